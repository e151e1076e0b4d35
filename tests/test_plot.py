"""benchmark/: tables of curves made up so that every number can be worked out by hand; launcher."""

import json

import pytest

pytest.importorskip("matplotlib")
from benchmark import launch, plot


@pytest.fixture
def curves(tmp_path, monkeypatch):
    """A function that files one seed: an evaluation each 10 steps, a minute apart."""
    monkeypatch.setattr(plot, "ROOT", tmp_path)

    def file(seed, values, expert=100.0, column="eval_return_mean", offline=False, edition=2):
        path = tmp_path / "benchmark" / "results" / f"{seed}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps({"versions": {}} if edition == 1 else {"torch": "2"}))
        counts = [(0, 10 * i) if offline else (10 * i, "") for i in range(1, len(values) + 1)]
        rows = [f"{e},{u},{60 * i},{expert},{values[i - 1]}" for i, (e, u) in enumerate(counts, 1)]
        path.write_text("\n".join([f"env_steps,updates,wall_time_s,expert_return,{column}", *rows]))
        return path

    return file


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_results_of_both_editions_of_different_lengths_and_without_an_expert(curves):
    curves("hype/hype/Toy-v0/seed1", [50, 95, 120], edition=1)
    curves("hype/hype/Toy-v0/seed2", [30, 85])
    curves("hype/mm/Toy-v0/seed1", [30, 90], expert="nan")  # the one beside knows the expert
    curves("hype/bc/Toy-v0/seed1", [70, 80], offline=True)
    bc, together, alone, beside = cells(plot.result_table("hype"))
    assert bc == ["Toy-v0", "bc", "1", "2", "20 updates", "80%", "-", "-", "2"]
    assert together == ["Toy-v0", "hype", "2", "1+2", "20", "95%, 85%", "72%, 57%", "20, never", "2"]
    assert alone == ["Toy-v0", "hype", "1", "1", "30", "120%", "88%", "20", "3"] and beside[5:8] == ["90%", "60%", "20"]
    curves("sac/default/Toy-v0/seed1", [10, 80], expert="")
    assert cells(plot.result_table("sac"))[0][5:] == ["80", "45", "2"]
    for n, mean in ((12, 10.5), (20, 17.5), (21, 16.5), (40, 35.5)):
        assert plot.last(plot.curve([curves("hype/mm/Long-v0/seed1", range(1, n + 1), expert=1)])) == [mean]


def test_held_out_tasks_by_the_number_of_training_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "ROOT", tmp_path)
    names = "env_steps,train_tasks,test/after_0,test/task_0_after_0,test/after_100"
    files = {"multitask/HCF-v0/seed1": ["0,0,,,", "10,1,-50.4,7,", "300,2,-30,7,-20"]}
    files |= {"multitask/HCF-v0/seed2": ["0,0,,,", "10,1,-40,7,", "300,2,-20,7,-10.6"]}
    files |= {"goal/HCFTold-v0/seed1": ["300,2,-99,7,"]}
    for name, lines in files.items():
        path = tmp_path / "benchmark" / "results" / "slbo_multitask" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([names, *lines]))
    assert cells(plot.held_out_table("slbo_multitask")) == [
        ["HCF-v0", "goal", "-", "-99", "-"],
        ["HCF-v0", "multitask", "-50, -40", "-30, -20", "-20, -11"],
    ]


def test_scores_of_the_last_third_and_the_published_one(curves, tmp_path):
    scores = dict(column="eval_normalized_score", offline=True)
    curves("sra_offline/sra/Maze2D-umaze-v0/seed1", [0, 10, 20, 30, 80, 100], **scores)
    curves("sra_offline/sra/Maze2D-umaze-v0/seed2", [0, 10, 20, 30, 60, 40], **scores)
    paper = tmp_path / "benchmark" / "published" / "sra_offline.csv"
    paper.parent.mkdir()
    paper.write_text("env,variant,reward,score\nMaze2D-umaze-v0,sra,sparse,112\nMaze2D-umaze-v0,sra,dense,99")
    assert cells(plot.result_table("sra_offline")) == [["sra", "90, 50 (112)"]]


