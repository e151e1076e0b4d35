"""SAC-EO (Ozcan et al., "A Model-Based Approach for Improving Reinforcement Learning Efficiency Leveraging Expert
Observations", arXiv 2402.18836).

SAC on the true reward, with a second term in the actor's loss that needs only an expert's states: through learned
dynamics models, the policy's action at an expert state should lead to the expert's next state. The more the two models
disagree at the expert's states, the smaller the term's weight.

    python sac_eo.py --env-id dm_control/walker-walk-v0                          # 20 minutes on one core
    python sac_eo.py --env-id dm_control/walker-walk-v0 --eps-fixed 0            # SAC, the baseline

Expected on walker-walk: 90% of the expert after 40,000 to 60,000 steps, in one seed of six later (SAC: 60,000 to
70,000). More: docs/sac_eo.md
"""

import copy
import json
import math
import random
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

SCRIPT = "sac_eo"


@dataclass
class Args:
    env_id: str = "dm_control/walker-walk-v0"  # gymnasium id; "Hopper-v4" or "my_module:MyEnv-v0" work too
    seed: int = 1
    total_timesteps: int = 300_000
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile: a minute at the start, then faster (docs/speed.md)
    bf16: bool = False  # hidden layers in bfloat16; only fast on CPUs with avx512_bf16 or amx_bf16 (see lscpu)
    track: bool = False  # to Weights & Biases, into the project that WANDB_PROJECT names
    run_dir: str | None = None  # folder; one that holds a run is continued (a larger --total-timesteps lengthens it)
    checkpoint_every: int = 10_000  # steps; a checkpoint is written at the end of an episode
    eval_every: int = 5_000
    eval_episodes: int = 5

    # Demonstrations and imitation
    demos: str | None = None  # .npz file, from whose actions nothing is learned; default demos/<env_id>.npz
    num_demos: int = 10
    expert_batch_size: int = 256  # half for each model
    beta: float = 10.0  # the weight of the imitation term is 1 / (1 + beta * disagreement of the models)
    delta_stat: Literal["max", "median"] = "max"  # of the disagreement over the expert's states
    eps_fixed: float | None = None  # this weight instead of the adaptive one; 0 is SAC, 1 ignores the reward
    mse_units: Literal["normalised", "raw"] = "normalised"  # by the standard deviations of the changes, or not (paper)

    # Dynamics models
    model_hidden_sizes: tuple[int, ...] = (256, 256)
    model_lr: float = 1e-3
    model_batch_size: int = 200
    model_buffer_size: int = 100_000  # the latest transitions, from which the models learn
    model_every: int = 1_000  # steps between fits, after each of which the weight is set anew
    model_epochs: int = 10
    model_batches: int = 500  # minibatches of a fit, at most

    # SAC
    hidden_sizes: tuple[int, ...] = (256, 256)
    learning_starts: int = 5_000  # uniformly random actions before
    batch_size: int = 256
    gamma: float = 0.99
    tau: float = 0.005
    actor_lr: float = 3e-4
    critic_lr: float = 1e-3
    alpha_lr: float = 1e-3
    alpha: float = 1.0


