"""The maths of hyper.py, and with it of the blocks that model-based and imitation scripts share, by hand or by a second
method. What it shares with sac.py is tested there."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import hyper
import sac
from tests.conftest import POINT, ROOT

ARGS = hyper.Args(model_hidden_sizes=(8, 8), hidden_sizes=(8, 8), cost_hidden_sizes=(8, 8), model_batch_size=32)


def batch_of(n: int, obs_dim: int = 2, act_dim: int = 1, shift: float = 0.0) -> hyper.Batch:
    obs, actions = torch.randn(n, obs_dim) + shift, torch.rand(n, act_dim) * 2 - 1
    return hyper.Batch(obs, actions, torch.randn(n), torch.randn(n, obs_dim), (torch.rand(n) < 0.3).float())


# ----------------------------------------------------------------------------------------------- normalisation
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
    torch.testing.assert_close(
        normalise(torch.tensor([[4.0, 1, 0]])), torch.tensor([[1.0, -1, 0]])
    )  # constant: centred


def test_actor_and_critics_see_standardised_observations_and_raw_actions():
    torch.manual_seed(0)
    agent, noise = hyper.Agent(3, 2, ARGS), torch.randn(50, 2)
    obs, actions = 5 + 9 * torch.randn(50, 3), torch.rand(50, 2)
    raw = agent.actor.sample(obs, noise), agent.critic(obs, actions), agent.actor.act(obs[0].numpy(), True)
    for network in (agent.actor, agent.critic):
        network.normalise.fit(obs)
    outside = obs * obs.std(0, correction=0) + obs.mean(0)  # standardised, it is obs again
    torch.testing.assert_close(agent.actor.sample(outside, noise), raw[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(agent.critic(outside, actions), raw[1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(agent.actor.act(outside[0].numpy(), True), raw[2], atol=1e-4)


# -------------------------------------------------------------------------------------------------------- cost
def test_cost_loss_and_its_gradient_are_those_of_the_written_out_loss():
    torch.manual_seed(0)
    args = hyper.Args(cost_hidden_sizes=(8, 8), gp_coef=7.0, gp_target=0.4)
    cost, expert, learner, mix = hyper.Cost(2, 1, args).double(), batch_of(16), batch_of(16, shift=1), torch.rand(16, 1)
    expert, learner = (hyper.Batch(*(field.double() for field in data)) for data in (expert, learner))
    x, y = (torch.cat([data.obs, data.actions], -1) for data in (expert, learner))
    cost.normalise.fit(x, y)
    weights, biases = list(cost.net.weights), list(cost.net.biases)

    def f(inputs):
        h = (inputs - cost.normalise.mean) / cost.normalise.std if inputs is not between else inputs
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            h = torch.relu(h @ weight[0] + bias[0])
        return (h @ weights[-1][0] + biases[-1][0])[:, 0]

    between = mix * cost.normalise(x) + (1 - mix) * cost.normalise(y)
    between.requires_grad_()
    (slope,) = torch.autograd.grad(f(between).sum(), between, create_graph=True)
    logistic = -torch.log(1 - torch.sigmoid(f(x))).mean() - torch.log(torch.sigmoid(f(y))).mean()
    total = logistic + 7 * (slope.norm(dim=1) - 0.4).square().mean()
    ours = hyper.cost_loss(cost, expert, learner, mix, args)
    torch.testing.assert_close(ours, total)
    pairs = zip(*(torch.autograd.grad(loss, [*weights, *biases]) for loss in (ours, total)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("target", [0.4, 2.0])
def test_gradient_penalty_pulls_a_linear_cost_towards_its_target(target):
    args = hyper.Args(cost_hidden_sizes=(), gp_target=target, cost_lr=1e-2)
    cost, same = hyper.Cost(2, 1, args), batch_of(50)
    with torch.no_grad():
        cost.net.weights[0].copy_(torch.tensor([0.3, -1.2, 0.4])[None, :, None])  # of length 1.3
        cost.net.biases[0].zero_()
    inputs = torch.cat([same.obs, same.actions], -1)
    both = (F.softplus(cost(inputs)) + F.softplus(-cost(inputs))).mean().item()
    loss = hyper.cost_update(cost, same, same, torch.rand(50, 1), args)
    assert loss.item() == pytest.approx(both + 10 * (1.3 - target) ** 2, rel=1e-5)
    length = cost.net.weights[0].detach().norm().item()
    assert (length < 1.3) == (target < 1.3)


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
    inputs = cost.normalise(torch.cat([obs, actions], -1))
    f = torch.stack([cost(row) for row in inputs])
    torch.testing.assert_close(cost.reward(obs, actions), -torch.log(torch.sigmoid(f)).detach())
    with torch.no_grad():
        cost.net.biases[-1].fill_(-1e3)
    assert (cost.reward(obs, actions) == 10).all()  # at most
    cost.bf16 = True
    with torch.no_grad():
        cost.net.biases[-1].zero_()
    rounded = cost.reward(obs, actions)
    cost.bf16 = False
    assert rounded.dtype == torch.float32 and 0 < (rounded - cost.reward(obs, actions)).abs().max() < 0.1


def test_cost_starts_from_orthogonal_weights():
    weight = hyper.Cost(2, 1, hyper.Args()).net.weights[1][0]
    torch.testing.assert_close(weight @ weight.T, torch.eye(256), atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------ policy
def test_without_cloning_an_update_is_that_of_sac():
    torch.manual_seed(0)
    args = sac.Args(hidden_sizes=(8, 8), critic_layer_norm=True, alpha=ARGS.alpha, critic_lr=3e-4, alpha_lr=3e-4)
    ours, theirs, batch = hyper.Agent(3, 2, ARGS), sac.Agent(3, 2, args), batch_of(32, 3, 2)
    for name in ("actor", "critic", "target_critic"):
        getattr(theirs, name).net.load_state_dict(getattr(ours, name).net.state_dict())
    noise = torch.randn(2, 32, 2)
    a = hyper.sac_update(ours, batch, batch, noise, ARGS)
    b = sac.sac_update(theirs, sac.Batch(*batch), noise, args)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.equal(p, dict(ours.named_parameters())[name]) for name, p in theirs.named_parameters())


def test_cloning_adds_the_mean_actions_squared_error_to_the_actors_loss():
    torch.manual_seed(0)
    agent, batch, expert, noise = hyper.Agent(3, 2, ARGS), batch_of(32, 3, 2), batch_of(8, 3, 2), torch.randn(32, 2)
    plain, entropy = hyper.actor_loss(agent, batch, expert, noise, ARGS)
    cloned, _ = hyper.actor_loss(agent, batch, expert, noise, replace(ARGS, bc_coef=50.0))
    error = sum((a - agent.actor.act(o, True)) ** 2 for o, a in zip(*map(torch.Tensor.numpy, expert[:2]), strict=True))
    assert (cloned - plain).item() == pytest.approx(50 * error.sum() / 16, rel=1e-4)
    alpha_part = -agent.log_alpha.exp() * entropy
    actions, _ = agent.actor.sample(batch.obs, noise)
    torch.testing.assert_close(plain, alpha_part - agent.critic(batch.obs, actions).min(0).values.mean())


# ---------------------------------------------------------------------------------------------- dynamics model
@pytest.mark.parametrize("raw,bounded", [(-30, -10), (-5, -4.997336), (0, -0.474004), (30, 0.500028)])
def test_log_variance_stays_in_its_bounds(raw, bounded):
    model = hyper.EnsembleDynamics(2, 1, ARGS)
    model.net.weights[-1].data.zero_()
    model.net.biases[-1].data.fill_(raw)
    _, log_var = model(torch.randn(7, 4, 3))
    torch.testing.assert_close(log_var, torch.full_like(log_var, bounded), atol=2e-6, rtol=0)


def test_dynamics_loss_is_twice_the_negative_log_likelihood_and_its_gradient_that_of_finite_differences():
    torch.manual_seed(0)
    model = hyper.EnsembleDynamics(2, 1, ARGS).double()
    inputs, targets = torch.randn(7, 5, 3).double(), torch.randn(7, 5, 2).double()

    def nll() -> torch.Tensor:
        mean, log_var = model(inputs)
        gaussian = torch.distributions.Normal(mean, (0.5 * log_var).exp())
        return (-2 * gaussian.log_prob(targets) - math.log(2 * math.pi)).mean((1, 2)).sum()

    loss, params = hyper.dynamics_loss(model, inputs, targets, ARGS), list(model.net.parameters())
    assert loss.item() == pytest.approx(nll().item(), rel=1e-6)
    for param, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
        index, values = int(torch.randint(param.numel(), ())), []
        for shift in (1e-5, -1e-5):
            with torch.no_grad():
                param.view(-1)[index] += shift
                values.append(nll().item())
                param.view(-1)[index] -= shift
        assert grad.flatten()[index].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=2e-3, abs=1e-5)


def numbered(n: int) -> hyper.Batch:
    """Transitions whose observation is their number and whose next one is one more."""
    obs = torch.arange(n, dtype=torch.float32)[:, None]
    return hyper.Batch(obs, torch.zeros(n, 1), torch.zeros(n), obs + 1, torch.zeros(n))


def fit_and_watch(n: int, weights: torch.Tensor, patience: int) -> tuple[list[torch.Tensor], set[int]]:
    """Fits by an update that does nothing. Returns each epoch's rows [members, n], and the held-out ones."""
    torch.manual_seed(0)
    args = replace(ARGS, model_patience=patience)
    model, seen, held_out = hyper.EnsembleDynamics(1, 1, args), [], set()
    forward = model.forward

    def validation(inputs):  # the fit itself calls the model only to validate
        held_out.update(inputs[..., 0].long().flatten().tolist())
        return forward(inputs)

    model.forward = validation
    update = lambda model, inputs, targets, args: seen.append(inputs[..., 0].long())  # noqa: E731
    hyper.fit_dynamics(model, update, numbered(n), weights, 10**6, args)
    epoch = len(seen) // patience
    return [torch.cat(seen[i : i + epoch], 1) for i in range(0, len(seen), epoch)], held_out


