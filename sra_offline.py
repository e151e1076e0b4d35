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
"""SRA: offline imitation with self-paced reverse augmentation, and offline baselines (Shao, Shi, Guo, Li, "Offline Imitation
Learning with Model-based Reverse Augmentation", KDD 2024, arXiv 2406.12550).

A few expert trajectories D_E have reward 1, many transitions D_S of any quality reward 0. A model of the *reverse* dynamics
imagines transitions that lead into states where the policy is already good, also with reward 0, so that a value learner finds
ways back to the expert from outside. In each round these goal states grow by states of D_S at which the policy has become
confident, and the imagined states are resampled towards those at which it is not.

    python sra_offline.py --dataset maze2d-umaze
    python sra_offline.py --dataset maze2d-medium --algo uds
    python sra_offline.py --dataset hopper-medium --algo sra --learner td3bc

--algo: sra; uds, D_E and D_S alone; romi, one round of plain reverse rollouts; forward, sra with a forward model; bc, cloning of
D_E; dwbc, otil, demodice. --learner: iql, td3bc, awac, sac-n, for the first four. --help shows the defaults of what stands beside it.

No environment step is taken but by evaluations: steps are gradient steps. Results: docs/sra_offline.md.
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
import zipfile
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, NoReturn

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
    exp_name: str = "sra_offline"
    """name of the experiment, part of the run folder's name"""
    algo: Literal["sra", "uds", "romi", "forward", "bc", "dwbc", "otil", "demodice"] = "sra"
    """the method"""
    learner: Literal["iql", "td3bc", "awac", "sac-n"] = "iql"
    """the value learner of sra, uds, romi and forward"""
    dataset: str = "maze2d-umaze"
    """maze2d-umaze, -medium or -large (generated); hopper-, walker2d-, halfcheetah-, ant-medium or -medium-expert (docs/sra_offline.md);
    "minari:ID" of the offline part"""
    env_id: str = ""
    """where the policy is evaluated; default: that of the data set. Alone, with --demos and --offline-data, for data of your own"""
    seed: int = 1
    """seed of every random stream of the run; --data-seed is another"""
    preset: Literal["default", "paper"] = "default"
    """settings to start from; any other flag beats them. "paper" is the authors' released setting"""
    total_timesteps: int = 12_000
    """gradient steps of the policy; maze2d-large 6,000, robots 30,000 (paper: mazes 200,000, robots 500,000)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto takes a GPU if there is one"""
    num_threads: int = 1
    """threads of torch on the CPU; several seeds side by side use a machine better than several threads"""
    compile: bool = False
    """torch.compile of the update functions: about a minute of warm-up, then faster"""
    bf16: bool = False
    """hidden layers in bfloat16 (autocast), the rest in float32; slow on a CPU whose lscpu does not list avx512_bf16 or amx_bf16"""
    run_dir: str | None = None
    """folder of the run; default runs/<env-id>__<exp-name>-<algo>__<seed>__<time>"""
    checkpoint_every: int = 2_000
    """gradient steps between checkpoints; 0 for none but the last"""
    resume: str | None = None
    """folder of a run to continue exactly where its checkpoint stands"""
    track: bool = False
    """also log to Weights and Biases (pip install wandb)"""

    # Data
    demos: str | None = None
    """D_E: an .npz file (demos/README.md) or "minari:mujoco/hopper/expert-v0"; default: that of the data set"""
    offline_data: str | None = None
    """D_S: the same kinds of source; default: that of the data set"""
    num_demos: int = 5
    """expert trajectories used"""
    first_demos: bool = False
    """the first ones of the file (paper), instead of a choice by --data-seed"""
    data_dir: str = "data"
    """folder of generated and recorded data"""
    data_seed: int = 0
    """seed of generated data and of the choice of expert trajectories, so that training seeds share their data"""
    offline_steps: int = 100_000
    """transitions of a generated D_S, and of each part of -medium-expert (paper: 1,000,000)"""
    offline_noise: float = 0.5
    """mazes: standard deviation of noise on its actions (unknown of the paper's data)"""
    drop_terminals: bool = False
    """lose the end of each episode as the released loader does, and every terminal transition with it"""

    # Policy
    hidden_sizes: tuple[int, ...] = (256, 256)
    """widths of the hidden layers of actor, critics and value (the critics of awac and sac-n have a third one)"""
    batch_size: int = 256
    """expert transitions of a gradient step; as many others"""
    lr: float = 1e-3
    """Adam step size (paper: 1e-3 in mazes, else 1e-4)"""
    lr_cosine: bool = True
    """the actor's falls to 0 along a cosine (paper: iql and otil)"""
    lr_decay: bool = True
    """a tenth of the step size for the critics' and the value's second half (paper: iql in mazes, also the actor's)"""
    weight_decay: float = 5e-4
    """L2 added to gradients, paper 0.005 (iql, awac: of all networks; others: of the actor; sac-n, otil and demodice have none)"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.05
    """share of a network that moves into its target at an update (paper: 0.005, in runs that are longer than the default's)"""
    bc_weight: float = 1.0
    """weight of cloning D_E in the actor's loss"""
    rl_weight: float = 1.0
    """alpha: weight of the value learner's term in the actor's loss"""
    expectile: float = 0.7
    """iql: expectile of the value"""
    temperature: float = 3.0
    """iql: beta, the inverse temperature of the advantage weights; awac: 1"""
    num_critics: int = 10
    """sac-n: critics (unknown of the paper)"""

    # Model and augmentation
    model_members: int = 3
    """networks of the dynamics ensemble (paper: 7)"""
    model_hidden_sizes: tuple[int, ...] = (128, 128)
    """widths of their hidden layers (paper: 1024 1024)"""
    model_steps: int = 3_000
    """gradient steps of the ensemble (paper: 20 epochs, 78,500 steps of 1,005,000 transitions)"""
    model_optim: Literal["adam", "sgd"] = "adam"
    """Adam along a cosine, or SGD with Nesterov's momentum 0.9 (paper)"""
    model_lr: float = 1e-3
    """its step size (paper: 1e-4)"""
    reverse_action: Literal["uniform", "cvae"] = "uniform"
    """actions of rollouts: uniform, or of a conditional variational autoencoder (paper: uniform in mazes and hopper)"""
    cvae_hidden_sizes: tuple[int, ...] = (256, 256)
    """widths of its hidden layers (paper: 750 750)"""
    cvae_steps: int = 5_000
    """its gradient steps (paper: 200,000)"""
    model_ratio: float = 0.7
    """share of augmented rows among the batch's other half (paper: umaze 0.7, other mazes and hopper 0.5, else 0.1)"""
    new_ratio: float = 0.3
    """share of the newest round among them"""
    rollout_length: int = 5
    """h: steps of a rollout (paper: mazes and hopper 5, else 1)"""
    rollout_freq: int = 3_000
    """gradient steps between rounds of rollouts (paper: 20,000; robots 50,000)"""
    warmup_steps: int = 0
    """gradient steps before the first round (paper: robots 200,000; unknown in mazes)"""
    aug_size: int = 200_000
    """augmented transitions of all rounds (paper: 4,000,000)"""
    resample: bool = True
    """keep half of the imagined states, those of low confidence with higher probability"""
    self_paced: bool = True
    """let goals grow round by round; otherwise one round of all transitions, from D_E"""
    goal_threshold: Literal["quantile", "mean"] = "quantile"
    """confidence that makes a state a goal: above the 0.8 quantile over D_E (released code), or their mean density (slides)"""
    confidence: Literal["mode", "pre-tanh"] = "mode"
    """log density of the policy at its mode after tanh, which grows without bound where actions saturate, or before tanh"""
    expert_start_ratio: float = 0.9
    """share of rollouts that start at D_E, the others at goals"""
    plot_augmentation: bool = False
    """mazes: pictures of augmented states and of returns by start at 0, 25, 50 and 75% of the updates (pip install matplotlib)"""

    # Evaluation
    eval_every: int = 1_000
    """gradient steps between evaluations (paper: 5,000)"""
    eval_episodes: int = 20
    """episodes of an evaluation: deterministic policy, true reward (paper: 30)"""
    eval_only: bool = False
    """evaluate the policy of --checkpoint, train nothing"""
    checkpoint: str | None = None
    """a policy.pt or checkpoint.pt, or the run folder, for --eval-only"""
    capture_video: bool = False
    """write a video of the first episode of each evaluation to videos/"""


# Flags on the command line beat these. Keys are data sets, methods, learners, or a data set and a method; "*" applies always.
_ROBOTS = {"hopper": "Hopper", "walker2d": "Walker2d", "halfcheetah": "HalfCheetah", "ant": "Ant"}
_LEVELS = ("medium", "medium-expert")
_METHODS = {
    "romi": dict(self_paced=False, resample=False, warmup_steps=0), "otil": dict(learner="iql", weight_decay=0.0, bc_weight=0.0),
    "demodice": dict(weight_decay=0.0), "td3bc": dict(rl_weight=2.5), "awac": dict(temperature=1.0), "sac-n": dict(weight_decay=0.0),
}  # fmt: skip
_CONSTANT = dict(lr_cosine=False, lr_decay=False)
_STEP_SIZES = {  # of the methods' own codes, whose runs are much longer than the default; there, all have the environment's
    "bc": dict(**_CONSTANT, lr=1e-4), "dwbc": dict(**_CONSTANT, lr=1e-4), "otil": dict(lr=3e-4, lr_decay=False),
    **{name: dict(**_CONSTANT, lr=3e-4) for name in ("demodice", "td3bc", "awac", "sac-n")},
}  # fmt: skip
_ROBOT = dict(
    total_timesteps=30_000, lr=3e-4, lr_decay=False, model_ratio=0.1, reverse_action="cvae", rollout_length=1, rollout_freq=3_000,
    warmup_steps=12_000, eval_every=3_000, eval_episodes=10,
)  # fmt: skip
_HOPPER = dict(model_ratio=0.5, reverse_action="uniform", rollout_length=5)
_PAPER = dict(
    num_demos=5, first_demos=True, offline_steps=1_000_000, hidden_sizes=(256, 256), batch_size=256, weight_decay=0.005, gamma=0.99,
    tau=0.005, expectile=0.7, temperature=3.0, rl_weight=1.0, model_members=7, model_hidden_sizes=(1024, 1024), model_steps=78_500,
    model_optim="sgd", model_lr=1e-4, cvae_hidden_sizes=(750, 750), cvae_steps=200_000, new_ratio=0.3, aug_size=4_000_000,
    expert_start_ratio=0.9, eval_every=5_000, eval_episodes=30, checkpoint_every=20_000,
)  # fmt: skip
_PAPER_MAZE = dict(total_timesteps=200_000, lr=1e-3, lr_decay=True, reverse_action="uniform", rollout_length=5, rollout_freq=20_000)
_PAPER_ROBOT = dict(
    total_timesteps=500_000, lr=1e-4, lr_decay=False, model_ratio=0.1, reverse_action="cvae", rollout_length=1, rollout_freq=50_000,
    warmup_steps=200_000,
)  # fmt: skip
PRESETS: dict[str, dict[str, dict]] = {
    "default": {"maze2d-umaze": dict(model_ratio=0.7), "maze2d-medium": dict(model_ratio=0.5),
                "maze2d-large": dict(model_ratio=0.5, total_timesteps=6_000, rollout_freq=1_500)}
    | {f"{robot}-{level}": {**_ROBOT, **(_HOPPER if robot == "hopper" else {})} for robot in _ROBOTS for level in _LEVELS} | _METHODS,
    "paper": {"*": _PAPER}
    | {f"maze2d-{maze}": {**_PAPER_MAZE, "model_ratio": ratio} for maze, ratio in (("umaze", 0.7), ("medium", 0.5), ("large", 0.5))}
    | {f"{robot}-{level}": {**_PAPER_ROBOT, **(_HOPPER if robot == "hopper" else {})} for robot in _ROBOTS for level in _LEVELS}
    | {name: {**_METHODS.get(name, {}), **_STEP_SIZES.get(name, {})} for name in {**_METHODS, **_STEP_SIZES}},
}  # fmt: skip
POSITIVE = """
    total_timesteps num_threads num_demos offline_steps hidden_sizes batch_size lr temperature num_critics model_members
    model_hidden_sizes model_steps model_lr cvae_hidden_sizes cvae_steps rollout_length rollout_freq aug_size eval_every eval_episodes
""".split()
FRACTIONS = ("gamma", "tau", "expectile", "model_ratio", "new_ratio", "expert_start_ratio")
RESUME_MAY_CHANGE = {"resume", "demos", "offline_data", "data_dir", "checkpoint_every", "num_threads", "track"}
OBS_KEPT = {"Ant": 27, "Humanoid": 45}  # leading columns: qpos[2:] and qvel, without contact forces and inertias
SCRIPT = Path(__file__).name
ACTORS = Path(__file__).parent / "demos" / "experts"
AUGMENTING = ("sra", "romi", "forward")
MAZES = {  # PointMaze id, goal cell (row, column), horizon
    "umaze": ("PointMaze_UMaze-v3", (1, 1), 300), "medium": ("PointMaze_Medium-v3", (6, 6), 600),
    "large": ("PointMaze_Large-v3", (7, 9), 800),
}  # fmt: skip
# D4RL's returns of score 0 and 100. Its robots are older versions of gymnasium's, whose scores are only roughly on this scale.
SCORES = {
    "maze2d-umaze": (23.85, 161.86), "maze2d-medium": (13.13, 277.39), "maze2d-large": (6.7, 273.99),
    "maze2d-umaze-dense": (68.537689, 193.66285642381482), "maze2d-medium-dense": (44.264742, 297.4552547777125),
    "maze2d-large-dense": (30.569041, 303.4857382709002),
    "Hopper": (-20.272305, 3234.3), "HalfCheetah": (-280.178953, 12135.0), "Walker2d": (1.629008, 4592.3), "Ant": (-325.6, 3879.7),
}  # fmt: skip


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
    own = args.env_id and not any(word.startswith("--dataset") for word in argv)
    settings = dict(dataset="own" if own else args.dataset, algo=args.algo, learner=args.learner)
    settings["env_id"] = args.env_id or policy.get("env_id") or env_of(args.dataset)
    name = settings["dataset"] if settings["dataset"] in PRESETS["paper"] else like(settings["env_id"])
    for key in ("*", name, args.algo, args.learner if args.algo in (*AUGMENTING, "uds") else None):
        settings |= PRESETS[args.preset].get(key, {})
    return cli(replace(Args(), **settings), argv)


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
            if number < 0:
                fail(f"{flag} must not be negative, got {value}")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: no GPU that torch can use; take --device cpu")
    if args.track and importlib.util.find_spec("wandb") is None:
        fail("--track: wandb is not installed; pip install wandb")
    if args.compile and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))):
        fail("--compile: needs a C++ compiler (g++ or clang++); none is on the PATH")
    if args.eval_only != bool(args.checkpoint):
        fail("--eval-only and --checkpoint PATH go together")
    if args.eval_only:
        return
    known = [name for name in PRESETS["paper"] if name.startswith(("maze2d", *_ROBOTS))]
    if args.dataset not in ("own", *known) and not args.dataset.startswith("minari:"):
        near = difflib.get_close_matches(args.dataset, known, 1)
        fail(f"--dataset {args.dataset}: unknown. Known: {', '.join(known)}, minari:ID" + (f"; do you mean {near[0]}?" if near else ""))
    if not args.env_id:
        fail(f"--dataset {args.dataset}: give --env-id and --demos, where and what the expert did")
    for flag, path in zip(("--demos", "--offline-data"), sources(args), strict=True):
        if not path:
            fail(f"--env-id {args.env_id}: data of your own need {flag} PATH too")
    if args.learner != "iql" and args.algo not in (*AUGMENTING, "uds"):
        fail(f"--learner {args.learner}: --algo {args.algo} has no value learner to choose")
    if args.algo == "romi" and (args.self_paced or args.resample):
        fail("--algo romi has neither --self-paced nor --resample: take --algo sra")
    if args.algo in AUGMENTING and args.warmup_steps >= args.total_timesteps:
        fail(f"--warmup-steps {args.warmup_steps}: no round of rollouts in {args.total_timesteps} steps; give fewer, or 0")
    if args.algo in AUGMENTING and args.aug_size // rounds_of(args) < args.rollout_length:
        fail(f"--aug-size {args.aug_size}: less than one rollout of {args.rollout_length} steps in each of {rounds_of(args)} rounds")
    if args.plot_augmentation and (args.algo not in AUGMENTING or not args.env_id.startswith("maze2d-")):
        fail("--plot-augmentation: for --algo sra, romi and forward in the mazes")
    if args.plot_augmentation and importlib.util.find_spec("matplotlib") is None:
        fail("--plot-augmentation: matplotlib is not installed; pip install matplotlib")


