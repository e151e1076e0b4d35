"""MBARL's losses, model, rollouts and bookkeeping against hand calculation or a second method."""

import math
import re
from dataclasses import replace
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
    device="cpu", total_timesteps=120, eval_every=120, learning_starts=40, switch_steps=20, num_demos=4,
    hidden_sizes=(8, 8), batch_size=16, eval_episodes=4, classifier_every=1, classifier_batch_size=16,
    model_hidden_sizes=(8, 8), model_every=40, model_first_batches=20, model_batches=5, rollouts_per_step=1,
    rollout_length=5,
)  # fmt: skip
POINT = replace(TINY, env_id="PointMass2D-v0", reward="learned", model_beta=0.0, classifier_goal=False)


def trained(args: Args, folder, **changes) -> tuple[dict, list[mbarl.Player]]:
    """The last checkpoint of a tiny run, and its players."""
    args = replace(args, run_dir=str(folder), **changes)
    mbarl.train(replace(args, checkpoint_every=args.total_timesteps))
    state = torch.load(folder / "checkpoint.pt", weights_only=False)
    return state, [*state["players"].values()]


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
    model, inputs = mbarl.ScaledDynamics(2, 1, args), torch.randn(5, 4, 3)
    torch.testing.assert_close(model.scaled(data, args).next_obs - obs, change / unit, rtol=1e-4, atol=1e-5)
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
def test_demonstrations_are_real_end_with_their_success_and_are_relabelled(world):
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

    copy, goals = mbarl.relabel(demos, world.goals[0], world), world.goals[:1].float().expand(len(states), -1)
    assert torch.equal(copy.obs, torch.cat([states, goals], 1)) and torch.equal(copy.actions, demos.actions)
    assert torch.equal(copy.next_obs, torch.cat([next_states, goals], 1)) and not copy.terminations.any()
    assert torch.equal(copy.rewards, world.reward(next_states, goals))


# ------------------------------------------------------------------------------------------ rollouts, evaluation
def as_model(function) -> SimpleNamespace:
    """In the place of the ensemble."""
    return SimpleNamespace(sample=lambda states, actions, noise: function(states, actions) if noise else None)


@pytest.mark.parametrize(
    "world,reward", [(Tabletop(), "analytic"), (PointMass2D(), "analytic"), (PointMass2D(), "learned")]
)
def test_with_the_true_step_as_model_imagined_transitions_are_real(world, reward):
    """A model that learns rewards sees 0 in their place, and here predicts the first action."""

    def step(states, actions):
        if reward == "analytic":
            return world.transition(states, actions)
        assert (states[:, 4:] == 0).all() and states.shape[1] == 5
        return torch.cat([world.transition(states[:, :4], actions), actions[:, :1]], 1)

    rng, width, args = np.random.default_rng(0), world.goals.shape[1], replace(TINY, snap=False, reward=reward)
    states, goals = world.start_states(40, rng), world.goals[rng.integers(len(world.goals), size=40)]
    states[:, :2] += torch.from_numpy(rng.normal(size=(40, 2)))
    start = torch.cat([states, goals], -1).float().clamp(-2.5, 2.5)
    actor = mbarl.Actor(start.shape[1], world.action_space.shape[0], (8,))
    data = mbarl.imagine_goals(as_model(step), world, actor, start, 5, True, args)
    states, next_states = data.obs[:, :-width], data.next_obs[:, :-width]
    torch.testing.assert_close(world.transition(states, data.actions), next_states)
    rewards = world.reward(next_states, data.obs[:, -width:]) if reward == "analytic" else data.actions[:, 0]
    torch.testing.assert_close(rewards, data.rewards)
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


