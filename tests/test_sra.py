"""sra_offline.py and envs/maze2d.py against hand calculation or a second method."""

import copy
import itertools
import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch

import sra_offline as sra
from envs.maze2d import MAZES, Maze2D, WaypointController, maze_data, maze_file


@pytest.fixture(scope="module")
def env() -> gym.Env:
    return sra.make_env("Maze2D-umaze-v0")


@pytest.fixture(scope="module")
def offline() -> dict[str, np.ndarray]:
    return maze_data("Maze2D-umaze-v0", "offline", 6_000, seed=0)


def agent_and_args(**settings):
    torch.manual_seed(0)
    small = dict(hidden_sizes=(16, 16), model_hidden_sizes=(16, 16), cvae_hidden_sizes=(16, 16))
    args = sra.Args(**small | settings)
    agent = sra.OfflineAgent(4, 2, args)
    sra.standardise(agent, 2 * torch.randn(100, 4) + 1)
    return agent, args


def transitions(n: int, seed: int, reward: float = 0.0) -> sra.Batch:
    generator = torch.Generator().manual_seed(seed)
    obs, next_obs = torch.randn(2, n, 4, generator=generator)
    actions = torch.rand(n, 2, generator=generator) * 1.9 - 0.95
    return sra.Batch(obs, actions, torch.full((n,), reward), next_obs, (torch.arange(n) % 3 == 0).float())


def numbered(numbers) -> sra.Batch:
    """Transitions that can be told apart by their rewards."""
    numbers = torch.as_tensor(numbers, dtype=torch.float32)
    return sra.Batch(numbers[:, None].expand(-1, 4), torch.zeros(len(numbers), 2), numbers, *2 * [numbers])


class Told(sra.OfflineActor):
    """Has the confidence that stands in the first column of the state."""

    def confidence(self, obs):
        return obs[:, 0]


def record(optimizer) -> list:
    """The gradients of the optimiser's steps, as they come."""
    seen, step = [], optimizer.step
    optimizer.step = lambda grads: [seen.append(grads), step(grads)]
    return seen


def gradients(loss: torch.Tensor, network: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, list(network.parameters()))


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


def test_frames_are_each_others_inverse():
    env, obs = Maze2D("large"), np.random.default_rng(0).normal(size=4)
    np.testing.assert_allclose(env.from_pointmaze(env.to_pointmaze(obs)), obs, atol=1e-12)
    start, _ = env.reset(seed=3)
    joints = np.concatenate([env.point.data.qpos, env.point.data.qvel])
    np.testing.assert_allclose(env.from_pointmaze(joints), start, atol=1e-12)


def test_reward_within_half_a_cell_of_the_goal_and_no_termination(env):
    env.reset(seed=0)
    steps = [env.step(np.zeros(2, np.float32)) for _ in range(300)]
    assert [step[3] for step in steps].index(True) == 299 and not any(step[2] for step in steps)
    for x, reward in ((1.49, 1), (1.51, 0)):
        env.unwrapped.reset(options={"start": [x, 1.0, 0, 0]})
        _, found, *_, info = env.unwrapped.step(np.zeros(2))
        assert found == reward == info["success"]


def test_random_and_expert_returns_are_the_known_ones(env):
    rng, returns = np.random.default_rng(0), []
    for episode in range(20):
        env.reset(seed=episode)
        returns.append(sum(env.step(rng.uniform(-1, 1, 2).astype(np.float32))[1] for _ in range(300)))
    expert = maze_data("Maze2D-umaze-v0", "expert", 3_000, seed=0)
    assert np.mean(returns) < 60 and expert["rewards"].sum() / 10 > 180  # D4RL: 24; re-planned: about 218
    assert np.flatnonzero(expert["truncations"]).tolist() == list(range(299, 3_000, 300))


def test_offline_data_are_one_stream_from_goal_to_goal(offline):
    np.testing.assert_array_equal(offline["observations"][1:], offline["next_observations"][:-1])
    ends = np.flatnonzero(offline["truncations"])
    assert len(ends) > 10 and np.diff(ends).max() <= 300
    at_goal = offline["next_observations"][ends, :2]
    assert (np.linalg.norm(at_goal - at_goal.round(), axis=1) < 0.15).mean() > 0.8  # the others ran out of time
    free = exact_reverse(offline["next_observations"].astype(float), offline["actions"].astype(float))
    assert (np.abs(free - offline["observations"]).max(1) < 1e-5).mean() > 0.95  # few steps touch a wall
    again = maze_data("Maze2D-umaze-v0", "offline", 50, seed=0)
    assert all(np.array_equal(again[name][:49], offline[name][:49]) for name in again)
    assert not np.array_equal(maze_data("Maze2D-umaze-v0", "offline", 50, seed=1)["actions"], again["actions"])


