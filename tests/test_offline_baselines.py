"""offline_baselines.py against hand calculation or a second method."""

import copy
import math

import numpy as np
import pytest
import torch

import offline_baselines as ob
from tests import pointmass
from tests.conftest import POINT, run
from tests.test_sra import assert_gradients, record, transitions

EXPERT, OTHER = transitions(8, 1), transitions(8, 2)


def agent_and_args(algo: str, **settings):
    torch.manual_seed(0)
    args = ob.Args(device="cpu", algo=algo, hidden_sizes=(16, 16), **settings)
    agent = ob.BaselineAgent(4, 2, args)
    agent.actor.normalise.fit(2 * torch.randn(100, 4) + 1)
    return agent, args


def slope_at(function, points: torch.Tensor) -> torch.Tensor:
    points.requires_grad_()
    (slope,) = torch.autograd.grad(function(points).sum(), points, create_graph=True)
    return slope.square().sum(1)


def test_dwbc_steps_by_hand():
    """The outputs of policy and discriminator are constants to each other."""
    agent, _ = agent_and_args("dwbc")
    agent.discriminator.head.net.weights[-1].data *= 9
    agent.discriminator.head.net.biases[-1].data -= 1.4  # outputs on both sides of a half
    before = copy.deepcopy(agent)
    actor, discriminator = record(agent.actor_optimizer), record(agent.discriminator_optimizer)
    ob.dwbc_discriminator_update(agent, EXPERT, OTHER)
    agent.discriminator = before.discriminator
    ob.dwbc_update(agent, EXPERT, OTHER)
    each = [before.actor.log_prob(batch.obs, batch.actions) for batch in (EXPERT, OTHER)]
    pairs = [before.pairs(batch) for batch in (EXPERT, OTHER)]
    d = [before.discriminator(pair, lp.detach()) for pair, lp in zip(pairs, each, strict=True)]
    assert min(d[1]) < 0.4 < 0.6 < max(d[1]) and max(d[0]) - min(d[0]) > 0.3
    loss = ((1 - d[0]) / d[0]).log().mean() - 2 * (1 - d[1]).log().mean()
    assert_gradients(discriminator, loss, before.discriminator)
    d = d[0].detach(), torch.where(d[1] < 0.5, 0, d[1]).detach()
    loss = ((0.5 / (d[0] * (1 - d[0])) + 1 - 7.5) * each[0].sum(1)).mean()
    assert_gradients(actor, loss - ((1 / (1 - d[1]) - 1) * each[1].sum(1)).mean(), before.actor)


def test_otil_step_by_hand():
    agent, args = agent_and_args("otil", temperature=10.0)
    agent.target_critic.net.biases[-1].data += 0.5 - torch.arange(2.0)[:, None, None]
    agent.value.net.biases[-1].data -= 1
    batch, before = transitions(64, 1), copy.deepcopy(agent)
    value, critic, actor = map(record, (agent.value_optimizer, agent.critic_optimizer, agent.actor_optimizer))
    ob.otil_update(agent, batch, args)
    pairs, normalise = before.pairs(batch), before.actor.normalise
    u = before.target_critic(pairs).min(0).values - before.value(normalise(batch.obs))[0]
    assert_gradients(value, torch.where(u < 0, 0.3 * u**2, 0.7 * u**2).mean(), before.value)
    target = batch.rewards + (0.99 - 0.99 * batch.terminations) * before.value(normalise(batch.next_obs))[0].detach()
    assert_gradients(critic, sum(0.5 * ((q - target) ** 2).mean() for q in before.critic(pairs)), before.critic)
    weights = (10 * u.detach()).exp().clamp(max=100)
    assert weights.max() == 100 and weights.min() < 1
    assert_gradients(actor, -(weights * before.actor.log_prob(batch.obs, batch.actions).sum(1)).mean(), before.actor)


