"""HyPER's blocks against hand calculation or a second method. Numbers in the names refer to the reference page's equations."""

import copy
import math
from dataclasses import asdict, replace

import gymnasium as gym
import numpy as np
import pytest
import torch

import hyper
import sac

TINY = hyper.Args(model_members=7, model_elites=5, model_hidden_sizes=(8, 8), hidden_sizes=(8, 8), model_batch_size=32)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------- cost
def linear_cost(weights: list[float], args: hyper.Args) -> hyper.Cost:
    cost = hyper.Cost(2, 1, args)
    cost.net = hyper.StackedMLP(1, [3, 1])
    cost.net.output.weight.data = torch.tensor(weights)[None, :, None]
    return cost


@pytest.mark.parametrize("target", [0.4, 1.0])
def test_gradient_penalty_of_a_linear_cost(target):
    args = hyper.Args(cost_gp_target=target, cost_loss="moment")
    cost = linear_cost([0.3, -1.2, 0.4], args)
    optimizer = hyper.Adam(cost.parameters(), 1e-2)
    before = cost.net.output.weight.clone()
    same = torch.randn(50, 3)
    logged = hyper.cost_update(cost, optimizer, same, same, torch.rand(50, 1), args)  # equal data: only the penalty pulls
    assert logged["losses/cost"].item() == pytest.approx(0, abs=1e-6)
    assert logged["losses/cost_gradient_penalty"].item() == pytest.approx((1.3 - target) ** 2, rel=1e-5)
    moved = (cost.net.output.weight - before).flatten()
    assert (moved.sign() == -before.sign().flatten()).all()  # |w| = 1.3 is above the target: towards zero


class Catch:
    """An optimiser that keeps the gradients instead of stepping."""

    def __init__(self, module):
        self.params = list(module.parameters())

    def step(self, grads):
        self.grads = grads


