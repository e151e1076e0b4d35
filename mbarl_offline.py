"""The offline study of MBARL's poster: how good are policies that learn from imagined transitions alone?

A dynamics ensemble is fitted to uniformly drawn transitions of a point mass; SAC learns in it from scratch. Each cell
of the study has a number of transitions, a length of rollouts, and their start states: the task's own ("narrow") or
those of demonstrations ("demo"). progress.csv has one row a cell.

    python mbarl_offline.py                                  # 18 policies in 5 to 6 minutes of one core
    python mbarl_offline.py --env-id PointMass2DCoarse-v0    # steps twice as long
    python mbarl_offline.py --run-dir runs/a                 # the same command again goes on with the cells not there

What the poster found and what this finds: docs/mbarl_offline.md
"""

import copy
import csv
import json
import math
import subprocess
import time
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

import envs.point_mass

SCRIPT = "mbarl_offline"
gym.register_envs(envs)  # importing them did it


@dataclass
class Args:
    env_id: str = "PointMass2D-v0"
    """PointMass2D-v0, PointMass2DCoarse-v0, or a world of docs/mbarl.md that has uniform_states(n, rng)"""
    seed: int = 1
    run_dir: str | None = None  # folder of the run; one that holds a run is continued
    eval_episodes: int = 20

    # Study
    sizes: tuple[int, ...] = (1_000, 20_000, 50_000)  # transitions that the model learns from
    lengths: tuple[int, ...] = (20, 35, 50)  # steps of imagined rollouts
    starts: tuple[Literal["narrow", "demo"], ...] = ("narrow", "demo")
    num_demos: int = 10  # scripted
    updates: int = 5_000  # of each policy
    rollout_every: int = 250  # updates between rounds of fresh rollouts
    rollout_transitions: int = 10_000  # of a round, whatever the length
    rollout_retain: int = 4  # rounds that are kept
    reward: Literal["analytic", "learned"] = "learned"
    """of imagined transitions: the task's r(s', g), or a head of the model, which does not see the goal (poster)"""
    snap: bool = True  # move imagined states to the nearest possible one

    # Dynamics ensemble
    model_members: int = 7
    model_elites: int = 5
    model_hidden_sizes: tuple[int, ...] = (64, 64)
    model_lr: float = 1e-3
    model_batch_size: int = 128
    model_batches: int = 1_500  # whatever the size

    # SAC
    hidden_sizes: tuple[int, ...] = (64, 64)
    batch_size: int = 128
    gamma: float = 0.95
    tau: float = 0.02
    actor_lr: float = 1e-3
    critic_lr: float = 1e-3
    alpha_lr: float = 1e-3
    alpha: float = 0.1


# ------------------------------------------------------------------------------------------ starts, transitions
def narrow_starts(world: gym.Env, n: int, seed: list[int]) -> Tensor:
    """Observations [n, obs_dim] of the task's own start states, the goals in turn."""
    states = world.start_states(n, np.random.default_rng(seed))
    goals = world.goals[torch.arange(n) % len(world.goals)]
    return torch.cat([states, goals], -1).float()


def demo_starts(world: gym.Env, n: int, horizon: int, seed: list[int]) -> Tensor:
    """All observations [rows, obs_dim] of n trips of the world's scripted expert to the goals in turn."""
    rng, visited = np.random.default_rng(seed), []
    for trip in range(n):
        state, goal = world.start_states(1, rng)[0], world.goals[trip % len(world.goals)]
        for _ in range(horizon):
            visited.append(torch.cat([state, goal]))
            state = world.transition(state, world.expert(state, goal, rng))
            if world.success(state, goal):
                break
    return torch.stack(visited).float()


class Transitions(NamedTuple):
    """Without terminations: nothing but the time limit ends an episode."""

    obs: Tensor  # [batch, obs_dim]: state and goal
    actions: Tensor  # [batch, act_dim], in [-1, 1]
    rewards: Tensor  # [batch]
    next_obs: Tensor  # [batch, obs_dim]


def join(parts: list[Transitions]) -> Transitions:
    """One after the other."""
    return Transitions(*(torch.cat(column) for column in zip(*parts, strict=True)))


# -------------------------------------------------------------------------------------------------- networks
class ParallelMLP(nn.Module):
    """`n` independent MLPs: [n, batch, sizes[0]], or [batch, sizes[0]] for all of them, -> [n, batch, sizes[-1]]."""

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
        x = x.expand(len(last_weight), -1, -1)
        for weight, bias in hidden:
            x = torch.baddbmm(bias, x, weight)
            if self.layer_norm:
                x = F.layer_norm(x, x.shape[-1:])
            x = self.activation(x)
        return torch.baddbmm(last_bias, x, last_weight)