def test_plan_leads_through_free_cells_around_the_wall():
    controller = WaypointController(Maze2D("umaze").walls, np.random.default_rng(0))
    controller.plan(np.array([3.0, 1.0, 0, 0]), (1, 1))
    for waypoint, cell in zip(controller.waypoints, [(3, 2), (3, 3), (2, 3), (1, 3), (1, 2), (1, 1)], strict=True):
        assert (cell - waypoint >= 0).all() and (cell - waypoint <= 0.2).all()
    action, at_goal = controller.act(np.array([3.0, 1.0, 0.1, 0]))
    np.testing.assert_allclose(action, np.clip(10 * (controller.waypoints[0] - [3, 1]) - [0.1, 0], -1, 1))
    assert not at_goal and tuple(controller.waypoints[-1]) == (1, 1)
    controller.plan(np.array([1.05, 1.0, 0, 0]), (1, 1))
    assert len(controller.waypoints) == 1 and controller.act(np.array([1.05, 1.0, 0, 0]))[1]


def write_episodes(path, lengths, **changes) -> str:
    """A file of episodes whose states count on, all with reward 1."""
    n = sum(lengths)
    obs = np.arange(n, dtype=np.float32)[:, None].repeat(4, 1)
    ends = np.isin(np.arange(n), np.cumsum(lengths) - 1)
    data = dict(observations=obs, actions=np.full((n, 2), 0.5), rewards=np.ones(n), next_observations=obs + 1)
    data |= dict(terminations=ends & (np.arange(n) < 5), truncations=ends & (np.arange(n) >= 5))
    np.savez(path, **data | changes)
    return str(path)


def test_demonstrations_are_chosen_by_the_data_seed(env, tmp_path):
    file, cut = write_episodes(tmp_path / "a.npz", [3, 4, 5, 6]), np.zeros(9)
    cut[2] = 1  # only the first three rows are a whole trajectory
    partial = write_episodes(tmp_path / "b.npz", [9], terminations=np.zeros(9), truncations=cut)
    for seed in (0, 1):
        args = sra.Args(demos=file, offline_data=(file, partial), num_demos=2, data_seed=seed)
        expert, offline, expert_return = sra.load_data(env, args)
        chosen = np.random.default_rng([seed, 2]).permutation(4)[:2]
        assert [len(episode.obs) for episode in expert] == (3 + chosen).tolist()
        assert expert_return == np.mean(3 + chosen)
        assert all((episode.rewards == 1).all() for episode in expert)
    assert [len(episode.obs) for episode in offline] == [3, 4, 5, 6, 3]
    whole = sra.concat(*offline)
    assert not whole.rewards.any() and whole.terminations.tolist() == [0, 0, 1] + 18 * [0]
    assert torch.equal(whole.next_obs, whole.obs + 1)


def test_actions_are_rescaled_to_the_unit_box(tmp_path):
    point = sra.make_env("Hopper-v4")
    obs = np.zeros((3, 11), np.float32)
    file = write_episodes(tmp_path / "c.npz", [3], observations=obs, next_observations=obs, actions=-np.ones((3, 3)))
    (episode,), returns = sra.load_episodes(file, point, "cpu")
    assert (episode.actions == -1).all() and returns.tolist() == [3]
    point.unwrapped.action_space = gym.spaces.Box(np.float32([-4, -1, -1]), np.float32([0, 3, 1]))
    (episode,), _ = sra.load_episodes(file, point, "cpu")
    torch.testing.assert_close(episode.actions[0], torch.tensor([0.5, -1, -1]))


def test_generated_files_are_made_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = maze_file("Maze2D-umaze-v0", "offline", 40, seed=3)
    data = np.load(path)
    assert json.loads(str(data["metadata"]))["env_id"] == "Maze2D-umaze-v0" and len(data["observations"]) == 40
    monkeypatch.setattr("envs.maze2d.maze_data", None)
    assert maze_file("Maze2D-umaze-v0", "offline", 40, seed=3) == path


