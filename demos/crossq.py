"""CrossQ (Bhatt et al., arXiv 1902.05605v4): the experts that plain SAC is too slow for. Made from sac.py.

SAC whose critics have batch normalisation and no target network; both states of a transition go through them in one
batch. The actor is updated every third time. What it made, and how: demos/README.md

    python demos/crossq.py --env-id Humanoid-v4 --bf16 --total-timesteps 300000 --run-dir runs/humanoid
    python evaluate.py runs/humanoid/policy.pt --episodes 50        # each evaluation's is kept, as policy_<steps>.pt
"""

import copy
import csv
import json
import math
import os
import random
import subprocess
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
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

SCRIPT = "crossq"


@dataclass
class Args:
    env_id: str = "Hopper-v4"  # gymnasium id; "dm_control/walker-walk-v0" or "my_module:MyEnv-v0" work too
    seed: int = 1
    total_timesteps: int = 1_000_000
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    compile: bool = True  # needs a C++ compiler
    bf16: bool = False  # hidden layers in bfloat16; only fast on CPUs with avx512_bf16 or amx_bf16 (see lscpu)
    track: bool = False  # to Weights & Biases
    run_dir: str | None = None  # folder; one that holds a run is continued (a larger --total-timesteps lengthens it)
    checkpoint_every: int = 50_000  # steps; a checkpoint is written at the end of an episode
    eval_every: int = 10_000
    eval_episodes: int = 10

    # SAC
    hidden_sizes: tuple[int, ...] = (256, 256)
    critic_hidden_sizes: tuple[int, ...] = (512, 512)
    policy_delay: int = 3  # updates of the critics between those of actor and temperature
    ema_steps: int = 2_000  # the evaluated actor is an average of the training actor over about so many steps
    reset_every: int = 0  # cut training episodes at its multiples, and act without noise between every second two
    init: str | None = None  # folder of a run at another task of the same robot, whose actor and critics go on here
    prior: str | None = None  # .npz of transitions that fill half of each batch (RLPD, arXiv 2302.02948)
    buffer_size: int = 1_000_000
    learning_starts: int = 5_000  # uniformly random actions before
    batch_size: int = 256
    gamma: float = 0.99
    actor_lr: float = 3e-4
    critic_lr: float = 1e-3
    alpha_lr: float = 1e-3
    alpha: float = 1.0
    target_entropy: float | None = None  # default: minus the action dimension


# --------------------------------------------------------------------------------------- environment and replay
OBS_DIM = {"Ant": 27, "Humanoid": 45}  # positions and velocities only, whatever a version of the robot adds behind them


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """Environment with flat float32 observations, copied when they arrive, and actions in [-1, 1]."""
    env = gym.make(f"shimmy:{env_id}" if env_id.startswith("dm_control/") else env_id, render_mode=render_mode)
    if isinstance(env.observation_space, gym.spaces.Dict):
        env = gym.wrappers.FlattenObservation(env)
    spaces = env.observation_space, env.action_space
    if not all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in spaces):
        raise SystemExit(f"{SCRIPT}.py: {env_id} needs vectors of observations and continuous actions, not {spaces}")
    if env.spec.max_episode_steps is None and not env_id.startswith("dm_control/"):  # these bring their own
        raise SystemExit(f"{SCRIPT}.py: {env_id} has no time limit: register it with max_episode_steps")
    dim, box = OBS_DIM.get(env_id.split("-v")[0], spaces[0].shape[0]), env.action_space
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
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.ones(obs_dim))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation before the tanh, [batch, act_dim] each."""
        mean, log_std = self.net(((obs - self.mean) / self.std)[None])[0].chunk(2, -1)
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


class BatchNorm(nn.Module):
    """Of n stacked networks, [n, batch, dim]: the batch's statistics in the critics' update, running ones elsewhere."""

    def __init__(self, n: int, dim: int):
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(n, 1, dim)), nn.Parameter(torch.zeros(n, 1, dim))
        self.register_buffer("mean", torch.zeros(n, 1, dim))
        self.register_buffer("var", torch.ones(n, 1, dim))

    def forward(self, x: Tensor, train: bool) -> Tensor:
        mean, var = self.mean, self.var
        if train:
            mean, var = x.float().mean(1, keepdim=True), x.float().var(1, keepdim=True, unbiased=False)
            with torch.no_grad():
                self.mean.lerp_(mean.detach(), 0.01)
                self.var.lerp_(var.detach(), 0.01)
        scale = (var + 1e-5).rsqrt() * self.gain
        return x * scale.to(x.dtype) + (self.bias - mean * scale).to(x.dtype)


class Critic(nn.Module):
    """Twin Q functions, [2, batch]: batch normalisation of the input and after each hidden layer."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        self.net = EnsembleMLP(2, [obs_dim + act_dim, *hidden_sizes, 1])
        self.norms = nn.ModuleList(BatchNorm(2, dim) for dim in (obs_dim + act_dim, *hidden_sizes))

    def forward(self, obs: Tensor, actions: Tensor, train: bool = False) -> Tensor:
        x = self.norms[0](torch.cat([obs, actions], -1).expand(2, -1, -1), train)
        *hidden, (last_weight, last_bias) = zip(self.net.weights, self.net.biases, strict=True)
        for (weight, bias), norm in zip(hidden, self.norms[1:], strict=True):
            x = torch.bmm(x, weight)
            x = norm(F.relu(x + bias.to(x.dtype)), train)
        with torch.autocast(x.device.type, enabled=False):
            return (x.float() * last_weight.mT).sum(-1) + last_bias.squeeze(-1)


