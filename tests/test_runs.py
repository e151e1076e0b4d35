"""Whole runs with tiny networks: what they write, that they repeat, resume and count, and that they learn."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import hyper
import sac
from tests.conftest import POINT, TINY_HYPER, TINY_SAC, rows, run

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("KILLS", 3))
COLUMNS = ["env_steps", "updates", "eval_return_mean", "eval_return_std", "eval_success_rate", "expert_return"]


def argv_of(script, hyper_point) -> list[str]:
    return hyper_point if script is hyper else [*POINT, *TINY_SAC]


@pytest.mark.parametrize("script", [sac, hyper])
def test_run_folder_is_complete(script, tmp_path, hyper_point):
    last = run(script, [*argv_of(script, hyper_point), "--total-timesteps", "120", "--eval-every", "60", "--run-dir", tmp_path])
    table = rows(tmp_path)
    assert [int(row["env_steps"]) for row in table] == [0, 60, 120] and set(COLUMNS) <= set(table[0])
    assert last["env_steps"] == 120 and float(table[-1]["updates"]) == (60 if script is sac else 122)
    assert 0 <= float(table[-1]["eval_success_rate"]) <= 1
    about = json.loads((tmp_path / "args.json").read_text())
    assert about["args"]["seed"] == 1 and about["versions"]["torch"].startswith("2.13")
    assert list(tmp_path.glob("events.out.tfevents.*"))
    policy = torch.load(tmp_path / "policy.pt", weights_only=True)
    actor = sac.Actor(policy["obs_dim"], policy["act_dim"], tuple(policy["hidden_sizes"]))
    actor.load_state_dict(policy["actor"])
    assert actor.act(np.zeros(4)).shape == (2,) and policy["action_high"] == [2, 2]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "env_id", ["Hopper-v4", "Walker2d-v5", "Ant-v4", "Ant-v5", "Humanoid-v5", "dm_control/cartpole-balance-v0", "PointMaze_UMaze-v3"]
)
def test_sac_runs_on_every_kind_of_environment(env_id, tmp_path):
    run(sac, ["--env-id", env_id, *TINY_SAC, "--total-timesteps", "70", "--eval-every", "70", "--run-dir", tmp_path])
    assert all(np.isfinite(float(row["eval_return_mean"])) for row in rows(tmp_path))


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Ant-v4", "Hopper-v5"])
def test_hyper_runs_on_bundled_demonstrations(env_id, tmp_path):
    demos = ["--demos", str(ROOT / "demos" / "Hopper-v4.npz")] if env_id == "Hopper-v5" else []
    run(hyper, ["--env-id", env_id, *demos, *TINY_HYPER, "--total-timesteps", "70", "--eval-every", "70", "--run-dir", tmp_path])
    last = rows(tmp_path)[-1]
    for name in ("model/hold_out_mse", "model/error_1_step", "model/disagreement", "reward/gap", "losses/cost", "losses/critic"):
        assert np.isfinite(float(last[name])), name


VARIANTS = [
    ["--preset", "paper", "--initial-steps", "40", "--total-timesteps", "300", "--cost-every", "30", "--model-first-batches", "3"],
    ["--model-data", "learner", "--expert-start-prob", "0"],
    ["--expert-start-prob", "1", "--cost-reduce", "max", "--cost-members", "3", "--pessimism-coef", "0.5"],
    ["--p-tremble", "0.2", "--termination", "learned", "--cost-reduce", "mean", "--bf16"],
    [
        "--hybrid-size",
        "100",
        "--start-coin",
        "call",
        "--cost-window",
        "50",
        "--lr-sawtooth",
        "10",
        "--reset-every",
        "7",
        "--model-cosine",
        "9",
    ],
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: " ".join(v[:2]))
def test_every_experiment_flag_runs(variant, tmp_path, hyper_point):
    run(hyper, [*hyper_point, "--total-timesteps", "150", "--eval-every", "50", "--run-dir", tmp_path, *variant])
    assert np.isfinite(float(rows(tmp_path)[-1]["losses/critic"]))


@pytest.mark.parametrize("script", [sac, hyper])
def test_same_seed_same_csv_and_another_seed_another(script, tmp_path, hyper_point):
    argv = [*argv_of(script, hyper_point), "--total-timesteps", "150", "--eval-every", "50"]
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(script, [*argv, "--seed", seed, "--run-dir", tmp_path / name])
    assert rows(tmp_path / "a") == rows(tmp_path / "b") != rows(tmp_path / "c")


@pytest.mark.parametrize("script", [sac, hyper])
def test_an_extra_evaluation_changes_nothing(script, tmp_path, hyper_point):
    argv = [*argv_of(script, hyper_point), "--total-timesteps", "120"]
    for name, every in (("a", 120), ("b", 10)):
        run(script, [*argv, "--eval-every", every, "--eval-episodes", 1 if name == "a" else 3, "--run-dir", tmp_path / name])
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["parts"]["agent"] for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("script", [sac, hyper])
def test_resumed_run_equals_an_uninterrupted_one(script, tmp_path, hyper_point):
    """Stopped in the middle of an episode, with different lengths of what was before and after."""
    extra = ["--p-tremble", "0.1", "--cost-data", "rollout", "--cost-every", "20"] if script is hyper else []
    argv = [*argv_of(script, hyper_point), *extra, "--eval-every", "40"]
    run(script, [*argv, "--total-timesteps", "480", "--run-dir", tmp_path / "whole"])
    run(script, [*argv, "--total-timesteps", "200", "--run-dir", tmp_path / "parts"])
    parts = rows(tmp_path / "parts")
    assert 0 < len(parts) < len(rows(tmp_path / "whole"))
    run(script, ["--resume", tmp_path / "parts", "--total-timesteps", "360"])
    run(script, ["--resume", tmp_path / "parts", "--total-timesteps", "480"])
    whole, resumed = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    steps = {row["env_steps"] for row in whole}
    assert whole == [row for row in resumed if row["env_steps"] in steps] if script is hyper else whole == resumed


def command(script, argv) -> list[str]:
    return [sys.executable, str(ROOT / f"{script.__name__}.py"), *map(str, argv)]


def environment() -> dict:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("script", [sac, hyper])
def test_a_signal_saves_first_and_the_run_goes_on_exactly(script, tmp_path, hyper_point):
    argv = [*argv_of(script, hyper_point), "--eval-every", "100", "--total-timesteps", "800", "--checkpoint-every", "0"]
    run(script, [*argv, "--run-dir", tmp_path / "whole"])
    process = subprocess.Popen(
        command(script, [*argv, "--run-dir", tmp_path / "cut"]), env=environment(), stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "cut" / "progress.csv").exists() or len(rows(tmp_path / "cut")) < 4:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "--resume" in errors and "Traceback" not in errors
    assert len(rows(tmp_path / "cut")) < 9
    run(script, ["--resume", tmp_path / "cut"])
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_kill_9_loses_only_the_steps_since_the_last_checkpoint(tmp_path, hyper_point):
    """KILLS=20 for the long version. The run ends with the progress.csv of one that was never killed."""
    argv = [*hyper_point, "--eval-every", "100", "--total-timesteps", str(400 + 100 * KILLS), "--checkpoint-every", "50"]
    run(hyper, [*argv, "--run-dir", tmp_path / "whole"])
    rng, killed, start = np.random.default_rng(0), 0, [*argv, "--run-dir", tmp_path / "killed"]
    while killed < KILLS:
        process = subprocess.Popen(command(hyper, start), env=environment(), stderr=subprocess.PIPE)
        checkpoint = tmp_path / "killed" / "checkpoint.pt"
        before = checkpoint.stat().st_mtime if checkpoint.exists() else 0
        while not (checkpoint.exists() and checkpoint.stat().st_mtime > before):
            time.sleep(0.005)
            assert process.poll() is None, process.stderr.read()
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.wait()
        torch.load(checkpoint, weights_only=True)
        killed += 1
        start = ["--resume", str(tmp_path / "killed")]
    run(hyper, start)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def count_steps(script, monkeypatch) -> list:
    """Every env.step that the script takes, by the environment's number in the order of their making."""
    steps, original = [], script.make_env

    class Counter(gym.Wrapper):
        def step(self, action):
            steps.append(self.number)
            return self.env.step(action)

    def counted(*args):
        env = Counter(original(*args))
        env.number = counted.made = getattr(counted, "made", -1) + 1
        return env

    monkeypatch.setattr(script, "make_env", counted)
    return steps