# Settings that differ from the defaults above; a flag on the command line beats them.
TUNED = {
    "dm_control/walker-walk": dict(total_timesteps=60_000),
    "dm_control/walker-run": dict(total_timesteps=130_000),
    "dm_control/cheetah-run": dict(total_timesteps=200_000),
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


class Critic(nn.Module):
    """Twin Q functions: [2, batch]."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: tuple[int, ...], layer_norm: bool):
        super().__init__()
        self.net = EnsembleMLP(2, [obs_dim + act_dim, *hidden_sizes, 1], layer_norm=layer_norm)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat([obs, actions], -1).expand(2, -1, -1)).squeeze(-1)


class Adam:
    """Adam in plain tensor operations (epsilon not bias-corrected): torch.compile makes one graph of an update."""

    def __init__(self, params, lr: float):
        self.params, self.lr = list(params), lr
        self.mean, self.square = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.t = torch.zeros((), device=self.params[0].device)
        self.scale = torch.zeros_like(self.t)

    @torch.no_grad()
    def step(self, grads) -> None:
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
        self.critic = Critic(obs_dim, act_dim, args.hidden_sizes, layer_norm=False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))
        self.target_entropy = -act_dim
        self.register_buffer("eps", torch.zeros(()))  # the imitation term's weight
        self.to(args.device)
        self.actor_optimizer = Adam(self.actor.parameters(), args.actor_lr)
        self.critic_optimizer = Adam(self.critic.parameters(), args.critic_lr)
        self.alpha_optimizer = Adam([self.log_alpha], args.alpha_lr)


class TwinModels(nn.Module):
    """Two independent Gaussian models of next_obs, whose standard deviations do not depend on the input."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.net = EnsembleMLP(2, [obs_dim + act_dim, *args.model_hidden_sizes, obs_dim])
        for weight in self.net.weights:
            for member in weight:
                nn.init.orthogonal_(member, 0.01 if weight is self.net.weights[-1] else 2**0.5)
        self.log_std = nn.Parameter(torch.zeros(2, 1, obs_dim))
        self.register_buffer("inputs", torch.tensor([[0.0], [1.0]]).repeat(1, obs_dim + act_dim))  # mean and std
        self.register_buffer("changes", torch.tensor([[0.0], [1.0]]).repeat(1, obs_dim))
        self.raw = args.mse_units == "raw"
        self.to(args.device)
        self.optimizer = Adam([*self.net.parameters(), self.log_std], args.model_lr)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Mean next_obs [2, batch, obs_dim] at obs and actions [batch, ...], or [2, batch, ...] of each model's own."""
        inputs = (torch.cat([obs, actions], -1) - self.inputs[0]) / self.inputs[1]
        return obs + self.changes[0] + self.changes[1] * self.net(inputs.expand(2, -1, -1))

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Squared distance [...] of observations [..., obs_dim]."""
        return ((a - b) if self.raw else (a - b) / self.changes[1]).square().sum(-1)


# -------------------------------------------------------------------------------- losses, updates, models
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


def imitation_loss(actor: Actor, models: TwinModels, expert: Batch, noise: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """Mean |s' - f(s, a)|^2 over expert (s, s') [2, batch, ...], one half for each model f, with the policy's actions a
    for noise [2, batch, act_dim]; and the policy's entropy there."""
    with torch.autocast(noise.device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False):
        actions, log_prob = actor.sample(expert.obs.flatten(0, 1), noise.flatten(0, 1))
        predicted = models(expert.obs, actions.view(noise.shape))
    return models.distance(predicted, expert.next_obs).mean(), -log_prob.detach().mean()


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source"""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def sac_update(
    agent: Agent, models: TwinModels, batch: Batch, expert: Batch, noise: Tensor, expert_noise: Tensor, args: Args
) -> dict[str, Tensor]:
    """One gradient step of critics, actor and temperature, and of the target critics. Returns metrics.
    noise [2, batch, act_dim] is standard normal: for the target's and for the actor loss's actions."""
    q_loss, q = critic_loss(agent, batch, noise[0], args)
    agent.critic_optimizer.step(torch.autograd.grad(q_loss, agent.critic_optimizer.params))
    pi_loss, entropy = actor_loss(agent, batch, noise[1], args)
    grads = torch.autograd.grad(pi_loss, agent.actor_optimizer.params)
    metrics = dict(critic=q_loss, actor=pi_loss, q=q, entropy=entropy)
    if args.eps_fixed != 0:  # of (1 - eps) J_SAC + eps MSE
        mse, _ = imitation_loss(agent.actor, models, expert, expert_noise, args)
        mse_grads = torch._foreach_mul(torch.autograd.grad(mse, agent.actor_optimizer.params), agent.eps)
        grads = torch._foreach_mul(grads, 1 - agent.eps)
        norms = [torch.stack(torch._foreach_norm(part)).norm() for part in (grads, mse_grads)]
        grads = torch._foreach_add(grads, mse_grads)
        metrics |= dict(imitation=mse, gradient_sac=norms[0], gradient_imitation=norms[1])
    agent.actor_optimizer.step(grads)
    agent.alpha_optimizer.step([entropy - agent.target_entropy])  # eq. 18, without the factor alpha
    polyak(agent.target_critic, agent.critic, args.tau)
    metrics["alpha"] = agent.log_alpha.exp()
    return {f"losses/{name}": value.detach() for name, value in metrics.items()}


def model_update(models: TwinModels, batch: Batch, args: Args) -> Tensor:
    """One gradient step on each model's Gaussian negative log-likelihood of its transitions [2, batch, ...]."""
    with torch.autocast(batch.obs.device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False):
        error = (batch.next_obs - models(batch.obs, batch.actions)) / models.changes[1]
    log_std = models.log_std.clamp(-10, 2)
    loss = (0.5 * (error * (-log_std).exp()).square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1).mean(1)
    models.optimizer.step(torch.autograd.grad(loss.sum(), models.optimizer.params))
    return loss.detach().mean()


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


