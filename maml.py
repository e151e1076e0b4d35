"""MAML: Model-Agnostic Meta-Learning (Finn, Abbeel, Levine, arXiv 1703.03400), first order, with TRPO: the baseline of
Landolfi, Thomas, Ma (arXiv 1907.04964), whose own method is slbo_multitask.py.

Tasks differ only in the reward. Where slbo_multitask.py shares a model of the robot, MAML shares a policy's weights,
from which one gradient step on a few real episodes of a task leads to a policy for that task. An update: collect steps
of several tasks with the shared weights and take each task's gradient step; collect again with each task's own policy;
move the shared weights, by TRPO, so that the policies after the step earn more (first order: as if the step did not
depend on the weights).

    python maml.py                                      # HCF: HalfCheetah at speeds, a million real steps in all
    python maml.py --env-id HCFB-v0 --run-dir runs/a    # the same command again continues

Results, and where this differs from the papers: docs/maml.md
"""

import copy
import json
import math
import random
import subprocess
import time
from dataclasses import asdict, dataclass
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

SCRIPT = "maml"


@dataclass
class Args:
    env_id: str = "HCF-v0"  # gymnasium id of a family; it has `task` and `draw_task`
    seed: int = 1
    total_timesteps: int = 960_000  # real steps of the training tasks
    device: Literal["cpu", "cuda"] = "cpu"  # real steps take most of the time
    track: bool = False  # to Weights & Biases, into the project that WANDB_PROJECT names
    run_dir: str | None = None  # folder; one that holds a run is continued (a larger --total-timesteps lengthens it)
    checkpoint_every: int = 80_000  # steps; a checkpoint is written after an update
    eval_every: int = 80_000  # a multiple of an update's steps
    eval_episodes: int = 10  # of each held-out task

    # Tasks
    batch_tasks: int = 10  # of an update
    task_steps: int = 400  # real steps of each, before its gradient step and again after it
    held_out_tasks: int = 5
    stage_steps: int = 4_000  # real steps of a held-out task before a gradient step
    test_stages: int = 2  # gradient steps on a held-out task at the end of the run; their real steps count as well

    # Policy
    hidden_sizes: tuple[int, ...] = (32, 32)
    maml_lr: float = 0.1  # of the gradient step on a task; half of it in a second one
    gamma: float = 0.99
    gae_lambda: float = 0.95
    max_kl: float = 0.01
    cg_iterations: int = 10
    damping: float = 0.1
    entropy_coef: float = 0.005
    entropy: Literal["official", "exact"] = "official"  # of actions within [-2, 2]: SLBO's code, or the integral


# ----------------------------------------------------------------------------------------- environment and tasks
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


class Adapted(nn.Module):
    """A policy for each task of a batch: the shared weights, and a shift of them for each task.

    Shifts are no parameters: to the update of the shared weights they are constants. That is the first order.
    """

    def __init__(self, actor: Actor, tasks: int):
        super().__init__()
        self.actor = actor
        params = actor.net.parameters()  # [1, ...] each, where EnsembleMLP may have a network for each task
        self.shifts = [torch.zeros(tasks, *param.shape[1:], device=param.device) for param in params]

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """As Actor, of obs [tasks * n, obs_dim], task after task."""
        pairs = zip(self.actor.net.named_parameters(), self.shifts, strict=True)
        weights = {name: param + shift for (name, param), shift in pairs}
        rows = self.actor.normalise(obs).unflatten(0, (len(self.shifts[0]), -1))
        return functional_call(self.actor.net, weights, (rows,)).flatten(0, 1), self.actor.log_std

    def of_task(self, i: int) -> Actor:
        """The policy of the i-th task alone."""
        policy = copy.deepcopy(self.actor)
        for param, shift in zip(policy.net.parameters(), self.shifts, strict=True):
            param.data += shift[i]
        return policy


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


