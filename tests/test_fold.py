"""A block that is traced once for all its calls gives the program that tracing each call gives, letter for letter.

The key of equality is a table; each of its parts has a model here that a mutant without that part gets wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import profiles
import pytest
import torch
import typing_extensions
from hypothesis import given, settings
from hypothesis import strategies as st
from repeated import BLOCKS, DIFFERENCES, WIDTH, Block, Made, Modes, model_of, outcome
from torch import nn

from stagecut import pipeline
from stagecut.frontend.capture.capture import capture
from stagecut.frontend.fold import body, calls, kinds, reads, repeats, values
from stagecut.frontend.marks import AGAIN
from stagecut.frontend.source import is_users_file
from stagecut.ir.text.printer import text
from stagecut.programs import Programs

COUNT, ODD = 5, (3,)
"""How many blocks there are, and which differ: the third call of a kind is the first that is not traced."""


def both(difference: str, block: Made = Block, training: bool = True, count: int = COUNT, odd: Sequence[int] = ODD) -> list[Any]:
    """What comes out with fold, and without."""
    return [one(difference, block, training, count, odd, fold) for fold in (True, False)]


def one(difference: str, block: Made, training: bool, count: int, odd: Sequence[int], fold: bool) -> list[str]:
    """What comes out."""
    change = DIFFERENCES[difference]
    leaves = [path for k in odd for path in change.leaf(k)]
    return outcome(model_of(block, count, odd, change, training), (torch.ones(4, WIDTH),), fold, leaves)


def repeated_calls(model: nn.Module, *args: Any) -> int:
    """How many calls of a model are not traced by themselves."""
    exported, _ = capture(model, args, {}, fold=True)
    return sum(AGAIN in node.meta for node in exported.graph.nodes)


@pytest.mark.timeout(7200 if profiles.DEEP else 600)
@settings(max_examples=2000 if profiles.DEEP else 8)  # each part of the key has a case of its own below
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
    [("nothing", Block, 3), ("nothing", Modes, 3), ("class", Block, 2), ("literal", Block, 2), ("all called twice", Block, 6)],
)
def test_equal_calls_are_traced_twice(difference: str, block: Made, wanted: int) -> None:
    model = model_of(block, COUNT, [2], DIFFERENCES[difference], training=False)
    model.stem.requires_grad_(True)
    assert repeated_calls(model, torch.ones(4, WIDTH)) == wanted


def test_a_type_that_torch_makes_is_no_code_of_a_block() -> None:
    """torch makes the types of an op where it is first called, and `typing` calls this library then."""
    assert not is_users_file(typing_extensions.__file__)


# --- mutants ----------------------------------------------------------------------------------------------


def changes(difference: str) -> bool:
    """True where the program is another one than without fold, or there is none."""
    try:
        return _mutant(difference, fold=True) != _whole(difference)
    except Exception:
        return True


@cache
def _whole(difference: str) -> list[str]:
    """No mutant is part of it: they are all of fold."""
    return _mutant(difference, fold=False)


def _mutant(difference: str, fold: bool) -> list[str]:
    # a flag that forward sets shows where it is what it was
    return one(difference, Block, difference != "flag set", COUNT + 2, (3, 4, 5), fold)


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
    assert not changes(PARTS[part])
    monkeypatch.delitem(calls.PARTS, part)
    assert changes(PARTS[part])


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
    assert not changes(REFUSALS[refusal])
    monkeypatch.delitem(calls.REFUSALS, refusal)
    assert changes(REFUSALS[refusal])


# --- what is noticed after a call ---------------------------------------------------------------------------


def _nothing(*_: Any) -> None:
    """Sees nothing."""


MUTANTS: dict[str, tuple[Any, str, Any, str]] = {
    "reads of attributes": (reads, "_attribute", _nothing, "number"),
    "reads of globals": (reads.Reads, "_variable", _nothing, "global object"),
    "contents of objects": (values.Values, "_of_object", lambda _, part: type(part), "object"),
    "contents of containers": (values.Values, "_composed", lambda _, part: type(part), "list"),
    "objects that have changed since": (values.Shared, "look_again", _nothing, "global object"),
    "attributes of classes": (values.Values, "_of_class", _nothing, "class of a global"),
    "known constants": (repeats.Repeats, "_refuse", _nothing, "constant"),
    "changed containers": (kinds, "_refuse", _nothing, "list given"),
    "tensors that an op returns as they were": (body.Recorder, "_moved", lambda _: [], "used again"),
    "dropouts at the end": (body, "_refuse_questions", _nothing, "dropout at the end"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_net_that_sees_nothing_is_noticed(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, blind, difference = MUTANTS[mutant]
    assert not changes(difference)
    monkeypatch.setattr(owner, name, blind)
    assert changes(difference)


# --- models of transformers, modes, sizes -------------------------------------------------------------------


def test_a_decoder_is_cut_as_without_fold() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, vocab_size=100
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
        inputs = {"input_ids": torch.zeros(2, 8, dtype=torch.long), "use_cache": False}
    folded, whole = (pipeline(model, (), inputs, stages=3, check=None, fold=fold) for fold in (True, False))
    assert text(folded.program) == text(whole.program)
    exported, _ = capture(model, (), inputs, fold=True)
    assert sum(AGAIN in node.meta for node in exported.graph.nodes) == 4


def test_stages_of_a_folded_trace_compute_what_the_model_does() -> None:
    model = model_of(Modes, 6, [4], DIFFERENCES["number"], training=True)
    pipe = pipeline(model, (torch.randn(4, WIDTH),), stages=3, check="gradients")
    assert pipe.num_stages == 3


def test_sizes_that_vary_are_traced_each() -> None:
    model = model_of(Block, 5, [3], DIFFERENCES["nothing"], training=True)
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    folded, whole = (outcome(model, (torch.ones(4, WIDTH),), fold, (), shapes) for fold in (True, False))
    assert folded == whole


@pytest.mark.parametrize("difference", ["keeps", "gradient", "draws from Python"])
def test_a_trace_that_is_compared_with_another_is_whole(difference: str) -> None:
    folded, whole = both(difference, training=False, count=3, odd=[0])
    assert folded == whole


@pytest.mark.parametrize("of_several_calls", [False, True])
def test_a_policy_that_edits_the_graph_is_given_all_of_it(of_several_calls: bool) -> None:
    seen: list[int] = []

    def policy(graph: Any) -> Any:
        seen.append(sum(node.target is torch.ops.aten.layer_norm.default for node in graph.graph.nodes))
        return graph

    model, x = model_of(Block, 5, [], DIFFERENCES["nothing"], training=False), torch.ones(4, WIDTH)
    if of_several_calls:
        Programs(model.requires_grad_(False), None, policy).fitting({"x": x})
    else:
        pipeline(model, (x,), split_policy=policy, check=None)
    assert seen == [5]
