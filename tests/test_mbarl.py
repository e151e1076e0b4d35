"""MBARL's losses, model, rollouts and bookkeeping against hand calculation or a second method."""

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro

import mbarl
import mbarl_offline
from envs.point_mass import PointMass2D
from envs.point_maze import PersistentPointMaze
from envs.tabletop import Tabletop
from mbarl import Args, Batch
from tests.conftest import ROOT

TINY = Args(
    device="cpu",
    total_timesteps=120, eval_every=120, learning_starts=40, switch_steps=20, num_demos=4,
    hidden_sizes=(8, 8), batch_size=16, eval_episodes=4, classifier_every=1, classifier_batch_size=16,
    model_hidden_sizes=(8, 8), model_every=40, model_first_batches=20, model_batches=5, rollouts_per_step=1,
    rollout_length=5,
)  # fmt: skip
POINT = replace(TINY, env_id="PointMass2D-v0", reward="learned", model_beta=0.0, classifier_goal=False)
BOTH = pytest.mark.parametrize("world", [Tabletop(), PointMass2D()], ids=["table", "point"])


def trained(args: Args, folder: Path, **changes) -> tuple[dict, dict[str, mbarl.Player]]:
    """The last checkpoint of a tiny run, and its players."""
    args = replace(args, run_dir=str(folder), **changes)
    mbarl.train(replace(args, checkpoint_every=args.total_timesteps))
    state = torch.load(folder / "checkpoint.pt", weights_only=False)
    return state, state["players"]


def as_set(*columns: torch.Tensor) -> set[tuple]:
    """Rows of columns side by side."""
    return {tuple(row) for row in torch.cat(columns, -1).tolist()}


def watch(monkeypatch, module, name: str, note=lambda *inputs: None) -> list[tuple]:
    """Inputs and result of each call, and a note that is made before it."""
    calls, original = [], getattr(module, name)

    def watched(*inputs):
        noted = note(*inputs)
        calls.append((inputs, original(*inputs), noted))
        return calls[-1][1]

    monkeypatch.setattr(module, name, watched)
    return calls


# --------------------------------------------------------------------------------------------- model, classifier
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_changes_are_predicted_in_units_of_the_data(beta):
    """elites_forward gives mean * std and log_var + 2 log std of what the members give; with beta 0 their own units."""
    obs, actions, change = torch.randn(1_000, 2), torch.randn(1_000, 1), torch.randn(1_000, 2) * torch.tensor([0.1, 20])
    data, unit = Batch(obs, actions, obs[:, 0], obs + change, obs[:, 0]), change.std(0) if beta else torch.ones(2)
    args = replace(TINY, model_beta=beta)
    model = mbarl.ScaledDynamics(2, 1, args)
    torch.testing.assert_close(model.scaled(data, args).next_obs - obs, change / unit, rtol=1e-4, atol=1e-5)
    inputs = torch.randn(5, 4, 3)
    mean, log_var = (x[:5] for x in model(inputs[[0, 1, 2, 3, 4, 0, 0]]))
    torch.testing.assert_close(model.elites_forward(inputs), (mean * unit, log_var + 2 * unit.log()))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_likelihood_weighs_errors_with_the_variance(beta):
    """The gradient of a mean is 2 (mean - y) var^(beta - 1), of a log-variance var^beta (1 - error^2 / var)."""
    mean, log_var = torch.randn(7, 4, 2, requires_grad=True), torch.randn(7, 4, 2, requires_grad=True)
    y, var = torch.randn(7, 4, 2), log_var.detach().exp()
    loss = mbarl.weighted_dynamics_loss(lambda inputs: (mean, log_var), y, y, replace(TINY, model_beta=beta))
    grads = torch.autograd.grad(loss, (mean, log_var))
    torch.testing.assert_close(grads[0] * 8, 2 * (mean.detach() - y) * var ** (beta - 1))
    torch.testing.assert_close(grads[1] * 8, var**beta * (1 - (mean.detach() - y).square() / var))