# ------------------------------------------------------------------------------------------------------- MAML
def linear_advantages(actor: Actor, steps: Steps, args: Args) -> Tensor:
    """Standardised advantages [T, tasks] of steps [T, tasks, ...].

    V is linear in the standardised state and its square, and fitted to each task's own lambda-returns, which depend
    on V in turn.
    """
    rows, next_rows = (actor.normalise(x).clamp(-10, 10).transpose(0, 1) for x in (steps.obs, steps.next_obs))
    rows, next_rows = (torch.cat([x, x.square()], -1) for x in (rows, next_rows))
    rows, next_rows = (F.pad(x, (0, 1), value=1.0) for x in (rows, next_rows))  # [tasks, T, 2 obs_dim + 1]
    ridge = 1e-3 * rows.shape[1] * torch.eye(rows.shape[2], device=rows.device)
    values, next_values = torch.zeros(2, *steps.rewards.shape, device=rows.device)
    for _ in range(20):
        advantages = generalised_advantages(steps, values, next_values, args)
        targets = (advantages + values).T[..., None]
        weights = torch.linalg.solve(rows.mT @ rows + ridge, rows.mT @ targets)
        values, next_values = (rows @ weights)[..., 0].T, (next_rows @ weights)[..., 0].T
    advantages = generalised_advantages(steps, values, next_values, args)
    return (advantages - advantages.mean(0)) / advantages.std(0, correction=0).clamp(min=1e-8)


def task_by_task(x: Tensor) -> Tensor:
    """[T, tasks, ...] -> [tasks * T, ...]"""
    return x.transpose(0, 1).flatten(0, 1)


def inner_step(policies: Adapted, steps: Steps, lr: float, args: Args) -> None:
    """MAML's step on each task: its policy gradient on its own steps [T, tasks, ...] moves its shift."""
    shifts = [shift.requires_grad_() for shift in policies.shifts]
    advantages = task_by_task(linear_advantages(policies.actor, steps, args))
    obs, actions = task_by_task(steps.obs), task_by_task(steps.actions)
    old_log_prob = log_prob(actions, *policies(obs)).detach()  # of the same policies: the gradient is A grad log pi
    mean_gain = gain(policies, obs, actions, advantages, old_log_prob, 0.0, args)
    gradients = torch.autograd.grad(mean_gain * len(shifts[0]), shifts)  # of the sum over tasks
    policies.shifts = [(shift + lr * grad).detach() for shift, grad in zip(shifts, gradients, strict=True)]


def outer_step(policies: Adapted, steps: Steps, args: Args) -> dict:
    """One TRPO step of the shared weights on steps [T, tasks, ...] of the adapted policies. Returns metrics."""
    advantages = task_by_task(linear_advantages(policies.actor, steps, args))
    obs, actions = task_by_task(steps.obs), task_by_task(steps.actions)
    return trpo_update(policies, fisher_product, obs, actions, advantages, args.entropy_coef, args)


# ------------------------------------------------------------------------------------------- real steps
@torch.no_grad()
def rollout(actor: Actor, env: gym.Env, n: int, seed: int, device: str) -> Steps:
    """n real steps [n, ...] of the policy's samples; the last episode is cut like at a time limit."""
    (obs, _), rows = env.reset(seed=hash((seed, 0)) % 2**31), []
    for step in range(n):
        noise = torch.randn(1, len(actor.log_std), device=device)
        action = actor.sample(torch.as_tensor(obs, device=device)[None], noise)[0].cpu().numpy()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        rows.append((obs, action, reward, next_obs, terminated, truncated or step + 1 == n))
        obs = next_obs
        if (terminated or truncated) and step + 1 < n:
            obs, _ = env.reset(seed=hash((seed, step + 1)) % 2**31)
    return stack(rows, device)


def collect(policies: Adapted, env: gym.Env, tasks: list[tuple], n: int, seed: int, device: str) -> Steps:
    """n real steps [n, tasks, ...] of each task with its own policy."""
    parts = []
    for i, task in enumerate(tasks):
        env.unwrapped.task = task
        parts.append(rollout(policies.of_task(i), env, n, hash((seed, i)) % 2**31, device))
    return Steps(*(torch.stack(field, 1) for field in zip(*parts, strict=True)))


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