# --------------------------------------------------------------------------------- policy, confidence, resampling
def test_log_prob_and_confidence_are_those_of_the_transformed_normal():
    agent, _ = agent_and_args()
    obs = torch.randn(50, 4)
    mean, log_std = (x.double() for x in agent.actor(obs))
    normal = torch.distributions.Normal(mean, log_std.exp())
    squashed = torch.distributions.TransformedDistribution(normal, [torch.distributions.TanhTransform()])
    expected = squashed.log_prob(mean.tanh()).sum(-1)
    torch.testing.assert_close(agent.actor.confidence(obs).double(), expected, rtol=1e-4, atol=1e-4)
    expected = squashed.log_prob(torch.tensor(0.7).double())
    torch.testing.assert_close(
        agent.actor.log_prob(obs, torch.full((50, 2), 0.7)).double(), expected, rtol=1e-4, atol=1e-4
    )
    actions, log_prob = agent.actor.sample(obs, torch.randn(50, 2))
    torch.testing.assert_close(agent.actor.log_prob(obs, actions).sum(-1), log_prob, rtol=1e-3, atol=1e-3)


def test_bounds_keep_confidence_and_densities_finite():
    agent, _ = agent_and_args()
    with torch.no_grad():
        agent.actor.net.biases[-1].copy_(torch.tensor([500.0, -500, 90, -90]))
    obs = torch.zeros(1, 4)
    mean, log_std = agent.actor(obs)
    assert mean.tolist() == [[9, -9]] and log_std.tolist() == [[2, -5]]
    by_hand = sum(-s - 0.5 * math.log(2 * math.pi) - math.log(1 - math.tanh(9) ** 2) for s in (2, -5))
    assert agent.actor.confidence(obs).item() == pytest.approx(by_hand, rel=1e-3)
    assert agent.actor.log_prob(obs, torch.tensor([[1.0, -1.0]])).isfinite().all()


def test_saved_policy_acts_as_the_trained_one():
    """evaluate.py builds an Actor, which has no bounds."""
    agent, _ = agent_and_args()
    actor, obs = sra.Actor(4, 2, (16, 16)), np.random.default_rng(0).normal(size=4).astype(np.float32)
    with torch.no_grad():
        agent.actor.net.biases[-1][0, 0, 0] = 20
    actor.load_state_dict(agent.actor.state_dict())
    np.testing.assert_allclose(actor.act(obs, True), agent.actor.act(obs, True), atol=1e-6)


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


def test_resampling_does_not_overflow_and_has_a_floor():
    torch.manual_seed(0)
    assert sra.keep_unsure(torch.tensor([200.0, 150.0, -200.0, 199.0]), 1).item() == 2
    kept = torch.cat([sra.keep_unsure(torch.tensor([-80.0, -40.0, -30.0, -50.0]), 1) for _ in range(2_000)])
    assert torch.bincount(kept).min() > 400  # far below the floor of 1e-5 all are the same


def test_goals_are_above_the_quantile_and_capped():
    actor, confidence = Told(4, 2, (8,)), np.linspace(0, 20, 300)
    above = np.flatnonzero(confidence > np.quantile(np.arange(10), 0.8))
    for n, expected in ((300, above[-100:]), (150, above[above < 150])):  # the cap keeps the most confident ones
        goals = sra.confident_states(actor, numbered(range(10)), numbered(confidence[:n]))
        np.testing.assert_allclose(sorted(goals.rewards.tolist()), confidence[expected], rtol=1e-6)


# ------------------------------------------------------------------------------------------ rollouts and batches
class Shift(sra.DeltaEnsemble):
    """Reaches state + 1 in the first column, and notes the action in the next ones."""

    def predict(self, state, actions):
        return torch.cat([state[:, :1] + 1, actions, state[:, 3:]], 1)


