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


def test_offline_scores_at_the_end_and_over_the_last_third(file_result, monkeypatch, tmp_path):
    offline = dict(column="eval_normalized_score", count="updates", expert="")
    dense = {"eval_normalized_score_dense": [1, 2, 3, 4, 50, 70]}
    file_result("sra_offline", "sra", "maze2d-umaze", 1, [0, 10, 20, 30, 80, 100], **offline, **dense)
    file_result("sra_offline", "sra", "maze2d-umaze", 2, [0, 10, 20, 30, 60, 40], **offline, **dense)
    (tmp_path / "benchmark" / "published").mkdir()
    (tmp_path / "benchmark" / "published" / "sra_offline.csv").write_text(
        "env,variant,reward,score,spread\nmaze2d-umaze,sra,sparse,112.5,11\nmaze2d-umaze,sra,dense,99,4\nmaze2d-umaze,bc,sparse,1,1\n"
    )
    assert plot.measures("sra_offline", "eval_normalized_score") and not plot.measures("sra_offline", "charts/interventions")
    row = cells(plot.score_table("sra_offline"), "maze2d-umaze", "sra")
    assert row[2:] == ["2", "60", "100, 40", "90, 50", "70", "112.5±11", "60", "99±4", "6"]
    file_result("sra_offline", "sra-200k", "maze2d-umaze", 1, [0] * 20, **offline)
    drawn = []
    monkeypatch.setattr(plot.plt, "close", drawn.append)
    plot.score_picture("sra_offline")
    assert (tmp_path / "docs" / "sra_offline.png").exists()
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == ["sra, 2 seeds"]  # variants stand in the table


@pytest.fixture
def file_autonomous(file_result):
    """The same for mbarl.py, which knows no expert: one seed's success rates."""

    def file(variant, env_id, seed, success, distance=0.5, grasps=0.25, reward=0.0012, interventions=0):
        last = {"eval_final_distance": distance, "eval_grasp_rate": grasps, "charts/reward_per_step": reward}
        last["charts/interventions"] = interventions
        more = {name: [9.0] * (len(success) - 1) + [value] for name, value in last.items()}
        more["eval_success_at_end"] = [rate / 2 for rate in success]
        file_result("mbarl", variant, env_id, seed, success, expert="nan", column="eval_success_rate", **more)

    return file


@pytest.fixture
def file_study(tmp_path):
    """A function that files one seed of an offline study, from its rows' (size, length, start, return, success rate, error)."""

    def file(seed, rows, variant="offline", env_id="Toy-v0"):
        folder = tmp_path / "benchmark" / "results" / "mbarl" / variant / env_id
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"seed{seed}.json").write_text(json.dumps({"args": {"offline": True, "preset": "default", "env_id": env_id}}))
        lines = ["seed,size,rollout_length,start,eval_return_mean,eval_success_rate,error_1_steps,error_2_steps,error_5_steps"]
        lines += [f"{seed},{size},{n},{start},{value},{rate},0.01,{error},{2 * error}" for size, n, start, value, rate, error in rows]
        (folder / f"seed{seed}.csv").write_text("\n".join(lines) + "\n")

    return file


def test_success_of_the_autonomous_arms(file_autonomous, file_study):
    file_autonomous("mbarl", "Tabletop-v0", 1, [0.0, 0.5, 0.8999999761581421, 0.75], distance=0.2, reward=0.002, interventions=1)
    file_autonomous("mbarl", "Tabletop-v0", 2, [0.25, 0.5, 0.8999999761581421, 1.0], distance=0.4, interventions=3)
    file_autonomous("oracle", "Tabletop-v0", 1, [0.0] * 2 + [0.1] * 10, grasps=0.0)
    file_autonomous("naive", "PointMass2D-v0", 1, [0.6] * 3)
    file_study(1, [(200, 2, "narrow", 1, 1, 1)], env_id="Tabletop-v0")
    table = plot.success_table("mbarl")
    assert cells(table, "Tabletop-v0", "mbarl")[2:] == [
        "2", "40", "0.54, 0.66", "0.54, 0.66", "0.12, 0.50, 0.90, 0.88", "20", "30", "-", "0.30", "0.30", "0.25", "0.0016", "2", "4"
    ]  # fmt: skip
    assert cells(table, "Tabletop-v0", "oracle")[4:13] == ["0.10", "0.08", "0.10, 0.10, 0.10, 0.10", "-", "-", "-", "0.05", "0.50", "0.00"]
    assert cells(table, "PointMass2D-v0", "naive")[7:13] == ["10", "-", "-", "0.30", "0.50", "-"]  # it has nothing to hold
    assert len(table.splitlines()) == 5 and "offline" not in table


