"""How fast the shared blocks are, beside stable-baselines3, SBX (JAX) and code written the usual way.

    pip install -r requirements.txt -r benchmark/requirements.txt
    python benchmark/speed.py --list
    python benchmark/speed.py --only "replay"

Every contender is a process of its own with one thread, pinned to one core where the system can. Contenders of a table take
turns of about a fifth of a second, 40 times (whole scripts: longer turns, fewer), so that what else the machine does hits all
of them; the numbers are medians. All PyTorch contenders, ours and others, get the two process settings that our scripts make
(freed memory is kept, denormals are flushed), unless their name says otherwise.
With --write the tables go to benchmark/results/speed/<device>.json and, where docs/speed.md has `<!-- speed <device> -->`, to
what stands from there to `<!-- end -->`.
"""

import argparse
import copy
import itertools
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SIZES = {"Hopper": (11, 3), "Ant": (27, 8)}
BATCH = 256
Turn = Callable[[], int]  # ends a contender's turn and waits for the next; returns how often to do its work


# ---------------------------------------------------------------------------------------------- SAC gradient step
def sac_agent(robot: str, width: int, mode: str):
    """Our agent, its update function, and a filled replay buffer."""
    import torch

    import sac

    args = sac.Args(hidden_sizes=(width, width), bf16="bf16" in mode, compile=mode != "eager")
    agent = sac.Agent(*SIZES[robot], args).to(device())
    buffer = sac.ReplayBuffer(10_000, *SIZES[robot], device())
    rows = torch.randn(10_000, sum(buffer.widths))
    rows[:, SIZES[robot][0] : sum(SIZES[robot])].tanh_()
    rows[:, -1] = 0
    buffer.extend(rows)
    return sac, args, agent, sac.compiled(sac.sac_update, args), buffer


def sac_ours(turn: Turn, robot: str, width: int, mode: str, kept: bool = True) -> None:
    import torch

    sac, args, agent, update, buffer = sac_agent(robot, width, mode)
    generator = torch.Generator(device()).manual_seed(1)

    def step() -> None:
        batch = buffer.split(buffer.sample((BATCH,), generator))
        noise = torch.randn(2, BATCH, SIZES[robot][1], generator=generator, device=device())
        update(agent, batch, batch.obs, noise, args)
        sac.target_update(agent, args.tau)

    repeat(turn, step)


class FixedEnv:
    """Builds an environment of a robot's sizes that does nothing, for libraries that want one."""

    def __new__(cls, robot: str):
        import gymnasium as gym
        import numpy as np

        class Env(gym.Env):
            observation_space = gym.spaces.Box(-np.inf, np.inf, (SIZES[robot][0],), np.float32)
            action_space = gym.spaces.Box(-1, 1, (SIZES[robot][1],), np.float32)

            def reset(self, seed=None, options=None):
                return np.zeros(SIZES[robot][0], np.float32), {}

            def step(self, action):
                return np.zeros(SIZES[robot][0], np.float32), 0.0, False, False, {}

        return Env()


def sac_library(turn: Turn, robot: str, width: int, library: str) -> None:
    """One call of train(gradient_steps=1) of stable-baselines3 or sbx: what they do after an environment step."""
    import numpy as np

    if library == "sbx":
        from sbx import SAC
    else:
        from stable_baselines3 import SAC
    kwargs = {} if library == "sbx" else dict(device=device())
    model = SAC("MlpPolicy", FixedEnv(robot), policy_kwargs=dict(net_arch=[width, width]), buffer_size=10_000, verbose=0, **kwargs)
    model._setup_learn(10_000)
    rng = np.random.default_rng(1)
    for _ in range(10_000):
        obs, next_obs = rng.standard_normal((2, 1, SIZES[robot][0]), np.float32)
        action = np.tanh(rng.standard_normal((1, SIZES[robot][1]), np.float32))
        model.replay_buffer.add(obs, next_obs, action, rng.standard_normal(1, np.float32), np.zeros(1), [{}])
    repeat(turn, lambda: model.train(gradient_steps=1, batch_size=BATCH))


