"""Runs seeds side by side, one core each, and files their progress.csv (mbarl.py --offline: offline.csv) under benchmark/results.

    python benchmark/launch.py hyper.py --seeds 1 2 3 --parallel 2 -- --env-id Hopper-v4 --compile --bf16

What stands after `--` goes to the script. A run that was interrupted goes on from its checkpoint when the same command is given
again, an offline study after its last finished policy. `--variant` names the folder of the results where settings differ from the
preset's (otherwise "offline", or `--algo`, with a `--learner` that is not the usual one, or bco_baseline.py's own `--variant`, or the
preset).
"""

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
NO_CHANGE = {"seed", "run_dir", "compile", "bf16", "checkpoint_every", "num_threads", "device", "track", "exp_name",
             "total_timesteps", "data_dir", "offline"}  # fmt: skip


def filed_as(args: dict) -> tuple[str, str]:
    """Names of the method and of the environment or data set under which the results of these settings stand, if no --variant is given."""
    variant = "offline" if args.get("offline") else args.get("algo") or args.get("variant") or args["preset"]
    if args.get("learner", "iql") != "iql":
        variant += f"-{args['learner']}"
    if args["preset"] not in (variant, "default"):
        variant += f"-{args['preset']}"
    environment = args["env_id"] if args.get("dataset", "own") == "own" else args["dataset"]
    return variant, re.sub("[/:]", "-", environment)


def variant_of(script: str, words: list[str]) -> str:
    """The name under which results of this command line are filed; an error if it changes the preset."""
    module = importlib.import_module(Path(script).stem)
    args = asdict(module.parse_args(words))
    same = ["preset", *(name for name in ("algo", "learner", "variant") if name in args)]
    same += ["env_id"] if args.get("dataset", "own") == "own" else ["dataset"]
    preset = asdict(module.parse_args([word for name in same for word in (f"--{name.replace('_', '-')}", args[name])]))
    changed = [f"--{name.replace('_', '-')}" for name in args if args[name] != preset[name] and name not in NO_CHANGE]
    if changed:
        raise SystemExit(f"launch.py: error: {', '.join(changed)} differ from the preset: name the results' folder with --variant")
    return filed_as(args)[0]


def launch(script: str, seed: int, words: list[str], variant: str, runs: Path, results: Path) -> tuple[int, str]:
    """One seed from start to filed result; returns the exit code and a line about it."""
    run_dir = runs / re.sub(r"[^\w.-]+", "_", " ".join([Path(script).stem, *words, variant, str(seed)]))
    new = not any((run_dir / name).exists() for name in ("checkpoint.pt", "offline.csv"))  # an offline study has no checkpoint
    if new:
        shutil.rmtree(run_dir, ignore_errors=True)
    argv = [*words, "--seed", str(seed), "--run-dir", str(run_dir)] if new else ["--resume", str(run_dir)]
    runs.mkdir(parents=True, exist_ok=True)
    with open(f"{run_dir}.log", "a") as log:
        code = subprocess.run(
            [sys.executable, str(ROOT / script), *argv], stdout=log, stderr=log, env={"OMP_NUM_THREADS": "1", **os.environ}
        ).returncode
    if code:
        return code, f"seed {seed}: exit code {code}, see {run_dir}.log"
    args = json.loads((run_dir / "args.json").read_text())["args"]
    folder = results / Path(script).stem / variant / filed_as(args)[1]
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(run_dir / ("offline.csv" if args.get("offline") else "progress.csv"), folder / f"seed{seed}.csv")
    shutil.copy(run_dir / "args.json", folder / f"seed{seed}.json")
    return 0, f"seed {seed}: {folder / f'seed{seed}.csv'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="file name of the script, such as hyper.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--parallel", type=int, default=1, help="runs at the same time")
    parser.add_argument("--variant", help="folder of the results instead of the preset's name")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where run folders go")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmark" / "results", help="where results are filed")
    options, words = parser.parse_args(sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else None), []
    if "--" in sys.argv:
        words = sys.argv[sys.argv.index("--") + 1 :]
    if any(word.partition("=")[0] in ("--seed", "--run-dir", "--resume") for word in words):
        raise SystemExit("launch.py: error: --seed, --run-dir and --resume are the launcher's: take --seeds and --runs")
    args = asdict(importlib.import_module(Path(options.script).stem).parse_args(words))
    variant, failed = options.variant or variant_of(options.script, words), 0
    for seed in options.seeds:
        path = options.results / Path(options.script).stem / variant / filed_as(args)[1] / f"seed{seed}.json"
        if path.exists() and (longer := json.loads(path.read_text())["args"]["total_timesteps"]) > args["total_timesteps"]:
            raise SystemExit(f"launch.py: error: {path} is a run of {longer:,} steps: take another --results or --variant")
    with ThreadPoolExecutor(options.parallel) as pool:
        for code, line in pool.map(lambda seed: launch(options.script, seed, words, variant, options.runs, options.results), options.seeds):
            print(line, flush=True)
            failed = failed or code
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
