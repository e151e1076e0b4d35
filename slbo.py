"""SLBO: Stochastic Lower Bound Optimization (Luo et al., "Algorithmic Framework for Model-based Deep Reinforcement
Learning with Theoretical Guarantees", arXiv 1807.03858).

Model and policy maximise, together, a lower bound of the policy's true return: its return in the model, minus a bound
D(M, pi) on what the model gets wrong where the policy goes. D is a norm, not a squared norm, of predictions over a few
steps. Between two collections of real data, many rounds alternate a few model steps with a few policy steps (TRPO in
the model), so that the policy never sees one model for long. Reward and termination are known functions.

    python slbo.py                                            # HalfCheetah, 80,000 real steps, one core
    python slbo.py --env-id SLBOHopper-v0 --run-dir runs/a    # the same command again continues an interrupted run
    python slbo.py --algo mb-trpo                             # the same amounts, model first, then policy

Results, the paper's own settings, and where this differs from the paper and the authors' code: docs/slbo.md
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

import envs.com_velocity  # noqa: F401  registers SLBOHalfCheetah-v0 and the other robots

SCRIPT = "slbo"


@dataclass
class Args:
    env_id: str = "SLBOHalfCheetah-v0"  # gymnasium id; the environment has methods `reward` and `terminates`
    seed: int = 1
    total_timesteps: int = 80_000
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile: a minute at the start, then faster (docs/speed.md)
    track: bool = False  # to Weights & Biases, into the project that WANDB_PROJECT names
    run_dir: str | None = None  # folder; one that holds a run is continued (a larger --total-timesteps lengthens it)
    checkpoint_every: int = 4_000  # steps; a checkpoint is written at the end of a stage
    eval_every: int = 4_000
    eval_episodes: int = 10

    # Stages: collect real steps, then alternate rounds of model and policy updates
    algo: Literal["slbo", "mb-trpo", "mf-trpo"] = "slbo"
    """mb-trpo: one round with all the updates. mf-trpo: one policy update on each stage's real steps, no model"""
    stage_steps: int = 4_000
    rounds: int = 10
    model_updates: int = 100  # in each round
    policy_updates: int = 5  # in each round, each with fresh virtual steps
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
    virtual_steps: int = 200  # of each for a policy update; the last one is cut like a time limit

    # Policy (TRPO) and value
    hidden_sizes: tuple[int, ...] = (32, 32)
    gamma: float = 0.99
    gae_lambda: float = 0.95
    max_kl: float = 0.01
    cg_iterations: int = 10
    damping: float = 0.1
    entropy_coef: float = 0.005
    entropy: Literal["official", "exact"] = "official"  # of actions within [-2, 2], as in the code or as the integral
    entropy_until: int = 40_000  # real steps after which there is no entropy bonus (paper: half of the run)
    value_hidden_sizes: tuple[int, ...] = (64, 64)
    value_lr: float = 1e-3
    value_epochs: int = 5
    value_batch_size: int = 256


# --------------------------------------------------------------------------------------- environment and replay
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


# ------------------------------------------------------------------------------------------- model and virtual steps
# V^{pi,M} is the discounted return of pi in M, and M* the truth. If V^{pi,M} is L-Lipschitz and pi is near the policy
# that collected the data, then V^{pi,M*} >= V^{pi,M} - D(M, pi) (R1), D(M, pi) = gamma / (1 - gamma) L E|M(s, a) - s'|
# over real steps (R3), up to the policies' distance. D is 0 at M* (R2). Who maximises V^{pi,M} - D(M, pi) over pi near
# the last policy and over models, M* among them, never gets worse: V^{new,M*} >= V^{new,M} - D(M, new) >= V^{last,M*} -
# D(M*, last) = V^{last,M*}, by R1, since (last, M*) was a candidate, and by R2. SLBO climbs in turns (eq. 6.2): V by
# TRPO in a model that stands still, -D by Adam on the H-step loss; the weight lambda between them does not matter then.
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


def real_episodes(act, env: gym.Env, episodes: int, seed: int, device: str) -> tuple[Steps, Tensor]:
    """Steps [n, ...] of act(obs) that nobody learns from, and how many steps of its episode were before each [n]."""
    rows, times = [], []
    for episode in range(episodes):
        obs, info = env.reset(seed=seed + episode)
        while "episode" not in info:
            action = act(obs)
            next_obs, reward, terminated, truncated, info = env.step(action)
            rows.append((obs, action, reward, next_obs, terminated, truncated))
            obs = next_obs
        times += range(info["episode"]["l"])
    return stack(rows, device), torch.tensor(times, device=device)


