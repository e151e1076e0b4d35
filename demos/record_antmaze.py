"""Ants that walk through gymnasium-robotics' AntMaze: demonstrations, offline data and how often the goal is reached.

An ant that goes where it is told (experts/EgoAnt-v0.pt) is told to head for the next cell of the shortest path.

    python demos/record_antmaze.py AntMaze_UMaze-v4 --episodes 50                               # the share that arrives
    python demos/record_antmaze.py AntMaze_UMaze-v4 --record AntMaze_UMaze-v4.npz --noise 0    # ten that arrive
    python demos/record_antmaze.py AntMaze_Large-v4 --record large.npz --transitions 1000000    # offline data

Demonstrations end when the goal is reached, with a termination. Offline data goes on to a new goal instead.
"""

import json
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import gymnasium_robotics
import numpy as np
import torch
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import sac  # noqa: E402
from envs.ego_ant import egocentric  # noqa: E402

gym.register_envs(gymnasium_robotics)


@dataclass
class Args:
    env_id: Annotated[str, tyro.conf.Positional]  # AntMaze_UMaze-v4, AntMaze_Medium-v4, AntMaze_Large-v4, ...
    episodes: int = 10  # that are recorded; without --record, that are run
    transitions: int = 0  # record so many instead, of episodes that go on to a new goal
    noise: float = 0.2  # standard deviation of Gaussian noise on the actions, of [-1, 1]
    record: Path | None = None  # .npz file, schema: demos/README.md
    seed: int = 2**31
    policy: Path = ROOT / "demos" / "experts" / "EgoAnt-v0.pt"


def distances(maze_map: list, goal: tuple[int, int]) -> dict[tuple[int, int], int]:
    """Steps from each free cell (row, column) to the goal's, breadth first."""
    found, queue = {goal: 0}, deque([goal])
    while queue:
        i, j = queue.popleft()
        for cell in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            if cell not in found and maze_map[cell[0]][cell[1]] != 1:
                found[cell] = found[i, j] + 1
                queue.append(cell)
    return found


def direction(maze, position: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Unit vector [2] from the position [2] to the centre of the path's next cell, or to the goal [2] in its own."""
    here, there = (tuple(int(x) for x in maze.cell_xy_to_rowcol(xy)) for xy in (position, goal))
    target = goal
    if here != there:
        far = distances(maze.maze_map, there)
        near = [(here[0] + i, here[1] + j) for i, j in ((1, 0), (-1, 0), (0, 1), (0, -1))]
        target = maze.cell_rowcol_to_xy(min(near, key=lambda cell: far.get(cell, np.inf)))
    return (target - position) / max(np.linalg.norm(target - position), 1e-6)


def main(args: Args) -> None:
    """Prints the share of episodes that reach the goal within the time limit."""
    policy = torch.load(args.policy, weights_only=True)
    actor = sac.Actor(*policy["sizes"])
    actor.load_state_dict(policy["actor"])
    env, rng = gym.make(args.env_id, continuing_task=args.transitions > 0), np.random.default_rng(args.seed)
    world, columns, kept, arrived, lengths = env.unwrapped, {}, 0, [], []
    enough = args.transitions or args.episodes
    while kept < enough:
        if len(arrived) == 10 * args.episodes and not args.transitions:
            raise SystemExit(f"record_antmaze.py: only {sum(arrived)} of {len(arrived)} episodes reach the goal")
        obs, _ = env.reset(seed=args.seed + len(arrived))
        steps, done, success = [], False, False
        while not done:
            data = world.data
            heading = direction(world.maze, obs["achieved_goal"], obs["desired_goal"])
            action = actor.act(
                egocentric(data.qpos[:15], data.qvel[:14], heading).astype(np.float32), deterministic=True
            )
            action = np.clip(action + args.noise * rng.standard_normal(8), -1, 1)
            row = dict(observations=flat(obs), actions=action, qpos=data.qpos[:15].copy(), qvel=data.qvel[:14].copy())
            obs, reward, terminated, truncated, info = env.step(action)
            row |= dict(rewards=reward, next_observations=flat(obs), terminations=terminated, truncations=truncated)
            steps.append(row)
            success |= info["success"]
            done = terminated or truncated
        arrived.append(success)
        lengths.append(len(steps))
        if args.transitions or success or not args.record:
            kept += len(steps) if args.transitions else 1
            for name in steps[0] if args.record else ():
                columns.setdefault(name, []).extend(np.float32(step[name]) for step in steps)
    report = f"goal reached in {np.mean(arrived):.0%} of {len(arrived)} episodes of {np.mean(lengths):.0f} steps"
    print(f"{args.env_id}: {report}")
    if args.record:
        about = dict(env_id=args.env_id, continuing_task=args.transitions > 0, noise=args.noise, seed=args.seed)
        np.savez_compressed(args.record, metadata=json.dumps(about | dict(report=report)), **columns)
        print(f"{args.record}: {len(columns['rewards'])} transitions")


def flat(obs: dict[str, np.ndarray]) -> np.ndarray:
    """As gymnasium's FlattenObservation: achieved goal [2], desired goal [2], observation [27]."""
    return np.concatenate([obs[name] for name in sorted(obs)])


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
