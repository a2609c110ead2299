"""backward="graph": each stage as three functions. What they compute is what autograd computes, bit for bit."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from by_graphs import ByGraphs
from cluster.graphs import (
    compare_each,
    compare_in_autocast,
    compare_models,
    compare_one_by_autograd,
    compare_subject,
    compare_unseeded_and_seeded,
    unfreeze_and_compare,
)
from cluster.matrix import SCHEDULES, cut, on_ranks, stages_of
from cluster.models import SUBJECTS
from cluster.recipes import RECIPES
from torch import nn
from torch.export import Dim
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zoo.cuts import equal_ops

from stagecut import Driver, InputError, Pipe, SplitPoint, pipeline
from stagecut.backend.stages.graphs import Graphs
from stagecut.backend.stages.roles import RoleCode
from stagecut.backend.stages.run import results_of
from stagecut.frontend.capture.joint import joint_graph
from stagecut.frontend.lower.from_joint import lower_joint
from stagecut.ir.graph import Value
from stagecut.passes.roles import skip_views, split

# --- all schedules, two ranks ---------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "stages"), [("ResNet", 2), ("two towers", 4)])
def test_models_get_the_gradients_of_autograd(name: str, stages: int) -> None:
    subject = SUBJECTS[name]
    _, pipe = cut(subject, stages)
    torch.manual_seed(5)
    batches: list[Any] = [((), subject.inputs(8)) for _ in range(2)]
    schedules = [schedule for schedule in SCHEDULES if stages_of(schedule, 2) == stages]
    assert on_ranks(2, compare_subject, pipe, subject, batches, schedules) == [["ok"] * len(schedules)] * 2


def _tied(stages: int, samples: int) -> tuple[Pipe, Any, list[Any]]:
    """A language model whose head has the weight of the embedding, its loss, and two batches."""
    recipe = RECIPES["GPT, tied"]
    torch.manual_seed(3)
    pipe = pipeline(recipe.make().double(), recipe.inputs(2)[0], split_policy=equal_ops(stages), check=None)
    batches = []
    for _ in range(2):
        inputs, target = recipe.inputs(samples)
        batches.append((inputs, {"target": target}))
    return pipe, recipe.loss, batches


def test_a_tied_language_model_gets_the_gradients_of_autograd() -> None:
    schedules = ["Interleaved1F1B", "ZBVZeroBubble"]
    assert on_ranks(2, compare_each, *_tied(4, 8), schedules) == [["ok", "ok"]] * 2


@pytest.mark.parametrize("stages", [4, 8])
def test_four_ranks_get_the_gradients_of_autograd(stages: int) -> None:
    """Under all seven schedules, with a weight that the first and the last rank have, and with dropout."""
    schedules = [schedule for schedule in SCHEDULES if stages_of(schedule, 4) == stages]
    dropped = _pipe(Deep(stages, nn.Dropout(0.15)), stages, torch.randn(2, 6)), F.mse_loss, _batches(16, 6)
    ok = ["ok"] * len(schedules)
    assert on_ranks(4, compare_models, [_tied(stages, 16), dropped], schedules) == [[ok, ok]] * 4


class Relayed(nn.Module):
    """Every layer reads what the first one made, several times over."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x = torch.tanh(self.layers[0](x))
        for layer in self.layers[1:]:
            x = torch.tanh(layer(x * first) + first.sin() - first.exp())
        return x


def test_gradients_of_what_is_handed_on_are_added_in_the_order_of_autograd() -> None:
    torch.manual_seed(0)
    pipe = _pipe(Relayed().double(), 4, torch.randn(2, 8).double())
    batches: list[Any] = [((torch.randn(8, 8).double(),), {"target": torch.randn(8, 8).double()})]
    assert on_ranks(2, compare_each, pipe, F.mse_loss, batches, ["LoopedBFS", "ZBVZeroBubble"]) == [["ok", "ok"]] * 2


def _batches(*shape: int) -> list[Any]:
    torch.manual_seed(5)
    return [((torch.randn(shape),), {"target": torch.randn(shape)}) for _ in range(2)]


def test_dropout_draws_what_it_draws_under_autograd() -> None:
    pipe = _pipe(Deep(4, nn.Dropout(0.5)), 4)
    schedules = ["Interleaved1F1B", "DualPipeV"]
    assert on_ranks(2, compare_unseeded_and_seeded, pipe, F.mse_loss, _batches(16, 6), schedules, ["ZBVZeroBubble"]) == [["ok"] * 3] * 2