def fit_models(models: TwinModels, update, data: Batch, args: Args) -> Tensor:
    """Passes over the data, each model in an order of its own, without incomplete minibatches. Returns its loss."""
    inputs, changes = torch.cat([data.obs, data.actions], -1), data.next_obs - data.obs
    for stats, x in (models.inputs, inputs), (models.changes, changes):
        std = x.std(0, correction=0)
        stats.copy_(torch.stack([x.mean(0), torch.where(std < 1e-6, 1.0, std)]))
    n, size = len(inputs), min(args.model_batch_size, len(inputs))
    passes = [torch.stack([torch.randperm(n), torch.randperm(n)]) for _ in range(args.model_epochs)]
    batches = [rows for order in passes for rows in order.split(size, 1)[: n // size]]
    for rows in batches[: args.model_batches]:
        loss = update(models, Batch(*(field[rows] for field in data)), args)
    return loss


@torch.no_grad()
def imitation_weight(agent: Agent, models: TwinModels, expert: Batch, args: Args) -> dict[str, Tensor]:
    """Sets eps = 1 / (1 + beta delta), delta the max or median of |f1(s, a) - f2(s, a)| over all expert states s."""
    actions, _ = agent.actor.sample(expert.obs, torch.randn_like(expert.actions))
    delta = models.distance(*models(expert.obs, actions)).sqrt()
    delta = dict(max=delta.amax(), median=delta.median())
    agent.eps.fill_(1 / (1 + args.beta * delta[args.delta_stat]) if args.eps_fixed is None else args.eps_fixed)
    return {f"model/discrepancy_{k}": v for k, v in delta.items()} | {"losses/imitation_weight": agent.eps.clone()}


# ------------------------------------------------------------------------------- evaluation, logging, checkpoints
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
    """SAC-EO. Returns the rows of progress.csv."""
    args = pick_device(args)
    torch.set_num_threads(1)  # run several seeds side by side instead
    torch.set_flush_denormal(True)  # numbers next to 0 would be slow
    for set_seed in (torch.manual_seed, random.seed, np.random.seed):  # environments may draw from the last two
        set_seed(args.seed % 2**32)
    env, eval_env = make_env(args.env_id), make_env(args.env_id)
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    demos = args.demos or f"demos/{args.env_id.replace('/', '-')}.npz"
    expert, _, returns = load_demos(demos, env, args.num_demos, 1, args.device, actions=False)
    expert_return = float(returns.mean())
    run_dir, state = open_run(args)
    agent = state.get("agent") or Agent(obs_dim, act_dim, args)
    models = state.get("models") or TwinModels(obs_dim, act_dim, args)
    buffer = state.get("buffer") or ReplayBuffer(10**9, obs_dim, act_dim, args.device)
    rows, metrics, start_step = state.get("rows", []), state.get("metrics", {}), state.get("step", 0)
    start_time = time.time() - state.get("wall_time", 0)
    update, update_models = compiled(sac_update, args), compiled(model_update, args)
    writer = SummaryWriter(str(run_dir), purge_step=start_step)
    obs, _ = env.reset(seed=hash((args.seed, start_step)) % 2**31)
    if not np.array_equal(obs, state.get("obs", obs)):
        print(f"{SCRIPT}.py: {args.env_id} keeps state that no reset restores; uninterrupted, the run would differ")

    bar = tqdm(range(start_step, args.total_timesteps + 1), initial=start_step, total=args.total_timesteps)
    for step in bar:
        if step % args.eval_every == 0 or step == args.total_timesteps:
            row = dict(env_steps=step, wall_time_s=round(time.time() - start_time, 1), expert_return=expert_return)
            row |= evaluate(agent.actor, eval_env, args.eval_episodes, seed=args.seed * 1_000_000 + step)
            rows.append(row | {name: float(value) for name, value in metrics.items()})
            log_row(run_dir, rows, writer)
            policy = dict(actor=agent.actor.state_dict(), sizes=(obs_dim, act_dim, args.hidden_sizes))
            torch.save(policy | dict(script=SCRIPT, env_id=args.env_id), run_dir / "policy.pt")
            bar.set_postfix_str(f"return {row['eval_return_mean']:.0f} of {expert_return:.0f}")
        if step == args.total_timesteps:
            break

        # Models: fit them to the latest transitions, then set the imitation weight, which stays until the next fit
        learning_step = step - args.learning_starts
        if learning_step >= 0 and learning_step % args.model_every == 0 and args.eps_fixed != 0:
            latest = Batch(*(field[-args.model_buffer_size :] for field in buffer.all()))
            metrics["losses/model"] = fit_models(models, update_models, latest, args)
            metrics |= imitation_weight(agent, models, expert, args)

        # Act
        action = agent.actor.act(obs) if learning_step >= 0 else torch.rand(act_dim).mul(2).sub(1).numpy()
        next_obs, reward, terminated, truncated, info = env.step(action)
        buffer.add(obs, action, reward, next_obs, terminated)  # a time limit is no termination
        obs = next_obs

        # Learn
        if learning_step >= 0:
            batch, expert_batch = sample(buffer.all(), args.batch_size), sample(expert, 2, args.expert_batch_size // 2)
            noise = torch.randn(2, args.batch_size, act_dim, device=args.device)
            metrics |= update(agent, models, batch, expert_batch, noise, torch.randn_like(expert_batch.actions), args)

        if terminated or truncated:
            writer.add_scalar("charts/episodic_return", info["episode"]["r"], step)
            obs, _ = env.reset(seed=hash((args.seed, step + 1)) % 2**31)
            if not all(math.isfinite(value) for name, value in metrics.items() if "losses" in name):
                raise SystemExit(f"{SCRIPT}.py: a loss is not finite at step {step}: {metrics}")
            if step + 1 - state.get("step", 0) >= args.checkpoint_every:  # between episodes: resuming is exact
                state = dict(agent=agent, models=models, buffer=buffer, obs=obs, rows=rows, step=step + 1)
                save_checkpoint(run_dir, state | dict(metrics=metrics, wall_time=time.time() - start_time))

    writer.close()
    return rows


if __name__ == "__main__":
    args, _ = tyro.cli(Args, add_help=False, return_unknown_args=True)  # --help below shows the tuned settings
    tuned = TUNED.get(args.env_id.split("-v")[0], {})
    train(tyro.cli(Args, default=replace(Args(env_id=args.env_id), **tuned), description=__doc__))
