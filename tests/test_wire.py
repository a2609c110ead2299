"""What crosses between neighbours: every layout and dtype comes back as it was, and boundaries list what is needed behind them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stagecut import Pipe, StagecutError, parse, pipe_split, pipeline
from stagecut.backend.ranks.mailbox import Mailbox
from stagecut.backend.ranks.wire import boundaries, port
from stagecut.backend.stages.crossing import backward_is_whole
from stagecut.frontend.lower.types import tensor_type
from stagecut.ir.graph import Value
from stagecut.ir.types import OBJECT, ScalarType, TensorType

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8]


@given(st.data())
def test_a_tensor_comes_back_as_it_was(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 3), max_size=4))
    tensor = (torch.randn(shape) * 4).to(data.draw(st.sampled_from(DTYPES)))
    if data.draw(st.booleans()):
        tensor = tensor.permute(data.draw(st.permutations(range(len(shape)))))
    if data.draw(st.booleans()):
        tensor = tensor.unsqueeze(0).expand(2, *tensor.shape)
    p = port(Value(tensor_type(tensor), "x"), {})
    sent = p.pack(tensor, CPU)
    assert sent.is_contiguous()
    assert (sent.shape, sent.dtype) == (p.meta().shape, p.meta().dtype)
    assert not sent._is_view()
    back = p.unpack(sent)
    assert (back.shape, back.dtype) == (tensor.shape, tensor.dtype)
    if tensor.numel():
        assert [s for s, n in zip(back.stride(), back.shape, strict=True) if n > 1] == [
            s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1
        ]
    assert torch.equal(_bits(back), _bits(tensor))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.element_size() == 1 else tensor


@pytest.mark.parametrize("item", [3, -(2**40), True, False, 0.1])
def test_a_number_comes_back_as_it_was(item: Any) -> None:
    p = port(Value(ScalarType(type(item).__name__, "u0"), "n"), {})
    back = p.unpack(p.pack(item, CPU))
    assert type(back) is type(item)
    assert back == item


def test_gradients_pass_both_ways_and_are_contiguous() -> None:
    base = torch.randn(3, 4, requires_grad=True)
    value = base.t().expand(2, 4, 3)
    p = port(Value(TensorType("f32", (2, 4, 3), tuple(value.stride()), grad=True), "x"), {})
    sent = p.pack(value, CPU)
    leaf = sent.detach().requires_grad_()
    (p.unpack(leaf) * torch.arange(24.0).view(2, 4, 3)).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.is_contiguous()
    sent.backward(leaf.grad)
    expected = torch.arange(24.0).view(2, 4, 3).sum(0).t()
    assert torch.equal(base.grad, expected)  # type: ignore[arg-type]


def test_what_carries_no_gradient_has_no_history() -> None:
    tensor = torch.randn(3, requires_grad=True) * 2
    p = port(Value(TensorType("f32", (3,)), "x"), {})
    assert not p.pack(tensor, CPU).requires_grad


def test_symbolic_sizes_are_numbers_of_this_call() -> None:
    value = Value(TensorType("f32", ("s0", "2*s0 + 1")), "x")
    assert port(value, {"s0": 3}).wire_shape == (3, 7)


@pytest.mark.parametrize(("kind", "why"), [(OBJECT, "no tensor"), (TensorType("f32", ("u0",)), "depends on data")])
def test_what_cannot_cross_is_refused(kind: Any, why: str) -> None:
    with pytest.raises(StagecutError, match=why) as caught:
        port(Value(kind, "x"), {})
    assert caught.value.hint


@pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning")
def test_a_quantized_tensor_is_refused_when_it_is_sent() -> None:
    """Its trace is that of a tensor of floats, so no port tells."""

    class Quantized(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            y = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
            pipe_split()
            return y.dequantize() * 2

    pipe = pipeline(Quantized(), (torch.ones(2),))
    assert pipe(torch.ones(2))[0].tolist() == [2.0, 2.0]
    (crossing,) = pipe.program.stages[1].inputs
    sends = (lambda: Mailbox(pipe.program, pipe.stages).forward([torch.ones(2)]), lambda: pack_one(pipe, crossing))
    for send in sends:
        with pytest.raises(StagecutError, match=r"cannot cross to another process: it is quantized \(torch.qint8\)") as caught:
            send()
        assert "test_wire.py:" in caught.value.where
        assert "cut where it does not cross" in caught.value.hint


def pack_one(pipe: Pipe, value: Value) -> None:
    """What the first stage sends, as a port packs it."""
    port(value, {}).pack(pipe.stages[0](torch.ones(2)), torch.device("cpu"))


PROGRAM = """program @Skip phase=linked stages=3 {
  input %x : f32[2] grad
  input %m : f32[2]
  state @w : param f32[2] grad stages(0)
  stage 0 (%x) -> (%a, %b) {
    holds @w
    %a = aten.mul.Tensor(%x, @w) : f32[2] grad
    %b = aten.neg.default(%a) : f32[2] grad
  }
  stage 1 (%b) -> (%c) {
    %c = aten.relu.default(%b) : f32[2] grad
  }
  stage 2 (%m, %a, %c) -> (%d) {
    %d = aten.add.Tensor(%a, %c) : f32[2] grad
    %e = aten.mul.Tensor(%m, 2) : f32[2]
  }
  transfer %x : input -> 0 feed
  transfer %b : 0 -> 1 send
  transfer %m : input -> 2 feed
  transfer %a : 0 -> 2 relay(1)
  transfer %c : 1 -> 2 send
  output (%d, %b, %x)
}
"""


def test_boundaries_carry_what_is_needed_behind_them() -> None:
    program = parse(PROGRAM)
    names = [[v.hint for v in values] for values in boundaries(program, frozenset())]
    assert names == [["x", "m", "a", "b"], ["x", "m", "a", "b", "c"], ["d", "b", "x"]]
    names = [[v.hint for v in values] for values in boundaries(program, frozenset(program.inputs))]
    assert names == [["a", "b"], ["a", "b", "c"], ["d", "b"]]


def test_a_backward_is_split_only_where_every_weight_meets_what_is_received_once() -> None:
    program = parse(PROGRAM)
    first = program.stages[0]
    x, a, b = program.inputs[0], first.ops[0].results[0], first.ops[1].results[0]
    assert not backward_is_whole(first, {x}, {a, b})
    assert backward_is_whole(first, set(), {a, b})
