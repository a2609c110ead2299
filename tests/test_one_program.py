"""The program is the same in every process: texts, code, notes and errors, letter for letter, whatever hashes and addresses are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fuzz.draw import called
from fuzz.judge import programs
from fuzz.plans import ModelPlan
from hypothesis import given
from hypothesis import strategies as st

from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import fingerprint

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2026)


class Processes:
    """Cut what they are told, each with hashes and in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._running = [self._start(folder / str(seed), seed) for seed in SEEDS]

    def _start(self, folder: Path, seed: int) -> subprocess.Popen[str]:
        folder.mkdir()
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "tests" / "one_program.py")]
        return subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answers(self, question: dict[str, Any]) -> list[str]:
        """What each of them says, all at work at the same time."""
        for process in self._running:
            assert process.stdin is not None
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
        return [json.loads(process.stdout.readline()) for process in self._running if process.stdout is not None]

    def stop(self) -> None:
        """None is left."""
        for process in self._running:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Those that this module asks."""
    started = Processes(tmp_path_factory.mktemp("folders"))
    yield started
    started.stop()


def same(processes: Processes, question: dict[str, Any]) -> str:
    """What all of them say."""
    first, *others = processes.answers(question)
    for other in others:
        assert other == first
    return first


@pytest.mark.parametrize("whole", [[], ["model.rotary_emb"]])
def test_a_llama_is_one_program(processes: Processes, whole: list[str]) -> None:
    answer = same(processes, {"name": "LlamaForCausalLM", "whole": whole})
    assert "stages=2" in answer
    assert ("module.model.rotary_emb(" in answer) == bool(whole)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "MixtralForCausalLM"])
def test_an_architecture_is_one_program(processes: Processes, name: str) -> None:
    assert "stages=2" in same(processes, {"name": name, "whole": []})


def test_the_buffers_that_a_module_kept_whole_writes_stand_in_the_order_of_the_module(processes: Processes) -> None:
    answer = same(processes, {"name": "Counted", "whole": []})
    (line,) = (line for line in answer.splitlines() if "= module.whole(" in line)
    written = line.partition(" writes(")[2]
    assert [part.split(" -> ")[0] for part in written.partition(")")[0].split(", ")] == [
        f"@whole.{name}" for name in ("total", "largest", "smallest", "first", "last", "count")
    ]


def test_assigned_buffers_are_written_in_one_order(processes: Processes) -> None:
    assert "aten.copy_.default(@total" in same(processes, {"name": "Assigned", "whole": []})


@pytest.mark.parametrize(("name", "what"), [("Grown", "forward assigns the buffer 'total'"), ("Regions", "inside a checkpointed region")])
def test_of_several_faults_the_same_one_is_told(processes: Processes, name: str, what: str) -> None:
    assert what in same(processes, {"name": name, "whole": []})


@given(plan=programs(graphs=0.25), whole=st.booleans())
def test_a_drawn_model_is_one_program(processes: Processes, plan: ModelPlan, whole: bool) -> None:
    """With some of its modules kept whole, or as it is."""
    same(processes, {"plan": repr(replace(plan, whole=tuple(called(plan))) if whole else plan)})


@pytest.mark.parametrize("index", range(12))
def test_a_model_of_the_fuzzer_is_one_program(processes: Processes, index: int) -> None:
    same(processes, {"name": f"fuzz 14 {index}", "whole": []})


PROGRAM = """
program @Net phase=traced {
  file net.py "/here/net.py"
  input %x : f32[4]@cuda:0
  %ones = aten.ones.default([4], device=device("cuda:0")) : f32[4]@cuda:0 with autocast("cuda", torch.bfloat16, True, True) at net.py:3
  %t = aten.as_strided.default(%x, [2, 2], [1, 2]) : f32[2,2]{1,2}@cuda:0 view(%x) at net.py:4
  output (%ones, %t,)
}
"""


@pytest.mark.parametrize(
    ("old", "new", "alike"),
    [
        ("cuda:0", "cuda:7", True),
        ("@cuda:0", "", True),
        ("/here/", "/elsewhere/on/another/machine/", True),
        ("net.py:4", "net.py:5", False),
        ("{1,2}", "{2,1}", False),
        ("aten.ones", "aten.zeros", False),
    ],
)
def test_neither_devices_nor_folders_are_part_of_what_ranks_compare(old: str, new: str, alike: bool) -> None:
    changed = PROGRAM.replace(old, new)
    assert changed != PROGRAM
    assert (fingerprint(parse(changed)) == fingerprint(parse(PROGRAM))) == alike
