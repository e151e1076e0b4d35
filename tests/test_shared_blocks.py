"""A block that stands in several scripts under one name is the same text in all of them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for path in ROOT.glob("*.py"))

# Blocks that are meant to differ, and why.
WANTED = {
    "Args": "each script has its own settings",
    "check_args": "each script has its own combinations that cannot be",
    "parse_args": "the presets of sra_offline.py go by its data sets and learners, not by environments",
    "train": "the algorithm itself",
    "sac_update": "hype.py and hyper.py can add behaviour cloning of the expert rows to the actor's loss, sac_eo.py its imitation term",
}


def blocks(path: Path) -> dict[str, str]:
    """Functions and classes of a script by name, as normalised source (comments and layout do not count)."""
    tree = ast.parse(path.read_text())
    return {node.name: ast.unparse(node) for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_shared_blocks_are_the_same_everywhere():
    first: dict[str, tuple[str, str]] = {}
    for path in SCRIPTS:
        for name, text in blocks(path).items():
            if name not in WANTED:
                where, known = first.setdefault(name, (path.name, text))
                assert text == known, f"{name} differs between {where} and {path.name}: run tests/sync_blocks.py {where}:{name}"


def test_the_imitation_scripts_share_their_sac():
    """Of the wanted differences, this one is not between these two."""
    of = {name: blocks(ROOT / name)["sac_update"] for name in ("hype.py", "hyper.py")}
    assert len(set(of.values())) == 1


def test_shared_blocks_stand_in_the_same_order():
    orders = {path.name: list(blocks(path)) for path in SCRIPTS}
    for one, names in orders.items():
        for other, others in orders.items():
            shared = [name for name in names if name in others]
            assert shared == [name for name in others if name in names], f"{one} and {other}"


def test_no_wanted_difference_is_stale():
    for name in WANTED:
        assert len({blocks(path).get(name) for path in SCRIPTS} - {None}) > 1, f"{name} is the same everywhere"


def test_shared_constants_are_the_same_everywhere():
    """All but the settings and the names of this script's own flags."""
    own = {"PRESETS", "POSITIVE", "FRACTIONS", "RESUME_MAY_CHANGE"}
    first: dict[str, str] = {}
    for path in SCRIPTS:
        for node in ast.parse(path.read_text()).body:
            for target in node.targets if isinstance(node, ast.Assign) else ():
                if target.id not in own and not target.id.startswith("_"):
                    assert first.setdefault(target.id, ast.unparse(node.value)) == ast.unparse(node.value), f"{target.id} in {path.name}"
    assert {"OBS_KEPT", "SCRIPT"} <= first.keys()


def test_sync_copies_a_block(tmp_path):
    (tmp_path / "a.py").write_text("X = 1\n\n\n@decorated\ndef f(x):\n    # why\n    return x\n\n\ndef g():\n    pass\n")
    (tmp_path / "b.py").write_text("def f(x):\n    return -x\n\n\nY = 2\n")
    subprocess.run([sys.executable, ROOT / "tests" / "sync_blocks.py", "a.py:f"], cwd=tmp_path, check=True)
    assert (tmp_path / "b.py").read_text() == "@decorated\ndef f(x):\n    # why\n    return x\n\n\nY = 2\n"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_inline_dependencies_are_the_requirements(path):
    import tomllib

    lines = path.read_text().splitlines()
    start, end = lines.index("# /// script"), lines.index("# ///")
    block = tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[start + 1 : end]))
    assert block["dependencies"] == (ROOT / "requirements.txt").read_text().split() and block["requires-python"] == ">=3.11,<3.14"