@pytest.mark.parametrize("algo", ["sra", "forward"])
@pytest.mark.parametrize("resample", [True, False])
def test_rollouts_go_on_from_where_they_arrived(algo, resample):
    _, args = agent_and_args(algo=algo, resample=resample, rollout_length=3)
    starts = torch.zeros(100 if resample else 50, 4)
    starts[:, 3] = torch.rand(len(starts))
    batch = sra.augment(Shift(4, 2, args), None, Told(4, 2, (8,)), starts, args)
    near, far = (batch.obs, batch.next_obs) if algo == "forward" else (batch.next_obs, batch.obs)
    assert len(near) == 150 and not batch.rewards.any() and not batch.terminations.any()
    torch.testing.assert_close(far[:, 0], near[:, 0] + 1)
    assert torch.equal(far[:, 1:3], batch.actions) and torch.equal(far[:, 3], near[:, 3])
    assert batch.actions.abs().max() <= 1 and batch.actions.std() > 0.4
    before = starts
    for step in range(3):  # each goes on from a state that the step before kept
        now, reached = near[50 * step : 50 * step + 50], far[50 * step : 50 * step + 50]
        assert {tuple(row) for row in now.tolist()} <= {tuple(row) for row in before.tolist()}
        assert resample or torch.equal(now, before)
        before = reached


def test_rollouts_keep_states_of_low_confidence():
    _, args = agent_and_args(rollout_length=1)
    starts = torch.zeros(200, 4)
    starts[::2, 0] = 100
    batch = sra.augment(Shift(4, 2, args), None, Told(4, 2, (8,)), starts, args)
    assert batch.obs[:, 0].tolist() == 100 * [1.0]


def test_rollouts_take_the_autoencoders_actions():
    _, args = agent_and_args(rollout_length=1, resample=False)
    vae, seen = sra.ActionVAE(4, 2, args), []
    vae.sample = lambda state, noise: [seen.append((state, noise)), torch.full((len(state), 2), 0.25)][1]
    starts = torch.randn(5, 4)
    batch = sra.augment(Shift(4, 2, args), vae, Told(4, 2, (8,)), starts, args)
    assert (batch.actions == 0.25).all() and torch.equal(seen[0][0], starts) and seen[0][1].shape == (5, 4)


def test_mixtures_have_their_shares():
    """Of D_S (0), newest (1) and older (2) rounds; the total is always the same."""
    base, newest, older, nothing = (numbered(numbers) for numbers in ([0], [1], [2], []))

    def counts(newest, older, ratio=0.7, n=256):
        return torch.bincount(sra.mixture(base, newest, older, ratio, 0.3, n).rewards.long(), minlength=3).tolist()

    assert counts(newest, older) == [77, 54, 125]
    assert counts(newest, nothing) == [77, 179, 0]  # the first round gets all
    assert counts(nothing, nothing) == [256, 0, 0]  # UDS
    assert counts(nothing, older) == [131, 0, 125]  # no new goals
    assert counts(newest, older, ratio=0.0) == [256, 0, 0]
    assert counts(newest, older, ratio=0.1, n=1_000) == [900, 30, 70]


# ------------------------------------------------------------------------------------------------------ models
def fitted_model(args: sra.Args, data: sra.Batch) -> tuple[sra.DeltaEnsemble, float]:
    torch.manual_seed(0)
    model = sra.DeltaEnsemble(4, 2, args)
    sra.standardise(model, data.obs)
    return model, sra.fit_model(model, sra.delta_update, data, args)


@pytest.mark.parametrize("algo", ["sra", "forward"])
def test_model_learns_the_closed_form(algo):
    """On free space, where the dynamics are linear: far below the zero predictor."""
    rng = np.random.default_rng(0)
    next_obs = np.concatenate([rng.uniform(0, 3, (6_000, 2)), rng.normal(0, 2, (6_000, 2))], 1)
    actions = rng.uniform(-1, 1, (6_000, 2))
    columns = exact_reverse(next_obs, actions), actions, np.zeros(6_000), next_obs, np.zeros(6_000)
    data = sra.Batch(*(torch.as_tensor(column, dtype=torch.float32) for column in columns))
    args = sra.Args(algo=algo, model_hidden_sizes=(64, 64), batch_size=128, model_batches=400)
    model, error = fitted_model(args, data)
    near, far = (data.obs, data.next_obs) if algo == "forward" else (data.next_obs, data.obs)
    scale = model.normalise.std
    again = ((model.predict(near, data.actions) - far) / scale).square().mean() / ((far - near) / scale).square().mean()
    assert error < 0.01 and again.item() == pytest.approx(error, rel=0.2)


