"""Wrong data and worlds: one line that says what was found and what to do, before anything is trained."""

import importlib
import re
import sys

import pytest
import torch

from tests.conftest import POINT, ROOT, run
from tests.test_scripts import COMMANDS

WORLDS = {
    "sac": [
        ("--env-id tests.pointmass:Discrete-v0", r"Discrete-v0: needs vectors .* not .*Discrete\(3\)"),
        ("--env-id tests.pointmass:Image-v0", r"Image-v0: needs vectors .* not .*\(8, 8, 3\)"),
        ("--env-id CartPole-v1", r"CartPole-v1: needs vectors"),
    ],
    "hyper": [("--env-id tests.pointmass:Lawless-v0 --demos DEMOS --num-demos 5", r"Add its rule to TERMINATION")],
    "mbarl": [(f"--env-id {POINT}", r"PointMass-v0 has no goals, .* docs/mbarl.md shows a world")],
    "mbarl_offline": [("--env-id envs.tabletop:Tabletop-v0", r"no uniform_states\(n, rng\); take PointMass2D-v0")],
    "sra_offline": [(f"{COMMANDS.get('sra_offline')} --num-imagined 1", r"nothing is imagined; give fewer --warmup")],
}
WORLDS = [(script, *case) for script, cases in WORLDS.items() for case in cases if (ROOT / f"{script}.py").exists()]


def complaint(script: str, words: str, folder) -> str:
    """What the user reads. No run has begun."""
    with pytest.raises(SystemExit) as stopped:
        run(script, words, folder)
    message = str(stopped.value)
    assert message.startswith(f"{script}.py: ") and len(message.splitlines()) == 1 and not (folder / "run").exists()
    return message


@pytest.mark.parametrize("script,words,expected", WORLDS)
def test_a_world_that_will_not_do(script, words, expected, demos, tmp_path):
    (tmp_path / "demos").symlink_to(ROOT / "demos")
    message = complaint(script, words.replace("DEMOS", demos), tmp_path)
    assert re.search(expected, message), message


IMITATORS = [script for script in COMMANDS if "--num-demos" in COMMANDS[script] and script != "mbarl"]


@pytest.mark.parametrize("script", IMITATORS)
def test_demonstrations_that_will_not_do(script, demos, tmp_path):
    words = f"--env-id {POINT}" + (f" --offline-data {demos}" if "offline" in script else "")
    assert f"at {tmp_path}/no.npz" in complaint(script, f"{words} --demos {tmp_path}/no.npz", tmp_path)
    assert "demos/tests.pointmass:PointMass-v0.npz" in complaint(script, words, tmp_path)
    few = complaint(script, f"{words} --demos {demos} --num-demos 6", tmp_path)
    assert "has 5 trajectories" in few and "--num-demos" in few
    other = complaint(script, f"{words} --demos {ROOT}/demos/Hopper-v4.npz --num-demos 5", tmp_path)
    assert "11 observations" in other and "4" in other


@pytest.mark.parametrize("script", [script for script in COMMANDS if script != "mbarl"])
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_a_checkpoint(script, demos, tmp_path):
    """From step 160 on the step sizes are absurd; a loss is looked at every 100 steps."""
    data = f"--demos {demos} --num-demos 5" if script != "sac" else ""
    words = f"{COMMANDS[script]} --env-id {POINT} {data} --eval-every 1000 --checkpoint-every 100"
    words += " --learning-starts 160" if "offline" not in script else f" --offline-data {demos} --lr 1e30"
    words += " --actor-lr 1e30" if "offline" not in script else ""
    with pytest.raises(SystemExit, match=rf"^{script}\.py: a loss is not finite at step \d+: .*losses/.*nan"):
        run(script, words, tmp_path)
    if "offline" not in script:
        with pytest.MonkeyPatch.context() as patch:  # the checkpoint holds classes of the script that was run
            patch.setitem(sys.modules, "__main__", importlib.import_module(script))
            state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=False)
        networks = [part for part in state.values() if isinstance(part, torch.nn.Module)]
        assert state["step"] >= 100 and networks
        assert all(parameter.isfinite().all() for network in networks for parameter in network.parameters())
