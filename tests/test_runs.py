"""Whole runs with tiny networks: what they write, that they repeat, resume and count, and that they learn."""

import copy
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import bco_baseline
import hype
import hyper
import mbarl
import sac
import sac_eo
import sra_offline
from tests.conftest import POINT, TINY_BCO, TINY_HYPE, TINY_HYPER, TINY_SAC, TINY_SAC_EO, rows, run

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("KILLS", 3))
COLUMNS = ["env_steps", "updates", "eval_return_mean", "eval_return_std", "eval_success_rate", "expert_return"]


@pytest.mark.parametrize("script", [sac, hype, hyper, sac_eo, bco_baseline])
def test_run_folder_is_complete(script, tmp_path, argv_of):
    last = run(script, [*argv_of(script), "--total-timesteps", "120", "--eval-every", "60", "--run-dir", tmp_path])
    table = rows(tmp_path)
    assert [int(row["env_steps"]) for row in table] == [0, 60, 120] and set(COLUMNS) <= set(table[0])
    assert last["env_steps"] == 120 and float(table[-1]["updates"]) == {hype: 61, hyper: 122}.get(script, 60)
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
    ["--model-members", "1", "--model-elites", "1", "--pessimism-coef", "0.5"],
    ["--expert-start-prob", "1", "--cost-reduce", "max", "--cost-members", "3", "--pessimism-coef", "0.5"],
    ["--p-tremble", "0.2", "--termination", "learned", "--cost-reduce", "mean", "--bf16"],
    "--hybrid-size 100 --start-coin call --cost-window 50 --lr-sawtooth 10 --reset-every 7 --model-cosine 9".split(),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: " ".join(v[:2]))
def test_every_experiment_flag_runs(variant, tmp_path, hyper_point):
    run(hyper, [*hyper_point, "--total-timesteps", "150", "--eval-every", "50", "--run-dir", tmp_path, *variant])
    assert np.isfinite(float(rows(tmp_path)[-1]["losses/critic"]))


def test_what_a_batch_holds_and_which_step_sizes_it_is_learned_with(tmp_path, hyper_point, monkeypatch, demos):
    """Learner rows, expert rows, imagined rows, in these shares and in this order; the cloned ones are the expert's."""
    seen, original = [], hyper.sac_update

    def watch(agent, batch, actor_obs, noise, args, cloned, cloned_noise):
        seen.append((batch, actor_obs, cloned, agent.actor_optimizer.lr.item(), agent.critic_optimizer.lr.item()))
        assert cloned_noise.shape == cloned.action.shape and not cloned_noise.any()
        return original(agent, batch, actor_obs, noise, args, cloned, cloned_noise)

    monkeypatch.setattr(hyper, "sac_update", watch)
    argv = [
        *hyper_point,
        "--real-share",
        "0.125",
        "--expert-share",
        "0.5",
        "--bc-weight",
        "1",
        "--total-timesteps",
        "100",
        "--lr-decay",
        "20",
    ]
    run(hyper, [*argv, "--lr-sawtooth", "10", "--cost-every", "4", "--run-dir", tmp_path])

    def rows_of(rows: torch.Tensor) -> set[tuple]:
        return {tuple(row) for row in rows[:, :10].numpy().round(5).tolist()}

    expert = rows_of(hyper.load_demos(demos, POINT[1], hyper.make_env(POINT[1]), 4)[0])
    real = rows_of(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["parts"]["real"]["rows"])
    assert len(seen) == 2 * 41 and not expert & real  # the first update comes with the last step of the warm-up
    for number, (batch, actor_obs, cloned, actor_lr, critic_lr) in enumerate(seen):
        rows = torch.cat([batch.obs, batch.action, batch.next_obs], 1)
        assert (
            torch.equal(cloned.obs, batch.obs[2:10])
            and torch.equal(cloned.action, batch.action[2:10])
            and torch.equal(actor_obs, batch.obs)
        )
        assert rows_of(rows[:2]) <= real and rows_of(rows[2:10]) <= expert and not rows_of(rows[10:]) & (real | expert)
        # A round of the cost comes after the updates of steps 4, 8, ...: the sawtooth starts anew.
        step, since_round = number // 2, number if number < 10 else (number - 2) % 8
        share = (1 - since_round / 10) / (1 + step / 20)
        assert (actor_lr, critic_lr) == pytest.approx((3e-4 * share, 3e-4 * share), rel=1e-4)


def test_independent_actor_batch_is_another_one(tmp_path, hyper_point, monkeypatch):
    seen, original = [], hyper.sac_update
    monkeypatch.setattr(hyper, "sac_update", lambda *inputs: [seen.append(inputs[1:3]), original(*inputs)][1])
    run(hyper, [*hyper_point, "--independent-actor-batch", "--total-timesteps", "70", "--run-dir", tmp_path])
    assert seen and not any(torch.equal(batch.obs, actor_obs) for batch, actor_obs in seen)


