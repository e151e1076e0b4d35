"""How fast the scripts are, beside stable-baselines3, SBX (JAX) and PyTorch written the usual way.

    pip install -r requirements.txt -r benchmark/requirements.txt
    python benchmark/speed.py --only "2 x 256"               # prints one contest; all take about twenty minutes
    python benchmark/speed.py --write && python benchmark/plot.py         # into docs/speed.md
    python benchmark/speed.py --against ../other-checkout    # the other's scripts take part, too
    python benchmark/speed.py --device cuda --write          # on a GPU; bash benchmark/gpu.sh does that and more

One thread, held to one core. The contenders of a contest take turns of about a fifth of a second (of a whole script:
250 env steps), so that whatever else the machine does hits all of them alike; numbers are medians of turns.
"""

import copy
import importlib.util
import itertools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn

ROOT = Path(__file__).parents[1]
OBS_DIM, ACT_DIM, BATCH = 11, 3, 256  # Hopper's
UPDATES = 10  # that are drawn, and on a GPU launched, at once
MODES = {"": dict(compile="off"), " --compile": dict(compile="on"), " --compile --bf16": dict(compile="on", bf16=True)}
GPU_MODES = MODES | {" --compile, no CUDA graph": dict(compile="on", graph=False)}


@dataclass
class Args:
    only: str = ""  # the contests with this in their title
    rounds: int = 40  # turns of each contender; of env steps of hyper.py a tenth as many
    device: Literal["cpu", "cuda"] = "cpu"
    core: int = 0  # CPU core to run on
    against: Path | None = None  # another checkout, whose scripts take turns with these
    write: bool = False  # to benchmark/results/speed/<device>.json


# ------------------------------------------------------------------------------------------------ our scripts
# Each function returns a turn, see turns_of.
def load(root: Path, script: str):
    """A script as a module of its own, so that nothing compiled is shared between contenders."""
    spec = importlib.util.spec_from_file_location(f"{script}_{len(sys.modules)}", root / f"{script}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled(module, update, args, loop=None, graph: bool = True):
    return module.compiled(update, args if graph else replace(args, device="cpu"), loop)


def sac_step(root: Path, width: int, graph: bool = True, **flags):
    """A gradient step with all that belongs to it: a batch from replay, noise, target critics."""
    sac = load(root, "sac")
    args = sac.Args(hidden_sizes=(width, width), **flags)
    agent, buffer = sac.Agent(OBS_DIM, ACT_DIM, args), sac.ReplayBuffer(10_000, OBS_DIM, ACT_DIM, args.device)
    updates = compiled(sac, sac.sac_update, args, sac.sac_updates, graph)
    for obs, next_obs, action in zip(*np.random.randn(3, 10_000, OBS_DIM).astype(np.float32), strict=True):
        buffer.add(obs, np.tanh(action[:ACT_DIM]), 0.0, next_obs, False)

    def step():
        noise = torch.randn(UPDATES, 2, BATCH, ACT_DIM, device=args.device)
        updates(agent, sac.sample(buffer.all(), UPDATES, BATCH), noise, args)

    return turns_of(step, UPDATES)


def ensemble_minibatch(root: Path, graph: bool = True, **flags):
    """A gradient step of hyper.py's seven dynamics models."""
    hyper = load(root, "hyper")
    args = hyper.Args(**flags)
    dynamics, update = hyper.EnsembleDynamics(27, 8, args), compiled(hyper, hyper.dynamics_update, args, graph=graph)
    inputs = [torch.randn(7, BATCH, dim, device=args.device) for dim in (27 + 8, 27)]
    return turns_of(lambda: update(dynamics, *inputs, args))


def sra_update(root: Path, graph: bool = True, **flags):
    """A gradient step of SRA's policy in a maze (IQL): 256 expert and 256 other transitions."""
    sra = load(root, "sra_offline")
    args = sra.Args(**flags)
    agent, update = sra.OfflineAgent(4, 2, args), compiled(sra, sra.iql_update, args, graph=graph)
    shapes = (BATCH, 4), (BATCH, 2), (BATCH,), (BATCH, 4), (BATCH,)
    expert, other = (sra.Batch(*(torch.rand(shape, device=args.device) for shape in shapes)) for _ in range(2))

    def step():
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16, cache_enabled=False):
            update(agent, expert, other, torch.randn(2, 2 * BATCH, 2, device=args.device), True, args)

    return turns_of(step)


