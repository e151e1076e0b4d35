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
"""MBARL: Model-Based Autonomous Reinforcement Learning (Charles, Sharma, Dong, Finn, Stanford; a poster) on top of MEDAL (Sharma,
Ahmad, Finn, "A State-Distribution Matching Approach to Non-Episodic Reinforcement Learning", arXiv 2205.05212) and MBPO
(Janner, Fu, Zhang, Levine, arXiv 1906.08253).

An agent lives in one long trajectory without resets. A forward policy pursues goals; a backward policy returns to the states of
demonstrations, rewarded by a classifier that tells these from its own states. One dynamics ensemble of the goal-free physical
state learns from both and imagines data for both. --algo has the arms to compare with: medal (no imagined data), fbrl (the
backward policy returns to the start), naive (no backward policy), oracle (the world is reset).

    python mbarl.py --env-id Tabletop-v0
    python mbarl.py --env-id PointMass2D-v0 --algo medal
    python mbarl.py --env-id PointMass2D-v0 --offline

What to expect, after how many steps, in how many minutes: docs/mbarl.md. --help shows the defaults of the --env-id and
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
    exp_name: str = "mbarl"
    """name of the experiment, part of the run folder's name"""
    env_id: str = "Tabletop-v0"
    """Tabletop-v0, PointMass2D-v0, PointMass2DCoarse-v0, PersistentPointMaze-v0, or "module:Env-v0" for a GoalEnv of your own"""
    algo: Literal["mbarl", "medal", "fbrl", "naive", "oracle"] = "mbarl"
    """forward and backward policy with imagined data; without; backward to the start; forward only; forward only, with resets"""
    seed: int = 1
    """seed of every random stream of the run"""
    preset: Literal["default", "paper"] = "default"
    """settings to start from; any other flag beats them. "paper" has the sizes of MEDAL's and MBPO's codes: untested, needs a GPU"""
    total_timesteps: int = 100_000
    """steps taken in the training environment, seed steps included (EARL: 2,500,000)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto takes a GPU if there is one; the offline study stays on the CPU"""
    num_threads: int = 1
    """threads of torch on the CPU; several seeds side by side use a machine better than several threads"""
    compile: bool = False
    """torch.compile of the update functions: about a minute of warm-up, then faster"""
    bf16: bool = False
    """hidden layers in bfloat16 (autocast), the rest in float32; slow on a CPU whose lscpu does not list avx512_bf16 or amx_bf16"""
    run_dir: str | None = None
    """folder of the run; default runs/<env-id>__<exp-name>-<algo>__<seed>__<time>"""
    checkpoint_every: int = 10_000
    """env steps between checkpoints; 0 for none but the last"""
    resume: str | None = None
    """folder of a run to continue exactly where its checkpoint stands"""
    track: bool = False
    """also log to Weights and Biases (pip install wandb)"""

    # Autonomy and demonstrations
    num_demos: int = 12
    """scripted forward demonstrations, the goals in turn (point mass: 10)"""
    backward_demos: int = 12
    """scripted backward demonstrations (point mass: 10)"""
    switch_steps: int = 200
    """longest phase of a policy; oracle: longest episode (MEDAL's configs: 300; point mass: 100)"""
    switch_terminal: bool = False
    """a switch ends the value, not only success (MEDAL)"""
    train_horizon: int = 200_000
    """env steps between hard resets, each an intervention (EARL's tabletop: 200,000)"""
    seed_steps: int = 1_000
    """steps of the untrained policies before the first gradient step (MEDAL: 10,000; point mass: 100)"""
    update_both: bool = False
    """update both policies at each step instead of the acting one: twice the updates"""

    # Policies
    hidden_sizes: tuple[int, ...] = (256, 256)
    """widths of the hidden layers of actors and critics (point mass: 64 64)"""
    critic_layer_norm: bool = True
    """normalise the critics' hidden layers (MEDAL: only the layer below them, in actor and critic)"""
    batch_size: int = 256
    """transitions in a gradient step"""
    actor_lr: float = 3e-4
    """Adam step size of the actor (point mass: 1e-3, as of the next two)"""
    critic_lr: float = 3e-4
    """Adam step size of the critics"""
    alpha_lr: float = 3e-4
    """Adam step size of log alpha"""
    alpha: float = 0.01
    """initial temperature; stays there without --autotune (point mass: 0.1; MEDAL: 1)"""
    autotune: bool = True
    """learn alpha towards the target entropy"""
    target_entropy: float | None = None
    """in nats; default minus half the action dimension (MEDAL)"""
    gamma: float = 0.99
    """discount factor (point mass: 0.95)"""
    tau: float = 0.005
    """share of the critic that moves into the target critic at each update (point mass: 0.02)"""
    optimistic: bool = False
    """optimistic Adam for actor and critic"""
    reward_scale: float = 10.0
    """factor of every reward that a policy learns from (point mass: 1)"""
    updates_per_step: int = 2
    """gradient steps of the acting policy after each env step, the same for every --algo (MEDAL: 1; point mass: 10)"""

    # Classifier, the backward policy's reward
    classifier_hidden: int = 128
    """width of its hidden layer"""
    classifier_lr: float = 3e-4
    """Adam step size"""
    classifier_every: int = 10
    """env steps between its gradient steps"""
    classifier_batch: int = 128
    """demonstrated states, and as many visited ones, of a step (MEDAL: 400)"""
    classifier_goal: bool = True
    """it sees the goal, not only the physical state (point mass: not)"""
    mixup: bool = True
    """train it on random mixtures of rows and labels"""

    # Dynamics model
    model_members: int = 7
    """networks in the ensemble"""
    model_elites: int = 5
    """members with the lowest hold-out error, which imagine"""
    model_hidden_sizes: tuple[int, ...] = (200, 200, 200, 200)
    """widths of a member's hidden layers (point mass: 64 64)"""
    model_lr: float = 1e-3
    """Adam step size of the model"""
    model_weight_decay: float = 5e-5
    """L2 added to the model's gradients"""
    model_batch_size: int = 256
    """transitions of each member's minibatch"""
    model_every: int = 500
    """env steps between fits of the model, each followed by imagined rollouts (MBPO: 250)"""
    model_rows: int = 25_000
    """transitions of a fit, drawn from all without replacement; a fifth is held out; 0 for all"""
    model_patience: int = 5
    """a fit ends after this many epochs in which no member improved its hold-out error by 1%"""
    model_first_batches: int = 1_000
    """most minibatches of the first fit; 0 for no limit (MBPO)"""
    model_max_batches: int = 150
    """most minibatches of a later fit; 0 for no limit (MBPO)"""
    model_mean_clamp: float = 0.0
    """bound of the predicted mean change; 0 for none"""
    model_scale_targets: bool = True
    """the networks predict changes in units of their standard deviation (MBPO: not)"""
    model_beta: float = 1.0
    """power of the predicted variance that weighs the likelihood's terms; 0: plain likelihood (MBPO), 1: means by squared error"""
    model_cosine: int = 0
    """period in minibatches / 2 of the model's cosine step size; 0 for constant"""
    reward: Literal["analytic", "learned"] = "analytic"
    """of imagined forward transitions: the task's r(s', g), or a head of the model, which cannot know the goal (poster; point mass)"""
    snap: bool = True
    """move an imagined state to the nearest possible one: Tabletop's flag to -1 or 0, positions into the table"""
    true_dynamics: bool = False
    """imagine with the environment's own transition: what a perfect model would give"""

    # Imagined rollouts
    start: Literal["mixed", "replay", "demo", "narrow"] = "mixed"
    """where they start: half demonstrated states and half replay, replay (poster), demonstrated states, or initial states"""
    rollout_length: int = 20
    """their steps; 0 for no model at all"""
    rollout_growth: int = 0
    """env steps in which their length grows from 1; 0 for the full length from the start"""
    rollouts: int = 1_000
    """trajectories for each policy after each fit (MBPO: 100,000; point mass: 200)"""
    rollout_retain: int = 4
    """fits whose imagined transitions are kept"""
    rollout_noise: bool = True
    """draw imagined states from a member's Gaussian; otherwise take its mean"""
    real_share: float = 0.5
    """share of real transitions in a batch, once there are imagined ones (MBPO: 0.05)"""
    mix_into_replay: bool = False
    """imagined transitions go into the real replay and batches are drawn from it (the poster's algorithm box)"""

    # Exploration policy
    explore: bool = False
    """mbarl: a policy that maximises the entropy of its states near the demonstrations collects the data, instead of the two"""
    explore_neighbour: int = 5
    """its reward is the log distance to this nearest neighbour among its recent states"""
    explore_window: int = 1_000
    """how many states are recent"""
    explore_kl: float = 1.0
    """divergence from the demonstrated states that it may have, in nats"""
    explore_lr: float = 0.01
    """step size of the weight of that constraint"""

    # Offline study
    offline: bool = False
    """the poster's study: policies from imagined data alone, for each size, length and start; one row each in offline.csv"""
    offline_sizes: tuple[int, ...] = (1_000, 20_000, 50_000)
    """uniformly drawn transitions that the model learns from"""
    offline_lengths: tuple[int, ...] = (20, 35, 50)
    """steps of the imagined rollouts"""
    offline_starts: tuple[Literal["narrow", "demo"], ...] = ("narrow", "demo")
    """where the imagined rollouts start"""
    offline_fit: int = 1_500
    """minibatches of the model's fit, whatever the size"""
    offline_updates: int = 5_000
    """gradient steps of each policy"""
    offline_every: int = 250
    """gradient steps between rounds of fresh rollouts"""
    offline_transitions: int = 10_000
    """imagined transitions of a round"""
    equal_rollouts: bool = False
    """as many rollouts for every length (as many as for the shortest) instead of as many transitions"""

    # Evaluation
    eval_every: int = 5_000
    """env steps between evaluations"""
    eval_episodes: int = 20
    """deterministic episodes from the initial state, the goals in turn (EARL: 10, random goals)"""
    eval_horizon: int = 200
    """steps of such an episode (point mass: 100)"""
    eval_only: bool = False
    """evaluate the policy of --checkpoint in the gymnasium environment, train nothing"""
    checkpoint: str | None = None
    """a policy.pt or checkpoint.pt, or the run folder, for --eval-only"""
    capture_video: bool = False
    """write a video of the first episode of each evaluation to videos/"""


