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
    args = sac_eo.Args(device="cpu", **dict(hidden_sizes=(8, 8), model_hidden_sizes=(8, 8), mse_units="raw") | settings)
    models = sac_eo.TwinModels(3, 2, args)
    models.net.weights[-1].data.normal_()
    models.inputs.copy_(torch.tensor([[0.2, -0.1, 0.4, 0.3, 0.0], [2.0, 0.5, 1.5, 0.6, 0.7]]))
    models.changes.copy_(torch.tensor([[0.1, -0.2, 0.3], [0.5, 2.0, 3.0]]))
    return models, args


def transitions(*shape: int, seed: int = 1) -> sac_eo.Batch:
    torch.manual_seed(seed)
    obs, actions = torch.randn(*shape, 3), torch.rand(*shape, 2) * 2 - 1
    return sac_eo.Batch(obs, actions, torch.randn(shape), obs + torch.randn(*shape, 3), torch.rand(shape).round())


def shown(*shape: int) -> sac_eo.Batch:
    """Transitions of an expert, whose actions nobody knows."""
    return transitions(*shape)._replace(actions=torch.full((*shape, 2), math.nan))


def predicted_by(models, m: int, obs, action) -> torch.Tensor:
    """Model m's prediction at one obs [3] and action [2], layer by layer."""
    x = (torch.cat([obs, action]) - models.inputs[0]) / models.inputs[1]
    for weight, bias in list(zip(models.net.weights, models.net.biases, strict=True))[:-1]:
        x = (x @ weight[m] + bias[m, 0]).relu()
    change = x @ models.net.weights[-1][m] + models.net.biases[-1][m, 0]
    return obs + models.changes[0] + models.changes[1] * change


@pytest.mark.parametrize("stat,units,beta", [("max", "raw", 50), ("median", "raw", 1), ("max", "normalised", 0.1)])
def test_the_weight_is_one_over_one_plus_beta_times_the_models_disagreement(stat, units, beta, monkeypatch):
    """Of one action for both models, over all of the expert's states."""
    models, args = models_and_args(delta_stat=stat, beta=beta, mse_units=units)
    agent, expert, noise = sac_eo.Agent(3, 2, args), shown(5), torch.randn(5, 2)
    monkeypatch.setattr(torch, "randn_like", lambda actions: noise)
    metrics = sac_eo.imitation_weight(agent, models, expert, args)
    deltas = []
    for obs, action in zip(expert.obs, agent.actor.sample(expert.obs, noise)[0], strict=True):
        apart = predicted_by(models, 0, obs, action) - predicted_by(models, 1, obs, action)
        deltas.append((apart / (models.changes[1] if units == "normalised" else 1)).norm().item())
    delta = max(deltas) if stat == "max" else sorted(deltas)[2]
    assert agent.eps.item() == pytest.approx(1 / (1 + beta * delta), rel=1e-5) and not agent.eps.requires_grad
    assert metrics["losses/imitation_weight"] == agent.eps
    assert metrics["model/discrepancy_max"].item() == pytest.approx(max(deltas), rel=1e-5)
    assert metrics["model/discrepancy_median"].item() == pytest.approx(sorted(deltas)[2], rel=1e-5)
    sac_eo.imitation_weight(agent, models, expert, replace(args, eps_fixed=0.25))
    assert agent.eps == 0.25


@pytest.mark.parametrize("units", ["raw", "normalised"])
def test_imitation_loss_by_hand(units):
    """Each row by the model of its half, at the policy's action."""
    models, args = models_and_args(mse_units=units)
    actor, expert, noise = sac_eo.Actor(3, 2, (8, 8)), shown(2, 4), torch.randn(2, 4, 2)
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
    inputs = transitions(6), shown(2, 4), torch.randn(2, 6, 2), torch.randn(2, 4, 2)
    return agent, models, *inputs, args


def actor_grads(eps: float) -> tuple[list[torch.Tensor], dict]:
    """What sac_update gives to the actor's optimiser, and its metrics."""
    inputs, seen = setting(eps), []
    inputs[0].actor_optimizer.step = lambda grads: seen.extend(g.clone() for g in grads)
    return seen, sac_eo.sac_update(*inputs)


