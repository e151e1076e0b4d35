# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium==1.4.0",
#     "gymnasium-robotics==1.4.2",
#     "mujoco==3.11.0",
#     "dm_control==1.0.44",
#     "shimmy==2.0.1",
#     "minari[hdf5,hf]==0.5.4",
#     "moviepy==2.2.1",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
# ]
# ///
"""SAC: Soft Actor-Critic (Haarnoja, Zhou, Abbeel, Levine, arXiv 1801.01290 and 1812.05905).

The reinforcement learning baseline of this repository, and the expert that records its demonstrations. SAC maximises
return plus policy entropy, off-policy: twin critics learn the soft action value from replay and take the minimum of two
target critics against over-estimation; a tanh-Gaussian actor climbs that value through the reparameterised action; the
temperature alpha follows a target entropy.

    python sac.py --env-id Hopper-v4
    python sac.py --eval-only --checkpoint demos/experts/Ant-v4.pt --record-demos my.npz --record-episodes 64 --seed 3

What to expect, after how many steps, in how many minutes: docs/sac.md. --help shows the defaults of the --env-id and
--preset that stand beside it.
"""

import contextlib
import copy
import csv
import ctypes
import difflib
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # Experiment
    exp_name: str = "sac"
    """name of the experiment, part of the run folder's name"""
    env_id: str = "Hopper-v4"
    """gymnasium id, "dm_control/walker-walk-v0" through shimmy, or "module:Env-v0" for your own"""
    seed: int = 1
    """seed of every random stream of the run"""
    preset: Literal["default", "paper"] = "default"
    """settings to start from; any other flag beats them. "paper" is arXiv 1812.05905, table 1"""
    total_timesteps: int = 1_000_000
    """steps taken in the training environment, warm-up included"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto takes a GPU if there is one"""
    num_threads: int = 1
    """threads of torch on the CPU; several seeds side by side use a machine better than several threads"""
    compile: bool = False
    """torch.compile of the update functions: about a minute of warm-up, then faster"""
    bf16: bool = False
    """hidden layers in bfloat16 (autocast), the rest in float32; slow on a CPU whose lscpu does not list avx512_bf16 or amx_bf16"""
    run_dir: str | None = None
    """folder of the run; default runs/<env-id>__<exp-name>__<seed>__<time>"""
    checkpoint_every: int = 50_000
    """env steps between checkpoints; 0 for none but the last"""
    resume: str | None = None
    """folder of a run to continue exactly where its checkpoint stands"""
    track: bool = False
    """also log to Weights and Biases (pip install wandb)"""

    # Policy
    hidden_sizes: tuple[int, ...] = (256, 256)
    """widths of the hidden layers of actor and critics"""
    critic_layer_norm: bool = False
    """normalise the critics' hidden layers, which calms them at many updates a step (not in the paper)"""
    batch_size: int = 256
    """transitions in a gradient step"""
    actor_lr: float = 3e-4
    """Adam step size of the actor"""
    critic_lr: float = 1e-3
    """Adam step size of the critics (paper: 3e-4)"""
    alpha_lr: float = 1e-3
    """Adam step size of log alpha (paper: 3e-4)"""
    alpha: float = 1.0
    """initial temperature; stays there without --autotune"""
    autotune: bool = True
    """learn alpha towards the target entropy"""
    target_entropy: float | None = None
    """in nats, of actions scaled to [-1, 1]; default minus the action dimension"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """share of the critic that moves into the target critic at a target update"""
    target_update_every: int = 1
    """gradient steps between target updates"""
    optimistic: bool = False
    """optimistic Adam for actor and critic"""

    # Algorithm
    buffer_size: int = 1_000_000
    """transitions in replay"""
    learning_starts: int = 5_000
    """steps of uniformly random actions before the first gradient step"""
    updates_per_step: int = 1
    """gradient steps after each env step"""

    # Evaluation and recording
    eval_every: int = 10_000
    """env steps between evaluations"""
    eval_episodes: int = 10
    """episodes of an evaluation: deterministic policy, true reward, environments of their own"""
    eval_only: bool = False
    """evaluate (and record) the policy of --checkpoint, train nothing"""
    checkpoint: str | None = None
    """a policy.pt or checkpoint.pt, or the run folder, for --eval-only"""
    capture_video: bool = False
    """write a video of the first episode of each evaluation to videos/"""
    record_demos: str | None = None
    """write demonstrations of the final (or --checkpoint) policy to this .npz file"""
    record_episodes: int = 10
    """full-length episodes to record (with --record-sampled: of any length)"""
    record_level: float | None = None
    """record not the final actor but the first one whose evaluation went this share of the way from first to last return"""
    record_sampled: bool = False
    """record sampled actions instead of the mean ones, and every episode however it ends: offline data rather than demonstrations"""
    record_min_return: float | None = None
    """record only episodes of at least this return, of an expert that fails from some starts; the file tells the share dropped"""


# Flags on the command line beat these. Keys are env ids; "*" applies to every environment.
PRESETS: dict[str, dict[str, dict]] = {
    "default": {},
    "paper": {"*": dict(critic_lr=3e-4, alpha_lr=3e-4)},
}
POSITIVE = """
    total_timesteps num_threads hidden_sizes batch_size actor_lr critic_lr alpha_lr alpha target_update_every buffer_size
    updates_per_step eval_every eval_episodes record_episodes
