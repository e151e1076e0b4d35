"""MBARL: model-based autonomous RL (Charles, Sharma, Dong, Finn; a poster) on MEDAL (arXiv 2205.05212) and MBPO.

A robot that nobody resets lives in one long trajectory. A forward policy pursues the task's goals; a backward policy
then returns to states of demonstrations, rewarded by a classifier that tells these from its own states. One dynamics
ensemble of the goal-free physical state learns from both and imagines data for both. --algo has the arms to compare
with: medal (nothing imagined), fbrl (backward to the start), naive (no backward policy), oracle (the world is reset).

    python mbarl.py --env-id Tabletop-v0                      # EARL's tabletop; PointMass2D-v0, PersistentPointMaze-v0
    python mbarl.py --env-id PointMass2D-v0 --algo medal      # one of the other arms
    python mbarl.py --env-id Tabletop-v0 --run-dir runs/a     # the same command again continues an interrupted run

Expected: Tabletop-v0 at all four goals after 35,000 to 60,000 steps (10 to 17 minutes on one core with --bf16),
PointMass2D-v0 after about 1,000 (a minute). Worlds of your own, results, departures: docs/mbarl.md
"""

import copy
import json
import math
import random
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

import envs.point_mass
import envs.point_maze
import envs.tabletop

SCRIPT = "mbarl"
gym.register_envs(envs)  # importing them did it


@dataclass
class Args:
    env_id: str = "Tabletop-v0"  # a world that is never reset; "my_module:MyWorld-v0" works too, see docs/mbarl.md
    algo: Literal["mbarl", "medal", "fbrl", "naive", "oracle"] = "mbarl"
    seed: int = 1
    total_timesteps: int = 90_000
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile: a minute at the start, then faster (docs/speed.md)
    bf16: bool = False  # hidden layers in bfloat16; only fast on CPUs with avx512_bf16 or amx_bf16 (see lscpu)
    track: bool = False  # to Weights & Biases, into the project that WANDB_PROJECT names
    run_dir: str | None = None  # folder; one that holds a run is continued (a larger --total-timesteps lengthens it)
    checkpoint_every: int = 10_000
    eval_every: int = 5_000
    eval_episodes: int = 20

    # Autonomy
    num_demos: int = 12  # scripted, of each direction, the goals in turn
    switch_steps: int = 200  # longest phase of a policy; of the oracle: longest episode
    train_horizon: int = 200_000  # steps between hard resets, each an intervention
    learning_starts: int = 1_000  # steps of the untrained policies before learning starts

    # SAC
    hidden_sizes: tuple[int, ...] = (256, 256)
    updates_per_step: int = 2  # of the acting policy, the same for every --algo
    batch_size: int = 256
    gamma: float = 0.99
    tau: float = 0.005
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    alpha_lr: float = 3e-4
    alpha: float = 0.01
    reward_scale: float = 10.0

    # Classifier, the backward policy's reward
    classifier_lr: float = 3e-4
    classifier_every: int = 10  # steps between its updates
    classifier_batch_size: int = 128  # demonstrated states, and as many visited ones
    classifier_goal: bool = True  # it sees the goal, not only the physical state

    # Dynamics ensemble
    model_members: int = 7
    model_elites: int = 5
    model_hidden_sizes: tuple[int, ...] = (200, 200, 200, 200)
    model_lr: float = 1e-3
    model_beta: float = 1.0
    """power of the variance that weighs the likelihood's terms, in units of the changes; 0: MBPO's, in the state's"""
    model_batch_size: int = 256
    model_every: int = 500  # steps between fits, each followed by imagined rollouts
    model_rows: int = 25_000  # transitions of a fit, drawn from all real ones
    model_first_batches: int = 1_000  # minibatches of the first fit, at most
    model_batches: int = 150  # of later fits
    model_patience: int = 5  # stop a fit after so many epochs without improvement on held-out data

    # Imagined rollouts
    reward: Literal["analytic", "learned"] = "analytic"
    """of imagined transitions: the task's r(s', g), or a head of the model, which does not see the goal (poster)"""
    snap: bool = True  # move imagined states to the nearest possible one
    expert_start_prob: float = 0.5  # that a rollout starts at a demonstrated state, not in the replay (poster: 0)
    rollouts_per_step: int = 2  # of each policy
    rollout_length: int = 20
    rollout_retain: int = 4  # model fits whose rollouts are kept
    real_ratio: float = 0.5  # share of real transitions in a batch


