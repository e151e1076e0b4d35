"""HyPE's blocks against hand calculation or a second method. Numbers in the names refer to the reference page's tests."""

import itertools
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch

import hype
from tests import pointmass
from tests.conftest import POINT, TINY_HYPE, rows, run


def test_hybrid_share_schedules_4():
    """Schedules A and B at the values worked out by hand."""
    a, b = (hype.PRESETS["paper"][f"{robot}-v4 hype"]["hybrid_ratio"] for robot in ("Ant", "Hopper"))
    for schedule, steps, share in (
        (a, 0, 0.2), (a, 300_000, 0.2), (a, 600_000, 0.157143), (a, 1_000_000, 0.1), (a, 2_000_000, 0.1),
        (b, 0, 0.2), (b, 100_000, 0.15), (b, 200_000, 0.1), (b, 300_000, 0.08875), (b, 600_000, 0.055), (b, 1_000_000, 0.01),
        ((0.3,), 12_345, 0.3),
    ):  # fmt: skip
        assert hype.hybrid_share(schedule, steps) == pytest.approx(share, abs=1e-6), (schedule, steps)


@pytest.mark.parametrize(
    "algo, extra, own, shown, clones",
    [
        ("hype", [], 8, 8, 0), ("mm", [], 16, 0, 0), ("bc-reg", [], 16, 0, 16),
        ("hype", ["--hybrid-ratio", "0.2", "--batch-size", "256"], 205, 51, 0),  # the released code takes 204 and 51
    ],
)  # fmt: skip
def test_what_a_batch_holds_5(algo, extra, own, shown, clones, tmp_path, demos, monkeypatch, hype_point):
    seen, original = [], hype.sac_update

    def watch(agent, batch, actor_obs, noise, args, cloned, cloned_noise):
        seen.append((batch, actor_obs, cloned))
        return original(agent, batch, actor_obs, noise, args, cloned, cloned_noise)

    monkeypatch.setattr(hype, "sac_update", watch)
    run(hype, [*hype_point, "--algo", algo, *extra, "--total-timesteps", "100", "--run-dir", tmp_path])
    expert = {row.tobytes() for row in hype.load_demos(demos, POINT[1], hype.make_env(POINT[1]), 4)[0][:, :6].numpy()}
    assert len(seen) == 41
    for batch, actor_obs, cloned in seen:
        marks = [row.tobytes() in expert for row in torch.cat([batch.obs, batch.action], 1).numpy()]
        assert marks == [False] * own + [True] * shown and torch.equal(actor_obs, batch.obs)
        assert len(cloned.obs) == clones and all(row.tobytes() in expert for row in torch.cat([cloned.obs, cloned.action], 1).numpy())


