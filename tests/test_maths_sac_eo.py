"""SAC-EO's and the BCO baseline's parts against hand calculation or a second method (section numbers: arXiv 2402.18836's symbols)."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch

import bco_baseline
import sac
import sac_eo
from tests.conftest import POINT, TINY_SAC, rows, run


def models_and_args(n: int = 2, **settings):
    torch.manual_seed(0)
    args = sac_eo.Args(**dict(hidden_sizes=(8, 8), model_hidden_sizes=(8, 8), num_models=n, mse_units="raw") | settings)
    return sac_eo.DynamicsModels(3, 2, args), args


def randomise(models) -> None:
    """The output layer starts near zero: give the models something to say, and units that are not 1."""
    with torch.no_grad():
        models.net.output.weight.normal_()
        models.change.std.copy_(torch.tensor([0.5, 2.0, 3.0]))
        models.change.mean.copy_(torch.tensor([0.1, -0.2, 0.3]))


def affine(models, shifts: list[float]) -> None:
    """Makes model m predict obs + shifts[m] in each dimension, whatever the action."""
    with torch.no_grad():
        models.net.output.weight.zero_()
        for bias, shift in zip(models.net.output.bias, shifts, strict=True):
            bias.fill_(shift)


def transitions(batch: int = 6) -> sac_eo.Batch:
    torch.manual_seed(1)
    obs, action = torch.randn(batch, 3), torch.rand(batch, 2) * 2 - 1
    return sac_eo.Batch(obs, action, torch.randn(batch), obs + torch.randn(batch, 3), torch.arange(batch) % 2.0)


class Still(sac_eo.Actor):
    """Acts with the noise itself."""

    def forward(self, obs, noise):
        return noise, noise.sum(-1)


# The weight
TABLE = {
    50: (0.667, 0.167, 0.0385, 0.0196, 0.0099, 0.0040),
    100: (0.500, 0.0909, 0.0196, 0.0099, 0.0050, 0.0020),
    200: (0.333, 0.0476, 0.0099, 0.0050, 0.0025, 0.0010),
}


@pytest.mark.parametrize("beta,delta,eps", [
    *((beta, delta, eps) for beta, row in TABLE.items() for delta, eps in zip((0.01, 0.1, 0.5, 1, 2, 5), row, strict=True)), (0, 3, 1.0),
])  # fmt: skip
def test_adaptive_weight_against_the_table(beta, delta, eps):
    models, args = models_and_args(beta=beta)
    affine(models, [0.0, delta / math.sqrt(3)])
    batch = transitions()
    metrics = sac_eo.imitation_weight(models, Still(3, 2, (8,)), batch, torch.randn(6, 2), args)
    assert metrics["losses/imitation_weight"].item() == pytest.approx(eps, abs=0 if beta == 0 else 0.51 * 10 ** -(3 if eps > 0.1 else 4))
    assert metrics["model/discrepancy_max"].item() == pytest.approx(delta, rel=1e-4)
    assert not metrics["losses/imitation_weight"].requires_grad


def test_identical_models_do_not_disagree():
    models, args = models_and_args()
    randomise(models)
    with torch.no_grad():
        for p in models.net.parameters():
            p[1] = p[0]
    batch = transitions()
    metrics = sac_eo.imitation_weight(models, sac_eo.Actor(3, 2, (8, 8)), batch, torch.randn(6, 2), args)
    assert metrics["model/discrepancy_max"] == 0 and metrics["losses/imitation_weight"] == 1


@pytest.mark.parametrize("stat,units", [("max", "raw"), ("median", "raw"), ("sum", "raw"), ("max", "normalised")])
def test_discrepancy_is_of_one_action_for_both_models_over_all_states(stat, units):
    models, args = models_and_args(delta_stat=stat, beta=1.0, mse_units=units)
    randomise(models)
    batch, noise, actor = transitions(5), torch.randn(5, 2), sac_eo.Actor(3, 2, (8, 8))
    metrics = sac_eo.imitation_weight(models, actor, batch, noise, args)
    action = actor(batch.obs, noise)[0]
    ours = sac_eo.discrepancy(models, batch.obs, action)
    one, two = (copy.deepcopy(models) for _ in range(2))
    for part, m in ((one, 0), (two, 1)):
        part.net.hidden, part.net.output = copy.deepcopy(models.net.hidden), copy.deepcopy(models.net.output)
        for layer in (*part.net.hidden, part.net.output):
            layer.weight, layer.bias = torch.nn.Parameter(layer.weight[m : m + 1]), torch.nn.Parameter(layer.bias[m : m + 1])
    apart = one(batch.obs[None], action[None])[0] - two(batch.obs[None], action[None])[0]
    apart = apart / torch.tensor([0.5, 2.0, 3.0]) if units == "normalised" else apart
    torch.testing.assert_close(ours, apart.square().sum(-1).sqrt())
    d = dict(max=max, median=lambda x: sorted(x)[2], sum=sum)[stat](apart.norm(dim=-1).tolist())
    assert metrics["losses/imitation_weight"].item() == pytest.approx(1 / (1 + d), rel=1e-5)
    with torch.no_grad():
        for p in models.parameters():
            p.copy_(p.flip(0))
    torch.testing.assert_close(sac_eo.discrepancy(models, batch.obs, action), ours)  # swapped


def test_an_outlier_in_the_last_row_counts():
    models, args = models_and_args()
    randomise(models)
    batch = transitions(9)
    calm = sac_eo.imitation_weight(models, Still(3, 2, (8,)), batch, torch.zeros(9, 2), args)["model/discrepancy_max"]
    noise = torch.zeros(9, 2)
    noise[-1] = 50.0
    assert sac_eo.imitation_weight(models, Still(3, 2, (8,)), batch, noise, args)["model/discrepancy_max"] > 2 * calm


def test_true_mse_weight_by_hand():
    models, args = models_and_args(1, eps_mode="true-mse", beta=2.0)
    affine(models, [1.0])
    batch = transitions()
    error = (batch.next_obs - batch.obs - 1).square().sum(-1).mean().item()
    weight = sac_eo.imitation_weight(models, Still(3, 2, (8,)), batch, torch.randn(6, 2), args)["losses/imitation_weight"]
    assert weight.item() == pytest.approx(1 / (1 + 2.0 * 0.5 * error), rel=1e-5)


# The imitation term
@pytest.mark.parametrize("rows_", [4, 5, 7])
@pytest.mark.parametrize("units", ["raw", "normalised"])
def test_imitation_error_by_hand(rows_, units):
    """Each row once, by one model: the first half by the first. An odd number works."""
    models, _ = models_and_args(mse_units=units)
    randomise(models)
    affine(models, [0.5, -1.0])
    batch, std, mean = transitions(rows_), models.change.std, models.change.mean
    errors = []
    for i in range(rows_):
        shift = [0.5, -1.0][i // ((rows_ + 1) // 2)]
        wrong = batch.next_obs[i] - (batch.obs[i] + mean + std * shift)
        errors.append((wrong / (std if units == "normalised" else 1)).square().sum().item())
    ours = sac_eo.imitation_error(models, batch.obs, batch.action, batch.next_obs).item()
    assert ours == pytest.approx(np.mean(errors), rel=1e-5)


def test_one_model_or_two_identical_ones_give_the_same_error():
    two, _ = models_and_args(2)
    randomise(two)
    one, _ = models_and_args(1)
    with torch.no_grad():
        for a, b in zip(two.parameters(), one.parameters(), strict=True):
            a[1] = a[0]
            b.copy_(a[:1])
        for a, b in zip(two.buffers(), one.buffers(), strict=True):
            b.copy_(a)
    batch = transitions(7)
    errors = [sac_eo.imitation_error(models, batch.obs, batch.action, batch.next_obs) for models in (one, two)]
    torch.testing.assert_close(*errors)


def setting(eps: float):
    models, args = models_and_args(actor_lr=1.0)
    randomise(models)
    agent = sac_eo.Agent(3, 2, args)
    batch, expert = transitions(6), transitions(8)
    noise, expert_noise = torch.randn(2, 6, 2), torch.randn(8, 2)
    return agent, models, batch, expert, noise, expert_noise, args, torch.tensor(eps)


def actor_grads(eps: float) -> list[torch.Tensor]:
    """What sac_update gives to the actor's optimiser."""
    agent, models, batch, expert, noise, expert_noise, args, weight = setting(eps)
    seen = []
    agent.actor_optimizer.step = lambda grads: seen.append([g.clone() for g in grads])
    sac_eo.sac_update(agent, batch, batch.obs, noise, args, models, expert, expert_noise, weight)
    return seen[0]


