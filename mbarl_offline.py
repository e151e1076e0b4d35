"""The offline study of MBARL's poster: how good are policies that learn from imagined transitions alone?

A dynamics ensemble is fitted to uniformly drawn transitions of a point mass; SAC learns in it from scratch. Each cell
of the study has a number of transitions, a length of rollouts, and their start states: the task's own ("narrow") or
those of demonstrations ("demo"). progress.csv has one row a cell.

    python mbarl_offline.py                                  # 18 policies in 2 to 5 minutes of one core with --compile
    python mbarl_offline.py --env-id PointMass2DCoarse-v0    # steps twice as long
    python mbarl_offline.py --run-dir runs/a                 # the same command again goes on with the cells not there

What the poster found and what this finds: docs/mbarl_offline.md
"""

import copy
import csv
import json
import math
import os
import subprocess
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
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
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    compile: bool = False  # compile the updates with torch.compile (about a minute at the start; needs a C++ compiler)
    bf16: bool = False
    track: bool = False  # to Weights & Biases
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
    model_patience: int = 1_500  # epochs without improvement that stop a fit: never

    # SAC
    hidden_sizes: tuple[int, ...] = (64, 64)
    batch_size: int = 128
    gamma: float = 0.95
    tau: float = 0.02
    actor_lr: float = 1e-3
    critic_lr: float = 1e-3
    alpha_lr: float = 1e-3
    alpha: float = 0.1


# ------------------------------------------------------------------------------------- demonstrations and batches
class Batch(NamedTuple):
    obs: Tensor  # [batch, obs_dim]
    actions: Tensor  # [batch, act_dim], in [-1, 1]
    rewards: Tensor  # [batch]
    next_obs: Tensor  # [batch, obs_dim]
    terminations: Tensor  # [batch], 1 where the episode ended; 0 at a time limit


def scripted_demos(world: gym.Env, n: int, seed: int, device: str) -> tuple[Batch, Batch]:
    """D_f and D_b: n trips of the world's expert from a start to the goals in turn, and n back. Success ends each."""
    rng, directions = np.random.default_rng([seed, 2]), ([], [])
    for i in range(n):
        state, home = world.start_states(2, rng)
        for goal, trips in zip((world.goals[i % len(world.goals)], world.as_goal(home)), directions, strict=True):
            done, first = False, len(trips)
            while not done:
                if len(trips) - first == 10_000:
                    raise SystemExit(f"{SCRIPT}.py: the expert does not reach {goal.tolist()} in 10,000 steps")
                action = world.expert(state, goal, rng).float()
                next_state = world.transition(state, action.to(state))
                reward, done = world.reward(next_state, goal), world.success(next_state, goal)
                trips.append(Batch(torch.cat([state, goal]), action, reward, torch.cat([next_state, goal]), done))
                state = next_state
    return tuple(Batch(*(torch.stack(x).float().to(device) for x in zip(*trips, strict=True))) for trips in directions)


def concat(*batches: Batch, dim: int = 0) -> Batch:
    return Batch(*(torch.cat(fields, dim) for fields in zip(*batches, strict=True)))


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
        mean = torch.stack([x.mean(0) for x in sources]).mean(0)
        std = torch.stack([(x - mean).square().mean(0) for x in sources]).mean(0).sqrt()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std < 1e-6, 1.0, std))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


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
    """torch.optim.Adam in plain tensor operations, so that torch.compile makes one graph of a whole update."""

    def __init__(self, params, lr: float, weight_decay: float = 0.0):
        self.params, self.lr, self.weight_decay = list(params), lr, weight_decay
        self.mean = [torch.zeros_like(p) for p in self.params]
        self.square = [torch.zeros_like(p) for p in self.params]
        self.t = torch.zeros((), device=self.params[0].device)
        self.scale = torch.zeros_like(self.t)

    @torch.no_grad()
    def step(self, grads) -> None:
        if self.weight_decay:
            grads = torch._foreach_add(grads, self.params, alpha=self.weight_decay)
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
        self.critic = Critic(obs_dim, act_dim, args.hidden_sizes, layer_norm=True)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))
        self.target_entropy = -act_dim / 2
        self.to(args.device)
        self.actor_optimizer = Adam(self.actor.parameters(), args.actor_lr)
        self.critic_optimizer = Adam(self.critic.parameters(), args.critic_lr)
        self.alpha_optimizer = Adam([self.log_alpha], args.alpha_lr)


