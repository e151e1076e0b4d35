"""Writes a Minari data set in the schema of demos/README.md.

python demos/from_minari.py mujoco/hopper/expert-v0 Hopper-v5.npz --episodes 10
python hyper.py --env-id Hopper-v5 --demos Hopper-v5.npz
"""

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import minari
import numpy as np
import tyro

OBS_DIM = {"Ant": 27, "Humanoid": 45}  # as make_env cuts


@dataclass
class Args:
    dataset: Annotated[str, tyro.conf.Positional]  # id of the data set; downloaded if it is not on this machine
    file: Annotated[Path, tyro.conf.Positional]  # the .npz file to write
    episodes: int | None = None  # only the first so many


def flatten(space: gym.Space, obs) -> np.ndarray:
    """An episode's observations [t, obs_dim]; dictionaries in the order of gymnasium's FlattenObservation."""
    if isinstance(space, gym.spaces.Dict):
        return np.concatenate([flatten(part, obs[name]) for name, part in space.items()], -1)
    return obs.reshape(len(obs), -1)


def main(args: Args) -> None:
    data = minari.load_dataset(args.dataset, download=True)
    env_id = data.env_spec.id if data.env_spec else None
    dim, columns = OBS_DIM.get(str(env_id).split("-v")[0]), {}
    for episode in data.iterate_episodes(data.episode_indices[: args.episodes]):
        obs, truncations = flatten(data.observation_space, episode.observations)[:, :dim], episode.truncations.copy()
        truncations[-1] |= not episode.terminations[-1]  # the next row belongs to another episode
        row = dict(observations=obs[:-1], actions=episode.actions, rewards=episode.rewards, next_observations=obs[1:])
        for name, column in (row | dict(terminations=episode.terminations, truncations=truncations)).items():
            columns.setdefault(name, []).append(np.asarray(column, np.float32))
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    episodes, returns = len(columns["rewards"]), [rewards.sum() for rewards in columns["rewards"]]
    about = dict(env_id=env_id, dataset=args.dataset, episodes=episodes, minari=version("minari"))
    np.savez_compressed(args.file, metadata=json.dumps(about), **arrays)
    print(f"{args.file}: {episodes} episodes of {env_id}, return {np.mean(returns):.1f} +- {np.std(returns):.1f}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
