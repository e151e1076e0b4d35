"""MBARL's worlds, rewards, rollouts and bookkeeping against hand calculation or a second method."""

import csv
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mbarl
from tests.conftest import TINY_MBARL, rows, run

ROOT = Path(__file__).parents[1]
TABLE, POINT = ["--env-id", "Tabletop-v0"], ["--env-id", "PointMass2D-v0"]
SMALL = dict(hidden_sizes=(8, 8), model_hidden_sizes=(8, 8), model_batch_size=32)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensor(*numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def checkpoint(run_dir) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def watch(monkeypatch, name: str) -> list:
    """The inputs and the result of each call of a function of mbarl.py."""
    calls, original = [], getattr(mbarl, name)

    def watched(*inputs):
        result = original(*inputs)
        calls.append((inputs, result))
        return result

    monkeypatch.setattr(mbarl, name, watched)
    return calls


def table(gripper=(0, 0), mug=(2.5, 0), flag=-1) -> torch.Tensor:
    return tensor(*gripper, *mug, flag, flag)


# ------------------------------------------------------------------------------------------- model
def test_outputs_are_in_units_of_the_data_and_bounds_with_them():
    """The mean of a member is its network's output times the change's deviation, and the greatest deviation 1.28 times that."""
    args = replace(mbarl.parse_args(POINT), **SMALL)
    scaled, plain = (mbarl.EnsembleDynamics(2, 1, replace(args, model_scale_targets=flag)) for flag in (True, False))
    plain.load_state_dict(scaled.state_dict())
    inputs, targets = torch.randn(1_000, 3), torch.randn(1_000, 2) * torch.tensor([0.1, 20.0])
    for model in (scaled, plain):
        model.set_normaliser(inputs, targets)
    batch, unit = torch.randn(7, 5, 3), targets.std(0)
    torch.testing.assert_close(scaled(batch)[0], plain(batch)[0] * unit)
    torch.testing.assert_close(scaled(batch)[1], plain(batch)[1] + 2 * unit.log())
    for raw, bound in ((100, 0.5), (-100, -10)):
        scaled.net.output.bias.data.fill_(raw)
        torch.testing.assert_close(scaled(batch)[1], (bound + 2 * unit.log()).expand(7, 5, 2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_beta_likelihood_weighs_errors_with_the_variance(beta):
    """The gradient of a mean is 2 (mean - y) var^(beta - 1), of a log-variance var^beta (1 - error^2 / var), in units of the data."""
    args = replace(mbarl.parse_args(POINT), model_scale_targets=True, model_beta=beta, **SMALL)
    dynamics = mbarl.EnsembleDynamics(2, 1, args)
    dynamics.set_normaliser(torch.randn(100, 3), torch.randn(100, 2) * torch.tensor([0.1, 20.0]))
    mean, log_var = torch.randn(7, 4, 2, requires_grad=True), torch.randn(7, 4, 2, requires_grad=True)
    y, unit, grads = torch.randn(7, 4, 2), dynamics.unit, []

    class Fixed:  # the data's units stay those of the ensemble, its outputs are leaves
        def __init__(self):
            self.unit = unit

        def __call__(self, inputs):
            return mean * unit, log_var + 2 * unit.log()

    class Catch:
        params = (mean, log_var)

        def step(self, found):
            grads.extend(found)

    mbarl.dynamics_update(Fixed(), Catch(), torch.zeros(7, 4, 3), y * unit, args)
    var = log_var.detach().exp()
    torch.testing.assert_close(grads[0] * 8, 2 * (mean.detach() - y) * var ** (beta - 1))
    torch.testing.assert_close(grads[1] * 8, var**beta * (1 - (mean.detach() - y).square() / var))


def test_a_rare_change_is_learned_by_squared_error_not_by_plain_likelihood():
    """One row in fifty changes: with plain likelihood it is soon noise of a mean that stays, with beta 1 its mean is learned."""
    torch.manual_seed(0)
    action = torch.rand(5_000, 1) * 2 - 1
    action[::50], action[1::50] = 0.97, action[1::50] * 0.9
    obs = torch.randn(5_000, 2)
    change = torch.where(action > 0.95, 1.0, 0.0) * torch.tensor([1.0, 0.0]) + 0.1 * obs * torch.tensor([0.0, 1.0])
    batch = mbarl.Batch(obs, action, torch.zeros(5_000), obs + change, torch.zeros(5_000))
    found = {}
    for beta in (0.0, 1.0):
        args = replace(mbarl.parse_args(POINT), model_scale_targets=True, model_beta=beta)
        torch.manual_seed(1)
        dynamics = mbarl.EnsembleDynamics(2, 1, args)
        optimizer = mbarl.Adam(dynamics.parameters(), args.model_lr, args.model_weight_decay)
        mbarl.fit_dynamics(dynamics, optimizer, mbarl.dynamics_update, batch, torch.ones(5_000), 900, args, generator())
        mean, _ = dynamics.forward_elites(torch.cat([torch.zeros(2), tensor(0.97).float()]).expand(5, 1, 3))
        found[beta] = mean[..., 0].mean().item()
    assert found[1.0] > 0.5 and found[1.0] > found[0.0] + 0.3


# ------------------------------------------------------------------------------------------- tabletop
@pytest.mark.parametrize("distance,flag", [(0.39, 0), (0.41, -1)])
def test_the_gripper_reaches_less_than_0_4(distance, flag):
    after = mbarl.Tabletop().transition(table(mug=(distance, 0)), tensor(0, 0, 1))
    assert after[4:].tolist() == [flag, flag]


@pytest.mark.parametrize("before,action,after", [
    (((2.75, 0), (2.5, 0), 0), (1, 0, 1), (2.8, 0, 2.55, 0, 0, 0)),  # a held mug moves as far as the gripper, which the edge stops
    (((1, 1), (1, 1), 0), (0.5, -1, 0), (1.1, 0.8, 1, 1, -1, -1)),  # grip <= 0 releases before the move
    (((0, 0), (0.3, 0), -1), (0, 1, 0.01), (0, 0.2, 0.3, 0.2, 0, 0)),  # grasping and carrying in one step
    (((0, 0), (2, 0), -1), (-3, 3, 1), (-0.2, 0.2, 2, 0, -1, -1)),  # actions are clipped; too far to grasp
    (((0, 0), (2, 0), 0), (0, 1, 1), (0, 0.2, 2, 0.2, 0, 0)),  # once held, distance does not matter
    (((0, 0), (-2.75, 0), 0), (-1, 0, 1), (-0.2, 0, -2.8, 0, 0, 0)),  # the mug stays on the table
])  # fmt: skip
def test_tabletop_transitions_by_hand(before, action, after):
    torch.testing.assert_close(mbarl.Tabletop().transition(table(*before), tensor(*action)), tensor(*after))


@pytest.mark.parametrize("gripper,mug,flag,success", [
    ((0.1, 0), (0, 1.9), -1, True), ((1, 0), (0, 2), -1, False), ((0, 0), (0, 1.7), -1, False), ((0.15, 0), (0, 1.85), -1, False),
    ((0, 0), (0, 2), 0, True),
])  # fmt: skip
def test_success_needs_gripper_and_mug(gripper, mug, flag, success):
    world = mbarl.Tabletop()
    assert world.success(table(gripper, mug, flag), world.goals[2]).item() is success
    assert world.reward(table(gripper, mug, flag), world.goals[2]).item() == success


def test_the_flag_snaps_to_the_nearer_of_its_values_and_places_to_the_table():
    states = tensor(0, 3, -2.9, 1, -0.3, -0.6).float(), tensor(0, 0, 0, 0, -0.9, -0.2).float()
    snapped = mbarl.Tabletop().project(torch.stack(states))
    torch.testing.assert_close(snapped, torch.tensor([[0, 2.8, -2.8, 1, 0, 0], [0, 0, 0, 0, -1, -1]]))


def test_a_point_beyond_the_wall_is_put_to_it_without_its_velocity_outwards():
    snapped = mbarl.PointMass2D().project(torch.tensor([[1.2, 0.5, 0.3, 0.4], [-1.1, 1.01, 0.2, 0.6], [1.0, -1.0, 0.5, -0.5]]))
    torch.testing.assert_close(snapped, torch.tensor([[1, 0.5, 0, 0.4], [-1, 1, 0.2, 0], [1.0, -1.0, 0.5, -0.5]]))


def test_an_expert_that_never_succeeds_is_an_error(monkeypatch, capsys):
    world = mbarl.PointMass2D()
    monkeypatch.setattr(world, "expert", lambda *_: torch.zeros(2))
    with pytest.raises(SystemExit):
        mbarl.scripted_demos(world, 1, False, np.random.default_rng(0))
    assert "the scripted expert does not reach [0.8, 0.8] in 10000 steps" in capsys.readouterr().err


@pytest.mark.parametrize("world", [mbarl.Tabletop(), mbarl.PointMass2D(drag=0.5), mbarl.PointMass2D(frame_skip=4, sparse=True)])
def test_the_environment_is_its_pure_functions_batched_or_not(world):
    rng, states, actions = np.random.default_rng(0), [], []
    world.reset(seed=3)
    for k in range(300):
        action = rng.uniform(-1.5, 1.5, world.act_dim)
        states.append(world.state)
        actions.append(torch.from_numpy(action))
        obs, reward, terminated, truncated, info = world.step(action)
        assert not terminated and not truncated and obs.dtype == np.float32 and world.observation_space.contains(obs)
        assert reward == world.reward(world.state, world.goal).item() and info["is_success"] == world.success(world.state, world.goal)
        if k % 100 == 99:
            world.draw_goal()  # does not move anything
    after = world.transition(torch.stack(states), torch.stack(actions))
    torch.testing.assert_close(after, torch.stack([*states[1:], world.state]), rtol=0, atol=0)


@pytest.mark.parametrize(
    "env_id,limit", [("Tabletop-v0", 200), ("PointMass2D-v0", 100), ("PointMass2DCoarse-v0", 100), ("PersistentPointMaze-v0", 300)]
)
def test_only_the_registered_limit_ends_an_episode(env_id, limit):
    env = mbarl.make_env(env_id)
    env.reset(seed=0)
    ends = [env.step(env.action_space.sample())[2:4] for _ in range(limit)]
    assert ends == [(False, False)] * (limit - 1) + [(False, True)]
    world = mbarl.make_world(mbarl.Args(env_id=env_id))
    world.reset(seed=0)
    assert not any(any(world.step(np.ones(world.act_dim))[2:4]) for _ in range(1_000))


def test_the_maze_is_gymnasium_robotics_own_and_its_expert_goes_both_ways():
    """Its own environment, stepped on and on, goes the same way up to what its solver remembers at walls."""
    world, rng = mbarl.PointMaze(), np.random.default_rng(0)
    own = mbarl.PointMaze().point
    own.set_state(np.array([-1.0, -1.0]), np.zeros(2))
    state, touched = tensor(-1, -1, 0, 0), 0
    for k in range(600):
        action = rng.uniform(-1, 1, 2) + np.array([0.5, -0.3]) * (k % 200 < 100)
        state, theirs = world.transition(state, torch.from_numpy(action)), own.step(action)[0]
        np.testing.assert_allclose(state, theirs, atol=1e-4)
        state, touched = torch.from_numpy(theirs), touched + bool(abs(theirs[1]) > 1.35)
    assert touched > 10
    states, actions = (
        torch.from_numpy(rng.uniform(-0.3, 0.3, (3, 2, 4))) + tensor(1, 0, 0, 0),
        torch.from_numpy(rng.uniform(-1, 1, (3, 2, 2))),
    )
    batched = world.transition(states, actions)
    assert torch.equal(batched[1, 1], world.transition(states[1, 1], actions[1, 1]))
    rows = mbarl.scripted_demos(world, 3, True, rng)
    ends = rows[rows[:, -1] > 0]
    assert len(ends) == 3 and 100 < len(rows) / 3 < 600 and world.success(ends[:, 8:12].double(), ends[:, 12:14].double()).all()
    assert (ends[:, 13] < -0.7).all()  # home


# ------------------------------------------------------------------------------------------- point mass
def test_point_mass_is_mujocos_away_from_the_walls():
    import mujoco

    world, rng = mbarl.PointMass2D(frame_skip=1), np.random.default_rng(0)
    model = mujoco.MjModel.from_xml_string(world.xml)
    data = mujoco.MjData(model)
    for _ in range(100):
        place, velocity, force = rng.uniform(-0.8, 0.8, 2), rng.uniform(-1, 1, 2), rng.uniform(-1, 1, 2)
        data.qpos[:], data.qvel[:], data.ctrl[:] = place, velocity, force
        mujoco.mj_step(model, data)
        ours = world.transition(tensor(*place, *velocity), tensor(*force)).numpy()
        np.testing.assert_allclose(ours, np.concatenate([data.qpos, data.qvel]), rtol=0, atol=1e-12)
        np.testing.assert_allclose(ours[2:], velocity + 0.0625 * (force - velocity), atol=1e-12)


@pytest.mark.parametrize("frame_skip,steps", [(1, 92), (2, 46), (4, 23)])
def test_full_throttle_takes_so_many_steps(frame_skip, steps):
    world = mbarl.PointMass2D(frame_skip=frame_skip)
    state, taken = tensor(-0.8, -0.8, 0, 0), 0
    while not world.success(state, world.goals[0]):
        state, taken = world.transition(state, tensor(1, 1)), taken + 1
    assert taken == steps
    for _ in range(200):
        state = world.transition(state, tensor(1, 1))
    assert state.tolist() == [1, 1, 0, 0]  # at the wall
    slow = mbarl.PointMass2D(frame_skip=frame_skip, drag=1.0)
    assert slow.transition(tensor(0, 0, 1, 0), tensor(0, 0))[2] < world.transition(tensor(0, 0, 1, 0), tensor(0, 0))[2]


# ------------------------------------------------------------------------------------------- demonstrations
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("world", [mbarl.Tabletop(), mbarl.PointMass2D()], ids=["table", "point"])
def test_scripted_demonstrations_succeed_at_their_end_and_are_real(world, backward):
    n, dim, act_dim = 2 * len(world.goals), world.observation_space.shape[0], world.act_dim
    data = mbarl.scripted_demos(world, n, backward, np.random.default_rng(0))
    batch = mbarl.ReplayBuffer(1, dim, act_dim, torch.device("cpu")).split(data)
    state, goal, next_state = batch.obs[:, : world.state_dim], batch.obs[:, world.state_dim :], batch.next_obs[:, : world.state_dim]
    torch.testing.assert_close(world.transition(state.double(), batch.action.double()).float(), next_state, rtol=0, atol=2e-6)
    ends = batch.terminated.nonzero()[:, 0]
    assert len(ends) == n and ends[-1] == len(data) - 1 and torch.equal(batch.terminated > 0, world.success(next_state, goal))
    first = torch.cat([torch.tensor([0]), ends[:-1] + 1])
    assert torch.equal(batch.obs[1:][batch.terminated[:-1] == 0], batch.next_obs[:-1][batch.terminated[:-1] == 0])
    if isinstance(world, mbarl.Tabletop):
        assert torch.equal(batch.reward, batch.terminated) and (batch.action[:, 2].abs() == 1).all()
        lengths = (ends - first + 1).tolist()
        assert min(lengths) > 70 and max(lengths) < 135, lengths  # the page's: 81 to 121 in 80
        wanted = world.start if backward else world.goals.repeat(2, 1)
        assert (goal[first] == wanted).all()
        assert world.success(state[first].double(), world.goals.repeat(2, 1)).all() if backward else (state[first] == world.start).all()


def test_copied_demonstrations_differ_in_their_goal_alone():
    world = mbarl.Tabletop()
    data = mbarl.scripted_demos(world, 1, True, np.random.default_rng(0))
    copies = mbarl.with_goals(data, world.goals.float(), 6, 3).view(4, len(data), -1)
    for k in range(4):
        assert (copies[k, :, 6:12] == world.goals[k]).all() and (copies[k, :, 21:27] == world.goals[k]).all()
        rest = [*range(6), *range(12, 21), 27, 28]
        assert torch.equal(copies[k][:, rest], data[:, rest])


# ------------------------------------------------------------------------------------------- classifier
def constant_classifier(logit: float, dim: int = 3) -> mbarl.Classifier:
    classifier = mbarl.Classifier(dim, 8)
    classifier.net.output.weight.data.zero_()
    classifier.net.output.bias.data.fill_(logit)
    return classifier


@pytest.mark.parametrize("logit", [-10.0, -1.0, 0.0, 2.0, 10.0])
def test_backward_reward_is_minus_log_of_one_minus_the_classifier(logit):
    reward = mbarl.backward_reward(constant_classifier(logit), torch.randn(5, 4))
    np.testing.assert_allclose(reward.numpy(), -math.log(1 - 1 / (1 + math.exp(-logit))), rtol=1e-4)
    if logit == 0:
        assert reward[0].item() == pytest.approx(math.log(2))


def test_backward_reward_is_bounded():
    assert mbarl.backward_reward(constant_classifier(1e4), torch.randn(2, 3)).max().item() == pytest.approx(23.03, abs=0.01)


def fitted_classifier(mixup: bool, explore: bool = False) -> torch.Tensor:
    """Logits at -1, 0, 1 of a classifier of N(1, 1) against N(-1, 1), where the log-ratio is 2 x. The second entry it must not see."""
    torch.manual_seed(0)
    args, classifier = mbarl.Args(mixup=mixup, explore=explore), mbarl.Classifier(1, 32)
    optimizer = mbarl.Adam(classifier.parameters(), 3e-3)
    for _ in range(600):
        a, b = torch.randn(512, 2) + torch.tensor([1.0, 9]), torch.randn(512, 2) + torch.tensor([-1.0, -9])
        mbarl.classifier_update(classifier, optimizer, a, b, torch.rand(1024, 1), torch.randperm(1024), args)
    return classifier(torch.tensor([[-1.0, 9], [0, 9], [1, 9]])).detach()


def test_classifier_approaches_the_log_ratio_and_mixup_shrinks_it():
    plain, mixed = fitted_classifier(False), fitted_classifier(True)
    torch.testing.assert_close(plain, torch.tensor([-2.0, 0, 2]), rtol=0, atol=0.3)
    assert (mixed[[0, 2]].abs() < 0.8 * plain[[0, 2]].abs()).all() and mixed[2] > 0.2 > -0.2 > mixed[0]
    torch.testing.assert_close(fitted_classifier(True, explore=True), plain)  # whose divergence needs the logits as they are


def test_classifier_loss_with_mixup_by_hand():
    args, classifier = mbarl.Args(), mbarl.Classifier(2, 4)
    demos, visited, mix, order = torch.randn(2, 2), torch.randn(2, 2), torch.rand(4, 1), torch.tensor([2, 0, 3, 1])
    rows_, labels, loss = [*demos, *visited], [1, 1, 0, 0], 0.0
    for i in range(4):
        m, j = mix[i].item(), order[i].item()
        p = torch.sigmoid(classifier(m * rows_[i] + (1 - m) * rows_[j])).item()
        y = m * labels[i] + (1 - m) * labels[j]
        loss -= (y * math.log(p) + (1 - y) * math.log(1 - p)) / 4
    right = [(classifier(x).item() > 0) == (y > 0) for x, y in zip(rows_, labels, strict=True)]
    metrics = mbarl.classifier_update(classifier, mbarl.Adam(classifier.parameters(), 1e-3), demos, visited, mix, order, args)
    assert metrics["losses/classifier"].item() == pytest.approx(loss, rel=1e-5)
    assert metrics["reward/classifier_accuracy"].item() == np.mean(right)


# ------------------------------------------------------------------------------------------- exploration
def test_exploration_reward_by_hand():
    """d_2 of the origin among points at 1, 3 and 5 is 3; entries beyond the state do not count."""
    recent = torch.tensor([[1.0, 0, 7], [0, 3, 8], [5, 0, 9]])
    args = mbarl.Args(explore_neighbour=2)
    obs = torch.zeros(1, 4, 3)
    reward = mbarl.exploration_reward(constant_classifier(-30.0), obs, recent, 0.5, 2, args)
    torch.testing.assert_close(reward, torch.full((1, 4), math.log(4) - 0.5 * 10))  # logits are clipped at 10
    few = mbarl.exploration_reward(constant_classifier(0.0), obs, recent[:1], 0.5, 2, args)
    assert few[0, 0].item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("weight,logit,after", [(0.0, -3.0, 0.2), (0.5, -3.0, 0.7), (0.5, 4.0, 0.0), (0.5, -1.0, 0.5), (0.0, -99.0, 0.9)])
def test_the_constraints_weight_rises_with_too_much_divergence_and_is_never_negative(weight, logit, after):
    new, divergence = mbarl.constraint_weight(weight, torch.full((7,), logit), mbarl.Args(explore_lr=0.1, explore_kl=1.0))
    assert new == pytest.approx(after) and divergence == -max(logit, -10.0)


# ------------------------------------------------------------------------------------------- critic's target
def test_a_terminal_row_has_no_value_after_it():
    torch.manual_seed(0)
    args = mbarl.Args(**SMALL)
    agent, reward = mbarl.Agent(4, 2, args), torch.randn(9)
    batch = mbarl.Batch(torch.randn(9, 4), torch.rand(9, 2), reward, torch.randn(9, 4), torch.ones(9))
    q = agent.critic(batch.obs, batch.action).detach()
    metrics = mbarl.sac_update(agent, batch, batch.obs, torch.randn(2, 9, 2), args)
    assert metrics["losses/critic"].item() == pytest.approx((q - reward).square().mean(1).sum().item(), rel=1e-5)


@pytest.mark.parametrize("terminal", [False, True])
def test_what_ends_a_value(terminal, tmp_path):
    """Time-limit switches bootstrap, unless --switch-terminal; demonstrations end forward values at success."""
    flags = ["--switch-terminal"] if terminal else []
    run(mbarl, [*TABLE, *TINY_MBARL, *flags, "--total-timesteps", "130", "--run-dir", tmp_path])
    parts = checkpoint(tmp_path)["parts"]
    ends = {name: parts[f"{name}_replay"]["rows"][:, -1] for name in ("forward", "backward")}
    switches = 130 // 20  # no phase of an untrained policy succeeds
    assert ends["forward"].sum() == 4 + terminal * math.ceil(switches / 2)
    assert ends["backward"].sum() == terminal * (4 + 4 * 4 + switches // 2)
    assert parts["visited"]["rows"][:, -1].sum() == terminal * (switches // 2)


# ------------------------------------------------------------------------------------------- rollouts
class Random(mbarl.Actor):
    """Acts with the noise, so that it does visit places."""

    def forward(self, obs, noise):
        return noise.tanh(), noise.sum(-1)


@pytest.mark.parametrize("world", [mbarl.Tabletop(), mbarl.PointMass2D()], ids=["table", "point"])
def test_with_the_true_step_as_model_imagined_rows_are_real(world):
    dim, rng = world.observation_space.shape[0], np.random.default_rng(0)
    goal = world.goals[torch.from_numpy(rng.integers(len(world.goals), size=40))]
    state = world.initial(40, rng)
    state[:, :2] += torch.randn(40, 2, generator=generator())
    start = torch.cat([state.clamp(-1, 1), goal], -1)
    args = mbarl.Args(snap=False)
    data = mbarl.imagine_goals(world, lambda s, a: (world.transition(s, a), None), Random(dim, world.act_dim, (8,)), start, 5, True, args,
                               generator())  # fmt: skip
    batch = mbarl.ReplayBuffer(1, dim, world.act_dim, torch.device("cpu")).split(data)
    states, goals, next_states = batch.obs[:, : world.state_dim], batch.obs[:, world.state_dim :], batch.next_obs[:, : world.state_dim]
    torch.testing.assert_close(world.transition(states, batch.action), next_states)
    torch.testing.assert_close(world.reward(next_states, goals), batch.reward.to(next_states))
    assert torch.equal(goals, batch.next_obs[:, world.state_dim :]) and torch.equal(batch.terminated > 0, world.success(next_states, goals))
    assert torch.equal(batch.obs[:40], start) and len(data) == 200  # none got there


class Shift:
    """A model that predicts the same change everywhere."""

    def __init__(self, change):
        self.change = torch.tensor(change)

    def __call__(self, state, action):
        return state + self.change, None


def test_success_ends_a_trajectory_only_where_it_is_terminal():
    world, args = mbarl.Tabletop(), mbarl.Args()
    start = torch.cat([table(mug=(0, y)) for y in (2.05, -3.0, 0.0)]).view(3, 6)
    start = torch.cat([start, world.goals[2].expand(3, -1)], -1).float()
    still, actor = Shift([0.0, 0, 0, 0, 0.3, 0.4]), mbarl.Actor(12, 3, (8,))
    for terminal, lengths in ((True, 1 + 3 + 3), (False, 9)):
        data = mbarl.imagine_goals(world, still, actor, start, 3, terminal, args, generator())
        assert len(data) == lengths and data[:, -1].sum() == terminal and data[:, -2].sum() == (1 if terminal else 3)
        assert torch.isin(data[:, 15:21], torch.tensor([0.0, 2.05, -2.8, -1])).all()  # next states: the table's edge, flags
    bad = mbarl.imagine_goals(world, Shift([math.nan] + [0.0] * 5), actor, start, 3, True, args, generator())
    assert len(bad) == 0


def test_reward_head_and_state_of_one_ensemble():
    """The head learns r(s, a); the states' change is not disturbed; MBPO's mean squared error beats predicting the mean."""
    torch.manual_seed(0)
    args = mbarl.Args(**(SMALL | dict(model_hidden_sizes=(32, 32))), model_first_batches=300)
    obs, action = torch.randn(1500, 3), torch.rand(1500, 2) * 2 - 1
    batch = mbarl.Batch(obs, action, obs[:, 0] - action[:, 1], obs + 0.3 * F.pad(action, (0, 1)), torch.zeros(1500))
    data = mbarl.with_reward(batch)
    assert torch.equal(data.next_obs - data.obs, torch.cat([batch.next_obs - obs, batch.reward[:, None]], 1))
    dynamics = mbarl.EnsembleDynamics(4, 2, args)
    optimizer = mbarl.Adam(dynamics.parameters(), 3e-3)
    fit = mbarl.fit_dynamics(dynamics, optimizer, mbarl.dynamics_update, data, torch.ones(1500), 300, args, generator())
    assert fit["model/batches"] == 300
    next_obs, reward = mbarl.predict(dynamics, obs, action, replace(args, rollout_noise=False), generator())
    assert (reward - batch.reward).square().mean() < 0.05 * batch.reward.var()
    assert (next_obs - batch.next_obs).square().mean() < 0.05 * (batch.next_obs - obs).var(0)[:2].mean()
    assert mbarl.predict(mbarl.EnsembleDynamics(3, 2, args), obs, action, args, generator())[1] is None


def test_open_loop_error_of_a_constant_model():
    """True steps of 1, predicted steps of 1.5: after 4 steps 2 too far, in units of the standard deviation."""
    args = mbarl.Args(**SMALL)
    states = torch.randn(1, 50, 3) + torch.arange(5.0)[:, None, None]
    for extra in (0, 1):
        dynamics = mbarl.EnsembleDynamics(3 + extra, 2, args)
        dynamics.net.output.weight.data.zero_()
        dynamics.net.output.bias.data.fill_(1.5)
        error = mbarl.open_loop_error(dynamics, states, torch.zeros(4, 50, 2))
        assert error == pytest.approx((2 / states.flatten(0, 1).std(0)).square().mean().sqrt().item(), rel=1e-4)
        still = mbarl.open_loop_error(dynamics, torch.ones(5, 50, 3), torch.zeros(4, 50, 2))
        assert still == pytest.approx(6)  # predicted to move by 1.5 four times; nothing varies


def test_stretches_do_not_cross_a_reset():
    obs = torch.tensor([0.0, 1, 2, 10, 11, 12, 13])[:, None]
    batch = mbarl.Batch(obs, 100 + obs, obs[:, 0], obs + 1, obs[:, 0])
    states, actions = mbarl.stretches(batch, 3)
    assert states[:, :, 0].T.tolist() == [[0, 1, 2, 3], [10, 11, 12, 13], [11, 12, 13, 14]]
    assert actions[:, :, 0].T.tolist() == [[100, 101, 102], [110, 111, 112], [111, 112, 113]]
    assert mbarl.stretches(batch, 1)[0].shape == (2, 7, 1) and mbarl.stretches(batch, 9)[0].shape[1] == 0


@pytest.mark.parametrize("kind,demos,replay,narrow", [("replay", 0, 20, 0), ("demo", 20, 0, 0), ("mixed", 10, 10, 0), ("narrow", 0, 0, 20)])
def test_rollouts_start_from_the_asked_source(kind, demos, replay, narrow):
    world, width = mbarl.Tabletop(), 2 * 12 + 3 + 2
    buffer = mbarl.ReplayBuffer(50, 12, 3, torch.device("cpu"))
    buffer.extend(torch.full((50, width), 2.0))
    player = mbarl.Player(None, buffer, None, torch.full((9, width), 1.0))
    starts = mbarl.start_states(kind, 20, player, world, generator(), np.random.default_rng(0))
    assert starts.shape == (20, 12) and ((starts == 1).all(-1).sum(), (starts == 2).all(-1).sum()) == (demos, replay)
    assert (starts[:, :6] == world.start).all(-1).sum() == narrow
    if narrow:
        assert len(starts[:, 6:].unique(dim=0)) == 4
    if kind != "narrow":
        player.demos = player.demos[:0]
        assert (mbarl.start_states(kind, 20, player, world, generator(), None) == 2).all()  # where there are none


# ------------------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize("env_id", ["Tabletop-v0", "PointMass2D-v0"])
def test_lock_step_evaluation_is_that_of_single_episodes_in_the_environment(env_id):
    torch.manual_seed(1)
    world = mbarl.make_world(mbarl.Args(env_id=env_id))
    actor = mbarl.Actor(world.observation_space.shape[0], world.act_dim, (8,))
    ours = mbarl.evaluate_goals(actor, world, 5, 60, [1, 2])
    returns, distances, held, success, at_end = [], [], [], [], []
    for start, k in zip(world.initial(5, np.random.default_rng([1, 2])), range(5), strict=True):
        world.reset(seed=0)
        world.state, world.goal = start, world.goals[k % len(world.goals)]
        steps = [(*world.step(actor.act(world.observation())), world.held(world.state).item()) for _ in range(60)]
        returns.append(sum(step[1] for step in steps))
        success.append(any(step[4]["is_success"] for step in steps))
        at_end.append(steps[-1][4]["is_success"])
        held.append(any(step[5] for step in steps))
        distances.append(world.distance(world.state, world.goal).item())
    assert ours["eval_return_mean"] == pytest.approx(np.mean(returns), rel=1e-4)
    assert ours["eval_return_std"] == pytest.approx(np.std(returns), rel=1e-2, abs=1e-5)
    assert ours["eval_final_distance"] == pytest.approx(np.mean(distances), rel=1e-4)
    assert (ours["eval_success_rate"], ours["eval_grasp_rate"]) == (np.mean(success), np.mean(held))
    assert ours["eval_success_at_end"] == np.mean(at_end)


class Scripted(mbarl.Actor):
    """The scripted expert in a network's clothes."""

    world = mbarl.Tabletop()

    def forward(self, obs, noise):
        rng = np.random.default_rng(0)
        actions = [self.world.expert(o[:6], o[6:], rng) for o in obs.double()]
        return torch.stack(actions).float(), None


def test_an_expert_is_successful():
    result = mbarl.evaluate_goals(Scripted(12, 3, (8,)), mbarl.Tabletop(), 4, 150, [0])
    assert result["eval_success_rate"] == result["eval_grasp_rate"] == 1 and result["eval_final_distance"] < 0.13
    assert result["eval_return_mean"] > 4 and result["eval_success_at_end"] == 1  # it stays


class FullThrottle(mbarl.Actor):
    def forward(self, obs, noise):
        return torch.ones(len(obs), 2), None


def test_flying_through_the_goal_is_success_but_not_at_the_end():
    result = mbarl.evaluate_goals(FullThrottle(6, 2, (8,)), mbarl.PointMass2D(), 4, 100, [0])
    assert (result["eval_success_rate"], result["eval_success_at_end"]) == (1, 0)
    assert result["eval_final_distance"] == pytest.approx(0.2 * 2**0.5)  # in the corner behind it


# ------------------------------------------------------------------------------------------- whole runs
@pytest.mark.parametrize("env", [TABLE, POINT], ids=["table", "point"])
@pytest.mark.parametrize("algo", ["mbarl", "medal", "fbrl", "naive", "oracle"])
def test_every_arm_runs_and_has_as_many_updates(env, algo, tmp_path):
    last = run(mbarl, [*env, *TINY_MBARL, "--algo", algo, "--total-timesteps", "80", "--eval-every", "40", "--run-dir", tmp_path])
    assert last["env_steps"] == 80 and last["updates"] == 2 * 40  # 40 seed steps
    forward = {"naive": 80, "oracle": 80}.get(algo, 40)  # phases of 20 steps: 20 of 40 steps are forward ones
    assert last["charts/updates_forward"] == forward and last.get("charts/updates_backward", 0) == 80 - forward
    assert last["charts/interventions"] == (4 if algo == "oracle" else 0)
    assert {"eval_grasp_rate", "eval_final_distance", "eval_success_rate", "losses/critic", "charts/reward_per_step"} <= last.keys()
    assert ("reward/classifier_accuracy" in last) == (algo in ("mbarl", "medal"))
    assert ("model/hold_out_mse" in last) == (algo == "mbarl")
    assert {"args.json", "progress.csv", "checkpoint.pt", "policy.pt"} <= {path.name for path in tmp_path.iterdir()}
    policy = mbarl.load_policy(str(tmp_path))
    actor = mbarl.Actor(policy["obs_dim"], policy["act_dim"], tuple(policy["hidden_sizes"]))
    actor.load_state_dict(policy["actor"])
    args = mbarl.parse_args(["--eval-only", "--checkpoint", str(tmp_path), "--eval-episodes", "2"])
    mbarl.check_args(args)
    assert args.env_id == env[1] and mbarl.evaluate_policy(args)["eval_length_mean"] == gym.spec(env[1]).max_episode_steps


@pytest.mark.parametrize("env", [TABLE, POINT], ids=["table", "point"])
def test_without_rollouts_it_is_medal_bit_for_bit(env, tmp_path):
    argv = [*env, *TINY_MBARL, "--total-timesteps", "85", "--eval-every", "40"]
    for name, flags in (("a", ["--rollout-length", "0"]), ("b", ["--algo", "medal"]), ("c", ["--real-share", "1"]), ("d", [])):
        run(mbarl, [*argv, *flags, "--run-dir", tmp_path / name])
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    policies = {name: torch.load(tmp_path / name / "policy.pt", weights_only=True)["actor"] for name in "abcd"}
    for name, same in (("a", True), ("c", True), ("d", False)):
        assert all(torch.equal(policies[name][k], policies["b"][k]) for k in policies["b"]) is same, name


@pytest.mark.parametrize("flags", [
    ["--explore"], ["--reward", "learned", "--start", "narrow"], ["--true-dynamics", "--start", "demo"], ["--mix-into-replay"],
    ["--no-snap", "--update-both", "--no-mixup", "--no-classifier-goal"], ["--train-horizon", "50", "--start", "replay"],
    ["--preset", "paper", "--updates-per-step", "2"], POINT, ["--true-dynamics", "--env-id", "PersistentPointMaze-v0"],
], ids=lambda flags: flags[0])  # fmt: skip
def test_every_experiment_flag_runs_and_resumes(flags, tmp_path):
    argv = [*TABLE, *flags, *TINY_MBARL, "--eval-every", "30", "--model-every", "20"]  # fits after 40 and 60 steps
    run(mbarl, [*argv, "--total-timesteps", "70", "--run-dir", tmp_path / "whole"])
    run(mbarl, [*argv, "--total-timesteps", "55", "--run-dir", tmp_path / "parts"])
    run(mbarl, ["--resume", tmp_path / "parts", "--total-timesteps", "70"])
    whole, parts = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    assert whole[-1]["env_steps"] == "70" and np.isfinite(float(whole[-2]["losses/critic"]))
    assert parts[:2] == whole[:2]
    imagined_error = float(whole[-1]["model/imagined_error_forward"])
    assert imagined_error < 1e-5 if flags[0] == "--true-dynamics" else imagined_error > 1e-3
    a, b = (checkpoint(tmp_path / name)["parts"]["forward_agent"] for name in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_signal_saves_first_and_the_run_goes_on_exactly(tmp_path, monkeypatch):
    """SIGTERM at step 50, in the middle of a backward phase and of what a row of progress.csv sums up."""
    argv, step = [*POINT, *TINY_MBARL, "--total-timesteps", "70", "--eval-every", "30"], mbarl.PointMass2D.step
    run(mbarl, [*argv, "--run-dir", tmp_path / "whole"])
    taken = []

    def interrupted(self, action):
        taken.append(action)
        if len(taken) == 50:
            signal.raise_signal(signal.SIGTERM)
        return step(self, action)

    monkeypatch.setattr(mbarl.PointMass2D, "step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(mbarl, [*argv, "--run-dir", tmp_path / "cut"])
    assert stopped.value.code == 128 + signal.SIGTERM and checkpoint(tmp_path / "cut")["counters"]["env_steps"] == 50
    run(mbarl, ["--resume", tmp_path / "cut"])
    assert len(taken) == 70 and rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_rewards_are_scaled_and_the_backward_ones_of_the_current_classifier(tmp_path, monkeypatch):
    made, seen, original = [], [], mbarl.sac_update
    init = mbarl.Classifier.__init__
    monkeypatch.setattr(mbarl.Classifier, "__init__", lambda self, *a: [init(self, *a), made.append(self)][0])

    def update(agent, batch, *rest):
        expected = 10 * F.softplus(made[-1](batch.next_obs)).detach()
        seen.append(
            (
                torch.allclose(batch.reward, expected),
                bool(torch.isin(batch.reward, torch.tensor([0.0, 10.0])).all()),
                expected.mean().item(),
            )
        )
        return original(agent, batch, *rest)

    monkeypatch.setattr(mbarl, "sac_update", update)
    run(mbarl, [*TABLE, *TINY_MBARL, "--classifier-every", "1", "--total-timesteps", "120", "--run-dir", tmp_path])
    assert [matches for matches, _, _ in seen] == ([False] * 40 + [True] * 40) * 2  # phases of 20 steps, from step 40 on
    assert all(sparse for matches, sparse, _ in seen if not matches)
    assert np.std([mean for matches, _, mean in seen if matches]) > 1e-3  # it did learn


def test_a_batch_holds_real_and_imagined_rows_of_its_own_player(tmp_path, monkeypatch):
    seen, original, players = [], mbarl.sac_update, []
    make = mbarl.Player
    monkeypatch.setattr(mbarl, "Player", lambda *a: [players.append(make(*a)), players[-1]][1])

    def update(agent, batch, *rest):
        player = next(player for player in players if player.agent is agent)
        sources = [{tuple(row) for row in b.newest(len(b))[:, :15].tolist()} for b in (player.replay, player.imagined)]
        keys = [tuple(row) for row in torch.cat([batch.obs, batch.action], 1).tolist()]
        seen.append([sum(key in source for key in keys) for source in sources])
        return original(agent, batch, *rest)

    monkeypatch.setattr(mbarl, "sac_update", update)
    run(mbarl, [*TABLE, *TINY_MBARL, "--real-share", "0.25", "--total-timesteps", "100", "--run-dir", tmp_path])
    assert len(players) == 2 and len(seen) == 120 and all(real == 4 and imagined == 12 for real, imagined in seen)


def test_the_model_learns_each_physical_transition_once(tmp_path, monkeypatch):
    fits = watch(monkeypatch, "fit_dynamics")
    imagined = watch(monkeypatch, "imagine_goals")
    run(mbarl, [*TABLE, *TINY_MBARL, "--train-horizon", "50", "--total-timesteps", "121", "--run-dir", tmp_path])
    parts, world = checkpoint(tmp_path)["parts"], mbarl.Tabletop()
    data = parts["physical"]["rows"]
    demos = len(parts["forward_replay"]["rows"]) + len(parts["backward_replay"]["rows"]) - 121  # D_f twice, D_b four times
    forward = int((parts["forward_replay"]["rows"][:, -1] > 0).nonzero()[3]) + 1
    backward = (demos - 2 * forward) // 4
    assert len(data) == forward + backward + 121 and len(data.unique(dim=0)) == len(data)
    torch.testing.assert_close(world.transition(data[:, :6], data[:, 6:9]), data[:, 9:15], rtol=0, atol=2e-6)
    real = data[-121:]
    joined = (real[1:, :6] == real[:-1, 9:15]).all(-1)
    assert (~joined).nonzero()[:, 0].tolist() == [49, 99]  # hard resets
    sizes = [len(inputs[3].obs) for inputs, _ in fits]
    assert [n - forward - backward for n in sizes] == [41, 81, 121]
    assert [inputs[5] for inputs, _ in imagined] == [True, False] * 3  # success ends forward rollouts alone


def test_goals_and_phases(tmp_path):
    """Phases of 20 steps; the backward policy carries the next forward goal; a hard reset starts a forward phase."""
    run(mbarl, [*TABLE, *TINY_MBARL, "--train-horizon", "150", "--total-timesteps", "230", "--seed", "3", "--run-dir", tmp_path])
    content = checkpoint(tmp_path)
    parts, counters = content["parts"], content["counters"]
    forward, backward = parts["forward_replay"]["rows"][-120:], parts["backward_replay"]["rows"][-110:]
    assert counters["interventions"] == 1 and counters["since_reset"] == 80
    goals = [rows_[:, 6:12] for rows_ in (forward, backward)]
    # forward 0-20, 40-60, 80-100, 120-140, then 150-170, 190-210; backward 20-40, ..., 140-150, 170-190, 210-230
    starts = [0, 20, 40, 60, 80, 100], [0, 20, 40, 60, 70, 90]
    for k in range(5):
        ours, theirs = goals[0][starts[0][k + 1]], goals[1][starts[1][k]]
        if k != 3:  # there the reset drew a goal
            assert torch.equal(ours, theirs), k
    assert len(torch.cat([goals[0][:70], goals[1][:70]]).unique(dim=0)) > 1  # drawn at switches, before the reset draws another
    assert torch.equal(forward[0, :6], mbarl.Tabletop.start.float()) and torch.equal(forward[80, :6], mbarl.Tabletop.start.float())
    assert torch.equal(forward[19, 15:21], backward[0, :6])  # the world goes on


def test_goals_of_the_arms_without_a_classifier(tmp_path):
    """fbrl's backward policy has the initial state as its goal; naive draws a new goal after each phase; oracle starts anew."""
    world, start = mbarl.Tabletop(), mbarl.Tabletop.start.float()
    parts = {}
    for algo in ("fbrl", "naive", "oracle"):
        run(mbarl, [*TABLE, *TINY_MBARL, "--algo", algo, "--total-timesteps", "160", "--seed", "3", "--run-dir", tmp_path / algo])
        parts[algo] = checkpoint(tmp_path / algo)["parts"]
    backward = parts["fbrl"]["backward_replay"]["rows"][-80:]
    assert torch.equal(backward[:, 6:12], world.as_goal(start).expand(80, -1))
    assert torch.isin(parts["fbrl"]["forward_replay"]["rows"][-80:, 6:12].unique(dim=0), world.goals.float()).all()
    for algo in ("fbrl", "naive", "oracle"):
        of = parts[algo]["forward_replay"]["rows"][-80 if algo == "fbrl" else -160 :]
        phases = of.view(-1, 20, of.shape[1])
        assert (phases[:, :, 6:12] == phases[:, :1, 6:12]).all() and len(phases[:, 0, 6:12].unique(dim=0)) > 1, algo
        if algo == "oracle":
            assert torch.equal(phases[:, 0, :6], start.expand(8, -1))
        if algo == "naive":
            assert torch.equal(phases[1:, 0, :6], phases[:-1, -1, 15:21])  # the world goes on


def test_what_the_classifier_takes_for_demonstrated(tmp_path, monkeypatch):
    """Each state of the forward demonstrations, the last ones too, and no other; beside states that backward steps led to."""
    calls = watch(monkeypatch, "classifier_update")
    run(mbarl, [*TABLE, *TINY_MBARL, "--classifier-every", "1", "--total-timesteps", "140", "--run-dir", tmp_path])
    parts = checkpoint(tmp_path)["parts"]
    demos = parts["forward_replay"]["rows"][:-80]  # phases of 20 steps: 80 of 140 are forward ones
    ends = demos[demos[:, -1] > 0]
    assert len(ends) == 4
    expected = {tuple(row) for row in torch.cat([demos[:, :12], ends[:, 15:27]]).tolist()}
    shown = {tuple(row) for (_, _, some, *_), _ in calls for row in some.tolist()}
    assert shown <= expected and len(shown) > 0.9 * len(expected) and shown & {tuple(row) for row in ends[:, 15:27].tolist()}
    visited = {tuple(row) for row in parts["visited"]["rows"][:, 15:27].tolist()}
    assert len(parts["visited"]["rows"]) == 60 and {tuple(row) for (_, _, _, some, *_), _ in calls for row in some.tolist()} <= visited


def test_where_imagined_rows_and_demonstrated_rewards_go(tmp_path, monkeypatch):
    imagined = watch(monkeypatch, "imagine_goals")
    argv = ["--env-id", "PointMass2D-v0", *TINY_MBARL, "--total-timesteps", "100"]
    run(mbarl, [*argv, "--run-dir", tmp_path / "apart"])
    physical = checkpoint(tmp_path / "apart")["parts"]["physical"]["rows"]  # state, action, next state, reward, terminal
    world = mbarl.PointMass2D()
    torch.testing.assert_close(physical[:, 10], world.reward(physical[:, 6:10], world.goals[0].float()))  # the backward demonstrations' too
    imagined.clear()
    run(mbarl, [*argv, "--mix-into-replay", "--run-dir", tmp_path / "mixed"])
    apart, mixed = (checkpoint(tmp_path / name)["parts"] for name in ("apart", "mixed"))
    for k, name in enumerate(("forward", "backward")):
        more = len(mixed[f"{name}_replay"]["rows"]) - len(apart[f"{name}_replay"]["rows"])
        assert more == sum(len(rows_) for _, rows_ in imagined[k::2]) > 0 and not len(mixed[f"{name}_imagined"]["rows"])


def test_a_forward_success_ends_its_phase_and_a_backward_one_only_in_fbrl(tmp_path, monkeypatch):
    """A world in which everything is a success."""
    monkeypatch.setattr(mbarl.Tabletop, "success", lambda self, state, goal: torch.ones(state.shape[:-1], dtype=torch.bool))
    monkeypatch.setattr(mbarl, "scripted_demos", lambda world, n, backward, rng: torch.rand(3, 29))
    for algo, forward, backward in (("medal", 5, 95), ("fbrl", 50, 50), ("naive", 100, 0), ("oracle", 100, 0)):
        run(mbarl, [*TABLE, *TINY_MBARL, "--algo", algo, "--total-timesteps", "100", "--run-dir", tmp_path / algo])
        content = checkpoint(tmp_path / algo)
        steps = [len(content["parts"].get(f"{name}_replay", dict(rows=[]))["rows"]) for name in ("forward", "backward")]
        assert steps[0] - 3 == forward and max(steps[1] - {"medal": 3 + 3 * 4, "fbrl": 3}.get(algo, 0), 0) == backward, algo
        assert content["counters"]["interventions"] == (100 if algo == "oracle" else 0)
        assert rows(tmp_path / algo)[-1]["charts/reward_per_step"] == str(forward / 100)


@pytest.mark.parametrize("env_id", ["Tabletop-v0", "PointMass2D-v0"])
def test_the_picture_of_phases_finds_them_again(env_id, tmp_path, monkeypatch):
    from benchmark import phases

    found, original = [], phases.phases
    monkeypatch.setattr(phases, "phases", lambda *a: [found.append(original(*a)), found[-1]][1])
    monkeypatch.setattr("sys.argv", ["phases.py", str(tmp_path), "--out", str(tmp_path / "strip.png"), "--at", "0", "0", "1"])
    run(mbarl, ["--env-id", env_id, *TINY_MBARL, "--algo", "medal", "--total-timesteps", "90", "--run-dir", tmp_path])
    phases.main()
    forward, backward = found
    assert (tmp_path / "strip.png").exists() and [len(piece) - 1 for piece in forward + backward] == [20, 20, 10, 20, 20]
    for one, other in zip(
        [forward[0], backward[0], forward[1], backward[1]], [backward[0], forward[1], backward[1], forward[2]], strict=True
    ):
        state = {"Tabletop-v0": 6}.get(env_id, 4)
        np.testing.assert_array_equal(one[-1, :state], other[0, :state])  # one long trajectory
    monkeypatch.setattr("sys.argv", ["phases.py", str(tmp_path), "--at", "1.5"])
    with pytest.raises(SystemExit, match="--at takes shares between 0 and 1"):
        phases.main()


def test_exploration_collects_for_both_policies(tmp_path, monkeypatch):
    monkeypatch.setattr(mbarl.Tabletop, "success", lambda self, state, goal: state[..., 0] > 0.3)
    last = run(mbarl, [*TABLE, *TINY_MBARL, "--explore", "--backward-demos", "0", "--total-timesteps", "120", "--run-dir", tmp_path])
    parts = checkpoint(tmp_path)["parts"]
    theirs, ours = parts["explore_replay"]["rows"], parts["forward_replay"]["rows"]
    assert torch.equal(theirs[:, :-1], ours[-120:, :-1]) and len(theirs) == 120
    assert 0 < ours[-120:, -1].sum() < 120 and not theirs[:, -1].any()  # success ends a forward trajectory, not exploration
    assert last["charts/updates_forward"] == last["charts/updates_explore"] == 80 and last["reward/explore_weight"] >= 0


def test_offline_study_has_a_row_a_cell_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    flags = "--offline --offline-sizes 200 400 --offline-lengths 2 5 --offline-fit 20 --offline-updates 20 --offline-every 10".split()
    args = mbarl.parse_args([*POINT, *TINY_MBARL, *flags, "--offline-transitions", "100", "--run-dir", str(tmp_path / "whole")])
    mbarl.check_args(args)
    imagined = watch(monkeypatch, "imagine_goals")
    mbarl.study(args)
    with open(tmp_path / "whole" / "offline.csv") as file:
        whole = list(csv.DictReader(file))
    cells = [(row["size"], row["rollout_length"], row["start"]) for row in whole]
    assert cells == [(s, k, start) for s in ("200", "400") for k in ("2", "5") for start in ("narrow", "demo")]
    assert all(len(rows_) == 100 and not rows_[:, -1].any() for _, rows_ in imagined) and len(imagined) == 16
    for row in whole:
        assert all(math.isfinite(float(row[k])) for k in ("eval_return_mean", "eval_final_distance", "hold_out_mse", "error_5_steps"))
        assert float(row["error_1_steps"]) < float(row["error_5_steps"])
    # again, interrupted after three cells
    original, calls = mbarl.learn_offline, []
    monkeypatch.setattr(mbarl, "learn_offline", lambda *a: None if len(calls) == 3 else [calls.append(0), original(*a)][1])
    args = replace(args, run_dir=str(tmp_path / "parts"))
    with pytest.raises(SystemExit):
        mbarl.study(args)
    monkeypatch.setattr(mbarl, "learn_offline", original)
    mbarl.study(mbarl.parse_args(["--resume", str(tmp_path / "parts")]))
    assert (tmp_path / "parts" / "offline.csv").read_text() == (tmp_path / "whole" / "offline.csv").read_text()
    imagined.clear()
    mbarl.study(replace(args, run_dir=str(tmp_path / "equal"), equal_rollouts=True, offline_sizes=(200,), offline_starts=("demo",)))
    assert [len(rows_) for _, rows_ in imagined] == [100, 100, 250, 250]
    imagined.clear()  # with the task's own reward the model has no head for it
    args = replace(args, run_dir=str(tmp_path / "analytic"), reward="analytic", offline_sizes=(200,), offline_starts=("demo",))
    mbarl.study(args)
    world = mbarl.PointMass2D()
    for _, batch in imagined:
        batch = mbarl.ReplayBuffer(1, 6, 2, torch.device("cpu")).split(batch)
        torch.testing.assert_close(batch.reward, world.reward(batch.next_obs[:, :4], batch.next_obs[:, 4:]))


def test_it_runs_alone_in_an_empty_folder(tmp_path):
    (tmp_path / "mbarl.py").write_text((ROOT / "mbarl.py").read_text())
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    argv = [sys.executable, "mbarl.py", *TABLE, *TINY_MBARL, "--total-timesteps", "50"]
    result = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.glob("runs/Tabletop-v0__mbarl__1__*/policy.pt"))


def test_the_docs_own_world_runs(tmp_path):
    """The page's skeleton and the command below it; in a process of its own, where the skeleton's import is this file's second one."""
    page = (ROOT / "docs" / "mbarl.md").read_text()
    (tmp_path / "my_world.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    words = re.search(r"python mbarl.py (--env-id my_world:Line-v0 [^`]*)", page)[1].split()
    path = os.pathsep.join([str(ROOT), str(tmp_path)])

    def call(*argv):
        argv, environment = [sys.executable, str(ROOT / "mbarl.py"), *argv], {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        return subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)

    result = call(*words, "--total-timesteps", "120", "--run-dir", "run")
    assert result.returncode == 0 and not re.search("[Ww]arn", result.stderr), result.stderr
    result = call("--eval-only", "--checkpoint", "run", "--eval-episodes", "2")
    expected = r"^my_world:Line-v0: return .*\nas in progress.csv, all goals in turn: success rate \d\.\d\d, at the end .*distance \d"
    assert re.search(expected, result.stdout)


@pytest.mark.parametrize("name,value,expected", [
    ("initial", torch.zeros(2, 5), r"initial of two states must give a tensor \[2, 6\], not a tensor \[2, 5\]"),
    ("initial", np.zeros((2, 6)), r"initial of two states must give a tensor \[2, 6\], not ndarray"),
    ("transition", torch.zeros(2, 5), r"transition of two states must give a tensor \[2, 6\]"),
    ("distance", torch.tensor(1.0), r"distance of two states must give a tensor \[2\], not a tensor \[\]"),
    ("held", torch.zeros(2, 1), r"held of two states must give a tensor \[2\], not a tensor \[2, 1\]"),
    ("as_goal", torch.zeros(2, 2), r"as_goal of two states must give a tensor \[2, 6\]"),
    ("expert", np.zeros(3), r"expert of one state must give a tensor \[3\], not ndarray"),
])  # fmt: skip
def test_a_world_whose_function_gives_something_else_is_an_error(name, value, expected, monkeypatch, capsys):
    class Broken(mbarl.Tabletop):
        pass

    setattr(Broken, name, lambda self, *inputs: value)
    monkeypatch.setattr(mbarl, "make_env", lambda env_id: Broken())
    with pytest.raises(SystemExit):
        mbarl.make_world(mbarl.Args())
    assert re.search(expected, capsys.readouterr().err)


def test_a_world_without_its_sizes_is_an_error(capsys):
    with pytest.raises(SystemExit):
        type("Bare", (mbarl.GoalEnv,), {"act_dim": 1})()
    assert "Bare has no goals, state_dim" in capsys.readouterr().err


def test_equal_rollouts_are_counted_by_the_shortest(capsys):
    flags = ["--env-id", "PointMass2D-v0", "--offline", "--offline-transitions", "40"]
    mbarl.check_args(mbarl.parse_args([*flags, "--equal-rollouts"]))  # two of each length
    with pytest.raises(SystemExit):
        mbarl.check_args(mbarl.parse_args(flags))
    assert "less than one rollout of 50 steps" in capsys.readouterr().err


def test_a_study_has_no_policy_to_evaluate(tmp_path, capsys):
    (tmp_path / "offline.csv").write_text("seed\n")
    with pytest.raises(SystemExit):
        mbarl.parse_args(["--eval-only", "--checkpoint", str(tmp_path)])
    assert f"--checkpoint {tmp_path}: no policy.pt in this folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        mbarl.parse_args(["--eval-only", "--checkpoint", str(tmp_path / "nowhere.pt")])
    assert "nowhere.pt: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("goals", [[[0, 0]], torch.zeros(6)], ids=["list", "one-dimensional"])
def test_goals_of_another_form_are_an_error(goals, monkeypatch, capsys):
    monkeypatch.setattr(mbarl.Tabletop, "goals", goals)
    with pytest.raises(SystemExit):
        mbarl.Tabletop()
    assert "Tabletop.goals must be a tensor [goals, goal]" in capsys.readouterr().err


@pytest.mark.parametrize("argv,expected", [
    (["--env-id", "Tabletop"], r"--env-id Tabletop: name the version too, as in Tabletop-v0"),
    (["--true-dynamics", "--algo", "medal"], r"--true-dynamics: nothing is imagined here"),
    (["--mix-into-replay", "--rollout-length", "0"], r"--mix-into-replay: nothing is imagined here"),
    (["--env-id", "Hopper-v4"], r"--env-id Hopper-v4: needs the functions of GoalEnv"),
    (["--env-id", "Tabletp-v0"], r"Tabletp-v0.*Nearest known: .*Tabletop-v0"),
    (["--algo", "vaprl"], r"invalid choice 'vaprl' for argument '--algo'"),
    (["--explore", "--algo", "medal"], r"--explore goes with --algo mbarl, not medal"),
    (["--explore", "--explore-window", "4"], r"--explore-neighbour 5: among only 4"),
    (["--true-dynamics", "--reward", "learned"], r"take --reward analytic"),
    (["--offline"], r"--offline: Tabletop-v0 cannot draw uniform states"),
    (["--offline", "--start", "demo"], r"take --offline-starts"),
    (["--offline", "--true-dynamics"], r"--true-dynamics goes with training"),
    (["--offline", "--algo", "naive", "--env-id", "PointMass2D-v0"], r"--offline is a study of models .* leave --algo naive out"),
    (["--offline", "--offline-sizes", "9", "20"], r"--offline-sizes 9: too few"),
    (["--offline", "--offline-transitions", "40"], r"--offline-transitions 40: less than one rollout of 50 steps"),
    (["--model-rows", "9"], r"--model-rows 9: too few"),
    (["--model-hidden-sizes"], r"--model-hidden-sizes needs at least one value"),
    (["--env-id", "./my_world.py:Line-v0"], r"takes a module's name, not a path: my_world:MyEnv-v0"),
    (["--env-id", "no_such_module:Line-v0"], r"No module named 'no_such_module'[^:]*can be imported.$"),
    (["--explore", "--update-both"], r"--update-both goes without it"),
    (["--total-timesteps", "500"], r"nothing is learned in the first 1000 \(--seed-steps\)"),
    (["--num-demos", "0"], r"--num-demos must be positive"),
    (["--real-share", "1.5"], r"--real-share must be between 0 and 1"),
    (["--model-elites", "9"], r"has only 7 members"),
    (["--rollout-length", "-1"], r"--rollout-length must not be negative"),
])  # fmt: skip
def test_wrong_input_is_one_line(argv, expected, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        args = mbarl.parse_args([*argv, "--run-dir", str(tmp_path / "run")])
        mbarl.check_args(args)
        mbarl.study(args) if args.offline else mbarl.train(args)
    message = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and re.search(expected, message) and len(message.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_presets_are_the_documented_settings():
    default, point, paper = (mbarl.parse_args(argv) for argv in ([], POINT, ["--preset", "paper"]))
    assert (default.reward, default.switch_steps, default.num_demos, default.backward_demos, default.reward_scale) == (
        "analytic",
        200,
        12,
        12,
        10,
    )
    assert (point.reward, point.switch_steps, point.num_demos, point.backward_demos, point.eval_horizon) == ("learned", 100, 10, 10, 100)
    assert (default.alpha, point.alpha, paper.alpha) == (0.01, 0.1, 1.0)
    assert [(a.model_scale_targets, a.model_beta) for a in (default, point, paper)] == [(True, 1.0), (False, 0.0), (False, 0.0)]
    assert (paper.total_timesteps, paper.updates_per_step, paper.rollouts, paper.rollout_length) == (2_500_000, 20, 100_000, 25)
    assert paper.switch_terminal and not default.switch_terminal and gym.spec("Tabletop-v0").max_episode_steps == default.eval_horizon
