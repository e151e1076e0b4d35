"""That the usual PyTorch of benchmark/speed.py does what ours does."""

import pytest
import torch

import sac
from benchmark import speed


def test_the_usual_sac_learns_as_ours_does(monkeypatch):
    """Five updates without noise, from the same weights on the same batches."""
    monkeypatch.setattr(torch.distributions.Normal, "rsample", lambda self: self.mean)
    args = sac.Args(device="cpu", hidden_sizes=(16, 16))
    ours, usual, pairs = sac.Agent(3, 2, args), speed.UsualSAC(3, 2, 16), []
    nets = [(ours.actor.net, [usual.actor]), (ours.critic.net, usual.critics), (ours.target_critic.net, usual.targets)]
    for net, others in nets:
        for k, other in enumerate(others):
            for layer, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
                pairs += [(weight[k].T, other[2 * layer].weight), (bias[k, 0], other[2 * layer].bias)]
    for mine, theirs in pairs:
        theirs.data.copy_(mine)
    for _ in range(5):
        obs, next_obs, actions, rewards = torch.randn(64, 3), torch.randn(64, 3), torch.rand(64, 2), torch.randn(64)
        batch = sac.Batch(obs, actions, rewards, next_obs, (torch.rand(64) < 0.2).float())
        sac.sac_update(ours, batch, torch.zeros(2, 64, 2), args)
        usual.update(obs, actions, rewards[:, None], next_obs, batch.terminations[:, None])
    apart = torch.cat([(mine - theirs).detach().flatten().abs() for mine, theirs in pairs])
    assert apart.quantile(0.95) < 0.05 * 5 * 1e-3  # but for a few: the two Adams differ where gradients are tiny
    assert float(usual.log_alpha) == pytest.approx(float(ours.log_alpha), abs=1e-4) != 0
