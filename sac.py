"""Soft Actor-Critic (Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", arXiv 1812.05905).

    python sac.py --env-id Hopper-v4                     # train; writes runs/<env>__sac__<seed>__<time>/
    python sac.py --env-id Hopper-v4 --bf16              # faster on a CPU with bfloat16, see lscpu
    python sac.py --env-id Hopper-v4 --run-dir runs/a    # the same command again continues an interrupted run

Expected: Hopper-v4 500 to 3,200 after 100,000 steps, and swings (11 to 29 minutes on one core). More: docs/sac.md
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

SCRIPT = "sac"


@dataclass
class Args:
    env_id: str = "Hopper-v4"  # gymnasium id; "dm_control/walker-walk-v0" or "my_module:MyEnv-v0" work too
    seed: int = 1
    total_timesteps: int = 1_000_000
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile: a minute at the start, then faster (docs/speed.md)
    bf16: bool = False  # hidden layers in bfloat16; only fast on CPUs with avx512_bf16 or amx_bf16 (see lscpu)
    track: bool = False  # to Weights & Biases, into the project that WANDB_PROJECT names
    run_dir: str | None = None  # folder; one that holds a run is continued (a larger --total-timesteps lengthens it)
    checkpoint_every: int = 10_000  # steps; a checkpoint is written at the end of an episode
    eval_every: int = 10_000
    eval_episodes: int = 10

    # SAC
    hidden_sizes: tuple[int, ...] = (256, 256)
    critic_layer_norm: bool = False
    buffer_size: int = 1_000_000
    learning_starts: int = 5_000  # uniformly random actions before
    updates_per_step: int = 1
    batch_size: int = 256
    gamma: float = 0.99
    tau: float = 0.005
    actor_lr: float = 3e-4
    critic_lr: float = 1e-3
    alpha_lr: float = 1e-3  # learning rate of the temperature (paper: 3e-4 for all three)
    alpha: float = 1.0
    target_entropy: float | None = None  # default: minus the action dimension


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
        self.critic = Critic(obs_dim, act_dim, args.hidden_sizes, args.critic_layer_norm)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))
        self.target_entropy = -act_dim if args.target_entropy is None else args.target_entropy
        self.to(args.device)
        self.actor_optimizer = Adam(self.actor.parameters(), args.actor_lr)
        self.critic_optimizer = Adam(self.critic.parameters(), args.critic_lr)
        self.alpha_optimizer = Adam([self.log_alpha], args.alpha_lr)


# --------------------------------------------------------------------------------------- losses and updates
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
    """SAC (algorithm 1). Returns the rows of progress.csv."""
    args = pick_device(args)
    torch.set_num_threads(1)  # run several seeds side by side instead
    torch.set_flush_denormal(True)  # numbers next to 0 would be slow
    for set_seed in (torch.manual_seed, random.seed, np.random.seed):  # environments may draw from the last two
        set_seed(args.seed % 2**32)
    env, eval_env = make_env(args.env_id), make_env(args.env_id)
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    run_dir, state = open_run(args)
    agent = state.get("agent") or Agent(obs_dim, act_dim, args)
    buffer = state.get("buffer") or ReplayBuffer(args.buffer_size, obs_dim, act_dim, args.device)
    rows, metrics, start_step = state.get("rows", []), state.get("metrics", {}), state.get("step", 0)
    start_time = time.time() - state.get("wall_time", 0)
    updates = compiled(sac_update, args, loop=sac_updates)
    writer = SummaryWriter(str(run_dir), purge_step=start_step)
    obs, _ = env.reset(seed=hash((args.seed, start_step)) % 2**31)
    if not np.array_equal(obs, state.get("obs", obs)):
        print(f"{SCRIPT}.py: {args.env_id} keeps state that no reset restores; uninterrupted, the run would differ")

    bar = tqdm(range(start_step, args.total_timesteps + 1), initial=start_step, total=args.total_timesteps)
    for step in bar:
        if step % args.eval_every == 0 or step == args.total_timesteps:
            row = dict(env_steps=step, wall_time_s=round(time.time() - start_time, 1))
            row |= evaluate(agent.actor, eval_env, args.eval_episodes, seed=args.seed * 1_000_000 + step)
            rows.append(row | {name: float(value) for name, value in metrics.items()})
            log_row(run_dir, rows, writer)
            policy = dict(actor=agent.actor.state_dict(), sizes=(obs_dim, act_dim, args.hidden_sizes))
            torch.save(policy | dict(script=SCRIPT, env_id=args.env_id), run_dir / "policy.pt")
            bar.set_postfix_str(f"return {row['eval_return_mean']:.0f}")
        if step == args.total_timesteps:
            break

        # Act
        action = agent.actor.act(obs) if step >= args.learning_starts else torch.rand(act_dim).mul(2).sub(1).numpy()
        next_obs, reward, terminated, truncated, info = env.step(action)
        buffer.add(obs, action, reward, next_obs, terminated)  # a time limit is no termination
        obs = next_obs

        # Learn
        if step >= args.learning_starts:
            batches = sample(buffer.all(), args.updates_per_step, args.batch_size)
            noise = torch.randn(args.updates_per_step, 2, args.batch_size, act_dim, device=args.device)
            metrics = updates(agent, batches, noise, args)

        if terminated or truncated:
            writer.add_scalar("charts/episodic_return", info["episode"]["r"], step)
            obs, _ = env.reset(seed=hash((args.seed, step + 1)) % 2**31)
            if not all(map(math.isfinite, metrics.values())):
                raise SystemExit(f"{SCRIPT}.py: a loss is not finite at step {step}: {metrics}")
            if step + 1 - state.get("step", 0) >= args.checkpoint_every:  # between episodes: resuming is exact
                state = dict(agent=agent, buffer=buffer, obs=obs, rows=rows, metrics=metrics, step=step + 1)
                save_checkpoint(run_dir, state | dict(wall_time=time.time() - start_time))

    writer.close()
    return rows


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