def test_the_saved_actor_is_the_average(tmp_path, hyper_point, monkeypatch):
    """With the weights w_t = 1 / min(actor_average, 1 + t / 4) after training step t."""
    snapshots, update = [], hyper.sac_update
    monkeypatch.setattr(hyper, "sac_update", lambda *a: [update(*a), snapshots.append(copy.deepcopy(a[0].actor.state_dict()))][0])
    argv = [*hyper_point, "--actor-average", "3", "--updates-per-step", "1", "--total-timesteps", "90", "--run-dir", tmp_path]
    run(hyper, argv)
    average = None
    for t, weights in enumerate(snapshots):
        share = 1 / min(3, 1 + t / 4)
        average = {k: w if average is None else average[k] + share * (w - average[k]) for k, w in weights.items()}
    saved = torch.load(tmp_path / "policy.pt", weights_only=True)["actor"]
    torch.testing.assert_close(saved, average, rtol=1e-4, atol=1e-6)
    assert not all(torch.equal(saved[k], snapshots[-1][k]) for k in saved)


def test_episodes_are_cut_at_multiples_of_reset_every(tmp_path, hyper_point, monkeypatch):
    lengths, original = {}, hyper.ResumableEnv.reset
    monkeypatch.setattr(
        hyper.ResumableEnv, "reset", lambda self: [lengths.setdefault(self, []).append(len(self.executed)), original(self)][1]
    )
    flags = "--initial-steps 30 --eval-every 1000 --reset-every 7 --total-timesteps 130".split()
    run(hyper, [*hyper_point, *flags, "--run-dir", tmp_path])
    ends = set(np.cumsum(max(lengths.values(), key=len)).tolist())  # of the training environment's episodes
    assert set(range(30, 131, 7)) <= ends and len(ends - set(range(30, 131, 7))) < 8  # the others ended by themselves


# What is imagined from, what the model learns from, what the cost sees.
def watch(monkeypatch, name: str) -> list:
    """The inputs of each call of a function of hyper.py."""
    calls, original = [], getattr(hyper, name)
    monkeypatch.setattr(hyper, name, lambda *inputs: [calls.append(inputs), original(*inputs)][1])
    return calls


def as_set(rows: torch.Tensor) -> set[tuple]:
    return {tuple(row) for row in rows.numpy().round(5).tolist()}


def expert_rows(demos: str) -> torch.Tensor:
    return hyper.load_demos(demos, POINT[1], hyper.make_env(POINT[1]), 4)[0]


@pytest.mark.parametrize("prob,coin", [(0, "each"), (1, "each"), (0.25, "each"), (0.5, "call")])
def test_imagined_trajectories_start_at_expert_states_with_the_given_probability(prob, coin, tmp_path, hyper_point, monkeypatch, demos):
    calls = watch(monkeypatch, "imagine")
    monkeypatch.setattr(hyper, "sac_update", lambda *_: {"losses/critic": torch.tensor(0.0)})
    flags = ["--expert-start-prob", prob, "--start-coin", coin, "--total-timesteps", "300", "--cost-every", "1000"]
    run(hyper, [*hyper_point, *flags, "--run-dir", tmp_path])
    expert = as_set(expert_rows(demos)[:, :4])
    shares = [np.mean([tuple(row) in expert for row in call[2].numpy().round(5).tolist()]) for call in calls]
    assert len(shares) == 9 and all(len(call[2]) == 4 * 30 for call in calls)
    if coin == "call":
        assert set(shares) == {0.0, 1.0}
    else:
        assert np.mean(shares) == pytest.approx(prob, abs=0.06 if 0 < prob < 1 else 0)


def test_the_model_learns_from_expert_and_learner_in_equal_parts(tmp_path, hyper_point, monkeypatch, demos):
    calls, rows = watch(monkeypatch, "fit_dynamics"), expert_rows(demos)[:, :4]
    expert = as_set(rows)
    run(hyper, [*hyper_point, "--total-timesteps", "125", "--run-dir", tmp_path / "hybrid"])
    for n, (_, _, _, batch, weights, *_) in zip((60, 90, 120), calls, strict=True):
        from_expert = torch.tensor([tuple(row) in expert for row in batch.obs.numpy().round(5).tolist()])
        assert len(weights) == n + len(rows) and from_expert.sum() == len(rows)
        assert weights[from_expert].sum().item() == pytest.approx(weights[~from_expert].sum().item(), rel=1e-4)
    calls.clear()
    run(hyper, [*hyper_point, "--model-data", "learner", "--total-timesteps", "70", "--run-dir", tmp_path / "learner"])
    assert len(calls[0][3].obs) == 60 and not as_set(calls[0][3].obs) & expert


