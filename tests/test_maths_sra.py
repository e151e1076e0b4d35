"""SRA's and the offline baselines' parts against hand calculation or a second method, and tiny runs of every method and learner."""

import copy
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import sra_offline as sra
from tests.conftest import POINT, TINY_SRA, rows, run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    """The generated data of a small umaze data set."""
    folder = str(tmp_path_factory.mktemp("data"))
    args = sra.parse_args([*TINY_SRA, "--data-dir", folder])
    for part in ("expert", "offline"):
        sra.generated(part, args)
    return folder


@pytest.fixture
def maze(data_dir) -> list[str]:
    """Command line of a tiny run on the umaze."""
    return [*TINY_SRA, "--data-dir", data_dir]


@pytest.fixture(scope="session")
def env() -> gym.Env:
    return sra.make_env("maze2d-umaze-v1")


def load(folder: str, part: str) -> dict[str, np.ndarray]:
    return dict(np.load(next(Path(folder).glob(f"maze2d-umaze-{part}*.npz"))))


def agent_and_args(**settings):
    torch.manual_seed(0)
    args = sra.Args(**{"hidden_sizes": (16, 16), "model_hidden_sizes": (16, 16), "cvae_hidden_sizes": (16, 16), **settings})
    return sra.OfflineAgent(4, 2, args), args


def transitions(n: int, seed: int = 1, reward: float = 0.0) -> sra.Batch:
    generator = torch.Generator().manual_seed(seed)
    obs, next_obs = torch.randn(2, n, 4, generator=generator)
    terminated = (torch.arange(n) % 3 == 0).float()
    return sra.Batch(obs, torch.rand(n, 2, generator=generator) * 1.9 - 0.95, torch.full((n,), reward), next_obs, terminated)


class Told(sra.OfflineActor):
    """Has the confidence that stands in the first column of the state."""

    def confidence(self, obs, kind="mode"):
        return obs[:, 0]


# The maze and its data
def exact_reverse(next_obs: np.ndarray, action: np.ndarray) -> np.ndarray:
    """Where a step came from, away from walls: m = 4.18879, force 100 a, damping 1, dt 0.01."""
    velocity = 1.0023873 * next_obs[..., 2:] - 0.238732 * action
    return np.concatenate([next_obs[..., :2] - 0.01 * next_obs[..., 2:], velocity], -1)


@pytest.mark.parametrize("name,centre", [("umaze", (1, 1)), ("medium", (6, 6)), ("large", (7, 9))])
def test_reverse_step_and_real_step_are_a_round_trip(name, centre):
    rng, maze = np.random.default_rng(0), sra.Maze2d(name)
    assert tuple(maze.goal) == centre and not maze.walls[centre]
    for _ in range(50):
        next_obs = np.array([*(centre + rng.uniform(-0.25, 0.05, 2)), *rng.uniform(-3, 3, 2)])
        action = rng.uniform(-1, 1, 2)
        obs = exact_reverse(next_obs, action)
        maze.reset(seed=0, options={"start": obs})
        np.testing.assert_allclose(maze.step(action)[0], next_obs, atol=1e-6)  # the constants have 7 digits


def test_the_reverse_step_is_exact_with_exact_constants():
    """Mass of a sphere of radius 0.1 and density 1000; damping is implicit."""
    mass, rng, maze = 1000 * 4 / 3 * math.pi * 0.1**3, np.random.default_rng(0), sra.Maze2d("umaze")
    for _ in range(20):
        next_obs, action = np.array([*rng.uniform(0.8, 1, 2), *rng.uniform(-3, 3, 2)]), rng.uniform(-1, 1, 2)
        velocity = (1 + 0.01 / mass) * next_obs[2:] - action / mass
        maze.reset(seed=0, options={"start": np.array([*(next_obs[:2] - 0.01 * next_obs[2:]), *velocity])})
        np.testing.assert_allclose(maze.step(action)[0], next_obs, atol=1e-9)


def test_frames_are_each_others_inverse(env):
    maze, obs = env.unwrapped, np.random.default_rng(0).normal(size=(5, 4))
    there = np.array([maze.to_pointmaze(o) for o in obs])
    np.testing.assert_allclose(maze.from_pointmaze(there), obs, atol=1e-12)
    start, _ = env.reset(seed=3)
    np.testing.assert_allclose(maze.from_pointmaze(np.concatenate([maze.point.data.qpos, maze.point.data.qvel])), start, atol=1e-12)


def test_episodes_last_the_horizon_and_never_terminate(env):
    env.reset(seed=0)
    steps = [env.step(np.zeros(2, np.float32)) for _ in range(300)]
    assert [step[3] for step in steps].index(True) == 299 and not any(step[2] for step in steps)
    maze = env.unwrapped
    maze.reset(seed=0, options={"start": [1.0, 1.49, 0, 0]})
    *_, info = maze.step(np.zeros(2))
    assert info["success"] and info["dense_reward"] == pytest.approx(math.exp(-0.49), abs=1e-3)
    maze.reset(seed=0, options={"start": [2.6, 1.0, 0, 0]})
    assert maze.step(np.zeros(2))[1] == 0


def test_random_and_expert_returns_are_the_known_ones(env, data_dir):
    rng, returns = np.random.default_rng(0), []
    for episode in range(40):
        env.reset(seed=episode)
        returns.append(sum(env.step(rng.uniform(-1, 1, 2).astype(np.float32))[1] for _ in range(300)))
    expert = load(data_dir, "expert")
    assert np.mean(returns) < 60 and expert["rewards"].sum() / 100 > 180
    assert expert["truncations"].sum() == 100 and (np.flatnonzero(expert["truncations"]) % 300 == 299).all()


def test_scores_are_those_of_the_benchmark():
    table = {("maze2d-umaze-v1", 161.86): 100, ("maze2d-medium-v1", 13.13): 0, ("Hopper-v4", 3234.3): 100, ("Ant-v5", -325.6): 0}
    for (env_id, value), score in table.items():
        assert sra.normalised_score(env_id, value) == pytest.approx(score)
    assert sra.normalised_score("maze2d-umaze-v1", (68.537689 + 193.66285642381482) / 2, "-dense") == pytest.approx(50)
    assert math.isnan(sra.normalised_score("Humanoid-v4", 1.0))


def test_data_is_one_stream_of_noisy_goal_reaching(data_dir):
    data = load(data_dir, "offline")
    np.testing.assert_array_equal(data["observations"][1:], data["next_observations"][:-1])
    ends = np.flatnonzero(data["truncations"])
    assert len(ends) > 10 and np.diff(ends).max() <= 300 and np.std(data["observations"][ends][:, 0]) > 0.5
    at_goal = np.abs(data["observations"][ends] - data["observations"][ends].round())[:, :2]
    assert (np.linalg.norm(at_goal, axis=1) < 0.1).mean() > 0.8  # the others ran out of time
    free = exact_reverse(data["next_observations"].astype(float), data["actions"].astype(float))
    assert (np.abs(free - data["observations"]).max(1) < 1e-5).mean() > 0.95
    again = sra.maze_data("umaze", "offline", 50, 0.5, 0)
    assert all(np.array_equal(again[name][:-1], data[name][:49]) for name in again)
    assert not np.array_equal(sra.maze_data("umaze", "offline", 50, 0.5, 1)["actions"], again["actions"])