# Settings that differ from the defaults above; a flag on the command line beats them.
POINT_MASS = dict(
    total_timesteps=5_000, checkpoint_every=1_000, eval_every=100, num_demos=10, switch_steps=100, learning_starts=100,
    hidden_sizes=(64, 64), updates_per_step=10, batch_size=128, gamma=0.95, tau=0.02, actor_lr=1e-3, critic_lr=1e-3,
    alpha_lr=1e-3, alpha=0.1, reward_scale=1.0, classifier_goal=False, model_hidden_sizes=(64, 64),
    model_batch_size=128, model_every=50, model_first_batches=300, model_batches=50, model_beta=0.0, reward="learned",
    rollouts_per_step=4, real_ratio=0.1,
)  # fmt: skip
TUNED = {
    "PointMass2D": POINT_MASS,
    "PointMass2DCoarse": POINT_MASS,
    "PersistentPointMaze": dict(num_demos=10, switch_steps=300),
}


# ---------------------------------------------------------------------------------- world, demonstrations, replay
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


def check_world(env: gym.Env) -> None:
    """Stops if the world lacks what training needs; docs/mbarl.md says what each method gives."""
    needed = "goals observation get_state set_state transition reward success distance project start_states as_goal"
    lacking = [name for name in (*needed.split(), "expert") if not hasattr(env.unwrapped, name)]
    lacking += ["max_episode_steps"] if env.spec.max_episode_steps is None else []
    if lacking:
        raise SystemExit(f"{SCRIPT}.py: {env.spec.id} has no {', '.join(lacking)}; docs/mbarl.md shows a world")


class Batch(NamedTuple):
    obs: Tensor  # [batch, obs_dim]
    actions: Tensor  # [batch, act_dim], in [-1, 1]
    rewards: Tensor  # [batch]
    next_obs: Tensor  # [batch, obs_dim]
    terminations: Tensor  # [batch], 1 where the episode ended; 0 at a time limit


def scripted_demos(world: gym.Env, n: int, seed: int, device: str) -> tuple[Batch, Batch]:
    """D_f and D_b: n trips of the world's expert from a start to the goals in turn, and n back. Success ends each."""
    rng, directions = np.random.default_rng([seed, 2]), ([], [])
    for i in range(n):
        state, home = world.start_states(2, rng)
        for goal, trips in zip((world.goals[i % len(world.goals)], world.as_goal(home)), directions, strict=True):
            done, first = False, len(trips)
            while not done:
                if len(trips) - first == 10_000:
                    raise SystemExit(f"{SCRIPT}.py: the expert does not reach {goal.tolist()} in 10,000 steps")
                action = world.expert(state, goal, rng).float()
                next_state = world.transition(state, action.to(state))
                reward, done = world.reward(next_state, goal), world.success(next_state, goal)
                trips.append(Batch(torch.cat([state, goal]), action, reward, torch.cat([next_state, goal]), done))
                state = next_state
    return tuple(Batch(*(torch.stack(x).float().to(device) for x in zip(*trips, strict=True))) for trips in directions)


def relabel(demos: Batch, goal: Tensor, world: gym.Env) -> Batch:
    """The transitions [n, ...] as if they pursued `goal` [goal_dim]; none is terminal."""
    goals = goal.to(demos.obs).expand(len(demos.obs), -1)
    obs, next_obs = (torch.cat([x[:, : -len(goal)], goals], -1) for x in (demos.obs, demos.next_obs))
    rewards = world.reward(next_obs[:, : -len(goal)], goals)
    return Batch(obs, demos.actions, rewards, next_obs, torch.zeros_like(rewards))


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


