"""The maths of sac.py, and with it of the blocks that other scripts share with it, by hand or by a second method."""

import copy
import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import hyper
import sac
from tests.conftest import POINT


def agent_and_batch(**settings):
    """A small agent, a batch of 6, noise of an update, settings."""
    torch.manual_seed(0)
    args = sac.Args(device="cpu", hidden_sizes=(8, 8), **settings)
    ends = torch.tensor([0.0, 1, 0, 1, 0, 0])
    batch = sac.Batch(torch.randn(6, 3), torch.rand(6, 2) * 2 - 1, torch.randn(6), torch.randn(6, 3), ends)
    return sac.Agent(3, 2, args), batch, torch.randn(2, 6, 2), args


def test_the_policy_is_a_squashed_gaussian():
    agent, batch, noise, _ = agent_and_batch()
    agent.actor.net.weights[-1].data *= 0.2
    actions, log_prob = agent.actor.sample(batch.obs, noise[0])
    mean, log_std = agent.actor.net(batch.obs[None])[0].detach().chunk(2, -1)
    normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.transforms.TanhTransform())
    torch.testing.assert_close(log_prob, squashed.log_prob(actions).sum(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actions, torch.tanh(mean + normal.scale * noise[0]))
    first = batch.obs[0].numpy()
    np.testing.assert_allclose(agent.actor.act(first, deterministic=True), mean[0].tanh(), rtol=1e-5)
    drawn = np.arctanh([agent.actor.act(first) for _ in range(2_000)])
    np.testing.assert_allclose((drawn.mean(0), drawn.std(0)), (mean[0], normal.scale[0]), atol=0.1)


def test_the_density_is_finite_where_tanh_rounds_to_one():
    actor = sac.Actor(3, 1, (8,))
    actor.net.weights[-1].data.zero_()
    actor.net.biases[-1].data.copy_(torch.tensor([20.0, -20.0]))
    actions, log_prob = actor.sample(torch.zeros(5, 3), torch.randn(5, 1))
    (gradient,) = torch.autograd.grad(log_prob.sum(), actor.net.biases[-1])
    assert (actions == 1).all() and log_prob.isfinite().all() and gradient.isfinite().all()


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
            if layer_norm:
                h = (h - h.mean(-1, True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            h = F.silu(h)
        return h @ net.weights[-1][i] + net.biases[-1][i]

    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        ours = net(x)
    theirs = torch.stack([member(0), member(1)])
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, **(dict(rtol=0.1, atol=0.2) if bf16 else dict(rtol=1e-4, atol=1e-5)))
    pull, wanted = torch.randn_like(ours) / fan_out, (x, *net.parameters())
    ours, theirs = (torch.autograd.grad((y * pull).sum(), wanted) for y in (ours, theirs))
    torch.testing.assert_close(ours, theirs, **(dict(rtol=0.2, atol=0.5) if bf16 else dict(rtol=1e-4, atol=1e-5)))


@pytest.mark.parametrize("script,decay", [(sac, {}), (hyper, dict(weight_decay=0.1, beta1=0.5))])
def test_adam_is_torchs_adam(script, decay):
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (3, 5)] for _ in range(2))
    betas, rest = (decay.get("beta1", 0.9), 0.999), dict(weight_decay=decay.get("weight_decay", 0))
    a, b = script.Adam(ours, 0.01, **decay), torch.optim.Adam(theirs, 0.01, betas=betas, **rest)
    for _ in range(20):
        for p in theirs:
            p.grad = torch.randn_like(p)
        a.step([p.grad.clone() for p in theirs])
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer_norm,target_entropy,alpha_moves", [(False, None, -1), (True, 100.0, 1)])
def test_an_update_is_a_step_of_autograd_on_the_written_out_losses(layer_norm, target_entropy, alpha_moves):
    settings = dict(critic_layer_norm=layer_norm, target_entropy=target_entropy)
    agent, batch, noise, args = agent_and_batch(gamma=0.9, alpha=0.3, tau=0.25, **settings)
    other = copy.deepcopy(agent)
    metrics = sac.sac_update(agent, batch, noise, args)

    with torch.no_grad():
        next_actions, next_log_prob = other.actor.sample(batch.next_obs, noise[0])
        later = torch.minimum(*other.target_critic(batch.next_obs, next_actions)) - 0.3 * next_log_prob
        y = torch.where(batch.terminations == 1, batch.rewards, batch.rewards + 0.9 * later)
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
    moved = (agent.log_alpha - other.log_alpha).item()  # up where entropy is below its target
    assert moved == pytest.approx(alpha_moves * args.alpha_lr, rel=1e-3)
    assert agent.target_entropy == (target_entropy or -2)


def test_bfloat16_changes_an_update_a_little():
    agent, batch, noise, args = agent_and_batch()
    exact, rounded = (sac.critic_loss(agent, batch, noise[0], replace(args, bf16=on)) for on in (False, True))
    assert 0 < abs(exact[0] - rounded[0]).item() < 0.05 * exact[0].item()