def test_plan_leads_through_free_cells_around_the_wall():
    maze = sra.Maze2d("umaze")
    controller = sra.WaypointController(maze.walls, np.random.default_rng(0))
    controller.plan(np.array([3.0, 1.0, 0, 0]), (1, 1))
    path = [(3, 2), (3, 3), (2, 3), (1, 3), (1, 2), (1, 1)]
    for waypoint, cell in zip(controller.waypoints, path, strict=True):
        assert (cell - waypoint >= 0).all() and (cell - waypoint <= 0.2).all()
    assert tuple(controller.waypoints[-1]) == (1, 1)
    action, solved = controller.act(np.array([3.0, 1.0, 0.1, 0]))
    np.testing.assert_allclose(action, np.clip(10 * (controller.waypoints[0] - [3, 1]) - [0.1, 0], -1, 1))
    assert not solved
    controller.plan(np.array([1.05, 1.0, 0, 0]), (1, 1))
    assert len(controller.waypoints) == 1 and controller.act(np.array([1.05, 1.0, 0, 0]))[1]


def test_expert_is_chosen_by_data_seed_or_first(data_dir, env, maze):
    data = load(data_dir, "expert")
    episodes = data["observations"].reshape(100, 300, 4)

    def chosen(*flags) -> list[int]:
        expert, lengths, offline, _, mean = sra.load_data(env, sra.parse_args([*maze, *flags]))
        assert lengths == [300] * 5 and (expert[:, -2] == 1).all() and (offline[:, -2] == 0).all()
        found = [int(np.argwhere((episodes[:, 0] == start).all(1))[0, 0]) for start in expert[::300, :4].numpy()]
        assert mean == pytest.approx(np.mean(data["rewards"].reshape(100, 300).sum(1)[found]))
        return found

    assert chosen("--first-demos") == [0, 1, 2, 3, 4]
    assert chosen() == chosen("--seed", "9") != [0, 1, 2, 3, 4]


def test_drop_terminals_loses_what_the_released_loader_loses():
    data = dict(observations=np.arange(12.0)[:, None], actions=np.zeros((12, 1)), next_observations=np.arange(12.0)[:, None] + 1,
                terminations=np.eye(12)[4], truncations=np.eye(12)[11])  # fmt: skip
    kept, lengths = sra.as_rows(data, sra.episodes_of(data), 1.0, sra.Args(drop_terminals=True))
    assert lengths == [4, 5] and kept[:, 0].tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9] and not kept[:, -1].any()
    kept, lengths = sra.as_rows(data, sra.episodes_of(data), 1.0, sra.Args())
    assert lengths == [5, 7] and kept[:, -1].tolist() == [0, 0, 0, 0, 1, *[0] * 7]


# Policy, confidence, goals, resampling
def test_log_prob_and_confidence_are_of_the_transformed_normal():
    agent, _ = agent_and_args()
    obs = torch.randn(50, 4)
    mean, log_std = agent.actor.distribution(obs)
    normal = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean.double(), log_std.double().exp()), [torch.distributions.TanhTransform()]
    )
    assert mean.abs().max() < 3
    expected = normal.log_prob(mean.double().tanh()).sum(-1)
    torch.testing.assert_close(agent.actor.confidence(obs).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(agent.actor.log_prob(obs, torch.full((50, 2), 0.7)).double(), normal.log_prob(torch.tensor(0.7).double()),
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    action, log_prob = agent.actor(obs, torch.randn(50, 2))
    torch.testing.assert_close(agent.actor.log_prob(obs, action).sum(-1), log_prob, rtol=1e-3, atol=1e-3)
    pre_tanh = -(log_std + 0.5 * math.log(2 * math.pi)).sum(-1)
    torch.testing.assert_close(agent.actor.confidence(obs, "pre-tanh"), pre_tanh)


def test_bounds_keep_confidence_and_densities_finite():
    agent, _ = agent_and_args()
    with torch.no_grad():
        agent.actor.net.output.bias.copy_(torch.tensor([500.0, -500, 90, -90]))
    mean, log_std = agent.actor.distribution(torch.zeros(1, 4))
    assert mean.tolist() == [[9, -9]] and log_std.tolist() == [[2, -5]]
    confidence = agent.actor.confidence(torch.zeros(1, 4)).item()
    by_hand = sum(-s - 0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - 9 - math.log1p(math.exp(-18))) for s in (2, -5))
    assert confidence == pytest.approx(by_hand - 2 * 18 + 36, rel=1e-4) or confidence == pytest.approx(
        sum(-s - 0.5 * math.log(2 * math.pi) - math.log(1 - math.tanh(9) ** 2) for s in (2, -5)), rel=1e-3
    )
    assert torch.isfinite(agent.actor.log_prob(torch.zeros(1, 4), torch.tensor([[1.0, -1.0]]))).all()


def test_act_batch_is_act():
    agent, _ = agent_and_args()
    agent.actor.normalise.fit(torch.randn(100, 4) * 3 + 1)
    obs = np.random.default_rng(0).normal(size=(5, 4))
    np.testing.assert_allclose(agent.actor.act_batch(obs), [agent.actor.act(o) for o in obs], atol=1e-6)


def test_resampling_is_sequential_sampling_without_replacement():
    confidence = torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0])
    weight = 1 / (confidence.exp() + 1e-5).double()
    generator, counts, n = torch.Generator().manual_seed(0), {}, 5_000
    for _ in range(n):
        kept = frozenset(sra.keep_unsure(confidence, 2, generator).tolist())
        counts[kept] = counts.get(kept, 0) + 1
    total = weight.sum()
    for i, j in itertools.combinations(range(5), 2):
        expected = (weight[i] / total * weight[j] / (total - weight[i]) + weight[j] / total * weight[i] / (total - weight[j])).item()
        assert counts.get(frozenset((i, j)), 0) / n == pytest.approx(expected, abs=4 * math.sqrt(expected / n) + 1e-4)


def test_resampling_prefers_low_confidence_and_does_not_overflow():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.randn(2_000, generator=generator) * 3
    kept = sra.keep_unsure(confidence, 1_000, generator)
    assert len(set(kept.tolist())) == 1_000 and confidence[kept].mean() < confidence.mean() - 1
    huge = torch.tensor([200.0, 150.0, -200.0, 199.0])
    assert sra.keep_unsure(huge, 1, generator).item() == 2
    assert (
        torch.bincount(torch.cat([sra.keep_unsure(torch.full((4,), -80.0), 1, generator) for _ in range(4_000)])) > 850
    ).all()  # the floor 1e-5


def test_goals_are_above_the_quantile_and_capped():
    actor = Told(4, 2, (8,))
    expert, offline = torch.zeros(10, 4), torch.zeros(300, 4)
    expert[:, 0], offline[:, 0] = torch.arange(10.0), torch.linspace(0, 20, 300)
    chosen = sra.confident_states(actor, expert, offline, sra.Args())
    threshold = np.quantile(np.arange(10), 0.8)  # 7.2
    above = np.flatnonzero(offline[:, 0].numpy() > threshold)
    assert len(above) > 100 and sorted(chosen.tolist()) == above[-100:].tolist()  # the cap keeps the largest
    chosen = sra.confident_states(actor, expert, offline[:150], sra.Args())
    assert sorted(chosen.tolist()) == [i for i in above if i < 150]
    chosen = sra.confident_states(actor, expert, offline[:120], sra.Args(goal_threshold="mean"))
    assert sorted(chosen.tolist()) == np.flatnonzero(np.exp(offline[:120, 0].numpy()) >= np.exp(np.arange(10)).mean()).tolist()


# Rollouts
class Shift(sra.DeltaEnsemble):
    """Reaches state + 1 in the first column, and notes the action in the others."""

    def forward(self, obs, action):
        return torch.cat([obs[:, :1] + 1, action, obs[:, 3:]], 1)