def test_each_member_learns_from_its_own_bootstrap_and_never_from_held_out_rows():
    epochs, held_out = fit_and_watch(5_000, torch.ones(5_000), patience=3)
    assert len(epochs) == 3 and len(held_out) == 1_000  # nothing improves: patience ends the fit
    unique = [set(member.tolist()) for member in epochs[0]]
    np.testing.assert_allclose([len(rows) / 4_000 for rows in unique], 1 - math.exp(-1), atol=0.02)
    assert unique[0] != unique[1] and not set.union(*unique) & held_out
    for epoch in epochs[1:]:
        for member, first in zip(epoch, unique, strict=True):
            assert len(set(member.tolist()) ^ first) < 100  # the same rows, but for a cut last minibatch


def test_bootstraps_follow_the_weights():
    weights = torch.cat([torch.full((4_000,), 1 / 4_000), torch.full((1_000,), 1 / 1_000)])
    epochs, _ = fit_and_watch(5_000, weights, patience=1)
    assert (epochs[0] >= 4_000).float().mean().item() == pytest.approx(0.5, abs=0.03)


def scripted_fit(epochs: list[list[float]], patience: int) -> tuple[hyper.EnsembleDynamics, int, float]:
    """A fit in which member m predicts the change epochs[k][m], of a true 1, after epoch k of two minibatches."""
    torch.manual_seed(0)
    args, calls, x = replace(ARGS, model_patience=patience), [], torch.randn(100, 1)
    model = hyper.EnsembleDynamics(1, 1, args)
    model.net.weights[-1].data.zero_()

    def update(model, inputs, targets, args):
        model.net.biases[-1].data[:, 0, 0] = torch.tensor(epochs[len(calls) // 2])
        calls.append(1)

    data = hyper.Batch(x, torch.zeros(100, 1), torch.zeros(100), x + 1, torch.zeros(100))
    error = hyper.fit_dynamics(model, update, data, torch.ones(100), 10**6, args)
    return model, len(calls), error


def test_a_fit_keeps_the_last_epoch_that_improved_and_ranks_its_elites():
    good = [0.2, 0.9, 0.5, 0.8, 0.1, 1.0, 0.7]
    model, batches, error = scripted_fit([good, [50.0] * 7, [60.0] * 7], patience=2)
    assert batches == 6  # one good epoch and two without improvement
    torch.testing.assert_close(model.net.biases[-1][:, 0, 0].detach(), torch.tensor(good))
    assert model.elites.tolist() == [5, 1, 3, 6, 2]  # errors 0, .01, .04, .09, .25
    assert error == pytest.approx(np.mean([(1 - x) ** 2 for x in good]), rel=1e-4)


def test_a_fit_goes_on_only_while_a_member_beats_its_own_best_by_one_percent():
    """Epoch 1 improves member 0; epoch 2 member 1, while 0 falls back; epoch 3 member 0 by half a percent."""
    errors = [(0.25, 1.0), (1.0, 0.25), (0.25 * 0.995, 0.25), (0.01, 0.01)]
    epochs = [[1 - math.sqrt(a), 1 - math.sqrt(b), 0, 0, 0, 0, 0] for a, b in errors]
    model, batches, error = scripted_fit(epochs, patience=1)
    assert batches == 6 and error == pytest.approx(5.5 / 7, rel=1e-4)
    torch.testing.assert_close(model.net.biases[-1][:2, 0, 0].detach(), torch.tensor([0.0, 0.5]))
    assert set(model.elites[:2].tolist()) == {0, 1}


def test_a_fit_learns_and_keeps_to_its_minibatches():
    torch.manual_seed(0)
    args = replace(ARGS, model_hidden_sizes=(32, 32), model_lr=3e-3)
    obs, actions = torch.randn(2_000, 2) + 5, torch.rand(2_000, 1) * 2 - 1
    next_obs = obs + torch.cat([actions, (obs[:, :1] - 5).tanh()], -1)  # the change's variance is 0.36
    data = hyper.Batch(obs, actions, torch.zeros(2_000), next_obs, torch.zeros(2_000))
    model = hyper.EnsembleDynamics(2, 1, args)
    error = hyper.fit_dynamics(model, hyper.dynamics_update, data, torch.ones(2_000), 600, args)
    assert error < 0.02 and model.optimizer.t.item() <= 600
    torch.testing.assert_close(model.normalise.mean, torch.cat([obs, actions], -1).mean(0))
    model = hyper.EnsembleDynamics(2, 1, args)
    hyper.fit_dynamics(model, hyper.dynamics_update, data, torch.ones(2_000), 20, args)
    assert model.optimizer.t.item() == 20


def with_elites(forward) -> hyper.EnsembleDynamics:
    model = hyper.EnsembleDynamics(2, 1, ARGS)
    model.elites = torch.tensor([6, 0, 3, 2, 5])
    model.elites_forward = forward
    return model


def test_rows_are_shared_out_to_the_elites_in_equal_parts_at_random_and_come_back_in_order():
    def forward(inputs):  # next_obs = 2 obs + the elite's place in thousandths
        mean = inputs[..., :2] + 1e-3 * torch.arange(5.0)[:, None, None]
        return mean, torch.full_like(mean, -torch.inf)

    model, obs = with_elites(forward), torch.arange(200.0).view(100, 2)
    dealt = [((model.sample(obs, torch.zeros(100, 1), True) - 2 * obs) * 1e3).round().long() for _ in range(2)]
    assert torch.equal(dealt[0][:, 0], dealt[0][:, 1]) and torch.bincount(dealt[0][:, 0]).tolist() == [20] * 5
    assert not torch.equal(dealt[0], dealt[0].sort(0).values) and not torch.equal(*dealt)
    for n in (1, 3, 98, 101):
        who = (model.sample(obs[:1].expand(n, -1), torch.zeros(n, 1), True) - 2 * obs[:1]) * 1e3
        counts = torch.bincount(who[:, 0].round().long(), minlength=5)
        assert counts.sum() == n and counts.max() <= -(-n // 5)


def test_a_sampled_step_has_the_members_mean_and_deviation():
    torch.manual_seed(0)
    model = with_elites(lambda x: (x[..., :2] + 0.5, torch.full_like(x[..., :2], 2 * math.log(0.3))))
    obs, actions = torch.ones(10_000, 2), torch.zeros(10_000, 1)
    drawn = model.sample(obs, actions, noise=True)
    assert (drawn.mean().item(), drawn.std().item()) == (pytest.approx(2.5, abs=0.01), pytest.approx(0.3, abs=0.01))
    assert torch.equal(model.sample(obs, actions, noise=False), torch.full_like(obs, 2.5))


def test_elites_alone_predict_what_they_do_within_the_ensemble():
    torch.manual_seed(0)
    model, x = hyper.EnsembleDynamics(2, 1, ARGS), torch.randn(5, 4, 3)
    model.normalise.fit(torch.randn(50, 3) * 3 + 2)
    model.elites = torch.tensor([6, 0, 3, 2, 5])
    inputs = torch.zeros(7, 4, 3)
    inputs[model.elites] = x
    for alone, within in zip(model.elites_forward(x), model(inputs), strict=True):
        torch.testing.assert_close(alone, within[model.elites])


def test_model_error_of_known_models():
    data = numbered(11)
    model = with_elites(lambda inputs: (torch.full_like(inputs[..., :1], 1.0), None))
    assert hyper.model_error(model, data, 3) == pytest.approx(0, abs=1e-6)
    model.elites_forward = lambda inputs: (torch.full_like(inputs[..., :1], 1.5), None)
    assert hyper.model_error(model, data, 3) == pytest.approx(1.5 / data.obs.std().item(), rel=1e-5)
    broken = data._replace(next_obs=data.next_obs + (torch.arange(11) % 2)[:, None])  # no two in a row
    assert math.isnan(hyper.model_error(model, broken, 3))


# -------------------------------------------------------------------------------------------- imagined rollouts
def moved_by(step) -> SimpleNamespace:
    """A model whose next observation is step(obs, actions)."""
    return SimpleNamespace(sample=lambda obs, actions, noise: step(obs, actions))


def test_an_imagined_rollout_stops_where_it_ends():
    torch.manual_seed(0)
    ends = lambda next_obs: next_obs[:, 0].abs() > 1  # noqa: E731
    model, start = moved_by(lambda obs, actions: obs + actions), torch.linspace(-2, 2, 41)[:, None]
    data = hyper.imagine(model, hyper.Actor(1, 1, (8,)), start, 4, ends, ARGS)
    assert 41 < len(data.obs) < 4 * 41 and (data.rewards == 0).all()
    torch.testing.assert_close(data.next_obs, data.obs + data.actions)
    torch.testing.assert_close(data.terminations, (data.next_obs[:, 0].abs() > 1).float())
    assert torch.equal(data.obs[:41], start) and (data.obs[41:].abs() <= 1).all()
    assert set(data.obs[41:, 0].tolist()) <= set(data.next_obs[data.terminations == 0][:, 0].tolist())


def test_what_the_model_makes_infinite_is_dropped():
    model = moved_by(lambda obs, actions: torch.where(obs > 0, torch.inf, obs + actions))
    never, start = hyper.TERMINATION["HalfCheetah"], torch.tensor([[-9.0], [9.0]])
    data = hyper.imagine(model, hyper.Actor(1, 1, (8,)), start, 2, never, ARGS)
    assert all(field.isfinite().all() for field in data) and len(data.obs) == 2


@pytest.mark.parametrize("version", ["v4", "v5"])
@pytest.mark.parametrize("robot", ["Hopper", "Walker2d", "Ant", "Humanoid", "HalfCheetah"])
def test_termination_rules_agree_with_the_simulator(robot, version):
    env, rule = hyper.make_env(f"{robot}-{version}"), hyper.TERMINATION[robot]
    env.action_space.seed(0)
    env.reset(seed=0)
    ends = []
    for _ in range(1_000):
        next_obs, _, terminated, truncated, _ = env.step(env.action_space.sample())
        assert bool(rule(torch.from_numpy(next_obs)[None])) == terminated
        ends.append(terminated)
        if terminated or truncated:
            env.reset()
    assert sum(ends) > 5 or robot in ("HalfCheetah", "Ant")


@pytest.mark.parametrize("robot", ["Hopper", "Walker2d", "Ant", "Humanoid"])
def test_termination_rules_have_the_simulators_bounds(robot):
    env = gym.make(f"{robot}-v4").unwrapped
    dim, (low, high) = hyper.make_env(f"{robot}-v4").observation_space.shape[0], env._healthy_z_range

    def ends(height: float, angle: float = 0.0, last: float = 0.0) -> bool:
        obs = torch.zeros(1, dim)
        obs[0, 0], obs[0, 1], obs[0, -1] = height, angle, last
        return bool(hyper.TERMINATION[robot](obs))

    assert ends(low - 0.01) and not ends(low + 0.01) and ends(math.nan)
    assert high == math.inf or (ends(high + 0.01) and not ends(high - 0.01))
    if robot in ("Hopper", "Walker2d"):
        bound = env._healthy_angle_range[1]
        assert ends(1.3, bound + 0.01) and ends(1.3, -bound - 0.01) and not ends(1.3, bound - 0.01)
    assert ends(1.3, last=101.0) == (robot == "Hopper") or robot == "Ant"


# ---------------------------------------------------------------------------------------------- demonstrations
def test_bundled_demonstrations_load():
    path, env = str(ROOT / "demos" / "Hopper-v4.npz"), hyper.make_env("Hopper-v4")
    data, expert_return = hyper.load_demos(path, env, 10, "cpu")
    raw = np.load(path)
    assert len(data.obs) == 10_000 and expert_return == pytest.approx(raw["rewards"].sum() / 10, rel=1e-5)
    assert (data.rewards == 0).all() and data.terminations.sum() == 0
    np.testing.assert_allclose(data.actions, raw["actions"], atol=2e-6)
    few, expert_return = hyper.load_demos(path, env, 3, "cpu")
    assert torch.equal(few.next_obs, data.next_obs[:3_000])
    assert expert_return == pytest.approx(raw["rewards"][:3_000].sum() / 3, rel=1e-5)


def test_demonstrated_actions_are_those_that_the_environment_executes(tmp_path):
    """An action of a Humanoid in +-0.4 becomes one in +-1, and executing that gives the demonstrated one."""
    env, ends = hyper.make_env("Humanoid-v4"), np.array([0, 0, 1], np.float32)
    actions, obs = np.random.default_rng(0).uniform(-0.4, 0.4, (3, 17)).astype(np.float32), np.zeros((3, 45))
    columns = dict(observations=obs, next_observations=obs, actions=actions, rewards=ends)
    np.savez(tmp_path / "demos.npz", **columns, terminations=ends * 0, truncations=ends)
    data, _ = hyper.load_demos(str(tmp_path / "demos.npz"), env, 1, "cpu")
    np.testing.assert_allclose(data.actions, actions / 0.4, atol=1e-5)
    env.reset(seed=0)
    env.step(data.actions[1].numpy())
    np.testing.assert_allclose(env.unwrapped.data.ctrl, actions[1], atol=1e-6)


@pytest.mark.parametrize("path", sorted((ROOT / "demos").glob("*.npz")), ids=lambda path: path.stem)
def test_bundled_demonstrations_are_ten_whole_episodes_whose_rows_follow_each_other(path):
    data = np.load(path)
    obs, next_obs, last = data["observations"], data["next_observations"], data["truncations"] == 1
    assert last.sum() == 10 and last[999::1000].all() and not data["terminations"].any()
    np.testing.assert_array_equal(next_obs[~last], obs[1:][~last[:-1]])
    assert np.abs(data["actions"]).max() <= 1 and all(
        np.isfinite(data[name]).all() for name in data if name != "metadata"
    )


def test_bundled_transitions_are_the_simulators():
    """Put at qpos and qvel, it goes on to next_observations."""
    raw, env = np.load(ROOT / "demos" / "Hopper-v4.npz"), gym.make("Hopper-v4")
    env.reset(seed=0)
    for i in (0, 17, 4321):
        env.unwrapped.set_state(raw["qpos"][i].astype(np.float64), raw["qvel"][i].astype(np.float64))
        obs, reward, *_ = env.step(raw["actions"][i])
        np.testing.assert_allclose(obs, raw["next_observations"][i], atol=2e-3)
        assert reward == pytest.approx(raw["rewards"][i], abs=2e-2)


# ---------------------------------------------------------------------------------------------------- training
def rows_of(*fields: torch.Tensor) -> set[tuple]:
    return {tuple(row) for row in torch.cat(fields, -1).numpy().round(5).tolist()}


def train_and_watch(monkeypatch, tmp_path, demos, names: list[str], **settings) -> tuple[dict[str, list], dict]:
    """A short run on the point mass. Returns the inputs of each call of these functions, and the last checkpoint."""
    calls = {name: [] for name in names}
    for name in names:
        original = getattr(hyper, name)
        watch = lambda *inputs, n=name, f=original: [calls[n].append((*inputs, None)), f(*inputs)][1]  # noqa: E731
        monkeypatch.setattr(hyper, name, watch)
    small = dict(learning_starts=60, model_every=30, model_first_batches=20, model_batches=5, rollouts_per_step=4)
    small |= dict(batch_size=16, updates_per_step=2, num_demos=4, eval_every=10**6, eval_episodes=1, checkpoint_every=1)
    args = replace(
        ARGS, env_id=POINT, demos=demos, run_dir=str(tmp_path), **small | dict(total_timesteps=130) | settings
    )
    hyper.train(args)
    return calls, torch.load(tmp_path / "checkpoint.pt", weights_only=False)


def test_what_the_model_and_the_policy_learn_from(monkeypatch, tmp_path, demos):
    names = ["fit_dynamics", "imagine", "sac_update"]
    calls, state = train_and_watch(monkeypatch, tmp_path, demos, names, real_ratio=0.125, expert_ratio=0.5)
    expert, _ = hyper.load_demos(demos, hyper.make_env(POINT), 4, "cpu")
    learner, cost = state["buffer"].all(), state["cost"]
    of_expert, of_learner = (rows_of(data.obs, data.actions, data.next_obs) for data in (expert, learner))
    assert not of_expert & of_learner

    # Model: all learner and all expert transitions, with equal weight in total.
    fits = calls["fit_dynamics"]
    assert [len(data.obs) for _, _, data, *_ in fits] == [n + len(expert.obs) for n in (60, 90, 120)]
    for _, _, data, weights, *_ in fits:
        from_expert = torch.tensor([tuple(row) in rows_of(expert.obs) for row in data.obs.numpy().round(5).tolist()])
        assert from_expert.sum() == len(expert.obs)
        assert weights[from_expert].sum().item() == pytest.approx(weights[~from_expert].sum().item(), rel=1e-4)

    # Rollouts: from expert and learner states.
    for _, _, starts, length, *_ in calls["imagine"]:
        share = np.mean([tuple(row) in rows_of(expert.obs) for row in starts.numpy().round(5).tolist()])
        assert len(starts) == 4 * 30 and length == 1 and share == pytest.approx(0.5, abs=0.2)

    # Policy: the shares of a batch, in this order; the cloned transitions are the batch's expert ones.
    updates = calls["sac_update"]
    assert len(updates) == 2 * 71  # two for each step from the 60th on
    for _, batch, cloned, *_ in updates:
        assert torch.equal(cloned.obs, batch.obs[2:10]) and torch.equal(cloned.actions, batch.actions[2:10])
        fields = batch.obs, batch.actions, batch.next_obs
        assert rows_of(*(field[2:10] for field in fields)) <= of_expert
        assert not rows_of(*(field[10:] for field in fields)) & (of_expert | of_learner)
    last = updates[2 * (state["step"] - 60) - 1][1]
    assert rows_of(last.obs[:2], last.actions[:2], last.next_obs[:2]) <= of_learner
    assert not torch.allclose(last.rewards, torch.zeros(16)) and cost.reward(last.obs, last.actions).shape == (16,)


def test_model_data_of_the_learner_alone_and_starts_of_one_kind(monkeypatch, tmp_path, demos):
    settings = dict(model_data="learner", expert_start_prob=0.0)
    calls, _ = train_and_watch(monkeypatch, tmp_path, demos, ["fit_dynamics", "imagine"], **settings)
    expert, _ = hyper.load_demos(demos, hyper.make_env(POINT), 4, "cpu")
    assert [len(data.obs) for _, _, data, *_ in calls["fit_dynamics"]] == [60, 90, 120]
    assert not any(rows_of(starts) & rows_of(expert.obs) for _, _, starts, *_ in calls["imagine"])


def test_rewards_of_a_batch_are_the_current_costs(monkeypatch, tmp_path, demos):
    made, means, init, update = [], [], hyper.Cost.__init__, hyper.sac_update

    def checked(agent, batch, *rest):
        torch.testing.assert_close(batch.rewards, made[0].reward(batch.obs, batch.actions))
        means.append(batch.rewards.mean().item())
        return update(agent, batch, *rest)

    monkeypatch.setattr(hyper.Cost, "__init__", lambda self, *rest: [made.append(self), init(self, *rest)][1])
    monkeypatch.setattr(hyper, "sac_update", checked)
    train_and_watch(monkeypatch, tmp_path, demos, [], cost_lr=1e-2)
    assert len(means) == 2 * 71 and np.std(means) > 0.01  # the cost did change


def test_normalisers_are_fitted_to_expert_and_warm_up(monkeypatch, tmp_path, demos):
    _, state = train_and_watch(monkeypatch, tmp_path, demos, [], learning_starts=40)
    expert, _ = hyper.load_demos(demos, hyper.make_env(POINT), 4, "cpu")
    sources = expert, hyper.Batch(*(field[:40] for field in state["buffer"].all()))
    normalise = hyper.Normaliser(6)
    normalise.fit(*(torch.cat([data.obs, data.actions], -1) for data in sources))
    torch.testing.assert_close(state["cost"].normalise.mean, normalise.mean)
    torch.testing.assert_close(state["cost"].normalise.std, normalise.std)
    for name in ("actor", "ema_actor", "critic", "target_critic"):
        torch.testing.assert_close(getattr(state["agent"], name).normalise.mean, normalise.mean[:4])
        torch.testing.assert_close(getattr(state["agent"], name).normalise.std, normalise.std[:4])
    policy = torch.load(tmp_path / "policy.pt", weights_only=True)["actor"]
    torch.testing.assert_close(policy["normalise.std"], normalise.std[:4])


def test_the_evaluated_actor_is_an_average(monkeypatch, tmp_path, demos):
    """With weights 1 / min(ema_steps, 1 + t / 4) after training step t."""
    snapshots, update = [], hyper.sac_update

    def watched(agent, *inputs):
        metrics = update(agent, *inputs)
        snapshots.append(copy.deepcopy(list(agent.actor.parameters())))
        return metrics

    monkeypatch.setattr(hyper, "sac_update", watched)
    settings = dict(updates_per_step=1, actor_lr=0.03, ema_steps=3, total_timesteps=72)
    train_and_watch(monkeypatch, tmp_path, demos, [], **settings)
    average = snapshots[0]
    for t, weights in enumerate(snapshots):
        share = 1 / min(3, 1 + t / 4)
        average = [a + share * (w - a) for a, w in zip(average, weights, strict=True)]
    actor = hyper.Actor(4, 2, ARGS.hidden_sizes)
    actor.load_state_dict(torch.load(tmp_path / "policy.pt", weights_only=True)["actor"])
    torch.testing.assert_close(list(actor.parameters()), average, rtol=1e-4, atol=1e-6)
    assert not any(torch.equal(a, b) for a, b in zip(average, snapshots[-1], strict=True))


def test_rollouts_lengthen_episodes_are_cut_and_the_mean_acts_after_the_warm_up(monkeypatch, tmp_path, demos):
    update = dict.fromkeys(["losses/critic"], torch.tensor(0.0))
    monkeypatch.setattr(hyper, "sac_update", lambda *_: update)
    monkeypatch.setattr(hyper, "cost_update", lambda *_: torch.tensor(0.0))
    settings = dict(rollout_length=(1, 151), learning_starts=10, model_every=105, rollouts_per_step=1, reset_every=7)
    calls, state = train_and_watch(monkeypatch, tmp_path, demos, ["imagine"], total_timesteps=450, **settings)
    assert [length for _, _, _, length, *_ in calls["imagine"]] == [1, 2, 3, 4, 5]  # grows by 150 in 15,000 steps
    data = state["buffer"].all()
    ends = (data.next_obs[:-1] != data.obs[1:]).any(-1).nonzero()[:, 0] + 1
    assert set(range(10, len(data.obs), 7)) <= set(ends.tolist())
    means = state["agent"].actor(data.obs)[0].tanh().detach()  # it learned nothing
    torch.testing.assert_close(data.actions[10:], means[10:], rtol=1e-4, atol=1e-5)
    assert (data.actions - means)[:10].abs().min() > 1e-3  # sampled
