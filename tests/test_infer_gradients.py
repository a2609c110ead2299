"""infer-gradients: which values carry gradient."""

from __future__ import annotations

import pytest
from helpers import Bless, diff_of, leaves_alone, load

from stagecut.ir.gradients import grad_enabled
from stagecut.ir.graph import Context
from stagecut.passes.infer_gradients import InferGradients
from stagecut.passes.version_mutations import VersionMutations


def test_dtypes_contexts_and_cutting_ops(bless: Bless) -> None:
    bless("infer-gradients-gradients.diff", diff_of(InferGradients(), load("gradients")))


def test_a_write_makes_a_version_carry_gradient(bless: Bless) -> None:
    bless("infer-gradients-versions.diff", diff_of(InferGradients(), load("gradients", VersionMutations())))


def test_what_differs_by_mode_carries_gradient_where_one_way_does(bless: Bless) -> None:
    bless("infer-gradients-by-mode.diff", diff_of(InferGradients(), load("by-mode", VersionMutations())))


def test_right_marks_stay() -> None:
    leaves_alone(InferGradients(), load("clean"))


@pytest.mark.parametrize(
    ("kinds", "enabled"),
    [
        ("", True),
        ("no_grad", False),
        ("no_grad enable_grad", True),
        ("enable_grad no_grad", False),
        ("no_grad autocast", False),
        ("autocast", True),
        ("inference_mode enable_grad", False),
        ("enable_grad inference_mode", False),
    ],
)
def test_grad_mode(kinds: str, enabled: bool) -> None:
    assert grad_enabled(tuple(Context(kind) for kind in kinds.split())) is enabled
