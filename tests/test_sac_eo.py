"""The maths of sac_eo.py and bco_baseline.py by hand or by a second method (symbols: arXiv 2402.18836)."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import bco_baseline
import sac
import sac_eo
from tests.conftest import POINT


def models_and_args(**settings):
    """Two models of 3 observations and 2 actions that have something to say, in units that are not 1."""
    torch.manual_seed(0)
    args = sac_eo.Args(**dict(hidden_sizes=(8, 8), model_hidden_sizes=(8, 8), mse_units="raw") | settings)
    models = sac_eo.TwinModels(3, 2, args)
    with torch.no_grad():
        models.net.weights[-1].normal_()
        models.inputs.copy_(torch.tensor([[0.2, -0.1, 0.4, 0.3, 0.0], [2.0, 0.5, 1.5, 0.6, 0.7]]))
        models.changes.copy_(torch.tensor([[0.1, -0.2, 0.3], [0.5, 2.0, 3.0]]))
    return models, args


def affine(models, shifts: list[float]) -> None:
    """Makes model m predict obs + shifts[m] in each dimension, whatever the action."""
    with torch.no_grad():
        models.changes.copy_(torch.tensor([[0.0], [1.0]]).expand(2, 3))
        models.net.weights[-1].zero_()
        models.net.biases[-1].copy_(torch.tensor(shifts)[:, None, None].expand(2, 1, 3))


def transitions(*shape: int, seed: int = 1) -> sac_eo.Batch:
    torch.manual_seed(seed)
    obs, actions = torch.randn(*shape, 3), torch.rand(*shape, 2) * 2 - 1
    return sac_eo.Batch(obs, actions, torch.randn(shape), obs + torch.randn(*shape, 3), torch.rand(shape).round())


def predicted_by(models, m: int, obs, action) -> torch.Tensor:
    """Model m's prediction at one obs [3] and action [2], layer by layer."""
    x = (torch.cat([obs, action]) - models.inputs[0]) / models.inputs[1]
    for weight, bias in list(zip(models.net.weights, models.net.biases, strict=True))[:-1]:
        x = (x @ weight[m] + bias[m, 0]).relu()
    change = x @ models.net.weights[-1][m] + models.net.biases[-1][m, 0]
    return obs + models.changes[0] + models.changes[1] * change


# ---------------------------------------------------------------------------------------------------- weight
TABLE = {  # eps at delta .01, .1, .5, 1, 2, 5
    50: (0.667, 0.167, 0.0385, 0.0196, 0.0099, 0.0040),
    100: (0.500, 0.0909, 0.0196, 0.0099, 0.0050, 0.0020),
    200: (0.333, 0.0476, 0.0099, 0.0050, 0.0025, 0.0010),
    0: (1, 1, 1, 1, 1, 1),
}


@pytest.mark.parametrize("beta", TABLE)
def test_the_adaptive_weight_against_the_table(beta):
    models, args = models_and_args(beta=beta)
    agent = sac_eo.Agent(3, 2, args)
    for delta, eps in zip((0.01, 0.1, 0.5, 1, 2, 5), TABLE[beta], strict=True):
        affine(models, [0.0, delta / math.sqrt(3)])
        metrics = sac_eo.imitation_weight(agent, models, transitions(6), args)
        assert (
            agent.eps == metrics["losses/imitation_weight"] == pytest.approx(eps, abs=5.1e-4 if eps > 0.1 else 5.1e-5)
        )
        assert metrics["model/discrepancy_max"].item() == pytest.approx(delta, rel=1e-3)