def test_autonomous_arms_that_went_further_have_their_own_row(file_autonomous):
    file_autonomous("medal", "Tabletop-v0", 1, [0.0, 0.5])
    file_autonomous("medal", "Tabletop-v0", 2, [0.0, 0.5, 1.0])
    rows = [line.split(" | ") for line in plot.success_table("mbarl").splitlines() if "medal" in line]
    assert [(row[2], row[3], row[8]) for row in rows] == [("2", "20", "-"), ("1", "30", "30")]


def test_from_when_on_success_lasts(file_autonomous):
    file_autonomous("mbarl", "Tabletop-v0", 1, [0.0, 1.0, 0.5, 0.9, 0.9])
    file_autonomous("medal", "Tabletop-v0", 1, [0.9, 1.0, 1.0])
    table = plot.success_table("mbarl")
    assert cells(table, "Tabletop-v0", "mbarl")[8:10] == ["20", "40"] and cells(table, "Tabletop-v0", "medal")[9] == "10"


def test_picture_of_success_beside_what_is_published(file_autonomous, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plot.plt, "close", lambda figure: drawn.append(figure))
    (tmp_path / "benchmark" / "published").mkdir(parents=True)
    (tmp_path / "benchmark" / "published" / "mbarl.csv").write_text(
        "env,variant,k_steps,success\nTabletop-v0,naive,0.02,0.1\nTabletop-v0,naive,0.03,0.2\nTabletop-v0,naive,0.2,0.9\n"
        "Tabletop-v0,r3l,0.02,0.3\n"
    )
    for seed in (1, 2):
        file_autonomous("naive", "Tabletop-v0", seed, [0.0, 0.25 * seed, 0.5, 0.75])
    file_autonomous("naive", "PointMass2D-v0", 1, [0.5, 1.0])
    plot.score_picture("mbarl", "eval_success_rate", "env steps", "success rate", full=1)
    assert (tmp_path / "docs" / "mbarl.png").exists()
    point, tabletop = drawn[0].axes
    assert (point.get_title(), tabletop.get_title(), point.get_xlabel()) == ("PointMass2D-v0", "Tabletop-v0", "thousand env steps")
    ours, naive, r3l = tabletop.get_lines()[:3]
    assert (ours.get_label(), naive.get_label(), r3l.get_label()) == ("naive, 2 seeds", "naive, published", "r3l, published")
    assert ours.get_ydata().tolist() == [0, 0.375, 0.5, 0.75] and ours.get_color() == naive.get_color() != r3l.get_color()
    assert naive.get_xdata().tolist() == [0.02, 0.03] and r3l.get_ydata().tolist() == [0.3]  # as far as we went
    band = tabletop.collections[0].get_paths()[0].vertices
    assert {tuple(corner) for corner in band} >= {(0.02, 0.25), (0.02, 0.5)}
    assert [line.get_label() for line in point.get_lines()][:1] == ["naive, 1 seed"] and len(point.get_lines()) == 2


