"""The test suite's own world: a point pushed towards the origin. `--env-id tests.pointmass:PointMass-v0`."""

from typing import ClassVar

import gymnasium as gym
import numpy as np
import torch


class PointMass(gym.Env):
    """obs [4]: position and velocity; action [2]: force in [-2, 2]; reward 1 - |position|; ends outside |x| < 2."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = gym.spaces.Box(-2, 2, (2,), np.float32)

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state = np.concatenate([self.np_random.uniform(-1, 1, 2), np.zeros(2)]).astype(np.float32)
        return self.state, {}

    def step(self, action):
        assert not (np.abs(action) > 2).any(), action
        self.state[2:] = 0.8 * self.state[2:] + 0.1 * np.asarray(action, np.float32)
        self.state[:2] += 0.5 * self.state[2:]
        distance = float(np.linalg.norm(self.state[:2]))
        outside = bool((np.abs(self.state[:2]) > 2).any())
        return self.state, 1 - distance, outside, False, {"success": distance < 0.2}  # always the same array

    def render(self):
        return np.full((64, 64, 3), int(100 * np.abs(self.state[:2]).max()) % 256, np.uint8)

    def terminates(self, next_obs: torch.Tensor) -> torch.Tensor:
        return (next_obs[..., :2].abs() > 2).any(-1)

    def reward(self, obs: torch.Tensor, actions: torch.Tensor, next_obs: torch.Tensor) -> torch.Tensor:
        return 1 - next_obs[..., :2].norm(dim=-1)


class Jointed(PointMass):
    """With joints, of a simulator that is not MuJoCo's own."""

    data = property(lambda self: self)
    qpos = property(lambda self: self.state[:2])
    qvel = property(lambda self: self.state[2:])

    def __init__(self, render_mode: str | None = None):
        super().__init__(render_mode)
        self.state = np.zeros(4, np.float32)


class Discrete(PointMass):
    action_space = gym.spaces.Discrete(3)


class Image(PointMass):
    observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)


class Lawless(PointMass):
    """Nobody knows when it ends."""

    terminates = None


class Split(PointMass):
    """Observations in two parts."""

    observation_space = gym.spaces.Dict(
        position=gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
        velocity=gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
    )

    def reset(self, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return dict(position=obs[:2], velocity=obs[2:]), info

    def step(self, action):
        obs, *rest = super().step(action)
        return dict(position=obs[:2], velocity=obs[2:]), *rest


for env in (PointMass, Jointed, Discrete, Image, Lawless, Split):
    gym.register(f"{env.__name__}-v0", entry_point=env, max_episode_steps=50, disable_env_checker=True)


def expert(obs: np.ndarray) -> np.ndarray:
    """A damped spring, in the environment's units."""
    return np.clip(-4 * obs[:2] - 4 * obs[2:], -2, 2).astype(np.float32)


def write_demos(path, episodes: int = 5, seed: int = 0) -> None:
    """The README's recipe for a demonstration file, on this environment."""
    names = "observations", "actions", "rewards", "next_observations", "terminations", "truncations"
    env, transitions = gym.make("PointMass-v0"), []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        done = False
        while not done:
            obs, action = obs.copy(), expert(obs)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            transitions.append((obs, action, reward, next_obs.copy(), terminated, truncated))
            obs, done = next_obs, terminated or truncated
    columns = dict(zip(names, map(np.asarray, zip(*transitions, strict=True)), strict=True))
    np.savez(path, **{name: column.astype(np.float32) for name, column in columns.items()})