def test_every_real_step_is_counted(tmp_path, hyper_point, monkeypatch):
    steps = count_steps(hyper, monkeypatch)
    last = run(hyper, [*hyper_point, "--cost-data", "rollout", "--cost-every", "20", "--total-timesteps", "700", "--run-dir", tmp_path])
    train, cost = steps.count(0), steps.count(1)
    assert cost > 100 and last["env_steps"] == train + cost >= 700
    assert (last["charts/train_steps"], last["charts/cost_rollout_steps"]) == (train, cost)


def test_recent_cost_data_takes_no_extra_steps(tmp_path, hyper_point, monkeypatch):
    steps = count_steps(hyper, monkeypatch)
    last = run(hyper, [*hyper_point, "--total-timesteps", "200", "--run-dir", tmp_path])
    assert steps.count(0) == last["env_steps"] == 200 and steps.count(1) == 0


@pytest.mark.parametrize("script,name", [(sac, "buffer"), (hyper, "real")])
def test_time_limits_do_not_stop_bootstrapping(script, name, tmp_path, hyper_point):
    run(
        script,
        [
            *argv_of(script, hyper_point),
            "--total-timesteps",
            "220",
            "--seed",
            "5",
            "--tau",
            "0.0001",
            "--actor-lr",
            "1e-9",
            "--run-dir",
            tmp_path,
        ],
    )
    parts = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["parts"]
    stored = parts[name]["rows"]
    continues = (stored[:-1, 6:10] == stored[1:, :4]).all(-1)
    ends = (~continues).nonzero()[:, 0]
    outside = (stored[:, 6:8].abs() > 2).any(-1)
    assert len(ends) >= 3 and torch.equal(stored[:, -1] > 0, outside)
    assert (stored[ends, -1] == 0).sum() >= 1  # an episode of 50 steps that did not leave the square