def rounds_of(args: Args) -> int:
    """Rounds of rollouts in a run: one after the warm-up, then one each rollout_freq gradient steps."""
    return math.ceil((args.total_timesteps - args.warmup_steps) / args.rollout_freq) if args.self_paced else 1


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


def load_npz(path: str) -> dict[str, np.ndarray]:
    if not Path(path).exists():
        bundled = sorted((Path(__file__).parent / "demos").glob("*.npz"))
        near = [file for file in bundled if re.split(r"-v\d", file.stem)[0] == re.split(r"-v\d", Path(path).stem)[0]]
        names = ", ".join(file.stem for file in bundled) or "none here"
        hint = f"of another version: {near[0]}" if near else f"bundled demonstrations: {names}"
        fail(f"--demos {path}: no such file; give --demos PATH ({hint})")
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        fail(f"--demos {path}: not a readable .npz file ({str(error).splitlines()[0]})")


def load_minari(name: str) -> dict[str, np.ndarray]:
    """A Minari dataset in the same schema."""
    import minari

    with contextlib.suppress(ImportError):
        import huggingface_hub

        huggingface_hub.logging.set_verbosity_error()  # otherwise it announces every retry
    try:
        episodes = list(minari.load_dataset(name, download=True).iterate_episodes())
    except Exception as error:  # what a failed download raises depends on the storage behind it
        fail(f"minari:{name}: cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:200]})")

    def flat(obs) -> np.ndarray:
        return np.concatenate([flat(obs[key]) for key in sorted(obs)], -1) if isinstance(obs, dict) else np.asarray(obs)

    parts = [
        dict(observations=flat(e.observations)[:-1], actions=e.actions, rewards=e.rewards, next_observations=flat(e.observations)[1:],
             terminations=e.terminations, truncations=e.truncations | (np.arange(len(e.rewards)) == len(e.rewards) - 1) & ~e.terminations)
        for e in episodes
    ]  # fmt: skip
    return {key: np.concatenate([part[key] for part in parts]).astype(np.float32) for key in parts[0]}


