"""GraphModules that write, detach and reshape: what fx does not record is seen, in all spellings; each is right across processes too."""

from __future__ import annotations

import operator
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from compare import Near, differences, observe
from fuzz.check import mailbox
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from stagecut import Pipe, pipe_split, pipeline
from stagecut.backend.ranks.mailbox import Mailbox
from stagecut.ir.errors import CaptureError, SplitError, StagecutError

X = torch.linspace(-1, 1, 12).view(3, 4)


class Net(nn.Module):
    """A forward of one's choice, and some parameters."""

    def __init__(self, run: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.layer, self.run = nn.Parameter(torch.linspace(0.5, 1.5, 4)), nn.Linear(4, 4), run
        self.register_buffer("steps", torch.zeros(3, 4))

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, x)


class Assigning(fx.Proxy):
    """`x[i] = y` is a node too."""

    def __setitem__(self, key: Any, item: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, item), {})


class Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Assigning(node, self)


def traced(run: Callable[[Any, Any], Any]) -> fx.GraphModule:
    """The symbolic trace of a forward."""
    net = Net(run)
    return fx.GraphModule(net, Tracer().trace(net))


def cuts(module: fx.GraphModule, x: torch.Tensor = X) -> list[Pipe]:
    """The pipes of a module, cut in two at each place."""
    count = len(pipeline(deepcopy(module), (x,), check=None).program.stages[0].ops)
    pipes = [pipeline(deepcopy(module), (x,), split_policy=lambda program, at=at: [at], check=None) for at in range(1, count)]
    return [pipe for pipe in pipes if pipe.num_stages == 2]


def check(module: fx.GraphModule, x: torch.Tensor = X) -> None:
    """Wherever it is cut, in one process and in boxes, the pipe does what the module does."""
    pipes = cuts(module, x)
    assert pipes
    for pipe in pipes:
        call = ((x.clone(),), {})
        wrong = mailbox(deepcopy(module), pipe, deepcopy(call), deepcopy(call), Near(1e-5))
        wrong += differences(observe(deepcopy(module), deepcopy(call)), observe(pipe.module(), deepcopy(call)), Near(1e-5))
        assert not wrong, "\n".join([pipe.ir(), *wrong])


def detached_in_place(self: Net, x: torch.Tensor) -> Any:
    y = x * self.scale
    y.detach_()
    return y * self.scale


def detached_by_function(self: Net, x: torch.Tensor) -> Any:
    y = x * self.scale
    return torch.detach(y) * 2, y.detach() * self.scale, y


def data_of_what_crosses(self: Net, x: torch.Tensor) -> Any:
    y = x * self.scale
    return y.data * 2, y.data[:, 1:] * 3, y


def data_written(self: Net, x: torch.Tensor) -> Any:
    y = x * 2
    part = y.data[:, 1:]
    part.add_(1)
    return y * self.scale, part * 2


def as_strided_method(self: Net, x: torch.Tensor) -> Any:
    y = x * 2
    part = y[2:]
    return part + 1, part.as_strided((2,), (1,), 0) * 3


def as_strided_function(self: Net, x: torch.Tensor) -> Any:
    y = x * self.scale
    part = y[2:]
    return part + 1, torch.as_strided(part, (2, 2), (1, 2), 1) * 3


def transposed_in_place(self: Net, x: torch.Tensor) -> Any:
    y = x.clone()
    part = y[1:]
    y.t_()
    part.add_(1)
    z = y * 2
    return z @ z.t(), y * 1


def squeezed_in_place(self: Net, x: torch.Tensor) -> Any:
    y = (x * self.scale)[None]
    y.squeeze_(0).transpose_(0, 1)
    y.unsqueeze_(0)
    return y * 2, y.sum(0) @ self.layer.weight[:3]


def restrided_in_place(self: Net, x: torch.Tensor) -> Any:
    y = x * self.scale
    part = y[1:]
    part.as_strided_((2, 2), (1, 2), 1)
    return part + 1, y * 2


def resized_in_place(self: Net, x: torch.Tensor) -> Any:
    y = x.new_empty(0)
    y.resize_(3, 4)
    y.copy_(x * self.scale)
    return y * 2


def attributes(self: Net, x: torch.Tensor) -> Any:
    y = x * self.scale
    other = y.T
    other.mT.mul_(3)
    return y + 1, other @ self.layer.weight[:3], y.real * 2


def python_in_place(self: Net, x: torch.Tensor) -> Any:
    y = x * self.scale
    part = y[:, 1:]
    part += 1
    y *= 2
    y[0] = x[1]
    y[:, :1] = part[:, :1]
    return y * self.scale, part