def filled(capacity: int, n: int) -> sac.Batch:
    """What a buffer keeps of n transitions, of which each is known by its number."""
    buffer = sac.ReplayBuffer(capacity, 2, 1, "cpu")
    for i in range(n):
        buffer.add(np.full(2, i), np.full(1, i), float(i), np.full(2, i + 1), i % 2 == 0)
    return buffer.all()


def test_replay_keeps_the_newest_while_its_storage_grows():
    data = filled(5, 8)
    assert sorted(data.rewards.tolist()) == [3, 4, 5, 6, 7]
    assert torch.equal(data.obs[:, 0] + 1, data.next_obs[:, 1]) and torch.equal(data.actions[:, 0], data.rewards)
    assert torch.equal(data.terminations, (data.rewards % 2 == 0).float())
    assert filled(2_500, 2_200).rewards.tolist() == list(range(2_200))
    assert filled(2_500, 2_501).rewards.tolist() == [2_500, *range(1, 2_500)]


def test_every_transition_is_drawn_equally_often_and_whole():
    torch.manual_seed(0)
    batches = sac.sample(filled(10, 13), 50, 1_000)
    assert batches.obs.shape == (50, 1_000, 2) and batches.rewards.shape == (50, 1_000)
    assert torch.equal(batches.obs[..., 0], batches.rewards)
    assert torch.equal(batches.next_obs[..., 0], batches.rewards + 1)
    counts = torch.bincount(batches.rewards.flatten().long(), minlength=13)
    assert counts[:3].sum() == 0 and (counts[3:] - 5_000).abs().max() < 5 * math.sqrt(5_000)


@pytest.mark.parametrize("env_id,kept", [("Ant-v5", 27), ("Humanoid-v4", 45), ("Humanoid-v5", 45)])
def test_observations_are_positions_and_velocities_and_actions_rescaled_once(env_id, kept):
    env = sac.make_env(env_id)
    obs, _ = env.reset(seed=1)
    data, box = env.unwrapped.data, env.unwrapped.action_space
    assert env.observation_space.shape == (kept,) < env.unwrapped.observation_space.shape and obs.dtype == np.float32
    np.testing.assert_allclose(obs, np.concatenate([data.qpos[2:], data.qvel]), rtol=1e-6)
    assert env.action_space.low.min() == -1 and env.action_space.high.max() == 1
    for action in (0.5, -1.01):
        env.step(np.full(box.shape, action, np.float32))
        np.testing.assert_allclose(data.ctrl, max(action, -1) * box.high, rtol=1e-6)


def test_parts_of_an_observation_are_put_together():
    env, split = sac.make_env(POINT), sac.make_env("tests.pointmass:Split-v0")
    for each in (env, split):
        each.reset(seed=0)
    np.testing.assert_array_equal(split.step(np.ones(2, np.float32))[0], env.step(np.ones(2, np.float32))[0])


class Reports(gym.Env):
    """Two steps of reward seed. Seed 10 reports nothing, 11 a success in its first step, 12 none."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,))

    def reset(self, seed=None, options=None):
        self.seed, self.infos = seed, [{}, dict(success=seed == 11) if seed > 10 else {}]
        return np.zeros(1, np.float32), {}

    def step(self, action):
        info = self.infos.pop()
        return np.zeros(1, np.float32), float(self.seed), not self.infos, False, info


def test_evaluation_gives_each_episode_its_seed_and_counts_successes():
    result = sac.evaluate(sac.Actor(1, 1, (8,)), gym.wrappers.RecordEpisodeStatistics(Reports()), 3, seed=10)
    assert result["eval_return_mean"] == 22 and result["eval_length_mean"] == 2
    assert result["eval_return_std"] == pytest.approx(np.std([20, 22, 24]))
    assert result["eval_success_rate"] == pytest.approx(1 / 3)


def test_a_time_limit_is_no_termination_and_every_step_is_stored(tmp_path):
    words = dict(hidden_sizes=(8,), learning_starts=10**6, eval_every=10**6, eval_episodes=1, checkpoint_every=1)
    sac.train(sac.Args(device="cpu", env_id=POINT, total_timesteps=400, run_dir=str(tmp_path), seed=5, **words))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    data = state["buffer"].all()
    assert len(data.obs) == state["step"] and data.actions.abs().max() <= 1 and data.rewards.min() < 0
    episode_ends = torch.cat([(data.next_obs[:-1] != data.obs[1:]).any(-1), torch.tensor([True])])
    outside = (data.next_obs[:, :2].abs() > 2).any(-1)
    assert outside.any() and torch.equal(data.terminations > 0, outside) and (episode_ends & ~outside).sum() >= 1
    assert (episode_ends | ~outside).all()
