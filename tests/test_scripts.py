"""Every script as a user runs it: alone in an empty folder, killed and started again, longer, with another seed."""

import os
import random
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import evaluate
from tests.conftest import POINT, ROOT, rows, run

KILLS = int(os.environ.get("KILLS", 1))

# Script -> settings of a run of a few seconds. Checkpoints come with every end of an episode, or so many steps.
RUN = "--hidden-sizes 16 16 --eval-every 60 --eval-episodes 2 --total-timesteps 300"
HOPPER = f"{RUN} --env-id Hopper-v4 --learning-starts 60 --checkpoint-every 1"
IMITATE = f"{HOPPER} --batch-size 16 --num-demos 4"
MODEL = "--model-hidden-sizes 16 16 --model-every 30"
COST = "--cost-hidden-sizes 16 16"
OFFLINE = f"{RUN} --env-id Hopper-v4 --batch-size 16 --checkpoint-every 40 --num-demos 4"
OFFLINE += " --offline-data demos/Hopper-v4.npz"
STATES = f"{MODEL} --model-batch-size 20 --model-batches 10 --expert-batch-size 16 --num-demos 4"
COMMANDS = {
    "sac": f"{HOPPER} --batch-size 16",
    "hyper": f"{IMITATE} {MODEL} {COST} --model-first-batches 20 --model-batches 5 --updates-per-step 2 "
    "--rollouts-per-step 4",
    "hype": f"{IMITATE} {COST} --cost-batch-size 16",
    "bc": f"{RUN} --env-id Hopper-v4 --batch-size 16 --num-demos 4",
    "sac_eo": f"{HOPPER} {STATES} --batch-size 16",
    "bco_baseline": f"{HOPPER} {STATES}",
    "mbarl": f"{RUN} {MODEL} --batch-size 16 --checkpoint-every 40 --model-first-batches 20 --model-batches 5 "
    "--num-demos 4 --learning-starts 40 --switch-steps 25 --classifier-batch-size 16",
    "sra_offline": f"{OFFLINE} --model-hidden-sizes 16 16 --model-batches 20 --rollout-every 100 --warmup-steps 0 "
    "--num-imagined 300",
    "offline_baselines": OFFLINE,
    "vins": f"{RUN} --env-id FetchReach-v4 --batch-size 16 --checkpoint-every 40 --num-demos 4 --model-hidden-sizes 16 "
    "--num-candidates 10 --eval-envs 2 --rl-after 200 --rl-every 50 --rl-episodes 2",
    "slbo": f"{RUN} --env-id SLBOHopper-v0 --model-hidden-sizes 16 16 --checkpoint-every 1 --stage-steps 60 --rounds 2 "
    "--model-updates 5 --policy-updates 2 --virtual-envs 4 --virtual-steps 20 --entropy-until 120 --value-epochs 1",
    "slbo_multitask": f"{RUN} --env-id HCF-v0 --model-hidden-sizes 16 16 --checkpoint-every 1 --stage-steps 30 "
    "--warm-up-rounds 1 --model-updates 5 --policy-updates 2 --virtual-envs 4 --virtual-steps 20 --value-epochs 1 "
    "--held-out-tasks 2 --test-after 4 99",
    "maml": f"{RUN} --env-id HCF-v0 --checkpoint-every 1 --batch-tasks 3 --task-steps 5 --held-out-tasks 1 "
    "--test-stages 0",
    "hyper_paper": f"{IMITATE} {MODEL} {COST} --model-patience 1 --updates-per-step 2 --rollouts-per-step 4 "
    "--cost-every 50 --cost-episodes 1 --cost-batch-size 16",
}
COMMANDS = {script: words for script, words in COMMANDS.items() if (ROOT / f"{script}.py").exists()}
FILES = {  # what a script needs beside it
    "mbarl": ("envs/point_mass.py", "envs/point_maze.py", "envs/tabletop.py"),
    "sra_offline": ("envs/maze2d.py", "demos/Hopper-v4.npz"),
    "offline_baselines": ("envs/maze2d.py", "demos/Hopper-v4.npz"),
    "slbo": ("envs/com_velocity.py",),
    "slbo_multitask": ("envs/com_velocity.py", "envs/multitask.py"),
    "maml": ("envs/com_velocity.py", "envs/multitask.py"),
    "hyper_paper": ("envs/wrappers.py", "demos/Hopper-v4.npz"),
    "vins": ("demos/FetchReach-v4.npz",),
}
STEP = {
    "bc": "updates",
    "vins": "updates",
    "sra_offline": "updates",
    "offline_baselines": "updates",
    "hyper_paper": "charts/train_steps",
}
PLANNED = ("sra_offline", "offline_baselines")  # learning rates are planned for the length of the run
BEGIN_AGAIN = ("bc",)  # without checkpoints
OWN_EVALUATION = ("mbarl", "hyper_paper")  # of given goals, with a trembling hand
COLUMNS = "env_steps wall_time_s eval_return_mean eval_return_std eval_length_mean eval_success_rate".split()

