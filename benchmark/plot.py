"""Tables and pictures of README and docs: pip install -r benchmark/requirements.txt && python benchmark/plot.py

Reads benchmark/results/<script>/<variant>/<env-id>/seed<k>.csv and fills README.md and docs/*.md between `<!-- KIND
NAME -->` and `<!-- end -->`, see TABLES. Bands in pictures are from the least to the greatest seed, dashed are papers.
"""

import csv
import re
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmark import speed

ROOT = Path(__file__).parents[1]
# Methods side by side in a page's comparison and picture, and their names where those are not the variant's.
COMPARED = {
    "hype": "hyper/default hype/ten hype/hype hype/hype-filter hype/filter hype/bc-reg hype/gail hype/mm hype/bc",
    "one": "hyper/one hyper/one-no-imagined-rows hype/one hype/one-gail bc/one",
    "fifty": "hyper/fifty hype/fifty hype/fifty-gail bc/fifty",
    "ablations": "hyper/fifty hyper/fifty-learner-model hyper/fifty-no-expert-starts hyper/fifty-neither"
    " hyper/fifty-no-imagined-rows hyper/fifty-no-expert-rows hyper/fifty-no-cloning"
    " hype/fifty hype/fifty-10-updates hype/fifty-mm",
    "sac_eo": "sac_eo/default sac_eo/sac bco_baseline/forward hyper/default hype/hype hype/bc",
}
NAMES = {
    "hyper/default": "HyPER",
    "hype/ten": "HyPE, today's default",
    "hype/hype": "HyPE",
    "hype/hype-filter": "HyPE + FILTER",
    "hype/bc-reg": "BC-Reg",
}
NAMES |= {"hyper/": "HyPER", "hype/": "HyPE", "bc/": "BC"}  # of a protocol
NAMES |= {"sac_eo/default": "SAC-EO", "sac_eo/sac": "SAC", "bco_baseline/forward": "BCO"}
NAMES |= {f"hype/{variant}": variant.upper() for variant in ("gail", "mm", "filter", "bc")}
# Pages with one demonstrated trajectory or every twentieth row of one, and the script that they belong to.
PROTOCOLS = {"one": "hype", "fifty": "hype", "ablations": "hyper"}
# README's table.
ROBOTS = "Hopper-v4 Walker2d-v4 HalfCheetah-v4 Ant-v4 Humanoid-v4".split()
SUMMARY = {
    "ten trajectories": dict(HyPER="hyper/default", HyPE="hype/ten", BC="hype/bc"),
    "ten, 1% random actions": dict(HyPER="hyper/tremble", HyPE="hype/tremble"),
    "one trajectory": dict(HyPER="hyper/one", HyPE="hype/one", GAIL="hype/one-gail", BC="bc/one"),
    "fifty rows of one": dict(HyPER="hyper/fifty", HyPE="hype/fifty", GAIL="hype/fifty-gail", BC="bc/fifty"),
}
# Variants with a line in the picture; the others stand in the table alone. Scripts that are not named draw all.
DRAWN = dict(mbarl="mbarl medal fbrl naive oracle", sra_offline="sra uds romi forward bc", slbo_multitask="", maml="")
DRAWN |= dict(vins="rl-from-vins rl-from-random", slbo="default mb-trpo mf-trpo mse sac", bc="")
DRAWN["hyper"] = "default one fifty"
LEVELS = {"sac_eo": (0.5, 0.8, 0.9), "bco_baseline": (0.5, 0.8, 0.9), "mbarl": (0.5, 0.9, 1.0)}
MEASURES = dict(mbarl="success_rate", vins="success_rate")
MEASURES |= dict.fromkeys(("sra_offline", "offline_baselines"), "normalized_score")


class Curve(NamedTuple):
    steps: np.ndarray  # [t], those that all seeds share
    values: np.ndarray  # [seeds, t]: shares of the expert's return (returns where there is no expert), success, scores
    expert: float  # the demonstrations' mean return, not a number where there are none
    minutes: float  # a run
    offline: bool  # steps are updates: no environment was trained in


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def results(script: str, studies: bool = False) -> dict[tuple[str, str], list[Path]]:
    """Files of the seeds by (environment, variant): of training runs, or of offline studies, which count no steps."""
    found = {}
    for path in sorted((ROOT / "benchmark" / "results" / script).glob("*/*/seed*.csv")):
        if ("env_steps" in read(path)[0]) != studies:
            found.setdefault((path.parent.name, path.parent.parent.name), []).append(path)
    return dict(sorted(found.items()))


