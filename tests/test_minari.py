"""demos/from_minari.py, on small data sets made here."""

import copy
import sys
from types import SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch

import hyper
from demos import from_minari

# Minari writes the environment's entry point into the data set: a name, not a class.
gym.register("NamedSplit-v0", "tests.pointmass:Split", max_episode_steps=50, disable_env_checker=True)


class Copied(minari.StepDataCallback):
    """The point mass gives the same arrays at every step."""

    def __call__(self, env, **step):
        return copy.deepcopy(super().__call__(env, **step))


def tree_map(function, tree, *others):
    """All that Minari, when it makes a data set, needs of jax, which is no requirement of ours."""
    if isinstance(tree, dict):
        return {name: tree_map(function, part, *(other[name] for other in others)) for name, part in tree.items()}
    return function(tree, *others)


@pytest.mark.parametrize("env_id", ["Ant-v5", "NamedSplit-v0"])
def test_a_minari_data_set_loads_as_what_the_environment_showed(env_id, tmp_path, monkeypatch):
    """Three recorded episodes, cut short; expected: what make_env gives for the same seeds and actions."""
    jax = SimpleNamespace(tree_util=SimpleNamespace(tree_map=tree_map))
    monkeypatch.setitem(sys.modules, "jax", jax)
    monkeypatch.setitem(sys.modules, "jax.tree_util", jax.tree_util)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    recorder, env = minari.DataCollector(gym.make(env_id), step_data_callback=Copied), hyper.make_env(env_id)
    low, high, draw = env.unwrapped.action_space.low, env.unwrapped.action_space.high, np.random.default_rng(0)
    expected = []
    for seed in range(3):
        recorder.reset(seed=seed)
        obs, _ = env.reset(seed=seed)
        for _ in range(5 + seed):
            action = draw.uniform(-1, 1, low.shape).astype(np.float32)
            recorder.step(low + (action + 1) / 2 * (high - low))
            next_obs, reward, *_ = env.step(action)
            expected.append((obs, action, next_obs, reward))
            obs = next_obs
    recorder.create_dataset("test/three-v0")
    from_minari.main(from_minari.Args("test/three-v0", tmp_path / "two.npz", episodes=2))
    minari.delete_dataset("test/three-v0")

    *columns, rewards = (torch.as_tensor(np.array(column[:11])) for column in zip(*expected, strict=True))
    demos, _, returns = hyper.load_demos(str(tmp_path / "two.npz"), env, 2, 1, "cpu")
    torch.testing.assert_close([demos.obs, demos.actions, demos.next_obs], columns)
    assert returns.mean() == pytest.approx(rewards.sum().item() / 2, rel=1e-5)
    assert not demos.terminations.any()  # cut short is no termination
    assert np.flatnonzero(np.load(tmp_path / "two.npz")["truncations"]).tolist() == [4, 10]