@pytest.mark.parametrize("world,bias", [(Tabletop(), 0.0), (PointMass2D(), 0.0), (PointMass2D(), 10.0)])
def test_lock_step_evaluation_is_that_of_single_episodes(world, bias):
    torch.manual_seed(1)
    actor, results = mbarl.Actor(world.observation_space.shape[0], world.action_space.shape[0], (8,)), []
    actor.net.biases[-1].data += bias
    for k, start in enumerate(world.start_states(5, np.random.default_rng([1, 2]))):
        world.state, world.goal = start, world.goals[k % len(world.goals)]
        steps = [world.step(actor.act(world.observation(), deterministic=True)) for _ in range(100)]
        success = [step[4]["is_success"] for step in steps]
        distance = world.distance(world.state, world.goal).item()
        results.append((sum(step[1] for step in steps), any(success), success[-1], distance))
    returns, *means = np.array(results, float).T
    names = "return_mean", "return_std", "length_mean", "success_rate", "success_at_end", "final_distance"
    expected = dict(zip(names, (returns.mean(), returns.std(), 100, *map(np.mean, means)), strict=True))
    ours = mbarl.evaluate_goals(actor, world, 5, 100, [1, 2])
    assert ours == pytest.approx({f"eval_{name}": x for name, x in expected.items()}, rel=1e-3, abs=1e-5)
    assert not bias or (expected["success_rate"], expected["success_at_end"]) == (1, 0)  # it goes through the goal


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
    world, learned, (forward, backward) = mbarl.make_env(args.env_id).unwrapped, args.reward == "learned", players
    width = world.goals.shape[1]

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

    # Model: each physical transition once; rewards are the task's, those of the backward demonstrations too
    demos = sum(len(trips.obs) for trips in mbarl.scripted_demos(world, 4, args.seed, "cpu"))
    assert [(len(inputs[2].obs), inputs[4]) for inputs, _, _ in fits] == [(demos + 41, 20), (demos + 81, 5)]
    _, _, data, weights, *_ = fits[-1][0]
    assert (weights == 1).all() and len(as_set(data.obs, data.actions)) == len(data.obs)
    assert data.obs.shape[1] == world.state.shape[0] + learned
    if learned:
        assert not data.obs[:, 4].any()
        torch.testing.assert_close(data.next_obs[:, 4], world.reward(data.next_obs[:, :4], world.goals[0].float()))

    # Rollouts: for both policies after each fit; success ends the forward ones alone
    assert [inputs[5] for inputs, _, _ in dreams] == [True, False] * 2
    for k, (inputs, result, _) in enumerate(dreams):
        starts, player = as_set(inputs[3]), players[k % 2]
        assert len(inputs[3]) == 40 and starts <= as_set(player.replay.all().obs)
        assert (starts <= as_set(player.demos.obs)) == (args.expert_start_prob == 1)
        assert as_set(result.obs, result.actions) <= sources[k % 2][1]


def test_one_long_trajectory_of_goals_and_phases(tmp_path):
    """Phases of 20 steps; the backward policy carries the next forward goal; a hard reset starts a forward phase."""
    changes = dict(train_horizon=150, total_timesteps=230, seed=3, learning_starts=229)
    state, players = trained(TINY, tmp_path, **changes)
    forward, backward = (player.lived() for player in players)
    there, arrived = forward.obs.split(20), forward.next_obs.split(20)
    back = backward.obs.split([20, 20, 20, 10, 20, 20])  # the fourth phase ends with the reset
    assert len(there) == 6 and state["interventions"] == 1
    for k in range(6):
        assert torch.equal(arrived[k][-1, :6], back[k][0, :6])  # the world goes on
        assert k in (3, 5) or torch.equal(back[k][:, 6:], there[k + 1][:, 6:])  # the reset drew a goal
    assert len(as_set(forward.obs[:80, 6:])) > 1
    assert (forward.obs[[0, 80], :6] == Tabletop.start).all()
    # a switch by time is no end of values, and no phase of untrained policies succeeds
    assert not forward.terminations.any() and not backward.terminations.any()
    d_f, d_b = mbarl.scripted_demos(Tabletop(), 4, 3, "cpu")
    demos = [(len(player.demos.obs), player.demos.terminations.sum()) for player in players]
    assert demos == [(len(d_f.obs), 4), (len(d_f.obs) + 4 * len(d_b.obs), 0)]


@pytest.mark.parametrize("algo,interventions", [("fbrl", 0), ("naive", 0), ("oracle", 8)])
def test_goals_of_the_arms_without_a_classifier(algo, interventions, tmp_path):
    """fbrl's backward goal is the initial state; naive draws a goal after each phase; oracle starts anew."""
    state, players = trained(TINY, tmp_path, algo=algo, total_timesteps=160, learning_starts=159)
    data, *others = (player.lived() for player in players)
    phases, start = data.obs.unflatten(0, (-1, 20)), Tabletop.start.float()
    goals = as_set(phases[:, 0, 6:])
    assert (phases[:, :, 6:] == phases[:, :1, 6:]).all() and len(goals) > 1 and goals <= as_set(Tabletop.goals)
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
    first, *others = (player.lived() for player in players)
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


def constant_model(outputs: int, output: float, args=STUDY) -> mbarl_offline.WorldModel:
    """Predicts `output` for every state of the point mass, with the least variance (e^-10)."""
    model = mbarl_offline.WorldModel(torch.randn(50, 6), torch.zeros(50, outputs), args)
    model.net.weights[-1].data.zero_()
    model.net.biases[-1].data[..., :outputs] = output
    model.net.biases[-1].data[..., outputs:] = -99
    return model