def curve(paths: list[Path]) -> Curve:
    measure = MEASURES.get(paths[0].parts[-4], "return_mean")
    tables = [read(path) for path in paths]
    offline = tables[0][-1]["env_steps"] == "0"
    by_step = [{int(row["updates" if offline else "env_steps"]): row for row in table} for table in tables]
    steps = sorted(set.intersection(*map(set, by_step)))
    values = np.array([[float(rows[step][f"eval_{measure}"]) for step in steps] for rows in by_step])
    minutes = np.mean([float(rows[steps[-1]]["wall_time_s"]) for rows in by_step]) / 60
    beside = paths[0].parents[2].glob(f"*/{paths[0].parent.name}/seed*.csv")  # SAC has no demonstrations, SAC-EO has
    experts = (float(read(path)[-1].get("expert_return") or "nan") for path in [*paths, *sorted(beside)])
    expert = next((value for value in experts if np.isfinite(value)), np.nan)
    scale = expert if measure == "return_mean" and np.isfinite(expert) else 1
    return Curve(np.array(steps), values / scale, expert, float(minutes), offline)


def stretches(paths: list[Path]) -> list[list[Path]]:
    """For each length at which a seed ended, the seeds that went so far: at first all, at last the longest."""
    lengths = {path: curve([path]).steps[-1] for path in paths}
    return [[path for path in paths if lengths[path] >= length] for length in sorted(set(lengths.values()))]


def methods(page: str) -> dict[str, dict[str, list[Path]]]:
    """For each environment of a page's script: name -> files, of the methods of COMPARED or of the variants drawn."""
    own, found = results(PROTOCOLS.get(page, page)), {}
    drawn = [variant for _, variant in own if variant in DRAWN.get(page, variant).split()]
    for method in COMPARED[page].split() if page in COMPARED else [f"{page}/{variant}" for variant in sorted(drawn)]:
        script, variant = method.split("/")
        for (env_id, of), paths in results(script).items():
            if of == variant and any(env_id == own_id for own_id, _ in own):
                plain = re.sub("/(one|fifty)-?", "/", method)
                long = plain.replace("hyper/", "HyPER, ").replace("-", " ").replace("hype/", "HyPE, ")
                name = NAMES.get(plain, long) if page in COMPARED else variant
                found.setdefault(env_id, {})[name] = paths
    least = 0 if page not in COMPARED else 4 if page == "ablations" else 2
    return {env_id: there for env_id, there in sorted(found.items()) if len(there) >= least}


# ---------------------------------------------------------------------------------------------------- tables
def markdown(head: list[str], rows: list[list]) -> str:
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [head, ["---"] * len(head), *rows])


def each(values, form: str = "{:.0%}") -> str:
    return ", ".join(form.format(value) for value in values)


def first_at(level: float, run: Curve) -> str:
    """Each seed's first step at this share of the expert."""
    reached = run.values >= level - 1e-6  # some files have 0.9 as 0.8999999761581421
    return ", ".join(f"{run.steps[seed.argmax()]:,}" if seed.any() else "never" for seed in reached)


LAST = "last ten evaluations (of up to twenty the last third)"


