"""The fuzzer of texts and saved pipes: it finds what is planted, and finds nothing else."""

from __future__ import annotations

import os
import random
import time
from itertools import count
from pathlib import Path
from typing import NoReturn

import pytest
from fuzz import text as fuzz_text
from fuzz.judge import FAILED, PASSED, REFUSED, quiet
from fuzz.text import CASES, DAMAGES, TooSlow, damaged, fuzz, judge_text, limits, main, outcome, shrink

from stagecut.ir.text.printer import text

SOURCE = (CASES / "linked.ir").read_text(encoding="utf-8")


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> None:
    quiet()


def test_six_hundred_inputs_hold() -> None:
    report = fuzz(range(600), 2026, 0)
    assert report.programs == 600
    assert not report.failures, str(report)
    assert report.kinds[PASSED] > 10
    assert report.kinds[REFUSED] > 300


def test_a_seed_makes_the_same_inputs_again() -> None:
    one, again = ([damaged(random.Random(f"7 {i}"), SOURCE, SOURCE) for i in range(20)] for _ in range(2))
    assert one == again
    assert len(set(one)) > 15


@pytest.mark.parametrize("damage", DAMAGES[:-1], ids=lambda d: d.__name__)
def test_every_damage_changes_something(damage: fuzz_text.Damage) -> None:
    assert len({damage(random.Random(i), SOURCE, SOURCE[::-1]) for i in range(20)} - {SOURCE}) > 5


def test_undamaged_texts_are_right() -> None:
    judged = {path.stem: judge_text(path.read_text(encoding="utf-8")) for path in CASES.glob("*.ir")}
    assert judged.pop("pictures") == REFUSED  # its names are what a picture must survive, not what a model may have
    assert set(judged.values()) == {PASSED}


def test_another_error_is_a_failure_and_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: str) -> NoReturn:
        raise KeyError("a") if "relay" in source else AssertionError

    monkeypatch.setattr(fuzz_text, "parse", broken)
    kind, signature = outcome(lambda: judge_text(SOURCE))
    assert kind == FAILED
    assert signature.startswith("KeyError")
    assert shrink(SOURCE, signature) == "relay"


def test_text_that_does_not_print_back_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    serial = count()
    monkeypatch.setattr(fuzz_text, "text", lambda program: f"{text(program)}# {next(serial)}")
    kind, signature = outcome(lambda: judge_text(SOURCE))
    assert kind == FAILED
    assert "does not print back" in signature


def test_hang_is_a_failure() -> None:
    with pytest.raises(TooSlow), limits(seconds=0.2):
        time.sleep(5)


def test_memory_is_bounded() -> None:
    with pytest.raises(MemoryError), limits(memory=64 << 20):
        bytearray(1 << 30)


@pytest.mark.parametrize("step", [lambda folder: os.system("true"), lambda folder: (folder / "x").write_text("x")])
def test_what_reading_must_not_do_is_a_failure(step: object, tmp_path: Path) -> None:
    kind, signature = outcome(lambda: str(step(tmp_path)))  # type: ignore[operator]
    assert kind == FAILED
    assert signature.startswith("Escaped")
    assert not list(tmp_path.iterdir())


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--inputs", "20", "--jobs", "0", "--start", "40"]) == 0
    assert capsys.readouterr().out.startswith("20 inputs in")
    assert not capsys.readouterr().err
