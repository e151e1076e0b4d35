"""Sequential multi-task model-based RL (Landolfi, Thomas, Ma, arXiv 1907.04964), on SLBO (arXiv 1807.03858).

One robot, a sequence of tasks that differ only in a known reward. The dynamics model and its data are kept, the policy
never is. On a new task a fresh policy is warmed up inside the model, without a real step (zero-shot), then collects a
few real steps, which make the model better where this task leads. Tasks that were held out show it.

    python slbo_multitask.py                                      # HCF: HalfCheetah at 20 speeds, one core
    python slbo_multitask.py --env-id HCFB-v0 --run-dir runs/a    # the same command again continues
    python slbo_multitask.py --algo scratch                       # SLBO on each held-out task alone

Families of tasks, results, and where this differs from the paper and the authors' code: docs/slbo_multitask.md
"""

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
from torch.func import functional_call, jvp, vjp
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs.multitask  # noqa: F401  registers HCF-v0 and the other families

SCRIPT = "slbo_multitask"


@dataclass
class Args:
    env_id: str = "HCF-v0"  # gymnasium id of a family; it has `task`, `draw_task`, `reward` and `terminates`
    seed: int = 1
    total_timesteps: int = 80_000  # real steps of the training tasks: 20 tasks of 4,000
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile: a minute at the start, then faster (docs/speed.md)
    track: bool = False  # to Weights & Biases, into the project that WANDB_PROJECT names
    run_dir: str | None = None  # folder; one that holds a run is continued (a larger --total-timesteps lengthens it)
    checkpoint_every: int = 4_000  # steps; a checkpoint is written at the end of a stage or a held-out task
    eval_every: int = 4_000  # at the ends of stages
    eval_episodes: int = 10

    # The sequence of tasks
    algo: Literal["multitask", "scratch", "goal-conditioned"] = "multitask"
    """scratch: SLBO on each held-out task alone. goal-conditioned: model-free TRPO, a policy that is told its task"""
    stage_steps: int = 4_000  # real steps of a training task, and of each stage of a held-out one
    train_rounds: int = 0  # of model and policy updates after a training task's real steps; 0: it only collects
    warm_up_rounds: int = 10  # of model and policy updates on a new task, without a real step
    held_out_tasks: int = 5
    test_after: tuple[int, ...] = (1, 5, 10, 20)  # training tasks; held-out tasks adapt after the last of these numbers
    test_stages: int = 2  # of a held-out task, whose real steps count as well
    test_rounds: int = 10  # of model and policy updates after each of its stages
    batch_tasks: int = 20  # goal-conditioned: tasks that share an update's real steps

    # Updates of a round
    model_updates: int = 100
    policy_updates: int = 20  # each with fresh virtual steps; a new policy needs many
    ou_theta: float = 0.15  # Ornstein-Uhlenbeck noise on the actions of real steps
    ou_sigma: float = 0.3

    # Model
    model_hidden_sizes: tuple[int, ...] = (500, 500)
    model_lr: float = 1e-3
    model_weight_decay: float = 1e-5
    model_max_grad_norm: float = 2.0
    model_batch_size: int = 256  # rows, in 256 / H stretches of H steps
    horizon: int = 2  # H, steps predicted one after the other in the model's loss
    loss: Literal["l2", "mse"] = "l2"  # a norm, as the theory asks for, or its square
    model_target: Literal["delta", "state"] = "delta"  # error of each predicted change (code) or of the state (paper)
    buffer_size: int = 200_000
    optimism: float = 0.0  # bonus for disagreement of two models in virtual rewards; negative: a penalty
    virtual_envs: int = 20  # that move side by side in the model
    virtual_steps: int = 200  # of each for a policy update; also their time limit

    # Policy (TRPO) and value
    hidden_sizes: tuple[int, ...] = (32, 32)
    gamma: float = 0.99
    gae_lambda: float = 0.95
    max_kl: float = 0.01
    cg_iterations: int = 10
    damping: float = 0.1
    entropy_coef: float = 0.005
    entropy: Literal["official", "exact"] = "official"  # of actions within [-2, 2], as in the code or as the integral
    value_hidden_sizes: tuple[int, ...] = (64, 64)
    value_lr: float = 1e-3
    value_epochs: int = 5
    value_batch_size: int = 256