@pytest.mark.parametrize("algo", ["sra", "forward"])
@pytest.mark.parametrize("resample", [True, False])
def test_rollouts_go_on_from_where_they_arrived(algo, resample):
    _, args = agent_and_args(algo=algo, resample=resample, rollout_length=3)
    pool = torch.zeros(4, 4)
    pool[:, 3] = torch.arange(4.0)
    imagined, reached = sra.rollouts(
        Shift(4, 2, args), None, Told(4, 2, (8,)), [(1.0, pool)], 50, 2, torch.Generator().manual_seed(0), args
    )
    buffer = sra.ReplayBuffer(150, 4, 2, torch.device("cpu"))
    batch = buffer.split(imagined)
    near, far = (batch.obs, batch.next_obs) if algo == "forward" else (batch.next_obs, batch.obs)
    assert imagined.shape == (150, 12) and not batch.reward.any() and not batch.terminated.any()
    torch.testing.assert_close(far[:, 0], near[:, 0] + 1)
    assert torch.equal(far[:, 1:3], batch.action) and batch.action.abs().max() <= 1 and batch.action.std() > 0.4
    candidates = 100 if resample else 50
    assert reached[:, 0].tolist() == [step for step in (1.0, 2.0, 3.0) for _ in range(candidates)]
    assert {tuple(row) for row in far.tolist()} <= {tuple(row) for row in reached.tolist()}
    for step in range(3):
        assert (near[50 * step : 50 * step + 50, 0] == step).all()
    for step in (1, 2):  # each goes on from a kept state of the step before
        earlier = {tuple(row) for row in far[50 * step - 50 : 50 * step].tolist()}
        now = near[50 * step : 50 * step + 50]
        assert {tuple(row) for row in now.tolist()} <= earlier
        assert resample or torch.equal(now, far[50 * step - 50 : 50 * step])


def test_starts_are_drawn_in_their_shares():
    pools = [(0.9, torch.zeros(5, 1)), (0.07, torch.ones(5, 1)), (0.03, torch.full((2, 1), 2.0))]
    generator = torch.Generator().manual_seed(0)
    assert torch.bincount(sra.draw(pools, 1_000, generator)[:, 0].long()).tolist() == [900, 70, 30]
    pools[1] = (0.07, torch.zeros(0, 1))
    assert torch.bincount(sra.draw(pools, 1_000, generator)[:, 0].long()).tolist() == [970, 0, 30]
    pools = [(0.0, pools[0][1]), (0.5, torch.ones(5, 1)), (0.5, pools[2][1])]
    assert torch.bincount(sra.draw(pools, 5, generator)[:, 0].long()).tolist()[0] == 0  # two halves of 5 are not 6


def test_a_round_more_for_the_rest():
    args = sra.Args(total_timesteps=30, warmup_steps=6, rollout_freq=8)
    assert [sra.rounds_of(sra.replace(args, total_timesteps=n)) for n in (7, 14, 15, 30, 31)] == [1, 1, 2, 3, 4]
    assert sra.rounds_of(sra.replace(args, self_paced=False)) == 1


def fitted_model(args, near: torch.Tensor, action: torch.Tensor, far: torch.Tensor, steps: int):
    """A model fitted as train does, and its hold-out error as a share of the zero predictor's."""
    model, held_out = sra.DeltaEnsemble(4, 2, args), len(near) // 10
    inputs, delta = torch.cat([near, action], 1), far - near
    model.scale.fit(delta[held_out:])
    optimizer, generator = sra.Adam(model.net.parameters(), 1e-3), torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.lr.fill_(1e-3 * (1 + math.cos(math.pi * step / steps)) / 2)
        index = held_out + torch.randint(len(near) - held_out, (args.model_members, 128), generator=generator)
        sra.delta_update(model, optimizer, inputs[index], delta[index])
    return model, model.validate(inputs[:held_out], delta[:held_out]).item()


def test_reverse_model_learns_the_closed_form():
    """On free space, whose reverse dynamics are linear: far below the zero predictor."""
    torch.manual_seed(0)
    _, args = agent_and_args(model_hidden_sizes=(64, 64))
    rng = np.random.default_rng(0)
    next_obs, action = np.concatenate([rng.uniform(0, 3, (6_000, 2)), rng.normal(0, 2, (6_000, 2))], 1), rng.uniform(-1, 1, (6_000, 2))
    obs = exact_reverse(next_obs, action)
    near, far, action = (torch.from_numpy(x.astype(np.float32)) for x in (next_obs / [1, 1, 2, 2], obs / [1, 1, 2, 2], action))
    model, error = fitted_model(args, near, action, far, 600)
    assert error < 0.01
    again = model(near[:600], action[:600])
    assert ((again - far[:600]).square().mean() / (far[:600] - near[:600]).square().mean()).item() == pytest.approx(error, rel=1e-3)


def test_reverse_model_is_as_good_as_least_squares_on_maze_data(data_dir, env):
    """The dynamics are linear but at walls and at the speed limit."""
    data, agent = load(data_dir, "offline"), agent_and_args()[0]
    torch.manual_seed(0)
    near, far, action = (torch.from_numpy(data[name]) for name in ("next_observations", "observations", "actions"))
    agent.actor.normalise.fit(near)
    order = torch.randperm(len(near))
    near, far, action = agent.actor.normalise(near)[order], agent.actor.normalise(far)[order], action[order]
    _, error = fitted_model(sra.Args(model_hidden_sizes=(64, 64)), near, action, far, 800)
    held_out, delta = len(near) // 10, (far - near).numpy()
    design = np.concatenate([near, action, np.ones((len(near), 1))], 1)
    solution = np.linalg.lstsq(design[held_out:], delta[held_out:], rcond=None)[0]
    linear = ((design[:held_out] @ solution - delta[:held_out]) ** 2).mean() / (delta[:held_out] ** 2).mean()
    assert 0.001 < linear < 0.01 and error < 1.5 * linear


def test_best_weights_are_kept_by_member():
    _, args = agent_and_args(model_members=2)
    model = sra.DeltaEnsemble(4, 2, args)
    inputs, delta = torch.randn(20, 6), torch.randn(20, 4)
    model.validate(inputs, delta)
    first = [p.clone() for p in model.net.parameters()]
    with torch.no_grad():  # the first member gets worse, the second one better
        model.net.output.bias[0] += 100
        model.net.output.weight[1] = 0
        model.net.output.bias[1] = delta.mean(0)
    model.validate(inputs, delta)
    best = dict(model.best.named_parameters())
    assert torch.equal(best["output.bias"][0], first[-1][0] if first[-1].shape == best["output.bias"].shape else first[-2][0])
    torch.testing.assert_close(best["output.bias"][1, 0], delta.mean(0))


def test_members_gradients_are_clipped_one_by_one():
    _, args = agent_and_args(model_members=2)
    model, seen = sra.DeltaEnsemble(4, 2, args), []
    optimizer = sra.Adam(model.net.parameters(), 1e-3)
    optimizer.step = lambda grads: seen.extend(grads)
    inputs, delta = torch.randn(2, 8, 6), torch.randn(2, 8, 4)
    delta[0] *= 1_000
    sra.delta_update(model, optimizer, inputs, delta)
    alone = torch.autograd.grad((model.net(inputs)[1] - delta[1]).square().mean(), list(model.net.parameters()))
    norms = [math.sqrt(sum(float(g[m].square().sum()) for g in seen)) for m in range(2)]
    whole = math.sqrt(sum(float(g[1].square().sum()) for g in alone))
    assert norms == pytest.approx([1.0, min(whole, 1.0)], rel=1e-4)


def test_cvae_divergence_and_samples():
    _, args = agent_and_args()
    vae = sra.ActionVAE(4, 2, args)
    obs, action, noise = torch.randn(30, 4), torch.rand(30, 2) * 2 - 1, torch.randn(30, 4)
    mean, log_std = vae.encode(obs, action)
    pair = [torch.distributions.Normal(m, s) for m, s in ((mean, log_std.exp()), (torch.zeros(30, 4), torch.ones(30, 4)))]
    analytic = torch.distributions.kl_divergence(*pair).sum(1).mean() / 4  # over the latent size
    error = (vae.decode(obs, mean + log_std.exp() * noise) - action).square().mean()
    metrics = sra.cvae_update(vae, sra.Adam(vae.parameters(), 1e-3), obs, action, noise)
    torch.testing.assert_close(metrics["losses/cvae_kl"], analytic.detach())
    torch.testing.assert_close(metrics["losses/cvae_error"], error.detach())
    seen, decode = [], vae.decode
    vae.decode = lambda obs, latent: [seen.append(latent), decode(obs, latent)][1]
    sampled = vae.sample(obs, 5 * noise)
    assert seen[0].abs().max() == 0.5 and sampled.abs().max() < 1 and torch.equal(sampled, decode(obs, (5 * noise).clamp(-0.5, 0.5)))


