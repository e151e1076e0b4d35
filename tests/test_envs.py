"""The worlds without resets: EARL's tabletop, the point mass, the maze; and ants in mazes."""

import math

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from demos.record_antmaze import direction, distances
from envs.ego_ant import egocentric
from envs.point_mass import PointMass2D
from envs.point_maze import PersistentPointMaze
from envs.tabletop import Tabletop

WORLDS = {"Tabletop-v0": 200, "PointMass2D-v0": 100, "PointMass2DCoarse-v0": 100, "PersistentPointMaze-v0": 300}


def tensor(*numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize("env_id", WORLDS)
@pytest.mark.filterwarnings("ignore")
def test_a_plain_environment_that_only_its_time_limit_ends(env_id):
    env = gym.make(env_id, render_mode="rgb_array")
    check_env(env.unwrapped)
    env.reset(seed=0)
    ends = [env.step(env.action_space.sample())[2:4] for _ in range(WORLDS[env_id])]
    assert ends == [(False, False)] * (WORLDS[env_id] - 1) + [(False, True)]
    assert not any(any(env.unwrapped.step(np.ones(env.action_space.shape))[2:4]) for _ in range(300))
    still = env.render()
    assert still.shape == (480, 480, 3) and len(np.unique(still.reshape(-1, 3), axis=0)) >= 3


@pytest.mark.parametrize("env_id", WORLDS)
def test_steps_are_the_batched_functions_and_go_on_from_a_saved_state(env_id):
    world, other = gym.make(env_id).unwrapped, gym.make(env_id).unwrapped
    rng, states, actions = np.random.default_rng(0), [], []
    world.reset(seed=3)
    for _ in range(60):
        action = rng.uniform(-1.5, 1.5, world.action_space.shape)
        other.set_state(world.get_state())
        states.append(world.state)
        actions.append(torch.from_numpy(action))
        obs, reward, _, _, info = world.step(action)
        np.testing.assert_array_equal(other.step(action)[0], obs)
        np.testing.assert_array_equal(obs, np.float32(torch.cat([world.state, world.goal])))
        assert reward == world.reward(world.state, world.goal).item()
        assert info["is_success"] == world.success(world.state, world.goal).item()
    after = world.transition(torch.stack(states), torch.stack(actions))
    torch.testing.assert_close(after, torch.stack([*states[1:], world.state]), rtol=0, atol=0)
    np.testing.assert_array_equal(other.reset()[0], world.reset()[0])  # the random numbers too


# Gripper, mug, flag; action; the same after it.
TRANSITIONS = {
    "a held mug moves as far as the gripper, which the edge stops": [2.75, 0, 2.5, 0, 0, 1, 0, 1, 2.8, 0, 2.55, 0, 0],
    "the mug stays on the table": [0, 0, -2.75, 2.7, 0, -1, 1, 1, -0.2, 0.2, -2.8, 2.8, 0],
    "grip <= 0 releases before the move": [1, 1, 1, 1, 0, 0.5, -1, 0, 1.1, 0.8, 1, 1, -1],
    "grasping and carrying in one step": [0, 0, 0.3, 0, -1, 0, 1, 0.01, 0, 0.2, 0.3, 0.2, 0],
    "0.39 is near": [0, 0, 0.39, 0, -1, 0, 0, 1, 0, 0, 0.39, 0, 0],
    "0.41 is too far to grasp": [0, 0, 0, 0.41, -1, 0, 0, 1, 0, 0, 0, 0.41, -1],
    "0.3 in both directions too": [0, 0, 0.3, 0.3, -1, 0, 0, 1, 0, 0, 0.3, 0.3, -1],
    "actions are clipped": [0, 0, 2, 0, -1, -3, 3, 1, -0.2, 0.2, 2, 0, -1],
    "once held, distance does not matter": [0, 0, 2, 0, 0, 0, 1, 1, 0, 0.2, 2, 0.2, 0],
}


@pytest.mark.parametrize("numbers", TRANSITIONS.values(), ids=TRANSITIONS)
def test_the_tabletop_is_earls(numbers):
    before, action, after = numbers[:5], numbers[5:8], numbers[8:]
    found = Tabletop().transition(tensor(*before, before[4]), tensor(*action))
    torch.testing.assert_close(found, tensor(*after, after[4]))


SUCCESSES = [
    ((0.1, 0, 0, 1.9, -1, -1), True),
    ((1, 0, 0, 2, -1, -1), False),
    ((0, 0, 0, 1.7, -1, -1), False),
    ((0.15, 0, 0, 1.85, -1, -1), False),
    ((0, 0, 0, 2, 0, 0), True),
]


@pytest.mark.parametrize("state,success", SUCCESSES)
def test_success_needs_gripper_and_mug(state, success):
    world = Tabletop()
    assert world.success(tensor(*state), world.goals[2]).item() is success
    assert world.reward(tensor(*state), world.goals[2]).item() == success


PROJECTIONS = [
    (Tabletop, (0, 3, -2.9, 1, -0.3, -0.6), (0, 2.8, -2.8, 1, 0, 0)),  # to the table, to the flag's nearer value
    (Tabletop, (0, 0, 0, 0, -0.9, -0.2), (0, 0, 0, 0, -1, -1)),
    (PointMass2D, (1.2, 0.5, 0.3, 0.4), (1, 0.5, 0, 0.4)),  # to the wall, without its velocity outwards
    (PointMass2D, (-1.1, 1.01, 0.2, 0.6), (-1, 1, 0.2, 0)),
    (PointMass2D, (1, -1, 0.5, -0.5), (1, -1, 0.5, -0.5)),
    (PersistentPointMaze, (1.5, 0, -6, 1), (1.45, 0, -5.3, 1)),
]


@pytest.mark.parametrize("world,state,possible", PROJECTIONS)
def test_the_nearest_possible_state(world, state, possible):
    torch.testing.assert_close(world().project(torch.stack([tensor(*state)])), torch.stack([tensor(*possible)]))


SLIDER = """<mujoco><option timestep="0.02"><flag contact="disable"/></option><worldbody><body>
  <joint name="x" type="slide" axis="1 0 0" damping="1"/><joint name="y" type="slide" axis="0 1 0" damping="1"/>
  <geom type="sphere" size=".05" mass=".3"/></body></worldbody><actuator><motor joint="x"/><motor joint="y"/></actuator>
</mujoco>"""


def test_the_point_mass_is_mujocos_away_from_the_walls():
    world, rng, model = PointMass2D(frame_skip=1), np.random.default_rng(0), mujoco.MjModel.from_xml_string(SLIDER)
    data = mujoco.MjData(model)
    for _ in range(100):
        place, velocity, force = rng.uniform(-0.8, 0.8, 2), rng.uniform(-1, 1, 2), rng.uniform(-1, 1, 2)
        data.qpos[:], data.qvel[:], data.ctrl[:] = place, velocity, force
        mujoco.mj_step(model, data)
        ours = world.transition(tensor(*place, *velocity), tensor(*force)).numpy()
        np.testing.assert_allclose(ours, np.concatenate([data.qpos, data.qvel]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("frame_skip,steps", [(1, 92), (2, 46), (4, 23)])
def test_full_throttle_takes_so_many_steps_and_ends_at_the_wall(frame_skip, steps):
    world, states = PointMass2D(frame_skip), [tensor(-0.8, -0.8, 0, 0)]
    for _ in range(300):
        states.append(world.transition(states[-1], tensor(1, 1)))
    assert world.success(torch.stack(states), world.goals[0]).int().argmax() == steps
    assert states[-1].tolist() == [1, 1, 0, 0]


def test_the_maze_is_gymnasium_robotics_own():
    """Its own environment, stepped on and on, goes the same way up to what its solver remembers at walls."""
    world, own, rng = PersistentPointMaze(), PersistentPointMaze().point, np.random.default_rng(0)
    own.set_state(np.array([-1.0, -1.0]), np.zeros(2))
    state, touched = tensor(-1, -1, 0, 0), 0
    for k in range(400):
        action = rng.uniform(-1, 1, 2) + np.array([0.5, -0.3]) * (k % 200 < 100)
        state, theirs = world.transition(state, torch.from_numpy(action)), own.step(action)[0]
        np.testing.assert_allclose(state, theirs, atol=1e-4)
        state, touched = torch.from_numpy(theirs), touched + bool(abs(theirs[1]) > 1.35)
    assert touched > 10


# ------------------------------------------------------------------------------------------------- ants in mazes
def test_an_egocentric_ant_does_not_know_which_way_is_north():
    """The whole world turned about the vertical axis looks the same, and the direction is its own."""
    env = gym.make("EgoAnt-v0")
    env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(20):
        env.step(env.action_space.sample())
    qpos, qvel, north = env.unwrapped.data.qpos.copy(), env.unwrapped.data.qvel.copy(), np.array([0.6, 0.8])
    seen = egocentric(qpos, qvel, north)
    for angle in (0.5, 2.0, -3.0):
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        other_qpos, other_qvel = qpos.copy(), qvel.copy()
        other_qpos[:2], other_qvel[:2] = turn @ qpos[:2], turn @ qvel[:2]
        half = np.array([math.cos(angle / 2), 0.0, 0.0, math.sin(angle / 2)])
        mujoco.mju_mulQuat(other_qpos[3:7], half, qpos[3:7])
        np.testing.assert_allclose(egocentric(other_qpos, other_qvel, turn @ north), seen, atol=1e-12)
    upright = qpos.copy()
    upright[3:7] = 1, 0, 0, 0
    np.testing.assert_allclose(egocentric(upright, qvel, north), [*upright[2:], *qvel, *north])


def test_the_shortest_path_through_a_maze():
    world = gym.make("AntMaze_UMaze-v4").unwrapped  # from (1, 1) around the wall in the middle to (3, 1)
    far = distances(world.maze.maze_map, (3, 1))
    assert [far[cell] for cell in ((1, 1), (1, 3), (2, 3), (3, 3), (3, 1))] == [6, 4, 3, 2, 0] and (2, 2) not in far
    here, there, goal = (world.maze.cell_rowcol_to_xy(np.array(cell)) for cell in ((1, 1), (1, 2), (3, 1)))
    np.testing.assert_allclose(direction(world.maze, here, goal), (there - here) / np.linalg.norm(there - here))
    np.testing.assert_allclose(direction(world.maze, goal + 0.3, goal), [-(0.5**0.5)] * 2, atol=1e-9)