class Critic(nn.Module):
    """Twin Q functions: [2, batch]."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: tuple[int, ...], layer_norm: bool):
        super().__init__()
        self.net = EnsembleMLP(2, [obs_dim + act_dim, *hidden_sizes, 1], layer_norm=layer_norm)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat([obs, actions], -1).expand(2, -1, -1)).squeeze(-1)


class Adam:
    """Adam in plain tensor operations (epsilon not bias-corrected): torch.compile makes one graph of an update."""

    def __init__(self, params, lr: float, weight_decay: float = 0.0):
        self.params, self.lr, self.weight_decay = list(params), lr, weight_decay
        self.mean, self.square = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.t = torch.zeros((), device=self.params[0].device)
        self.scale = torch.zeros_like(self.t)

    @torch.no_grad()
    def step(self, grads) -> None:
        if self.weight_decay:
            grads = torch._foreach_add(grads, self.params, alpha=self.weight_decay)
        self.t += 1
        torch._foreach_lerp_(self.mean, grads, 0.1)
        torch._foreach_lerp_(self.square, torch._foreach_mul(grads, grads), 0.001)
        self.scale.copy_(self.lr * (1 - 0.999**self.t).sqrt() / (1 - 0.9**self.t))  # kept, or the compiler repeats it
        root = torch._foreach_add(torch._foreach_sqrt(self.square), 1e-8)
        torch._foreach_sub_(self.params, torch._foreach_mul(torch._foreach_div(self.mean, root), self.scale))


class Agent(nn.Module):
    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, act_dim, args.hidden_sizes)
        self.critic = Critic(obs_dim, act_dim, args.hidden_sizes, layer_norm=True)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))
        self.target_entropy = -act_dim / 2
        self.to(args.device)
        self.actor_optimizer = Adam(self.actor.parameters(), args.actor_lr)
        self.critic_optimizer = Adam(self.critic.parameters(), args.critic_lr)
        self.alpha_optimizer = Adam([self.log_alpha], args.alpha_lr)


class Classifier(nn.Module):
    """Logit f that a state is a demonstrated one: at the optimum sigmoid(f) = rho* / (rho* + rho^b)."""

    def __init__(self, dim: int, args: Args):
        super().__init__()
        self.dim, self.net = dim, EnsembleMLP(1, [dim, 128, 1])
        self.to(args.device)
        self.optimizer = Adam(self.net.parameters(), args.classifier_lr)

    def forward(self, obs: Tensor) -> Tensor:
        """f [...] of obs [..., obs_dim], of which it sees the first `dim` entries."""
        return self.net(obs[..., : self.dim].reshape(1, -1, self.dim)).view(obs.shape[:-1])

    @torch.no_grad()
    def reward(self, next_obs: Tensor) -> Tensor:
        """-log(1 - C(s')) = softplus(f(s')) [...], what the backward policy maximises; at most -log(1e-10)."""
        return F.softplus(self(next_obs)).clamp(max=-math.log(1e-10))


class Player:
    """A policy and what it learns from."""

    def __init__(self, demos: Batch, obs_dim: int, act_dim: int, args: Args):
        self.agent, self.demos = Agent(obs_dim, act_dim, args), demos
        self.replay = ReplayBuffer(10_000_000, obs_dim, act_dim, args.device)  # R: demonstrations, then real life
        for transition in zip(*demos, strict=True):
            self.replay.add(*transition)
        self.rollouts = deque(maxlen=args.rollout_retain)  # M: imagined transitions of the last model fits
        self.imagined: Batch | None = None  # all of M

    def lived(self) -> Batch:
        """Its real transitions, without the demonstrations."""
        return Batch(*(column[len(self.demos.obs) :] for column in self.replay.all()))


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


class ScaledDynamics(EnsembleDynamics):
    """Its members predict changes in units of the changes' standard deviation (with model_beta 0: in the state's)."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__(obs_dim, act_dim, args)
        self.register_buffer("unit", torch.ones(obs_dim, device=args.device))

    def scaled(self, data: Batch, args: Args) -> Batch:
        """The data with changes in units that are measured here."""
        change = data.next_obs - data.obs
        if args.model_beta:
            self.unit.copy_(change.std(0).clamp(min=1e-6))
        return data._replace(next_obs=data.obs + change / self.unit)

    def elites_forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """In the state's units."""
        mean, log_var = super().elites_forward(inputs)
        return mean * self.unit, log_var + 2 * self.unit.log()