class Actor(nn.Module):
    """Tanh-Gaussian policy."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        self.net = ParallelMLP(1, [obs_dim, *hidden_sizes, 2 * act_dim])

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation before the tanh, [batch, act_dim] each."""
        mean, log_std = self.net(obs)[0].chunk(2, -1)
        return mean, log_std.clamp(-20, 2)

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [batch, act_dim] and their log-probabilities [batch]."""
        mean, log_std = self(obs)
        noise = torch.randn_like(mean)
        raw = mean + log_std.exp() * noise
        log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob - 2 * (math.log(2) - raw - F.softplus(-2 * raw))  # log(1 - tanh(raw)^2), without overflow
        return raw.tanh(), log_prob.sum(-1)


class Agent:
    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        self.actor = Actor(obs_dim, act_dim, args.hidden_sizes)
        self.critic = ParallelMLP(2, [obs_dim + act_dim, *args.hidden_sizes, 1], layer_norm=True)  # twin Q functions
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))
        self.target_entropy = -act_dim / 2
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), args.actor_lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), args.critic_lr, fused=True)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], args.alpha_lr, fused=True)


class WorldModel(nn.Module):
    """Probabilistic ensemble (PETS, MBPO): each member predicts a Gaussian over the change of the state, and over the
    reward of having arrived there if it is learned."""

    def __init__(self, inputs: Tensor, targets: Tensor, args: Args):
        """For data inputs [n, state_dim + act_dim] and targets [n, outputs]."""
        super().__init__()
        sizes = [inputs.shape[1], *args.model_hidden_sizes, 2 * targets.shape[1]]
        self.net = ParallelMLP(args.model_members, sizes, F.silu)
        for weight in self.net.weights:
            std = 0.5 * weight.shape[1] ** -0.5
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        self.input_mean, self.input_std = inputs.mean(0), inputs.std(0) + 1e-6
        self.elites = torch.arange(args.model_elites)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [members, batch, outputs] of inputs [members or none, batch, state_dim + act_dim]."""
        mean, log_var = self.net((inputs - self.input_mean) / self.input_std).chunk(2, -1)
        log_var = 0.5 - F.softplus(0.5 - log_var)  # smoothly between -10 and 0.5
        return mean, F.softplus(log_var + 10) - 10

    def sample(self, states: Tensor, actions: Tensor) -> Tensor:
        """Outputs [batch, outputs]; each row asks one elite, drawn at random (TS1)."""
        mean, log_var = self(torch.cat([states, actions], -1))
        rows = torch.arange(len(states))
        members = self.elites[torch.randint(len(self.elites), (len(states),))]
        mean, log_var = mean[members, rows], log_var[members, rows]
        return mean + (0.5 * log_var).exp() * torch.randn_like(mean)


# ----------------------------------------------------------------------------------------------------- SAC
def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One gradient step."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


def sac_update(agent: Agent, batch: Transitions, args: Args) -> tuple[Tensor, Tensor]:
    """One gradient step of critics, actor and temperature, and of the target critics. Returns the first two losses."""
    alpha = agent.log_alpha.exp().detach()
    with torch.no_grad():
        next_actions, next_log_prob = agent.actor.sample(batch.next_obs)
        next_q = agent.target_critic(torch.cat([batch.next_obs, next_actions], -1)).squeeze(-1).amin(0)
        target = batch.rewards + args.gamma * (next_q - alpha * next_log_prob)
    q = agent.critic(torch.cat([batch.obs, batch.actions], -1)).squeeze(-1)  # [2, batch]
    critic_loss = (q - target).square().mean(1).sum()
    descend(agent.critic_optimizer, critic_loss)

    actions, log_prob = agent.actor.sample(batch.obs)
    q = agent.critic(torch.cat([batch.obs, actions], -1)).squeeze(-1).amin(0)
    actor_loss = (alpha * log_prob - q).mean()
    descend(agent.actor_optimizer, actor_loss)

    entropy = -log_prob.detach().mean()
    descend(agent.alpha_optimizer, agent.log_alpha * (entropy - agent.target_entropy))
    for target_weight, weight in zip(agent.target_critic.parameters(), agent.critic.parameters(), strict=True):
        target_weight.data.lerp_(weight.data, args.tau)
    return critic_loss, actor_loss


