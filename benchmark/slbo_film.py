"""What SLBO's model predicts beside what the robot does, after few, more and all real steps: docs/slbo_model.png

    pip install -r benchmark/requirements.txt
    MUJOCO_GL=egl python benchmark/slbo_film.py --run-dir runs/film     # trains, ten minutes; or osmesa

The policy without noise moves in the model and in the simulator, from the same start. The command again draws anew.
"""

import sys
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import slbo

STEPS = (8_000, 24_000, 80_000)
TIMES = (0, 10, 20, 40, 80, 120, 160, 199)
ROOT = Path(__file__).parents[1]


@torch.no_grad()
def predicted(actor: slbo.Actor, dynamics: slbo.DeltaMLP, obs: np.ndarray, length: int) -> np.ndarray:
    """States [length, obs_dim] of the policy in the model."""
    states, noise = [torch.as_tensor(obs)[None]], torch.zeros(1, len(actor.log_std))
    for _ in range(length - 1):
        states.append(slbo.virtual_step(actor, dynamics, states[-1], noise)[1])
    return torch.cat(states).numpy()


def real(actor: slbo.Actor, env, obs: np.ndarray, length: int) -> np.ndarray:
    """States [length, obs_dim] of the policy in the simulator; the last one is repeated where an episode ends."""
    states, over = [obs], False
    while len(states) < length:
        if not over:
            obs, _, terminated, truncated, _ = env.step(actor.act(obs, deterministic=True))
            over = terminated or truncated
        states.append(obs)
    return np.array(states)


def frame(env, state: np.ndarray) -> np.ndarray:
    """Picture [height, width, 3] of the robot in a state, whose first columns are positions, moved to x = 0."""
    robot, positions = env.unwrapped, state[: env.unwrapped.model.nq].astype(float)
    positions[0] = 0
    robot.set_state(positions, np.zeros(robot.model.nv))
    return env.render()[140:360]


def main(args: slbo.Args) -> None:
    args = replace(args, run_dir=args.run_dir or f"runs/film-{args.env_id}")
    env = slbo.make_env(args.env_id, "rgb_array")
    figure, axes = plt.subplots(2 * len(STEPS), len(TIMES), figsize=(2.2 * len(TIMES), 2.9 * len(STEPS)))
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    for i, steps in enumerate(STEPS):
        kept = Path(args.run_dir) / f"after_{steps}.pt"
        if not kept.exists():
            slbo.train(replace(args, total_timesteps=steps))
            state = torch.load(Path(args.run_dir) / "checkpoint.pt", weights_only=False)
            torch.save((state["actor"], state["dynamics"]), kept)
        actor, dynamics = torch.load(kept, weights_only=False)
        obs, _ = env.reset(seed=2**31)
        rows = dict(model=predicted(actor, dynamics, obs, TIMES[-1] + 1), robot=real(actor, env, obs, TIMES[-1] + 1))
        for j, (name, states) in enumerate(rows.items()):
            for ax, t in zip(axes[2 * i + j], TIMES, strict=True):
                ax.imshow(frame(env, states[t]))
                ax.set_title(f"step {t}, x = {states[t][0]:.1f}", fontsize=8)
            axes[2 * i + j][0].set_ylabel(f"{name}\nafter {steps:,}", fontsize=9)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "slbo_model.png", dpi=60)


if __name__ == "__main__":
    main(tyro.cli(slbo.Args, description=__doc__))
