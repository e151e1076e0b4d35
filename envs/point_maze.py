"""PointMaze_UMaze of gymnasium-robotics without resets. `import envs.point_maze` registers PersistentPointMaze-v0."""

import contextlib
import io
from typing import ClassVar

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class PersistentPointMaze(gym.Env):
    """A ball is pushed round a wall from one end of a U to the other: reward 1 at success, no termination.

    State [4]: x, y and their velocities. Goal [2]: x, y. Observation [6]: both. Action [2]: force. The functions take
    tensors with any leading dimensions. MuJoCo computes each step from the state alone.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 50}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (6,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    goals = torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
    cells = (-1.0, -1), (0, -1), (1, -1), (1, 0), (1, 1), (0, 1), (-1, 1)  # their centres, from one end to the other
    path = torch.tensor(cells, dtype=torch.float64)

    def __init__(self, render_mode: str | None = None):
        with contextlib.redirect_stderr(io.StringIO()):  # it announces what does not concern mazes
            import gymnasium_robotics

        gym.register_envs(gymnasium_robotics)
        self.point, self.render_mode = gym.make("PointMaze_UMaze-v3").unwrapped.point_env, render_mode
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
        """From above: the wall grey, the goal green, the ball red."""
        y, x = np.mgrid[1.6:-1.6:480j, -1.6:1.6:480j]
        image = np.full((480, 480, 3), (225, 210, 185), np.uint8)
        image[(x < 0.5) & (abs(y) < 0.5) | (np.maximum(abs(x), abs(y)) > 1.5)] = 100
        for place, radius, colour in ((self.goal, 0.45, (75, 180, 75)), (self.state, 0.1, (230, 50, 50))):
            image[np.hypot(x - float(place[0]), y - float(place[1])) < radius] = colour
        return image

    # ----------------------------------------------------------------------------------------------- the task
    def transition(self, state: Tensor, action: Tensor) -> Tensor:
        """Next state [..., 4]: 0.01 s of force on the ball, whose speed is first cut to 5 along each axis."""
        import mujoco

        after = []
        states, forces = (x.double().cpu().numpy() for x in (state.reshape(-1, 4), action.reshape(-1, 2)))
        for one, force in zip(states, forces, strict=True):
            mujoco.mj_resetData(self.point.model, self.point.data)  # its solver remembers the last step's forces
            self.point.set_state(one[:2], one[2:])
            after.append(self.point.step(force)[0])
        return torch.from_numpy(np.array(after)).to(state).reshape(state.shape)

    def success(self, state: Tensor, goal: Tensor) -> Tensor:
        """bool [...]"""
        return self.distance(state, goal) <= 0.45

    def reward(self, state: Tensor, goal: Tensor) -> Tensor:
        """[...], of having arrived at the state."""
        return self.success(state, goal).to(state.dtype)

    def distance(self, state: Tensor, goal: Tensor) -> Tensor:
        """[...]"""
        return (state[..., :2] - goal[..., :2]).norm(dim=-1)

    def project(self, state: Tensor) -> Tensor:
        """Into the outer walls, which give way a little, and the speed that a push adds to the bound of 5."""
        return torch.cat([state[..., :2].clamp(-1.45, 1.45), state[..., 2:].clamp(-5.3, 5.3)], -1)

    def start_states(self, n: int, rng: np.random.Generator) -> Tensor:
        """[n, 4], in the first cell, at rest."""
        return F.pad(self.path[0] + torch.from_numpy(rng.uniform(-0.25, 0.25, (n, 2))), (0, 2))

    def as_goal(self, state: Tensor) -> Tensor:
        """The goal that asks for this state."""
        return state[..., :2]

    # ------------------------------------------------------------------------------------------ demonstrations
    def expert(self, state: Tensor, goal: Tensor, rng: np.random.Generator) -> Tensor:
        """Noisy action [2] towards the next cell on the way."""
        here, there = ((self.path - place).norm(dim=-1).argmin() for place in (state[:2], goal))
        way = (goal if here == there else self.path[here + (there - here).sign()]) - state[:2]
        return ((10 * way - state[2:]).clamp(-1, 1) + torch.from_numpy(rng.normal(0, 0.1, 2))).clamp(-1, 1)


gym.register("PersistentPointMaze-v0", PersistentPointMaze, max_episode_steps=300)
