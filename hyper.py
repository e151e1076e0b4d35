"""HyPER: hybrid model-based inverse RL (Ren et al., "Hybrid Inverse Reinforcement Learning", arXiv 2402.08848).

Imitation as a game. The cost player learns a cost that is low on expert and high on learner transitions; the policy
player maximises softplus(-cost) with SAC in a learned model. The dynamics ensemble and the rollouts' start states are
hybrid: half expert, half learner. So the policy need not explore for every new cost: it starts where the expert was.
Here half of SAC's batch is real, and the actor's loss has a cloning term, too.

    python hyper.py --env-id Ant-v4 --bf16                 # --bf16: faster on a CPU with bfloat16 (see lscpu)
    python hyper.py --env-id Hopper-v4 --run-dir runs/a    # the same command again continues an interrupted run

Expected with ten demonstrations: first at 95% of the expert's return after 2,000 real steps on Hopper-v4, 2,000 to
6,000 on Walker2d-v4 and Ant-v4, 4,000 to 9,000 on HalfCheetah-v4, 50 to 100 ms a step on one core. More: docs/hyper.md
"""

import copy
import json
import math
import random
import re
import subprocess
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module, metadata
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "hyper"


@dataclass
class Args:
    env_id: str = "Ant-v4"  # gymnasium id; "dm_control/walker-walk-v0" or "my_module:MyEnv-v0" work too
    seed: int = 1
    total_timesteps: int = 20_000
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile: a minute at the start, then faster (docs/speed.md)
    bf16: bool = False  # hidden layers in bfloat16; only fast on CPUs with avx512_bf16 or amx_bf16 (see lscpu)
    track: bool = False  # to Weights & Biases, into the project that WANDB_PROJECT names
    run_dir: str | None = None  # folder; one that holds a run is continued (a larger --total-timesteps lengthens it)
    checkpoint_every: int = 1_000  # steps; a checkpoint is written at the end of an episode
    eval_every: int = 1_000
    eval_episodes: int = 5

    # Demonstrations
    demos: str | None = None  # .npz file of expert trajectories; default demos/<env_id>.npz
    num_demos: int = 10
    demo_subsample: int = 1  # use every k-th transition of them
    p_tremble: float = 0.0  # probability that a step takes a random action instead, also in evaluations of the run

    # Dynamics ensemble
    model_data: Literal["hybrid", "learner"] = "hybrid"  # of the fit: half expert, half learner, or the learner's alone
    model_members: int = 7
    model_elites: int = 5
    model_hidden_sizes: tuple[int, ...] = (200, 200, 200, 200)
    model_lr: float = 1e-3
    model_batch_size: int = 256
    model_every: int = 250  # steps between model fits, each followed by imagined rollouts
    model_first_batches: int = 1_500  # minibatches of the first fit, at most
    model_batches: int = 120  # of each later one
    model_patience: int = 10  # stop a fit (in effect the first) after so many epochs without progress on held-out data

    # Imagined rollouts
    expert_start_prob: float = 0.5  # probability that a rollout starts at an expert state instead of a learner state
    rollouts_per_step: int = 40  # that start at each fit, times model_every
    rollout_length: int = 1
    rollout_retain: int = 8  # model fits whose rollouts are kept
    rollout_noise: bool = False  # sample next states from the ensemble members' Gaussians instead of taking their means

    # Cost (discriminator)
    cost_hidden_sizes: tuple[int, ...] = (128, 128)
    cost_batch_size: int = 128  # of the expert, and of the learner
    cost_lr: float = 1e-4
    gp_coef: float = 10.0
    gp_target: float = 0.5  # gradient norm

    # SAC
    hidden_sizes: tuple[int, ...] = (128, 128)
    critic_hidden_sizes: tuple[int, ...] = (128, 128)
    learning_starts: int = 1_000  # steps of uniformly random actions before learning starts
    updates_per_step: int = 10
    batch_size: int = 256
    real_ratio: float = 0.25  # share of the learner's real transitions in a batch
    expert_ratio: float = 0.25  # share of the expert's; the rest is imagined
    bc_coef: float = 1_000.0  # weight of behaviour cloning of the batch's expert transitions in the actor's loss
    gamma: float = 0.99
    actor_lr: float = 3e-4  # of the temperature too
    critic_lr: float = 1e-3
    ema_steps: int = 2_000  # the evaluated actor is an average of the training actor over about so many steps
    reset_until: int = 10_000  # until then episodes are cut at the run's every 250th step, or robots learn lying down


# ---------------------------------------------------------------------------- environment, demonstrations, replay
def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """Environment with flat float32 observations, copied when they arrive, and actions in [-1, 1]."""
    env = gym.make(f"shimmy:{env_id}" if env_id.startswith("dm_control/") else env_id, render_mode=render_mode)
    box, env = env.action_space, gym.wrappers.FlattenObservation(env)
    if len(box.shape or ()) != 1 or not (env.spec.max_episode_steps or env_id.startswith("dm_control/")):
        raise SystemExit(f"{SCRIPT}.py: {env_id} needs a vector of actions and a time limit (max_episode_steps)")
    sizes = {"Ant": 27, "Humanoid": 45}  # positions and velocities, whatever a version of the robot adds behind them
    dim = sizes.get(env_id.split("-v")[0], env.observation_space.shape[0])
    space = gym.spaces.Box(-np.inf, np.inf, (dim,), np.float32)
    env = gym.wrappers.TransformObservation(env, lambda obs: np.array(obs[:dim], np.float32), space)
    env = gym.wrappers.TransformAction(env, lambda action: action.clip(box.low, box.high), box)  # of rounding errors
    env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    env = gym.wrappers.TransformReward(env, lambda reward: np.asarray(reward, float).item())
    return gym.wrappers.RecordEpisodeStatistics(env)


