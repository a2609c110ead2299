"""Models that failed once, found by trying architectures in the wild: each is right now, or refused by name."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import fx, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F

from stagecut import Pipe, SplitPoint, load, pipe_split, pipeline
from stagecut.backend.ranks.mailbox import Mailbox
from stagecut.ir.errors import CaptureError, InputError, StagecutError

CUT = {"b": SplitPoint.BEGINNING}
X = torch.linspace(-1, 1, 8).view(2, 4)


class Net(nn.Module):
    """Two layers; `run` is the forward."""

    def __init__(self, run: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.a, self.b, self.run = nn.Linear(4, 4), nn.Linear(4, 4), run

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, x)


class Times(torch.autograd.Function):
    """A product of which nothing flows back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: Any) -> torch.Tensor:
        return x * factor

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None


def equal_literals_of_other_types(self: Net, x: torch.Tensor) -> Any:
    counts = torch.ones(2, dtype=torch.int64)
    return self.b(self.a(x)), Times.apply(counts, 1), Times.apply(counts, 1.0), Times.apply(counts, True)


def a_distribution(self: Net, x: torch.Tensor) -> Any:
    hidden = self.a(x)
    return self.b(torch.distributions.Normal(hidden, hidden.exp()).rsample())


def a_distribution_with_its_own_backward(self: Net, x: torch.Tensor) -> Any:
    hidden = F.softplus(self.a(x)) + 0.1
    return self.b(torch.distributions.Beta(hidden, hidden).rsample())


def checks_that_only_raise(self: Net, x: torch.Tensor) -> Any:
    if x.max() > 100:
        raise ValueError("too large")
    if not (x > -100).all():
        raise ValueError("too small")
    return self.b(self.a(x))


def hooks_installed_by_the_first_call(self: Net, x: torch.Tensor) -> Any:
    if not getattr(self, "installed", False):
        for layer in (self.a, self.b):
            layer.register_forward_hook(lambda module, given, made: SEEN[-1].append(made))
        self.installed = True
    SEEN.append([])
    try:
        x = self.b(self.a(x))
    finally:
        seen = SEEN.pop()
    return x, tuple(seen)


SEEN: list[Any] = []


@pytest.mark.parametrize(
    "run",
    [equal_literals_of_other_types, a_distribution, a_distribution_with_its_own_backward, checks_that_only_raise],
    ids=lambda run: run.__name__,
)
def test_right(run: Any) -> None:
    assert pipeline(Net(run), (X,), split_spec=CUT, check="gradients").num_stages == 2


def test_hooks_of_the_first_call_are_not_left_behind() -> None:
    model = Net(hooks_installed_by_the_first_call)
    assert pipeline(model, (X,), split_spec=CUT).num_stages == 2
    assert len(model(X)[1]) == 2


def test_ctc_loss_with_lengths_in_tensors() -> None:
    targets, lengths, sizes = torch.randint(1, 4, (2, 3)), torch.tensor([8, 8]), torch.tensor([3, 2])
    model = Net(lambda self, x: F.ctc_loss(self.b(self.a(x)).log_softmax(-1), targets, lengths, sizes))
    assert pipeline(model, (torch.randn(8, 2, 4),), split_spec=CUT, check="gradients").num_stages == 2


def test_sparse_gradients_are_compared() -> None:
    model = Net(lambda self, x: self.b(self.bag(x)))
    model.bag = nn.EmbeddingBag(10, 4, sparse=True, mode="sum")
    assert pipeline(model, (torch.randint(0, 10, (2, 3)),), split_spec=CUT, check="gradients").num_stages == 2


def test_torch_s_fast_paths_without_gradients() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
            self.b = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor, pad: torch.Tensor) -> Any:
            return self.b(self.a(x, src_key_padding_mask=pad))

    pad = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    assert pipeline(Encoder().eval(), (torch.randn(2, 5, 8), pad), split_spec=CUT).num_stages == 2


def test_a_copy_that_computes_with_the_original_is_not_compared() -> None:
    model = Net(lambda self, x: self.b(self.twice(x)))
    layer = model.a
    model.twice = lambda x: layer(x) * 2
    pipe = pipeline(model, (X,), split_spec=CUT)
    assert "of the original" in pipe.notes[-1]
    assert all(p.grad is None for p in model.parameters())


def _submodule_replaced(self: Net, x: torch.Tensor) -> Any:
    x = self.b(self.act(self.a(x)))
    self.act = nn.ReLU()
    return x


