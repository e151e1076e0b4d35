import os
import signal
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads anything
sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import pointmass

TINY = ["--hidden-sizes", "16", "16", "--batch-size", "16", "--eval-episodes", "1"]
TINY_SAC = [*TINY, "--buffer-size", "1000", "--learning-starts", "60"]
TINY_HYPER = [*TINY, "--model-hidden-sizes", "16", "16", "--model-every", "30", "--model-first-batches", "20", "--model-max-batches", "5",
              "--initial-steps", "60", "--updates-per-step", "2", "--num-demos", "4", "--rollouts-per-step", "4"]  # fmt: skip
TINY_HYPE = [*TINY, "--initial-steps", "60", "--num-demos", "4"]
TINY_MODELS = ["--num-demos", "5", "--model-hidden-sizes", "16", "16", "--model-batch-size", "20", "--model-max-batches", "10",
               "--model-every", "40"]  # fmt: skip
TINY_BCO = ["--hidden-sizes", "16", "16", "--eval-episodes", "1", "--learning-starts", "60", *TINY_MODELS]
TINY_SAC_EO = [*TINY_SAC, *TINY_MODELS]
TINY_SRA = ["--offline-steps", "6000", *TINY, "--batch-size", "32", "--model-hidden-sizes", "16", "16", "--model-steps", "20",
            "--model-members", "2", "--cvae-hidden-sizes", "16", "16", "--aug-size", "300"]  # fmt: skip
TINY_MBARL = [*TINY, "--model-hidden-sizes", "16", "16", "--model-every", "40", "--model-first-batches", "20", "--model-max-batches", "5",
              "--seed-steps", "40", "--rollouts", "16", "--num-demos", "4", "--backward-demos", "4", "--classifier-batch", "16",
              "--switch-steps", "20", "--eval-horizon", "20", "--updates-per-step", "2"]  # fmt: skip
POINT = ["--env-id", "tests.pointmass:PointMass-v0"]


@pytest.fixture(autouse=True)
def quiet_and_restored():
    """Training installs signal handlers and sets the thread count: give both back."""
    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def demos(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("demos") / "point.npz"
    pointmass.write_demos(path)
    return str(path)


@pytest.fixture
def hyper_point(demos) -> list[str]:
    """Command line of a tiny HyPER run on the point mass."""
    return [*POINT, *TINY_HYPER, "--demos", demos, "--termination", "tests.pointmass:terminates"]


@pytest.fixture
def hype_point(demos) -> list[str]:
    """Command line of a tiny HyPE run on the point mass."""
    return [*POINT, *TINY_HYPE, "--demos", demos]


@pytest.fixture
def argv_of(hyper_point, hype_point, demos):
    """Command line of a tiny run of a script on the point mass."""
    argv = dict(hyper=hyper_point, hype=hype_point, sac=[*POINT, *TINY_SAC])
    argv |= dict(sac_eo=[*POINT, *TINY_SAC_EO, "--demos", demos], bco_baseline=[*POINT, *TINY_BCO, "--demos", demos])
    argv |= dict(sra_offline=[*POINT, *TINY_SRA, "--demos", demos, "--offline-data", demos, "--rollout-freq", "40"])
    argv |= dict(mbarl=["--env-id", "Tabletop-v0", *TINY_MBARL])  # a world of its own
    return lambda script: argv[script.__name__]


def run(script, argv: list[str]) -> dict:
    """What `python script.py argv` does, in this process."""
    args = script.parse_args([str(word) for word in argv])
    script.check_args(args)
    return script.train(args)


def rows(run_dir) -> list[dict]:
    """progress.csv without the column that depends on the machine's speed."""
    import csv

    with open(Path(run_dir) / "progress.csv") as file:
        return [{name: value for name, value in row.items() if name != "wall_time_s"} for row in csv.DictReader(file)]