# When imagined rollouts end, bool [batch] of next_obs [batch, obs_dim]; or give your environment a method `terminates`.
NEVER = "HalfCheetah", "Swimmer", "Reacher", "Pusher", "Pendulum", "dm_control"
TERMINATION = dict.fromkeys(NEVER, lambda s: torch.zeros_like(s[:, 0], dtype=torch.bool)) | {
    "Hopper": lambda s: ~((s[:, 1:].abs() < 100).all(-1) & (s[:, 0] > 0.7) & (s[:, 1].abs() < 0.2)),
    "Walker2d": lambda s: ~((s[:, 0] > 0.8) & (s[:, 0] < 2.0) & (s[:, 1].abs() < 1.0)),
    "Ant": lambda s: ~((s[:, 0] >= 0.2) & (s[:, 0] <= 1.0)),
    "Humanoid": lambda s: ~((s[:, 0] >= 1.0) & (s[:, 0] <= 2.0)),
}


class Batch(NamedTuple):
    obs: Tensor  # [batch, obs_dim]
    actions: Tensor  # [batch, act_dim], in [-1, 1]
    rewards: Tensor  # [batch]
    next_obs: Tensor  # [batch, obs_dim]
    terminations: Tensor  # [batch], 1 where the episode ended; 0 at a time limit


def load_demos(path: str, env: gym.Env, num_demos: int, subsample: int, device: str, actions: bool = True) -> tuple:
    """Every `subsample`-th transition of a file's first trajectories (num_demos 0: of all), as a Batch with rewards 0,
    and without `actions` nan for those; the trajectories' ends, and their returns. Schema: demos/README.md"""
    box, dim, limit = env.unwrapped.action_space, env.observation_space.shape[0], env.spec.max_episode_steps
    shapes = dict(observations=(dim,), next_observations=(dim,), rewards=(), terminations=(), truncations=())
    shapes |= dict(actions=box.shape) if actions else {}
    try:
        with np.load(path) as file:
            about, n = json.loads(str(file.get("metadata", "{}"))), len(file["rewards"]) or 1
            data = {name: np.array(file[name], np.float64).reshape(n, *shape) for name, shape in shapes.items()}
    except Exception as error:
        raise SystemExit(f"{SCRIPT}.py: {path} is no .npz as in demos/README.md (has converters): {error!r}") from None
    taken = 2 * (data.get("actions", np.full((n, *box.shape), np.nan)) - box.low) / (box.high - box.low) - 1
    ended = (data["terminations"] > 0) | (data["truncations"] > 0)
    ends = np.flatnonzero(ended) + 1
    at_limit = (data["terminations"] > data["truncations"])[ends - 1][np.diff(ends, prepend=0) == limit].any()
    joined = np.isclose(data["next_observations"], np.roll(data["observations"], -1, 0), atol=1e-5).all(1)
    robot, here = (str(name).split(":")[-1].split("-v")[0] for name in (about.get("env_id", env.spec.id), env.spec.id))
    faults = {
        f"was recorded in {robot}, not in {here}": robot != here,
        "has numbers that are not finite": not all(np.isfinite(column).all() for column in data.values()),
        "lacks rows or marks of ends, or has next_observations of the next trajectory": (joined == ended)[:-1].any(),
        "terminates a trajectory at the time limit (truncations?)": at_limit,
        "has actions beyond the bounds or all in half of them (units?)": actions and not 0.5 < abs(taken).max() < 1.001,
    }
    for fault, found in faults.items():
        if found and not about.get("checked"):
            raise SystemExit(f"{SCRIPT}.py: {path} {fault}; if that is meant, its metadata must say checked")
    if len(ends) < max(num_demos, 1):
        raise SystemExit(f"{SCRIPT}.py: {path} has {len(ends)} marked ends of trajectories; fewer --num-demos?")
    ends = ends[: num_demos or None]
    columns = data["observations"], taken.clip(-1 + 1e-6, 1 - 1e-6), np.zeros(n), data["next_observations"]
    columns = [x[: ends[-1] : subsample] for x in (*columns, data["terminations"])]
    returns = np.add.reduceat(data["rewards"][: ends[-1]], [0, *ends[:-1]])
    return Batch(*(torch.as_tensor(x, dtype=torch.float32, device=device) for x in columns)), ends, returns


def concat(*batches: Batch, dim: int = 0) -> Batch:
    return Batch(*(torch.cat(fields, dim) for fields in zip(*batches, strict=True)))


def sample(data: Batch, *shape: int) -> Batch:
    """Transitions [*shape, ...], uniformly with replacement."""
    index = torch.randint(len(data.obs), (math.prod(shape),), device=data.obs.device)
    return Batch(*(field.index_select(0, index).unflatten(0, shape) for field in data))


