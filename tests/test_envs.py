"""The worlds without resets: EARL's tabletop, the point mass, the maze."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import envs.point_mass
import envs.point_maze
import envs.tabletop

gym.register_envs(envs)
WORLDS = {"Tabletop-v0": 200, "PointMass2D-v0": 100, "PointMass2DCoarse-v0": 100, "PersistentPointMaze-v0": 300}


def tensor(*numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def table(gripper=(0, 0), mug=(2.5, 0), flag=-1) -> torch.Tensor:
    return tensor(*gripper, *mug, flag, flag)


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


@pytest.mark.parametrize("env_id", WORLDS)
def test_the_expert_reaches_every_goal_and_the_start(env_id):
    world, rng = gym.make(env_id).unwrapped, np.random.default_rng(0)
    for goal in world.goals:
        state, home = world.start_states(2, rng)
        for target in (goal, world.as_goal(home)):
            steps = 0
            while not world.success(state, target) and steps < 600:
                state, steps = world.transition(state, world.expert(state, target, rng)), steps + 1
            assert 75 < steps < 130 if env_id == "Tabletop-v0" else steps < 600
    possible = world.project(state)
    torch.testing.assert_close(world.project(possible), possible)


# ------------------------------------------------------------------------------------------------------ tabletop
def earl_tabletop(state, action) -> list[float]:
    """EARL's rules once more, a number at a time."""
    clip = lambda x, bound: max(-bound, min(bound, x))  # noqa: E731
    x, y, mug_x, mug_y, flag, _ = state
    dx, dy, grip = (clip(a, 1) for a in action)
    if grip > 0:
        held = flag == 0 or ((x - mug_x) ** 2 + (y - mug_y) ** 2) ** 0.5 < 0.4
    else:
        held = False
    new_x, new_y = clip(x + 0.2 * dx, 2.8), clip(y + 0.2 * dy, 2.8)
    if held:
        mug_x, mug_y = clip(mug_x + (new_x - x), 2.8), clip(mug_y + (new_y - y), 2.8)
    return [new_x, new_y, mug_x, mug_y, float(held) - 1, float(held) - 1]


def test_the_tabletop_is_earls():
    world, rng = envs.tabletop.Tabletop(), np.random.default_rng(0)
    held = 0
    for _ in range(100):
        gripper = rng.uniform(-2.8, 2.8, 2)
        state = [*gripper, *np.clip(gripper + rng.normal(0, 0.3, 2), -2.8, 2.8), -1.0, -1.0]
        world.state = tensor(*state)
        for _ in range(20):
            action = rng.uniform(-1.3, 1.3, 3) + np.array([0, 0, 0.8])
            state = earl_tabletop(state, action)
            world.step(action)
            np.testing.assert_allclose(world.state, state, rtol=0, atol=1e-6)
            held += state[4] == 0
        for goal in world.goals:
            distance = sum((a - float(b)) ** 2 for a, b in zip(state[:4], goal[:4], strict=True)) ** 0.5
            assert world.success(world.state, goal) == world.reward(world.state, goal) == (distance <= 0.2)
    assert 200 < held < 1_800


@pytest.mark.parametrize("distance,flag", [(0.39, 0), (0.41, -1)])
def test_the_gripper_reaches_less_than_0_4(distance, flag):
    after = envs.tabletop.Tabletop().transition(table(mug=(distance, 0)), tensor(0, 0, 1))
    assert after[4:].tolist() == [flag, flag]


