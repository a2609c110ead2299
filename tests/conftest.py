"""Golden files: `pytest --bless` rewrites what a test compares with. What was skipped is told, one line a reason."""

from __future__ import annotations

import difflib
import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import torch.distributed as dist

GOLDEN = Path(__file__).parent / "golden"

gc.set_threshold(10_000, 20, 20)  # Python's own would spend an eighth of the time on looking through all that is imported


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one process."""
    place = Path(tmp_path_factory.mktemp("store")) / "meet"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--bless`."""
    parser.addoption("--bless", action="store_true", help="rewrite the golden files with what the tests see now")


def pytest_collection_finish() -> None:
    """What is imported by now stays, and is not looked through for garbage again."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints how many tests were skipped for each reason."""
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", ()))
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"skipped {count}: {reason}")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the cache of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAGECUT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _new_cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds in the cache what another has left there."""
    name = sha256(request.node.nodeid.encode()).hexdigest()
    monkeypatch.setenv("STAGECUT_CACHE", str(Path(os.environ["STAGECUT_CACHE"]) / name))


@pytest.fixture
def bless(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """bless(name, actual): `actual` is what tests/golden/<name> holds; with --bless it is from now on."""

    def compare(name: str, actual: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--bless"):
            path.write_text(actual, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(f"golden/{name} does not exist; `pytest --bless` writes it", pytrace=False)
        expected = path.read_text(encoding="utf-8")
        if actual != expected:
            lines = difflib.unified_diff(expected.splitlines(), actual.splitlines(), f"golden/{name}", "now", lineterm="")
            pytest.fail("\n".join(lines), pytrace=False)

    return compare