def _functional_gradient(self: Net, x: torch.Tensor) -> Any:
    x = self.a(x)
    return self.b(x + torch.func.grad(lambda y: y.pow(3).sum())(x.detach()))


@pytest.mark.parametrize(("run", "why"), [(_submodule_replaced, "act"), (_functional_gradient, r"torch\.func\.grad")])
def test_refused(run: Any, why: str) -> None:
    model = Net(run)
    model.act = nn.GELU()
    with pytest.raises(CaptureError, match=why) as caught:
        pipeline(model, (X,), split_spec=CUT, check=None)
    assert caught.value.where
    assert caught.value.hint
    assert isinstance(model.act, nn.GELU)


class _Cached(nn.Module):
    """Makes its table in the first call and reads it in all later ones."""

    def __init__(self) -> None:
        super().__init__()
        self.table: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.arange(x.shape[-1], dtype=x.dtype)
        return x + self.table


def test_a_cache_beside_hooks_of_the_first_call_is_kept_whole() -> None:
    model = Net(lambda self, x: hooks_installed_by_the_first_call(self, self.cached(x)))
    model.cached = _Cached()
    pipe = pipeline(model, (X,), split_spec=CUT)
    assert pipe.num_stages == 2
    assert not pipe.notes or "'cached'" in pipe.notes[0]


def test_a_constant_that_only_an_unread_op_reads() -> None:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.constant.detach()
        return self.b(self.a(x)) * self.constant

    model = Net(run)
    model.constant = torch.tensor([1.0, 2.0, 0.5, -1.0])
    pipe = pipeline(model, (X,), split_spec=CUT)
    assert torch.equal(pipe(X)[0], model(X))
    assert pipe.verify(X).ok