def test_autocast_around_the_step_counts() -> None:
    assert on_ranks(2, compare_in_autocast, _pipe(Net()), F.mse_loss, _batches(16, 6), ["1F1B"]) == [["ok"]] * 2


def test_weights_that_are_trained_later_have_gradients_then() -> None:
    assert on_ranks(2, unfreeze_and_compare, _pipe(Net()), F.mse_loss, _batches(16, 6)) == [["ok", "ok"]] * 2


@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_a_micro_batch_without_graphs_loses_no_gradient_of_the_others(schedule: str) -> None:
    stages = stages_of(schedule, 2)
    pipe = _pipe(Deep(stages), stages, dynamic_shapes={"x": {0: Dim("batch")}})
    xs = [torch.randn(size, 6) for size in (4, 2, 4, 4)]
    assert on_ranks(2, compare_one_by_autograd, pipe, F.mse_loss, xs, schedule) == ["ok", "ok"]


# --- one process ----------------------------------------------------------------------------------------


class Run:
    """One forward and backward of a pipe by graphs, and then by autograd, with the same random numbers."""

    def __init__(
        self,
        pipe: Pipe,
        *args: torch.Tensor,
        loss: Callable[..., torch.Tensor] | None = None,
        code: RoleCode | None = None,
        recompute: bool = False,
    ) -> None:
        self.pipe = pipe
        self.code = code or RoleCode()
        self.graphs = [Graphs(pipe, index, self.code, recompute) for index in range(pipe.num_stages)]
        self.loss = loss or (lambda *outputs: sum(output.square().sum() for output in outputs))
        buffers = [buffer.clone() for buffer in pipe.buffers()]
        self.mine = self._run(args, self._stage)
        for buffer, before in zip(pipe.buffers(), buffers, strict=True):
            buffer.copy_(before)
        self.expected = self._run(args, lambda index, inputs: pipe.stages[index](*inputs))

    @property
    def notes(self) -> list[str]:
        return [graphs.note for graphs in self.graphs]

    def check(self) -> Run:
        for mine, expected in zip(self.mine, self.expected, strict=True):
            assert (mine is None) == (expected is None)
            if mine is not None and expected is not None:
                assert torch.equal(mine, expected)
                assert mine.stride() == expected.stride()
                assert mine.dtype == expected.dtype
        return self

    def _stage(self, index: int, inputs: list[Any]) -> Any:
        self.graphs[index].begin(self.pipe.stages[index])
        outputs = self.graphs[index].run(inputs)
        return self.pipe.stages[index](*inputs) if outputs is None else outputs

    def _run(self, args: tuple[torch.Tensor, ...], stage: Callable[[int, list[Any]], Any]) -> list[torch.Tensor | None]:
        self.pipe.zero_grad()
        torch.manual_seed(7)
        given = [arg.detach().clone().requires_grad_(arg.requires_grad) for arg in args]
        values: dict[Value, Any] = dict(zip(self.pipe.program.inputs, given, strict=True))
        for block in self.pipe.program.stages:
            result = stage(block.index, [values[value] for value in block.inputs])
            outputs = result if isinstance(result, tuple) and stage == self._stage else results_of(result, block)
            values |= zip(block.outputs, outputs, strict=True)
        outputs = [values[value] for value in self.pipe.program.outputs]
        self.loss(*outputs).backward()
        for graphs in reversed(self.graphs):
            graphs.take_weights()()
        grads = [parameter.grad for parameter in self.pipe.parameters()]
        return [*outputs, *grads, *(arg.grad for arg in given), *(buffer.clone() for buffer in self.pipe.buffers())]