# ---------------------------------------------------------------------------------- environment, tasks and replay
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


def draw_task(env: gym.Env, seed: int, held_out: bool, index: int) -> tuple[float, ...]:
    """Task number `index` of training, or of the held-out ones, which have generators of their own."""
    return env.unwrapped.draw_task(np.random.default_rng((seed % 2**32, int(held_out), index)))


def set_task(envs: tuple[gym.Env, ...], task: tuple[float, ...]) -> None:
    """Of real rewards, and of the virtual ones: KnownTask asks one of these environments."""
    for env in envs:
        env.unwrapped.task = task


class KnownTask:
    """The environment's own functions of transitions [..., dim], with raw actions: 1 is the bound, more is cut."""

    def __init__(self, env: gym.Env, device: str):
        self.env, box = env.unwrapped, env.unwrapped.action_space
        if not (hasattr(self.env, "reward") and hasattr(self.env, "terminates")):
            raise SystemExit(f"{SCRIPT}.py: {env.spec.id} has no reward(obs, actions, next_obs), terminates(next_obs)")
        self.low, self.high = (torch.as_tensor(bound, device=device) for bound in (box.low, box.high))
        self.terminates = self.env.terminates

    def reward(self, obs: Tensor, actions: Tensor, next_obs: Tensor) -> Tensor:
        return self.env.reward(obs, self.low + (actions.clamp(-1, 1) + 1) / 2 * (self.high - self.low), next_obs)


class Steps(NamedTuple):
    """Transitions in the order of time. Actions are raw: 1 is the bound, but they may exceed it."""

    obs: Tensor  # [..., obs_dim]
    actions: Tensor  # [..., act_dim]
    rewards: Tensor  # [...]
    next_obs: Tensor  # [..., obs_dim], before any reset
    terminations: Tensor  # [...], 1 where the episode ended; 0 at a time limit
    truncations: Tensor  # [...], 1 where it was cut: the time limit, the end of a stage


def stack(rows: list[tuple], device: str) -> Steps:
    """[n, ...] of n transitions."""
    return Steps(*(torch.as_tensor(np.array(x, np.float32), device=device) for x in zip(*rows, strict=True)))


def check_task(task: KnownTask, steps: Steps) -> None:
    """Stops the run if the known functions are not what happened in real steps [n, ...]."""
    error = (task.reward(steps.obs, steps.actions, steps.next_obs) - steps.rewards).abs().max()
    wrong_ends = (task.terminates(steps.next_obs) != steps.terminations.bool()).sum()
    if not error <= 1e-4 or wrong_ends:
        found = f"reward is wrong by up to {error:.3g}, terminates {wrong_ends} times in {len(steps.obs)} steps"
        raise SystemExit(f"{SCRIPT}.py: the environment's {found}")


def stretches(data: Steps, n: int, batch: int, horizon: int) -> Steps:
    """[n, batch, horizon, ...]: consecutive rows from uniformly drawn ones on; the first row follows the last."""
    starts = torch.randint(len(data.obs), (n, batch, 1), device=data.obs.device)
    index = (starts + torch.arange(horizon, device=data.obs.device)) % len(data.obs)
    return Steps(*(field.index_select(0, index.flatten()).unflatten(0, index.shape) for field in data))


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


class RunningNormaliser(nn.Module):
    """Mean and standard deviation of everything seen so far; the identity at first."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.register_buffer("count", torch.zeros(()))

    def update(self, x: Tensor) -> None:
        """Merges [n, dim] in (the parallel variance of Chan et al.)."""
        x, mean, std, n = (numbers.cpu().double() for numbers in (x, self.mean, self.std, self.count))
        delta, share = x.mean(0) - mean, len(x) / (n + len(x))
        self.mean.copy_(mean + share * delta)
        self.std.copy_(((1 - share) * std**2 + share * x.var(0, correction=0) + share * (1 - share) * delta**2).sqrt())
        self.count += len(x)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std.clamp(min=1e-8)


def unit_columns(net: EnsembleMLP, last: float) -> EnsembleMLP:
    """Gaussian weights, those into each unit scaled to norm 1, into the last layer's to `last`."""
    for weight, norm in zip(net.weights, [1.0] * (len(net.weights) - 1) + [last], strict=True):
        nn.init.normal_(weight)
        weight.data *= norm / weight.data.norm(dim=1, keepdim=True)
    return net