# ----------------------------------------------------------------------------------------------------- model
def train_model(model: WorldModel, inputs: Tensor, targets: Tensor, args: Args) -> float:
    """Fits each member to its own bootstrap of the data, inputs [n, state_dim + act_dim] and targets [n, outputs].

    A fifth is held out: it picks the epoch whose weights are kept, and the elites. Returns the error on it.
    """
    held_out, train = torch.randperm(len(inputs)).tensor_split([len(inputs) // 5])
    bootstrap = train[torch.randint(len(train), (args.model_members, len(train)))]
    epoch = max(1, len(train) // args.model_batch_size)  # minibatches
    optimizer = torch.optim.Adam(model.parameters(), args.model_lr, weight_decay=5e-5, fused=True)
    best_error = torch.full((args.model_members,), math.inf)
    for step in range(1, args.model_batches + 1):
        rows = bootstrap[:, torch.randint(len(train), (args.model_batch_size,))]  # [members, batch]
        mean, log_var = model(inputs[rows])
        loss = (mean - targets[rows]).square() * (-log_var).exp() + log_var  # negative log-likelihood, Gaussian
        descend(optimizer, loss.mean((1, 2)).sum())
        if step % epoch == 0 or step == args.model_batches:
            with torch.no_grad():
                mean, _ = model(inputs[held_out])
            error = (mean - targets[held_out]).square().mean((1, 2))  # [members]
            if (error < 0.99 * best_error).any():
                best_error = torch.minimum(error, best_error)
                best_weights = copy.deepcopy(model.state_dict())
    model.load_state_dict(best_weights)
    model.elites = best_error.argsort()[: args.model_elites]
    return best_error.mean().item()


@torch.no_grad()
def open_loop_errors(model: WorldModel, world: gym.Env, rng: np.random.Generator, args: Args) -> dict[str, float]:
    """Root mean square error of the elites' mean after 1 step and after each length, along 1,000 trajectories of random
    actions from uniform states, in standard deviations over the true states until then."""
    states = [world.uniform_states(1_000, rng).float()]
    predicted, errors = states[0], {}
    for k in range(1, max(args.lengths) + 1):
        actions = torch.empty(1_000, world.action_space.shape[0]).uniform_(-1, 1)
        states.append(world.transition(states[-1], actions))
        mean, _ = model(torch.cat([predicted, actions], -1))
        predicted = predicted + mean[model.elites].mean(0)[:, : predicted.shape[1]]
        if k in (1, *args.lengths):
            error = (predicted - states[-1]) / torch.cat(states).std(0)
            errors[f"error_{k}_steps"] = error.square().mean().sqrt().item()
    return errors


def learn_model(world: gym.Env, size: int, args: Args) -> tuple[WorldModel, dict[str, float]]:
    """A model of `size` uniformly drawn transitions, and its errors."""
    rng = np.random.default_rng([args.seed, size])
    states = world.uniform_states(size, rng).float()
    actions = torch.empty(size, world.action_space.shape[0]).uniform_(-1, 1)
    next_states = world.transition(states, actions)
    inputs, targets = torch.cat([states, actions], -1), next_states - states
    if args.reward == "learned":
        rewards = world.reward(next_states, world.goals[0].float())
        targets = torch.cat([targets, rewards[:, None]], -1)
    model = WorldModel(inputs, targets, args)
    hold_out_mse = train_model(model, inputs, targets, args)
    return model, dict(hold_out_mse=hold_out_mse) | open_loop_errors(model, world, rng, args)


# ----------------------------------------------------------------------------------------------------- policy
@torch.no_grad()
def roll_out(model: WorldModel, world: gym.Env, actor: Actor, obs: Tensor, length: int, args: Args) -> Transitions:
    """Imagined transitions [length * n] of the policy from obs [n, obs_dim], whose goals stay."""
    steps = []
    for _ in range(length):
        states, goals = obs.tensor_split([-world.goals.shape[1]], -1)
        actions, _ = actor.sample(obs)
        predicted = model.sample(states, actions)
        next_states = states + predicted[:, : states.shape[1]]
        if args.snap:
            next_states = world.project(next_states)
        rewards = predicted[:, -1] if args.reward == "learned" else world.reward(next_states, goals)
        next_obs = torch.cat([next_states, goals], -1)
        steps.append(Transitions(obs, actions, rewards, next_obs))
        obs = next_obs
    return join(steps)


def learn_policy(world: gym.Env, model: WorldModel, starts: Tensor, length: int, args: Args) -> Actor:
    """SAC on imagined transitions alone, which bootstrap at the end of their rollouts. starts [n, obs_dim]."""
    agent = Agent(starts.shape[1], world.action_space.shape[0], args)
    rounds = []
    for step in range(args.updates):
        if step % args.rollout_every == 0:
            rows = torch.randint(len(starts), (args.rollout_transitions // length,))
            rounds.append(roll_out(model, world, agent.actor, starts[rows], length, args))
            imagined = join(rounds[-args.rollout_retain :])
        rows = torch.randint(len(imagined.obs), (args.batch_size,))
        batch = Transitions(*(column[rows] for column in imagined))
        losses = sac_update(agent, batch, args)
    if not all(loss.isfinite() for loss in losses):
        raise SystemExit(f"{SCRIPT}.py: losses of critics and actor are not finite: {losses}")
    return agent.actor


@torch.no_grad()
def evaluate_policy(actor: Actor, world: gym.Env, obs: Tensor, horizon: int) -> dict[str, float]:
    """Deterministic episodes of the true reward from obs [n, obs_dim], all at once. Success is success at any step."""
    states, goals = obs.tensor_split([-world.goals.shape[1]], -1)
    rewards, successes = [], []
    for _ in range(horizon):
        mean, _ = actor(torch.cat([states, goals], -1))
        states = world.transition(states, mean.tanh())
        rewards.append(world.reward(states, goals))
        successes.append(world.success(states, goals))
    returns = torch.stack(rewards).sum(0)
    return dict(
        eval_return_mean=returns.mean().item(),
        eval_return_std=returns.std(correction=0).item(),
        eval_length_mean=horizon,
        eval_success_rate=torch.stack(successes).any(0).float().mean().item(),
        eval_final_distance=world.distance(states, goals).mean().item(),
        eval_success_at_end=successes[-1].float().mean().item(),
    )


# ----------------------------------------------------------------------------------------------------- study
def open_study(args: Args) -> tuple[Path, list[dict]]:
    """The run's folder with args.json (settings, versions, commit), and the rows that progress.csv has already."""
    run_dir = Path(args.run_dir or f"runs/{args.env_id.replace(':', '-')}__{SCRIPT}__{args.seed}__{int(time.time())}")
    run_dir.mkdir(parents=True, exist_ok=True)
    file, table = run_dir / "args.json", run_dir / "progress.csv"
    settings = json.loads(json.dumps(asdict(args)))
    before = json.loads(file.read_text())["args"] if file.exists() else settings
    for name, new in settings.items():
        old = before.get(name, new)
        if new != old and name != "run_dir":
            raise SystemExit(f"{SCRIPT}.py: --{name.replace('_', '-')} was {old} in {run_dir}, now it is {new}")
    status, commit = subprocess.getstatusoutput("git describe --always --dirty --abbrev=40 --exclude='*'")
    about = dict(script=SCRIPT, args=settings, commit=None if status else commit, torch=torch.__version__)
    file.write_text(json.dumps(about, indent=2))
    return run_dir, list(csv.DictReader(table.read_text().splitlines())) if table.exists() else []


def study(args: Args) -> list[dict]:
    """All cells. Returns the rows of progress.csv."""
    torch.set_num_threads(1)  # run several seeds side by side instead
    torch.set_flush_denormal(True)  # weight decay drives unused weights towards 0, where arithmetic is slow
    env = gym.make(args.env_id)
    world, horizon = env.unwrapped, env.spec.max_episode_steps
    if not hasattr(world, "uniform_states"):
        raise SystemExit(f"{SCRIPT}.py: {args.env_id} has no uniform_states(n, rng); take PointMass2D-v0")
    narrow = narrow_starts(world, 10_000, [args.seed, 3])
    starts = dict(narrow=narrow, demo=demo_starts(world, args.num_demos, horizon, [args.seed, 2]))
    eval_starts = narrow_starts(world, args.eval_episodes, [args.seed, 1])
    run_dir, rows = open_study(args)
    done = [(int(row["size"]), int(row["rollout_length"]), row["start"]) for row in rows]
    for size in args.sizes:
        torch.manual_seed(hash((args.seed, size)) % 2**31)  # whatever ran before
        model, errors = learn_model(world, size, args)
        for length, start in tqdm(list(product(args.lengths, args.starts)), f"{size:,} transitions", unit="policy"):
            if (size, length, start) in done:
                continue
            torch.manual_seed(hash((args.seed, size, length, start == "demo")) % 2**31)
            actor = learn_policy(world, model, starts[start], length, args)
            cell = dict(seed=args.seed, size=size, rollout_length=length, start=start)
            rows.append(cell | evaluate_policy(actor, world, eval_starts, horizon) | errors)
            with open(run_dir / "progress.csv", "a", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                if len(rows) == 1:
                    writer.writeheader()
                writer.writerow(rows[-1])
    return rows


if __name__ == "__main__":
    study(tyro.cli(Args, description=__doc__))