def env_steps(root: Path, script: str, graph: bool = True, **flags):
    """All of a script on Hopper, from step 1,250 on; a turn is 250 steps. It waits where it would evaluate."""
    module, go, done = load(root, script), queue.Queue(), queue.Queue()

    def evaluate(*_, **__):
        done.put(None)
        go.get()
        return dict(eval_return_mean=0.0, eval_return_std=0.0, eval_success_rate=0.0, eval_length_mean=0.0)

    def turn() -> float:
        start = time.perf_counter()
        go.put(None)
        done.get()
        return (time.perf_counter() - start) / 250

    module.evaluate = evaluate
    if not graph:
        with_graph = module.compiled
        module.compiled = lambda update, args, loop=None: with_graph(update, replace(args, device="cpu"), loop)
    flags |= dict(demos=str(root / "demos" / "Hopper-v4.npz")) if script != "sac" else {}
    args = module.Args(env_id="Hopper-v4", total_timesteps=10**6, eval_every=250, learning_starts=1_000, **flags)
    args.run_dir = f"{tempfile.mkdtemp()}/run"
    threading.Thread(target=module.train, args=[args], daemon=True).start()
    done.get()
    for _ in range(5):
        turn()
    return turn


# ------------------------------------------------------------------------------------------------ other code
def library_step(library: str, width: int, device: str):
    """One call of train(gradient_steps=1) of stable-baselines3 or SBX: what they do after an environment step."""
    SAC = importlib.import_module(library).SAC
    settings = dict(policy_kwargs=dict(net_arch=[width, width]), buffer_size=10_000, device=device)
    model = SAC("MlpPolicy", gym.make("Hopper-v4"), **settings)
    model._setup_learn(10_000)
    for obs, next_obs, action in zip(*np.random.randn(3, 10_000, 1, OBS_DIM).astype(np.float32), strict=True):
        model.replay_buffer.add(obs, next_obs, np.tanh(action[:, :ACT_DIM]), np.zeros(1), np.zeros(1), [{}])
    return turns_of(lambda: model.train(gradient_steps=1, batch_size=BATCH))


def mlp(*sizes: int) -> nn.Sequential:
    layers = [layer for pair in itertools.pairwise(sizes[:-1]) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))


class UsualSAC:
    """Separate critics, torch.optim.Adam, one target parameter after the other, as most implementations have it."""

    def __init__(self, obs_dim: int = OBS_DIM, act_dim: int = ACT_DIM, width: int = 256, device: str = "cpu"):
        self.actor = mlp(obs_dim, width, width, 2 * act_dim).to(device)
        self.critics = nn.ModuleList(mlp(obs_dim + act_dim, width, width, 1) for _ in range(2)).to(device)
        self.targets, self.target_entropy = copy.deepcopy(self.critics), -act_dim
        self.log_alpha = torch.zeros(1, requires_grad=True, device=device)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), 1e-3)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), 3e-4)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], 1e-3)

    def act(self, obs):
        mean, log_std = self.actor(obs).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
        raw = normal.rsample()
        actions = torch.tanh(raw)
        log_prob = normal.log_prob(raw) - torch.log(1 - actions.pow(2) + 1e-6)
        return actions, log_prob.sum(1, keepdim=True)

    def update(self, obs, actions, rewards, next_obs, terminations) -> None:
        alpha = self.log_alpha.exp().detach()
        with torch.no_grad():
            next_actions, next_log_prob = self.act(next_obs)
            x = torch.cat([next_obs, next_actions], 1)
            next_q = torch.min(*(critic(x) for critic in self.targets)) - alpha * next_log_prob
            target = rewards + 0.99 * (1 - terminations) * next_q
        x = torch.cat([obs, actions], 1)
        critic_loss = sum(F.mse_loss(critic(x), target) for critic in self.critics)
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()

        new_actions, log_prob = self.act(obs)
        x = torch.cat([obs, new_actions], 1)
        actor_loss = (alpha * log_prob - torch.min(*(critic(x) for critic in self.critics))).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()

        alpha_loss = (-self.log_alpha * (log_prob.detach() + self.target_entropy)).mean()
        self.alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.alpha_optimizer.step()
        for p, target_p in zip(self.critics.parameters(), self.targets.parameters(), strict=True):
            target_p.data.copy_(0.005 * p.data + 0.995 * target_p.data)


def usual_sac_step(width: int, device: str):
    agent = UsualSAC(width=width, device=device)
    columns = [torch.rand(10_000, n, device=device) for n in (OBS_DIM, ACT_DIM, 1, OBS_DIM, 1)]

    def step():
        index = torch.randint(10_000, (BATCH,), device=device)
        agent.update(*(column[index] for column in columns))

    return turns_of(step)