def test_blocks_of_updates_of_the_paper_on_a_v5_robot(tmp_path, monkeypatch):
    """Four updates each fourth step: each has rows of its own and its block's share of expert rows; it resumes exactly."""
    seen, original = [], hype.sac_update

    def watch(agent, batch, actor_obs, noise, args, cloned, cloned_noise):
        seen.append((batch, noise, cloned, cloned_noise))
        return original(agent, batch, actor_obs, noise, args, cloned, cloned_noise)

    monkeypatch.setattr(hype, "sac_update", watch)
    ratio = (0.75, 0.25, 30, 0.0, 60)
    argv = ["--env-id", "Hopper-v5", "--demos", HOPPER, "--preset", "paper", *TINY_HYPE, "--initial-steps", "40", "--hybrid-ratio", *ratio,
            "--cost-hidden-sizes", "16", "--updates-per-step", "4", "--update-every", "4", "--cost-every", "30", "--lr-sawtooth", "30",
            "--cost-batch-size", "16", "--cost-episodes", "1", "--bc-weight", "1", "--total-train-steps"]  # fmt: skip
    run(hype, [*argv, "160", "--run-dir", tmp_path / "whole"])
    expert = {row.tobytes() for row in hype.load_demos(HOPPER, "Hopper-v4", hype.make_env("Hopper-v4"), 4)[0][:, :14].numpy()}
    assert len(seen) == 4 * (1 + (160 - 40) // 4)
    for u, (batch, noise, cloned, cloned_noise) in enumerate(seen):
        marks = [row.tobytes() in expert for row in torch.cat([batch.obs, batch.action], 1).numpy()]
        assert sum(marks) == round(hype.hybrid_share(ratio, u // 4 * 4) * 16), u
        assert all(row.tobytes() in expert for row in torch.cat([cloned.obs, cloned.action], 1).numpy())
        assert not any(torch.equal(noise, other[1]) for other in seen[:u]) and cloned_noise.std() > 0.5
        assert not any(torch.equal(cloned.obs, other[2].obs) for other in seen[:u])
        assert u == 0 or not torch.equal(batch.obs, seen[u - 1][0].obs)
    run(hype, [*argv, "111", "--run-dir", tmp_path / "parts"])
    run(hype, ["--resume", tmp_path / "parts", "--total-train-steps", "160"])
    whole, parts = (torch.load(tmp_path / name / "policy.pt", weights_only=True)["actor"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


HOPPER = str(hype.Path(hype.__file__).parent / "demos" / "Hopper-v4.npz")


def hopper_resets(env_id: str = "Hopper-v4", path: str = HOPPER, **settings) -> hype.ExpertResets:
    args, env = hype.Args(env_id=env_id, **settings), hype.make_env(env_id)
    rows, _ = hype.load_demos(path, env_id, env, args.num_demos)
    expert = hype.ReplayBuffer(len(rows), env.observation_space.shape[0], env.action_space.shape[0], "cpu")
    expert.extend(rows)
    return hype.reset_to_experts(env, path, expert.split(expert.rows), args)


def test_resets_restore_the_demonstration_exactly_12():
    """The observation, the steps left and what the demonstrated actions lead to, to the last bit."""
    env, data = hopper_resets(num_demos=2, reset_prob=1.0), np.load(HOPPER)
    assert len(env.states) == 500
    for seed in range(2):
        obs, _ = env.reset(seed=seed)
        row, truncated = int(np.flatnonzero((data["observations"][:2000] == obs).all(1))[0]), False
        assert env.from_expert and env.limit._elapsed_steps == row % 1000
        for t in range(row, row + 1000 - row % 1000):
            assert not truncated
            obs, _, terminated, truncated, _ = env.step(data["actions"][t])
            np.testing.assert_array_equal(obs.astype(np.float32), data["next_observations"][t])
        assert truncated and not terminated
    assert len({env.reset(seed=seed)[0].tobytes() for seed in range(50)}) > 40


def test_steps_left_are_those_of_episodes_of_different_lengths_12(tmp_path):
    """Of 601, 1,000 and 399 steps; the first two are used."""
    data = dict(np.load(HOPPER))
    parts = [np.arange(601), np.arange(1000, 2000), np.arange(2000, 2399)]
    marked = [rows[::4] // 4 for rows in parts]
    cut = {name: data[name][np.concatenate(parts)] for name in data if name not in ("states", "metadata")}
    cut["truncations"][[600, 1600, 1999]] = 1
    np.savez(tmp_path / "Hopper-v4.npz", **cut, states=data["states"][np.concatenate(marked)])
    env = hopper_resets(path=str(tmp_path / "Hopper-v4.npz"), num_demos=2, reset_prob=1.0)
    assert len(env.states) == 151 + 250
    for start in (0, 150, 151, 400):
        obs, row = env.restore(start), 4 * start if start < 151 else 1000 + 4 * (start - 151)
        np.testing.assert_array_equal(obs, data["observations"][row])
        assert env.limit._elapsed_steps == row % 1000
        np.testing.assert_array_equal(env.step(data["actions"][row])[0].astype(np.float32), data["next_observations"][row])


def test_resets_have_their_probability():
    env = hopper_resets(reset_prob=0.3)
    marks = [(env.reset(seed=seed), env.from_expert, env.limit._elapsed_steps) for seed in range(400)]
    hits = [elapsed for _, from_expert, elapsed in marks if from_expert]
    assert 80 < len(hits) < 160 and 400 < np.mean(hits) < 600  # 120 +- 9, 498 +- 26
    assert all(elapsed == 0 for _, from_expert, elapsed in marks if not from_expert)


def drop(name):
    return lambda data: data.pop(name)


WRONG_STATES = {
    r"Hopper-v4.npz has no array 'states', .*: python sac.py --eval-only --checkpoint POLICY --record-demos": drop("states"),
    r"a state of \d+ numbers for each 4th step, \(2500, \d+\) in all; it holds \(10000,": lambda d: d.update(
        states=np.repeat(d["states"], 4, 0)
    ),
    r"it holds \(2500, 3\)": lambda d: d.update(states=d["states"][:, :3]),
    r"do not put Hopper-v4 back: a demonstrated action leads elsewhere": lambda d: d.update(states=np.roll(d["states"], 7, 0)),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG_STATES)
def test_states_that_do_not_restore_are_refused(message, tmp_path, capsys):
    data = dict(np.load(HOPPER))
    WRONG_STATES[message](data)
    np.savez(tmp_path / "Hopper-v4.npz", **data)
    with pytest.raises(SystemExit) as stopped:
        argv = ["--env-id", "Hopper-v4", "--algo", "filter", "--demos", tmp_path / "Hopper-v4.npz", "--run-dir", tmp_path / "run"]
        run(hype, argv)
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    assert re.search(message, capsys.readouterr().err)


def test_resets_want_a_simulator_and_a_time_limit(tmp_path, capsys, demos, hype_point):
    data = dict(np.load(demos)) | dict(states=np.zeros((3, 3)))
    np.savez(tmp_path / "point.npz", **data)
    with pytest.raises(SystemExit):
        run(hype, [*hype_point, "--algo", "filter", "--demos", tmp_path / "point.npz", "--run-dir", tmp_path / "run"])
    assert "must hold a state of 0 numbers" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        hype.ExpertResets(hype.make_env("Hopper-v4").env.env, np.zeros((1, 1)), np.zeros((1, 1)), np.zeros(1), 0.5)
    assert "Hopper-v4 has no time limit" in capsys.readouterr().err


def test_the_cost_sees_no_episode_that_started_at_an_expert_state(tmp_path, monkeypatch):
    """And the policy sees all of them. A reset in the middle of an episode shows as a first observation of the demonstrations."""
    seen = []
    original = hype.cost_update
    monkeypatch.setattr(hype, "cost_update", lambda *inputs: [seen.append(inputs[3]), original(*inputs)][1])
    argv = ["--env-id", "Hopper-v4", "--algo", "filter", *TINY_HYPE, "--total-timesteps", "200", "--run-dir", tmp_path]
    run(hype, argv)
    parts = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["parts"]
    every, own = ({row.numpy().tobytes() for row in parts[name]["rows"][:, :14]} for name in ("real", "own"))
    starts = {row.tobytes() for row in np.load(HOPPER)["observations"]}
    resets = [row for row in parts["real"]["rows"] if row[:11].numpy().tobytes() in starts]
    assert resets and own < every and {row.numpy().tobytes() for inputs in seen for row in inputs} <= own
    assert not any(row[:14].numpy().tobytes() in own for row in resets)


def test_steps_are_all_counted_14(tmp_path, hype_point, monkeypatch):
    calls = []
    original = pointmass.PointMass.step
    monkeypatch.setattr(pointmass.PointMass, "step", lambda self, action: [calls.append(1), original(self, action)][1])
    unseen = dict(eval_return_mean=0.0, eval_return_std=0.0, eval_success_rate=0.0, eval_length_mean=0.0)
    monkeypatch.setattr(hype, "evaluate", lambda *_: unseen)
    last = run(hype, [*hype_point, "--cost-data", "rollout", "--cost-every", "50", "--total-timesteps", "600", "--run-dir", tmp_path])
    assert last["env_steps"] == len(calls) == last["charts/train_steps"] + last["charts/cost_rollout_steps"]
    assert last["charts/cost_rollout_steps"] > 100


def test_steps_of_reset_episodes_are_counted_14(tmp_path, monkeypatch):
    """All but the three that check the states; a reset itself takes none."""
    calls, original = [], hype.gym.envs.mujoco.hopper_v4.HopperEnv.step
    monkeypatch.setattr(hype.gym.envs.mujoco.hopper_v4.HopperEnv, "step", lambda self, a: [calls.append(1), original(self, a)][1])
    unseen = dict(eval_return_mean=0.0, eval_return_std=0.0, eval_success_rate=0.0, eval_length_mean=0.0)
    monkeypatch.setattr(hype, "evaluate", lambda *_: unseen)
    argv = ["--env-id", "Hopper-v4", "--algo", "hype-filter", *TINY_HYPE, "--total-timesteps", "300", "--run-dir", tmp_path]
    assert run(hype, argv)["env_steps"] == 300 == len(calls) - 3


# ------------------------------------------------------------------------------------------- settings
def test_the_family_differs_in_what_its_names_say():
    base = asdict(hype.parse_args(["--algo", "mm"]))
    differences = {algo: {name for name, value in asdict(hype.parse_args(["--algo", algo])).items() if value != base[name]} - {"algo"}
                   for algo in ("hype", "filter", "hype-filter", "bc-reg", "gail")}  # fmt: skip
    assert base["cost_loss"] == "moment" and differences == {
        "hype": {"hybrid_ratio"}, "filter": {"reset_prob"}, "hype-filter": {"hybrid_ratio", "reset_prob"}, "bc-reg": {"bc_weight"},
        "gail": {"cost_loss", "cost_gp_target"},
    }  # fmt: skip


def test_paper_preset_is_the_published_table():
    """Section 3.1 of the reference page, and that nothing of it is left to the defaults but what the run is about."""
    a, b = (0.2, 0.2, 300_000, 0.1, 1_000_000), (0.2, 0.1, 200_000, 0.01, 1_000_000)
    for robot, every, schedule, weight, tremble in (
        ("Ant", 10_000, a, 1.0, 0.01), ("Hopper", 5_000, b, 1.0, 0.01), ("Humanoid", 10_000, b, 0.5, 0.025),
        ("Walker2d", 10_000, a, 0.5, 0.01),
    ):  # fmt: skip
        for algo in ("hype", "mm", "filter", "hype-filter", "bc-reg"):
            args = hype.parse_args(["--env-id", f"{robot}-v4", "--preset", "paper", "--algo", algo])
            assert (args.cost_every, args.lr_sawtooth, args.p_tremble) == (every, every, tremble)
            assert args.hybrid_ratio == (schedule if "hype" in algo else (0.0,))
            assert args.bc_weight == (weight if algo == "bc-reg" else 0) and args.reset_prob == (0.5 if "filter" in algo else 0)
            assert (args.total_train_steps, args.num_demos, args.initial_steps) == (1_000_000, 64, 100)
            assert (args.updates_per_step, args.update_every, args.batch_size, args.gamma, args.tau) == (64, 64, 256, 0.98, 0.02)
            assert args.actor_lr == args.critic_lr == args.alpha_lr == 7.3e-4 and args.alpha == 1 and args.autotune and args.optimistic
            assert (args.cost_loss, args.cost_data, args.cost_episodes, args.cost_batch_size) == ("moment", "rollout", 4, 4_096)
            assert (args.cost_lr, args.cost_restart, args.cost_gp_weight, args.cost_gp_target) == (8e-4, True, 10, 0.4)
            assert not (args.normalise_obs or args.critic_layer_norm or args.cost_normalise or args.actor_average or args.cost_clamp)
    clone = hype.parse_args(["--preset", "paper", "--algo", "bc"])
    assert (clone.total_timesteps, clone.actor_lr, clone.optimistic, clone.bc_sample, clone.eval_episodes) == (
        300_000,
        3e-4,
        False,
        True,
        50,
    )
    left = {"algo", "hybrid_ratio", "reset_prob", "bc_weight"} | set(
        """exp_name env_id seed preset device num_threads compile bf16 run_dir
        resume track demos cost_window cost_reduce eval_only checkpoint capture_video""".split()
    )
    assert set(asdict(clone)) - left == set(hype._PAPER)


def test_the_sawtooth_and_the_harmonic_cost_steps_of_the_paper(tmp_path, hype_point, monkeypatch):
    """Rounds at multiples of cost_every training steps; step sizes fall from one to the next; the cost's are lr, lr, lr / 2, ..."""
    policy, cost, updates = [], [], (hype.sac_update, hype.cost_update)

    def watch_policy(agent, *rest):
        policy.append([optimizer.lr.item() for optimizer in (agent.actor_optimizer, agent.critic_optimizer, agent.alpha_optimizer)])
        return updates[0](agent, *rest)

    def watch_cost(net, optimizer, expert, learner, *rest):
        cost.append((len(policy), optimizer.lr.item(), optimizer.steps.item(), optimizer.optimistic))
        return updates[1](net, optimizer, expert, learner, *rest)

    monkeypatch.setattr(hype, "sac_update", watch_policy)
    monkeypatch.setattr(hype, "cost_update", watch_cost)
    flags = "--cost-every 20 --lr-sawtooth 20 --cost-restart --cost-data rollout --cost-lr 0.0008 --actor-lr 0.001 --total-train-steps 140"
    run(hype, [*hype_point, *flags.split(), "--total-timesteps", "9000", "--run-dir", tmp_path])
    # The first update belongs to the last warm-up step, 60, at which a round is due as well.
    assert [n for n, *_ in cost] == [1, 21, 41, 61, 81] and all(steps == 0 and optimistic for *_, steps, optimistic in cost)
    np.testing.assert_allclose([lr / 8e-4 for _, lr, *_ in cost], [1, 1, 1 / 2, 1 / 3, 1 / 4], rtol=1e-5)
    shares = [1.0, *[1 - i / 20 for i in range(20)] * 4]
    np.testing.assert_allclose([lrs[0] / 1e-3 for lrs in policy], shares, rtol=1e-4)
    np.testing.assert_allclose(np.array(policy)[:, 1:], 3e-4 * np.array(shares)[:, None] * np.ones(2), rtol=1e-4)


def test_a_batch_is_relabelled_with_the_current_cost(tmp_path, hype_point, monkeypatch):
    made, original, checked = [], hype.sac_update, []

    class Cost(hype.Cost):
        def __init__(self, *inputs):
            super().__init__(*inputs)
            made.append(self)

    def update(agent, batch, *rest):
        now = made[-1].reward(batch.obs, batch.action)
        torch.testing.assert_close(batch.reward, now)
        checked.append(now.mean().item())
        return original(agent, batch, *rest)

    monkeypatch.setattr(hype, "Cost", Cost)
    monkeypatch.setattr(hype, "sac_update", update)
    run(hype, [*hype_point, "--cost-lr", "0.01", "--total-timesteps", "100", "--run-dir", tmp_path])
    assert len(checked) == 41 and np.std(checked) > 0.01  # the cost did change


# ------------------------------------------------------------------------------------------- cloning
def test_cloning_on_narrow_actions_learns_and_executes_them_15(tmp_path, hype_point, monkeypatch):
    """Demonstrations in a fifth of the bounds, as Humanoid's in 0.4 of them: what is executed is in the environment's own unit."""
    pointmass.write_demos(tmp_path / "narrow.npz", episodes=40)
    data = dict(np.load(tmp_path / "narrow.npz"))

    def narrow(obs: np.ndarray) -> np.ndarray:
        return 0.2 * pointmass.expert(obs)

    data["actions"] = np.array([narrow(obs) for obs in data["observations"]])
    np.savez(tmp_path / "narrow.npz", **data)
    executed, original = [], pointmass.PointMass.step
    monkeypatch.setattr(
        pointmass.PointMass, "step", lambda self, action: [executed.append((self.state.copy(), action)), original(self, action)][1]
    )
    flags = ["--algo", "bc", "--hidden-sizes", "64", "64", "--batch-size", "64", "--total-timesteps", "1500", "--actor-lr", "3e-3"]
    flags += ["--demos", tmp_path / "narrow.npz", "--num-demos", "40", "--eval-every", "1500"]
    run(hype, [*hype_point, *flags, "--run-dir", tmp_path / "run"])
    assert len(executed) == 100  # an episode at the start, one at the end
    shown, done = np.array([narrow(obs) for obs, _ in executed[50:]]), np.array([action for _, action in executed[50:]])
    assert np.abs(data["actions"]).max() == pytest.approx(0.4) and np.abs(shown).max() > 0.1
    assert (done * shown).sum() / (shown**2).sum() == pytest.approx(1, abs=0.25)


def test_cloning_takes_no_environment_steps_and_imitates(tmp_path, hype_point, demos):
    flags = ["--algo", "bc", "--hidden-sizes", "64", "64", "--batch-size", "64", "--total-timesteps", "1500", "--eval-every", "500"]
    last = run(hype, [*hype_point, *flags, "--actor-lr", "1e-3", "--eval-episodes", "3", "--run-dir", tmp_path])
    assert (last["env_steps"], last["updates"]) == (0, 1500) and [row["updates"] for row in rows(tmp_path)] == ["0", "500", "1000", "1500"]
    assert last["eval_return_mean"] > 0.8 * last["expert_return"]
    assert last["losses/actor"] < 0.05


def test_sampled_cloning_narrows_the_policy(tmp_path):
    """The expected squared error of a sampled action falls with the policy's deviation; of the mean action it does not depend on it."""
    stds = {}
    for sampled in (False, True):
        torch.manual_seed(0)
        args = hype.Args(hidden_sizes=(32, 32), actor_lr=3e-3)
        agent, obs = hype.Agent(3, 2, args), torch.randn(64, 3)
        batch = hype.Batch(obs, obs[:, :2].clamp(-0.5, 0.5), torch.zeros(64), obs, torch.zeros(64))
        for _ in range(300):
            hype.clone_update(agent, batch, torch.randn(64, 2) * sampled, args)
        stds[sampled] = agent.actor.net(obs[None])[0, :, 2:].exp().mean().item()
    assert stds[True] < 0.3 < 0.6 < stds[False]


def test_noise_on_demonstrated_actions_has_its_deviation_and_a_stream_of_its_own(tmp_path, hype_point, monkeypatch):
    seen, original = [], hype.sac_update
    monkeypatch.setattr(hype, "sac_update", lambda *inputs: [seen.append(inputs[1]), original(*inputs)][1])
    for noise in ("0", "0.1"):
        run(hype, [*hype_point, "--demo-noise", noise, "--total-timesteps", "70", "--run-dir", tmp_path / noise])
    pairs = list(zip(seen[: len(seen) // 2], seen[len(seen) // 2 :], strict=True))
    clean, noisy = (torch.cat([batch.action[8:] for batch in batches]) for batches in zip(*pairs, strict=True))
    assert torch.equal(pairs[0][0].obs, pairs[0][1].obs) and torch.equal(pairs[0][0].action[:8], pairs[0][1].action[:8])
    inside = clean.abs() < 0.6
    assert (noisy - clean)[inside].std().item() == pytest.approx(0.1, rel=0.2) and noisy.abs().max() < 1


def test_a_small_actor_is_saved_and_evaluated(tmp_path, hype_point):
    run(hype, [*hype_point, "--actor-hidden", "4", "--total-timesteps", "70", "--run-dir", tmp_path])
    policy = hype.load_policy(str(tmp_path))
    assert policy["hidden_sizes"] == [4] and policy["actor"]["net.output.weight"].shape == (1, 4, 4)
    args = hype.parse_args(["--eval-only", "--checkpoint", str(tmp_path), "--eval-episodes", "1"])
    assert np.isfinite(hype.evaluate_policy(args)["eval_return_mean"])


@pytest.mark.parametrize(
    "env_id,algo",
    [
        ("Hopper-v4", "mm"), ("Hopper-v4", "filter"), ("Ant-v4", "hype-filter"), ("Walker2d-v4", "bc-reg"), ("Hopper-v5", "gail"),
        ("Hopper-v4", "bc"), ("Walker2d-v5", "hype"),
    ],
)  # fmt: skip
def test_every_method_runs_and_resumes_exactly(env_id, algo, tmp_path):
    shown = HOPPER.replace("Hopper-v4", env_id.replace("v5", "v4"))
    argv = ["--env-id", env_id, "--demos", shown, "--algo", algo, *TINY_HYPE, "--demo-noise", "0.05", "--eval-every", "40"]
    run(hype, [*argv, "--total-timesteps", "160", "--run-dir", tmp_path / "whole"])
    run(hype, [*argv, "--total-timesteps", "120", "--run-dir", tmp_path / "parts"])
    run(hype, ["--resume", tmp_path / "parts", "--total-timesteps", "160"])
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts") and len(rows(tmp_path / "whole")) == 5


def test_the_reward_is_the_softplus_of_the_learners_mean_cost_minus_the_cost():
    """A running mean over the learner's batches. Without: minus the cost. The logistic loss has no baseline."""
    torch.manual_seed(0)
    expert, learner, mix = torch.randn(64, 5), torch.randn(64, 5) + 1, torch.rand(64, 1)
    for loss, subtract in itertools.product(("moment", "logistic"), (False, True)):
        cost, mean = hype.Cost(3, 2, args := hype.Args(cost_baseline=subtract, cost_loss=loss)), 0.0
        optimizer = hype.Adam(cost.parameters(), 1e-3)
        for k in range(1, 151):
            mean += max(0.01, 1 / k) * (cost(learner).mean().item() - mean)
            hype.cost_update(cost, optimizer, expert, learner, mix, args)
        f = cost(learner)
        expected = torch.log1p(torch.exp(-f if loss == "logistic" else mean - f)) if subtract or loss == "logistic" else -f
        torch.testing.assert_close(cost.reward(learner[:, :3], learner[:, 3:]), expected, rtol=1e-3, atol=1e-3)
        assert (abs(cost.baseline) > 0.3) == (subtract and loss == "moment") and abs(mean) > 0.1


@pytest.mark.parametrize("algo,name", [("hype", "hype"), ("mm", "hype-mm")])
def test_the_run_folder_names_the_method(algo, name, tmp_path, hype_point, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(hype, [*hype_point, "--algo", algo, "--total-timesteps", "65", "--eval-every", "65"])
    assert [path.name.split("__")[1:3] for path in (tmp_path / "runs").iterdir()] == [[name, "1"]]