TRANSITIONS = {
    "a held mug moves as far as the gripper, which the edge stops": (
        ((2.75, 0), (2.5, 0), 0), (1, 0, 1), (2.8, 0, 2.55, 0, 0, 0)),
    "grip <= 0 releases before the move": (((1, 1), (1, 1), 0), (0.5, -1, 0), (1.1, 0.8, 1, 1, -1, -1)),
    "grasping and carrying in one step": (((0, 0), (0.3, 0), -1), (0, 1, 0.01), (0, 0.2, 0.3, 0.2, 0, 0)),
    "actions are clipped; too far to grasp": (((0, 0), (2, 0), -1), (-3, 3, 1), (-0.2, 0.2, 2, 0, -1, -1)),
    "once held, distance does not matter": (((0, 0), (2, 0), 0), (0, 1, 1), (0, 0.2, 2, 0.2, 0, 0)),
    "the mug stays on the table": (((0, 0), (-2.75, 0), 0), (-1, 0, 1), (-0.2, 0, -2.8, 0, 0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("before,action,after", TRANSITIONS.values(), ids=TRANSITIONS)
def test_tabletop_transitions_by_hand(before, action, after):
    torch.testing.assert_close(envs.tabletop.Tabletop().transition(table(*before), tensor(*action)), tensor(*after))


SUCCESSES = [
    ((0.1, 0), (0, 1.9), -1, True), ((1, 0), (0, 2), -1, False), ((0, 0), (0, 1.7), -1, False),
    ((0.15, 0), (0, 1.85), -1, False), ((0, 0), (0, 2), 0, True),
]  # fmt: skip


@pytest.mark.parametrize("gripper,mug,flag,success", SUCCESSES)
def test_success_needs_gripper_and_mug(gripper, mug, flag, success):
    world = envs.tabletop.Tabletop()
    assert world.success(table(gripper, mug, flag), world.goals[2]).item() is success
    assert world.reward(table(gripper, mug, flag), world.goals[2]).item() == success


def test_the_flag_snaps_to_the_nearer_of_its_values_and_places_to_the_table():
    states = torch.stack([tensor(0, 3, -2.9, 1, -0.3, -0.6), tensor(0, 0, 0, 0, -0.9, -0.2)])
    snapped = torch.stack([tensor(0, 2.8, -2.8, 1, 0, 0), tensor(0, 0, 0, 0, -1, -1)])
    torch.testing.assert_close(envs.tabletop.Tabletop().project(states), snapped)


# ---------------------------------------------------------------------------------------------------- point mass
SLIDER = """<mujoco><option timestep="0.02"><flag contact="disable"/></option><worldbody><body>
  <joint name="x" type="slide" axis="1 0 0" damping="1"/><joint name="y" type="slide" axis="0 1 0" damping="1"/>
  <geom type="sphere" size=".05" mass=".3"/></body></worldbody><actuator><motor joint="x"/><motor joint="y"/></actuator>
</mujoco>"""


def test_the_point_mass_is_mujocos_away_from_the_walls():
    import mujoco

    world, rng = envs.point_mass.PointMass2D(frame_skip=1), np.random.default_rng(0)
    model = mujoco.MjModel.from_xml_string(SLIDER)
    data = mujoco.MjData(model)
    for _ in range(100):
        place, velocity, force = rng.uniform(-0.8, 0.8, 2), rng.uniform(-1, 1, 2), rng.uniform(-1, 1, 2)
        data.qpos[:], data.qvel[:], data.ctrl[:] = place, velocity, force
        mujoco.mj_step(model, data)
        ours = world.transition(tensor(*place, *velocity), tensor(*force)).numpy()
        np.testing.assert_allclose(ours, np.concatenate([data.qpos, data.qvel]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("frame_skip,steps", [(1, 92), (2, 46), (4, 23)])
def test_full_throttle_takes_so_many_steps_and_ends_at_the_wall(frame_skip, steps):
    world = envs.point_mass.PointMass2D(frame_skip=frame_skip)
    state, taken = tensor(-0.8, -0.8, 0, 0), 0
    while not world.success(state, world.goals[0]):
        state, taken = world.transition(state, tensor(1, 1)), taken + 1
    assert taken == steps
    for _ in range(200):
        state = world.transition(state, tensor(1, 1))
    assert state.tolist() == [1, 1, 0, 0]


def test_a_point_beyond_the_wall_is_put_to_it_without_its_velocity_outwards():
    states = torch.tensor([[1.2, 0.5, 0.3, 0.4], [-1.1, 1.01, 0.2, 0.6], [1.0, -1.0, 0.5, -0.5]])
    snapped = torch.tensor([[1, 0.5, 0, 0.4], [-1, 1, 0.2, 0], [1.0, -1.0, 0.5, -0.5]])
    torch.testing.assert_close(envs.point_mass.PointMass2D().project(states), snapped)


# ---------------------------------------------------------------------------------------------------------- maze
def test_the_maze_is_gymnasium_robotics_own():
    """Its own environment, stepped on and on, goes the same way up to what its solver remembers at walls."""
    world, rng = envs.point_maze.PersistentPointMaze(), np.random.default_rng(0)
    own = envs.point_maze.PersistentPointMaze().point
    own.set_state(np.array([-1.0, -1.0]), np.zeros(2))
    state, touched = tensor(-1, -1, 0, 0), 0
    for k in range(400):
        action = rng.uniform(-1, 1, 2) + np.array([0.5, -0.3]) * (k % 200 < 100)
        state, theirs = world.transition(state, torch.from_numpy(action)), own.step(action)[0]
        np.testing.assert_allclose(state, theirs, atol=1e-4)
        state, touched = torch.from_numpy(theirs), touched + bool(abs(theirs[1]) > 1.35)
    assert touched > 10