def test_an_op_that_writes_what_it_is_told_returns_that() -> None:
    class Out(nn.Module):
        def forward(self, x: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                torch.add(x, into.squeeze(), out=into)
            return into.flip(-1)

    into = torch.zeros(2, 4, requires_grad=True)
    program = pipeline(Out(), (X, into), check=None).program
    add = next(op for op in program.all_ops() if op.target == "aten.add.out")
    assert add.effects.views == add.effects.writes
    assert getattr(add.results[0].type, "grad", False)


def same_across_processes(model: nn.Module, x: torch.Tensor, **options: Any) -> Pipe:
    """The pipe of a model, whose stages give the same as separate processes would run them."""
    pipe = pipeline(model, (x.clone(),), **options)
    assert torch.equal(Mailbox(pipe.program, pipe.stages).forward([x.clone()])[0], model(x.clone()))
    return pipe


def test_a_write_into_a_received_part_of_a_tensor_finds_the_strides_it_knows() -> None:
    """torch refuses to write a dense tensor from a part of itself, and does not look where the tensor is no dense one."""

    class Part(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            part = torch.cat([x, x], -1)[:, 2:6]
            pipe_split()
            part[torch.tensor([0, 1])] = part[:2]
            return part

    model, x = Part(), torch.randn(7, 4)
    pipe = pipeline(model, (x,))
    assert torch.equal(Mailbox(pipe.program, pipe.stages).forward([x])[0], model(x))


def test_an_input_is_written_from_a_part_of_itself_that_was_taken_in_another_stage() -> None:
    """What is read while it is written shares its storage, as in the model: torch does not look where a tensor is no dense one."""

    class Part(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            row = x[0]
            pipe_split()
            x.add_(row)
            return x * 1

    same_across_processes(Part(), torch.randn(4, 7).t(), check=None)


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_out_that_is_a_view_of_another_size_is_refused() -> None:
    """torch makes it a view of that size, over what lies behind it in the tensor it is a view of."""

    class Over(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            part = x[:, :2]
            pipe_split()
            torch.add(x, x, out=part)
            return part

    with pytest.raises(CaptureError, match="out=, a tensor of another size") as caught:
        pipeline(Over(), (torch.randn(7, 4),))
    assert "test_hunted.py" in caught.value.where


def test_what_is_broadcast_to_its_own_shape_is_itself() -> None:
    """A loss does it to what it compares; a view taken anew behind the cut would read what was written before."""

    class Compared(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            y = x + 0.5
            F.mse_loss(x, y)
            y.addcmul_(y, y, value=0.5)
            pipe_split()
            part = (x * y).sum(1)
            x.copy_(y)
            return part

    pipe = same_across_processes(Compared(), torch.randn(7, 4))
    assert not any("broadcast" in op.target for op in pipe.program.all_ops())


def test_a_view_that_lends_its_shape_to_a_view_of_it_is_taken_anew_too() -> None:
    class Spread(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            turned = x.t()
            wide = turned[..., :1].expand_as(turned)
            x[:, :2] = x[:, 2:] * 2
            pipe_split()
            x[:, :2] = x[:, 2:] * 3
            return wide.clone()

    same_across_processes(Spread(), torch.randn(7, 4))


def test_a_view_that_is_read_for_nothing_may_be_written_as_in_the_model() -> None:
    """torch refuses to write a view whose base was given a gradient since, unless somebody read the view in between."""

    class Stale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.randn(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            turned = x.t()
            x[0] = self.p * 2
            torch.sigmoid(turned)
            turned.mul_(0.5)
            return self.p * 3

    model, x = Stale(), torch.randn(7, 4)
    assert torch.equal(pipeline(model, (x.clone(),)).module()(x.clone()), model(x.clone()))


class _Assigns(nn.Module):
    """Gives a buffer a new tensor, while the old one goes on being read or written under another name."""

    def __init__(self, run: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.arange(4.0))
        self.run = run

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, x)


def _old_one_returned(self: Any, x: torch.Tensor) -> torch.Tensor:
    old = self.mean.float()
    self.mean = self.mean * 0.5 + x.mean(0)
    return old


def _old_one_written_and_returned(self: Any, x: torch.Tensor) -> torch.Tensor:
    old = nn.functional.relu_(self.mean)
    self.mean = self.mean * 0.5 + x.mean(0)
    return old


def _old_one_written_behind(self: Any, x: torch.Tensor) -> torch.Tensor:
    old = self.mean.flatten()
    self.mean = self.mean * 0.5 + x.mean(0)
    result = self.mean * 2
    old.sigmoid_()
    return result + 1


@pytest.mark.parametrize("run", [_old_one_returned, _old_one_written_and_returned, _old_one_written_behind])
def test_who_read_a_buffer_before_it_was_assigned_keeps_the_old_one(run: Any) -> None:
    model = _Assigns(run)
    assert pipeline(model, (X,)).verify(X).ok


class _Kept(nn.Module):
    """A module kept whole in front of something that knows its size."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return y.sum(0) / y.shape[0] + y.reshape(y.shape[0], -1).mean()


BATCH = {"dynamic_shapes": ({0: torch.export.Dim("batch", min=2)},), "leaf_modules": ["inner"]}


def test_the_size_of_what_a_module_kept_whole_returns_varies_with_the_batch() -> None:
    model = _Kept(nn.Linear(4, 4))
    pipe = pipeline(model, (torch.randn(7, 4),), **BATCH)
    for batch in (7, 5, 2):
        assert pipe.verify(torch.randn(batch, 4)).ok


def test_another_size_than_traced_of_what_a_module_kept_whole_returns_is_refused() -> None:
    class Positive(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x.sum(-1) > 0]

    pipe = pipeline(_Kept(Positive()), (torch.ones(3, 4),), leaf_modules=["inner"])
    with pytest.raises(StagecutError, match=r"'inner' returns is \[0, 4\]; the trace expects \[3, 4\]"):
        pipe(-torch.ones(3, 4))


def test_another_number_of_tensors_than_traced_of_what_a_module_kept_whole_returns_is_refused() -> None:
    """As of a decoder that leaves out layers, and fills no cache for them."""

    class Some(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [x, *[x * 2] * int(x.sum() > 0)]

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.some = Some()

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            made = self.some(x)
            pipe_split()
            return [y + 1 for y in made]

    pipe = pipeline(Outer(), (torch.ones(3, 4),), leaf_modules=["some"])
    with pytest.raises(StagecutError, match="'some' returns 1 tensor in this call; the trace expects 2") as caught:
        pipe(-torch.ones(3, 4))
    assert caught.value.hint


def test_a_size_that_is_the_batch_by_chance_is_refused() -> None:
    class Seven(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_ones(7, x.shape[0])

    pipe = pipeline(_Kept(Seven()), (torch.randn(7, 4),), **BATCH)
    with pytest.raises(StagecutError, match="give the example a batch that is no other size"):
        pipe(torch.randn(5, 4))


def test_of_two_operands_in_one_storage_a_result_is_the_one_in_its_place() -> None:
    """The second result of broadcast_tensors is its second operand, with all its history, though the first shares its storage."""

    class Compared(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.broadcast_tensors(x.detach(), x)
            return x.view(x.shape[0], 2, 2)

    x = torch.randn(3, 4, requires_grad=True)
    pipe = pipeline(Compared(), (x,))
    assert pipe.verify(x).ok
    assert getattr(pipe.program.outputs[0].type, "grad", False)


def test_a_module_kept_whole_that_returns_what_it_is_given_returns_its_strides() -> None:
    x = torch.randn(7, 4)
    model = _Kept(nn.Identity())
    shapes = ({0: torch.export.Dim("batch", min=2)},)

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model.inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(nn.functional.pad(x, (0, 2))[:, 2:])

    pipe = pipeline(Padded(), (x,), dynamic_shapes=shapes, leaf_modules=["inner"])
    assert getattr(pipe.program.outputs[0].type, "strides", None) == (6, 1)
    assert pipe(x)[0].stride() == (6, 1)


def _whole_that_only_a_write_returned(x: torch.Tensor) -> Any:
    written = (x + 1).detach().tanh_()
    flat, other = written.view(-1), written.reshape(-1)
    pipe_split()
    flat.sub_(other)
    return written + written


def _part_that_only_a_write_returned(x: torch.Tensor) -> Any:
    written = (x + 1)[:3].tanh_()
    first, second = written[:2], written[1:3]
    pipe_split()
    first.sub_(second.clone())
    return first + second


def _part_of_a_part_written_in_two_stages(x: torch.Tensor) -> Any:
    written = (x + 1)[:3].tanh_()
    first, second, flat = written[:2], written[1:3], written.view(-1)[2:9]
    first.exp_()
    pipe_split()
    second.mul_(3)
    pipe_split()
    flat.sub_(1)
    return first + second, flat


@pytest.mark.parametrize(
    "run", [_whole_that_only_a_write_returned, _part_that_only_a_write_returned, _part_of_a_part_written_in_two_stages]
)
def test_views_of_what_an_in_place_op_returned_share_its_storage_in_another_stage(run: Any) -> None:
    """The tensor that was written is read by nobody else, so no version of it crosses: views are taken of the op's result."""

    class Written(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return run(x)

    x = torch.arange(16.0).reshape(4, 4)
    pipe = pipeline(Written(), (x,))
    expected = run(x)
    found = Mailbox(pipe.program, pipe.stages).forward([x])
    for one, other in zip(expected if isinstance(expected, tuple) else (expected,), found, strict=True):
        assert torch.equal(one, other)


def test_what_is_returned_twice_is_not_computed_again() -> None:
    """A view of a tensor, and the tensor, are one storage for the caller too."""

    class Ones(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            ones = torch.ones(4, 4)
            x = x + 1
            pipe_split()
            return x, ones.t(), ones

    x = torch.randn(4, 4)
    _, turned, ones = pipeline(Ones(), (x,))(x)
    assert turned.untyped_storage().data_ptr() == ones.untyped_storage().data_ptr()


class _Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(self.weight)


@pytest.mark.parametrize("read_too", [False, True])
def test_what_a_module_kept_whole_writes_and_returns_carries_its_gradient(read_too: bool) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.last = _Scales(), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 1
            y = self.scale(x)
            pipe_split()
            return self.last(y) + x if read_too else self.last(y)  # type: ignore[no-any-return]

    model, x = Scaled(), torch.randn(3, 4)
    pipe = pipeline(model, (x,), leaf_modules=["scale"])
    model(x).sum().backward()
    box = Mailbox(pipe.program, pipe.stages)
    box.forward([x])[0].sum().backward()
    box.backward()
    found = box.gradients()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad)


WRAPPED = {
    "torch.compile": lambda: torch.compile(nn.Linear(4, 4), backend="eager"),
    "checkpoint_wrapper": lambda: checkpoint_wrapper(nn.Linear(4, 4)),
    "torch.jit.script": lambda: torch.jit.script(nn.Linear(4, 4)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_was_wrapped_before_the_cut_is_stored_under_the_names_of_the_model(name: str, tmp_path: Path) -> None:
    """A pipe loads the model's state dict and gives the same again, also when it was saved, or materialized from that."""
    model = Net(lambda self, x: self.b(self.c(self.a(x))))
    model.c = WRAPPED[name]()
    pipe = pipeline(model, (X,), split_spec=CUT)
    other = {key: torch.full_like(tensor, 0.5) for key, tensor in model.state_dict().items()}
    pipe.load_state_dict(other)
    pipe.materialize([0, 1], values=other)
    pipes = [pipe]
    if name != "torch.jit.script":  # that one is kept whole, which no file holds
        pipe.save(tmp_path / "saved")
        pipes.append(load(tmp_path / "saved"))
    for found in pipes:
        assert list(found.state_dict()) == list(other)
        assert all(torch.equal(found.state_dict()[key], tensor) for key, tensor in other.items())


def test_a_model_on_meta_with_a_checkpointed_module_becomes_real_from_a_plain_checkpoint(tmp_path: Path) -> None:
    """The checkpoint has the names of the state dict, without the wrapper."""
    with torch.device("meta"):
        model = Net(lambda self, x: self.b(self.c(self.a(x))))
        model.c = checkpoint_wrapper(nn.Linear(4, 4))
    pipe = pipeline(model, (X.to("meta"),), split_spec=CUT)
    values = {key: torch.full(tensor.shape, 0.5) for key, tensor in model.state_dict().items()}
    save_file(values, tmp_path / "model.safetensors")
    pipe.materialize([0, 1], tmp_path)
    assert torch.equal(pipe.state_dict()["c.weight"], values["c.weight"])


@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, X)], ids=["script", "trace"])
def test_a_model_that_torch_jit_compiled_is_refused(make: Any) -> None:
    model = make(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    with pytest.raises(InputError, match="no Python forward to trace") as caught:
        pipeline(model, (X,))
    assert "Sequential" in caught.value.where
    assert "the nn.Module that it was made of" in caught.value.hint


def test_a_lazy_module_is_to_be_called_first() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU())
    with pytest.raises(InputError, match=r"'0\.weight' has no size") as caught:
        pipeline(model, (X,))
    assert "'0'" in caught.value.where
    assert "call the model once" in caught.value.hint
    model(X)
    assert pipeline(model, (X,)).num_stages == 1


class EntersNothing(nn.Module):
    """Enters an object that is no context."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self)  # type: ignore[arg-type]
        return x


def test_no_error_names_a_line_of_the_standard_library() -> None:
    """What fails inside contextlib fails on behalf of the model."""
    with pytest.raises(CaptureError) as caught:
        pipeline(EntersNothing(), (X,))
    assert "test_hunted.py" in caught.value.where
    assert "contextlib" not in caught.value.where


@pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning")
def test_a_quantized_layer_is_kept_whole_by_itself() -> None:
    """Its weights are packed by torch.jit: no trace looks into them."""
    model = nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(4, 4), nn.ReLU())
    pipe = pipeline(model, (X,))
    assert [op.target for op in pipe.program.all_ops() if op.is_users] == ["module.0"]
    torch.testing.assert_close(pipe(X)[0], model(X), rtol=0, atol=0)


class Quiet(nn.Module):
    """A dropout that is off, where no gradient is recorded: it returns the very tensor, with all its history."""

    def __init__(self, drop: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.drop(x, 0.5, self.training)
        pipe_split()
        return x * 2


@pytest.mark.parametrize("drop", [F.dropout, F.alpha_dropout, F.feature_alpha_dropout, F.dropout1d])
def test_a_dropout_that_is_off_under_no_grad_keeps_the_gradient(drop: Callable[..., torch.Tensor]) -> None:
    given = X.view(2, 4, 1).clone().requires_grad_() if drop is F.dropout1d else X.clone().requires_grad_()
    pipe = pipeline(Quiet(drop).eval(), (given,), check=None)
    for box in (Mailbox(pipe.program, pipe.stages), None):
        given.grad = None
        if box is None:
            pipe.module()(given).sum().backward()
        else:
            box.forward([given])[0].sum().backward()
            box.backward()
            given.grad = box.input_gradients()[0]
        assert torch.equal(given.grad, torch.full_like(given, 2.0))


class Heads(nn.Module):
    """A dropout of a part of a wider tensor, laid out anew behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.drop = nn.Linear(4, 12), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> Any:
        made = self.qkv(x)
        q, k = made[:, :4], made[:, 4:8]
        pipe_split()
        q = self.drop(q)
        laid = q.contiguous()
        return laid.view(-1, 2), q[:1].contiguous().view(-1), q, k


@pytest.mark.parametrize("training", [True, False])
def test_what_a_dropout_that_is_off_returns_is_laid_out_anew(training: bool) -> None:
    """In a trace what a dropout returns lies in order already; in a run without it, it is a part of a wider tensor."""
    model = Heads().train(training)
    pipe = pipeline(model, (X,))
    for mode in (training, not training):
        model.train(mode), pipe.train(mode)
        runs = []
        for run in (model, pipe.module()):
            torch.manual_seed(1)
            runs.append(run(X))
        for one, other in zip(*runs, strict=True):
            assert torch.equal(one, other)
        places = [[t.untyped_storage().data_ptr() for t in found] for found in runs]
        assert [place.index(p) for place in places for p in place][:4] == [place.index(p) for place in places for p in place][4:]
        assert torch.equal(Mailbox(pipe.program, pipe.stages).forward([X])[0].isfinite().all(), torch.tensor(True))


def test_what_is_written_into_a_dropout_that_is_off_is_laid_out_anew() -> None:
    class Written(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            made = x * 2
            part = F.dropout(made[:, 2:], 0.5, self.training)
            part.add_(1)
            return part.contiguous(), made

    laid, made = pipeline(Written().eval(), (X,))(X)
    assert laid.untyped_storage().data_ptr() != made.untyped_storage().data_ptr()


def test_a_write_into_what_backward_needs_is_explained() -> None:
    """Where what a module kept whole made carries none, the model may write what its backward would need."""

    class Sorts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sort(-1).values

    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sorts = Sorts()

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            made = self.sorts(x)
            pipe_split()
            y.copy_(made)
            product = made * y
            y.clamp_(max=0.5)
            return product * 2

    model, inputs = Copies(), (torch.randn(3, 4), torch.randn(3, 4))
    pipe = pipeline(model, inputs, leaf_modules=["sorts"], check=None)
    box = Mailbox(pipe.program, pipe.stages)
    out = box.forward([*inputs])[0]
    out.sum().backward()
    with pytest.raises(StagecutError, match="stage 1 writes in a way that torch refuses"):
        box.backward()


class Spreads(nn.Module):
    """Writes what it is given, and returns a view of it in which every element of a row is its first."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2)[..., :1].expand_as(x)


class Reads(nn.Module):
    def __init__(self, out: bool) -> None:
        super().__init__()
        self.spreads, self.out = Spreads(), out

    def forward(self, x: torch.Tensor) -> Any:
        spread = self.spreads(x)
        pipe_split()
        if self.out:
            x.add_(1)
        return spread * 3, x


def test_a_view_that_a_module_kept_whole_returns_of_what_it_wrote_is_not_what_it_wrote() -> None:
    pipe = pipeline(Reads(False), (X.clone(),), leaf_modules=["spreads"])
    for run in (lambda x: pipe(x), lambda x: Mailbox(pipe.program, pipe.stages).forward([x])):
        assert torch.equal(run(X.clone())[0], (X * 6)[:, :1].expand(2, 4))
    with pytest.raises(StagecutError, match=r"stage 1 writes the result of module\.spreads"):
        pipeline(Reads(True), (X.clone(),), leaf_modules=["spreads"])


class Twice(nn.Module):
    """A part that holds a norm, which the model has under a name of its own too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.part = nn.Sequential(self.norm, nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(self.norm(x)) + self.norm.running_mean


class WholeParts(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name == "part" or super().is_leaf_module(m, module_qualified_name)


def test_a_graph_with_a_module_of_two_names_is_left_as_it_was() -> None:
    """The run on fakes left one in it."""
    model = Twice()
    module = fx.GraphModule(model, WholeParts().trace(model))
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    pipeline(module, (X,), check=None)
    for name, tensor in module.state_dict().items():
        assert type(tensor) is torch.Tensor, name
        assert torch.equal(tensor, state[name]), name


class Inner(nn.Module):
    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(x) * 2


class Sharing(nn.Module):
    """Two modules with one part; the first is kept whole, the second traced through: a graph names the part by its place in the first."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.part, self.other = Inner(shared), Inner(shared)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.part(x)) + self.part.shared[0].bias


def test_a_graph_that_keeps_a_module_whole_and_runs_a_part_of_it() -> None:
    model = Sharing()
    module = fx.GraphModule(model, WholeParts().trace(model))
    pipe = pipeline(module, (X,), split_policy=lambda program: [1], check="gradients")
    assert pipe.num_stages == 2
    assert torch.equal(Mailbox(pipe.program, pipe.stages).forward([X])[0], model(X))


class Dunder(nn.Module):
    """A tensor that is no proxy is indexed and written by one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("index", torch.tensor([2, 1, 0, 3]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = torch.arange(4.0)
        table[self.mask] = 2.0
        return x + table + torch.arange(4.0)[self.index]


class WithBuffers(fx.Tracer):
    proxy_buffer_attributes = True


def test_operators_that_a_graph_has_as_methods() -> None:
    model = Dunder()
    module = fx.GraphModule(model, WithBuffers().trace(model))
    assert {"__setitem__", "__getitem__"} <= {node.target for node in module.graph.nodes}
    pipe = pipeline(module, (X,), split_policy=lambda program: [2])
    assert {"operator.setitem", "operator.getitem"} <= {op.target for op in pipe.program.all_ops()}


class WritesTwice(nn.Module):
    """An input that is a view, written through another view and then itself. What is read between has torch bring it up to date."""

    def __init__(self, read: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.read = read

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y[:, 1] += x[:, 0]
        self.read(y)
        y.mul_(0.5)
        return y


@pytest.mark.parametrize("read", [lambda y: y.double(), lambda y: torch.complex(y.float(), y.float())])
@pytest.mark.parametrize("graph", [True, False])
def test_an_input_that_is_a_view_is_read_between_two_writes(graph: bool, read: Callable[[torch.Tensor], Any]) -> None:
    """Without that, torch takes it for a leaf that requires grad, in the model too. float() of floats is the view itself."""
    model = WritesTwice(read)
    given = lambda: (torch.ones(3, 4).requires_grad_(), torch.ones(4, 3).t())
    pipe = pipeline(fx.GraphModule(model, Assigning().trace(model)) if graph else model, given(), check=None)
    assert torch.equal(pipe(*given())[0], model(*given()))


class Assigns(fx.Proxy):
    def __setitem__(self, key: Any, item: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, item), {})


class Assigning(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Assigns(node, self)


class Forgets(nn.Module):
    """Writes what it is given, and returns it without its history."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = x.detach()
        made.fill_(0.25)
        return made


def test_what_a_module_kept_whole_writes_and_returns_detached_is_refused() -> None:
    """A stage behind it took what was written for what was returned, and sent a gradient back."""
    model = Net(lambda self, x: self.forgets(self.a(x)) * self.b(x))
    model.forgets = Forgets()
    with pytest.raises(CaptureError, match="'forgets' is kept whole and returns what it writes as a tensor of another history") as caught:
        pipeline(model, (X,), leaf_modules=["forgets"])
    assert "test_hunted.py" in caught.value.where


class Dropping(nn.Module):
    """A dropout, which in a graph is a module kept whole."""

    def __init__(self, run: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.drop, self.run = nn.Dropout(0.5), run

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, x)


def gradient_under_no_grad(self: Dropping, x: torch.Tensor) -> Any:
    with torch.no_grad():
        x = self.drop(x)
    return x.clamp(-1, 1)


def written_in_the_stage_that_drops(self: Dropping, x: torch.Tensor) -> Any:
    x = x * 1
    y = self.drop(x)
    view = y.view(4, 2)
    x.add_(1)
    return view * 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("run", [gradient_under_no_grad, written_in_the_stage_that_drops])
def test_a_dropout_of_a_graph_may_return_what_it_is_given(run: Callable[[Any, Any], Any], training: bool) -> None:
    """In the mode in which it was traced, and in the other one."""
    graph = fx.symbolic_trace(Dropping(run).train(training))
    pipe = pipeline(graph, (X.clone().requires_grad_(),))
    for mode in (training, not training):
        x, twin = X.clone().requires_grad_(), X.clone().requires_grad_()
        torch.manual_seed(0)
        expected = graph.train(mode)(x)
        torch.manual_seed(0)
        (found,) = pipe.train(mode)(twin)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert found.requires_grad == expected.requires_grad
        for tensor in (expected, found):
            if tensor.requires_grad:
                tensor.sum().backward()
        torch.testing.assert_close(twin.grad, x.grad, rtol=0, atol=0)


def written_across(self: Dropping, x: torch.Tensor) -> Any:
    y = self.drop(x)
    view = y.view(4, 2)
    x.add_(y)
    return view * 1


def test_a_write_of_what_a_dropout_may_have_returned_stays_in_its_stage() -> None:
    """In one process both modes are right; across processes the cut is refused."""
    graph = fx.symbolic_trace(Dropping(written_across))
    pipe = pipeline(graph, (X.clone(),))
    for mode in (False, True):
        torch.manual_seed(0)
        expected = graph.train(mode)(X.clone())
        torch.manual_seed(0)
        torch.testing.assert_close(pipe.train(mode)(X.clone())[0], expected, rtol=0, atol=0)
    for cut in range(1, 4):
        with pytest.raises(StagecutError, match="may or may not be the tensor it was given") if cut < 3 else nullcontext():
            pipeline(graph.train(), (X.clone(),), split_policy=lambda program, cut=cut: [cut])


@pytest.mark.parametrize("training", [True, False])
def test_a_dropout_kept_whole_may_return_what_it_is_given(training: bool) -> None:
    """Who writes that, and reads in another stage what it returned, sees the write when it is off."""

    def run(self: Dropping, x: torch.Tensor) -> Any:
        x = x * 1
        y = self.drop(x)
        x.add_(1)
        pipe_split()
        return y * x

    model = Dropping(run).train(training)
    pipe = pipeline(model, (X.clone(),), leaf_modules=["drop"])
    for mode in (training, not training):
        box = Mailbox(pipe.program, pipe.train(mode).stages)
        for forward in (lambda: pipe(X.clone())[0], lambda box=box: box.forward([X.clone()])[0]):
            torch.manual_seed(0)
            expected = model.train(mode)(X.clone())
            torch.manual_seed(0)
            torch.testing.assert_close(forward(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_a_dropout_kept_whole_under_no_grad_may_return_a_part_with_its_history(training: bool) -> None:
    """In a trace of train mode its result lies in order; off, it returns the part of a wider tensor that it was given."""

    def run(self: Dropping, x: torch.Tensor) -> Any:
        part = x[:, :2]
        with torch.no_grad():
            return self.drop(part)

    model = Dropping(run)
    pipe = pipeline(model.train(training), (X.clone().requires_grad_(),), leaf_modules=["drop"])
    assert model.eval()(X.clone().requires_grad_()).grad_fn is not None
    assert [value.type.grad for value in pipe.program.outputs] == [True]


def test_a_graph_that_assigns_an_element_writes_only_what_it_assigns_to() -> None:
    """What it reads there may lie in the same memory, without a history."""

    def run(self: Dropping, x: torch.Tensor) -> Any:
        x = x * 3
        y = x.detach()
        x[0] = y[1]
        return y + 1, x

    pipe = pipeline(fx.GraphModule(nn.Module(), Assigning().trace(Dropping(run))), (X.clone().requires_grad_(),))
    assert [value.type.grad for value in pipe.program.outputs] == [False, True]


class Resizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k = torch.ones(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.add(x, x, out=self.k)
        return self.k + self.k


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_out_of_another_size_is_refused() -> None:
    """A trace would take the old size for that of the result."""
    with pytest.raises(CaptureError, match="writes its result to out=, a tensor of another size"):
        pipeline(Resizes(), (X,))


def test_what_is_written_into_a_detached_tensor_carries_gradient_to_the_next_stage() -> None:
    """A detach taken anew in that stage would lose it."""

    class Detached(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            x = x.detach()
            x[0].copy_(y[0])
            pipe_split()
            F.relu(x, inplace=True)
            return x.tanh() * x

    x, y = X.clone(), X.clone().requires_grad_()
    pipe = pipeline(Detached(), (x, y))
    box = Mailbox(pipe.program, pipe.stages)
    found = box.forward([X.clone(), y])[0]
    torch.testing.assert_close(found, Detached()(X.clone(), y), rtol=0, atol=0)
    (found * 1).sum().backward()
    box.backward()
    (expected,) = torch.autograd.grad(Detached()(X.clone(), y).sum(), y)
    torch.testing.assert_close(box.input_gradients()[1], expected, rtol=0, atol=0)


class Assigned(nn.Module):
    """A buffer that is written and then assigned, with a view of what it was before."""

    mean: torch.Tensor

    def __init__(self, is_returned: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(4))
        self.is_returned = is_returned

    def forward(self, x: torch.Tensor) -> Any:
        view = self.mean[:2]
        self.mean.mul_(0.5)
        early = view * 2
        old = self.mean
        self.mean = self.mean + x.mean(0)
        pipe_split()
        return x + 1, early, old * 3, self.mean * 1, *([view] * self.is_returned)


def test_a_view_of_a_buffer_from_before_it_was_written_and_assigned_is_refused() -> None:
    """It sees the tensor that the name had; the stages have one tensor for the name. Views that are not used later do not matter."""
    pipe = pipeline(Assigned(False), (X,))
    twin, mine = Assigned(False), pipe.module()
    for _ in range(3):
        for one, other in zip(mine(X), twin(X), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(pipe.get_buffer("mean"), twin.mean)
    with pytest.raises(CaptureError, match=r"'mean' is written in place and then assigned, and %slice.*, a view from before"):
        pipeline(Assigned(True), (X,))
