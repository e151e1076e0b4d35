"""The test suite's own environment: a point pushed towards the origin. `--env-id tests.pointmass:PointMass-v0`."""

from types import SimpleNamespace
from typing import ClassVar

import gymnasium as gym
import numpy as np
import torch


class PointMass(gym.Env):
    """obs: position and velocity [4]; action: force in [-2, 2] [2]; reward 1 - |position|; 50 steps; ends outside |x| < 2."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float64)
    action_space = gym.spaces.Box(-2, 2, (2,), np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state = np.concatenate([self.np_random.uniform(-1, 1, 2), np.zeros(2)])
        return self.state.copy(), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, np.float32)), action
        position, velocity = self.state[:2], self.state[2:]
        velocity = 0.8 * velocity + 0.1 * np.asarray(action, np.float64)
        self.state = np.concatenate([position + 0.5 * velocity, velocity])
        distance = float(np.linalg.norm(self.state[:2]))
        return self.state.copy(), 1 - distance, bool((np.abs(self.state[:2]) > 2).any()), False, {"success": distance < 0.2}


class Jointed(PointMass):
    """With joints, of a simulator that is not MuJoCo's own."""

    model = "foreign"

    def __init__(self):
        self.data = SimpleNamespace(qpos=np.zeros(2), qvel=np.zeros(2))

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "state":
            self.data.qpos[:], self.data.qvel[:] = value[:2], value[2:]


class Discrete(PointMass):
    action_space = gym.spaces.Discrete(3)


class Unbounded(PointMass):
    action_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)


class Image(PointMass):
    observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)


class Blind(PointMass):
    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        raise OSError("no display")


def Rescaled():
    """Actions in [-1, 1] by a wrapper of its own."""
    return gym.wrappers.RescaleAction(PointMass(), np.float32(-1), np.float32(1))


for env in (PointMass, Jointed, Discrete, Unbounded, Image, Blind, Rescaled):
    gym.register(f"{env.__name__}-v0", entry_point=env, max_episode_steps=50)


def expert(obs: np.ndarray) -> np.ndarray:
    """A scripted expert: a damped spring, in the environment's units."""
    return np.clip(-4 * obs[:2] - 4 * obs[2:], -2, 2).astype(np.float32)


def terminates(obs: torch.Tensor, action: torch.Tensor, next_obs: torch.Tensor) -> torch.Tensor:
    return (next_obs[:, :2].abs() > 2).any(-1)


def write_demos(path, episodes: int = 5, seed: int = 0) -> None:
    """The README's recipe for a demonstration file, on this environment."""
    env, rows = (
        gym.make("PointMass-v0"),
        {k: [] for k in ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")},
    )
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        done = False
        while not done:
            action = expert(obs)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            for name, value in zip(rows, (obs, action, reward, next_obs, terminated, truncated), strict=True):
                rows[name].append(value)
            obs, done = next_obs, terminated or truncated
    np.savez(path, **{name: np.asarray(values, np.float32) for name, values in rows.items()})