@torch.no_grad()
def virtual_value(actor: Actor, dynamics: DeltaMLP, task: KnownTask, obs: Tensor, length: int, gamma: float) -> Tensor:
    """Mean discounted return of the policy without noise in the model, from obs [n, obs_dim] on."""
    noise, alive, total = torch.zeros(len(obs), len(actor.log_std), device=obs.device), 1.0, 0.0
    for t in range(length):
        actions, next_obs, _ = virtual_step(actor, dynamics, obs, noise)
        total = total + gamma**t * alive * task.reward(obs, actions, next_obs)
        alive = alive * ~task.terminates(next_obs)
        obs = next_obs
    return total.mean()


def discrepancy(value: Value, dynamics: DeltaMLP, task: KnownTask, steps: Steps, times: Tensor, gamma: float) -> dict:
    """D(M, pi) = L E[sum_t gamma^t |M(s, a) - s'|] over real steps [n, ...], lengths in deviations of the states.

    Rewards depend on s' here, so L is the slope of r(s, a, s') + gamma V(s'), the steepest there of the learned V.
    """
    std, next_obs = value.normalise.std, steps.next_obs.clone().requires_grad_()
    worth = task.reward(steps.obs, steps.actions, next_obs) + gamma * value(next_obs)
    (slopes,) = torch.autograd.grad(worth.sum(), next_obs)
    lipschitz = (slopes * std).norm(dim=-1).max()
    shape = dynamics.members, -1, -1
    predicted = dynamics(steps.obs.expand(shape), steps.actions.expand(shape))[0].detach()
    errors = ((predicted - steps.next_obs) / std.clamp(min=1e-6)).norm(dim=-1)
    bound = lipschitz * (gamma**times * errors).sum() / (times == 0).sum()
    return {"model/bound": bound, "model/lipschitz": lipschitz, "model/error": errors.mean()}


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
    """SLBO (algorithm 2). Returns the rows of progress.csv."""
    args = pick_device(args)
    torch.set_num_threads(1)  # run several seeds side by side instead
    torch.set_flush_denormal(True)  # weight decay drives unused weights towards 0, where arithmetic is slow
    for set_seed in (torch.manual_seed, random.seed, np.random.seed):  # environments may draw from the last two
        set_seed(args.seed % 2**32)
    env, eval_env = make_env(args.env_id), make_env(args.env_id)
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    model_based = args.algo != "mf-trpo"
    if model_based:
        task = KnownTask(eval_env, args.device)
        rng = np.random.default_rng(args.seed)
        random_steps, _ = real_episodes(lambda obs: rng.uniform(-1, 1, act_dim), eval_env, 20, args.seed, args.device)
        check_task(task, random_steps)
    run_dir, state = open_run(args)
    actor = state.get("actor") or Actor(obs_dim, act_dim, args.hidden_sizes).to(args.device)
    value = state.get("value") or Value(obs_dim, args)
    dynamics = state.get("dynamics") or DeltaMLP(obs_dim, act_dim, args)
    replay, ou_noise = state.get("replay"), state.get("ou_noise", torch.zeros(act_dim))
    rows, metrics, start_step = state.get("rows", []), state.get("metrics", {}), state.get("step", 0)
    start_time = time.time() - state.get("wall_time", 0)
    update_model, step_virtually = compiled(dynamics_step, args), compiled(virtual_step, args)
    fisher, update_value = compiled(fisher_product, args), compiled(value_update, args)
    rounds, times_more = (1, args.rounds) if args.algo == "mb-trpo" else (args.rounds, 1)
    writer = SummaryWriter(str(run_dir), purge_step=start_step)
    (obs, _), stage = env.reset(seed=hash((args.seed, start_step)) % 2**31), []
    if not np.array_equal(obs, state.get("obs", obs)):
        print(f"{SCRIPT}.py: {args.env_id} keeps state that no reset restores; uninterrupted, the run would differ")

    bar = tqdm(range(start_step, args.total_timesteps + 1), initial=start_step, total=args.total_timesteps)
    for step in bar:
        if step % args.eval_every == 0 or step == args.total_timesteps:
            seed, greedy = args.seed * 1_000_000 + step, partial(actor.act, deterministic=True)
            row = dict(env_steps=step, wall_time_s=round(time.time() - start_time, 1))
            row |= evaluate(actor, eval_env, args.eval_episodes, seed)
            if model_based:  # how far V^{pi,M} is from V^{pi,M*}, in these episodes once more, and the bound on it
                steps, times = real_episodes(greedy, eval_env, args.eval_episodes, seed, args.device)
                starts, limit = steps.obs[times == 0], env.spec.max_episode_steps
                virtual = virtual_value(actor, dynamics, task, starts, limit, args.gamma)
                real = (args.gamma**times * steps.rewards).sum() / len(starts)
                metrics |= {"model/virtual_value": virtual, "model/real_value": real, "model/gap": virtual - real}
                metrics |= discrepancy(value, dynamics, task, steps, times, args.gamma)
            rows.append(row | {name: float(number) for name, number in metrics.items()})
            log_row(run_dir, rows, writer)
            policy = dict(actor=actor.state_dict(), sizes=(obs_dim, act_dim, args.hidden_sizes))
            torch.save(policy | dict(script=SCRIPT, env_id=args.env_id), run_dir / "policy.pt")
            bar.set_postfix_str(f"return {row['eval_return_mean']:.0f}")
        if step == args.total_timesteps:
            break

        # Collect real steps: the policy's samples with noise that lasts (mf-trpo: without, as it learns from them)
        ou_noise = (1 - args.ou_theta) * ou_noise + args.ou_sigma * torch.randn(act_dim)
        state_row, noise = torch.as_tensor(obs, device=args.device)[None], torch.randn(1, act_dim, device=args.device)
        action = actor.sample(state_row, noise).detach()[0].cpu() + model_based * ou_noise
        next_obs, reward, terminated, truncated, _ = env.step(action.numpy())
        stage_ends = (step + 1) % args.stage_steps == 0
        stage.append((obs, action.numpy(), reward, next_obs, terminated, truncated or stage_ends))
        obs = next_obs
        if terminated or truncated or stage_ends:
            obs, _ = env.reset(seed=hash((args.seed, step + 1)) % 2**31)
        if not stage_ends:
            continue

        new, stage = stack(stage, args.device), []
        coef = args.entropy_coef if step < args.entropy_until else 0.0
        if not model_based:  # before the normalisers make another policy of it
            columns = Steps(*(field[:, None] for field in new))  # one environment
            metrics |= policy_update(actor, value, fisher, update_value, columns, coef, args)
        pairs = zip(replay or Steps(*(field[:0] for field in new)), new, strict=True)
        replay = Steps(*(torch.cat(pair)[-args.buffer_size :] for pair in pairs))
        for network in (actor, value, dynamics):
            network.normalise.update(new.obs)
        dynamics.normalise_delta.update(new.next_obs - new.obs)
        if model_based:
            fresh = stretches(new, dynamics.members, 1_000, args.horizon)
            metrics["model/loss_new_data"] = model_loss(dynamics, fresh, args).detach()
            seeds = [hash((args.seed, step, i)) % 2**31 for i in range(1_000)]
            starts = torch.as_tensor(np.array([eval_env.reset(seed=seed)[0] for seed in seeds]), device=args.device)
            for _ in range(rounds):  # each policy update gets fresh steps of the current policy in the current model
                for _ in range(times_more * args.model_updates):
                    batch = stretches(replay, dynamics.members, args.model_batch_size // args.horizon, args.horizon)
                    metrics["losses/model"] = update_model(dynamics, batch, args)
                for _ in range(times_more * args.policy_updates):
                    steps = virtual_rollout(step_virtually, actor, dynamics, task, starts, args)
                    metrics |= policy_update(actor, value, fisher, update_value, steps, coef, args)

        if not all(math.isfinite(number) for number in metrics.values()):
            raise SystemExit(f"{SCRIPT}.py: a loss is not finite at step {step}: {metrics}")
        if step + 1 - state.get("step", 0) >= args.checkpoint_every:  # between stages: resuming is exact
            state = dict(actor=actor, value=value, dynamics=dynamics, replay=replay, ou_noise=ou_noise, obs=obs)
            state |= dict(rows=rows, metrics=metrics, step=step + 1, wall_time=time.time() - start_time)
            save_checkpoint(run_dir, state)

    writer.close()
    return rows


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
