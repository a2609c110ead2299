""".ci/run: what it runs sees a bare machine, whatever the machine has; its result is that of the tests."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HIDDEN = ("dot", "graphviz-pure", "chromium", "chromium-browser", "google-chrome", "chrome", "cc", "gcc", "g++", "clang", "node", "npm")
MAKE = f"""#!/bin/sh
for program in {" ".join(HIDDEN)}; do
    command -v $program && exit 3
done
for word in "$@"; do
    case $word in PYTHON=*) ${{word#PYTHON=}} -c 'import venv' || exit 4;; esac
done
command -v python3 git sh >/dev/null || exit 5
cat && echo "$1 in $PWD"
[ "$1" != "$FAILING" ] || exit 2
"""
"""Says what it was asked for, with an error for a program that should be hidden and for one that is missing."""


@pytest.mark.parametrize(
    ("failing", "asked", "status"),
    [
        ("nothing", ["test", "docs", "test-torch", "test-torch"], 0),
        ("test", ["test"], 2),
        ("test-torch", ["test", "docs", "test-torch", "test-torch"], 2),
    ],
)
def test_what_a_machine_has_is_hidden(failing: str, asked: list[str], status: int, tmp_path: Path) -> None:
    for name in (*HIDDEN, "make"):
        (tmp_path / name).write_text(MAKE if name == "make" else "#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "left").mkdir()
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path / "left"), "FAILING": failing}
    done = subprocess.run([ROOT / ".ci" / "run"], capture_output=True, text=True, check=False, env=environment, cwd=tempfile.gettempdir())
    assert (done.stdout, done.returncode) == ("".join(f"{target} in {ROOT}\n" for target in asked), status), done.stderr
    assert not list((tmp_path / "left").iterdir())
