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
"""HyPE: Hybrid Policy Emulation, and its model-free relatives (Ren, Swamy, Wu, Bagnell, Choudhury, "Hybrid Inverse
Reinforcement Learning", arXiv 2402.08848).

Imitation as a game: a reward player learns a cost that is low on expert and high on learner transitions; a policy player
minimises it. HyPE's policy player is hybrid: expert transitions stand in its batches beside its own, with rewards from the
current cost. So it only has to compete with the expert, not with the best policy for each adversarial cost.

    python hype.py --env-id Ant-v4
    python hype.py --env-id Ant-v4 --algo mm

--algo: hype; mm, the same game on learner transitions alone; filter, mm with resets to expert states (arXiv 2303.14623);
hype-filter, both; bc-reg, mm with behaviour cloning in the actor's loss; bc, cloning alone; gail, off-policy GAIL (arXiv
1809.02925). --help shows the defaults of the --env-id, --algo and --preset beside it.

Ant-v4 and Hopper-v4 are on average at their experts' returns (5233, 3176) from 65,000 and 15,000 real steps on (seed 1, Ant's single
evaluations 82% to 106%); 300,000 steps took 48 and 43 minutes on one core of a 2-core machine with --compile --bf16. More in docs/hype.md.
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
    exp_name: str = "hype"
    """name of the experiment, part of the run folder's name"""
    algo: Literal["hype", "mm", "filter", "hype-filter", "bc-reg", "bc", "gail"] = "hype"
    """the method, which sets a few of the flags below; any of them beats it"""
    env_id: str = "Ant-v4"
    """gymnasium id, "dm_control/walker-walk-v0" through shimmy, or "module:Env-v0" for your own"""
    seed: int = 1
    """seed of every random stream of the run"""
    preset: Literal["default", "paper"] = "default"
    """settings to start from; any other flag beats them. "paper" is the authors' released setting"""
    total_timesteps: int = 300_000
    """steps taken in training environments: warm-up, training and cost rollouts, all counted (--algo bc: gradient steps)"""
    total_train_steps: int = 0
    """stop after so many steps of warm-up and training, whatever the cost rollouts took; 0 for no such limit (paper: 1,000,000)"""
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
    checkpoint_every: int = 20_000
    """env steps (--algo bc: gradient steps) between checkpoints; 0 for none but the last"""
    resume: str | None = None
    """folder of a run to continue exactly where its checkpoint stands"""
    track: bool = False
    """also log to Weights and Biases (pip install wandb)"""

    # Environment and demonstrations
    demos: str | None = None
    """an .npz file (demos/README.md) or "minari:mujoco/hopper/expert-v0"; default demos/<env-id>.npz"""
    num_demos: int = 10
    """trajectories used, the first ones of the file (paper: 64)"""
    demo_noise: float = 0.0
    """standard deviation of noise that the demonstrated actions are read with, in units of [-1, 1]; where they led to stays (not
    in the paper)"""
    p_tremble: float = 0.0
    """probability that a step executes a random action, in evaluation too (paper: 0.01, Humanoid 0.025)"""
    reset_prob: float = 0.0
    """FILTER: probability that a training episode starts at a demonstrated simulator state (paper: 0.5)"""

    # Policy
    hidden_sizes: tuple[int, ...] = (128, 128)
    """widths of the hidden layers of the critics, and of the actor (paper: 256 256)"""
    actor_hidden: tuple[int, ...] = ()
    """widths of the actor's hidden layers, if others: a small one cannot realise the expert"""
    normalise_obs: bool = True
    """actor and critics see standardised observations, by the expert's and the first learner ones (not in the paper)"""
    critic_layer_norm: bool = True
    """normalise the critics' hidden layers, which calms them (not in the paper)"""
    batch_size: int = 256
    """transitions in a gradient step"""
    actor_lr: float = 3e-4
    """Adam step size of the actor (paper: 7.3e-4)"""
    critic_lr: float = 3e-4
    """Adam step size of the critics (paper: 7.3e-4)"""
    alpha_lr: float = 3e-4
    """Adam step size of log alpha (paper: 7.3e-4)"""
    alpha: float = 0.2
    """initial temperature; stays there without --autotune (paper: 1)"""
    autotune: bool = True
    """learn alpha towards the target entropy"""
    target_entropy: float | None = None
    """in nats, of actions scaled to [-1, 1]; default minus the action dimension"""
    gamma: float = 0.99
    """discount factor (paper: 0.98)"""
    tau: float = 0.005
    """share of the critic that moves into the target critic at a target update (paper: 0.02)"""
    optimistic: bool = False
    """optimistic Adam for actor and critic (paper)"""

    # Hybrid batches
    hybrid_ratio: tuple[float, ...] = (0.0,)
    """share of expert rows in the policy's batch: one number, or r0 r1 t1 r2 t2: from r0 to r1 in t1 gradient steps, then to r2 at
    step t2 (paper: Ant, Walker2d 0.2 0.2 300000 0.1 1000000; Hopper, Humanoid 0.2 0.1 200000 0.01 1000000)"""
    bc_weight: float = 0.0
    """weight of behaviour cloning of expert rows in the actor's loss, by mean squared error (paper: 0; BC-Reg 1 or 0.5)"""
    bc_sample: bool = False
    """clone with sampled actions instead of the mean ones (paper)"""

    # Cost
    cost_loss: Literal["logistic", "moment"] = "moment"
    """moment matching (paper), or a logistic discriminator with reward softplus(-f)"""
    cost_baseline: bool = True
    """with moment: reward softplus(m - f), where m is the mean cost of learner transitions, instead of -f (paper), whose constant is
    arbitrary: where it is negative, an agent learns to end its episodes"""
    cost_data: Literal["recent", "rollout"] = "recent"
    """learner transitions: of training, or of fresh episodes of the current policy in another environment (paper)"""
    cost_window: int = 0
    """with recent: how many of the last training transitions; 0 for all"""
    cost_episodes: int = 4
    """with rollout: episodes a round, every step counted"""
    cost_every: int = 1
    """training steps between rounds of one gradient step (paper: 10,000; Hopper 5,000)"""
    cost_batch_size: int = 128
    """expert transitions, and learner transitions, of a round (paper: 4,096)"""
    cost_lr: float = 1e-4
    """step size (paper: 8e-4)"""
    cost_restart: bool = False
    """a new optimistic Adam with step size cost_lr / k in round k: steps along the gradient's sign (paper)"""
    cost_weight_decay: float = 0.0
    """L2 added to the cost's gradients"""
    cost_normalise: bool = True
    """standardise its inputs, by the expert's and the first learner transitions (paper: raw inputs)"""
    cost_gp_weight: float = 10.0
    """weight of the gradient penalty"""
    cost_gp_target: float = 0.5
    """gradient norm that the penalty asks for, with respect to what the networks see (paper: 0.4)"""
    cost_hidden_sizes: tuple[int, ...] = (128, 128)
    """widths of the hidden layers of the cost (paper: 256 256)"""
    cost_members: int = 1
    """networks of the cost"""
    cost_reduce: Literal["min", "mean", "max"] = "min"
    """how their outputs become one cost; min is optimistic, max pessimistic"""
    cost_clamp: float = 0.0
    """bound of the cost; 0 for none"""

    # Algorithm
    initial_steps: int = 1_000
    """steps of uniformly random actions before the first gradient step (paper: 100)"""
    updates_per_step: int = 1
    """gradient steps of the policy each time (paper: 64)"""
    update_every: int = 1
    """training steps between them (paper: 64)"""
    actor_average: int = 2_000
    """training steps over which the actor's weights are averaged (at first, a quarter of those so far); the average is
    evaluated and saved; 0 for none (paper)"""
    lr_decay: int = 0
    """training steps t0 in the factor 1 / (1 + t / t0) of the step sizes of actor, critics, temperature and cost; 0 for constant"""
    lr_sawtooth: int = 0
    """updates in which the step sizes of actor, critics and temperature fall to 0, restarted at each round of the cost; 0 for
    constant (paper: 10,000; Hopper 5,000)"""

    # Evaluation
    eval_every: int = 5_000
    """env steps between evaluations (--algo bc: gradient steps; paper: 50,000)"""
    eval_episodes: int = 5
    """episodes of an evaluation: deterministic policy, true reward, environments of their own (paper: 10)"""
    eval_only: bool = False
    """evaluate (and record) the policy of --checkpoint, train nothing"""
    checkpoint: str | None = None
    """a policy.pt or checkpoint.pt, or the run folder, for --eval-only"""
    capture_video: bool = False
    """write a video of the first episode of each evaluation to videos/"""