def test_the_queue_of_model_data_takes_an_expert_row_for_each_training_step(tmp_path, hyper_point, monkeypatch, demos):
    calls, expert = watch(monkeypatch, "fit_dynamics"), expert_rows(demos)[:, :4]
    run(hyper, [*hyper_point, "--hybrid-size", "1000", "--total-timesteps", "125", "--run-dir", tmp_path / "all"])
    for steps, call in zip((0, 30, 60), calls, strict=True):
        obs = call[3].obs
        assert torch.equal(obs[: len(expert)], expert) and len(obs) == len(expert) + 60 + 2 * steps
        later = obs[len(expert) + 60 :]
        assert as_set(later[1::2]) <= as_set(expert) and not as_set(later[0::2]) & as_set(expert)
    longest = calls[-1][3].obs
    calls.clear()
    run(hyper, [*hyper_point, "--hybrid-size", "100", "--total-timesteps", "125", "--run-dir", tmp_path / "fifo"])
    assert len(calls[-1][3].obs) == 100 and len(longest) > 300
    assert as_set(calls[-1][3].obs[0::2]).isdisjoint(as_set(expert)) or as_set(calls[-1][3].obs[1::2]).isdisjoint(as_set(expert))


def test_a_batch_is_relabelled_with_the_current_cost(tmp_path, hyper_point, monkeypatch):
    made, original, checked = [], hyper.sac_update, []

    class Cost(hyper.Cost):
        def __init__(self, *inputs):
            super().__init__(*inputs)
            made.append(self)

    def update(agent, batch, actor_obs, noise, args, *cloned):
        now = made[-1].reward(batch.obs, batch.action)
        torch.testing.assert_close(batch.reward[:8], now[:8])
        assert (batch.reward[8:] < now[8:]).all()  # minus the pessimism of imagined rows
        checked.append(now.mean().item())
        return original(agent, batch, actor_obs, noise, args, *cloned)

    monkeypatch.setattr(hyper, "Cost", Cost)
    monkeypatch.setattr(hyper, "sac_update", update)
    flags = ["--pessimism-coef", "1", "--cost-lr", "0.01", "--total-timesteps", "100"]
    run(hyper, [*hyper_point, *flags, "--run-dir", tmp_path])
    assert len(checked) == 82 and np.std(checked) > 0.01  # the cost did change


@pytest.mark.parametrize("flags", [["--normalise-obs", "--no-cost-normalise"], ["--no-normalise-obs", "--cost-normalise"]])
def test_normalisers_are_of_expert_and_warm_up_from_the_first_update_on(flags, tmp_path, hyper_point, demos, monkeypatch):
    seen, imagine = [], hyper.imagine

    def first(dynamics, actor, *rest):
        seen.append(actor.normalise.mean.clone())
        return imagine(dynamics, actor, *rest)

    monkeypatch.setattr(hyper, "imagine", first)
    run(hyper, [*hyper_point, *flags, "--initial-steps", "40", "--total-timesteps", "70", "--run-dir", tmp_path])
    checkpoint, data = hyper.read_checkpoint(tmp_path), np.load(demos)
    expert = hyper.load_demos(demos, POINT[1], hyper.make_env(POINT[1]), 4)[0][:, :6]
    assert len(expert) == 200 and np.array_equal(expert[:, :4], data["observations"][:200])
    sources = [expert, checkpoint["parts"]["real"]["rows"][:40, :6]]
    mean = torch.stack([source.mean(0) for source in sources]).mean(0)
    std = torch.stack([(source - mean).square().mean(0) for source in sources]).mean(0).sqrt()
    none, policy = (torch.zeros(6), torch.ones(6)), "--normalise-obs" in flags
    agent, cost, saved = checkpoint["parts"]["agent"], checkpoint["parts"]["cost"], hyper.load_policy(str(tmp_path))["actor"]
    for weights, prefix in ((saved, ""), *((agent, f"{name}.") for name in ("actor", "critic", "target_critic"))):
        for name, value in zip(("mean", "std"), (mean, std) if policy else none, strict=True):
            torch.testing.assert_close(weights[f"{prefix}normalise.{name}"], value[:4])
    torch.testing.assert_close(seen[0], (mean if policy else none[0])[:4])
    for name, value in zip(("mean", "std"), none if policy else (mean, std), strict=True):
        torch.testing.assert_close(cost[f"normalise.{name}"], value)


