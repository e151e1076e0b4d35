"""Wrappers that change the environment of hype.py, hyper.py, hyper_paper.py and evaluate.py."""

import gymnasium as gym
import numpy as np


class TremblingHand(gym.ActionWrapper):
    """With some probability a step executes a uniformly random action instead. The seed of a reset decides when."""

    def __init__(self, env: gym.Env, p_tremble: float):
        super().__init__(env)
        self.p_tremble = p_tremble

    def reset(self, *, seed: int, options=None):
        self.rng = np.random.default_rng((seed, 1))  # not the environment's own stream
        return super().reset(seed=seed, options=options)

    def action(self, action: np.ndarray) -> np.ndarray:
        trembles = self.rng.random() < self.p_tremble
        return self.rng.uniform(-1, 1, action.shape).astype(np.float32) if trembles else action


class DemoStarts(gym.Wrapper):
    """Starts an episode, with some probability, at a random demonstrated state of MuJoCo (FILTER, arXiv 2303.14623).

    `path` is a file of evaluate.py --record, whose `states` [n, k], the time first, are those of every fourth step.
    reset's info says in "demo_start" whether the episode started there; its seed decides.
    """

    def __init__(self, env: gym.Env, path: str, num_demos: int, prob: float):
        super().__init__(env)
        data = np.load(path)
        if "states" not in data:
            raise SystemExit(f"hype.py: {path} has no simulator states to reset to; record some with evaluate.py")
        self.states = data["states"][np.cumsum(data["states"][:, 0] == 0) <= num_demos]
        self.prob = prob

    def reset(self, *, seed: int, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        rng = np.random.default_rng((seed, 2))  # not the environment's own stream
        demo_start = bool(rng.random() < self.prob)
        if demo_start:
            import mujoco

            model, data = self.unwrapped.model, self.unwrapped.data
            mujoco.mj_setState(model, data, rng.choice(self.states), mujoco.mjtState.mjSTATE_INTEGRATION)
            mujoco.mj_forward(model, data)  # everything that follows from the state
            for clock in ("_elapsed_steps", "episode_lengths"):  # time limit; hype.py
                self.set_wrapper_attr(clock, round(data.time / self.unwrapped.dt), force=False)
            obs = np.float32(self.unwrapped._get_obs()[: len(obs)])
        return obs, info | dict(demo_start=demo_start)
