"""MBARL's losses, model, rollouts and bookkeeping against hand calculation or a second method."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

import mbarl
import mbarl_offline
from envs.point_mass import PointMass2D
from envs.tabletop import Tabletop
from mbarl import Args, Batch

ROOT = Path(__file__).parents[1]
TINY = Args(
    total_timesteps=120, eval_every=120, learning_starts=40, switch_steps=20, num_demos=4,
    hidden_sizes=(8, 8), batch_size=16, eval_episodes=4, classifier_every=1, classifier_batch_size=16,
    model_hidden_sizes=(8, 8), model_every=40, model_first_batches=20, model_batches=5, rollouts_per_step=1,
    rollout_length=5,
)  # fmt: skip
POINT = replace(TINY, env_id="PointMass2D-v0", reward="learned", model_beta=0.0, classifier_goal=False)


def trained(args: Args, folder: Path, **changes) -> dict:
    """The last checkpoint of a tiny run."""
    args = replace(args, run_dir=str(folder), **changes)
    mbarl.train(replace(args, checkpoint_every=args.total_timesteps))
    return torch.load(folder / "checkpoint.pt", weights_only=False)


def rows(batch: Batch, *names: str) -> set[tuple]:
    """The batch's transitions as a set, of the named fields."""
    columns = [getattr(batch, name).flatten(0, -2) for name in names]
    return {tuple(row) for row in torch.cat(columns, -1).tolist()}


# --------------------------------------------------------------------------------------------------------- model
def test_changes_are_predicted_in_units_of_the_data():
    """elites_forward gives mean * std and log_var + 2 log std of what the members give; with beta 0 their own units."""
    obs, actions, change = torch.randn(1_000, 2), torch.randn(1_000, 1), torch.randn(1_000, 2) * torch.tensor([0.1, 20])
    data = Batch(obs, actions, obs[:, 0], obs + change, obs[:, 0])
    for beta, unit in ((1.0, change.std(0)), (0.0, torch.ones(2))):
        args = replace(TINY, model_beta=beta)
        model = mbarl.ScaledDynamics(2, 1, args)
        scaled = model.scaled(data, args)
        torch.testing.assert_close(scaled.next_obs - obs, change / unit, rtol=1e-4, atol=1e-5)
        inputs = torch.randn(5, 4, 3)
        mean, log_var = model(inputs[[0, 1, 2, 3, 4, 0, 0]])
        torch.testing.assert_close(model.elites_forward(inputs)[0], mean[:5] * unit)
        torch.testing.assert_close(model.elites_forward(inputs)[1], log_var[:5] + 2 * unit.log())


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_likelihood_weighs_errors_with_the_variance(beta):
    """The gradient of a mean is 2 (mean - y) var^(beta - 1), of a log-variance var^beta (1 - error^2 / var)."""
    mean, log_var = torch.randn(7, 4, 2, requires_grad=True), torch.randn(7, 4, 2, requires_grad=True)
    y, var = torch.randn(7, 4, 2), log_var.detach().exp()
    loss = mbarl.weighted_dynamics_loss(lambda inputs: (mean, log_var), y, y, replace(TINY, model_beta=beta))
    grads = torch.autograd.grad(loss, (mean, log_var))
    torch.testing.assert_close(grads[0] * 8, 2 * (mean.detach() - y) * var ** (beta - 1))
    torch.testing.assert_close(grads[1] * 8, var**beta * (1 - (mean.detach() - y).square() / var))


def test_a_rare_change_is_learned_by_squared_error_not_by_plain_likelihood():
    """One row in fifty changes: with the plain likelihood it is noise of a mean that stays, with beta 1 its mean."""
    torch.manual_seed(0)
    actions = torch.rand(3_000, 1) * 1.8 - 0.9
    actions[::50] = 0.97
    obs = torch.randn(3_000, 2)
    jump = torch.where(actions > 0.95, 1.0, 0.0) * torch.tensor([1.0, 0.0])
    data = Batch(obs, actions, obs[:, 0], obs + jump + obs * torch.tensor([0.0, 0.1]), torch.zeros(3_000))
    found = {}
    for beta in (0.0, 1.0):
        args = replace(TINY, model_beta=beta, model_members=5, model_hidden_sizes=(32, 32))
        args = replace(args, model_lr=3e-3, model_patience=100)
        torch.manual_seed(1)
        model = mbarl.ScaledDynamics(2, 1, args)
        scaled, weights = model.scaled(data, args), torch.ones(3_000)
        mbarl.fit_dynamics(model, mbarl.weighted_dynamics_update, scaled, weights, 500, args)
        mean, _ = model.elites_forward(torch.tensor([0, 0, 0.97]).expand(5, 1, 3))
        found[beta] = mean[..., 0].mean().item()
    assert found[1.0] > 0.5 and found[1.0] > found[0.0] + 0.3, found


