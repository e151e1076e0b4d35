"""That benchmark/speed.py compares like with like."""

import json
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
    for bf16 in (False, True):
        products = flops_of(speed.sac_products, robot=robot, width=32, bf16=bf16)
        assert products == flops_of(speed.sac_ours, robot=robot, width=32, mode="eager")
        products = flops_of(speed.ensemble_products, robot=robot, width=32, bf16=bf16)
        assert products == flops_of(speed.ensemble_ours, robot=robot, width=32, mode="eager")


def test_the_usual_sac_does_the_critics_weight_gradients_once_more():
    """Backward of the actor's loss goes through the critics' weights there. Its single outputs (7 products) are matrix products."""
    obs_dim, act_dim = speed.SIZES["Hopper"]
    more = 2 * ((obs_dim + act_dim) * 32 + 32 * 32 + 7 * 32)
    extra = flops_of(speed.sac_usual, robot="Hopper", width=32) - flops_of(speed.sac_ours, robot="Hopper", width=32, mode="eager")
    assert extra == 2 * speed.BATCH * more


def copy_members(stacked, networks) -> None:
    for i, network in enumerate(networks):
        linear = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
        for ours, theirs in zip([*stacked.hidden, stacked.output], linear, strict=True):
            theirs.weight.data.copy_(ours.weight[i].T)
            theirs.bias.data.copy_(ours.bias[i, 0])


def assert_together(stacked, networks, moved: float) -> None:
    """All parameters but a few, whose tiny gradients make the different epsilons of the two Adams count, moved alike."""
    apart = []
    for i, network in enumerate(networks):
        linear = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
        for ours, theirs in zip([*stacked.hidden, stacked.output], linear, strict=True):
            apart += [(theirs.weight - ours.weight[i].T).flatten(), theirs.bias - ours.bias[i, 0]]
    assert torch.cat(apart).abs().quantile(0.95) < 0.05 * moved


def test_the_usual_ensemble_does_the_same_products_and_learns_the_same():
    ours = flops_of(speed.ensemble_ours, robot="Hopper", width=16, mode="eager")
    assert ours == flops_of(speed.ensemble_usual, robot="Hopper", width=16)
    torch.manual_seed(0)
    args = hyper.Args(model_hidden_sizes=(16,) * 4)
    dynamics, (members, optimizers) = hyper.EnsembleDynamics(3, 2, args), speed.usual_ensemble(3, 2, args)
    copy_members(dynamics.net, members)
    optimizer = hyper.Adam(dynamics.parameters(), args.model_lr, args.model_weight_decay)
    for _ in range(5):
        inputs, targets = torch.randn(7, 8, 5), torch.randn(7, 8, 3)
        speed.usual_ensemble_update(members, optimizers, inputs, targets)
        hyper.dynamics_update(dynamics, optimizer, inputs, targets, args)
    assert_together(dynamics.net, members, 5 * args.model_lr)


@pytest.mark.parametrize("extras", [{}, dict(critic_layer_norm=True, bc_weight=3.0)])
def test_the_usual_sac_learns_the_same(extras, monkeypatch):
    """Five steps of deterministic policies (no noise in either) from the same weights, with the extras of hyper.py or without."""
    monkeypatch.setattr(torch.distributions.Normal, "rsample", lambda self: self.mean)
    torch.manual_seed(0)
    module = hyper if extras else sac
    args = module.Args(hidden_sizes=(16, 16), alpha=0.5, actor_lr=3e-4, critic_lr=1e-3, alpha_lr=1e-3, tau=0.005, **extras)
    ours, theirs = module.Agent(3, 2, args), speed.usual_agent(3, 2, args)
    torch.nn.init.normal_(ours.target_critic.net.output.bias)
    pairs = [(ours.actor.net, [theirs.net], args.actor_lr), (ours.critic.net, [theirs.q1, theirs.q2], args.critic_lr)]
    pairs += [(ours.target_critic.net, [theirs.q1_target, theirs.q2_target], 0.005 * args.critic_lr)]
    for stacked, networks, _ in pairs:
        copy_members(stacked, networks)
    for _ in range(5):
        obs, next_obs, action, reward = torch.randn(64, 3), torch.randn(64, 3), torch.rand(64, 2), torch.randn(64)
        terminated = (torch.rand(64) < 0.2).float()
        batch = module.Batch(obs, action, reward, next_obs, terminated)
        cloned = module.Batch(*(field[10:30] for field in batch)) if extras else None
        module.sac_update(ours, batch, obs, torch.zeros(2, 64, 2), args, *((cloned, torch.zeros(20, 2)) if extras else ()))
        module.target_update(ours, args.tau)
        theirs.update(obs, action, next_obs, reward[:, None], terminated[:, None], cloned)
    for stacked, networks, lr in pairs:
        assert_together(stacked, networks, 5 * lr)
    assert float(theirs.log_alpha) == pytest.approx(float(ours.log_alpha), abs=0.05 * 5 * args.alpha_lr)


def test_the_page_shows_the_committed_numbers():
    results = json.loads((speed.ROOT / "benchmark" / "results" / "speed" / "cpu.json").read_text())
    assert speed.table(results) in (speed.ROOT / "docs" / "speed.md").read_text()
