"""mailbox: stages that share nothing but what is sent."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from compare import assert_same, snapshot
from edge import buffer, linear, t, weight
from torch import nn

from stagecut import Pipe, StagecutError, pipe_split, pipeline
from stagecut.backend.ranks import mailbox
from stagecut.backend.ranks.mailbox import Mailbox
from stagecut.backend.stages.crossing import refuse_feedback, written_inputs
from stagecut.ir.text.parser import parse

X = t(4, 4)


def boxed(model: nn.Module, *args: Any, **options: Any) -> tuple[Pipe, Mailbox]:
    """The pipe of a model, and its stages in boxes."""
    pipe = pipeline(model, args, **options)
    return pipe, Mailbox(pipe.program, pipe.stages)


# --- what crosses ---------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": X,
    "transposed": X.T,
    "a column": X[:, 1],
    "every other": X[::2, 1::2],
    "expanded": X[:1].expand(3, 4, 4),
    "one element expanded": t(1).expand(5, 2),
    "a scalar": X[0, 0],
    "empty": X[:0],
    "complex": torch.complex(X, X + 1),
    "numbers": torch.arange(6).view(2, 3),
    "channels last": t(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "sparse": X.to_sparse(),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_tensor_arrives_with_its_values_and_strides_in_storage_of_its_own(name: str) -> None:
    sent = LAYOUTS[name]
    arrived = mailbox._post(sent, grad=False)
    assert torch.equal(arrived.to_dense(), sent.to_dense())
    assert (arrived.dtype, arrived.layout) == (sent.dtype, sent.layout)
    if sent.layout is torch.strided:
        assert arrived.stride() == sent.stride()
        assert arrived.untyped_storage()._cdata != sent.untyped_storage()._cdata


@pytest.mark.parametrize("grad", [True, False])
def test_a_tensor_arrives_without_history(grad: bool) -> None:
    """It is a leaf, and carries gradient when it is told to."""
    arrived = mailbox._post(X.clone().requires_grad_() * 2, grad)
    assert arrived.is_leaf
    assert arrived.requires_grad is grad


@pytest.mark.parametrize("item", [3, 2.5, True, "text", None, (1, 2)])
def test_what_is_no_tensor_arrives_as_it_is(item: Any) -> None:
    assert mailbox._post(item, True) is item


class Sizes(nn.Module):
    """Sends a size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0] * 2
        y = x * 2
        pipe_split()
        return y.sum(0) * n


def test_a_size_crosses_as_a_number() -> None:
    """Another size than traced, another number."""
    rows = torch.export.Dim("rows", min=2, max=64)
    pipe, box = boxed(Sizes(), X, dynamic_shapes={"x": {0: rows}})
    for count in (4, 7):
        x = t(count, 4)
        assert_same(box.forward(pipe.flatten((x,), {}))[0], Sizes()(x), "the result")


# --- nothing is shared ----------------------------------------------------------------------------------