def test_reverse_model_is_as_good_as_least_squares_on_maze_data(offline):
    """The dynamics are linear but at walls and at the speed limit."""
    names = ("observations", "actions", "rewards", "next_observations", "terminations")
    data = sra.Batch(*(torch.from_numpy(offline[name]) for name in names))
    args = sra.Args(model_hidden_sizes=(64, 64), batch_size=128, model_batches=500)
    model, _ = fitted_model(args, data)
    scale = model.normalise.std.numpy()
    delta = (data.obs - data.next_obs).numpy() / scale
    design = np.concatenate([data.next_obs, data.actions, np.ones((len(delta), 1))], 1)
    linear = design @ np.linalg.lstsq(design, delta, rcond=None)[0]
    predicted = (model.predict(data.next_obs, data.actions) - data.next_obs).numpy() / scale
    errors = [((guess - delta) ** 2).mean() / (delta**2).mean() for guess in (linear, predicted)]
    assert errors[0] < 0.05 and errors[1] < 1.2 * errors[0]


def test_each_member_keeps_its_best_weights():
    """The update makes the first member better and the second one worse after the first validation."""
    _, args = agent_and_args(model_members=2, model_batches=40)
    data, model, calls = transitions(60, 1), sra.DeltaEnsemble(4, 2, args), itertools.count(1)
    delta = data.obs - data.next_obs
    targets = [delta.mean() + 100 * torch.tensor([[0.0], [1.0]]), delta.mean() + 100 * torch.tensor([[1.0], [0.0]])]

    def update(model, state, actions, delta):
        with torch.no_grad():
            model.net.weights[-1].zero_()
            model.net.biases[-1].copy_(targets[next(calls) <= 2][:, :, None].expand(-1, 1, 4))

    sra.fit_model(model, update, data, args)
    assert model.net.biases[-1].abs().max() < 50


def test_members_gradients_are_cut_one_by_one():
    _, args = agent_and_args(model_members=2)
    model = sra.DeltaEnsemble(4, 2, args)
    seen = record(model.optimizer)
    state, actions, delta = torch.randn(2, 8, 4), torch.randn(2, 8, 2), 0.01 * torch.randn(2, 8, 4)
    delta[0] *= 100_000
    alone = gradients(sra.delta_loss(model, state, actions, delta)[1], model.net)
    sra.delta_update(model, state, actions, delta)
    norms = [math.sqrt(sum(grad[m].square().sum().item() for grad in seen[0])) for m in range(2)]
    whole = math.sqrt(sum(grad[1].square().sum().item() for grad in alone))
    assert norms == pytest.approx([1.0, whole], rel=1e-4) and whole < 1


def test_cvae_loss_and_samples():
    _, args = agent_and_args()
    vae = sra.ActionVAE(4, 2, args)
    state, actions, noise = torch.randn(30, 4), torch.rand(30, 2) * 2 - 1, torch.randn(30, 4)
    before, seen = copy.deepcopy(vae), record(vae.optimizer)
    error, kl = sra.cvae_update(vae, state, actions, noise)
    mean, log_std = before.encoder(state, actions)[0].chunk(2, -1)
    prior = torch.distributions.Normal(torch.zeros(30, 4), torch.ones(30, 4))
    posterior = torch.distributions.Normal(mean, log_std.exp())
    analytic = torch.distributions.kl_divergence(posterior, prior).sum(1).mean() / 4  # over the latent size
    squared = (before.decode(state, mean + log_std.exp() * noise) - actions).square().mean()
    torch.testing.assert_close((error, kl), (squared.detach(), analytic.detach()))
    torch.testing.assert_close(seen[0], gradients(squared + 0.5 * analytic, before))
    assert torch.equal(before.sample(state, 5 * noise), before.decode(state, (5 * noise).clamp(-0.5, 0.5)).detach())