def test_goal_free_transitions_and_a_reward_head():
    """The head learns r(s, a) beside the states' change."""
    torch.manual_seed(0)
    states, actions, goals = torch.randn(1_500, 3), torch.rand(1_500, 2) * 2 - 1, torch.randn(1_500, 2)
    rewards, next_states = states[:, 0] - actions[:, 1], states + 0.3 * torch.nn.functional.pad(actions, (0, 1))
    obs, next_obs = torch.cat([states, goals], 1), torch.cat([next_states, goals], 1)
    data = Batch(obs, actions, rewards, next_obs, torch.zeros(1_500))
    plain, headed = (mbarl.physical(data, 3, head) for head in (False, True))
    assert torch.equal(plain.obs, states) and torch.equal(plain.next_obs, next_states)
    change = torch.cat([next_states - states, rewards[:, None]], 1)
    torch.testing.assert_close(headed.next_obs - headed.obs, change, rtol=0, atol=0)
    args = replace(TINY, model_beta=0.0, model_hidden_sizes=(32, 32), model_lr=3e-3, model_patience=100)
    model = mbarl.ScaledDynamics(4, 2, args)
    mbarl.fit_dynamics(model, mbarl.weighted_dynamics_update, headed, torch.ones(1_500), 300, args)
    found = model.sample(headed.obs, actions, noise=False) - headed.obs
    assert ((found - change).square().mean(0) < 0.05 * change.var(0) + 0.005).all()


# ---------------------------------------------------------------------------------------------------- classifier
@pytest.mark.parametrize("logit", [-10.0, -1.0, 0.0, 2.0, 10.0, 1e4])
def test_backward_reward_is_minus_log_of_one_minus_the_classifier(logit):
    classifier = mbarl.Classifier(3, TINY)
    classifier.net.weights[-1].data.zero_()
    classifier.net.biases[-1].data.fill_(logit)
    expected = -math.log(1 - 1 / (1 + math.exp(-logit))) if logit < 1e4 else 23.0259
    np.testing.assert_allclose(classifier.reward(torch.randn(2, 5, 4)).numpy(), np.full((2, 5), expected), rtol=1e-4)


def test_the_classifier_approaches_the_log_ratio_and_mixup_shrinks_it():
    """N(1, 1) against N(-1, 1): the log-ratio is 2 x. The second entry it must not see."""
    found = {}
    for mixup in (False, True):
        torch.manual_seed(0)
        classifier = mbarl.Classifier(1, replace(TINY, classifier_lr=5e-3))
        for _ in range(300):
            demos = torch.randn(512, 2) + torch.tensor([1.0, 9])
            visited = torch.randn(512, 2) + torch.tensor([-1.0, -9])
            mix = torch.rand(1024, 1) if mixup else torch.ones(1024, 1)
            mbarl.classifier_update(classifier, demos, visited, mix, torch.randperm(1024))
        found[mixup] = classifier(torch.tensor([[-1.0, 9], [0, 9], [1, 9]])).detach()
    torch.testing.assert_close(found[False], torch.tensor([-2.0, 0, 2]), rtol=0, atol=0.3)
    assert (found[True][[0, 2]].abs() < 0.8 * found[False][[0, 2]].abs()).all()
    assert found[True][2] > 0.2 > -0.2 > found[True][0]


