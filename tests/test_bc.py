"""Behaviour cloning: whose actions, in which units, at what cost; the update beside one by hand."""

import numpy as np
import pytest
import torch

import bc
from tests import pointmass
from tests.conftest import POINT, run

SETTINGS = dict(env_id=POINT, num_demos=5, eval_episodes=1, eval_every=1_000)


def policy(run_dir) -> bc.Actor:
    saved = torch.load(run_dir / "policy.pt", weights_only=True)
    actor = bc.Actor(*saved["sizes"])
    actor.load_state_dict(saved["actor"])
    return actor


def test_it_takes_no_steps_and_executes_what_was_shown(tmp_path, monkeypatch):
    """Demonstrations in a fifth of the bounds: what is executed is in the environment's own unit."""
    pointmass.write_demos(tmp_path / "narrow.npz", episodes=40)
    data = dict(np.load(tmp_path / "narrow.npz"))
    data["actions"] = data["actions"].clip(-0.4, 0.4)
    np.savez(tmp_path / "narrow.npz", **data, metadata='{"checked": "yes"}')
    executed, step = [], pointmass.PointMass.step
    monkeypatch.setattr(pointmass.PointMass, "step", lambda self, a: [executed.append(a), step(self, a)][1])
    others = dict(demos=str(tmp_path / "narrow.npz"), num_demos=40, hidden_sizes=(32, 32), batch_size=64, actor_lr=3e-3)
    rows = bc.train(bc.Args(**SETTINGS | others, total_timesteps=1_000, run_dir=str(tmp_path / "run")))
    assert len(executed) == sum(row["eval_length_mean"] for row in rows)  # an episode at the start, one at the end
    assert [(row["env_steps"], row["updates"]) for row in rows] == [(0, 0), (0, 1_000)]
    asked, actor = data["actions"][:200:5], policy(tmp_path / "run")
    done = 2 * np.array([actor.act(obs) for obs in data["observations"][:200:5]])
    assert (done * asked).sum() / (asked**2).sum() == pytest.approx(1, abs=0.15)


def test_what_a_batch_holds(demos, tmp_path, monkeypatch):
    """Every third of the first three trajectories' states, each with its action, within the reach of a tanh."""
    batches, sample = [], bc.sample
    monkeypatch.setattr(bc, "sample", lambda *inputs: [batches.append(sample(*inputs)), batches[-1]][1])
    others = dict(demos=demos, num_demos=3, demo_subsample=3, batch_size=64, hidden_sizes=(8,), total_timesteps=50)
    bc.train(bc.Args(**SETTINGS | others, run_dir=str(tmp_path / "run")))
    data = np.load(demos)
    rows = zip(data["observations"][:150:3], data["actions"][:150:3], strict=True)
    shown = {obs.tobytes(): action for obs, action in rows}
    obs, actions = (torch.cat([batch[field] for batch in batches]).numpy() for field in (0, 1))
    assert {row.tobytes() for row in obs} == shown.keys() and len(batches) == 50
    asked = np.array([shown[row.tobytes()] for row in obs]) / 2
    np.testing.assert_allclose(actions, asked, atol=2e-6)
    assert np.abs(asked).max() == 1 and np.abs(actions).max() < 1


def test_updates_are_those_written_out(demos, tmp_path):
    """tanh(W z + b) of standardised observations z, Adam on the mean squared error, and the average of all weights."""
    args = bc.Args(**SETTINGS, demos=demos, hidden_sizes=(), batch_size=32, actor_lr=0.01, ema_steps=20)
    args.run_dir, args.total_timesteps = str(tmp_path / "run"), 100
    losses = bc.train(args)[-1]["losses/actor"]

    data, *_ = bc.load_demos(demos, bc.make_env(POINT), 5, 1, "cpu")
    mean, std = data.obs.mean(0).double(), data.obs.double().std(0, correction=0)
    torch.manual_seed(args.seed)
    start = bc.Actor(4, 2, ()).net.weights[0][0].detach()
    weights = torch.cat([start, torch.zeros(1, 2)]).double()  # [4 + 1, 2], the bias below
    average, momentum, square = weights.clone(), torch.zeros(5, 2), torch.zeros(5, 2)
    for t in range(1, 101):
        batch = bc.sample(data, 32)
        inputs = torch.cat([(batch.obs.double() - mean) / std, torch.ones(32, 1)], 1)
        actions = (inputs @ weights).tanh()
        error = actions - batch.actions
        gradient = inputs.T @ (2 * error * (1 - actions**2)) / error.numel()
        momentum, square = 0.9 * momentum + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        step = momentum / (1 - 0.9**t) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
        weights = weights - 0.01 * step
        average = average + (weights - average) / min(20, 1 + t / 4)
    assert losses == pytest.approx(error.square().mean().item(), rel=1e-4)
    ours, z = policy(tmp_path / "run"), torch.cat([(data.obs - mean) / std, torch.ones(250, 1)], 1)
    torch.testing.assert_close(ours(data.obs).double(), (z @ average).tanh(), atol=1e-4, rtol=0)
    assert (average - weights).abs().max() > 0.01


def test_a_loss_that_is_not_finite_stops_the_run(demos, tmp_path):
    words = f"--env-id {POINT} --demos {demos} --num-demos 5 --actor-lr 1e30 --eval-episodes 1"
    with pytest.raises(SystemExit, match=r"^bc\.py: a loss is not finite at step \d+: .*losses/actor.*nan"):
        run("bc", words, tmp_path)
    assert (tmp_path / "run" / "progress.csv").exists()
