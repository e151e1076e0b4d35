"""Runs seeds side by side, one thread each, and files their curves under benchmark/results.

    python benchmark/launch.py hyper.py --seeds 1 2 3 --variant default -- --env-id Hopper-v4

What stands after `--` goes to the script. The same command again continues runs that were interrupted; a larger
--total-timesteps lengthens them. A run that has reached its end is copied to
benchmark/results/<script>/<variant>/<env-id>/seed<k>.csv, its args.json to seed<k>.json. A longer curve that is there
already is kept, unless --replace is given.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]


def length(path: Path) -> int:
    """Env steps of a curve, or updates where it has none, or rows of an offline study; 0 if there is no such file."""
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    return int(rows[-1].get("env_steps") or 0) or int(rows[-1].get("updates") or 0) or len(rows) if rows else 0


def file_result(run_dir: Path, seed: int, variant: str, results: Path, replace: bool) -> str:
    """Copies a finished run; returns a line about it."""
    about = json.loads((run_dir / "args.json").read_text())
    env_id = about["args"]["env_id"].replace("/", "-").replace(":", "-")
    target = results / about["script"] / variant / env_id / f"seed{seed}.csv"
    if length(target) > length(run_dir / "progress.csv") and not replace:
        return f"{target} is longer ({length(target):,} steps) and stays; --replace files {run_dir} instead"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(run_dir / "progress.csv", target)
    shutil.copy(run_dir / "args.json", target.with_suffix(".json"))
    return str(target)


def main() -> int:
    """Runs all seeds; returns the number of those that failed."""
    argv = sys.argv[1:]
    at = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="file name of the script, such as hyper.py")
    parser.add_argument("--variant", required=True, help="name of the settings: folder of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--parallel", type=int, default=2, help="runs at the same time")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go, from the repository")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmark" / "results")
    parser.add_argument("--replace", action="store_true", help="also replace longer curves")
    options, flags = parser.parse_args(argv[:at]), argv[at + 1 :]
    env_id = next((value for flag, value in pairwise(flags) if flag == "--env-id"), "default")
    name = f"{Path(options.script).stem}-{options.variant}-{env_id.replace('/', '-').replace(':', '-')}"

    def launch(seed: int) -> int:
        words = [*flags, "--seed", str(seed), "--run-dir", str(options.runs / f"{name}-seed{seed}")]
        run_dir = ROOT / words[-1]
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | dict(OMP_NUM_THREADS="1")
        with open(f"{run_dir}.log", "a") as log:
            command = [sys.executable, options.script, *words]
            code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=environment).returncode
        report = f"exit code {code}, see {run_dir}.log"
        if code == 0:
            report = file_result(run_dir, seed, options.variant, options.results, options.replace)
        print(f"seed {seed}: {report}", flush=True)
        return int(code != 0)

    with ThreadPoolExecutor(options.parallel) as pool:
        return sum(pool.map(launch, options.seeds))


if __name__ == "__main__":
    sys.exit(main())