# Flags on the command line beat these. Keys are env ids, methods, or both; "*" applies always.
_TO_A_TENTH = (0.2, 0.2, 300_000, 0.1, 1_000_000)
_TO_A_HUNDREDTH = (0.2, 0.1, 200_000, 0.01, 1_000_000)
_METHODS = {
    "hype": dict(hybrid_ratio=(0.5,)),
    "filter": dict(reset_prob=0.5),
    "hype-filter": dict(hybrid_ratio=(0.5,), reset_prob=0.5),
    "bc-reg": dict(bc_weight=1.0),
}
_GAIL = dict(
    cost_loss="logistic", cost_data="recent", cost_window=0, cost_every=1, cost_restart=False, cost_gp_weight=10.0, cost_gp_target=1.0,
)  # fmt: skip
_PAPER = dict(
    total_timesteps=1_400_000, total_train_steps=1_000_000, num_demos=64, demo_noise=0.0, p_tremble=0.01, hidden_sizes=(256, 256),
    actor_hidden=(), normalise_obs=False, critic_layer_norm=False, batch_size=256, actor_lr=7.3e-4, critic_lr=7.3e-4, alpha_lr=7.3e-4,
    alpha=1.0, autotune=True, target_entropy=None, gamma=0.98, tau=0.02, optimistic=True, bc_sample=True, cost_loss="moment",
    cost_data="rollout", cost_episodes=4, cost_every=10_000, cost_batch_size=4_096, cost_lr=8e-4, cost_restart=True,
    cost_weight_decay=0.0, cost_normalise=False, cost_baseline=False, cost_gp_weight=10.0, cost_gp_target=0.4, cost_members=1,
    cost_hidden_sizes=(256, 256), cost_clamp=0.0, initial_steps=100, updates_per_step=64, update_every=64, actor_average=0, lr_decay=0,
    lr_sawtooth=10_000, eval_every=70_000, eval_episodes=10, checkpoint_every=100_000,
)  # fmt: skip
_SCHEDULES = dict(Ant=_TO_A_TENTH, Walker2d=_TO_A_TENTH, Hopper=_TO_A_HUNDREDTH, Humanoid=_TO_A_HUNDREDTH)
_SCHEDULES |= {"HalfCheetah": _TO_A_TENTH}  # not in the released code
PRESETS: dict[str, dict[str, dict]] = {
    "default": {**_METHODS, "gail": _GAIL, "bc": dict(total_timesteps=20_000, eval_every=5_000, eval_episodes=20)},
    "paper": {"*": _PAPER, **_METHODS}
    | {"bc": dict(total_timesteps=300_000, actor_lr=3e-4, optimistic=False, eval_every=300_000, eval_episodes=50)}
    | {f"Hopper-v{v}": dict(total_timesteps=1_800_000, cost_every=5_000, lr_sawtooth=5_000, eval_every=90_000) for v in (4, 5)}
    | {f"Humanoid-v{v}": dict(p_tremble=0.025) for v in (4, 5)}
    | {
        f"{robot}-v{v} {algo}": dict(hybrid_ratio=ratio)
        for robot, ratio in _SCHEDULES.items() for algo in ("hype", "hype-filter") for v in (4, 5)
    }
    | {f"{robot}-v{v} bc-reg": dict(bc_weight=0.5) for robot in ("Humanoid", "Walker2d", "HalfCheetah") for v in (4, 5)},
}  # fmt: skip
POSITIVE = """
    total_timesteps num_threads hidden_sizes actor_hidden batch_size actor_lr critic_lr alpha_lr alpha updates_per_step update_every
    eval_every eval_episodes num_demos initial_steps cost_episodes cost_every cost_batch_size cost_lr cost_hidden_sizes cost_members
""".split()
FRACTIONS = ("gamma", "tau", "p_tremble", "reset_prob")
RESUME_MAY_CHANGE = {"resume", "demos", "total_timesteps", "total_train_steps", "checkpoint_every", "num_threads", "track"}
STATE_EVERY = 4  # steps of a recorded episode between simulator states
OBS_KEPT = {"Ant": 27, "Humanoid": 45}  # leading columns: qpos[2:] and qvel, without contact forces and inertias
SCRIPT = Path(__file__).name


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
            if number < 0 and name != "target_entropy":
                fail(f"{flag} must not be negative, got {value}")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: no GPU that torch can use; take --device cpu")
    if args.algo == "gail" and args.preset == "paper":
        fail("--preset paper: gail is not one of the paper's methods")
    ratios = args.hybrid_ratio[:1] if len(args.hybrid_ratio) == 1 else args.hybrid_ratio[0:2] + args.hybrid_ratio[3:4]
    if len(args.hybrid_ratio) not in (1, 5) or max(ratios) > 1:
        fail(f"--hybrid-ratio: one share, or r0 r1 t1 r2 t2 with shares r up to 1, got {args.hybrid_ratio}")
    if len(args.hybrid_ratio) == 5 and not 0 < args.hybrid_ratio[2] < args.hybrid_ratio[4]:
        fail(f"--hybrid-ratio: gradient steps t1 and t2 must increase, got {args.hybrid_ratio}")
    if args.reset_prob == 1 and args.cost_data == "recent":
        fail("--reset-prob 1: no episode is left for the cost to learn from; lower it, or take --cost-data rollout")
    if args.algo == "bc" and (args.reset_prob or args.bc_weight or any(ratios)):
        fail("--algo bc clones and does nothing else: --reset-prob, --bc-weight and --hybrid-ratio have no meaning there")
    for flag, steps in ("--total-timesteps", args.total_timesteps), ("--total-train-steps", args.total_train_steps or math.inf):
        if steps <= args.initial_steps and not args.eval_only and args.algo != "bc":
            fail(f"{flag} {steps}: nothing is learned in the first {args.initial_steps} (--initial-steps)")
    if args.cost_data == "rollout" and args.cost_every == 1:
        fail("--cost-data rollout takes whole episodes for a gradient step of the cost: give --cost-every too")
    if args.lr_sawtooth and args.cost_every == 1:
        fail("--lr-sawtooth starts again with each round of the cost: give --cost-every too")
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