class Net(nn.Module):
    """A tied layer, a layer that is used once, a frozen one, one nobody uses, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.frozen, self.idle = linear(), linear(), linear().requires_grad_(False), linear()
        self.b.weight = self.a.weight
        self.steps = buffer(value=0.0)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.a(x) + y
        self.steps.add_(1)
        pipe_split()
        z = self.frozen(x).relu() * y
        pipe_split()
        return self.b(z), x, y, x


def test_the_model_and_the_pipe_are_left_alone() -> None:
    """Their tensors, gradients and inputs stay; the boxes have others of the same names and values."""
    model = Net()
    before = snapshot(model)
    pipe, box = boxed(model, X, X + 1)
    own = {tensor.untyped_storage()._cdata for tensor in model.state_dict().values()}
    assert not own & {tensor.untyped_storage()._cdata for tensor in box.state().values()}
    assert box.state().keys() == model.state_dict().keys()
    x = X.clone().requires_grad_()
    outputs = box.forward([x, X + 1])
    torch.stack([o.sum() for o in outputs if o.requires_grad]).sum().backward()
    box.backward()
    assert_same(snapshot(model), before, "the model")
    assert all(p.grad is None for p in (*model.parameters(), *pipe.parameters()))
    assert x.grad is None
    assert box.state()["steps"].item() == 1


def test_outputs_are_leaves_but_for_inputs_that_are_returned() -> None:
    """An input comes back as the very tensor that was given; what is returned twice is one value, posted twice."""
    _, box = boxed(Net(), X, X + 1)
    y = (X + 1).requires_grad_()
    outputs = box.forward([X, y])
    assert all(o.is_leaf and o.requires_grad for o in outputs)
    assert outputs[2] is y
    assert outputs[1] is not outputs[3]
    assert torch.equal(outputs[1], outputs[3])


def test_written_inputs_are_the_boxes_own() -> None:
    """What a stage writes in place stays unwritten for the others and for the caller."""

    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            pipe_split()
            y.add_(1)
            return y

    _, box = boxed(Writes(), X)
    x = X.clone().requires_grad_()
    assert_same(box.forward([x])[0].detach(), X * 2 + 1, "the result")
    assert torch.equal(x, X)


# --- backward -------------------------------------------------------------------------------------------


def test_gradients_by_the_models_names() -> None:
    """Replicas are summed under every name; frozen and unused parameters have none; inputs sum over stages and returns."""
    model = Net()
    pipe, box = boxed(model, X, X + 1)
    twin = deepcopy(model)
    args = [X.clone().requires_grad_(), (X + 1).requires_grad_()]
    theirs = [a.detach().clone().requires_grad_() for a in args]
    for outputs in (box.forward(pipe.flatten(args, {})), twin(*theirs)):
        torch.stack([(o * (i + 1)).sum() for i, o in enumerate(outputs)]).sum().backward()
    box.backward()
    found = box.gradients()
    assert found.keys() == dict(model.named_parameters(remove_duplicate=False)).keys()
    assert found["a.weight"] is found["b.weight"]
    assert [n for n, g in found.items() if g is None] == ["frozen.weight", "frozen.bias", "idle.weight", "idle.bias"]
    assert_same(found, {n: p.grad for n, p in twin.named_parameters(remove_duplicate=False)}, "gradients")
    assert_same(box.input_gradients(), [a.grad for a in theirs], "gradients of inputs")


def test_gradients_accumulate_over_calls() -> None:
    """As they do in the model: two micro-batches."""
    model = Net()
    pipe, box = boxed(model, X, X + 1)
    twin = deepcopy(model)
    for step in range(2):
        box.forward(pipe.flatten((X + step, X), {}))[0].sum().backward()
        box.backward()
        twin(X + step, X)[0].sum().backward()
    assert_same(box.gradients(), {n: p.grad for n, p in twin.named_parameters(remove_duplicate=False)}, "gradients")
    assert box.state()["steps"].item() == twin.steps.item() == 2


def test_backward_without_a_loss_does_nothing() -> None:
    _, box = boxed(Net(), X, X + 1)
    box.forward([X, X + 1])
    box.backward()
    assert set(box.gradients().values()) == {None}
    assert box.input_gradients() == [None, None]


def test_what_was_cut_off_gets_no_gradient() -> None:
    """A detached value and a whole number cross without."""

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = weight()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x @ self.w
            index = y.argmax(1)
            y = y.detach()
            pipe_split()
            return y[index] * self.w

    pipe, box = boxed(Cut(), X)
    outputs = box.forward(pipe.flatten((X,), {}))
    outputs[0].sum().backward()
    box.backward()
    assert [x.requires_grad for x in box._received[1]] == [False] * len(box._received[1])
    grad = box.gradients()["w"]
    assert grad is not None
    assert_same(grad, (X @ pipe.get_parameter("w")).detach()[(X @ pipe.get_parameter("w")).argmax(1)], "gradient of w")


# --- state that flows backward --------------------------------------------------------------------------


class Late(nn.Module):
    """Reads a buffer in the first stage and writes it in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.b = buffer(4, value=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.b
        pipe_split()
        self.b.add_(1)
        return y * 2


def test_state_that_flows_backward_is_refused() -> None:
    """With the name of the buffer, the lines and a remedy; one process runs the pipe all the same."""
    pipe = pipeline(Late(), (X,))
    with pytest.raises(StagecutError, match=r"'b' is written in one stage and read or written in another") as caught:
        Mailbox(pipe.program, pipe.stages)
    assert caught.value.where.count("test_mailbox.py:") == 2
    assert "several cannot" in caught.value.hint
    refuse_feedback(pipeline(Net(), (X, X + 1)).program)


class Norms(nn.Module):
    """One BatchNorm in two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        pipe_split()
        return self.norm(x)  # type: ignore[no-any-return]


def test_statistics_flow_backward_only_in_training() -> None:
    """Built in eval mode it runs, until it is switched."""
    model = Norms()
    pipe = pipeline(model, (X,))
    with pytest.raises(StagecutError, match=r"'norm\.running_mean'"):
        Mailbox(pipe.program, pipe.stages)
    pipe.eval()
    box = Mailbox(pipe.program, pipe.stages)
    assert_same(box.forward([X])[0].detach(), model.eval()(X).detach(), "the result")
    box._stages[0].train()
    with pytest.raises(StagecutError, match="stale copy"):
        box.forward([X])


# --- which inputs a stage writes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ops", "written"),
    [
        ("%a = aten.neg.default(%x) : f32[4]", []),
        ("aten.add_.Tensor(%x, 1) writes(%x)", ["x"]),
        ("aten.add_.Tensor(%x, %y) writes(%x -> %x.1)\n %a = aten.neg.default(%x.1) : f32[4]", ["x"]),
        ("%v = aten.slice.Tensor(%y, 0, 0, 2) : f32[2] view(%y)\n aten.add_.Tensor(%v, %x) writes(%v)", ["y"]),
        ("%v = aten.alias.default(%y) : f32[4] view(%y)\n %u = aten.neg.default(%v) : f32[4]\n aten.neg_.default(%u) writes(%u)", []),
        ("aten.neg_.default(%x) writes(%x -> %x.1)\n %v = aten.view.default(%x.1, [4]) : f32[4] view(%x.1)\n"
         " aten.add_.Tensor(%v, %y) writes(%v)", ["x"]),
        ("%v, %u = aten.unbind.int(%y) : f32[], f32[] views(%y, -)\n aten.add_.Tensor(%u, %x) writes(%u)", []),
        ("torch.ops.my.both.default(%x, %y) writes(%x, %y)", ["x", "y"]),
    ],
)  # fmt: skip
def test_written_inputs(ops: str, written: list[str]) -> None:
    """Directly, through a view, through a version; not through a copy."""
    program = parse(f"program @P phase=partitioned {{\n input %x : f32[4]\n input %y : f32[4]\n stage 0 {{\n {ops}\n }}\n output ()\n}}")
    block = program.stages[0]
    block.inputs = program.inputs
    assert sorted(v.hint for v in written_inputs(block)) == written


class Masks(nn.Module):
    """A module kept whole that makes a mask: from outside nobody sees that no gradient flows through."""

    def __init__(self) -> None:
        super().__init__()
        self.masked, self.lin = MaskOf(), linear(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = self.masked(x)
        pipe_split()
        mask.chunk(2, -1)[0].sub_(1)
        return self.lin(x) * mask  # type: ignore[no-any-return]


class MaskOf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = linear(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.lin(x) > 0).double()


def test_torch_s_refusal_to_write_one_of_several_views_is_explained() -> None:
    """One process runs it; across processes the mask carries gradient, and torch refuses the write."""
    model = Masks()  # the pipe does not keep it alive
    pipe, box = boxed(model, X, leaf_modules=["masked"])
    assert pipe.verify(X).ok
    with pytest.raises(StagecutError, match="stage 1 writes in a way that torch refuses") as caught:
        box.forward([X])
    assert "detach() it behind the module" in caught.value.hint
    assert any(str(frame.path).startswith("<stagecut Masks") for frame in caught.traceback)
