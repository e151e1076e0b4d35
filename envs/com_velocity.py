"""Robots that observe the velocity of their centre of mass, so that reward and termination are known functions of an
observed transition (rllab's robots as in the SLBO paper, on gymnasium's bodies and time steps).

`import envs.com_velocity` registers SLBO<robot>-v0 (200 steps) and SLBO<robot>Long-v0 (500 steps, as in the paper) for
HalfCheetah, Ant, Walker2d, Hopper, Swimmer and Humanoid.
"""

import gymnasium as gym
import mujoco
import numpy as np
import torch
from gymnasium.envs.mujoco import ant_v4, half_cheetah_v4, hopper_v4, humanoid_v4, swimmer_v4, walker2d_v4
from torch import Tensor


class ComVelocity:
    """Observation [qpos, qvel, of Ant the torso's rotation matrix, centre of mass (3), its velocity (3)].

    `reward` and `terminates` take tensors with any leading dimensions; actions are in the environment's units.
    """

    def __init__(self, render_mode: str | None = None):
        super().__init__(exclude_current_positions_from_observation=False, render_mode=render_mode)
        dim = len(self._get_obs())
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (dim,), np.float64)

    def extra(self) -> np.ndarray:
        return np.zeros(0)

    def _get_obs(self) -> np.ndarray:
        for refresh in (mujoco.mj_kinematics, mujoco.mj_comPos, mujoco.mj_comVel, mujoco.mj_subtreeVel):
            refresh(self.model, self.data)  # or the centre of mass lags one step of the simulator behind
        torso = self.data.body("torso")  # its subtree is the whole robot
        return np.concatenate([self.data.qpos, self.data.qvel, self.extra(), torso.subtree_com, torso.subtree_linvel])

    def step(self, action: np.ndarray):
        obs = self._get_obs()
        self.do_simulation(action, self.frame_skip)
        next_obs = self._get_obs()
        reward = self.reward(*(torch.as_tensor(x, dtype=torch.float64) for x in (obs, action, next_obs)))
        terminated = self.terminates(torch.from_numpy(next_obs))
        if self.render_mode == "human":
            self.render()
        return next_obs, float(reward), bool(terminated), False, {}

    def effort(self, actions: Tensor) -> Tensor:
        """Squared norm [...] of actions as shares of their greatest."""
        return (actions / float(self.action_space.high[0])).square().sum(-1)

    def reward(self, obs: Tensor, actions: Tensor, next_obs: Tensor) -> Tensor:
        raise NotImplementedError

    def terminates(self, next_obs: Tensor) -> Tensor:
        return torch.zeros_like(next_obs[..., 0], dtype=torch.bool)


class HalfCheetah(ComVelocity, half_cheetah_v4.HalfCheetahEnv):
    def reward(self, obs, actions, next_obs):
        return next_obs[..., -3] - 0.05 * self.effort(actions)


class Ant(ComVelocity, ant_v4.AntEnv):
    def extra(self):
        return self.data.body("torso").xmat

    def reward(self, obs, actions, next_obs):
        return next_obs[..., -3] - 0.005 * self.effort(actions) + 0.05

    def terminates(self, next_obs):
        height = next_obs[..., 2]
        return ~((height >= 0.2) & (height <= 1.0) & next_obs.isfinite().all(-1))


class Walker2d(ComVelocity, walker2d_v4.Walker2dEnv):
    def reward(self, obs, actions, next_obs):
        return next_obs[..., -3] - 0.001 * self.effort(actions) + 1

    def terminates(self, next_obs):
        height, pitch = next_obs[..., 1], next_obs[..., 2]
        return ~((height > 0.8) & (height < 2.0) & (pitch.abs() < 1.0))


class Hopper(ComVelocity, hopper_v4.HopperEnv):
    def reward(self, obs, actions, next_obs):
        return next_obs[..., -3] - 0.005 * self.effort(actions) + 1

    def terminates(self, next_obs):
        height, pitch = next_obs[..., 1], next_obs[..., 2]
        return ~((height > 0.7) & (pitch.abs() < 0.2) & (next_obs[..., 3:12].abs() < 100).all(-1))


class Swimmer(ComVelocity, swimmer_v4.SwimmerEnv):
    def reward(self, obs, actions, next_obs):
        return next_obs[..., -3] - 0.005 * self.effort(actions)


class Humanoid(ComVelocity, humanoid_v4.HumanoidEnv):
    def reward(self, obs, actions, next_obs):
        sideways = next_obs[..., -2:].square().sum(-1)
        return next_obs[..., -3] + 0.2 - 5e-4 * self.effort(actions) - 5e-3 * sideways

    def terminates(self, next_obs):
        height = next_obs[..., 2]
        return ~((height >= 0.8) & (height <= 2.0))


for robot in (HalfCheetah, Ant, Walker2d, Hopper, Swimmer, Humanoid):
    for suffix, time_limit in (("", 200), ("Long", 500)):
        name = f"SLBO{robot.__name__}{suffix}-v0"
        gym.register(name, robot, max_episode_steps=time_limit, disable_env_checker=True)
