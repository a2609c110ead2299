"""The wheel alone, in a clean environment: every module imports and dump-ir runs."""

import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent

IMPORT_ALL = """
import importlib, pkgutil, stagecut
names = [m.name for m in pkgutil.walk_packages(stagecut.__path__, "stagecut.")]
for name in names:
    importlib.import_module(name)
print(stagecut.__file__, len(names))
"""


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def test_wheel_alone(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", cwd=ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    home = tmp_path / "env"
    run(sys.executable, "-m", "venv", "--without-pip", home)
    site = next((home / "lib").iterdir()) / "site-packages"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel)
    # torch and the other dependencies come from the environment the tests run in, stagecut does not: it is not in that folder
    env = {**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"], "PYTHONSAFEPATH": "1"}
    python = home / "bin" / "python"
    where, count = run(python, "-c", IMPORT_ALL, env=env, cwd=tmp_path).split()
    assert where.startswith(str(site))
    folders = [(d, (ROOT / d).rglob("*.py")) for d in ("ir", "passes", "frontend", "backend", "tools", "stagecut")]
    sources = [
        p for d, paths in folders for p in paths if (d != "stagecut" or p.parent.name == "stagecut") and p.parent.name != "bench"
    ]  # others are links
    assert int(count) == len(sources) - 1  # all but stagecut/__init__.py
    shown = run(python, "-m", "stagecut.tools.dump_ir", f"{ROOT}/examples/net.py:make", env=env, cwd=tmp_path)
    assert shown.startswith("program @Net phase=linked stages=3")
    assert (site / "stagecut" / "py.typed").exists()
    assert (site / "stagecut" / "backend" / "page" / "main.js").exists()


def test_console_script_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"dump-ir": "stagecut.tools.dump_ir.main:main"}