def usual_agent(obs_dim: int, act_dim: int, args):
    """Actor, two critics, their targets and Adam optimisers, as most single-file implementations have them."""
    import torch
    import torch.nn as nn
    import torch.nn.functional as F

    def mlp(sizes: list[int], layer_norm: bool = False) -> nn.Sequential:
        layers = []
        for fan_in, fan_out in itertools.pairwise(sizes[:-1]):
            layers += [nn.Linear(fan_in, fan_out), *([nn.LayerNorm(fan_out, elementwise_affine=False)] if layer_norm else []), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))

    class Agent:
        def __init__(self):
            self.net = mlp([obs_dim, *args.hidden_sizes, 2 * act_dim]).to(device())
            sizes = [obs_dim + act_dim, *args.hidden_sizes, 1]
            self.q1, self.q2 = (mlp(sizes, args.critic_layer_norm).to(device()) for _ in range(2))
            self.q1_target, self.q2_target = copy.deepcopy(self.q1), copy.deepcopy(self.q2)
            self.log_alpha = torch.full((1,), math.log(args.alpha), requires_grad=True, device=device())
            self.q_optimizer = torch.optim.Adam([*self.q1.parameters(), *self.q2.parameters()], args.critic_lr)
            self.actor_optimizer = torch.optim.Adam(self.net.parameters(), args.actor_lr)
            self.alpha_optimizer = torch.optim.Adam([self.log_alpha], args.alpha_lr)

        def act(self, obs):
            mean, log_std = self.net(obs).chunk(2, -1)
            normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
            raw = normal.rsample()
            action = torch.tanh(raw)
            log_prob = normal.log_prob(raw) - torch.log(1 - action.pow(2) + 1e-6)
            return action, log_prob.sum(1, keepdim=True)

        def update(self, obs, action, next_obs, reward, done, cloned=None) -> None:
            alpha = self.log_alpha.exp().detach()
            with torch.no_grad():
                next_action, next_log_prob = self.act(next_obs)
                x = torch.cat([next_obs, next_action], 1)
                next_q = torch.min(self.q1_target(x), self.q2_target(x)) - alpha * next_log_prob
                target = reward + 0.99 * (1 - done) * next_q
            x = torch.cat([obs, action], 1)
            q_loss = F.mse_loss(self.q1(x), target) + F.mse_loss(self.q2(x), target)
            self.q_optimizer.zero_grad()
            q_loss.backward()
            self.q_optimizer.step()

            new_action, log_prob = self.act(obs)
            x = torch.cat([obs, new_action], 1)
            actor_loss = (alpha * log_prob - torch.min(self.q1(x), self.q2(x))).mean()
            if cloned is not None and args.bc_weight:  # hyper.py's cloning term
                mean, _ = self.net(cloned.obs).chunk(2, -1)
                actor_loss = actor_loss + args.bc_weight * F.mse_loss(torch.tanh(mean), cloned.action)
            self.actor_optimizer.zero_grad()
            actor_loss.backward()
            self.actor_optimizer.step()

            alpha_loss = (-self.log_alpha.exp() * (log_prob.detach() - act_dim)).mean()
            self.alpha_optimizer.zero_grad()
            alpha_loss.backward()
            self.alpha_optimizer.step()
            for net, target_net in ((self.q1, self.q1_target), (self.q2, self.q2_target)):
                for p, target_p in zip(net.parameters(), target_net.parameters(), strict=True):
                    target_p.data.copy_(0.005 * p.data + 0.995 * target_p.data)

    return Agent()


def sac_usual(turn: Turn, robot: str, width: int, kept: bool = True) -> None:
    import numpy as np
    import torch

    import sac

    (obs_dim, act_dim), rng = SIZES[robot], np.random.default_rng(1)
    agent = usual_agent(obs_dim, act_dim, sac.Args(hidden_sizes=(width, width)))
    arrays = [rng.standard_normal((10_000, n), np.float32) for n in (obs_dim, act_dim, obs_dim, 1)] + [np.zeros((10_000, 1), np.float32)]
    arrays[1] = np.tanh(arrays[1])

    def step() -> None:
        index = rng.integers(0, 10_000, BATCH)
        agent.update(*(torch.as_tensor(array[index]).to(device()) for array in arrays))

    repeat(turn, step)


def products_alone(layers: list[tuple]) -> list[tuple]:
    """Factors and result of each matrix product, in the forms that StackedLinear and its gradients choose.

    A layer is (networks, inputs, outputs, how often forward, gradients of inputs, gradients of weights, whether in bfloat16).
    """
    import torch

    products = []
    for n, fan_in, fan_out, forward, inputs, weights, bf16 in layers:
        dtype = torch.bfloat16 if bf16 else torch.float32
        x, w, y = (torch.randn(n, *shape, device=device(), dtype=dtype) for shape in ((BATCH, fan_in), (fan_in, fan_out), (BATCH, fan_out)))
        if fan_out < 16:  # all transposed
            products += [(w.mT, x.mT, torch.empty_like(y.mT))] * forward
            products += [(w, y.mT.contiguous(), torch.empty_like(x.mT))] * inputs
            products += [(y.mT.contiguous(), x, torch.empty_like(w.mT))] * weights
        else:
            products += [(x, w, torch.empty_like(y))] * forward
            products += [(y, w.mT, torch.empty_like(x))] * inputs
            products += [(x.mT, y, torch.empty_like(w))] * weights
    return products