# ---------------------------------------------------------------------------------------------------- learners
def test_iql_step_by_hand():
    settings = dict(rl_coef=2.0, temperature=1000.0, tau=0.03, weight_decay=0.0)
    agent, args = agent_and_args(**settings)
    expert, other = transitions(8, 1, 1.0), transitions(6, 2)
    batch = sra.concat(expert, other)
    with torch.no_grad():  # advantages of both signs
        advantages = agent.target_critic(batch.obs, batch.actions).amin(0) - agent.value(batch.obs)[0]
        agent.value.net.biases[-1] += advantages.median()
    before = copy.deepcopy(agent)
    grads = {name: record(getattr(agent, f"{name}_optimizer")) for name in ("value", "critic", "actor")}
    metrics = sra.iql_update(agent, expert, other, torch.zeros(2, 14, 2), False, args)

    advantages = before.target_critic(batch.obs, batch.actions).min(0).values.detach() - before.value(batch.obs)[0]
    value_loss = ((0.7 - (advantages < 0).float()).abs() * advantages**2).mean()
    torch.testing.assert_close(grads["value"][0], gradients(value_loss, before.value))
    next_values = before.value(batch.next_obs)[0].detach()  # before the value's step
    target = batch.rewards + 0.99 * (1 - batch.terminations) * next_values
    q = before.critic(batch.obs, batch.actions)
    critic_loss = 0.5 * sum((q[i] - target).square().mean() for i in range(2))
    torch.testing.assert_close(grads["critic"][0], gradients(critic_loss, before.critic))
    weights = (1000 * advantages.detach()).exp().clamp(max=100)
    assert weights.max() == 100 and weights.min() < 1  # the cap is at work
    log_prob = before.actor.log_prob(batch.obs, batch.actions).sum(-1)
    actor_loss = -log_prob[:8].mean() - 2 * (weights * log_prob).mean()
    torch.testing.assert_close(grads["actor"][0], gradients(actor_loss, before.actor))
    assert metrics["losses/weight"].item() == pytest.approx(weights.mean().item(), rel=1e-5)
    pairs = zip(before.critic.parameters(), agent.critic.parameters(), strict=True)
    for target, (old, new) in zip(agent.target_critic.parameters(), pairs, strict=True):
        torch.testing.assert_close(target, old + 0.03 * (new - old))


def test_td3bc_acts_every_second_step_with_a_scale_free_value():
    agent, args = agent_and_args(learner="td3bc", rl_coef=2.5, tau=0.03)
    expert, other, noise = transitions(8, 1, 1.0), transitions(6, 2), torch.randn(2, 14, 2)
    before, grads = copy.deepcopy(agent), record(agent.actor_optimizer)
    metrics = sra.td3bc_update(agent, expert, other, noise, False, args)
    batch = sra.concat(expert, other)
    next_values = before.target_critic(batch.next_obs, before.actor.sample(batch.next_obs, noise[0])[0]).min(0).values
    target = batch.rewards + 0.99 * (1 - batch.terminations) * next_values
    loss = (before.critic(batch.obs, batch.actions) - target).square().sum(0).mean()
    assert metrics["losses/critic"].item() == pytest.approx(loss.item(), rel=1e-5) and not grads
    assert torch.equal(agent.target_critic.net.weights[0], before.target_critic.net.weights[0])
    sra.td3bc_update(agent, expert, other, noise, True, args)
    cloning = -before.actor.log_prob(expert.obs, expert.actions).sum(-1)
    q = agent.critic(batch.obs, before.actor(batch.obs)[0].tanh())[0]
    loss = cloning.mean() - 2.5 * (cloning.abs().mean() / q.abs().mean()).item() * q.mean()
    torch.testing.assert_close(grads[0], gradients(loss, before.actor))
    pairs = zip(before.actor.parameters(), agent.actor.parameters(), strict=True)
    for target, (old, new) in zip(agent.target_actor.parameters(), pairs, strict=True):
        torch.testing.assert_close(target, old + 0.03 * (new - old))


def test_awac_weights_and_target():
    agent, args = agent_and_args(learner="awac", temperature=1.0)
    expert, other, noise = transitions(8, 1, 1.0), transitions(6, 2), torch.randn(2, 14, 2)
    assert len(agent.critic.net.weights) == 4
    before, grads = copy.deepcopy(agent), record(agent.actor_optimizer)
    metrics = sra.awac_update(agent, expert, other, noise, True, args)
    batch = sra.concat(expert, other)
    next_values = before.target_critic(batch.next_obs, before.actor.sample(batch.next_obs, noise[0])[0]).min(0).values
    target = batch.rewards + 0.99 * (1 - batch.terminations) * next_values
    loss = (before.critic(batch.obs, batch.actions) - target).square().sum(0).mean()
    assert metrics["losses/critic"].item() == pytest.approx(loss.item(), rel=1e-5)
    policy_actions = before.actor.sample(batch.obs, noise[1])[0]
    q, v = (agent.critic(batch.obs, actions).min(0).values for actions in (batch.actions, policy_actions))
    weights = (q - v).exp().detach()
    assert metrics["losses/weight"].item() == pytest.approx(weights.mean().item(), rel=1e-5)
    log_prob = before.actor.log_prob(batch.obs, batch.actions).sum(-1)
    loss = -log_prob[:8].mean() - (weights * log_prob).mean()
    torch.testing.assert_close(grads[0], gradients(loss, before.actor))