# Script -> settings with which it learns a point mass, a return of which a fresh policy is short, one that it reaches.
FAST = "--hidden-sizes 32 32 --batch-size 64 --actor-lr 3e-3 --critic-lr 3e-3"
LEARN = f"{FAST} --env-id {POINT} --learning-starts 200 --gamma 0.9"
CLONE = f"--env-id {POINT} --num-demos 5 --demos DEMOS"
SMALL = "--model-hidden-sizes 32 32"
SMALL_COST = "--cost-hidden-sizes 32 32 --ema-steps 200 --cost-lr 3e-3"
WORLD = f"{FAST} --env-id PointMass2D-v0 --reward analytic --tau 0.05"
LEARNS = {
    "sac": (f"{LEARN} --total-timesteps 1500", 10, 29),
    "hyper": (
        f"{LEARN} {CLONE} {SMALL} {SMALL_COST} --total-timesteps 800 --updates-per-step 2 "
        "--model-every 50 --model-first-batches 200 --model-batches 20",
        *(10, 29),
    ),
    "hype": (f"{LEARN} {CLONE} {SMALL_COST} --cost-batch-size 64 --total-timesteps 900", 10, 29),
    "bc": (f"{CLONE} --hidden-sizes 32 32 --actor-lr 3e-3 --total-timesteps 1000", 10, 29),
    "sac_eo": (
        f"{LEARN} {CLONE} {SMALL} --model-every 200 --model-batches 100 --expert-batch-size 32 --total-timesteps 1000",
        *(10, 29),
    ),
    "bco_baseline": (
        f"{CLONE} {SMALL} --hidden-sizes 32 32 --actor-lr 3e-3 --learning-starts 300 --model-lr 3e-3 --model-every 100 "
        "--model-batches 200 --expert-batch-size 32 --total-timesteps 700",
        *(10, 40),
    ),
    "mbarl": (
        f"{WORLD} --updates-per-step 4 --total-timesteps 1000 --model-batches 20 --model-first-batches 100 "
        "--real-ratio 0.3",
        *(-200, -120),
    ),
    "mbarl_offline": (
        f"{WORLD} --sizes 5000 --lengths 20 --starts demo --updates 1500 --model-batches 300 "
        "--rollout-transitions 5000",
        *(-200, -120),
    ),
    "sra_offline": (
        f"{CLONE} {SMALL} --offline-data DEMOS --hidden-sizes 32 32 --batch-size 64 --gamma 0.9 --total-timesteps 800 "
        "--model-batches 300 --rollout-every 300 --num-imagined 5000",
        *(10, 29),
    ),
    "vins": (f"--env-id FetchReach-v4 --demos {ROOT}/demos/FetchReach-v4.npz --total-timesteps 500", -45, -38),
    "slbo": (
        f"--env-id {POINT} --total-timesteps 750 --stage-steps 250 --rounds 4 --model-updates 60 --policy-updates 6 "
        "--model-hidden-sizes 32 32 --virtual-envs 40 --virtual-steps 25 --gamma 0.9 --max-kl 0.03",
        *(20, 40),
    ),
    "hyper_paper": (
        f"{LEARN} {CLONE} {SMALL} --updates-per-step 3 --model-every 50 --model-patience 2 --rollouts-per-step 10 "
        "--cost-hidden-sizes 32 32 --cost-every 25 --cost-episodes 1 --cost-batch-size 256 --cost-lr 1e-2 --alpha 0.1 "
        "--p-tremble 0 --total-timesteps 800",
        *(10, 29),
    ),
}
LEARNS = {script: case for script, case in LEARNS.items() if (ROOT / f"{script}.py").exists()}


class Run(NamedTuple):
    script: str
    words: str
    folder: Path
    run_dir: Path
    rows: list[dict[str, str]]


def start(script: str, words: str, folder: Path) -> subprocess.Popen:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [sys.executable, f"{script}.py", *words.split()]
    return subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module", params=COMMANDS)
def alone(request, tmp_path_factory) -> Run:
    """A finished run of the script, copied into a folder that holds nothing but its environment and a demo file."""
    script, words, folder = request.param, COMMANDS[request.param], tmp_path_factory.mktemp(request.param)
    for name in (f"{script}.py", *FILES.get(script, ["demos/Hopper-v4.npz"])):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    process = start(script, words, folder)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    (run_dir,) = (folder / "runs").iterdir()
    return Run(script, words, folder, run_dir, rows(run_dir))


def steps(run: Run) -> list[int]:
    return [int(row[STEP.get(run.script, "env_steps")]) for row in run.rows]


