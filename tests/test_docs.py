"""Every command that README and docs show is understood by the script that it names; every metric and file exists."""

import re
import shlex
from pathlib import Path

import pytest

import bco_baseline
import hype
import hyper
import mbarl
import sac
import sac_eo
import sra_offline
from tests.conftest import POINT, TINY_BCO, TINY_HYPE, TINY_HYPER, TINY_MBARL, TINY_SAC, TINY_SAC_EO, TINY_SRA, run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "demos" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = dict(sac=sac, hype=hype, hyper=hyper, sac_eo=sac_eo, bco_baseline=bco_baseline, sra_offline=sra_offline, mbarl=mbarl)
COMMANDS = sorted({
    (page.name, match[1], match[2]) for page in PAGES
    for match in re.finditer(r"(?:python|uv run) (\w+)\.py((?: [^\n`&|#]+)?)", page.read_text())
})  # fmt: skip


@pytest.fixture(scope="session")
def finished(tmp_path_factory, demos):
    """The folder of a finished tiny run of a script."""
    folders = {}

    def folder(script: str) -> Path:
        if script not in folders:
            folders[script] = tmp_path_factory.mktemp(script)
            of_hyper = [*TINY_HYPER, "--demos", demos, "--termination", "tests.pointmass:terminates"]
            extra = dict(sac=TINY_SAC, hype=[*TINY_HYPE, "--demos", demos], hyper=of_hyper)
            extra |= dict(sac_eo=[*TINY_SAC_EO, "--demos", demos], bco_baseline=[*TINY_BCO, "--demos", demos])
            extra |= dict(sra_offline=[*TINY_SRA, "--demos", demos, "--offline-data", demos, "--rollout-freq", "20"])
            extra |= dict(mbarl=["--env-id", "Tabletop-v0", *TINY_MBARL])
            run(MODULES[script], [*POINT, *extra[script], "--total-timesteps", "70", "--run-dir", folders[script]])
        return folders[script]

    return folder


@pytest.mark.parametrize("page,script,argv", COMMANDS)
def test_command_is_understood(page, script, argv, finished):
    words = [word for word in shlex.split(argv) if word != "\\"]
    if any("RUN_DIR" in word for word in words):
        words = [word.replace("RUN_DIR", str(finished(script))) for word in words]
    args = MODULES[script].parse_args(words)
    MODULES[script].check_args(args)
    if "--env-id" in words:
        MODULES[script].make_env(args.env_id) if ":" not in args.env_id else None


def test_there_are_commands_to_check():
    assert len([c for c in COMMANDS if c[0] == "README.md"]) >= 3 and {c[1] for c in COMMANDS} == set(MODULES)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("script", MODULES)
def test_every_metric_is_explained(script):
    source, page = (ROOT / f"{script}.py").read_text(), (ROOT / "docs" / f"{script}.md").read_text()
    for metric in set(re.findall(r'"((?:charts|losses|model|reward)/\w+)"', source)):
        assert f"`{metric}`" in page, metric


@pytest.mark.parametrize("script", MODULES)
def test_functions_of_the_equation_table_exist(script):
    page = (ROOT / "docs" / f"{script}.md").read_text()
    source = (ROOT / f"{script}.py").read_text()
    table = page.partition("## Equation to function")[2].partition("\n## ")[0]
    named = {name for row in table.splitlines() if row.startswith("| ") for name in re.findall(r"`([\w.]+)`", row.split(" | ")[1])}
    assert len(named) > 2
    for name in named:
        assert re.search(rf"\b{name.split('.')[-1]}\b", source), name


def test_no_committed_file_is_large():
    for path in ROOT.rglob("*"):
        if path.is_file() and not {".git", "runs", "data", ".venv", ".ruff_cache"} & set(path.relative_to(ROOT).parts):
            assert path.stat().st_size < 5_000_000, path