class Net(nn.Module):
    """Two layers around whatever stands between."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(6, 6), between or nn.Tanh(), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.between(self.first(x)))  # type: ignore[no-any-return]


def _pipe(model: nn.Module, stages: int = 2, x: torch.Tensor | None = None, **options: Any) -> Pipe:
    return pipeline(model, (torch.randn(4, 6) if x is None else x,), split_policy=equal_ops(stages), check=None, **options)


@pytest.mark.parametrize(
    "between",
    [
        nn.SiLU(),
        nn.Mish(),
        nn.Dropout(0.5),
        nn.BatchNorm1d(6),
        nn.LayerNorm(6),
        nn.RMSNorm(6),
        nn.Softmax(-1),
        nn.GELU(),
        nn.Dropout(0.5).eval(),
    ],
    ids=lambda module: f"{type(module).__name__}-{module.training}",
)
def test_one_stage_after_the_other(between: nn.Module) -> None:
    run = Run(_pipe(Net(between)), torch.randn(4, 6)).check()
    assert run.notes == ["", ""]


class Turned(nn.Module):
    """The gradient of an activation has another layout than what it was computed from."""

    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(6, 64), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.linear(x).view(-1, 16, 4)).transpose(1, 2).contiguous() * 2


@pytest.mark.parametrize(
    "act", [F.softplus, F.elu, F.hardswish, F.hardsigmoid, F.hardtanh, F.gelu, F.logsigmoid], ids=lambda act: act.__name__
)
def test_a_gradient_lies_where_its_kernel_puts_it(act: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(2, 6)
    Run(_pipe(Turned(act), 1, x), x).check()


class Called(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class Recurrent(nn.Module):
    """A recurrent net, and a draw after those of its own dropout."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.net, self.drop = kind(6, 6, 2, batch_first=True, dropout=0.15, **options), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.net(x)[0][..., :6])  # type: ignore[no-any-return]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "options", [{"kind": nn.LSTM}, {"kind": nn.LSTM, "bidirectional": True}, {"kind": nn.GRU}, {"kind": nn.RNN}], ids=str
)
def test_recurrent_nets_run_on_the_kernels_of_eager(options: dict[str, Any], recompute: bool) -> None:
    """A trace would compute them step by step, or on a kernel for inference, and skip the dropout between layers in the stream of draws."""
    run = Run(_pipe(Net(Recurrent(**options)), 1, torch.randn(3, 5, 6)), torch.randn(3, 5, 6), recompute=recompute).check()
    assert run.notes == [""]


@pytest.mark.parametrize(
    ("mode", "shape", "size"),
    [
        ("linear", (2, 3, 6), (6,)),
        ("bilinear", (2, 3, 4, 6), (7, 6)),
        ("bicubic", (2, 3, 4, 6), (7, 6)),
        ("trilinear", (1, 2, 3, 4, 6), (5, 7, 6)),
        ("nearest", (2, 3, 4, 6), (7, 6)),
    ],
)
def test_pictures_are_resized_by_the_kernel_of_eager(mode: str, shape: tuple[int, ...], size: tuple[int, ...]) -> None:
    resize = Called(lambda x: F.interpolate(x[..., :-1], size=size, mode=mode))
    assert Run(_pipe(Net(resize), 1, torch.randn(shape)), torch.randn(shape)).check().notes == [""]


@pytest.mark.parametrize("drop", [F.dropout, F.alpha_dropout, F.feature_alpha_dropout])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "laid",
    [
        lambda x: x,
        lambda x: x.transpose(0, 1),
        lambda x: x.transpose(0, 2)[:, ::2],
        lambda x: x.expand(3, *x.shape[1:]) if x.shape[0] == 1 else x[::2],
    ],
    ids=["as it is", "transposed", "every other", "parts"],
)
def test_dropout_draws_for_elements_as_they_lie(drop: Any, inplace: bool, laid: Any) -> None:
    """0.15: one divided by 0.85 is another number in float32 than in double."""

    def dropped(x: torch.Tensor) -> torch.Tensor:
        return x.mean() * drop(laid(x * 2), 0.15, inplace=inplace).sum((0, 1)).sum() + x

    assert Run(_pipe(Net(Called(dropped)), 1, torch.randn(4, 5, 6)), torch.randn(4, 5, 6)).check().notes == [""]


def test_an_input_that_requires_grad_gets_one() -> None:
    run = Run(_pipe(Net()), torch.randn(4, 6, requires_grad=True)).check()
    assert run.notes == ["", ""]
    assert sum(value is None for value in run.mine) == 0


def test_a_frozen_parameter_costs_nothing() -> None:
    model = Net()
    model.first.requires_grad_(False)
    model.last.weight.requires_grad_(False)
    run = Run(_pipe(model), torch.randn(4, 6)).check()
    assert sum(value is None for value in run.mine) == 4  # three weights, and the input
    texts = [text for text, _ in run.code._functions]
    assert sum(text.count("torch.mm(") for text in texts) == 0  # the only gradient is that of a bias


