"""--compile changes the speed, not the result."""

import copy
import shutil

import pytest
import torch

import hyper

pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
ARGS = hyper.Args(hidden_sizes=(16,), model_hidden_sizes=(16,), cost_hidden_sizes=(16,), bc_coef=10.0)


def batch_of(n: int) -> hyper.Batch:
    ends = (torch.rand(n) < 0.3).float()
    return hyper.Batch(torch.randn(n, 3), torch.rand(n, 2) - 0.5, torch.randn(n), torch.randn(n, 3), ends)


CASES = {
    "sac_update": (hyper.Agent, lambda: (batch_of(32), batch_of(8), torch.randn(2, 32, 2))),
    "dynamics_update": (hyper.EnsembleDynamics, lambda: (torch.randn(7, 32, 5), torch.randn(7, 32, 3))),
    "cost_update": (hyper.Cost, lambda: (batch_of(32), batch_of(32), torch.rand(32, 1))),
}


@pytest.mark.parametrize("name", CASES)
def test_twenty_compiled_updates_agree_with_eager_ones(name):
    torch.manual_seed(0)
    make, inputs = CASES[name]
    eager = make(3, 2, ARGS)
    before, other, update = copy.deepcopy(eager), copy.deepcopy(eager), getattr(hyper, name)
    compiled = hyper.compiled(update)
    for _ in range(20):
        drawn = inputs()
        results = update(eager, *drawn, ARGS), compiled(other, *drawn, ARGS)
    if results[0] is not None:
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)
    ours, theirs, old = (dict(module.named_parameters()) for module in (eager, other, before))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(not torch.equal(ours[name], old[name]) for name in ours if ours[name].requires_grad)