""".split()
FRACTIONS = ("gamma", "tau", "record_level")
RESUME_MAY_CHANGE = {"resume", "total_timesteps", "checkpoint_every", "num_threads", "track"}
OBS_KEPT = {"Ant": 27, "Humanoid": 45}  # leading columns: qpos[2:] and qvel, without contact forces and inertias
SCRIPT = Path(__file__).name
STATE_EVERY = 4  # steps of a recorded episode between simulator states


# ---------------------------------------------------------------------------------------------- command line
def fail(message: str) -> NoReturn:
    """A mistake that the user can mend: one line on stderr, exit code 2, no traceback."""
    tqdm.write(f"{SCRIPT}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv: list[str]) -> Args:
    """Dataclass defaults, then the preset (resuming: the run's own settings), then the command line."""

    def cli(default: Args, words: list[str]) -> Args:
        complaint = io.StringIO()
        try:
            with contextlib.redirect_stderr(complaint):
                return tyro.cli(Args, args=words, default=default, description=__doc__)
        except SystemExit as error:
            if not error.code:
                raise
            words = re.sub(r"[╭╮╰╯│─]|-{3,}|\s", " ", complaint.getvalue().partition("helptext")[0]).split()
            words = " ".join(words).removesuffix(" Argument").removesuffix(" For full")
            fail(words.removeprefix("Unrecognized options ").removeprefix("Invalid choice "))

    args = cli(Args(), [word for word in argv if word not in ("-h", "--help")])  # help shows the preset's values
    if args.resume:
        try:
            about = json.loads((Path(args.resume) / "args.json").read_text())
            saved = about["args"]
            if about["script"] != SCRIPT:
                fail(f"--resume {args.resume}: a run of {about['script']}, not of {SCRIPT}")
            if missing := asdict(Args()).keys() - saved.keys():  # of an older version, whose value nobody knows
                raise KeyError(*sorted(missing))
            saved = Args(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})
        except (OSError, ValueError, TypeError, KeyError) as error:
            fail(f"--resume {args.resume}: not a run folder of {SCRIPT} ({getattr(error, 'strerror', None) or error})")
        args = cli(replace(saved, resume=args.resume), argv)
        for name, value in asdict(args).items():
            shorter = name == "total_timesteps" and value < saved.total_timesteps
            if value != getattr(saved, name) and (shorter or name not in RESUME_MAY_CHANGE):
                fail(f"--resume: --{name.replace('_', '-')} was {getattr(saved, name)} and cannot become {value}")
        return args
    policy = load_policy(args.checkpoint) if args.eval_only and args.checkpoint else {}
    env_id = args.env_id if any(word.startswith("--env-id") for word in argv) else policy.get("env_id", args.env_id)
    settings, algo = {}, getattr(args, "algo", None)
    for key in ("*", env_id, algo, f"{env_id} {algo}"):
        settings |= PRESETS[args.preset].get(key, {})
    if algo:
        settings["algo"] = algo
    if hasattr(args, "p_tremble") and "p_tremble" in policy.get("args", {}):
        settings["p_tremble"] = policy["args"]["p_tremble"]
    return cli(replace(Args(), env_id=env_id, **settings), argv)


def check_args(args: Args) -> None:
    """Numbers and combinations that cannot be."""
    for name, value in asdict(args).items():
        flag, numbers = f"--{name.replace('_', '-')}", value if isinstance(value, tuple) else (value,)
        if value == () and getattr(Args, name):
            fail(f"{flag} needs at least one value")
        for number in (number for number in numbers if isinstance(number, (int, float))):
            if not math.isfinite(number):
                fail(f"{flag} must be finite, got {value}")
            if name in POSITIVE and number <= 0:
                fail(f"{flag} must be positive, got {value}")
            if name in FRACTIONS and not 0 <= number <= 1:
                fail(f"{flag} must be between 0 and 1, got {value}")
            if number < 0 and name not in ("target_entropy", "record_min_return"):
                fail(f"{flag} must not be negative, got {value}")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: no GPU that torch can use; take --device cpu")
    if args.record_demos and not Path(args.record_demos).absolute().parent.is_dir():
        fail(f"--record-demos {args.record_demos}: there is no folder {Path(args.record_demos).absolute().parent}")
    if args.record_level is not None and not args.record_demos:
        fail("--record-level goes with --record-demos PATH")
    if args.record_sampled and not args.record_demos:
        fail("--record-sampled goes with --record-demos PATH")
    if args.record_min_return is not None and not args.record_demos:
        fail("--record-min-return goes with --record-demos PATH")
    if args.total_timesteps <= args.learning_starts and not args.eval_only:
        fail(f"--total-timesteps {args.total_timesteps}: nothing is learned in the first {args.learning_starts} (--learning-starts)")
    if args.track and importlib.util.find_spec("wandb") is None:
        fail("--track: wandb is not installed; pip install wandb")
    if args.compile and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))):
        fail("--compile: needs a C++ compiler (g++ or clang++); none is on the PATH")
    if args.eval_only != bool(args.checkpoint):
        fail("--eval-only and --checkpoint PATH go together")


# ---------------------------------------------------------------------------------------------- environment
def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """The environment with flat float observations and actions in [-1, 1].

    Dict observations of boxes (dm_control, gymnasium-robotics) are concatenated; Ant and Humanoid observe positions and
    velocities only (27 and 45 numbers), whatever their version adds to them.
    """
    module, _, name = env_id.rpartition(":")
    warnings.filterwarnings("ignore", message=".*is out of date.*|overflow encountered in cast")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where a user's module is
    if render_mode and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        if env_id.startswith("dm_control/"):
            import shimmy

            gym.register_envs(shimmy)
        elif not module and env_id not in gym.registry:
            with contextlib.redirect_stderr(io.StringIO()):  # it announces changed rewards
                import gymnasium_robotics

            gym.register_envs(gymnasium_robotics)
        env = gym.make(env_id, **({"render_mode": render_mode} if render_mode else {}))
    except (gym.error.Error, ImportError, TypeError) as error:
        if "/" in module or module.endswith(".py"):
            fail(f"--env-id {env_id}: takes a module's name, not a path: my_world:MyEnv-v0 for my_world.py in this folder")
        if module and not render_mode and not isinstance(error, (gym.error.Error, ModuleNotFoundError)):
            raise  # a mistake in the user's module, which its traceback shows
        with contextlib.suppress(ImportError), contextlib.redirect_stderr(io.StringIO()):  # without a display glfw complains
            import shimmy  # names dm_control's environments too
        unknown = name not in gym.registry and not (module and isinstance(error, ModuleNotFoundError))
        names = [name, *([] if module else [f"dm_control/{name}-v0"])] if unknown else []
        near = next(filter(None, (difflib.get_close_matches(name, gym.registry, n=3) for name in names)), [])
        fail(f"--env-id {env_id}: {' '.join(str(error).split())}{' Nearest known: ' + ', '.join(near) if near else ''}")
    if env.spec.id != name:  # gymnasium takes the latest version, whose presets nobody asked for
        fail(f"--env-id {env_id}: name the version too, as in {env.spec.id}")
    if render_mode:
        try:
            env.reset(seed=0)
            env.render()
        except Exception as error:  # every renderer fails in its own way
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            sys.unraisablehook = lambda *_: None  # gymnasium's half-made viewer complains when it goes
            fail(f"--capture-video: {env_id} cannot be rendered here with MUJOCO_GL={os.environ.get('MUJOCO_GL')} ({reason})")
    space = env.observation_space
    if isinstance(space, gym.spaces.Dict) and all(isinstance(part, gym.spaces.Box) for part in space.values()):
        env = gym.wrappers.FlattenObservation(env)
    if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
        fail(f"--env-id {env_id}: observations must be a vector (or a dict of vectors), not {space}")
    bounds = env.action_space
    if not isinstance(bounds, gym.spaces.Box) or len(bounds.shape) != 1 or not np.isfinite([bounds.low, bounds.high]).all():
        fail(f"--env-id {env_id}: actions must be a vector with finite bounds, not {env.action_space}")
    robot = re.fullmatch(r"(\w+)-v[45]", env_id)
    if robot and robot[1] in OBS_KEPT:
        kept = OBS_KEPT[robot[1]]
        env = gym.wrappers.TransformObservation(
            env, lambda obs: obs[:kept], gym.spaces.Box(-np.inf, np.inf, (kept,), env.observation_space.dtype)
        )
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