@pytest.mark.parametrize("stat,units", [("max", "raw"), ("median", "raw"), ("max", "normalised")])
def test_disagreement_is_of_one_action_for_both_models_over_all_states(stat, units, monkeypatch):
    models, args = models_and_args(delta_stat=stat, beta=1.0, mse_units=units)
    agent, expert, noise = sac_eo.Agent(3, 2, args), transitions(5), torch.randn(5, 2)
    monkeypatch.setattr(torch, "randn_like", lambda actions: noise)
    metrics = sac_eo.imitation_weight(agent, models, expert, args)
    actions, _ = agent.actor.sample(expert.obs, noise)
    deltas = []
    for obs, action in zip(expert.obs, actions, strict=True):
        apart = predicted_by(models, 0, obs, action) - predicted_by(models, 1, obs, action)
        deltas.append((apart / (models.changes[1] if units == "normalised" else 1)).norm().item())
    delta = max(deltas) if stat == "max" else sorted(deltas)[2]
    assert agent.eps.item() == pytest.approx(1 / (1 + delta), rel=1e-5)
    assert metrics["model/discrepancy_median"].item() == pytest.approx(sorted(deltas)[2], rel=1e-5)
    assert not agent.eps.requires_grad


def test_identical_models_do_not_disagree_and_a_fixed_weight_is_as_given():
    models, args = models_and_args()
    agent = sac_eo.Agent(3, 2, args)
    with torch.no_grad():
        for p in models.net.parameters():
            p[1] = p[0]
    metrics = sac_eo.imitation_weight(agent, models, transitions(6), args)
    assert metrics["model/discrepancy_max"] == 0 and agent.eps == 1
    sac_eo.imitation_weight(agent, models, transitions(6), replace(args, eps_fixed=0.25))
    assert agent.eps == 0.25


# ------------------------------------------------------------------------------------------- imitation, updates
@pytest.mark.parametrize("units", ["raw", "normalised"])
def test_imitation_loss_by_hand(units):
    """Each row by the model of its half, at the policy's action."""
    models, args = models_and_args(mse_units=units)
    actor, expert, noise = sac_eo.Actor(3, 2, (8, 8)), transitions(2, 4), torch.randn(2, 4, 2)
    errors, log_probs = [], []
    for m in range(2):
        for i in range(4):
            actions, log_prob = actor.sample(expert.obs[m, i][None], noise[m, i][None])
            wrong = expert.next_obs[m, i] - predicted_by(models, m, expert.obs[m, i], actions[0])
            errors.append((wrong / (models.changes[1] if units == "normalised" else 1)).square().sum().item())
            log_probs.append(log_prob.item())
    loss, entropy = sac_eo.imitation_loss(actor, models, expert, noise, args)
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-5)
    assert entropy.item() == pytest.approx(-np.mean(log_probs), rel=1e-5)


def setting(eps: float, **settings):
    """Inputs of an update, on the same weights each time."""
    models, args = models_and_args(actor_lr=1.0, **settings)
    agent = sac_eo.Agent(3, 2, args)
    agent.eps.fill_(eps)
    inputs = transitions(6), transitions(2, 4), torch.randn(2, 6, 2), torch.randn(2, 4, 2)
    return agent, models, *inputs, args


def actor_grads(eps: float) -> tuple[list[torch.Tensor], dict]:
    """What sac_update gives to the actor's optimiser, and its metrics."""
    inputs, seen = setting(eps), []
    inputs[0].actor_optimizer.step = lambda grads: seen.extend(g.clone() for g in grads)
    return seen, sac_eo.sac_update(*inputs)


def test_the_actors_gradient_is_the_weighted_sum():
    agent, models, _, expert, _, expert_noise, args = setting(0.0)
    (of_sac, _), (of_mse, _), (mixed, metrics) = actor_grads(0.0), actor_grads(1.0), actor_grads(0.3)
    loss, _ = sac_eo.imitation_loss(agent.actor, models, expert, expert_noise, args)
    torch.testing.assert_close(of_mse, list(torch.autograd.grad(loss, agent.actor_optimizer.params)))
    assert all(g.abs().max() > 0 for g in of_mse) and not torch.allclose(of_sac[0], of_mse[0])
    torch.testing.assert_close(mixed, [0.7 * a + 0.3 * b for a, b in zip(of_sac, of_mse, strict=True)])
    for name, share, grads in (("sac", 0.7, of_sac), ("imitation", 0.3, of_mse)):
        norm = torch.cat([g.flatten() for g in grads]).norm().item()
        assert metrics[f"losses/gradient_{name}"].item() == pytest.approx(share * norm, rel=1e-4)


