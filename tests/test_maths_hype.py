"""HyPE's blocks against hand calculation or a second method. Numbers in the names refer to the reference page's tests."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import hype
from tests.conftest import POINT, run


def test_expert_share_schedules_4():
    """Schedules A and B at the values worked out by hand."""
    a, b = (hype.PRESETS["paper"][f"{robot}-v4 hype"]["hybrid_ratio"] for robot in ("Ant", "Hopper"))
    for schedule, steps, share in (
        (a, 0, 0.2), (a, 300_000, 0.2), (a, 600_000, 0.157143), (a, 1_000_000, 0.1), (a, 2_000_000, 0.1),
        (b, 0, 0.2), (b, 100_000, 0.15), (b, 200_000, 0.1), (b, 300_000, 0.08875), (b, 600_000, 0.055), (b, 1_000_000, 0.01),
        ((0.3,), 12_345, 0.3),
    ):  # fmt: skip
        assert hype.expert_share(schedule, steps) == pytest.approx(share, abs=1e-6), (schedule, steps)


@pytest.mark.parametrize("algo, ratio, clones", [("hype", 0.5, 0), ("mm", 0.0, 0), ("bc-reg", 0.0, 16)])
def test_what_a_batch_holds_5(algo, ratio, clones, tmp_path, demos, monkeypatch, hype_point):
    seen, original = [], hype.sac_update

    def watch(agent, batch, actor_obs, noise, args, cloned, cloned_noise):
        seen.append((batch, actor_obs, cloned))
        return original(agent, batch, actor_obs, noise, args, cloned, cloned_noise)

    monkeypatch.setattr(hype, "sac_update", watch)
    run(hype, [*hype_point, "--algo", algo, "--total-timesteps", "100", "--run-dir", tmp_path])
    expert = {row.tobytes() for row in hype.load_demos(demos, POINT[1], hype.make_env(POINT[1]), 4)[0][:, :4].numpy()}
    for batch, actor_obs, cloned in seen:
        marks = [row.tobytes() in expert for row in batch.obs.numpy()]
        n = round(16 * ratio)
        assert marks == [False] * (16 - n) + [True] * n and torch.equal(actor_obs, batch.obs)
        assert len(cloned.obs) == clones and all(row.tobytes() in expert for row in cloned.obs.numpy())


def test_resets_restore_the_demonstration_exactly_12():
    """The observation, the steps left and what the demonstrated actions lead to, to the last bit."""
    path = str(hype.Path(hype.__file__).parent / "demos" / "Hopper-v4.npz")
    starts, data = hype.load_starts(path, 2), np.load(path)
    assert len(starts) == 500
    env = hype.ExpertResets(hype.make_env("Hopper-v4"), starts, 1.0)
    for seed in range(2):
        obs, _ = env.reset(seed=seed)
        row = int(np.flatnonzero((data["observations"][:2000] == obs).all(1))[0])
        for t in range(row, row + 1000 - row % 1000):
            obs, _, terminated, truncated, _ = env.step(data["actions"][t])
            np.testing.assert_array_equal(obs.astype(np.float32), data["next_observations"][t])
        assert truncated and not terminated
    assert len({env.reset(seed=seed)[0].tobytes() for seed in range(50)}) > 40


def test_resets_have_their_probability():
    path = str(hype.Path(hype.__file__).parent / "demos" / "Hopper-v4.npz")
    env = hype.ExpertResets(hype.make_env("Hopper-v4"), hype.load_starts(path, 10), 0.3)
    limit = env.limit
    hits = sum(env.reset(seed=seed)[0][0] != 0 and limit._elapsed_steps > 0 for seed in range(400))
    assert 80 < hits < 160  # 120 +- 9, but for the demonstrations' first states


def test_steps_are_all_counted_14(tmp_path, hype_point, monkeypatch):
    calls, step = [], gym.Env.step

    from tests import pointmass

    original = pointmass.PointMass.step
    monkeypatch.setattr(pointmass.PointMass, "step", lambda self, action: [calls.append(1), original(self, action)][1])
    monkeypatch.setattr(
        hype, "evaluate", lambda *_: dict(eval_return_mean=0.0, eval_return_std=0.0, eval_success_rate=0.0, eval_length_mean=0.0)
    )
    last = run(hype, [*hype_point, "--cost-data", "rollout", "--cost-every", "50", "--total-timesteps", "600", "--run-dir", tmp_path])
    assert last["env_steps"] == len(calls) == last["charts/train_steps"] + last["charts/cost_rollout_steps"]
    assert last["charts/cost_rollout_steps"] > 100 and step