def rescaling(env: gym.Env) -> gym.wrappers.RescaleAction:
    """make_env's last wrapper: `.action(a)` are the environment's own units, `.env.action_space` its own bounds."""
    while not isinstance(env, gym.wrappers.RescaleAction):
        env = env.env
    return env


class ResumableEnv(gym.Wrapper):
    """Draws the seed of every episode from one stream and remembers the episode's actions.

    So any deterministic simulator can be put back exactly where a checkpoint left it: reset with the same seed, repeat
    the actions. With probability p_tremble a step executes a uniformly random action instead (the trembling hand).
    """

    def __init__(self, env: gym.Env, seed: list[int], p_tremble: float = 0.0):
        super().__init__(env)
        self.rng, self.p_tremble = np.random.default_rng(seed), p_tremble
        self.episode_seed, self.executed, self.episode_return, self.obs = 0, [], 0.0, None

    def reset(self) -> np.ndarray:
        """First observation [obs] of a new episode."""
        self.episode_seed, self.executed, self.episode_return = int(self.rng.integers(2**31)), [], 0.0
        self.obs, _ = self.env.reset(seed=self.episode_seed)
        return self.obs

    def step(self, action: np.ndarray):
        """Executes `action` [act], in [-1, 1], or the trembled one."""
        if self.p_tremble and self.rng.random() < self.p_tremble:
            action = self.rng.uniform(-1, 1, action.shape).astype(np.float32)
        self.executed.append(action)
        self.obs, reward, terminated, truncated, info = self.env.step(action)
        self.episode_return += float(reward)
        return self.obs, float(reward), terminated, truncated, info

    def state_dict(self) -> dict:
        return dict(
            rng=self.rng.bit_generator.state, episode_seed=self.episode_seed, episode_return=self.episode_return,
            executed=torch.from_numpy(np.array(self.executed, np.float32)),
        )  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        self.rng.bit_generator.state = state["rng"]
        self.obs, _ = self.env.reset(seed=state["episode_seed"])
        self.executed = list(state["executed"].numpy())
        for action in self.executed:
            self.obs, *_ = self.env.step(action)
        self.episode_seed, self.episode_return = state["episode_seed"], state["episode_return"]


class Batch(NamedTuple):
    """Transitions, `[..., n]` a field; reward and terminated have no last dimension."""

    obs: torch.Tensor
    action: torch.Tensor
    reward: torch.Tensor
    next_obs: torch.Tensor
    terminated: torch.Tensor


class ReplayBuffer:
    """The last `capacity` transitions, one contiguous float32 row each: obs, action, next_obs, reward, terminated."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: torch.device):
        self.widths = [obs_dim, act_dim, obs_dim, 1, 1]
        self.rows = torch.zeros(capacity, sum(self.widths), device=device)
        self.added = 0

    def __len__(self) -> int:
        return min(self.added, len(self.rows))

    def add(self, obs, action, reward, next_obs, terminated) -> None:
        """One transition, of arrays and numbers."""
        row = np.concatenate([obs, action, next_obs, [reward, terminated]], dtype=np.float32, casting="same_kind")
        self.extend(torch.from_numpy(row)[None])

    def extend(self, rows: torch.Tensor) -> None:
        """Rows [n, width], oldest first."""
        rows = rows[-len(self.rows) :]
        index = torch.arange(self.added, self.added + len(rows), device=self.rows.device) % len(self.rows)
        self.rows[index] = rows.to(self.rows.device)
        self.added += len(rows)

    def newest(self, n: int) -> torch.Tensor:
        """The last n rows (or all there are), oldest first: [n, width]."""
        n = min(n, len(self))
        return self.rows[torch.arange(self.added - n, self.added, device=self.rows.device) % len(self.rows)]

    def sample(self, shape: tuple[int, ...], generator: torch.Generator, newest: int | None = None) -> torch.Tensor:
        """Rows [*shape, width], uniformly with replacement, from the `newest` ones if given."""
        n = min(newest or len(self), len(self))
        index = torch.randint(n, shape, generator=generator, device=self.rows.device)
        return F.embedding((self.added - n + index) % len(self.rows), self.rows)  # rows[index], but a faster kernel

    def resize(self, capacity: int) -> None:
        """Changes the capacity, keeping the newest rows."""
        kept = self.newest(capacity)
        self.rows, self.added = torch.zeros(capacity, kept.shape[1], device=kept.device), 0
        self.extend(kept)

    def split(self, rows: torch.Tensor) -> Batch:
        """Rows [..., width] as a Batch."""
        obs, action, next_obs, reward, terminated = rows.split(self.widths, -1)
        return Batch(obs, action, reward.squeeze(-1), next_obs, terminated.squeeze(-1))

    def state_dict(self) -> dict:
        return dict(rows=self.newest(len(self)), capacity=len(self.rows))

    def load_state_dict(self, state: dict) -> None:
        self.rows, self.added = torch.zeros(state["capacity"], self.rows.shape[1], device=self.rows.device), 0
        self.extend(state["rows"])


# ---------------------------------------------------------------------------------------------- networks
class StackedLinear(nn.Module):
    """n independent linear layers at once: [n, batch, fan_in] -> [n, batch, fan_out]."""

    def __init__(self, n: int, fan_in: int, fan_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, fan_in, fan_out))
        self.bias = nn.Parameter(torch.zeros(n, 1, fan_out))
        for weight in self.weight:
            nn.init.xavier_uniform_(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fan_out = self.weight.shape[-1]
        if x.is_cuda or fan_out >= 16:
            product = torch.bmm(x, self.weight)
        elif fan_out == 1:  # on a CPU, bmm with few output columns is several times slower than these two (docs/speed.md)
            product = (x * self.weight.mT).sum(-1, keepdim=True)
        else:
            product = torch.bmm(self.weight.mT, x.mT).mT
        return product + self.bias.to(product.dtype)  # a float32 bias would make a bfloat16 product float32


class StackedMLP(nn.Module):
    """n independent multilayer perceptrons: [n, batch, sizes[0]] -> [n, batch, sizes[-1]]. The output layer is float32."""

    def __init__(self, n: int, sizes: list[int], activation: Callable[[torch.Tensor], torch.Tensor] = F.relu, layer_norm: bool = False):
        super().__init__()
        layers = [StackedLinear(n, fan_in, fan_out) for fan_in, fan_out in itertools.pairwise(sizes)]
        self.hidden, self.output, self.activation, self.layer_norm = nn.ModuleList(layers[:-1]), layers[-1], activation, layer_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.hidden:
            x = layer(x)
            x = self.activation(F.layer_norm(x, x.shape[-1:]) if self.layer_norm else x)
        with torch.autocast(x.device.type, enabled=False):
            return self.output(x.to(self.output.weight.dtype))


class Normaliser(nn.Module):
    """Standardises each of `dim` inputs; the identity until it is fitted."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def fit(self, *sources: torch.Tensor) -> None:
        """Mean and standard deviation over sources [n, dim], each of which counts the same; inputs that hardly vary are only centred."""
        sources = [source.double() for source in sources]
        mean = torch.stack([source.mean(0) for source in sources]).mean(0)
        std = torch.stack([(source - mean).square().mean(0) for source in sources]).mean(0).sqrt()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std < 1e-6, 1.0, std))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / self.std


