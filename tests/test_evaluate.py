"""evaluate.py: what it measures, films and records."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import evaluate
import hyper
import sac
from tests.conftest import POINT, ROOT

HOPPER = ROOT / "demos" / "experts" / "Hopper-v4.pt"


def save_policy(folder, env_id: str, obs_dim: int, act_dim: int):
    """The policy of a run that learned nothing."""
    torch.manual_seed(0)
    sizes = obs_dim, act_dim, (16, 16)
    about = dict(actor=sac.Actor(*sizes).state_dict(), sizes=sizes, script="sac", env_id=env_id)
    torch.save(about, folder / "policy.pt")
    return folder


def test_it_measures_a_policy_as_training_does(tmp_path, capsys):
    folder = save_policy(tmp_path, POINT, 4, 2)
    policy = torch.load(folder / "policy.pt", weights_only=True)
    actor = sac.Actor(*policy["sizes"])
    actor.load_state_dict(policy["actor"])
    wanted = sac.evaluate(actor, sac.make_env(POINT), 5, seed=17)
    evaluate.main(evaluate.Args(folder, episodes=5, seed=17))
    told = capsys.readouterr().out
    assert f"return {wanted['eval_return_mean']:.1f} +- {wanted['eval_return_std']:.1f}" in told
    assert f"length {wanted['eval_length_mean']:.0f}, success rate {wanted['eval_success_rate']:.2f}" in told


def test_what_it_records_loads_as_demonstrations_of_the_policy(tmp_path):
    folder = save_policy(tmp_path, POINT, 4, 2)
    evaluate.main(evaluate.Args(folder, episodes=3, record=tmp_path / "d.npz", full_length=True))
    raw = np.load(tmp_path / "d.npz")
    about = json.loads(str(raw["metadata"]))
    assert about["env_id"] == POINT and about["episodes"] == 3 and raw["truncations"].sum() == 3
    assert raw["observations"].shape == (150, 4) and not {"states", "qpos"} & set(raw)
    data, _ = hyper.load_demos(str(tmp_path / "d.npz"), hyper.make_env(POINT), 3, "cpu")
    actor = sac.Actor(4, 2, (16, 16))
    actor.load_state_dict(torch.load(folder / "policy.pt", weights_only=True)["actor"])
    action = actor.act(raw["observations"][7], deterministic=True)
    np.testing.assert_allclose(data.actions[7], action, atol=1e-5)
    np.testing.assert_allclose(raw["actions"][7], 2 * action, atol=1e-5)  # in the environment's units


def test_episodes_of_low_return_can_be_left_out(tmp_path, capsys):
    folder = save_policy(tmp_path, POINT, 4, 2)
    evaluate.main(evaluate.Args(folder, episodes=6, record=tmp_path / "all.npz"))
    raw = np.load(tmp_path / "all.npz")
    ends = np.flatnonzero(raw["terminations"] + raw["truncations"]) + 1
    returns = np.array([episode.sum() for episode in np.split(raw["rewards"], ends[:-1])])
    bar = float(np.sort(returns)[3]) - 1e-3
    evaluate.main(evaluate.Args(folder, episodes=3, record=tmp_path / "some.npz", min_return=bar))
    some = np.load(tmp_path / "some.npz")
    assert some["rewards"].sum() == pytest.approx(returns[returns >= bar][:3].sum(), rel=1e-5)
    about = json.loads(str(some["metadata"]))
    assert about["episodes"] == 3 and about["of"] == np.flatnonzero(returns >= bar)[2] + 1
    with pytest.raises(SystemExit, match=r"only 0 of 20 episodes were good enough"):
        evaluate.main(evaluate.Args(folder, episodes=1, record=tmp_path / "none.npz", min_return=1e6))
    assert not (tmp_path / "none.npz").exists()


def test_recorded_states_put_the_simulator_back_to_the_last_bit(tmp_path):
    """From the state at a step, the policy goes on as it did, also much later."""
    import mujoco

    evaluate.main(evaluate.Args(HOPPER, episodes=1, record=tmp_path / "d.npz"))
    data, policy, env = np.load(tmp_path / "d.npz"), torch.load(HOPPER, weights_only=True), sac.make_env("Hopper-v4")
    assert len(data["states"]) == 1_000 / 4 and data["states"].dtype == np.float64 and data["rewards"].sum() > 3_000
    actor = sac.Actor(*policy["sizes"])
    actor.load_state_dict(policy["actor"])
    env.reset(seed=0)
    model, simulator = env.unwrapped.model, env.unwrapped.data
    for number in (0, 100, 200):
        mujoco.mj_setState(model, simulator, data["states"][number], mujoco.mjtState.mjSTATE_INTEGRATION)
        np.testing.assert_array_equal(simulator.qpos.astype(np.float32), data["qpos"][4 * number])
        for row in range(4 * number, 4 * number + 200):
            action = actor.act(data["observations"][row], deterministic=True)
            np.testing.assert_allclose(data["actions"][row], action, atol=2e-7)
            np.testing.assert_array_equal(env.step(action)[0], data["next_observations"][row])


def test_a_simulator_that_is_not_mujocos_own_gives_joints_but_no_states(tmp_path):
    folder = save_policy(tmp_path, "tests.pointmass:Jointed-v0", 4, 2)
    evaluate.main(evaluate.Args(folder, episodes=2, record=tmp_path / "d.npz"))
    data = np.load(tmp_path / "d.npz")
    assert "states" not in data and data["qvel"].shape == data["qpos"].shape
    np.testing.assert_array_equal(data["qpos"], data["observations"][:, :2])


def test_sampled_actions_are_others_and_repeat_with_the_seed(tmp_path):
    folder, actions = save_policy(tmp_path, "Hopper-v4", 11, 3), []
    for sample, seed in ((True, 3), (True, 3), (False, 3), (True, 4)):
        evaluate.main(evaluate.Args(folder, episodes=2, record=tmp_path / "d.npz", sample=sample, seed=seed))
        actions.append(np.load(tmp_path / "d.npz")["actions"])
    assert np.array_equal(actions[0], actions[1])
    assert not np.array_equal(actions[0][0], actions[2][0]) and not np.array_equal(actions[0][0], actions[3][0])


@pytest.mark.parametrize("env_id,dims", [(POINT, (4, 2)), ("Hopper-v4", (11, 3))])
def test_it_films(env_id, dims, tmp_path):
    """In a process of its own, because MuJoCo chooses its renderer when it is first imported."""
    pytest.importorskip("moviepy")
    folder = save_policy(tmp_path, env_id, *dims)
    words = [sys.executable, str(ROOT / "evaluate.py"), str(folder), "--video", "--episodes", "1"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if result.returncode and env_id != POINT:
        pytest.skip(f"no renderer: {result.stderr.splitlines()[-1]}")
    assert result.returncode == 0, result.stderr
    (video,) = (folder / "videos").glob("*.mp4")
    assert video.stat().st_size > 1_000


@pytest.mark.parametrize("path", sorted((ROOT / "demos" / "experts").glob("*.pt")), ids=lambda path: path.stem)
def test_bundled_experts_load(path):
    policy = torch.load(path, weights_only=True)
    env, actor = sac.make_env(policy["env_id"]), sac.Actor(*policy["sizes"])
    actor.load_state_dict(policy["actor"])
    obs, _ = env.reset(seed=0)
    assert env.action_space.contains(actor.act(obs, deterministic=True))
