"""False against conservative extrapolation: values beside a demonstrated path, with and without negative samples.

    pip install -r benchmark/requirements.txt && python benchmark/vins_toy.py     # half a minute; docs/vins_toy.png

A point in the plane, whose action is its displacement, was seen on one curved path. Both value functions learn minus
the steps to go along it, with the losses of vins.py. White lines: the point climbs from off the path.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import vins

STEPS = 30
LAYOUT = vins.Layout(state=(0, 1), perturbed=((0, 1),), goal=())
STARTS = torch.tensor([[-0.6, 0.5], [-0.9, -0.9], [0.1, -0.7], [0.4, 0.9]])


def path() -> Tensor:
    """The demonstrated points [STEPS + 1, 2], the last one is the goal."""
    x = torch.linspace(-1, 1, STEPS + 1)
    return torch.stack([x, 0.6 * torch.sin(3 * x)], -1)


def learn(negatives: bool, updates: int, seed: int = 1) -> vins.GoalValue:
    """The value function of the path."""
    torch.manual_seed(seed)
    points, args = path(), vins.Args(hidden_sizes=(64, 64), model_hidden_sizes=(8,), value_lr=1e-3, tau=0.02)
    ends = (torch.arange(STEPS) == STEPS - 1).float()
    demo = vins.Batch(points[:-1], points[1:] - points[:-1], torch.zeros(STEPS), points[1:], ends)
    agent = vins.Agent((2, 2, tuple(LAYOUT), args.hidden_sizes, args.model_hidden_sizes, 1), demo, args)
    for _ in range(updates):
        vins.vins_update(agent, vins.sample(demo, 64), torch.ones(1, 2) if negatives else None, args)
    return agent.actor.value


def grid(size: int = 60) -> Tensor:
    """Points [size, size, 2] of the plane; the first axis is y."""
    line = torch.linspace(-1.3, 1.3, size)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], -1)


@torch.no_grad()
def too_high(value: vins.GoalValue) -> float:
    """Share of the plane's points, farther than 0.2 from the path, whose value exceeds the nearest path point's."""
    points = grid().flatten(0, 1)
    distances, nearest = torch.cdist(points, path()).min(1)
    off = distances > 0.2
    return (value(points[off]) > value(path()[nearest[off]])).float().mean().item()


@torch.no_grad()
def climb(value: vins.GoalValue, points: Tensor, steps: int = 80, stride: float = 0.06) -> Tensor:
    """Where points [n, 2] go that always make the step, of 32 directions, to the highest value: [steps + 1, n, 2]."""
    angles = torch.arange(32) * 2 * torch.pi / 32
    moves = stride * torch.stack([angles.cos(), angles.sin()], -1)
    visited = [points]
    for _ in range(steps):
        outcomes = visited[-1][:, None] + moves
        moved = outcomes[torch.arange(len(points)), value(outcomes).argmax(1)]
        arrived = (visited[-1] - path()[-1]).norm(dim=-1, keepdim=True) < 1.5 * stride
        visited.append(torch.where(arrived, visited[-1], moved))
    return torch.stack(visited)


def main() -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True)
    names = {False: "without negative samples", True: "with negative samples"}
    for axis, (negatives, name) in zip(axes, names.items(), strict=True):
        value = learn(negatives, 6_000)
        with torch.no_grad():
            image = value(grid()).numpy()
        shown = axis.imshow(image, origin="lower", extent=(-1.3, 1.3, -1.3, 1.3), vmin=-60, vmax=10)
        figure.colorbar(shown, ax=axis)
        axis.plot(*path().T, "k.-", markersize=3)
        axis.plot(*path()[-1], "k*", markersize=12)
        trips = climb(value, STARTS)
        for trip in trips.transpose(0, 1):
            axis.plot(*trip.T, "w-")
            axis.plot(*trip[0], "wo", markersize=4)
        arrived = ((trips[-1] - path()[-1]).norm(dim=-1) < 0.1).sum()
        report = f"too high off the path: {too_high(value):.0%}; at the goal: {arrived} of {len(STARTS)}"
        print(f"{name}: {report}")
        axis.set(title=f"{name}\n{report}", xlim=(-1.3, 1.3), ylim=(-1.3, 1.3))
    figure.tight_layout()
    figure.savefig(Path(__file__).parents[1] / "docs" / "vins_toy.png", dpi=70)


if __name__ == "__main__":
    main()