def test_classifier_loss_with_mixup_by_hand():
    classifier = mbarl.Classifier(2, TINY)
    demos, visited, mix, order = torch.randn(2, 2), torch.randn(2, 2), torch.rand(4, 1), torch.tensor([2, 0, 3, 1])
    inputs, labels, loss = [*demos, *visited], [1, 1, 0, 0], 0.0
    for i in range(4):
        m, j = mix[i].item(), order[i].item()
        p = torch.sigmoid(classifier(m * inputs[i] + (1 - m) * inputs[j])).item()
        y = m * labels[i] + (1 - m) * labels[j]
        loss -= (y * math.log(p) + (1 - y) * math.log(1 - p)) / 4
    metrics = mbarl.classifier_update(classifier, demos, visited, mix, order)
    assert metrics["losses/classifier"].item() == pytest.approx(loss, rel=1e-5)
    right = [(classifier(x).item() > 0) == (y > 0) for x, y in zip(inputs, labels, strict=True)]
    assert metrics["reward/classifier_accuracy"].item() == np.mean(right)


# ------------------------------------------------------------------------------------------------ demonstrations
@pytest.mark.parametrize("world", [Tabletop(), PointMass2D()], ids=["table", "point"])
def test_demonstrations_are_real_and_end_with_their_success(world):
    n, width = 2 * len(world.goals), world.goals.shape[1]
    forward, backward = mbarl.scripted_demos(world, n, 0, "cpu")
    for demos in (forward, backward):
        states, goals, next_states = demos.obs[:, :-width], demos.obs[:, -width:], demos.next_obs[:, :-width]
        torch.testing.assert_close(world.transition(states, demos.actions), next_states, rtol=0, atol=2e-6)
        torch.testing.assert_close(world.reward(next_states, goals), demos.rewards)
        assert torch.equal(demos.terminations > 0, world.success(next_states, goals))
        assert torch.equal(goals, demos.next_obs[:, -width:])
        ends = demos.terminations.nonzero()[:, 0]
        assert len(ends) == n and ends[-1] == len(states) - 1
        joined = (demos.next_obs[:-1] == demos.obs[1:]).all(-1)
        assert torch.equal(joined, demos.terminations[:-1] == 0)
    firsts = [torch.cat([torch.tensor([0]), d.terminations.nonzero()[:-1, 0] + 1]) for d in (forward, backward)]
    assert torch.equal(forward.obs[firsts[0], -width:], world.goals.repeat(2, 1).float())
    homes = backward.obs[firsts[1], -width:].double()
    assert world.success(forward.obs[firsts[0], :-width].double(), homes).float().mean() > 0.5
    if isinstance(world, Tabletop):
        assert (homes == world.start).all()


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


def test_an_expert_that_never_succeeds_is_an_error(monkeypatch):
    world = PointMass2D()
    monkeypatch.setattr(world, "expert", lambda *_: torch.zeros(2))
    monkeypatch.setattr(world, "transition", lambda state, action: state)
    with pytest.raises(SystemExit, match=r"the expert does not reach \[0.8, 0.8\] in 10,000 steps"):
        mbarl.scripted_demos(world, 1, 0, "cpu")


# ------------------------------------------------------------------------------------------------------ rollouts
class Model:
    """A function of states and actions in the place of the ensemble."""

    def __init__(self, function):
        self.function = function

    def sample(self, states, actions, noise):
        assert noise
        return self.function(states, actions)


@pytest.mark.parametrize("world", [Tabletop(), PointMass2D()], ids=["table", "point"])
def test_with_the_true_step_as_model_imagined_transitions_are_real(world):
    rng, width = np.random.default_rng(0), world.goals.shape[1]
    states, goals = world.start_states(40, rng), world.goals[rng.integers(len(world.goals), size=40)]
    states[:, :2] += torch.from_numpy(rng.normal(size=(40, 2)))
    start = torch.cat([states, goals], -1).float().clamp(-2.5, 2.5)
    actor = mbarl.Actor(start.shape[1], world.action_space.shape[0], (8,))
    args = replace(TINY, snap=False)
    data = mbarl.imagine_goals(Model(world.transition), world, actor, start, 5, True, args)
    states, next_states = data.obs[:, :-width], data.next_obs[:, :-width]
    torch.testing.assert_close(world.transition(states, data.actions), next_states)
    torch.testing.assert_close(world.reward(next_states, data.obs[:, -width:]), data.rewards)
    assert torch.equal(data.obs[:, -width:], data.next_obs[:, -width:])
    assert torch.equal(data.obs[:40], start) and torch.equal(data.obs[40:80], data.next_obs[:40]) and len(states) == 200
    assert mbarl.imagined_error(data, world) < 1e-6
    assert mbarl.imagined_error(data._replace(next_obs=data.next_obs + 0.5), world).item() == pytest.approx(
        0.5, rel=1e-4
    )