@pytest.mark.parametrize("logit", [-10.0, -1.0, 0.0, 2.0, 10.0, 1e4])
def test_backward_reward_is_minus_log_of_one_minus_the_classifier(logit):
    classifier = mbarl.Classifier(3, TINY)
    classifier.net.weights[-1].data.zero_()
    classifier.net.biases[-1].data.fill_(logit)
    expected = -math.log(1 - 1 / (1 + math.exp(-logit))) if logit < 1e4 else 23.0259
    np.testing.assert_allclose(classifier.reward(torch.randn(2, 5, 4)).numpy(), np.full((2, 5), expected), rtol=1e-4)


def test_classifier_loss_with_mixup_by_hand():
    """Of the first two entries of three."""
    classifier = mbarl.Classifier(2, TINY)
    demos, visited, mix, order = torch.randn(2, 3), torch.randn(2, 3), torch.rand(4, 1), torch.tensor([2, 0, 3, 1])
    inputs, labels, loss = [*demos, *visited], [1, 1, 0, 0], 0.0
    for i in range(4):
        m, j = mix[i].item(), order[i].item()
        p = torch.sigmoid(classifier.net((m * inputs[i] + (1 - m) * inputs[j])[None, None, :2])).item()
        y = m * labels[i] + (1 - m) * labels[j]
        loss -= (y * math.log(p) + (1 - y) * math.log(1 - p)) / 4
    metrics = mbarl.classifier_update(classifier, demos, visited, mix, order)
    assert metrics["losses/classifier"].item() == pytest.approx(loss, rel=1e-5)
    right = [(classifier(x).item() > 0) == (y > 0) for x, y in zip(inputs, labels, strict=True)]
    assert metrics["reward/classifier_accuracy"].item() == np.mean(right)
    assert mbarl.classifier_loss(classifier, demos, visited, mix, order).item() < loss