# ---------------------------------------------------------------------------------------------- mazes
class Maze2d(gym.Env):
    """D4RL's maze2d-*-v1 on gymnasium-robotics' PointMaze, which has the same physics but another task.

    Observation x, y, vx, vy with x along the rows and y along the columns; a fixed goal, reward 1 within 0.5 of it, no termination.
    `reset(options={"start": [4]})` starts anywhere. D4RL's walls stand 0.2 nearer to the origin than its integer cells say.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 50}
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float64)

    def __init__(self, maze: str, render_mode: str | None = None):
        with contextlib.redirect_stderr(io.StringIO()):  # it announces changed rewards
            import gymnasium_robotics

        gym.register_envs(gymnasium_robotics)
        env_id, goal, self.horizon = MAZES[maze]
        self.pointmaze, self.render_mode, self.goal = (
            gym.make(env_id, render_mode=render_mode).unwrapped,
            render_mode,
            np.array(goal, float),
        )
        self.pointmaze.reset(seed=0)
        self.point, self.map = self.pointmaze.point_env, self.pointmaze.maze
        self.walls = np.array([[cell == 1 for cell in row] for row in self.map.maze_map])
        self.free = [tuple(map(int, cell)) for cell in np.argwhere(~self.walls)]
        self.pointmaze.goal = self.to_pointmaze(np.array([*goal, 0, 0]))[:2]
        self.pointmaze.update_target_site_pos()

    def to_pointmaze(self, obs: np.ndarray) -> np.ndarray:
        """[4] -> PointMaze's [4]: X right, Y up, from the maze's centre."""
        x, y, vx, vy = obs
        return np.array([y + 0.7 - self.map.x_map_center, self.map.y_map_center - x - 0.7, vy, -vx])

    def from_pointmaze(self, obs: np.ndarray) -> np.ndarray:
        """The inverse, [..., 4]."""
        x, y, vx, vy = np.moveaxis(obs, -1, 0)
        return np.stack([self.map.y_map_center - y - 0.7, x + self.map.x_map_center - 0.7, -vy, vx], -1)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """A uniform free cell (the goal's too), +-0.1, velocity N(0, 0.1)."""
        super().reset(seed=seed)
        cell = self.free[self.np_random.integers(len(self.free))]
        obs = np.array([*(cell + self.np_random.uniform(-0.1, 0.1, 2)), *self.np_random.normal(0, 0.1, 2)])
        obs = np.asarray((options or {}).get("start", obs), float)
        state = self.to_pointmaze(obs)
        self.point.set_state(state[:2], state[2:])
        return obs, {}

    def step(self, action: np.ndarray):
        state, *_ = self.point.step(np.array([action[1], -action[0]]))
        obs = self.from_pointmaze(state)
        distance = np.linalg.norm(obs[:2] - self.goal)
        return obs, float(distance <= 0.5), False, False, {"success": distance <= 0.5, "dense_reward": float(np.exp(-distance))}

    def render(self):
        return self.pointmaze.render()


for _maze, (_, _, _horizon) in MAZES.items():
    if f"maze2d-{_maze}-v1" not in gym.registry:
        gym.register(f"maze2d-{_maze}-v1", Maze2d, max_episode_steps=_horizon, disable_env_checker=True, kwargs=dict(maze=_maze))


class WaypointController:
    """Breadth-first plan to a goal cell, followed by a proportional controller with damping, then held."""

    def __init__(self, walls: np.ndarray, rng: np.random.Generator):
        self.walls, self.rng = walls, rng

    def plan(self, obs: np.ndarray, goal: tuple[int, int]) -> None:
        """Waypoints: the path's cells without the first one, each but the last shifted by up to 0.2 towards the walls' offset."""
        free = np.argwhere(~self.walls)
        start = tuple(map(int, free[np.abs(free - obs[:2]).max(1).argmin()]))  # rounded, to a free cell
        towards, queue = {goal: goal}, deque([goal])
        while queue and start not in towards:
            cell = queue.popleft()
            for step in ((0, -1), (0, 1), (-1, 0), (1, 0)):
                near = (cell[0] + step[0], cell[1] + step[1])
                if not self.walls[near] and near not in towards:
                    towards[near] = cell
                    queue.append(near)
        path = [towards[start]]
        while path[-1] != goal:
            path.append(towards[path[-1]])
        self.waypoints = [cell - self.rng.uniform(0, 0.2, 2) for cell in map(np.array, path[:-1])] + [np.array(goal, float)]
        self.previous = np.array(start, float)

    def act(self, obs: np.ndarray) -> tuple[np.ndarray, bool]:
        """Action [2] at obs [4], and whether the goal is reached at low speed."""
        position, velocity = obs[:2], obs[2:]
        slow = np.linalg.norm(position - self.previous) < 0.1
        solved = slow and np.linalg.norm(position - self.waypoints[-1]) < 0.1
        waypoint = self.waypoints[-1 if solved else 0]
        if slow and len(self.waypoints) > 1 and np.linalg.norm(position - waypoint) < 0.1:
            self.waypoints.pop(0)
        self.previous = position
        return np.clip(10 * (waypoint - position) - velocity, -1, 1), bool(solved)


def maze_data(maze: str, part: Literal["expert", "offline"], steps: int, noise: float, seed: int) -> dict[str, np.ndarray]:
    """`steps` transitions in the schema of demos/README.md: expert episodes to the fixed goal, each planned anew and without noise, or
    one stream of goal after goal (a truncation marks the change, but nothing is reset), with noise on the actions."""
    env, rng = Maze2d(maze), np.random.default_rng([seed, part == "offline"])
    controller, columns, since, obs = WaypointController(env.walls, rng), [], 0, None
    goal = tuple(map(int, env.goal))
    for _ in tqdm(range(steps), desc=f"{part} data of maze2d-{maze}", unit="step", leave=False):
        if obs is None or (part == "expert" and since == 0):
            obs, _ = env.reset(seed=int(rng.integers(2**31)))
        if since == 0:
            others = [cell for cell in env.free if cell != goal]
            goal = goal if part == "expert" else others[rng.integers(len(others))]
            controller.plan(obs, goal)
        action, solved = controller.act(obs)
        if part == "offline":
            action = np.clip(action + noise * rng.normal(size=2), -1, 1)
        next_obs, reward, *_ = env.step(action)
        since += 1
        ends = since == env.horizon or (part == "offline" and solved)
        columns.append((obs, action, reward, next_obs, 0.0, float(ends)))
        obs, since = next_obs, 0 if ends else since
    columns[-1] = (*columns[-1][:-1], 1.0)
    names = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    return {name: np.array(values, np.float32) for name, values in zip(names, zip(*columns, strict=True), strict=True)}


def robot_data(policy: dict, steps: int, seed: int) -> dict[str, np.ndarray]:
    """`steps` transitions of a policy's sampled actions, in the schema of demos/README.md; episodes end as they do, the last one is cut."""
    env, stream, columns, obs = ResumableEnv(make_env(policy["env_id"]), [seed, 4]), torch.Generator().manual_seed(seed), [], None
    actor = Actor(policy["obs_dim"], policy["act_dim"], tuple(policy["hidden_sizes"]))
    actor.load_state_dict(policy["actor"])
    for _ in tqdm(range(steps), desc=f"offline data of {policy['env_id']}", unit="step", leave=False):
        obs = env.reset() if obs is None else obs
        action = actor.act(obs, stream)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        columns.append((obs, rescaling(env).action(action), reward, next_obs, float(terminated), float(truncated)))
        obs = None if terminated or truncated else next_obs
    columns[-1] = (*columns[-1][:-1], 1.0 - columns[-1][-2])
    names = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    return {name: np.array(values, np.float32) for name, values in zip(names, zip(*columns, strict=True), strict=True)}


def generated(part: Literal["expert", "medium", "offline"], args: Args) -> Path:
    """The file of generated data, made where there is none. Mazes: 100 expert episodes, or D_S; robots: of the bundled expert or medium
    actor."""
    maze = args.env_id.split("-")[1] if args.env_id.startswith("maze2d-") else ""
    detail = f"-{args.offline_steps}" * (part == "offline" or not maze) + f"-noise{args.offline_noise:g}" * (part == "offline")
    path = Path(args.data_dir) / f"{args.env_id.removesuffix('-v1')}-{part}{detail}-seed{args.data_seed}.npz"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"--data-dir {args.data_dir}: {error.strerror}")
        if maze:
            steps = args.offline_steps if part == "offline" else 100 * MAZES[maze][2]
            data, about = maze_data(maze, part, steps, args.offline_noise, args.data_seed), dict(actor="waypoint controller")
        else:
            actor = actor_file(args.env_id, part)
            if not actor.exists():
                fail(f"{actor}: no such file; {args.dataset} needs this repository's actors in demos/experts beside {SCRIPT}")
            data, about = robot_data(load_policy(str(actor)), args.offline_steps, args.data_seed), dict(actor=actor.name)
        about |= dict(env_id=args.env_id, seed=args.data_seed, noise=args.offline_noise * (part == "offline"))
        own = path.with_suffix(f".{os.getpid()}")  # several seeds may start at once
        write_atomically(own, lambda file: np.savez_compressed(file, metadata=json.dumps(about), **data))
        os.replace(own, path)
    return path


def actor_file(env_id: str, part: Literal["expert", "medium"]) -> Path:
    """The bundled actor of a robot, which sac.py trained: all the way, or about a third."""
    return ACTORS / f"{env_id}{'-medium' if part == 'medium' else ''}.pt"


# ---------------------------------------------------------------------------------------------- data
def env_of(dataset: str) -> str:
    """The environment of a named data set; empty if the name does not say."""
    maze = re.fullmatch(r"(?:maze2d-|minari:D4RL/pointmaze/)(umaze|medium|large)(?:-dense)?(?:-v\d)?", dataset)
    robot = _ROBOTS.get(dataset.partition("-")[0])
    return f"maze2d-{maze[1]}-v1" if maze else f"{robot}-v4" if robot else ""


def like(env_id: str) -> str:
    """The named data set on whose settings runs on other data start: those of the same maze or robot."""
    return env_id.removesuffix("-v1") if env_id.startswith("maze2d-") else re.split(r"-v[45]$", env_id)[0].lower() + "-medium"


def sources(args: Args) -> tuple[str | None, str | None]:
    """Where D_E and D_S come from: files, "minari:ID", "generated" (of robots "generated medium"), or None where nothing says it."""
    demos, offline = None, args.dataset if args.dataset.startswith("minari:") else None
    if args.dataset != "own" and args.env_id.startswith("maze2d-"):
        demos, offline = "generated", offline or "generated"
    elif args.dataset in PRESETS["paper"]:
        demos = str(Path(__file__).parent / "demos" / f"{args.env_id}.npz")
        recorded = Path(args.data_dir) / f"{args.env_id}-medium.npz"
        offline = "generated medium" if actor_file(args.env_id, "medium").exists() and not recorded.exists() else str(recorded)
    return args.demos or demos, args.offline_data or offline


def load_transitions(source: str, flag: str, part: Literal["expert", "offline"], env: gym.Env, args: Args) -> dict[str, np.ndarray]:
    """A source's arrays in the schema of demos/README.md, checked against the environment, actions in [-1, 1]."""
    where, obs_dim, act_dim = f"{flag} {source}:", env.observation_space.shape[0], env.action_space.shape[0]
    if source.startswith("generated"):
        source = str(generated(source.partition(" ")[2] or part, args))
    if part == "offline" and not source.startswith("minari:") and not Path(source).exists():
        level = f"--env-id {args.env_id} --record-level 0.33 --record-sampled --record-demos {source} --record-episodes 100"
        hint = "" if args.offline_data else f"; train an actor and record it with: python sac.py {level}"
        fail(f"{where} no such file{hint}")
    data = load_minari(source[7:]) if source.startswith("minari:") else load_npz(source)
    if source.startswith("minari:D4RL/pointmaze/") and isinstance(env.unwrapped, Maze2d):
        for name in ("observations", "next_observations"):  # achieved goal, desired goal, observation
            data[name] = env.unwrapped.from_pointmaze(data[name][:, -4:]).astype(np.float32)
        data["actions"] = np.stack([-data["actions"][:, 1], data["actions"][:, 0]], 1)
    try:
        recorded = json.loads(str(data.get("metadata", "{}"))).get("env_id") or args.env_id
    except (ValueError, AttributeError):
        fail(f"{where} metadata is not a JSON object")
    if re.split(r"-v\d", recorded)[0].split(":")[-1] != re.split(r"-v\d", args.env_id)[0].split(":")[-1]:
        fail(f"{where} recorded on {recorded}, not on {args.env_id}")
    for name in ("observations", "next_observations"):
        if name in data and data[name].shape[1:] == env.unwrapped.observation_space.shape:
            data[name] = data[name][:, :obs_dim]  # cut as make_env cuts
    for name in ("observations", "actions", "rewards", "next_observations", "terminations", "truncations"):
        if name not in data:
            fail(f"{where} no array {name!r}; it has {', '.join(sorted(data))}")
        n, dims = len(data["observations"]), dict(observations=obs_dim, next_observations=obs_dim, actions=act_dim).get(name)
        shape, wanted = data[name].shape, (n, dims) if dims else (n,)
        if shape != wanted and len(shape) == 2 and dims and shape[0] == n:
            fail(f"{where} {args.env_id} has {dims}-dim {name}, the file has {shape[1]}: another version?")
        if shape != wanted:
            fail(f"{where} {name} must have shape {wanted}, has {shape}")
        if not np.isfinite(data[name]).all():
            fail(f"{where} {name} has a value that is not finite in row {int(np.argwhere(~np.isfinite(data[name]))[0, 0])}")
    low, high = rescaling(env).env.action_space.low, rescaling(env).env.action_space.high
    if (data["actions"] < low - 1e-4).any() or (data["actions"] > high + 1e-4).any():
        found = f"[{data['actions'].min():.3g}, {data['actions'].max():.3g}]"
        fail(f"{where} actions must lie in the environment's bounds [{low.min():.3g}, {high.max():.3g}], they span {found}")
    if not n or not (data["terminations"][-1] or data["truncations"][-1]):
        fail(f"{where} the last row must end an episode (terminations or truncations 1)")
    return {**data, "actions": (2 * (data["actions"] - low) / (high - low) - 1).clip(-1, 1)}