class Tied(nn.Module):
    """A weight that both ends use, and the second end twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x @ self.weight)
        x = torch.tanh(self.inner(x))
        return torch.tanh(x @ self.weight) @ self.weight


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_parameter_that_is_used_three_times(stages: int) -> None:
    run = Run(_pipe(Tied(), stages), torch.randn(4, 6))
    for mine, expected in zip(run.mine, run.expected, strict=True):
        torch.testing.assert_close(mine, expected)
    assert run.notes == [""] * stages


class TwoEnds(nn.Module):
    """Two outputs, each with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.trunk(x))
        return self.left(x), self.right(x)


def test_weights_that_the_loss_does_not_reach_have_no_gradient() -> None:
    run = Run(_pipe(TwoEnds()), torch.randn(4, 6), loss=lambda left, right: left.sum()).check()
    assert run.notes == ["", ""]
    assert sum(value is None for value in run.mine) == 3  # a weight, a bias, the input


def test_a_loss_that_reaches_nothing_leaves_nothing() -> None:
    free = torch.zeros((), requires_grad=True)
    run = Run(_pipe(TwoEnds()), torch.randn(4, 6), loss=lambda left, right: free * 2).check()
    assert sum(value is None for value in run.mine) == 7


class Numbered(TwoEnds):
    """Its first result is a number on the CPU, wherever the model lies."""

    def forward(self, x: torch.Tensor) -> Any:
        return torch.ones(()), *super().forward(x)


def test_a_gradient_that_nobody_sent_lies_where_its_result_does() -> None:
    """Caches with a sliding window keep such a number. The device meta stands for a GPU: no op takes it and the CPU together."""
    pipe = pipeline(Numbered().to("meta"), (torch.empty(4, 6, device="meta"),), stages=1)
    stages = ByGraphs(pipe)
    number, left, right = stages(torch.empty(4, 6, device="meta"))
    assert (number.device.type, left.device.type, stages.notes) == ("cpu", "meta", [""])
    right.sum().backward()
    stages.backward()
    assert [gradient.device.type for gradient in stages.gradients().values() if gradient is not None] == ["meta"] * 4


class Counting(nn.Module):
    """Writes a buffer and uses it before and after; returns a view of what it computed."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(6))
        self.lin = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lin(x) * self.seen.clone()
        self.seen.mul_(0.5).add_(x.detach().mean(0))
        return (x * self.seen.clone()).t()


def test_a_buffer_that_forward_writes_is_as_it_was_for_the_backward() -> None:
    pipe = _pipe(Counting(), 1)
    assert Run(pipe, torch.randn(4, 6)).check().notes == [""]
    stage = pipe.stages[0]
    graphs = Graphs(pipe, 0, RoleCode())
    graphs.begin(stage)
    inputs = [torch.randn(4, 6) for _ in range(2)]
    by_graphs = _both_forwards_first(pipe, [lambda x=x: graphs.run([x])[0] for x in inputs], graphs)
    by_autograd = _both_forwards_first(pipe, [lambda x=x: stage(x) for x in inputs], graphs)
    assert all(torch.equal(one, other) for one, other in zip(by_graphs, by_autograd, strict=True))


def test_a_written_buffer_that_no_backward_reads_is_not_copied() -> None:
    pipe = _pipe(nn.BatchNorm1d(6), 1)
    graphs = Graphs(pipe, 0, RoleCode())
    graphs.begin(pipe.stages[0])
    graphs.run([torch.randn(4, 6)])
    state = [slot.tensor for slot in graphs._pure.slots]
    (split,) = graphs._splits.values()
    assert sum(slot.written for slot in graphs._pure.slots) == 3
    assert all(one is other for one, other in zip(graphs.snapshot(state, split), state, strict=True))


def _both_forwards_first(pipe: Pipe, forwards: list[Callable[[], torch.Tensor]], graphs: Graphs) -> list[torch.Tensor]:
    pipe.zero_grad()
    pipe.stages[0].seen.fill_(1)
    for output in [forward() for forward in forwards]:
        output.square().sum().backward()
        graphs.take_weights()()
    return [parameter.grad for parameter in pipe.parameters()]


def test_autocast_around_the_call_counts() -> None:
    pipe = _pipe(Net())
    with torch.autocast("cpu", torch.bfloat16):
        run = Run(pipe, torch.randn(4, 6)).check()
    assert run.notes == ["", ""]
    assert run.mine[0].dtype == torch.bfloat16
    assert run.mine[1].dtype == torch.float32


def test_gradients_accumulate_in_place() -> None:
    pipe = _pipe(Net(), 1)
    graphs = Graphs(pipe, 0, RoleCode())
    graphs.begin(pipe.stages[0])
    tensors = []
    for _ in range(2):
        (output,) = graphs.run([torch.randn(4, 6)])
        output.sum().backward()
        graphs.take_weights()()
        tensors.append([p.grad for p in pipe.parameters()])
    assert all(one is other for one, other in zip(*tensors, strict=True))


def test_a_weight_takes_its_first_gradient_without_a_copy() -> None:
    pipe = _pipe(nn.Linear(6, 6), 1)
    graphs = Graphs(pipe, 0, RoleCode())
    graphs.begin(pipe.stages[0])
    (output,) = graphs.run([torch.randn(4, 6)])
    output.sum().backward()
    places = []
    split = next(iter(graphs._splits.values()))
    compute = split.backward_weight

    def watched(needed: Any) -> Any:
        results = compute(needed)
        places.extend(result.data_ptr() for result in results)
        return results

    split.backward_weight = watched
    graphs.take_weights()()
    assert pipe.stages[0].weight.grad.data_ptr() in places


class Added(nn.Module):
    """The gradient of both weights is that of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.other = nn.Linear(6, 6), nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.one + self.other.view(4, 6)