# ------------------------------------------------------------------------------------------------ demonstrations
@pytest.mark.parametrize("world", [Tabletop(), PointMass2D(), PersistentPointMaze()], ids=["table", "point", "maze"])
def test_demonstrations_are_real_and_end_with_their_success(world):
    width, trips, starts = world.goals.shape[1], mbarl.scripted_demos(world, 8, 0, "cpu"), []
    for demos in trips:
        states, goals, next_states = demos.obs[:, :-width], demos.obs[:, -width:], demos.next_obs[:, :-width]
        torch.testing.assert_close(world.transition(states, demos.actions), next_states, rtol=0, atol=2e-6)
        torch.testing.assert_close(world.reward(next_states, goals), demos.rewards)
        assert torch.equal(demos.terminations > 0, world.success(next_states, goals))
        assert torch.equal(goals, demos.next_obs[:, -width:])
        ends = demos.terminations.nonzero()[:, 0]
        assert len(ends) == 8 and ends[-1] == len(states) - 1
        joined = (demos.next_obs[:-1] == demos.obs[1:]).all(-1)
        assert torch.equal(joined, demos.terminations[:-1] == 0)
        starts.append(demos.obs[[0, *(ends[:-1] + 1).tolist()]])
    assert torch.equal(starts[0][:, -width:], world.goals.repeat(8 // len(world.goals), 1).float())
    homes = starts[1][:, -width:].double()
    assert world.success(starts[0][:, :-width].double(), homes).float().mean() > 0.5
    if isinstance(world, Tabletop):
        assert (homes == world.start).all() and 8 * 75 < len(trips[0].obs) < 8 * 130


def test_relabelled_demonstrations_differ_in_their_goal_and_reward_alone():
    world = Tabletop()
    demos, _ = mbarl.scripted_demos(world, 1, 0, "cpu")
    copy = mbarl.relabel(demos, world.start, world)
    goals = world.start.float().expand(len(demos.obs), -1)
    for old, new in ((demos.obs, copy.obs), (demos.next_obs, copy.next_obs)):
        assert torch.equal(new, torch.cat([old[:, :6], goals], 1))
    assert torch.equal(copy.actions, demos.actions) and not copy.terminations.any()
    assert torch.equal(copy.rewards, world.reward(demos.next_obs[:, :6], goals))
    assert (copy.rewards[0], demos.rewards[0]) == (1, 0)


# ------------------------------------------------------------------------------------------ rollouts, evaluation
def as_model(function) -> SimpleNamespace:
    """In the place of the ensemble."""
    return SimpleNamespace(sample=lambda states, actions, noise: function(states, actions) if noise else None)


@BOTH
def test_with_the_true_step_as_model_imagined_transitions_are_real(world):
    rng, width, args = np.random.default_rng(0), world.goals.shape[1], replace(TINY, snap=False)
    states, goals = world.start_states(40, rng), world.goals[rng.integers(len(world.goals), size=40)]
    states[:, :2] += torch.from_numpy(rng.normal(size=(40, 2)))
    start = torch.cat([states, goals], -1).float().clamp(-2.5, 2.5)
    actor = mbarl.Actor(start.shape[1], world.action_space.shape[0], (8,))
    data = mbarl.imagine_goals(as_model(world.transition), world, actor, start, 5, True, args)
    states, next_states = data.obs[:, :-width], data.next_obs[:, :-width]
    torch.testing.assert_close(world.transition(states, data.actions), next_states)
    torch.testing.assert_close(world.reward(next_states, data.obs[:, -width:]), data.rewards)
    assert torch.equal(data.obs[:, -width:], data.next_obs[:, -width:])
    assert torch.equal(data.obs[:40], start) and torch.equal(data.obs[40:80], data.next_obs[:40]) and len(states) == 200
    for shift in (0, 0.5):
        moved = data._replace(next_obs=data.next_obs + shift)
        assert mbarl.imagined_error(moved, world).item() == pytest.approx(shift, rel=1e-4, abs=1e-6)


def test_success_ends_a_rollout_only_where_asked_and_states_are_snapped():
    world, actor = Tabletop(), mbarl.Actor(12, 3, (8,))
    start = torch.tensor([[0, 0, 0, y, -1, -1] for y in (2.05, -3.0, 0.0)])
    start = torch.cat([start, world.goals[2].float().expand(3, -1)], -1)
    shift = as_model(lambda states, actions: states + torch.tensor([0.0, 0, 0, 0, 0.3, 0.4]))
    for ends, n in ((True, 1 + 3 + 3), (False, 9)):
        data = mbarl.imagine_goals(shift, world, actor, start, 3, ends, TINY)
        assert len(data.obs) == n and data.terminations.sum() == ends and data.rewards.sum() == (1 if ends else 3)
        assert torch.isin(data.next_obs[:, :6], torch.tensor([0.0, 2.05, -2.8, -1])).all()  # the table's edge, flags
    assert len(mbarl.imagine_goals(shift, world, actor, start[:1], 3, True, TINY).obs) == 1  # all of them have ended
    bad = as_model(lambda states, actions: states + torch.tensor([math.nan, 0, 0, 0, 0, 0]))
    assert len(mbarl.imagine_goals(bad, world, actor, start, 3, True, TINY).obs) == 0


def test_a_learned_reward_is_the_models():
    world, actor, start = PointMass2D(), mbarl.Actor(6, 2, (8,)), torch.randn(7, 6).clamp(-1, 1)

    def headed(states, actions):
        assert (states[:, -1] == 0).all() and states.shape == (7, 5)
        return torch.cat([states[:, :4], actions[:, :1]], 1)

    data = mbarl.imagine_goals(as_model(headed), world, actor, start, 2, False, replace(TINY, reward="learned"))
    assert torch.equal(data.rewards, data.actions[:, 0]) and len(data.obs) == 14


@pytest.mark.parametrize("world,bias", [(Tabletop(), 0.0), (PointMass2D(), 0.0), (PointMass2D(), 10.0)])
def test_lock_step_evaluation_is_that_of_single_episodes(world, bias):
    torch.manual_seed(1)
    actor = mbarl.Actor(world.observation_space.shape[0], world.action_space.shape[0], (8,))
    actor.net.biases[-1].data += bias
    ours = mbarl.evaluate_goals(actor, world, 5, 100, [1, 2])
    returns, distances, success, at_end = [], [], [], []
    for k, start in enumerate(world.start_states(5, np.random.default_rng([1, 2]))):
        world.state, world.goal = start, world.goals[k % len(world.goals)]
        steps = [world.step(actor.act(world.observation(), deterministic=True)) for _ in range(100)]
        returns.append(sum(step[1] for step in steps))
        success.append(any(step[4]["is_success"] for step in steps))
        at_end.append(steps[-1][4]["is_success"])
        distances.append(world.distance(world.state, world.goal).item())
    assert ours["eval_return_mean"] == pytest.approx(np.mean(returns), rel=1e-4)
    assert ours["eval_return_std"] == pytest.approx(np.std(returns), rel=1e-2, abs=1e-5)
    assert ours["eval_final_distance"] == pytest.approx(np.mean(distances), rel=1e-4)
    assert (ours["eval_success_rate"], ours["eval_success_at_end"]) == (np.mean(success), np.mean(at_end))
    assert not bias or (all(success) and not any(at_end))  # full throttle goes through the goal


# ---------------------------------------------------------------------------------------------------- whole runs
@pytest.mark.parametrize(
    "args", [replace(TINY, expert_start_prob=0.0), replace(POINT, expert_start_prob=1.0)], ids=["table", "point"]
)
def test_what_everything_learns_from(args, tmp_path, monkeypatch):
    """Of a run with phases of 20 steps, that learns from step 40 on."""
    judged, fits, dreams = (
        watch(monkeypatch, mbarl, name) for name in ("classifier_update", "fit_dynamics", "imagine_goals")
    )

    def by_classifier(agent, batch, *_):
        return 10 * judged[-1][0][0].reward(batch.next_obs)

    updates = watch(monkeypatch, mbarl, "sac_update", by_classifier)
    _, players = trained(args, tmp_path, real_ratio=0.25)
    world, learned, players = mbarl.make_env(args.env_id).unwrapped, args.reward == "learned", [*players.values()]
    (forward, backward), width = players, world.goals.shape[1]

    # SAC: the acting policy's; a quarter of a batch real, the rest imagined, all its own
    sources = [[as_set(d.obs, d.actions) for d in (player.replay.all(), player.imagined)] for player in players]
    assert len(updates) == 2 * 80
    for k, ((agent, batch, *_), _, rewards) in enumerate(updates):
        acting = k // 40 % 2
        assert agent is updates[40 * acting][0][0]
        pairs = torch.cat([batch.obs, batch.actions], 1).tolist()
        assert [sum(tuple(row) in source for row in pairs) for source in sources[acting]] == [4, 12]
        if not acting:
            rewards = 10 * world.reward(batch.next_obs[:, :-width], batch.obs[:, -width:])
        if acting or not learned:  # the backward policy is rewarded by the classifier as it is
            torch.testing.assert_close(batch.rewards, rewards)

    # Classifier: every state of the forward demonstrations, the last ones too, against states of backward steps
    ends = forward.demos.next_obs[forward.demos.terminations > 0]
    positives = as_set(torch.cat([forward.demos.obs, ends]))
    shown, visited = (set().union(*(as_set(inputs[k]) for inputs, _, _ in judged)) for k in (1, 2))
    assert shown <= positives and len(ends) == 4 and len(shown) > 0.8 * len(positives)
    assert visited <= as_set(backward.lived().next_obs) and len(judged) == 80

    # Model: each physical transition once
    demos = sum(len(trips.obs) for trips in mbarl.scripted_demos(world, 4, args.seed, "cpu"))
    assert [(len(inputs[2].obs), inputs[4]) for inputs, _, _ in fits] == [(demos + 41, 20), (demos + 81, 5)]
    _, _, data, weights, *_ = fits[-1][0]
    assert (weights == 1).all() and len(as_set(data.obs, data.actions)) == len(data.obs)
    assert data.obs.shape[1] == world.state.shape[0] + learned
    if learned:  # rewards of the task, those of the backward demonstrations too
        assert not data.obs[:, 4].any()
        torch.testing.assert_close(data.next_obs[:, 4], world.reward(data.next_obs[:, :4], world.goals[0].float()))

    # Rollouts: for both policies after each fit; success ends the forward ones alone
    assert [inputs[5] for inputs, _, _ in dreams] == [True, False] * 2
    not_shown = 0
    for k, (inputs, result, _) in enumerate(dreams):
        starts, player = as_set(inputs[3]), players[k % 2]
        not_shown += len(starts - as_set(player.demos.obs))
        assert len(inputs[3]) == 40 and starts <= as_set(player.replay.all().obs)
        assert as_set(result.obs, result.actions) <= sources[k % 2][1]
    assert (not_shown > 0) == (args.expert_start_prob == 0)


def test_one_long_trajectory_of_goals_and_phases(tmp_path):
    """Phases of 20 steps; the backward policy carries the next forward goal; a hard reset starts a forward phase."""
    state, players = trained(TINY, tmp_path, train_horizon=150, total_timesteps=230, seed=3, learning_starts=229)
    forward, backward = (player.lived() for player in players.values())
    assert len(forward.obs) == 120 and len(backward.obs) == 110 and state["interventions"] == 1
    # forward 0-20, 40-60, 80-100, 120-140, then 150-170, 190-210; backward 20-40, ..., 140-150, 170-190, 210-230
    pairs = (0, 0), (20, 20), (40, 40), (60, 60), (80, 70), (100, 90)
    for k, (f, b) in enumerate(pairs):
        assert torch.equal(forward.next_obs[f + 19, :6], backward.obs[b, :6])  # the world goes on
        if k in (0, 1, 2, 4):  # after the fourth phase the reset drew a goal
            f = pairs[k + 1][0]
            assert torch.equal(backward.obs[b : b + 20, 6:], forward.obs[f : f + 20, 6:])
    assert len(as_set(forward.obs[:80, 6:])) > 1
    assert (forward.obs[[0, 80], :6] == Tabletop.start).all()
    # a switch by time is no end of values, and no phase of untrained policies succeeds
    assert not forward.terminations.any() and not backward.terminations.any()
    demos = [player.demos for player in players.values()]
    assert [d.terminations.sum() for d in demos] == [4, 0]
    d_f, d_b = mbarl.scripted_demos(Tabletop(), 4, 3, "cpu")
    assert [len(d.obs) for d in demos] == [len(d_f.obs), len(d_f.obs) + 4 * len(d_b.obs)]


@pytest.mark.parametrize("algo,interventions", [("fbrl", 0), ("naive", 0), ("oracle", 8)])
def test_goals_of_the_arms_without_a_classifier(algo, interventions, tmp_path):
    """fbrl's backward goal is the initial state; naive draws a goal after each phase; oracle starts anew."""
    state, players = trained(TINY, tmp_path, algo=algo, total_timesteps=160, learning_starts=159)
    data, *others = (player.lived() for player in players.values())
    phases, start = data.obs.unflatten(0, (-1, 20)), Tabletop.start.float()
    goals = phases[:, 0, 6:]
    assert (
        (phases[:, :, 6:] == goals[:, None]).all()
        and len(as_set(goals)) > 1
        and as_set(goals) <= as_set(Tabletop.goals)
    )
    assert len(others) == (algo == "fbrl") and state["interventions"] == interventions
    if algo == "fbrl":
        assert (others[0].obs[:, 6:] == start).all() and len(others[0].obs) == 80
    if algo == "naive":
        assert torch.equal(phases[1:, 0, :6], data.next_obs[19:-1:20, :6])
    if algo == "oracle":
        assert (phases[:, 0, :6] == start).all()


@pytest.mark.parametrize("algo,forward", [("medal", 5), ("fbrl", 50), ("naive", 100), ("oracle", 100)])
def test_a_forward_success_ends_its_phase_and_a_backward_one_only_in_fbrl(algo, forward, tmp_path, monkeypatch):
    """A world in which everything is a success."""
    monkeypatch.setattr(Tabletop, "success", lambda self, state, goal: torch.ones(state.shape[:-1], dtype=torch.bool))
    state, players = trained(TINY, tmp_path, algo=algo, total_timesteps=100, learning_starts=99)
    first, *others = (player.lived() for player in players.values())
    assert len(first.obs) == forward and first.terminations.all()
    assert all(data.terminations.all() == (algo == "fbrl") for data in others)
    assert state["interventions"] == (100 if algo == "oracle" else 0)


def test_the_docs_own_world_trains(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "mbarl.md").read_text()
    (tmp_path / "my_world.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    words = re.search(r"python mbarl.py (--env-id my_world:[^`]*)`", page)[1]
    words = f"{words} --total-timesteps 60 --learning-starts 55 --run-dir {tmp_path / 'run'}"
    table = mbarl.train(tyro.cli(Args, args=words.split()))
    assert table[-1]["env_steps"] == 60 and math.isfinite(table[-1]["losses/critic_backward"])


# ------------------------------------------------------------------------------------------------- offline study
STUDY = mbarl_offline.Args(
    sizes=(200, 400), lengths=(2, 5), num_demos=2, updates=20, rollout_every=10, rollout_transitions=100,
    model_hidden_sizes=(8, 8), model_batches=20, hidden_sizes=(8, 8), eval_episodes=2,
)  # fmt: skip


def constant_model(world, outputs: int, output: float, args=STUDY) -> mbarl_offline.WorldModel:
    """Predicts `output` for everything, with the least variance (e^-10)."""
    state_dim, act_dim = len(world.state), world.action_space.shape[0]
    model = mbarl_offline.WorldModel(torch.randn(50, state_dim + act_dim), torch.zeros(50, outputs), args)
    model.net.weights[-1].data.zero_()
    model.net.biases[-1].data[..., :outputs] = output
    model.net.biases[-1].data[..., outputs:] = -99
    return model


def test_policies_of_the_study_learn_from_rollouts_of_their_cell(tmp_path, monkeypatch):
    dreams = watch(monkeypatch, mbarl_offline, "roll_out")
    table = mbarl_offline.study(replace(STUDY, run_dir=str(tmp_path)))
    assert all(row["error_1_steps"] < row["error_5_steps"] for row in table) and len(dreams) == 2 * len(table) == 16
    demos = as_set(mbarl_offline.demo_starts(PointMass2D(), 2, 100, [1, 2]))
    for k, ((*_, obs, length, _), batch, _) in enumerate(dreams):
        assert len(batch.obs) == 100 and length == table[k // 2]["rollout_length"]
        near_start = (obs[:, :2] < -0.75).all() and (obs[:, 2:4] == 0).all()
        assert near_start if table[k // 2]["start"] == "narrow" else as_set(obs) <= demos


def test_demonstrated_starts_are_trips_to_success():
    obs = mbarl_offline.demo_starts(PointMass2D(), 3, 100, [1, 2])
    begins = (obs[:, :2] < -0.7499).all(1) & (obs[:, 2:4] == 0).all(1)
    assert begins[0] and begins.sum() == 3 and obs[:, :2].min(1).values.max() > 0.65
    assert not PointMass2D().success(obs[:, :4], obs[:, 4:]).any()


@pytest.mark.parametrize("reward", ["analytic", "learned"])
@pytest.mark.parametrize("snap", [True, False])
def test_imagined_steps_follow_one_another(reward, snap):
    """A model that changes all by -0.5 leaves the square from the first step on."""
    world, args = PointMass2D(), replace(STUDY, reward=reward, snap=snap)
    obs = mbarl_offline.narrow_starts(world, 30, [1, 3])
    model = constant_model(world, 5 if reward == "learned" else 4, -0.5, args)
    batch = mbarl_offline.roll_out(model, world, mbarl_offline.Actor(6, 2, (8,)), obs, 3, args)
    assert torch.equal(batch.obs[:30], obs) and torch.equal(batch.obs[30:], batch.next_obs[:60])
    place, goals = batch.next_obs[:, :2], batch.next_obs[:, 4:]
    assert torch.equal(goals, obs[:, 4:].repeat(3, 1)) and (place < -0.9).all() and (place >= -1).all() == snap
    expected = world.reward(place, goals) if reward == "analytic" else torch.full((90,), -0.5)
    assert torch.allclose(batch.rewards, expected, atol=0.05)


@pytest.mark.parametrize("head", [0, 1])
def test_open_loop_error_of_a_constant_model(head):
    """True steps of 1, predicted steps of 1.5: after k steps k / 2 too far, in units of the standard deviation."""
    world = PointMass2D()
    starts = torch.randn(1_000, 4, dtype=torch.float64)
    world.uniform_states, world.transition = lambda n, rng: starts[:n], lambda states, actions: states + 1
    model = constant_model(world, 4 + head, 1.5)
    errors = mbarl_offline.open_loop_errors(model, world, np.random.default_rng(0), STUDY)
    assert list(errors) == ["error_1_steps", "error_2_steps", "error_5_steps"]
    states = starts + torch.arange(6.0)[:, None, None]
    for k in (1, 2, 5):
        expected = (k / 2 / states[: k + 1].flatten(0, 1).std(0)).square().mean().sqrt().item()
        assert errors[f"error_{k}_steps"] == pytest.approx(expected, rel=1e-4)


def test_a_fitted_model_knows_mean_and_noise_and_samples_them():
    torch.manual_seed(0)
    args = replace(STUDY, model_hidden_sizes=(32,), model_batches=500, model_members=3, model_elites=2, model_lr=5e-3)
    inputs = torch.randn(4_000, 3) * torch.tensor([1.0, 5.0, 0.2])
    targets = inputs[:, :2] / inputs.std(0)[:2] + torch.tensor([0.1, 0.3]) * torch.randn(4_000, 2)
    model = mbarl_offline.WorldModel(inputs, targets, args)
    error = mbarl_offline.train_model(model, inputs, targets, args)
    mean, log_var = model(inputs)
    assert error == pytest.approx((0.1**2 + 0.3**2) / 2, rel=0.15)
    assert (0.5 * log_var).exp().mean((0, 1)).tolist() == pytest.approx([0.1, 0.3], rel=0.15)
    assert (mean[0] - mean[1]).abs().max() > 1e-3 and len(set(model.elites.tolist())) == 2
    states, actions = inputs[:, :2], inputs[:, 2:]
    assert (model.sample(states, actions) - targets).std(0).tolist() == pytest.approx([0.14, 0.42], rel=0.15)


def test_the_study_and_mbarl_learn_the_same_from_a_batch():
    """mbarl.py's update, its losses and its Adam are the second method. Nothing terminates."""
    args = replace(TINY, gamma=0.9, tau=0.5, actor_lr=1e-2, critic_lr=1e-2, alpha_lr=1e-2, alpha=0.3)
    ours, theirs = mbarl_offline.Agent(6, 2, args), mbarl.Agent(6, 2, args)
    theirs.actor.load_state_dict(ours.actor.state_dict())
    theirs.critic.net.load_state_dict(ours.critic.state_dict())
    theirs.target_critic.net.load_state_dict(ours.target_critic.state_dict())
    obs, actions, rewards, next_obs = torch.randn(16, 6), torch.rand(16, 2), torch.randn(16), torch.randn(16, 6)
    for seed in range(3):
        torch.manual_seed(seed)
        noise = torch.stack([torch.randn(16, 2), torch.randn(16, 2)])
        metrics = mbarl.sac_update(theirs, Batch(obs, actions, rewards, next_obs, torch.zeros(16)), noise, args)
        torch.manual_seed(seed)
        losses = mbarl_offline.sac_update(ours, mbarl_offline.Transitions(obs, actions, rewards, next_obs), args)
        expected = [metrics["losses/critic"].item(), metrics["losses/actor"].item()]
        assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-4)
    assert ours.log_alpha.item() == pytest.approx(theirs.log_alpha.item(), rel=1e-4)