def multiply(turn: Turn, products: list[tuple]) -> None:
    import torch

    def step() -> None:
        for a, b, out in products:
            torch.bmm(a, b, out=out)

    repeat(turn, step)


def sac_products(turn: Turn, robot: str, width: int, bf16: bool) -> None:
    """Critics: target, value, actor's loss; gradients of weights once, of inputs twice (once for the first layer)."""
    (obs_dim, act_dim), products = SIZES[robot], []
    critic, actor = [obs_dim + act_dim, width, width], [obs_dim, width, width, 2 * act_dim]
    for layer in range(3):
        if layer < 2:  # the critics' single outputs are no matrix products
            products.append((2, critic[layer], critic[layer + 1], 3, 2 if layer else 1, 1, bf16))
        products.append((1, actor[layer], actor[layer + 1], 2, 1 if layer else 0, 1, bf16 and layer < 2))
    multiply(turn, products_alone(products))


def ensemble_products(turn: Turn, robot: str, width: int, bf16: bool) -> None:
    sizes = [sum(SIZES[robot]), *[width] * 4, 2 * SIZES[robot][0]]
    layers = enumerate(itertools.pairwise(sizes))
    multiply(
        turn, products_alone([(7, fan_in, fan_out, 1, 1 if layer else 0, 1, bf16 and layer < 4) for layer, (fan_in, fan_out) in layers])
    )


# ---------------------------------------------------------------------------------------------- ensemble, rollouts, replay
def usual_ensemble(obs_dim: int, act_dim: int, args):
    """Seven separate networks, each with its own Adam."""
    import torch
    import torch.nn as nn

    def member() -> nn.Sequential:
        sizes = [obs_dim + act_dim, *args.model_hidden_sizes]
        layers = [part for i in range(len(sizes) - 1) for part in (nn.Linear(sizes[i], sizes[i + 1]), nn.SiLU())]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], 2 * obs_dim)).to(device())

    members = [member() for _ in range(args.model_members)]
    optimizers = [torch.optim.Adam(net.parameters(), args.model_lr, weight_decay=args.model_weight_decay) for net in members]
    return members, optimizers


def usual_gaussian(net, inputs):
    import torch.nn.functional as F

    mean, log_var = net(inputs).chunk(2, -1)
    log_var = 0.5 - F.softplus(0.5 - log_var)
    return mean, -10 + F.softplus(log_var + 10)


def usual_ensemble_update(members, optimizers, inputs, targets):
    """One minibatch for every member, one after the other."""
    for i, (net, optimizer) in enumerate(zip(members, optimizers, strict=True)):
        mean, log_var = usual_gaussian(net, inputs[i])
        loss = ((mean - targets[i]).pow(2) * (-log_var).exp() + log_var).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.detach()


def hyper_args(width: int, mode: str = "eager"):
    import hyper

    return hyper, hyper.Args(model_hidden_sizes=(width,) * 4, bf16="bf16" in mode)


def ensemble_ours(turn: Turn, robot: str, width: int, mode: str) -> None:
    import torch

    hyper, args = hyper_args(width, mode)
    dynamics = hyper.EnsembleDynamics(*SIZES[robot], args).to(device())
    optimizer = hyper.Adam(dynamics.parameters(), args.model_lr, args.model_weight_decay).to(device())
    inputs = torch.randn(7, BATCH, sum(SIZES[robot]), device=device())
    targets = torch.randn(7, BATCH, SIZES[robot][0], device=device())
    update = hyper.compiled(hyper.dynamics_update, replace(args, compile=mode != "eager"))
    repeat(turn, lambda: update(dynamics, optimizer, inputs, targets, args))


def ensemble_usual(turn: Turn, robot: str, width: int) -> None:
    import torch

    members, optimizers = usual_ensemble(*SIZES[robot], hyper_args(width)[1])
    inputs, targets = torch.randn(7, BATCH, sum(SIZES[robot]), device=device()), torch.randn(7, BATCH, SIZES[robot][0], device=device())
    repeat(turn, lambda: usual_ensemble_update(members, optimizers, inputs, targets))


def maze_args(width: int, mode: str = "eager"):
    import sra_offline

    return sra_offline, sra_offline.Args(
        model_members=7, model_hidden_sizes=(width,) * 2, weight_decay=0.0, bf16="bf16" in mode, compile=mode != "eager"
    )