def load_demos(source: str, env_id: str, env: gym.Env, num_demos: int, needs_actions: bool = True) -> tuple[torch.Tensor, float]:
    """Expert transitions [n, width] in the replay buffer's layout (actions in [-1, 1], rewards 0), and their mean return.

    Where actions are not needed, a file may have none: they become NaN.
    """
    data = load_minari(source[7:]) if source.startswith("minari:") else load_npz(source)
    where, obs_dim, act_dim = f"--demos {source}:", env.observation_space.shape[0], env.action_space.shape[0]
    has_actions = needs_actions or "actions" in data
    if not has_actions:
        data["actions"] = np.zeros((len(data.get("observations", ())), act_dim), np.float32)
    try:
        recorded = json.loads(str(data.get("metadata", "{}"))).get("env_id")
    except (ValueError, AttributeError):
        fail(f"{where} metadata is not a JSON object")
    for name in ("observations", "next_observations"):
        if name in data and data[name].shape[1:] == env.unwrapped.observation_space.shape:
            data[name] = data[name][:, :obs_dim]  # cut as make_env cuts
    for name in ("observations", "actions", "rewards", "next_observations", "terminations", "truncations"):
        if name not in data:
            fail(f"{where} no array {name!r}; it has {', '.join(sorted(data))}")
        n, dims = len(data["observations"]), dict(observations=obs_dim, next_observations=obs_dim, actions=act_dim).get(name)
        shape, wanted = data[name].shape, (n, dims) if dims else (n,)
        if shape != wanted and len(shape) == 2 and dims and shape[0] == n:
            hint = f"recorded on {recorded}?" if recorded else "recorded in another environment, or another version of it?"
            fail(f"{where} {env_id} has {dims}-dim {name}, the file has {shape[1]}: {hint}")
        if shape != wanted:
            fail(f"{where} {name} must have shape {wanted}, has {shape}")
        if not np.isfinite(data[name]).all():
            fail(f"{where} {name} has a value that is not finite in row {int(np.argwhere(~np.isfinite(data[name]))[0, 0])}")
    if recorded and recorded != env_id:
        if re.split(r"-v\d", recorded)[0].split(":")[-1] != re.split(r"-v\d", env_id)[0].split(":")[-1]:
            fail(f"{where} recorded on {recorded}, not on {env_id}")
        tqdm.write(f"{SCRIPT}: note: {where} recorded on {recorded}, another version of {env_id}", file=sys.stderr)
    low, high = rescaling(env).env.action_space.low, rescaling(env).env.action_space.high
    if (data["actions"] < low - 1e-4).any() or (data["actions"] > high + 1e-4).any():
        found = f"[{data['actions'].min():.3g}, {data['actions'].max():.3g}]"
        fail(f"{where} actions must lie in the environment's bounds [{low.min():.3g}, {high.max():.3g}], they span {found}")
    ends = np.flatnonzero((data["terminations"] > 0) | (data["truncations"] > 0)) + 1
    if not len(ends) or ends[-1] != len(data["rewards"]):
        fail(f"{where} the last row must end an episode (terminations or truncations 1)")
    if len(ends) < num_demos:
        fail(f"{where} has {len(ends)} trajectories, --num-demos asks for {num_demos}; give --num-demos {len(ends)}")
    n = ends[num_demos - 1]
    actions = 2 * (data["actions"][:n] - low) / (high - low) - 1
    columns = [
        data["observations"][:n],
        actions.clip(-1 + 1e-6, 1 - 1e-6) if has_actions else np.full((n, act_dim), np.nan),
        data["next_observations"][:n],
        np.zeros((n, 1)),
        data["terminations"][:n, None],
    ]
    return torch.from_numpy(np.concatenate(columns, 1, dtype=np.float32)), float(data["rewards"][:n].sum() / num_demos)


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