def test_weight_one_is_the_baselines_gradient():
    agent, models, _, expert, _, expert_noise, args = setting(1.0)
    optimizer, seen = bco_baseline.Adam(agent.actor.parameters(), 1.0), []
    optimizer.step = seen.extend
    bco_baseline.bco_update(agent.actor, optimizer, models, expert, expert_noise, args)
    torch.testing.assert_close(seen, actor_grads(1.0)[0], rtol=0, atol=0)


def test_an_update_leaves_the_models_and_the_critics_do_not_know_of_the_experts_states():
    agent, models, batch, expert, noise, expert_noise, args = setting(0.5)
    before, alone = copy.deepcopy(models.state_dict()), copy.deepcopy(agent)
    sac_eo.sac_update(agent, models, batch, expert, noise, expert_noise, args)
    sac.sac_update(alone, batch, noise, args)
    torch.testing.assert_close(models.state_dict(), before, rtol=0, atol=0)
    for name in ("critic", "target_critic"):
        mine, theirs = getattr(agent, name).state_dict(), getattr(alone, name).state_dict()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert agent.log_alpha == alone.log_alpha
    assert not torch.equal(agent.actor.net.weights[-1], alone.actor.net.weights[-1])


@pytest.mark.parametrize("eps_fixed", [0.0, None])
def test_weight_0_is_sac_bit_for_bit(eps_fixed):
    agent, models, batch, expert, noise, expert_noise, args = setting(0.0, eps_fixed=eps_fixed)
    alone = copy.deepcopy(agent)
    for _ in range(20):
        metrics = sac_eo.sac_update(agent, models, batch, expert, noise, expert_noise, args)
        assert sac.sac_update(alone, batch, noise, args).items() <= metrics.items()
    torch.testing.assert_close(agent.state_dict(), alone.state_dict(), rtol=0, atol=0)


def test_the_experts_actions_are_not_learned_from():
    results = []
    for wrong in (False, True):
        agent, models, batch, expert, noise, expert_noise, args = setting(0.5)
        expert = expert._replace(actions=expert.actions * math.nan) if wrong else expert
        metrics = sac_eo.sac_update(agent, models, batch, expert, noise, expert_noise, args)
        metrics |= sac_eo.imitation_weight(agent, models, sac_eo.Batch(*(field[0] for field in expert)), args)
        results.append((metrics, agent.state_dict()))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_with_an_exact_model_the_policy_finds_the_experts_actions():
    """next_obs = obs + B action: the error is that of the mean action plus the noise's, and the noise shrinks."""
    torch.manual_seed(0)
    b = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])

    class Exact(bco_baseline.TwinModels):
        def forward(self, obs, actions):
            return obs + actions @ b.T

    args = bco_baseline.Args(hidden_sizes=(32, 32), model_hidden_sizes=(8,))
    models, actor = Exact(3, 2, args), bco_baseline.Actor(3, 2, (32, 32))
    optimizer, obs = bco_baseline.Adam(actor.parameters(), 1e-2), torch.randn(2, 32, 3)
    wanted = 0.8 * torch.tanh(obs[..., :2])
    expert = bco_baseline.Batch(obs, wanted * math.nan, obs[..., 0], obs + wanted @ b.T, obs[..., 0])

    def error_and_its_parts() -> tuple[float, float, float]:
        noise = torch.randn(300, 2, 32, 2)
        losses = [bco_baseline.imitation_loss(actor, models, expert, x, args)[0].item() for x in noise]
        samples = torch.stack([actor.sample(obs.flatten(0, 1), x.flatten(0, 1))[0] for x in noise]).view(noise.shape)
        bias = models.distance(models(obs, samples.mean(0)), expert.next_obs).mean().item()
        return np.mean(losses), bias, (samples.var(0, correction=0).mean((0, 1)) * b.square().sum(0)).sum().item()

    error, bias, of_noise = error_and_its_parts()
    assert error == pytest.approx(bias + of_noise, rel=1e-3) and of_noise > 0.3 * error
    losses = [
        bco_baseline.bco_update(actor, optimizer, models, expert, torch.randn(2, 32, 2), args) for _ in range(400)
    ]
    error, bias, of_less_noise = error_and_its_parts()
    assert error == pytest.approx(bias + of_less_noise, rel=1e-3) and error < 0.05 and of_less_noise < 0.1 * of_noise
    assert losses[-1]["losses/entropy"] < losses[0]["losses/entropy"] - 2