def test_the_actors_gradient_is_the_weighted_sum_and_with_weight_one_the_baselines():
    agent, models, _, expert, _, expert_noise, args = setting(0.0)
    (of_sac, _), (of_mse, _), (mixed, metrics) = actor_grads(0.0), actor_grads(1.0), actor_grads(0.3)
    loss, _ = sac_eo.imitation_loss(agent.actor, models, expert, expert_noise, args)
    torch.testing.assert_close(of_mse, list(torch.autograd.grad(loss, agent.actor_optimizer.params)))
    assert all(g.abs().max() > 0 for g in of_mse) and not torch.allclose(of_sac[0], of_mse[0])
    torch.testing.assert_close(mixed, [0.7 * a + 0.3 * b for a, b in zip(of_sac, of_mse, strict=True)])
    for name, share, grads in (("sac", 0.7, of_sac), ("imitation", 0.3, of_mse)):
        norm = torch.cat([g.flatten() for g in grads]).norm().item()
        assert metrics[f"losses/gradient_{name}"].item() == pytest.approx(share * norm, rel=1e-4)
    optimizer, of_bco = bco_baseline.Adam(agent.actor.parameters(), 1.0), []
    optimizer.step = of_bco.extend
    bco_baseline.bco_update(agent.actor, optimizer, models, expert, expert_noise, args)
    torch.testing.assert_close(of_bco, of_mse, rtol=0, atol=0)


@pytest.mark.parametrize("eps,eps_fixed", [(0.5, None), (0.0, None), (0.0, 0.0)])
def test_all_but_the_actors_gradient_is_sac_bit_for_bit_and_the_models_stay(eps, eps_fixed):
    agent, models, batch, expert, noise, expert_noise, args = setting(eps, eps_fixed=eps_fixed)
    before, alone = copy.deepcopy(models.state_dict()), copy.deepcopy(agent)
    for _ in range(1 if eps else 20):
        sac_eo.sac_update(agent, models, batch, expert, noise, expert_noise, args)
        sac.sac_update(alone, batch, noise, args)
    torch.testing.assert_close(models.state_dict(), before, rtol=0, atol=0)
    ours, theirs = (dict(each.named_parameters()) for each in (agent, alone))
    same = {name.split(".")[0] for name in ours if torch.equal(ours[name], theirs[name])}
    assert same == {"critic", "target_critic", "log_alpha"} | ({"actor"} if not eps else set())


@pytest.mark.parametrize("shift", [0.0, 9.0, -30.0])
def test_the_model_loss_and_gradient_are_those_of_the_gaussian_likelihood_of_each_models_own_rows(shift):
    """In standard deviations of the changes. The models' own deviations are clamped."""
    models, args = models_and_args()
    models.log_std.data = torch.linspace(-1, 1, 6).view(2, 1, 3) + shift
    batch, seen, wanted = transitions(2, 5), [], []
    for m in range(2):
        std = models.log_std[m, 0].clamp(-10, 2).exp()
        for i in range(5):
            mean = predicted_by(models, m, batch.obs[m, i], batch.actions[m, i])
            normal = torch.distributions.Normal(mean / models.changes[1], std)
            wanted.append(-normal.log_prob(batch.next_obs[m, i] / models.changes[1]).sum() / 5)
    models.optimizer.step = seen.extend
    torch.testing.assert_close(sac_eo.model_update(models, batch, args), sum(wanted).detach() / 2)
    grads = torch.autograd.grad(sum(wanted), models.optimizer.params)
    torch.testing.assert_close(seen, list(grads), rtol=1e-4, atol=1e-5)


def test_untrained_models_are_orthogonal_and_say_little():
    models = sac_eo.TwinModels(3, 2, sac_eo.Args(device="cpu", model_hidden_sizes=(8, 8)))
    for weight, gain in zip(models.net.weights, (2, 2, 1e-4), strict=True):
        square = weight @ weight.mT if weight.shape[1] <= weight.shape[2] else weight.mT @ weight
        torch.testing.assert_close(square, gain * torch.eye(square.shape[1]).expand(2, -1, -1), atol=1e-5, rtol=0)
        assert not torch.equal(*weight)  # two opinions from the start


def linear(n: int, seed: int = 0) -> sac_eo.Batch:
    """n transitions of next_obs = obs + B action, where nothing changes the last observation."""
    batch = transitions(n, seed=seed)
    obs = torch.cat([batch.obs[:, :2], torch.full((n, 1), 3.0)], 1)
    return batch._replace(obs=obs, next_obs=obs + batch.actions @ torch.tensor([[1.0, 0.5, 0], [0, 2.0, 0]]))


