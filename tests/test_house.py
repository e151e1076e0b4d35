"""The rules of the house: a script is short, flat and its own; shared blocks are the same; the pages' commands work."""

import ast
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import fields
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import tyro

from tests.conftest import ROOT

LINES = dict(sac=400, bco_baseline=450, sac_eo=550, hype=560, hyper=730, mbarl=800, sra_offline=850, slbo=700)
LINES |= dict(slbo_multitask=750, vins=600, hyper_paper=700, offline_baselines=700)
LINES |= dict(mbarl_offline=400, bc=300, maml=530, evaluate=110)
FLAGS = 50
PATHS = [ROOT / f"{name}.py" for name in LINES if (ROOT / f"{name}.py").exists()]
SCRIPTS = [path for path in PATHS if path.stem != "evaluate"]
PAGES = [ROOT / "README.md", ROOT / "demos" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Blocks that differ between scripts, and why.
WANTED = {
    "Args": "each script has its own settings",
    "train": "the algorithm itself",
    "Adam": "only ensembles and offline learners decay weights, only hype.py and hyper.py have two kinds of momentum",
    "Agent": "its networks and optimisers are the algorithm's",
    "Actor": "imitation scripts standardise its observations; that of bc.py has no noise",
    "Critic": "hype.py and hyper.py normalise batches",
    "actor_loss": "imitation scripts add behaviour cloning",
    "critic_loss": "only sac.py has equations to name",
    "sac_update": "imitation scripts take the cost's rewards",
    "cost_loss": "hype.py's methods have two losses, hyper.py has one",
    "collect": "that of maml.py has a policy for each task",
    "cost_update": "hype.py keeps the mean of a cost that moment matching leaves free",
}


def blocks(path: Path) -> dict[str, str]:
    """Functions and classes by name, as they stand in the file, decorators included."""
    text = path.read_text()
    lines = text.splitlines()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[start - 1 : node.end_lineno])
    return found


@cache
def load(path: Path):
    """The file as a module."""
    spec = importlib.util.spec_from_file_location(f"house_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# --------------------------------------------------------------------------------------------- shared blocks
@pytest.mark.parametrize("one,other", combinations(SCRIPTS, 2), ids=lambda path: path.stem)
def test_shared_blocks_are_the_same_text_in_the_same_order(one, other):
    ours, theirs = blocks(one), blocks(other)
    shared = [name for name in ours if name in theirs]
    different = [name for name in shared if ours[name] != theirs[name] and name not in WANTED]
    assert not different, f"run tests/sync_blocks.py {one.name}:{different[0]}"
    assert shared == [name for name in theirs if name in ours]


@pytest.mark.parametrize("name", WANTED)
def test_no_wanted_difference_is_stale(name):
    assert len({blocks(path).get(name) for path in SCRIPTS} - {None}) > 1


def test_sync_copies_a_block(tmp_path):
    (tmp_path / "a.py").write_text(
        "X = 1\n\n\n@decorated\ndef f(x):\n    # why\n    return x\n\n\ndef g():\n    pass\n"
    )
    (tmp_path / "b.py").write_text("def f(x):\n    return -x\n\n\nY = 2\n")
    subprocess.run([sys.executable, ROOT / "tests" / "sync_blocks.py", "a.py:f"], cwd=tmp_path, check=True)
    assert (tmp_path / "b.py").read_text() == "@decorated\ndef f(x):\n    # why\n    return x\n\n\nY = 2\n"


# ------------------------------------------------------------------------------------------------- a script
def test_every_file_of_the_root_has_its_budget():
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {file[:-3] for file in files if "/" not in file} <= set(LINES)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_file_keeps_to_its_budget(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= LINES[path.stem] and max(map(len, lines)) <= 120
    assert len(fields(load(path).Args)) <= FLAGS


def test_help_shows_the_settings_of_the_method(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hype.py", "--algo", "gail", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "hype.py"), run_name="__main__")
    assert "(default: logistic)" in capsys.readouterr().out and load(ROOT / "hype.py").Args().cost_loss == "moment"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_imports_nothing_of_ours_but_environments(path):
    ours = {file.stem for file in ROOT.iterdir() if file.suffix in ("", ".py")} - {"envs"}
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not {name.split(".")[0] for name in names} & ours, path.name


def root_name(node: ast.expr) -> str | None:
    """`a` of a.b[c].d"""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_no_function_in_a_training_loop_changes_what_is_around_it(path):
    loops = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") in ("train", "study")]
    assert len(loops) == 1
    inner = [node for node in ast.walk(loops[0]) if isinstance(node, ast.FunctionDef | ast.Lambda) and node != loops[0]]
    for function in inner:
        nodes = list(ast.walk(function))
        own = {node.arg for node in nodes if isinstance(node, ast.arg)}
        own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        for node in nodes:
            assert not isinstance(node, ast.Nonlocal | ast.Global)
            if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store):
                assert root_name(node) in own, ast.unparse(node)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                changes = node.func.attr in ("append", "extend", "update", "add", "pop", "clear", "setdefault")
                assert not changes or root_name(node.func) in own, ast.unparse(node)


# ------------------------------------------------------------------------------------------------- the pages
def commands(text: str) -> list[tuple[str, str]]:
    """File and words of every `python file.py words` in a text."""
    found = re.findall(r"python ((?:\w+/)*\w+\.py)((?: [^\n`&|#>]+)?)", text.replace("\\\n", " "))
    return sorted({(file, words.strip()) for file, words in found})


@pytest.mark.parametrize("path", [*PAGES, *PATHS], ids=lambda path: path.name)
def test_commands_are_understood(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    wrong = []
    for file, words in commands(path.read_text()):
        try:
            module = load(ROOT / file)
            tyro.cli(module.Args, args=shlex.split(words)) if hasattr(module, "Args") else None
        except (SystemExit, FileNotFoundError):
            wrong.append(f"{file} {words}")
    assert not wrong, capsys.readouterr().err[-500:]


@pytest.mark.parametrize("path", [ROOT / "README.md", *SCRIPTS], ids=lambda path: path.name)
def test_there_are_commands_to_understand(path):
    assert len(commands(path.read_text())) >= (3 if path.suffix == ".md" else 1)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_metric_is_explained(path):
    metrics = set(re.findall(r'"((?:losses|model|reward)/\w+)"', path.read_text()))
    page = (ROOT / "docs" / f"{path.stem}.md").read_text()
    assert not [metric for metric in metrics if f"`{metric}`" not in page]


def test_no_committed_file_is_large():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert all((ROOT / file).stat().st_size < 5_000_000 for file in files if (ROOT / file).exists())