# ---------------------------------------------------------------------------------------------------- models
def test_the_model_loss_is_the_gaussian_likelihood_of_each_models_own_rows():
    models, args = models_and_args()
    with torch.no_grad():
        models.log_std.uniform_(-1, 1)
    batch, wanted = transitions(2, 5), []
    for m in range(2):
        for i in range(5):
            mean, std = predicted_by(models, m, batch.obs[m, i], batch.actions[m, i]), models.log_std[m, 0].exp()
            normal = torch.distributions.Normal(mean / models.changes[1], std)  # in standard deviations of the changes
            wanted.append(-normal.log_prob(batch.next_obs[m, i] / models.changes[1]).sum().item())
    assert sac_eo.model_update(models, batch, args).item() == pytest.approx(np.mean(wanted), rel=1e-5)


def test_the_models_do_not_learn_from_each_others_rows():
    """One optimiser for both is two, and what one sees leaves the other as it is."""
    (models, args), (others, _) = models_and_args(), models_and_args()
    for k in range(10):
        batch, other = transitions(2, 5, seed=k), transitions(2, 5, seed=100 + k)
        sac_eo.model_update(models, batch, args)
        mixed = (torch.stack([b[0], a[1]]) for a, b in zip(batch, other, strict=True))
        sac_eo.model_update(others, sac_eo.Batch(*mixed), args)
    for a, b in zip(models.parameters(), others.parameters(), strict=True):
        torch.testing.assert_close(a[1], b[1])
        assert not torch.allclose(a[0], b[0])


def test_the_models_deviation_is_clamped():
    models, args = models_and_args(model_lr=0.0)
    for wild, clamped in ((5.0, 2.0), (-30.0, -10.0)):
        losses = []
        for value in (wild, clamped):
            models.log_std.data.fill_(value)
            losses.append(sac_eo.model_update(models, transitions(2, 6), args).item())
        assert losses[0] == losses[1] and math.isfinite(losses[0])


def test_untrained_models_are_orthogonal_and_say_little():
    models = sac_eo.TwinModels(3, 2, sac_eo.Args(model_hidden_sizes=(8, 8)))
    for weight, gain in zip(models.net.weights, (2, 2, 1e-4), strict=True):
        square = weight @ weight.mT if weight.shape[1] <= weight.shape[2] else weight.mT @ weight
        torch.testing.assert_close(square, gain * torch.eye(square.shape[1]).expand(2, -1, -1), atol=1e-5, rtol=0)
    assert not torch.equal(*models.net.weights[0])  # two opinions from the start


def linear(n: int, seed: int = 0) -> sac_eo.Batch:
    """n transitions of next_obs = obs + B action, where nothing changes the last observation."""
    batch = transitions(n, seed=seed)
    obs = torch.cat([batch.obs[:, :2], torch.full((n, 1), 3.0)], 1)
    return batch._replace(obs=obs, next_obs=obs + batch.actions @ torch.tensor([[1.0, 0.5, 0], [0, 2.0, 0]]))


