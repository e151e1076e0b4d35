"""evaluate.py: what it measures, films and records."""

import json
import subprocess
import sys
from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch

import evaluate
import hyper
import sac
from envs.wrappers import TremblingHand
from tests.conftest import POINT, ROOT

EXPERTS = sorted((ROOT / "demos" / "experts").glob("*.pt"))


def save_policy(folder: Path, env_id: str, obs_dim: int, act_dim: int) -> Path:
    """A policy that learned nothing, of large actions."""
    torch.manual_seed(0)
    sizes = obs_dim, act_dim, (16, 16)
    actor = sac.Actor(*sizes)
    actor.net.weights[-1].data *= 6
    about = dict(actor=actor.state_dict(), sizes=sizes, script="sac", env_id=env_id)
    torch.save(about, folder / "policy.pt")
    return folder


def load_actor(path: Path) -> sac.Actor:
    policy = torch.load(path, weights_only=True)
    actor = sac.Actor(*policy["sizes"])
    actor.load_state_dict(policy["actor"])
    return actor


def record(policy: Path, file: Path, episodes: int, **settings) -> dict[str, np.ndarray]:
    evaluate.main(evaluate.Args(policy, episodes=episodes, record=file, **settings))
    return dict(np.load(file))


def test_it_measures_as_training_does_and_what_it_records_loads_as_demonstrations(tmp_path, capsys):
    folder, env = save_policy(tmp_path, POINT, 4, 2), hyper.make_env(POINT)
    raw, actor = record(folder, tmp_path / "d.npz", 3, full_length=True, seed=17), load_actor(folder / "policy.pt")
    about = json.loads(str(raw["metadata"]))
    result = sac.evaluate(actor, env, about["of"], seed=17)
    told = "return {:.1f} +- {:.1f}, length {:.0f}, success rate {:.2f}".format(*result.values())
    assert told in capsys.readouterr().out and about["of"] > 3
    assert about["env_id"] == POINT and about["episodes"] == 3 and raw["truncations"].sum() == 3
    assert raw["observations"].shape == (150, 4) and not {"states", "qpos"} & set(raw)
    data, _, returns = hyper.load_demos(str(tmp_path / "d.npz"), env, 3, 1, "cpu")
    assert returns.mean() == pytest.approx(raw["rewards"].sum() / 3, rel=1e-5)
    action = actor.act(raw["observations"][7], deterministic=True)
    np.testing.assert_allclose(data.actions[7], action, atol=1e-5)
    np.testing.assert_allclose(raw["actions"][7], 2 * action, atol=1e-5)  # in the environment's units


def test_the_hand_trembles(tmp_path, capsys):
    folder, told = save_policy(tmp_path, POINT, 4, 2), []
    for p_tremble in (0.0, 0.3):
        evaluate.main(evaluate.Args(folder, episodes=3, seed=17, p_tremble=p_tremble))
        env = TremblingHand(sac.make_env(POINT), p_tremble)
        mean = sac.evaluate(load_actor(folder / "policy.pt"), env, 3, seed=17)["eval_return_mean"]
        told.append(f"return {mean:.1f} ")
        assert told[-1] in capsys.readouterr().out
    assert told[0] != told[1]


def test_episodes_of_low_return_can_be_left_out(tmp_path):
    """The simulator has joints, but is not MuJoCo's own."""
    folder = save_policy(tmp_path, "tests.pointmass:Jointed-v0", 4, 2)
    raw = record(folder, tmp_path / "all.npz", 6)
    ends = np.flatnonzero(raw["terminations"] + raw["truncations"]) + 1
    returns = np.array([episode.sum() for episode in np.split(raw["rewards"], ends[:-1])])
    bar = float(np.sort(returns)[3]) - 1e-3
    some = record(folder, tmp_path / "some.npz", 3, min_return=bar)
    about, good = json.loads(str(some["metadata"])), np.flatnonzero(returns >= bar)
    assert some["rewards"].sum() == pytest.approx(returns[good].sum(), rel=1e-5)
    assert about["episodes"] == len(good) == 3 and about["of"] == good[2] + 1
    assert "states" not in some and some["qvel"].shape == some["qpos"].shape
    np.testing.assert_array_equal(some["qpos"], some["observations"][:, :2])
    with pytest.raises(SystemExit, match=r"only 0 of 20 episodes were good enough"):
        record(folder, tmp_path / "none.npz", 1, min_return=1e6)
    assert not (tmp_path / "none.npz").exists()
    with pytest.raises(SystemExit, match=r"there is no .*runz"):
        record(tmp_path / "runz", tmp_path / "none.npz", 1)


def test_recorded_states_put_the_simulator_back_to_the_last_bit(tmp_path):
    """From the state at a step, the policy goes on as it did, also much later."""
    path, env = ROOT / "demos" / "experts" / "Hopper-v4.pt", sac.make_env("Hopper-v4")
    data, actor = record(path, tmp_path / "d.npz", 1), load_actor(path)
    assert len(data["states"]) == 1_000 / 4 and data["states"].dtype == np.float64 and data["rewards"].sum() > 3_000
    env.reset(seed=0)
    model, simulator = env.unwrapped.model, env.unwrapped.data
    for number in (0, 100, 200):
        mujoco.mj_setState(model, simulator, data["states"][number], mujoco.mjtState.mjSTATE_INTEGRATION)
        np.testing.assert_array_equal(simulator.qpos.astype(np.float32), data["qpos"][4 * number])
        for row in range(4 * number, 4 * number + 200):
            action = actor.act(data["observations"][row], deterministic=True)
            np.testing.assert_allclose(data["actions"][row], action, atol=2e-7)
            np.testing.assert_array_equal(env.step(action)[0], data["next_observations"][row])


def test_sampled_actions_are_others_and_repeat_with_the_seed(tmp_path):
    folder, settings = save_policy(tmp_path, "Hopper-v4", 11, 3), [(True, 3), (True, 3), (False, 3), (True, 4)]
    runs = [record(folder, tmp_path / "d.npz", 2, sample=sample, seed=seed)["actions"] for sample, seed in settings]
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0][0], runs[2][0]) and not np.array_equal(runs[0][0], runs[3][0])


def test_it_films(tmp_path):
    pytest.importorskip("moviepy")
    folder = save_policy(tmp_path, POINT, 4, 2)
    words = [sys.executable, str(ROOT / "evaluate.py"), str(folder), "--video", "--episodes", "1"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (video,) = (folder / "videos").glob("*.mp4")
    assert video.stat().st_size > 1_000


@pytest.mark.parametrize("path", EXPERTS, ids=lambda path: path.stem)
def test_bundled_experts_load(path):
    env = sac.make_env(torch.load(path, weights_only=True)["env_id"])
    obs, _ = env.reset(seed=0)
    assert env.action_space.contains(load_actor(path).act(obs, deterministic=True))