def test_sac_n_takes_the_least_of_n_critics():
    agent, args = agent_and_args(learner="sac-n", num_critics=5)
    expert, other, noise = transitions(8, 1, 1.0), transitions(6, 2), torch.randn(2, 14, 2)
    assert all((bias == 0.1).all() for bias in agent.critic.net.biases[:-1])
    assert agent.critic.net.weights[-1].shape == (5, 16, 1) and agent.critic.net.weights[-1].abs().max() <= 0.003
    before, grads = copy.deepcopy(agent), record(agent.actor_optimizer)
    metrics = sra.sacn_update(agent, expert, other, noise, True, args)
    batch = sra.concat(expert, other)
    next_actions, next_log_prob = before.actor.sample(batch.next_obs, noise[0])
    next_values = before.target_critic(batch.next_obs, next_actions).min(0).values - next_log_prob  # alpha is 1
    target = batch.rewards + 0.99 * (1 - batch.terminations) * next_values
    loss = sum((q - target).square().mean() for q in before.critic(batch.obs, batch.actions))
    assert metrics["losses/critic"].item() == pytest.approx(loss.item(), rel=1e-5)
    cloning = -before.actor.log_prob(expert.obs, expert.actions).sum(-1)
    actions, log_prob = before.actor.sample(batch.obs, noise[1])
    q = agent.critic(batch.obs, actions).min(0).values
    loss = cloning.mean() + log_prob.mean() - (cloning.abs().mean() / q.abs().mean()).item() * q.mean()
    torch.testing.assert_close(grads[0], gradients(loss, before.actor), rtol=1e-4, atol=1e-6)
    assert -log_prob.mean() > -2 and agent.log_alpha < 0  # more entropy than -|a|: the temperature falls


def test_weight_decay_is_that_of_the_learner():
    decays = dict(iql=(0.1, 0.1), awac=(0.1, 0.1), td3bc=(0.1, 0.0))
    for learner, expected in decays.items():
        agent, _ = agent_and_args(learner=learner, weight_decay=0.1)
        assert (agent.actor_optimizer.weight_decay, agent.critic_optimizer.weight_decay) == expected


@pytest.mark.parametrize("learner", ["iql", "td3bc", "awac", "sac-n"])
def test_steps_follow_a_learning_rate_that_changes(learner):
    agent, args = agent_and_args(learner=learner, weight_decay=0.0)
    agent.actor_lr.fill_(0.0)
    agent.critic_lr.fill_(1e-2)
    before = copy.deepcopy(agent)
    expert, other, noise = transitions(8, 1, 1.0), transitions(6, 2), torch.randn(2, 14, 2)
    sra.UPDATES[learner](agent, expert, other, noise, True, args)
    assert torch.equal(agent.actor.net.weights[0], before.actor.net.weights[0])
    step = (agent.critic.net.weights[0] - before.critic.net.weights[0]).abs().max().item()
    assert step == pytest.approx(1e-2, rel=1e-2)  # Adam's first step


def test_bf16_networks_are_seen_as_an_update_left_them(tmp_path, monkeypatch):
    """autocast, as train sets it, does not keep old weights: updates evaluate a network that they have just changed."""
    settings, autocast = [], torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: [settings.append((a, k)), autocast(*a, **k)][1])
    file = write_episodes(tmp_path / "a.npz", [30])
    tiny = dict(demos=file, offline_data=(file,), num_demos=1, hidden_sizes=(8, 8), eval_episodes=1, total_timesteps=2)
    sra.train(sra.Args(algo="bc", bf16=True, run_dir=str(tmp_path / "run"), **tiny))
    (positional, keywords), agent = settings[0], agent_and_args()[0]
    batch = transitions(8, 1)
    with autocast(*positional, **keywords):
        q = agent.critic(batch.obs, batch.actions)
        agent.critic_optimizer.step(gradients(q.sum(), agent.critic))
        now = agent.critic(batch.obs, batch.actions)
    with autocast("cpu", torch.bfloat16):
        assert torch.equal(now, agent.critic(batch.obs, batch.actions)) and not torch.equal(now, q)


def test_tuned_settings_are_flags():
    for name, settings in sra.TUNED.items():
        assert settings.keys() <= sra.Args.__dataclass_fields__.keys(), name