# Batches
def test_batch_shares_by_round():
    args = sra.Args(model_ratio=0.7, new_ratio=0.3, batch_size=256)
    assert [sra.batch_shares(k, args) for k in range(4)] == [(256, 0, 0), (76, 0, 179), (76, 125, 53), (76, 125, 53)]
    assert sra.batch_shares(2, sra.Args(model_ratio=0.0)) == (256, 0, 0)


def test_what_batches_hold(maze, tmp_path, monkeypatch):
    """Expert rows, then D_S, older and newest imagined rows; older and newest are disjoint; goals go on from D_S."""
    seen, update, newest = [], sra.iql_update, []
    original = sra.rollouts
    monkeypatch.setattr(sra, "rollouts", lambda *a: [newest.append((a[3], *original(*a))), newest[-1][1:]][1])
    monkeypatch.setitem(sra.UPDATES, "iql", lambda *a: [seen.append((len(newest), *a[1:3])), update(*a)][1])
    run(
        sra, [*maze, "--model-ratio", "0.5", "--total-timesteps", "30", "--warmup-steps", "6", "--rollout-freq", "8", "--run-dir", tmp_path]
    )

    def as_set(rows):
        return {tuple(row) for row in rows.numpy().round(5).tolist()}

    sets = [as_set(imagined[:, :6]) for _, imagined, _ in newest]
    assert len(newest) == 3 and [number for number, *_ in seen] == [0] * 6 + [1] * 8 + [2] * 8 + [3] * 8
    assert not sets[0] & sets[1] and not sets[1] & sets[2]
    for number, expert, other in seen:
        own, imagined = torch.cat([other.obs, other.action], 1), set().union(*sets[:number])
        assert expert.reward.eq(1).all() and not other.reward.any() and len(expert.obs) == 32
        shares = sra.batch_shares(number, sra.Args(model_ratio=0.5, batch_size=32))
        assert len(own) == sum(shares)
        older, latest = own[shares[0] : shares[0] + shares[1]], own[shares[0] + shares[1] :]
        assert not as_set(own[: shares[0]]) & imagined
        assert as_set(older) <= set().union(*sets[: max(0, number - 1)]) and as_set(latest) <= (sets[number - 1] if number else set())
    shares = [[round(share, 6) for share, rows in pools] for pools, *_ in newest]
    assert shares == [[0.9, 0.0, 0.1], [0.9, 0.07, 0.03], [0.9, 0.07, 0.03]]
    assert torch.equal(newest[1][0][1][1], newest[0][0][2][1])  # the goals of the first round are the known ones of the second


def test_uds_is_sra_without_imagined_rows_bit_for_bit(maze, tmp_path):
    flags = ["--total-timesteps", "40", "--rollout-freq", "10", "--eval-every", "20"]
    run(sra, [*maze, *flags, "--algo", "uds", "--run-dir", tmp_path / "uds"])
    run(sra, [*maze, *flags, "--model-ratio", "0", "--run-dir", tmp_path / "sra"])
    run(sra, [*maze, *flags, "--run-dir", tmp_path / "with"])
    uds, without, with_ = (torch.load(tmp_path / k / "checkpoint.pt", weights_only=True)["parts"]["agent"] for k in ("uds", "sra", "with"))
    assert all(torch.equal(uds[k], without[k]) for k in uds) and not all(torch.equal(uds[k], with_[k]) for k in uds)
    a, b = rows(tmp_path / "uds"), rows(tmp_path / "sra")
    assert all(x[k] == y[k] for x, y in zip(a, b, strict=True) for k in x)


# Learners
def test_expectile_loss():
    difference = torch.tensor([-2.0, 1.0, 3.0])
    assert sra.expectile_loss(difference, 0.5).item() == pytest.approx(0.5 * difference.square().mean().item())
    assert sra.expectile_loss(difference, 0.7).item() == pytest.approx((0.3 * 4 + 0.7 * 1 + 0.7 * 9) / 3)


def test_iql_step_by_hand():
    agent, args = agent_and_args(lr=0.01, rl_weight=2.0, bc_weight=0.5, temperature=1000.0, tau=0.03)
    expert, other = transitions(8, 1, 1.0), transitions(6, 2)
    with torch.no_grad():  # advantages of both signs
        difference = agent.target_critic(expert.obs, expert.action).amin(0) - agent.value(expert.obs)
        agent.value.net.output.bias += difference.median()
    before, grads = copy.deepcopy(agent), {}
    for name in ("critic_optimizer", "value_optimizer", "actor_optimizer"):
        optimizer = getattr(agent, name)
        optimizer.step = lambda g, name=name, step=optimizer.step: [grads.__setitem__(name, g), step(g)]
    metrics = sra.iql_update(agent, expert, other, torch.zeros(2, 14, 2), True, args)

    batch = sra.Batch(*(torch.cat(pair) for pair in zip(expert, other, strict=True)))
    advantage = before.target_critic(batch.obs, batch.action).min(0).values.detach() - before.value(batch.obs)
    value_loss = ((0.7 - (advantage < 0).float()).abs() * advantage**2).mean()
    torch.testing.assert_close(grads["value_optimizer"], torch.autograd.grad(value_loss, list(before.value.parameters())))
    target = batch.reward + 0.99 * (1 - batch.terminated) * before.value(batch.next_obs).detach()  # before the value's step
    q = before.critic(batch.obs, batch.action)
    critic_loss = 0.5 * sum((q[i] - target).square().mean() for i in range(2))
    torch.testing.assert_close(grads["critic_optimizer"], torch.autograd.grad(critic_loss, list(before.critic.parameters())))
    weight = (1000 * advantage.detach()).exp().clamp(max=100)
    assert weight.max() == 100 and weight.min() < 1  # the cap is at work
    log_prob = before.actor.log_prob(batch.obs, batch.action).sum(-1)
    actor_loss = -0.5 * log_prob[:8].mean() - 2 * (weight * log_prob).mean()
    torch.testing.assert_close(grads["actor_optimizer"], torch.autograd.grad(actor_loss, list(before.actor.parameters())))
    assert metrics["losses/weight"].item() == pytest.approx(weight.mean().item(), rel=1e-5)
    for target_p, old, new in zip(agent.target_critic.parameters(), before.critic.parameters(), agent.critic.parameters(), strict=True):
        torch.testing.assert_close(target_p, old + 0.03 * (new - old))


def test_td3bc_acts_every_second_step_with_a_scale_free_value():
    agent, args = agent_and_args(learner="td3bc", rl_weight=2.5, tau=0.03)
    expert, other, noise = transitions(8, 1, 1.0), transitions(6, 2), torch.randn(2, 14, 2)
    before, grads = copy.deepcopy(agent), []
    step = agent.actor_optimizer.step
    agent.actor_optimizer.step = lambda g: [grads.append(g), step(g)]
    sra.td3bc_update(agent, expert, other, noise, False, args)
    assert not grads and not torch.equal(next(agent.critic.parameters()), next(before.critic.parameters()))
    assert torch.equal(next(agent.target_critic.parameters()), next(before.target_critic.parameters()))
    sra.td3bc_update(agent, expert, other, noise, True, args)
    obs = torch.cat([expert.obs, other.obs])
    cloning = -before.actor.log_prob(expert.obs, expert.action).sum(-1)
    value = agent.critic(obs, before.actor.distribution(obs)[0].tanh())[0]
    loss = cloning.mean() - 2.5 * (cloning.abs().mean() / value.abs().mean()).item() * value.mean()
    torch.testing.assert_close(grads[0], torch.autograd.grad(loss, list(before.actor.parameters())))
    for target, old, new in zip(agent.target_actor.parameters(), before.actor.parameters(), agent.actor.parameters(), strict=True):
        torch.testing.assert_close(target, old + 0.03 * (new - old))