def test_pairs_of_an_offline_study(curves):
    path = curves("mbarl/offline/Toy-v0/seed1", [])
    rows = "1,200,20,narrow,10 1,1000,20,narrow,40 1,200,50,narrow,15 1,200,20,demo,7 1,200,50,demo,5".split()
    path.write_text("\n".join(["seed,size,rollout_length,start,eval_return_mean", *rows]))
    narrow, size, demo, start = (row[2:] for row in cells(plot.effect_table("mbarl")))
    assert narrow == ["20 steps", "50 steps", "narrow", "5.0", "5.0", "5.0", "1 of 1"] and demo[3] == "-2.0"
    assert size[:4] == ["200 transitions", "1000 transitions", "narrow", "30.0"]
    assert start == ["narrow starts", "demo starts", "all", "-6.5", "-10.0", "-3.0", "0 of 2"]


@pytest.mark.parametrize(
    "page,names",
    [("hype", "hyper/default hype/hype hype/gail hype/bc"), ("one", "hyper/one hype/one hype/one-gail bc/one")],
)
def test_methods_side_by_side_after_the_fewest_steps(curves, page, names):
    for env_id in ("Hopper-v4", "Ant-v4"):
        for method, values in zip(names.split(), ([95], [50, 95, 99], [0, 20], [70, 80]), strict=True):
            curves(f"{method}/{env_id}/seed1", values, offline="bc" in method)
    table = plot.comparison_table(page)
    expected = {"HyPE": "95%, all 72% (20)", "GAIL": "20%, all 10% (never)"}
    expected["BC"] = "80%"
    assert "Hopper-v4, 20 steps" in table and {row[0]: row[2] for row in cells(table)} == expected


def test_methods_over_the_steps_that_all_took(curves):
    curves("hyper/fifty/Toy-v0/seed1", [0, 100, 100])  # at 100 from step 20 on
    curves("hyper/fifty-no-imagined-rows/Toy-v0/seed1", [20, 20, 20, 90])
    curves("hype/fifty-mm/Toy-v0/seed1", [45, 45, 45, 45])
    for method in ("hyper/fifty", "hype/fifty", "hype/fifty-mm"):  # too few for a column of ablations
        curves(f"{method}/Few-v0/seed1", [0, 10])
    curves("hyper/fifty-no-cloning/Toy-v0/seed1", [0, 0, 0, 0])
    table = plot.early_table("ablations")
    assert "Toy-v0, 30 steps" in table
    # from 0 to 10 the first evaluation, to 20 the line between both, then 100: (0 + 50 + 100) / 3, on 101 steps 50.05
    assert cells(table) == [
        ["HyPER", "50%, then 100%"],
        ["HyPER, no imagined rows", "20%, then 20%"],
        ["HyPER, no cloning", "0%, then 0%"],
        ["MM", "45%, then 45%"],
    ]
    curves("bc/fifty/Toy-v0/seed1", [7, 9], offline=True)
    curves("hype/fifty/Toy-v0/seed1", [60])
    assert ["BC", "-", "9%"] in cells(plot.early_table("fifty"))


def test_each_seeds_first_step_at_95_percent(curves, monkeypatch):
    monkeypatch.setattr(plot, "SUMMARY", {"one": dict(HyPE="hype/one", BC="bc/one")})
    curves("hype/one/Hopper-v4/seed1", [50, 94, 96, 80])
    curves("hype/one/Hopper-v4/seed2", [50, 60, 70, 90])
    curves("bc/one/Ant-v4/seed1", [70, 80], offline=True)
    hype, bc = cells(plot.summary_table("all"))
    assert hype == ["one", "HyPE", "40", "85% (30, never)", *"----"]
    assert bc == ["one", "BC", "0", "-", "-", "-", "80%", "-"]


def test_launcher_keeps_a_longer_curve(curves, tmp_path):
    run = curves("run/progress", [1, 2])
    (run.parent / "args.json").write_text(json.dumps(dict(script="sac", args=dict(env_id="a/Toy-v0"))))
    longer = curves("sac/default/a-Toy-v0/seed3", [1, 2, 3])
    for replace, steps in ((False, 30), (True, 20)):
        launch.file_result(run.parent, 3, "default", tmp_path / "benchmark" / "results", replace)
        assert launch.length(longer) == steps