class Adam:
    """torch.optim.Adam in plain tensor operations, so that torch.compile makes one graph of a whole update."""

    def __init__(self, params, lr: float, beta: float = 0.9):
        self.params, self.lr, self.beta = list(params), lr, beta
        self.mean = [torch.zeros_like(p) for p in self.params]
        self.square = [torch.zeros_like(p) for p in self.params]
        self.t = torch.zeros((), device=self.params[0].device)
        self.scale = torch.zeros_like(self.t)

    @torch.no_grad()
    def step(self, grads) -> None:
        self.t += 1
        torch._foreach_lerp_(self.mean, grads, 1 - self.beta)
        torch._foreach_lerp_(self.square, torch._foreach_mul(grads, grads), 0.001)
        self.scale.copy_(self.lr * (1 - 0.999**self.t).sqrt() / (1 - self.beta**self.t))  # or the compiler repeats it
        root = torch._foreach_add(torch._foreach_sqrt(self.square), 1e-8)
        torch._foreach_sub_(self.params, torch._foreach_mul(torch._foreach_div(self.mean, root), self.scale))


class Agent(nn.Module):
    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, act_dim, args.hidden_sizes)
        self.critic = Critic(obs_dim, act_dim, args.critic_hidden_sizes)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))
        self.target_entropy = -act_dim if args.target_entropy is None else args.target_entropy
        self.to(args.device)
        self.actor_optimizer = Adam(self.actor.parameters(), args.actor_lr, beta=0.5)
        self.critic_optimizer = Adam(self.critic.parameters(), args.critic_lr, beta=0.5)
        self.alpha_optimizer = Adam([self.log_alpha], args.alpha_lr)


