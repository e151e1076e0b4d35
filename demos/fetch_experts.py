"""Scripted experts of FetchReach, FetchPush and FetchPickAndPlace, and demonstrations of them for vins.py.

    python demos/fetch_experts.py --env-id FetchPush-v4 --episodes 200 --out demos/FetchPush-v4.npz
    python demos/fetch_experts.py --env-id FetchPush-v4 --demo-noise 0.3 --out push.npz    # less regular

An expert is a function of the observation, so cloning it is possible. Episodes that succeed are kept, up to the first
success, which terminates them. The file has the schema of demos/README.md.
"""

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import gymnasium_robotics
import numpy as np
import tyro

gym.register_envs(gymnasium_robotics)
UP = np.array([0, 0, 1.0])


@dataclass
class Args:
    env_id: str = "FetchReach-v4"
    episodes: int = 100  # successful ones
    demo_noise: float = 0.0  # standard deviation of Gaussian noise on the executed actions, which are the recorded ones
    seed: int = 0  # of the first episode
    out: Path | None = None  # default demos/<env_id>.npz


def reach(gripper: np.ndarray, obj: np.ndarray, fingers: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Straight to the goal. There is no object."""
    return np.append((goal - gripper) * 6, 0)


def pick(gripper: np.ndarray, obj: np.ndarray, fingers: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Above the object, down with open fingers, close them, carry it to the goal."""
    away = obj - gripper
    sideways = np.linalg.norm(away[:2])
    if np.linalg.norm(away) < 0.02 and fingers.sum() < 0.055:  # the object is held
        return np.append((goal - obj) * 6, -1)
    if sideways < 0.01 and abs(away[2]) < 0.012:  # around the object: close
        return np.array([0, 0, 0, -1.0])
    if sideways < 0.012:  # above it: down
        return np.append(away * 6, 1)
    return np.append((away + 0.06 * UP) * 6, 1)


def push(gripper: np.ndarray, obj: np.ndarray, fingers: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Over the object to the side that is away from the goal, down, and push."""
    distance = np.linalg.norm(goal[:2] - obj[:2])
    direction = (goal[:2] - obj[:2]) / (distance + 1e-8)
    behind = obj - np.append(direction * 0.07, 0)
    offset = (gripper - obj)[:2]
    along = offset @ direction  # negative behind the object
    sideways = offset - along * direction
    if distance < 0.02:
        return np.zeros(4)
    if along < -0.025 and np.linalg.norm(sideways) < 0.02 and gripper[2] < obj[2] + 0.03:  # lined up: push
        pushing = direction * min(1, distance * 5) * 0.8 - sideways * 10
        return np.array([*pushing, (obj[2] - gripper[2]) * 6, 0])
    if np.linalg.norm(gripper[:2] - behind[:2]) < 0.015:  # above the place behind it: down
        return np.append((behind - gripper) * 8, 0)
    above = behind + 0.08 * UP - gripper
    if gripper[2] > obj[2] + 0.06:  # high enough to cross the object
        return np.append(above * 8, 0)
    across = 3.0 if gripper[2] > obj[2] + 0.045 else 0.0  # rise first
    return np.array([*above[:2] * across, above[2] * 8, 0])


EXPERTS = {"FetchReach": reach, "FetchPush": push, "FetchPickAndPlace": pick}


def expert_action(env_id: str, obs: dict[str, np.ndarray]) -> np.ndarray:
    """The expert's action [4] in [-1, 1] at an observation of the environment."""
    state = obs["observation"]
    fingers = state[9:11] if len(state) > 10 else state[3:5]
    action = EXPERTS[env_id.split("-v")[0]](state[:3], state[3:6], fingers, obs["desired_goal"])
    return action.clip(-1, 1)


def record(env: gym.Env, noise: float, seed: int) -> dict[str, list] | None:
    """An episode up to its first success, with flat observations; None if it does not succeed."""
    rng = np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    truncated, rows = False, []
    while not truncated:
        action = expert_action(env.spec.id, obs) + noise * rng.standard_normal(4)
        action = action.clip(-1, 1).astype(np.float32)
        next_obs, reward, _, truncated, info = env.step(action)
        success = bool(info["is_success"])
        flat, next_flat = (gym.spaces.flatten(env.observation_space, each) for each in (obs, next_obs))
        rows.append((flat, action, reward, next_flat, success, False))
        if success:
            names = "observations actions rewards next_observations terminations truncations".split()
            return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
        obs = next_obs
    return None


def main(args: Args) -> None:
    env, columns, lengths, tried = gym.make(args.env_id), {}, [], 0
    while len(lengths) < args.episodes:
        if tried == 10 + 10 * args.episodes:
            raise SystemExit(f"fetch_experts.py: only {len(lengths)} of {tried} episodes succeeded")
        episode = record(env, args.demo_noise, args.seed + tried)
        tried += 1
        if episode and len(episode["rewards"]) > 1:  # not those that begin at the goal
            lengths.append(len(episode["rewards"]))
            for name, rows in episode.items():
                columns.setdefault(name, []).extend(rows)
    about = dict(env_id=args.env_id, script="fetch_experts", episodes=args.episodes, of=tried, seed=args.seed)
    about |= dict(demo_noise=args.demo_noise, cut="at the first success, which is stored as a termination")
    about |= {name: version(name) for name in ("gymnasium", "gymnasium-robotics", "mujoco")}
    out = args.out or Path(__file__).parent / f"{args.env_id}.npz"
    arrays = {name: np.array(rows, np.float32) for name, rows in columns.items()}
    np.savez_compressed(out, metadata=json.dumps(about), **arrays)
    print(f"{out}: {args.episodes} of {tried} episodes, median length {np.median(lengths):.0f}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