def test_demodice_step_by_hand():
    agent, args = agent_and_args("demodice")
    first, mix, before, normalise = torch.randn(8, 4), torch.rand(4, 8, 1), copy.deepcopy(agent), agent.actor.normalise
    discriminator, value, actor = map(
        record, (agent.discriminator_optimizer, agent.value_optimizer, agent.actor_optimizer)
    )
    ob.demodice_update(agent, EXPERT, OTHER, first, mix, args)

    def reward(net, pairs):
        return -torch.log(1 / (torch.sigmoid(net(pairs)[0]) + 1e-3) - 1 + 1e-3)

    expert, union, net = before.pairs(EXPERT), before.pairs(OTHER), before.discriminator
    points = mix[0] * expert + (1 - mix[0]) * union, mix[1] * union.roll(1, 0) + (1 - mix[1]) * union
    slopes = slope_at(lambda x: reward(net, x), torch.cat(points)).sqrt()
    loss = -torch.sigmoid(net(expert)).log().mean() - torch.sigmoid(-net(union)).log().mean()
    assert_gradients(discriminator, loss + 0.1 * (slopes - 1).square().mean(), net)

    obs, next_obs = normalise(OTHER.obs), normalise(OTHER.next_obs)
    rewards = reward(agent.discriminator, union).detach()  # after the discriminator's step
    advantages = rewards + 0.99 * before.value(next_obs)[0] - before.value(obs)[0]
    mixed = normalise(mix[2] * EXPERT.obs + (1 - mix[2]) * OTHER.obs)
    next_mixed = normalise(mix[3] * EXPERT.next_obs + (1 - mix[3]) * OTHER.next_obs)
    slopes = slope_at(before.value, torch.cat([obs, mixed, next_mixed]))
    loss = 0.01 * before.value(normalise(first)).mean() + 1.1 * torch.logsumexp(advantages / 1.1, 0)
    assert_gradients(value, loss + 1e-4 * slopes.mean(), before.value)
    weights = 8 * torch.softmax(advantages.detach() / 1.1, 0)
    assert_gradients(actor, -(weights * before.actor.log_prob(OTHER.obs, OTHER.actions).sum(1)).mean(), before.actor)


def test_sinkhorn_marginals_and_a_plan_by_hand():
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(ob.sinkhorn(rng.uniform(0, 0.2, (30, 40)), 40).sum(1), 1 / 40, rtol=1e-9)
    np.testing.assert_allclose(ob.sinkhorn(rng.uniform(0, 0.2, (40, 40)), 40).sum(0), 1 / 40, atol=1e-3)
    np.testing.assert_allclose(ob.sinkhorn(rng.uniform(0, 2, (2, 900)), 1_000).sum(1), 1e-3, rtol=1e-9)  # they drift
    plan, k = ob.sinkhorn(np.array([[0, 0.02], [0.02, 0]]), 2), math.exp(-2)  # the symmetric plan in closed form
    np.testing.assert_allclose(plan, np.array([[1, k], [k, 1]]) / (2 * (1 + k)), rtol=1e-6)


def test_transport_rewards_are_highest_for_the_experts_own_trajectory():
    angle = torch.linspace(0, 3, 20)
    expert, away = (torch.stack([a.cos(), a.sin()], 1) for a in (angle, angle + 2))
    rewards = ob.transport_rewards([expert, away], [away.flip(0) * 0.5 - 9, expert], 20)
    assert rewards[0].sum() > rewards[1].sum() + 5 and (rewards[0] <= 5).all() and rewards[0].mean() > 4.5
    episodes = [ob.Batch(obs, torch.zeros(20, 1), torch.zeros(20), obs, torch.zeros(20)) for obs in (expert, away)]
    labelled = ob.label_by_transport(episodes, episodes[:1], ob.Normaliser(2), 20)
    assert (labelled[0].rewards.sum() - labelled[1].rewards.sum()).item() == pytest.approx(1_000, rel=1e-4)


@pytest.mark.parametrize("algo,steps", [("otil", 1_500), ("demodice", 600)])
def test_it_learns(algo, steps, demos, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(pointmass, "expert", lambda obs: rng.uniform(-2, 2, 2))
    pointmass.write_demos(tmp_path / "random.npz", episodes=20)
    words = f"--algo {algo} --env-id {POINT} --demos {demos} --offline-data random.npz --hidden-sizes 32 32 --lr 3e-3"
    words += f" --batch-size 64 --gamma 0.9 --total-timesteps {steps} --eval-every {steps} --eval-episodes 5"
    first, last = (float(row["eval_return_mean"]) for row in run("offline_baselines", words, tmp_path))
    assert first < 10 and last > 29