@pytest.mark.parametrize("loss,reduce", [("moment", "min"), ("moment", "max"), ("logistic", "min")])
def test_cost_gradient_is_that_of_the_written_out_loss(loss, reduce):
    torch.manual_seed(0)
    args = hyper.Args(cost_loss=loss, cost_reduce=reduce, cost_members=7, cost_gp_weight=10.0, cost_gp_target=0.4)
    cost = hyper.Cost(2, 1, args).double()
    expert, learner, mix = torch.randn(16, 3).double(), torch.randn(16, 3).double() + 0.5, torch.rand(16, 1).double()
    catch = Catch(cost)
    hyper.cost_update(cost, catch, expert, learner, mix, args)

    def f(x):
        h = x.expand(7, -1, -1)
        for layer in cost.net.hidden:
            h = torch.relu(h @ layer.weight + layer.bias)
        members = (h @ cost.net.output.weight + cost.net.output.bias)[..., 0]
        return members.min(0).values if reduce == "min" else members.max(0).values

    points = (mix * expert + (1 - mix) * learner).requires_grad_()
    (slope,) = torch.autograd.grad(f(points).sum(), points, create_graph=True)
    total = 10 * (slope.norm(dim=1) - 0.4).square().mean()
    if loss == "moment":
        total = total + f(expert).mean() - f(learner).mean()
    else:  # the logit of "learner"
        total = total - torch.log(1 - torch.sigmoid(f(expert))).mean() - torch.log(torch.sigmoid(f(learner))).mean()
    for ours, theirs in zip(catch.grads, torch.autograd.grad(total, catch.params), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", ["moment", "logistic"])
def test_reward_becomes_higher_on_expert_rows_and_relabelling_follows(loss):
    torch.manual_seed(0)
    args = hyper.Args(cost_loss=loss)
    cost = hyper.Cost(2, 1, args)
    optimizer = hyper.Adam(cost.parameters(), 1e-3)
    expert, learner = torch.randn(64, 3) + 1, torch.randn(64, 3) - 1
    before = cost.reward(expert[:, :2], expert[:, 2:])
    for _ in range(50):
        hyper.cost_update(cost, optimizer, expert, learner, torch.rand(64, 1), args)
    on_expert, on_learner = (cost.reward(x[:, :2], x[:, 2:]) for x in (expert, learner))
    assert on_expert.mean() > on_learner.mean() + 0.1
    assert not torch.allclose(before, on_expert)
    expected = -cost(expert) if loss == "moment" else -torch.log(1 - torch.sigmoid(-cost(expert)))
    torch.testing.assert_close(on_expert, expected.detach(), rtol=1e-4, atol=1e-5)


def test_the_cost_sees_standardised_inputs_whatever_the_numbers_of_transitions():
    cost = hyper.Cost(2, 1, TINY)
    expert, learner = torch.randn(50, 3) * torch.tensor([0.1, 1, 9]) + 4, torch.randn(500, 3)
    cost.normalise.fit(expert, learner)
    seen = torch.cat([expert.repeat(10, 1), learner])  # as many of each
    torch.testing.assert_close(cost.normalise(seen).mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(cost.normalise(seen).std(0), torch.ones(3), atol=1e-2, rtol=0)
    assert torch.equal(cost.reward(seen[:, :2], seen[:, 2:]), torch.nn.functional.softplus(-cost(cost.normalise(seen))).clamp(max=10))


def test_actor_and_critics_see_standardised_observations_and_raw_actions():
    torch.manual_seed(0)
    agent, obs, action, noise = hyper.Agent(3, 2, TINY), 5 + 9 * torch.randn(50, 3), torch.rand(50, 2), torch.randn(50, 2)
    raw = agent.actor(obs, noise), agent.critic(obs, action), agent.actor.act(obs[0].numpy())
    for network in (agent.actor, agent.critic):
        torch.testing.assert_close(network.normalise(obs), obs)  # nothing before a fit
        network.normalise.fit(obs)
    outside = obs * obs.std(0, correction=0) + obs.mean(0)  # standardised, it is obs again
    torch.testing.assert_close(agent.actor(outside, noise), raw[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(agent.critic(outside, action), raw[1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(agent.actor.act(outside[0].numpy()), raw[2], atol=1e-4)


def test_a_constant_input_is_only_centred():
    normalise = hyper.Normaliser(2)
    normalise.fit(torch.tensor([[3.0, 1.0], [3.0, 2.0]]))
    torch.testing.assert_close(normalise(torch.tensor([[4.0, 1.0]])), torch.tensor([[1.0, -1.0]]))


def test_reward_in_bfloat16_is_close_and_only_with_its_flag():
    torch.manual_seed(0)
    cost = hyper.Cost(2, 1, TINY)
    obs, action = torch.randn(500, 2), torch.rand(500, 1)
    exact = cost.reward(obs, action)
    cost.bf16 = True
    rounded = cost.reward(obs, action)
    assert rounded.dtype == torch.float32 and 0 < (rounded - exact).abs().max() < 0.02


def test_cost_reductions_and_clamp():
    torch.manual_seed(0)
    x = torch.randn(20, 3) * 5
    members = hyper.Cost(2, 1, hyper.Args(cost_members=3)).net(x.expand(3, -1, -1)).squeeze(-1)
    for name, reduced in dict(min=members.amin(0), mean=members.mean(0), max=members.amax(0)).items():
        torch.manual_seed(0)
        torch.randn(20, 3)
        torch.testing.assert_close(hyper.Cost(2, 1, hyper.Args(cost_members=3, cost_reduce=name))(x), reduced)
    torch.manual_seed(0)
    torch.randn(20, 3)
    clamped = hyper.Cost(2, 1, hyper.Args(cost_members=3, cost_reduce="mean", cost_clamp=0.1))(x)
    torch.testing.assert_close(clamped, members.clamp(-0.1, 0.1).mean(0))


@pytest.mark.parametrize(
    "rounds,lr0,travel", [(100, 8e-4, 0.0099), (200, 8e-4, 0.0110), (150, 8e-4, 0.0105), (749, 8e-4, 0.0131), (100, 8e-3, 0.099)]
)
def test_published_cost_steps_follow_the_sign_with_harmonic_size(rounds, lr0, travel):
    """Step sizes lr0, lr0, lr0/2, lr0/3, ...: with one sign-like step each, a weight travels at most 2 lr0 (1 + H)."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer, moves = hyper.Adam([p], lr0, optimistic=True).double(), []
    for k in range(rounds):
        before = p.item()
        optimizer.restart()
        optimizer.lr.fill_(lr0 / max(1, k))
        optimizer.step([torch.full((1,), -0.7, dtype=torch.float64)])
        moves.append(p.item() - before)
    np.testing.assert_allclose(moves[:4], [2 * lr0, 2 * lr0, lr0, 2 * lr0 / 3], rtol=1e-5)
    assert p.item() == pytest.approx(2 * lr0 * (1 + sum(1 / k for k in range(1, rounds))), rel=1e-4)
    assert p.item() == pytest.approx(travel, rel=0.01)


# ------------------------------------------------------------------------------------------- policy
def rows_to_clone(batch: hyper.Batch, start: int, end: int) -> tuple[hyper.Batch, torch.Tensor]:
    """These rows of a batch, to be cloned by the mean action."""
    cloned = hyper.Batch(*(field[start:end] for field in batch))
    return cloned, torch.zeros_like(cloned.action)


def test_behaviour_cloning_pulls_the_mean_action_to_the_expert_rows_only():
    torch.manual_seed(0)
    obs, action = torch.randn(64, 3), torch.rand(64, 2) - 0.5
    batch = hyper.Batch(obs, action, torch.zeros(64), obs, torch.zeros(64))
    errors = {}
    for weight in (0.0, 1_000.0):
        args = hyper.Args(hidden_sizes=(64, 64), bc_weight=weight, actor_lr=3e-3)
        torch.manual_seed(1)
        agent = hyper.Agent(3, 2, args)
        for _ in range(300):
            hyper.sac_update(agent, batch, obs, torch.randn(2, 64, 2), args, *rows_to_clone(batch, 16, 48))
        error = (agent.actor(obs, torch.zeros(64, 2))[0] - action).square().mean(1)
        errors[weight] = error[16:48].mean().item(), torch.cat([error[:16], error[48:]]).mean().item()
    assert errors[1_000.0][0] < 0.01 < 0.05 < errors[0.0][0]
    assert errors[1_000.0][1] > 5 * errors[1_000.0][0]


def test_compiled_steps_agree_with_eager():
    """Of the policy with cloning, the model, and the cost, whose loss holds a gradient."""
    torch._dynamo.config.trace_autograd_ops = True
    torch.manual_seed(0)
    args = hyper.Args(hidden_sizes=(16, 16), model_hidden_sizes=(16, 16), bc_weight=10.0)
    agent, dynamics, cost = hyper.Agent(3, 2, args), hyper.EnsembleDynamics(3, 2, args), hyper.Cost(3, 2, args)
    pairs = [(part, copy.deepcopy(part)) for part in (agent, dynamics, cost)]
    update_agent, update_dynamics, update_cost = (
        torch.compile(f, dynamic=False) for f in (hyper.sac_update, hyper.dynamics_update, hyper.cost_update)
    )
    optimizers = [[hyper.Adam(part.parameters(), 1e-3, 5e-5) for part in pair] for pair in pairs[1:]]
    for _ in range(10):
        obs, action, noise = torch.randn(32, 3), torch.rand(32, 2) - 0.5, torch.randn(2, 32, 2)
        batch = hyper.Batch(obs, action, torch.randn(32), torch.randn(32, 3), torch.zeros(32))
        for part, update in zip(pairs[0], (hyper.sac_update, update_agent), strict=True):
            update(part, batch, obs, noise, args, *rows_to_clone(batch, 8, 16))
        inputs, targets, mix = torch.randn(7, 32, 5), torch.randn(7, 32, 3), torch.rand(32, 1)
        for part, optimizer, update in zip(pairs[1], optimizers[0], (hyper.dynamics_update, update_dynamics), strict=True):
            update(part, optimizer, inputs, targets, args)
        for part, optimizer, update in zip(pairs[2], optimizers[1], (hyper.cost_update, update_cost), strict=True):
            update(part, optimizer, inputs[0], inputs[1], mix, args)
    for eager, compiled in pairs:
        torch.testing.assert_close(dict(eager.named_parameters()), dict(compiled.named_parameters()), rtol=1e-4, atol=1e-5)
    assert not torch.equal(pairs[0][0].actor.net.output.weight, hyper.Agent(3, 2, args).actor.net.output.weight)


def test_sac_update_without_cloning_is_the_one_of_sac():
    torch.manual_seed(0)
    ended = (torch.rand(32) < 0.5).float()
    batch = hyper.Batch(torch.randn(32, 3), torch.rand(32, 2) - 0.5, torch.randn(32), torch.randn(32, 3), ended)
    actor_obs, noise = torch.randn(32, 3), torch.randn(2, 32, 2)
    agent = hyper.Agent(3, 2, TINY)
    other = copy.deepcopy(agent)
    ours = hyper.sac_update(agent, batch, actor_obs, noise, TINY, *rows_to_clone(batch, 0, 0))
    theirs = sac.sac_update(other, batch, actor_obs, noise, TINY)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(torch.equal(p, q) for p, q in zip(agent.parameters(), other.parameters(), strict=True))


# ------------------------------------------------------------------------------------------- dynamics
@pytest.mark.parametrize("raw,bounded", [(-30, -10), (-5, -4.997336), (0, -0.474004), (30, 0.500028)])
def test_log_variance_bounds(raw, bounded):
    model = hyper.EnsembleDynamics(2, 1, TINY)
    model.net.output.weight.data.zero_()
    model.net.output.bias.data.fill_(raw)
    _, log_var = model(torch.randn(7, 4, 3))
    torch.testing.assert_close(log_var, torch.full_like(log_var, bounded), atol=2e-6, rtol=0)


def test_mean_clamp_and_normaliser():
    model = hyper.EnsembleDynamics(2, 1, replace(TINY, model_mean_clamp=0.05))
    assert model(torch.randn(7, 50, 3) * 10)[0].abs().max() <= 0.05
    inputs = torch.randn(100, 3) * torch.tensor([1e3, 1.0, 0.0]) + torch.tensor([1e5, 0.0, 2.0])
    model.set_normaliser(inputs, torch.randn(100, 2))
    torch.testing.assert_close(model.input_mean, inputs.double().mean(0).float())
    torch.testing.assert_close(model.input_std[:2], inputs.double().std(0)[:2].float())
    assert model.input_std[2] == 1  # a constant input is not divided by zero


def test_nll_gradient_against_finite_differences():
    torch.manual_seed(0)
    model = hyper.EnsembleDynamics(2, 1, TINY).double()
    inputs, targets = torch.randn(7, 5, 3).double(), torch.randn(7, 5, 2).double()

    def nll() -> torch.Tensor:
        mean, log_var = model(inputs)
        gaussian = torch.distributions.Normal(mean, (0.5 * log_var).exp())
        return (-2 * gaussian.log_prob(targets) - math.log(2 * math.pi)).mean((1, 2)).sum()

    catch = Catch(model)
    assert hyper.dynamics_update(model, catch, inputs, targets, TINY).item() == pytest.approx(nll().item() / 7, rel=1e-6)
    for p, grad in zip(catch.params, catch.grads, strict=True):
        index = int(torch.randint(p.numel(), ()))
        with torch.no_grad():
            flat, step = p.view(-1), 1e-5
            flat[index] += step
            up = nll().item()
            flat[index] -= 2 * step
            down = nll().item()
            flat[index] += step
        assert grad.flatten()[index].item() == pytest.approx((up - down) / (2 * step), rel=2e-3, abs=1e-5)


def fit_and_watch(n=200, weights=None, **settings):
    """Fits rows whose first input is their number; returns the rows of each epoch's minibatches and the held-out ones."""
    args = replace(TINY, **settings)
    torch.manual_seed(0)
    model = hyper.EnsembleDynamics(1, 1, args)
    number = torch.arange(n, dtype=torch.float32)
    batch = hyper.Batch(number[:, None], torch.zeros(n, 1), torch.zeros(n), number[:, None] + 1, torch.zeros(n))
    seen, held_out, forward = [], set(), model.forward

    def watch(model, optimizer, inputs, targets, args):
        seen.append(inputs[..., 0].long())
        return torch.tensor(0.0)

    def watched_forward(inputs):  # the fit itself calls the model only to validate
        held_out.update(inputs[..., 0].long().flatten().tolist())
        return forward(inputs)

    model.forward = watched_forward
    optimizer = hyper.Adam(model.parameters(), 1e-3)
    hyper.fit_dynamics(model, optimizer, watch, batch, torch.ones(n) if weights is None else weights, 0, args, generator())
    epochs = torch.cat(seen, 1).split(n - n // 5, 1)
    return epochs, held_out


def test_bootstrap_has_63_percent_unique_rows_and_never_the_held_out_ones():
    epochs, held_out = fit_and_watch(n=5000, model_patience=3)
    assert len(epochs) == 3  # nothing improves: patience ends the fit
    unique = [set(member.tolist()) for member in epochs[0]]
    np.testing.assert_allclose([len(u) / 4000 for u in unique], 1 - math.exp(-1), atol=0.02)
    for later in epochs[1:]:
        for member, first in zip(later, unique, strict=True):
            assert set(member.tolist()) == first  # fixed for the call
    assert len(held_out) == 1000 and not set.union(*unique) & held_out
    assert unique[0] != unique[1]


def test_bootstrap_follows_the_weights():
    weights = torch.cat([torch.full((4000,), 1 / 4000), torch.full((1000,), 1 / 1000)])
    epochs, _ = fit_and_watch(n=5000, weights=weights, model_patience=1)
    assert (epochs[0] >= 4000).float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_fit_keeps_the_last_epoch_that_improved_and_ranks_elites():
    args = replace(TINY, model_patience=2)
    torch.manual_seed(0)
    model = hyper.EnsembleDynamics(1, 1, args)
    x = torch.randn(100, 1)
    batch = hyper.Batch(x, torch.zeros(100, 1), torch.zeros(100), x + 1, torch.zeros(100))
    calls = []

    def script(model, optimizer, inputs, targets, args):
        """Member m predicts a change of good[m] in the first epoch, and nonsense afterwards."""
        calls.append(1)
        good = torch.tensor([0.2, 0.9, 0.5, 0.8, 0.1, 1.0, 0.7]) if len(calls) <= 2 else torch.full((7,), 50.0)
        model.net.output.weight.data.zero_()
        model.net.output.bias.data[:, 0, 0] = good
        return torch.tensor(0.0)

    logged = hyper.fit_dynamics(model, None, script, batch, torch.ones(100), 0, args, generator())
    assert logged["model/batches"] == 6  # 2 whole minibatches an epoch, one good epoch and two without improvement
    torch.testing.assert_close(model.net.output.bias[:, 0, 0].detach(), torch.tensor([0.2, 0.9, 0.5, 0.8, 0.1, 1.0, 0.7]))
    assert model.elites.tolist() == [5, 1, 3, 6, 2]  # errors 0, .01, .04, .09, .25


def test_a_fit_goes_on_only_while_a_member_beats_its_own_best_by_one_percent():
    """Epoch 1 improves member 0; epoch 2 member 1, while 0 falls back; epoch 3 member 0 by 0.5% of its best: that ends it."""
    torch.manual_seed(0)
    args = replace(TINY, model_patience=1)
    model = hyper.EnsembleDynamics(1, 1, args)
    model.net.output.weight.data.zero_()
    model.net.output.bias.data.zero_()  # every member's error is 1
    x, calls = torch.randn(100, 1), []
    batch = hyper.Batch(x, torch.zeros(100, 1), torch.zeros(100), x + 1, torch.zeros(100))
    errors = [(0.25, 1.0), (1.0, 0.25), (0.25 * 0.995, 0.25), (0.01, 0.01)]

    def script(model, optimizer, inputs, targets, args):
        for member, error in enumerate(errors[len(calls) // 2]):
            model.net.output.bias.data[member, 0, 0] = 1 - math.sqrt(error)
        calls.append(1)
        return torch.tensor(0.0)

    logged = hyper.fit_dynamics(model, None, script, batch, torch.ones(100), 0, args, generator())
    assert logged["model/batches"] == 6 and logged["model/hold_out_mse"] == pytest.approx(5.5 / 7, rel=1e-4)
    torch.testing.assert_close(model.net.output.bias[:2, 0, 0].detach(), torch.tensor([0.0, 0.5]))
    assert set(model.elites[:2].tolist()) == {0, 1}


def test_a_limit_on_minibatches_holds():
    torch.manual_seed(0)
    x = torch.randn(500, 1)
    batch = hyper.Batch(x, torch.zeros(500, 1), torch.zeros(500), x + 1, torch.zeros(500))
    model = hyper.EnsembleDynamics(1, 1, TINY)
    optimizer = hyper.Adam(model.parameters(), 1e-3)
    logged = hyper.fit_dynamics(model, optimizer, hyper.dynamics_update, batch, torch.ones(500), 20, TINY, generator())
    assert logged["model/batches"] == 20 and optimizer.steps.item() == 20


def test_fit_learns_dynamics():
    torch.manual_seed(0)
    args = replace(TINY, model_hidden_sizes=(32, 32), model_weight_decay=0.0)
    obs, action = torch.randn(2000, 2), torch.rand(2000, 1) * 2 - 1
    batch = hyper.Batch(obs, action, torch.zeros(2000), obs + torch.cat([action, obs[:, :1].tanh()], -1), torch.zeros(2000))
    model = hyper.EnsembleDynamics(2, 1, args)
    logged = hyper.fit_dynamics(
        model, hyper.Adam(model.parameters(), 3e-3), hyper.dynamics_update, batch, torch.ones(2000), 600, args, generator()
    )
    assert logged["model/hold_out_mse"] < 0.01  # the change has variance 0.36


def test_ts1_deals_equal_parts_to_the_elites_and_restores_the_order():
    model = hyper.EnsembleDynamics(2, 1, TINY)
    model.elites = torch.tensor([6, 0, 3, 2, 5])

    def own_input(inputs):  # next_obs = 2 obs + the place of the elite in the third decimal
        mean = inputs[..., :2] + 1e-3 * torch.arange(5.0)[:, None, None]
        return mean, torch.full_like(mean, -torch.inf)

    model.forward_elites = own_input
    obs = torch.arange(200.0).view(100, 2)
    who = (model.sample(obs, torch.zeros(100, 1), generator()) - 2 * obs) * 1e3
    assert (who[:, 0] - who[:, 1]).abs().max() < 0.1
    dealt, again = (((model.sample(obs, torch.zeros(100, 1), generator(seed)) - 2 * obs)[:, 0] * 1e3).round().long() for seed in (0, 1))
    assert torch.bincount(dealt).tolist() == [20] * 5
    assert not torch.equal(dealt, dealt.sort().values) and not torch.equal(dealt, again)  # at random
    for n in (1, 3, 98, 101):
        who = (model.sample(obs[:1].expand(n, -1), torch.zeros(n, 1), generator()) - 2 * obs[:1]) * 1e3
        counts = torch.bincount(who[:, 0].round().long(), minlength=5)
        assert counts.sum() == n and counts.max() <= -(-n // 5)


def test_a_sampled_step_has_the_members_mean_and_variance():
    model = hyper.EnsembleDynamics(1, 1, TINY)
    model.forward_elites = lambda inputs: (inputs[..., :1] + 0.5, torch.full_like(inputs[..., :1], 2 * math.log(0.3)))
    obs, action = torch.ones(20_000, 1), torch.zeros(20_000, 1)
    drawn = model.sample(obs, action, generator())
    assert (drawn.mean().item(), drawn.std().item()) == (pytest.approx(2.5, abs=0.01), pytest.approx(0.3, abs=0.01))
    assert torch.equal(model.sample(obs, action, generator(), noise=False), torch.full_like(obs, 2.5))


def test_elites_alone_give_the_same_as_the_whole_ensemble():
    torch.manual_seed(0)
    model = hyper.EnsembleDynamics(2, 1, TINY)
    model.elites = torch.tensor([6, 0, 3, 2, 5])
    x = torch.randn(5, 4, 3)
    full = torch.zeros(7, 4, 3)
    full[model.elites] = x
    for mine, all_members in zip(model.forward_elites(x), model(full), strict=True):
        torch.testing.assert_close(mine, all_members[model.elites])


def test_model_error_of_known_models():
    obs = torch.arange(12.0)[:, None]
    batch = hyper.Batch(obs[:-1], torch.zeros(11, 1), torch.zeros(11), obs[1:], torch.zeros(11))
    model = hyper.EnsembleDynamics(1, 1, TINY)
    model.forward_elites = lambda inputs: (torch.full_like(inputs[..., :1], 1.0), None)
    assert hyper.model_error(model, batch, 3) == pytest.approx(0, abs=1e-6)
    model.forward_elites = lambda inputs: (torch.full_like(inputs[..., :1], 1.5), None)
    assert hyper.model_error(model, batch, 3) == pytest.approx(1.5 / batch.obs.std().item(), rel=1e-5)
    cut = batch._replace(next_obs=batch.next_obs + (torch.arange(11) % 2)[:, None])  # no two consecutive transitions
    assert math.isnan(hyper.model_error(model, cut, 3))


# ------------------------------------------------------------------------------------------- rollouts
def test_rollout_lengths_of_the_published_schedules():
    lengths = {e: hyper.rollout_length((20, 100, 1, 25), e) for e in range(1, 151)}
    assert [lengths[e] for e in (1, 23, 24, 30, 40, 50, 60, 80, 100, 150)] == [1, 1, 2, 4, 7, 10, 13, 19, 25, 25]
    humanoid = {e: hyper.rollout_length((20, 300, 1, 25), e) for e in range(1, 151)}
    assert [humanoid[e] for e in (31, 32, 60, 100, 150)] == [1, 2, 4, 7, 12]
    assert round(sum(lengths.values()) * 400e3 / 1e6) == 914 and round(sum(humanoid.values()) * 400e3 / 1e6) == 327


class Drift:
    """A model that moves every observation by the action."""

    def sample(self, obs, action, generator, noise):
        return obs + action

    def disagreement(self, obs, action):
        return torch.full((len(obs),), 0.5)


def test_no_terminated_imagined_trajectory_goes_on():
    actor = hyper.Actor(1, 1, (8,))
    start = torch.linspace(-2, 2, 41)[:, None]
    ends = lambda obs, action, next_obs: next_obs[:, 0].abs() > 1  # noqa: E731
    args = replace(TINY, pessimism_coef=2.0)
    rows = hyper.imagine(Drift(), actor, start, 4, ends, args, generator())
    batch = hyper.ReplayBuffer(1, 1, 1, torch.device("cpu")).split(rows)
    assert 41 < len(rows) < 4 * 41
    torch.testing.assert_close(batch.terminated, (batch.next_obs[:, 0].abs() > 1).float())
    assert (batch.obs[41:, 0].abs() <= 1).all()  # later steps start where nothing ended
    assert set(batch.obs[41:, 0].tolist()) <= set(batch.next_obs[batch.terminated == 0][:, 0].tolist())
    assert batch.reward.unique().item() == pytest.approx(-1.0)  # minus pessimism x disagreement


def test_what_the_model_makes_infinite_is_dropped():
    class Explodes(Drift):
        def sample(self, obs, action, generator, noise):
            return torch.where(obs > 0, torch.inf, obs + action)

    never = lambda obs, action, next_obs: hyper.never_terminates(next_obs)  # noqa: E731
    rows = hyper.imagine(Explodes(), hyper.Actor(1, 1, (8,)), torch.tensor([[-3.0], [3.0]]), 2, never, TINY, generator())
    assert rows.isfinite().all() and 1 <= len(rows) <= 2


ROBOTS = [f"{robot}-v{v}" for robot in ("Hopper", "Walker2d", "Ant", "Humanoid", "HalfCheetah", "InvertedPendulum") for v in (4, 5)]


@pytest.mark.parametrize("env_id", ROBOTS)
def test_termination_rules_agree_with_the_environment(env_id):
    rule = hyper.termination_rule(hyper.Args(env_id=env_id))
    env = hyper.make_env(env_id)
    env.action_space.seed(0)
    ended, truth, predicted = 0, [], []
    env.reset(seed=0)
    for _ in range(1500):
        next_obs, _, terminated, truncated, _ = env.step(env.action_space.sample())
        x = torch.as_tensor(next_obs, dtype=torch.float32)[None]
        truth.append(terminated)
        predicted.append(bool(rule(None, None, x)))
        ended += terminated
        if terminated or truncated:
            env.reset()
    # float32 may flip a value that stands exactly on the bound
    assert sum(a != b for a, b in zip(truth, predicted, strict=True)) == 0
    assert ended > 5 or env_id.startswith(("HalfCheetah", "Ant"))


@pytest.mark.parametrize("env_id,bad", [("Hopper-v4", 5), ("Ant-v4", 3), ("Humanoid-v4", 3)])
def test_not_a_number_ends_an_imagined_episode(env_id, bad):
    rule = hyper.termination_rule(hyper.Args(env_id=env_id))
    obs = torch.zeros(1, hyper.make_env(env_id).observation_space.shape[0])
    obs[0, 0] = {"Hopper-v4": 1.2, "Ant-v4": 0.7, "Humanoid-v4": 1.3}[env_id]
    assert not rule(None, None, obs)
    obs[0, bad] = torch.nan
    assert rule(None, None, obs)


def test_ant_ends_when_it_jumps_or_lies():
    rule = hyper.termination_rule(hyper.Args(env_id="Ant-v4"))
    obs = torch.zeros(4, 27)
    obs[:, 0] = torch.tensor([0.1, 0.3, 0.9, 1.1])
    assert rule(None, None, obs).tolist() == [True, False, False, True]


def test_learned_termination_finds_the_rule():
    torch.manual_seed(0)
    net = hyper.LearnedTermination(2, TINY)
    next_obs = torch.randn(4000, 2) * 3 + 1
    ends = (next_obs[:, 0] > 3).float()
    net.fit(hyper.Batch(next_obs, next_obs, ends, next_obs, ends), 400, generator())
    fresh = torch.randn(1000, 2) * 3 + 1
    assert ((net(fresh) > 0) == (fresh[:, 0] > 3)).float().mean() > 0.97


# ------------------------------------------------------------------------------------------- demonstrations
def test_bundled_demonstrations_load_in_the_learners_units():
    env = hyper.make_env("Hopper-v4")
    rows, expert_return = hyper.load_demos("demos/Hopper-v4.npz", "Hopper-v4", env, 10)
    raw = np.load("demos/Hopper-v4.npz")
    batch = hyper.ReplayBuffer(1, 11, 3, torch.device("cpu")).split(rows)
    assert len(rows) == 10_000 and expert_return == pytest.approx(raw["rewards"].sum() / 10, rel=1e-5)
    assert (batch.reward == 0).all() and batch.terminated.sum() == 0 and raw["truncations"].sum() == 10
    np.testing.assert_allclose(batch.action, raw["actions"], atol=2e-6)
    few, _ = hyper.load_demos("demos/Hopper-v4.npz", "Hopper-v4", env, 3)
    assert len(few) == 3000


def test_demo_actions_round_trip_between_units(tmp_path):
    """A demonstrated Humanoid action in +-0.4 becomes one in +-1, and executing that gives the demonstrated one."""
    env = hyper.make_env("Humanoid-v4")
    actions = np.random.default_rng(0).uniform(-0.4, 0.4, (3, 17)).astype(np.float32)
    obs, ends = np.zeros((3, 45), np.float32), np.array([0, 0, 1], np.float32)
    path = tmp_path / "humanoid.npz"
    np.savez(path, observations=obs, actions=actions, rewards=ends, next_observations=obs, terminations=ends * 0, truncations=ends)
    rows, _ = hyper.load_demos(str(path), "Humanoid-v4", env, 1)
    ours = rows[:, 45 : 45 + 17].numpy()
    np.testing.assert_allclose(ours, actions / 0.4, atol=1e-5)
    np.testing.assert_allclose(env.action(ours[1]), actions[1], atol=1e-6)


def test_paper_preset_is_the_published_table():
    columns = (
        "hidden_sizes actor_lr critic_lr autotune alpha target_entropy updates_per_step update_every model_hidden_sizes model_mean_clamp "
    )
    columns += "model_cosine lr_sawtooth cost_every cost_clamp cost_weight_decay rollout_schedule p_tremble"
    walker = [(1024,) * 2, 1e-4, 1e-4, False, 0.2, None, 20, 2, (200,) * 4, 40, 30_000, 10_000, 1_000, 40, 5e-5, (20, 100, 1, 25), 0.01]
    table = {
        "Hopper": [(512,) * 2, 3e-4, 3e-4, True, 1.0, 1.0, 30, 1, (400,) * 4, 0, 0, 0, 1_000, 0, 0, (20, 100, 1, 25), 0.01],
        "Walker2d": walker,
        "HalfCheetah": walker,
        "Ant": [(1024,) * 2, 1e-4, 1e-4, False, 0.2, None, 30, 1, (400,) * 4, 40, 0, 0, 200, 40, 5e-5, (20, 100, 1, 25), 0.01],
        "Humanoid": [(1024,) * 2, 1e-4, 1e-4, True, 1.0, -1.42, 20, 2, (400,) * 4, 0, 0, 10_000, 1_000, 0, 0, (20, 300, 1, 25), 0.025],
    }
    common = dict(
        num_demos=64, total_train_steps=151_000, initial_steps=1_000, reset_every=1_000, gamma=0.99, tau=0.005, target_update_every=4,
        batch_size=256, real_share=0, expert_share=0, bc_weight=0, optimistic=True, independent_actor_batch=True, critic_layer_norm=False,
        actor_average=0, lr_decay=0, model_members=7, model_elites=5, model_lr=3e-4, model_weight_decay=5e-5, model_batch_size=256,
        model_every=125, model_patience=10, model_first_batches=0, model_max_batches=0, model_data="hybrid", hybrid_size=150_000,
        expert_start_prob=0.5, start_coin="call", rollout_noise=True, rollouts_per_step=400, rollout_retain=1, pessimism_coef=0,
        cost_loss="moment", cost_data="rollout", cost_episodes=4, cost_batch_size=4_096, cost_lr=8e-4, cost_restart=True,
        normalise_obs=False, cost_normalise=False, cost_gp_weight=10, cost_gp_target=0.4, cost_members=7, cost_reduce="min",
    )  # fmt: skip
    for robot, row in table.items():
        for v in (4, 5):
            args = hyper.parse_args(["--env-id", f"{robot}-v{v}", "--preset", "paper"])
            for name, value in [*zip(columns.split(), row, strict=True), *common.items()]:
                assert getattr(args, name) == value, (robot, name)


def test_default_preset_is_the_documented_table():
    cloning = dict(actor_average=5_000, bc_weight=1_000, rollout_schedule=(0, 1, 1, 1), rollout_noise=False)
    own = {
        "Hopper": dict(total_timesteps=40_000, normalise_obs=False),
        "Walker2d": cloning,
        "HalfCheetah": cloning | dict(reset_every=250),
        "Ant": cloning | dict(reset_every=250, actor_lr=1e-4, normalise_obs=False),
        "Swimmer": {},
    }
    for robot, values in own.items():
        for v in (4, 5):
            args = hyper.parse_args(["--env-id", f"{robot}-v{v}", "--demos", "demos/Hopper-v4.npz"])
            expected = asdict(hyper.Args(env_id=f"{robot}-v{v}", demos="demos/Hopper-v4.npz", **values))
            assert asdict(args) == expected, robot


def test_entropy_target_in_environment_units_equals_ours():
    """HyPER's Humanoid target -17 is an entropy of actions scaled to 0.4; scaled to 1 it is -17 - 17 ln 0.4."""
    assert hyper.PRESETS["paper"]["Humanoid-v4"]["target_entropy"] == pytest.approx(-17 - 17 * math.log(0.4), abs=0.005)


def test_expert_truth_is_in_the_demos():
    """The bundled rows are real transitions: the simulator put at qpos, qvel gives next_observations."""
    raw, env = np.load("demos/Hopper-v4.npz"), gym.make("Hopper-v4")
    env.reset(seed=0)
    for i in (0, 17, 4321):
        env.unwrapped.set_state(raw["qpos"][i].astype(np.float64), raw["qvel"][i].astype(np.float64))
        obs, reward, *_ = env.step(raw["actions"][i])
        np.testing.assert_allclose(obs, raw["next_observations"][i], atol=2e-3)
        assert reward == pytest.approx(raw["rewards"][i], abs=2e-2)
