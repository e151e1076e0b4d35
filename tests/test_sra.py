"""sra_offline.py and envs/maze2d.py against hand calculation or a second method."""

import copy
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sra_offline as sra
from envs.maze2d import MAZES, Maze2D, maze_data, maze_file
from tests.conftest import POINT

UMAZE = "Maze2D-umaze-v0"
TOLD = sra.OfflineActor(4, 2, (8,))
TOLD.confidence = lambda obs: obs[:, 0]  # stands in the first column of the state


def small(**settings) -> sra.Args:
    sizes = dict(hidden_sizes=(16, 16), model_hidden_sizes=(16, 16), cvae_hidden_sizes=(16, 16))
    return sra.Args(device="cpu", **sizes | settings)


def standard_agent(args: sra.Args) -> sra.OfflineAgent:
    """Its targets differ from the networks, and advantages have both signs."""
    torch.manual_seed(0)
    agent = sra.OfflineAgent(4, 2, args)
    sra.standardise(agent, 2 * torch.randn(100, 4) + 1)
    obs, actions = torch.randn(30, 4), torch.randn(30, 2)
    with torch.no_grad():
        for target in (agent.target_critic, agent.target_actor):
            target.net.biases[-1] += 0.3
        agent.value.net.biases[-1] += (agent.target_critic(obs, actions).amin(0) - agent.value(obs)[0]).median()
    return agent


def transitions(n: int, seed: int) -> sra.Batch:
    generator = torch.Generator().manual_seed(seed)
    obs, next_obs = torch.randn(2, n, 4, generator=generator)
    actions = torch.rand(n, 2, generator=generator) * 1.9 - 0.95
    return sra.Batch(obs, actions, torch.rand(n, generator=generator), next_obs, (torch.arange(n) % 3 == 0).float())


def numbered(numbers) -> sra.Batch:
    """Transitions that can be told apart by their rewards."""
    numbers = torch.as_tensor(numbers, dtype=torch.float32)
    return sra.Batch(numbers[:, None].expand(-1, 4), torch.zeros(len(numbers), 2), numbers, *2 * [numbers])


def record(optimizer) -> list:
    """The gradients of the optimiser's steps, as they come."""
    seen, step = [], optimizer.step
    optimizer.step = lambda grads: [seen.append(tuple(grads)), step(grads)]
    return seen