def lists_in_place(self: Net, x: torch.Tensor) -> Any:
    y = x * 2
    torch._foreach_mul_([y.view(-1), x * 1], [3.0, 1.0])
    return y + self.scale


def new_tensors(self: Net, x: torch.Tensor) -> Any:
    y = x * self.scale
    return y.new_ones(3, 4) * 2, y.new_tensor([1.0, 2.0]) * 2, torch.zeros_like(y) + 1, y.new_empty_strided((2,), (1,)).zero_() + 1, y


def results_by_name(self: Net, x: torch.Tensor) -> Any:
    found = (x * self.scale).max(-1)
    return found.values * 2, found.indices, found[0] + 1


def out_of_a_part(self: Net, x: torch.Tensor) -> Any:
    y = x * 2
    part = y[:, 1:]
    torch.add(y, 1, out=y)
    return y * self.scale, part + 1


def buffers(self: Net, x: torch.Tensor) -> Any:
    self.steps.add_(x)
    self.steps[0].mul_(2)
    return self.layer(x) + self.steps


FORWARDS = (
    detached_in_place, detached_by_function, data_of_what_crosses, data_written, as_strided_method, as_strided_function,
    transposed_in_place, squeezed_in_place, restrided_in_place, resized_in_place, attributes, python_in_place, lists_in_place, new_tensors,
    results_by_name, out_of_a_part,
)  # fmt: skip


@pytest.mark.parametrize("run", FORWARDS, ids=lambda run: run.__name__)
def test_right_wherever_it_is_cut(run: Callable[[Any, Any], Any]) -> None:
    check(traced(run))


def test_buffers_are_written_where_they_lie() -> None:
    module = traced(buffers)
    pipe = pipeline(module, (X,))
    assert pipe.verify(X).ok


class Exponential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x * self.l).exp()
        y.data.mul_(2)
        return y * 1


def test_a_write_through_data_of_what_crossed_is_refused() -> None:
    pipe = pipeline(fx.symbolic_trace(Exponential()), (X,), split_policy=lambda program: [2])
    with pytest.raises(StagecutError, match=r"stage 1 writes %exp through \.data"):
        Mailbox(pipe.program, pipe.stages)


# --- modes ----------------------------------------------------------------------------------------------


def without_gradient(self: Net, x: torch.Tensor) -> Any:
    with torch.no_grad():
        y = x * self.scale
    z = y * self.scale
    with torch.autocast("cpu", torch.bfloat16):
        w = self.layer(x)
    return z + 1, y, w.float() * 2


def test_modes_in_a_graph_are_contexts_of_its_ops() -> None:
    """A stage must not leave its mode to the next one: that is another process."""
    module = make_fx(Net(without_gradient), pre_dispatch=True)(X)
    check(module)
    pipe = pipeline(module, (X,), check=None)
    kinds = [[context.kind for context in op.context] for op in pipe.program.all_ops()]
    assert ["no_grad"] in kinds
    assert ["autocast"] in kinds
    assert not any(op.is_users for op in pipe.program.all_ops())


def test_a_graph_that_leaves_its_mode_behind_does_not_leave_it_to_us() -> None:
    module = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    node = next(n for n in module.graph.nodes if n.op == "call_module")
    with module.graph.inserting_before(node):
        module.graph.call_function(torch._C._set_grad_enabled, (False,))
    module.recompile()
    pipe = pipeline(module, (X,), check=None)
    assert torch.is_grad_enabled()
    assert not pipe(X)[0].requires_grad
    assert torch.is_grad_enabled()