class ExpertResets(gym.Wrapper):
    """With probability reset_prob an episode starts at a demonstrated simulator state, with the steps that were left there.

    `states` [n, k] are MuJoCo's whole integration states, so an episode goes on to the last bit as the demonstration did;
    obs [n, obs] and elapsed [n] are what was seen there and after how many steps. The coin and the start follow from the
    reset's seed.
    """

    def __init__(self, env: gym.Env, states: np.ndarray, obs: np.ndarray, elapsed: np.ndarray, reset_prob: float):
        super().__init__(env)
        self.states, self.obs, self.elapsed, self.reset_prob, self.from_expert = states, obs, elapsed, reset_prob, False
        self.limit = env
        while not isinstance(self.limit, gym.wrappers.TimeLimit):
            if self.limit is env.unwrapped:
                fail(f"--reset-prob: {env.spec.id} has no time limit, so no steps are left at a demonstrated state")
            self.limit = self.limit.env

    def reset(self, seed: int, options=None):
        obs, info = self.env.reset(seed=seed)
        rng = np.random.default_rng([seed, 1])
        self.from_expert = rng.random() < self.reset_prob
        return self.restore(rng.integers(len(self.states))) if self.from_expert else obs, info

    def restore(self, start: int) -> np.ndarray:
        """Puts the simulator to a demonstrated state; returns the observation [obs]."""
        import mujoco

        model, data, spec = self.unwrapped.model, self.unwrapped.data, mujoco.mjtState.mjSTATE_INTEGRATION
        mujoco.mj_setState(model, data, self.states[start], spec)
        mujoco.mj_forward(model, data)  # derived quantities; it moves the solver's warm start, so the state is set again
        mujoco.mj_setState(model, data, self.states[start], spec)
        self.limit._elapsed_steps = self.elapsed[start]
        return self.obs[start]


