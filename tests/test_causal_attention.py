"""causal-attention: attention whose mask is exactly the causal one asks for that, and has no mask."""

from __future__ import annotations

import pytest
import torch
from helpers import Bless, diff_of, leaves_alone, load
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

from stagecut import pipeline
from stagecut.ir.graph import CAUSAL, OPEN
from stagecut.ir.run.attention import Masks, mask_kind
from stagecut.ir.run.bindings import Bindings
from stagecut.passes.causal_attention import CausalAttention


def test_masks_that_are_proved(bless: Bless) -> None:
    program = load("attention")
    bless("causal-attention.diff", diff_of(CausalAttention(Masks(program, Bindings()).kind), program))


def test_nothing_is_known_without_torch() -> None:
    leaves_alone(CausalAttention(), load("attention"))


def test_staged_program_stays() -> None:
    leaves_alone(CausalAttention(lambda *_: CAUSAL), load("shared"))


def _past(size: int) -> torch.Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("hidden", [float("-inf"), "least"])
def test_masks_that_are_added(dtype: torch.dtype, hidden: float | str) -> None:
    least = torch.finfo(dtype).min if hidden == "least" else hidden
    mask = torch.zeros(4, 4, dtype=dtype).masked_fill(~_past(4), least)
    assert mask_kind(mask, 4, 4) == CAUSAL
    assert mask_kind(mask / 4, 4, 4) == (CAUSAL if hidden == float("-inf") else None)
    assert mask_kind(torch.zeros(1, 4, dtype=dtype), 4, 4) == OPEN


@given(st.integers(1, 6), st.integers(1, 6), st.randoms())
def test_a_kind_is_given_only_where_attention_is_the_same(queries: int, keys: int, random: object) -> None:
    draw = getattr(random, "random")  # noqa: B009
    mask = torch.tensor([[column <= row or draw() < 0.05 for column in range(keys)] for row in range(queries)])
    kind = mask_kind(mask, queries, keys)
    query, key, value = torch.randn(queries, 8), torch.randn(keys, 8), torch.randn(keys, 8)
    if kind is not None:
        without = F.scaled_dot_product_attention(query, key, value, is_causal=kind == CAUSAL)
        torch.testing.assert_close(without, F.scaled_dot_product_attention(query, key, value, mask))
    assert (kind is None) == (not mask.all() and not (queries == keys and torch.equal(mask, _past(keys))))


class Attends(nn.Module):
    """A model that makes its own mask of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        mask = torch.full((5, 5), float("-inf")).triu(1)
        y = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        return self.outer(F.scaled_dot_product_attention(y, x, x, attn_mask=mask))


def test_the_mask_and_what_makes_it_are_gone() -> None:
    pipe = pipeline(Attends(), (torch.randn(2, 1, 5, 8),), stages=2, check="gradients")
    assert not [op for op in pipe.program.all_ops() if op.target.split(".")[1] in ("full", "triu")]
    assert [note for note in pipe.notes if "hides just the future" in note and "test_causal_attention.py" in note]


def test_a_graph_module_is_rewritten_too() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    mask = graph.call_function(torch.tril, (graph.call_function(torch.ones, (5, 5), {"dtype": torch.bool}),))
    graph.output(graph.call_function(F.scaled_dot_product_attention, (x, x, x), {"attn_mask": mask}))
    pipe = pipeline(fx.GraphModule({}, graph), (torch.randn(2, 1, 5, 8),))
    (attention,) = pipe.program.all_ops()
    assert attention.kwargs == {"attn_mask": None, "is_causal": True}


def test_a_result_that_would_lie_otherwise_keeps_its_mask() -> None:
    program = load("attention")
    masks = Masks(program, Bindings())
    attention = next(op for op in program.ops if "attention" in op.target)
    query, key, value, mask = attention.args
    assert masks.kind(mask, query, key, value, attention.results[0]) == CAUSAL
    assert masks.kind(mask, query, key, value, next(v for v in program.inputs if v.hint == "given")) is None