def test_policies_of_the_study_learn_from_rollouts_of_their_cell(tmp_path, monkeypatch):
    dreams = watch(monkeypatch, mbarl_offline, "roll_out")
    table = mbarl_offline.study(replace(STUDY, run_dir=str(tmp_path)))
    assert all(row["error_1_steps"] < row["error_5_steps"] for row in table) and len(dreams) == 2 * len(table) == 16
    trips = mbarl_offline.demo_starts(PointMass2D(), 2, 100, [1, 2])
    begins = (trips[:, :2] < -0.7499).all(1) & (trips[:, 2:4] == 0).all(1)
    assert begins[0] and begins.sum() == 2 and trips[:, :2].min(1).values.max() > 0.65  # two trips to the goal
    assert not PointMass2D().success(trips[:, :4], trips[:, 4:]).any()
    for k, ((*_, obs, length, _), batch, _) in enumerate(dreams):
        assert len(batch.obs) == 100 and length == table[k // 2]["rollout_length"]
        near_start = (obs[:, :2] < -0.75).all() and (obs[:, 2:4] == 0).all()
        assert near_start if table[k // 2]["start"] == "narrow" else as_set(obs) <= as_set(trips)


@pytest.mark.parametrize("reward", ["analytic", "learned"])
@pytest.mark.parametrize("snap", [True, False])
def test_imagined_steps_follow_one_another(reward, snap):
    """A model that changes all by -0.5 leaves the square from the first step on."""
    world, args = PointMass2D(), replace(STUDY, reward=reward, snap=snap)
    obs, model = mbarl_offline.narrow_starts(world, 30, [1, 3]), constant_model(4 + (reward == "learned"), -0.5, args)
    batch = mbarl_offline.roll_out(model, world, mbarl_offline.Actor(6, 2, (8,)), obs, 3, args)
    assert torch.equal(batch.obs[:30], obs) and torch.equal(batch.obs[30:], batch.next_obs[:60])
    place, goals = batch.next_obs[:, :2], batch.next_obs[:, 4:]
    assert torch.equal(goals, obs[:, 4:].repeat(3, 1)) and (place < -0.9).all() and (place >= -1).all() == snap
    expected = world.reward(place, goals) if reward == "analytic" else torch.full((90,), -0.5)
    assert torch.allclose(batch.rewards, expected, atol=0.05)


@pytest.mark.parametrize("head", [0, 1])
def test_open_loop_error_of_a_constant_model(head):
    """True steps of 1, predicted steps of 1.5: after k steps k / 2 too far, in units of the standard deviation."""
    world, starts = PointMass2D(), torch.randn(1_000, 4, dtype=torch.float64)
    world.uniform_states, world.transition = lambda n, rng: starts[:n], lambda states, actions: states + 1
    errors = mbarl_offline.open_loop_errors(constant_model(4 + head, 1.5), world, np.random.default_rng(0), STUDY)
    states, expected = starts + torch.arange(6.0)[:, None, None], {}
    for k in (1, 2, 5):
        expected[f"error_{k}_steps"] = (k / 2 / states[: k + 1].flatten(0, 1).std(0)).square().mean().sqrt().item()
    assert errors == pytest.approx(expected, rel=1e-4)


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
    residual = model.sample(inputs[:, :2], inputs[:, 2:]) - targets
    assert residual.std(0).tolist() == pytest.approx([0.14, 0.42], rel=0.15)


def test_the_study_and_mbarl_learn_the_same_from_a_batch():
    """mbarl.py's update, its losses and its Adam are the second method. Nothing terminates."""
    args = replace(TINY, gamma=0.9, tau=0.5, actor_lr=1e-2, critic_lr=1e-2, alpha_lr=1e-2, alpha=0.3)
    ours, theirs = mbarl_offline.Agent(6, 2, args), mbarl.Agent(6, 2, args)
    theirs.actor.load_state_dict(ours.actor.state_dict())
    for critic in (theirs.critic, theirs.target_critic):
        critic.net.load_state_dict(ours.critic.state_dict())
    obs, actions, rewards, next_obs = torch.randn(16, 6), torch.rand(16, 2), torch.randn(16), torch.randn(16, 6)
    for seed in range(3):
        torch.manual_seed(seed)
        noise = torch.stack([torch.randn(16, 2), torch.randn(16, 2)])
        metrics = mbarl.sac_update(theirs, Batch(obs, actions, rewards, next_obs, torch.zeros(16)), noise, args)
        torch.manual_seed(seed)
        losses = mbarl_offline.sac_update(ours, mbarl_offline.Transitions(obs, actions, rewards, next_obs), args)
        torch.testing.assert_close(losses, (metrics["losses/critic"], metrics["losses/actor"]), rtol=1e-4, atol=1e-5)
    assert ours.log_alpha.item() == pytest.approx(theirs.log_alpha.item(), rel=1e-4)
