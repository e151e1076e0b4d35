"""Writes a D4RL file (.hdf5) in the schema of demos/README.md.

python demos/from_d4rl.py hopper_expert-v2.hdf5 Hopper-v4.npz --env-id Hopper-v4 --episodes 10
python hyper.py --env-id Hopper-v4 --demos Hopper-v4.npz

Files without next_observations (v0, v1) do not hold what follows the last row of an episode: this row is left out, and
the row before it ends the episode as at a time limit.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import h5py
import numpy as np
import tyro

OBS_DIM = {"Ant": 27, "Humanoid": 45}  # as make_env cuts


@dataclass
class Args:
    source: Annotated[Path, tyro.conf.Positional]
    file: Annotated[Path, tyro.conf.Positional]  # the .npz file to write
    env_id: str
    """gymnasium's name of the environment; the file does not know it"""
    episodes: int | None = None  # only the first so many


def main(args: Args) -> None:
    with h5py.File(args.source) as file:
        obs, actions, rewards = (np.array(file[name], np.float32) for name in ("observations", "actions", "rewards"))
        terminations, truncations = np.array(file["terminals"], bool), np.array(file["timeouts"], bool)
        next_obs = np.array(file["next_observations"], np.float32) if "next_observations" in file else None
    keep = np.ones(len(obs), bool)
    ends = np.flatnonzero(terminations | truncations)
    if next_obs is None:
        next_obs, keep[ends], keep[-1] = np.roll(obs, -1, 0), False, False
        terminations[:], truncations[ends[ends > 0] - 1] = False, True
    if args.episodes:
        keep[ends[args.episodes - 1] + 1 :] = False
    dim = OBS_DIM.get(args.env_id.split("-v")[0])
    arrays = dict(observations=obs[:, :dim], actions=actions, rewards=rewards, next_observations=next_obs[:, :dim])
    arrays |= dict(terminations=terminations, truncations=truncations & ~terminations)
    arrays = {name: column[keep].astype(np.float32) for name, column in arrays.items()}
    episodes = int((arrays["terminations"] + arrays["truncations"]).sum())
    about = dict(env_id=args.env_id, source=args.source.name, episodes=episodes)
    np.savez_compressed(args.file, metadata=json.dumps(about), **arrays)
    print(f"{args.file}: {episodes} episodes, return {arrays['rewards'].sum() / max(episodes, 1):.1f} on average")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
