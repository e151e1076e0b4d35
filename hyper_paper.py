"""HyPER as its authors released it (Ren et al., "Hybrid Inverse Reinforcement Learning", arXiv 2402.08848).

hyper.py is our HyPER; this is the published one, for comparison. An ensemble of costs takes one step along the
gradient's sign a round, on fresh episodes. SAC takes steps of optimistic Adam, on imagined transitions alone.

    python hyper_paper.py --env-id Hopper-v4 --num-demos 10                 # settings of this robot, see TUNED below
    python hyper_paper.py --env-id Ant-v4 --num-demos 10 --run-dir runs/a   # the same command again continues it

Expected: unknown, no robot has been trained to the end. Hopper takes 5 seconds a step, 220 hours in all, on one core.
Each piece was held against the authors' code instead; how, and what still differs: docs/hyper_paper.md
"""

import copy
import json
import math
import random
import re
import subprocess
import time
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

from envs.wrappers import TremblingHand

SCRIPT = "hyper_paper"


@dataclass
class Args:
    env_id: str = "Ant-v4"  # gymnasium id; "dm_control/walker-walk-v0" or "my_module:MyEnv-v0" work too
    seed: int = 1
    total_timesteps: int = 151_000  # the steps of the cost's rollouts come on top; env_steps counts both
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile: a minute at the start, then faster (docs/speed.md)
    track: bool = False  # to Weights & Biases, into the project that WANDB_PROJECT names
    run_dir: str | None = None  # folder; one that holds a run is continued (a larger --total-timesteps lengthens it)
    checkpoint_every: int = 1_000  # training steps; a checkpoint (up to 3 GB) is written at the end of an episode
    eval_every: int = 10_000
    eval_episodes: int = 10

    # Environment and demonstrations
    p_tremble: float = 0.01  # probability that a step, of evaluation too, executes a random action
    reset_every: int = 1_000  # cut training episodes at multiples of this many steps
    demos: str | None = None  # .npz file of expert trajectories; default demos/<env_id>.npz
    num_demos: int = 64

    # Dynamics ensemble and imagined rollouts
    model_members: int = 7
    model_elites: int = 5
    model_hidden_sizes: tuple[int, ...] = (400, 400, 400, 400)
    model_lr: float = 3e-4
    model_cosine: int = 0  # half the period of the step size's cosine, in minibatches; 0 for a constant step size
    model_batch_size: int = 256
    model_every: int = 125  # training steps between model fits, each followed by imagined rollouts
    model_patience: int = 10  # stop a fit after so many epochs without improvement on held-out data
    output_clamp: float | None = None  # bound of the model's predicted mean changes and of the cost
    rollouts_per_step: int = 400
    rollout_length: tuple[int, int] = (1, 25)
    rollout_epochs: tuple[int, int] = (20, 100)  # the length grows between these two epochs of 1,000 training steps

    # Cost
    cost_members: int = 7
    cost_hidden_sizes: tuple[int, ...] = (256, 256)
    cost_lr: float = 8e-4
    cost_weight_decay: float = 0.0
    cost_every: int = 1_000  # training steps between rounds of one gradient step
    cost_episodes: int = 4
    cost_batch_size: int = 4_096

    # SAC
    hidden_sizes: tuple[int, ...] = (512, 512)
    learning_starts: int = 1_000  # steps of the untrained policy before learning starts
    updates_per_step: int = 30
    update_every: int = 1  # steps
    batch_size: int = 256
    gamma: float = 0.99
    tau: float = 0.005
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    lr_sawtooth: int = 0  # updates in which these two rates fall to 0, unless a cost round restarts them; 0: constant
    alpha: float = 1.0
    alpha_lr: float = 3e-4  # 0 for a fixed temperature
    target_entropy: float | None = None  # default: minus the action dimension