def test_the_actors_gradient_is_the_weighted_sum():
    agent, models, _, expert, _, expert_noise, _, _ = setting(0.0)
    of_sac, of_mse = actor_grads(0.0), actor_grads(1.0)
    error = sac_eo.imitation_error(models, expert.obs, agent.actor(expert.obs, expert_noise)[0], expert.next_obs)
    torch.testing.assert_close(of_mse, list(torch.autograd.grad(error, list(agent.actor.parameters()))))
    assert all(g.abs().max() > 0 for g in of_mse[:2]) and not torch.allclose(of_sac[0], of_mse[0])
    mixed = [0.7 * a + 0.3 * b for a, b in zip(of_sac, of_mse, strict=True)]
    torch.testing.assert_close(actor_grads(0.3), mixed, rtol=1e-4, atol=1e-5)
    agent, models, batch, expert, noise, expert_noise, args, weight = setting(0.3)
    metrics = sac_eo.sac_update(agent, batch, batch.obs, noise, args, models, expert, expert_noise, weight)
    for name, share, grads in (("losses/gradient_sac", 0.7, of_sac), ("losses/gradient_imitation", 0.3, of_mse)):
        norm = torch.cat([g.flatten() for g in grads]).norm().item()  # of all parameters, with the weight
        assert metrics[name].item() == pytest.approx(share * norm, rel=1e-4)


def test_weight_one_is_the_baselines_gradient():
    agent, models, _, expert, _, expert_noise, _, _ = setting(1.0)
    seen, args = [], bco_baseline.Args()
    optimizer = bco_baseline.Adam(agent.actor.parameters(), 1.0)
    optimizer.step = lambda grads: seen.append([g.clone() for g in grads])
    bco_baseline.bco_update(agent.actor, optimizer, models, expert, expert_noise, args)
    torch.testing.assert_close(seen[0], actor_grads(1.0))