def test_success_ends_a_rollout_only_where_asked_and_states_are_snapped():
    world, actor = Tabletop(), mbarl.Actor(12, 3, (8,))
    start = torch.tensor([[0, 0, 0, y, -1, -1] for y in (2.05, -3.0, 0.0)])
    start = torch.cat([start, world.goals[2].float().expand(3, -1)], -1)
    shift = Model(lambda states, actions: states + torch.tensor([0.0, 0, 0, 0, 0.3, 0.4]))
    for ends, n in ((True, 1 + 3 + 3), (False, 9)):
        data = mbarl.imagine_goals(shift, world, actor, start, 3, ends, TINY)
        assert len(data.obs) == n and data.terminations.sum() == ends and data.rewards.sum() == (1 if ends else 3)
        assert torch.isin(data.next_obs[:, :6], torch.tensor([0.0, 2.05, -2.8, -1])).all()  # the table's edge, flags
    every = mbarl.imagine_goals(shift, world, actor, start[:1], 3, True, TINY)
    assert len(every.obs) == 1  # all of them have ended
    bad = Model(lambda states, actions: states + torch.tensor([math.nan, 0, 0, 0, 0, 0]))
    assert len(mbarl.imagine_goals(bad, world, actor, start, 3, True, TINY).obs) == 0


def test_a_learned_reward_is_the_models():
    world, actor, start = PointMass2D(), mbarl.Actor(6, 2, (8,)), torch.randn(7, 6).clamp(-1, 1)

    def headed(states, actions):
        assert (states[:, -1] == 0).all() and states.shape == (7, 5)
        return torch.cat([states[:, :4], actions[:, :1]], 1)

    data = mbarl.imagine_goals(Model(headed), world, actor, start, 2, False, replace(TINY, reward="learned"))
    assert torch.equal(data.rewards, data.actions[:, 0]) and len(data.obs) == 14


# ---------------------------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize("world", [Tabletop(), PointMass2D()], ids=["table", "point"])
def test_lock_step_evaluation_is_that_of_single_episodes(world):
    torch.manual_seed(1)
    actor = mbarl.Actor(world.observation_space.shape[0], world.action_space.shape[0], (8,))
    ours = mbarl.evaluate_goals(actor, world, 5, 60, [1, 2])
    returns, distances, success, at_end = [], [], [], []
    for k, start in enumerate(world.start_states(5, np.random.default_rng([1, 2]))):
        world.state, world.goal = start, world.goals[k % len(world.goals)]
        steps = [world.step(actor.act(world.observation(), deterministic=True)) for _ in range(60)]
        returns.append(sum(step[1] for step in steps))
        success.append(any(step[4]["is_success"] for step in steps))
        at_end.append(steps[-1][4]["is_success"])
        distances.append(world.distance(world.state, world.goal).item())
    assert ours["eval_return_mean"] == pytest.approx(np.mean(returns), rel=1e-4)
    assert ours["eval_return_std"] == pytest.approx(np.std(returns), rel=1e-2, abs=1e-5)
    assert ours["eval_final_distance"] == pytest.approx(np.mean(distances), rel=1e-4)
    assert (ours["eval_success_rate"], ours["eval_success_at_end"]) == (np.mean(success), np.mean(at_end))


def test_flying_through_the_goal_is_success_but_not_at_the_end():
    actor = mbarl.Actor(6, 2, (8,))
    actor.net.biases[-1].data[..., :2] = 10  # full throttle
    result = mbarl.evaluate_goals(actor, PointMass2D(), 4, 100, [0])
    assert (result["eval_success_rate"], result["eval_success_at_end"]) == (1, 0)
    assert result["eval_final_distance"] == pytest.approx(0.2 * 2**0.5, rel=1e-3)  # in the corner behind it