# The authors' settings of each robot; a flag on the command line beats them. HalfCheetah is not among theirs.
WIDE = dict(hidden_sizes=(1024, 1024), actor_lr=1e-4, critic_lr=1e-4)
CLAMPED = dict(alpha=0.2, alpha_lr=0.0, output_clamp=40.0, cost_weight_decay=5e-5)
SLOW = dict(updates_per_step=20, update_every=2, lr_sawtooth=10_000)
WALKER = WIDE | CLAMPED | SLOW | dict(model_hidden_sizes=(200, 200, 200, 200), model_cosine=30_000)
TUNED = {
    "Hopper": dict(target_entropy=1.0),
    "Walker2d": WALKER,
    "HalfCheetah": WALKER,
    "Ant": WIDE | CLAMPED | dict(cost_every=200, reset_every=200),
    # Their target of -17 is for actions in [-0.4, 0.4]; in [-1, 1] the same entropy is -17 - 17 ln 0.4.
    "Humanoid": WIDE | SLOW | dict(alpha_lr=1e-4, target_entropy=-1.42, rollout_epochs=(20, 300), p_tremble=0.025),
}


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


class Actor(nn.Module):
    """Tanh-Gaussian policy."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        self.net = EnsembleMLP(1, [obs_dim, *hidden_sizes, 2 * act_dim])

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation before the tanh, [batch, act_dim] each."""
        mean, log_std = self.net(obs[None])[0].chunk(2, -1)
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


def twin_q(critic: EnsembleMLP, obs: Tensor, actions: Tensor) -> Tensor:
    """Both critics' Q values [2, batch]."""
    return critic(torch.cat([obs, actions], -1).expand(2, -1, -1)).squeeze(-1)


class OptimisticAdam:
    """Adam that takes its last step back and makes the new one twice: p <- p + s d(t-1) - 2 s d(t), d its direction."""

    def __init__(self, params, weight_decay: float = 0.0, optimistic: bool = True):
        self.params, self.weight_decay, self.optimistic = list(params), weight_decay, optimistic
        self.mean, self.square = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.t = torch.zeros((), device=self.params[0].device)
        self.scale = torch.zeros_like(self.t)

    def direction(self) -> list[Tensor]:
        return torch._foreach_div(self.mean, torch._foreach_add(torch._foreach_sqrt(self.square), 1e-8))

    @torch.no_grad()
    def step(self, grads, lr: Tensor | float) -> None:
        # In plain tensor operations: torch.compile makes one graph of a whole update.
        if self.weight_decay:
            grads = torch._foreach_add(grads, self.params, alpha=self.weight_decay)
        last = self.direction() if self.optimistic else None
        self.t += 1
        torch._foreach_lerp_(self.mean, grads, 0.1)
        torch._foreach_lerp_(self.square, torch._foreach_mul(grads, grads), 0.001)
        self.scale.copy_(lr * (1 - 0.999**self.t).sqrt() / (1 - 0.9**self.t))  # kept, or the compiler repeats it
        change = self.direction()
        if self.optimistic:
            change = torch._foreach_sub(torch._foreach_mul(change, 2.0), last)
        torch._foreach_sub_(self.params, torch._foreach_mul(change, self.scale))

    def restart(self) -> None:
        torch._foreach_zero_([*self.mean, *self.square, self.t])


class Agent(nn.Module):
    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, act_dim, args.hidden_sizes)
        self.critic = EnsembleMLP(2, [obs_dim + act_dim, *args.hidden_sizes, 1])
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))
        self.target_entropy = -act_dim if args.target_entropy is None else args.target_entropy
        self.to(args.device)
        self.actor_optimizer = OptimisticAdam(self.actor.parameters())
        self.critic_optimizer = OptimisticAdam(self.critic.parameters())
        self.alpha_optimizer = OptimisticAdam([self.log_alpha], optimistic=False)


