"""Tables and pictures of README and docs, from the committed progress.csv files.

    pip install -r benchmark/requirements.txt && python benchmark/plot.py

Reads benchmark/results/<script>/<variant>/<env-id>/seed<k>.csv and benchmark/published/<script>.csv, rewrites
docs/<script>.png, docs/ranking.png and what stands between `<!-- results <script> -->`
(or `<!-- comparison <script> -->`, or `<!-- offline <script> -->` and `<!-- effects <script> -->` for offline studies,
whose picture is docs/<script>_offline.png)
and `<!-- end -->` in README.md and docs/. Results of bco_baseline.py stand with those
of sac_eo.py, whose experiments have a picture of their own, docs/sac_eo_experiments.png.
Curves are interquartile means over seeds with 95% stratified bootstrap intervals (rliable, arXiv 2108.13264); with
fewer than four seeds the interquartile mean is the plain mean. Normalised scores and success rates: means, and the least and
greatest seed.
"""

import csv
import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import trim_mean

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmark.launch import filed_as

ROOT = Path(__file__).parents[1]
TOGETHER = {"sac_eo": ("sac_eo", "bco_baseline")}  # scripts of one page
SHARES = {"sac_eo": (0.5, 0.8, 0.9)}  # when each was first reached; others: 90%
EXPERIMENTS = {
    "sac_eo": {
        "the weight": ("sac-eo", "eps-0.1", "eps-0.01", "eps-0.001", "sac"),
        "beta": ("beta-1", "sac-eo", "beta-100", "raw-beta-10", "raw-beta-50", "raw-beta-100", "raw-beta-200"),
        "one model or two, weight 0.1": ("eps-0.1", "one-model"),
        "disturbed expert states": ("sac-eo", "noise-0.1", "noise-1", "noise-1-all", "shuffled", "sac"),
        "models or the truth": ("sac-eo", "true-actions", "sac"),
        "standardised observations": ("sac-eo", "normalise-obs", "sac", "sac-normalise-obs", "bco-forward", "bco-normalise-obs"),
        "on a GPU": ("sac-eo", "gpu", "sac"),
    }
}
DRAWN = {  # the others stand in tables
    "sra_offline": {"sra", "uds", "romi", "bc", "dwbc", "otil", "demodice"},
    "mbarl": {"mbarl", "medal", "fbrl", "naive", "oracle"},
}
BESIDE = {"sac_eo": (("hyper", "default", "hyper"), ("hype", "hype", "hype"), ("hype", "bc", "bc"))}  # other scripts' methods
SEES = {
    "sac": "reward",
    "sac-eo": "reward, expert's states",
    "bco-forward": "expert's states",
    "bco-inverse": "expert's states",
    "hyper": "expert's states and actions",
    "hype": "expert's states and actions",
    "bc": "expert's states and actions",
}
HOLDS = ("Tabletop-v0",)  # environments with something to grasp


