"""VINS: value iteration with negative sampling (Luo, Xu, Ma, "Learning Self-Correctable Policies and Value Functions
from Demonstrations with Negative Sampling", arXiv 1907.05634).

Imitation from a few demonstrations without interaction. A value function learns the steps to the goal along them, and
from perturbed states beside them ("negative samples") to fall with the distance from them. So uphill is back to the
demonstrations, and also towards the goal. The policy tries random actions around a cloned one, predicts where a learned
model takes each, and does the one whose next state has the highest value: small errors are corrected, not compounded.

    python vins.py --env-id FetchPickAndPlace-v4                  # 100 demonstrations, three minutes of one core
    python vins.py --env-id FetchPickAndPlace-v4 --algo bc        # the cloned policy alone; also vins-no-ns, ...
    python vins.py --env-id FetchReach-v4 --num-demos 10 --run-dir runs/a    # again: continues an interrupted run
    python vins.py --env-id FetchPush-v4 --rl-after 20_000 --total-timesteps 40_000    # VINS+RL

Measured after 10,000 updates: Push 67% (BC 58%), PickAndPlace 54% (53%); without negative samples 28, 26%. docs/vins.md
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
import gymnasium_robotics
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "vins"
gym.register_envs(gymnasium_robotics)  # importing it did


@dataclass
class Args:
    env_id: str = "FetchPickAndPlace-v4"  # or FetchReach-v4, FetchPush-v4; others need a line in LAYOUTS
    algo: Literal["vins", "bc", "vins-no-ns", "vins-no-bc", "vins-oracle-model", "vins-oracle-model-no-bc"] = "vins"
    """bc: the cloned policy; no-ns: no negative samples; no-bc: actions from the whole box; oracle: the simulator"""
    seed: int = 1
    total_timesteps: int = 10_000  # gradient steps, of VINS and RL together
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    track: bool = False  # to Weights & Biases, into the project that WANDB_PROJECT names
    run_dir: str | None = None  # folder; one that holds a run is continued (a larger --total-timesteps lengthens it)
    checkpoint_every: int = 5_000  # gradient steps
    eval_every: int = 10_000
    eval_episodes: int = 500
    eval_envs: int = 25  # that step side by side

    # Demonstrations
    demos: str | None = None  # .npz file of expert trajectories; default demos/<env_id>.npz
    num_demos: int = 100

    # Value function
    hidden_sizes: tuple[int, ...] = (256, 256)  # of value function and cloned policy
    batch_size: int = 64  # transitions
    interpolations: int = 6  # states between s and s' for each transition
    tau: float = 0.005
    value_lr: float = 3e-4
    negative_weight: float = 0.3  # mu, of the loss of negative samples
    negative_slope: float = 20.0  # lambda, steps that values fall for each standard deviation of distance
    negative_scale: float = 0.7  # size of the perturbations, in the demonstrations' standard deviations

    # Model, cloned policy, induced policy
    model_hidden_sizes: tuple[int, ...] = (256, 256)
    model_lr: float = 1e-3
    actor_lr: float = 3e-4
    num_candidates: int = 100  # k, actions among which the value function chooses
    radius: float = 0.1  # alpha, how far they are from the cloned action

    # VINS+RL
    rl_after: int | None = None  # from this gradient step on option 2 acts and collects; 0: random networks
    rl_every: int = 200  # gradient steps between collections
    rl_episodes: int = 10  # of a collection


# ------------------------------------------------------------------------------ environment and demonstrations
class Layout(NamedTuple):
    """Columns of the flat observation: achieved goal 0 to 2, desired goal 3 to 5, observation from 6 on."""

    state: tuple[int, ...]  # what the model predicts; the value function sees it and the goal
    perturbed: tuple[tuple[int, ...], ...]  # an entry for each negative sample: the columns it moves
    goal: tuple[int, ...] = (3, 4, 5)


GRIPPER, OBJECT, FINGERS = (6, 7, 8), (9, 10, 11), (15, 16)
LAYOUTS = {
    "FetchReach": Layout(GRIPPER, (GRIPPER, GRIPPER)),
    "FetchPush": Layout(GRIPPER + OBJECT, (GRIPPER, GRIPPER)),
    "FetchPickAndPlace": Layout(GRIPPER + OBJECT + FINGERS, (GRIPPER, FINGERS)),
}


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


class Clone(nn.Module):
    """The cloned policy."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        self.normalise = Normaliser(obs_dim)
        self.net = EnsembleMLP(1, [obs_dim, *hidden_sizes, act_dim])

    def forward(self, obs: Tensor) -> Tensor:
        """Actions [batch, act_dim] at obs [batch, obs_dim]."""
        return self.net(self.normalise(obs)[None])[0].tanh()