class Actor(nn.Module):
    """Tanh-Gaussian policy over actions in [-1, 1]. The noise is an argument, so that a gradient step is a pure function."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        self.hidden_sizes, self.normalise = tuple(hidden_sizes), Normaliser(obs_dim)
        self.net = StackedMLP(1, [obs_dim, *hidden_sizes, 2 * act_dim])

    def forward(self, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Action [batch, act] and its log-probability [batch] at obs [batch, obs], from standard normal noise [batch, act]."""
        mean, log_std = self.net(self.normalise(obs)[None])[0].chunk(2, -1)
        log_std = log_std.clamp(-20, 2)
        raw = mean + log_std.exp() * noise
        log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob - 2 * (math.log(2) - raw - F.softplus(-2 * raw))  # log of d tanh(raw) / d raw
        return raw.tanh(), log_prob.sum(-1)

    @torch.no_grad()
    def act(self, obs: np.ndarray, generator: torch.Generator | None = None) -> np.ndarray:
        """Action [act] at obs [obs]: sampled with a generator, deterministic (the mean) without."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.normalise.mean.device)
        mean, log_std = self.net(self.normalise(obs)[None, None])[0, 0].chunk(2, -1)
        if generator is not None:
            mean = mean + log_std.clamp(-20, 2).exp() * torch.randn(mean.shape, generator=generator, device=mean.device)
        return mean.tanh().cpu().numpy()


class Critic(nn.Module):
    """Twin action values."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: tuple[int, ...], layer_norm: bool = False):
        super().__init__()
        self.normalise = Normaliser(obs_dim)
        self.net = StackedMLP(2, [obs_dim + act_dim, *hidden_sizes, 1], layer_norm=layer_norm)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Q [2, batch] of obs [batch, obs] and action [batch, act]."""
        return self.net(torch.cat([self.normalise(obs), action], -1).expand(2, -1, -1)).squeeze(-1)


class Adam(nn.Module):
    """Adam over a fixed list of parameters, or optimistic Adam, which steps along 2 g_t - g_{t-1}.

    Its state is made of tensors and its step of tensor operations, so that a compiled gradient step has no Python in it.
    Betas 0.9 and 0.999, epsilon 1e-8 without bias correction (torch.optim.Adam corrects its).
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, optimistic: bool = False):
        super().__init__()
        self.params, self.weight_decay, self.optimistic = list(params), weight_decay, optimistic
        self.mean = nn.ParameterList([nn.Parameter(torch.zeros_like(p), requires_grad=False) for p in self.params])
        self.square = nn.ParameterList([nn.Parameter(torch.zeros_like(p), requires_grad=False) for p in self.params])
        self.register_buffer("lr", torch.tensor(lr))
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("scale", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def step(self, grads) -> None:
        """One step along the gradients, in the order of the parameters."""
        mean, square = list(self.mean), list(self.square)
        if self.weight_decay:
            grads = torch._foreach_add(grads, self.params, alpha=self.weight_decay)
        self.steps += 1
        # lr * sqrt(1 - 0.999^t) / (1 - 0.9^t), written to a buffer: otherwise the compiler merges it into the loop over the
        # weights and computes it again for every 16 of them.
        corrections = torch.sqrt(-torch.expm1(self.steps * math.log(0.999))) / (1 - torch.exp(self.steps * math.log(0.9)))
        self.scale.copy_(self.lr * corrections)
        if self.optimistic:
            torch._foreach_add_(self.params, self._direction(mean, square, self.scale))
        torch._foreach_lerp_(mean, grads, 0.1)
        torch._foreach_lerp_(square, torch._foreach_mul(grads, grads), 0.001)
        torch._foreach_sub_(self.params, self._direction(mean, square, 2 * self.scale if self.optimistic else self.scale))

    @torch.no_grad()
    def restart(self) -> None:
        """Forgets all moments."""
        for tensor in (*self.mean, *self.square, self.steps):
            tensor.zero_()

    @staticmethod
    def _direction(mean, square, scale):
        root = torch._foreach_sqrt(square)
        torch._foreach_add_(root, 1e-8)
        return torch._foreach_mul(torch._foreach_div(mean, root), scale)


class Agent(nn.Module):
    """Actor, twin critics, temperature, and their optimisers."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, act_dim, getattr(args, "actor_hidden", None) or args.hidden_sizes)
        self.critic = Critic(obs_dim, act_dim, args.hidden_sizes, args.critic_layer_norm)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))
        self.target_entropy = -act_dim if args.target_entropy is None else args.target_entropy
        self.actor_optimizer = Adam(self.actor.parameters(), args.actor_lr, optimistic=args.optimistic)
        self.critic_optimizer = Adam(self.critic.parameters(), args.critic_lr, optimistic=args.optimistic)
        self.alpha_optimizer = Adam([self.log_alpha], args.alpha_lr)


# ---------------------------------------------------------------------------------------------- gradient steps
def sac_update(agent: Agent, batch: Batch, actor_obs: torch.Tensor, noise: torch.Tensor, args: Args) -> dict[str, torch.Tensor]:
    """One gradient step of critics, actor and temperature (arXiv 1812.05905, eqs. 6, 9, 18).

    `batch` has [batch, ...] fields, `actor_obs` [batch, obs] are the states of the actor's and temperature's loss,
    `noise` [2, batch, act] is standard normal. Returns scalars to log.
    """
    alpha = agent.log_alpha.detach().exp()
    with torch.autocast(actor_obs.device.type, torch.bfloat16, enabled=args.bf16):
        with torch.no_grad():
            next_action, next_log_prob = agent.actor(batch.next_obs, noise[0])
            next_value = agent.target_critic(batch.next_obs, next_action).amin(0) - alpha * next_log_prob
            target = batch.reward + args.gamma * (1 - batch.terminated) * next_value
        q = agent.critic(batch.obs, batch.action)
        critic_loss = (q - target).square().mean(1).sum()
    agent.critic_optimizer.step(torch.autograd.grad(critic_loss, agent.critic_optimizer.params))

    with torch.autocast(actor_obs.device.type, torch.bfloat16, enabled=args.bf16):
        action, log_prob = agent.actor(actor_obs, noise[1])
        actor_loss = (alpha * log_prob - agent.critic(actor_obs, action).amin(0)).mean()
    agent.actor_optimizer.step(torch.autograd.grad(actor_loss, agent.actor_optimizer.params))

    entropy = -log_prob.detach().mean()
    if args.autotune:  # gradient of log_alpha * (entropy - target entropy)
        agent.alpha_optimizer.step([entropy - agent.target_entropy])
    return {"losses/critic": critic_loss.detach(), "losses/actor": actor_loss.detach(), "losses/q": q.detach().mean(),
            "losses/entropy": entropy, "losses/alpha": alpha}  # fmt: skip


@torch.no_grad()
def target_update(agent: Agent, tau: float) -> None:
    """Moves the target critics a share tau towards the critics."""
    torch._foreach_lerp_(list(agent.target_critic.parameters()), list(agent.critic.parameters()), tau)


def compiled(function: Callable, args: Args) -> Callable:
    """With --compile, the update function as one graph; says how long its first call took.

    torch keeps what it compiled on disk: the next run with the same shapes starts in a fraction of that time.
    """
    if not args.compile:
        return function
    started = time.time()
    torch._dynamo.config.trace_autograd_ops = True  # lets it trace autograd.grad; this line imports the compiler
    graph, spent = torch.compile(function, dynamic=False), time.time() - started

    def call(*inputs):
        nonlocal spent
        started, result = time.time(), graph(*inputs)
        if spent is not None:
            tqdm.write(f"{SCRIPT}: compiled {function.__name__} in {spent + time.time() - started:.0f} s", file=sys.stderr)
            spent = None
        return result

    return call


# ---------------------------------------------------------------------------------------------- evaluation and logs
def evaluate(actor: Actor, env: gym.Env, episodes: int, seed: list[int], p_tremble: float = 0.0, video: Path | None = None) -> dict:
    """Deterministic episodes of the true reward; the same seed gives the same ones. Films the first one to `video`-....mp4."""
    film = video and gym.wrappers.RecordVideo(env, str(video.parent), lambda n: n == 0, name_prefix=video.name, disable_logger=True)
    env, returns, lengths, successes = ResumableEnv(film or env, seed, p_tremble), [], [], []
    for _ in range(episodes):
        obs, done, success = env.reset(), False, float("nan")
        while not done:
            obs, _, terminated, truncated, info = env.step(actor.act(obs))
            if "success" in info or "is_success" in info:
                success = np.fmax(success, float(info.get("success", info.get("is_success"))))
            done = terminated or truncated
            if len(env.executed) == 100_000 and not done:
                fail("an episode of 100,000 steps has not ended: register the environment with max_episode_steps")
        returns.append(env.episode_return)
        lengths.append(len(env.executed))
        successes.append(success)
    if film and film.recording:
        film.stop_recording()
    return dict(eval_return_mean=float(np.mean(returns)), eval_return_std=float(np.std(returns)),
                eval_success_rate=float(np.mean(successes)), eval_length_mean=float(np.mean(lengths)))  # fmt: skip


class Log:
    """progress.csv, TensorBoard and the means of metrics in between, kept on the device so that nothing waits for them."""

    def __init__(self, run_dir: Path, args: Args, env_steps: int = 0):
        self.run_dir, self.rows, self.sums, self.counts = run_dir, [], {}, {}
        self.started, self.wall_time_before = time.time(), 0.0
        if args.track:
            import wandb

            wandb.init(project="hybrid-irl", name=run_dir.name, id=run_dir.name, resume="allow", config=asdict(args), sync_tensorboard=True)
        self.writer = SummaryWriter(str(run_dir), purge_step=env_steps + 1)
        self.bar = tqdm(total=args.total_timesteps, initial=env_steps, unit="step", smoothing=0.05, dynamic_ncols=True)

    def add(self, metrics: dict[str, torch.Tensor | float]) -> None:
        """Adds to the means that the next row will show."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def row(self, env_steps: int, updates: int, evaluation: dict[str, float], expert_return: float) -> None:
        """One line of progress.csv: the evaluation and the means since the last one."""
        check_finite(self.sums, env_steps)
        means = {name: float(total) / self.counts[name] for name, total in sorted(self.sums.items())}
        self.sums, self.counts = {}, {}
        for name, value in {**means, **{name.replace("_", "/", 1): value for name, value in evaluation.items()}}.items():
            self.writer.add_scalar(name, value, env_steps or updates)  # cloning takes no env steps
        fixed = dict(env_steps=env_steps, updates=updates, wall_time_s=round(self.wall_time(), 1), **evaluation)
        if self.rows and fixed["wall_time_s"] > self.rows[-1]["wall_time_s"]:
            steps, seconds = (fixed[name] - self.rows[-1][name] for name in ("env_steps", "wall_time_s"))
            self.writer.add_scalar("charts/steps_per_second", steps / seconds, env_steps)
        self.rows.append({**fixed, "expert_return": expert_return, **means})
        self.write()

    def write(self) -> None:
        """Rewrites progress.csv (a metric that had no value yet stays empty) and shows the latest return in the bar."""
        latest, expert_return = self.rows[-1]["eval_return_mean"], self.rows[-1]["expert_return"]
        self.bar.set_postfix_str(f"return {latest:.0f}" + (f" of {expert_return:.0f}" if math.isfinite(expert_return) else ""))
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.run_dir / "progress.csv", lambda file: file.write(text.getvalue().encode()))

    def wall_time(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.wall_time_before + time.time() - self.started

    def state_dict(self) -> dict:
        return dict(rows=self.rows, sums=self.sums, counts=self.counts, wall_time=self.wall_time())

    def load_state_dict(self, state: dict) -> None:
        self.rows, self.sums, self.counts = state["rows"], state["sums"], state["counts"]
        self.wall_time_before = state["wall_time"]
        self.write()


def check_finite(values: dict[str, torch.Tensor | float], env_steps: int) -> None:
    """Stops the run, before anything is overwritten, if a loss or a parameter is not a finite number."""
    for name, value in values.items():
        if not torch.isfinite(torch.as_tensor(value)).all():
            fail(f"{name} is not finite at env step {env_steps}; the last good checkpoint is kept")


# ---------------------------------------------------------------------------------------------- files
def keep_freed_memory() -> None:
    """Has glibc keep freed memory (pieces up to 32 MB, 1 GB in all) instead of asking the system for zeroed pages at each step."""
    if platform.libc_ver()[0] == "glibc":
        libc, m_mmap_threshold, m_trim_threshold = ctypes.CDLL(None), -3, -1
        libc.mallopt(m_mmap_threshold, 1 << 25)
        libc.mallopt(m_trim_threshold, 1 << 30)


def write_atomically(path: Path, write: Callable) -> None:
    """A crash or a full disk at any moment leaves the previous file as it was."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {path} ({type(error).__name__}: {str(error).partition(chr(10))[0]}); the previous one is kept")


def make_run_dir(args: Args) -> Path:
    """The run's folder, with args.json: settings, versions, commit and machine. A resumed one takes on the changed settings."""
    if args.resume:
        path = Path(args.resume) / "args.json"
        about = {**json.loads(path.read_text()), "args": asdict(replace(args, resume=None))}
        write_atomically(path, lambda file: file.write(json.dumps(about, indent=2).encode()))
        return path.parent
    what = "-".join(dict.fromkeys([args.exp_name, getattr(args, "algo", args.exp_name)]))
    name = f"{re.sub('[/:]', '-', args.env_id)}__{what}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.run_dir or Path("runs") / name)
    if (run_dir / "args.json").exists():
        fail(f"--run-dir {run_dir}: holds a run already; continue it with --resume {run_dir} or take another folder")
    try:
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        git = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        git = None
    about = dict(
        script=SCRIPT, args=asdict(replace(args, run_dir=run_dir.name)), commit=git or None, machine=platform.machine(),
        python=platform.python_version(), versions={name: version(name) for name in ("torch", "gymnasium", "mujoco", "numpy")},
    )  # fmt: skip
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--run-dir {run_dir}: {error.strerror}")
    write_atomically(run_dir / "args.json", lambda file: file.write(json.dumps(about, indent=2).encode()))
    return run_dir


def save_checkpoint(run_dir: Path, parts: dict, counters: dict[str, int], policy: dict) -> None:
    """checkpoint.pt: everything that `parts` (objects with a state_dict) and the random streams among them hold."""
    env_steps = counters["env_steps"]
    check_finite(
        {f"{name}.{k}": p for name, part in parts.items() if isinstance(part, nn.Module) for k, p in part.named_parameters()}, env_steps
    )
    states = {name: part.get_state() if isinstance(part, torch.Generator) else part.state_dict() for name, part in parts.items()}
    content = dict(script=SCRIPT, counters=counters, policy=policy, parts=states)
    write_atomically(run_dir / "checkpoint.pt", lambda file: torch.save(content, file))


def read_checkpoint(run_dir: Path) -> dict:
    """What save_checkpoint wrote."""
    if not (run_dir / "checkpoint.pt").exists():
        fail(f"--resume {run_dir}: it was stopped before its first checkpoint; delete the folder and start the run anew")
    content = read_torch_file(run_dir / "checkpoint.pt")
    if content.get("script") != SCRIPT:
        fail(f"{run_dir / 'checkpoint.pt'}: written by {content.get('script', 'another program')}, not by {SCRIPT}")
    return content


def restore(content: dict, parts: dict) -> None:
    """Puts every part back where the checkpoint left it."""
    try:
        for name, part in parts.items():
            state = content["parts"][name]
            if isinstance(part, torch.Generator):
                if part.get_state().shape != state.shape:
                    fail("--resume: the run's random numbers are of another kind of device (GPU or CPU) than --device is here")
                part.set_state(state)
            else:
                part.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        fail(f"--resume: the checkpoint does not fit this script ({type(error).__name__}: {str(error).partition(chr(10))[0]})")


def read_torch_file(path: Path) -> dict:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a broken file raises depends on where it is broken
        fail(f"{path}: not a readable checkpoint ({error.strerror if isinstance(error, OSError) else type(error).__name__})")
    return content if isinstance(content, dict) else {}


def policy_content(actor: Actor, env: gym.Env, args: Args, env_steps: int) -> dict:
    """What policy.pt holds: a whole policy, loadable with weights_only=True."""
    space = rescaling(env).env.action_space
    return dict(
        script=SCRIPT, env_id=args.env_id, env_steps=env_steps, obs_dim=env.observation_space.shape[0], act_dim=space.shape[0],
        action_low=space.low.tolist(), action_high=space.high.tolist(), hidden_sizes=list(actor.hidden_sizes),
        actor={k: v.cpu().clone() for k, v in actor.state_dict().items()}, args=asdict(args),
    )  # fmt: skip


def load_policy(path: str) -> dict:
    """The policy in a policy.pt, a checkpoint.pt, or a run folder."""
    file = Path(path) / "policy.pt" if Path(path).is_dir() else Path(path)
    if not file.exists():
        fail(f"--checkpoint {path}: {'no policy.pt in this folder' if file != Path(path) else 'no such file'}")
    content = read_torch_file(file)
    content = content.get("policy", content)
    if not {"actor", "env_id", "obs_dim", "act_dim", "hidden_sizes"} <= content.keys():
        fail(f"--checkpoint {path}: holds no policy")
    if "normalise.mean" not in content["actor"]:
        fail(f"--checkpoint {path}: was written by an older version of {SCRIPT}")
    return content


def evaluate_policy(args: Args) -> dict:
    """--eval-only: the deterministic policy of --checkpoint. Returns the policy's content with its actor built."""
    policy = load_policy(args.checkpoint)
    env = make_env(args.env_id, "rgb_array" if args.capture_video else None)
    dims = env.observation_space.shape[0], env.action_space.shape[0]
    if dims != (policy["obs_dim"], policy["act_dim"]):
        fail(f"--checkpoint {args.checkpoint}: made for {policy['env_id']} ({policy['obs_dim']} observations, {policy['act_dim']} "
             f"actions); {args.env_id} has {dims[0]} and {dims[1]}")  # fmt: skip
    video = Path(args.run_dir or ".") / "videos" / "eval" if args.capture_video else None
    actor = Actor(*dims, tuple(policy["hidden_sizes"]))
    actor.load_state_dict(policy["actor"])
    result = evaluate(actor, env, args.eval_episodes, [args.seed, 1, 0], getattr(args, "p_tremble", 0.0), video)
    success = f", success rate {result['eval_success_rate']:.2f}" if math.isfinite(result["eval_success_rate"]) else ""
    print(f"{args.env_id}: return {result['eval_return_mean']:.1f} +- {result['eval_return_std']:.1f} over {args.eval_episodes} episodes, "
          f"mean length {result['eval_length_mean']:.0f}{success}")  # fmt: skip
    return {**policy, "actor": actor, **result}


class StopSignal:
    """Remembers SIGINT or SIGTERM, so that the loop can save a checkpoint first. A second one stops at once."""

    def __init__(self):
        self.received = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number: int, frame) -> None:
        if self.received:
            raise SystemExit(128 + number)
        self.received = number
        os.write(2, f"\n{SCRIPT}: stopping after this step, which may take a minute; once more to stop without saving\n".encode())