def test_awac_weights_and_target():
    agent, args = agent_and_args(learner="awac", temperature=1.0)
    expert, other, noise = transitions(8, 1, 1.0), transitions(6, 2), torch.randn(2, 14, 2)
    assert len(agent.critic.net.hidden) == 3
    before = copy.deepcopy(agent)
    grads, step = [], agent.actor_optimizer.step
    agent.actor_optimizer.step = lambda g: [grads.append(g), step(g)]
    metrics = sra.awac_update(agent, expert, other, noise, True, args)
    batch = sra.both(expert, other)
    next_value = before.target_critic(batch.next_obs, before.actor(batch.next_obs, noise[0])[0]).min(0).values
    target = batch.reward + 0.99 * (1 - batch.terminated) * next_value
    loss = (before.critic(batch.obs, batch.action) - target).square().sum(0).mean()
    assert metrics["losses/critic"].item() == pytest.approx(loss.item(), rel=1e-5)
    q, v = (agent.critic(batch.obs, a).min(0).values for a in (batch.action, before.actor(batch.obs, noise[1])[0]))
    assert metrics["losses/weight"].item() == pytest.approx((q - v).exp().mean().item(), rel=1e-5)
    log_prob = before.actor.log_prob(batch.obs, batch.action).sum(-1)
    loss = -args.bc_weight * log_prob[:8].mean() - args.rl_weight * ((q - v).exp().detach() * log_prob).mean()
    torch.testing.assert_close(grads[0], torch.autograd.grad(loss, list(before.actor.parameters())))


def test_sac_n_takes_the_least_of_n_critics():
    agent, args = agent_and_args(learner="sac-n", num_critics=5)
    expert, other, noise = transitions(8, 1, 1.0), transitions(6, 2), torch.randn(2, 14, 2)
    assert all((layer.bias == 0.1).all() for layer in agent.critic.net.hidden)
    assert agent.critic.net.output.weight.abs().max() <= 0.003 and len(agent.critic.net.output.weight) == 5
    before = copy.deepcopy(agent)
    grads, step = [], agent.actor_optimizer.step
    agent.actor_optimizer.step = lambda g: [grads.append(g), step(g)]
    metrics = sra.sacn_update(agent, expert, other, noise, True, args)
    batch = sra.both(expert, other)
    next_action, next_log_prob = before.actor(batch.next_obs, noise[0])
    target = batch.reward + 0.99 * (1 - batch.terminated) * (
        before.target_critic(batch.next_obs, next_action).min(0).values - next_log_prob
    )
    loss = sum((q - target).square().mean() for q in before.critic(batch.obs, batch.action))
    assert metrics["losses/critic"].item() == pytest.approx(loss.item(), rel=1e-5)
    cloning = -before.actor.log_prob(expert.obs, expert.action).sum(-1)
    action, log_prob = before.actor(batch.obs, noise[1])
    value = agent.critic(batch.obs, action).min(0).values
    loss = cloning.mean() + log_prob.mean() - (cloning.abs().mean() / value.abs().mean()).item() * value.mean()  # alpha is 1
    torch.testing.assert_close(grads[0], torch.autograd.grad(loss, list(before.actor.parameters())), rtol=1e-4, atol=1e-6)
    entropy = -before.actor(batch.obs, noise[1])[1].mean().item()
    assert entropy > -2 and agent.log_alpha < 0  # more entropy than -|a|: the temperature falls


@pytest.mark.parametrize("learner", ["iql", "td3bc", "awac", "sac-n"])
def test_bf16_steps_see_the_weights_as_they_are(learner, maze, tmp_path, monkeypatch):
    """An update with autocast as train sets it equals one that begins anew after each optimiser's step."""
    contexts, original = [], torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: [contexts.append((a, k)), original(*a, **k)][1])
    run(sra, [*maze, "--learner", learner, "--bf16", "--total-timesteps", "2", "--run-dir", tmp_path])
    a, k = contexts[-1]
    torch.manual_seed(0)
    agent, args = agent_and_args(learner=learner, lr=0.1, hidden_sizes=(32, 32))
    expert, other, noise = transitions(8, 1, 1.0), transitions(6, 2), torch.randn(2, 14, 2)
    cleared = copy.deepcopy(agent)
    for optimizer in (part for part in cleared.children() if isinstance(part, sra.Adam)):
        step = optimizer.step
        optimizer.step = lambda g, step=step: [step(g), torch.clear_autocast_cache()]
    for one in (agent, cleared):
        with original(*a, **(k if one is agent else {**k, "cache_enabled": True})):
            sra.UPDATES[learner](one, expert, other, noise, True, args)
    assert all(torch.equal(p, q) for p, q in zip(agent.parameters(), cleared.parameters(), strict=True))


# Baselines
def test_dwbc_step_by_hand():
    """The gradient is of the weighted log-likelihoods, the discriminator's outputs being constants."""
    agent, args = agent_and_args(algo="dwbc")
    expert, other = transitions(8, 1), transitions(6, 2)
    grads, step, before = [], agent.actor_optimizer.step, copy.deepcopy(agent)
    agent.actor_optimizer.step = lambda g: [grads.append(g), step(g)]
    sra.dwbc_update(agent, expert, other, torch.zeros(2, 14, 2), True, args)
    (on_e, lp_e), (on_o, lp_o) = (
        (before.discriminator(b.obs, b.action, lp.detach()).detach(), lp.sum(-1))
        for b, lp in ((b, before.actor.log_prob(b.obs, b.action)) for b in (expert, other))
    )
    d_o = torch.where(on_o < 0.5, 0, on_o)
    loss = -7.5 * lp_e.mean() + ((0.5 / (on_e * (1 - on_e)) + 1) * lp_e).mean() - ((1 / (1 - d_o) - 1) * lp_o).mean()
    torch.testing.assert_close(grads[0], torch.autograd.grad(loss, list(before.actor.parameters())), rtol=1e-4, atol=1e-5)


def test_demodice_value_and_actor_by_hand():
    agent, args = agent_and_args(algo="demodice")
    expert, union, first = transitions(8, 1), transitions(8, 2), torch.randn(8, 4)
    mix, grads, before = torch.rand(4, 8, 1), {}, copy.deepcopy(agent)
    for name in ("value_optimizer", "actor_optimizer"):
        optimizer = getattr(agent, name)
        optimizer.step = lambda g, name=name, step=optimizer.step: [grads.__setitem__(name, g), step(g)]
    sra.demodice_update(agent, expert, union, first, mix, args)
    h = agent.discriminator(torch.cat([union.obs, union.action], 1)).detach()  # after its own step
    reward = -torch.log(1 / (torch.sigmoid(h) + 1e-3) - 1 + 1e-3)
    advantage = reward + 0.99 * before.value(union.next_obs) - before.value(union.obs)
    points = torch.cat([
        union.obs, mix[2] * expert.obs + (1 - mix[2]) * union.obs, mix[3] * expert.next_obs + (1 - mix[3]) * union.next_obs
    ]).requires_grad_()  # fmt: skip
    (slope,) = torch.autograd.grad(before.value(points).sum(), points, create_graph=True)
    loss = 0.01 * before.value(first).mean() + 1.1 * torch.logsumexp(advantage / 1.1, 0) + 1e-4 * slope.square().sum(1).mean()
    torch.testing.assert_close(grads["value_optimizer"], torch.autograd.grad(loss, list(before.value.parameters())), rtol=1e-3, atol=1e-5)
    weight = (advantage.detach() / 1.1).exp()
    loss = -(weight / weight.mean() * before.actor.log_prob(union.obs, union.action).sum(-1)).mean()
    torch.testing.assert_close(grads["actor_optimizer"], torch.autograd.grad(loss, list(before.actor.parameters())), rtol=1e-3, atol=1e-5)