class Actor(nn.Module):
    """Gaussian policy whose standard deviation is the same in all states. Actions are not squashed."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        self.normalise = RunningNormaliser(obs_dim)
        self.net = unit_columns(EnsembleMLP(1, [obs_dim, *hidden_sizes, act_dim], F.tanh), last=0.01)
        self.log_std = nn.Parameter(torch.zeros(act_dim))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [batch, act_dim] at obs [batch, obs_dim], log standard deviation [act_dim]."""
        return self.net(self.normalise(obs)[None])[0], self.log_std

    def sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Raw actions [batch, act_dim] from standard normal noise [batch, act_dim]."""
        mean, log_std = self(obs)
        return mean + log_std.exp() * noise

    @torch.no_grad()
    def act(self, obs: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """Action [act_dim] at an observation [obs_dim], cut to the bounds."""
        mean, log_std = self(torch.as_tensor(obs, device=self.log_std.device)[None])
        raw = mean if deterministic else mean + log_std.exp() * torch.randn_like(mean)
        return raw.clamp(-1, 1)[0].cpu().numpy()


class Value(nn.Module):
    """V(s) [batch] of obs [batch, obs_dim]."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        self.normalise = RunningNormaliser(obs_dim)
        self.net = unit_columns(EnsembleMLP(1, [obs_dim, *args.value_hidden_sizes, 1], F.tanh), last=1.0)
        self.to(args.device)
        self.optimizer = Adam(self.net.parameters(), args.value_lr)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(self.normalise(obs)[None])[0, :, 0]


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


class DeltaMLP(nn.Module):
    """The deterministic model M (two where their disagreement is asked for); at first s + the mean change."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.members = 2 if args.optimism else 1
        self.normalise, self.normalise_delta = RunningNormaliser(obs_dim), RunningNormaliser(obs_dim)
        self.net = EnsembleMLP(self.members, [obs_dim + act_dim, *args.model_hidden_sizes, obs_dim])
        for weight in self.net.weights:
            nn.init.trunc_normal_(weight, std=1e-5, a=-2e-5, b=2e-5)
        self.to(args.device)
        self.optimizer = Adam(self.net.parameters(), args.model_lr)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Next states [members, batch, obs_dim] of obs [members, batch, obs_dim], within 100 deviations of the mean."""
        z = self.net(torch.cat([self.normalise(obs), actions.clamp(-1, 1)], -1))
        next_obs = obs + self.normalise_delta.mean + self.normalise_delta.std * z
        reach = 100 * self.normalise.std.clamp(min=1e-8)
        return next_obs.clamp(self.normalise.mean - reach, self.normalise.mean + reach)


def contents(network: nn.Module) -> list[Tensor]:
    """All that a network remembers: weights, normalisers, its optimiser's moments."""
    adam = getattr(network, "optimizer", None)
    moments = [*adam.mean, *adam.square, adam.t, adam.scale] if adam else []
    return [tensor.data for tensor in network.state_dict(keep_vars=True).values()] + moments


def begin_anew(actor: Actor, value: Value, args: Args) -> None:
    """A fresh policy, and value, for a new task. Normalisers and model stay, and the objects, which are compiled."""
    obs_dim, act_dim = len(actor.normalise.mean), len(actor.log_std)
    fresh = {actor: Actor(obs_dim, act_dim, args.hidden_sizes).to(args.device), value: Value(obs_dim, args)}
    for network, new in fresh.items():
        new.normalise = network.normalise
        torch._foreach_copy_(contents(network), contents(new))