def reset_to_experts(env: gym.Env, path: str, expert: "Batch", args: Args) -> ExpertResets:
    """The environment with resets to the states that a demonstration file holds, whose transitions are `expert` [n, ...]."""
    import mujoco

    data = load_npz(path) if not path.startswith("minari:") else {}
    if "states" not in data:
        fail(f"--reset-prob: {path} has no array 'states', the simulator's (demos/README.md); of a MuJoCo robot's policy, record some: "
             "python sac.py --eval-only --checkpoint POLICY --record-demos recorded.npz (demos/experts has policies)")  # fmt: skip
    ends = np.flatnonzero((data["terminations"] > 0) | (data["truncations"] > 0)) + 1
    begins = np.array([0, *ends[:-1]])
    elapsed = [np.arange(0, end - begin, STATE_EVERY) for begin, end in zip(begins, ends, strict=True)]
    model, states = getattr(env.unwrapped, "model", None), data["states"]
    width = mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION) if isinstance(model, mujoco.MjModel) else 0
    if states.shape != (sum(map(len, elapsed)), width):
        fail(f"--reset-prob: {path} must hold a state of {width} numbers for each {STATE_EVERY}th step, "
             f"{(sum(map(len, elapsed)), width)} in all; it holds {states.shape}")  # fmt: skip
    rows = np.concatenate([begin + steps for begin, steps in zip(begins, elapsed, strict=True)][: args.num_demos])
    obs, elapsed = expert.obs[rows].cpu().numpy(), np.concatenate(elapsed[: args.num_demos])
    env = ExpertResets(env, states[: len(rows)], obs, elapsed, args.reset_prob)
    env.reset(seed=0)
    for start in (0, len(rows) // 2, len(rows) - 1):
        env.restore(start)
        next_obs, *_ = env.step(expert.action[rows[start]].cpu().numpy())
        apart = np.abs(next_obs - expert.next_obs[rows[start]].cpu().numpy()).max()
        if not apart < 1e-3:
            fail(f"--reset-prob: the states in {path} do not put {args.env_id} back: a demonstrated action leads elsewhere, by {apart:.2g}")
    return env


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


class Cost(nn.Module):
    """Ensemble of cost functions of (obs, action), reduced to one: low on expert, high on learner transitions."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.net = StackedMLP(args.cost_members, [obs_dim + act_dim, *args.cost_hidden_sizes, 1])
        self.reduce, self.clamp, self.logistic = args.cost_reduce, args.cost_clamp, args.cost_loss == "logistic"
        self.bf16 = args.bf16  # of the reward alone: the gradient penalty stays float32
        self.normalise = Normaliser(obs_dim + act_dim)
        self.subtract_mean = args.cost_baseline and not self.logistic
        self.register_buffer("baseline", torch.zeros(()))
        for layer in (*self.net.hidden, self.net.output):
            for weight in layer.weight.detach():
                nn.init.orthogonal_(weight)
            nn.init.uniform_(layer.bias, -(layer.weight.shape[1] ** -0.5), layer.weight.shape[1] ** -0.5)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Cost [batch] of normalised inputs [batch, obs + act]."""
        cost = self.net(inputs.expand(len(self.net.output.weight), -1, -1)).squeeze(-1)
        if self.clamp:
            cost = cost.clamp(-self.clamp, self.clamp)
        return {"min": cost.amin, "mean": cost.mean, "max": cost.amax}[self.reduce](0)

    @torch.no_grad()
    def reward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """What the policy maximises, [...], at obs [..., obs] and action [..., act]."""
        inputs = self.normalise(torch.cat([obs, action], -1))
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.bf16):
            cost = self(inputs.flatten(0, -2)).view(inputs.shape[:-1])
        return F.softplus(self.baseline - cost).clamp(max=10) if self.logistic or self.subtract_mean else -cost