class ReplayBuffer:
    """First-in-first-out buffer of transitions."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: str):
        shapes = Batch((obs_dim,), (act_dim,), (), (obs_dim,), ())
        self.data = Batch(*(torch.zeros(min(capacity, 1_000), *shape, device=device) for shape in shapes))
        self.capacity, self.pos, self.size = capacity, 0, 0

    def add(self, *transition) -> None:
        """obs [obs_dim], action [act_dim], reward, next_obs [obs_dim], termination."""
        if self.size == len(self.data.obs) < self.capacity:  # the storage doubles as it fills
            self.data = Batch(*(torch.cat([field, torch.zeros_like(field)])[: self.capacity] for field in self.data))
        for field, value in zip(self.data, transition, strict=True):
            field[self.pos] = torch.as_tensor(value)
        self.pos, self.size = (self.pos + 1) % self.capacity, min(self.size + 1, self.capacity)

    def all(self) -> Batch:
        return Batch(*(field[: self.size] for field in self.data))


# -------------------------------------------------------------------------------------------------- networks
class EnsembleMLP(nn.Module):
    """`n` independent MLPs in one: [n, batch, sizes[0]] -> [n, batch, sizes[-1]]. The output layer stays float32."""

    def __init__(self, n: int, sizes: list[int], activation=F.relu, layer_norm: bool = False):
        super().__init__()
        self.activation, self.layer_norm = activation, layer_norm
        self.weights = nn.ParameterList(torch.empty(n, i, o) for i, o in pairwise(sizes))
        self.biases = nn.ParameterList(torch.zeros(n, 1, o) for o in sizes[1:])
        for weight in self.weights:
            for member in weight:
                nn.init.xavier_uniform_(member)

    def forward(self, x: Tensor) -> Tensor:
        *hidden, (last_weight, last_bias) = zip(self.weights, self.biases, strict=True)
        for weight, bias in hidden:
            x = torch.bmm(x, weight)
            x = x + bias.to(x.dtype)  # under autocast a float32 bias would undo bfloat16
            x = self.activation(F.layer_norm(x, x.shape[-1:]) if self.layer_norm else x)
        with torch.autocast(x.device.type, enabled=False):  # in forms that a CPU does quickly for few outputs
            x, weight = x.to(last_weight.dtype), last_weight.mT
            return ((x * weight).sum(-1, keepdim=True) if weight.shape[1] == 1 else (weight @ x.mT).mT) + last_bias


class Normaliser(nn.Module):
    """Standardises inputs; the identity until it is fitted."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def fit(self, *sources: Tensor) -> None:
        """To data sets [n, dim] that all count the same, whatever their sizes."""
        self.mean.copy_(torch.stack([x.mean(0) for x in sources]).mean(0))
        std = torch.stack([(x - self.mean).square().mean(0) for x in sources]).mean(0).sqrt()
        self.std.copy_(torch.where(std < 1e-6, 1.0, std))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Actor(nn.Module):
    """Tanh-Gaussian policy."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        self.normalise = Normaliser(obs_dim)
        self.net = EnsembleMLP(1, [obs_dim, *hidden_sizes, 2 * act_dim])

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation before the tanh, [batch, act_dim] each."""
        mean, log_std = self.net(self.normalise(obs)[None])[0].chunk(2, -1)
        return mean, log_std.clamp(-20, 2)

    def sample(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [batch, act_dim] from standard normal noise [batch, act_dim], and their log-probabilities [batch]."""
        mean, log_std = self(obs)
        raw = mean + log_std.exp() * noise
        log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob - 2 * (math.log(2) - raw - F.softplus(-2 * raw))  # log(1 - tanh(raw)^2), without overflow
        return raw.tanh(), log_prob.sum(-1)

    @torch.no_grad()
    def act(self, obs: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """Action [act_dim] at an observation [obs_dim]."""
        mean, log_std = self(torch.as_tensor(obs, device=self.net.weights[0].device)[None])
        raw = mean if deterministic else mean + log_std.exp() * torch.randn_like(mean)
        return raw.tanh()[0].cpu().numpy()


class Critic(nn.Module):
    """Twin Q functions whose batch normalisation makes target networks needless (CrossQ, arXiv 1902.05605)."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        sizes = [obs_dim + act_dim, *hidden_sizes]
        self.net = EnsembleMLP(2, [*sizes, 1])
        self.norms = nn.ModuleList(nn.BatchNorm1d(2 * size, momentum=0.01) for size in sizes)

    def forward(self, obs: Tensor, actions: Tensor, train: bool = False) -> Tensor:
        """[2, batch]. Normalises by this batch's statistics if `train`, otherwise by running averages of them."""
        x = torch.cat([obs, actions], -1).expand(2, -1, -1)
        for i, norm in enumerate(self.norms):
            if i > 0:
                x = F.relu(torch.baddbmm(self.net.biases[i - 1], x, self.net.weights[i - 1]))
            x = x.transpose(0, 1).flatten(1)  # both networks side by side: [batch, 2 * size]
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, train, norm.momentum)
            x = x.unflatten(1, (2, -1)).transpose(0, 1)
        with torch.autocast(x.device.type, enabled=False):  # the output stays float32
            return (x.float() * self.net.weights[-1].mT).sum(-1) + self.net.biases[-1].squeeze(-1)