def test_dwbc_weights():
    on_expert, on_other = sra.dwbc_weights(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([0.5, 0.3, 0.8, 0.9]))
    assert on_expert.tolist() == pytest.approx([4.5, 7.5 - 0.5 / 0.09 - 1, 7.5 - 0.5 / 0.09 - 1], abs=1e-4)
    assert on_other.tolist() == pytest.approx([1, 0, 4, 9], abs=1e-4)


def test_dwbc_discriminator_learns_the_difference():
    agent, _ = agent_and_args(algo="dwbc", lr=1e-2)
    expert, other = transitions(64, 1), transitions(64, 2)
    other = other._replace(obs=other.obs + 3)
    for _ in range(100):
        sra.dwbc_discriminator_update(agent, expert, other)
    scores = [agent.discriminator(b.obs, b.action, agent.actor.log_prob(b.obs, b.action)).detach() for b in (expert, other)]
    assert scores[0].mean() > 0.8 and scores[1].mean() < 0.2 and scores[0].max() <= 0.9 and scores[1].min() >= 0.1


def test_demodice_weights_have_mean_one_and_prefer_the_expert():
    advantage = torch.tensor([0.0, 1.1, 500.0, -3.0])
    assert sra.demodice_weights(advantage, 0.1).mean().item() == pytest.approx(1)
    small = sra.demodice_weights(torch.tensor([0.0, 1.1]), 0.1)
    assert (small[1] / small[0]).item() == pytest.approx(math.e, rel=1e-4)
    agent, args = agent_and_args(algo="demodice", lr=1e-2)
    expert, other = transitions(64, 1), transitions(64, 2)
    expert = expert._replace(obs=expert.obs + 2, next_obs=expert.next_obs + 2)
    union = sra.both(expert, other)
    index = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    union = sra.Batch(*(field[index] for field in union))
    for _ in range(60):
        sra.demodice_update(agent, sra.both(expert, expert), union, union.obs, torch.rand(4, 128, 1), args)
    logits = [agent.discriminator(torch.cat([b.obs, b.action], 1)).mean() for b in (expert, other)]
    assert logits[0] > logits[1] + 1


def test_sinkhorn_marginals_and_a_plan_by_hand():
    rng = np.random.default_rng(0)
    plan = sra.sinkhorn(rng.uniform(0, 2, (30, 40)) * 0.1, 40)
    np.testing.assert_allclose(plan.sum(1), 1 / 40, rtol=1e-9)  # 30 steps of mass 1 / 40
    plan = sra.sinkhorn(rng.uniform(0, 2, (40, 40)) * 0.1, 40)
    assert np.abs(plan.sum(0) - 1 / 40).max() < 1e-3 and np.abs(plan.sum(1) - 1 / 40).max() < 1e-3
    short = sra.sinkhorn(rng.uniform(0, 2, (2, 900)), 1_000)  # its factors drift by 450 each time
    np.testing.assert_allclose(short.sum(1), 1 / 1_000, rtol=1e-9)
    x = 0.02  # [[0, x], [x, 0]]: the symmetric plan in closed form
    plan, k = sra.sinkhorn(np.array([[0, x], [x, 0]]), 2), math.exp(-x / 0.01)
    np.testing.assert_allclose(plan, np.array([[1, k], [k, 1]]) / (2 * (1 + k)), rtol=1e-6)


def test_transport_rewards_are_highest_for_the_experts_own_trajectory():
    angle = torch.linspace(0, 3, 20)
    expert = torch.stack([angle.cos(), angle.sin()], 1)
    away = torch.stack([(angle + 2).cos(), (angle + 2).sin()], 1)
    of_expert, of_away = sra.transport_rewards(
        torch.cat([expert, away]), [20, 20], torch.cat([away.flip(0) * 0.5 - 9, expert]), [20, 20], 20, 2
    )
    assert of_expert.sum() > of_away.sum() + 5 and (of_expert <= 5).all() and of_expert.mean() > 4.5
    one, two = torch.zeros(20, 8), torch.zeros(20, 8)
    one[:, :2], two[:, :2] = expert, away
    sra.label_by_transport(one, [20], two, [20], 20, 2)
    assert (one[:, -2].sum() - two[:, -2].sum()).item() == pytest.approx(1000, rel=1e-4)


# Evaluation
def test_lock_step_evaluation_is_the_sequential_one(env, maze, data_dir):
    """The same starts, one by one, with the expert's actions fitted a little."""
    agent, _ = agent_and_args()
    envs = [sra.make_env("maze2d-umaze-v1") for _ in range(3)]
    result = sra.evaluate_mazes(agent.actor, envs, [5])
    rng, sparse, dense = np.random.default_rng([5]), [], []
    for _ in range(3):
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        steps = []
        for _ in range(300):
            steps.append(env.step(agent.actor.act(obs)))
            obs = steps[-1][0]
        sparse.append(sum(step[1] for step in steps))
        dense.append(sum(math.exp(-np.linalg.norm(step[0][:2] - [1, 1])) for step in steps))
    assert result["returns"].tolist() == sparse and result["eval_return_mean"] == np.mean(sparse)
    assert result["eval_return_dense"] == pytest.approx(np.mean(dense), rel=1e-4) and result["eval_length_mean"] == 300
    assert result["eval_success_rate"] == np.mean([value > 0 for value in sparse])
    at_goal = sra.evaluate_mazes(Still(4, 2, (8,)), envs, [0], np.array([[1.0, 1, 0, 0], [3, 1, 0, 0]]))
    assert at_goal["returns"].tolist() == [300, 0] and np.abs(at_goal["first_obs"] - [[1, 1, 0, 0], [3, 1, 0, 0]]).max() < 0.5
    states = np.array([[1.0, 1, 9, 9], [1, 2.4, 0, 0]])
    assert sra.without_expert(np.array([[1.4, 1], [1.6, 1], [1, 1.8], [1.4, 2.8]]), states).tolist() == [False, True, True, False]


class Still(sra.OfflineActor):
    def act_batch(self, obs):
        return np.zeros((len(obs), 2), np.float32)


# Whole runs
VARIANTS = [["--algo", algo] for algo in ("sra", "uds", "romi", "forward", "bc", "dwbc", "otil", "demodice")]
VARIANTS += [["--learner", learner] for learner in ("td3bc", "awac", "sac-n")]
VARIANTS += [["--reverse-action", "cvae", "--cvae-steps", "5", "--model-optim", "sgd"], ["--no-resample", "--goal-threshold", "mean"]]
VARIANTS += [
    ["--no-self-paced", "--confidence", "pre-tanh", "--bf16"],
    ["--preset", "paper", *TINY_SRA, "--rollout-freq", "10", "--cvae-steps", "5"],
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: " ".join(v[:4]))
def test_every_method_and_learner_runs(variant, maze, tmp_path):
    run(sra, [*maze, "--total-timesteps", "30", "--eval-every", "15", "--rollout-freq", "10", *variant, "--total-timesteps", "30",
              "--eval-every", "15", "--run-dir", tmp_path])  # fmt: skip
    table = rows(tmp_path)
    assert [int(row["updates"]) for row in table] == [0, 15, 30] and {row["env_steps"] for row in table} == {"0"}
    for name in ("eval_return_mean", "eval_normalized_score", "eval_normalized_score_dense", "expert_return"):
        assert all(np.isfinite(float(row[name])) for row in table), name
    assert np.isfinite([float(table[-1][name]) for name in table[-1] if name.startswith("losses/") and table[-1][name]]).all()
    assert "eval_normalized_score_outside" in table[-1]
    score = (float(table[-1]["eval_return_mean"]) - 23.85) / (161.86 - 23.85) * 100
    assert float(table[-1]["eval_normalized_score"]) == pytest.approx(score)
    start, end = (sra.load_policy(str(tmp_path))["actor"], torch.load(tmp_path / "checkpoint.pt", weights_only=True)["policy"]["actor"])
    assert all(torch.equal(start[k], end[k]) for k in start)


