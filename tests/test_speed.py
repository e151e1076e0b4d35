"""That benchmark/speed.py compares like with like."""

import json
import math
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


@pytest.mark.parametrize("kept", [None, True, False])
def test_who_gets_the_process_settings_of_our_scripts(kept, monkeypatch):
    """Everyone whose arguments do not say otherwise."""
    given = []
    monkeypatch.setattr(speed, "our_settings", lambda: given.append(1))
    monkeypatch.setattr(speed, "sac_usual", lambda turn, **_: None)
    monkeypatch.setattr(speed.sys, "stdout", speed.sys.stdout)  # a worker keeps it for itself
    speed.worker("sac_usual", json.dumps({} if kept is None else dict(kept=kept)))
    assert bool(given) == (kept is not False)
    names = [c["name"] for contenders, _ in speed.contests("gradient step").values() for c in contenders if c.get("kept") is False]
    assert names and all("freed memory not kept" in name for name in names)


def test_our_step_samples_and_moves_the_targets(monkeypatch):
    calls = []
    for owner, name in ((sac, "target_update"), (sac, "sac_update"), (sac.ReplayBuffer, "sample")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, original=original, name=name, **k: [calls.append(name), original(*a, **k)][1])
    flops_of(speed.sac_ours, robot="Hopper", width=16, mode="eager")
    assert calls == ["sample", "sac_update", "target_update"] * 20


def test_products_are_in_the_precision_and_form_of_the_step():
    """A thin layer's are transposed; with bfloat16 all but those of the output layers."""
    seen = []
    for bf16 in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(speed, "multiply", lambda turn, products: seen.append(products))
            speed.sac_products(None, "Hopper", 32, bf16)
    plain, halved = ([(a.dtype, tuple(out.shape)) for a, _, out in products] for products in seen)
    thin = {(1, 6, 256), (1, 32, 256), (1, 6, 32)}  # 2 x 3 outputs of 32 units: y, and the gradients of x and w, transposed
    assert {shape for dtype, shape in halved if dtype == torch.float32} == thin <= {shape for _, shape in plain}
    assert {dtype for dtype, _ in plain} == {torch.float32} and [s for _, s in plain] == [s for _, s in halved]


def test_the_other_rollouts_evaluate_five_elites_where_ours_evaluate_one():
    ours, usual = (flops_of(f, robot="Ant", width=16) for f in (speed.rollouts_ours, speed.rollouts_usual))
    actor = 2 * 10_000 * (27 * 128 + 128 * 128 + 128 * 16)
    assert usual - actor == pytest.approx(5 * (ours - actor), rel=1e-6)


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
    args = hyper.Args(model_hidden_sizes=(16,) * 4, model_weight_decay=1.0)
    dynamics, (members, optimizers) = hyper.EnsembleDynamics(3, 2, args), speed.usual_ensemble(3, 2, args)
    copy_members(dynamics.net, members)
    optimizer = hyper.Adam(dynamics.parameters(), args.model_lr, args.model_weight_decay)
    for _ in range(5):
        inputs, targets = torch.randn(7, 8, 5), torch.randn(7, 8, 3)
        speed.usual_ensemble_update(members, optimizers, inputs, targets)
        hyper.dynamics_update(dynamics, optimizer, inputs, targets, args)
    assert_together(dynamics.net, members, 5 * args.model_lr)


def test_the_usual_reverse_model_does_the_same_products_and_learns_the_same():
    """From the same weights, on targets so large that the gradients' norm is clipped in every step."""
    assert flops_of(speed.deltas_ours, width=16, mode="eager") == flops_of(speed.deltas_usual, width=16)
    torch.manual_seed(0)
    sra, args = speed.maze_args(16)
    model, (members, optimizers) = sra.DeltaEnsemble(4, 2, args), speed.usual_deltas(args)
    copy_members(model.net, members)
    optimizer = sra.Adam(model.net.parameters(), args.model_lr)
    for _ in range(5):
        inputs, delta = torch.randn(7, 8, 6), 20 * torch.randn(7, 8, 4)
        speed.usual_deltas_update(members, optimizers, inputs, delta)
        sra.delta_update(model, optimizer, inputs, delta)
    assert_together(model.net, members, 5 * args.model_lr)


@pytest.mark.parametrize("extras", [{}, dict(critic_layer_norm=True, bc_weight=3.0)])
def test_the_usual_sac_learns_the_same(extras, monkeypatch):
    """Five steps of deterministic policies (no noise in either) from the same weights, with the extras of hyper.py or without."""
    monkeypatch.setattr(torch.distributions.Normal, "rsample", lambda self: self.mean)
    torch.manual_seed(0)
    module = hyper if extras else sac
    args = module.Args(hidden_sizes=(16, 16), alpha=0.5, actor_lr=3e-4, critic_lr=1e-3, alpha_lr=1e-3, tau=0.005, **extras)
    ours, theirs = module.Agent(3, 2, args), speed.usual_agent(3, 2, args)
    torch.nn.init.normal_(ours.target_critic.net.output.bias)
    with torch.no_grad():  # an entropy of about -1: alpha has to fall towards the target of -2, and would rise towards 0
        ours.actor.net.output.bias[..., 2:] = -1.4
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
    assert float(ours.log_alpha) < math.log(args.alpha) - 4 * args.alpha_lr
    assert float(theirs.log_alpha) == pytest.approx(float(ours.log_alpha), abs=0.05 * 5 * args.alpha_lr)


def test_the_page_shows_the_committed_numbers():
    results = json.loads((speed.ROOT / "benchmark" / "results" / "speed" / "cpu.json").read_text())
    assert list(results) == list(speed.contests(""))
    assert speed.table(results) in (speed.ROOT / "docs" / "speed.md").read_text()
