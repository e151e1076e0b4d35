"""Behaviour cloning: supervised learning of the expert's actions.

The policy's action at each demonstrated state should be the expert's: least squares, over minibatches of the
demonstrations. Nothing is tried in the environment, which is only there for evaluations. The simplest of all imitation
methods, and with many full demonstrations hard to beat: run it before anything else.

    python bc.py --env-id Hopper-v4
    python bc.py --env-id Hopper-v4 --num-demos 1                      # one demonstration instead of ten
    python bc.py --env-id my_module:MyEnv-v0 --demos my.npz            # yours

Expected: Hopper-v4 at the expert's return after a minute, Ant-v4 at 85% of it. More in docs/bc.md
"""

import copy
import json
import math
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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "bc"


@dataclass
class Args:
    env_id: str = "Ant-v4"  # gymnasium id; "dm_control/walker-walk-v0" or "my_module:MyEnv-v0" work too
    seed: int = 1
    total_timesteps: int = 20_000  # gradient steps
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    track: bool = False  # to Weights & Biases, into the project that WANDB_PROJECT names
    run_dir: str | None = None  # folder; a run in it that was interrupted begins again
    eval_every: int = 5_000
    eval_episodes: int = 20

    # Demonstrations
    demos: str | None = None  # .npz file of expert trajectories; default demos/<env_id>.npz
    num_demos: int = 10
    demo_subsample: int = 1  # use every k-th transition of them

    # Policy
    hidden_sizes: tuple[int, ...] = (128, 128)
    batch_size: int = 256
    actor_lr: float = 3e-4
    ema_steps: int = 2_000  # the evaluated actor is an average of the trained one over about so many steps


# ------------------------------------------------------------------------------ environment and demonstrations
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
    """Deterministic policy."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        self.normalise = Normaliser(obs_dim)
        self.net = EnsembleMLP(1, [obs_dim, *hidden_sizes, act_dim])

    def forward(self, obs: Tensor) -> Tensor:
        """Actions [batch, act_dim] at observations [batch, obs_dim]."""
        return self.net(self.normalise(obs)[None])[0].tanh()

    @torch.no_grad()
    def act(self, obs: np.ndarray, deterministic: bool = True) -> np.ndarray:
        """Action [act_dim] at an observation [obs_dim]. There is no other than the deterministic one."""
        return self(torch.as_tensor(obs, device=self.net.weights[0].device)[None])[0].cpu().numpy()


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source"""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


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


def log_updates(run_dir: Path, rows: list[dict], writer: SummaryWriter) -> None:
    """Writes progress.csv, and its last row to TensorBoard over gradient steps."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    (run_dir / "progress.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    for name, value in rows[-1].items():
        writer.add_scalar(name.replace("eval_", "eval/"), value, rows[-1]["updates"])


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
    """Behaviour cloning. Returns the rows of progress.csv."""
    torch.set_num_threads(1)  # run several seeds side by side instead
    torch.set_flush_denormal(True)  # numbers next to 0 would be slow
    torch.manual_seed(args.seed)
    env = make_env(args.env_id)  # for evaluations alone
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    demos = args.demos or f"demos/{args.env_id.replace('/', '-')}.npz"
    expert, _, returns = load_demos(demos, env, args.num_demos, args.demo_subsample, args.device)
    expert_return = float(returns.mean())
    run_dir, _ = open_run(args)  # a run takes a minute and saves no checkpoints
    actor = Actor(obs_dim, act_dim, args.hidden_sizes).to(args.device)
    actor.normalise.fit(expert.obs)
    ema_actor = copy.deepcopy(actor).requires_grad_(False)
    optimizer = torch.optim.Adam(actor.parameters(), args.actor_lr)
    writer = SummaryWriter(str(run_dir), purge_step=0)
    rows, metrics, start_time = [], {}, time.time()

    bar = tqdm(range(args.total_timesteps + 1), total=args.total_timesteps)
    for step in bar:
        if step % args.eval_every == 0 or step == args.total_timesteps:
            row = dict(env_steps=0, updates=step, wall_time_s=round(time.time() - start_time, 1))
            row |= evaluate(ema_actor, env, args.eval_episodes, seed=args.seed * 1_000_000 + step)
            row |= dict(expert_return=expert_return) | metrics
            rows.append(row)
            log_updates(run_dir, rows, writer)
            policy = dict(actor=ema_actor.state_dict(), sizes=(obs_dim, act_dim, args.hidden_sizes))
            torch.save(policy | dict(script=SCRIPT, env_id=args.env_id), run_dir / "policy.pt")
            bar.set_postfix_str(f"return {row['eval_return_mean']:.0f} of {expert_return:.0f}")
        if step == args.total_timesteps:
            break

        batch = sample(expert, args.batch_size)
        loss = F.mse_loss(actor(batch.obs), batch.actions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        polyak(ema_actor, actor, 1 / min(args.ema_steps, 1 + (step + 1) / 4))
        metrics = {"losses/actor": loss.item()}
        if not math.isfinite(metrics["losses/actor"]):
            raise SystemExit(f"{SCRIPT}.py: a loss is not finite at step {step}: {metrics}")

    writer.close()
    return rows


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