def test_robot_data_sets(tmp_path, monkeypatch, capsys):
    """D_E is bundled; D_S is made from bundled actors at the first run, medium-expert from both; a file that is there comes first."""
    sizes, original, folder = [], sra.load_data, tmp_path / "data"
    monkeypatch.setattr(sra, "load_data", lambda *a: [sizes.append(original(*a)), sizes[-1]][1])
    flags = [*TINY_SRA[2:], "--offline-steps", "700", "--data-dir", folder, "--total-timesteps", "20", "--warmup-steps", "5",
             "--rollout-freq", "5", "--cvae-steps", "5"]  # fmt: skip
    with pytest.raises(SystemExit), monkeypatch.context() as without_actors:
        without_actors.setattr(sra, "ACTORS", tmp_path)
        sra.load_data(sra.make_env("Hopper-v4"), sra.parse_args([str(word) for word in ["--dataset", "hopper-medium", *flags]]))
    assert "record it with: python sac.py --env-id Hopper-v4 --record-level 0.33 --record-sampled" in capsys.readouterr().err
    with pytest.raises(SystemExit), monkeypatch.context() as without_actors:
        without_actors.setattr(sra, "ACTORS", tmp_path)
        sra.generated("expert", sra.parse_args([str(word) for word in ["--dataset", "hopper-medium-expert", *flags]]))
    assert "Hopper-v4.pt: no such file; hopper-medium-expert needs this repository's actors" in capsys.readouterr().err
    for name in ("hopper-medium", "hopper-medium-expert"):
        run(sra, ["--dataset", name, *flags, "--run-dir", tmp_path / name])
        assert np.isfinite(float(rows(tmp_path / name)[-1]["eval_normalized_score"]))
    assert [len(loaded[2]) for loaded in sizes] == [700, 1_400] and len(sizes[0][0]) == 5_000
    said = capsys.readouterr().err
    assert "5000 expert transitions (Hopper-v4.npz), 700 others (generated medium)" in said
    assert f"normalised score {float(rows(tmp_path / 'hopper-medium')[-1]['eval_normalized_score']):.1f}; the policy is" in said
    assert sorted(path.name for path in folder.iterdir()) == ["Hopper-v4-expert-700-seed0.npz", "Hopper-v4-medium-700-seed0.npz"]
    data, expert = (np.load(folder / f"Hopper-v4-{part}-700-seed0.npz") for part in ("medium", "expert"))
    ends = np.flatnonzero(data["terminations"] + data["truncations"])
    assert data["terminations"].sum() >= 2 and ends[-1] == 699 and data["terminations"][-1] + data["truncations"][-1] == 1
    inside = np.setdiff1d(np.arange(699), ends)
    np.testing.assert_array_equal(data["next_observations"][inside], data["observations"][inside + 1])
    actor = sra.Actor(11, 3, (256, 256))
    actor.load_state_dict(torch.load(ROOT / "demos" / "experts" / "Hopper-v4.pt", weights_only=True)["actor"])
    mean = np.array([actor.act(obs) for obs in expert["observations"]])
    assert 0.01 < np.abs(mean - expert["actions"]).mean() < 0.5  # sampled around its mean
    np.savez(folder / "Hopper-v4-medium.npz", **{k: v for k, v in data.items() if k != "metadata"} | {"rewards": data["rewards"] + 1})
    args = sra.parse_args(["--dataset", "hopper-medium", "--data-dir", str(folder)])
    assert sra.sources(args)[1] == str(folder / "Hopper-v4-medium.npz")


def test_own_data_of_an_own_environment(tmp_path, demos):
    flags = [*TINY_SRA[2:], "--total-timesteps", "20", "--rollout-freq", "10"]
    last = run(sra, [*POINT, "--demos", demos, "--offline-data", demos, *flags, "--run-dir", tmp_path])
    assert last["updates"] == 20 and math.isnan(last["eval_normalized_score"]) and 0 <= last["eval_success_rate"] <= 1


def test_minari_round_trip_without_losing_transitions(tmp_path, monkeypatch, data_dir, env, maze):
    """Also of PointMaze's frame: a stream written in it is read back as ours."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    import minari
    from minari.data_collector import EpisodeBuffer

    data, inner, buffers = load(data_dir, "offline"), env.unwrapped, []
    episodes = sra.episodes_of(data)[:4]
    for number, index in enumerate(episodes):
        obs = np.concatenate([data["observations"][index], data["next_observations"][index[-1:]]])
        there = np.array([inner.to_pointmaze(o) for o in obs])
        observations = dict(achieved_goal=there[:, :2], desired_goal=there[:, :2], observation=there)
        actions = np.stack([data["actions"][index][:, 1], -data["actions"][index][:, 0]], 1)
        flags = np.zeros(len(index), bool)
        step = dict(actions=actions, rewards=np.zeros(len(index)), terminations=flags, truncations=flags.copy())
        buffers.append(EpisodeBuffer(id=number, observations=observations, infos={}, **step))
    box = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    space = gym.spaces.Dict(achieved_goal=box, desired_goal=box, observation=gym.spaces.Box(-np.inf, np.inf, (4,), np.float64))
    minari.create_dataset_from_buffers("D4RL/pointmaze/umaze-v2", buffers, observation_space=space, action_space=inner.action_space)
    args = sra.parse_args([*maze, "--dataset", "minari:D4RL/pointmaze/umaze-v2"])
    sra.check_args(args)
    assert args.env_id == "maze2d-umaze-v1"
    _, _, offline, lengths, _ = sra.load_data(env, args)
    n = sum(map(len, episodes))
    assert lengths == [len(index) for index in episodes] and len(offline) == n
    expected = np.concatenate([data[name][:n] for name in ("observations", "actions", "next_observations")], 1)
    np.testing.assert_allclose(offline[:, :10], expected, atol=1e-5)


@pytest.mark.parametrize("variant", [["--reverse-action", "cvae", "--cvae-steps", "40"], ["--model-optim", "sgd", "--learner", "td3bc"]])
@pytest.mark.parametrize("phase", ["model", "policy"])
def test_resumed_run_equals_an_uninterrupted_one(variant, phase, maze, tmp_path, monkeypatch):
    """Stopped while the model is fitted, or between two rounds."""
    argv = [*maze, *variant, "--total-timesteps", "50", "--rollout-freq", "12", "--eval-every", "10", "--checkpoint-every", "0"]
    run(sra, [*argv, "--run-dir", tmp_path / "whole"])
    name, calls = ("delta_update", 7) if phase == "model" else ("batch_shares", 31)
    original, count = getattr(sra, name), itertools.count(1)
    monkeypatch.setattr(sra, name, lambda *a: [next(count) == calls and signal.raise_signal(signal.SIGTERM), original(*a)][1])
    with pytest.raises(SystemExit):
        run(sra, [*argv, "--run-dir", tmp_path / "cut"])
    monkeypatch.undo()
    counters = sra.read_checkpoint(tmp_path / "cut")["counters"]
    assert counters["model_steps"] == (7 if phase == "model" else 20) and counters["updates"] == (0 if phase == "model" else 31)
    run(sra, ["--resume", tmp_path / "cut"])
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    a, b = (torch.load(tmp_path / k / "checkpoint.pt", weights_only=True)["parts"] for k in ("cut", "whole"))
    for part in ("agent", "newest", "older", "goals", "model"):
        assert all(torch.equal(a[part][k], b[part][k]) if torch.is_tensor(a[part][k]) else a[part][k] == b[part][k] for k in a[part])


def test_resume_with_other_data_is_refused(maze, tmp_path, capsys):
    run(sra, [*maze, "--algo", "uds", "--total-timesteps", "10", "--run-dir", tmp_path / "run"])
    args = sra.parse_args([*maze, "--data-dir", str(tmp_path), "--offline-steps", "600"])
    sra.generated("offline", args)
    with pytest.raises(SystemExit):
        run(sra, ["--resume", tmp_path / "run", "--offline-data", next(tmp_path.glob("*.npz"))])
    assert "the data are not those of the run" in capsys.readouterr().err


def test_pictures(maze, tmp_path):
    pytest.importorskip("matplotlib")
    run(
        sra, [*maze, "--plot-augmentation", "--eval-episodes", "7", "--total-timesteps", "16", "--rollout-freq", "4", "--run-dir", tmp_path]
    )
    pictures = sorted(tmp_path.glob("augmentation-*.png"))
    assert [p.stem for p in pictures] == ["augmentation-0", "augmentation-12", "augmentation-4", "augmentation-8"]
    assert all(p.stat().st_size > 10_000 for p in pictures)


@pytest.mark.parametrize("algo", ["bc", "sra", "dwbc"])
def test_it_learns(algo, demos, tmp_path):
    """On the point mass, whose expert is cloned: most of the way from the first return to the expert's in seconds."""
    argv = [*POINT, "--demos", demos, "--offline-data", demos, "--algo", algo]
    argv += "--hidden-sizes 32 32 --batch-size 64 --lr 3e-3".split()
    argv += "--total-timesteps 300 --eval-every 300 --eval-episodes 5 --model-steps 400 --rollout-freq 100 --aug-size 900".split()
    last = run(sra, [*argv, "--model-hidden-sizes", "64", "64", "--run-dir", tmp_path])
    first, expert = float(rows(tmp_path)[0]["eval_return_mean"]), last["expert_return"]
    assert last["eval_return_mean"] > first + 0.7 * (expert - first)


