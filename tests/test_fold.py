"""A block that is traced once for all its calls gives the program that tracing each call gives, letter for letter.

The key of equality is a table; each of its parts has a model here that a mutant without that part gets wrong.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from repeated import BLOCKS, DIFFERENCES, WIDTH, Block, Made, Modes, model_of, outcome
from torch import Tensor, nn

from stagecut import pipeline
from stagecut.frontend.capture.capture import capture
from stagecut.frontend.fold import body, calls, reads, repeats, values
from stagecut.frontend.marks import AGAIN
from stagecut.ir.text.printer import text

COUNT, ODD = 5, (3,)
"""How many blocks there are, and which differ: the third call of a kind is the first that is not traced."""


def both(difference: str, block: Made = Block, training: bool = True, count: int = COUNT, odd: Sequence[int] = ODD) -> list[Any]:
    """What comes out with fold, and without."""
    change = DIFFERENCES[difference]
    inputs = (torch.ones(4, WIDTH),)
    leaves = [path for k in odd for path in change.leaf(k)]
    return [outcome(model_of(block, count, odd, change, training), inputs, fold, leaves) for fold in (True, False)]


def repeated_calls(model: nn.Module, *args: Any) -> int:
    """How many calls of a model are not traced by themselves."""
    exported, _ = capture(model, args, {}, fold=True)
    return sum(AGAIN in node.meta for node in exported.graph.nodes)


@given(
    st.sampled_from([*DIFFERENCES]),
    st.sampled_from(BLOCKS),
    st.booleans(),
    st.integers(3, 6),
    st.integers(0, 5),
)
def test_fold_changes_no_letter(difference: str, block: Made, training: bool, count: int, k: int) -> None:
    folded, whole = both(difference, block, training, count, [k % count])
    assert folded == whole


@pytest.mark.parametrize(
    ("difference", "block", "wanted"),
    [("nothing", Block, 3), ("nothing", Modes, 3), ("class", Block, 1), ("literal", Block, 1), ("all called twice", Block, 5)],
)
def test_equal_calls_are_traced_twice(difference: str, block: Made, wanted: int) -> None:
    model = model_of(block, COUNT, [2], DIFFERENCES[difference], training=False)
    model.stem.requires_grad_(True)
    assert repeated_calls(model, torch.ones(4, WIDTH)) == wanted


# --- mutants ----------------------------------------------------------------------------------------------


def changes(monkeypatch: pytest.MonkeyPatch, difference: str, training: bool = True) -> bool:
    """True where the model comes out otherwise than it is, or not at all."""
    try:
        folded, whole = both(difference, training=training, count=COUNT + 2, odd=(3, 4, 5))
    except Exception:
        return True
    return bool(folded != whole)


PARTS = {
    "classes": "torch's class",
    "training": "training of a part",
    "state names": "other names",
    "state shapes": "shape",
    "state dtypes": "dtype",
    "state devices": "state device",
    "state strides": "strides",
    "state requires_grad": "requires_grad",
    "calls before": "called again",
    "structure of inputs": "place",
    "literals": "value",
    "input shapes": "input shape",
    "input dtypes": "input dtype",
    "input devices": "input device",
    "input strides": "input strides",
    "input requires_grad": "input requires_grad",
    "aliases": "same input",
    "facts of inputs": "dropout before",
    "autocast": "autocast",
    "settings": "default dtype",
    "modes": "function mode",
    "trace": "asked grad",
}


@pytest.mark.parametrize("part", PARTS)
def test_a_key_without_this_part_is_noticed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not changes(monkeypatch, PARTS[part])
    monkeypatch.delitem(calls.PARTS, part)
    assert changes(monkeypatch, PARTS[part])


REFUSALS = {
    "hooks": "hook",
    "objects": "an object",
    "containers": "own container",
    "own lookup": "hidden",
    "own flags": "flag set",
    "odd tensors": "a tensor of nobody's",
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_call_that_is_not_refused_is_noticed(refusal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not changes(monkeypatch, REFUSALS[refusal])
    monkeypatch.delitem(calls.REFUSALS, refusal)
    assert changes(monkeypatch, REFUSALS[refusal])