def test_rollouts_lengthen_with_the_epochs_and_their_buffer_with_them(tmp_path, hyper_point, monkeypatch):
    calls, capacities, resize = watch(monkeypatch, "imagine"), [], hyper.ReplayBuffer.resize
    monkeypatch.setattr(hyper, "sac_update", lambda *_: {"losses/critic": torch.tensor(0.0)})
    monkeypatch.setattr(hyper.ReplayBuffer, "resize", lambda self, n: [capacities.append(n), resize(self, n)][1])
    flags = "--model-every 500 --cost-every 5000 --eval-every 5000 --rollout-schedule 0 3 1 4 --total-timesteps 2100".split()
    run(hyper, [*hyper_point, *flags, "--rollout-retain", "3", "--run-dir", tmp_path])
    assert [call[3] for call in calls] == [2, 2, 2, 3, 3]  # after 0, 500, 1,000 steps of training: epoch 1; then epoch 2
    assert capacities == [length * 4 * 1_000 * 3 for length in (2, 3)]


def test_published_cost_rounds_have_fresh_optimisers_with_harmonic_step_sizes(tmp_path, hyper_point, monkeypatch):
    """lr0, lr0, lr0 / 2, lr0 / 3, ...; and the learner rows are what the current policy meant to do, trembling or not."""
    seen, acted, update, act = [], set(), hyper.cost_update, hyper.Actor.act

    def watched_act(self, obs, generator=None):
        action = act(self, obs, generator)
        if generator is None:
            acted.add(tuple(np.concatenate([obs, action]).astype(np.float32).round(5).tolist()))
        return action

    def watched_update(cost, optimizer, expert, learner, mix, args):
        seen.append((optimizer.lr.item(), optimizer.steps.item(), optimizer.optimistic))
        assert as_set(learner) <= acted and len(as_set(learner)) > 40
        return update(cost, optimizer, expert, learner, mix, args)

    monkeypatch.setattr(hyper.Actor, "act", watched_act)
    monkeypatch.setattr(hyper, "cost_update", watched_update)
    flags = "--cost-data rollout --cost-restart --cost-every 5 --cost-lr 0.0008 --p-tremble 0.5 --total-train-steps 90".split()
    run(hyper, [*hyper_point, *flags, "--total-timesteps", "9000", "--run-dir", tmp_path])
    np.testing.assert_allclose([lr / 8e-4 for lr, *_ in seen], [1, 1, 1 / 2, 1 / 3, 1 / 4, 1 / 5], rtol=1e-5)
    assert all(steps == 0 and optimistic for _, steps, optimistic in seen)


@pytest.mark.parametrize("script", [sac, hype, hyper, sac_eo, bco_baseline, sra_offline, mbarl])
def test_same_seed_same_csv_and_another_seed_another(script, tmp_path, argv_of):
    argv = [*argv_of(script), "--total-timesteps", "150", "--eval-every", "50"]
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(script, [*argv, "--seed", seed, "--run-dir", tmp_path / name])
    assert rows(tmp_path / "a") == rows(tmp_path / "b") != rows(tmp_path / "c")


@pytest.mark.parametrize("script", [sac, hype, hyper, sac_eo, bco_baseline, sra_offline])
def test_an_extra_evaluation_changes_nothing(script, tmp_path, argv_of):
    argv, part = [*argv_of(script), "--total-timesteps", "120"], "actor" if script is bco_baseline else "agent"
    for name, every in (("a", 120), ("b", 10)):
        run(script, [*argv, "--eval-every", every, "--eval-episodes", 1 if name == "a" else 3, "--run-dir", tmp_path / name])
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["parts"][part] for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("script", [sac, hype, hyper, sac_eo, bco_baseline])
def test_resumed_run_equals_an_uninterrupted_one(script, tmp_path, argv_of):
    """Stopped in the middle of an episode, with different lengths of what was before and after."""
    extra = [] if script not in (hype, hyper) else ["--p-tremble", "0.1", "--cost-data", "rollout", "--cost-every", "20"]
    argv = [*argv_of(script), *extra, "--eval-every", "40"]
    run(script, [*argv, "--total-timesteps", "480", "--run-dir", tmp_path / "whole"])
    run(script, [*argv, "--total-timesteps", "200", "--run-dir", tmp_path / "parts"])
    parts = rows(tmp_path / "parts")
    assert 0 < len(parts) < len(rows(tmp_path / "whole"))
    run(script, ["--resume", tmp_path / "parts", "--total-timesteps", "360"])
    run(script, ["--resume", tmp_path / "parts", "--total-timesteps", "480"])
    whole, resumed = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    steps = {row["env_steps"] for row in whole}
    assert whole == [row for row in resumed if row["env_steps"] in steps] if script in (hype, hyper) else whole == resumed
    assert json.loads((tmp_path / "parts" / "args.json").read_text())["args"]["total_timesteps"] == 480