def deltas_ours(turn: Turn, width: int, mode: str) -> None:
    """sra_offline.py's reverse model of a maze (4 + 2 inputs, 4 outputs), Adam."""
    import torch

    sra, args = maze_args(width, mode)
    model = sra.DeltaEnsemble(4, 2, args).to(device())
    optimizer = sra.Adam(model.net.parameters(), args.model_lr).to(device())
    inputs, delta = torch.randn(7, BATCH, 6, device=device()), torch.randn(7, BATCH, 4, device=device())
    update = sra.compiled(sra.delta_update, args)

    def step() -> None:
        with torch.autocast(device(), torch.bfloat16, enabled=args.bf16, cache_enabled=False):
            update(model, optimizer, inputs, delta)

    repeat(turn, step)


def usual_deltas(args):
    """Seven separate networks, each with its own Adam."""
    import torch
    import torch.nn as nn

    def member() -> nn.Sequential:
        first, second = args.model_hidden_sizes
        return nn.Sequential(nn.Linear(6, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 4)).to(device())

    members = [member() for _ in range(args.model_members)]
    return members, [torch.optim.Adam(net.parameters(), args.model_lr) for net in members]


def usual_deltas_update(members, optimizers, inputs, delta) -> None:
    """One minibatch for every member, one after the other, its gradient's norm clipped to 1."""
    import torch
    import torch.nn.functional as F

    for i, (net, optimizer) in enumerate(zip(members, optimizers, strict=True)):
        loss = F.mse_loss(net(inputs[i]), delta[i])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()


def deltas_usual(turn: Turn, width: int) -> None:
    import torch

    members, optimizers = usual_deltas(maze_args(width)[1])
    inputs, delta = torch.randn(7, BATCH, 6, device=device()), torch.randn(7, BATCH, 4, device=device())
    repeat(turn, lambda: usual_deltas_update(members, optimizers, inputs, delta))


def rollouts_ours(turn: Turn, robot: str, width: int) -> None:
    """10,000 trajectories of one step."""
    import torch

    hyper, args = hyper_args(width)
    dynamics = hyper.EnsembleDynamics(*SIZES[robot], args).to(device())
    actor, generator = hyper.Actor(*SIZES[robot], (128, 128)).to(device()), torch.Generator(device()).manual_seed(1)
    start = torch.randn(10_000, SIZES[robot][0], device=device())

    def never(obs, action, next_obs):
        return hyper.never_terminates(next_obs)

    repeat(turn, lambda: hyper.imagine(dynamics, actor, start, 1, never, args, generator))


def rollouts_usual(turn: Turn, robot: str, width: int) -> None:
    """The same with every elite evaluated on every row and one picked for each."""
    import torch

    members, _ = usual_ensemble(*SIZES[robot], hyper_args(width)[1])
    agent, start = usual_agent(*SIZES[robot], hyper_args(width)[1]), torch.randn(10_000, SIZES[robot][0], device=device())

    @torch.no_grad()
    def step() -> None:
        action, _ = agent.act(start)
        inputs = torch.cat([start, action], 1)
        mean, log_var = map(torch.stack, zip(*(usual_gaussian(net, inputs) for net in members[:5]), strict=True))
        sampled = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        picked = torch.randint(5, (len(start),), device=device())
        next_obs = start + sampled[picked, torch.arange(len(start), device=device())]
        torch.cat([start, action, next_obs, torch.zeros(len(start), 2, device=device())], 1)

    repeat(turn, step)


def replay_ours(turn: Turn, robot: str) -> None:
    import torch

    _, _, _, _, buffer = sac_agent(robot, 64, "eager")
    generator = torch.Generator(device()).manual_seed(1)
    repeat(turn, lambda: buffer.split(buffer.sample((BATCH,), generator)))


def replay_library(turn: Turn, robot: str) -> None:
    import numpy as np
    from stable_baselines3.common.buffers import ReplayBuffer

    env, rng = FixedEnv(robot), np.random.default_rng(1)
    buffer = ReplayBuffer(10_000, env.observation_space, env.action_space, device())
    for _ in range(10_000):
        obs, action = rng.standard_normal((1, SIZES[robot][0]), np.float32), rng.standard_normal((1, SIZES[robot][1]), np.float32)
        buffer.add(obs, obs, action, np.zeros(1), np.zeros(1), [{}])
    repeat(turn, lambda: buffer.sample(BATCH))


# ---------------------------------------------------------------------------------------------- whole scripts
def whole_sac(turn: Turn, robot: str, mode: str) -> None:
    """500 env steps of sac.py with a gradient step each; evaluation left out."""
    import sac

    scratch = os.environ["SPEED_SCRATCH"] + f"/{os.getpid()}"

    def evaluate(*_, **__) -> dict:
        turn()
        return dict(eval_return_mean=0.0, eval_return_std=0.0, eval_success_rate=math.nan, eval_length_mean=0.0)

    sac.evaluate = evaluate
    args = sac.Args(env_id=f"{robot}-v4", learning_starts=1_000, eval_every=500, run_dir=scratch, checkpoint_every=0)
    args = replace(args, compile=mode != "eager", bf16="bf16" in mode, total_timesteps=10**6, device=device())
    sac.train(args)


