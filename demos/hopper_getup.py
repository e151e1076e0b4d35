"""Episodes in which DeepMind Control's hopper gets up from where an actor stays lying, for crossq.py --prior.

The actor acts. Where it lies, in hopper-stand a planner (cross-entropy method) takes over that tries actions in the
simulator itself, in hopper-hop the actor of hopper-stand, until the hopper is upright. Episodes that needed it and
succeeded are kept; the bundled demonstrations follow.

    python demos/hopper_getup.py dm_control/hopper-stand-v0 stand.npz        # 20 to 30 minutes
    python demos/crossq.py --env-id dm_control/hopper-stand-v0 --run-dir runs/stand --prior stand.npz --reset-every 200
        --target-entropy -2 --alpha 0.1 --bf16

Angles of the body count full turns. The actors that SAC trained know the first alone: they are shown the angle of that.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import mujoco
import numpy as np
import torch
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import sac  # noqa: E402

NAMES = "observations", "actions", "rewards", "next_observations", "terminations", "truncations"


@dataclass
class Args:
    env_id: Annotated[str, tyro.conf.Positional]  # dm_control/hopper-stand-v0 or dm_control/hopper-hop-v0
    out: Annotated[Path, tyro.conf.Positional]  # .npz file, schema: demos/README.md
    episodes: int = 20
    min_return: float = 300.0
    seed: int = 500  # of the first episode's start
    horizon: int = 10  # actions of a plan, each held for `hold` steps
    hold: int = 5
    candidates: int = 48
    max_plans: int = 20  # an episode that needs more is dropped


def plan(model, data, qpos: np.ndarray, qvel: np.ndarray, mean: np.ndarray, substeps: int, rng, args: Args):
    """The best plan tried [horizon, act_dim], from a state and a first guess: three rounds, around the best eight."""
    torso, foot = (model.body(name).id for name in ("torso", "foot"))
    std, best, best_score = np.full_like(mean, 0.8), mean, -np.inf
    for _ in range(3):
        plans = (mean + std * rng.normal(size=(args.candidates, *mean.shape))).clip(-1, 1)
        scores = np.zeros(len(plans))
        for i, actions in enumerate(plans):
            data.qpos[:], data.qvel[:], data.qacc_warmstart[:] = qpos, qvel, 0
            for action in actions.repeat(args.hold, axis=0):
                data.ctrl[:] = action
                mujoco.mj_step(model, data, substeps)
                height = data.xipos[torso, 2] - data.xipos[foot, 2]
                scores[i] += min(height, 0.9) + 0.5 * np.cos(data.qpos[2]) + (height > 0.6)
        order = scores.argsort()[::-1][:8]
        mean, std = plans[order].mean(0), plans[order].std(0) + 0.1
        if scores[order[0]] > best_score:
            best, best_score = plans[order[0]], scores[order[0]]
    return best


def run_episode(env, actor: sac.Actor, stand_actor: sac.Actor | None, seed: int, args: Args) -> tuple[list, int]:
    """Transitions of an episode, and how often it planned, or began to stand up."""
    obs, _ = env.reset(seed=seed)
    control, rng = env.unwrapped._env, np.random.default_rng(seed)
    physics, model = control.physics, control.physics.model.ptr
    data, guess = mujoco.MjData(model), np.zeros((args.horizon, env.action_space.shape[0]))
    rows, queue, plans, getting_up = [], [], 0, False
    while (not rows or not rows[-1][-1]) and plans <= args.max_plans:
        height, angle = physics.height(), physics.data.qpos[2]
        turns = 2 * np.pi * np.round(angle / (2 * np.pi))
        shown = obs - np.float32(turns) * (np.arange(len(obs)) == 1).astype(np.float32)
        if stand_actor:
            plans += not getting_up and height < 0.4
            getting_up = height < 0.4 or (getting_up and (height < 0.65 or abs(angle - turns) > 0.8))
        else:
            lies = height < (0.6 if len(rows) == 60 else 0.4) and (len(rows) == 60 or len(rows) > 120)
            getting_up = (getting_up or lies) and (height < 0.75 or abs(angle - turns) > 0.6)
        if getting_up and not stand_actor:
            if not queue:
                best = plan(model, data, physics.data.qpos, physics.data.qvel, guess, control._n_sub_steps, rng, args)
                guess, queue, plans = np.concatenate([best[1:], best[-1:]]), [best[0]] * args.hold, plans + 1
            action = queue.pop()
        else:
            action, queue = (stand_actor if getting_up else actor).act(shown, deterministic=True), []
        next_obs, reward, terminated, truncated, _ = env.step(np.asarray(action, np.float32))
        rows.append((obs, action, reward, next_obs, terminated, truncated))
        obs = next_obs
    return rows, plans


def load_actor(name: str) -> sac.Actor:
    policy = torch.load(ROOT / "demos" / "experts" / f"{name}.pt", weights_only=True)
    actor = sac.Actor(*policy["sizes"])
    actor.load_state_dict(policy["actor"])
    return actor


def main(args: Args) -> None:
    torch.set_num_threads(1)
    name = args.env_id.replace("/", "-")
    actor = load_actor(f"{name}-sac")
    stand_actor = load_actor("dm_control-hopper-stand-v0") if "hop-" in args.env_id else None
    env, kept, seed = sac.make_env(args.env_id), [], args.seed
    while len(kept) < args.episodes:
        rows, plans = run_episode(env, actor, stand_actor, seed, args)
        total = sum(row[2] for row in rows)
        kept += [rows] if plans and total >= args.min_return and rows[-1][-1] else []
        print(f"start {seed}: {plans} plans, return {total:.0f}, kept {len(kept)} of {args.episodes}", flush=True)
        seed += 1
    columns = zip(*(row for rows in kept for row in rows), strict=True)
    with np.load(ROOT / "demos" / f"{name}.npz") as file:
        both = {
            n: np.concatenate([np.array(column, np.float32), file[n]]) for n, column in zip(NAMES, columns, strict=True)
        }
    np.savez(args.out, **both)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
