"""The maths of sac.py, and with it of the blocks that other scripts share with it, by hand or by a second method."""

import copy
import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sac
from tests.conftest import POINT


def agent_and_batch(**settings):
    """A small agent, a batch of 6, noise of an update, settings."""
    torch.manual_seed(0)
    args = sac.Args(hidden_sizes=(8, 8), **settings)
    ends = torch.tensor([0.0, 1, 0, 1, 0, 0])
    batch = sac.Batch(torch.randn(6, 3), torch.rand(6, 2) * 2 - 1, torch.randn(6), torch.randn(6, 3), ends)
    return sac.Agent(3, 2, args), batch, torch.randn(2, 6, 2), args


# ---------------------------------------------------------------------------------------------------- policy
def test_log_prob_is_the_density_of_the_squashed_gaussian():
    agent, batch, noise, _ = agent_and_batch()
    actions, log_prob = agent.actor.sample(batch.obs, noise[0])
    mean, log_std = agent.actor.net(batch.obs[None])[0].chunk(2, -1)
    normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.transforms.TanhTransform())
    torch.testing.assert_close(log_prob, squashed.log_prob(actions).sum(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actions, torch.tanh(mean + normal.scale * noise[0]))
    action = agent.actor.act(batch.obs[0].numpy(), deterministic=True)
    torch.testing.assert_close(torch.from_numpy(action), mean[0].tanh().detach())


def fixed_actor(mean: float, log_std: float) -> sac.Actor:
    actor = sac.Actor(3, 1, (8,))
    with torch.no_grad():
        actor.net.weights[-1].zero_()
        actor.net.biases[-1].copy_(torch.tensor([[[mean, log_std]]]))
    return actor


def test_the_density_integrates_to_one_and_is_finite_at_the_edge():
    noise = torch.linspace(-9, 9, 20_001)[:, None]
    actions, log_prob = fixed_actor(0.4, math.log(0.9)).sample(torch.zeros(20_001, 3), noise)
    area = torch.trapezoid(log_prob.double().exp(), actions[:, 0].double())
    assert area.item() == pytest.approx(1, abs=1e-3)
    edge = fixed_actor(20.0, -20.0)  # where tanh rounds to 1
    actions, log_prob = edge.sample(torch.zeros(5, 3), torch.randn(5, 1))
    (gradient,) = torch.autograd.grad(log_prob.sum(), edge.net.biases[-1])
    assert (actions == 1).all() and log_prob.isfinite().all() and gradient.isfinite().all()


def test_sampled_actions_have_the_policys_mean_and_deviation():
    torch.manual_seed(0)
    actor = fixed_actor(0.3, math.log(0.5))
    drawn = np.arctanh([actor.act(np.zeros(3, np.float32)) for _ in range(2_000)])
    assert (drawn.mean(), drawn.std()) == (pytest.approx(0.3, abs=0.05), pytest.approx(0.5, abs=0.05))


# -------------------------------------------------------------------------------------- networks and optimiser
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("fan_out", [1, 3, 20])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_an_ensemble_is_n_separate_networks(fan_out, bf16, layer_norm):
    """Values and gradients, for the output layer's different forms."""
    torch.manual_seed(0)
    net, x = sac.EnsembleMLP(2, [5, 8, 8, fan_out], F.silu, layer_norm), torch.randn(2, 7, 5, requires_grad=True)
    for bias in net.biases:
        torch.nn.init.normal_(bias)

    def member(i: int) -> torch.Tensor:
        h = x[i]
        for weight, bias in zip(net.weights[:-1], net.biases[:-1], strict=True):
            h = h @ weight[i] + bias[i]
            h = F.silu(
                (h - h.mean(-1, True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() if layer_norm else h
            )
        return h @ net.weights[-1][i] + net.biases[-1][i]

    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        ours = net(x)
    theirs = torch.stack([member(0), member(1)])
    assert ours.dtype == torch.float32
    close = dict(rtol=0.1, atol=0.2) if bf16 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, theirs, **close)
    pull, wanted = torch.randn_like(ours) / fan_out, (x, *net.parameters())
    ours, theirs = (torch.autograd.grad((y * pull).sum(), wanted) for y in (ours, theirs))
    torch.testing.assert_close(ours, theirs, **(close if not bf16 else dict(rtol=0.2, atol=0.5)))


def test_adam_is_torchs_adam_with_weight_decay():
    torch.manual_seed(0)
    ours, theirs = [[torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (3, 5)] for _ in range(2)]
    a, b = sac.Adam(ours, 0.01, weight_decay=0.1), torch.optim.Adam(theirs, 0.01, weight_decay=0.1)
    for _ in range(20):
        grads = [torch.randn_like(p) for p in ours]
        a.step(grads)
        for p, grad in zip(theirs, grads, strict=True):
            p.grad = grad.clone()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------- updates
@pytest.mark.parametrize("layer_norm", [False, True])
def test_an_update_is_a_step_of_autograd_on_the_written_out_losses(layer_norm):
    agent, batch, noise, args = agent_and_batch(gamma=0.9, alpha=0.3, tau=0.25, critic_layer_norm=layer_norm)
    other = copy.deepcopy(agent)
    metrics = sac.sac_update(agent, batch, noise, args)

    next_actions, next_log_prob = other.actor.sample(batch.next_obs, noise[0])
    q1, q2 = other.target_critic(batch.next_obs, next_actions)
    y = torch.tensor(
        [
            r.item() + (0.0 if end else 0.9 * (min(a, b).item() - 0.3 * log_prob.item()))
            for r, end, a, b, log_prob in zip(batch.rewards, batch.terminations, q1, q2, next_log_prob, strict=True)
        ]
    )
    optimizer = torch.optim.Adam(other.critic.parameters(), args.critic_lr)
    q = other.critic(batch.obs, batch.actions)
    loss = F.mse_loss(q[0], y) + F.mse_loss(q[1], y)
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(list(agent.critic.parameters()), list(other.critic.parameters()), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metrics["losses/critic"], loss.detach())
    torch.testing.assert_close(metrics["losses/q"], q.mean().detach())

    optimizer = torch.optim.Adam(other.actor.parameters(), args.actor_lr)
    actions, log_prob = other.actor.sample(batch.obs, noise[1])
    (0.3 * log_prob - torch.minimum(*other.critic(batch.obs, actions))).mean().backward()
    optimizer.step()
    # Where a gradient is tiny the two Adams' epsilons matter; a wrong sign would move a weight by 6e-4.
    torch.testing.assert_close(list(agent.actor.parameters()), list(other.actor.parameters()), rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(metrics["losses/entropy"], -log_prob.mean().detach())

    networks = agent.target_critic, other.target_critic, agent.critic
    for new, target, critic in zip(*(net.parameters() for net in networks), strict=True):
        torch.testing.assert_close(new, 0.75 * target + 0.25 * critic)


@pytest.mark.parametrize("target,direction", [(100.0, 1), (-100.0, -1)])
def test_temperature_rises_when_entropy_is_below_its_target(target, direction):
    agent, batch, noise, args = agent_and_batch(target_entropy=target)
    sac.sac_update(agent, batch, noise, args)
    assert agent.log_alpha.item() == pytest.approx(direction * args.alpha_lr, rel=1e-3)
    assert sac.Agent(3, 2, sac.Args()).target_entropy == -2


def test_bfloat16_changes_an_update_a_little():
    agent, batch, noise, args = agent_and_batch()
    exact, rounded = (sac.critic_loss(agent, batch, noise[0], replace(args, bf16=on)) for on in (False, True))
    assert 0 < abs(exact[0] - rounded[0]).item() < 0.05 * exact[0].item()


# ---------------------------------------------------------------------------------------------------- replay
def filled(capacity: int, n: int) -> sac.ReplayBuffer:
    buffer = sac.ReplayBuffer(capacity, 2, 1, "cpu")
    for i in range(n):
        buffer.add(np.full(2, i), np.full(1, i), float(i), np.full(2, i + 1), i % 2 == 0)
    return buffer


def test_replay_keeps_the_newest_while_its_storage_grows():
    data = filled(5, 8).all()
    assert sorted(data.rewards.tolist()) == [3, 4, 5, 6, 7]
    assert torch.equal(data.obs[:, 0] + 1, data.next_obs[:, 1]) and torch.equal(data.actions[:, 0], data.rewards)
    assert torch.equal(data.terminations, (data.rewards % 2 == 0).float())
    grown = filled(2_500, 2_200)
    assert grown.all().rewards.tolist() == list(range(2_200))
    assert filled(2_500, 2_501).all().rewards.tolist() == [2_500, *range(1, 2_500)]


def test_every_transition_is_drawn_equally_often_and_whole():
    torch.manual_seed(0)
    batches = sac.sample(filled(10, 13).all(), 50, 1_000)
    assert batches.obs.shape == (50, 1_000, 2) and batches.rewards.shape == (50, 1_000)
    assert torch.equal(batches.obs[..., 0], batches.rewards) and torch.equal(
        batches.next_obs[..., 0], batches.rewards + 1
    )
    counts = torch.bincount(batches.rewards.flatten().long(), minlength=13)
    assert counts[:3].sum() == 0 and (counts[3:] - 5_000).abs().max() < 5 * math.sqrt(5_000)


# --------------------------------------------------------------------------------------------- environments
@pytest.mark.parametrize("env_id,kept", [("Ant-v5", 27), ("Humanoid-v4", 45), ("Humanoid-v5", 45)])
def test_observations_are_the_leading_columns(env_id, kept):
    full, ours = gym.make(env_id), sac.make_env(env_id)
    a, _ = full.reset(seed=1)
    b, _ = ours.reset(seed=1)
    assert len(a) > kept and ours.observation_space.shape == (kept,) and b.dtype == np.float32
    data = full.unwrapped.data
    np.testing.assert_allclose(b, a[:kept], rtol=1e-6)
    np.testing.assert_allclose(b, np.concatenate([data.qpos[2:], data.qvel]), rtol=1e-6)


def test_actions_are_rescaled_once():
    env = sac.make_env("Humanoid-v4")
    assert env.action_space.low.min() == -1 and env.action_space.high.max() == 1
    env.reset(seed=0)
    env.step(np.full(17, 0.5, np.float32))
    np.testing.assert_allclose(env.unwrapped.data.ctrl, 0.2, rtol=1e-6)


def test_observations_are_copied_and_parts_of_them_put_together():
    """The point mass writes each observation over the last one."""
    env, split = sac.make_env(POINT), sac.make_env("tests.pointmass:Split-v0")
    first, _ = env.reset(seed=0)
    kept = first.copy()
    second, *_ = env.step(np.ones(2, np.float32))
    np.testing.assert_array_equal(first, kept)
    split.reset(seed=0)
    np.testing.assert_array_equal(split.step(np.ones(2, np.float32))[0], second)
    assert (first != second).any()


def test_deepmind_control_runs_through_shimmy():
    env = sac.make_env("dm_control/cartpole-swingup-v0")
    obs, _ = env.reset(seed=0)
    assert obs.shape == (5,) and np.isfinite(env.step(np.zeros(1, np.float32))[1])


# ------------------------------------------------------------------------------------------------ evaluation
class Reports(gym.Env):
    """Two steps of reward seed; the success of step 1 is what `report(seed)` says; terminates."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,))

    def __init__(self, report):
        self.report = report

    def reset(self, seed=None, options=None):
        self.seed, self.t = seed, 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        info = self.report(self.seed) if self.t == 1 else {}
        return np.zeros(1, np.float32), float(self.seed), self.t == 2, False, info


def evaluation(report) -> dict[str, float]:
    return sac.evaluate(sac.Actor(1, 1, (8,)), gym.wrappers.RecordEpisodeStatistics(Reports(report)), 3, seed=10)


def test_evaluation_gives_each_episode_its_seed_and_counts_successes():
    result = evaluation(lambda seed: dict(success=seed == 11))
    assert result["eval_return_mean"] == 22 and result["eval_length_mean"] == 2
    assert result["eval_return_std"] == pytest.approx(np.std([20, 22, 24]))
    assert result["eval_success_rate"] == pytest.approx(1 / 3)
    assert evaluation(lambda seed: dict(is_success=True) if seed == 12 else {})["eval_success_rate"] == pytest.approx(
        1 / 3
    )
    assert math.isnan(evaluation(lambda seed: {})["eval_success_rate"])


def test_evaluation_repeats_itself_and_draws_nothing_from_the_training_runs_generator():
    torch.manual_seed(0)
    actor, env = sac.Actor(4, 2, (8,)), sac.make_env(POINT)
    before = torch.get_rng_state()
    assert sac.evaluate(actor, env, 3, seed=5) == sac.evaluate(actor, env, 3, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


# -------------------------------------------------------------------------------------------------- training
def test_a_time_limit_is_no_termination_and_every_step_is_stored(tmp_path):
    words = dict(hidden_sizes=(8,), learning_starts=10**6, eval_every=10**6, eval_episodes=1, checkpoint_every=1)
    sac.train(sac.Args(env_id=POINT, total_timesteps=400, run_dir=str(tmp_path), seed=5, **words))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    data = state["buffer"].all()
    assert len(data.obs) == state["step"] and data.actions.abs().max() <= 1 and data.rewards.min() < 0
    episode_ends = torch.cat([(data.next_obs[:-1] != data.obs[1:]).any(-1), torch.tensor([True])])
    outside = (data.next_obs[:, :2].abs() > 2).any(-1)
    assert torch.equal(data.terminations > 0, outside) and (episode_ends & ~outside).sum() >= 1
    assert (episode_ends | ~outside).all()