def test_a_run_writes_all_that_it_should(alone):
    with open(alone.run_dir / "progress.csv") as file:
        columns = [name for name in file.readline().strip().split(",") if name != "updates"]
    expert = [] if alone.script in ("sac", "mbarl", "slbo", "slbo_multitask", "maml") else ["expert_return"]
    assert set(columns) >= {*COLUMNS, *expert}
    assert steps(alone) == list(range(0, 301, 60))
    assert all(value not in ("", "nan", "inf") for name, value in alone.rows[-1].items() if name.startswith("losses/"))
    files = {path.name for path in alone.run_dir.iterdir()}
    assert {"args.json", "progress.csv", "policy.pt"} <= files
    assert ("checkpoint.pt" in files) == (alone.script not in BEGIN_AGAIN)
    assert any(name.startswith("events.out.tfevents") for name in files) and not any(".tmp" in name for name in files)


def test_the_saved_policy_is_the_evaluated_one(alone, capsys):
    """evaluate.py on the last evaluation's seeds finds the last evaluation's return."""
    torch.set_flush_denormal(True)
    evaluate.main(evaluate.Args(alone.run_dir, episodes=2, seed=1_000_300))
    found = float(capsys.readouterr().out.split("return ")[1].split()[0])
    if alone.script not in OWN_EVALUATION:
        assert found == pytest.approx(float(alone.rows[-1]["eval_return_mean"]), abs=0.06)


def test_the_same_seed_gives_the_same_rows_whatever_is_evaluated_between(alone):
    more = run(alone.script, f"{alone.words} --eval-every 30", alone.folder, "more")
    assert more[::2] == alone.rows and len(more) == 11


def test_another_seed_gives_other_rows(alone):
    assert run(alone.script, f"{alone.words} --seed 2", alone.folder, "other")[-1] != alone.rows[-1]


def test_a_longer_run_goes_on_as_if_it_had_been_so_long_from_the_start(alone):
    if alone.script in PLANNED:
        pytest.skip("its learning rates are planned for the length of the run")
    assert run(alone.script, f"{alone.words} --total-timesteps 180", alone.folder, "longer") == alone.rows[:4]
    assert run(alone.script, alone.words, alone.folder, "longer") == alone.rows


def test_another_setting_is_refused_by_its_two_values(alone):
    run_dir = str(alone.run_dir.relative_to(alone.folder))
    for words, message in (("--seed 7", "--seed was 1 in"), ("--total-timesteps 60", "--total-timesteps was 300 in")):
        with pytest.raises(SystemExit, match=rf"^{alone.script}\.py: {message} runs/.*, now it is {words.split()[1]}"):
            run(alone.script, f"{alone.words} {words}", alone.folder, run_dir)


def test_a_killed_run_goes_on_exactly(alone):
    """kill -9 at a random moment after the first checkpoint, or row. KILLS=10 kills ten times."""
    killed, saved = 0, "progress.csv" if alone.script in BEGIN_AGAIN else "checkpoint.pt"
    checkpoint = alone.folder / "killed" / saved
    while killed < KILLS:
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = start(alone.script, f"{alone.words} --run-dir killed", alone.folder)
        while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > before):
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        _, errors = process.communicate()
        assert process.returncode in (-9, 0), errors
        killed += process.returncode == -9
        if process.returncode == 0:  # it was over already: once more
            shutil.rmtree(alone.folder / "killed")
    assert run(alone.script, alone.words, alone.folder, "killed") == alone.rows


@pytest.mark.parametrize("script", LEARNS)
def test_it_learns(script, tmp_path, demos):
    words, untrained, trained = LEARNS[script]
    words = words.replace("DEMOS", demos) + " --eval-episodes 10"
    words += " --eval-every 500" if script != "mbarl_offline" else ""
    table = run(script, words, tmp_path)
    assert untrained < trained <= float(table[-1]["eval_return_mean"])
    assert len(table) == 1 or float(table[0]["eval_return_mean"]) <= untrained


STUDY = "--sizes 100 200 --lengths 2 --updates 20 --hidden-sizes 8 8 --model-hidden-sizes 8 8 --model-batches 20"
STUDY += " --rollout-transitions 100 --eval-episodes 2"


def test_the_offline_study_repeats_and_goes_on_where_it_was_killed(tmp_path):
    """Each row is a policy of its own."""
    shutil.copy(ROOT / "mbarl_offline.py", tmp_path)
    shutil.copytree(ROOT / "envs", tmp_path / "envs")
    whole = run("mbarl_offline", STUDY, tmp_path)
    assert [(row["size"], row["start"]) for row in whole] == list(product(("100", "200"), ("narrow", "demo")))
    process, table = start("mbarl_offline", f"{STUDY} --run-dir killed", tmp_path), tmp_path / "killed" / "progress.csv"
    while process.poll() is None and not table.exists():
        time.sleep(0.002)
    process.kill()
    assert process.communicate()[1] == "" and len(rows(table.parent)) < 4
    assert run("mbarl_offline", STUDY, tmp_path, "killed") == whole
    other = run("mbarl_offline", f"{STUDY} --seed 2", tmp_path, "other")
    assert [row["eval_return_mean"] for row in other] != [row["eval_return_mean"] for row in whole]
    with pytest.raises(SystemExit, match="--updates was 20 in killed, now it is 30"):
        run("mbarl_offline", f"{STUDY} --updates 30", tmp_path, "killed")