def assert_gradients(found: list, loss: torch.Tensor, network: torch.nn.Module) -> None:
    torch.testing.assert_close(found[0], torch.autograd.grad(loss, list(network.parameters())), rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------------------------------------- maze and data
def exact_reverse(next_obs: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Where a step came from, away from walls: a sphere of radius 0.1, density 1000, damping 1 (implicit), dt 0.01."""
    mass = 1000 * 4 / 3 * math.pi * 0.1**3
    velocity = (1 + 0.01 / mass) * next_obs[..., 2:] - actions / mass
    return np.concatenate([next_obs[..., :2] - 0.01 * next_obs[..., 2:], velocity], -1)


@pytest.mark.parametrize("maze", MAZES)
def test_reverse_step_and_real_step_are_a_round_trip(maze):
    rng, env = np.random.default_rng(0), Maze2D(maze)
    assert not env.walls[tuple(env.goal.astype(int))]
    for _ in range(20):
        next_obs = np.array([*(env.goal + rng.uniform(-0.2, 0, 2)), *rng.uniform(-3, 3, 2)])
        action = rng.uniform(-1, 1, 2)
        env.reset(seed=0, options={"start": exact_reverse(next_obs, action)})
        np.testing.assert_allclose(env.step(action)[0], next_obs, atol=1e-9)


def test_reward_within_half_a_cell_of_the_goal_and_known_returns():
    env, rng, returns = sra.make_env(UMAZE), np.random.default_rng(0), []
    for x, reward in ((1.49, 1), (1.51, 0)):
        env.unwrapped.reset(seed=0, options={"start": [x, 1.0, 0, 0]})
        _, found, *_, info = env.unwrapped.step(np.zeros(2))
        assert found == reward == info["success"]
    for episode in range(20):
        env.reset(seed=episode)
        steps = [env.step(rng.uniform(-1, 1, 2).astype(np.float32)) for _ in range(300)]
        assert [step[3] for step in steps].index(True) == 299 and not any(step[2] for step in steps)
        returns.append(sum(step[1] for step in steps))
    expert = maze_data(UMAZE, "expert", 3_000, seed=0)
    assert np.mean(returns) < 60 and expert["rewards"].sum() / 10 > 180  # D4RL: 24; re-planned: about 218
    assert np.flatnonzero(expert["truncations"]).tolist() == list(range(299, 3_000, 300))


def test_offline_data_are_one_stream_from_goal_to_goal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = maze_file(UMAZE, "offline", 6_000, seed=0)
    data = dict(np.load(path))
    assert json.loads(str(data.pop("metadata")))["env_id"] == UMAZE and len(data["rewards"]) == 6_000
    np.testing.assert_array_equal(data["observations"][1:], data["next_observations"][:-1])
    ends = np.flatnonzero(data["truncations"])
    assert len(ends) > 10 and np.diff(ends).max() <= 300
    at_goal = data["next_observations"][ends, :2]
    assert (np.linalg.norm(at_goal - at_goal.round(), axis=1) < 0.15).mean() > 0.8  # the others ran out of time
    free = exact_reverse(data["next_observations"].astype(float), data["actions"].astype(float))
    assert (np.abs(free - data["observations"]).max(1) < 1e-5).mean() > 0.95  # few steps touch a wall
    again = maze_data(UMAZE, "offline", 50, seed=0)
    assert all(np.array_equal(again[name][:49], data[name][:49]) for name in again)
    assert not np.array_equal(maze_data(UMAZE, "offline", 50, seed=1)["actions"], again["actions"])
    episodes, _ = sra.load_episodes(path, sra.make_env(UMAZE), "cpu")
    assert [len(episode.obs) for episode in episodes] == np.diff(ends, prepend=-1).tolist()
    monkeypatch.setattr("envs.maze2d.maze_data", None)  # it is not made twice
    assert maze_file(UMAZE, "offline", 6_000, seed=0) == path


def test_demonstrations_are_chosen_by_the_data_seed_and_rewarded(demos):
    env = sra.make_env(POINT)
    episodes, returns = sra.load_episodes(demos, env, "cpu")
    for seed in (0, 1):
        args = sra.Args(device="cpu", demos=demos, offline_data=(demos, demos), num_demos=2, data_seed=seed)
        expert, offline, expert_return = sra.load_data(env, args)
        chosen = np.random.default_rng([seed, 2]).permutation(5)[:2]
        assert expert_return == pytest.approx(returns[chosen].mean())
        for episode, k in zip(expert, chosen, strict=True):
            assert torch.equal(episode.obs, episodes[k].obs) and (episode.rewards == 1).all()
    assert len(offline) == 10 and not sra.concat(*offline).rewards.any()


# --------------------------------------------------------------------------------- policy, confidence, resampling
def test_densities_are_those_of_the_transformed_normal_and_finite_at_the_bounds():
    actor, obs = standard_agent(small()).actor, torch.randn(50, 4)
    mean, log_std = (x.double() for x in actor(obs))
    normal = torch.distributions.Normal(mean, log_std.exp())
    squashed = torch.distributions.TransformedDistribution(normal, [torch.distributions.TanhTransform()])
    found = actor.log_prob(obs, torch.full((50, 2), 0.7)), actor.confidence(obs)
    expected = squashed.log_prob(torch.tensor(0.7).double()), squashed.log_prob(mean.tanh()).sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, check_dtype=False)
    actor.net.biases[-1].data.copy_(torch.tensor([500.0, -500, 90, -90]))
    mean, log_std = actor(obs[:1])
    assert mean.tolist() == [[9, -9]] and log_std.tolist() == [[2, -5]]
    by_hand = sum(-s - 0.5 * math.log(2 * math.pi) - math.log(1 - math.tanh(9) ** 2) for s in (2, -5))
    assert actor.confidence(obs[:1]).item() == pytest.approx(by_hand, rel=1e-3)
    assert actor.log_prob(obs[:1], torch.tensor([[1.0, -1.0]])).isfinite().all()


def test_resampling_is_sequential_sampling_without_replacement():
    torch.manual_seed(0)
    confidence = torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0])
    weight = (1 / (confidence.exp() + 1e-5)).double()
    weight, counts, n = (weight / weight.sum()).tolist(), {}, 3_000
    for _ in range(n):
        kept = frozenset(sra.keep_unsure(confidence, 2).tolist())
        counts[kept] = counts.get(kept, 0) + 1
    for i, j in itertools.combinations(range(5), 2):
        expected = weight[i] * weight[j] * (1 / (1 - weight[i]) + 1 / (1 - weight[j]))
        assert counts.get(frozenset((i, j)), 0) / n == pytest.approx(expected, abs=4 * math.sqrt(expected / n) + 1e-4)
    assert sra.keep_unsure(torch.tensor([200.0, 150.0, -200.0, 199.0]), 1).item() == 2  # nothing overflows
    kept = torch.cat([sra.keep_unsure(torch.tensor([-80.0, -40.0, -30.0, -50.0]), 1) for _ in range(2_000)])
    assert torch.bincount(kept, minlength=4).min() > 400  # far below the floor of 1e-5 all are the same


def test_goals_are_above_the_quantile_and_capped():
    confidence = np.linspace(0, 20, 300)
    above = np.flatnonzero(confidence > np.quantile(np.arange(10), 0.8))
    for n, expected in ((300, above[-100:]), (150, above[above < 150])):  # the cap keeps the most confident ones
        goals = sra.confident_states(TOLD, numbered(range(10)), numbered(confidence[:n]))
        np.testing.assert_allclose(sorted(goals.rewards.tolist()), confidence[expected], rtol=1e-6)


# ------------------------------------------------------------------------------------------ rollouts and batches
@pytest.mark.parametrize("algo", ["sra", "forward"])
@pytest.mark.parametrize("resample", [True, False])
def test_rollouts_go_on_from_where_they_arrived(algo, resample):
    """With resampling, random actions and from the unsure half of the starts; otherwise actions of an autoencoder.

    The model reaches state + 1 in the first column, and notes the action in the next ones.
    """
    model = SimpleNamespace(predict=lambda state, actions: torch.cat([state[:, :1] + 1, actions, state[:, 3:]], 1))
    starts = torch.zeros(100 if resample else 50, 4)
    starts[:, 3] = torch.rand(len(starts))
    starts[::2, 0] = 100 * resample
    vae = SimpleNamespace(latent_dim=3, sample=lambda state, noise: state[:, 3:] + 0 * noise[:, 1:])
    args = small(algo=algo, resample=resample, rollout_length=3)
    batch = sra.augment(model, None if resample else vae, TOLD, starts, args)
    near, far = (batch.obs, batch.next_obs) if algo == "forward" else (batch.next_obs, batch.obs)
    assert len(near) == 150 and not batch.rewards.any() and not batch.terminations.any()
    assert torch.equal(far[:, 0], near[:, 0] + 1) and torch.equal(far[:, 0], torch.arange(1, 4).repeat_interleave(50))
    assert torch.equal(far[:, 1:3], batch.actions) and torch.equal(far[:, 3], near[:, 3])
    if resample:
        assert batch.actions.abs().max() <= 1 and batch.actions.std() > 0.4
    else:
        assert torch.equal(batch.actions, near[:, [3, 3]])
    for now, before in zip(near.split(50), (starts, *far.split(50)), strict=False):  # what the step before kept
        assert {tuple(row) for row in now.tolist()} <= {tuple(row) for row in before.tolist()}
        assert resample or torch.equal(now, before)


@pytest.mark.parametrize(
    "newest,older,ratio,n,expected",  # how many of D_S, of the newest round, of older ones
    [
        ([1], [2], 0.7, 256, [77, 54, 125]),
        ([1], [], 0.7, 256, [77, 179, 0]),  # the first round gets all
        ([], [], 0.7, 256, [256, 0, 0]),  # UDS
        ([], [2], 0.7, 256, [131, 0, 125]),  # no new goals
        ([1], [2], 0.0, 256, [256, 0, 0]),
        ([1], [2], 0.1, 1_000, [900, 30, 70]),
    ],
)
def test_mixtures_have_their_shares(newest, older, ratio, n, expected):
    mixed = sra.mixture(numbered([0]), numbered(newest), numbered(older), ratio, 0.3, n)
    assert torch.bincount(mixed.rewards.long(), minlength=3).tolist() == expected


# ------------------------------------------------------------------------------------------------------ models
@pytest.mark.parametrize("algo", ["sra", "forward"])
def test_model_learns_the_closed_form(algo):
    """On free space, where the dynamics are linear: far below the zero predictor."""
    torch.manual_seed(0)
    next_obs = torch.cat([3 * torch.rand(6_000, 2), 2 * torch.randn(6_000, 2)], 1)
    actions, zeros = torch.rand(6_000, 2) * 2 - 1, torch.zeros(6_000)
    obs = torch.from_numpy(exact_reverse(next_obs.numpy(), actions.numpy()))
    data = sra.Batch(obs, actions, zeros, next_obs, zeros)
    args = sra.Args(device="cpu", algo=algo, model_hidden_sizes=(64, 64), batch_size=128, model_batches=400)
    model = sra.DeltaEnsemble(4, 2, args)
    sra.standardise(model, data.obs)
    error = sra.fit_model(model, sra.delta_update, data, args)
    near, far = (data.obs, data.next_obs) if algo == "forward" else (data.next_obs, data.obs)
    scale = model.normalise.std
    again = ((model.predict(near, data.actions) - far) / scale).square().mean() / ((far - near) / scale).square().mean()
    assert error < 0.01 and again.item() == pytest.approx(error, rel=0.2)


def test_each_member_keeps_its_best_weights():
    """The update makes the first member better and the second one worse after the first validation."""
    args = small(model_members=2, model_batches=40)
    data, model, calls = transitions(60, 1), sra.DeltaEnsemble(4, 2, args), itertools.count(1)
    mean = (data.obs - data.next_obs).mean()
    targets = [mean + 100 * torch.tensor(far) for far in ([[[1.0]], [[0.0]]], [[[0.0]], [[1.0]]])]

    def update(model, state, actions, delta):
        with torch.no_grad():
            model.net.weights[-1].zero_()
            model.net.biases[-1].copy_(targets[next(calls) > 2].expand(-1, 1, 4))

    sra.fit_model(model, update, data, args)
    assert model.net.biases[-1].abs().max() < 50


def test_members_gradients_are_cut_one_by_one():
    model = sra.DeltaEnsemble(4, 2, small(model_members=2))
    seen = record(model.optimizer)
    state, actions = torch.randn(2, 8, 4), torch.randn(2, 8, 2)
    delta = model(state, actions).detach() + torch.tensor([1_000, 0.01])[:, None, None] * torch.randn(2, 8, 4)
    errors = (model(state, actions) - delta).square().mean((1, 2))
    alone = torch.autograd.grad(errors.sum(), list(model.net.parameters()))
    sra.delta_update(model, state, actions, delta)
    for grad, full in zip(seen[0], alone, strict=True):
        torch.testing.assert_close(grad[1], full[1])
    assert sum(grad[0].square().sum().item() for grad in seen[0]) == pytest.approx(1, rel=1e-4)
    assert sum(grad[1].square().sum().item() for grad in alone) < 1


def test_cvae_loss_and_samples():
    vae, state, actions, noise = sra.ActionVAE(4, 2, small()), torch.randn(30, 4), torch.rand(30, 2), torch.randn(30, 4)
    before, seen = copy.deepcopy(vae), record(vae.optimizer)
    error, kl = sra.cvae_update(vae, state, actions, noise)
    mean, log_std = before.encoder(state, actions)[0].chunk(2, -1)
    prior = torch.distributions.Normal(torch.zeros(30, 4), torch.ones(30, 4))
    posterior = torch.distributions.Normal(mean, log_std.exp())
    analytic = torch.distributions.kl_divergence(posterior, prior).sum(1).mean() / 4  # over the latent size
    squared = (before.decode(state, mean + log_std.exp() * noise) - actions).square().mean()
    torch.testing.assert_close((error, kl), (squared.detach(), analytic.detach()))
    assert_gradients(seen, squared + 0.5 * analytic, before)
    assert torch.equal(before.sample(state, 5 * noise), before.decode(state, (5 * noise).clamp(-0.5, 0.5)).detach())


# ---------------------------------------------------------------------------------------------------- learners
def assert_follows(target, before, source, tau: float) -> None:
    for now, old, new in zip(target.parameters(), before.parameters(), source.parameters(), strict=True):
        torch.testing.assert_close(now, old + tau * (new - old))


def assert_moved(network, before, lr: float) -> None:
    """Adam's first step."""
    step = (network.net.weights[0] - before.net.weights[0]).abs().max().item()
    assert step == pytest.approx(lr, rel=1e-2)


@pytest.mark.parametrize("actor_step", [True, False])
@pytest.mark.parametrize("learner", ["iql", "awac", "td3bc", "sac-n"])
def test_an_update_by_hand(learner, actor_step):
    args = small(learner=learner, tau=0.03, rl_coef=2.0, temperature=1000.0, num_critics=5, weight_decay=1e-9)
    agent, expert, other, noise = standard_agent(args), transitions(8, 1), transitions(6, 2), torch.randn(2, 14, 2)
    agent.actor_lr.fill_(2e-3)  # learning rates change in the course of a run
    agent.critic_lr.fill_(1e-2)
    grads = {name: record(getattr(agent, f"{name}_optimizer")) for name in ("value", "critic", "actor", "alpha")}
    before = copy.deepcopy(agent)
    metrics = sra.UPDATES[learner](agent, expert, other, noise, actor_step, args)
    obs, actions, rewards, next_obs, terminations = sra.concat(expert, other)

    policy = before.target_actor if learner == "td3bc" else before.actor
    next_actions, next_log_prob = policy.sample(next_obs, noise[0])
    next_values = before.target_critic(next_obs, next_actions).min(0).values
    next_values = {"iql": before.value(next_obs)[0], "sac-n": next_values - next_log_prob}.get(learner, next_values)
    target = (rewards + 0.99 * (1 - terminations) * next_values).detach()
    q = before.critic(obs, actions)
    loss = sum((one - target).square().mean() for one in q)
    assert metrics["losses/critic"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert_gradients(grads["critic"], loss * (0.5 if learner == "iql" else 1), before.critic)
    assert agent.critic_optimizer.weight_decay == (1e-9 if learner in ("iql", "awac") else 0)
    if learner == "sac-n":  # as in EDAC
        assert len(q) == 5 and all((bias == 0.1).all() for bias in before.critic.net.biases[:-1])
        assert before.critic.net.weights[-1].abs().max() <= 0.003

    waits = learner in ("td3bc", "sac-n") and not actor_step
    assert_moved(agent.critic, before.critic, 1e-2)
    assert_follows(agent.target_critic, before.target_critic, agent.critic, 0 if waits and learner == "td3bc" else 0.03)
    tau = 0.03 if learner == "td3bc" and actor_step else 0
    assert_follows(agent.target_actor, before.target_actor, agent.actor, tau)
    if waits:
        assert not grads["actor"]
        return
    assert_moved(agent.actor, before.actor, 2e-3)

    log_prob, q_of = before.actor.log_prob(obs, actions).sum(-1), lambda a: agent.critic(obs, a).min(0).values
    cloning = -log_prob[:8]
    if learner == "iql":
        advantages = before.target_critic(obs, actions).min(0).values.detach() - before.value(obs)[0]
        loss = ((0.7 - (advantages < 0).float()).abs() * advantages**2).mean()
        assert_gradients(grads["value"], loss, before.value)
    elif learner == "awac":
        advantages = q_of(actions) - q_of(before.actor.sample(obs, noise[1])[0])
    elif learner == "td3bc":
        q, entropy = agent.critic(obs, before.actor(obs)[0].tanh())[0], 0
    else:
        drawn, log_prob = before.actor.sample(obs, noise[1])
        q, entropy = q_of(drawn), -log_prob.mean()
        torch.testing.assert_close(grads["alpha"][0][0], entropy.detach() + 2)  # falls above an entropy of -|a|
    if learner in ("iql", "awac"):
        weights = (1000 * advantages.detach()).exp().clamp(max=100)
        assert weights.max() == 100 and weights.min() < 1  # the cap is at work
        assert metrics["losses/weight"].item() == pytest.approx(weights.mean().item(), rel=1e-3)
        loss = cloning.mean() - 2 * (weights * log_prob).mean()
    else:
        loss = cloning.mean() - entropy - 2 * (cloning.abs().mean() / q.abs().mean()).item() * q.mean()
    assert_gradients(grads["actor"], loss, before.actor)


def test_bf16_networks_are_seen_as_an_update_left_them(demos, tmp_path, monkeypatch):
    """autocast, as train sets it, does not keep old weights: updates evaluate a network that they have just changed."""
    seen = []

    def update(agent, expert, *_):
        q = agent.critic(expert.obs, expert.actions)
        agent.critic_optimizer.step(torch.autograd.grad(q.sum(), agent.critic_optimizer.params))
        now = agent.critic(expert.obs, expert.actions)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            seen.append(torch.equal(now, agent.critic(expert.obs, expert.actions)) and not torch.equal(now, q))
        return {}

    monkeypatch.setitem(sra.UPDATES, "iql", update)
    data = dict(env_id=POINT, demos=demos, offline_data=(demos,), run_dir=str(tmp_path / "run"))
    sra.train(small(algo="uds", bf16=True, eval_episodes=1, total_timesteps=2, **data))
    assert seen == [True, True]