class Adam:
    """Adam in plain tensor operations (epsilon not bias-corrected): torch.compile makes one graph of an update."""

    def __init__(self, params, lr: float, beta1: float = 0.9, weight_decay: float = 0.0):
        self.params, self.lr, self.beta1, self.weight_decay = list(params), lr, beta1, weight_decay
        self.mean, self.square = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.t = torch.zeros((), device=self.params[0].device)
        self.scale = torch.zeros_like(self.t)

    @torch.no_grad()
    def step(self, grads) -> None:
        if self.weight_decay:
            grads = torch._foreach_add(grads, self.params, alpha=self.weight_decay)
        self.t += 1
        torch._foreach_lerp_(self.mean, grads, 1 - self.beta1)
        torch._foreach_lerp_(self.square, torch._foreach_mul(grads, grads), 0.001)
        self.scale.copy_(self.lr * (1 - 0.999**self.t).sqrt() / (1 - self.beta1**self.t))  # kept, or computed often
        root = torch._foreach_add(torch._foreach_sqrt(self.square), 1e-8)
        torch._foreach_sub_(self.params, torch._foreach_mul(torch._foreach_div(self.mean, root), self.scale))


class Agent(nn.Module):
    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, act_dim, args.hidden_sizes)
        self.ema_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic = Critic(obs_dim, act_dim, args.critic_hidden_sizes)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(0.2)))
        self.to(args.device)
        self.actor_optimizer = Adam(self.actor.parameters(), args.actor_lr, beta1=0.5)
        self.critic_optimizer = Adam(self.critic.parameters(), args.critic_lr, beta1=0.5)
        self.alpha_optimizer = Adam([self.log_alpha], args.actor_lr)