# --------------------------------------------------------------------------------------- losses and updates
def critic_loss(agent: Agent, batch: Batch, noise: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """Soft Bellman error of both critics, and the mean Q value."""
    with torch.autocast(batch.obs.device.type, torch.bfloat16, enabled=args.bf16):
        with torch.no_grad():
            next_actions, next_log_prob = agent.actor.sample(batch.next_obs, noise)
        both = torch.cat([batch.obs, batch.next_obs]), torch.cat([batch.actions, next_actions])
        q, next_q = agent.critic(*both, train=True).chunk(2, 1)
        next_q = next_q.detach().amin(0) - agent.log_alpha.detach().exp() * next_log_prob
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_q
    return (q - target).square().mean(1).sum(), q.detach().mean()


def actor_loss(agent: Agent, batch: Batch, noise: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """alpha log pi(a|s) - Q(s, a) (eq. 9), and the policy's entropy."""
    with torch.autocast(batch.obs.device.type, torch.bfloat16, enabled=args.bf16):
        actions, log_prob = agent.actor.sample(batch.obs, noise)
        q = agent.critic(batch.obs, actions).amin(0)
    return (agent.log_alpha.exp().detach() * log_prob - q).mean(), -log_prob.detach().mean()


def crossq_update(agent: Agent, batch: Batch, noise: Tensor, with_actor: bool, args: Args) -> dict[str, Tensor]:
    """One gradient step of the critics, and of actor and temperature. noise [2, batch, act_dim] is standard normal."""
    q_loss, q = critic_loss(agent, batch, noise[0], args)
    agent.critic_optimizer.step(torch.autograd.grad(q_loss, agent.critic_optimizer.params))
    metrics = dict(critic=q_loss, q=q)
    if with_actor:
        pi_loss, entropy = actor_loss(agent, batch, noise[1], args)
        agent.actor_optimizer.step(torch.autograd.grad(pi_loss, agent.actor_optimizer.params))
        agent.alpha_optimizer.step([entropy - agent.target_entropy])
        metrics |= dict(actor=pi_loss, entropy=entropy, alpha=agent.log_alpha.exp())
    return {f"losses/{name}": value.detach() for name, value in metrics.items()}


def policy_of(actor: Actor) -> dict[str, Tensor]:
    """The actor's weights with its standardisation inside, as sac.py's Actor takes them."""
    state = actor.state_dict()
    mean, std, weight = state.pop("mean"), state.pop("std"), state["net.weights.0"]
    state["net.biases.0"] = state["net.biases.0"] - (mean / std)[None, None] @ weight
    return state | {"net.weights.0": weight / std[:, None]}


# ------------------------------------------------------------------------------- evaluation, logging, checkpoints
def evaluate(actor: Actor, env: gym.Env, episodes: int, seed: int) -> dict[str, float]:
    """Deterministic episodes of the true reward. Draws no random numbers from the training run's generator."""
    results = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        done, success = False, math.nan
        while not done:
            obs, _, terminated, truncated, info = env.step(actor.act(obs, deterministic=True))
            success = np.fmax(success, np.asarray(info.get("success", info.get("is_success")), float).max())
            done = terminated or truncated
        results.append((info["episode"]["r"], info["episode"]["l"], success))
    returns, lengths, successes = np.array(results, float).T
    rate = math.nan if np.isnan(successes).all() else np.nan_to_num(successes).mean()  # no report counts as no success
    result = dict(eval_return_mean=returns.mean(), eval_return_std=returns.std())
    return result | dict(eval_length_mean=lengths.mean(), eval_success_rate=rate)


def log_row(run_dir: Path, rows: list[dict], writer: SummaryWriter) -> None:
    """Writes progress.csv, and its last row to TensorBoard."""
    with open(run_dir / "progress.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        table.writeheader()
        table.writerows(rows)
    for name, value in rows[-1].items():
        writer.add_scalar(name.replace("eval_", "eval/"), value, rows[-1]["env_steps"])


def save_checkpoint(run_dir: Path, state: dict) -> None:
    """Writes to a temporary file first: an interruption leaves the previous checkpoint as it was."""
    state |= dict(rng=torch.get_rng_state(), cuda_rng=torch.cuda.get_rng_state_all())
    torch.save(state, run_dir / "checkpoint.tmp")
    os.replace(run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt")


def open_run(args: Args) -> tuple[Path, dict]:
    """The run's folder with args.json (settings, versions, commit), and its last checkpoint, {} if there is none."""
    name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{SCRIPT}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.run_dir or f"runs/{name}")
    file, settings = run_dir / "args.json", json.loads(json.dumps(asdict(args)))
    if args.track:
        import wandb

        wandb.init(project="hybrid-imitation", id=run_dir.name, resume="allow", config=settings, sync_tensorboard=True)
    run_dir.mkdir(parents=True, exist_ok=args.run_dir is not None)
    for name, old in json.loads(file.read_text())["args"].items() if file.exists() else ():
        new, flag = settings[name], f"--{name.replace('_', '-')}"
        if new != old and name not in ("run_dir", "compile") and not (name == "total_timesteps" and new > old):
            raise SystemExit(f"{SCRIPT}.py: {flag} was {old} in {run_dir}, now it is {new}")
    status, commit = subprocess.getstatusoutput("git describe --always --dirty --abbrev=40 --exclude='*'")
    about = dict(script=SCRIPT, args=settings, commit=None if status else commit)
    about |= {name: version(name) for name in ("torch", "gymnasium", "mujoco", "numpy")}
    about["gpu"] = torch.cuda.get_device_name() if args.device == "cuda" else None
    file.write_text(json.dumps(about, indent=2))
    if not (run_dir / "checkpoint.pt").exists():
        return run_dir, {}
    state = torch.load(run_dir / "checkpoint.pt", weights_only=False)
    torch.set_rng_state(state["rng"])
    torch.cuda.set_rng_state_all(state["cuda_rng"])
    return run_dir, state


# -------------------------------------------------------------------------------------------------- training
def train(args: Args) -> list[dict]:
    """CrossQ. Returns the rows of progress.csv."""
    torch.set_num_threads(1)  # run several seeds side by side instead
    torch.set_flush_denormal(True)  # numbers next to 0 would be slow
    torch.manual_seed(args.seed)
    random.seed(args.seed)  # for environments that draw from it
    np.random.seed(args.seed % 2**32)
    env, eval_env = make_env(args.env_id), make_env(args.env_id)
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    prior = None
    if args.prior:
        with np.load(args.prior) as file:
            columns = (
                file[name] for name in ("observations", "actions", "rewards", "next_observations", "terminations")
            )
            prior = Batch(*(torch.as_tensor(column, dtype=torch.float32, device=args.device) for column in columns))
    run_dir, state = open_run(args)
    agent = state.get("agent") or Agent(obs_dim, act_dim, args)
    if args.init and not state:
        agent = torch.load(f"{args.init}/checkpoint.pt", weights_only=False)["agent"]
        agent.log_alpha.data.fill_(math.log(args.alpha))
    ema_actor = state.get("ema_actor") or copy.deepcopy(agent.actor)
    buffer = state.get("buffer") or ReplayBuffer(args.buffer_size, obs_dim, act_dim, args.device)
    rows, metrics, start_step = state.get("rows", []), state.get("metrics", {}), state.get("step", 0)
    start_time, last_checkpoint = time.time() - state.get("wall_time", 0), start_step
    torch._dynamo.config.trace_autograd_ops = True
    update = torch.compile(crossq_update, dynamic=False) if args.compile else crossq_update
    writer = SummaryWriter(str(run_dir), purge_step=start_step)
    obs, _ = env.reset(seed=hash((args.seed, start_step)) % 2**31)
    if not np.array_equal(obs, state.get("obs", obs)):
        print(f"{SCRIPT}.py: {args.env_id} keeps state that no reset restores; uninterrupted, the run would differ")

    bar = tqdm(range(start_step, args.total_timesteps + 1), initial=start_step, total=args.total_timesteps)
    for step in bar:
        if step % args.eval_every == 0 or step == args.total_timesteps:
            row = dict(env_steps=step, wall_time_s=round(time.time() - start_time, 1))
            row |= evaluate(ema_actor, eval_env, args.eval_episodes, seed=args.seed * 1_000_000 + step)
            rows.append(row | {name: float(value) for name, value in metrics.items()})
            log_row(run_dir, rows, writer)
            policy = dict(actor=policy_of(ema_actor), sizes=(obs_dim, act_dim, args.hidden_sizes))
            for name in ("policy.pt", f"policy_{step}.pt"):  # the last one is rarely the best
                torch.save(policy | dict(script="sac", env_id=args.env_id), run_dir / name)
            bar.set_postfix_str(f"return {row['eval_return_mean']:.0f}")
        if step == args.total_timesteps:
            break

        # Act
        deterministic = args.reset_every > 0 and step // args.reset_every % 2 == 1
        action = (
            agent.actor.act(obs, deterministic)
            if step >= args.learning_starts
            else torch.rand(act_dim).mul(2).sub(1).numpy()
        )
        next_obs, reward, terminated, truncated, _ = env.step(action)
        buffer.add(obs, action, reward, next_obs, terminated)  # a time limit is no termination
        obs = next_obs

        if step == args.learning_starts and not args.init:
            seen = buffer.all().obs
            for actor in (agent.actor, ema_actor):
                actor.mean.copy_(seen.mean(0))
                actor.std.copy_(seen.std(0).clamp(min=1e-2))

        # Learn
        if step >= args.learning_starts:
            batch = sample(buffer.all(), args.batch_size // 2 if prior else args.batch_size)
            if prior:
                both = zip(batch, sample(prior, args.batch_size // 2), strict=True)
                batch = Batch(*(torch.cat(fields) for fields in both))
            noise = torch.randn(2, args.batch_size, act_dim, device=args.device)
            metrics |= update(agent, batch, noise, step % args.policy_delay == 0, args)
            weight = 1 / min(args.ema_steps, 1 + (step - args.learning_starts) / 4)
            with torch.no_grad():
                torch._foreach_lerp_(list(ema_actor.parameters()), list(agent.actor.parameters()), weight)

        if terminated or truncated or (args.reset_every and (step + 1) % args.reset_every == 0):
            obs, _ = env.reset(seed=hash((args.seed, step + 1)) % 2**31)
            if not all(map(math.isfinite, metrics.values())):
                raise SystemExit(f"{SCRIPT}.py: a loss is not finite at step {step}: {metrics}")
            if step + 1 - last_checkpoint >= args.checkpoint_every:  # between episodes, so that resuming is exact
                last_checkpoint = step + 1
                state = dict(
                    agent=agent, ema_actor=ema_actor, buffer=buffer, obs=obs, rows=rows, metrics=metrics, step=step + 1
                )
                save_checkpoint(run_dir, state | dict(wall_time=time.time() - start_time))

    writer.close()
    return rows


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