def read(path: Path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


def header(path: Path) -> list[str]:
    with open(path) as file:
        return next(csv.reader(file))


def runs(script: str, studies: bool = False) -> dict[tuple[str, str], list[Path]]:
    """Result files of a script by (environment, variant): of training runs, or of offline studies, which have no steps."""
    found: dict[tuple[str, str], list[Path]] = {}
    for name in TOGETHER.get(script, (script,)):
        for path in sorted((ROOT / "benchmark" / "results" / name).glob("*/*/seed*.csv")):
            if studies == ("env_steps" in header(path)):
                continue
            variant = path.parent.parent.name
            if script in TOGETHER:
                variant = f"bco-{variant}" if name == "bco_baseline" else variant.replace("default", "sac-eo")
            found.setdefault((path.parent.name, variant), []).append(path)
    return dict(sorted(found.items()))


def experiments(script: str) -> set[str]:
    """Variants that belong to an experiment alone: they have a picture of their own."""
    return {variant for variants in EXPERIMENTS.get(script, {}).values() for variant in variants} - set(SEES)


def curve(paths: list[Path], column: str = "eval_return_mean") -> tuple[np.ndarray, np.ndarray, float, float]:
    """Env steps [t] that all seeds share (without any: updates), values of the column [seeds, t] (by default returns), the
    demonstrations' mean return (not a number without any), minutes until then."""
    tables = [read(path) for path in paths]
    count = "env_steps" if int(tables[0][-1]["env_steps"]) else "updates"
    shared = sorted(set.intersection(*({int(row[count]) for row in table} for table in tables)))
    assert len(shared) > 1, f"{paths[0].parent}: seeds were not evaluated at the same steps"
    tables = [{int(row[count]): row for row in table} for table in tables]
    returns = [[float(table[t].get(column) or "nan") for t in shared] for table in tables]
    minutes = np.mean([float(table[shared[-1]]["wall_time_s"]) for table in tables]) / 60
    experts = [float(table[shared[-1]]["expert_return"] or "nan") for table in tables]
    if not np.isfinite(experts).any():  # SAC knows none: that of the methods it stands beside
        beside = sorted(paths[0].parents[2].glob(f"*/{paths[0].parent.name}/seed*.csv"))
        experts = [float(read(path)[-1].get("expert_return") or "nan") for path in beside]
    expert = next((expert for expert in experts if np.isfinite(expert)), np.nan)
    return np.array(shared), np.array(returns), expert, float(minutes)


def last_step(path: Path) -> int:
    return int(read(path)[-1]["env_steps"])


def stretches(paths: list[Path]) -> list[list[Path]]:
    """The seeds, which are compared as far as all of them went; then, if some went further, those alone."""
    furthest = max(map(last_step, paths))
    further = [path for path in paths if last_step(path) == furthest]
    return [paths, further] if len(further) < len(paths) else [paths]


def clones(paths: list[Path]) -> bool:
    """Whether these runs took no steps in an environment."""
    return not int(read(paths[0])[-1]["env_steps"])


def iqm(returns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Interquartile mean [t] over seeds of returns [seeds, t], and its 95% bootstrap interval [2, t]."""
    from rliable import library

    np.random.seed(0)
    point, interval = library.get_interval_estimates(
        {"": returns[:, None, :]},
        lambda x: trim_mean(x[:, 0], 0.25),  # rliable's aggregate_iqm, of all times at once
        reps=2_000,
    )
    return point[""], interval[""]


def published(script: str) -> dict[str, list[dict[str, str]]]:
    """Rows of the published curves by environment (robots: unversioned) or data set; with a column `variant` where there are several."""
    path, found = ROOT / "benchmark" / "published" / f"{script}.csv", {}
    for row in read(path) if path.exists() else []:
        found.setdefault(row["env"], []).append(row)
    return found


def measures(script: str, column: str) -> bool:
    """Whether this script's results have such a column."""
    return any(column in header(paths[0]) for paths in runs(script).values())


def score_table(script: str) -> str:
    """Markdown rows of an offline script: scores at the end, and over the last third of the evaluations, since they swing."""
    head = ["data", "method", "seeds", "updates", "score: last evaluation, each seed", "last third of the evaluations, each seed",
            "mean of seeds", "published", "dense: mean of seeds", "published", "minutes a run"]  # fmt: skip
    theirs = {
        (row["env"], row["variant"], row["reward"]): f"{row['score']}±{row['spread']}"
        for rows in published(script).values()
        for row in rows
    }
    lines = [head, ["---"] * len(head)]
    for (data, variant), paths in runs(script).items():
        steps, scores, _, minutes = curve(paths, "eval_normalized_score")
        third = scores[:, -max(1, len(steps) // 3) :].mean(1)
        row = [data, variant, f"{len(paths)}", f"{steps[-1]:,}", *(", ".join(f"{x:.0f}" for x in some) for some in (scores[:, -1], third))]
        row += [f"{third.mean():.0f}", theirs.get((data, variant, "sparse" if data.startswith("maze2d") else "true"), "-")]
        dense = "-"
        if "eval_normalized_score_dense" in read(paths[0])[0]:
            dense = f"{curve(paths, 'eval_normalized_score_dense')[1][:, -max(1, len(steps) // 3) :].mean():.0f}"
        lines.append([*row, dense, theirs.get((data, variant, "dense"), "-"), f"{minutes:.0f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def score_picture(
    script: str,
    column: str = "eval_normalized_score",
    steps_of: str = "gradient steps",
    ylabel: str = "normalised score (dots: published)",
    full: float = 100,
) -> None:
    """Scores by steps, one panel for each environment or data set; published ones are dots at the right edge, or at their steps."""
    results, theirs = {key: paths for key, paths in runs(script).items() if key[1] in DRAWN.get(script, {key[1]})}, published(script)
    if not results:
        return
    envs, variants = (list(dict.fromkeys(key[i] for key in results)) for i in (0, 1))
    names = dict.fromkeys([*variants, *(row["variant"] for rows in theirs.values() for row in rows)])
    colors = {variant: plt.get_cmap("tab20" if len(names) > 10 else "tab10")(i % 20) for i, variant in enumerate(names)}
    figure, axes = plt.subplots(1, len(envs), figsize=(4.5 * len(envs), 3.6), squeeze=False, layout="constrained")
    for ax, env_id in zip(axes[0], envs, strict=True):
        for variant in (variant for variant in variants if (env_id, variant) in results):
            steps, scores, *_ = curve(results[env_id, variant], column)
            ax.plot(steps / 1_000, scores.mean(0), color=colors[variant], label=f"{variant}, {len(scores)} seed{'s' * (len(scores) > 1)}")
            ax.fill_between(steps / 1_000, scores.min(0), scores.max(0), alpha=0.15, color=colors[variant], lw=0)
            for row in theirs.get(env_id, []):
                if row["variant"] == variant and row.get("reward", "dense") != "dense":
                    ax.plot(1.03 * steps[-1] / 1_000, float(row["score"]), "o", color=colors[variant], ms=5, clip_on=False)
        seen = [row for row in theirs.get(env_id, []) if "k_steps" in row and float(row["k_steps"]) <= ax.get_xlim()[1]]
        for variant in dict.fromkeys(row["variant"] for row in seen):
            at = [(float(row["k_steps"]), float(row["success"])) for row in seen if row["variant"] == variant]
            ax.plot(*zip(*at, strict=True), "o--", color=colors[variant], lw=0.8, ms=4, label=f"{variant}, published")
        ax.set(title=env_id, xlabel=f"thousand {steps_of}", ylabel=ylabel)
        ax.axhline(full, color="grey", lw=0.8)
        ax.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    figure.savefig(ROOT / "docs" / f"{script}.png", dpi=130)
    plt.close(figure)


def success_table(script: str) -> str:
    """Markdown rows of the deployed policy's success, one for each environment and method, and of what the life without resets gave."""
    levels, quarters = (0.5, 0.9), (0.25, 0.5, 0.75, 1)
    head = ["environment", "method", "seeds", "env steps", "success: last ten evaluations, each seed", "all evaluations, each seed",
            "mean of seeds after a quarter, half, three quarters and all of these steps",
            *(f"mean of seeds first at {level}" for level in levels), "at 0.9 or above from", "success at the end of an episode: last ten",
            "final distance", "grasp rate", "reward a step", "interventions",
            "minutes a run"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for (env_id, variant), paths in ((key, some) for key, seeds in runs(script).items() for some in stretches(seeds)):
        steps, success, _, minutes = curve(paths, "eval_success_rate")
        mean = success.mean(0)
        row = [env_id, variant, f"{len(paths)}", f"{steps[-1]:,}"]
        row += [", ".join(f"{x:.2f}" for x in some.mean(1)) for some in (success[:, -10:], success)]
        row.append(", ".join(f"{mean[np.abs(steps - quarter * steps[-1]).argmin()]:.2f}" for quarter in quarters))
        reached = [steps[mean > level - 1e-6] for level in levels]  # files have a share of 0.9 as 0.8999999761581421
        row += [f"{some[0]:,}" if len(some) else "-" for some in reached]
        below = np.flatnonzero(mean <= levels[-1] - 1e-6)
        lasting = steps[below[-1] + 1 if len(below) else 0 :]
        row += [f"{lasting[0]:,}" if len(lasting) else "-", f"{curve(paths, 'eval_success_at_end')[1][:, -10:].mean():.2f}"]
        last = {name: curve(paths, name)[1][:, -1].mean() for name in ("eval_final_distance", "eval_grasp_rate",
                "charts/reward_per_step", "charts/interventions")}  # fmt: skip
        row += [f"{last['eval_final_distance']:.2f}", f"{last['eval_grasp_rate']:.2f}" if env_id in HOLDS else "-"]
        row += [f"{last['charts/reward_per_step']:.4f}", f"{last['charts/interventions']:.0f}", f"{minutes:.0f}"]
        lines.append(row)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def study(paths: list[Path]) -> dict[tuple[str, int, int], list[dict[str, str]]]:
    """The seeds' rows of an offline study by (start, size, rollout length)."""
    found: dict[tuple[str, int, int], list[dict[str, str]]] = {}
    for row in (row for path in paths for row in read(path)):
        found.setdefault((row["start"], int(row["size"]), int(row["rollout_length"])), []).append(row)
    return found


def rows_of(cells: dict[tuple[str, int, int], list]) -> tuple[list[str], list[int]]:
    """The starts, as they come, and the sizes of offline studies."""
    return list(dict.fromkeys(start for start, _, _ in cells)), sorted({size for _, size, _ in cells})


def study_table(script: str) -> str:
    """Markdown rows of offline studies, one for each size of the data, with the return (and success rate) at each length of the imagined
    rollouts; then the model's open-loop error after as many steps, which the starts share. Means of seeds."""
    found = {key: study(paths) for key, paths in runs(script, studies=True).items()}
    lengths = sorted({length for cells in found.values() for *_, length in cells})
    head = ["environment", "variant", "start", "size", "seeds", *(f"{n} steps" for n in lengths)]
    lines = [head, ["---"] * len(head)]
    for (env_id, variant), cells in found.items():
        starts, sizes = rows_of(cells)
        for start, size in ((start, size) for start in starts for size in sizes):
            row, seeds = [], set()
            for rows in (cells.get((start, size, n), []) for n in lengths):
                value, rate = (np.mean([float(r[f"eval_{name}"]) for r in rows] or [np.nan]) for name in ("return_mean", "success_rate"))
                row.append(f"{value:.1f} ({rate:.2f})" if rows else "-")
                seeds |= {r["seed"] for r in rows}
            lines.append([env_id, variant, start, f"{size:,}", f"{len(seeds)}", *row])
        for size in sizes:
            models = {r["seed"]: r for (_, of, _), rows in cells.items() if of == size for r in rows}.values()
            errors = [[float(r[f"error_{n}_steps"]) for r in models if f"error_{n}_steps" in r] for n in lengths]
            row = [f"{np.mean(some):.3f}" if some else "-" for some in errors]
            lines.append([env_id, variant, "the model's error", f"{size:,}", f"{len(models)}", *row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def study_effects(script: str) -> str:
    """Markdown rows of offline studies: by how much the return differs between two values of one factor, over the pairs of policies that
    share everything else, the seed too."""
    head = ["environment", "variant", "instead of", "", "starts", "difference in return: mean", "least", "greatest", "pairs where greater"]
    lines = [head, ["---"] * len(head)]
    for (env_id, variant), paths in runs(script, studies=True).items():
        returns = {
            (row["start"], int(row["size"]), int(row["rollout_length"]), row["seed"]): float(row["eval_return_mean"])
            for path in paths
            for row in read(path)
        }
        starts, sizes, lengths = (list(dict.fromkeys(key[i] for key in returns)) for i in range(3))
        factors = [(2, min(lengths), max(lengths), "{:,} steps", start) for start in starts]
        factors += [(1, min(sizes), max(sizes), "{:,} transitions", start) for start in starts]
        factors += [(0, *starts[:2], "{} starts", None)] if len(starts) > 1 else []
        for at, low, high, name, start in factors:
            pairs = [(key, (*key[:at], high, *key[at + 1 :])) for key in returns if key[at] == low and start in (key[0], None)]
            change = [returns[other] - returns[key] for key, other in pairs if other in returns]
            if change and low != high:
                numbers = [f"{number:.2f}" for number in (np.mean(change), min(change), max(change))]
                won = f"{sum(number > 0 for number in change)} of {len(change)}"
                lines.append([env_id, variant, name.format(low), name.format(high), start or "-", *numbers, won])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def study_picture(script: str) -> None:
    """Returns by length of the imagined rollouts, a line for each size of the data; a panel for each environment and start."""
    found = {key: study(paths) for key, paths in runs(script, studies=True).items()}
    starts, sizes = rows_of({cell: rows for cells in found.values() for cell, rows in cells.items()})
    shape = len(found), len(starts)
    figure, axes = plt.subplots(
        *shape, figsize=(3.9 * shape[1], 3.3 * shape[0]), squeeze=False, sharex="row", sharey="row", layout="constrained"
    )
    for line, ((env_id, variant), cells) in zip(axes, found.items(), strict=True):
        for ax, start in zip(line, starts, strict=True):
            for color, size in enumerate(sizes):
                lengths = sorted(n for of, some, n in cells if (of, some) == (start, size))
                returns = [[float(row["eval_return_mean"]) for row in cells[start, size, n]] for n in lengths]
                if lengths:
                    seeds = max(map(len, returns))
                    label = f"{size:,} transitions, {seeds} seed{'s' * (seeds > 1)}"
                    ax.plot(lengths, [np.mean(some) for some in returns], "o-", color=f"C{color}", ms=4, label=label)
                    ax.fill_between(lengths, [*map(min, returns)], [*map(max, returns)], alpha=0.15, color=f"C{color}", lw=0)
            ax.set(title=f"{env_id}, {variant}: {start} starts", xlabel="steps of an imagined rollout", ylabel="return")
            ax.title.set_fontsize(8)
            if ax.lines:
                ax.legend(fontsize=6)
            else:
                ax.set_axis_off()
    figure.savefig(ROOT / "docs" / f"{script}_offline.png", dpi=130)
    plt.close(figure)


def table(script: str) -> str:
    """Markdown rows, one for each environment and variant; without demonstrations, without the columns about them."""
    found = [(*key, some, curve(some)) for key, paths in runs(script).items() for some in stretches(paths)]
    imitates = any(np.isfinite(expert) for *_, (*_, expert, _) in found)
    head = ["environment", "variant", "seeds", "env steps", "last ten evaluations (cloning: the last), each seed", "minutes a run"]
    if imitates:
        head += ["expert", "of the expert", "mean of seeds first at 90%"]
        head += ["paper, as many counted steps", "paper, as many real steps by their upper bound"] if published(script) else []
    lines = [head, ["---"] * len(head)]
    for env_id, variant, paths, (steps, returns, expert, minutes) in found:
        cloning = clones(paths)
        last = returns[:, -1 if cloning else -10 :].mean(1)
        row = [env_id, variant, f"{len(returns)}", f"0, {steps[-1]:,} updates" if cloning else f"{steps[-1]:,}"]
        row += [", ".join(f"{x:.0f}" for x in last), f"{minutes:.0f}"]
        if imitates:
            reached = steps[trim_mean(returns, 0.25) >= 0.9 * expert]
            theirs = []
            for column in ("counted_k_steps", "real_k_steps"):  # interpolated between their evaluations, relative to their expert
                rows = [r for r in published(script).get(env_id.rpartition("-")[0], []) if r.get("variant", variant) == variant]
                if column == "real_k_steps" and "filter" in variant:
                    rows = []  # nobody knows how many steps its resets replayed
                at, share = [float(r[column]) for r in rows], [float(r["return"]) / float(r["expert"]) for r in rows]
                there = rows and at[0] <= steps[-1] / 1_000 <= at[-1]
                theirs.append(f"{np.interp(steps[-1] / 1_000, at, share):.0%}" if there else "-")
            first = "-" if cloning else f"{reached[0]:,}" if len(reached) else f"not in {steps[-1]:,}"
            known = [f"{expert:.0f}", f"{100 * last.mean() / expert:.0f}%", first] if np.isfinite(expert) else ["-"] * 3
            row += [*known, *(theirs if published(script) else [])]
        lines.append(row)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def comparison(script: str) -> str:
    """Markdown rows that compare methods after the same number of steps: the fewest that any of an environment's methods was run for.

    Methods of the page's other scripts, which may have stopped earlier, do not shorten the others' stretch and tell their own.
    """
    left_out = experiments(script)
    found = {
        key: curve(paths)
        for key, paths in runs(script).items()
        if not clones(paths) and not key[1].endswith(("demo", "demos")) and key[1] not in left_out
    }
    sees, shares = script in BESIDE, SHARES.get(script, (0.9,))
    head = [
        "environment",
        "env steps",
        "method",
        *["sees"] * sees,
        "seeds",
        "of the expert: mean over these steps",
        "its last ten evaluations",
        "its last one",
    ]
    lines = [[*head, *(f"first at {share:.0%}, each seed" for share in shares)]]
    lines.append(["---"] * len(lines[0]))
    for env_id in dict.fromkeys(env_id for env_id, _ in found):
        methods = {variant: value for (env, variant), value in found.items() if env == env_id}
        own = [steps[-1] for variant, (steps, *_) in methods.items() if not variant.startswith("bco-")]
        end, rows = min(own, default=0), []
        for other, variant, name in BESIDE.get(script, ()):
            if (env_id, variant) in runs(other):
                methods[name] = curve(runs(other)[env_id, variant])
        if not own or len(methods) < 2 or not all(np.isfinite(expert) for *_, expert, _ in methods.values()):
            continue
        for variant, (steps, returns, expert, _) in methods.items():
            cloning = variant == "bc"
            share = returns[:, steps <= (steps[-1] if cloning else end)] / expert
            if cloning:
                row = ["-", "-", f"{share[:, -1].mean():.0%}", *["-"] * len(shares)]
            else:
                first = [", ".join(f"{steps[seed.argmax()]:,}" if seed.any() else "-" for seed in share >= level) for level in shares]
                row = [f"{share.mean():.0%}", f"{share[:, -10:].mean():.0%}", f"{share[:, -1].mean():.0%}", *first]
            taken = "none" if cloning else f"{min(end, steps[-1]):,}"
            row = [env_id, taken, variant, *[SEES.get(variant, "-")] * sees, f"{len(share)}", *row]
            rows.append((share[:, -1].mean() if cloning else share.mean(), row))
        lines += [row for _, row in sorted(rows, key=lambda row: -row[0])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture(script: str) -> None:
    """One panel for each environment of our results or of curves published by variant; published ones relative to their own expert."""
    left_out, theirs = experiments(script), published(script)
    results = {key: paths for key, paths in runs(script).items() if key[1] not in left_out}
    envs = list(dict.fromkeys(env_id for (env_id, _), paths in results.items() if not clones(paths)))
    envs += [f"{robot}-v4" for robot, rows in theirs.items() if "variant" in rows[0] and f"{robot}-v4" not in envs]
    variants = dict.fromkeys(variant for _, variant in results if not variant.endswith(("demo", "demos")))  # those have a table
    colors = dict(zip(variants, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    figure, axes = plt.subplots(1, len(envs), figsize=(4.5 * len(envs), 4.0), squeeze=False, layout="constrained")
    for ax, env_id in zip(axes[0], envs, strict=True):
        rows, scale = theirs.get(env_id.rpartition("-")[0], []), 1.0
        for variant in (variant for variant in variants if (env_id, variant) in results):
            steps, returns, expert, _ = curve(results[env_id, variant])
            scale = expert if np.isfinite(expert) else 1.0
            if clones(results[env_id, variant]):
                ax.axhline(returns[:, -1].mean() / scale, color="k", ls="-.", lw=0.8, label=f"cloning alone ({variant})")
                continue
            point, interval = iqm(returns)
            for some in stretches(results[env_id, variant])[1:]:
                beyond, alone, *_ = curve(some)
                label = f"{variant}, the {len(alone)} that went on" if len(alone) > 1 else f"{variant}, the one that went on"
                ax.plot(beyond / 1_000, alone.mean(0) / scale, color=colors[variant], lw=0.6, label=label)
            label = f"{variant}, {len(returns)} seed{'s' * (len(returns) > 1)}, all steps counted"
            ax.plot(steps / 1_000, point / scale, color=colors[variant], label=label)
            ax.fill_between(steps / 1_000, *(interval / scale), alpha=0.2, color=colors[variant], lw=0)
        for variant in dict.fromkeys(row.get("variant") for row in rows):
            one = [row for row in rows if row.get("variant") == variant]
            share = [float(row["return"]) / float(row["expert"]) for row in one]
            counted, real = ([float(row[column]) for row in one] for column in ("counted_k_steps", "real_k_steps"))
            if variant:
                label = f"{variant}, published, steps as counted there"
                ax.plot(counted, share, "--", lw=0.8, color=colors.get(variant, "grey"), label=label)
            else:
                ax.set_xlim(0, max(ax.get_xlim()[1], 1.5 * real[0], 1.5 * counted[min(4, len(one) - 1)]))
                ax.plot(counted, share, "k--", lw=1, label="published, steps as counted there")
                ax.plot(real, share, "k:", lw=1, label="published, upper bound of all steps")
        if rows:
            cloned = float(rows[0]["bc"]) / float(rows[0]["expert"])
            ax.axhline(cloned, color="grey", lw=0.8, ls="-.", label="published behaviour cloning")
        ax.set(title=env_id, xlabel="thousand env steps", ylabel="return")
        if rows and "variant" in rows[0]:
            ax.set(xscale="log", xlim=(4, None))
        if rows or scale != 1:
            ax.axhline(1, color="grey", lw=0.8)
            ax.set(ylabel="return / expert's", ylim=(-0.1, 1.15))
        ax.legend(fontsize=5, loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=2)
    figure.savefig(ROOT / "docs" / f"{script}.png", dpi=130)
    plt.close(figure)


def experiment_picture(script: str) -> None:
    """For each environment and experiment two panels, returns above and the imitation's weight below. Then, for each
    environment, how far the dynamics models can be relied on: their error above, its rank correlation with their disagreement below.
    At most four such pairs to a line."""
    results = runs(script)
    envs = list(dict.fromkeys(env_id for env_id, variant in results if variant == "sac-eo"))
    shown = {}
    for of in dict.fromkeys(env_id for env_id, _ in results):
        for title, variants in EXPERIMENTS[script].items():
            there = [variant for variant in variants if (of, variant) in results]
            if len(there) > 1 and set(there) & experiments(script):
                shown[of, title] = there
    if not shown:
        return
    across = min(4, len(shown) + len(envs))
    down = -(-(len(shown) + len(envs)) // across)
    figure, axes = plt.subplots(2 * down, across, figsize=(3.9 * across, 6.0 * down), squeeze=False, layout="constrained")
    pairs = axes.reshape(down, 2, across).transpose(0, 2, 1).reshape(-1, 2)
    for ax in pairs[len(shown) + len(envs) :].flat:
        ax.set_axis_off()
    for (above, below), ((of, title), variants) in zip(pairs, shown.items(), strict=False):
        expert = curve(results[of, variants[0]])[2]
        for variant in variants:
            paths = results[of, variant]
            steps, returns, *_ = curve(paths)
            label = f"{variant}, {len(paths)} seed{'s' * (len(paths) > 1)}"
            (line,) = above.plot(steps / 1_000, returns.mean(0) / expert, label=label)
            above.fill_between(steps / 1_000, returns.min(0) / expert, returns.max(0) / expert, alpha=0.15, color=line.get_color(), lw=0)
            weights = curve(paths, "losses/imitation_weight")[1]
            seen = np.isfinite(weights).all(0) & (weights > 1e-6).all(0)
            below.plot(steps[seen] / 1_000, weights[:, seen].mean(0), color=line.get_color())
        above.axhline(1, color="grey", lw=0.8)
        above.set(ylabel="return / expert's")
        above.set_title(f"{of}: {title}", fontsize=8)
        above.legend(fontsize=6)
        below.set(xlabel="thousand env steps", ylabel="imitation's weight", yscale="log")
    for (above, below), env_id in zip(pairs[len(shown) :], envs, strict=False):
        for where in ("expert", "agent", "random"):
            for ax, column in ((above, f"model/error_{where}"), (below, f"model/rank_correlation_{where}")):
                steps, values, *_ = curve(results[env_id, "sac-eo"], column)
                seen = np.isfinite(values).all(0)
                ax.plot(steps[seen] / 1_000, values[:, seen].mean(0), label=f"on {where} transitions")
        above.set(ylabel="squared error / squared change", yscale="log")
        above.set_title(f"{env_id}: the models", fontsize=8)
        above.legend(fontsize=6)
        below.set(xlabel="thousand env steps", ylabel="rank correlation of disagreement and error", ylim=(-0.2, 1))
    figure.savefig(ROOT / "docs" / f"{script}_experiments.png", dpi=130)
    plt.close(figure)


def ranking() -> None:
    """HyPER beside HyPE, MM and GAIL, ours and the published ones: by all real steps, and by the steps that the official curves count."""
    lines = [("hyper", "default", "HyPER"), ("hype", "hype", "HyPE"), ("hype", "mm", "MM"), ("hype", "gail", "off-policy GAIL")]
    ours = {name: {env_id: paths for (env_id, v), paths in runs(script).items() if v == variant} for script, variant, name in lines}
    envs = sorted(set(ours["HyPER"]) & set(ours["HyPE"]))
    if not envs:
        return
    figure, axes = plt.subplots(2, len(envs), figsize=(4.5 * len(envs), 6.4), squeeze=False, sharey=True, layout="constrained")
    counts = ("real_k_steps", "real steps (published: their upper bound)"), ("counted_k_steps", "steps as the official code counts")
    for (ax, (column, label)), (i, env_id) in ((pair, e) for e in enumerate(envs) for pair in zip(axes[:, e[0]], counts, strict=True)):
        for (script, variant, name), color in zip(lines, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False):
            if env_id in ours[name]:
                steps, returns, expert, _ = curve(ours[name][env_id])
                if column == "counted_k_steps":  # without the cost's rollouts (which our defaults do not take) and HyPER's first 1,000
                    rows = {int(row["env_steps"]): row for row in read(ours[name][env_id][0])}
                    about = json.loads(ours[name][env_id][0].with_suffix(".json").read_text())["args"]
                    uncounted = about["initial_steps"] if script == "hyper" else 0
                    steps = np.array([float(rows[t]["charts/train_steps"] or 0) - uncounted for t in steps])
                point, interval = iqm(returns)
                ax.plot(steps / 1_000, point / expert, color=color, label=f"{name}, {len(returns)} seed{'s' * (len(returns) > 1)}")
                ax.fill_between(steps / 1_000, *(interval / expert), alpha=0.2, color=color, lw=0)
            theirs = published(script).get(env_id.rpartition("-")[0], [])
            theirs = [row for row in theirs if row.get("variant", variant) == variant]
            if theirs:
                share = [float(row["return"]) / float(row["expert"]) for row in theirs]
                ax.plot([float(row[column]) for row in theirs], share, "--", lw=1, color=color, label=f"{name}, published")
        ax.axhline(1, color="grey", lw=0.8)
        ax.axhline(0.9, color="grey", lw=0.8, ls=":")
        ax.set(title=env_id, xlabel=f"thousand {label}", xscale="log", xlim=(1, None), ylim=(-0.1, 1.15))
        ax.set_ylabel("return / expert's" if i == 0 else None)
        ax.legend(fontsize=6, loc="best")
    figure.savefig(ROOT / "docs" / "ranking.png", dpi=130)
    plt.close(figure)


def main() -> None:
    ranking()
    elsewhere = {name for script, names in TOGETHER.items() for name in names if name != script}
    names = {path.name for path in (ROOT / "benchmark" / "results").iterdir()} | set(TOGETHER)
    for script in sorted(name for name in names - elsewhere if runs(name) or runs(name, studies=True)):
        pieces, studies = [], runs(script, studies=True)
        for path in (path for found in (runs(script), studies) for paths in found.values() for path in paths):
            about = json.loads(path.with_suffix(".json").read_text())["args"]
            assert filed_as(about)[1] == path.parent.name, f"{path}: its settings are of {filed_as(about)[1]}"
        if measures(script, "eval_normalized_score"):
            score_picture(script)
            pieces = [("results", score_table(script))]
        elif measures(script, "charts/interventions"):
            score_picture(script, "eval_success_rate", "env steps", "success rate (dashed: published)", full=1)
            pieces = [("results", success_table(script))]
        elif runs(script):
            picture(script)
            if script in EXPERIMENTS:
                experiment_picture(script)
            pieces = [("results", table(script)), ("comparison", comparison(script))]
        if studies:
            study_picture(script)
            pieces += [("offline", study_table(script)), ("effects", study_effects(script))]
        for kind, lines in pieces:
            for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
                mark = re.compile(rf"(<!-- {kind} {script} -->\n).*?(<!-- end -->)", re.S)
                page.write_text(mark.sub(rf"\g<1>{lines}\n\2", page.read_text()))
            print(f"{kind} {script}\n{lines}")


if __name__ == "__main__":
    main()