class EnsembleDynamics(nn.Module):
    """Probabilistic ensemble (PETS, MBPO): each member predicts a Gaussian over next_obs - obs."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.net = EnsembleMLP(args.model_members, [obs_dim + act_dim, *args.model_hidden_sizes, 2 * obs_dim], F.silu)
        for weight in self.net.weights:
            std = 0.5 * weight.shape[1] ** -0.5
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        self.normalise = Normaliser(obs_dim + act_dim)
        self.register_buffer("elites", torch.arange(args.model_elites))
        self.to(args.device)
        self.optimizer = Adam(self.net.parameters(), args.model_lr, weight_decay=5e-5)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [members, batch, obs_dim] of inputs [members, batch, obs_dim + act_dim]."""
        mean, log_var = self.net(self.normalise(inputs)).chunk(2, -1)
        log_var = 0.5 - F.softplus(0.5 - log_var)  # smoothly between -10 and 0.5
        return mean, F.softplus(log_var + 10) - 10

    def elites_forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """As forward, of the elites alone: [elites, batch, ...]."""
        params = {name: param[self.elites] for name, param in self.named_parameters()}
        return torch.func.functional_call(self, params, (inputs,))

    @torch.no_grad()
    def sample(self, obs: Tensor, actions: Tensor, noise: bool) -> Tensor:
        """next_obs [batch, obs_dim]; the elites share the rows out at random, in equal parts (TS1)."""
        n, k = len(obs), len(self.elites)
        order = torch.randperm(n, device=obs.device)
        shares = order[torch.arange(-(-n // k) * k, device=obs.device) % n].view(k, -(-n // k))
        mean, log_var = self.elites_forward(torch.cat([obs, actions], -1)[shares])
        delta = mean + (0.5 * log_var).exp() * torch.randn_like(mean) if noise else mean
        return obs + torch.empty_like(obs).index_copy_(0, order, delta.flatten(0, 1)[:n])


# ---------------------------------------------------------------------------------------------------- losses
def critic_loss(agent: Agent, batch: Batch, noise: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """Soft Bellman error of both critics (eqs. 5 and 6), and the mean Q value."""
    with torch.autocast(batch.obs.device.type, torch.bfloat16, enabled=args.bf16):
        with torch.no_grad():
            next_actions, next_log_prob = agent.actor.sample(batch.next_obs, noise)
            next_q = agent.target_critic(batch.next_obs, next_actions).amin(0) - agent.log_alpha.exp() * next_log_prob
            target = batch.rewards + args.gamma * (1 - batch.terminations) * next_q
        q = agent.critic(batch.obs, batch.actions)
    return (q - target).square().mean(1).sum(), q.detach().mean()


def actor_loss(agent: Agent, batch: Batch, noise: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """alpha log pi(a|s) - Q(s, a) (eq. 9), and the policy's entropy."""
    with torch.autocast(batch.obs.device.type, torch.bfloat16, enabled=args.bf16):
        actions, log_prob = agent.actor.sample(batch.obs, noise)
        q = agent.critic(batch.obs, actions).amin(0)
    return (agent.log_alpha.exp().detach() * log_prob - q).mean(), -log_prob.detach().mean()


def dynamics_loss(dynamics: EnsembleDynamics, inputs: Tensor, targets: Tensor, args: Args) -> Tensor:
    """Gaussian negative log-likelihood, summed over members."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=args.bf16):
        mean, log_var = dynamics(inputs)
    return ((mean - targets).square() * (-log_var).exp() + log_var).mean((1, 2)).sum()


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source"""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def sac_update(agent: Agent, batch: Batch, noise: Tensor, args: Args) -> dict[str, Tensor]:
    """One gradient step of critics, actor and temperature, and of the target critics.

    noise [2, batch, act_dim] is standard normal: for the target's and for the actor loss's actions. Returns metrics.
    """
    q_loss, q = critic_loss(agent, batch, noise[0], args)
    agent.critic_optimizer.step(torch.autograd.grad(q_loss, agent.critic_optimizer.params))
    pi_loss, entropy = actor_loss(agent, batch, noise[1], args)
    agent.actor_optimizer.step(torch.autograd.grad(pi_loss, agent.actor_optimizer.params))
    agent.alpha_optimizer.step([entropy - agent.target_entropy])  # eq. 18, without the factor alpha
    polyak(agent.target_critic, agent.critic, args.tau)
    metrics = dict(critic=q_loss, actor=pi_loss, q=q, entropy=entropy, alpha=agent.log_alpha.exp())
    return {f"losses/{name}": value.detach() for name, value in metrics.items()}


def dynamics_update(dynamics: EnsembleDynamics, inputs: Tensor, targets: Tensor, args: Args) -> None:
    """One gradient step of all members, on inputs and targets [members, batch, ...]."""
    loss = dynamics_loss(dynamics, inputs, targets, args)
    dynamics.optimizer.step(torch.autograd.grad(loss, dynamics.optimizer.params))


def compiled(function):
    torch._dynamo.config.trace_autograd_ops = True  # losses, gradients and optimiser steps in one graph
    return torch.compile(function, dynamic=False)


# ----------------------------------------------------------------------------------------------------- model
def fit_dynamics(dynamics: EnsembleDynamics, update, data: Batch, weights: Tensor, limit: int, args: Args) -> float:
    """Fits each member to its own bootstrap of the data, drawn in proportion to weights [n].

    A fifth is held out: it stops the fit, picks the epoch whose weights are kept, ranks the members. The fit also ends
    after `limit` minibatches. Returns the held-out error.
    """
    inputs, targets = torch.cat([data.obs, data.actions], -1), data.next_obs - data.obs
    dynamics.normalise.fit(inputs)
    order = torch.randperm(len(inputs), device=inputs.device)
    held_out, train = order[: len(order) // 5], order[len(order) // 5 :]
    draws = torch.multinomial(weights[train].expand(args.model_members, -1), len(train), replacement=True)

    @torch.no_grad()
    def validate() -> Tensor:  # [members]
        mean, _ = dynamics(inputs[held_out].expand(args.model_members, -1, -1))
        errors = (mean - targets[held_out]).square().mean(-1)
        return (errors * weights[held_out]).sum(-1) / weights[held_out].sum()

    best_error, best_net = validate(), dynamics.net.state_dict()  # no copy: the trained weights, if none are better
    batches = epochs_since_best = 0
    while batches < limit and epochs_since_best < args.model_patience:
        for columns in torch.randperm(len(train), device=inputs.device).split(args.model_batch_size):
            if len(columns) < args.model_batch_size or batches == limit:
                break
            rows = train[draws[:, columns]]  # [members, batch]
            update(dynamics, inputs[rows], targets[rows], args)
            batches += 1
        error = validate()
        epochs_since_best += 1
        if (error < 0.99 * best_error).any():
            best_error, epochs_since_best = torch.minimum(error, best_error), 0
            best_net = copy.deepcopy(dynamics.net.state_dict())
    dynamics.net.load_state_dict(best_net)
    dynamics.elites.copy_(best_error.argsort()[: args.model_elites])
    return best_error.mean().item()


def physical(data: Batch, state_dim: int, reward_head: bool) -> Batch:
    """Transitions without their goals. For a reward head the reward is one more entry of the state, from 0 to r."""
    obs, next_obs = data.obs[:, :state_dim], data.next_obs[:, :state_dim]
    if reward_head:
        obs, next_obs = F.pad(obs, (0, 1)), torch.cat([next_obs, data.rewards[:, None]], -1)
    return data._replace(obs=obs, next_obs=next_obs)


@torch.no_grad()
def imagine_goals(
    dynamics: EnsembleDynamics, world: gym.Env, actor: Actor, obs: Tensor, length: int, success_ends: bool, args: Args
) -> Batch:
    """Rolls the policy out in the model from obs [n, obs_dim], whose goals stay. Rewards are the forward policy's."""
    state_dim, act_dim = obs.shape[1] - world.goals.shape[1], world.action_space.shape[0]
    learned, steps = args.reward == "learned", []
    for _ in range(length):
        states, goals = obs[:, :state_dim], obs[:, state_dim:]
        actions, _ = actor.sample(obs, torch.randn(len(obs), act_dim, device=obs.device))
        predicted = dynamics.sample(F.pad(states, (0, int(learned))), actions, noise=True)
        next_states = predicted[:, :state_dim]
        next_states = world.project(next_states) if args.snap else next_states
        rewards = predicted[:, -1] if learned else world.reward(next_states, goals)
        next_obs, done = torch.cat([next_states, goals], -1), world.success(next_states, goals).bool() & success_ends
        finite = next_obs.isfinite().all(-1) & rewards.isfinite()
        steps.append(Batch(*(column[finite] for column in (obs, actions, rewards, next_obs, done.float()))))
        obs = next_obs[finite & ~done]
    return concat(*steps)


@torch.no_grad()
def open_loop_error(dynamics: EnsembleDynamics, states: Tensor, actions: Tensor) -> float:
    """Root mean square error at the end of true trajectories, states [k + 1, n, state_dim] and actions [k, n, act_dim],
    in standard deviations over the states."""
    predicted, state_dim = states[0], states.shape[-1]
    head = len(dynamics.normalise.mean) - state_dim - actions.shape[-1]  # 1 if it predicts rewards
    for action in actions:
        inputs = torch.cat([F.pad(predicted, (0, head)), action], -1)
        change, _ = dynamics.elites_forward(inputs.expand(len(dynamics.elites), -1, -1))
        predicted = predicted + change.mean(0)[:, :state_dim]
    error = (predicted - states[-1]) / states.flatten(0, 1).std(0)
    return error.square().mean().sqrt().item()


# ------------------------------------------------------------------------------------- evaluation and logging
@torch.no_grad()
def evaluate_goals(actor: Actor, world: gym.Env, episodes: int, horizon: int, seed: list[int]) -> dict[str, float]:
    """Deterministic episodes of the true reward from the task's starts, the goals in turn, all in lock step. Success is
    success at any step. Draws no random numbers from the training run's generator."""
    device, states = actor.net.weights[0].device, world.start_states(episodes, np.random.default_rng(seed))
    goals = world.goals[torch.arange(episodes) % len(world.goals)]
    returns, success = torch.zeros(episodes, dtype=states.dtype), torch.zeros(episodes, dtype=torch.bool)
    for _ in range(horizon):
        mean, _ = actor(torch.cat([states, goals], -1).float().to(device))
        states = world.transition(states, mean.tanh().cpu().to(states))
        returns += world.reward(states, goals)
        success |= world.success(states, goals)
    result = dict(return_mean=returns.mean(), return_std=returns.std(correction=0), length_mean=horizon)
    result |= dict(success_rate=success.double().mean(), final_distance=world.distance(states, goals).mean())
    result |= dict(success_at_end=world.success(states, goals).double().mean())
    return {f"eval_{name}": float(value) for name, value in result.items()}


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
        if new != old and name != "run_dir" and not (name == "total_timesteps" and new > old):
            raise SystemExit(f"{SCRIPT}.py: {flag} was {old} in {run_dir}, now it is {new}")
    status, commit = subprocess.getstatusoutput("git describe --always --dirty --abbrev=40 --exclude='*'")
    about = dict(script=SCRIPT, args=settings, commit=None if status else commit)
    about |= {name: version(name) for name in ("torch", "gymnasium", "mujoco", "numpy")}
    file.write_text(json.dumps(about, indent=2))
    if not (run_dir / "checkpoint.pt").exists():
        return run_dir, {}
    state = torch.load(run_dir / "checkpoint.pt", weights_only=False)
    torch.set_rng_state(state["rng"])
    torch.cuda.set_rng_state_all(state["cuda_rng"])
    return run_dir, state


# ----------------------------------------------------------------------------------------------------- study
def fit(world: gym.Env, size: int, update, args: Args) -> tuple[EnsembleDynamics, dict[str, float]]:
    """A model of `size` uniformly drawn transitions, and its errors, on held-out ones and along random actions."""
    rng, act_dim, goal = np.random.default_rng([args.seed, size, 5]), world.action_space.shape[0], world.goals[0]
    torch.manual_seed(int(rng.integers(2**31)))
    states, actions = world.uniform_states(size, rng), torch.from_numpy(rng.uniform(-1, 1, (size, act_dim)))
    next_states = world.transition(states, actions)
    rewards = world.reward(next_states, goal)
    data = Batch(states, actions, rewards, next_states, torch.zeros(size))
    data = Batch(*(column.float().to(args.device) for column in data))
    learned = args.reward == "learned"
    data = physical(data, states.shape[1], learned)
    dynamics = EnsembleDynamics(states.shape[1] + learned, act_dim, args)
    hold_out = fit_dynamics(dynamics, update, data, torch.ones_like(data.rewards), args.model_batches, args)

    way, forces = [world.uniform_states(1_000, rng)], rng.uniform(-1, 1, (max(args.lengths), 1_000, act_dim))
    forces = torch.from_numpy(forces)
    for force in forces:
        way.append(world.transition(way[-1], force))
    way, forces = torch.stack(way).float().to(args.device), forces.float().to(args.device)
    errors = {f"error_{k}_steps": open_loop_error(dynamics, way[: k + 1], forces[:k]) for k in (1, *args.lengths)}
    return dynamics, dict(hold_out_mse=hold_out) | errors


def learn(
    world: gym.Env, dynamics: EnsembleDynamics, demos: Batch, start: str, length: int, update, args: Args
) -> Agent:
    """SAC on imagined transitions alone, which bootstrap at the end of their rollouts."""
    obs_dim, act_dim, rounds = demos.obs.shape[1], demos.actions.shape[1], []
    rng = np.random.default_rng([args.seed, length, 3 + (start == "demo")])
    torch.manual_seed(int(rng.integers(2**31)))
    agent, n = Agent(obs_dim, act_dim, args), args.rollout_transitions // length
    for step in range(args.updates):
        if step % args.rollout_every == 0:
            starts = sample(demos, n).obs
            if start == "narrow":
                goals = world.goals[rng.integers(len(world.goals), size=n)]
                starts = torch.cat([world.start_states(n, rng), goals], -1).float().to(args.device)
            rounds.append(imagine_goals(dynamics, world, agent.actor, starts, length, False, args))
            imagined = concat(*rounds[-args.rollout_retain :])
        noise = torch.randn(2, args.batch_size, act_dim, device=args.device)
        losses = update(agent, sample(imagined, args.batch_size), noise, args)
    if not all(math.isfinite(value) for value in losses.values()):
        raise SystemExit(f"{SCRIPT}.py: a loss is not finite: {losses}")
    return agent


def study(args: Args) -> list[dict]:
    """All cells. Returns the rows of progress.csv."""
    torch.set_num_threads(1)  # run several seeds side by side instead
    torch.set_flush_denormal(True)  # weight decay drives unused weights towards 0, where arithmetic is slow
    env = gym.make(args.env_id)
    world, horizon = env.unwrapped, env.spec.max_episode_steps
    if not hasattr(world, "uniform_states"):
        raise SystemExit(f"{SCRIPT}.py: {args.env_id} has no uniform_states(n, rng); take PointMass2D-v0")
    demos, _ = scripted_demos(world, args.num_demos, args.seed, args.device)
    update, update_dynamics = sac_update, dynamics_update
    if args.compile:
        update, update_dynamics = compiled(update), compiled(update_dynamics)
    run_dir, _ = open_run(args)
    table, rows = run_dir / "progress.csv", []
    if table.exists():
        with open(table) as file:
            rows = list(csv.DictReader(file))
    done = [(int(row["size"]), int(row["rollout_length"]), row["start"]) for row in rows]
    cells = [cell for cell in product(args.sizes, args.lengths, args.starts) if cell not in done]
    fitted = None
    for size, length, start in tqdm(cells, unit="policy"):
        if size != fitted:
            fitted, (dynamics, errors) = size, fit(world, size, update_dynamics, args)
        agent = learn(world, dynamics, demos, start, length, update, args)
        evaluation = evaluate_goals(agent.actor, world, args.eval_episodes, horizon, [args.seed, 1])
        cell = dict(seed=args.seed, size=size, rollout_length=length, start=start)
        rows.append(cell | evaluation | errors)
        with open(run_dir / "progress.tmp", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        os.replace(run_dir / "progress.tmp", table)
    return rows


if __name__ == "__main__":
    study(tyro.cli(Args, description=__doc__))