def whole_library(turn: Turn, robot: str, library: str) -> None:
    """The same with learn()."""
    import gymnasium as gym

    if library == "sbx":
        from sbx import SAC
    else:
        from stable_baselines3 import SAC
    env = gym.make(f"{robot}-v4", **(dict(use_contact_forces=False) if robot == "Ant" else {}))
    model = SAC("MlpPolicy", env, learning_starts=1_000, verbose=0, **({} if library == "sbx" else dict(device=device())))
    model.learn(2_000)
    while True:
        turn()
        model.learn(500, reset_num_timesteps=False)


PARTS = {
    "policy's gradient steps": ["sac_update", "target_update"], "model's minibatches": ["dynamics_update"],
    "rest of the model's fit": ["fit_dynamics"], "imagined rollouts": ["imagine"], "cost": ["cost_update"],
    "relabelling": ["Cost.reward"], "replay sampling": ["ReplayBuffer.sample"],
    "environment": ["ResumableEnv.step", "ResumableEnv.reset"], "acting": ["Actor.act"],
}  # fmt: skip


def whole_hyper(turn: Turn, robot: str, mode: str) -> None:
    """250 env steps of hyper.py at the default preset, with one model fit, evaluation left out; reports the seconds of its parts.

    mode "usual": the same loop with separate critics and ensemble members, and torch.optim (replay, cost and rollout stay ours).
    """
    import torch

    import hyper

    spent, running = dict.fromkeys([*PARTS, "rest"], 0.0), ["rest"]
    last = time.perf_counter()

    def switch(to: str | None) -> None:
        nonlocal last
        if device() == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        spent[running[-1]] += now - last
        last = now
        running.append(to) if to else running.pop()

    def timed(part: str, function: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            switch(part)
            try:
                return function(*args, **kwargs)
            finally:
                switch(None)

        return wrapped

    def evaluate(*_, **__) -> dict:
        nonlocal last
        switch("rest")
        turn(dict(spent))
        spent.update(dict.fromkeys(spent, 0.0))
        last = time.perf_counter()
        running.pop()
        return dict(eval_return_mean=0.0, eval_return_std=0.0, eval_success_rate=math.nan, eval_length_mean=0.0)

    if mode == "usual":
        write_the_usual_way(hyper)
    hyper.evaluate = evaluate
    real_compile, part_of = torch.compile, {name: part for part, names in PARTS.items() for name in names}
    if "compile" in mode:
        torch.compile = lambda f, **kwargs: timed(part_of[f.__name__], real_compile(f, **kwargs))
    for name, part in part_of.items():
        owner, _, attribute = name.rpartition(".")
        owner = getattr(hyper, owner) if owner else hyper
        if not ("compile" in mode and attribute in ("sac_update", "dynamics_update", "cost_update")):
            setattr(owner, attribute, timed(part, getattr(owner, attribute)))
    flags = f"--env-id {robot}-v4 --checkpoint-every 0 --total-timesteps 1000000 --eval-every 250".split()
    flags += ["--run-dir", os.environ["SPEED_SCRATCH"] + f"/{os.getpid()}"]
    flags += ["--no-normalise-obs"]  # written the usual way, actor and critics have no normaliser
    flags += [flag for flag in ("--compile", "--bf16") if flag[2:] in mode]
    hyper.train(hyper.parse_args([*flags, "--device", device()]))


def write_the_usual_way(hyper) -> None:
    """Replaces hyper.py's networks, optimisers and update functions by the usual ones."""
    import torch
    import torch.nn as nn

    class Agent(nn.Module):
        def __init__(self, obs_dim, act_dim, args):
            super().__init__()
            self.usual = usual_agent(obs_dim, act_dim, args)
            self.actor = Actor(self.usual, act_dim)
            self.actor_optimizer = self.critic_optimizer = Lr()

    class Lr:
        lr = torch.zeros(())

    class Actor(nn.Module):
        def __init__(self, usual, act_dim):
            super().__init__()
            self.body, self.net = usual.net, nn.Module()
            self.net.output = nn.Module()
            self.net.output.bias = torch.zeros(2 * act_dim)
            self.usual = [usual]

        def __deepcopy__(self, memo):
            other = copy.copy(self)
            other.__dict__ = dict(self.__dict__, _modules=dict(self._modules, body=copy.deepcopy(self.body)))
            return other

        def forward(self, obs, noise):
            action, log_prob = self.usual[0].act(obs)
            return action, log_prob[:, 0]

        def act(self, obs, generator=None):
            with torch.no_grad():
                mean, log_std = self.body(torch.as_tensor(obs, dtype=torch.float32, device=device())[None]).chunk(2, -1)
                if generator is not None:
                    mean = mean + log_std.clamp(-20, 2).exp() * torch.randn_like(mean)
                return mean.tanh()[0].cpu().numpy()

    class EnsembleDynamics(hyper.EnsembleDynamics):
        def __init__(self, obs_dim, act_dim, args):
            super().__init__(obs_dim, act_dim, args)
            self.members, self.optimizers = usual_ensemble(obs_dim, act_dim, args)
            self.net = nn.ModuleList(self.members)

        def forward(self, inputs):
            inputs = (inputs - self.input_mean) / self.input_std
            return tuple(map(torch.stack, zip(*(usual_gaussian(net, x) for net, x in zip(self.members, inputs, strict=True)), strict=True)))

        def forward_elites(self, inputs):
            inputs, members = (inputs - self.input_mean) / self.input_std, [self.members[i] for i in self.elites.tolist()]
            return tuple(map(torch.stack, zip(*(usual_gaussian(net, x) for net, x in zip(members, inputs, strict=True)), strict=True)))

    class Adam(nn.Module):
        """torch.optim.Adam under the interface that the cost's update function wants."""

        def __init__(self, params, lr, weight_decay=0.0, optimistic=False):
            super().__init__()
            self.params, self.lr = list(params), torch.tensor(lr)
            self.optimizer = torch.optim.Adam(self.params, lr, weight_decay=weight_decay)

        def step(self, grads):
            for p, grad in zip(self.params, grads, strict=True):
                p.grad = grad
            self.optimizer.step()

    def sac_update(agent, batch, actor_obs, noise, args, cloned, _):
        reward, terminated = batch.reward[:, None], batch.terminated[:, None]
        agent.usual.update(batch.obs, batch.action, batch.next_obs, reward, terminated, cloned)
        return {}

    def dynamics_update(dynamics, optimizer, inputs, targets, args):
        inputs = (inputs - dynamics.input_mean) / dynamics.input_std
        return usual_ensemble_update(dynamics.members, dynamics.optimizers, inputs, targets)

    hyper.Agent, hyper.Actor, hyper.EnsembleDynamics, hyper.Adam = Agent, Actor, EnsembleDynamics, Adam
    hyper.sac_update, hyper.dynamics_update, hyper.target_update = sac_update, dynamics_update, lambda agent, tau: None
    hyper.policy_content = lambda *_: {}


# ---------------------------------------------------------------------------------------------- turns
def device() -> str:
    return os.environ.get("SPEED_DEVICE", "cpu")


def repeat(turn: Turn, step: Callable) -> None:
    """Does `step` as often as each turn asks for; 20 times before the first, to warm up."""
    import torch

    n = 20
    while True:
        for _ in range(n):
            step()
        if device() == "cuda":
            torch.cuda.synchronize()
        n = turn()


def our_settings() -> None:
    """What our scripts do when they start."""
    import torch

    import sac

    torch.set_flush_denormal(True)
    sac.keep_freed_memory()


def worker(function: str, arguments: str) -> None:
    """Runs a contender. After each turn it prints the seconds, and waits for the number of repetitions of the next."""
    import torch

    torch.set_num_threads(1)
    if json.loads(arguments).get("kept", True):
        our_settings()
    channel, sys.stdout = sys.stdout, sys.stderr
    started = time.perf_counter()

    def turn(parts: dict | None = None) -> int:
        nonlocal started
        seconds = time.perf_counter() - started
        print(json.dumps(dict(seconds=seconds, parts=parts)), file=channel, flush=True)
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        started = time.perf_counter()
        return int(line)

    globals()[function](turn, **json.loads(arguments))


class Contender:
    """A worker process and the seconds of its turns. `every`: work done in one turn, if not ours to choose."""

    def __init__(self, name: str, function: str, every: int = 0, skip: int = 0, **arguments):
        self.name, self.every, self.seconds, self.parts = name, every, [], []
        one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        one |= dict(
            XLA_FLAGS="--xla_cpu_multi_thread_eigen=false", XLA_PYTHON_CLIENT_PREALLOCATE="false", JAX_PLATFORMS="", MUJOCO_GL="disabled"
        )
        self.complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the worker writes to it)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--worker", function, json.dumps(arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.complaints, text=True, env={**os.environ, **one},
        )  # fmt: skip
        self.warm_up = self.wait()
        for _ in range(skip):
            self.warm_up += self.go(every)
        self.n = every or max(1, round(0.2 / (self.go(20) / 20)))
        self.seconds, self.parts = [], []

    def wait(self) -> float:
        line = self.process.stdout.readline()
        if not line:
            self.complaints.seek(0)
            why = (self.complaints.read().strip().splitlines() or ["no message"])[-1]
            raise SystemExit(f"speed.py: error: {self.name} failed: {why}; see {shlex.join(self.process.args)}")
        answer = json.loads(line)
        self.parts.append(answer["parts"])
        return answer["seconds"]

    def go(self, n: int) -> float:
        self.process.stdin.write(f"{n}\n")
        self.process.stdin.flush()
        return self.wait()

    def take_turn(self) -> None:
        self.seconds.append(self.go(self.n) / self.n)

    def result(self) -> dict:
        found = dict(milliseconds=1e3 * median(self.seconds), spread=[1e3 * min(self.seconds), 1e3 * max(self.seconds)])
        if self.parts[-1]:
            found["parts"] = {part: 1e3 * median(p[part] for p in self.parts) / self.n for part in self.parts[-1]}
        return {**found, "warm_up_seconds": self.warm_up}


