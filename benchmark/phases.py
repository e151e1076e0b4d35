"""A picture strip of an mbarl.py run: forward and backward phases of its one long trajectory, as they were in training.

    python benchmark/phases.py RUN_DIR --at 0.1 0.5 1 --out phases.png

Needs matplotlib (benchmark/requirements.txt). Reads RUN_DIR/checkpoint.pt, whose replays hold every transition in order. For each share
`--at` of the run's forward phases, the phase and the backward one after it: paths from above, dark at the start, light at the end; a cross
where the phase began, a star at the goal.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

MOVING = {"Tabletop-v0": {"gripper": 0, "mug": 2}}  # first column of each place in a state; elsewhere a point


def phases(rows: np.ndarray, obs_dim: int, act_dim: int, n_demos: int, limit: int) -> list[np.ndarray]:
    """Observations [steps + 1, obs] of each phase, of a replay's rows [n, width] after its demonstrations. A phase ends where the next
    row does not begin at its end, at a terminal row, and after `limit` steps."""
    rows = rows[n_demos:]
    obs, next_obs = rows[:, :obs_dim], rows[:, obs_dim + act_dim : 2 * obs_dim + act_dim]
    pieces, begin = [], 0
    for t in range(len(rows)):
        last = t + 1 == len(rows)
        if last or rows[t, -1] or not np.array_equal(obs[t + 1], next_obs[t]) or t + 1 - begin == limit:
            pieces.append(np.concatenate([obs[begin : t + 1], next_obs[t : t + 1]]))
            begin = t + 1
    return pieces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--at", type=float, nargs="+", default=[0.05, 0.25, 0.5, 1.0])
    parser.add_argument("--out", type=Path, default=Path("phases.png"))
    options = parser.parse_args()
    if not all(0 <= share <= 1 for share in options.at):
        raise SystemExit("phases.py: error: --at takes shares between 0 and 1")
    if not (options.run_dir / "checkpoint.pt").exists():
        raise SystemExit(f"phases.py: error: {options.run_dir} has no checkpoint.pt")
    content = torch.load(options.run_dir / "checkpoint.pt", weights_only=True)
    args, parts, env_steps = content["policy"]["args"], content["parts"], content["counters"]["env_steps"]
    if args["algo"] not in ("mbarl", "medal"):
        raise SystemExit(f"phases.py: error: a run of mbarl or medal is needed, not of {args['algo']}")
    obs_dim, act_dim, env_id = content["policy"]["obs_dim"], content["policy"]["act_dim"], args["env_id"]
    if args["mix_into_replay"] or args["explore"]:
        raise SystemExit("phases.py: error: the replays of this run are not its phases (--mix-into-replay, --explore)")
    of = {name: parts[f"{name}_replay"]["rows"].numpy() for name in ("forward", "backward")}
    backward = len(parts["visited"]["rows"])  # every step of backward phases
    demos = {name: len(rows) - {"backward": backward, "forward": env_steps - backward}[name] for name, rows in of.items()}
    of = {name: phases(rows, obs_dim, act_dim, demos[name], args["switch_steps"]) for name, rows in of.items()}
    if not of["backward"]:
        raise SystemExit("phases.py: error: this run had no backward phase yet")
    moving, state_dim = MOVING.get(env_id, {"point": 0}), len(parts["world"]["state"])
    if env_id not in MOVING and state_dim < 2:
        raise SystemExit("phases.py: error: a world whose state begins with a place x, y is needed")
    numbers = dict.fromkeys(min(round(share * (len(of["forward"]) - 1)), len(of["backward"]) - 1) for share in options.at)
    before = np.cumsum([0, *(len(f) + len(b) - 2 for f, b in zip(of["forward"], of["backward"], strict=False))])
    figure, axes = plt.subplots(2, len(numbers), figsize=(2.7 * len(numbers), 5.6), squeeze=False, layout="constrained")
    for column, number in zip(axes.T, numbers, strict=True):
        for ax, (name, pieces) in zip(column, of.items(), strict=True):
            path = pieces[number]
            for (what, at), cmap in zip(moving.items(), ("viridis", "autumn"), strict=False):
                ax.plot(*path[:, at : at + 2].T, color="0.8", lw=0.5, zorder=1)
                ax.scatter(*path[:, at : at + 2].T, c=np.arange(len(path)), cmap=cmap, s=5, label=what, zorder=2)
                ax.plot(*path[0, at : at + 2], "kx", zorder=3)
            if name == "forward":
                goal = list(moving.values())[-1] + state_dim
                ax.plot(*path[0, goal : goal + 2], "r*", ms=12, zorder=3)
            ax.set(title=f"{name}, {len(path) - 1} steps", aspect="equal", xticks=[], yticks=[])
        column[0].set_title(f"step {before[number]:,}\n{column[0].get_title()}")
    columns = [*moving.values(), list(moving.values())[-1] + state_dim]  # the goal's too
    every = np.concatenate([path[:, at : at + 2] for pieces in of.values() for path in pieces for at in columns])
    for ax in axes.flat:
        ax.set(xlim=(every[:, 0].min() - 0.1, every[:, 0].max() + 0.1), ylim=(every[:, 1].min() - 0.1, every[:, 1].max() + 0.1))
    axes[0, 0].legend(fontsize=7)
    figure.savefig(options.out, dpi=110)
    print(f"{options.out}: {len(of['forward'])} forward and {len(of['backward'])} backward phases in {env_steps:,} steps")


if __name__ == "__main__":
    main()