def test_weights_with_one_gradient_accumulate_apart() -> None:
    pipe = _pipe(Added(), 1)
    graphs = Graphs(pipe, 0, RoleCode())
    graphs.begin(pipe.stages[0])
    factor = torch.randn(4, 6)
    for count in (1, 2, 3):
        (output,) = graphs.run([torch.randn(4, 6)])
        output.backward(factor)
        graphs.take_weights()()
        stage = pipe.stages[0]
        assert torch.equal(stage.one.grad, sum([factor] * count))
        assert torch.equal(stage.other.grad, stage.one.grad.flatten())
        assert torch.equal(stage.one.grad, sum([factor] * count))


def test_hooks_of_parameters_are_called() -> None:
    pipe = _pipe(Net(), 1)
    calls = []
    weight = pipe.stages[0].first.weight
    weight.register_hook(lambda grad: calls.append("grad"))
    weight.register_post_accumulate_grad_hook(lambda parameter: calls.append("accumulated"))
    assert Run(pipe, torch.randn(4, 6)).check().notes == [""]
    assert calls == ["grad", "accumulated"] * 2


# --- what is shared, and when it is freed ---------------------------------------------------------------


class Deep(nn.Module):
    def __init__(self, depth: int, between: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Net(deepcopy(between)) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def test_equal_stages_share_their_functions() -> None:
    run = Run(_pipe(Deep(4), 4), torch.randn(4, 6, requires_grad=True)).check()
    assert len(run.code._functions) == 3


def test_another_size_makes_other_graphs_and_the_same_size_none() -> None:
    pipe = _pipe(Net(), 1)
    graphs = Graphs(pipe, 0, RoleCode())
    for size in (4, 2, 4, 2):
        graphs.begin(pipe.stages[0])
        graphs.run([torch.randn(size, 6)])
    assert len(graphs._splits) == 2


def test_values_saved_for_the_inputs_are_freed_before_the_weights() -> None:
    pipe = _pipe(Deep(2), 1)
    graphs = Graphs(pipe, 0, RoleCode())
    graphs.begin(pipe.stages[0])
    (output,) = graphs.run([torch.randn(4, 6, requires_grad=True)])
    node = weakref.ref(output.grad_fn)
    output.sum().backward()
    del output
    gc.collect()
    assert node() is None
    graphs.take_weights()()
    graphs.take_weights()()  # nothing is left
    assert all(parameter.grad is not None for parameter in pipe.parameters())


def test_a_loss_that_writes_what_the_backward_needs_is_refused_as_by_autograd() -> None:
    pipe = _pipe(Net(nn.Tanh()), 1)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    pipe = _pipe(model, 1)
    graphs = Graphs(pipe, 0, RoleCode())
    graphs.begin(pipe.stages[0])
    (output,) = graphs.run([torch.randn(4, 6)])
    output.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize(
    "between", [nn.SiLU(), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Softmax(-1)], ids=lambda module: type(module).__name__
)
def test_what_is_computed_again_is_the_same(between: nn.Module) -> None:
    run = Run(_pipe(Deep(3, between), 2), torch.randn(4, 6, requires_grad=True), recompute=True).check()
    assert run.notes == ["", ""]


def test_light_ops_are_computed_again_and_heavy_ones_are_not() -> None:
    pipe, x = _pipe(Deep(3, nn.SiLU()), 1), torch.randn(4, 6)
    texts = []
    for recompute in (False, True):
        run = Run(pipe, x, recompute=recompute).check()
        texts.append("".join(text for text, _ in run.code._functions))
    before, after = ([text.count(call) for call in ("silu(", "relu(", "addmm(", ".mm(")] for text in texts)
    assert before == [3, 3, 6, 11]
    assert after == [6, 3, 6, 11]


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ("_scaled_dot_product_flash_attention", (0.1, True)),
        ("_scaled_dot_product_cudnn_attention", (None, True, 0.1, True)),
        ("_scaled_dot_product_efficient_attention", (None, True, 0.1, True)),
    ],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_attention_on_a_gpu_draws_in_its_forward_only(kernel: str, options: tuple[Any, ...], recompute: bool) -> None:
    """The backward is given the seed. The device meta has the forms of the kernels of a GPU."""
    op = getattr(torch.ops.aten, kernel)

    def attend(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (op(*operands, *options)[0],)

    operands = [torch.empty(2, 4, 16, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3)]
    graph, tangents = joint_graph(attend, operands)
    joint, _ = lower_joint(graph, ["q", "k", "v"], tangents, [])
    skip_views(joint.block)
    roles = split(joint, recompute)
    assert [op.effects.random for op in roles.forward.ops] == [True]
    assert f"aten.{kernel}_backward.default" in [op.target for op in roles.backward_input.ops]
    assert not any(op.effects.random for op in roles.backward_input.ops)


# --- stages that autograd runs --------------------------------------------------------------------------


def _with_hook(pipe: Pipe) -> None:
    pipe.stages[0].first.register_forward_hook(lambda *_: None)


def _compiled(pipe: Pipe) -> None:
    pipe.stages[0].first.compile(backend="eager")


@pytest.mark.parametrize(("change", "why"), [(_with_hook, "'first' has hooks"), (_compiled, "'first' was compiled")])
def test_a_stage_that_was_changed_runs_by_autograd(change: Callable[[Pipe], None], why: str) -> None:
    pipe = _pipe(Net())
    change(pipe)
    run = Run(pipe, torch.randn(4, 6)).check()
    assert why in run.notes[0]
    assert run.notes[1] == ""


def test_a_module_kept_whole_runs_by_autograd() -> None:
    run = Run(_pipe(Net(nn.Tanh()), leaf_modules=["between"]), torch.randn(4, 6)).check()
    assert any("module.between runs as a whole" in note for note in run.notes)
    assert "" in run.notes


def _first_row_added(x: torch.Tensor) -> torch.Tensor:
    y = x.t() * 1  # not contiguous: torch does not see that the row is a part of it
    return y.add_(y[0]).t()


def _second_half_added(x: torch.Tensor) -> torch.Tensor:
    y = x.t() * 1
    y[1:3].add_(y[3:5])
    y[:, 1:][0].add_(y[:, 1:][-1])
    y[1] = y[0]
    return y.t()


def _itself_added(x: torch.Tensor) -> torch.Tensor:
    y = x.t() * 1
    y.add_(y).sub_(y.detach() * 2)
    y[:, 1:].add_(y[:, 1:])
    return y.t()


def test_an_op_that_reads_what_it_writes_runs_by_autograd() -> None:
    """What it reads depends on the order in which torch goes through the elements."""
    run = Run(_pipe(Net(Called(_first_row_added)), 1, torch.randn(6, 6)), torch.randn(6, 6)).check()
    assert "aten.add_.Tensor reads %select while it writes %mul, which may share elements" in run.notes[0]


def test_rows_of_windows_that_overlap_may_share_elements() -> None:
    def shifted(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            windows = (x.detach()[:, 0] * 1).unfold(0, 3, 1)
            windows[0, ::2].add_(windows[1, ::2])
        return x + windows.sum()

    run = Run(_pipe(Net(Called(shifted)), 1, torch.randn(6, 6)), torch.randn(6, 6)).check()
    assert "which may share elements" in run.notes[0]


@pytest.mark.parametrize("function", [_second_half_added, _itself_added])
def test_an_op_that_reads_another_part_or_all_of_what_it_writes_has_graphs(function: Any) -> None:
    assert Run(_pipe(Net(Called(function)), 1, torch.randn(6, 6)), torch.randn(6, 6)).check().notes == [""]


def test_halves_of_a_buffer_have_no_element_in_common() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.randn(6, 4).t())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                first, second = self.kept.chunk(2)
                first.add_(second)
            return x * self.kept.clone()

    assert Run(_pipe(Net(Halves()), 1), torch.randn(4, 6)).check().notes == [""]


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Net(nn.Dropout(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]


def test_a_checkpoint_runs_by_autograd() -> None:
    run = Run(_pipe(Recomputed(), 1), torch.randn(4, 6)).check()
    assert "a checkpoint computes again what a graph would keep" in run.notes[0]


def test_an_op_that_checks_runs_by_autograd() -> None:
    solve = Called(lambda x: x @ torch.linalg.inv(x.t() @ x))
    run = Run(_pipe(Net(solve), 1), torch.randn(8, 6)).check()
    assert "aten._linalg_check_errors.default checks or prints" in run.notes[0]


def test_an_error_of_ours_is_no_reason_for_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("a bug")

    monkeypatch.setattr("stagecut.passes.roles.split", broken)
    with pytest.raises(ValueError, match="a bug"):
        Run(_pipe(Net(), 1), torch.randn(4, 6))


# --- the driver -----------------------------------------------------------------------------------------


def test_the_driver_says_what_it_does_not_know() -> None:
    assert on_ranks(2, _refused, _pipe(Net())) == ["ok", "ok"]


def _refused(pipe: Pipe) -> str:
    with pytest.raises(InputError, match="backward='graphs' is not known"):
        Driver(pipe, "1F1B", 2, F.mse_loss, backward="graphs")
    with pytest.raises(InputError, match="recompute=True chooses"):
        Driver(pipe, "1F1B", 2, F.mse_loss, recompute=True)
    with pytest.raises(InputError, match="compile=True compiles the functions"):
        Driver(pipe, "1F1B", 2, F.mse_loss, compile=True)
    driver = Driver(pipe, "1F1B", 2, F.mse_loss, backward="graph", wrap=lambda module, index: nn.Sequential(module))
    driver.step(torch.ones(8, 6), target=torch.ones(8, 6))
    (note,) = driver.notes
    assert "runs by autograd: wrap returned a Sequential" in note
    return "ok"


class Drawing(nn.Module):
    """A block that draws, writes state, and cannot take an input of ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.2)
        self.register_buffer("row", torch.ones(1, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.row[(x == 1).all().long()[None]]
        return self.dropout(self.norm(self.first(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("second", "calls"), [(Net(nn.BatchNorm1d(6)), 3), (Drawing(), 1)])
def test_functions_are_compiled_on_all_ranks_at_once_before_the_first_step(second: nn.Module, calls: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Drawing(), second)
    pipe = pipeline(model, (torch.randn(16, 6),), split_spec={"1": SplitPoint.BEGINNING})
    assert on_ranks(2, _warmed_up, pipe) == [3, calls]


def _warmed_up(pipe: Pipe) -> int:
    """How often functions ran besides those of the micro-batches."""
    called: list[str] = []

    def compiled(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            called.append("")
            return function(*args)

        return noted

    results = []
    for compile_too in (False, True):
        copied = deepcopy(pipe)
        torch.manual_seed(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", compiled)
            driver = Driver(copied, "1F1B", 2, F.mse_loss, backward="graph", compile=compile_too)
            for _ in range(2):
                driver.step(torch.randn(32, 6), target=torch.ones(32, 6))
        assert driver.notes == (), driver.notes
        (stage,) = driver.modules.values()
        results.append([*(p.grad for p in stage.parameters()), *stage.buffers(), torch.randn(3)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    return len(called) - 3 * 2 * 2  # three functions, two micro-batches, two steps


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_compiled_functions_give_the_gradients_of_autograd_up_to_rounding() -> None:
    run = Run(_pipe(Net(nn.Dropout(0.5)), 1), torch.randn(4, 6, requires_grad=True), code=RoleCode(compiled=True))
    for mine, expected in zip(run.mine, run.expected, strict=True):
        torch.testing.assert_close(mine, expected)
    assert run.notes == [""]