# ------------------------------------------------------------------------------------------- model and virtual steps
# For the reward R_j of task j, V_j^{pi,M*} >= V_j^{pi,M} - D_j(M, pi), as in slbo.py. D_j, how long M's errors are
# where pi goes, knows no reward but by V_j's slope. So data of any task tightens every task's bound.
def model_loss(dynamics: DeltaMLP, steps: Steps, args: Args) -> Tensor:
    """H-step loss (eq. 6.1) on stretches [members, batch, H, ...]: mean length of the errors along predicted paths.

    A norm as in D, over sqrt(obs_dim), not its square; in deviations of changes. It goes on at the reset after an end.
    """
    scale, loss = dynamics.normalise_delta.std.clamp(min=1e-6), 0.0
    ends = torch.maximum(steps.terminations, steps.truncations).bool()[..., None]
    next_obs = steps.obs[:, :, 0]
    for i in range(args.horizon):
        obs = torch.where(ends[:, :, i - 1], steps.obs[:, :, i], next_obs) if i else next_obs
        next_obs = dynamics(obs, steps.actions[:, :, i])
        drift = obs - steps.obs[:, :, i] if args.model_target == "delta" else 0.0  # so far, which the code subtracts
        square = ((next_obs - drift - steps.next_obs[:, :, i]) / scale).square().mean(-1)
        length = (square + 1e-12).sqrt() if args.loss == "l2" else square
        loss = loss + length.mean(1).sum() / args.horizon
    return loss


def dynamics_step(dynamics: DeltaMLP, steps: Steps, args: Args) -> Tensor:
    """One Adam step on the loss and the weights' decay, whose gradient is cut to a norm. Returns the loss."""
    params = dynamics.optimizer.params
    loss = model_loss(dynamics, steps, args)
    grads = torch.autograd.grad(loss, params)
    grads = torch._foreach_add(grads, params, alpha=args.model_weight_decay)
    norm = torch.stack(torch._foreach_norm(grads)).norm()
    dynamics.optimizer.step(torch._foreach_mul(grads, (args.model_max_grad_norm / norm).clamp(max=1.0)))
    return loss.detach()