# ---------------------------------------------------------------------------------------------------- losses
def critic_loss(agent: Agent, batch: Batch, noise: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """Soft Bellman error of both critics (eqs. 5 and 6), and the mean Q value."""
    with torch.autocast(batch.obs.device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False):
        with torch.no_grad():
            next_actions, next_log_prob = agent.actor.sample(batch.next_obs, noise)
            next_q = agent.target_critic(batch.next_obs, next_actions).amin(0) - agent.log_alpha.exp() * next_log_prob
            target = batch.rewards + args.gamma * (1 - batch.terminations) * next_q
        q = agent.critic(batch.obs, batch.actions)
    return (q - target).square().mean(1).sum(), q.detach().mean()


def actor_loss(agent: Agent, batch: Batch, noise: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """alpha log pi(a|s) - Q(s, a) (eq. 9), and the policy's entropy."""
    with torch.autocast(batch.obs.device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False):
        actions, log_prob = agent.actor.sample(batch.obs, noise)
        q = agent.critic(batch.obs, actions).amin(0)
    return (agent.log_alpha.exp().detach() * log_prob - q).mean(), -log_prob.detach().mean()


def weighted_dynamics_loss(dynamics: ScaledDynamics, inputs: Tensor, targets: Tensor, args: Args) -> Tensor:
    """Gaussian negative log-likelihood, summed over members, with terms weighted by variance^model_beta (beta-NLL,
    arXiv 2203.09168). With 0, a rare change (a grasp) is soon explained as noise, which then divides its gradient;
    with 1 the means learn by squared error."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False):
        mean, log_var = dynamics(inputs)
    loss = (mean - targets).square() * (-log_var).exp() + log_var
    return (loss * (args.model_beta * log_var.detach()).exp()).mean((1, 2)).sum()


def classifier_loss(classifier: Classifier, demos: Tensor, visited: Tensor, mix: Tensor, order: Tensor) -> Tensor:
    """max_C E_demos[log C] + E_visited[log(1 - C)] on obs [batch, obs_dim] each, with mixup: rows and labels are mixed,
    in shares mix [2 batch, 1], with those at order [2 batch]."""
    inputs = torch.cat([demos, visited])
    labels = torch.cat([torch.ones_like(demos[:, :1]), torch.zeros_like(visited[:, :1])])
    inputs = mix * inputs + (1 - mix) * inputs[order]
    labels = mix * labels + (1 - mix) * labels[order]
    return F.binary_cross_entropy_with_logits(classifier(inputs), labels[:, 0])


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source"""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def sac_update(agent: Agent, batch: Batch, noise: Tensor, args: Args) -> dict[str, Tensor]:
    """One gradient step of critics, actor and temperature, and of the target critics. Returns metrics.
    noise [2, batch, act_dim] is standard normal: for the target's and for the actor loss's actions."""
    q_loss, q = critic_loss(agent, batch, noise[0], args)
    agent.critic_optimizer.step(torch.autograd.grad(q_loss, agent.critic_optimizer.params))
    pi_loss, entropy = actor_loss(agent, batch, noise[1], args)
    agent.actor_optimizer.step(torch.autograd.grad(pi_loss, agent.actor_optimizer.params))
    agent.alpha_optimizer.step([entropy - agent.target_entropy])  # eq. 18, without the factor alpha
    polyak(agent.target_critic, agent.critic, args.tau)
    metrics = dict(critic=q_loss, actor=pi_loss, q=q, entropy=entropy, alpha=agent.log_alpha.exp())
    return {f"losses/{name}": value.detach() for name, value in metrics.items()}


def sac_updates(update, agent: Agent, batches: Batch, noise: Tensor, args: Args) -> dict[str, Tensor]:
    """Gradient steps on batches [updates, batch, ...] with noise [updates, 2, batch, act_dim]."""
    for batch, batch_noise in zip(map(Batch, *batches), noise, strict=True):
        metrics = update(agent, batch, batch_noise, args)
    return metrics


def weighted_dynamics_update(dynamics: ScaledDynamics, inputs: Tensor, targets: Tensor, args: Args) -> None:
    loss = weighted_dynamics_loss(dynamics, inputs, targets, args)
    dynamics.optimizer.step(torch.autograd.grad(loss, dynamics.optimizer.params))


def classifier_update(classifier: Classifier, demos: Tensor, visited: Tensor, mix: Tensor, order: Tensor) -> dict:
    """One gradient step. Returns metrics, accuracy on plain states."""
    loss = classifier_loss(classifier, demos, visited, mix, order)
    classifier.optimizer.step(torch.autograd.grad(loss, classifier.optimizer.params))
    with torch.no_grad():
        right = torch.cat([classifier(demos) > 0, classifier(visited) <= 0])
    return {"losses/classifier": loss.detach(), "reward/classifier_accuracy": right.float().mean()}


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


def physical(data: Batch, state_dim: int, reward_head: bool) -> Batch:
    """Transitions without their goals. For a reward head the reward is one more entry of the state, from 0 to r."""
    obs, next_obs = data.obs[:, :state_dim], data.next_obs[:, :state_dim]
    if reward_head:
        obs, next_obs = F.pad(obs, (0, 1)), torch.cat([next_obs, data.rewards[:, None]], -1)
    return data._replace(obs=obs, next_obs=next_obs)


@torch.no_grad()
def imagine_goals(
    dynamics: EnsembleDynamics, world: gym.Env, actor: Actor, obs: Tensor, length: int, success_ends: bool, args: Args
) -> Batch:
    """Rolls the policy out in the model from obs [n, obs_dim], whose goals stay. Rewards are the forward policy's."""
    state_dim, act_dim = obs.shape[1] - world.goals.shape[1], world.action_space.shape[0]
    learned, steps = args.reward == "learned", []
    for _ in range(length):
        states, goals = obs[:, :state_dim], obs[:, state_dim:]
        actions, _ = actor.sample(obs, torch.randn(len(obs), act_dim, device=obs.device))
        predicted = dynamics.sample(F.pad(states, (0, int(learned))), actions, noise=True)
        next_states = predicted[:, :state_dim]
        next_states = world.project(next_states) if args.snap else next_states
        rewards = predicted[:, -1] if learned else world.reward(next_states, goals)
        next_obs, done = torch.cat([next_states, goals], -1), world.success(next_states, goals).bool() & success_ends
        finite = next_obs.isfinite().all(-1) & rewards.isfinite()
        steps.append(Batch(*(column[finite] for column in (obs, actions, rewards, next_obs, done.float()))))
        obs = next_obs[finite & ~done]
    return concat(*steps)


@torch.no_grad()
def imagined_error(imagined: Batch, world: gym.Env) -> Tensor:
    """Root mean square difference of some imagined next states from what the world makes of them, in its units."""
    obs, actions, _, next_obs, _ = (column[:: len(column) // 1_000 + 1].cpu() for column in imagined)
    state_dim = obs.shape[1] - world.goals.shape[1]
    truth = world.transition(obs[:, :state_dim].double(), actions.double())
    return (next_obs[:, :state_dim] - truth).square().mean().sqrt()


# ------------------------------------------------------------------------------------- evaluation and logging
@torch.no_grad()
def evaluate_goals(actor: Actor, world: gym.Env, episodes: int, horizon: int, seed: list[int]) -> dict[str, float]:
    """Deterministic episodes of the true reward from the task's starts, the goals in turn, all in lock step. Success is
    success at any step. Draws no random numbers from the training run's generator."""
    device, states = actor.net.weights[0].device, world.start_states(episodes, np.random.default_rng(seed))
    goals = world.goals[torch.arange(episodes) % len(world.goals)]
    returns, success = torch.zeros(episodes, dtype=states.dtype), torch.zeros(episodes, dtype=torch.bool)
    for _ in range(horizon):
        mean, _ = actor(torch.cat([states, goals], -1).float().to(device))
        states = world.transition(states, mean.tanh().cpu().to(states))
        returns += world.reward(states, goals)
        success |= world.success(states, goals)
    result = dict(return_mean=returns.mean(), return_std=returns.std(correction=0), length_mean=horizon)
    result |= dict(success_rate=success.double().mean(), final_distance=world.distance(states, goals).mean())
    result |= dict(success_at_end=world.success(states, goals).double().mean())
    return {f"eval_{name}": float(value) for name, value in result.items()}


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
    """MBARL and the arms to compare it with. Returns the rows of progress.csv."""
    args = pick_device(args)
    torch.set_num_threads(1)  # run several seeds side by side instead
    torch.set_flush_denormal(True)  # weight decay drives unused weights towards 0, where arithmetic is slow
    for set_seed in (torch.manual_seed, random.seed, np.random.seed):  # environments may draw from the last two
        set_seed(args.seed % 2**32)
    env = make_env(args.env_id)
    check_world(env)
    env.reset(seed=args.seed)  # the world is stepped without make_env's wrappers: its actions are in [-1, 1]
    world, horizon = env.unwrapped, env.spec.max_episode_steps
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    state_dim, learned = obs_dim - world.goals.shape[1], args.reward == "learned"
    matches, imagines = args.algo in ("mbarl", "medal"), args.algo == "mbarl"
    forward_demos, backward_demos = scripted_demos(world, args.num_demos, args.seed, args.device)  # D_f, D_b
    relabelled = [relabel(backward_demos, goal, world) for goal in world.goals]
    demos = dict(forward=forward_demos)
    if matches:  # the backward policy carries any forward goal, and its phases do not end with success
        demos["backward"] = concat(forward_demos._replace(terminations=0 * forward_demos.terminations), *relabelled)
    elif args.algo == "fbrl":
        demos["backward"] = backward_demos
    positives = torch.cat([forward_demos.obs, forward_demos.next_obs[forward_demos.terminations > 0]])

    run_dir, state = open_run(args)
    players = state.get("players") or {name: Player(data, obs_dim, act_dim, args) for name, data in demos.items()}
    classifier = state.get("classifier") or Classifier(obs_dim if args.classifier_goal else state_dim, args)
    dynamics = state.get("dynamics") or ScaledDynamics(state_dim + learned, act_dim, args)
    phase, phase_steps = state.get("phase", "forward"), state.get("phase_steps", 0)
    rows, metrics, start_step = state.get("rows", []), state.get("metrics", {}), state.get("step", 0)
    interventions, start_time = state.get("interventions", 0), time.time() - state.get("wall_time", 0)
    updates = {name: compiled(sac_update, args, loop=sac_updates) for name in players}
    update_dynamics, update_classifier = compiled(weighted_dynamics_update, args), compiled(classifier_update, args)
    writer = SummaryWriter(str(run_dir), purge_step=start_step)
    if state:
        world.set_state(state["world"])
    obs = world.observation()

    bar = tqdm(range(start_step, args.total_timesteps + 1), initial=start_step, total=args.total_timesteps)
    for step in bar:
        if step % args.eval_every == 0 or step == args.total_timesteps:
            actor = players["forward"].agent.actor
            row = dict(env_steps=step, wall_time_s=round(time.time() - start_time, 1))
            row |= evaluate_goals(actor, world, args.eval_episodes, horizon, [args.seed, 1, step])
            task_reward = players["forward"].lived().rewards.sum().item() / max(step, 1)
            row |= {"charts/interventions": interventions, "charts/reward_per_step": task_reward}
            row |= {f"charts/{name}_steps": len(player.lived().obs) for name, player in players.items()}
            rows.append(row | {name: float(value) for name, value in metrics.items()})
            log_row(run_dir, rows, writer)
            policy = dict(actor=actor.state_dict(), sizes=(obs_dim, act_dim, args.hidden_sizes))
            torch.save(policy | dict(script=SCRIPT, env_id=args.env_id), run_dir / "policy.pt")
            bar.set_postfix_str(f"success {row['eval_success_rate']:.2f}")
        if step == args.total_timesteps:
            break

        # Act: one long trajectory. A phase ends with success (not MEDAL's backward policy's) or after switch_steps
        player = players[phase]
        action = player.agent.actor.act(obs)
        next_obs, reward, _, _, info = world.step(action)
        success = info["is_success"] and (phase == "forward" or args.algo == "fbrl")
        player.replay.add(obs, action, reward, next_obs, success)  # values continue after a switch that is no success
        phase_steps += 1
        reset = (step + 1) % args.train_horizon == 0
        switch = success or phase_steps == args.switch_steps or reset
        learning_step = step - args.learning_starts

        # Model: fit it to what both policies and the experts lived through, then imagine with both policies
        if imagines and learning_step >= 0 and learning_step % args.model_every == 0:
            # relabelled[0]: the backward trips once, with the forward reward; `physical` cuts their goal off
            real = concat(forward_demos, relabelled[0], *(p.lived() for p in players.values()))
            drawn = torch.randperm(len(real.obs), device=args.device)[: args.model_rows]
            data = physical(Batch(*(column[drawn] for column in real)), state_dim, learned)
            data, weights = dynamics.scaled(data, args), torch.ones_like(data.rewards)
            max_batches = args.model_batches if player.rollouts else args.model_first_batches
            metrics["model/hold_out_mse"] = fit_dynamics(dynamics, update_dynamics, data, weights, max_batches, args)
            n = args.rollouts_per_step * args.model_every
            for name, dreamer in players.items():
                from_demos = torch.rand(n, 1, device=args.device) < args.expert_start_prob
                starts = torch.where(from_demos, sample(dreamer.demos, n).obs, sample(dreamer.replay.all(), n).obs)
                actor, length, ends = dreamer.agent.actor, args.rollout_length, name == "forward"
                rollouts = imagine_goals(dynamics, world, actor, starts, length, ends, args)
                dreamer.rollouts.append(rollouts)
                dreamer.imagined = concat(*dreamer.rollouts)
                metrics[f"model/imagined_error_{name}"] = imagined_error(rollouts, world)

        # Classifier: demonstrated states against those that the backward policy led to
        if matches and learning_step >= 0 and learning_step % args.classifier_every == 0:
            visited, n = players["backward"].lived().next_obs, args.classifier_batch_size
            if len(visited):
                shown = positives[torch.randint(len(positives), (n,), device=args.device)]
                visited = visited[torch.randint(len(visited), (n,), device=args.device)]
                mix, order = torch.rand(2 * n, 1, device=args.device), torch.randperm(2 * n, device=args.device)
                metrics |= update_classifier(classifier, shown, visited, mix, order)

        # Policy: SAC of the acting one, on its real and imagined transitions
        if learning_step >= 0:
            n, real_ratio = args.updates_per_step, args.real_ratio if player.rollouts else 1.0
            n_real = round(real_ratio * args.batch_size)
            batches = sample(player.replay.all(), n, n_real)
            if player.rollouts:
                batches = concat(batches, sample(player.imagined, n, args.batch_size - n_real), dim=1)
            rewards = classifier.reward(batches.next_obs) if matches and phase == "backward" else batches.rewards
            batches = batches._replace(rewards=args.reward_scale * rewards)  # [updates, batch, ...]
            noise = torch.randn(n, 2, args.batch_size, act_dim, device=args.device)
            losses = updates[phase](player.agent, batches, noise, args)
            metrics |= {name if phase == "forward" else f"{name}_backward": loss for name, loss in losses.items()}

        # Switch: the other policy goes on from here. MEDAL's backward policy already carries the next forward goal
        if switch:
            ended, phase_steps = phase, 0
            if ended == "forward":
                metrics["charts/forward_success"] = 0.9 * metrics.get("charts/forward_success", 0.0) + 0.1 * success
            if reset or args.algo == "oracle":
                phase, interventions = "forward", interventions + 1
                world.reset(seed=int(torch.randint(2**31, ())))
            else:
                phase = "backward" if ended == "forward" and "backward" in players else "forward"
                if args.algo == "fbrl" and phase == "backward":
                    world.goal = world.as_goal(world.start_states(1, world.np_random)[0])
                elif args.algo == "fbrl" or ended == "forward":
                    world.goal = world.goals[torch.randint(len(world.goals), ())]
        obs = world.observation()

        save = (step + 1) % args.checkpoint_every == 0
        if (save or step % 100 == 0) and not all(math.isfinite(v) for name, v in metrics.items() if "losses" in name):
            raise SystemExit(f"{SCRIPT}.py: a loss is not finite at step {step}: {metrics}")
        if save:
            state = dict(players=players, classifier=classifier, dynamics=dynamics, rows=rows)
            state |= dict(world=world.get_state(), phase=phase, phase_steps=phase_steps, interventions=interventions)
            save_checkpoint(run_dir, state | dict(metrics=metrics, step=step + 1, wall_time=time.time() - start_time))

    writer.close()
    return rows


if __name__ == "__main__":
    args, _ = tyro.cli(Args, add_help=False, return_unknown_args=True)  # --help below shows the tuned settings
    tuned = TUNED.get(args.env_id.split("-v")[0], {})
    train(tyro.cli(Args, default=replace(Args(env_id=args.env_id), **tuned), description=__doc__))
