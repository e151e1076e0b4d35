"""Tables and pictures of benchmark/plot.py, on results made up so that every number can be worked out by hand."""

import csv
import json

import pytest

pytest.importorskip("matplotlib")
from benchmark import plot


@pytest.fixture
def file_result(tmp_path, monkeypatch):
    """A function that files one seed's curve of returns (one evaluation each 10 steps) as if a run had made it."""
    monkeypatch.setattr(plot, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()

    def file(script, variant, env_id, seed, returns, expert=100.0, column="eval_return_mean", count="env_steps", **more):
        folder = tmp_path / "benchmark" / "results" / script / variant / env_id
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"seed{seed}.json").write_text(json.dumps({"args": {}}))
        with open(folder / f"seed{seed}.csv", "w") as out:
            names = ["env_steps", "updates", "wall_time_s", "eval_return_mean", "expert_return", *({column} - {"eval_return_mean"}), *more]
            table = csv.DictWriter(out, names)
            table.writeheader()
            for i, value in enumerate(returns, 1):
                row = {"env_steps": 0, "updates": 10 * i, "wall_time_s": 60 * i, "eval_return_mean": 0, "expert_return": expert}
                table.writerow(row | {count: 10 * i, column: value} | {name: values[i - 1] for name, values in more.items()})

    return file