def contest(title: str, contenders: list[dict], rounds: int) -> dict:
    """Lets the contenders take turns; returns the result of each by name."""
    print(title, file=sys.stderr)
    found = [Contender(**contender) for contender in contenders]
    for _ in range(rounds):
        for contender in found:
            contender.take_turn()
    for contender in found:
        contender.process.stdin.close()
        contender.process.wait()
    results = {contender.name: contender.result() for contender in found}
    for name, result in results.items():
        print(f"    {name:38s} {result['milliseconds']:9.3f} ms", file=sys.stderr)
    return results


OTHERS = ("stable-baselines3", "SBX (JAX)", "usual PyTorch", "one network after the other", "every elite on every row")
OURS = {"ours": "eager", "ours --compile": "compile", "ours --compile --bf16": "compile bf16"}


def contests(which: str) -> dict[str, tuple[list[dict], int]]:
    """Contenders and rounds of every table, by title."""

    def products(function: str, **about) -> list[dict]:
        dtypes = {"float32": False, "bfloat16": True}
        return [dict(name=f"its matrix products alone, {name}", function=function, bf16=bf16, **about) for name, bf16 in dtypes.items()]

    found = {}
    for width in (256, 1024):
        for robot in SIZES:
            about = dict(robot=robot, width=width)
            found[f"SAC gradient step, {robot}, 2 x {width}"] = [
                *(dict(name=name, function="sac_ours", mode=mode, **about) for name, mode in OURS.items()),
                dict(name="stable-baselines3", function="sac_library", library="sb3", **about),
                dict(name="SBX (JAX)", function="sac_library", library="sbx", **about),
                dict(name="usual PyTorch", function="sac_usual", **about),
                dict(name="ours, freed memory not kept", function="sac_ours", mode="eager", kept=False, **about),
                dict(name="ours --compile, freed memory not kept", function="sac_ours", mode="compile", kept=False, **about),
                dict(name="usual PyTorch, freed memory not kept", function="sac_usual", kept=False, **about),
                *products("sac_products", **about),
            ], 40  # fmt: skip
    for width in (200, 400):
        about = dict(robot="Ant", width=width)
        found[f"ensemble minibatch, Ant, 7 members of 4 x {width}"] = [
            *(dict(name=name, function="ensemble_ours", mode=mode, **about) for name, mode in OURS.items()),
            dict(name="one network after the other", function="ensemble_usual", **about),
            *products("ensemble_products", **about),
        ], 40  # fmt: skip
    for width in (128, 1024):
        found[f"minibatch of SRA's reverse model, a maze, 7 members of 2 x {width}"] = [
            *(dict(name=name, function="deltas_ours", mode=mode, width=width) for name, mode in OURS.items()),
            dict(name="one network after the other", function="deltas_usual", width=width),
        ], 40  # fmt: skip
    about = dict(robot="Ant", width=200)
    found["10,000 imagined steps, Ant"] = [
        dict(name="ours", function="rollouts_ours", **about), dict(name="every elite on every row", function="rollouts_usual", **about)
    ], 40  # fmt: skip
    found["replay sample of 256, Ant"] = [
        dict(name="ours", function="replay_ours", robot="Ant"), dict(name="stable-baselines3", function="replay_library", robot="Ant")
    ], 40  # fmt: skip
    found["SAC with the environment, Hopper, 2 x 256, an env step"] = [
        *(dict(name=name, function="whole_sac", every=500, skip=3, robot="Hopper", mode=mode) for name, mode in OURS.items()),
        *(dict(name=name, function="whole_library", every=500, skip=1, robot="Hopper", library=library)
          for name, library in (("stable-baselines3", "sb3"), ("SBX (JAX)", "sbx"))),
    ], 12  # fmt: skip
    for robot in SIZES:
        found[f"hyper.py, {robot}, default preset, an env step"] = [
            dict(name=name, function="whole_hyper", every=250, skip=5, robot=robot, mode=mode)
            for name, mode in {**OURS, "usual PyTorch": "usual"}.items()
        ], 6  # fmt: skip
    if device() == "cuda":  # jax from PyPI has no CUDA
        found = {title: ([c for c in contest if "SBX" not in c["name"]], rounds) for title, (contest, rounds) in found.items()}
    return {title: contest for title, contest in found.items() if re.search(which, title)}