# Flags on the command line beat these. Keys are env ids; "*" applies to every environment.
_POINT = dict(
    num_demos=10, backward_demos=10, switch_steps=100, eval_horizon=100, reward="learned", classifier_goal=False, reward_scale=1.0,
    total_timesteps=5_000, seed_steps=100, eval_every=100, gamma=0.95, tau=0.02, alpha=0.1, actor_lr=1e-3, critic_lr=1e-3, alpha_lr=1e-3,
    hidden_sizes=(64, 64), batch_size=128, model_hidden_sizes=(64, 64), model_batch_size=128, model_every=50, model_first_batches=300,
    model_max_batches=50, model_scale_targets=False, model_beta=0.0, rollouts=200, real_share=0.1, updates_per_step=10,
)  # fmt: skip
_PAPER = dict(
    total_timesteps=2_500_000, seed_steps=10_000, switch_steps=300, switch_terminal=True, classifier_batch=400, updates_per_step=20,
    model_every=250, model_rows=0, model_first_batches=0, model_max_batches=0, model_scale_targets=False, model_beta=0.0,
    rollouts=100_000, rollout_length=25, rollout_growth=100_000, real_share=0.05, alpha=1.0,
    eval_every=10_000, eval_episodes=10, checkpoint_every=100_000,
)  # fmt: skip
_MAZE = dict(num_demos=10, backward_demos=10, switch_steps=300, eval_horizon=300)
PRESETS: dict[str, dict[str, dict]] = {
    "default": {"PointMass2D-v0": _POINT, "PointMass2DCoarse-v0": _POINT, "PersistentPointMaze-v0": _MAZE},
    "paper": {"*": _PAPER, "PersistentPointMaze-v0": _MAZE}
    | {
        env_id: {key: _POINT[key] for key in ("num_demos", "backward_demos", "eval_horizon", "reward", "classifier_goal", "reward_scale")}
        for env_id in ("PointMass2D-v0", "PointMass2DCoarse-v0")
    },
}
POSITIVE = """
    total_timesteps num_threads num_demos switch_steps train_horizon hidden_sizes batch_size actor_lr critic_lr alpha_lr alpha reward_scale
    updates_per_step classifier_hidden classifier_lr classifier_every classifier_batch model_members model_elites model_hidden_sizes
    model_lr model_batch_size model_every model_patience rollouts rollout_retain explore_neighbour explore_window offline_sizes
    offline_lengths offline_fit offline_updates offline_every offline_transitions eval_every eval_episodes eval_horizon
""".split()
FRACTIONS = ("gamma", "tau", "real_share")
RESUME_MAY_CHANGE = {"resume", "total_timesteps", "checkpoint_every", "num_threads", "track"}
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
    if args.model_elites > args.model_members:
        fail(f"--model-elites {args.model_elites}: the ensemble has only {args.model_members} members")
    if args.total_timesteps <= args.seed_steps and not args.eval_only and not args.offline:
        fail(f"--total-timesteps {args.total_timesteps}: nothing is learned in the first {args.seed_steps} (--seed-steps)")
    if args.explore and args.algo != "mbarl":
        fail(f"--explore goes with --algo mbarl, not {args.algo}")
    for flag in ("true_dynamics", "mix_into_replay"):
        if getattr(args, flag) and (args.algo != "mbarl" or not args.rollout_length) and not args.offline:
            fail(f"--{flag.replace('_', '-')}: nothing is imagined here; it goes with --algo mbarl and --rollout-length above 0")
    if args.explore and args.explore_neighbour >= args.explore_window:
        fail(f"--explore-neighbour {args.explore_neighbour}: among only {args.explore_window} states (--explore-window)")
    if args.explore and args.update_both:
        fail("--explore updates its two policies in turn: --update-both goes without it")
    if args.offline and args.algo != Args.algo:
        fail(f"--offline is a study of models and has no arms: leave --algo {args.algo} out")
    if args.offline and min(args.offline_sizes) < 10:
        fail(f"--offline-sizes {min(args.offline_sizes)}: too few to hold a fifth out; take 10 or more")
    longest = (min if args.equal_rollouts else max)(args.offline_lengths)  # equal ones are counted by the shortest
    if args.offline and args.offline_transitions < longest:
        fail(f"--offline-transitions {args.offline_transitions}: less than one rollout of {longest} steps")
    if 0 < args.model_rows < 10:
        fail(f"--model-rows {args.model_rows}: too few to hold a fifth out; take 10 or more, or 0 for all")
    if args.offline and args.true_dynamics:
        fail("--offline is about learned models: --true-dynamics goes with training")
    if args.offline and args.start != Args.start:
        fail("--offline has starts of its own: take --offline-starts")
    if args.true_dynamics and args.reward == "learned":
        fail("--true-dynamics has no reward head: take --reward analytic")
    if args.track and importlib.util.find_spec("wandb") is None:
        fail("--track: wandb is not installed; pip install wandb")
    if args.compile and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))):
        fail("--compile: needs a C++ compiler (g++ or clang++); none is on the PATH")
    if args.eval_only != bool(args.checkpoint):
        fail("--eval-only and --checkpoint PATH go together")