def test_a_gradient_step_leaves_the_models_as_they_are():
    agent, models, batch, expert, noise, expert_noise, args, weight = setting(0.5)
    before, twin = copy.deepcopy(models.state_dict()), copy.deepcopy(agent)
    metrics = sac_eo.sac_update(agent, batch, batch.obs, noise, args, models, expert, expert_noise, weight)
    for name, value in models.state_dict().items():
        assert torch.equal(value, before[name]), name
    sac_eo.sac_update(twin, batch, batch.obs, noise, args)  # critics and temperature do not know of the term
    for name in ("critic", "target_critic", "log_alpha"):
        a, b = (getattr(x, name) for x in (agent, twin))
        torch.testing.assert_close(
            a if name == "log_alpha" else a.state_dict(), b if name == "log_alpha" else b.state_dict(), rtol=0, atol=0
        )
    assert not torch.equal(agent.actor.net.output.weight, twin.actor.net.output.weight)
    assert metrics["losses/gradient_imitation"] > 0 and metrics["losses/gradient_sac"] > 0


def test_without_models_it_is_sac_bit_for_bit():
    agent, _, batch, _, _, _, args, _ = setting(0.0)
    theirs = copy.deepcopy(agent)
    for k in range(50):
        torch.manual_seed(k)
        noise = torch.randn(2, 6, 2)
        a = sac_eo.sac_update(agent, batch, batch.obs, noise, args)
        b = sac.sac_update(theirs, batch, batch.obs, noise, args)
        assert a == b
    for (name, p), q in zip(agent.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_whole_run_with_weight_0_is_sacs(tmp_path):
    """The same progress.csv, and every random stream goes its own way."""
    argv = [*POINT, *TINY_SAC, "--total-timesteps", "200", "--eval-every", "50", "--eval-episodes", "1"]
    run(sac, [*argv, "--run-dir", tmp_path / "sac"])
    run(sac_eo, [*argv, "--eps-mode", "fixed", "--eps-fixed", "0", "--run-dir", tmp_path / "eo"])
    assert rows(tmp_path / "sac") == rows(tmp_path / "eo") and len(rows(tmp_path / "sac")) == 5
    agents = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["parts"]["agent"] for name in ("sac", "eo")]
    assert all(torch.equal(agents[0][key], agents[1][key]) for key in agents[0])


def test_imitating_actions_clones_them_and_needs_them(tmp_path, argv_of, demos, capsys):
    agent, models, batch, expert, noise, expert_noise, args, weight = setting(1.0)
    args, seen = sac_eo.replace(args, imitate="actions"), []
    error = (agent.actor(expert.obs, expert_noise)[0] - expert.action).square().sum(1).mean()
    agent.actor_optimizer.step = seen.append
    metrics = sac_eo.sac_update(agent, batch, batch.obs, noise, args, models, expert, expert_noise, weight)
    torch.testing.assert_close(seen[0], list(torch.autograd.grad(error, list(agent.actor.parameters()))))
    assert metrics["losses/imitation"].item() == pytest.approx(error.item())
    file = without_actions(demos, tmp_path / "none.npz")
    with pytest.raises(SystemExit):
        run(sac_eo, [*argv_of(sac_eo), "--demos", file, "--imitate", "actions", "--run-dir", tmp_path / "never"])
    assert "no array 'actions'" in capsys.readouterr().err


def test_with_an_exact_model_the_policy_finds_the_experts_actions():
    """next_obs = obs + B action: the error falls to the variance of the actions, which shrinks."""
    torch.manual_seed(0)
    b = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])

    class Exact(sac_eo.DynamicsModels):
        def forward(self, obs, action):
            return obs + action @ b.T

    args = bco_baseline.Args(hidden_sizes=(32, 32), model_hidden_sizes=(8,), actor_lr=1e-2)
    models, actor = Exact(3, 2, args), bco_baseline.Actor(3, 2, (32, 32))
    optimizer, obs = bco_baseline.Adam(actor.parameters(), 1e-2), torch.randn(64, 3)
    wanted = 0.8 * torch.tanh(obs[:, :2])
    expert = bco_baseline.Batch(obs, wanted, obs[:, 0], obs + wanted @ b.T, obs[:, 0])
    samples = torch.stack([actor(obs, torch.randn(64, 2))[0] for _ in range(2_000)])
    noisy = np.mean([bco_baseline.imitation_error(models, obs, a, expert.next_obs).item() for a in samples])
    bias = bco_baseline.imitation_error(models, obs, samples.mean(0), expert.next_obs).item()
    of_noise = (samples.var(0).mean(0) * b.square().sum(0)).sum().item()
    assert noisy == pytest.approx(bias + of_noise, rel=0.01) and of_noise > 0.3 * noisy
    entropy = []
    for _ in range(400):
        metrics = bco_baseline.bco_update(actor, optimizer, models, expert, torch.randn(64, 2), args)
        entropy.append(metrics["losses/entropy"].item())
    samples = torch.stack([actor(obs, torch.randn(64, 2))[0] for _ in range(300)])
    error = bco_baseline.imitation_error(models, obs, actor(obs, torch.zeros(64, 2))[0], expert.next_obs)
    assert (samples.mean(0) - wanted).abs().mean() < 0.05 and error < 0.05
    noisy = np.mean([bco_baseline.imitation_error(models, obs, a, expert.next_obs).item() for a in samples])
    bias = bco_baseline.imitation_error(models, obs, samples.mean(0), expert.next_obs).item()
    of_less_noise = (samples.var(0, correction=0).mean(0) * b.square().sum(0)).sum().item()
    assert noisy == pytest.approx(bias + of_less_noise, rel=0.01) and of_less_noise < 0.3 * of_noise
    assert entropy[-1] < entropy[0] - 2  # nothing holds the noise up


