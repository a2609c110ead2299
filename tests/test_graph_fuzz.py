"""Random models run by graphs do what their stages do under autograd."""

from __future__ import annotations

from typing import Any

import pytest
from fuzz.judge import FAILED, draw, judge, quiet
from fuzz.run import BY_GRAPHS, Job, Silent, fuzz

from stagecut.backend.stages.graphs import Split

SEED, PROGRAMS = 2027, 24


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> None:
    quiet()


def test_random_models_get_the_gradients_of_autograd() -> None:
    report = fuzz(range(PROGRAMS), Job(SEED, only="backward"), 0, Silent())
    assert not report.failures, str(report)
    assert report.backwards[BY_GRAPHS] > PROGRAMS / 2


def test_a_gradient_that_is_wrong_in_its_last_bit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = Split.backward_weight

    def wrong(self: Split, needed: Any) -> Any:
        return [result * (1 + 3e-16) for result in compute(self, needed)]

    monkeypatch.setattr(Split, "backward_weight", wrong)
    verdicts = [judge(draw(SEED, index)[0], deep=True, only="backward") for index in range(6)]
    failed = [verdict.signature for verdict in verdicts if verdict.kind == FAILED]
    assert failed
    assert all(signature.startswith("backward: gradient of") for signature in failed)
