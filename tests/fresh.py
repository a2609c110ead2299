"""Runs of dump-ir in processes that have imported torch and the compiler, and nothing of the user's."""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple


class Shown(NamedTuple):
    """Whether the model was traced, what was printed, and the exit status."""

    traced: bool
    text: str
    status: int


class Fresh:
    """Forks a process for each run from one that waits here."""

    def __enter__(self) -> Fresh:
        self._waiting = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._waiting.communicate()

    def run(self, *argv: str, path: str = "", before: str = "") -> Shown:
        """One run in the working directory and with the variables of this process. Imports look at `path` too; `before` is run first."""
        assert self._waiting.stdin is not None
        assert self._waiting.stdout is not None
        order = {"argv": argv, "folder": os.getcwd(), "variables": dict(os.environ), "path": path, "before": before}
        self._waiting.stdin.write(json.dumps(order) + "\n")
        self._waiting.stdin.flush()
        return Shown(*json.loads(self._waiting.stdout.readline()))


def _wait() -> None:
    """Runs what standard input asks for, each in a process of its own."""
    import stagecut.tools.dump_ir.main  # before torch: it notes where imports look

    import torch  # noqa: F401  isort: skip
    import stagecut.pipe  # noqa: F401  isort: skip

    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                shown = _run(**json.loads(line))
            except BaseException:
                shown = Shown(False, traceback.format_exc(), -1)
            sys.stdout.write(json.dumps(shown) + "\n")
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)


def _run(argv: list[str], folder: str, variables: dict[str, str], path: str, before: str) -> Shown:
    from stagecut.tools.dump_ir import session
    from stagecut.tools.dump_ir.main import main
    from stagecut.tools.dump_ir.variables import unnoted

    os.chdir(folder)
    with unnoted():
        os.environ.clear()
        os.environ.update(variables)
    sys.path.extend([path] if path else [])
    exec(before, {})
    traced: list[Any] = []
    load = session.load

    def counting(options: Any) -> Any:
        traced.append(options)
        return load(options)

    session.load = counting
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        status = main(argv)
    return Shown(bool(traced), output.getvalue(), status)


if __name__ == "__main__":
    _wait()