def evaluate_tasks(policies: Adapted, env: gym.Env, tasks: list[tuple], episodes: int, seed: int) -> dict:
    """Each number of `evaluate` [tasks], of each task with its own policy."""
    results = []
    for i, task in enumerate(tasks):
        env.unwrapped.task = task
        results.append(evaluate(policies.of_task(i), env, episodes, seed))
    return {name: [float(result[name]) for result in results] for name in results[0]}


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
    """MAML. Returns the rows of progress.csv."""
    update_steps = 2 * args.batch_tasks * args.task_steps
    if args.total_timesteps % update_steps or args.eval_every % update_steps:
        raise SystemExit(
            f"{SCRIPT}.py: an update takes {update_steps} steps; --total-timesteps, --eval-every: multiples"
        )
    torch.set_num_threads(1)  # run several seeds side by side instead
    for set_seed in (torch.manual_seed, random.seed, np.random.seed):  # environments may draw from the last two
        set_seed(args.seed % 2**32)
    env, eval_env = make_env(args.env_id), make_env(args.env_id)
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    held_out = [draw_task(env, args.seed, True, i) for i in range(args.held_out_tasks)]
    run_dir, state = open_run(args)
    about = json.loads((run_dir / "args.json").read_text()) | dict(held_out_tasks=held_out)
    (run_dir / "args.json").write_text(json.dumps(about, indent=2))
    actor = state.get("actor") or Actor(obs_dim, act_dim, args.hidden_sizes).to(args.device)
    rows, metrics, start_step = state.get("rows", []), state.get("metrics", {}), state.get("step", 0)
    start_time = time.time() - state.get("wall_time", 0)
    writer = SummaryWriter(str(run_dir), purge_step=start_step)

    bar = tqdm(range(start_step, args.total_timesteps + 1, update_steps), unit="update")
    for step in bar:
        number, seed = step // update_steps, args.seed * 1_000_000 + step  # number: of finished updates
        if step % args.eval_every == 0 or step == args.total_timesteps:
            policies = Adapted(actor, args.held_out_tasks)
            zero_shot = evaluate_tasks(policies, eval_env, held_out, args.eval_episodes, seed)
            row = {name: float(np.mean(numbers)) for name, numbers in zero_shot.items()}
            row |= dict(train_tasks=number * args.batch_tasks, train_steps=step, test_steps=0)
            if step == args.total_timesteps and args.test_stages:  # held-out tasks: gradient steps on real steps
                returns = [zero_shot["eval_return_mean"]]
                for stage in range(args.test_stages):
                    steps = collect(policies, env, held_out, args.stage_steps, hash((seed, 2, stage)), args.device)
                    inner_step(policies, steps, args.maml_lr / min(2, stage + 1), args)
                    row["test_steps"] += args.stage_steps * args.held_out_tasks
                    after = evaluate_tasks(policies, eval_env, held_out, args.eval_episodes, seed)
                    returns.append(after["eval_return_mean"])
                for stage, each in enumerate(returns):
                    name = f"after_{stage * args.stage_steps}"
                    row[f"test/{name}"] = float(np.mean(each))
                    row |= {f"test/task_{i}_{name}": result for i, result in enumerate(each)}
            counts = dict(env_steps=step + row["test_steps"], wall_time_s=round(time.time() - start_time, 1))
            rows.append(counts | row | {name: float(value) for name, value in metrics.items()})
            log_row(run_dir, rows, writer)
            policy = dict(actor=actor.state_dict(), sizes=(obs_dim, act_dim, args.hidden_sizes), task=held_out[0])
            torch.save(policy | dict(script=SCRIPT, env_id=args.env_id), run_dir / "policy.pt")
            bar.set_postfix_str(f"return {row['eval_return_mean']:.0f}")
        if step == args.total_timesteps:
            break

        tasks = [draw_task(env, args.seed, False, number * args.batch_tasks + i) for i in range(args.batch_tasks)]
        policies = Adapted(actor, args.batch_tasks)
        before = collect(policies, env, tasks, args.task_steps, hash((seed, 0)), args.device)
        inner_step(policies, before, args.maml_lr, args)
        after = collect(policies, env, tasks, args.task_steps, hash((seed, 1)), args.device)
        metrics = outer_step(policies, after, args)
        metrics["charts/reward_before"], metrics["charts/reward_after"] = before.rewards.mean(), after.rewards.mean()
        for steps in (before, after):
            actor.normalise.update(steps.obs.flatten(0, 1))

        if not all(math.isfinite(value) for value in metrics.values()):
            raise SystemExit(f"{SCRIPT}.py: a loss is not finite at step {step}: {metrics}")
        if step + update_steps - state.get("step", 0) >= args.checkpoint_every:
            state = dict(actor=actor, rows=rows, metrics=metrics, step=step + update_steps)
            save_checkpoint(run_dir, state | dict(wall_time=time.time() - start_time))

    writer.close()
    return rows


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
