"""A point with momentum on a square. `import envs.point_mass` registers PointMass2D-v0 and PointMass2DCoarse-v0, whose
steps are twice as long.
"""

from typing import ClassVar

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class PointMass2D(gym.Env):
    """The point is pushed from one corner to the other; the distance is the cost, and nothing terminates.

    State [4]: x, y and their velocities. Goal [2]: x, y. Observation [6]: both. Action [2]: force. The functions take
    tensors with any leading dimensions.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 25}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (6,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    goals = torch.tensor([[0.8, 0.8]], dtype=torch.float64)

    def __init__(self, frame_skip: int = 2, render_mode: str | None = None):
        self.frame_skip, self.render_mode = frame_skip, render_mode
        self.state, self.goal = self.start_states(1, np.random.default_rng(0))[0], self.goals[0]

    # ----------------------------------------------------------------------------------------------- Gymnasium
    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.state = self.start_states(1, self.np_random)[0]
        self.goal = self.goals[self.np_random.integers(len(self.goals))]
        return self.observation(), {}

    def step(self, action: np.ndarray):
        self.state = self.transition(self.state, torch.as_tensor(action, dtype=torch.float64))
        success = bool(self.success(self.state, self.goal))
        return self.observation(), float(self.reward(self.state, self.goal)), False, False, {"is_success": success}

    def observation(self) -> np.ndarray:
        return torch.cat([self.state, self.goal]).float().numpy()

    def get_state(self) -> dict:
        """All that the next steps and resets depend on."""
        return dict(state=self.state, goal=self.goal, rng=self.np_random.bit_generator.state)

    def set_state(self, saved: dict) -> None:
        self.state, self.goal, self.np_random.bit_generator.state = saved["state"], saved["goal"], saved["rng"]

    def render(self) -> np.ndarray:
        """From above: the goal green, the point red."""
        y, x = np.mgrid[1.1:-1.1:480j, -1.1:1.1:480j]
        image = np.full((480, 480, 3), (225, 210, 185), np.uint8)
        for place, radius, colour in ((self.goal, 0.1, (75, 180, 75)), (self.state, 0.05, (230, 50, 50))):
            image[np.hypot(x - float(place[0]), y - float(place[1])) < radius] = colour
        return image

    # ----------------------------------------------------------------------------------------------- the task
    def transition(self, state: Tensor, action: Tensor) -> Tensor:
        """Next state [..., 4] by semi-implicit Euler steps of 0.02 s; mass 0.3, damping 1 (taken implicitly).

        The closed form of a MuJoCo model with two slide joints as long as no wall is touched; walls are hard.
        """
        (place, velocity), force = state.chunk(2, -1), action.clamp(-1, 1)
        for _ in range(self.frame_skip):
            velocity = velocity + 0.02 * (force - velocity) / (0.3 + 0.02)
            place = place + 0.02 * velocity
            velocity = torch.where(place.abs() > 1, 0.0, velocity)
            place = place.clamp(-1, 1)
        return torch.cat([place, velocity], -1)

    def success(self, state: Tensor, goal: Tensor) -> Tensor:
        """bool [...]"""
        return self.distance(state, goal) <= 0.1

    def reward(self, state: Tensor, goal: Tensor) -> Tensor:
        """[...], of having arrived at the state."""
        return -self.distance(state, goal)

    def distance(self, state: Tensor, goal: Tensor) -> Tensor:
        """[...]"""
        return (state[..., :2] - goal[..., :2]).norm(dim=-1)

    def project(self, state: Tensor) -> Tensor:
        """The nearest possible state: beyond a wall, there and without the velocity into it."""
        place, velocity = state.chunk(2, -1)
        velocity = torch.where((place.abs() > 1) & (place * velocity > 0), 0.0, velocity)
        return torch.cat([place.clamp(-1, 1), velocity], -1)

    def start_states(self, n: int, rng: np.random.Generator) -> Tensor:
        """[n, 4], near one corner, at rest."""
        return F.pad(torch.from_numpy(rng.uniform(-0.85, -0.75, (n, 2))), (0, 2))

    def uniform_states(self, n: int, rng: np.random.Generator) -> Tensor:
        """[n, 4], all over the square."""
        return torch.from_numpy(rng.uniform(-1, 1, (n, 4)))

    def as_goal(self, state: Tensor) -> Tensor:
        """The goal that asks for this state."""
        return state[..., :2]

    # ------------------------------------------------------------------------------------------ demonstrations
    def expert(self, state: Tensor, goal: Tensor, rng: np.random.Generator) -> Tensor:
        """Noisy action [2] of a damped spring."""
        spring = (4 * (goal - state[:2]) - state[2:]).clamp(-1, 1)
        return (spring + torch.from_numpy(rng.normal(0, 0.1, 2))).clamp(-1, 1)


gym.register("PointMass2D-v0", PointMass2D, max_episode_steps=100)
gym.register("PointMass2DCoarse-v0", PointMass2D, max_episode_steps=100, kwargs=dict(frame_skip=4))