def last(run: Curve) -> np.ndarray:
    """Each seed's mean of the last ten evaluations [seeds], of up to twenty the last third; of cloning the last one."""
    n = 1 if run.offline else 10 if len(run.steps) > 20 else max(1, len(run.steps) // 3)
    return run.values[:, -n:].mean(1)


def editions(paths: list[Path]) -> str:
    """Of the code that made these runs. The first edition's args.json has all versions in one dictionary."""
    return "+".join(sorted({"1" if '"versions"' in path.with_suffix(".json").read_text() else "2" for path in paths}))


def result_table(script: str) -> str:
    """All runs; where some seeds went further than others, a row for each length."""
    if script in ("sra_offline", "offline_baselines", "vins", "slbo"):
        return score_table(script)
    found = [(*key, paths, curve(paths)) for key, seeds in results(script).items() for paths in stretches(seeds)]
    unit, form, levels = "success" if script in MEASURES else "of the expert", "{:.0%}", LEVELS.get(script, (0.9,))
    if script not in MEASURES and not any(np.isfinite(run.expert) for *_, run in found):
        unit, form, levels = "return", "{:.0f}", ()
    rows = []
    for env_id, variant, paths, run in found:
        row = [env_id, variant, len(paths), editions(paths), f"{run.steps[-1]:,}" + " updates" * run.offline]
        row += [each(last(run), form), "-" if run.offline else each(run.values.mean(1), form)]
        row += ["-" if run.offline else first_at(level, run) for level in levels]
        rows.append([*row, f"{run.minutes:.0f}"])
    head = f"environment, variant, seeds, edition, env steps, {unit}: {LAST}, all evaluations".split(", ")
    return markdown([*head, *(f"first at {level:.0%}" for level in levels), "minutes a run"], rows)


def score_table(script: str) -> str:
    """A row for each variant, a column for each environment: of each seed the mean of the last third of evaluations,
    since they swing (slbo: of ten); and the published score."""
    found, rows, form = results(script), [], "{:.0%}" if script == "vins" else "{:.0f}"
    papers = read(ROOT / "benchmark" / "published" / "sra_offline.csv")
    theirs = {
        (row["env"], row["variant"]): f" ({float(row['score']):.0f})" for row in papers if row["reward"] != "dense"
    }
    envs, variants = (sorted({key[i] for key in found}) for i in range(2))
    for variant in sorted(variants, key=lambda variant: variant not in DRAWN["sra_offline"].split()):
        rows.append([variant])
        for run, key in ((found.get(key) and curve(found[key]), key) for key in ((env_id, variant) for env_id in envs)):
            n = 10 if script == "slbo" else max(1, len(run.steps) // 3) if run else 0
            rows[-1].append(each(run.values[:, -n:].mean(1), form) + theirs.get(key, "") if run else "-")
    head = {"vins": "success, each seed", "slbo": "return, each seed"}.get(script, "score, each seed (published)")
    return markdown([head, *envs], rows)


def comparison_table(page: str) -> str:
    """Methods after the fewest steps that one of the page's own script took; those that took fewer tell theirs. HyPER's
    are so few that hype.md leaves it out: see early_table."""
    columns, script = {}, PROTOCOLS.get(page, page)
    for env_id, there in methods(page).items():
        runs = {name: curve(paths) for name, paths in there.items()}
        ends = [run.steps[-1] for name, run in runs.items() if there[name][0].parts[-4] == script and not run.offline]
        if len(ends) < 2 - (page in PROTOCOLS):
            continue
        cells = columns[f"{env_id}, {min(ends):,} steps"] = {}
        for name, run in runs.items():
            until = run.steps <= (np.inf if run.offline else min(ends))
            run = run._replace(steps=run.steps[until], values=run.values[:, until])
            fewer = f" after {run.steps[-1]:,}" if run.steps[-1] < min(ends) else ""
            detail = f", all {run.values.mean():.0%}{fewer} ({first_at(0.9, run)})"
            if script != "hype" or "HyPER" not in name:
                cells[name] = f"{last(run).mean():.0%}" + detail * (not run.offline)
    names = dict.fromkeys(name for cells in sorted(columns.values(), key=len, reverse=True) for name in cells)
    head = f"mean of the {LAST}, of all, of the expert's return (first at 90%, each seed)"
    return markdown([head, *columns], [[name, *(cells.get(name, "-") for cells in columns.values())] for name in names])


def early_table(page: str) -> str:
    """After the steps that all methods took: the mean over steps and seeds, and at the end each seed; cloning alone."""
    columns = {}
    for env_id, there in methods(page).items():
        runs = {name: curve(paths) for name, paths in there.items()}
        steps = np.linspace(0, min(run.steps[-1] for run in runs.values() if not run.offline), 101)
        cells = columns[f"{env_id}, {steps[-1]:,.0f} steps"] = {}
        for name, run in runs.items():
            values = np.array([np.interp(steps, run.steps, seed) for seed in run.values])
            cells[name] = each(last(run)) if run.offline else f"{values.mean():.0%}, then {each(values[:, -1])}"
    names = dict.fromkeys(name for cells in sorted(columns.values(), key=len, reverse=True) for name in cells)
    rows = [[name, *(cells.get(name, "-") for cells in columns.values())] for name in names]
    return markdown(["of the expert's return: mean over the steps, then each seed's last (BC: last)", *columns], rows)


def summary_table(_: str) -> str:
    """Of each method the last evaluations, a mean over seeds, and each seed's first step at 95% of the expert."""
    rows = []
    for demos, there in SUMMARY.items():
        for name, method in there.items():
            script, variant = method.split("/")
            paths = [results(script).get((env_id, variant)) for env_id in ROBOTS]
            runs = [curve(files) if files else None for files in paths]
            steps = max(0 if run.offline else run.steps[-1] for run in runs if run)
            cells = [
                f"{last(run).mean():.0%}" + f" ({first_at(0.95, run)})" * (not run.offline) if run else "-"
                for run in runs
            ]
            rows.append([demos, name, f"{steps:,}", *cells])
    return markdown(["demonstrations", "method", "real steps, at most", *ROBOTS], rows)


def effect_table(script: str) -> str:
    """By how much the return differs between two values of one factor, over pairs of policies that share the others."""
    rows, names = [], ["start", "size", "rollout_length", "seed"]
    forms = dict(start="{} starts", rollout_length="{} steps", size="{} transitions")
    for (env_id, variant), paths in (results(script, True) | results(f"{script}_offline", True)).items():
        policies = pd.concat(map(pd.read_csv, paths))
        for start, part in [*policies.groupby("start", sort=False), ("all", policies)]:
            for factor in ("start",) if start == "all" else ("rollout_length", "size"):
                low, *_, high = sorted({*part[factor]}, reverse=factor == "start") * 2
                table = part.pivot(index=[name for name in names if name != factor], columns=factor)["eval_return_mean"]
                change = (table[high] - table[low]).dropna()
                if low != high and len(change):
                    row = [env_id, variant, forms[factor].format(low), forms[factor].format(high), start]
                    numbers = [f"{number:.1f}" for number in (change.mean(), change.min(), change.max())]
                    rows.append([*row, *numbers, f"{(change > 0).sum()} of {len(change)}"])
    head = "environment, variant, instead of, , starts, difference in return, least, greatest, greater in"
    return markdown(head.split(", "), rows)


def held_out_table(script: str) -> str:
    """Each seed's mean return on held-out tasks, without and with real steps of theirs, by number of training tasks."""
    files = [(*key, path) for key, paths in results(script).items() for path in paths]
    tables = [pd.read_csv(path).assign(family=env.replace("Told", ""), variant=variant) for env, variant, path in files]
    tests = pd.concat(tables).dropna(subset="test/after_0")
    spent = sorted(int(name[11:]) for name in tests if re.fullmatch(r"test/after_\d+", name))[1:]
    counts, rows = sorted(tests.train_tasks.unique()), []
    for key, part in tests.groupby(["family", "variant"]):
        zero_shot = part.groupby("train_tasks")["test/after_0"].apply(list)
        numbers = [zero_shot.get(n, []) for n in counts] + [part[f"test/after_{n}"].dropna() for n in spent]
        rows.append([*key, *(each(column, "{:.0f}") or "-" for column in numbers)])
    head = [*(f"zero-shot, {n} tasks" for n in counts), *(f"then {n:,} real steps" for n in spent)]
    return markdown(["family", "variant", *head], rows)


# -------------------------------------------------------------------------------------------------- pictures
def picture(file: str, panels: dict[str, dict[str, list[Path]]], unit: str) -> None:
    """A panel for each environment, in it a line for each method."""
    names = list(dict.fromkeys(name for there in panels.values() for name in there))
    across, down = min(4, len(panels)), -(-len(panels) // 4)
    figure, axes = plt.subplots(down, across, figsize=(4.5 * across, 3.6 * down), squeeze=False, layout="constrained")
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, (env_id, there) in zip(axes.flat, panels.items(), strict=False):
        for name, paths in there.items():
            run, color = curve(paths), f"C{names.index(name) % 10}"
            label = f"{name}, {len(run.values)} seed{'s' * (len(run.values) > 1)}"
            if run.offline and unit == "return":
                ax.axhline(last(run).mean(), ls="-.", color=color, label=label)
                continue
            ax.plot(run.steps / 1_000, run.values.mean(0), color=color, label=label)
            ax.fill_between(run.steps / 1_000, run.values.min(0), run.values.max(0), alpha=0.15, color=color, lw=0)
        steps = "updates" if unit == "normalized score" else "env steps"
        ax.set(title=env_id, xlim=(0, ax.get_xlim()[1]), xlabel=f"thousand {steps}", ylabel=unit)
        papers = [row for row in read(ROOT / f"benchmark/published/{file}.csv") if row["env"] == env_id[:-3]]
        if papers and "variant" not in papers[0]:
            share = [float(row["return"]) / float(row["expert"]) for row in papers]
            ax.plot([float(row["counted_k_steps"]) for row in papers], share, "k--", lw=0.8, label="published")
        if unit == "return" and np.isfinite(run.expert):
            ax.axhline(1, color="k", lw=0.8, label="expert")
            ax.set(ylim=(-0.05, 1.15), ylabel="return / expert's")
        ax.legend(fontsize=7)
    figure.savefig(ROOT / "docs" / f"{file}.png", dpi=130)


TABLES = dict(results=result_table, comparison=comparison_table, effects=effect_table, held_out=held_out_table)
TABLES |= dict(early=early_table, summary=summary_table)
TABLES["speed"] = speed.table


def main() -> None:
    mark = re.compile(r"(<!-- (\w+) (\w+) -->\n).*?(<!-- end -->)", re.S)
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        page.write_text(mark.sub(lambda m: f"{m[1]}{TABLES[m[2]](m[3])}\n{m[4]}", page.read_text()))
    for script in (path.name for path in (ROOT / "benchmark" / "results").iterdir() if methods(path.name)):
        picture(script, methods(script), MEASURES.get(script, "return").replace("_", " "))
    panels = {
        e: {n: methods("one")[e][n] for n in ("HyPER", "HyPE", "GAIL", "BC")} for e in ("Hopper-v4", "Walker2d-v4")
    }
    picture("hyper_hype", panels, "return")


if __name__ == "__main__":
    main()
