"""A release: one version everywhere, workflows that call what there is, extras that are declared."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import stagecut

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_one() -> None:
    """It stands in ir/version.py; the package reads it there, and the changelog and the citation agree."""
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "stagecut.ir.version.VERSION"}
    released = re.findall(r"^## (\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)$", read("CHANGELOG.md"), re.MULTILINE)
    citation = yaml.safe_load(read("CITATION.cff"))
    assert released[0] == (stagecut.__version__, str(citation["date-released"]))
    assert citation["version"] == stagecut.__version__
    assert read("CHANGELOG.md").startswith("# Changelog\n\n## Unreleased\n")


def test_extras_that_the_pages_install_are_declared() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    wanted = {
        extra for page in pages for group in re.findall(r"(?:stagecut|\.)\[(\w[\w,]*)\]", page.read_text()) for extra in group.split(",")
    }
    assert {"pictures", "hf"} <= wanted <= set(PROJECT["project"]["optional-dependencies"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_targets_and_files_that_exist(path: Path) -> None:
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    for step in steps:
        assert set(re.findall(r"^make ([a-z-]+)", step)) <= targets
        for name in re.findall(r"source/([\w./]+)", step):
            assert (ROOT / name).exists()


def test_the_matrix_has_every_torch_that_the_readme_names() -> None:
    jobs = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]
    tried = {str(cell["torch"]) for cell in jobs["versions"]["strategy"]["matrix"]["include"]}
    tried |= set(re.findall(r"^torch==(\S+)$", read("constraints.txt"), re.MULTILINE))
    (named,) = re.findall(r"torch ((?:[\d.]+, )+[\d.]+ and [\d.]+);", read("README.md"))
    versions = re.split(r", | and ", named)
    assert {".".join(version.split(".")[:2]) for version in versions} == {".".join(version.split(".")[:2]) for version in tried}


def test_commands_of_the_pages_exist() -> None:
    """Each `make` target, and each file that Python or torchrun is given."""
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        fenced = "".join(re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
        commands = re.findall(r"^(?:make|python|torchrun) .*$", fenced, re.MULTILINE)
        commands += re.findall(r"`(make [a-z][^`\n]*|python [^`\n]*)`", text)
        for command in commands:
            if command.startswith("make "):
                assert command.split()[1] in targets, (page.name, command)
            for script in re.findall(r"(?:^|\s)((?:tests|benchmarks|examples)/[\w/]+\.py)", command):
                assert (ROOT / script).exists(), (page.name, command)