# ---------------------------------------------------------------------------------------------- demonstrations
def is_mujoco(env: gym.Env) -> bool:
    """Whether MuJoCo's own bindings simulate the environment, so that `simulator_state` works."""
    import mujoco

    return isinstance(getattr(env.unwrapped, "model", None), mujoco.MjModel)


def simulator_state(env: gym.Env) -> np.ndarray:
    """MuJoCo's integration state [k], in double precision: positions, velocities, and what warm-starts the solver."""
    import mujoco

    model, data, spec = env.unwrapped.model, env.unwrapped.data, mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(model, spec))
    mujoco.mj_getState(model, data, state, spec)
    return state


def record_demos(path: Path, actor: Actor, args: Args, about: dict) -> None:
    """Writes full-length episodes of the deterministic actor, or all of the sampling one, as flat float32 arrays (demos/README.md).

    MuJoCo's own robots also get qpos, qvel, and at each fourth step the simulator's whole state, which restores it exactly.
    """
    env = make_env(args.env_id)
    rescaled, limit = rescaling(env), env.spec.max_episode_steps
    env = ResumableEnv(env, [args.seed, 2])
    stream = torch.Generator().manual_seed(args.seed) if args.record_sampled else None
    episodes, kept_returns, all_returns, data = 0, [], [], getattr(env.unwrapped, "data", None)
    has_joints = hasattr(data, "qpos") and hasattr(data, "qvel")
    has_state = has_joints and is_mujoco(env)
    least = -math.inf if args.record_min_return is None else args.record_min_return
    wanted = " and ".join(["reached the time limit"] * (not args.record_sampled) + [f"returned at least {least:g}"] * math.isfinite(least))
    columns: dict[str, list] = {}
    states: list[np.ndarray] = []
    with tqdm(total=args.record_episodes, unit="episode", dynamic_ncols=True) as bar:
        while len(kept_returns) < args.record_episodes:
            if episodes == 10 + 10 * args.record_episodes:
                fail(f"--record-demos: only {len(kept_returns)} of {episodes} episodes {wanted}: a better policy is needed")
            episode: dict[str, list] = {}
            episode_states: list[np.ndarray] = []
            obs, done = env.reset(), False
            while not done:
                action = actor.act(obs, stream)
                step = dict(observations=obs, actions=rescaled.action(action))
                if has_joints:
                    step.update(qpos=data.qpos.copy(), qvel=data.qvel.copy())
                if has_state and len(env.executed) % STATE_EVERY == 0:
                    episode_states.append(simulator_state(env))
                next_obs, reward, terminated, truncated, _ = env.step(action)
                step.update(rewards=reward, next_observations=next_obs, terminations=terminated, truncations=truncated)
                for name, value in step.items():
                    episode.setdefault(name, []).append(value)
                obs, done = next_obs, terminated or truncated
            episodes += 1
            all_returns.append(env.episode_return)
            to_the_end = not terminated and (limit is None or len(env.executed) == limit)
            if (args.record_sampled or to_the_end) and env.episode_return >= least:
                kept_returns.append(env.episode_return)
                states.extend(episode_states)
                for name, values in episode.items():
                    columns.setdefault(name, []).extend(values)
                bar.update()
    dropped = 1 - len(kept_returns) / episodes
    metadata = dict(
        env_id=args.env_id, **about, episodes=len(kept_returns), return_mean=float(np.mean(kept_returns)),
        return_std=float(np.std(kept_returns)), dropped_share=dropped, all_return_mean=float(np.mean(all_returns)),
        all_return_std=float(np.std(all_returns)), versions={name: version(name) for name in ("gymnasium", "mujoco")},
        command=" ".join([SCRIPT, *sys.argv[1:]]),
    )  # fmt: skip
    arrays = {name: np.asarray(values, np.float32) for name, values in columns.items()}
    if states:
        arrays["states"] = np.array(states)
    write_atomically(path, lambda file: np.savez_compressed(file, metadata=json.dumps(metadata), **arrays))
    others = wanted and f"; {episodes - len(kept_returns)} of {episodes} episodes dropped, kept are those that {wanted}"
    print(f"{path}: {len(kept_returns)} episodes, return {metadata['return_mean']:.1f} +- {metadata['return_std']:.1f}{others}")