# ---------------------------------------------------------------------------------------------------- whole runs
@pytest.mark.parametrize("args", [TINY, POINT], ids=["table", "point"])
def test_what_everything_learns_from(args, tmp_path, monkeypatch):
    """Of a run with phases of 20 steps, that learns from step 40 on."""
    calls, classifiers, order = {}, [], []

    def watch(name):
        original = getattr(mbarl, name)

        def watched(*inputs):
            order.append(name)
            expected = 10 * classifiers[0].reward(inputs[1].next_obs) if name == "sac_update" and classifiers else None
            result = original(*inputs)
            calls.setdefault(name, []).append((inputs, result, expected))
            return result

        monkeypatch.setattr(mbarl, name, watched)

    for name in ("sac_update", "classifier_update", "fit_dynamics", "imagine_goals"):
        watch(name)
    init = mbarl.Classifier.__init__
    monkeypatch.setattr(mbarl.Classifier, "__init__", lambda self, *a: [init(self, *a), classifiers.append(self)][0])
    state = trained(args, tmp_path, real_ratio=0.25)
    world = mbarl.make_env(args.env_id).unwrapped
    width, learned = world.goals.shape[1], args.reward == "learned"
    forward, backward = state["players"]["forward"], state["players"]["backward"]

    # SAC: the acting policy's; a quarter of a batch real, the rest imagined, all its own
    assert len(calls["sac_update"]) == 2 * 80
    for k, ((agent, batch, *_), _, expected) in enumerate(calls["sac_update"]):
        player = [forward, backward][k // 40 % 2]
        assert agent is calls["sac_update"][40 * (k // 40 % 2)][0][0]
        real, imagined = (rows(data, "obs", "actions") for data in (player.replay.all(), player.imagined))
        pairs = torch.cat([batch.obs, batch.actions], 1).tolist()
        assert [sum(tuple(row) in source for row in pairs) for source in (real, imagined)] == [4, 12]
        if player is backward:  # rewarded by the classifier as it is
            torch.testing.assert_close(batch.rewards, expected)
        elif not learned:
            torch.testing.assert_close(
                batch.rewards, 10 * world.reward(batch.next_obs[:, :-width], batch.obs[:, -width:])
            )

    # Classifier: every state of the forward demonstrations, the last ones too, against states of backward steps
    ends = forward.demos.next_obs[forward.demos.terminations > 0]
    positives = {tuple(row) for row in torch.cat([forward.demos.obs, ends]).tolist()}
    shown = {tuple(row) for (_, demos, *_), _, _ in calls["classifier_update"] for row in demos.tolist()}
    assert shown <= positives and len(ends) == 4 and len(shown) > 0.8 * len(positives)
    visited = {tuple(row) for (_, _, seen, *_), _, _ in calls["classifier_update"] for row in seen.tolist()}
    assert visited <= rows(backward.lived(), "next_obs")
    assert len(calls["classifier_update"]) == 80

    # Model: each physical transition once
    (_, _, data, weights, *_), _, _ = calls["fit_dynamics"][-1]
    demos = sum(len(trips.obs) for trips in mbarl.scripted_demos(world, 4, args.seed, "cpu"))
    assert [len(inputs[2].obs) for inputs, _, _ in calls["fit_dynamics"]] == [demos + 41, demos + 81]
    assert [inputs[4] for inputs, _, _ in calls["fit_dynamics"]] == [20, 5] and (weights == 1).all()
    assert len(torch.cat([data.obs, data.actions], 1).unique(dim=0)) == len(data.obs)
    assert data.obs.shape[1] == world.state.shape[0] + learned
    if learned:  # rewards of the task, those of the backward demonstrations too
        expected = world.reward(data.next_obs[:, :4], world.goals[0].float())
        torch.testing.assert_close(data.next_obs[:, 4], expected)

    # Rollouts: for both policies after each fit; success ends the forward ones alone
    assert [inputs[5] for inputs, _, _ in calls["imagine_goals"]] == [True, False] * 2
    for k, (inputs, result, _) in enumerate(calls["imagine_goals"]):
        starts, player = inputs[3], [forward, backward][k % 2]
        assert len(starts) == 40 and {tuple(row) for row in starts.tolist()} <= rows(player.replay.all(), "obs")
        assert rows(result, "obs", "actions") <= rows(player.imagined, "obs", "actions")
    assert len(forward.rollouts) == 2 and order.index("fit_dynamics") < order.index("sac_update")


def test_rollouts_may_start_at_demonstrated_states_alone(tmp_path, monkeypatch):
    starts, original = [], mbarl.imagine_goals
    monkeypatch.setattr(mbarl, "imagine_goals", lambda *inputs: [starts.append(inputs[3]), original(*inputs)][1])
    players = trained(POINT, tmp_path, total_timesteps=60, expert_start_prob=1.0)["players"]
    for player, obs in zip(players.values(), starts, strict=True):
        assert {tuple(row) for row in obs.tolist()} <= rows(player.demos, "obs")


def test_one_long_trajectory_of_goals_and_phases(tmp_path):
    """Phases of 20 steps; the backward policy carries the next forward goal; a hard reset starts a forward phase."""
    state = trained(TINY, tmp_path, train_horizon=150, total_timesteps=230, seed=3, learning_starts=229)
    forward, backward = (player.lived() for player in state["players"].values())
    assert len(forward.obs) == 120 and len(backward.obs) == 110 and state["interventions"] == 1
    # forward 0-20, 40-60, 80-100, 120-140, then 150-170, 190-210; backward 20-40, ..., 140-150, 170-190, 210-230
    pairs = (0, 0), (20, 20), (40, 40), (60, 60), (80, 70), (100, 90)
    for k, (f, b) in enumerate(pairs):
        assert torch.equal(forward.next_obs[f + 19, :6], backward.obs[b, :6])  # the world goes on
        if k != 3 and k < 5:  # after the fourth phase the reset drew a goal
            f = pairs[k + 1][0]
            assert torch.equal(backward.obs[b : b + 20, 6:], forward.obs[f : f + 20, 6:])
    assert len(torch.cat([forward.obs[:80], backward.obs[:70]])[:, 6:].unique(dim=0)) > 1
    for f in (0, 80):
        assert torch.equal(forward.obs[f, :6], Tabletop.start.float())
    # a switch by time is no end of values, and no phase of untrained policies succeeds
    assert not forward.terminations.any() and not backward.terminations.any()
    demos = [player.demos for player in state["players"].values()]
    assert [d.terminations.sum() for d in demos] == [4, 0]
    d_f, d_b = mbarl.scripted_demos(Tabletop(), 4, 3, "cpu")
    assert [len(d.obs) for d in demos] == [len(d_f.obs), len(d_f.obs) + 4 * len(d_b.obs)]


def test_goals_of_the_arms_without_a_classifier(tmp_path):
    """fbrl's backward goal is the initial state; naive draws a goal after each phase; oracle starts anew."""
    states = {
        algo: trained(TINY, tmp_path / algo, algo=algo, total_timesteps=160, learning_starts=159)
        for algo in ("fbrl", "naive", "oracle")
    }
    lived = {algo: [player.lived() for player in state["players"].values()] for algo, state in states.items()}
    start = Tabletop.start.float()
    assert [len(data) for data in lived.values()] == [2, 1, 1]
    assert (lived["fbrl"][1].obs[:, 6:] == start).all() and len(lived["fbrl"][1].obs) == 80
    for algo, (data, *_) in lived.items():
        phases = data.obs.unflatten(0, (-1, 20))
        goals = phases[:, 0, 6:]
        assert (phases[:, :, 6:] == goals[:, None]).all() and len(goals.unique(dim=0)) > 1, algo
        assert {tuple(goal) for goal in goals.tolist()} <= {tuple(goal) for goal in Tabletop.goals.tolist()}
        if algo == "oracle":
            assert (phases[:, 0, :6] == start).all()
        if algo == "naive":
            assert torch.equal(phases[1:, 0, :6], data.next_obs[19:-1:20, :6])
    assert [states[algo]["interventions"] for algo in lived] == [0, 0, 8]


@pytest.mark.parametrize("algo,forward", [("medal", 5), ("fbrl", 50), ("naive", 100), ("oracle", 100)])
def test_a_forward_success_ends_its_phase_and_a_backward_one_only_in_fbrl(algo, forward, tmp_path, monkeypatch):
    """A world in which everything is a success."""
    monkeypatch.setattr(Tabletop, "success", lambda self, state, goal: torch.ones(state.shape[:-1], dtype=torch.bool))
    state = trained(TINY, tmp_path, algo=algo, total_timesteps=100, learning_starts=99)
    lived = [player.lived() for player in state["players"].values()]
    assert len(lived[0].obs) == forward and lived[0].terminations.all()
    assert all(data.terminations.all() == (algo == "fbrl") for data in lived[1:])
    assert state["interventions"] == (100 if algo == "oracle" else 0)


@pytest.mark.parametrize("change,message", [
    (dict(env_id="Hopper-v4"), "Hopper-v4 has no goals, observation, get_state"),
    (dict(env_id="tests.pointmass:PointMass-v0"), "PointMass-v0 has no goals"),
])  # fmt: skip
def test_a_world_without_the_methods_is_an_error(change, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        mbarl.train(replace(TINY, run_dir=str(tmp_path / "run"), **change))
    assert not (tmp_path / "run").exists()


def test_the_docs_own_world_trains(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "mbarl.md").read_text()
    (tmp_path / "my_world.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    words = re.search(r"python mbarl.py (--env-id my_world:[^`]*)`", page)[1].split()
    words += ["--total-timesteps", "60", "--learning-starts", "55", "--run-dir", str(tmp_path / "run")]
    table = mbarl.train(tyro.cli(Args, args=words))
    assert table[-1]["env_steps"] == 60 and math.isfinite(table[-1]["losses/critic_backward"])


# ------------------------------------------------------------------------------------------------- offline study
STUDY = mbarl_offline.Args(
    sizes=(200, 400), lengths=(2, 5), num_demos=2, updates=20, rollout_every=10, rollout_transitions=100,
    model_hidden_sizes=(8, 8), model_batches=20, hidden_sizes=(8, 8), eval_episodes=2,
)  # fmt: skip


def test_the_study_has_a_row_a_cell_and_goes_on_with_those_not_there(tmp_path, monkeypatch):
    imagined, original = [], mbarl_offline.imagine_goals

    def watched(*inputs):
        imagined.append((inputs, original(*inputs)))
        return imagined[-1][1]

    monkeypatch.setattr(mbarl_offline, "imagine_goals", watched)
    args = replace(STUDY, run_dir=str(tmp_path))
    whole = mbarl_offline.study(args)
    cells = [(row["size"], row["rollout_length"], row["start"]) for row in whole]
    assert cells == [(s, k, start) for s in (200, 400) for k in (2, 5) for start in ("narrow", "demo")]
    assert all(row["error_1_steps"] < row["error_5_steps"] and math.isfinite(row["eval_return_mean"]) for row in whole)
    assert len(imagined) == 16 and all(len(batch.obs) == 100 and not batch.terminations.any() for _, batch in imagined)
    starts = [inputs[3] for inputs, _ in imagined]
    demos = rows(mbarl_offline.scripted_demos(PointMass2D(), 2, 1, "cpu")[0], "obs")
    for k, obs in enumerate(starts):
        if k // 2 % 2:
            assert {tuple(row) for row in obs.tolist()} <= demos
        else:
            assert (obs[:, :2] < -0.75).all() and (obs[:, 2:4] == 0).all()
    table = (tmp_path / "progress.csv").read_text()
    (tmp_path / "progress.csv").write_text("".join(table.splitlines(keepends=True)[:4]))
    mbarl_offline.study(args)
    assert (tmp_path / "progress.csv").read_text() == table and len(imagined) == 26


def test_open_loop_error_of_a_constant_model():
    """True steps of 1, predicted steps of 1.5: after 4 steps 2 too far, in units of the standard deviation."""
    states = torch.randn(1, 50, 3) + torch.arange(5.0)[:, None, None]
    for head in (0, 1):
        dynamics = mbarl_offline.EnsembleDynamics(3 + head, 2, STUDY)
        dynamics.net.weights[-1].data.zero_()
        dynamics.net.biases[-1].data.fill_(1.5)
        error = mbarl_offline.open_loop_error(dynamics, states, torch.zeros(4, 50, 2))
        assert error == pytest.approx((2 / states.flatten(0, 1).std(0)).square().mean().sqrt().item(), rel=1e-4)


def test_a_study_in_a_world_without_uniform_states_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="Tabletop-v0 has no uniform_states"):
        mbarl_offline.study(replace(STUDY, env_id="Tabletop-v0", run_dir=str(tmp_path)))
