"""Robots with a task that can be changed: the reward is a known function of an observed transition and of the task.

`import envs.multitask` registers HCFB-v0, HCF-v0, HCP-v0 (HalfCheetah) and AFB-v0, AF-v0, AD-v0 (Ant), 200 steps an
episode, on the robots of envs/com_velocity.py. The task is not observed; in HCFBTold-v0 and so on it stands in front of
the observation. `env.unwrapped.task` is a tuple of floats, `draw_task(rng)` draws one.
"""

import gymnasium as gym
import numpy as np
from torch import Tensor

from envs.com_velocity import Ant, HalfCheetah


class HalfCheetahDirection(HalfCheetah):
    """Task: the direction to run in, -1 or 1."""

    task = (1.0,)

    def draw_task(self, rng: np.random.Generator) -> tuple[float, ...]:
        return (float(rng.choice((-1.0, 1.0))),)

    def reward(self, obs: Tensor, actions: Tensor, next_obs: Tensor) -> Tensor:
        return self.task[0] * next_obs[..., -3] - 0.05 * self.effort(actions)


class HalfCheetahVelocity(HalfCheetah):
    """Task: the speed to keep, in [-2, 2]; negative is backwards."""

    task, low, high = (0.0,), -2.0, 2.0

    def draw_task(self, rng: np.random.Generator) -> tuple[float, ...]:
        return (float(rng.uniform(self.low, self.high)),)

    def reward(self, obs: Tensor, actions: Tensor, next_obs: Tensor) -> Tensor:
        return -(next_obs[..., -3] - self.task[0]).abs() - 0.05 * self.effort(actions)


class HalfCheetahSpeed(HalfCheetahVelocity):
    """Task: the speed to keep, in [0, 2]."""

    low = 0.0


class AntDirection(Ant):
    """Task: the direction to run in, -1 or 1."""

    task = (1.0,)

    def draw_task(self, rng: np.random.Generator) -> tuple[float, ...]:
        return (float(rng.choice((-1.0, 1.0))),)

    def reward(self, obs: Tensor, actions: Tensor, next_obs: Tensor) -> Tensor:
        return self.task[0] * next_obs[..., -3] + 0.05 - 0.005 * self.effort(actions)


class AntVelocity(Ant):
    """Task: the velocity to keep along x, in [-3, 3]."""

    task = (0.0,)

    def draw_task(self, rng: np.random.Generator) -> tuple[float, ...]:
        return tuple(rng.uniform(-3, 3, len(self.task)).tolist())

    def reward(self, obs: Tensor, actions: Tensor, next_obs: Tensor) -> Tensor:
        """Each component that is right earns 1, so that falling does not pay."""
        alive = len(self.task) + 0.05
        return alive - sum(self.misses(next_obs)) - 0.005 * self.effort(actions)

    def misses(self, next_obs: Tensor) -> list[Tensor]:
        """Distances [...] of the velocity's components from the task's."""
        return [(next_obs[..., i - 3] - target).abs() for i, target in enumerate(self.task)]


class AntVelocity2D(AntVelocity):
    """Task: the velocity to keep in the plane, both components in [-3, 3]."""

    task = (0.0, 0.0)


class Told(gym.ObservationWrapper):
    """The task stands in front of the observation."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        dim = len(env.unwrapped.task) + env.observation_space.shape[0]
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (dim,), np.float64)

    def observation(self, obs: np.ndarray) -> np.ndarray:
        return np.concatenate([self.unwrapped.task, obs])


def told(robot: type, render_mode: str | None = None) -> gym.Env:
    return Told(robot(render_mode=render_mode))


FAMILIES = dict(HCFB=HalfCheetahDirection, HCF=HalfCheetahVelocity, HCP=HalfCheetahSpeed)
FAMILIES |= dict(AFB=AntDirection, AF=AntVelocity, AD=AntVelocity2D)
for name, robot in FAMILIES.items():
    gym.register(f"{name}-v0", robot, max_episode_steps=200, disable_env_checker=True)
    gym.register(f"{name}Told-v0", told, max_episode_steps=200, disable_env_checker=True, kwargs=dict(robot=robot))