def test_eval_only_record_and_imitate(tmp_path):
    """A trained actor records demonstrations, which load and are what the actor does."""
    argv = [
        *POINT,
        *TINY_SAC,
        "--gamma",
        "0.9",
        "--actor-lr",
        "3e-3",
        "--critic-lr",
        "3e-3",
        "--total-timesteps",
        "900",
        "--run-dir",
        tmp_path / "run",
    ]
    run(sac, argv)
    policy = tmp_path / "run" / "policy.pt"
    result = subprocess.run(
        command(sac, ["--eval-only", "--checkpoint", policy, "--record-demos", tmp_path / "d.npz", "--record-episodes", 3]),
        env=environment(), capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "return" in result.stdout and "dropped" in result.stdout
    data = np.load(tmp_path / "d.npz")
    about = json.loads(str(data["metadata"]))
    assert about["env_id"] == POINT[1] and about["episodes"] == 3 and about["env_steps"] == 900
    assert data["observations"].shape == (150, 4) and data["truncations"].sum() == 3
    env = hyper.make_env(POINT[1])
    batch_rows, expert_return = hyper.load_demos(str(tmp_path / "d.npz"), POINT[1], env, 3)
    assert expert_return == pytest.approx(about["return_mean"], rel=1e-4)
    policy = sac.load_policy(str(tmp_path / "run" / "policy.pt"))
    actor = sac.Actor(4, 2, (16, 16))
    actor.load_state_dict(policy["actor"])
    np.testing.assert_allclose(actor.act(data["observations"][7]), batch_rows[7, 4:6], atol=1e-5)
    np.testing.assert_allclose(2 * actor.act(data["observations"][7]), data["actions"][7], atol=1e-5)


def test_record_level_keeps_the_actor_that_first_reached_it(tmp_path):
    demos = tmp_path / "medium.npz"
    argv = [
        *POINT,
        *TINY_SAC,
        "--gamma",
        "0.9",
        "--actor-lr",
        "3e-3",
        "--critic-lr",
        "3e-3",
        "--total-timesteps",
        "900",
        "--eval-every",
        "50",
        "--run-dir",
        tmp_path / "run",
    ]
    run(sac, [*argv, "--record-demos", demos, "--record-episodes", 2, "--record-level", "0.33"])
    returns = [(float(row["eval_return_mean"]), int(row["env_steps"])) for row in rows(tmp_path / "run")]
    first, last = returns[0][0], returns[-1][0]
    wanted = next(steps for value, steps in returns if value >= first + 0.33 * (last - first))
    assert json.loads(str(np.load(demos)["metadata"]))["env_steps"] == wanted


def test_minari_dataset_loads_like_the_same_npz(tmp_path, monkeypatch, demos):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer

    data = np.load(demos)
    ends = np.flatnonzero(data["truncations"] + data["terminations"]) + 1
    buffers, start = [], 0
    for i, end in enumerate(ends):
        observations = np.concatenate([data["observations"][start:end], data["next_observations"][end - 1 : end]])
        buffers.append(EpisodeBuffer(
            id=i, observations=list(observations.astype(np.float64)), actions=list(data["actions"][start:end]),
            rewards=list(data["rewards"][start:end].astype(float)), terminations=[bool(x) for x in data["terminations"][start:end]],
            truncations=[bool(x) for x in data["truncations"][start:end]], infos={},
        ))  # fmt: skip
        start = end
    space = gym.make("PointMass-v0").unwrapped
    minari.create_dataset_from_buffers(
        "point/expert-v0", buffers, observation_space=space.observation_space, action_space=space.action_space
    )
    env = hyper.make_env(POINT[1])
    ours, theirs = (hyper.load_demos(source, POINT[1], env, 5) for source in (demos, "minari:point/expert-v0"))
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[1] == pytest.approx(theirs[1], rel=1e-5)


def test_video(tmp_path):
    """Headless: in a process of its own, because the rendering backend is chosen when MuJoCo is first imported."""
    argv = ["--env-id", "Hopper-v4", *TINY_SAC, "--total-timesteps", "30", "--capture-video", "--run-dir", tmp_path]
    env = {key: value for key, value in environment().items() if key != "MUJOCO_GL"}
    result = subprocess.run(command(sac, argv), env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.glob("videos/*.mp4")) == ["step-0-episode-0.mp4", "step-30-episode-0.mp4"]
    assert all(path.stat().st_size > 1000 for path in tmp_path.glob("videos/*.mp4"))


@pytest.mark.parametrize("script", [sac, hyper])
def test_a_script_runs_alone_in_an_empty_folder(script, tmp_path):
    for file in (f"{script.__name__}.py",):
        (tmp_path / file).write_text((ROOT / file).read_text())
    argv = ["--env-id", "Hopper-v4", "--total-timesteps", "70", "--eval-every", "70"]
    argv += TINY_SAC if script is sac else TINY_HYPER
    if script is hyper:
        (tmp_path / "demo.npz").write_bytes((ROOT / "demos" / "Hopper-v4.npz").read_bytes())
        argv += ["--demos", "demo.npz"]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run([sys.executable, f"{script.__name__}.py", *argv], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.glob(f"runs/Hopper-v4__{script.__name__}__1__*/policy.pt"))


def test_sac_learns(tmp_path):
    argv = [
        *POINT,
        "--hidden-sizes",
        "32",
        "32",
        "--batch-size",
        "64",
        "--learning-starts",
        "200",
        "--eval-every",
        "1000",
        "--gamma",
        "0.9",
    ]
    last = run(sac, [*argv, "--actor-lr", "3e-3", "--critic-lr", "3e-3", "--total-timesteps", "3000", "--run-dir", tmp_path])
    table = rows(tmp_path)
    assert last["eval_success_rate"] >= 0.9 and last["eval_return_mean"] > 35 > float(table[0]["eval_return_mean"])


def test_hyper_imitates(tmp_path, demos):
    argv = [*POINT, "--demos", demos, "--num-demos", "5", "--termination", "tests.pointmass:terminates", "--hidden-sizes", "32", "32"]
    argv += ["--model-hidden-sizes", "32", "32", "--model-every", "50", "--model-first-batches", "300", "--model-max-batches", "40"]
    argv += [
        "--batch-size",
        "64",
        "--initial-steps",
        "200",
        "--updates-per-step",
        "4",
        "--cost-lr",
        "1e-3",
        "--actor-lr",
        "1e-3",
        "--gamma",
        "0.9",
    ]
    last = run(hyper, [*argv, "--total-timesteps", "1200", "--eval-every", "200", "--eval-episodes", "10", "--run-dir", tmp_path])
    assert last["eval_return_mean"] > 0.93 * last["expert_return"] > 0.93 * 30
    assert float(rows(tmp_path)[0]["eval_return_mean"]) < 0.8 * last["expert_return"]
    assert last["eval_success_rate"] == 1


def test_launcher_files_each_seed_and_goes_on_where_one_stopped(tmp_path):
    words = [*POINT, *TINY_SAC, "--total-timesteps", "120", "--eval-every", "60"]
    argv = [sys.executable, ROOT / "benchmark" / "launch.py", "sac.py", "--seeds", "1", "2", "--parallel", "2", "--runs", tmp_path / "runs"]
    argv += ["--results", tmp_path / "results", "--", *words]
    for _ in range(2):  # the second time finds finished runs
        result = subprocess.run([str(word) for word in argv], env=environment(), capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0 and "seed 2:" in result.stdout, result.stderr
    filed = sorted(path.name for path in (tmp_path / "results" / "sac" / "default" / "tests.pointmass-PointMass-v0").iterdir())
    assert filed == ["seed1.csv", "seed1.json", "seed2.csv", "seed2.json"]