def first_at_level(run_dir: Path, rows: list[dict], level: float) -> dict:
    """The policy of the first evaluation that reached `level` of the way from the first return to the last."""
    first, last = rows[0]["eval_return_mean"], rows[-1]["eval_return_mean"]
    row = next((row for row in rows if row["eval_return_mean"] >= first + level * (last - first)), rows[-1])
    return load_policy(str(run_dir / "snapshots" / f"{row['env_steps']}.pt"))


# ---------------------------------------------------------------------------------------------- training
def train(args: Args) -> dict:
    """SAC (arXiv 1812.05905, algorithm 1). Returns the last row of progress.csv."""
    device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu"))
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    streams = {}
    for name, seed in zip(("replay", "policy"), np.random.SeedSequence(args.seed).generate_state(2), strict=True):
        streams[name] = torch.Generator(device).manual_seed(int(seed))

    eval_env = make_env(args.env_id, "rgb_array" if args.capture_video else None)  # first, because it chooses the renderer
    env = ResumableEnv(make_env(args.env_id), [args.seed, 0])
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    agent = Agent(obs_dim, act_dim, args).to(device)
    buffer = ReplayBuffer(args.buffer_size, obs_dim, act_dim, device)
    update = compiled(sac_update, args)

    fresh = dict(env_steps=0, updates=0)
    checkpoint = read_checkpoint(Path(args.resume)) if args.resume else dict(counters=fresh)
    run_dir = make_run_dir(args)
    counters = checkpoint["counters"]
    log = Log(run_dir, args, counters["env_steps"])
    parts = dict(agent=agent, buffer=buffer, env=env, log=log) | {f"{name}_stream": stream for name, stream in streams.items()}
    if args.resume:
        restore(checkpoint, parts)
    else:
        env.reset()
    stop, obs = StopSignal(), env.obs
    tqdm.write(f"{SCRIPT}: {args.env_id}, run folder {run_dir}", file=sys.stderr)

    def evaluate_and_save_policy() -> None:
        env_steps = counters["env_steps"]
        check_finite({**log.sums, **dict(agent.actor.named_parameters())}, env_steps)
        video = run_dir / "videos" / f"step-{env_steps}" if args.capture_video else None
        evaluation = evaluate(agent.actor, eval_env, args.eval_episodes, [args.seed, 1, env_steps], video=video)
        log.row(env_steps, counters["updates"], evaluation, float("nan"))
        policy = policy_content(agent.actor, env, args, env_steps)
        write_atomically(run_dir / "policy.pt", lambda file: torch.save(policy, file))
        if args.record_level is not None:
            (run_dir / "snapshots").mkdir(exist_ok=True)
            write_atomically(run_dir / "snapshots" / f"{env_steps}.pt", lambda file: torch.save(policy, file))

    def crossed(every: int) -> bool:
        """Whether this iteration's step reached a multiple of `every`."""
        return bool(every) and counters["env_steps"] // every > before // every

    def finished() -> bool:
        return counters["env_steps"] >= args.total_timesteps

    if not log.rows:
        evaluate_and_save_policy()
    while not finished() and not stop.received:
        before = counters["env_steps"]
        training = before >= args.learning_starts
        if not training:
            action = torch.rand(act_dim, generator=streams["policy"], device=device).mul(2).sub(1).cpu().numpy()
        else:
            action = agent.actor.act(obs, streams["policy"])
        check_finite({"action": action}, before)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        # A time limit is no end: only `terminated` stops bootstrapping.
        buffer.add(obs, action, reward, next_obs, terminated)
        obs = next_obs
        counters["env_steps"] += 1
        if terminated or truncated:
            log.writer.add_scalar("charts/episodic_return", env.episode_return, counters["env_steps"])
            log.writer.add_scalar("charts/episodic_length", len(env.executed), counters["env_steps"])
            obs = env.reset()

        if training:
            shape = (args.updates_per_step, args.batch_size)
            batches = buffer.split(buffer.sample(shape, streams["replay"]))
            noise = torch.randn(shape[0], 2, shape[1], act_dim, generator=streams["policy"], device=device)
            for u in range(args.updates_per_step):
                batch = Batch(*(field[u] for field in batches))
                metrics = update(agent, batch, batch.obs, noise[u], args)
                counters["updates"] += 1
                if counters["updates"] % args.target_update_every == 0:
                    target_update(agent, args.tau)
            log.add(metrics)

        env_steps = counters["env_steps"]
        log.bar.update(env_steps - before)
        if crossed(args.eval_every) or finished():
            evaluate_and_save_policy()
        if env_steps % 100 == 0:
            check_finite(log.sums, env_steps)
        if crossed(args.checkpoint_every) or finished():
            save_checkpoint(run_dir, parts, counters, policy_content(agent.actor, env, args, env_steps))

    env_steps = counters["env_steps"]
    if stop.received:
        save_checkpoint(run_dir, parts, counters, policy_content(agent.actor, env, args, env_steps))
    log.bar.close()
    log.writer.close()
    if stop.received:
        print(f"{SCRIPT}: stopped at env step {env_steps}; continue with: python {SCRIPT} --resume {run_dir}", file=sys.stderr)
        raise SystemExit(128 + stop.received)
    print(f"{SCRIPT}: done, the policy is {run_dir / 'policy.pt'}", file=sys.stderr)
    if args.record_demos:
        policy = policy_content(agent.actor, env, args, env_steps)
        if args.record_level is not None:
            policy = first_at_level(run_dir, log.rows, args.record_level)
            agent.actor.load_state_dict(policy["actor"])
            write_atomically(run_dir / "policy_at_level.pt", lambda file: torch.save(policy, file))
        about = dict(script=SCRIPT, env_steps=policy["env_steps"], record_level=args.record_level, sampled=args.record_sampled)
        record_demos(Path(args.record_demos), agent.actor.cpu(), args, about)
    return log.rows[-1]


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    keep_freed_memory()
    args = parse_args(sys.argv[1:])
    check_args(args)
    if args.eval_only:
        policy = evaluate_policy(args)
        if args.record_demos:
            about = dict(script=policy["script"], env_steps=policy["env_steps"], record_level=None, sampled=args.record_sampled)
            record_demos(Path(args.record_demos), policy["actor"], args, about)
    else:
        train(args)