# ---------------------------------------------------------------------------------------------- environment
class GoalEnv(gym.Env):
    """A world that never ends by itself. Its physics, goals and rewards are pure functions of tensors with any leading dimensions:
    state [..., state], action [..., act] in [-1, 1], goal [..., goal]. An observation is state and goal in float32; the world keeps
    its own state in float64."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}
    xml: str  # how it looks: its joints are the state's first entries, its mocap body marks the goal
    goals: torch.Tensor  # [goals, goal]
    state_dim: int
    act_dim: int
    goal_mark: slice  # entries of a goal that are a place

    def __init__(self, render_mode: str | None = None):
        lacking = [name for name in ("goals", "state_dim", "act_dim") if not hasattr(self, name)]
        if lacking:
            fail(f"{type(self).__name__} has no {', '.join(lacking)}")
        if not torch.is_tensor(self.goals) or self.goals.ndim != 2:
            fail(f"{type(self).__name__}.goals must be a tensor [goals, goal]")
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (self.state_dim + self.goals.shape[1],), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (self.act_dim,), np.float32)
        self.render_mode, self.renderer, self.goal = render_mode, None, self.goals[0]
        self.state = self.initial(1, np.random.default_rng(0))[0]

    def observation(self) -> np.ndarray:
        return torch.cat([self.state, self.goal]).float().numpy()

    def draw_goal(self) -> None:
        self.goal = self.goals[self.np_random.integers(len(self.goals))]

    def reset(self, seed: int | None = None, options=None):
        super().reset(seed=seed)
        self.state = self.initial(1, self.np_random)[0]
        self.draw_goal()
        return self.observation(), {}

    def step(self, action: np.ndarray):
        self.state = self.transition(self.state, torch.as_tensor(action, dtype=torch.float64))
        reward, success = (float(f(self.state, self.goal)) for f in (self.reward, self.success))
        return self.observation(), reward, False, False, {"is_success": bool(success)}

    def render(self) -> np.ndarray:
        import mujoco

        if self.renderer is None:
            self.model = mujoco.MjModel.from_xml_string(self.xml)
            self.data, self.renderer = mujoco.MjData(self.model), mujoco.Renderer(self.model, 480, 480)
        self.data.qpos[:] = self.state[: self.model.nq]
        self.data.mocap_pos[0, :2] = self.goal[self.goal_mark]
        mujoco.mj_forward(self.model, self.data)
        self.renderer.update_scene(self.data, camera="top")
        return self.renderer.render()

    def close(self) -> None:
        if self.renderer is not None:
            self.renderer.close()
            self.renderer = None

    def state_dict(self) -> dict:
        return dict(state=self.state, goal=self.goal, rng=self.np_random.bit_generator.state)

    def load_state_dict(self, state: dict) -> None:
        self.state, self.goal, self.np_random.bit_generator.state = state["state"], state["goal"], state["rng"]


class Tabletop(GoalEnv):
    """EARL's tabletop manipulation: a gripper carries a mug to one of four places and goes home.

    State: gripper x, y; mug x, y; a flag twice (-1 free, 0 held). Goals have the same layout. Action: move x, y; grip. Purely
    kinematic. Sparse reward.
    """

    xml = """<mujoco><visual><global offwidth="480" offheight="480"/></visual><worldbody>
      <light directional="true" pos="0 0 4" dir="0 0 -1" diffuse=".3 .3 .3" specular="0 0 0"/><camera name="top" pos="0 0 8" fovy="45"/>
      <geom type="plane" size="3.2 3.2 1" rgba=".85 .8 .7 1"/>
      <body name="goal" mocap="true"><geom type="cylinder" size=".3 .01" rgba=".3 .7 .3 1"/></body>
      <body><joint type="slide" axis="1 0 0"/><joint type="slide" axis="0 1 0"/>
        <geom type="cylinder" size=".15 .2" pos="0 0 .6" rgba=".1 .1 .1 1"/></body>
      <body><joint type="slide" axis="1 0 0"/><joint type="slide" axis="0 1 0"/>
        <geom type="cylinder" size=".2 .15" pos="0 0 .15" rgba=".9 .2 .2 1"/></body></worldbody></mujoco>"""
    start = torch.tensor([0, 0, 2.5, 0, -1, -1], dtype=torch.float64)
    goals = torch.tensor([[0, 0, *mug, -1, -1] for mug in ((-2.5, -1), (-2.5, 1), (0, 2), (0, -2))], dtype=torch.float64)
    state_dim, act_dim, goal_mark = 6, 3, slice(2, 4)

    def transition(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Grasp or release, then move; a held mug moves as far as the gripper did."""
        action, gripper, mug = action.clamp(-1, 1), state[..., :2], state[..., 2:4]
        near = (gripper - mug).norm(dim=-1) < 0.4
        held = (action[..., 2] > 0) & (near | (state[..., 4] > -0.5))
        moved = (gripper + 0.2 * action[..., :2]).clamp(-2.8, 2.8)
        mug = torch.where(held[..., None], (mug + (moved - gripper)).clamp(-2.8, 2.8), mug)
        flag = held.to(state.dtype)[..., None] - 1
        return torch.cat([moved, mug, flag, flag], -1)

    def success(self, state: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        """Gripper and mug within 0.2 of theirs, in four dimensions; bool [...]."""
        return (state[..., :4] - goal[..., :4]).norm(dim=-1) <= 0.2

    def reward(self, state: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        return self.success(state, goal).to(state.dtype)

    def distance(self, state: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        """Of the mug from its goal, [...]."""
        return (state[..., 2:4] - goal[..., 2:4]).norm(dim=-1)

    def held(self, state: torch.Tensor) -> torch.Tensor:
        return state[..., 4] > -0.5

    def project(self, state: torch.Tensor) -> torch.Tensor:
        """The nearest possible state."""
        flag = (state[..., 4:].mean(-1, keepdim=True) > -0.5).to(state.dtype) - 1
        return torch.cat([state[..., :4].clamp(-2.8, 2.8), flag, flag], -1)

    def initial(self, n: int, rng: np.random.Generator) -> torch.Tensor:
        """Initial states [n, state]."""
        return self.start.repeat(n, 1)

    def as_goal(self, state: torch.Tensor) -> torch.Tensor:
        """The goal that asks for this state."""
        return state

    def expert(self, state: torch.Tensor, goal: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Noisy scripted action [act]: go to the mug, grasp it, carry it along x, then y, release it, go home."""
        gripper, mug, left = state[:2], state[2:4], goal[2:4] - state[2:4]
        if left.norm() < 0.13:  # less could never end: a mug grasped from behind stops at x = -2.41, where the gripper is at the edge
            way, grip = goal[:2] - gripper, -1.0
        elif self.held(state):
            way, grip = left * torch.tensor([1, 0] if left[0].abs() > 0.1 else [0, 1]), 1.0
        else:
            way, grip = mug - gripper, 1.0
        move = F.normalize(way, dim=0) * min(0.5, float(way.norm()) / 0.2) + torch.from_numpy(rng.normal(0, 0.06, 2))
        return torch.cat([move, torch.tensor([grip])]).clamp(-1, 1)


class PointMass2D(GoalEnv):
    """A point with momentum on a square, pushed from one corner to the other; the distance is the cost.

    State: x, y and velocities; goal: x, y. The closed form of a MuJoCo model (`xml`) as long as no wall is touched; walls are hard.
    """

    xml = """<mujoco><option timestep="0.02"><flag contact="disable"/></option>
      <visual><global offwidth="480" offheight="480"/></visual><worldbody>
      <light directional="true" pos="0 0 4" dir="0 0 -1" diffuse=".3 .3 .3" specular="0 0 0"/><camera name="top" pos="0 0 3" fovy="45"/>
      <geom type="plane" size="1.1 1.1 1" rgba=".85 .8 .7 1"/>
      <body name="goal" mocap="true"><geom type="cylinder" size=".1 .01" rgba=".3 .7 .3 1"/></body>
      <body><joint name="x" type="slide" axis="1 0 0" limited="true" range="-1 1" damping="1"/>
        <joint name="y" type="slide" axis="0 1 0" limited="true" range="-1 1" damping="1"/>
        <geom type="sphere" size=".05" mass=".3" rgba=".9 .2 .2 1"/></body></worldbody><actuator>
      <motor joint="x" ctrlrange="-1 1" ctrllimited="true"/><motor joint="y" ctrlrange="-1 1" ctrllimited="true"/></actuator></mujoco>"""
    goals = torch.tensor([[0.8, 0.8]], dtype=torch.float64)
    state_dim, act_dim, goal_mark = 4, 2, slice(0, 2)

    def __init__(self, frame_skip: int = 2, drag: float = 0.0, sparse: bool = False, render_mode: str | None = None):
        self.frame_skip, self.drag, self.sparse = frame_skip, drag, sparse
        super().__init__(render_mode)

    def transition(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Semi-implicit Euler steps of 0.02 s; mass 0.3, damping 1 (taken implicitly), and a quadratic drag."""
        (place, velocity), force = state.chunk(2, -1), action.clamp(-1, 1)
        for _ in range(self.frame_skip):
            drag = self.drag * velocity * velocity.norm(dim=-1, keepdim=True)
            velocity = velocity + 0.02 * (force - velocity - drag) / (0.3 + 0.02)
            place = place + 0.02 * velocity
            velocity = torch.where(place.abs() > 1, 0.0, velocity)
            place = place.clamp(-1, 1)
        return torch.cat([place, velocity], -1)

    def success(self, state: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        return self.distance(state, goal) <= 0.1

    def reward(self, state: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        return self.success(state, goal).to(state.dtype) if self.sparse else -self.distance(state, goal)

    def distance(self, state: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        return (state[..., :2] - goal[..., :2]).norm(dim=-1)

    def held(self, state: torch.Tensor) -> torch.Tensor:
        return torch.zeros(state.shape[:-1], dtype=torch.bool)  # there is nothing to hold

    def project(self, state: torch.Tensor) -> torch.Tensor:
        """The nearest possible state; beyond a wall, there and without the velocity into it."""
        place, velocity = state.chunk(2, -1)
        velocity = torch.where((place.abs() > 1) & (place * velocity > 0), 0.0, velocity)
        return torch.cat([place.clamp(-1, 1), velocity], -1)

    def initial(self, n: int, rng: np.random.Generator) -> torch.Tensor:
        """Near one corner, at rest: [n, state]."""
        return F.pad(torch.from_numpy(rng.uniform(-0.85, -0.75, (n, 2))), (0, 2))

    def uniform(self, n: int, rng: np.random.Generator) -> torch.Tensor:
        """States all over the square, [n, state]."""
        return torch.from_numpy(rng.uniform(-1, 1, (n, 4)))

    def as_goal(self, state: torch.Tensor) -> torch.Tensor:
        return state[..., :2]

    def expert(self, state: torch.Tensor, goal: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Noisy action [act] of a damped spring."""
        return ((4 * (goal - state[:2]) - state[2:]).clamp(-1, 1) + torch.from_numpy(rng.normal(0, 0.1, 2))).clamp(-1, 1)


class PointMaze(GoalEnv):
    """gymnasium-robotics' PointMaze_UMaze without its resets: a point with momentum goes round a wall, from one end of a U to the other.

    State: x, y and velocities; goal: x, y. Sparse reward. MuJoCo computes each step, from the state alone.
    """

    xml = """<mujoco><visual><global offwidth="480" offheight="480"/></visual><worldbody>
      <light directional="true" pos="0 0 4" dir="0 0 -1" diffuse=".3 .3 .3" specular="0 0 0"/><camera name="top" pos="0 0 5" fovy="45"/>
      <geom type="plane" size="1.6 1.6 1" rgba=".85 .8 .7 1"/><geom type="box" size="1 .5 .1" pos="-.5 0 .1" rgba=".4 .4 .4 1"/>
      <body name="goal" mocap="true"><geom type="cylinder" size=".45 .01" rgba=".3 .7 .3 1"/></body>
      <body><joint type="slide" axis="1 0 0"/><joint type="slide" axis="0 1 0"/>
        <geom type="sphere" size=".1" pos="0 0 .1" rgba=".9 .2 .2 1"/></body></worldbody></mujoco>"""
    goals = torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
    path = torch.tensor([[-1.0, -1], [0, -1], [1, -1], [1, 0], [1, 1], [0, 1], [-1, 1]], dtype=torch.float64)  # the cells' centres
    state_dim, act_dim, goal_mark = 4, 2, slice(0, 2)

    def __init__(self, render_mode: str | None = None):
        with contextlib.redirect_stderr(io.StringIO()):  # it announces changed rewards
            import gymnasium_robotics

        gym.register_envs(gymnasium_robotics)
        self.point = gym.make("PointMaze_UMaze-v3").unwrapped.point_env
        super().__init__(render_mode)

    def transition(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """0.01 s of force on the point, whose speed is first cut to 5 along each axis."""
        import mujoco

        after = []
        states, forces = (x.double().cpu().numpy() for x in (state.reshape(-1, 4), action.reshape(-1, 2)))
        for one, force in zip(states, forces, strict=True):
            mujoco.mj_resetData(self.point.model, self.point.data)  # its solver starts from the last step's forces otherwise
            self.point.set_state(one[:2], one[2:])
            after.append(self.point.step(force)[0])
        return torch.from_numpy(np.array(after)).to(state).reshape(state.shape)

    def success(self, state: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        return self.distance(state, goal) <= 0.45

    def reward(self, state: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        return self.success(state, goal).to(state.dtype)

    def distance(self, state: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        return (state[..., :2] - goal[..., :2]).norm(dim=-1)

    def held(self, state: torch.Tensor) -> torch.Tensor:
        return torch.zeros(state.shape[:-1], dtype=torch.bool)  # there is nothing to hold

    def project(self, state: torch.Tensor) -> torch.Tensor:
        """Within the outer walls, which give way a little, and the speed that a push adds to the bound of 5 along each axis."""
        return torch.cat([state[..., :2].clamp(-1.45, 1.45), state[..., 2:].clamp(-5.3, 5.3)], -1)

    def initial(self, n: int, rng: np.random.Generator) -> torch.Tensor:
        """In the first cell, at rest: [n, state]."""
        return F.pad(self.path[0] + torch.from_numpy(rng.uniform(-0.25, 0.25, (n, 2))), (0, 2))

    def as_goal(self, state: torch.Tensor) -> torch.Tensor:
        return state[..., :2]

    def expert(self, state: torch.Tensor, goal: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Noisy action [act] towards the next cell on the way."""
        here, there = ((self.path - place).norm(dim=-1).argmin() for place in (state[:2], goal))
        way = (goal if here == there else self.path[here + (there - here).sign()]) - state[:2]
        return ((10 * way - state[2:]).clamp(-1, 1) + torch.from_numpy(rng.normal(0, 0.1, 2))).clamp(-1, 1)


if "Tabletop-v0" not in gym.registry:  # a module with a world of your own imports this file once more
    gym.register("Tabletop-v0", entry_point=Tabletop, max_episode_steps=200)
    gym.register("PointMass2D-v0", entry_point=PointMass2D, max_episode_steps=100)
    gym.register("PointMass2DCoarse-v0", entry_point=PointMass2D, max_episode_steps=100, kwargs=dict(frame_skip=4))
    gym.register("PersistentPointMaze-v0", entry_point=PointMaze, max_episode_steps=300)


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


def make_world(args: Args) -> GoalEnv:
    """The environment without its time limit, as the pure functions and the one state that training works on."""
    world = make_env(args.env_id).unwrapped
    needed = "transition success reward distance held project initial as_goal expert goals state_dim act_dim"
    lacking = [name for name in needed.split() if not hasattr(world, name)]
    if lacking:
        fail(f"--env-id {args.env_id}: needs the functions of GoalEnv, as Tabletop-v0 and PointMass2D-v0 have; no {', '.join(lacking)}")
    if args.offline and not hasattr(world, "uniform"):
        fail(f"--offline: {args.env_id} cannot draw uniform states; take PointMass2D-v0")
    rng, state_dim, goal = np.random.default_rng(0), world.state_dim, world.goals[:1].repeat(2, 1)
    state, action = world.initial(2, rng), torch.zeros(2, world.act_dim, dtype=torch.float64)
    shapes = dict(initial=((2, rng), (2, state_dim)), transition=((state, action), (2, state_dim)), project=((state,), (2, state_dim)))
    shapes |= {name: ((state, goal), (2,)) for name in ("success", "reward", "distance")} | dict(held=((state,), (2,)))
    shapes |= dict(as_goal=((state,), tuple(goal.shape)), expert=((state[0], goal[0], rng), (world.act_dim,)))
    for name, (inputs, shape) in shapes.items():
        value = getattr(world, name)(*inputs)
        got = f"a tensor {list(value.shape)}" if torch.is_tensor(value) else type(value).__name__
        if got != f"a tensor {list(shape)}":
            of = "one state" if name == "expert" else "two states"
            fail(f"--env-id {args.env_id}: {name} of {of} must give a tensor {list(shape)}, not {got}")
    return world


def scripted_demos(world: GoalEnv, n: int, backward: bool, rng: np.random.Generator) -> torch.Tensor:
    """n trajectories of the scripted expert, in the replay buffer's layout [rows, width]; the last row of each is terminal.

    Forward ones go from an initial state to the goals in turn, backward ones from where a forward one ended to an initial state.
    """
    rows, limit = [torch.empty(0, 2 * world.observation_space.shape[0] + world.act_dim + 2)], 10_000
    for i in range(n):
        state, home = world.initial(2, rng)
        for goal in [world.goals[i % len(world.goals)], world.as_goal(home)][: 1 + backward]:
            trajectory, done = [], False
            while not done:
                action = world.expert(state, goal, rng).float()
                next_state = world.transition(state, action.double())
                done = bool(world.success(next_state, goal))
                numbers = torch.stack([world.reward(next_state, goal), torch.tensor(float(done), dtype=torch.float64)])
                trajectory.append(torch.cat([state, goal, action, next_state, goal, numbers]).float())
                state = next_state
                if len(trajectory) == limit:
                    fail(f"the scripted expert does not reach {[round(x, 2) for x in goal.tolist()]} in {limit} steps")
        rows.append(torch.stack(trajectory))
    return torch.cat(rows)


def with_goals(rows: torch.Tensor, goals: torch.Tensor, state_dim: int, act_dim: int) -> torch.Tensor:
    """Rows [n, width] once for each of goals [m, goal], which replaces theirs: [m * n, width]. Rewards stay: nothing may read them."""
    obs_dim, copies = state_dim + goals.shape[1], rows.repeat(len(goals), 1, 1)
    for start in (state_dim, obs_dim + act_dim + state_dim):
        copies[:, :, start : start + goals.shape[1]] = goals[:, None]
    return copies.flatten(0, 1)


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


@dataclass
class Player:
    """A policy and what it learns from."""

    agent: Agent
    replay: ReplayBuffer  # R, real transitions, demonstrations first
    imagined: ReplayBuffer  # M
    demos: torch.Tensor  # the demonstrations in R, [n, width]


class EnsembleDynamics(nn.Module):
    """Probabilistic ensemble: each member gives a Gaussian over next_obs - obs (Chua et al. 2018, as in MBPO)."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.net = StackedMLP(args.model_members, [obs_dim + act_dim, *args.model_hidden_sizes, 2 * obs_dim], F.silu)
        for layer in (*self.net.hidden, self.net.output):
            std = 0.5 * layer.weight.shape[1] ** -0.5
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
        self.mean_clamp, self.scale_targets = args.model_mean_clamp, args.model_scale_targets
        self.register_buffer("input_mean", torch.zeros(obs_dim + act_dim))
        self.register_buffer("input_std", torch.ones(obs_dim + act_dim))
        self.register_buffer("target_std", torch.ones(obs_dim))
        self.register_buffer("elites", torch.arange(args.model_elites))

    def set_normaliser(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Mean and standard deviation of inputs [n, obs + act], and the deviation of targets [n, obs], in double precision."""
        inputs, targets = inputs.double(), targets.double()
        self.input_mean.copy_(inputs.mean(0))
        self.input_std.copy_(torch.where(inputs.std(0) < 1e-12, 1.0, inputs.std(0)))
        self.target_std.copy_(targets.std(0).clamp(min=1e-6))

    @property
    def unit(self) -> torch.Tensor:
        """What the network's outputs are multiples of, [obs]."""
        return self.target_std if self.scale_targets else torch.ones_like(self.target_std)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance, [members, batch, obs] each, of inputs [members, batch, obs + act]."""
        mean, log_var = self.net((inputs - self.input_mean) / self.input_std).chunk(2, -1)
        mean = mean * self.unit
        if self.mean_clamp:
            mean = mean.clamp(-self.mean_clamp, self.mean_clamp)
        log_var = 0.5 - F.softplus(0.5 - log_var)
        return mean, F.softplus(log_var + 10) - 10 + 2 * self.unit.log()

    def forward_elites(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As forward, of the elites alone: [elites, batch, ...]."""
        params = {name: parameter[self.elites] for name, parameter in self.named_parameters()}
        return torch.func.functional_call(self, params, (inputs,))

    def sample(self, obs: torch.Tensor, action: torch.Tensor, generator: torch.Generator, noise: bool = True) -> torch.Tensor:
        """next_obs [batch, obs], each from one elite: a random permutation deals them out in equal parts (TS1).

        A draw from that elite's Gaussian, or without noise its mean.
        """
        inputs, n, members = torch.cat([obs, action], -1), len(obs), len(self.elites)
        order = torch.randperm(n, generator=generator, device=obs.device)
        dealt = torch.cat([order, order[: -n % members]]) if n >= members else order.repeat(members)[:members]
        mean, log_var = self.forward_elites(inputs[dealt].view(members, -1, inputs.shape[-1]))
        if noise:
            mean = mean + (0.5 * log_var).exp() * torch.randn(mean.shape, generator=generator, device=obs.device)
        return obs + torch.empty_like(obs).index_copy_(0, order, mean.flatten(0, 1)[:n])

    @torch.no_grad()
    def disagreement(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Standard deviation of the elites' means in units of the data's change, averaged over dimensions: [batch]."""
        mean, _ = self.forward_elites(torch.cat([obs, action], -1).expand(len(self.elites), -1, -1))
        return (mean.std(0, correction=min(1, len(mean) - 1)) / self.target_std).mean(-1)


class Classifier(nn.Module):
    """Logit f that a state is a demonstrated one: sigmoid(f) is rho* / (rho* + rho^b) at the optimum."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.dim, self.net = dim, StackedMLP(1, [dim, hidden, 1])

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """Logit [...] of obs [..., obs], of which it sees the first `dim` entries."""
        return self.net(obs[..., : self.dim].reshape(1, -1, self.dim)).view(obs.shape[:-1])


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


def dynamics_update(dynamics: EnsembleDynamics, optimizer: Adam, inputs: torch.Tensor, targets: torch.Tensor, args: Args) -> torch.Tensor:
    """One gradient step on the Gaussian negative log-likelihood (times two, without its constant), weighed if there is a `model_beta`.

    Inputs [members, batch, obs + act], targets next_obs - obs [members, batch, obs]. Returns the mean over members. `model_beta` weighs
    each term with its variance to that power, without gradient (beta-NLL, arXiv 2203.09168): otherwise a rare change is soon explained
    as noise, and its mean, whose gradient that noise divides, is never learned.
    """
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=args.bf16):
        mean, log_var = dynamics(inputs)
    loss = (mean - targets).square() * (-log_var).exp() + log_var
    if args.model_beta:
        loss = loss * (args.model_beta * (log_var.detach() - 2 * dynamics.unit.log())).exp()
    loss = loss.mean((1, 2)).sum()
    optimizer.step(torch.autograd.grad(loss, optimizer.params))
    return loss.detach() / len(inputs)


def classifier_update(
    classifier: Classifier, optimizer: Adam, demos: torch.Tensor, visited: torch.Tensor, mix: torch.Tensor, order: torch.Tensor, args: Args
) -> dict[str, torch.Tensor]:
    """One gradient step of the logistic loss on demonstrated and visited obs [batch, obs] each; with mixup on mixtures, by the shares
    mix [2 batch, 1], of each row with the one that order [2 batch] gives it. Returns scalars to log."""
    inputs = torch.cat([demos, visited])
    labels = torch.cat([torch.ones(len(demos), 1), torch.zeros(len(visited), 1)]).to(inputs)
    mixed, targets = inputs, labels
    if args.mixup and not args.explore:  # mixtures shrink the logits, from which --explore estimates a divergence
        mixed, targets = mix * inputs + (1 - mix) * inputs[order], mix * labels + (1 - mix) * labels[order]
    loss = F.binary_cross_entropy_with_logits(classifier(mixed), targets[:, 0])
    optimizer.step(torch.autograd.grad(loss, optimizer.params))
    with torch.no_grad():
        logits = classifier(inputs)
    right = (logits > 0) == (labels[:, 0] > 0)
    return {"losses/classifier": loss.detach(), "reward/classifier_accuracy": right.float().mean(),
            "reward/logit_demos": logits[: len(demos)].mean(), "reward/logit_visited": logits[len(demos) :].mean()}  # fmt: skip


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


# ---------------------------------------------------------------------------------------------- rewards
@torch.no_grad()
def backward_reward(classifier: Classifier, next_obs: torch.Tensor) -> torch.Tensor:
    """-log(1 - C(s')) = softplus(f(s')), [...], at most -log(1e-10)."""
    return F.softplus(classifier(next_obs)).clamp(max=-math.log(1e-10))


@torch.no_grad()
def exploration_reward(
    classifier: Classifier, next_obs: torch.Tensor, recent: torch.Tensor, weight: float, state_dim: int, args: Args
) -> torch.Tensor:
    """log(1 + d_k(s')) + weight * f(s'), [...]: d_k is the distance of next_obs [..., obs] to its k-th neighbour among recent [m, obs]."""
    distances = torch.cdist(next_obs[..., :state_dim].flatten(0, -2), recent[:, :state_dim])
    neighbour = distances.kthvalue(min(args.explore_neighbour, len(recent)))[0].view(next_obs.shape[:-1])
    return neighbour.log1p() + weight * classifier(next_obs).clamp(-10, 10)


def constraint_weight(weight: float, visited_logits: torch.Tensor, args: Args) -> tuple[float, float]:
    """The next weight of the constraint KL(rho^exp || rho*) < eps, and the divergence, estimated by logits [n] at visited states."""
    divergence = -float(visited_logits.clamp(-10, 10).mean())
    return max(0.0, weight + args.explore_lr * (divergence - args.explore_kl)), divergence


# ---------------------------------------------------------------------------------------------- model
def fit_dynamics(
    dynamics, optimizer, update, batch: Batch, weights: torch.Tensor, max_batches: int, args: Args, generator
) -> dict[str, float]:
    """Fits the ensemble to transitions `batch` [n, ...], drawn in proportion to weights [n].

    A fifth is held out. Each member has its own bootstrap of the rest, fixed for the call. Epochs go on until
    `model_patience` in a row bring no member 1% better on the hold-out set (or max_batches are done); then the weights of
    the last epoch that improved any member come back, and the best members become the elites.
    """
    inputs, targets = torch.cat([batch.obs, batch.action], -1), batch.next_obs - batch.obs
    n, members, device = len(inputs), args.model_members, inputs.device
    order = torch.randperm(n, generator=generator, device=device)
    held_out, rest = order[: n // 5], order[n // 5 :]
    dynamics.set_normaliser(inputs, targets)
    bootstrap = rest[torch.multinomial(weights[rest].expand(members, -1), len(rest), replacement=True, generator=generator)]

    @torch.no_grad()
    def hold_out_error() -> torch.Tensor:
        mean, _ = dynamics(inputs[held_out].expand(members, -1, -1))
        error = ((mean - targets[held_out]) / dynamics.unit).square().mean(-1)
        return (error * weights[held_out]).sum(-1) / weights[held_out].sum()

    best, snapshot, epochs_without, batches, loss = hold_out_error(), None, 0, 0, torch.tensor(0.0)
    while epochs_without < args.model_patience and not (max_batches and batches >= max_batches):
        minibatches = torch.randperm(len(rest), generator=generator, device=device).split(args.model_batch_size)
        minibatches = minibatches[: max(1, len(rest) // args.model_batch_size)]  # an incomplete last one would be compiled anew
        for index in minibatches[: max_batches - batches if max_batches else None]:
            if args.model_cosine:
                optimizer.lr.fill_(0.5 * args.model_lr * (1 + math.cos(math.pi * float(optimizer.steps) / args.model_cosine)))
            rows = bootstrap[:, index]
            loss = update(dynamics, optimizer, inputs[rows], targets[rows], args)
            batches += 1
        error = hold_out_error()
        improved = (best - error) / best.abs() > 0.01
        epochs_without = 0 if improved.any() else epochs_without + 1
        if improved.any():
            best = torch.minimum(best, error)
            snapshot = copy.deepcopy(dynamics.net.state_dict())
    if snapshot is not None:
        dynamics.net.load_state_dict(snapshot)
    dynamics.elites.copy_(best.argsort()[: args.model_elites])
    return {"model/hold_out_mse": float(best.mean()), "losses/model": float(loss), "model/batches": float(batches)}


def rollout_length(schedule: tuple[int, int, int, int], epoch: int) -> int:
    """Steps of an imagined trajectory in an epoch, counted from 1."""
    e0, e1, h0, h1 = schedule
    return int(h0 + min(max((epoch - e0) / (e1 - e0), 0.0), 1.0) * (h1 - h0))


def with_reward(batch: Batch) -> Batch:
    """The reward as one more dimension of the state, which changes from 0 to r: so the ensemble gets a reward head."""
    return batch._replace(obs=F.pad(batch.obs, (0, 1)), next_obs=torch.cat([batch.next_obs, batch.reward[..., None]], -1))


@torch.no_grad()
def predict(dynamics, state: torch.Tensor, action: torch.Tensor, args: Args, generator) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Next state [n, state] and reward [n] (None without that head), each row by one elite."""
    state_dim, has_reward = state.shape[-1], dynamics.target_std.numel() > state.shape[-1]
    sample = dynamics.sample(F.pad(state, (0, int(has_reward))), action, generator, args.rollout_noise)
    return sample[:, :state_dim], sample[:, -1] if has_reward else None


@torch.no_grad()
def imagine_goals(world, model: Callable, actor, obs: torch.Tensor, length: int, terminal: bool, args: Args, generator) -> torch.Tensor:
    """Rolls the sampled policy through `model` (state, action -> next state, reward or None) from obs [n, obs], whose goals stay;
    returns transitions [m, width] in the buffer's layout. Success ends a trajectory if it is terminal; a number that is not finite ends
    it without that transition."""
    rows, act_dim = [], world.act_dim
    for _ in range(length):
        state, goal = obs[:, : world.state_dim], obs[:, world.state_dim :]
        action, _ = actor(obs, torch.randn(len(obs), act_dim, generator=generator, device=obs.device))
        next_state, reward = model(state, action)
        if args.snap:
            next_state = world.project(next_state)
        reward = world.reward(next_state, goal) if reward is None else reward
        done = world.success(next_state, goal) & terminal
        row = torch.cat([obs, action, next_state, goal, reward[:, None], done[:, None].float()], -1)
        good = row.isfinite().all(-1)
        rows.append(row[good])
        obs = torch.cat([next_state, goal], -1)[good & ~done]
        if not len(obs):
            break
    return torch.cat(rows)


@torch.no_grad()
def open_loop_error(dynamics: EnsembleDynamics, states: torch.Tensor, actions: torch.Tensor) -> float:
    """Root mean square error of the elites' mean prediction along true trajectories, states [k + 1, n, state] and actions [k, n, act],
    at their end, in units of each entry's standard deviation over the states (1 for entries that hardly vary: a mug that lies still)."""
    state, extra = states[0], dynamics.target_std.numel() - states.shape[-1]
    for action in actions:
        inputs = torch.cat([F.pad(state, (0, extra)), action], -1)
        change = dynamics.forward_elites(inputs.expand(len(dynamics.elites), -1, -1))[0].mean(0)
        state = state + change[:, : state.shape[-1]]
    std = states.flatten(0, 1).std(0)
    return float(((state - states[-1]) / torch.where(std < 1e-3, 1.0, std)).square().mean().sqrt())


def stretches(batch: Batch, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All runs of `length` consecutive transitions in batch [n, ...]: states [length + 1, m, obs] and actions [length, m, act]."""
    joined = (batch.next_obs[:-1] == batch.obs[1:]).all(-1)
    index = torch.arange(max(len(batch.obs) - length + 1, 0), device=batch.obs.device)
    whole = torch.stack([joined[index + k] for k in range(length - 1)]).all(0) if length > 1 else torch.ones_like(index, dtype=torch.bool)
    index = index[whole] + torch.arange(length, device=batch.obs.device)[:, None]
    return torch.cat([batch.obs[index], batch.next_obs[index[-1:]]]), batch.action[index]


def start_states(kind: str, n: int, player: Player, world: GoalEnv, generator, rng: np.random.Generator) -> torch.Tensor:
    """Observations [n, obs] from which rollouts start; replay's also where a player has no demonstrations."""
    demos, replay, device = player.demos, player.replay, player.replay.rows.device
    if kind == "narrow":
        goals = world.goals[torch.from_numpy(rng.integers(len(world.goals), size=n))]
        return torch.cat([world.initial(n, rng), goals], -1).float().to(device)
    shown = {"demo": n, "mixed": n // 2}.get(kind, 0) if len(demos) else 0
    parts = [demos[torch.randint(len(demos), (shown,), generator=generator, device=device)]] if shown else []
    parts += [replay.sample((n - shown,), generator)] if shown < n else []
    return torch.cat(parts)[:, : world.observation_space.shape[0]]


# ---------------------------------------------------------------------------------------------- evaluation and logs
@torch.no_grad()
def evaluate_goals(actor: Actor, world: GoalEnv, episodes: int, horizon: int, seed: list[int]) -> dict[str, float]:
    """Deterministic episodes from the initial state, the goals in turn, all in lock step. Success is success at any step."""
    device, state = actor.normalise.mean.device, world.initial(episodes, np.random.default_rng(seed))
    goal = world.goals[torch.arange(episodes) % len(world.goals)]
    returns, success, held = torch.zeros(episodes), torch.zeros(episodes, dtype=torch.bool), torch.zeros(episodes, dtype=torch.bool)
    no_noise = torch.zeros(episodes, world.act_dim, device=device)
    for _ in range(horizon):
        action, _ = actor(torch.cat([state, goal], -1).float().to(device), no_noise)
        state = world.transition(state, action.double().cpu())
        returns += world.reward(state, goal)
        success |= world.success(state, goal)
        held |= world.held(state)
    return dict(eval_return_mean=float(returns.mean()), eval_return_std=float(returns.std(correction=0)),
                eval_success_rate=float(success.float().mean()), eval_grasp_rate=float(held.float().mean()),
                eval_success_at_end=float(world.success(state, goal).float().mean()),
                eval_final_distance=float(world.distance(state, goal).mean()))  # fmt: skip


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
    """MBARL and the arms to compare it with. Returns the last row of progress.csv."""
    device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu"))
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    streams = {}
    names = ("replay", "policy", "classifier", "model", "rollout")  # of their own, so that without a model the rest stays as it is
    for name, seed in zip(names, np.random.SeedSequence(args.seed).generate_state(len(names)), strict=True):
        streams[name] = torch.Generator(device).manual_seed(int(seed))

    env = eval_env = make_env(args.env_id, "rgb_array" if args.capture_video else None)
    world = make_world(args)
    state_dim, act_dim, obs_dim = world.state_dim, world.act_dim, env.observation_space.shape[0]
    matching, imagines = args.algo in ("mbarl", "medal"), args.algo == "mbarl" and args.rollout_length > 0
    demo_rng = np.random.default_rng([args.seed, 2])
    forward_demos = scripted_demos(world, args.num_demos, False, demo_rng)  # D_f
    backward_demos = scripted_demos(world, args.backward_demos, True, demo_rng)  # D_b
    demos_of = {"forward": forward_demos}
    if args.explore:
        demos_of["explore"] = forward_demos[:0]
    elif matching:
        goals = world.goals.float()
        demos_of["backward"] = torch.cat([forward_demos, with_goals(backward_demos, goals, state_dim, act_dim)])
        if not args.switch_terminal:  # the backward policy's phase does not end by success
            demos_of["backward"][:, -1] = 0
    elif args.algo == "fbrl":
        demos_of["backward"] = backward_demos

    size = args.total_timesteps + args.rollout_retain * args.rollouts * args.rollout_length * (args.mix_into_replay and imagines)
    settings = replace(args, target_entropy=-act_dim / 2 if args.target_entropy is None else args.target_entropy)
    players, parts = {}, {f"{name}_stream": stream for name, stream in streams.items()}
    for name, demos in demos_of.items():
        replay, imagined = (ReplayBuffer(n, obs_dim, act_dim, device) for n in (len(demos) + size, 1))
        replay.extend(demos)
        player = players[name] = Player(Agent(obs_dim, act_dim, settings).to(device), replay, imagined, demos.to(device))
        parts |= {f"{name}_agent": player.agent, f"{name}_replay": replay, f"{name}_imagined": imagined}
    parts["world"] = world
    if matching:
        classifier = Classifier(obs_dim if args.classifier_goal else state_dim, args.classifier_hidden).to(device)
        classifier_optimizer = Adam(classifier.parameters(), args.classifier_lr).to(device)
        visited = ReplayBuffer(args.total_timesteps, obs_dim, act_dim, device)  # N, of the backward (or exploration) policy
        shown = players["forward"].replay.split(players["forward"].demos)
        positives = torch.cat([shown.obs, shown.next_obs[shown.terminated > 0]])  # P, each demonstrated state once
        parts |= dict(classifier=classifier, classifier_optimizer=classifier_optimizer, visited=visited)
    if imagines:
        learned = args.reward == "learned"
        dynamics = EnsembleDynamics(state_dim + learned, act_dim, args).to(device)
        dynamics_optimizer = Adam(dynamics.parameters(), args.model_lr, args.model_weight_decay).to(device)
        demos = torch.cat([forward_demos, backward_demos])  # each once, whatever it was copied to
        physical = ReplayBuffer(len(demos) + args.total_timesteps, state_dim, act_dim, device)
        batch, goal_of = players["forward"].replay.split(demos), world.goals[0].float()
        # A demonstration's reward is of its own goal, and the backward ones' is not of the task: both matter to `learned` alone.
        reward = world.reward(batch.next_obs[:, :state_dim], goal_of) if len(world.goals) == 1 else batch.reward
        columns = [batch.obs[:, :state_dim], batch.action, batch.next_obs[:, :state_dim], reward[:, None], torch.zeros(len(demos), 1)]
        physical.extend(torch.cat(columns, 1))
        parts |= dict(dynamics=dynamics, dynamics_optimizer=dynamics_optimizer, physical=physical)
    update, update_dynamics, update_classifier = (compiled(f, args) for f in (sac_update, dynamics_update, classifier_update))

    fresh = dict(env_steps=0, updates=0, phase="forward", phase_steps=0, since_reset=0, interventions=0, task_reward=0.0, model_batches=0,
                 imagined=0, explore_weight=0.0) | {f"updates_{name}": 0 for name in players}  # fmt: skip
    checkpoint = read_checkpoint(Path(args.resume)) if args.resume else dict(counters=fresh)
    run_dir = make_run_dir(args)
    counters = checkpoint["counters"]
    log = parts["log"] = Log(run_dir, args, counters["env_steps"])
    if args.resume:
        world.reset(seed=0)  # it makes the random stream that is about to be put back
        restore(checkpoint, parts)
        for player in players.values():
            player.replay.resize(len(player.demos) + size)  # the run may have become longer
        for name in ("visited", "physical"):
            if name in parts:
                parts[name].resize(args.total_timesteps + (len(demos) if name == "physical" else 0))
    else:
        world.reset(seed=int(np.random.SeedSequence([args.seed, 0]).generate_state(1)[0]))
    stop, obs = StopSignal(), world.observation()
    tqdm.write(f"{SCRIPT}: {args.env_id}, {args.algo}, run folder {run_dir}", file=sys.stderr)

    def evaluate_and_save_policy() -> None:
        env_steps, actor = counters["env_steps"], players["forward"].agent.actor
        check_finite({**log.sums, **dict(actor.named_parameters())}, env_steps)
        evaluation = evaluate_goals(actor, world, args.eval_episodes, args.eval_horizon, [args.seed, 1, env_steps])
        if args.capture_video:
            evaluate(actor, eval_env, 1, [args.seed, 1, env_steps], video=run_dir / "videos" / f"step-{env_steps}")
        log.add({f"charts/updates_{name}": counters[f"updates_{name}"] for name in players})
        log.add({"charts/interventions": counters["interventions"], "charts/reward_per_step": counters["task_reward"] / max(env_steps, 1)})
        if imagines:
            log.add({"charts/model_batches": counters["model_batches"], "charts/imagined_transitions": counters["imagined"]})
        log.row(env_steps, counters["updates"], evaluation, float("nan"))
        policy = policy_content(actor, env, args, env_steps)
        write_atomically(run_dir / "policy.pt", lambda file: torch.save(policy, file))

    def model(state: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if args.true_dynamics:
            return world.transition(state, action), None
        return predict(dynamics, state, action, args, streams["rollout"])

    def fit_and_imagine(steps: int) -> None:
        first = not counters["model_batches"]
        rows = physical.newest(len(physical))
        if args.model_rows:
            rows = rows[torch.randperm(len(rows), generator=streams["model"], device=device)[: args.model_rows]]
        data, most = physical.split(rows), args.model_first_batches if first else args.model_max_batches
        if not args.true_dynamics:
            recent = physical.split(physical.newest(min(1_000, counters["env_steps"])))  # the newest have not been learned yet
            for k in (1, 5):
                states, actions = stretches(recent, k)
                if states.shape[1] and not first:
                    log.add({f"model/error_{k}_step{'s' * (k > 1)}": open_loop_error(dynamics, states, actions)})
            data, weights = with_reward(data) if learned else data, torch.ones(len(rows), device=device)
            metrics = fit_dynamics(dynamics, dynamics_optimizer, update_dynamics, data, weights, most, args, streams["model"])
            counters["model_batches"] += int(metrics["model/batches"])
            log.add(metrics)
        length = rollout_length((0, args.rollout_growth or 1, 1, args.rollout_length), steps if args.rollout_growth else 1)
        rng = np.random.default_rng([args.seed, 3, counters["env_steps"]])
        for name, player in players.items():
            start = start_states(args.start, args.rollouts, player, world, streams["rollout"], rng)
            rows = imagine_goals(world, model, player.agent.actor, start, length, name == "forward", args, streams["rollout"])
            counters["imagined"] += len(rows)
            if len(rows):  # what would a perfect model have said to them?
                some = player.replay.split(rows[:: len(rows) // 1_000 + 1].cpu())
                true = world.transition(some.obs[:, :state_dim].double(), some.action.double())
                log.add({f"model/imagined_error_{name}": float((some.next_obs[:, :state_dim] - true).square().mean().sqrt())})
            if args.mix_into_replay:
                player.replay.extend(rows)
                continue
            capacity = args.rollouts * length * args.rollout_retain
            if capacity != len(player.imagined.rows):
                player.imagined.resize(capacity)
            player.imagined.extend(rows)
        log.add({"model/rollout_length": length})

    def update_classifier_once() -> None:
        shape = (args.classifier_batch,)
        shown = positives[torch.randint(len(positives), shape, generator=streams["classifier"], device=device)]
        seen = visited.split(visited.sample(shape, streams["classifier"])).next_obs
        mix = torch.rand(2 * shape[0], 1, generator=streams["classifier"], device=device)  # Beta(1, 1)
        order = torch.randperm(2 * shape[0], generator=streams["classifier"], device=device)
        metrics = update_classifier(classifier, classifier_optimizer, shown, seen, mix, order, args)
        if args.explore:
            with torch.no_grad():
                weight, divergence = constraint_weight(counters["explore_weight"], classifier(seen), args)
            counters["explore_weight"] = weight
            metrics |= {"reward/explore_weight": weight, "reward/explore_kl": divergence}
        log.add(metrics)

    def rewarded(name: str, batch: Batch) -> Batch:
        """The rewards that a player learns from: the classifier's are never stored."""
        reward = batch.reward
        if name == "backward" and matching:
            reward = backward_reward(classifier, batch.next_obs)
        elif name == "explore":
            recent = visited.split(visited.newest(args.explore_window)).next_obs
            reward = exploration_reward(classifier, batch.next_obs, recent, counters["explore_weight"], state_dim, args)
        return batch._replace(reward=args.reward_scale * reward)

    def update_player(name: str, player: Player) -> None:
        real = round(args.real_share * args.batch_size) if len(player.imagined) else args.batch_size
        sources = {player.replay: real, player.imagined: args.batch_size - real}
        rows = torch.cat([b.sample((args.updates_per_step, n), streams["replay"]) for b, n in sources.items() if n], 1)
        batches = rewarded(name, player.replay.split(rows))
        noise = torch.randn(args.updates_per_step, 2, args.batch_size, act_dim, generator=streams["policy"], device=device)
        for u in range(args.updates_per_step):
            batch = Batch(*(field[u] for field in batches))
            metrics = update(player.agent, batch, batch.obs, noise[u], args)
            target_update(player.agent, args.tau)
        counters["updates"] += args.updates_per_step
        counters[f"updates_{name}"] += args.updates_per_step
        log.add(metrics if name == "forward" else {f"{key}_{name}": value for key, value in metrics.items()})

    def finished() -> bool:
        return counters["env_steps"] >= args.total_timesteps

    if not log.rows:
        evaluate_and_save_policy()
    while not finished() and not stop.received:
        phase = counters["phase"]
        acting = "explore" if args.explore else phase
        action = players[acting].agent.actor.act(obs, streams["policy"])
        check_finite({"action": action}, counters["env_steps"])
        next_obs, reward, _, _, info = world.step(action)
        for name in ("env_steps", "phase_steps", "since_reset"):
            counters[name] += 1
        env_steps = counters["env_steps"]
        done = info["is_success"] and (phase == "forward" or args.algo == "fbrl")
        reset = counters["since_reset"] == args.train_horizon
        switch = done or reset or counters["phase_steps"] == args.switch_steps
        # A switch is no end of the world: targets bootstrap through it, as through a time limit.
        terminal = done or (switch and args.switch_terminal)
        for name in {acting, phase}:  # the task's success is no end of exploration
            players[name].replay.add(obs, action, reward, next_obs, terminal and name == phase)
        if matching and acting != "forward":
            visited.add(obs, action, reward, next_obs, terminal)
        if imagines:
            physical.add(obs[:state_dim], action, reward, next_obs[:state_dim], False)
        log.add({"charts/held": float(world.held(world.state))})
        if phase == "forward":
            counters["task_reward"] += reward
            log.add({"charts/distance": float(world.distance(world.state, world.goal))})
            if switch:
                log.add({"charts/forward_success": float(done)})

        steps = env_steps - args.seed_steps - 1
        if steps >= 0:
            if imagines and steps % args.model_every == 0:
                fit_and_imagine(steps)
            if matching and steps % args.classifier_every == 0 and len(visited):
                update_classifier_once()
            learners = list(players) if args.update_both else [acting]
            if args.explore:  # in turn, so that the two share the updates that the other arms' acting policy gets
                learners = [("explore", "forward")[env_steps % 2]]
            for name in learners:
                update_player(name, players[name])

        if switch:
            counters["phase_steps"] = 0
            if reset or args.algo == "oracle":
                world.reset()
                counters.update(phase="forward", since_reset=0, interventions=counters["interventions"] + 1)
            else:
                if "backward" in players:
                    counters["phase"] = {"forward": "backward", "backward": "forward"}[phase]
                if args.algo == "fbrl" and phase == "forward":
                    world.goal = world.as_goal(world.initial(1, world.np_random)[0])
                elif args.algo == "fbrl" or phase == "forward":
                    world.draw_goal()  # MEDAL's backward policy already carries the next forward goal
        obs = world.observation()

        log.bar.update(1)
        if env_steps % args.eval_every == 0 or finished():
            evaluate_and_save_policy()
        if env_steps % 100 == 0:
            check_finite(log.sums, env_steps)
        if (args.checkpoint_every and env_steps % args.checkpoint_every == 0) or finished():
            save_checkpoint(run_dir, parts, counters, policy_content(players["forward"].agent.actor, env, args, env_steps))

    env_steps = counters["env_steps"]
    if stop.received:
        save_checkpoint(run_dir, parts, counters, policy_content(players["forward"].agent.actor, env, args, env_steps))
    log.bar.close()
    log.writer.close()
    if stop.received:
        print(f"{SCRIPT}: stopped at env step {env_steps}; continue with: python {SCRIPT} --resume {run_dir}", file=sys.stderr)
        raise SystemExit(128 + stop.received)
    print(f"{SCRIPT}: done, the policy is {run_dir / 'policy.pt'}", file=sys.stderr)
    return log.rows[-1]


# ---------------------------------------------------------------------------------------------- offline study
def fit_offline(world: GoalEnv, size: int, args: Args) -> tuple[EnsembleDynamics, dict[str, float]]:
    """An ensemble (with a reward head, if the reward is learned), fitted to `size` uniformly drawn transitions, and its errors: on
    held-out ones, and along true trajectories of random actions from uniform states, after as many steps as each rollout length.
    Every size has as many minibatches; which epoch's weights are kept is decided after each epoch, of which small data have more."""
    seed = int(np.random.SeedSequence([args.seed, size]).generate_state(1)[0])
    torch.manual_seed(seed)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)

    def random_actions(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(-1, 1, (*shape, world.act_dim)))

    state, action = world.uniform(size, rng), random_actions(size)
    next_state = world.transition(state, action)
    reward = world.reward(next_state, world.goals[rng.integers(len(world.goals), size=size)])
    data, learned = Batch(*(x.float() for x in (state, action, reward, next_state, torch.zeros(size)))), args.reward == "learned"
    data = with_reward(data) if learned else data
    dynamics = EnsembleDynamics(world.state_dim + learned, world.act_dim, args)
    optimizer = Adam(dynamics.parameters(), args.model_lr, args.model_weight_decay)
    same = replace(args, model_patience=args.offline_fit)  # as many gradient steps for every size
    fit = fit_dynamics(dynamics, optimizer, compiled(dynamics_update, args), data, torch.ones(size), args.offline_fit, same, generator)
    actions, states = random_actions(max(args.offline_lengths), 1_000), [world.uniform(1_000, rng)]
    for a in actions:
        states.append(world.transition(states[-1], a))
    states, actions = torch.stack(states).float(), actions.float()
    errors = {f"error_{k}_steps": open_loop_error(dynamics, states[: k + 1], actions[:k]) for k in (1, *args.offline_lengths)}
    return dynamics, {"hold_out_mse": fit["model/hold_out_mse"], **errors}


def learn_offline(world: GoalEnv, dynamics, demos: torch.Tensor, start: str, length: int, args: Args, stop: StopSignal) -> dict | None:
    """A policy from imagined transitions alone, and its evaluation in the world; None if it was told to stop."""
    seed = int(np.random.SeedSequence([args.seed, length, args.offline_starts.index(start)]).generate_state(1)[0])
    torch.manual_seed(seed)
    rng, generator, act_dim = np.random.default_rng(seed), torch.Generator().manual_seed(seed), world.act_dim
    obs_dim = world.observation_space.shape[0]
    agent = Agent(obs_dim, act_dim, replace(args, target_entropy=-act_dim / 2 if args.target_entropy is None else args.target_entropy))
    n = args.offline_transitions // (min(args.offline_lengths) if args.equal_rollouts else length)
    imagined = ReplayBuffer(args.rollout_retain * n * length, obs_dim, act_dim, torch.device("cpu"))
    player, update = Player(agent, imagined, imagined, demos), compiled(sac_update, args)
    for u in range(args.offline_updates):
        if u % args.offline_every == 0:
            starts = start_states(start, n, player, world, generator, rng)
            rows = imagine_goals(world, lambda s, a: predict(dynamics, s, a, args, generator), agent.actor, starts, length, False, args,
                                 generator)  # fmt: skip
            imagined.extend(rows)
        batch = imagined.split(imagined.sample((args.batch_size,), generator))
        batch = batch._replace(reward=args.reward_scale * batch.reward)
        check_finite(update(agent, batch, batch.obs, torch.randn(2, args.batch_size, act_dim, generator=generator), args), u)
        target_update(agent, args.tau)
        if stop.received:
            return None
    return evaluate_goals(agent.actor, world, args.eval_episodes, args.eval_horizon, [args.seed, 1, 0])


def study(args: Args) -> list[dict]:
    """The poster's offline study: data set sizes x rollout lengths x start states. Returns the rows of offline.csv, one a cell; a resumed
    study goes on with the cells that are not there."""
    torch.set_num_threads(args.num_threads)
    world, run_dir = make_world(args), make_run_dir(args)
    demos, stop, table = scripted_demos(world, args.num_demos, False, np.random.default_rng([args.seed, 2])), StopSignal(), []
    path = run_dir / "offline.csv"
    if path.exists():
        with open(path) as file:
            table = list(csv.DictReader(file))
    done = {(int(row["size"]), int(row["rollout_length"]), row["start"]) for row in table}
    cells = list(itertools.product(args.offline_sizes, args.offline_lengths, args.offline_starts))
    tqdm.write(f"{SCRIPT}: {args.env_id}, offline, run folder {run_dir}", file=sys.stderr)
    dynamics, fitted = None, None
    for size, length, start in tqdm([cell for cell in cells if cell not in done], unit="policy"):
        if size != fitted:
            (dynamics, errors), fitted = fit_offline(world, size, args), size
        evaluation = learn_offline(world, dynamics, demos, start, length, args, stop)
        if evaluation is None:
            print(f"{SCRIPT}: stopped; continue with: python {SCRIPT} --resume {run_dir}", file=sys.stderr)
            raise SystemExit(128 + stop.received)
        table.append(dict(seed=args.seed, size=size, rollout_length=length, start=start, **evaluation, **errors))
        text = io.StringIO()
        writer = csv.DictWriter(text, list(table[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        content = text.getvalue().encode()
        write_atomically(path, lambda file, content=content: file.write(content))
    print(f"{SCRIPT}: done, the table is {path}", file=sys.stderr)
    return table


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    keep_freed_memory()
    args = parse_args(sys.argv[1:])
    check_args(args)
    if args.eval_only:
        actor = evaluate_policy(args)["actor"]
        deployed = evaluate_goals(actor, make_world(args), args.eval_episodes, args.eval_horizon, [args.seed, 1, 0])
        print("as in progress.csv, all goals in turn: success rate {eval_success_rate:.2f}, at the end of an episode "
              "{eval_success_at_end:.2f}, final distance {eval_final_distance:.2f}".format(**deployed))  # fmt: skip
    elif args.offline:
        study(args)
    else:
        train(args)
