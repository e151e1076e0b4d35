"""That benchmark/speed.py compares like with like."""

import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import hyper
import sac
from benchmark import speed


class Done(Exception):
    """Raised at the end of a contender's first turn, after its 20 warm-up repetitions."""


def flops_of(contender, **arguments) -> float:
    """Floating point operations in matrix products of one repetition."""

    def turn():
        raise Done

    with FlopCounterMode(display=False) as counter, pytest.raises(Done):
        contender(turn, **arguments)
    return counter.get_total_flops() / 20


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setitem(os.environ, "SPEED_DEVICE", "cpu")


@pytest.mark.parametrize("robot", speed.SIZES)
def test_the_matrix_products_are_those_of_a_gradient_step(robot):
    assert flops_of(speed.matrix_products, robot=robot, width=32) == flops_of(speed.sac_ours, robot=robot, width=32, mode="eager")


def test_the_usual_sac_does_the_critics_weight_gradients_once_more():
    """Backward of the actor's loss goes through the critics' weights there. Its single outputs (7 products) are matrix products."""
    obs_dim, act_dim = speed.SIZES["Hopper"]
    more = 2 * ((obs_dim + act_dim) * 32 + 32 * 32 + 7 * 32)
    extra = flops_of(speed.sac_usual, robot="Hopper", width=32) - flops_of(speed.sac_ours, robot="Hopper", width=32, mode="eager")
    assert extra == 2 * speed.BATCH * more


def test_the_usual_ensemble_does_the_same_products_and_has_the_same_loss():
    ours = flops_of(speed.ensemble_ours, robot="Hopper", width=16, mode="eager")
    assert ours == flops_of(speed.ensemble_usual, robot="Hopper", width=16)
    torch.manual_seed(0)
    args = hyper.Args(model_hidden_sizes=(16,) * 4)
    dynamics, (members, optimizers) = hyper.EnsembleDynamics(3, 2, args), speed.usual_ensemble(3, 2, args)
    for i, member in enumerate(members):
        for a, b in zip([*dynamics.net.hidden, dynamics.net.output], member[::2], strict=True):
            b.weight.data.copy_(a.weight[i].T)
            b.bias.data.copy_(a.bias[i, 0])
    inputs, targets = torch.randn(7, 8, 5), torch.randn(7, 8, 3)
    optimizer = hyper.Adam(dynamics.parameters(), args.model_lr, args.model_weight_decay)
    last = speed.usual_ensemble_update(members, optimizers, inputs, targets)
    mean, log_var = dynamics(inputs)
    assert float(last) == pytest.approx(float(((mean - targets) ** 2 * (-log_var).exp() + log_var)[-1].mean()), rel=1e-5)
    hyper.dynamics_update(dynamics, optimizer, inputs, targets, args)
    for i, member in enumerate(members):
        apart = (member[0].weight - dynamics.net.hidden[0].weight[i].T).abs()  # our Adam's epsilon differs for tiny gradients
        assert apart.median() < 0.02 * args.model_lr


def test_the_usual_sac_step_is_ours():
    """With the same weights, batch and step sizes, both move the critics to the same place."""
    torch.manual_seed(0)
    args = sac.Args(hidden_sizes=(16, 16), alpha=1.0)
    ours, theirs = sac.Agent(3, 2, args), speed.usual_agent(3, 2, (16, 16))
    for source, target, i in [(ours.actor, theirs.net, 0), *((ours.critic, q, i) for i, q in enumerate((theirs.q1, theirs.q2)))]:
        for a, b in zip([*source.net.hidden, source.net.output], target[::2], strict=True):
            b.weight.data.copy_(a.weight[i].T)
            b.bias.data.copy_(a.bias[i, 0])
    obs, next_obs, action = torch.randn(64, 3), torch.randn(64, 3), torch.rand(64, 2)
    batch = sac.Batch(obs, action, torch.randn(64), next_obs, torch.ones(64))  # terminal: the noise of the target drops out
    sac.sac_update(ours, batch, obs, torch.zeros(2, 64, 2), args)
    theirs.update(obs, action, next_obs, batch.reward[:, None], batch.terminated[:, None])
    for i, q in enumerate((theirs.q1, theirs.q2)):
        torch.testing.assert_close(q[0].weight, ours.critic.net.hidden[0].weight[i].T, rtol=1e-3, atol=1e-5)