def test_offline_study_by_size_start_and_length(file_study, file_result, monkeypatch, tmp_path):
    monkeypatch.setattr(plot, "ROOT", tmp_path)
    file_study(1, [(200, 2, "narrow", 10, 0, 0.5), (200, 5, "narrow", 20, 0.5, 0.5), (400, 2, "narrow", 30, 1, 0.1)])
    file_study(2, [(200, 2, "narrow", 30, 1, 0.7), (200, 2, "demo", -4.04, 0.5, 0.7)])
    file_study(1, [(200, 5, "demo", 1, 0, 0.2)], variant="offline-coarse")
    table = plot.study_table("mbarl")
    assert table.splitlines()[0].endswith("| size | seeds | 2 steps | 5 steps |")
    assert cells(table, "Toy-v0", "offline", "narrow", "200")[4:] == ["2", "20.0 (0.50)", "20.0 (0.50)"]
    assert cells(table, "Toy-v0", "offline", "narrow", "400")[4:] == ["1", "30.0 (1.00)", "-"]
    assert cells(table, "Toy-v0", "offline", "demo", "200")[4:] == ["1", "-4.0 (0.50)", "-"]
    assert cells(table, "Toy-v0", "offline", "the model's error", "200")[4:] == ["2", "0.600", "1.200"]
    assert cells(table, "Toy-v0", "offline-coarse", "the model's error", "200")[4:] == ["1", "0.200", "0.400"]
    effects = plot.study_effects("mbarl")  # of pairs that differ in nothing else
    assert cells(effects, "Toy-v0", "offline", "2 steps", "5 steps")[4:] == ["narrow", "10.00", "10.00", "10.00", "1 of 1"]
    assert cells(effects, "Toy-v0", "offline", "200 transitions")[3:] == ["400 transitions", "narrow", "20.00", "20.00", "20.00", "1 of 1"]
    assert cells(effects, "Toy-v0", "offline", "narrow starts")[3:] == ["demo starts", "-", "-34.04", "-34.04", "-34.04", "0 of 1"]
    assert len(effects.splitlines()) == 5 and "coarse" not in effects
    drawn = []
    monkeypatch.setattr(plot.plt, "close", lambda figure: drawn.append(figure))
    plot.study_picture("mbarl")
    assert (tmp_path / "docs" / "mbarl_offline.png").exists()
    panels = {ax.get_title(): ax for ax in drawn[0].axes}
    assert list(panels) == [
        f"Toy-v0, {variant}: {start} starts" for variant in ("offline", "offline-coarse") for start in ("narrow", "demo")
    ]
    small, large = panels["Toy-v0, offline: narrow starts"].get_lines()
    assert small.get_label() == "200 transitions, 2 seeds" and large.get_label() == "400 transitions, 1 seed"
    assert small.get_xdata().tolist() == [2, 5] and small.get_ydata().tolist() == [20, 20]
    spread = panels["Toy-v0, offline: narrow starts"].collections[0].get_paths()[0].vertices
    assert {tuple(corner) for corner in spread} >= {(2, 10), (2, 30), (5, 20)}
    assert not panels["Toy-v0, offline-coarse: narrow starts"].axison


def test_pages_get_what_there_is(file_autonomous, file_study, monkeypatch, tmp_path):
    monkeypatch.setattr(plot, "filed_as", lambda about: ("", about.get("env_id", "Tabletop-v0")))
    page = tmp_path / "docs" / "mbarl.md"
    page.write_text("<!-- results mbarl -->\nnone\n<!-- end -->\nbetween\n<!-- offline mbarl -->\n<!-- end -->\n")
    (tmp_path / "README.md").write_text("")
    (tmp_path / "benchmark" / "results").mkdir(parents=True)
    plot.main()
    assert "\nnone\n" in page.read_text() and not list(tmp_path.glob("docs/*.png"))
    file_study(1, [(200, 2, "narrow", 10, 0, 0.5)])
    plot.main()
    results, _, study = page.read_text().partition("between")
    assert "none" in results and cells(study, "Toy-v0", "offline", "narrow")[5] == "10.0 (0.00)"
    assert [path.name for path in tmp_path.glob("docs/*.png")] == ["mbarl_offline.png"]
    file_autonomous("medal", "Tabletop-v0", 1, [0.0, 0.5])
    plot.main()
    results, _, study = page.read_text().partition("between")
    assert cells(results, "Tabletop-v0", "medal")[3] == "20" and "none" not in results and "offline" not in results
    assert "medal" not in study and (tmp_path / "docs" / "mbarl.png").exists()