def test_a_fit_learns_a_linear_system():
    torch.manual_seed(0)
    args = sac_eo.Args(model_hidden_sizes=(16, 16), model_lr=3e-3, mse_units="raw")
    models, data, test = sac_eo.TwinModels(3, 2, args), linear(2_000), linear(500, seed=2)
    for _ in range(4):
        sac_eo.fit_models(models, sac_eo.model_update, data, args)
    assert models.optimizer.t == 400  # its memory outlives a fit
    x, change = torch.cat([data.obs, data.actions], 1), data.next_obs - data.obs
    torch.testing.assert_close(models.inputs[0], x.mean(0))
    torch.testing.assert_close(models.changes[0], change.mean(0))
    assert models.inputs[1, 2] == models.changes[1, 2] == 1  # a constant is only centred
    torch.testing.assert_close(models.changes[1, :2], change.std(0, correction=0)[:2])
    predicted = models(test.obs, test.actions)
    share = (predicted - test.next_obs).square().sum(-1).mean() / (test.next_obs - test.obs).square().sum(-1).mean()
    assert share < 0.01 and (predicted[0] - predicted[1]).abs().mean() > 1e-4  # they stay two opinions
    accuracy = sac_eo.model_accuracy(models, test, "test")
    assert accuracy["model/error_test"].item() == pytest.approx(share.item(), rel=1e-4)


@pytest.mark.parametrize(
    "n,most,batches", [(5_000, 10**6, 250), (5_000, 40, 40), (4_199, 10**6, 200), (20_000, 10**6, 1_000), (90, 5, 5)]
)
def test_a_fit_has_so_many_minibatches(n, most, batches):
    (models, args), drawn = models_and_args(model_batches=most), []
    row = torch.arange(float(n))
    data = transitions(n)._replace(rewards=row)

    def update(models, batch, args):
        drawn.append(batch.rewards.clone())
        return torch.zeros(())

    sac_eo.fit_models(models, update, data, args)
    assert len(drawn) == batches and drawn[0].shape == (2, min(n, 200))
    if batches == 250:  # a pass has each row once, in an order of each model's own
        first = torch.cat(drawn[:25], 1)
        assert torch.equal(first.sort().values, row.expand(2, -1)) and not torch.equal(*first)


def test_rank_correlation_of_disagreement_and_error():
    """Spearman's, of the error of the models' mean. Errors that are independent noise are not foreseen."""
    models, _ = models_and_args()
    batch = transitions(40)
    mean = torch.stack(
        [sum(predicted_by(models, m, *row) for m in range(2)) / 2 for row in zip(*batch[:2], strict=True)]
    )
    apart = torch.stack(
        [predicted_by(models, 0, *row) - predicted_by(models, 1, *row) for row in zip(*batch[:2], strict=True)]
    )
    pairs = (batch.next_obs - mean).norm(dim=1).tolist(), apart.norm(dim=1).tolist()
    ranks = [[sorted(values).index(value) for value in values] for values in pairs]
    wanted = 1 - 6 * sum((a - b) ** 2 for a, b in zip(*ranks, strict=True)) / (40 * (40**2 - 1))
    ours = sac_eo.model_accuracy(models, batch, "x")["model/rank_correlation_x"].item()
    assert ours == pytest.approx(wanted, abs=1e-5)

    noise = torch.randn(2, 4_000, 3)
    models.forward = lambda obs, actions: noise
    metrics = sac_eo.model_accuracy(models, transitions(4_000)._replace(next_obs=torch.zeros(4_000, 3)), "x")
    assert abs(metrics["model/rank_correlation_x"]) < 0.05