def cells(table, *beginning):
    """The one row of a markdown table whose cells begin so."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    (row,) = [row for row in rows if row[: len(beginning)] == list(beginning)]
    return row


def test_comparison_is_over_the_steps_that_all_methods_took(file_result):
    file_result("hype", "hype", "Toy-v0", 1, [50, 95, 100])
    file_result("hype", "hype", "Toy-v0", 2, [30, 85, 100])
    file_result("hype", "mm", "Toy-v0", 1, [0, 20])
    file_result("hype", "bc", "Toy-v0", 1, [70, 80], count="updates")
    file_result("hype", "mm-4-demos", "Toy-v0", 1, [90, 90])
    table = plot.comparison("hype")
    assert cells(table, "Toy-v0", "20", "hype") == ["Toy-v0", "20", "hype", "2", "65%", "65%", "90%", "20, -"]
    assert cells(table, "Toy-v0", "20", "mm") == ["Toy-v0", "20", "mm", "1", "10%", "10%", "20%", "-"]
    assert len(table.splitlines()) == 4 and table.index("| hype |") < table.index("| mm |")


def test_table_has_the_seeds_together_then_those_that_went_further(file_result):
    file_result("hype", "hype", "Toy-v0", 1, [50, 95, 120])
    file_result("hype", "hype", "Toy-v0", 2, [30, 95])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in plot.table("hype").splitlines() if "Toy" in line]
    assert [row[2:6] for row in rows] == [["2", "20", "72, 62", "2"], ["1", "30", "88", "3"]]
    assert [row[7:9] for row in rows] == [["68%", "20"], ["88%", "20"]]


def test_seeds_that_know_no_expert_are_held_to_the_environments(file_result):
    file_result("sac_eo", "default", "Toy-v0", 1, [60, 85])
    file_result("sac_eo", "sac", "Toy-v0", 1, [10, 60], expert=float("nan"))
    file_result("sac_eo", "sac", "Toy-v0", 2, [10, 80])
    file_result("sac_eo", "sac-eo-beside", "Lone-v0", 1, [10, 60], expert="")
    assert cells(plot.table("sac_eo"), "Toy-v0", "sac")[2:9] == ["2", "20", "35, 45", "2", "100", "40%", "not in 20"]
    assert cells(plot.table("sac_eo"), "Lone-v0", "sac-eo-beside")[6:9] == ["-"] * 3
    assert "Lone" not in plot.comparison("sac_eo")


def test_a_sibling_is_compared_with_its_methods_and_other_scripts_are_beside(file_result):
    file_result("sac_eo", "default", "Toy-v0", 1, [60, 85, 95])
    file_result("sac_eo", "sac", "Toy-v0", 1, [10, 60, 85], expert=float("nan"))  # SAC knows no expert
    file_result("sac_eo", "beta-100", "Toy-v0", 1, [60, 85])  # an experiment: not a method, and its steps do not count
    file_result("bco_baseline", "forward", "Toy-v0", 1, [20, 30])  # stopped earlier: the others are compared further
    file_result("bco_baseline", "forward", "Alone-v0", 1, [20, 30])
    file_result("hype", "hype", "Toy-v0", 1, [95, 95])
    file_result("hype", "bc", "Toy-v0", 1, [70, 80], count="updates")
    table = plot.comparison("sac_eo")
    assert cells(table, "Toy-v0", "30", "sac-eo")[3:] == ["reward, expert's states", "1", "80%", "80%", "95%", "10", "20", "30"]
    assert cells(table, "Toy-v0", "30", "sac")[3:] == ["reward", "1", "52%", "52%", "85%", "20", "30", "-"]
    assert cells(table, "Toy-v0", "20", "bco-forward")[3:] == ["expert's states", "1", "25%", "25%", "30%", "-", "-", "-"]
    assert cells(table, "Toy-v0", "20", "hype")[3:] == ["expert's states and actions", "1", "95%", "95%", "95%", "10", "10", "10"]
    assert cells(table, "Toy-v0", "none", "bc")[3:] == ["expert's states and actions", "1", "-", "-", "80%", "-", "-", "-"]
    assert "beta-100" not in table and "Alone-v0" not in table


def test_picture_of_the_experiments(file_result, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plot.plt, "close", lambda figure: drawn.append(figure))
    more = {f"model/{what}_{where}": ["", 0.5, 0.4] for what in ("error", "rank_correlation") for where in ("expert", "agent", "random")}
    for variant, weight in (("default", 0.2), ("beta-100", 0.7)):
        file_result("sac_eo", variant, "Toy-v0", 1, [60, 85, 95], **more, **{"losses/imitation_weight": ["", weight, weight]})
    file_result("sac_eo", "sac", "Toy-v0", 1, [60, 85, 95])  # has no weight
    plot.experiment_picture("sac_eo")
    assert (tmp_path / "docs" / "sac_eo_experiments.png").exists()
    axes = drawn[0].axes
    assert [ax.get_title() for ax in axes] == ["Toy-v0: beta", "Toy-v0: the models", "", ""]  # of the others there is nothing to show
    assert [line.get_label() for line in axes[0].get_lines()][:2] == ["sac-eo, 1 seed", "beta-100, 1 seed"]
    below = axes[2].get_lines()[1]  # beta-100's weight, without the evaluation before the first one
    assert below.get_xdata().tolist() == [0.02, 0.03] and below.get_ydata().tolist() == [0.7, 0.7]
    for i in range(2):
        file_result("sac_eo", "default", f"Other-v{i}", 1, [60, 85, 95], **more)
        file_result("sac_eo", "beta-100", f"Other-v{i}", 1, [60, 85, 95], **more)
    plot.experiment_picture("sac_eo")
    titles = [ax.get_title() for ax in drawn[1].axes]  # three experiments and three environments' models: four pairs, then two
    assert [title.partition(": ")[2] for title in titles[:4] + titles[8:10]] == ["beta"] * 3 + ["the models"] * 3
    assert len(titles) == 16 and not any(titles[4:8] + titles[10:])


def test_offline_scores_at_the_end_and_over_the_last_third(file_result, tmp_path):
    offline = dict(column="eval_normalized_score", count="updates", expert="")
    dense = {"eval_normalized_score_dense": [1, 2, 3, 4, 50, 70]}
    file_result("sra_offline", "sra", "maze2d-umaze", 1, [0, 10, 20, 30, 80, 100], **offline, **dense)
    file_result("sra_offline", "sra", "maze2d-umaze", 2, [0, 10, 20, 30, 60, 40], **offline, **dense)
    (tmp_path / "benchmark" / "published").mkdir()
    (tmp_path / "benchmark" / "published" / "sra_offline.csv").write_text(
        "env,variant,reward,score,spread\nmaze2d-umaze,sra,sparse,112.5,11\nmaze2d-umaze,sra,dense,99,4\nmaze2d-umaze,bc,sparse,1,1\n"
    )
    assert plot.is_offline("sra_offline") and not plot.is_offline("hype")
    row = cells(plot.score_table("sra_offline"), "maze2d-umaze", "sra")
    assert row[2:] == ["2", "60", "100, 40", "90, 50", "70", "112.5±11", "60", "99±4", "6"]
    plot.score_picture("sra_offline")
    assert (tmp_path / "docs" / "sra_offline.png").exists()