# ---------------------------------------------------------------------------------------------- gradient steps
def sac_update(
    agent: Agent, batch: Batch, actor_obs: torch.Tensor, noise: torch.Tensor, args: Args, expert: Batch, expert_noise: torch.Tensor
) -> dict[str, torch.Tensor]:
    """One gradient step of critics, actor and temperature (arXiv 1812.05905, eqs. 6, 9, 18).

    `batch` has [batch, ...] fields, `actor_obs` [batch, obs] are the states of the actor's and temperature's loss,
    `noise` [2, batch, act] is standard normal; with bc_weight the actor also clones the transitions `expert` [n, ...],
    by its action for `expert_noise` [n, act] (zero: the mean). Returns scalars to log.
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
        if args.bc_weight:
            cloned, _ = agent.actor(expert.obs, expert_noise)
            actor_loss = actor_loss + args.bc_weight * F.mse_loss(cloned, expert.action)
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


def cost_update(cost: Cost, optimizer: Adam, expert: torch.Tensor, learner: torch.Tensor, mix: torch.Tensor, args: Args) -> dict:
    """One gradient step of the cost f on expert and learner inputs [batch, obs + act], with mix [batch, 1] in [0, 1].

    moment: mean f(expert) - mean f(learner); logistic: f is the logit of "learner". Both with the penalty
    (|grad f| - target)^2 on points between the two.
    """
    expert, learner = cost.normalise(expert), cost.normalise(learner)
    on_expert, on_learner = cost(expert), cost(learner)
    if args.cost_loss == "moment":
        loss = on_expert.mean() - on_learner.mean()
    else:
        loss = F.softplus(on_expert).mean() + F.softplus(-on_learner).mean()
    between = mix * expert + (1 - mix) * learner
    slope = torch.func.grad(lambda x: cost(x).sum())(between)
    penalty = ((slope.square().sum(-1) + 1e-12).sqrt() - args.cost_gp_target).square().mean()
    optimizer.step(torch.autograd.grad(loss + args.cost_gp_weight * penalty, optimizer.params))
    if cost.subtract_mean:
        cost.baseline.lerp_(on_learner.detach().mean(), (1 / optimizer.steps).clamp(min=0.01))  # at first a plain mean
    return {"losses/cost": loss.detach(), "losses/cost_gradient_penalty": penalty.detach()}


def hybrid_share(schedule: tuple[float, ...], updates: int) -> float:
    """Share of expert rows in the batch after so many gradient steps: constant, or r0 to r1 in t1 steps, then to r2 at t2."""
    if len(schedule) == 1:
        return schedule[0]
    r0, r1, t1, r2, t2 = schedule
    if updates <= t1:
        return r0 + (r1 - r0) * updates / t1
    return r1 + (r2 - r1) * min(1.0, (updates - t1) / (t2 - t1))


def clone_update(agent: Agent, expert: Batch, noise: torch.Tensor, args: Args) -> dict[str, torch.Tensor]:
    """One gradient step of behaviour cloning on transitions `expert` [batch, ...]; noise [batch, act] is zero for the mean action."""
    with torch.autocast(expert.obs.device.type, torch.bfloat16, enabled=args.bf16):
        loss = F.mse_loss(agent.actor(expert.obs, noise)[0], expert.action)
    agent.actor_optimizer.step(torch.autograd.grad(loss, agent.actor_optimizer.params))
    return {"losses/actor": loss.detach()}


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


# ---------------------------------------------------------------------------------------------- training
def train(args: Args) -> dict:
    """HyPE and its relatives (arXiv 2402.08848). Returns the last row of progress.csv."""
    device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu"))
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    streams = {}
    names = ("replay", "policy", "cost", "demos")
    for name, seed in zip(names, np.random.SeedSequence(args.seed).generate_state(len(names)), strict=True):
        streams[name] = torch.Generator(device).manual_seed(int(seed))

    eval_env = make_env(args.env_id, "rgb_array" if args.capture_video else None)  # first, because it chooses the renderer
    env = make_env(args.env_id)
    cost_env = ResumableEnv(make_env(args.env_id), [args.seed, 2], args.p_tremble)
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    demos = args.demos or str(Path(__file__).parent / "demos" / f"{re.sub('[/:]', '-', args.env_id)}.npz")
    expert_rows, expert_return = load_demos(demos, args.env_id, env, args.num_demos)
    expert = ReplayBuffer(len(expert_rows), obs_dim, act_dim, device)  # D_E
    expert.extend(expert_rows)
    if args.reset_prob:
        env = resets = reset_to_experts(env, demos, expert.split(expert.rows), args)
    env = ResumableEnv(env, [args.seed, 0], args.p_tremble)

    agent = Agent(obs_dim, act_dim, args).to(device)
    average_actor = copy.deepcopy(agent.actor).requires_grad_(False) if args.actor_average else agent.actor
    cost = Cost(obs_dim, act_dim, args).to(device)
    cost_optimizer = Adam(cost.parameters(), args.cost_lr, args.cost_weight_decay, optimistic=args.cost_restart).to(device)
    if args.demo_noise:
        noise = args.demo_noise * torch.randn(len(expert_rows), act_dim, generator=streams["demos"], device=device)
        expert.split(expert.rows).action.add_(noise).clamp_(-1 + 1e-6, 1 - 1e-6)
    limit = min(args.total_train_steps or args.total_timesteps, args.total_timesteps)
    real = ReplayBuffer(limit, obs_dim, act_dim, device)  # D_pi
    # What the cost may see: no rows of episodes that started at expert states, which are not what the policy does by itself.
    own = ReplayBuffer(limit, obs_dim, act_dim, device) if args.reset_prob else real
    parts = dict(
        agent=agent, average_actor=average_actor, cost=cost, cost_optimizer=cost_optimizer, real=real, env=env, cost_env=cost_env,
    )  # fmt: skip
    parts |= {"own": own} if args.reset_prob else {}
    parts |= {f"{name}_stream": stream for name, stream in streams.items()}
    update, update_cost, update_clone = (compiled(function, args) for function in (sac_update, cost_update, clone_update))

    demos_hash = zlib.crc32(expert_rows.numpy().tobytes() + str(expert_return).encode())
    fresh = dict(env_steps=0, train_steps=0, cost_rollout_steps=0, updates=0, cost_rounds=0, updates_since_round=0, demos_hash=demos_hash)
    checkpoint = read_checkpoint(Path(args.resume)) if args.resume else dict(counters=fresh)
    if checkpoint["counters"]["demos_hash"] != demos_hash:
        fail(f"--resume {args.resume}: the demonstrations in {demos} are not those of the run")
    run_dir = make_run_dir(args)
    counters = checkpoint["counters"]
    cloning = args.algo == "bc"  # its bar counts gradient steps
    log = parts["log"] = Log(run_dir, args, counters["updates" if cloning else "env_steps"])
    if args.resume:
        restore(checkpoint, parts)
        for buffer in {real, own}:
            buffer.resize(limit)  # the run may have become longer
    else:
        env.reset()
    stop, obs = StopSignal(), env.obs
    tqdm.write(f"{SCRIPT}: {args.algo} on {args.env_id}, run folder {run_dir}", file=sys.stderr)

    def evaluate_and_save_policy() -> None:
        env_steps = counters["env_steps"]
        at = counters["updates"] if cloning else env_steps
        check_finite({**log.sums, **dict(average_actor.named_parameters())}, at)
        if len(real):
            on_expert, on_policy = expert.split(expert.rows), real.split(real.newest(1_000))
            on_expert, on_policy = (cost.reward(b.obs, b.action).mean() for b in (on_expert, on_policy))
            log.add({"reward/expert": on_expert, "reward/policy": on_policy, "reward/gap": on_expert - on_policy})
        log.add({"charts/train_steps": counters["train_steps"], "charts/cost_rollout_steps": counters["cost_rollout_steps"]})
        video = run_dir / "videos" / f"step-{at}" if args.capture_video else None
        evaluation = evaluate(average_actor, eval_env, args.eval_episodes, [args.seed, 1, at], args.p_tremble, video)
        log.row(env_steps, counters["updates"], evaluation, expert_return)
        policy = policy_content(average_actor, env, args, env_steps)
        write_atomically(run_dir / "policy.pt", lambda file: torch.save(policy, file))

    def fit_normalisers() -> None:
        sources = [buffer.newest(len(buffer)) for buffer in (expert, real) if len(buffer)]
        if args.cost_normalise:
            cost.normalise.fit(*(rows[:, : obs_dim + act_dim] for rows in sources))
        if args.normalise_obs:
            for network in (agent.actor, average_actor, agent.critic, agent.target_critic):
                network.normalise.fit(*(rows[:, :obs_dim] for rows in sources))

    def update_policy(lr_share: float) -> None:
        n = round(hybrid_share(args.hybrid_ratio, counters["updates"]) * args.batch_size)
        shares = {real: args.batch_size - n, expert: n}
        rows = [b.sample((args.updates_per_step, n), streams["replay"]) for b, n in shares.items() if n]
        batches = real.split(torch.cat(rows, 1))
        # Relabelling: the current cost's reward, whatever was stored.
        batches = batches._replace(reward=cost.reward(batches.obs, batches.action))
        clone = expert.split(expert.sample((args.updates_per_step, args.batch_size if args.bc_weight else 0), streams["replay"]))
        noise = torch.randn(args.updates_per_step, 2, args.batch_size, act_dim, generator=streams["policy"], device=device)
        expert_noise = torch.randn(clone.action.shape, generator=streams["policy"], device=device) * args.bc_sample
        for u in range(args.updates_per_step):
            share = lr_share
            if args.lr_sawtooth:
                share *= max(0.0, 1 - counters["updates_since_round"] / args.lr_sawtooth)
            agent.actor_optimizer.lr.fill_(args.actor_lr * share)
            agent.critic_optimizer.lr.fill_(args.critic_lr * share)
            agent.alpha_optimizer.lr.fill_(args.alpha_lr * share)
            batch, cloned = (Batch(*(field[u] for field in fields)) for fields in (batches, clone))
            metrics = update(agent, batch, batch.obs, noise[u], args, cloned, expert_noise[u])
            counters["updates"] += 1
            counters["updates_since_round"] += 1
            target_update(agent, args.tau)
        log.add(metrics)

    def update_cost_round(lr_share: float) -> None:
        if args.cost_data == "rollout":
            rows, learner_obs = [], None
            for _ in range(args.cost_episodes):
                learner_obs, done = cost_env.reset(), False
                while not done:
                    action = agent.actor.act(learner_obs, streams["policy"])
                    rows.append(np.concatenate([learner_obs, action]))
                    learner_obs, _, terminated, truncated, _ = cost_env.step(action)
                    counters["env_steps"] += 1
                    counters["cost_rollout_steps"] += 1
                    done = terminated or truncated
            rows = torch.as_tensor(np.array(rows), dtype=torch.float32, device=device)
            learner = rows[torch.randint(len(rows), (args.cost_batch_size,), generator=streams["cost"], device=device)]
        else:
            if not len(own):
                return
            learner = own.sample((args.cost_batch_size,), streams["cost"], args.cost_window)[:, : obs_dim + act_dim]
        lr = args.cost_lr * lr_share
        if args.cost_restart:  # step sizes lr, lr, lr / 2, lr / 3, ...
            cost_optimizer.restart()
            lr /= max(1, counters["cost_rounds"])
        cost_optimizer.lr.fill_(lr)
        on_expert = expert.sample((args.cost_batch_size,), streams["cost"])[:, : obs_dim + act_dim]
        mix = torch.rand(args.cost_batch_size, 1, generator=streams["cost"], device=device)
        log.add(update_cost(cost, cost_optimizer, on_expert, learner, mix, args))
        counters["cost_rounds"] += 1
        counters["updates_since_round"] = 0

    def crossed(every: int) -> bool:
        """Whether this iteration's steps (a cost round takes many) passed a multiple of `every`."""
        return bool(every) and counters["env_steps"] // every > before // every

    def finished() -> bool:
        if cloning:
            return counters["updates"] >= args.total_timesteps
        enough = args.total_train_steps and counters["train_steps"] >= args.total_train_steps
        return bool(enough) or counters["env_steps"] >= args.total_timesteps

    def average(steps: int) -> None:
        if args.actor_average:
            weight = 1 / min(args.actor_average, 1 + steps / 4)
            torch._foreach_lerp_(list(average_actor.parameters()), [p.detach() for p in agent.actor.parameters()], weight)

    def clone() -> None:
        """--algo bc: no environment but the evaluation's."""
        batch = expert.split(expert.sample((args.batch_size,), streams["replay"]))
        noise = torch.randn(batch.action.shape, generator=streams["policy"], device=device) * args.bc_sample  # zero: the mean
        log.add(update_clone(agent, batch, noise, args))
        counters["updates"] += 1
        average(counters["updates"])
        log.bar.update()
        if counters["updates"] % args.eval_every == 0 or finished():
            evaluate_and_save_policy()
        if finished() or (args.checkpoint_every and counters["updates"] % args.checkpoint_every == 0):
            save_checkpoint(run_dir, parts, counters, policy_content(average_actor, env, args, 0))

    if not log.rows:
        if cloning:
            fit_normalisers()
        evaluate_and_save_policy()
    while cloning and not finished() and not stop.received:
        clone()
    while not finished() and not stop.received:
        before = counters["env_steps"]
        training = counters["train_steps"] >= args.initial_steps
        if training:
            action = agent.actor.act(obs, streams["policy"])
        else:
            action = (2 * torch.rand(act_dim, generator=streams["policy"], device=device) - 1).cpu().numpy()
        check_finite({"action": action}, before)
        next_obs, _, terminated, truncated, _ = env.step(action)
        real.add(obs, action, 0.0, next_obs, terminated)
        if args.reset_prob and not resets.from_expert:
            own.add(obs, action, 0.0, next_obs, terminated)
        obs = next_obs
        counters["env_steps"] += 1
        counters["train_steps"] += 1
        steps = counters["train_steps"] - args.initial_steps
        if terminated or truncated:
            log.writer.add_scalar("charts/episodic_return", env.episode_return, counters["env_steps"])
            log.writer.add_scalar("charts/episodic_length", len(env.executed), counters["env_steps"])
            obs = env.reset()

        if steps >= 0:
            if steps == 0:
                fit_normalisers()
            lr_share = 1 / (1 + steps / args.lr_decay) if args.lr_decay else 1.0
            if steps % args.update_every == 0:
                update_policy(lr_share)
            if counters["train_steps"] % args.cost_every == 0:
                update_cost_round(lr_share)
            average(steps)

        env_steps = counters["env_steps"]
        log.bar.update(env_steps - before)
        if crossed(args.eval_every) or finished():
            evaluate_and_save_policy()
        if env_steps % 100 == 0:
            check_finite(log.sums, env_steps)
        if crossed(args.checkpoint_every) or finished():
            save_checkpoint(run_dir, parts, counters, policy_content(average_actor, env, args, env_steps))

    env_steps = counters["env_steps"]
    if stop.received:
        save_checkpoint(run_dir, parts, counters, policy_content(average_actor, env, args, env_steps))
    log.bar.close()
    log.writer.close()
    if stop.received:
        at = f"update {counters['updates']}" if cloning else f"env step {env_steps}"
        print(f"{SCRIPT}: stopped at {at}; continue with: python {SCRIPT} --resume {run_dir}", file=sys.stderr)
        raise SystemExit(128 + stop.received)
    print(f"{SCRIPT}: done, the policy is {run_dir / 'policy.pt'}", file=sys.stderr)
    return log.rows[-1]


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    keep_freed_memory()
    args = parse_args(sys.argv[1:])
    check_args(args)
    if args.eval_only:
        evaluate_policy(args)
    else:
        train(args)