@pytest.mark.parametrize("script", [sac, hype, hyper, sac_eo, bco_baseline, sra_offline])
def test_a_signal_in_the_first_evaluation_leaves_a_run_to_resume(script, tmp_path, argv_of, monkeypatch):
    argv = [*argv_of(script), "--total-timesteps", "100", "--eval-every", "50", "--checkpoint-every", "0"]
    run(script, [*argv, "--run-dir", tmp_path / "whole"])
    original = script.evaluate
    monkeypatch.setattr(script, "evaluate", lambda *a, **k: [signal.raise_signal(signal.SIGTERM), original(*a, **k)][1])
    with pytest.raises(SystemExit):
        run(script, [*argv, "--run-dir", tmp_path / "cut"])
    monkeypatch.setattr(script, "evaluate", original)
    run(script, ["--resume", tmp_path / "cut"])
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def command(script, argv) -> list[str]:
    return [sys.executable, str(ROOT / f"{script.__name__}.py"), *map(str, argv)]


def environment() -> dict:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("script", [sac, hype, hyper, sac_eo, bco_baseline, sra_offline])
def test_a_signal_saves_first_and_the_run_goes_on_exactly(script, tmp_path, argv_of):
    argv = [*argv_of(script), "--eval-every", "100", "--total-timesteps", "800", "--checkpoint-every", "0"]
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
    assert "once more to stop without saving" in errors
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
    train, cost = steps.count(1), steps.count(2)  # 0 evaluates
    assert cost > 100 and last["env_steps"] == train + cost >= 700
    assert (last["charts/train_steps"], last["charts/cost_rollout_steps"]) == (train, cost)


def test_recent_cost_data_takes_no_extra_steps(tmp_path, hyper_point, monkeypatch):
    steps = count_steps(hyper, monkeypatch)
    last = run(hyper, [*hyper_point, "--total-timesteps", "200", "--run-dir", tmp_path])
    assert steps.count(1) == last["env_steps"] == 200 and steps.count(2) == 0


@pytest.mark.parametrize("script,name", [(sac, "buffer"), (hype, "real"), (hyper, "real"), (sac_eo, "buffer")])
def test_time_limits_do_not_stop_bootstrapping(script, name, tmp_path, argv_of):
    argv = [*argv_of(script), *"--total-timesteps 220 --seed 5 --tau 0.0001 --actor-lr 1e-9".split()]
    run(script, [*argv, "--run-dir", tmp_path])
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
    policy = sac.load_policy(str(tmp_path / "run"))  # the folder will do
    actor = sac.Actor(4, 2, (16, 16))
    actor.load_state_dict(policy["actor"])
    np.testing.assert_allclose(actor.act(data["observations"][7]), batch_rows[7, 4:6], atol=1e-5)
    np.testing.assert_allclose(2 * actor.act(data["observations"][7]), data["actions"][7], atol=1e-5)


def test_a_simulator_that_is_not_mujocos_own_gives_joints_but_no_states(tmp_path):
    torch.manual_seed(0)  # of some untrained policies every episode leaves the square
    args = sac.parse_args([*TINY_SAC, "--env-id", "tests.pointmass:Jointed-v0", "--record-episodes", "2"])
    sac.record_demos(tmp_path / "d.npz", sac.Actor(4, 2, (16, 16)), args, {})
    data = np.load(tmp_path / "d.npz")
    assert data["qpos"].shape == data["qvel"].shape == (100, 2) and "states" not in data
    np.testing.assert_allclose(data["qpos"], data["observations"][:, :2], atol=1e-6)