@torch.no_grad()
def virtual_step(actor: Actor, dynamics: DeltaMLP, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Raw actions and next states [envs, ...] of the policy in the first model, disagreement of both models [envs]."""
    actions = actor.sample(obs, noise)
    next_obs = dynamics(obs.expand(dynamics.members, -1, -1), actions.expand(dynamics.members, -1, -1))
    apart = (next_obs[0] - next_obs[-1]) / dynamics.normalise_delta.std.clamp(min=1e-6)
    return actions, next_obs[0], apart.square().mean(-1).sqrt()


def virtual_rollout(step, actor: Actor, dynamics: DeltaMLP, task: KnownTask, starts: Tensor, args: Args) -> Steps:
    """Steps [virtual_steps, virtual_envs, ...] in the model; robots start, also anew, at random `starts` [n, dim]."""
    shape, rows = (args.virtual_steps, args.virtual_envs), []
    noise = torch.randn(*shape, len(actor.log_std), device=starts.device)
    fresh = starts[torch.randint(len(starts), shape, device=starts.device)]
    obs = fresh[0]
    for t in range(args.virtual_steps):
        actions, next_obs, disagreement = step(actor, dynamics, obs, noise[t])
        ends = task.terminates(next_obs)
        rows.append((obs, actions, next_obs, ends, disagreement))
        obs = torch.where(ends[:, None], fresh[(t + 1) % args.virtual_steps], next_obs)
    obs, actions, next_obs, ends, disagreement = map(torch.stack, zip(*rows, strict=True))
    rewards = task.reward(obs, actions, next_obs) + args.optimism * disagreement
    cuts = torch.zeros_like(rewards)
    cuts[-1] = 1
    return Steps(obs, actions, rewards, next_obs, ends.float(), cuts)


# ------------------------------------------------------------------------------------------- policy and value: TRPO
def generalised_advantages(steps: Steps, values: Tensor, next_values: Tensor, args: Args) -> Tensor:
    """[T, envs]. What follows a termination is worth 0, what follows a time limit V(s'); both cut the trace."""
    deltas = steps.rewards + args.gamma * (1 - steps.terminations) * next_values - values
    goes_on = 1 - torch.maximum(steps.terminations, steps.truncations)
    advantages, trace = torch.empty_like(deltas), torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        trace = deltas[t] + args.gamma * args.gae_lambda * goes_on[t] * trace
        advantages[t] = trace
    return advantages


def limited_entropy(mean: Tensor, log_std: Tensor, exact: bool) -> Tensor:
    """-integral of p log p over [-2, 2], [...] for each dimension: actions far outside the bounds earn nothing.

    The official expression is not this integral; it peaks at a standard deviation of 1.90, the integral at 1.28.
    """
    high, low = ((bound - mean) / (log_std.exp() * math.sqrt(2)) for bound in (2.0, -2.0))
    inside = high.erf() - low.erf()
    edge = high * (-high.square()).exp() - low * (-low.square()).exp()
    entropy = 0.5 * (log_std + 0.5 * math.log(2 * math.pi)) * inside
    return entropy + 0.25 * inside - edge / (2 * math.sqrt(math.pi)) if exact else entropy + 0.5 * edge


def log_prob(actions: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """[batch]"""
    z = (actions - mean) / log_std.exp()
    return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gain(actor: Actor, obs: Tensor, actions: Tensor, advantages: Tensor, old_log_prob: Tensor, coef, args) -> Tensor:
    """J = E[pi / pi_old A] + coef E[entropy]."""
    mean, log_std = actor(obs)
    ratio = (log_prob(actions, mean, log_std) - old_log_prob).exp()
    entropy = limited_entropy(mean, log_std, args.entropy == "exact").sum(-1)
    return (ratio * advantages).mean() + coef * entropy.mean()


def mean_kl(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> Tensor:
    """E[KL(old || new)] of two Gaussians, each a mean [batch, act_dim] and a log standard deviation [act_dim]."""
    (old_mean, old_log_std), (mean, log_std) = old, new
    spread = (2 * old_log_std).exp() + (old_mean - mean).square()
    return (log_std - old_log_std + 0.5 * spread * (-2 * log_std).exp() - 0.5).sum(-1).mean()


def flat(tensors) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def shaped(vector: Tensor, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """A flat vector in the parameters' shapes."""
    pieces = vector.split([param.numel() for param in params.values()])
    return {name: piece.view_as(param) for (name, param), piece in zip(params.items(), pieces, strict=True)}


def fisher_product(actor: Actor, obs: Tensor, vector: Tensor, args: Args) -> Tensor:
    """(F + damping) v, F the Hessian of mean_kl at new = old: E[J' J / sigma^2], J of the means, and 2 for log_std."""
    params = {name: param.detach() for name, param in actor.named_parameters()}
    output, pull_back = vjp(lambda p: functional_call(actor, p, (obs,)), params)
    _, (d_mean, d_log_std) = jvp(lambda p: functional_call(actor, p, (obs,)), (params,), (shaped(vector, params),))
    (product,) = pull_back((d_mean * (-2 * output[1]).exp() / len(obs), 2 * d_log_std))
    return flat(product[name] for name in params) + args.damping * vector


def conjugate_gradient(product, target: Tensor, iterations: int, tolerance: float = 1e-10) -> Tensor:
    """x with product(x) = target, [n]."""
    x, residual = torch.zeros_like(target), target.clone()
    direction, square = target.clone(), target @ target
    for _ in range(iterations):
        if square < tolerance:
            break
        image = product(direction)
        alpha = square / (direction @ image)
        x, residual = x + alpha * direction, residual - alpha * image
        new_square = residual @ residual
        direction, square = residual + new_square / square * direction, new_square
    return x


def trpo_update(actor: Actor, fisher, obs: Tensor, actions: Tensor, advantages: Tensor, coef: float, args: Args):
    """A step along the natural gradient on steps [n, ...], halved until gain and divergence allow it. Metrics."""
    params = dict(actor.named_parameters())
    with torch.no_grad():
        old = [x.clone() for x in actor(obs)]
        old_log_prob, old_params = log_prob(actions, *old), flat(params.values())
    old_gain = gain(actor, obs, actions, advantages, old_log_prob, coef, args)
    gradient = flat(torch.autograd.grad(old_gain, list(params.values())))
    with torch.no_grad():
        direction = conjugate_gradient(lambda v: fisher(actor, obs, v, args), gradient, args.cg_iterations)
        curvature = (direction @ fisher(actor, obs, direction, args)).clamp(min=1e-12)
        step = direction * (2 * args.max_kl / curvature).sqrt()  # of KL max_kl or, since F is damped, less
        for share in [*(0.5**k for k in range(10)), 0.0]:  # at last the old policy
            for param, new in zip(params.values(), shaped(old_params + share * step, params).values(), strict=True):
                param.copy_(new)
            new_gain, kl = gain(actor, obs, actions, advantages, old_log_prob, coef, args), mean_kl(old, actor(obs))
            if kl <= 1.5 * args.max_kl and new_gain >= old_gain:
                break
    return {"losses/gain": new_gain - old_gain.detach(), "losses/kl": kl, "losses/step_share": share}


def value_update(value: Value, obs: Tensor, targets: Tensor) -> Tensor:
    """One step on the squared error at obs [batch, obs_dim]. Returns it."""
    loss = (value(obs) - targets).square().mean()
    value.optimizer.step(torch.autograd.grad(loss, value.optimizer.params))
    return loss.detach()


def policy_update(actor: Actor, value: Value, fisher, update_value, steps: Steps, coef: float, args: Args) -> dict:
    """TRPO on steps [T, envs, ...] of the current policy, then the value's fit to the same steps. Returns metrics."""
    obs, actions, n = steps.obs.flatten(0, 1), steps.actions.flatten(0, 1), steps.rewards.numel()
    with torch.no_grad():
        values, next_values = (value(x.flatten(0, 1)).view_as(steps.rewards) for x in (steps.obs, steps.next_obs))
    advantages = generalised_advantages(steps, values, next_values, args)
    targets, advantages = (advantages + values).flatten(), advantages.flatten()
    advantages = (advantages - advantages.mean()) / advantages.std(correction=0).clamp(min=1e-8)
    metrics = trpo_update(actor, fisher, obs, actions, advantages, coef, args)
    size = min(args.value_batch_size, n)
    for _ in range(args.value_epochs):
        for rows in torch.randperm(n, device=obs.device)[: n // size * size].view(-1, size):
            metrics["losses/value"] = update_value(value, obs[rows], targets[rows])
    return metrics


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


# ------------------------------------------------------------------------------------------- the parts of a task
def collect(actor: Actor, env: gym.Env, n: int, seed: int, args: Args, ou_noise: float | Tensor = 0.0):
    """n real steps [n, ...] of the policy's samples with noise that lasts, and that noise [act_dim] at their end."""
    (obs, _), rows = env.reset(seed=hash((seed, 0)) % 2**31), []
    for step in range(n):
        noise = torch.randn(2, len(actor.log_std))
        ou_noise = (1 - args.ou_theta) * ou_noise + args.ou_sigma * noise[0]
        sample = actor.sample(torch.as_tensor(obs, device=args.device)[None], noise[1:].to(args.device))
        action = (sample.detach()[0].cpu() + ou_noise).numpy()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        rows.append((obs, action, reward, next_obs, terminated, truncated or step + 1 == n))
        obs = next_obs
        if (terminated or truncated) and step + 1 < n:
            obs, _ = env.reset(seed=hash((seed, step + 1)) % 2**31)
    return stack(rows, args.device), ou_noise


def remember(networks: tuple, replay: Steps | None, new: Steps, args: Args) -> Steps:
    """The buffer with new steps [n, ...], which the normalisers see as well."""
    for network in networks:
        network.normalise.update(new.obs)
    networks[-1].normalise_delta.update(new.next_obs - new.obs)
    pairs = zip(replay or Steps(*(field[:0] for field in new)), new, strict=True)
    return Steps(*(torch.cat(pair)[-args.buffer_size :] for pair in pairs))


def slbo_rounds(rounds: int, networks: tuple, updates, replay: Steps, known: KnownTask, starts: Tensor, args: Args):
    """SLBO's inner loop, no real step: the model on all tasks' data, the policy on this task in the model. Metrics."""
    (actor, value, dynamics), metrics = networks, {}
    update_model, step_virtually, fisher, update_value = updates
    for _ in range(rounds):  # each policy update gets fresh steps of the current policy in the current model
        for _ in range(args.model_updates):
            batch = stretches(replay, dynamics.members, args.model_batch_size // args.horizon, args.horizon)
            metrics["losses/model"] = update_model(dynamics, batch, args)
        for _ in range(args.policy_updates):
            steps = virtual_rollout(step_virtually, actor, dynamics, known, starts, args)
            metrics |= policy_update(actor, value, fisher, update_value, steps, args.entropy_coef, args)
            metrics["model/virtual_return"] = steps.rewards.sum() / args.virtual_envs
    return {name: float(number) for name, number in metrics.items()}


def try_held_out(index: int, stages: int, networks: tuple, updates, replay, known, starts, envs: tuple, args: Args):
    """Returns on a held-out task without real steps of it and after each of `stages`. What it learns is taken back."""
    saved, returns = [[x.clone() for x in contents(network)] for network in networks], []
    (actor, value, _), (env, eval_env) = networks, envs
    with torch.random.fork_rng():
        torch.manual_seed(hash((args.seed, 1, index)))
        set_task(envs, draw_task(env, args.seed, True, index))
        if known:
            begin_anew(actor, value, args)
        if replay is not None:  # zero-shot
            slbo_rounds(args.warm_up_rounds, networks, updates, replay, known, starts, args)
        for stage in range(stages + 1):
            seed = hash((args.seed, 1, index, stage)) % 2**31
            if stage:
                new, _ = collect(actor, env, args.stage_steps, seed, args)
                if not known:  # before the normalisers make another policy of it
                    columns = Steps(*(field[:, None] for field in new))  # one environment
                    policy_update(actor, value, *updates[2:], columns, args.entropy_coef, args)
                replay = remember(networks, replay, new, args)
                if known:
                    slbo_rounds(args.test_rounds, networks, updates, replay, known, starts, args)
            returns.append(float(evaluate(actor, eval_env, args.eval_episodes, seed)["eval_return_mean"]))
    for network, old in zip(networks, saved, strict=True):
        torch._foreach_copy_(contents(network), old)
    return returns


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
    """The sequence of tasks. Returns the rows of progress.csv."""
    args = pick_device(args)
    if args.algo == "scratch":  # held-out tasks at once, before anything is learned
        args = replace(args, total_timesteps=0, test_after=(0,))
    if args.algo == "goal-conditioned":  # what is not the policy's own is no sample for TRPO
        args = replace(args, ou_sigma=0.0, env_id=args.env_id.replace("-v", "Told-v"))
    if args.total_timesteps % args.stage_steps:
        raise SystemExit(f"{SCRIPT}.py: --total-timesteps is no multiple of --stage-steps {args.stage_steps}, one task")
    torch.set_num_threads(1)  # run several seeds side by side instead
    torch.set_flush_denormal(True)  # weight decay drives unused weights towards 0, where arithmetic is slow
    for set_seed in (torch.manual_seed, random.seed, np.random.seed):  # environments may draw from the last two
        set_seed(args.seed % 2**32)
    env, eval_env = both = make_env(args.env_id), make_env(args.env_id)
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    known = None if args.algo == "goal-conditioned" else KnownTask(eval_env, args.device)
    resets = [eval_env.reset(seed=hash((args.seed, 2, i)) % 2**31)[0] for i in range(1_000)]
    starts = torch.as_tensor(np.array(resets), device=args.device)
    training_task, held_out_task = (partial(draw_task, env, args.seed, held_out) for held_out in (False, True))
    batch_tasks = 1 if known else args.batch_tasks  # that share the real steps of a stage
    numbers = range(args.total_timesteps // args.stage_steps * batch_tasks), range(args.held_out_tasks)
    lists = dict(train_tasks=list(map(training_task, numbers[0])), held_out_tasks=list(map(held_out_task, numbers[1])))
    actor = Actor(obs_dim, act_dim, args.hidden_sizes).to(args.device)
    networks = actor, Value(obs_dim, args), DeltaMLP(obs_dim, act_dim, args)
    run_dir, state = open_run(args)
    (run_dir / "args.json").write_text(json.dumps(json.loads((run_dir / "args.json").read_text()) | lists, indent=2))
    actor, value, dynamics = networks = state.get("networks", networks)
    updates = [compiled(update, args) for update in (dynamics_step, virtual_step, fisher_product, value_update)]
    replay, ou_noise = state.get("replay"), state.get("ou_noise", torch.zeros(act_dim))
    rows, metrics, start_step = state.get("rows", []), state.get("metrics", {}), state.get("step", 0)
    tested, test_steps = state.get("tested", []), state.get("test_steps", 0)
    start_time = time.time() - state.get("wall_time", 0)
    writer = SummaryWriter(str(run_dir), purge_step=start_step + test_steps)

    for step in (bar := tqdm(range(start_step, args.total_timesteps + 1, args.stage_steps), unit="stage")):
        state = dict(networks=networks, replay=replay, ou_noise=ou_noise, rows=rows, metrics=metrics, step=step)
        state |= dict(tested=tested, test_steps=test_steps, wall_time=time.time() - start_time)
        if step > start_step and step % args.checkpoint_every < args.stage_steps:
            save_checkpoint(run_dir, state)

        number, seed = step // args.stage_steps, args.seed * 1_000_000 + step  # of finished tasks
        if testing := number in args.test_after:  # held-out tasks: zero-shot, and the last time also after real steps
            stages = args.test_stages if number == max(args.test_after) else 0
            for i in range(len(tested), args.held_out_tasks):
                tested.append(try_held_out(i, stages, networks, updates, replay, known, starts, both, args))
                save_checkpoint(run_dir, state | dict(wall_time=time.time() - start_time))
            test_steps += stages * args.stage_steps * args.held_out_tasks
        set_task(both, training_task(max(number - 1, 0) * batch_tasks))  # the policy's own
        if testing or step % args.eval_every == 0 or step == args.total_timesteps:
            row = dict(env_steps=step + test_steps, wall_time_s=round(time.time() - start_time, 1))
            row |= evaluate(actor, eval_env, args.eval_episodes, seed)
            row |= dict(train_tasks=number, train_steps=step, test_steps=test_steps)
            for stage, returns in enumerate(zip(*tested, strict=True)):
                name = f"after_{stage * args.stage_steps}"
                row |= {f"test/{name}": float(np.mean(returns))}
                row |= {f"test/task_{i}_{name}": result for i, result in enumerate(returns)}
            rows.append(row | {name: float(number) for name, number in metrics.items()})
            log_row(run_dir, rows, writer)
            policy = dict(actor=actor.state_dict(), sizes=(obs_dim, act_dim, args.hidden_sizes))
            torch.save(policy | dict(script=SCRIPT, env_id=args.env_id, task=env.unwrapped.task), run_dir / "policy.pt")
            bar.set_postfix_str(f"return {row['eval_return_mean']:.0f}")
            tested = []
        if step == args.total_timesteps:
            break

        if known:
            set_task(both, training_task(number))
            begin_anew(actor, value, args)
            if replay is not None:  # warm-up of the fresh policy, without a real step
                metrics |= slbo_rounds(args.warm_up_rounds, networks, updates, replay, known, starts, args)
            metrics["charts/zero_shot"] = evaluate(actor, eval_env, args.eval_episodes, seed)["eval_return_mean"]
            new, ou_noise = collect(actor, env, args.stage_steps, seed, args, ou_noise)
            if number == 0:
                check_task(known, new)
            fresh = stretches(new, dynamics.members, 1_000, args.horizon)
            metrics["model/loss_new_data"] = model_loss(dynamics, fresh, args).detach()
            replay = remember(networks, replay, new, args)
            metrics |= slbo_rounds(args.train_rounds, networks, updates, replay, known, starts, args)
        else:  # one TRPO step on real steps of several tasks
            parts = []
            for i in range(batch_tasks):
                set_task(both, training_task(number * batch_tasks + i))
                parts.append(collect(actor, env, args.stage_steps // batch_tasks, hash((seed, i)), args)[0])
            columns = Steps(*(torch.stack(field, 1) for field in zip(*parts, strict=True)))
            found = policy_update(actor, value, *updates[2:], columns, args.entropy_coef, args)
            remember(networks, None, Steps(*(field.flatten(0, 1) for field in columns)), args)
            metrics = {name: float(number) for name, number in found.items()}
        if not all(math.isfinite(number) for number in metrics.values()):
            raise SystemExit(f"{SCRIPT}.py: a loss is not finite at step {step}: {metrics}")

    writer.close()
    return rows


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