# The models
def test_model_loss_is_the_gaussian_likelihood_of_each_models_own_rows():
    models, args = models_and_args(model_lr=1e-3)
    randomise(models)
    with torch.no_grad():
        models.log_std.uniform_(-1, 1)
    batch = sac_eo.Batch(*(torch.stack(pair) for pair in zip(transitions(5), transitions(5), strict=True)))
    batch = batch._replace(obs=batch.obs + torch.randn(2, 5, 3))
    wanted = []
    for m in range(2):
        mean = models(batch.obs, batch.action)[m]
        std = models.log_std[m].exp() * models.change.std
        normal = torch.distributions.Normal(mean, std)  # of raw observations: the change of units adds log std of the changes
        wanted.append(-(normal.log_prob(batch.next_obs[m]) + models.change.std.log()).sum(-1).mean().item())
    loss = sac_eo.model_update(models, sac_eo.Adam(models.parameters(), 1e-3), batch, args)
    assert loss.item() == pytest.approx(np.mean(wanted), rel=1e-4)


def test_one_optimiser_for_both_models_is_two():
    models, args = models_and_args()
    single, one = models_and_args(1)[0], models_and_args(1)[1]
    with torch.no_grad():
        for a, b in zip(models.parameters(), single.parameters(), strict=True):
            b.copy_(a[1:])
    together, alone = sac_eo.Adam(models.parameters(), 1e-2), sac_eo.Adam(single.parameters(), 1e-2)
    for k in range(10):
        torch.manual_seed(k)
        batch = sac_eo.Batch(torch.randn(2, 5, 3), torch.rand(2, 5, 2), torch.zeros(2, 5), torch.randn(2, 5, 3), torch.zeros(2, 5))
        sac_eo.model_update(models, together, batch, args)
        sac_eo.model_update(single, alone, sac_eo.Batch(*(field[1:] for field in batch)), one)
    for a, b in zip(models.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(a[1:], b)


def test_a_network_that_says_nothing_predicts_the_mean_change_and_a_constant_dimension_is_harmless():
    models, _ = models_and_args()
    batch = transitions(50)
    batch.next_obs[:, 1] = batch.obs[:, 1] = 3.0
    models.fit_normalisers(batch)
    affine(models, [0.0, 0.0])
    change = (batch.next_obs - batch.obs).mean(0)
    predicted = models.all(batch.obs, batch.action)
    torch.testing.assert_close(predicted, (batch.obs + change).expand(2, -1, -1))
    assert torch.isfinite(predicted).all() and models.change.std[1] == 1


def filled(n: int, seed: int = 0):
    """n transitions of next_obs = obs + B action."""
    generator = torch.Generator().manual_seed(seed)
    obs, action = torch.randn(n, 3, generator=generator), torch.rand(n, 2, generator=generator) * 2 - 1
    b = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
    buffer = sac_eo.ReplayBuffer(n, 3, 2, torch.device("cpu"))
    buffer.extend(torch.cat([obs, action, obs + action @ b.T, torch.zeros(n, 2)], 1))
    return buffer


def test_a_fit_learns_a_linear_system():
    models, args = models_and_args()
    assert not any(torch.equal(*layer.weight) for layer in (*models.net.hidden, models.net.output))  # the models start apart
    buffer, generator = filled(2_000), torch.Generator().manual_seed(0)
    optimizer = sac_eo.Adam(models.parameters(), 3e-3)
    for _ in range(4):
        sac_eo.fit_models(models, optimizer, sac_eo.model_update, buffer, args, generator)
    test = buffer.split(filled(500, 1).rows)
    predicted = models.all(test.obs, test.action)
    assert (predicted[0] - predicted[1]).abs().mean() > 1e-4  # and stay two opinions
    accuracy = sac_eo.model_accuracy(models, test, "test")
    error = models.distance(models.all(test.obs, test.action), test.next_obs).mean()
    share = error / (test.next_obs - test.obs).square().sum(-1).mean()
    known = buffer.split(buffer.rows)
    for normaliser, x in ((models.inputs, torch.cat([known.obs, known.action], 1)), (models.change, known.next_obs - known.obs)):
        torch.testing.assert_close(normaliser.mean, x.mean(0))
        torch.testing.assert_close(normaliser.std, x.std(0, correction=0))
    assert accuracy["model/error_test"].item() == pytest.approx(share.item(), rel=1e-4) and share < 0.01


@pytest.mark.parametrize("n,most,batches", [(5_000, 10_000, 250), (5_000, 40, 40), (4_199, 10_000, 200), (100_000, 10_000, 5_000)])
def test_a_fit_has_so_many_minibatches(n, most, batches):
    models, args = models_and_args(model_max_batches=most)
    drawn = []

    def update(models, optimizer, batch, args):
        drawn.append(batch.obs)
        return torch.tensor(0.0)

    metrics = sac_eo.fit_models(models, None, update, filled(n), args, torch.Generator().manual_seed(0))
    assert metrics["model/batches"] == len(drawn) == batches and drawn[0].shape == (2, 200, 3)
    if batches == 250:  # the first epoch has each row once, in an order of each model's own
        epoch = torch.cat(drawn[:25], 1)
        for m in range(2):
            assert len({tuple(row) for row in epoch[m].tolist()}) == n
        assert not torch.equal(epoch[0], epoch[1])


def test_models_learn_from_the_latest_transitions_only():
    models, args = models_and_args(model_buffer_size=400, model_epochs=1)
    buffer, drawn = filled(1_000), []
    sac_eo.fit_models(models, None, lambda *a: [drawn.append(a[2].obs), torch.tensor(0.0)][1], buffer, args, torch.Generator())
    latest = {tuple(row) for row in buffer.rows[-400:, :3].tolist()}
    assert {tuple(row) for row in torch.cat(drawn, 1)[0].tolist()} == latest


def test_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr

    models, _ = models_and_args()
    randomise(models)
    batch = transitions(40)
    metrics = sac_eo.model_accuracy(models, batch, "x")
    error = models.distance(models.all(batch.obs, batch.action).mean(0), batch.next_obs)
    wanted = spearmanr(error.detach(), sac_eo.discrepancy(models, batch.obs, batch.action).detach()).statistic
    assert metrics["model/rank_correlation_x"].item() == pytest.approx(wanted, abs=1e-6)
    assert "model/rank_correlation_x" not in sac_eo.model_accuracy(models, transitions(1), "x")


def test_errors_that_do_not_depend_on_the_state_are_not_foreseen():
    """Two models whose errors are independent noise: their disagreement says nothing about their mean's error."""
    torch.manual_seed(0)
    models, noise = models_and_args()[0], torch.randn(2, 4_000, 3)
    batch = transitions(4_000)._replace(next_obs=torch.zeros(4_000, 3))
    models.all = lambda obs, action: noise
    metrics = sac_eo.model_accuracy(models, batch, "x")
    assert abs(metrics["model/rank_correlation_x"]) < 0.05
    assert metrics["model/squared_error_x"].item() == pytest.approx(noise.square().sum(-1).mean().item(), rel=1e-5)
    assert metrics["model/error_x"].item() == pytest.approx(
        (noise.square().sum(-1).mean() / batch.obs.square().sum(-1).mean()).item(), rel=1e-5
    )


def test_random_transitions_are_of_random_actions_and_consecutive():
    buffer = sac_eo.ReplayBuffer(1, 4, 2, torch.device("cpu"))
    env = sac_eo.ResumableEnv(sac_eo.make_env(POINT[1]), [0, 2])
    batch = sac_eo.random_transitions(env, 120, buffer)
    follows = (batch.next_obs[:-1] == batch.obs[1:]).all(-1)
    assert len(batch.obs) == 120 and 110 < follows.sum() < 119
    assert batch.action.abs().max() <= 1 and batch.action.std() == pytest.approx(1 / math.sqrt(3), abs=0.06)


# The inverse model
def test_the_inverse_model_learns_which_action_it_was():
    torch.manual_seed(0)
    args = bco_baseline.Args(model_hidden_sizes=(32, 32))
    model = bco_baseline.InverseModel(3, 2, args)
    optimizer, buffer, generator = bco_baseline.Adam(model.parameters(), 3e-3), filled(2_000), torch.Generator().manual_seed(0)
    for _ in range(4):
        bco_baseline.fit_models(model, optimizer, bco_baseline.inverse_update, buffer, args, generator)
    test = buffer.split(filled(500, 1).rows)
    assert (model(test.obs, test.next_obs) - test.action).square().mean() < 0.003

    actor = bco_baseline.Actor(3, 2, (32, 32))
    optimizer, args = bco_baseline.Adam(actor.parameters(), 1e-2), bco_baseline.Args(variant="inverse")
    before, noise = copy.deepcopy(model.state_dict()), torch.randn(500, 2)
    label = model(test.obs, test.next_obs)
    wanted = (actor(test.obs, noise)[0] - label).square().sum(-1).mean().item()
    metrics = bco_baseline.bco_update(actor, optimizer, model, test._replace(action=test.action * math.nan), noise, args)
    assert metrics["losses/imitation"].item() == pytest.approx(wanted, rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Whole runs
def without_actions(demos: str, path, actions=None) -> str:
    data = dict(np.load(demos))
    del data["actions"]
    np.savez(path, **data, **({} if actions is None else dict(actions=actions)))
    return str(path)


@pytest.mark.parametrize("script,extra", [(sac_eo, []), (bco_baseline, []), (bco_baseline, ["--variant", "inverse"])])
def test_the_experts_actions_are_never_learned_from(script, extra, tmp_path, argv_of, demos):
    data = np.load(demos)
    wrong = np.random.default_rng(0).uniform(-2, 2, data["actions"].shape).astype(np.float32)
    files = dict(right=demos, none=without_actions(demos, tmp_path / "none.npz"), wrong=without_actions(demos, tmp_path / "w.npz", wrong))
    actors, tables = {}, {}
    for name, path in files.items():
        argv = [*argv_of(script), *extra, "--demos", path, "--total-timesteps", "200", "--eval-every", "50"]
        run(script, [*argv, "--run-dir", tmp_path / name])
        actors[name] = torch.load(tmp_path / name / "policy.pt", weights_only=True)["actor"]
        tables[name] = rows(tmp_path / name)
    for name in ("none", "wrong"):
        assert all(torch.equal(actors["right"][key], actors[name][key]) for key in actors["right"])
        for a, b in zip(tables["right"], tables[name], strict=True):
            assert {k: v for k, v in a.items() if "expert" not in k or k == "expert_return"} == {
                k: v for k, v in b.items() if "expert" not in k or k == "expert_return"
            }
    known = {key for key in tables["right"][0] if key.endswith("_expert")}
    assert known and not known & tables["none"][0].keys()
    assert any(tables["right"][-1][key] != tables["wrong"][-1][key] for key in known)  # the diagnostics do read them


def test_the_weight_is_set_after_each_fit_and_stays(tmp_path, argv_of, monkeypatch):
    seen, fits, update, weigh = [], [], sac_eo.sac_update, sac_eo.imitation_weight
    monkeypatch.setattr(sac_eo, "sac_update", lambda *a: [seen.append(a[-1].item()), update(*a)][1])
    monkeypatch.setattr(sac_eo, "imitation_weight", lambda *a: [fits.append(weigh(*a)), fits[-1]][1])
    run(sac_eo, [*argv_of(sac_eo), "--model-every", "30", "--total-timesteps", "150", "--run-dir", tmp_path])
    weights = [metrics["losses/imitation_weight"].item() for metrics in fits]
    assert len(weights) == 3 and len(set(weights)) == 3 and all(0 < w < 1 for w in weights)
    assert seen == [weights[k // 30] for k in range(90)]


@pytest.mark.parametrize("script", [sac_eo, bco_baseline])
def test_diagnostics_before_and_after_a_fit(script, tmp_path, argv_of, monkeypatch, demos):
    """The models are tried on the agent's newest transitions before they learn from them; the weight is set after the fit."""
    order, batches, accuracy, fit = [], [], script.model_accuracy, script.fit_models
    monkeypatch.setattr(script, "model_accuracy", lambda m, b, where: [order.append(where), batches.append(b), accuracy(m, b, where)][2])
    monkeypatch.setattr(script, "fit_models", lambda *a: [order.append("fit"), fit(*a)][1])
    if script is sac_eo:
        weigh = sac_eo.imitation_weight
        monkeypatch.setattr(script, "imitation_weight", lambda *a: [order.append("weigh"), weigh(*a)][1])
    flags = ["--model-every", "30", "--total-timesteps", "120", "--expert-noise-std", "3", "--expert-noise-target", "all"]
    run(script, [*argv_of(script), *flags, "--run-dir", tmp_path])
    after = ["fit", "random", "expert", *["weigh"] * (script is sac_eo)]
    assert order == [*after, "agent", *after]
    data = np.load(demos)
    for name in ("obs", "next_obs"):  # the expert's without the noise that the learner sees
        np.testing.assert_array_equal(getattr(batches[1], name), data[{"obs": "observations"}.get(name, "next_observations")])
    parts = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["parts"]
    assert torch.equal(batches[2].obs, parts["buffer"]["rows"][60:90, :4]) and len(batches[0].obs) == 1_000


def test_the_policys_spread():
    actor = sac_eo.Actor(3, 2, (8,))
    with torch.no_grad():
        actor.net.output.weight.zero_()
        actor.net.output.bias.zero_()
        actor.net.output.bias[..., 2:] = torch.tensor([-21.0, 1.0])
    metrics = sac_eo.log_std(actor, torch.randn(5, 3))
    assert metrics["losses/log_std"].item() == -9.5 and metrics["losses/log_std_clamped"].item() == 0.5


def test_the_models_deviation_is_clamped():
    models, args = models_and_args()
    batch = sac_eo.Batch(*(x.expand(2, *x.shape) for x in transitions(6)))
    optimizer = sac_eo.Adam(models.parameters(), 0.0)
    for wild, clamped in ((5.0, 2.0), (-30.0, -10.0)):
        losses = []
        for value in (wild, clamped):
            models.log_std.data.fill_(value)
            losses.append(sac_eo.model_update(models, optimizer, batch, args).item())
        assert losses[0] == losses[1] and math.isfinite(losses[0])


@pytest.mark.parametrize("script", [sac_eo, bco_baseline])
@pytest.mark.parametrize("size", [16, 0])
def test_the_actor_sees_demonstrated_transitions_drawn_anew(script, size, tmp_path, argv_of, demos, monkeypatch):
    seen, name = [], "sac_update" if script is sac_eo else "bco_update"
    update, first = getattr(script, name), 6 if script is sac_eo else 3
    monkeypatch.setattr(script, name, lambda *a: [seen.append(a[first : first + 2]), update(*a)][1])
    run(script, [*argv_of(script), "--expert-batch-size", size, "--total-timesteps", "70", "--run-dir", tmp_path])
    data = np.load(demos)
    pairs = np.concatenate([data["observations"], data["next_observations"]], 1).astype(np.float32)
    known = {tuple(row) for row in pairs.tolist()}
    drawn = [torch.cat([expert.obs, expert.next_obs], 1) for expert, _ in seen]
    assert len(drawn) == 10
    for rows_ in drawn:
        assert len(rows_) == (size or len(pairs)) and {tuple(row) for row in rows_.tolist()} <= known
        if not size:  # all of them, shuffled before they are halved
            assert {tuple(row) for row in rows_.tolist()} == known and not np.array_equal(rows_, pairs)
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(drawn))
    assert not any(torch.equal(a, b) for (_, a), (_, b) in itertools.pairwise(seen))  # noise


def test_the_weight_is_judged_at_all_demonstrated_states(tmp_path, argv_of, demos, monkeypatch):
    weighed, weigh, data = [], sac_eo.imitation_weight, np.load(demos)
    monkeypatch.setattr(sac_eo, "imitation_weight", lambda *a: [weighed.append(a[2]), weigh(*a)][1])
    run(sac_eo, [*argv_of(sac_eo), "--total-timesteps", "70", "--run-dir", tmp_path])
    np.testing.assert_array_equal(weighed[0].obs, data["observations"])
    np.testing.assert_array_equal(weighed[0].next_obs, data["next_observations"])


def test_weight_0_with_models_is_sac_too():
    agent, models, batch, expert, noise, expert_noise, args, weight = setting(0.0)
    alone = copy.deepcopy(agent)
    for _ in range(20):
        sac_eo.sac_update(agent, batch, batch.obs, noise, args, models, expert, expert_noise, weight)
        sac.sac_update(alone, batch, batch.obs, noise, args)
    assert all(torch.equal(p, q) for p, q in zip(agent.parameters(), alone.parameters(), strict=True))


def test_the_optimisers_memory_outlives_a_fit():
    models, args = models_and_args(model_max_batches=7)
    optimizer, generator = sac_eo.Adam(models.parameters(), 1e-3), torch.Generator().manual_seed(0)
    for fits in (1, 2, 3):
        sac_eo.fit_models(models, optimizer, sac_eo.model_update, filled(500), args, generator)
        assert optimizer.steps == 7 * fits


@pytest.mark.parametrize("script", [sac_eo, bco_baseline])
@pytest.mark.parametrize(
    "flags", [["--expert-noise-std", "0.5"], ["--expert-noise-std", "0.5", "--expert-noise-target", "all"], ["--expert-shuffle"]]
)
def test_disturbed_expert_states(script, flags, tmp_path, argv_of, demos, monkeypatch):
    """The learner sees them; by so many deviations of the changes, or paired with others."""
    seen, name = [], "sac_update" if script is sac_eo else "bco_update"
    update, expert = getattr(script, name), 6 if script is sac_eo else 3
    monkeypatch.setattr(script, name, lambda *a: [seen.append(a[expert]), update(*a)][1])
    common = [*argv_of(script), "--expert-batch-size", "0", "--num-models", "1", "--total-timesteps", "61"]
    common += ["--eps-mode", "true-mse"] if script is sac_eo else []
    run(script, [*common, *flags, "--run-dir", tmp_path])
    data, batch = np.load(demos), seen[0]
    obs, next_obs = data["observations"], data["next_observations"]
    std = (next_obs - obs).std(0)
    if flags == ["--expert-shuffle"]:
        np.testing.assert_array_equal(batch.obs, obs)
        assert (batch.next_obs.numpy() != next_obs).any(1).mean() > 0.9
        np.testing.assert_array_equal(sorted(batch.next_obs.tolist()), sorted(next_obs.tolist()))
        return
    np.testing.assert_allclose((batch.next_obs.numpy() - next_obs).std(0) / std, 0.5, rtol=0.15)
    if "all" in flags:
        np.testing.assert_allclose((batch.obs.numpy() - obs).std(0) / std, 0.5, rtol=0.15)
        own = (batch.obs.numpy() - obs) - (batch.next_obs.numpy() - next_obs)  # independent, not the same noise twice
        np.testing.assert_allclose(own.std(0) / std, 0.5 * 2**0.5, rtol=0.2)
    else:
        np.testing.assert_array_equal(batch.obs, obs)


@pytest.mark.parametrize("script,argv,message", [
    (sac_eo, ["--num-models", "1"], "--num-models 2"),
    (sac_eo, ["--model-batch-size", "61"], "--model-batch-size 61 must not exceed"),
    (sac_eo, ["--buffer-size", "15"], "of which 15 is the least"),
    (sac_eo, ["--eps-mode", "fixed", "--demos", "missing.npz"], "no such file"),
    (sac_eo, ["--env-id", "Hopper-v4"], "4: recorded in another environment, or another version of it?"),
    (sac_eo, ["--demos", "missing.npz"], "no such file"),
    (sac_eo, ["--demos", ""], "tests.pointmass-PointMass-v0.npz: no such file; give --demos PATH"),  # the bundled file's name
    (bco_baseline, ["--demos", ""], "tests.pointmass-PointMass-v0.npz: no such file; give --demos PATH"),
    (sac_eo, ["--num-demos", "9"], "--num-demos 5"),
    (bco_baseline, ["--demos", "missing.npz"], "no such file"),
    (sac_eo, ["--eps-fixed", "0"], "--eps-fixed 0.0: changes nothing"),
    (sac_eo, ["--eps-mode", "fixed", "--beta", "50"], "--beta 50.0: changes nothing"),
    (sac_eo, ["--eps-mode", "true-mse", "--delta-stat", "sum"], "--delta-stat sum: changes nothing with --eps-mode true-mse"),
    (sac_eo, ["--eps-mode", "fixed", "--eps-fixed", "0", "--expert-noise-std", "1"], "--expert-noise-std 1.0: changes nothing"),
    (sac_eo, ["--expert-noise-target", "all"], "--expert-noise-target all: changes nothing with --expert-noise-std 0"),
    (sac_eo, ["--eps-mode", "fixed", "--eps-fixed", "0", "--imitate", "actions"], "--imitate actions: changes nothing with --eps-fixed 0"),
    (sac_eo, ["--eps-mode", "fixed", "--eps-fixed", "0", "--normalise-obs"], "--normalise-obs: changes nothing with --eps-fixed 0"),
    (sac_eo, ["--preset", "paper", "--eps-mode", "fixed", "--beta", "50"], "--beta 50.0: changes nothing"),
    (bco_baseline, ["--expert-noise-target", "all"], "--expert-noise-target all: changes nothing"),
    (bco_baseline, ["--variant", "inverse", "--num-models", "1"], "--num-models 1: changes nothing with --variant inverse"),
])  # fmt: skip
def test_refusals(script, argv, message, tmp_path, argv_of, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(script, [*argv_of(script), *argv, "--run-dir", tmp_path / "never"])
    assert stopped.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "never").exists()


@pytest.mark.parametrize("flags", [
    ["--eps-mode", "true-mse", "--num-models", "1"], ["--eps-mode", "fixed", "--eps-fixed", "1"], ["--delta-stat", "median", "--bf16"],
    ["--mse-units", "raw", "--beta", "100", "--expert-batch-size", "0"], ["--delta-stat", "sum", "--beta", "0.01"],
    ["--imitate", "actions", "--eps-mode", "fixed", "--eps-fixed", "0.5"],
])  # fmt: skip
def test_every_experiment_flag_runs(flags, tmp_path, argv_of):
    run(sac_eo, [*argv_of(sac_eo), *flags, "--total-timesteps", "120", "--eval-every", "60", "--run-dir", tmp_path])
    last = rows(tmp_path)[-1]
    assert np.isfinite(float(last["losses/imitation"])) and 0 < float(last["losses/imitation_weight"]) <= 1


def test_the_papers_preset_with_a_fixed_weight_is_no_contradiction():
    for script, extra in ((sac_eo, ["--eps-mode", "fixed"]), (bco_baseline, ["--variant", "inverse"])):
        script.check_args(script.parse_args(["--preset", "paper", *extra]))


def test_a_compiled_step_agrees_with_the_eager_one():
    torch._dynamo.config.trace_autograd_ops = True
    agent, models, batch, expert, noise, expert_noise, args, weight = setting(0.3)
    args = sac_eo.replace(args, actor_lr=3e-4)
    agent = sac_eo.Agent(3, 2, args)
    twin, compiled = copy.deepcopy(agent), torch.compile(sac_eo.sac_update)
    for _ in range(10):
        sac_eo.sac_update(agent, batch, batch.obs, noise, args, models, expert, expert_noise, weight)
        compiled(twin, batch, batch.obs, noise, args, models, expert, expert_noise, weight)
    torch.testing.assert_close(dict(agent.named_parameters()), dict(twin.named_parameters()), rtol=1e-4, atol=1e-5)


def test_all_learn_the_point_mass(tmp_path, demos):
    """In 2,500 steps the baselines, which see no reward, come to the expert's level (48; random 36); SAC-EO by 1,500."""
    common = [*POINT, "--demos", demos, "--num-demos", "5", "--model-hidden-sizes", "64", "64", "--learning-starts", "500",
              "--model-every", "500", "--eval-every", "2500", "--eval-episodes", "5", "--total-timesteps", "2500"]  # fmt: skip
    for name, extra in (("forward", []), ("inverse", ["--variant", "inverse"])):
        flags = ["--hidden-sizes", "64", "64", "--actor-lr", "1e-3", *extra, "--run-dir", tmp_path / name]
        assert run(bco_baseline, [*common, *flags])["eval_return_mean"] > 46
    flags = [
        "--hidden-sizes",
        "64",
        "64",
        "--batch-size",
        "64",
        "--buffer-size",
        "5000",
        "--total-timesteps",
        "1500",
        "--eval-every",
        "1500",
    ]
    assert run(sac_eo, [*common, *flags, "--actor-lr", "1e-3", "--run-dir", tmp_path / "sac_eo"])["eval_return_mean"] > 45


def test_networks_see_observations_standardised_by_expert_and_first_random_ones(tmp_path, argv_of, demos):
    """Both count the same; what the policy sees in an evaluation is standardised alike."""
    for script, networks in ((sac_eo, ("agent.actor", "agent.critic", "agent.target_critic")), (bco_baseline, ("actor",))):
        argv = [*argv_of(script), "--demos", demos, "--learning-starts", "60", "--total-timesteps", "62"]
        run(script, [*argv, "--normalise-obs", "--run-dir", tmp_path / script.__name__])
        parts = torch.load(tmp_path / script.__name__ / "checkpoint.pt", weights_only=True)["parts"]
        theirs = torch.as_tensor(np.load(demos)["observations"]).double()
        mine = parts["buffer"]["rows"][:60, : theirs.shape[1]].double()
        mean = (mine.mean(0) + theirs.mean(0)) / 2
        std = (((mine - mean).square().mean(0) + (theirs - mean).square().mean(0)) / 2).sqrt()
        for network in networks:
            part, _, prefix = network.partition(".")
            state = {name.removeprefix(prefix + "."): value for name, value in parts[part].items()}
            torch.testing.assert_close(state["normalise.mean"].double(), mean, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(state["normalise.std"].double(), std, rtol=1e-5, atol=1e-6)
        policy = torch.load(tmp_path / script.__name__ / "policy.pt", weights_only=True)["actor"]
        torch.testing.assert_close(policy["normalise.mean"].double(), mean, rtol=1e-5, atol=1e-6)
        run(script, [*argv, "--run-dir", tmp_path / f"{script.__name__}-raw"])
        policy = torch.load(tmp_path / f"{script.__name__}-raw" / "policy.pt", weights_only=True)["actor"]
        assert not policy["normalise.mean"].any() and (policy["normalise.std"] == 1).all()