class EnsembleDynamics(nn.Module):
    """Probabilistic ensemble (PETS, MBPO): each member predicts a Gaussian over next_obs - obs."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.net = EnsembleMLP(args.model_members, [obs_dim + act_dim, *args.model_hidden_sizes, 2 * obs_dim], F.silu)
        for weight in self.net.weights:
            std = 0.5 * weight.shape[1] ** -0.5
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        self.normalise = Normaliser(obs_dim + act_dim)
        self.register_buffer("elites", torch.arange(args.model_elites))
        self.to(args.device)
        self.optimizer = Adam(self.net.parameters(), args.model_lr, weight_decay=5e-5)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [members, batch, obs_dim] of inputs [members, batch, obs_dim + act_dim]."""
        mean, log_var = self.net(self.normalise(inputs)).chunk(2, -1)
        log_var = 0.5 - F.softplus(0.5 - log_var)  # smoothly between -10 and 0.5
        return mean, F.softplus(log_var + 10) - 10

    def elites_forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """As forward, of the elites alone: [elites, batch, ...]."""
        params = {name: param[self.elites] for name, param in self.named_parameters()}
        return torch.func.functional_call(self, params, (inputs,))

    @torch.no_grad()
    def sample(self, obs: Tensor, actions: Tensor, noise: bool) -> Tensor:
        """next_obs [batch, obs_dim]; the elites share the rows out at random, in equal parts (TS1)."""
        n, k = len(obs), len(self.elites)
        order = torch.randperm(n, device=obs.device)
        shares = order[torch.arange(-(-n // k) * k, device=obs.device) % n].view(k, -(-n // k))
        mean, log_var = self.elites_forward(torch.cat([obs, actions], -1)[shares])
        delta = mean + (0.5 * log_var).exp() * torch.randn_like(mean) if noise else mean
        return obs + torch.empty_like(obs).index_copy_(0, order, delta.flatten(0, 1)[:n])


class Cost(nn.Module):
    """The learned cost f(s, a), low on expert and high on learner transitions."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.normalise, self.bf16 = Normaliser(obs_dim + act_dim), args.bf16
        self.net = EnsembleMLP(1, [obs_dim + act_dim, *args.cost_hidden_sizes, 1])
        self.to(args.device)
        self.optimizer = Adam(self.net.parameters(), args.cost_lr)

    def forward(self, inputs: Tensor) -> Tensor:
        """f [batch] of normalised inputs [batch, obs_dim + act_dim]."""
        return self.net(inputs[None])[0, :, 0]

    @torch.no_grad()
    def reward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """softplus(-f) up to 10, what the policy maximises, [...] at obs [..., obs_dim] and actions [..., act_dim]."""
        inputs = self.normalise(torch.cat([obs, actions], -1))
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            return F.softplus(-self(inputs.flatten(0, -2))).clamp(max=10).view(inputs.shape[:-1])


# ---------------------------------------------------------------------------------------------------- losses
def critic_loss(agent: Agent, batch: Batch, noise: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """Soft Bellman error of both critics, and the mean Q. Next values are at least 0, as rewards are."""
    with torch.autocast(batch.obs.device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False):
        with torch.no_grad():
            next_actions, next_log_prob = agent.actor.sample(batch.next_obs, noise)
        both = torch.cat([batch.obs, batch.next_obs]), torch.cat([batch.actions, next_actions])
        q, next_q = agent.critic(*both, train=True).chunk(2, 1)  # together: the statistics cover both
        next_value = next_q.detach().amin(0) - agent.log_alpha.detach().exp() * next_log_prob
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_value.clamp(min=0)
    return (q - target).square().mean(1).sum(), q.detach().mean()


def actor_loss(agent: Agent, batch: Batch, expert: Batch, noise: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """alpha log pi(a|s) - Q(s, a), plus behaviour cloning of the expert's actions, and the policy's entropy."""
    with torch.autocast(batch.obs.device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False):
        actions, log_prob = agent.actor.sample(batch.obs, noise)
        q = agent.critic(batch.obs, actions).amin(0)
        loss = (agent.log_alpha.exp().detach() * log_prob - q).mean()
        if args.bc_coef and len(expert.obs):
            loss = loss + args.bc_coef * F.mse_loss(agent.actor(expert.obs)[0].tanh(), expert.actions)
    return loss, -log_prob.detach().mean()


def dynamics_loss(dynamics: EnsembleDynamics, inputs: Tensor, targets: Tensor, args: Args) -> Tensor:
    """Gaussian negative log-likelihood, summed over members."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False):
        mean, log_var = dynamics(inputs)
    return ((mean - targets).square() * (-log_var).exp() + log_var).mean((1, 2)).sum()


def cost_loss(cost: Cost, expert: Batch, learner: Batch, mix: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """Moment matching with a gradient penalty at mix [batch, 1] between expert and learner; the learner's mean f."""
    expert_inputs, learner_inputs = (cost.normalise(torch.cat([b.obs, b.actions], -1)) for b in (expert, learner))
    f_expert, f_learner = cost(expert_inputs), cost(learner_inputs)
    between = mix * expert_inputs + (1 - mix) * learner_inputs
    gradient = torch.func.grad(lambda x: cost(x).sum())(between)
    penalty = ((gradient.square().sum(-1) + 1e-12).sqrt() - args.gp_target).square().mean()
    return f_expert.mean() - f_learner.mean() + args.gp_coef * penalty, f_learner.detach().mean()


def sac_update(agent: Agent, cost: Cost, batch: Batch, expert: Batch, noise: Tensor, args: Args) -> dict[str, Tensor]:
    """One gradient step of critics, actor and temperature; noise [2, batch, act_dim] is normal. Returns metrics."""
    batch = batch._replace(rewards=cost.reward(batch.obs, batch.actions))  # of the current cost
    q_loss, q = critic_loss(agent, batch, noise[0], args)
    agent.critic_optimizer.step(torch.autograd.grad(q_loss, agent.critic_optimizer.params))
    pi_loss, entropy = actor_loss(agent, batch, expert, noise[1], args)
    agent.actor_optimizer.step(torch.autograd.grad(pi_loss, agent.actor_optimizer.params))
    agent.alpha_optimizer.step([entropy + noise.shape[-1]])  # gradient of log_alpha (entropy + act_dim)
    metrics = dict(critic=q_loss, actor=pi_loss, q=q, entropy=entropy, alpha=agent.log_alpha.exp())
    return {f"losses/{name}": value.detach() for name, value in metrics.items()}


def dynamics_update(dynamics: EnsembleDynamics, inputs: Tensor, targets: Tensor, args: Args) -> None:
    """One gradient step of all members, on inputs and targets [members, batch, ...]."""
    loss = dynamics_loss(dynamics, inputs, targets, args)
    dynamics.optimizer.step(torch.autograd.grad(loss, dynamics.optimizer.params))


def cost_update(cost: Cost, expert: Batch, learner: Batch, mix: Tensor, args: Args) -> Tensor:
    loss, learner_mean = cost_loss(cost, expert, learner, mix, args)
    cost.optimizer.step(torch.autograd.grad(loss, cost.optimizer.params))
    with torch.no_grad():  # the loss leaves f free up to a constant: keep the learner's mean at 0
        cost.net.biases[-1].sub_(learner_mean / cost.optimizer.t.clamp(max=100))  # a running mean
    return loss.detach()


def pick_device(args: Args) -> Args:
    """The settings with a choice in place of each "auto", which is printed."""
    device = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    choice = args.compile.replace("auto", "on" if args.total_timesteps >= 10_000 else "off")  # it takes a minute
    try:
        torch.compile(torch.sin, disable=choice == "off")(torch.ones(8, device=device))
    except Exception as error:
        choice = "off"
        print(f"{SCRIPT}.py: torch.compile fails: {error!r:.200}")
    print(f"{SCRIPT}.py: --device {device} --compile {choice}")
    return replace(args, device=device, compile=choice)


def compiled(function, args: Args, loop=None):
    """The update, or loop(update, *inputs). The compiler sees one update; a CUDA graph holds the whole loop."""
    torch._dynamo.config.trace_autograd_ops = True
    function = torch.compile(function, dynamic=False) if args.compile == "on" else function
    function = partial(loop, function) if loop else function
    if args.compile == "off" or args.device != "cuda":
        return function
    torch._inductor.config.loop_ordering_after_fusion = False  # torch 2.11 stops otherwise
    return import_module("tensordict.nn").CudaGraphModule(function, warmup=3)


# ----------------------------------------------------------------------------------------------------- model
def fit_dynamics(dynamics: EnsembleDynamics, update, data: Batch, weights: Tensor, limit: int, args: Args) -> float:
    """Fits each member to its own bootstrap of the data, drawn in proportion to weights [n].

    A fifth is held out. Kept are the weights of the last epoch in which any member improved by 1% on it; elites are the
    members of the least errors, each its best one. At most `limit` minibatches. Returns the mean of these errors.
    """
    inputs, targets = torch.cat([data.obs, data.actions], -1), data.next_obs - data.obs
    dynamics.normalise.fit(inputs)
    order = torch.randperm(len(inputs), device=inputs.device)
    held_out, train = order[: len(order) // 5], order[len(order) // 5 :]
    draws = torch.multinomial(weights[train].expand(args.model_members, -1), len(train), replacement=True)

    @torch.no_grad()
    def validate() -> Tensor:  # [members]
        mean, _ = dynamics(inputs[held_out].expand(args.model_members, -1, -1))
        errors = (mean - targets[held_out]).square().mean(-1)
        return (errors * weights[held_out]).sum(-1) / weights[held_out].sum()

    best_error, best_net = validate(), dynamics.net.state_dict()  # no copy: without progress the last weights stay
    size, batches, epochs_since_best = min(args.model_batch_size, len(train)), 0, 0
    while batches < limit and epochs_since_best < args.model_patience:
        for columns in torch.randperm(len(train), device=inputs.device).split(size):
            if len(columns) < size or batches == limit:  # all minibatches have one size
                break
            rows = train[draws[:, columns]]  # [members, batch]
            update(dynamics, inputs[rows], targets[rows], args)
            batches += 1
        error = validate()
        epochs_since_best += 1
        if (error < 0.99 * best_error).any():
            best_error, epochs_since_best = torch.minimum(error, best_error), 0
            best_net = copy.deepcopy(dynamics.net.state_dict())
    dynamics.net.load_state_dict(best_net)
    dynamics.elites.copy_(best_error.argsort()[: args.model_elites])
    return best_error.mean().item()


@torch.no_grad()
def imagine(dynamics: EnsembleDynamics, actor: Actor, obs: Tensor, length: int, terminates, args: Args) -> Batch:
    """Rolls the policy out in the model. Rewards stay 0: the current cost's are filled in when a batch is drawn."""
    act_dim, steps = actor.net.biases[-1].shape[-1] // 2, []
    for _ in range(length):
        actions, _ = actor.sample(obs, torch.randn(len(obs), act_dim, device=obs.device))
        next_obs = dynamics.sample(obs, actions, args.rollout_noise)
        done, finite = terminates(next_obs), next_obs.isfinite().all(-1)
        step = Batch(obs, actions, torch.zeros(len(obs), device=obs.device), next_obs, done.float())
        steps.append(Batch(*(field[finite] for field in step)))
        obs = next_obs[finite & ~done]
    return concat(*steps)


@torch.no_grad()
def model_error(dynamics: EnsembleDynamics, real: Batch, length: int) -> Tensor:
    """Root mean square error of `length` predicted steps along real transitions [n, ...], in standard deviations."""
    n = max(len(real.obs) - length + 1, 0)
    obs, unbroken = real.obs[:n], torch.ones(n, dtype=torch.bool, device=real.obs.device)
    for k in range(length):
        inputs = torch.cat([obs, real.actions[k : k + n]], -1).expand(len(dynamics.elites), -1, -1)
        obs = obs + dynamics.elites_forward(inputs)[0].mean(0)
        if k:  # the next transition belongs to the same episode
            unbroken &= (real.next_obs[k - 1 : k - 1 + n] == real.obs[k : k + n]).all(-1)
    error = (obs - real.next_obs[length - 1 :]) / real.obs.std(0).clamp(min=1e-6)
    return error[unbroken].square().mean().sqrt()


# ------------------------------------------------------------------------------------- evaluation and logging
def evaluate(actor: Actor, env: gym.Env, episodes: int, seed: int) -> dict[str, float]:
    """Deterministic episodes of the true reward. Draws no random numbers from the training run's generator."""
    results = []
    for episode in range(episodes):
        (obs, info), success = env.reset(seed=seed + episode), math.nan
        while "episode" not in info:
            obs, _, _, _, info = env.step(actor.act(obs, deterministic=True))
            success = np.fmax(success, np.asarray(info.get("success", info.get("is_success")), float).max())
        results.append((info["episode"]["r"], info["episode"]["l"], success))
    returns, lengths, successes = np.array(results, float).T
    rate = math.nan if np.isnan(successes).all() else np.nan_to_num(successes).mean()  # no report counts as no success
    result = dict(eval_return_mean=returns.mean(), eval_return_std=returns.std())
    return result | dict(eval_length_mean=lengths.mean(), eval_success_rate=rate)


def log_row(run_dir: Path, rows: list[dict], writer: SummaryWriter) -> None:
    """Writes progress.csv, and its last row to TensorBoard."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    (run_dir / "progress.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    for name, value in rows[-1].items():
        writer.add_scalar(name.replace("eval_", "eval/"), value, rows[-1]["env_steps"])


def save_checkpoint(run_dir: Path, state: dict) -> None:
    """Writes to a temporary file first: an interruption leaves the previous checkpoint as it was."""
    state |= dict(rng=torch.get_rng_state(), cuda_rng=torch.cuda.get_rng_state_all())
    torch.save(state, run_dir / "checkpoint.tmp")
    (run_dir / "checkpoint.tmp").replace(run_dir / "checkpoint.pt")


def open_run(args: Args) -> tuple[Path, dict]:
    """The run's folder with args.json (settings, versions, commit), and its last checkpoint, {} if there is none."""
    name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{SCRIPT}__{args.seed}__{int(time.time())}"
    run_dir, settings = Path(args.run_dir or f"runs/{name}"), json.loads(json.dumps(asdict(args)))
    if args.track:
        import_module("wandb").init(id=run_dir.name, resume="allow", config=settings, sync_tensorboard=True)
    run_dir.mkdir(parents=True, exist_ok=args.run_dir is not None)
    file, checkpoint = run_dir / "args.json", run_dir / "checkpoint.pt"
    old = settings | (json.loads(file.read_text())["args"] if file.exists() else {})
    for name, new in settings.items():
        fits = new == old[name] or name in ("run_dir", "compile") or (name == "total_timesteps" and new > old[name])
        if not fits:
            raise SystemExit(f"{SCRIPT}.py: --{name.replace('_', '-')} was {old[name]} in {run_dir}, now it is {new}")
    status, commit = subprocess.getstatusoutput("git describe --always --dirty --abbrev=40 --exclude='*'")
    about = dict(script=SCRIPT, args=settings, commit=None if status else commit)
    about |= {name: metadata.version(name) for name in ("torch", "gymnasium", "mujoco", "numpy")}
    file.write_text(json.dumps(about | dict(gpu=args.device == "cuda" and torch.cuda.get_device_name()), indent=2))
    state = torch.load(checkpoint, weights_only=False) if checkpoint.exists() else {}
    print(f"{SCRIPT}.py: {run_dir} {'continues' if state else 'begins'}")
    torch.set_rng_state(state.get("rng", torch.get_rng_state()))
    torch.cuda.set_rng_state_all(state.get("cuda_rng", []))
    return run_dir, state


# -------------------------------------------------------------------------------------------------- training
def train(args: Args) -> list[dict]:
    """HyPER. Returns the rows of progress.csv."""
    args = pick_device(args)
    torch.set_num_threads(1)  # run several seeds side by side instead
    torch.set_flush_denormal(True)  # weight decay drives unused weights towards 0, where arithmetic is slow
    for set_seed in (torch.manual_seed, random.seed, np.random.seed):  # environments may draw from the last two
        set_seed(args.seed % 2**32)
    env, eval_env = make_env(args.env_id), make_env(args.env_id)
    if args.p_tremble:
        env, eval_env = (import_module("envs.wrappers").TremblingHand(x, args.p_tremble) for x in (env, eval_env))
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    demos = args.demos or f"demos/{args.env_id.replace('/', '-')}.npz"
    expert, ends, returns = load_demos(demos, env, args.num_demos, args.demo_subsample, args.device)
    terminates = getattr(env.unwrapped, "terminates", TERMINATION.get(re.split("-v|/", args.env_id)[0]))
    if terminates is None:
        raise SystemExit(f"{SCRIPT}.py: when do imagined rollouts of {args.env_id} end? Give it `terminates`")
    done = terminates(expert.next_obs)
    if done.dtype != torch.bool or not torch.equal(done, expert.terminations.bool()):
        raise SystemExit(f"{SCRIPT}.py: `terminates` must be bool [n] and agree with the demonstrations")
    run_dir, state = open_run(args)
    agent = state.get("agent") or Agent(obs_dim, act_dim, args)
    dynamics = state.get("dynamics") or EnsembleDynamics(obs_dim, act_dim, args)
    cost = state.get("cost") or Cost(obs_dim, act_dim, args)
    buffer = state.get("buffer") or ReplayBuffer(1_000_000, obs_dim, act_dim, args.device)
    rollouts = state.get("rollouts") or deque(maxlen=args.rollout_retain)
    imagined = concat(*rollouts) if rollouts else None
    times = torch.cat([torch.arange(n, device=args.device) for n in np.diff(ends, prepend=0)])[:: args.demo_subsample]
    visits = state.get("visits", torch.full_like(expert.rewards, 1e-6))  # of the learner within 12 steps of those times
    rows, metrics, start_step = state.get("rows", []), state.get("metrics", {}), state.get("step", 0)
    start_time = time.time() - state.get("wall_time", 0)
    update, update_dynamics, update_cost = (compiled(f, args) for f in (sac_update, dynamics_update, cost_update))
    writer = SummaryWriter(str(run_dir), purge_step=start_step)
    obs, _ = env.reset(seed=(env_seed := hash((args.seed, start_step)) % 2**31))
    if not np.array_equal(obs, state.get("obs", obs)):
        print(f"{SCRIPT}.py: {args.env_id} keeps state that no reset restores; uninterrupted, the run would differ")

    bar = tqdm(range(start_step, args.total_timesteps + 1), initial=start_step, total=args.total_timesteps)
    for step in bar:
        if step % args.eval_every == 0 or step == args.total_timesteps:
            row = dict(env_steps=step, wall_time_s=round(time.time() - start_time, 1), expert_return=returns.mean())
            row |= evaluate(agent.ema_actor, eval_env, args.eval_episodes, seed=args.seed * 1_000_000 + step)
            rows.append(row | {name: float(value) for name, value in metrics.items()})
            log_row(run_dir, rows, writer)
            policy = dict(actor=agent.ema_actor.state_dict(), sizes=(obs_dim, act_dim, args.hidden_sizes))
            torch.save(policy | dict(script=SCRIPT, env_id=args.env_id), run_dir / "policy.pt")
            bar.set_postfix_str(f"return {row['eval_return_mean']:.0f} of {returns.mean():.0f}")
        if step == args.total_timesteps:
            break

        # Act: at random at first, then as the policy does, in half of the episodes (their seeds tell) without noise
        quiet = env_seed < 2**30
        action = agent.actor.act(obs, quiet) if step >= args.learning_starts else 2 * torch.rand(act_dim).numpy() - 1
        next_obs, _, terminated, truncated, _ = env.step(action)
        buffer.add(obs, action, 0.0, next_obs, terminated)  # a time limit is no termination
        obs, learner, t = next_obs, buffer.all(), env.get_wrapper_attr("episode_lengths") - 1
        visits += F.normalize(((times - t).abs() < 13).float(), p=1, dim=0)
        learning_step = step + 1 - max(args.learning_starts, 1)

        if learning_step == 0:
            cost.normalise.fit(*(torch.cat([data.obs, data.actions], -1) for data in (expert, learner)))
            for network in (agent.actor, agent.ema_actor):
                network.normalise.fit(expert.obs, learner.obs)

        # Model: fit it to expert and learner transitions (hybrid), then imagine rollouts from states of both
        if learning_step >= 0 and learning_step % args.model_every == 0:
            sources = [learner, expert] if args.model_data == "hybrid" else [learner]
            weights = torch.cat([torch.full_like(data.rewards, 1 / len(data.obs)) for data in sources])
            max_batches = args.model_batches if rollouts else args.model_first_batches
            bar.set_postfix_str(f"model fit on {len(weights)}")
            hold_out = fit_dynamics(dynamics, update_dynamics, concat(*sources), weights, max_batches, args)
            n = args.rollouts_per_step * args.model_every
            from_expert = torch.rand(n, 1, device=args.device) < args.expert_start_prob
            starts = torch.where(from_expert, sample(expert, n).obs, sample(learner, n).obs)
            rollouts.append(imagine(dynamics, agent.actor, starts, args.rollout_length, terminates, args))
            imagined = concat(*rollouts)
            recent = Batch(*(field[-1_000:] for field in learner))
            metrics |= {f"model/error_{k}_steps": model_error(dynamics, recent, k) for k in (1, 5)}
            inputs = torch.cat([recent.obs, recent.actions], -1).expand(args.model_elites, -1, -1)
            metrics["model/hold_out_mse"] = hold_out
            metrics["model/disagreement"] = dynamics.elites_forward(inputs)[0].detach().std(0).mean()

        # Policy: SAC on real, expert and imagined transitions, with the current cost's rewards
        if learning_step >= 0:
            n_real, n_expert = round(args.real_ratio * args.batch_size), round(args.expert_ratio * args.batch_size)
            for _ in range(args.updates_per_step):
                expert_batch = sample(expert, n_expert)
                imagined_batch = sample(imagined, args.batch_size - n_real - n_expert)
                batch = concat(sample(learner, n_real), expert_batch, imagined_batch)
                noise = torch.randn(2, args.batch_size, act_dim, device=args.device)
                metrics |= update(agent, cost, batch, expert_batch, noise, args)
            with torch.no_grad():  # an average over a quarter of the steps so far, at most ema_steps
                weight, moved = 1 / min(args.ema_steps, 1 + learning_step / 4), list(agent.ema_actor.parameters())
                torch._foreach_lerp_(moved, list(agent.actor.parameters()), weight)

            # Cost: raised on learner rows, lowered on expert rows of times that the learner has reached, or starts cost
            index = torch.multinomial(visits, args.cost_batch_size, replacement=True)
            cost_expert, cost_learner = Batch(*(x[index] for x in expert)), sample(learner, args.cost_batch_size)
            mix = torch.rand(args.cost_batch_size, 1, device=args.device)
            metrics["losses/cost"] = update_cost(cost, cost_expert, cost_learner, mix, args)
            if step % 100 == 0:
                means = [cost.reward(obs[-1_000:], a[-1_000:]).mean() for obs, a, *_ in (cost_expert, learner)]
                metrics |= {"reward/expert": means[0], "reward/learner": means[1], "reward/gap": means[0] - means[1]}

        if terminated or truncated or (step < args.reset_until and (step + 1) % 250 == 0):
            obs, _ = env.reset(seed=(env_seed := hash((args.seed, step + 1)) % 2**31))
            if not all(math.isfinite(value) for name, value in metrics.items() if "losses" in name):
                raise SystemExit(f"{SCRIPT}.py: a loss is not finite at step {step}: {metrics}")
            if step + 1 - state.get("step", 0) >= args.checkpoint_every:  # between episodes: resuming is exact
                state = dict(agent=agent, dynamics=dynamics, cost=cost, buffer=buffer, rollouts=rollouts, rows=rows)
                state |= dict(visits=visits, metrics=metrics, obs=obs, step=step + 1)
                save_checkpoint(run_dir, state | dict(wall_time=time.time() - start_time))

    writer.close()
    return rows


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