class Normed(nn.Module):
    """One norm in two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.norm(x) + 1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("training", [True, False])
def test_what_a_module_writes_in_the_other_mode_is_known(training: bool) -> None:
    """Cut in eval mode and switched to training, a norm in two stages would keep two statistics."""
    pipe = pipeline(fx.symbolic_trace(Normed().train(training)), (X,), split_policy=lambda program: [1])
    written = [set(map(str, op.effects.writes)) for op in pipe.program.all_ops() if op.is_users]
    assert all("%norm.running_mean" in names and "%norm.num_batches_tracked" in str(names) for names in written[:1])
    with pytest.raises(StagecutError, match=r"'norm\.running_mean' is written in one stage and read or written in another"):
        Mailbox(pipe.program, pipe.stages)


class Drops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5, inplace=True)

    def forward(self, x: torch.Tensor) -> Any:
        y = x * 2
        return self.drop(y), y + 1


@pytest.mark.parametrize("training", [True, False])
def test_a_dropout_in_place_is_known_to_write_in_either_mode(training: bool) -> None:
    """y + 1 sees what the dropout wrote, in another stage too."""
    model = Drops().train(training)
    pipe = pipeline(fx.symbolic_trace(model), (X,), split_policy=lambda program: [2])
    for mode in (training, not training):
        model.train(mode), pipe.train(mode)
        torch.manual_seed(1)
        expected = model(X)
        torch.manual_seed(1)
        found = Mailbox(pipe.program, pipe.stages).forward([X])
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other)


# --- what is refused ------------------------------------------------------------------------------------


def flagged(self: Net, x: torch.Tensor) -> Any:
    y = (x * self.scale).detach()
    y.requires_grad_()
    return y * 2


def flagged_input(self: Net, x: torch.Tensor) -> Any:
    x.requires_grad_()
    return x * 2


@pytest.mark.parametrize("run", [flagged, flagged_input])
def test_setting_requires_grad_is_refused(run: Callable[[Any, Any], Any]) -> None:
    with pytest.raises(CaptureError, match=r"'requires_grad_' .* changes requires_grad of a tensor that it is given"):
        pipeline(traced(run), (X,))


def test_setting_requires_grad_to_what_it_is_is_not() -> None:
    check(traced(lambda self, x: (x * self.scale).requires_grad_() * 2 + self.scale))


def reshaped_input(self: Net, x: torch.Tensor) -> Any:
    x.t_()
    return x * 2


def test_another_shape_for_an_input_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"'t_' .* changes the shape of a tensor that it is given"):
        pipeline(traced(reshaped_input), (X.clone(),))


def both(x: torch.Tensor) -> list[torch.Tensor]:
    """A function that fx leaves as it is."""
    return [x + 1, x + 2]


def test_a_container_that_changes_is_refused() -> None:
    def build(g: fx.Graph) -> Any:
        x = g.placeholder("x")
        parts = g.call_function(both, (x,))
        g.call_method("append", (parts, x))
        return g.call_function(torch.stack, (parts,))

    graph = fx.Graph()
    graph.output(build(graph))
    with pytest.raises(CaptureError, match=r"call_method append\) changes a container it is given"):
        pipeline(fx.GraphModule(nn.Module(), graph), (X,))


class Splits(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        pipe_split()
        return x * 2


class KeepsSplits(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Splits) or super().is_leaf_module(m, module_qualified_name)


def test_a_split_point_inside_a_module_of_a_graph_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Splits())
    module = fx.GraphModule(model, KeepsSplits().trace(model))
    with pytest.raises(SplitError, match="a split point lies inside node '_1'"):
        pipeline(module, (X,))


def two_views(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two results in one memory, of which neither is a view of what is given."""
    made = x * 2
    return made, made[1:]


def test_a_write_into_one_of_two_results_that_share_memory_is_refused() -> None:
    def build(g: fx.Graph) -> Any:
        made = g.call_function(two_views, (g.placeholder("x"),))
        first, second = (g.call_function(operator.getitem, (made, i)) for i in (0, 1))
        g.call_method("add_", (second, 1))
        return g.call_function(torch.mul, (first, 2))

    graph = fx.Graph()
    graph.output(build(graph))
    with pytest.raises(CaptureError, match="shares memory with something else that it returned"):
        pipeline(fx.GraphModule(nn.Module(), graph), (X,))


def hides_its_write(x: torch.Tensor) -> torch.Tensor:
    """A write that moves no version counter."""
    x.data.mul_(2)
    return x + 1


def test_a_write_through_data_inside_a_function_is_seen() -> None:
    graph = fx.Graph()
    made = graph.call_function(torch.add, (graph.placeholder("x"), 1))
    result = graph.call_function(hides_its_write, (made,))
    graph.output((result, graph.call_method("neg", (made,))))
    check(fx.GraphModule(nn.Module(), graph))


def test_constants_that_are_written_through_a_view() -> None:
    model = Net(lambda self, x: x)
    model.table = torch.ones(3, 4)
    graph = fx.Graph()
    x, table = graph.placeholder("x"), graph.get_attr("table")
    graph.call_method("copy_", (graph.call_function(operator.getitem, (table, 0)), graph.call_function(operator.getitem, (x, 1))))
    graph.output(graph.call_function(torch.mul, (x, graph.get_attr("table"))))
    module = fx.GraphModule(model, graph)
    module.__dict__["table"] = module._buffers.pop("table")
    program = pipeline(module, (X,), check=None).program
    assert any(op.effects.writes for op in program.all_ops())
    assert torch.equal(module.table, torch.ones(3, 4))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_graph_within_a_graph_is_refused_with_a_remedy() -> None:
    exported = torch.export.export(Net(without_gradient), (X,))
    with pytest.raises(CaptureError, match="as a part of an op") as caught:
        pipeline(exported.module(), (X,))
    assert "ExportedProgram" in caught.value.hint
