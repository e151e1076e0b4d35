"""Ant-v4's body that walks in a commanded direction, redrawn every 100 steps: `EgoAnt-v0`."""

import gymnasium as gym
import numpy as np
from gymnasium.envs.mujoco.ant_v4 import AntEnv


def egocentric(qpos: np.ndarray, qvel: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Ant's 27 numbers as seen by an ant that heads for x, and the unit direction [2] in its frame: 29 in all."""
    w, x, y, z = qpos[3:7]
    yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    c, s = np.cos(yaw / 2), np.sin(yaw / 2)
    quaternion = np.array([c * w + s * z, c * x + s * y, c * y - s * x, c * z - s * w])  # turned back by yaw
    quaternion = quaternion * (1 if quaternion[0] >= 0 else -1)
    back = np.array([[np.cos(yaw), np.sin(yaw)], [-np.sin(yaw), np.cos(yaw)]])
    return np.concatenate([qpos[2:3], quaternion, qpos[7:15], back @ qvel[:2], qvel[2:14], back @ direction])


class EgoAnt(AntEnv):
    def __init__(self, **kwargs):
        super().__init__(use_contact_forces=False, **kwargs)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (29,), np.float64)

    def _draw(self) -> None:
        angle = self.np_random.uniform(-np.pi, np.pi)
        self.direction, self.since = np.array([np.cos(angle), np.sin(angle)]), 0

    def reset_model(self):
        super().reset_model()
        self._draw()
        return egocentric(self.data.qpos, self.data.qvel, self.direction)

    def step(self, action):
        before = self.data.qpos[:2].copy()
        self.do_simulation(action, self.frame_skip)
        reward = float((self.data.qpos[:2] - before) @ self.direction) / self.dt
        terminated = not (np.isfinite(self.state_vector()).all() and 0.2 <= self.data.qpos[2] <= 1.0)
        self.since += 1
        if self.since == 100:
            self._draw()
        return egocentric(self.data.qpos, self.data.qvel, self.direction), reward, terminated, False, {}


gym.register("EgoAnt-v0", EgoAnt, max_episode_steps=1000)