def test_a_fit_learns_a_linear_system():
    torch.manual_seed(0)
    args = sac_eo.Args(device="cpu", model_hidden_sizes=(16, 16), model_lr=3e-3, mse_units="raw")
    models, data, test = sac_eo.TwinModels(3, 2, args), linear(2_000), linear(500, seed=2)
    for _ in range(4):
        sac_eo.fit_models(models, sac_eo.model_update, data, args)
    assert models.optimizer.t == 400  # its memory outlives a fit
    x, change = torch.cat([data.obs, data.actions], 1), data.next_obs - data.obs
    torch.testing.assert_close(models.inputs[0], x.mean(0))
    torch.testing.assert_close(models.changes[0], change.mean(0))
    torch.testing.assert_close(models.changes[1, :2], change.std(0, correction=0)[:2])
    assert models.inputs[1, 2] == models.changes[1, 2] == 1  # a constant is only centred
    wrong, moved = models(test.obs, test.actions) - test.next_obs, test.next_obs - test.obs
    share = (wrong.square().sum(-1).mean() / moved.square().sum(-1).mean()).item()
    assert share < 0.01


@pytest.mark.parametrize("n,most,batches", [(5_000, 999, 250), (5_000, 40, 40), (4_199, 999, 200), (90, 5, 5)])
def test_a_fit_has_so_many_minibatches(n, most, batches):
    (models, args), drawn, row = models_and_args(model_batches=most), [], torch.arange(float(n))

    def update(models, batch, args):
        drawn.append(batch.rewards.clone())

    sac_eo.fit_models(models, update, transitions(n)._replace(rewards=row), args)
    assert len(drawn) == batches and drawn[0].shape == (2, min(n, 200))
    if batches == 250:  # a pass has each row once, in an order of each model's own
        first = torch.cat(drawn[:25], 1)
        assert torch.equal(first.sort().values, row.expand(2, -1)) and not torch.equal(*first)


@pytest.mark.parametrize("script", [sac_eo, bco_baseline])
def test_when_what_is_fitted_to_which_transitions(script, demos, tmp_path, monkeypatch):
    """Every model_every steps: the error on new transitions, a fit to the latest, the weight, which stays. The file
    needs no actions."""
    events, data = [], dict(np.load(demos))
    np.savez(tmp_path / "states.npz", **{name: data[name] for name in data if name != "actions"})

    def spy(name: str, note) -> None:
        function = getattr(script, name)
        monkeypatch.setattr(script, name, lambda *inputs: [events.append((name, note(*inputs))), function(*inputs)][1])

    is_eo = script is sac_eo
    update = "sac_update" if is_eo else "bco_update"
    spy("fit_models", lambda models, update, data, args: data.obs)
    spy(update, lambda *inputs: (inputs[3], inputs[5], inputs[0].eps.item()) if is_eo else (*inputs[3:5], 1.0))
    if is_eo:
        spy("imitation_weight", lambda agent, models, expert, args: expert.obs)
    settings = dict(hidden_sizes=(8,), model_hidden_sizes=(8,), model_batch_size=20, model_batches=5, model_every=30)
    settings |= dict(learning_starts=60, model_buffer_size=70, expert_batch_size=17, total_timesteps=120)
    settings |= dict(env_id=POINT, demos=str(tmp_path / "states.npz"), num_demos=2, eval_episodes=1)
    rows = script.train(script.Args(device="cpu", **settings, run_dir=str(tmp_path / "run")))

    fit = ["fit_models", "imitation_weight"] if is_eo else ["fit_models"]
    assert [name for name, _ in events] == (fit + [update] * 30) * 2
    at_fit = dict(events[len(fit) + 30 :][: len(fit)])
    assert len(at_fit["fit_models"]) == 70
    all_obs, all_next = (data[name][:100] for name in ("observations", "next_observations"))
    assert rows[-1]["expert_return"] == pytest.approx(data["rewards"][:100].sum() / 2)
    updates = [value for name, value in events if name == update]
    for batch, noise, _ in updates:  # the expert's transitions, a half for each model
        assert batch.obs.shape == batch.next_obs.shape == (2, 8, 4) and noise.shape == (2, 8, 2)
        rows_of_expert = (batch.obs[:, :, None] == torch.from_numpy(all_obs)).all(-1).int().argmax(-1)
        np.testing.assert_array_equal(batch.obs, all_obs[rows_of_expert])
        np.testing.assert_array_equal(batch.next_obs, all_next[rows_of_expert])
    assert len({(batch.obs.sum().item(), noise.sum().item()) for batch, noise, _ in updates}) == 60
    if is_eo:
        np.testing.assert_array_equal(at_fit["imitation_weight"], all_obs)
        weights = [weight for _, _, weight in updates]
        assert len(set(weights[:30])) == len(set(weights[30:])) == 1 and 0 < weights[0] != weights[30] < 1
        assert rows[-1]["losses/imitation_weight"] == weights[-1]
