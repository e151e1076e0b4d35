"""The maths of hyper.py, and with it of the blocks that model-based and imitation scripts share, by hand or by a second
method. What it shares with sac.py is tested there, its cost's loss with hype.py's."""

import copy
import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hype
import hyper
from tests.conftest import POINT, ROOT

SMALL = dict(hidden_sizes=(8, 8), critic_hidden_sizes=(8, 8), cost_hidden_sizes=(8, 8))
ARGS = hyper.Args(device="cpu", model_hidden_sizes=(8, 8), model_batch_size=32, **SMALL)


def batch_of(n: int, obs_dim: int = 2, act_dim: int = 1, shift: float = 0.0) -> hyper.Batch:
    obs, actions = torch.randn(n, obs_dim) + shift, torch.rand(n, act_dim) * 2 - 1
    return hyper.Batch(obs, actions, torch.randn(n), torch.randn(n, obs_dim), (torch.rand(n) < 0.3).float())


def counting(n: int) -> hyper.Batch:
    """Transitions whose observation is their number and whose next one is one more."""
    obs = torch.arange(n, dtype=torch.float32)[:, None]
    return hyper.Batch(obs, torch.zeros(n, 1), torch.zeros(n), obs + 1, torch.zeros(n))


def test_a_normaliser_counts_its_sources_the_same_whatever_their_sizes():
    torch.manual_seed(0)
    few, many = torch.randn(50, 3) * torch.tensor([0.1, 1, 9]) + 4, torch.randn(500, 3)
    normalise = hyper.Normaliser(3)
    assert torch.equal(normalise(few), few)  # nothing before a fit
    normalise.fit(few, many)
    seen = normalise(torch.cat([few.repeat(10, 1), many]))  # as many of each
    torch.testing.assert_close(seen.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen.std(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)
    normalise.fit(torch.tensor([[3.0, 1, 0], [3.0, 2, 0]]))
    centred = normalise(torch.tensor([[4.0, 1, 0]]))  # of what is constant, only the mean is taken
    torch.testing.assert_close(centred, torch.tensor([[1.0, -1, 0]]))


def test_the_actor_sees_standardised_observations():
    torch.manual_seed(0)
    actor, noise, obs = hyper.Actor(3, 2, (8, 8)), torch.randn(50, 2), 5 + 9 * torch.randn(50, 3)
    raw = actor.sample(obs, noise), actor.act(obs[0].numpy(), True)
    actor.normalise.fit(obs)
    outside = obs * obs.std(0, correction=0) + obs.mean(0)  # standardised, it is obs again
    torch.testing.assert_close(actor.sample(outside, noise), raw[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(actor.act(outside[0].numpy(), True), raw[1], atol=1e-4)


def test_reward_becomes_higher_on_expert_transitions_and_is_softplus_of_minus_the_cost():
    torch.manual_seed(0)
    args = replace(ARGS, cost_lr=1e-3)
    cost, expert, learner = hyper.Cost(2, 1, args), batch_of(64, shift=1), batch_of(64, shift=-1)
    for _ in range(50):
        hyper.cost_update(cost, expert, learner, torch.rand(64, 1), args)
    on_expert, on_learner = (cost.reward(data.obs, data.actions) for data in (expert, learner))
    assert on_expert.mean() > on_learner.mean() + 0.1
    cost.normalise.fit(torch.randn(20, 3) * 4 + 1)
    obs, actions = torch.randn(3, 5, 2), torch.randn(3, 5, 1)
    f = torch.stack([cost(row) for row in cost.normalise(torch.cat([obs, actions], -1))])
    exact = cost.reward(obs, actions)
    torch.testing.assert_close(exact, -torch.log(torch.sigmoid(f)).detach())
    cost.bf16 = True
    rounded = cost.reward(obs, actions)
    assert rounded.dtype == torch.float32 and 0 < (rounded - exact).abs().max() < 0.1
    cost.net.biases[-1].data.fill_(-1e3)
    assert (cost.reward(obs, actions) == 10).all()  # at most


def test_an_update_is_that_of_hype():
    torch.manual_seed(0)
    args = hype.Args(device="cpu", **SMALL)
    ours, theirs = (hyper.Agent(3, 2, ARGS), hyper.Cost(3, 2, ARGS)), (hype.Agent(3, 2, args), hype.Cost(3, 2, args))
    for mine, other in zip(ours, theirs, strict=True):
        other.load_state_dict(mine.state_dict())
    batch, expert, learner, noise, mix = (
        *(batch_of(n, 3, 2) for n in (32, 8, 8)),
        torch.randn(2, 32, 2),
        torch.rand(8, 1),
    )
    for _ in range(2):
        a, b = hyper.sac_update(*ours, batch, expert, noise, ARGS), hype.sac_update(*theirs, batch, expert, noise, args)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        hyper.cost_update(ours[1], expert, learner, mix, ARGS)
        hype.cost_update(theirs[1], expert, learner, mix, args)
    for mine, other in zip(ours, theirs, strict=True):
        assert all(map(torch.equal, mine.state_dict().values(), other.state_dict().values()))


def test_cloning_adds_the_mean_actions_squared_error_to_the_actors_loss():
    torch.manual_seed(0)
    agent, batch, expert, noise = hyper.Agent(3, 2, ARGS), batch_of(32, 3, 2), batch_of(8, 3, 2), torch.randn(32, 2)
    plain, cloned = (hyper.actor_loss(agent, batch, expert, noise, replace(ARGS, bc_coef=c))[0] for c in (0.0, 50.0))
    error = sum((a - agent.actor.act(o, True)) ** 2 for o, a in zip(*map(torch.Tensor.numpy, expert[:2]), strict=True))
    assert (cloned - plain).item() == pytest.approx(50 * error.sum() / 16, rel=1e-4)


def test_dynamics_loss_and_its_gradient_are_those_of_twice_the_negative_log_likelihood():
    torch.manual_seed(0)
    model = hyper.EnsembleDynamics(2, 1, ARGS).double()
    model.net.weights[-1].data *= 500  # log-variances in and far outside of their bounds
    inputs, targets = torch.randn(7, 5, 3).double(), torch.randn(7, 5, 2).double()
    mean, log_var = model.net(inputs).chunk(2, -1)
    assert log_var.min() < -10 and log_var.max() > 0.5
    log_var = 0.5 - torch.log1p(torch.exp(0.5 - log_var))
    log_var = -10 + torch.log1p(torch.exp(log_var + 10))
    log_prob = torch.distributions.Normal(mean, (0.5 * log_var).exp()).log_prob(targets)
    theirs = sum(-2 * member.mean() - math.log(2 * math.pi) for member in log_prob)
    ours, params = hyper.dynamics_loss(model, inputs, targets, ARGS), list(model.net.parameters())
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, params), torch.autograd.grad(theirs, params))


def fit_and_watch(weights: torch.Tensor, patience: int) -> tuple[list[torch.Tensor], set[int]]:
    """Fits by an update that does nothing. Returns each epoch's rows [members, n], and the held-out ones."""
    torch.manual_seed(0)
    args, seen, held_out = replace(ARGS, model_patience=patience), [], set()

    class Watched(hyper.EnsembleDynamics):
        def forward(self, inputs):  # the fit itself calls the model only to validate
            held_out.update(inputs[..., 0].long().flatten().tolist())
            return super().forward(inputs)

    def update(model, inputs, targets, args):
        seen.append(inputs[..., 0].long())

    hyper.fit_dynamics(Watched(1, 1, args), update, counting(len(weights)), weights, 10**6, args)
    epoch = len(seen) // patience
    return [torch.cat(seen[i : i + epoch], 1) for i in range(0, len(seen), epoch)], held_out


def test_each_member_learns_from_its_own_bootstrap_by_weight_and_never_from_held_out_rows():
    epochs, held_out = fit_and_watch(torch.ones(5_000), patience=3)
    assert len(epochs) == 3 and len(held_out) == 1_000  # nothing improves: patience ends the fit
    unique = [set(member.tolist()) for member in epochs[0]]
    np.testing.assert_allclose([len(rows) / 4_000 for rows in unique], 1 - math.exp(-1), atol=0.02)
    assert unique[0] != unique[1] and not set.union(*unique) & held_out
    for epoch in epochs[1:]:
        for member, first in zip(epoch, unique, strict=True):
            assert len(set(member.tolist()) ^ first) < 100  # the same rows, but for a cut last minibatch
    epochs, _ = fit_and_watch(torch.cat([torch.full((4_000,), 1 / 4), torch.ones(1_000)]), patience=1)
    assert (epochs[0] >= 4_000).float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_a_fit_keeps_the_last_epoch_in_which_a_member_beat_its_own_best_by_one_percent():
    """Epoch 1 improves most members; 2 member 1, while 0 falls back; 3 member 0 by half a percent; 4 is bad."""
    epochs, calls, args = [(0.25, 1.0), (1.0, 0.16), (0.25 * 0.995, 0.16), (4, 4), (0, 0)], [], ARGS
    model, rest = hyper.EnsembleDynamics(1, 1, args), (0.04, 0.01, 0.81, 0.64, 0.0)
    model.net.weights[-1].data.zero_()

    def update(model, inputs, targets, args):  # an epoch has two; the true change is 1
        errors = torch.tensor([*epochs[len(calls) // 2], *rest])
        model.net.biases[-1].data[:, 0, 0] = 1 - errors.sqrt()
        calls.append(1)

    error = hyper.fit_dynamics(model, update, counting(100), torch.ones(100), 10**6, replace(args, model_patience=2))
    assert len(calls) == 8 and error == pytest.approx(np.mean([0.25, 0.16, *rest]), rel=1e-4)
    kept = 1 - torch.tensor([*epochs[1], *rest]).sqrt()
    torch.testing.assert_close(model.net.biases[-1][:, 0, 0].detach(), kept)
    assert model.elites.tolist() == [6, 3, 2, 1, 0]


@pytest.mark.parametrize("most", [20, 600])
def test_a_fit_learns_and_keeps_to_its_minibatches(most):
    torch.manual_seed(0)
    args, data = replace(ARGS, model_hidden_sizes=(32, 32), model_lr=3e-3), batch_of(2_000, shift=5)
    moved = data.obs + torch.cat([data.actions, (data.obs[:, :1] - 5).tanh()], -1)  # the change's variance is 0.36
    model = hyper.EnsembleDynamics(2, 1, args)
    weights = torch.ones(2_000)
    error = hyper.fit_dynamics(model, hyper.dynamics_update, data._replace(next_obs=moved), weights, most, args)
    assert model.optimizer.t.item() == 20 if most == 20 else error < 0.02 and model.optimizer.t.item() <= 600
    torch.testing.assert_close(model.normalise.mean, torch.cat([data.obs, data.actions], -1).mean(0))


def test_fewer_rows_than_a_minibatch_are_one():
    seen, args = [], replace(ARGS, model_batch_size=32)
    model = hyper.EnsembleDynamics(1, 1, args)
    hyper.fit_dynamics(model, lambda _, x, *rest: seen.append(x.shape), counting(30), torch.ones(30), 3, args)
    assert seen == 3 * [(7, 24, 2)]  # a fifth is held out


def with_elites(forward=None) -> hyper.EnsembleDynamics:
    model = hyper.EnsembleDynamics(2, 1, ARGS)
    model.elites = torch.tensor([6, 0, 3, 2, 5])
    model.elites_forward = forward or model.elites_forward
    return model


def test_rows_are_shared_out_to_the_elites_in_equal_parts_at_random_and_come_back_in_order():
    def forward(inputs):  # next_obs = 2 obs + the elite's place in thousandths
        mean = inputs[..., :2] + 1e-3 * torch.arange(5.0)[:, None, None]
        return mean, torch.full_like(mean, -torch.inf)

    model, obs = with_elites(forward), torch.arange(202.0).view(101, 2)
    for n in (1, 3, 98, 100, 101):
        moved = [model.sample(obs[:n], torch.zeros(n, 1), True) - 2 * obs[:n] for _ in range(2)]
        who, again = ((x * 1e3).round().long() for x in moved)
        counts = torch.bincount(who[:, 0], minlength=5)
        assert torch.equal(who[:, 0], who[:, 1]) and counts.sum() == n and counts.max() <= -(-n // 5)
        assert n < 98 or not (torch.equal(who, again) or torch.equal(who, who.sort(0).values))


def test_sampled_steps_are_of_the_elites_gaussians():
    torch.manual_seed(0)
    model, obs, actions = with_elites(), torch.ones(5_000, 2), torch.ones(5_000, 1)
    model.net.weights[-1].data *= 5
    model.normalise.fit(torch.randn(50, 3) * 3 + 2)
    mean, log_var = (x[model.elites, 0].detach() for x in model(torch.ones(7, 1, 3)))
    still, drawn = (model.sample(obs, actions, noise) - obs for noise in (False, True))
    torch.testing.assert_close(still.sort(0).values[500::1_000], mean.sort(0).values)
    torch.testing.assert_close(drawn.mean(0), mean.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.var(0), mean.var(0, correction=0) + log_var.exp().mean(0), atol=0.05, rtol=0)


@pytest.mark.parametrize("step,error", [(1.0, 0.0), (1.5, 1.5)])
def test_model_error_of_known_models(step, error):
    data = counting(11)
    model = with_elites(lambda inputs: (torch.full_like(inputs[..., :1], step), None))
    assert hyper.model_error(model, data, 3) == pytest.approx(error / data.obs.std().item(), rel=1e-5, abs=1e-6)
    broken = data._replace(next_obs=data.next_obs + (torch.arange(11) % 2)[:, None])  # no two in a row
    assert math.isnan(hyper.model_error(model, broken, 3))


def test_an_imagined_rollout_stops_where_it_ends_or_is_not_finite():
    torch.manual_seed(0)
    start = torch.linspace(-2, 2, 41)[:, None]

    def step(obs, actions, noise):
        return torch.where(obs > 1.95, torch.inf, obs + actions)

    def ends(next_obs):
        return next_obs[:, 0].abs() > 1

    data = hyper.imagine(SimpleNamespace(sample=step), hyper.Actor(1, 1, (8,)), start, 4, ends, ARGS)
    assert 41 < len(data.obs) < 4 * 41 and (data.rewards == 0).all()
    torch.testing.assert_close(data.next_obs, data.obs + data.actions)
    torch.testing.assert_close(data.terminations, ends(data.next_obs).float())
    assert torch.equal(data.obs[:40], start[:40]) and (data.obs[40:].abs() <= 1).all()
    assert set(data.obs[40:, 0].tolist()) <= set(data.next_obs[data.terminations == 0][:, 0].tolist())


@pytest.mark.parametrize("version", ["v4", "v5"])
@pytest.mark.parametrize("robot", ["Hopper", "Walker2d", "Ant", "Humanoid"])
def test_termination_rules_are_the_simulators(robot, version):
    """At states around all of their bounds."""
    env, rule, healthy = hyper.make_env(f"{robot}-{version}"), hyper.TERMINATION[robot], []
    simulator, rng = env.unwrapped, np.random.default_rng(0)
    obs, _ = env.reset(seed=0)
    for _ in range(2_000):
        qpos = simulator.init_qpos.copy()
        qpos[1:3] = rng.uniform(-1.5, 2.5, 2)  # height and angle
        qpos[-1] = rng.choice([0, 0, 0, 99, 101])
        simulator.set_state(qpos, simulator.init_qvel)
        obs = torch.as_tensor(simulator._get_obs()[: len(obs)])
        assert bool(rule(obs[None])) != simulator.is_healthy
        healthy.append(simulator.is_healthy)
    assert 50 < sum(healthy) < 1_950 and rule(torch.full((1, len(obs)), math.nan))


ROBOTS = [path for path in sorted((ROOT / "demos").glob("*.npz")) if path.stem[:5] not in ("Fetch", "AntMa")]


@pytest.mark.parametrize("path", ROBOTS, ids=lambda path: path.stem)
def test_bundled_demonstrations_are_ten_whole_episodes_of_their_environment(path, capsys):
    env, raw = hyper.make_env(path.stem.replace("dm_control-", "dm_control/")), np.load(path)
    data, _, returns = hyper.load_demos(str(path), env, 10, 1, "cpu")
    assert len(data.obs) == 10_000 and not data.terminations.any() and not capsys.readouterr().out
    assert returns.mean() == pytest.approx(raw["rewards"].sum() / 10, rel=1e-5)
    assert env.reset(seed=0)[0].shape == data.obs[0].shape and np.isfinite(env.step(data.actions[0].numpy())[1])
    few, _, returns = hyper.load_demos(str(path), env, 3, 1, "cpu")
    assert torch.equal(few.next_obs, data.next_obs[:3_000])
    assert returns.mean() == pytest.approx(raw["rewards"][:3_000].sum() / 3, rel=1e-5)


def among(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Which rows [n, k] are rows of others [m, k] too."""
    return (rows[:, None] == others).all(-1).any(1)


def whole(data: hyper.Batch) -> torch.Tensor:
    return torch.cat([data.obs, data.actions, data.next_obs], -1)


@pytest.fixture
def expert(demos) -> hyper.Batch:
    return hyper.load_demos(demos, hyper.make_env(POINT), 4, 1, "cpu")[0]


@pytest.fixture
def watch(monkeypatch, tmp_path, demos):
    """A short run on the point mass: the inputs of each call of four functions, and the last checkpoint. `check` sees
    the inputs of an update of the policy just before it."""

    def run(check=lambda *inputs: None, **settings) -> tuple[dict[str, list], dict]:
        calls = defaultdict(list)

        def watched(name, function):
            def call(*inputs):
                check(*inputs) if name == "sac_update" else None
                calls[name].append(inputs)
                return function(*inputs)

            return call

        for name in ("fit_dynamics", "imagine", "sac_update"):
            monkeypatch.setattr(hyper, name, watched(name, getattr(hyper, name)))
        small = dict(learning_starts=60, model_every=30, model_first_batches=20, model_batches=5, rollouts_per_step=4)
        small |= dict(batch_size=16, updates_per_step=2, num_demos=4, eval_every=10**6, eval_episodes=1)
        small |= dict(checkpoint_every=1, total_timesteps=130)
        hyper.train(replace(ARGS, env_id=POINT, demos=demos, run_dir=str(tmp_path), **small | settings))
        return calls, torch.load(tmp_path / "checkpoint.pt", weights_only=False)

    return run


def test_learning_may_start_at_once(watch):
    """With fewer transitions than the model's error is measured along."""
    calls, _ = watch(lambda *_: None, learning_starts=0)
    assert len(calls["sac_update"]) == 2 * 130


def test_what_the_model_and_the_policy_learn_from(watch, expert, monkeypatch):
    made, means, init = [], [], hyper.Cost.__init__
    monkeypatch.setattr(hyper.Cost, "__init__", lambda self, *rest: [made.append(self), init(self, *rest)][1])

    def check(agent, cost, batch, *rest):
        assert cost is made[0]  # rewards are of the cost as it is now
        means.append(cost.reward(batch.obs, batch.actions).mean().item())

    calls, state = watch(check, real_ratio=0.125, expert_ratio=0.5, cost_lr=1e-2)
    assert np.std(means) > 0.01  # the cost did change
    learner, updates = whole(state["buffer"].all()), calls["sac_update"]
    assert len(learner) == state["step"] and not among(learner, whole(expert)).any()

    # Normalisers: expert and warm-up.
    sources, normalise = (torch.cat([expert.obs, expert.actions], -1), learner[:60, :6]), hyper.Normaliser(6)
    normalise.fit(*sources)
    torch.testing.assert_close(state["cost"].normalise.state_dict(), normalise.state_dict())
    for name in ("actor", "ema_actor"):
        of_obs = {part: value[:4] for part, value in normalise.state_dict().items()}
        torch.testing.assert_close(dict(getattr(state["agent"], name).normalise.state_dict()), of_obs)

    # Model: all learner and all expert transitions, with equal weight in total.
    for (_, _, data, weights, *_), n in zip(calls["fit_dynamics"], (60, 90, 120), strict=True):
        from_expert = among(data.obs, expert.obs)
        assert from_expert.sum() == len(expert.obs) == len(data.obs) - n
        assert weights[from_expert].sum().item() == pytest.approx(weights[~from_expert].sum().item(), rel=1e-4)

    # Rollouts: from expert and learner states.
    for _, _, starts, length, *_ in calls["imagine"]:
        share = among(starts, expert.obs).float().mean().item()
        assert len(starts) == 4 * 30 and length == 1 and share == pytest.approx(0.5, abs=0.2)

    # Policy: the shares of a batch, in this order; the cloned transitions are the batch's expert ones.
    assert len(updates) == 2 * 71  # two for each step from the 60th on
    for _, _, batch, cloned, *_ in updates:
        assert torch.equal(whole(cloned), whole(batch)[2:10])
        assert among(whole(batch), whole(expert)).tolist() == [False] * 2 + [True] * 8 + [False] * 6
    for _, _, batch, *_ in updates[: 2 * (state["step"] - 60)]:
        assert among(whole(batch), learner).tolist() == [True] * 2 + [False] * 14


def test_model_data_of_the_learner_alone_and_starts_of_one_kind(watch, expert):
    calls, _ = watch(model_data="learner", expert_start_prob=0.0)
    assert [len(data.obs) for _, _, data, *_ in calls["fit_dynamics"]] == [60, 90, 120]
    assert not any(among(starts, expert.obs).any() for _, _, starts, *_ in calls["imagine"])


def test_the_evaluated_actor_is_an_average(watch, tmp_path):
    """With weights 1 / min(ema_steps, 1 + t / 4) after training step t."""
    seen, settings = [], dict(updates_per_step=1, actor_lr=0.03, ema_steps=3, total_timesteps=72)
    watch(lambda agent, *_: seen.append((copy.deepcopy(agent.actor), agent)), **settings)
    actors = [list(actor.parameters()) for actor in (*(before for before, _ in seen[1:]), seen[-1][1].actor)]
    average = actors[0]
    for t, weights in enumerate(actors):
        share = 1 / min(3, 1 + t / 4)
        average = [a + share * (w - a) for a, w in zip(average, weights, strict=True)]
    actor = hyper.Actor(4, 2, ARGS.hidden_sizes)
    actor.load_state_dict(torch.load(tmp_path / "policy.pt", weights_only=True)["actor"])
    torch.testing.assert_close(list(actor.parameters()), average, rtol=1e-4, atol=1e-6)
    assert not any(map(torch.equal, average, actors[-1]))


def test_rollouts_have_their_length(watch):
    calls, _ = watch(rollout_length=3)
    assert {length for _, _, _, length, *_ in calls["imagine"]} == {3}
