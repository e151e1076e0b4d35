"""What all tests share."""

import csv
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tests import pointmass

ROOT = Path(__file__).parents[1]
POINT = "tests.pointmass:PointMass-v0"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demos(tmp_path_factory) -> str:
    """Five trajectories of the point mass's expert."""
    path = tmp_path_factory.mktemp("demos") / "point.npz"
    pointmass.write_demos(path)
    return str(path)


def run(script: str, words: str, folder: Path, run_dir: str = "run") -> list[dict[str, str]]:
    """What `python script.py words --run-dir run_dir` does in a folder, in this process. Returns the run's rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [f"{script}.py", *words.split(), "--run-dir", run_dir])
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    return rows(folder / run_dir)


def rows(run_dir: Path) -> list[dict[str, str]]:
    """progress.csv without the column that depends on the machine's speed."""
    with open(run_dir / "progress.csv") as file:
        return [{name: value for name, value in row.items() if name != "wall_time_s"} for row in csv.DictReader(file)]
