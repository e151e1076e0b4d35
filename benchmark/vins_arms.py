"""The arms of the paper's table that share a run's networks, on the same episodes, filed under benchmark/results/vins.

    python benchmark/vins_arms.py runs/pick-1 runs/pick-2 --episodes 500     # finished runs of vins.py, any --algo

Cloning, VINS and VINS without cloning (option 2) differ only in how they act, so they act with one run's networks; the
simulator in place of the model (--oracle-episodes) does so too, and is slow.
"""

import csv
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import vins  # noqa: E402

ARMS = {"bc": (0.0, True, False), "vins": (None, True, False), "vins-no-bc": (1.0, False, False)}
ORACLE = {"vins-oracle-model": (None, True, True), "vins-oracle-model-no-bc": (1.0, False, True)}


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    episodes: int = 500
    oracle_episodes: int = 0  # 0: not the simulator's arms
    first_seed: int = 10**9  # of the episodes; training runs use lower ones
    envs: int = 25  # side by side


def main(args: Args) -> None:
    torch.set_num_threads(1)
    for run in args.runs:
        about = json.loads((run / "args.json").read_text())
        settings, policy = about["args"], torch.load(run / "policy.pt", weights_only=True)
        actor = vins.Actor(*policy["sizes"])
        actor.load_state_dict(policy["actor"])
        envs = [vins.make_env(settings["env_id"]) for _ in range(args.envs)]
        arms = {settings["algo"]: (None, True, False)} if settings["algo"] == "vins-no-ns" else ARMS
        arms = arms | (ORACLE if args.oracle_episodes and settings["algo"] == "vins" else {})
        for name, (radius, actor.around_clone, oracle) in arms.items():
            actor.radius, start = settings["radius"] if radius is None else radius, time.time()
            episodes = args.oracle_episodes if oracle else args.episodes
            trained = list(csv.DictReader((run / "progress.csv").read_text().splitlines()))[-1]
            row = {name: trained[name] for name in ("env_steps", "updates", "wall_time_s")}
            row |= vins.evaluate_side_by_side(actor, envs, episodes, args.first_seed, oracle)
            row |= dict(episodes=episodes, seconds=round(time.time() - start))
            folder = ROOT / "benchmark" / "results" / "vins" / f"{name}-{settings['num_demos']}" / settings["env_id"]
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"seed{settings['seed']}.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
                writer.writerow(row)
            (folder / f"seed{settings['seed']}.json").write_text(json.dumps(about, indent=2))
            print(f"{run.name} {name}: {row['eval_success_rate']:.1%}, {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
