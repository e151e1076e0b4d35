"""D4RL's maze2d-*-v1 as Gymnasium environments, and the controller that makes their data sets.

`import envs.maze2d` registers Maze2D-umaze-v0, Maze2D-medium-v0 and Maze2D-large-v0. They stand on PointMaze of
gymnasium-robotics, which has the same physics and walls but another task.
"""

import contextlib
import io
import json
import os
import re
from collections import deque
from pathlib import Path
from typing import ClassVar, Literal

import gymnasium as gym
import numpy as np
from tqdm import tqdm

MAZES = {  # PointMaze id, goal cell (row, column), time limit
    "umaze": ("PointMaze_UMaze-v3", (1, 1), 300),
    "medium": ("PointMaze_Medium-v3", (6, 6), 600),
    "large": ("PointMaze_Large-v3", (7, 9), 800),
}


class Maze2D(gym.Env):
    """A ball that is pushed through a maze: reward 1 within 0.5 of a fixed goal, no termination.

    Observation [x, y, vx, vy], x along the rows and y along the columns; as in D4RL, the walls stand 0.2 nearer to the
    origin than integer cells say. Starts are uniform over free cells; options={"start": [x, y, vx, vy]} sets one.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 50}
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float64)

    def __init__(self, maze: str, render_mode: str | None = None):
        with contextlib.redirect_stderr(io.StringIO()):  # it announces what does not concern mazes
            import gymnasium_robotics

        gym.register_envs(gymnasium_robotics)
        env_id, goal, self.time_limit = MAZES[maze]
        self.pointmaze, self.render_mode = gym.make(env_id, render_mode=render_mode).unwrapped, render_mode
        self.pointmaze.reset(seed=0)
        self.point, self.map = self.pointmaze.point_env, self.pointmaze.maze
        self.walls = np.array([[cell == 1 for cell in row] for row in self.map.maze_map])
        self.free = [tuple(map(int, cell)) for cell in np.argwhere(~self.walls)]
        self.goal = np.array(goal, float)
        self.pointmaze.goal = self.to_pointmaze(np.array([*goal, 0, 0]))[:2]  # where it is drawn
        self.pointmaze.update_target_site_pos()

    def to_pointmaze(self, obs: np.ndarray) -> np.ndarray:
        """[4] in PointMaze's frame: right and up from the maze's centre."""
        x, y, vx, vy = obs
        return np.array([y + 0.7 - self.map.x_map_center, self.map.y_map_center - x - 0.7, vy, -vx])

    def from_pointmaze(self, obs: np.ndarray) -> np.ndarray:
        """The inverse, [4]."""
        right, up, v_right, v_up = obs
        return np.array([self.map.y_map_center - up - 0.7, right + self.map.x_map_center - 0.7, -v_up, v_right])

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        cell = self.free[self.np_random.integers(len(self.free))]
        obs = np.array([*(cell + self.np_random.uniform(-0.1, 0.1, 2)), *self.np_random.normal(0, 0.1, 2)])
        obs = np.asarray((options or {}).get("start", obs), float)
        state = self.to_pointmaze(obs)
        self.point.set_state(state[:2], state[2:])
        return obs, {}

    def step(self, action: np.ndarray):
        state, *_ = self.point.step(np.array([action[1], -action[0]]))
        obs = self.from_pointmaze(state)
        reached = bool(np.linalg.norm(obs[:2] - self.goal) <= 0.5)
        return obs, float(reached), False, False, {"success": reached}

    def render(self):
        return self.pointmaze.render()


for name, (_, _, time_limit) in MAZES.items():
    gym.register(
        f"Maze2D-{name}-v0", Maze2D, max_episode_steps=time_limit, disable_env_checker=True, kwargs=dict(maze=name)
    )


class WaypointController:
    """Plans a way to a goal cell, follows it by proportional control with damping, and holds at the goal."""

    def __init__(self, walls: np.ndarray, rng: np.random.Generator):
        self.walls, self.rng = walls, rng

    def plan(self, obs: np.ndarray, goal: tuple[int, int]) -> None:
        """Waypoints: the cells of the shortest way but the first, each but the last shifted by up to 0.2."""
        free = np.argwhere(~self.walls)
        start = tuple(map(int, free[np.abs(free - obs[:2]).max(1).argmin()]))
        next_cell, queue = {goal: goal}, deque([goal])
        while queue and start not in next_cell:  # breadth first, from the goal
            row, column = queue.popleft()
            for near in ((row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)):
                if not self.walls[near] and near not in next_cell:
                    next_cell[near] = (row, column)
                    queue.append(near)
        path = [next_cell[start]]
        while path[-1] != goal:
            path.append(next_cell[path[-1]])
        self.waypoints = [np.array(cell) - self.rng.uniform(0, 0.2, 2) for cell in path[:-1]]
        self.waypoints.append(np.array(goal, float))
        self.previous = np.array(start, float)

    def act(self, obs: np.ndarray) -> tuple[np.ndarray, bool]:
        """Action [2] at obs [4], and whether the goal is reached at low speed."""
        position, velocity = obs[:2], obs[2:]
        slow = np.linalg.norm(position - self.previous) < 0.1
        at_goal = bool(slow and np.linalg.norm(position - self.waypoints[-1]) < 0.1)
        waypoint = self.waypoints[-1 if at_goal else 0]
        if slow and len(self.waypoints) > 1 and np.linalg.norm(position - waypoint) < 0.1:
            self.waypoints.pop(0)
        self.previous = position
        return np.clip(10 * (waypoint - position) - velocity, -1, 1), at_goal


def maze_data(env_id: str, part: Literal["expert", "offline"], steps: int, seed: int) -> dict[str, np.ndarray]:
    """`steps` transitions of the controller, in the schema of demos/README.md.

    "expert": episodes to the fixed goal, each planned anew, without noise. "offline": one stream from goal to random
    goal with noise on the actions; a truncation marks the change of goals, but nothing is reset.
    """
    env, rng = Maze2D(re.fullmatch(r"Maze2D-(\w+)-v0", env_id)[1]), np.random.default_rng([seed, part == "offline"])
    controller, final_goal = WaypointController(env.walls, rng), tuple(map(int, env.goal))
    goal, obs, steps_to_goal, rows = final_goal, None, 0, []
    for _ in tqdm(range(steps), desc=f"{part} data of {env_id}", leave=False):
        if obs is None or (part == "expert" and steps_to_goal == 0):
            obs, _ = env.reset(seed=int(rng.integers(2**31)))
        if steps_to_goal == 0:
            others = [cell for cell in env.free if cell != goal]
            goal = final_goal if part == "expert" else others[rng.integers(len(others))]
            controller.plan(obs, goal)
        action, at_goal = controller.act(obs)
        if part == "offline":
            action = np.clip(action + 0.5 * rng.normal(size=2), -1, 1)
        next_obs, reward, *_ = env.step(action)
        steps_to_goal += 1
        ends = steps_to_goal == env.time_limit or (part == "offline" and at_goal)
        rows.append((obs, action, reward, next_obs, False, ends))
        obs, steps_to_goal = next_obs, 0 if ends else steps_to_goal
    names = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    data = {name: np.array(column, np.float32) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    data["truncations"][-1] = 1
    return data


def maze_file(env_id: str, part: Literal["expert", "offline"], steps: int, seed: int) -> str:
    """File in data/ with 100 expert episodes, or with an offline stream of `steps`; made if there is none."""
    steps = steps if part == "offline" else 100 * gym.spec(env_id).max_episode_steps
    path = Path("data") / f"{env_id}-{part}-{steps}-seed{seed}.npz"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.npz")  # several runs may start at once
        about = json.dumps(dict(env_id=env_id, part=part, seed=seed, checked=True))  # a stream runs on over truncations
        np.savez_compressed(temporary, metadata=about, **maze_data(env_id, part, steps, seed))
        os.replace(temporary, path)
    return str(path)