class GoalValue(nn.Module):
    """Minus the number of steps to the goal."""

    def __init__(self, layout: Layout, hidden_sizes: tuple[int, ...]):
        super().__init__()
        self.columns = [*layout.state, *layout.goal]
        self.normalise = Normaliser(len(self.columns))
        self.net = EnsembleMLP(1, [len(self.columns), *hidden_sizes, 1], layer_norm=True)

    def forward(self, obs: Tensor) -> Tensor:
        """Values [...] of obs [..., obs_dim]."""
        inputs = self.normalise(obs[..., self.columns])
        return self.net(inputs.reshape(1, -1, len(self.columns))).view(obs.shape[:-1])


class Model(nn.Module):
    """Predicts the change of the state in one step, in standard deviations of the demonstrations' changes."""

    def __init__(self, layout: Layout, act_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        self.columns = list(layout.state)
        self.normalise_state, self.normalise_change = Normaliser(len(self.columns)), Normaliser(len(self.columns))
        self.net = EnsembleMLP(1, [len(self.columns) + act_dim, *hidden_sizes, len(self.columns)])

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Changes [batch, columns] at obs [batch, obs_dim] and actions [batch, act_dim]."""
        return self.net(torch.cat([self.normalise_state(obs[:, self.columns]), actions], -1)[None])[0]

    def predict(self, obs: Tensor, actions: Tensor) -> Tensor:
        """obs [batch, obs_dim] after the actions. Columns that are no part of the state stay as they were."""
        next_obs = obs.clone()
        next_obs[:, self.columns] += self(obs, actions) * self.normalise_change.std + self.normalise_change.mean
        return next_obs


class Actor(nn.Module):
    """The induced policy: the action, of candidates around the cloned one, to whose next state V gives most."""

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        layout: Layout,
        hidden_sizes: tuple[int, ...],
        model_hidden_sizes: tuple[int, ...],
        num_candidates: int,
        radius: float,
        around_clone: bool,
    ):
        """radius 0 is the cloned policy; without around_clone, candidates are around the action 0."""
        super().__init__()
        self.clone = Clone(obs_dim, act_dim, hidden_sizes)
        self.value = GoalValue(Layout(*layout), hidden_sizes)
        self.model = Model(Layout(*layout), act_dim, model_hidden_sizes)
        self.radius, self.around_clone = radius, around_clone
        self.register_buffer("noise", torch.rand(num_candidates, act_dim) * 2 - 1)  # kept: evaluation is deterministic

    def candidates(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Actions [batch, candidates, act_dim] at obs [batch, obs_dim], for noise [candidates, act_dim] in [-1, 1]."""
        base = self.clone(obs)[:, None]
        base = base if self.around_clone else torch.zeros_like(base)
        return (base + self.radius * noise).clamp(-1, 1)

    @torch.no_grad()
    def forward(self, obs: Tensor, deterministic: bool = True, simulators: list[gym.Env] | None = None) -> Tensor:
        """Actions [batch, act_dim] at obs [batch, obs_dim]. Simulators, one a row, take the model's place."""
        if self.radius == 0:
            return self.clone(obs)
        noise = self.noise if deterministic else torch.rand_like(self.noise) * 2 - 1
        actions = self.candidates(obs, noise)
        if simulators is None:
            next_obs = self.model.predict(obs.repeat_interleave(len(noise), 0), actions.flatten(0, 1))
        else:
            next_obs = torch.stack([simulate(env, row) for env, row in zip(simulators, actions, strict=True)])
        best = self.value(next_obs.view(len(obs), len(noise), -1)).argmax(1)
        return actions[torch.arange(len(obs)), best]

    def act(self, obs: np.ndarray, deterministic: bool = True) -> np.ndarray:
        """Action [act_dim] at an observation [obs_dim], with the learned model."""
        return self(torch.as_tensor(obs, device=self.noise.device)[None], deterministic)[0].cpu().numpy()


def simulate(env: gym.Env, actions: Tensor) -> Tensor:
    """What the environment would show after each of the actions [n, act_dim]: [n, obs_dim]. It stays as it was."""
    world, kept, outcomes = env.unwrapped, copy.copy(env.unwrapped.data), []
    for action in actions.cpu().numpy():
        obs, *_ = world.step(action)
        outcomes.append(gym.spaces.flatten(world.observation_space, obs))
        mujoco.mj_copyData(world.data, world.model, kept)
    return torch.as_tensor(np.array(outcomes, np.float32), device=actions.device)


class Agent(nn.Module):
    def __init__(self, sizes: tuple, expert: Batch, args: Args):
        """All inputs, and the model's outputs, are standardised by the demonstrations."""
        super().__init__()
        options = dict(bc=(0.0, True)) | dict.fromkeys(("vins-no-bc", "vins-oracle-model-no-bc"), (1.0, False))
        self.actor = Actor(*sizes, *options.get(args.algo, (args.radius, True)))  # radius, around the cloned action
        self.to(args.device)
        model, value = self.actor.model, self.actor.value
        self.actor.clone.normalise.fit(expert.obs)
        value.normalise.fit(expert.obs[:, value.columns])
        model.normalise_state.fit(expert.obs[:, model.columns])
        model.normalise_change.fit((expert.next_obs - expert.obs)[:, model.columns])
        self.target_value = copy.deepcopy(value).requires_grad_(False)
        self.value_optimizer = torch.optim.Adam(self.actor.value.parameters(), args.value_lr)
        self.model_optimizer = torch.optim.Adam(self.actor.model.parameters(), args.model_lr, weight_decay=1e-5)
        self.clone_optimizer = torch.optim.Adam(self.actor.clone.parameters(), args.actor_lr)


# --------------------------------------------------------------------------------------- losses and updates
def td_loss(value: GoalValue, target_value: GoalValue, batch: Batch, mix: Tensor) -> Tensor:
    """E (r + V_target(s') - V(s))^2 with r = -1 and value 0 at the goal (L_td), at states between s and s'.

    These are mix s + (1 - mix) s', mix steps before s', for mix [interpolations, batch] in [0, 1].
    """
    with torch.no_grad():
        next_values = target_value(batch.next_obs) * (1 - batch.terminations)
    between = batch.next_obs + mix[..., None] * (batch.obs - batch.next_obs)
    return (next_values - mix - value(between)).square().mean()


def perturb(obs: Tensor, std: Tensor, noise: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Negative samples [samples, batch, obs_dim] of obs [batch, obs_dim], and how far they are [samples, batch].

    std [obs_dim] is the demonstrations'; noise [samples, batch, obs_dim] is 0 in columns that stay as they are.
    """
    shift = scale * noise
    return obs + shift * std, shift.norm(dim=-1)


def negative_loss(value: GoalValue, target: GoalValue, obs: Tensor, std: Tensor, noise: Tensor, args: Args) -> Tensor:
    """E (V_target(s) - lambda |s - s~| - V(s~))^2 at perturbed states s~ (L_ns)."""
    perturbed, distances = perturb(obs, std, noise, args.negative_scale)
    with torch.no_grad():
        targets = target(obs) - args.negative_slope * distances
    return (targets - value(perturbed)).square().mean()


def one_step_loss(model: Model, batch: Batch) -> Tensor:
    """E |M(s, a) - s'|, the norm and not its square, in standard deviations of the changes."""
    changes = (batch.next_obs - batch.obs)[:, model.columns]
    errors = model(batch.obs, batch.actions) - model.normalise_change(changes)
    return (errors.square().sum(-1) + 1e-12).sqrt().mean()


def clone_loss(clone: Clone, batch: Batch) -> Tensor:
    """E |pi(s) - a|^2, the mean over dimensions."""
    return F.mse_loss(clone(batch.obs), batch.actions)


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source"""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def adam_step(optimizer: torch.optim.Adam, loss: Tensor) -> Tensor:
    """One gradient step. Returns the loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def vins_update(agent: Agent, batch: Batch, masks: Tensor | None, args: Args) -> dict[str, Tensor]:
    """One gradient step on L_td + mu L_ns, and of the target. Negative samples move the columns of masks [samples,
    obs_dim]; there are none without masks."""
    value, std = agent.actor.value, agent.actor.clone.normalise.std
    mix = torch.rand(args.interpolations, len(batch.obs), device=args.device)
    losses = {"losses/td": td_loss(value, agent.target_value, batch, mix)}
    loss = losses["losses/td"]
    if masks is not None:
        noise = torch.randn(len(masks), *batch.obs.shape, device=args.device) * masks[:, None]
        losses["losses/negative"] = negative_loss(value, agent.target_value, batch.obs, std, noise, args)
        loss = loss + args.negative_weight * losses["losses/negative"]
    adam_step(agent.value_optimizer, loss)
    polyak(agent.target_value, value, args.tau)
    return {name: loss.detach() for name, loss in losses.items()}


# ------------------------------------------------------------------------------------- episodes and evaluation
class Episodes(NamedTuple):
    """Arrays [steps, episodes, ...]; all episodes last until the time limit."""

    obs: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    next_obs: np.ndarray
    successes: np.ndarray


def run_episodes(actor: Actor, envs: list[gym.Env], seeds: list[int], oracle: bool, deterministic: bool) -> Episodes:
    """An episode a seed, side by side in the environments."""
    resets = [env.reset(seed=seed) for env, seed in zip(envs, seeds, strict=True)]
    obs, steps = np.stack([obs for obs, _ in resets]), []
    for _ in range(envs[0].spec.max_episode_steps):
        batch = torch.as_tensor(obs, device=actor.noise.device)
        actions = actor(batch, deterministic, envs if oracle else None).cpu().numpy()
        outcomes = [env.step(action) for env, action in zip(envs, actions, strict=True)]
        next_obs, rewards, _, _, infos = zip(*outcomes, strict=True)
        successes = [float(info["is_success"]) for info in infos]
        steps.append((obs, actions, rewards, np.stack(next_obs), successes))
        obs = steps[-1][3]
    return Episodes(*(np.array(column, np.float32) for column in zip(*steps, strict=True)))


def evaluate_side_by_side(actor: Actor, envs: list[gym.Env], episodes: int, seed: int, oracle: bool) -> dict:
    """Deterministic episodes. Success is success at any step. Draws nothing from the training run's generator."""
    groups = []
    for first in range(seed, seed + episodes, len(envs)):
        seeds = list(range(first, min(first + len(envs), seed + episodes)))
        groups.append(run_episodes(actor, envs[: len(seeds)], seeds, oracle, deterministic=True))
    returns = np.concatenate([group.rewards for group in groups], 1).sum(0, dtype=float)
    successes = np.concatenate([group.successes for group in groups], 1)
    result = dict(eval_return_mean=returns.mean(), eval_return_std=returns.std(), eval_length_mean=len(successes))
    return result | dict(eval_success_rate=successes.max(0).mean(), eval_success_at_end=successes[-1].mean())


def until_success(episodes: Episodes, device: str) -> Batch:
    """Transitions of episodes that end where they first succeed."""
    before = np.cumsum(episodes.successes, 0) - episodes.successes == 0  # [steps, episodes]
    columns = episodes.obs, episodes.actions, np.zeros_like(episodes.rewards), episodes.next_obs, episodes.successes
    return Batch(*(torch.as_tensor(column[before], device=device) for column in columns))


def log_updates(run_dir: Path, rows: list[dict], writer: SummaryWriter) -> None:
    """Writes progress.csv, and its last row to TensorBoard over gradient steps."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    (run_dir / "progress.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    for name, value in rows[-1].items():
        writer.add_scalar(name.replace("eval_", "eval/"), value, rows[-1]["updates"])


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
    """VINS. Returns the rows of progress.csv."""
    torch.set_num_threads(1)  # run several seeds side by side instead
    torch.set_flush_denormal(True)  # numbers next to 0 would be slow
    torch.manual_seed(args.seed)
    if args.rl_after is not None and args.algo in ("bc", "vins-oracle-model", "vins-oracle-model-no-bc"):
        raise SystemExit(f"{SCRIPT}.py: --rl-after needs learned values and a learned model, not --algo {args.algo}")
    layout = LAYOUTS.get(args.env_id.split("-v")[0])
    if layout is None:
        raise SystemExit(f"{SCRIPT}.py: what are state and goal of {args.env_id}? See LAYOUTS")
    envs = [make_env(args.env_id) for _ in range(max(args.eval_envs, args.rl_episodes))]
    obs_dim, act_dim = envs[0].observation_space.shape[0], envs[0].action_space.shape[0]
    demos = args.demos or f"demos/{args.env_id.replace('/', '-')}.npz"
    expert, ends, returns = load_demos(demos, envs[0], args.num_demos, 1, args.device)
    expert_return = float(returns.mean())
    run_dir, state = open_run(args)
    sizes = (obs_dim, act_dim, tuple(layout), args.hidden_sizes, args.model_hidden_sizes, args.num_candidates)
    agent = state.get("agent") or Agent(sizes, expert, args)
    buffer, env_steps = state.get("buffer", expert), state.get("env_steps", 0)
    rows, metrics, start_step = state.get("rows", []), state.get("metrics", {}), state.get("step", 0)
    start_time = time.time() - state.get("wall_time", 0)
    masks = [[float(column in columns) for column in range(obs_dim)] for columns in layout.perturbed]
    masks = torch.tensor(masks, device=args.device)  # [samples, obs_dim]
    actor, oracle = agent.actor, "oracle" in args.algo
    writer = SummaryWriter(str(run_dir), purge_step=start_step)

    bar = tqdm(range(start_step, args.total_timesteps + 1), initial=start_step, total=args.total_timesteps)
    for step in bar:
        interactive = args.rl_after is not None and step >= args.rl_after
        if interactive:
            actor.radius, actor.around_clone = 1.0, False  # option 2, also in the evaluation that comes now
        if step % args.eval_every == 0 or step == args.total_timesteps:
            row = dict(env_steps=env_steps, updates=step, wall_time_s=round(time.time() - start_time, 1))
            row |= evaluate_side_by_side(actor, envs, args.eval_episodes, args.seed * 1_000_000 + step, oracle)
            row |= dict(expert_return=expert_return) | {name: float(value) for name, value in metrics.items()}
            with torch.no_grad():
                row["value_at_starts"] = actor.value(expert.obs[[0, *ends[:-1]]]).mean().item()
            rows.append(row)
            log_updates(run_dir, rows, writer)
            policy = dict(actor=actor.state_dict(), sizes=(*sizes, actor.radius, actor.around_clone))
            torch.save(policy | dict(script=SCRIPT, env_id=args.env_id), run_dir / "policy.pt")
            bar.set_postfix_str(f"success {row['eval_success_rate']:.0%}")
        if step == args.total_timesteps:
            break

        # VINS+RL: act in the real environment, with new candidates at each step
        if interactive and (step - args.rl_after) % args.rl_every == 0:
            seeds = [hash((args.seed, step, episode)) % 2**31 for episode in range(args.rl_episodes)]
            episodes = run_episodes(actor, envs[: args.rl_episodes], seeds, oracle, deterministic=False)
            columns = zip(buffer, until_success(episodes, args.device), strict=True)
            buffer = Batch(*map(torch.cat, columns))
            env_steps += episodes.rewards.size

        # Learn: the cloned policy, the value function with negative samples, the model
        batch = sample(buffer, args.batch_size)
        if not interactive:
            metrics["losses/clone"] = adam_step(agent.clone_optimizer, clone_loss(actor.clone, batch))
        if args.algo != "bc":
            negative = args.algo != "vins-no-ns" and not interactive  # bad trajectories are real then
            metrics |= vins_update(agent, batch, masks if negative else None, args)
            metrics["losses/model"] = adam_step(agent.model_optimizer, one_step_loss(actor.model, batch))

        if (step + 1) % args.checkpoint_every == 0:
            if not all(map(math.isfinite, metrics.values())):
                raise SystemExit(f"{SCRIPT}.py: a loss is not finite at step {step}: {metrics}")
            state = dict(agent=agent, buffer=buffer, env_steps=env_steps, rows=rows, metrics=metrics, step=step + 1)
            save_checkpoint(run_dir, state | dict(wall_time=time.time() - start_time))

    writer.close()
    return rows


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