def episodes_of(data: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Row numbers of each episode."""
    ends = np.flatnonzero((data["terminations"] > 0) | (data["truncations"] > 0)) + 1
    return np.split(np.arange(len(data["observations"])), ends[:-1])


def as_rows(data: dict[str, np.ndarray], episodes: list[np.ndarray], reward: float, args: Args) -> tuple[torch.Tensor, list[int]]:
    """The episodes' transitions [n, width] in the replay buffer's layout, all with this reward, and the episodes' lengths."""
    if args.drop_terminals:  # the released loader drops the last row of an episode, before it another loader that of a timeout
        episodes = [rows[: -2 if data["truncations"][rows[-1]] else -1] for rows in episodes]
        episodes = [rows for rows in episodes if len(rows)]
    kept, n = np.concatenate(episodes), sum(map(len, episodes))
    columns = [data[name][kept] for name in ("observations", "actions", "next_observations")]
    columns += [np.full((n, 1), reward), data["terminations"][kept, None]]
    return torch.from_numpy(np.concatenate(columns, 1, dtype=np.float32)), list(map(len, episodes))


def load_data(env: gym.Env, args: Args) -> tuple[torch.Tensor, list[int], torch.Tensor, list[int], float]:
    """D_E and D_S as rows [n, width] and episode lengths, and the mean return of D_E. Rewards 1 and 0 (UDS's labels)."""
    demos, offline = sources(args)
    data = load_transitions(demos, "--demos", "expert", env, args)
    episodes = episodes_of(data)
    if len(episodes) < args.num_demos:
        fail(f"--demos {demos}: has {len(episodes)} trajectories, --num-demos asks for {args.num_demos}; give --num-demos {len(episodes)}")
    order = np.arange(len(episodes)) if args.first_demos else np.random.default_rng([args.data_seed, 2]).permutation(len(episodes))
    chosen = [episodes[number] for number in order[: args.num_demos]]
    expert, expert_lengths = as_rows(data, chosen, 1.0, args)
    expert_return = float(np.mean([data["rewards"][rows].sum() for rows in chosen]))
    parts = [load_transitions(offline, "--offline-data", "offline", env, args)]
    if args.dataset.endswith("medium-expert"):
        parts.append(load_transitions("generated expert", "--offline-data", "offline", env, args))
    parts = [as_rows(part, episodes_of(part), 0.0, args) for part in parts]
    return expert, expert_lengths, torch.cat([rows for rows, _ in parts]), [k for _, lengths in parts for k in lengths], expert_return


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


class OfflineActor(Actor):
    """The same policy with bounds on mean and log_std, and densities of given actions.

    All but `act` and `act_batch` take normalised observations, as the buffers hold them.
    """

    def distribution(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log_std [batch, act] before tanh, at obs [batch, obs]."""
        mean, log_std = self.net(obs[None])[0].chunk(2, -1)
        return mean.clamp(-9, 9), log_std.clamp(-5, 2)

    def forward(self, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Action [batch, act] and its log-probability [batch], from standard normal noise [batch, act]."""
        mean, log_std = self.distribution(obs)
        raw = mean + log_std.exp() * noise
        return raw.tanh(), squashed_log_prob(raw, mean, log_std).sum(-1)

    def log_prob(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Log density [batch, act] of each dimension of actions [batch, act]."""
        return squashed_log_prob(action.clamp(-1 + 1e-7, 1 - 1e-7).atanh(), *self.distribution(obs))

    @torch.no_grad()
    def confidence(self, obs: torch.Tensor, kind: str = "mode") -> torch.Tensor:
        """c(s) [n]: log density of the policy at tanh of its mean (or, pre-tanh, of the Gaussian at its mean)."""
        pieces = []
        for piece in obs.split(10_000):
            mean, log_std = self.distribution(piece)
            density = squashed_log_prob(mean, mean, log_std) if kind == "mode" else -log_std - 0.5 * math.log(2 * math.pi)
            pieces.append(density.sum(-1))
        return torch.cat(pieces)

    @torch.no_grad()
    def act_batch(self, obs: np.ndarray) -> np.ndarray:
        """Deterministic actions [n, act] at raw observations [n, obs]."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.normalise.mean.device)
        return self.distribution(self.normalise(obs))[0].tanh().cpu().numpy()


def squashed_log_prob(raw: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Log density of tanh(raw), raw ~ N(mean, std), in each dimension [batch, act]."""
    density = -0.5 * ((raw - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    return density - 2 * (math.log(2) - raw - F.softplus(-2 * raw))  # log of d tanh(raw) / d raw


class CriticEnsemble(nn.Module):
    """n action values."""

    def __init__(self, n: int, obs_dim: int, act_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        self.net = StackedMLP(n, [obs_dim + act_dim, *hidden_sizes, 1])

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Q [n, batch] of obs [batch, obs] and action [batch, act]."""
        return self.net(torch.cat([obs, action], -1).expand(len(self.net.output.weight), -1, -1)).squeeze(-1)


class Scalar(nn.Module):
    """One number for each input."""

    def __init__(self, dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        self.net = StackedMLP(1, [dim, *hidden_sizes, 1])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[batch] of inputs [batch, dim]."""
        return self.net(inputs[None])[0, :, 0]


class DwbcDiscriminator(nn.Module):
    """Probability, in [0.1, 0.9], that a transition is the expert's, of obs, action and the policy's log density of it."""

    def __init__(self, obs_dim: int, act_dim: int):
        super().__init__()
        self.pair, self.density, self.head = nn.Linear(obs_dim + act_dim, 128), nn.Linear(act_dim, 128), Scalar(256, (256,))

    def forward(self, obs: torch.Tensor, action: torch.Tensor, log_prob: torch.Tensor) -> torch.Tensor:
        """[batch] of obs [batch, obs], action and log_prob [batch, act]."""
        density = (log_prob.clamp(-20, 10) + 20) / 30
        hidden = torch.cat([self.pair(torch.cat([obs, action], -1)), self.density(density)], -1).relu()
        return self.head(hidden).sigmoid().clamp(0.1, 0.9)


class DeltaEnsemble(nn.Module):
    """Where a transition came from (backward), s - s' of [s', a], or where it leads (forward), s' - s of [s, a].

    `best` keeps each member's weights of lowest hold-out error.
    """

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.net = StackedMLP(args.model_members, [obs_dim + act_dim, *args.model_hidden_sizes, obs_dim])
        self.best, self.scale = copy.deepcopy(self.net).requires_grad_(False), Normaliser(obs_dim)
        self.register_buffer("best_loss", torch.full((args.model_members,), math.inf))

    @torch.no_grad()
    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """The other state [n, obs]: the mean of all members."""
        pieces = []
        for piece in torch.cat([obs, action], -1).split(10_000):
            delta = self.best(piece.expand(len(self.best_loss), -1, -1)).mean(0)
            pieces.append(piece[:, : obs.shape[1]] + self.scale.mean + self.scale.std * delta)
        return torch.cat(pieces)

    @torch.no_grad()
    def validate(self, inputs: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Mean squared error on hold-out inputs [n, obs + act] and deltas [n, obs], as a share of the mean squared delta."""
        target = (delta - self.scale.mean) / self.scale.std
        loss = (self.net(inputs.expand(len(self.best_loss), -1, -1)) - target).square().mean((1, 2))
        better = loss < self.best_loss
        for best, now in zip(self.best.parameters(), self.net.parameters(), strict=True):
            best[better] = now[better]
        self.best_loss[better] = loss[better]
        obs_dim = delta.shape[1]
        other = self(inputs[:, :obs_dim], inputs[:, obs_dim:])
        return (other - inputs[:, :obs_dim] - delta).square().mean() / delta.square().mean()


class ActionVAE(nn.Module):
    """Conditional variational autoencoder of the actions that lead into a state (or are taken there)."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.latent = 2 * act_dim
        self.encoder = StackedMLP(1, [obs_dim + act_dim, *args.cvae_hidden_sizes, 2 * self.latent])
        self.decoder = StackedMLP(1, [obs_dim + self.latent, *args.cvae_hidden_sizes, act_dim])

    def encode(self, obs: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log_std [batch, latent]."""
        mean, log_std = self.encoder(torch.cat([obs, action], -1)[None])[0].chunk(2, -1)
        return mean, log_std.clamp(-4, 15)

    def decode(self, obs: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """Actions [batch, act] from a latent [batch, latent]."""
        return self.decoder(torch.cat([obs, latent], -1)[None])[0].tanh()

    @torch.no_grad()
    def sample(self, obs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Actions [n, act] from standard normal noise [n, latent], cut to [-0.5, 0.5]."""
        pairs = zip(obs.split(10_000), noise.clamp(-0.5, 0.5).split(10_000), strict=True)
        return torch.cat([self.decode(*pair) for pair in pairs])


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


class OfflineAgent(nn.Module):
    """Actor, what the method or the learner has beside it, and their optimisers."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        kind = args.algo if args.algo in ("bc", "dwbc", "demodice") else args.learner
        hidden, deeper, decay = args.hidden_sizes, (*args.hidden_sizes, args.hidden_sizes[-1]), args.weight_decay
        self.actor = OfflineActor(obs_dim, act_dim, hidden)
        self.actor_optimizer = Adam(self.actor.parameters(), args.lr, decay)
        if kind == "dwbc":
            self.discriminator = DwbcDiscriminator(obs_dim, act_dim)
            self.discriminator_optimizer = Adam(self.discriminator.parameters(), args.lr)
        elif kind == "demodice":
            self.discriminator, self.value = Scalar(obs_dim + act_dim, hidden), Scalar(obs_dim, hidden)
            self.discriminator_optimizer, self.value_optimizer = (
                Adam(self.discriminator.parameters(), args.lr),
                Adam(self.value.parameters(), args.lr),
            )
        elif kind != "bc":
            self.critic = CriticEnsemble(
                args.num_critics if kind == "sac-n" else 2, obs_dim, act_dim, deeper if kind in ("awac", "sac-n") else hidden
            )
            if kind == "sac-n":  # as in EDAC
                for layer in self.critic.net.hidden:
                    nn.init.constant_(layer.bias, 0.1)
                nn.init.uniform_(self.critic.net.output.weight, -0.003, 0.003)
                nn.init.uniform_(self.critic.net.output.bias, -0.003, 0.003)
                self.log_alpha, self.target_entropy = nn.Parameter(torch.zeros(())), -act_dim
                self.alpha_optimizer = Adam([self.log_alpha], args.lr)
            self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
            self.critic_optimizer = Adam(self.critic.parameters(), args.lr, decay if kind in ("iql", "awac") else 0.0)
            if kind == "iql":
                self.value = Scalar(obs_dim, hidden)
                self.value_optimizer = Adam(self.value.parameters(), args.lr, decay)
            if kind == "td3bc":
                self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)


# ---------------------------------------------------------------------------------------------- gradient steps
def both(expert: Batch, other: Batch) -> Batch:
    """The two halves [n, ...] and [m, ...] of a batch as one, the expert's first."""
    return Batch(*(torch.cat(fields) for fields in zip(expert, other, strict=True)))


@torch.no_grad()
def move_target(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Moves the target's parameters a share tau towards the source's."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def expectile_loss(difference: torch.Tensor, expectile: float) -> torch.Tensor:
    """mean |expectile - 1(difference < 0)| difference^2 of [batch]."""
    return ((expectile - (difference < 0).float()).abs() * difference.square()).mean()


def iql_update(
    agent: OfflineAgent, expert: Batch, other: Batch, noise: torch.Tensor, actor_step: bool, args: Args
) -> dict[str, torch.Tensor]:
    """One gradient step of value, critics and actor: IQL (arXiv 2110.06169), with cloning of the expert.

    `expert` [n, ...] and `other` [m, ...] are transitions. All update functions take `noise` [2, n + m, act], standard normal, and
    `actor_step`, true in every second step, which is for those that need it; they return scalars to log.
    """
    batch = both(expert, other)
    with torch.no_grad():
        next_value = agent.value(batch.next_obs)  # before the value's step
        target_q = agent.target_critic(batch.obs, batch.action).amin(0)
    advantage = target_q - agent.value(batch.obs)
    value_loss = expectile_loss(advantage, args.expectile)
    agent.value_optimizer.step(torch.autograd.grad(value_loss, agent.value_optimizer.params))

    target = batch.reward + args.gamma * (1 - batch.terminated) * next_value
    q = agent.critic(batch.obs, batch.action)
    critic_loss = 0.5 * (q - target).square().mean(1).sum()
    agent.critic_optimizer.step(torch.autograd.grad(critic_loss, agent.critic_optimizer.params))
    move_target(agent.target_critic, agent.critic, args.tau)

    weight = (args.temperature * advantage.detach()).exp().clamp(max=100)
    log_prob = agent.actor.log_prob(batch.obs, batch.action).sum(-1)
    clone = -log_prob[: len(expert.obs)].mean()
    actor_loss = args.bc_weight * clone - args.rl_weight * (weight * log_prob).mean()
    agent.actor_optimizer.step(torch.autograd.grad(actor_loss, agent.actor_optimizer.params))
    return {"losses/value": value_loss.detach(), "losses/critic": critic_loss.detach(), "losses/actor": actor_loss.detach(),
            "losses/clone": clone.detach(), "losses/q": q.detach().mean(), "losses/weight": weight.mean()}  # fmt: skip


def td3bc_update(
    agent: OfflineAgent, expert: Batch, other: Batch, noise: torch.Tensor, actor_step: bool, args: Args
) -> dict[str, torch.Tensor]:
    """One gradient step of the critics, and every second time of the actor: TD3+BC (arXiv 2106.06860) with a stochastic actor."""
    batch = both(expert, other)
    with torch.no_grad():
        next_action, _ = agent.target_actor(batch.next_obs, noise[0])
        next_value = agent.target_critic(batch.next_obs, next_action).amin(0)
        target = batch.reward + args.gamma * (1 - batch.terminated) * next_value
    q = agent.critic(batch.obs, batch.action)
    critic_loss = (q - target).square().mean(1).sum()
    agent.critic_optimizer.step(torch.autograd.grad(critic_loss, agent.critic_optimizer.params))
    metrics = {"losses/critic": critic_loss.detach(), "losses/q": q.detach().mean()}
    if not actor_step:
        return metrics
    cloning = -agent.actor.log_prob(expert.obs, expert.action).sum(-1)
    action = agent.actor.distribution(batch.obs)[0].tanh()
    value = agent.critic(batch.obs, action)[0]
    scale = (cloning.abs().mean() / value.abs().mean()).detach()  # lambda
    clone = cloning.mean()
    actor_loss = args.bc_weight * clone - args.rl_weight * scale * value.mean()
    agent.actor_optimizer.step(torch.autograd.grad(actor_loss, agent.actor_optimizer.params))
    move_target(agent.target_critic, agent.critic, args.tau)
    move_target(agent.target_actor, agent.actor, args.tau)
    return metrics | {"losses/actor": actor_loss.detach(), "losses/clone": clone.detach()}


def awac_update(
    agent: OfflineAgent, expert: Batch, other: Batch, noise: torch.Tensor, actor_step: bool, args: Args
) -> dict[str, torch.Tensor]:
    """One gradient step of critics and actor: AWAC (arXiv 2006.09359), with cloning of the expert."""
    batch = both(expert, other)
    with torch.no_grad():
        next_action, _ = agent.actor(batch.next_obs, noise[0])
        next_value = agent.target_critic(batch.next_obs, next_action).amin(0)
        target = batch.reward + args.gamma * (1 - batch.terminated) * next_value
    q = agent.critic(batch.obs, batch.action)
    critic_loss = (q - target).square().mean(1).sum()
    agent.critic_optimizer.step(torch.autograd.grad(critic_loss, agent.critic_optimizer.params))
    move_target(agent.target_critic, agent.critic, args.tau)
    with torch.no_grad():
        value = agent.critic(batch.obs, agent.actor(batch.obs, noise[1])[0]).amin(0)
        advantage = agent.critic(batch.obs, batch.action).amin(0) - value
        weight = (args.temperature * advantage).exp().clamp(max=100)
    log_prob = agent.actor.log_prob(batch.obs, batch.action).sum(-1)
    clone = -log_prob[: len(expert.obs)].mean()
    actor_loss = args.bc_weight * clone - args.rl_weight * (weight * log_prob).mean()
    agent.actor_optimizer.step(torch.autograd.grad(actor_loss, agent.actor_optimizer.params))
    return {"losses/critic": critic_loss.detach(), "losses/q": q.detach().mean(), "losses/actor": actor_loss.detach(),
            "losses/clone": clone.detach(), "losses/weight": weight.mean()}  # fmt: skip


def sacn_update(
    agent: OfflineAgent, expert: Batch, other: Batch, noise: torch.Tensor, actor_step: bool, args: Args
) -> dict[str, torch.Tensor]:
    """One gradient step of the critics, and every second time of actor and temperature: SAC-N (arXiv 2110.01548), with cloning."""
    batch, alpha = both(expert, other), agent.log_alpha.detach().exp()
    with torch.no_grad():
        next_action, next_log_prob = agent.actor(batch.next_obs, noise[0])
        next_value = agent.target_critic(batch.next_obs, next_action).amin(0) - alpha * next_log_prob
        target = batch.reward + args.gamma * (1 - batch.terminated) * next_value
    q = agent.critic(batch.obs, batch.action)
    critic_loss = (q - target).square().mean(1).sum()
    agent.critic_optimizer.step(torch.autograd.grad(critic_loss, agent.critic_optimizer.params))
    move_target(agent.target_critic, agent.critic, args.tau)
    metrics = {"losses/critic": critic_loss.detach(), "losses/q": q.detach().mean(), "losses/alpha": alpha}
    if not actor_step:
        return metrics
    cloning = -agent.actor.log_prob(expert.obs, expert.action).sum(-1)
    action, log_prob = agent.actor(batch.obs, noise[1])
    value = agent.critic(batch.obs, action).amin(0)
    scale, clone = (cloning.abs().mean() / value.abs().mean()).detach(), cloning.mean()
    actor_loss = args.bc_weight * clone + alpha * log_prob.mean() - args.rl_weight * scale * value.mean()
    agent.actor_optimizer.step(torch.autograd.grad(actor_loss, agent.actor_optimizer.params))
    agent.alpha_optimizer.step([-log_prob.detach().mean() - agent.target_entropy])
    return metrics | {"losses/actor": actor_loss.detach(), "losses/clone": clone.detach()}


def cloning_update(
    agent: OfflineAgent, expert: Batch, other: Batch, noise: torch.Tensor, actor_step: bool, args: Args
) -> dict[str, torch.Tensor]:
    """One gradient step of behaviour cloning: the mean negative log-likelihood of the expert's actions."""
    clone = -agent.actor.log_prob(expert.obs, expert.action).sum(-1).mean()
    agent.actor_optimizer.step(torch.autograd.grad(clone, agent.actor_optimizer.params))
    return {"losses/clone": clone.detach()}


def dwbc_weights(on_expert: torch.Tensor, on_other: torch.Tensor, eta: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [n] of the expert's and [m] of the other negative log-likelihoods, of the discriminator's outputs there."""
    on_other = torch.where(on_other < 0.5, 0.0, on_other)
    return 7.5 - (eta / (on_expert * (1 - on_expert)) + 1), 1 / (1 - on_other) - 1


def dwbc_update(
    agent: OfflineAgent, expert: Batch, other: Batch, noise: torch.Tensor, actor_step: bool, args: Args
) -> dict[str, torch.Tensor]:
    """One gradient step of the policy: DWBC (arXiv 2207.10050), cloning weighted by the discriminator."""
    log_prob = [agent.actor.log_prob(batch.obs, batch.action) for batch in (expert, other)]
    with torch.no_grad():
        outputs = [agent.discriminator(b.obs, b.action, lp) for b, lp in zip((expert, other), log_prob, strict=True)]
        weights = dwbc_weights(*outputs)
    actor_loss = sum(-(weight * lp.sum(-1)).mean() for weight, lp in zip(weights, log_prob, strict=True))
    agent.actor_optimizer.step(torch.autograd.grad(actor_loss, agent.actor_optimizer.params))
    return {"losses/actor": actor_loss.detach(), "losses/weight": weights[1].mean(), "losses/clone": -log_prob[0].detach().sum(-1).mean()}


def dwbc_discriminator_update(agent: OfflineAgent, expert: Batch, other: Batch, eta: float = 0.5) -> dict[str, torch.Tensor]:
    """One gradient step of DWBC's discriminator: positive (expert) and unlabelled (other) learning."""
    with torch.no_grad():
        log_prob = [agent.actor.log_prob(batch.obs, batch.action) for batch in (expert, other)]
    on_expert, on_other = (agent.discriminator(b.obs, b.action, lp) for b, lp in zip((expert, other), log_prob, strict=True))
    loss = (-on_expert.log() + (1 - on_expert).log()).mean() - (1 - on_other).log().mean() / eta
    agent.discriminator_optimizer.step(torch.autograd.grad(loss, agent.discriminator_optimizer.params))
    return {"losses/discriminator": loss.detach()}


def demodice_update(
    agent: OfflineAgent, expert: Batch, union: Batch, first: torch.Tensor, mix: torch.Tensor, args: Args
) -> dict[str, torch.Tensor]:
    """One gradient step of discriminator, value and policy: DemoDICE (ICLR 2022).

    `expert` and `union` (of D_E and D_S) are [n, ...], `first` [n, obs] initial states, `mix` [4, n, 1] in [0, 1].
    """
    alpha = 0.1

    def cost(pair: torch.Tensor) -> torch.Tensor:
        return (1 / (agent.discriminator(pair).sigmoid() + 1e-3) - 1 + 1e-3).log()

    def slope(function: Callable, points: torch.Tensor) -> torch.Tensor:
        return (torch.func.grad(lambda x: function(x).sum())(points).square().sum(-1) + 1e-12).sqrt()

    def between(share: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return share * one + (1 - share) * other

    on_expert, on_union = (torch.cat([batch.obs, batch.action], -1) for batch in (expert, union))
    classify = F.softplus(-agent.discriminator(on_expert)).mean() + F.softplus(agent.discriminator(on_union)).mean()
    points = torch.cat([between(mix[0], on_expert, on_union), between(mix[1], on_union.roll(1, 0), on_union)])
    penalty = (slope(cost, points) - 1).square().mean()
    discriminator_loss = classify + 0.1 * penalty
    agent.discriminator_optimizer.step(torch.autograd.grad(discriminator_loss, agent.discriminator_optimizer.params))

    with torch.no_grad():
        reward = -cost(on_union)
    advantage = reward + args.gamma * agent.value(union.next_obs) - agent.value(union.obs)
    points = torch.cat([union.obs, between(mix[2], expert.obs, union.obs), between(mix[3], expert.next_obs, union.next_obs)])
    value_loss = (1 - args.gamma) * agent.value(first).mean() + (1 + alpha) * torch.logsumexp(advantage / (1 + alpha), 0)
    value_loss = value_loss + 1e-4 * slope(agent.value, points).square().mean()
    agent.value_optimizer.step(torch.autograd.grad(value_loss, agent.value_optimizer.params))

    weight = demodice_weights(advantage.detach(), alpha)
    actor_loss = -(weight * agent.actor.log_prob(union.obs, union.action).sum(-1)).mean()
    agent.actor_optimizer.step(torch.autograd.grad(actor_loss, agent.actor_optimizer.params))
    return {"losses/discriminator": discriminator_loss.detach(), "losses/value": value_loss.detach(), "losses/actor": actor_loss.detach(),
            "losses/weight_max": weight.max()}  # fmt: skip


def demodice_weights(advantage: torch.Tensor, alpha: float) -> torch.Tensor:
    """exp(advantage / (1 + alpha)) over its mean, [n]."""
    return len(advantage) * torch.softmax(advantage / (1 + alpha), 0)


def delta_update(model: DeltaEnsemble, optimizer, inputs: torch.Tensor, delta: torch.Tensor) -> dict[str, torch.Tensor]:
    """One gradient step of each member, on rows of its own: inputs [members, batch, obs + act], delta [members, batch, obs]."""
    loss = (model.net(inputs) - (delta - model.scale.mean) / model.scale.std).square().mean((1, 2))
    params = list(model.net.parameters())
    grads = torch.autograd.grad(loss.sum(), params)
    norm = torch.stack([grad.square().flatten(1).sum(1) for grad in grads]).sum(0).sqrt()  # of each member
    grads = [grad / norm.clamp(min=1)[:, None, None] for grad in grads]
    if isinstance(optimizer, Adam):
        optimizer.step(grads)
    else:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    return {"losses/model": loss.detach().mean()}


def cvae_update(vae: ActionVAE, optimizer: Adam, obs: torch.Tensor, action: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
    """One gradient step on obs [batch, obs] and action [batch, act], with standard normal noise [batch, latent]."""
    mean, log_std = vae.encode(obs, action)
    kl = -0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp()).mean()  # the mean over latents too
    error = F.mse_loss(vae.decode(obs, mean + log_std.exp() * noise), action)
    optimizer.step(torch.autograd.grad(error + 0.5 * kl, optimizer.params))
    return {"losses/cvae_error": error.detach(), "losses/cvae_kl": kl.detach()}


UPDATES = {"iql": iql_update, "td3bc": td3bc_update, "awac": awac_update, "sac-n": sacn_update, "bc": cloning_update, "dwbc": dwbc_update}


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


# ---------------------------------------------------------------------------------------------- augmentation
def confident_states(actor: OfflineActor, expert: torch.Tensor, offline: torch.Tensor, args: Args) -> torch.Tensor:
    """Which of offline [m, obs] become goals: indices [k] of those more confident than the 0.8 quantile over expert [n, obs] (or its
    mean), at most the 10 n most confident ones."""
    on_expert, on_offline = (actor.confidence(obs, args.confidence) for obs in (expert, offline))
    mean = on_expert.logsumexp(0) - math.log(len(expert))  # of densities, whose logarithm the confidence is
    chosen = (on_offline >= mean if args.goal_threshold == "mean" else on_offline > on_expert.quantile(0.8)).nonzero()[:, 0]
    return chosen[on_offline[chosen].topk(min(len(chosen), 10 * len(expert))).indices]


def keep_unsure(confidence: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    """Indices [n] drawn without replacement, with probabilities proportional to 1 / (exp(c) + 1e-5), of confidence c [m].

    Gumbel noise on the log weights and the n largest: the same distribution, and nothing overflows.
    """
    uniform = torch.rand(confidence.shape, generator=generator, device=confidence.device, dtype=torch.float64)
    score = -torch.logaddexp(confidence.double(), torch.tensor(math.log(1e-5), device=confidence.device))
    return (score - (-uniform.clamp(min=1e-300).log()).log()).topk(n).indices


def draw(pools: list[tuple[float, torch.Tensor]], n: int, generator: torch.Generator) -> torch.Tensor:
    """n rows of pools, (share, rows [m, obs]) each, with replacement; a share of an empty pool goes to the first one."""
    shares = [share if len(rows) else 0.0 for share, rows in pools]
    shares[0] += 1 - sum(shares)
    counts = np.diff([0, *np.rint(n * np.cumsum(shares)).astype(int)]).tolist()
    index = [
        torch.randint(len(rows), (k,), generator=generator, device=rows.device) for k, (_, rows) in zip(counts, pools, strict=True) if k
    ]
    return torch.cat([rows[i] for i, (_, rows) in zip(index, [p for p, k in zip(pools, counts, strict=True) if k], strict=True)])


def rollouts(
    model: DeltaEnsemble, vae: ActionVAE | None, actor: OfflineActor, pools: list[tuple[float, torch.Tensor]], n: int, act_dim: int,
    generator: torch.Generator, args: Args,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """A round of augmentation: rollout_length times n transitions, rows [rollout_length * n, width] with reward 0, and all states
    that were reached, before resampling.

    The state that a step reaches, the predecessor (forward: the successor), is where the next step goes on and what is resampled.
    """
    rows, everywhere, state = [], [], None
    for _ in range(args.rollout_length):
        if args.resample:
            state = draw(pools if state is None else [(1.0, state)], 2 * n, generator)
        elif state is None:
            state = draw(pools, n, generator)
        if vae:
            action = vae.sample(state, torch.randn(len(state), vae.latent, generator=generator, device=state.device))
        else:
            action = 2 * torch.rand(len(state), act_dim, generator=generator, device=state.device) - 1
        reached = model(state, action)
        everywhere.append(reached)
        if args.resample:
            kept = keep_unsure(actor.confidence(reached, args.confidence), n, generator)
            state, action, reached = state[kept], action[kept], reached[kept]
        obs, next_obs = (state, reached) if args.algo == "forward" else (reached, state)
        rows.append(torch.cat([obs, action, next_obs, torch.zeros(n, 2, device=obs.device)], 1))
        state = reached
    return torch.cat(rows), torch.cat(everywhere)


def thinned(rows: torch.Tensor, n: int) -> torch.Tensor:
    """About n (up to 2n) of the rows, evenly spaced."""
    return rows[:: max(1, len(rows) // n)]


def batch_shares(rounds: int, args: Args) -> tuple[int, int, int]:
    """Rows of D_S, of older rounds and of the newest one in the batch's second half, after so many rounds."""
    if not rounds:
        return args.batch_size, 0, 0
    old = args.model_ratio * (1 - args.new_ratio) if rounds > 1 else 0.0
    return tuple(int(args.batch_size * share + 0.1) for share in (1 - args.model_ratio, old, args.model_ratio - old))


# ---------------------------------------------------------------------------------------------- optimal transport
def sinkhorn(cost: np.ndarray, horizon: int, epsilon: float = 0.01, iterations: int = 100) -> np.ndarray:
    """Entropic transport plan [n, m] between uniform masses 1 / horizon a step, of a cost [n, m] in [0, 2].

    Double precision holds exp(-2 / 0.01), so that scaling needs no logarithms, but where n and m differ both factors drift:
    the rows' is set back each time. The rows' masses are exact at the end.
    """
    kernel, mass = np.exp(-cost.astype(np.float64) / epsilon), 1 / horizon
    rows, columns = np.full(len(cost), 1.0), None
    for _ in range(iterations):
        rows = rows / rows.max()
        columns = mass / (rows @ kernel)
        scaled = kernel @ columns
        converged = np.abs(rows * scaled - mass).max() < 1e-9
        rows = mass / scaled
        if converged:
            break
    return rows[:, None] * kernel * columns


def transport_rewards(rows: torch.Tensor, lengths: list[int], expert: torch.Tensor, expert_lengths: list[int], horizon: int, obs_dim: int):
    """OTR's rewards [n] of episodes of these lengths in rows [n, width]: 5 exp(-5 T / |s| transported cosine distance), by the expert
    trajectory that gives most, before the scaling by returns."""
    unit = [F.normalize(x[:, :obs_dim].double(), dim=1).cpu().numpy() for x in (rows, expert)]
    episodes, experts = (np.split(x, np.cumsum(sizes)[:-1]) for x, sizes in zip(unit, (lengths, expert_lengths), strict=True))
    rewards = []
    for episode in tqdm(episodes, desc="optimal transport", unit="episode", leave=False):
        costs = [1 - episode @ trajectory.T for trajectory in experts]
        moved = [(sinkhorn(cost, horizon) * cost).sum(1) for cost in costs]
        rewards.append(max((5 * np.exp(-5 * horizon / obs_dim * z) for z in moved), key=np.sum))
    return rewards


def label_by_transport(
    expert: torch.Tensor, expert_lengths: list[int], offline: torch.Tensor, lengths: list[int], horizon: int, obs_dim: int
):
    """Writes OTR's rewards into the rows of D_E and D_S, scaled by 1000 / (largest - smallest return)."""
    rows, sizes = torch.cat([expert, offline]), [*expert_lengths, *lengths]
    rewards = transport_rewards(rows, sizes, expert, expert_lengths, horizon, obs_dim)
    returns = [reward.sum() for reward in rewards]
    scaled = torch.from_numpy(np.concatenate(rewards) * 1000 / max(max(returns) - min(returns), 1e-9)).to(expert)
    expert[:, -2], offline[:, -2] = scaled[: len(expert)], scaled[len(expert) :]


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


def evaluate_mazes(actor: OfflineActor, envs: list[gym.Env], seed: list[int], starts: np.ndarray | None = None) -> dict:
    """One deterministic episode in each environment, in lock step with one call of the policy; from starts [n, 4] if given.

    The same rollouts give the sparse and the dense return.
    """
    rng = np.random.default_rng(seed)
    envs = envs if starts is None else envs[: len(starts)]
    options = [None] * len(envs) if starts is None else [{"start": start} for start in starts]
    obs = first_obs = np.array([env.reset(seed=int(rng.integers(2**31)), options=o)[0] for env, o in zip(envs, options, strict=True)])
    returns, dense, success, length, done = (*np.zeros((2, len(envs))), np.zeros(len(envs), bool), 0, False)
    while not done:
        steps = [env.step(action) for env, action in zip(envs, actor.act_batch(obs), strict=True)]
        obs, length, done = np.array([step[0] for step in steps]), length + 1, steps[0][3]  # all end by the same time limit
        returns += [step[1] for step in steps]
        dense += [step[4]["dense_reward"] for step in steps]
        success |= [step[4]["success"] for step in steps]
    return dict(eval_return_mean=float(returns.mean()), eval_return_std=float(returns.std()), eval_success_rate=float(success.mean()),
                eval_length_mean=float(length), eval_return_dense=float(dense.mean()), returns=returns, first_obs=first_obs)  # fmt: skip


def without_expert(positions: np.ndarray, expert: np.ndarray) -> np.ndarray:
    """Which positions [k, 2] have no expert state of [n, obs] within 0.5 in both directions, which is the size of a cell."""
    return np.array([(np.abs(expert[:, :2] - position).max(1) >= 0.5).all() for position in positions])


def normalised_score(env_id: str, value: float, kind: str = "") -> float:
    """D4RL's scale: 0 a random, 100 an expert policy of the benchmark; NaN elsewhere."""
    low, high = SCORES.get(re.sub(r"-v\d+$", "", env_id) + kind, (math.nan, math.nan))
    return 100 * (value - low) / (high - low)


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


def plot_augmentation(
    path: Path, maze: Maze2d, expert: torch.Tensor, candidates: torch.Tensor, imagined: torch.Tensor, actor: OfflineActor,
    envs: list[gym.Env], args: Args,
) -> float:  # fmt: skip
    """A picture of the newest round's states [n, obs] (normalised), all that were reached in grey (those of a round before a resume
    are not known) and the kept ones by confidence, and of the greedy policy's return by starting cell.

    Returns the mean return from cells without an expert state.
    """
    import matplotlib.pyplot as plt

    def raw(obs: torch.Tensor) -> np.ndarray:
        return (obs * actor.normalise.std + actor.normalise.mean).cpu().numpy()

    cells, returns = np.array(maze.free, float), []
    starts = np.concatenate([cells, np.zeros_like(cells)], 1)
    for piece in np.array_split(starts, math.ceil(len(starts) / len(envs))):
        returns.extend(evaluate_mazes(actor, envs, [0], piece)["returns"])
    far = without_expert(cells, raw(expert))
    outside = float(np.mean(np.array(returns)[far])) if far.any() else math.nan
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5))
    states, before = thinned(imagined, 5_000), thinned(candidates, 5_000)
    for axes in (left, right):
        axes.imshow(
            maze.walls.T, cmap="Greys", vmax=2, origin="lower", extent=(-0.7, len(maze.walls) - 0.7, -0.7, maze.walls.shape[1] - 0.7)
        )
        axes.plot(*raw(expert)[::5, :2].T, "k.", ms=1, label="expert", zorder=3)
        axes.plot(*maze.goal, "r*", ms=12, zorder=4)
    left.plot(*raw(before)[:, :2].T, ".", color="0.8", ms=1, zorder=1)
    points = left.scatter(*raw(states)[:, :2].T, s=3, c=actor.confidence(states, args.confidence).cpu())
    figure.colorbar(points, ax=left, label="confidence")
    points = right.scatter(*cells.T, s=250, c=returns, vmin=0, cmap="viridis", marker="s", alpha=0.8)
    figure.colorbar(points, ax=right, label="return by starting cell")
    left.set_title(f"imagined states, update {path.stem.rpartition('-')[2]}")
    right.set_title(f"where the expert was {np.mean(np.array(returns)[~far]):.0f}, elsewhere {outside:.0f}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return outside


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


# ---------------------------------------------------------------------------------------------- training
def train(args: Args) -> dict:
    """SRA (arXiv 2406.12550) and offline baselines. Returns the last row of progress.csv."""
    device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu"))
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    streams = {}
    names = ("replay", "policy", "model", "rollout", "augmented")  # of their own, so that UDS is SRA with model_ratio 0
    for name, seed in zip(names, np.random.SeedSequence(args.seed).generate_state(len(names)), strict=True):
        streams[name] = torch.Generator(device).manual_seed(int(seed))

    eval_env = make_env(args.env_id, "rgb_array" if args.capture_video else None)  # first, because it chooses the renderer
    is_maze, augmenting = isinstance(eval_env.unwrapped, Maze2d), args.algo in AUGMENTING
    obs_dim, act_dim = eval_env.observation_space.shape[0], eval_env.action_space.shape[0]
    expert_rows, expert_lengths, offline_rows, offline_lengths, expert_return = load_data(eval_env, args)
    expert_obs = expert_rows[:, :obs_dim].numpy().copy()
    envs = [make_env(args.env_id) for _ in range(args.eval_episodes)] if is_maze else []

    agent = OfflineAgent(obs_dim, act_dim, args).to(device)
    normalise, next_obs = agent.actor.normalise, slice(obs_dim + act_dim, 2 * obs_dim + act_dim)
    normalise.fit(torch.cat([expert_rows, offline_rows])[:, :obs_dim].to(device))
    normalise.std.add_(1e-3)
    expert_rows, offline_rows = expert_rows.to(device), offline_rows.to(device)
    for rows in (expert_rows, offline_rows):  # from here on, all states are normalised
        rows[:, :obs_dim], rows[:, next_obs] = normalise(rows[:, :obs_dim]), normalise(rows[:, next_obs])
    if args.algo == "otil":
        horizon = eval_env.spec.max_episode_steps or max(expert_lengths + offline_lengths)
        label_by_transport(expert_rows, expert_lengths, offline_rows, offline_lengths, horizon, obs_dim)
    all_rows = torch.cat([expert_rows, offline_rows])
    expert, offline, union = (ReplayBuffer(len(rows), obs_dim, act_dim, device) for rows in (expert_rows, offline_rows, all_rows))
    for buffer, rows in ((expert, expert_rows), (offline, offline_rows), (union, all_rows)):
        buffer.extend(rows)
    starts = np.cumsum([0, *expert_lengths, *offline_lengths])[:-1]
    first_obs = all_rows[torch.from_numpy(starts).to(device), :obs_dim]

    parts = dict(agent=agent)
    if augmenting:
        model = DeltaEnsemble(obs_dim, act_dim, args).to(device)
        vae = ActionVAE(obs_dim, act_dim, args).to(device) if args.reverse_action == "cvae" else None
        rounds = rounds_of(args)
        n = args.aug_size // rounds // args.rollout_length
        newest = ReplayBuffer(n * args.rollout_length, obs_dim, act_dim, device)
        older = ReplayBuffer(max(1, n * args.rollout_length * (rounds - 1)), obs_dim, act_dim, device)
        goals = ReplayBuffer(rounds * min(10 * len(expert), len(offline)), obs_dim, act_dim, device)
        if args.model_optim == "adam":
            model_optimizer = Adam(model.net.parameters(), args.model_lr).to(device)
        else:
            model_optimizer = torch.optim.SGD(model.net.parameters(), args.model_lr, momentum=0.9, nesterov=True)
        parts |= dict(model=model, model_optimizer=model_optimizer, newest=newest, older=older, goals=goals)
        # Backward, a model goes from where a transition led to where it came from.
        near, far = (slice(0, obs_dim), next_obs) if args.algo == "forward" else (next_obs, slice(0, obs_dim))
        order = torch.from_numpy(np.random.default_rng([args.seed, 3]).permutation(len(all_rows))).to(device)
        inputs = torch.cat([all_rows[:, near], all_rows[:, obs_dim : obs_dim + act_dim]], 1)[order]
        delta, held_out = (all_rows[:, far] - all_rows[:, near])[order], min(len(order) // 10, 5_000)
        model.scale.fit(delta[held_out:])
        update_model, update_vae = compiled(delta_update, args), compiled(cvae_update, args)
        if vae:
            vae_optimizer = Adam(vae.parameters(), 1e-3).to(device)
            parts |= dict(vae=vae, vae_optimizer=vae_optimizer)
    parts |= {f"{name}_stream": stream for name, stream in streams.items()}
    kind = args.algo if args.algo in ("bc", "dwbc") else args.learner
    update = compiled(demodice_update if args.algo == "demodice" else UPDATES[kind], args)
    update_discriminator = compiled(dwbc_discriminator_update, args)

    data = zlib.crc32(all_rows.cpu().numpy().tobytes())
    fresh = dict(env_steps=0, updates=0, model_steps=0, cvae_steps=0, rounds=0, data=data)
    checkpoint = read_checkpoint(Path(args.resume)) if args.resume else dict(counters=fresh)
    if checkpoint["counters"]["data"] != data:
        fail(f"--resume {args.resume}: the data are not those of the run")
    run_dir = make_run_dir(args)
    counters = checkpoint["counters"]
    log = parts["log"] = Log(run_dir, args, counters["updates"])
    if args.resume:
        restore(checkpoint, parts)
    stop, total = StopSignal(), args.total_timesteps
    about = f"{args.algo} on {args.dataset if args.dataset != 'own' else args.env_id}"
    names = [source if source.startswith("minari:") else Path(source).name for source in sources(args)]
    sizes = f"{len(expert)} expert transitions ({names[0]}), {len(offline)} others ({names[1]})"
    tqdm.write(f"{SCRIPT}: {about}, {sizes}, run folder {run_dir}", file=sys.stderr)

    candidates = all_rows[:0, :obs_dim]  # of the newest round, for a picture

    def policy() -> dict:
        return policy_content(agent.actor, eval_env, args, 0)

    def evaluate_and_save_policy() -> None:
        at = counters["updates"]
        check_finite({**log.sums, **dict(agent.actor.named_parameters())}, at)
        confidence = {
            name: agent.actor.confidence(thinned(b.rows[:, :obs_dim], 1_000), args.confidence).mean()
            for name, b in (("expert", expert), ("offline", offline))
        }
        log.add({f"model/confidence_{name}": value for name, value in confidence.items()})
        video = run_dir / "videos" / f"step-{at}" if args.capture_video else None
        if is_maze:
            result = evaluate_mazes(agent.actor, envs, [args.seed, 1, at])
            outside = result.pop("returns")[without_expert(result.pop("first_obs")[:, :2], expert_obs)]
            result["eval_normalized_score_outside"] = normalised_score(args.env_id, float(outside.mean()) if len(outside) else math.nan)
            result["eval_normalized_score_dense"] = normalised_score(args.env_id, result["eval_return_dense"], "-dense")
            if video:
                evaluate(agent.actor, eval_env, 1, [args.seed, 1, at], video=video)
        else:
            result = evaluate(agent.actor, eval_env, args.eval_episodes, [args.seed, 1, at], video=video)
        result["eval_normalized_score"] = normalised_score(re.sub(r"-v\d$", "", args.env_id), result["eval_return_mean"])
        log.row(0, at, result, expert_return)
        write_atomically(run_dir / "policy.pt", lambda file: torch.save(policy(), file))

    def cosine(done: int, of: int) -> float:
        return (1 + math.cos(math.pi * done / of)) / 2

    def autocast():
        """Without its cache of weights, since an update changes one network and then evaluates it again."""
        return torch.autocast(device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False)

    def fit_model() -> None:
        """Stage 1: the dynamics. Returns early on a signal."""
        epoch = max(1, args.model_steps // 20)
        while counters["model_steps"] < args.model_steps and not stop.received:
            index = torch.randint(len(order) - held_out, (args.model_members, args.batch_size), generator=streams["model"], device=device)
            if args.model_optim == "adam":
                model_optimizer.lr.fill_(args.model_lr * cosine(counters["model_steps"], args.model_steps))
            with autocast():
                metrics = update_model(model, model_optimizer, inputs[held_out + index], delta[held_out + index])
            counters["model_steps"] += 1
            last = counters["model_steps"] == args.model_steps
            if last or counters["model_steps"] % epoch == 0:
                error = model.validate(inputs[:held_out], delta[:held_out])
                check_finite({"model/hold_out_error": error, **metrics}, 0)
                log.bar.set_postfix_str(f"model {counters['model_steps'] / args.model_steps:.0%}, error {error:.2g}")
                if last:
                    log.add({**metrics, "model/hold_out_error": error})

    def fit_vae() -> None:
        """Stage 2: the actions of rollouts, p(a | s') (forward: p(a | s))."""
        while counters["cvae_steps"] < args.cvae_steps and not stop.received:
            index = torch.randint(len(order), (args.batch_size,), generator=streams["model"], device=device)
            noise = torch.randn(args.batch_size, vae.latent, generator=streams["model"], device=device)
            with autocast():
                log.add(update_vae(vae, vae_optimizer, inputs[index, :obs_dim], inputs[index, obs_dim:], noise))
            counters["cvae_steps"] += 1

    def augment() -> None:
        """A self-paced round: goals by the current policy's confidence, rollouts from them."""
        states = expert.rows[:, :obs_dim]
        pools = [(1.0, states)]
        if args.self_paced:
            chosen = confident_states(agent.actor, states, offline.rows[:, :obs_dim], args)
            others, known = 1 - args.expert_start_ratio, goals.newest(len(goals))[:, :obs_dim]
            share = args.new_ratio if len(known) else 1.0
            pools = [(args.expert_start_ratio, states), (others * (1 - share), known), (others * share, offline.rows[chosen, :obs_dim])]
            log.add({"model/goals": float(len(chosen))})
            goals.extend(offline.rows[chosen])
        if counters["rounds"]:
            older.extend(newest.newest(len(newest)))
        newest.added = 0
        nonlocal candidates
        rows, candidates = rollouts(model, vae, agent.actor, pools, n, act_dim, streams["rollout"], args)
        newest.extend(rows)
        counters["rounds"] += 1
        imagined = newest.rows[:, :obs_dim] if args.algo != "forward" else newest.rows[:, next_obs]
        log.add({"model/confidence_augmented": agent.actor.confidence(thinned(imagined, 1_000), args.confidence).mean()})

    def second_half() -> Batch:
        if args.algo in ("otil", "demodice"):
            size = args.batch_size - args.batch_size // 2 if args.algo == "otil" else args.batch_size
            return union.split(union.sample((size,), streams["replay"]))
        shares = batch_shares(counters["rounds"], args)
        rows = [offline.sample((shares[0],), streams["replay"])]
        rows += [b.sample((k,), streams["augmented"]) for b, k in zip((older, newest), shares[1:], strict=True) if k] if augmenting else []
        return offline.split(torch.cat(rows))

    def update_policy() -> dict[str, torch.Tensor]:
        done = counters["updates"]
        agent.actor_optimizer.lr.fill_(args.lr * (cosine(done, total) if args.lr_cosine else 1.0))
        for name in ("critic_optimizer", "value_optimizer"):
            if hasattr(agent, name):
                getattr(agent, name).lr.fill_(args.lr * (0.1 if args.lr_decay and 2 * done >= total else 1.0))
        source, size = (union, args.batch_size // 2) if args.algo == "otil" else (expert, args.batch_size)
        batch, other = source.split(source.sample((size,), streams["replay"])), second_half()
        if args.algo == "demodice":
            first = first_obs[torch.randint(len(first_obs), (args.batch_size,), generator=streams["replay"], device=device)]
            mix = torch.rand(4, args.batch_size, 1, generator=streams["policy"], device=device)
            return update(agent, batch, other, first, mix, args)
        noise = torch.randn(2, len(batch.obs) + len(other.obs), act_dim, generator=streams["policy"], device=device)
        metrics = update(agent, batch, other, noise, done % 2 == 1, args)
        if args.algo == "dwbc" and done % 100 == 0:
            metrics |= update_discriminator(agent, batch, other)
        return metrics

    if not log.rows:
        evaluate_and_save_policy()
    if augmenting and counters["updates"] == 0:
        for fit in (fit_model, fit_vae) if vae else (fit_model,):
            fit()
            if args.checkpoint_every and not stop.received:
                save_checkpoint(run_dir, parts, counters, policy())
    while counters["updates"] < total and not stop.received:
        at = counters["updates"]
        due = at == args.warmup_steps or (args.self_paced and at > args.warmup_steps and (at - args.warmup_steps) % args.rollout_freq == 0)
        if augmenting and due:
            augment()
        if args.plot_augmentation and counters["rounds"] and at in {total * quarter // 4 for quarter in range(4)}:
            imagined = newest.rows[:, :obs_dim] if args.algo != "forward" else newest.rows[:, next_obs]
            picture = run_dir / f"augmentation-{at}.png"
            states = expert.rows[:, :obs_dim]
            outside = plot_augmentation(picture, eval_env.unwrapped, states, candidates, imagined, agent.actor, envs, args)
            log.writer.add_scalar("charts/return_outside", outside, at)
        with autocast():
            log.add(update_policy())
        counters["updates"] += 1
        log.bar.update()
        if counters["updates"] % 100 == 0:
            check_finite(log.sums, counters["updates"])
        if counters["updates"] % args.eval_every == 0 or counters["updates"] == total:
            evaluate_and_save_policy()
        if counters["updates"] == total or (args.checkpoint_every and counters["updates"] % args.checkpoint_every == 0):
            save_checkpoint(run_dir, parts, counters, policy())

    if stop.received:
        save_checkpoint(run_dir, parts, counters, policy())
    log.bar.close()
    log.writer.close()
    if stop.received:
        print(f"{SCRIPT}: stopped at update {counters['updates']}; continue with: python {SCRIPT} --resume {run_dir}", file=sys.stderr)
        raise SystemExit(128 + stop.received)
    score, result = log.rows[-1]["eval_normalized_score"], f"return {log.rows[-1]['eval_return_mean']:.1f}"
    result += f", normalised score {score:.1f}" if math.isfinite(score) else ""
    print(f"{SCRIPT}: done, last evaluation: {result}; the policy is {run_dir / 'policy.pt'}", file=sys.stderr)
    return log.rows[-1]


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    keep_freed_memory()
    args = parse_args(sys.argv[1:])
    check_args(args)
    if args.eval_only:
        result = evaluate_policy(args)
        print(f"normalised score {normalised_score(args.env_id, result['eval_return_mean']):.1f}")
    else:
        train(args)