def test_recorded_states_put_the_simulator_back_exactly(tmp_path):
    """From the state at a step, the recorded actions give the recorded observations to the last bit, also much later."""
    import mujoco

    expert = str(ROOT / "demos" / "experts" / "Hopper-v4.pt")
    args = sac.parse_args(["--eval-only", "--checkpoint", expert, "--record-episodes", "2", "--seed", "7"])
    sac.record_demos(tmp_path / "d.npz", sac.evaluate_policy(sac.replace(args, eval_episodes=1))["actor"], args, {})
    data, env = np.load(tmp_path / "d.npz"), gym.make("Hopper-v4")
    assert len(data["states"]) == 2 * 1000 / 4 and data["states"].dtype == np.float64
    env.reset(seed=0)
    model, simulator = env.unwrapped.model, env.unwrapped.data
    for number in (0, 100, 300):
        mujoco.mj_setState(model, simulator, data["states"][number], mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_forward(model, simulator)  # derived quantities; it moves the warm start, so the state is set again
        mujoco.mj_setState(model, simulator, data["states"][number], mujoco.mjtState.mjSTATE_INTEGRATION)
        np.testing.assert_array_equal(simulator.qpos.astype(np.float32), data["qpos"][4 * number])
        for row in range(4 * number, 4 * number + 300):
            obs, *_ = env.unwrapped.step(data["actions"][row])
            np.testing.assert_array_equal(obs.astype(np.float32), data["next_observations"][row])


def test_sampled_recording_keeps_every_episode(tmp_path):
    """A fresh Hopper falls at once: no demonstrations, but data; its actions are not the mean ones."""
    args = sac.parse_args([*TINY_SAC, "--env-id", "Hopper-v4", "--record-episodes", "3", "--record-demos", "d.npz", "--record-sampled"])
    actor = sac.Actor(11, 3, (16, 16))
    sac.record_demos(tmp_path / "d.npz", actor, args, {})
    data = np.load(tmp_path / "d.npz")
    assert data["terminations"].sum() == 3 and len(data["rewards"]) < 600
    mean = np.array([actor.act(obs) for obs in data["observations"]])
    assert np.abs(mean - data["actions"]).mean() > 0.1
    sac.record_demos(tmp_path / "e.npz", actor, args, {})
    np.testing.assert_array_equal(np.load(tmp_path / "e.npz")["actions"], data["actions"])


@pytest.mark.parametrize("path", sorted((ROOT / "demos").glob("*.npz")), ids=lambda path: path.stem)
def test_bundled_demonstrations_are_ten_whole_episodes_whose_rows_follow_each_other(path):
    data = np.load(path)
    obs, next_obs, last = data["observations"], data["next_observations"], data["truncations"] == 1
    assert last.sum() == 10 and last[999::1000].all() and not data["terminations"].any()
    np.testing.assert_array_equal(next_obs[~last], obs[1:][~last[:-1]])
    about = json.loads(str(data["metadata"]))
    assert path.stem == about["env_id"].replace("/", "-") and about["episodes"] == 10
    assert data["rewards"].sum() / 10 == pytest.approx(about["return_mean"], rel=1e-4)
    assert np.abs(data["actions"]).max() <= 1


def test_recording_can_leave_out_episodes_of_low_return(tmp_path, capsys):
    """The same episodes as without the bar, less those below it; the share is told; a bar out of reach is an error."""
    args = sac.parse_args([*TINY_SAC, *POINT, "--record-episodes", "6", "--record-demos", "d.npz"])
    torch.manual_seed(0)
    actor = sac.Actor(4, 2, (16, 16))
    sac.record_demos(tmp_path / "all.npz", actor, args, {})
    returns = np.load(tmp_path / "all.npz")["rewards"].reshape(6, -1).sum(1)
    bar = float(np.sort(returns)[3]) - 1e-3
    sac.record_demos(tmp_path / "some.npz", actor, sac.replace(args, record_episodes=3, record_min_return=bar), {})
    some = np.load(tmp_path / "some.npz")
    np.testing.assert_allclose(some["rewards"].reshape(3, -1).sum(1), returns[returns >= bar][:3], rtol=1e-6)
    tried = int(np.flatnonzero(returns >= bar)[2]) + 1  # and those, if any, that ended early
    about = json.loads(str(some["metadata"]))
    assert 1 > about["dropped_share"] >= 1 - 3 / tried - 1e-9 and about["dropped_share"] > 0
    assert about["return_mean"] >= max(bar, about["all_return_mean"])
    with pytest.raises(SystemExit):
        sac.record_demos(tmp_path / "none.npz", actor, sac.replace(args, record_episodes=1, record_min_return=1e6), {})
    assert "0 of 20 episodes reached the time limit and returned at least 1e+06" in capsys.readouterr().err


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


@pytest.mark.parametrize("script", [sac, hype, hyper, sac_eo, bco_baseline])
def test_the_environment_that_renders_is_made_first(script, tmp_path, argv_of, monkeypatch):
    """It chooses the renderer, and dm_control reads the choice only once."""
    modes, original = [], script.make_env
    monkeypatch.setattr(script, "make_env", lambda env_id, mode=None: [modes.append(mode), original(env_id)][1])
    monkeypatch.setattr(script, "evaluate", lambda *a, **k: dict(eval_return_mean=0.0))
    run(script, [*argv_of(script), "--capture-video", "--total-timesteps", "70", "--run-dir", tmp_path])
    assert modes[0] == "rgb_array" and not any(modes[1:])


def test_video(tmp_path):
    """Headless: in a process of its own, because the rendering backend is chosen when MuJoCo is first imported."""
    argv = ["--env-id", "Hopper-v4", *TINY_SAC, "--total-timesteps", "70", "--capture-video", "--run-dir", tmp_path]
    env = {key: value for key, value in environment().items() if key != "MUJOCO_GL"}
    result = subprocess.run(command(sac, argv), env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.glob("videos/*.mp4")) == ["step-0-episode-0.mp4", "step-70-episode-0.mp4"]
    assert all(path.stat().st_size > 1000 for path in tmp_path.glob("videos/*.mp4"))


@pytest.mark.parametrize("script", [sac, hype, hyper, sac_eo, bco_baseline])
def test_a_script_runs_alone_in_an_empty_folder(script, tmp_path):
    for file in (f"{script.__name__}.py",):
        (tmp_path / file).write_text((ROOT / file).read_text())
    argv = ["--env-id", "Hopper-v4", "--total-timesteps", "70", "--eval-every", "70"]
    argv += {sac: TINY_SAC, hype: TINY_HYPE, hyper: TINY_HYPER, sac_eo: TINY_SAC_EO, bco_baseline: TINY_BCO}[script]
    if script is not sac:
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
    argv = f"""--demos {demos} --num-demos 5 --termination tests.pointmass:terminates --hidden-sizes 32 32 --model-hidden-sizes 32 32
        --model-every 50 --model-first-batches 300 --model-max-batches 40 --batch-size 64 --initial-steps 200 --updates-per-step 4
        --cost-lr 1e-3 --actor-lr 1e-3 --critic-lr 1e-3 --gamma 0.9 --total-timesteps 1200 --eval-every 200 --eval-episodes 10
        --no-normalise-obs""".split()
    last = run(hyper, [*POINT, *argv, "--seed", "2", "--run-dir", tmp_path])
    assert last["eval_return_mean"] > 0.85 * last["expert_return"] > 0.85 * 30
    assert float(rows(tmp_path)[0]["eval_return_mean"]) < 0.5 * last["expert_return"]
    assert last["eval_success_rate"] > 0.8


def test_hype_imitates(tmp_path, demos):
    argv = f"""--demos {demos} --num-demos 5 --hidden-sizes 32 32 --cost-hidden-sizes 32 32 --batch-size 64 --cost-batch-size 64
        --initial-steps 200 --cost-lr 1e-3 --actor-lr 1e-3 --critic-lr 1e-3 --gamma 0.9 --total-timesteps 1500 --eval-every 500
        --eval-episodes 10""".split()
    last = run(hype, [*POINT, *argv, "--seed", "3", "--run-dir", tmp_path])
    assert last["eval_return_mean"] > 0.7 * last["expert_return"] > 0.7 * 45
    assert float(rows(tmp_path)[0]["eval_return_mean"]) < 0.2 * last["expert_return"]
    assert last["eval_success_rate"] > 0.8


@pytest.mark.parametrize("script,words,filed", [
    ("sac.py", "--env-id Ant-v4", ("default", "Ant-v4")),
    ("hype.py", "--env-id Ant-v4 --algo mm --seed 3 --compile", ("mm", "Ant-v4")),
    ("hype.py", "--env-id Ant-v4 --preset paper", ("hype-paper", "Ant-v4")),
    ("hype.py", "--env-id Ant-v4 --gamma 0.9", None),
    ("bco_baseline.py", "--env-id Hopper-v4 --variant inverse", ("inverse", "Hopper-v4")),
    ("sac_eo.py", "--env-id dm_control/walker-walk-v0", ("default", "dm_control-walker-walk-v0")),
    ("sra_offline.py", "--dataset hopper-medium-expert --learner td3bc", ("sra-td3bc", "hopper-medium-expert")),
    ("sra_offline.py", "--dataset maze2d-large --algo romi --preset paper", ("romi-paper", "maze2d-large")),
    ("sra_offline.py", "--dataset maze2d-large --rollout-length 9", None),
    ("mbarl.py", "--env-id Tabletop-v0 --algo medal", ("medal", "Tabletop-v0")),
    ("mbarl.py", "--env-id PointMass2D-v0 --offline", ("offline", "PointMass2D-v0")),
    ("mbarl.py", "--env-id PointMass2D-v0 --offline --offline-updates 20", None),
    ("mbarl.py", "--env-id PointMass2D-v0 --reward analytic", None),
])  # fmt: skip
def test_launcher_names_results_by_their_settings(script, words, filed, capsys):
    from benchmark import launch

    if filed is None:
        with pytest.raises(SystemExit, match="differ from the preset: name the results' folder with --variant"):
            launch.variant_of(script, words.split())
    else:
        args = importlib.import_module(script[:-3]).parse_args(words.split())
        assert launch.filed_as(asdict(args)) == filed and launch.variant_of(script, words.split()) == filed[0]


def test_launcher_files_each_seed_and_goes_on_where_one_stopped(tmp_path):
    words = [*POINT, *TINY_SAC, "--total-timesteps", "120", "--eval-every", "60"]
    argv = [sys.executable, ROOT / "benchmark" / "launch.py", "sac.py", "--seeds", "1", "2", "--parallel", "2", "--runs", tmp_path / "runs"]
    argv += ["--results", tmp_path / "results"]
    refused = subprocess.run([*map(str, argv), "--", *words], env=environment(), capture_output=True, text=True, cwd=ROOT)
    assert refused.returncode == 1 and "--hidden-sizes" in refused.stderr and "--variant" in refused.stderr
    argv += ["--variant", "default-tiny", "--", *words]
    for _ in range(2):  # the second time finds finished runs
        result = subprocess.run([str(word) for word in argv], env=environment(), capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0 and "seed 2:" in result.stdout, result.stderr
    filed = sorted(path.name for path in (tmp_path / "results" / "sac" / "default-tiny" / "tests.pointmass-PointMass-v0").iterdir())
    assert filed == ["seed1.csv", "seed1.json", "seed2.csv", "seed2.json"]
    for words, complaint in ((["120", "--seed", "2"], "take --seeds"), (["110"], "is a run of 120 steps")):
        refused = [*argv[: argv.index("--total-timesteps") + 1], *words]
        result = subprocess.run([str(word) for word in refused], env=environment(), capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 1 and complaint in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("variant,folder", [([], "offline"), (["--variant", "offline-tiny"], "offline-tiny")])
def test_launcher_files_an_offline_study_and_goes_on_where_it_stopped(tmp_path, monkeypatch, variant, folder):
    """With a study in the place of mbarl.py's that is told to stop after its first policy, and then finishes."""
    from benchmark import launch

    words, commands, original = ["--env-id", "PointMass2D-v0", "--offline"], [], subprocess.run

    def study(argv, **options):
        if argv[0] != sys.executable:
            return original(argv, **options)
        commands.append(argv[2:])
        args = mbarl.parse_args(argv[2:])
        path = mbarl.make_run_dir(args) / "offline.csv"
        path.write_text((path.read_text() if args.resume else "size\n") + f"{len(commands)}\n")
        return subprocess.CompletedProcess(argv, 130 if len(commands) == 1 else 0)

    monkeypatch.setattr(launch.subprocess, "run", study)
    argv = ["launch.py", "mbarl.py", "--seeds", "7", "--runs", tmp_path / "runs", "--results", tmp_path / "results", *variant, "--", *words]
    monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
    place = tmp_path / "results" / "mbarl" / folder / "PointMass2D-v0"
    for code in (1, 0):
        assert not place.exists()
        with pytest.raises(SystemExit) as left:
            launch.main()
        assert left.value.code == code
    run_dir = commands[0][-1]
    assert commands == [[*words, "--seed", "7", "--run-dir", run_dir], ["--resume", run_dir]]
    assert (place / "seed7.csv").read_text() == "size\n1\n2\n" and sorted(path.name for path in place.iterdir()) == [
        "seed7.csv",
        "seed7.json",
    ]


def test_tensorboard_keeps_all_points_of_a_resumed_run(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(sac, [*POINT, *TINY_SAC, "--eval-every", "40", "--total-timesteps", "120", "--run-dir", tmp_path])
    time.sleep(1.1)  # the events' files are ordered by second
    run(sac, ["--resume", tmp_path, "--total-timesteps", "160"])
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("eval/return_mean")
    assert [event.step for event in events] == [0, 40, 80, 120, 160]


def test_an_environment_module_in_the_working_directory(tmp_path):
    (tmp_path / "mine.py").write_text((ROOT / "tests" / "pointmass.py").read_text())
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    argv = [*TINY_SAC, "--env-id", "mine:PointMass-v0", "--total-timesteps", "70", "--run-dir", tmp_path / "run"]
    result = subprocess.run(command(sac, argv), cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_wrapper_of_the_actions_inside_the_environment_is_respected(tmp_path, demos):
    """Units and bounds are those below make_env's own rescaling, not those of the innermost simulator."""
    env_id = "tests.pointmass:Rescaled-v0"  # actions in [-1, 1] around a simulator of [-2, 2]
    env = hyper.ResumableEnv(hyper.make_env(env_id), [0, 0])
    data = dict(np.load(demos))
    data["actions"] /= 2
    np.savez(tmp_path / "demo.npz", **data)
    rows, _ = hyper.load_demos(str(tmp_path / "demo.npz"), env_id, env, 2)
    assert np.abs(data["actions"]).max() <= 1
    np.testing.assert_allclose(rows[:, 4:6].numpy(), data["actions"][: len(rows)], atol=1e-5)
    content = hyper.policy_content(hyper.Actor(4, 2, (8,)), env, hyper.Args(env_id=env_id, hidden_sizes=(8,)), 0)
    assert (content["action_low"], content["action_high"]) == ([-1, -1], [1, 1])


def test_evaluation_trembles_as_the_run_did(tmp_path, hyper_point):
    run(hyper, [*hyper_point, "--p-tremble", "0.3", "--total-timesteps", "70", "--run-dir", tmp_path])
    argv = ["--eval-only", "--checkpoint", str(tmp_path / "policy.pt")]
    assert hyper.parse_args(argv).p_tremble == 0.3
    assert hyper.parse_args([*argv, "--p-tremble", "0"]).p_tremble == 0