# ------------------------------------------------------------------------------------------------- whole runs
def test_demonstrations_with_and_without_actions(demos, tmp_path):
    env, data = sac_eo.make_env(POINT), dict(np.load(demos))
    expert, expert_return = sac_eo.load_expert(demos, env, 2, "cpu")
    n = len(expert.obs)
    np.testing.assert_array_equal(expert.obs, data["observations"][:n])
    np.testing.assert_array_equal(expert.next_obs, data["next_observations"][:n])
    np.testing.assert_allclose(expert.actions, data["actions"][:n] / 2, atol=1e-6)  # the world's go to 2
    assert n == 100 and expert_return == pytest.approx(data["rewards"][:n].sum() / 2)
    del data["actions"]
    np.savez(tmp_path / "states.npz", **data)
    states, _ = sac_eo.load_expert(str(tmp_path / "states.npz"), env, 2, "cpu")
    assert torch.equal(states.next_obs, expert.next_obs) and states.actions.isnan().all()
    with pytest.raises(SystemExit, match="5 trajectories of 4 observations; needed are 9"):
        sac_eo.load_expert(demos, env, 9, "cpu")
    with pytest.raises(SystemExit, match="of 3"):
        sac_eo.load_expert(demos, sac_eo.make_env("Pendulum-v1"), 2, "cpu")
    with pytest.raises(SystemExit, match="no demonstrations at nowhere"):
        sac_eo.load_expert("nowhere.npz", env, 2, "cpu")


@pytest.mark.parametrize("script", [sac_eo, bco_baseline])
def test_when_what_is_fitted_to_which_transitions(script, demos, tmp_path, monkeypatch):
    """Every model_every steps: the error on new transitions, a fit to the latest, the weight, which stays."""
    events = []

    def spy(name: str, note) -> None:
        function = getattr(script, name)
        monkeypatch.setattr(script, name, lambda *inputs: [events.append((name, note(*inputs))), function(*inputs)][1])

    spy("model_accuracy", lambda models, data, where: (where, data.obs))
    spy("fit_models", lambda models, update, data, args: data.obs)
    if script is sac_eo:
        spy("imitation_weight", lambda agent, models, expert, args: expert.obs)
        spy("sac_update", lambda *inputs: (inputs[3], inputs[5], inputs[0].eps.item()))
    else:
        spy("bco_update", lambda *inputs: (*inputs[3:5], 1.0))
    settings = dict(hidden_sizes=(8,), model_hidden_sizes=(8,), model_batch_size=20, model_batches=5, model_every=30)
    settings |= dict(learning_starts=60, model_buffer_size=70, expert_batch_size=17, total_timesteps=120)
    settings |= dict(env_id=POINT, demos=demos, num_demos=2, run_dir=str(tmp_path), eval_episodes=1)
    rows = script.train(script.Args(**settings))

    names = [name for name, _ in events]
    fit = ["model_accuracy", "fit_models", "model_accuracy", *["imitation_weight"] * (script is sac_eo)]
    update = "sac_update" if script is sac_eo else "bco_update"
    assert names == (fit + [update] * 30) * 2
    (_, (_, unseen)), (_, latest), (_, (_, expert)) = events[len(fit) + 30 :][:3]
    all_obs = np.load(demos)["observations"][:100]
    np.testing.assert_array_equal(expert, all_obs)
    assert len(unseen) == 30 and len(latest) == 70 and torch.equal(unseen, latest[-30:])
    updates = [value for name, value in events if name == update]
    for batch, noise, _ in updates:  # the expert's transitions, a half for each model
        assert batch.obs.shape == batch.next_obs.shape == (2, 8, 4) and noise.shape == (2, 8, 2)
        rows_of_expert = (batch.obs[:, :, None] == torch.from_numpy(all_obs)).all(-1).int().argmax(-1)
        np.testing.assert_array_equal(batch.next_obs, np.load(demos)["next_observations"][rows_of_expert])
    assert (
        len({batch.obs.sum().item() for batch, _, _ in updates})
        == len({noise.sum().item() for _, noise, _ in updates})
        == 60
    )
    if script is sac_eo:
        np.testing.assert_array_equal(events[3][1], all_obs)  # the weight is judged at all of the expert's states
        weights = [weight for _, _, weight in updates]
        assert len(set(weights[:30])) == len(set(weights[30:])) == 1 and 0 < weights[0] != weights[30] < 1
        assert rows[-1]["losses/imitation_weight"] == weights[-1]
