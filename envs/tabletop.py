"""EARL's tabletop manipulation (Sharma et al., "Autonomous Reinforcement Learning", arXiv 2112.09605), without MuJoCo.

`import envs.tabletop` registers Tabletop-v0.
"""

from typing import ClassVar

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Tabletop(gym.Env):
    """A gripper carries a mug to one of four places and goes home, kinematically. Reward 1 at success, no termination.

    State [6]: gripper x, y; mug x, y; a flag twice, -1 free, 0 held. Goal [6]: the same. Observation [12]: both.
    Action [3]: move x, y; grip where positive. The functions take tensors with any leading dimensions.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (12,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    start = torch.tensor([0, 0, 2.5, 0, -1, -1], dtype=torch.float64)
    places = (-2.5, -1), (-2.5, 1), (0, 2), (0, -2)
    goals = torch.tensor([[0, 0, *mug, -1, -1] for mug in places], dtype=torch.float64)

    def __init__(self, render_mode: str | None = None):
        self.render_mode, self.state, self.goal = render_mode, self.start, self.goals[0]

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
        """From above: the mug's goal green, the mug red, the gripper black."""
        y, x = np.mgrid[3:-3:480j, -3:3:480j]
        image = np.full((480, 480, 3), (225, 210, 185), np.uint8)
        circles = (self.goal[2:4], 0.3, (75, 180, 75)), (self.state[2:4], 0.2, (230, 50, 50)), (self.state[:2], 0.15, 0)
        for place, radius, colour in circles:
            image[np.hypot(x - float(place[0]), y - float(place[1])) < radius] = colour
        return image

    # ----------------------------------------------------------------------------------------------- the task
    def transition(self, state: Tensor, action: Tensor) -> Tensor:
        """Next state [..., 6]: grasp or release, then move; a held mug moves as far as the gripper did."""
        action, gripper, mug = action.clamp(-1, 1), state[..., :2], state[..., 2:4]
        near = (gripper - mug).norm(dim=-1) < 0.4
        held = (action[..., 2] > 0) & (near | self.held(state))
        moved = (gripper + 0.2 * action[..., :2]).clamp(-2.8, 2.8)
        mug = torch.where(held[..., None], (mug + (moved - gripper)).clamp(-2.8, 2.8), mug)
        flag = held.to(state.dtype)[..., None] - 1
        return torch.cat([moved, mug, flag, flag], -1)

    def success(self, state: Tensor, goal: Tensor) -> Tensor:
        """bool [...]: gripper and mug within 0.2 of theirs, in four dimensions."""
        return (state[..., :4] - goal[..., :4]).norm(dim=-1) <= 0.2

    def reward(self, state: Tensor, goal: Tensor) -> Tensor:
        """[...], of having arrived at the state."""
        return self.success(state, goal).to(state.dtype)

    def distance(self, state: Tensor, goal: Tensor) -> Tensor:
        """Of the mug from its goal, [...]."""
        return (state[..., 2:4] - goal[..., 2:4]).norm(dim=-1)

    def held(self, state: Tensor) -> Tensor:
        """bool [...]"""
        return state[..., 4] > -0.5

    def project(self, state: Tensor) -> Tensor:
        """The nearest possible state."""
        flag = (state[..., 4:].mean(-1, keepdim=True) > -0.5).to(state.dtype) - 1
        return torch.cat([state[..., :4].clamp(-2.8, 2.8), flag, flag], -1)

    def start_states(self, n: int, rng: np.random.Generator) -> Tensor:
        """[n, 6]"""
        return self.start.repeat(n, 1)

    def as_goal(self, state: Tensor) -> Tensor:
        """The goal that asks for this state."""
        return state

    # ------------------------------------------------------------------------------------------ demonstrations
    def expert(self, state: Tensor, goal: Tensor, rng: np.random.Generator) -> Tensor:
        """Noisy scripted action [3]: go to the mug, grasp it, carry it along x, then y, release it, go home."""
        gripper, mug, left = state[:2], state[2:4], goal[2:4] - state[2:4]
        if (
            left.norm() < 0.13
        ):  # less could never end: a mug grasped from behind stops at x = -2.41, gripper at the edge
            way, grip = goal[:2] - gripper, -1.0
        elif self.held(state):
            way, grip = left * torch.tensor([1, 0] if left[0].abs() > 0.1 else [0, 1]), 1.0
        else:
            way, grip = mug - gripper, 1.0
        move = F.normalize(way, dim=0) * min(0.5, float(way.norm()) / 0.2) + torch.from_numpy(rng.normal(0, 0.06, 2))
        return torch.cat([move, torch.tensor([grip])]).clamp(-1, 1)


gym.register("Tabletop-v0", Tabletop, max_episode_steps=200)