# --------------------------------------------------------------------------------------------------- contests
def turns_of(step, updates: int = 1):
    """A function that does steps of so many updates for about a fifth of a second; returns the seconds of an update."""

    def turn(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / n / updates

    turn(20)
    n = max(1, round(0.2 / updates / turn(5)))
    return lambda: turn(n)


def contests(roots: dict[str, Path], device: str) -> dict[str, dict]:
    """Title -> contender -> function that makes its turn. `roots`: "ours", "other" -> folder of the scripts."""
    scripts = {f"SAC gradient step, Hopper, 2 x {width}": partial(sac_step, width=width) for width in (256, 1024)}
    scripts["ensemble minibatch, Ant, 7 members of 4 x 200"] = ensemble_minibatch
    scripts["SRA gradient step, a maze, 2 x 256"] = sra_update
    scripts |= {f"{name}.py, Hopper, an env step": partial(env_steps, script=name) for name in ("hyper", "hype", "sac")}
    found = {title: {} for title in scripts}
    for title, (mode, flags), (name, root) in itertools.product(
        scripts, (GPU_MODES if device == "cuda" else MODES).items(), roots.items()
    ):
        found[title][name + mode] = partial(scripts[title], root, device=device, **flags)
    for width in (256, 1024):
        contenders = found[f"SAC gradient step, Hopper, 2 x {width}"]
        contenders["stable-baselines3"] = partial(library_step, "stable_baselines3", width, device)
        if device == "cpu":
            contenders["SBX (JAX)"] = partial(library_step, "sbx", width, device)
        contenders["usual PyTorch"] = partial(usual_sac_step, width, device)
    return found


def compete(contenders: dict, rounds: int) -> dict[str, dict]:
    """Median milliseconds of a step; of ours also the median ratio to the other checkout's turn in the same round."""
    turns = {name: make() for name, make in contenders.items()}
    taken = [{name: turn() for name, turn in turns.items()} for _ in range(rounds)]  # seconds of a step
    found = {name: dict(milliseconds=round(1_000 * median(one[name] for one in taken), 3)) for name in turns}
    for name in [name for name in turns if name.replace("ours", "other") != name and "other" in turns]:
        ratio = median(one[name] / one[name.replace("ours", "other")] for one in taken)
        found[name]["ratio"] = round(ratio, 3)
    return found


def table(device: str) -> str:
    """Markdown: a column for each contest, milliseconds; in brackets the share of the other checkout's time."""
    measured = json.loads((ROOT / "benchmark" / "results" / "speed" / f"{device}.json").read_text())
    known = {title: list(names) for title, names in contests(dict(ours=ROOT), device).items() if title in measured}
    lines = [["milliseconds", *known], ["---"] * (1 + len(known))]
    for name in dict.fromkeys(name for names in known.values() for name in names):
        found = [measured[title]["contenders"].get(name, {}) for title in known]
        cells = [f"{result['milliseconds']:.3g}" if result else "-" for result in found]
        cells = [f"{cell} ({r['ratio']:.2f})" if "ratio" in r else cell for cell, r in zip(cells, found, strict=True)]
        lines.append([name, *cells])
    lines.append(["measured at", *(f"{measured[title]['date']}, {measured[title]['commit']}" for title in known)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(args: Args) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {args.core})
    os.environ |= dict(XLA_FLAGS="--xla_cpu_multi_thread_eigen=false", TQDM_DISABLE="1")
    sys.path.append(str(ROOT))  # for envs/
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # our scripts' settings, from which the others profit too
    path = ROOT / "benchmark" / "results" / "speed" / f"{args.device}.json"
    commit = subprocess.getoutput(f"git -C {ROOT} describe --always --dirty --abbrev=9 --exclude='*'")
    about = dict(date=time.strftime("%Y-%m-%d"), commit=commit, torch=torch.__version__, turns=args.rounds)
    about |= dict(gpu=torch.cuda.get_device_name()) if args.device == "cuda" else {}
    roots = dict(ours=ROOT) | (dict(other=args.against.resolve()) if args.against else {})
    for title, contenders in contests(roots, args.device).items():
        if args.only in title:
            found = compete(contenders, max(1, args.rounds // 10) if "env step" in title else args.rounds)
            print(title, *(f"    {name:26} {result}" for name, result in found.items()), sep="\n", flush=True)
            if args.write:
                measured = json.loads(path.read_text()) if path.exists() else {}
                path.write_text(json.dumps(measured | {title: about | dict(contenders=found)}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