# ---------------------------------------------------------------------------------------------- report
def table(results: dict) -> str:
    """Markdown of all contests: milliseconds, and how many times faster than the others."""
    lines = []
    for title, result in results.items():
        contenders = result["contenders"]
        names = [name for name in OTHERS if name in contenders]
        about = f"{result['turns']} turns, {result['date']}, {result['commit']}"
        lines += [
            f"**{title}** ({about})",
            "",
            "| | ms | slowest and fastest turn | " + " | ".join(f"against {name}" for name in names) + " |",
        ]
        lines += ["|---|---|---|" + "---|" * len(names)]
        for name, found in contenders.items():
            ratios = (f"{contenders[other]['milliseconds'] / found['milliseconds']:.2f}" for other in names)
            fastest, slowest = found["spread"]
            lines.append(f"| {name} | {found['milliseconds']:.3g} | {slowest:.3g}, {fastest:.3g} | {' | '.join(ratios)} |")
        lines.append("")
        if any("parts" in found for found in contenders.values()):
            parts = list(next(iter(contenders.values()))["parts"])
            lines += [f"Its parts, in ms: {title}", "", "| | " + " | ".join(parts) + " |", "|---|" + "---|" * len(parts)]
            for name, found in contenders.items():
                lines.append(f"| {name} | " + " | ".join(f"{found['parts'][part]:.2f}" for part in parts) + " |")
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression: the tables to measure")
    parser.add_argument("--list", action="store_true", help="name all tables and stop")
    parser.add_argument("--write", action="store_true", help="put what was measured into benchmark/results/speed and docs/speed.md")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--core", type=int, default=0, help="CPU core that all contenders share")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker)
    os.environ["SPEED_DEVICE"] = options.device
    try:
        wanted = contests(options.only)
    except re.error as error:
        parser.error(f"--only {options.only}: not a regular expression ({error})")
    if options.list or not wanted:
        print("\n".join(contests("")))
        if not wanted:
            parser.error(f"--only {options.only}: no such table; the titles are above")
        return
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU that torch can use")
    if hasattr(os, "sched_setaffinity"):
        if options.core not in os.sched_getaffinity(0):
            parser.error(f"--core {options.core}: there are cores {sorted(os.sched_getaffinity(0))}")
        os.sched_setaffinity(0, {options.core})
    path, measured = ROOT / "benchmark" / "results" / "speed" / f"{options.device}.json", {}
    about = dict(machine=machine(options.device), date=time.strftime("%Y-%m-%d"), commit=commit(), versions=versions())
    for title, (contenders, rounds) in wanted.items():
        with tempfile.TemporaryDirectory() as os.environ["SPEED_SCRATCH"]:
            measured[title] = {**about, "turns": rounds, "contenders": contest(title, contenders, rounds)}
        if options.write:
            path.parent.mkdir(parents=True, exist_ok=True)
            known = json.loads(path.read_text()) if path.exists() else {}  # read late: another process may have measured other tables
            known[title] = measured[title]
            path.write_text(json.dumps({name: known[name] for name in contests("") if name in known}, indent=1) + "\n")
    print(table(measured))
    if options.write:
        page, mark = ROOT / "docs" / "speed.md", rf"(<!-- speed {options.device} -->\n).*?(<!-- end -->)"
        shown = table(json.loads(path.read_text()))
        page.write_text(re.sub(mark, lambda m: m[1] + shown + m[2], page.read_text(), flags=re.S))


def versions() -> dict[str, str]:
    found = dict(python=platform.python_version())
    for name in ("torch", "stable-baselines3", "sbx-rl", "jax", "numpy", "mujoco", "gymnasium"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # the tables that need it say so
            continue
    return found


def commit() -> str | None:
    """What the scripts were at; with "+" if they have changed since."""
    git = [subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True) for words in
           (["rev-parse", "--short=9", "HEAD"], ["status", "--porcelain", "--", "*.py"])]  # fmt: skip
    return git[0].stdout.strip() + "+" * bool(git[1].stdout.strip()) if git[0].returncode == 0 else None


def machine(where: str) -> str:
    """What the numbers were measured on."""
    import torch

    if where == "cuda":
        return torch.cuda.get_device_name()
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    return f"one core of {found[1].strip() if found else platform.processor()}"


if __name__ == "__main__":
    main()