# Wrong input
WRONG = [
    (["--dataset", "maze2d-huge"], r"--dataset maze2d-huge: unknown. Known: maze2d-umaze, .*ant-medium-expert, minari:ID"),
    (["--dataset", "hopper-medium", "--offline-data", "nowhere/my.npz"],
     r"nowhere/my.npz: no such file$"),
    (["--dataset", "hopper-medium-v2"], r"; do you mean hopper-medium\?"),
    (["--dataset", "minari:no/such-v0"], r"give --env-id and --demos"),
    ([*POINT], r"data of your own need --demos PATH too"),
    (["--algo", "bc", "--learner", "awac"], r"--algo bc has no value learner"),
    (["--algo", "romi", "--self-paced"], r"--algo romi has neither"),
    (["--warmup-steps", "12000"], r"no round of rollouts in 12000 steps"),
    (["--aug-size", "10"], r"--aug-size 10: less than one rollout of 5 steps in each of 4 rounds"),
    (["--num-demos", "101"], r"has 100 trajectories, --num-demos asks for 101"),
    (["--model-ratio", "1.2"], r"--model-ratio must be between 0 and 1"),
    (["--plot-augmentation", "--algo", "bc"], r"--plot-augmentation: for --algo sra, romi and forward"),
    (["--dataset", "hopper-medium", "--offline-data", str(ROOT / "demos" / "Ant-v4.npz")],
     r"--offline-data .*Ant-v4.npz: recorded on Ant-v4, not on Hopper-v4"),
    ([*POINT, "--offline-data", "WIDE", "--demos", "DEMOS"], r"PointMass-v0 has 4-dim observations, the file has 5: another version\?"),
    ([*POINT, "--offline-data", "LOUD", "--demos", "DEMOS"], r"--offline-data .*actions must lie in the environment's bounds \[-2, 2\]"),
    ([*POINT, "--offline-data", "OPEN", "--demos", "DEMOS"], r"the last row must end an episode"),
]  # fmt: skip


@pytest.mark.parametrize("argv,expected", WRONG, ids=lambda x: " ".join(x[:2]) if isinstance(x, list) else "")
def test_wrong_input(argv, expected, data_dir, demos, tmp_path, capsys):
    data = {name: value for name, value in np.load(demos).items() if value.ndim}
    wide = np.zeros((len(data["rewards"]), 5), np.float32)
    spoiled = dict(
        WIDE=dict(observations=wide), LOUD=dict(actions=data["actions"] * 3), OPEN=dict(truncations=0 * data["truncations"]), DEMOS={}
    )
    for name, change in spoiled.items():
        np.savez(tmp_path / f"{name}.npz", **{**data, **change})
    argv = [str(tmp_path / f"{word}.npz") if word in spoiled else word for word in argv]
    extra = [] if "--data-dir" in argv or "hopper-medium" in argv else ["--data-dir", data_dir, "--offline-steps", "6000"]
    with pytest.raises(SystemExit) as stopped:
        run(sra, [*argv, *extra, "--run-dir", tmp_path / "run"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and re.search(expected, error), error
    assert not (tmp_path / "run").exists()


def test_eval_only_prints_the_score(maze, tmp_path):
    run(sra, [*maze, "--algo", "bc", "--total-timesteps", "10", "--run-dir", tmp_path])
    command = [sys.executable, str(ROOT / "sra_offline.py"), "--eval-only", "--checkpoint", str(tmp_path), "--eval-episodes", "1"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0 and "maze2d-umaze-v1: return" in result.stdout and "normalised score" in result.stdout, result.stderr


def test_presets_follow_the_data_set(capsys):
    args = sra.parse_args(["--dataset", "hopper-medium", "--preset", "paper"])
    assert (args.model_ratio, args.reverse_action, args.rollout_length, args.warmup_steps, args.lr) == (0.5, "uniform", 5, 200_000, 1e-4)
    args = sra.parse_args(["--dataset", "ant-medium-expert", "--preset", "paper", "--rollout-length", "3"])
    assert (args.env_id, args.model_ratio, args.reverse_action, args.rollout_length) == ("Ant-v4", 0.1, "cvae", 3)
    args = sra.parse_args(["--dataset", "maze2d-large", "--preset", "paper"])
    assert (args.env_id, args.model_ratio, args.total_timesteps, args.warmup_steps, args.lr_decay) == (
        "maze2d-large-v1",
        0.5,
        200_000,
        0,
        True,
    )
    assert json.dumps(sra.PRESETS)  # plain values
    for argv, key in (
        (["--dataset", "minari:D4RL/pointmaze/large-v2"], "maze2d-large"), (["--env-id", "Hopper-v5"], "hopper-medium"),
    ):  # fmt: skip
        args = sra.parse_args([*argv, "--preset", "paper"])
        wanted = {**sra.PRESETS["paper"]["*"], **sra.PRESETS["paper"][key]}
        assert {name: getattr(args, name) for name in wanted} == wanted
    default = {algo: sra.parse_args(["--algo", algo]) for algo in ("sra", "uds", "romi", "bc", "dwbc", "otil", "demodice")}
    assert {(args.lr, args.lr_cosine, args.total_timesteps) for args in default.values()} == {(1e-3, True, 12_000)}
    paper = {algo: sra.parse_args(["--algo", algo, "--preset", "paper"]).lr for algo in default}
    assert paper == dict(sra=1e-3, uds=1e-3, romi=1e-3, bc=1e-4, dwbc=1e-4, otil=3e-4, demodice=3e-4)
    assert sra.parse_args(["--dataset", "hopper-medium", "--algo", "romi"]).warmup_steps == 0