class Dynamics(nn.Module):
    """Probabilistic ensemble (PETS, MBPO): each member predicts a Gaussian over next_obs - obs."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.clamp = args.output_clamp
        self.net = EnsembleMLP(args.model_members, [obs_dim + act_dim, *args.model_hidden_sizes, 2 * obs_dim], F.silu)
        for weight in self.net.weights:
            std = 0.5 * weight.shape[1] ** -0.5
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        self.register_buffer("mean", torch.zeros(obs_dim + act_dim))  # of the inputs
        self.register_buffer("std", torch.ones(obs_dim + act_dim))
        self.register_buffer("elites", torch.arange(args.model_elites))
        self.to(args.device)
        self.optimizer = OptimisticAdam(self.net.parameters(), weight_decay=5e-5, optimistic=False)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [members, batch, obs_dim] of inputs [members, batch, obs_dim + act_dim]."""
        mean, log_var = self.net((inputs - self.mean) / self.std).chunk(2, -1)
        mean = mean if self.clamp is None else mean.clamp(-self.clamp, self.clamp)
        log_var = 0.5 - F.softplus(0.5 - log_var)  # smoothly between -10 and 0.5
        return mean, F.softplus(log_var + 10) - 10

    @torch.no_grad()
    def sample(self, obs: Tensor, actions: Tensor) -> Tensor:
        """next_obs [batch, obs_dim]; the elites share the rows out at random, in equal parts (TS1)."""
        n, k = len(obs), len(self.elites)
        order = torch.randperm(n, device=obs.device)
        shares = order[torch.arange(-(-n // k) * k, device=obs.device) % n].view(k, -(-n // k))
        elites = {name: param[self.elites] for name, param in self.named_parameters()}
        mean, log_var = torch.func.functional_call(self, elites, (torch.cat([obs, actions], -1)[shares],))
        delta = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        return obs + torch.empty_like(obs).index_copy_(0, order, delta.flatten(0, 1)[:n])


class CostEnsemble(nn.Module):
    """The learned cost f(s, a): the least of its members' outputs, low on expert and high on learner transitions."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.clamp = args.output_clamp
        self.net = EnsembleMLP(args.cost_members, [obs_dim + act_dim, *args.cost_hidden_sizes, 1])
        for weight, bias in zip(self.net.weights, self.net.biases, strict=True):
            for member in weight:
                nn.init.orthogonal_(member)
            nn.init.uniform_(bias, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
        self.to(args.device)
        self.optimizer = OptimisticAdam(self.net.parameters(), args.cost_weight_decay)

    def forward(self, inputs: Tensor) -> Tensor:
        """f [batch] of inputs [batch, obs_dim + act_dim]."""
        costs = self.net(inputs.expand(len(self.net.weights[0]), -1, -1)).squeeze(-1)
        return (costs if self.clamp is None else costs.clamp(-self.clamp, self.clamp)).amin(0)

    @torch.no_grad()
    def reward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """-f [...], what the policy maximises, at obs [..., obs_dim] and actions [..., act_dim]."""
        inputs = torch.cat([obs, actions], -1)
        return -self(inputs.flatten(0, -2)).view(inputs.shape[:-1])


# --------------------------------------------------------------------------------------- losses and updates
def moment_loss(cost: CostEnsemble, expert: Batch, learner: Batch, mix: Tensor) -> Tensor:
    """mean f(expert) - mean f(learner) + 10 (|grad f| - 0.4)^2, the gradient at random points between the two."""
    expert_inputs, learner_inputs = (torch.cat([batch.obs, batch.actions], -1) for batch in (expert, learner))
    between = mix * expert_inputs + (1 - mix) * learner_inputs  # mix [batch, 1] in [0, 1]
    gradient = torch.func.grad(lambda x: cost(x).sum())(between)
    penalty = ((gradient.square().sum(-1) + 1e-12).sqrt() - 0.4).square().mean()
    return cost(expert_inputs).mean() - cost(learner_inputs).mean() + 10 * penalty


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source"""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def sac_update(agent: Agent, batch: Batch, actor_obs: Tensor, noise: Tensor, args: Args) -> dict[str, Tensor]:
    """One step of critics, actor (at its own states, actor_obs) and temperature. noise [2, batch, act_dim]: N(0, 1)."""
    # What is left of the learning rates. t counts the updates since the last cost round.
    left = (1 - agent.critic_optimizer.t / args.lr_sawtooth).clamp(min=0) if args.lr_sawtooth else 1.0
    alpha = agent.log_alpha.exp().detach()
    with torch.no_grad():
        next_actions, next_log_prob = agent.actor.sample(batch.next_obs, noise[0])
        next_q = twin_q(agent.target_critic, batch.next_obs, next_actions).amin(0) - alpha * next_log_prob
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_q
    q = twin_q(agent.critic, batch.obs, batch.actions)
    q_loss = (q - target).square().mean(1).sum()
    agent.critic_optimizer.step(torch.autograd.grad(q_loss, agent.critic_optimizer.params), args.critic_lr * left)

    actions, log_prob = agent.actor.sample(actor_obs, noise[1])
    pi_loss = (alpha * log_prob - twin_q(agent.critic, actor_obs, actions).amin(0)).mean()
    agent.actor_optimizer.step(torch.autograd.grad(pi_loss, agent.actor_optimizer.params), args.actor_lr * left)

    entropy = -log_prob.detach().mean()
    agent.alpha_optimizer.step([entropy - agent.target_entropy], args.alpha_lr)
    metrics = dict(critic=q_loss, actor=pi_loss, q=q.mean(), entropy=entropy, alpha=agent.log_alpha.exp())
    return {f"losses/{name}": value.detach() for name, value in metrics.items()}


def likelihood_update(dynamics: Dynamics, inputs: Tensor, targets: Tensor, args: Args) -> None:
    """One step of all members along their Gaussian log-likelihood's gradient, on [members, batch, ...]."""
    mean, log_var = dynamics(inputs)
    loss = ((mean - targets).square() * (-log_var).exp() + log_var).mean((1, 2)).sum()
    cosine = (math.pi / args.model_cosine * dynamics.optimizer.t).cos() if args.model_cosine else 1.0
    lr = args.model_lr * (1 + cosine) / 2
    dynamics.optimizer.step(torch.autograd.grad(loss, dynamics.optimizer.params), lr)


def cost_round(cost: CostEnsemble, expert: Batch, learner: Batch, mix: Tensor, lr: float) -> Tensor:
    """One step of a new optimistic Adam: it goes along the gradient's sign, every weight moves by 2 lr."""
    loss = moment_loss(cost, expert, learner, mix)
    cost.optimizer.restart()
    cost.optimizer.step(torch.autograd.grad(loss, cost.optimizer.params), lr)
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


# ----------------------------------------------------------------------------------------- model and rollouts
def fit_ensemble(dynamics: Dynamics, update, data: Batch, args: Args) -> float:
    """Fits each member to a bootstrap. A held-out fifth ends the fit, picks weights and elites. Returns the error."""
    inputs, targets = torch.cat([data.obs, data.actions], -1), data.next_obs - data.obs
    std = inputs.std(0, correction=0)
    dynamics.mean.copy_(inputs.mean(0))
    dynamics.std.copy_(torch.where(std < 1e-6, 1.0, std))
    order = torch.randperm(len(inputs), device=inputs.device)
    held_out, train = order[: len(order) // 5], order[len(order) // 5 :]
    weights = torch.ones(args.model_members, len(train), device=inputs.device)
    bootstrap = train[weights.multinomial(len(train), replacement=True)]  # [members, n]

    @torch.no_grad()
    def validate() -> Tensor:  # [members]
        mean, _ = dynamics(inputs[held_out].expand(args.model_members, -1, -1))
        return (mean - targets[held_out]).square().mean((1, 2))

    best_error, best_net, epochs_since_best = validate(), None, 0
    while epochs_since_best < args.model_patience:
        for columns in torch.randperm(len(train), device=inputs.device).split(args.model_batch_size):
            if len(columns) == args.model_batch_size:  # one shape to compile
                rows = bootstrap[:, columns]
                update(dynamics, inputs[rows], targets[rows], args)
        error = validate()
        epochs_since_best += 1
        if (error < 0.99 * best_error).any():
            best_error, epochs_since_best = torch.minimum(error, best_error), 0
            best_net = copy.deepcopy(dynamics.net.state_dict())
    if best_net is not None:
        dynamics.net.load_state_dict(best_net)
    dynamics.elites.copy_(best_error.argsort()[: args.model_elites])
    return best_error.mean().item()


@torch.no_grad()
def imagine_rollouts(dynamics: Dynamics, actor: Actor, obs: Tensor, length: int, terminates) -> Batch:
    """Rolls the policy out in the model. Rewards stay 0: the current cost's are filled in when a batch is drawn."""
    act_dim, steps = actor.net.biases[-1].shape[-1] // 2, []
    for _ in range(length):
        actions, _ = actor.sample(obs, torch.randn(len(obs), act_dim, device=obs.device))
        next_obs = dynamics.sample(obs, actions)
        done, finite = terminates(next_obs), next_obs.isfinite().all(-1)
        step = Batch(obs, actions, torch.zeros(len(obs), device=obs.device), next_obs, done.float())
        steps.append(Batch(*(field[finite] for field in step)))
        obs = next_obs[finite & ~done]
    return concat(*steps)


def cost_rollouts(actor: Actor, env: gym.Env, episodes: int, device: str) -> Batch:
    """Real, deterministic episodes of the current policy, to train the cost on."""
    buffer = ReplayBuffer(1_000_000, env.observation_space.shape[0], env.action_space.shape[0], device)
    for _ in range(episodes):
        obs, _ = env.reset(seed=int(torch.randint(2**31, ())))
        done = False
        while not done:
            action = actor.act(obs, deterministic=True)
            next_obs, _, terminated, truncated, _ = env.step(action)
            buffer.add(obs, action, 0.0, next_obs, terminated)
            obs, done = next_obs, terminated or truncated
    return buffer.all()


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
    env, cost_env, eval_env = (TremblingHand(make_env(args.env_id), args.p_tremble) for _ in range(3))
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    demos = args.demos or f"demos/{args.env_id.replace('/', '-')}.npz"
    expert, _, returns = load_demos(demos, env, args.num_demos, 1, args.device)
    expert_return = float(returns.mean())
    terminates = getattr(env.unwrapped, "terminates", TERMINATION.get(re.split("-v|/", args.env_id)[0]))
    if terminates is None:
        raise SystemExit(f"{SCRIPT}.py: when do imagined rollouts of {args.env_id} end? Give it `terminates`")
    run_dir, state = open_run(args)
    agent = state.get("agent") or Agent(obs_dim, act_dim, args)
    dynamics = state.get("dynamics") or Dynamics(obs_dim, act_dim, args)
    cost = state.get("cost") or CostEnsemble(obs_dim, act_dim, args)
    buffer = state.get("buffer") or ReplayBuffer(1_000_000, obs_dim, act_dim, args.device)
    hybrid = state.get("hybrid") or ReplayBuffer(150_000, obs_dim, act_dim, args.device)
    imagined, updates = state.get("imagined"), state.get("updates", 0)
    rows, metrics = state.get("rows", []), state.get("metrics", {})
    start_step, env_steps = state.get("step", 0), state.get("env_steps", 0)  # without and with the cost's rollouts
    start_time = time.time() - state.get("wall_time", 0)
    if not hybrid.size:
        for transition in zip(*expert, strict=True):
            hybrid.add(*transition)
    update, update_model = compiled(sac_update, args), compiled(likelihood_update, args)
    writer = SummaryWriter(str(run_dir), purge_step=env_steps)
    obs, _ = env.reset(seed=hash((args.seed, start_step)) % 2**31)
    if not np.array_equal(obs, state.get("obs", obs)):
        print(f"{SCRIPT}.py: {args.env_id} keeps state that no reset restores; uninterrupted, the run would differ")

    bar = tqdm(range(start_step, args.total_timesteps + 1), initial=start_step, total=args.total_timesteps)
    for step in bar:
        if step % args.eval_every == 0 or step == args.total_timesteps:
            row = dict(env_steps=env_steps, wall_time_s=round(time.time() - start_time, 1))
            row |= evaluate(agent.actor, eval_env, args.eval_episodes, seed=args.seed * 1_000_000 + step)
            row |= {"expert_return": expert_return, "charts/train_steps": step}
            rows.append(row | {name: float(value) for name, value in metrics.items()})
            log_row(run_dir, rows, writer)
            policy = dict(actor=agent.actor.state_dict(), sizes=(obs_dim, act_dim, args.hidden_sizes))
            torch.save(policy | dict(script=SCRIPT, env_id=args.env_id), run_dir / "policy.pt")
            bar.set_postfix_str(f"return {row['eval_return_mean']:.0f} of {expert_return:.0f}")
        if step == args.total_timesteps:
            break

        # Act: samples of the untrained policy at first, then the deterministic policy. Buffers keep the intended
        # action, whatever the hand did. The model's queue gets an expert transition for every learner transition.
        action = agent.actor.act(obs, deterministic=step >= args.learning_starts)
        next_obs, _, terminated, truncated, _ = env.step(action)
        env_steps += 1
        for replay in (buffer, hybrid):
            replay.add(obs, action, 0.0, next_obs, terminated)  # a time limit is no termination
        if step >= args.learning_starts:
            hybrid.add(*(field[0] for field in sample(expert, 1)))
        obs, learner = next_obs, buffer.all()
        learning_step = step + 1 - max(args.learning_starts, 1)

        # Model: fit it to the queue, then imagine rollouts, all from expert or all from learner states
        if learning_step >= 0 and learning_step % args.model_every == 0:
            hold_out = fit_ensemble(dynamics, update_model, hybrid.all(), args)
            coin = torch.rand(()) < 0.5
            starts = sample(expert if coin else learner, args.rollouts_per_step * args.model_every).obs
            epoch = max(1, math.ceil(learning_step / 1_000))
            length = int(np.interp(epoch, args.rollout_epochs, args.rollout_length))
            rollouts = imagine_rollouts(dynamics, agent.actor, starts, length, terminates)
            capacity = length * args.rollouts_per_step * 1_000  # an epoch's, if none of them ended early
            imagined = concat(imagined, rollouts) if imagined else rollouts
            imagined = Batch(*(field[-capacity:] for field in imagined))
            metrics |= {"model/hold_out_mse": hold_out, "model/rollout_length": length}

        # Policy: SAC on imagined transitions alone, with the current cost's rewards
        if learning_step >= 0 and learning_step % args.update_every == 0:
            n = args.updates_per_step
            batches, actor_obs = sample(imagined, n, args.batch_size), sample(imagined, n, args.batch_size).obs
            batches = batches._replace(rewards=cost.reward(batches.obs, batches.actions))  # [updates, batch]
            noise = torch.randn(n, 2, args.batch_size, act_dim, device=args.device)
            for batch, *inputs in zip(map(Batch, *batches), actor_obs, noise, strict=True):
                metrics |= update(agent, batch, *inputs, args)
                updates += 1
                if updates % 4 == 0:
                    polyak(agent.target_critic, agent.critic, args.tau)

        # Cost: one step on fresh episodes of the policy, every one of whose real steps counts
        if learning_step >= 1 and learning_step % args.cost_every == 0:
            played = cost_rollouts(agent.actor, cost_env, args.cost_episodes, args.device)
            env_steps += len(played.obs)
            expert_batch, learner_batch = (sample(data, args.cost_batch_size) for data in (expert, played))
            mix = torch.rand(args.cost_batch_size, 1, device=args.device)
            lr = args.cost_lr / max(1, learning_step // args.cost_every - 1)  # lr, lr, lr / 2, lr / 3, ...
            metrics["losses/cost"] = cost_round(cost, expert_batch, learner_batch, mix, lr)
            means = [cost.reward(data.obs[-1_000:], data.actions[-1_000:]).mean() for data in (expert, learner)]
            metrics |= {"reward/expert": means[0], "reward/learner": means[1], "reward/gap": means[0] - means[1]}
            if args.lr_sawtooth:
                agent.actor_optimizer.restart()
                agent.critic_optimizer.restart()

        cut = learning_step >= 0 and learning_step % args.reset_every == 0
        if terminated or truncated or cut:
            obs, _ = env.reset(seed=hash((args.seed, step + 1)) % 2**31)
            if not all(math.isfinite(value) for name, value in metrics.items() if "losses" in name):
                raise SystemExit(f"{SCRIPT}.py: a loss is not finite at step {step}: {metrics}")
            if step + 1 - state.get("step", 0) >= args.checkpoint_every:  # between episodes: resuming is exact
                state = dict(agent=agent, dynamics=dynamics, cost=cost, buffer=buffer, hybrid=hybrid, imagined=imagined)
                state |= dict(updates=updates, rows=rows, metrics=metrics, obs=obs, step=step + 1, env_steps=env_steps)
                state |= dict(wall_time=time.time() - start_time)
                save_checkpoint(run_dir, state)

    writer.close()
    return rows


if __name__ == "__main__":
    args, _ = tyro.cli(Args, add_help=False, return_unknown_args=True)  # --help below shows the tuned settings
    tuned = TUNED.get(args.env_id.split("-v")[0], {})
    train(tyro.cli(Args, default=replace(Args(env_id=args.env_id), **tuned), description=__doc__))
