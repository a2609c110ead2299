"""Models of repeated blocks in which one call differs from the others in one thing: what `fold` must notice."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import register_pytree_node
from torch.utils.checkpoint import checkpoint

from stagecut import StagecutError
from stagecut.frontend.capture.batch import mark_batches
from stagecut.ir.text.printer import text
from stagecut.pipe import lower

WIDTH = 4

GLOBAL = SimpleNamespace(scale=1.0)
NUMBER = 1.0
VARIABLE: ContextVar[float] = ContextVar("VARIABLE", default=1.0)
CALLS: list[int] = []
TENSOR = torch.ones(4, 4)


class Settings:
    factor = 1.0


class Part(nn.Module):
    """A part of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.bias: nn.Parameter | None = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("shift", torch.randn(WIDTH))
        self.register_buffer("extra", None)
        self.register_buffer("late", None)
        self.register_buffer("mark", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if not self.weight.is_contiguous():
            weight = weight + 1
        if self.mark.device.type == "meta":
            weight = weight + 2
        if not self.weight.requires_grad:
            weight = weight * 2
        y = x @ weight + self.shift.to(x.dtype)
        if self.bias is not None:
            y = y + self.bias.to(x.dtype)
        if self.extra is not None:
            y = y + self.extra
        return y if self.late is None else y * self.late


class Block(nn.Module):
    """A block whose trace depends on much."""

    level = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.part, self.other = Part(), Part()
        self.drop = nn.Dropout(0.1)
        self.rate, self.scale, self.names, self.config = 0.1, 1.0, ["a"], SimpleNamespace(act="relu", depth=[1, 2])
        self.function: Callable[[Tensor], Tensor] = torch.relu

    def forward(self, x: Tensor, y: Tensor | None = None, flag: Any = None, many: Any = ()) -> Any:
        h = self.norm(x.to(self.norm.weight.dtype)).to(x.dtype)
        h = self.part(h) * self.scale * self.level
        h = self.function(h) if self.config.act == "relu" else h.tanh()
        if self.config.depth[-1] > 2 or "b" in self.names:
            h = h + 1
        if NUMBER != 1.0 or GLOBAL.scale != 1.0 or Settings.factor != 1.0 or VARIABLE.get() != 1.0:
            h = h - 1
        h = F.dropout(h, self.rate, self.training)
        if flag:
            h = h * 3
        for one in many:
            h = h + one
        if y is not None and y.device.type == "meta":
            h = h.sin()
        elif y is not None:
            h = h * 2 if y is x else h + y
        if x.requires_grad:
            h = h.neg()
        return self.drop(self.other(h)).add(x)


class Other(Block):
    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        return super().forward(x, *rest, **named).sin()


class Alike(Block):
    """The same but for what it is called with."""


class Pair(Block):
    """Returns more than one tensor, one of them as it was given."""

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        return {"out": super().forward(x, *rest, **named), "given": x, "size": x.shape[0], "rest": (x.cos(), None)}


class Modes(Block):
    """Chooses by its mode, and changes the modes of torch."""

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        with torch.no_grad():
            gate = x.sigmoid()
        with torch.autocast("cpu", torch.bfloat16):
            y = super().forward(x, *rest, **named)
        if self.training:
            y = y * gate
        return y.to(x.dtype) if self.part.training else y.to(x.dtype).exp()


class Norms(nn.Module):
    """Writes its buffers in training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.norm(self.up(x)).relu_() + x


class Writes(Block):
    """Writes into tensors of its own."""

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        y = super().forward(x, *rest, **named).clone()
        y[:, 0] = 1
        first, second = y[:, :2], y[:, 2:]
        first.mul_(2)
        return torch.cat([first, second.t().t()], -1)


class Views(Block):
    """Asks for contiguous tensors."""

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        y = super().forward(x, *rest, **named)
        return y.t().contiguous().t() + x.contiguous().view(-1, WIDTH)


class Nested(nn.Module):
    """Blocks in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Norms())
        self.again = Part()

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.again(self.again(self.blocks(x)))


class Constants(Block):
    """Makes a constant."""

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        return super().forward(x, *rest, **named) * torch.tensor(2.0) + torch.arange(WIDTH)


BLOCKS: list[Made] = [
    Block, Pair, Modes, Norms, Writes, Views, Nested, Constants,
]  # fmt: skip


def first(result: Any) -> Tensor:
    while not isinstance(result, Tensor):
        result = next(iter(result.values())) if isinstance(result, dict) else result[0]
    return result


Way = Callable[["Model", nn.Module, Tensor], Any]


def plain(model: Model, block: nn.Module, x: Tensor) -> Any:
    return block(x)


class Model(nn.Module):
    """Blocks one after the other; those in `ways` are called in their own way."""

    def __init__(self, blocks: list[nn.Module], ways: dict[int, Way] | None = None) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(WIDTH, WIDTH), nn.ModuleList(blocks), nn.Linear(WIDTH, 2)
        self.ways = ways or {}

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            x = first(self.ways.get(number, plain)(self, block, x)).to(x.dtype)
        return self.head(x)


Made = Callable[[], nn.Module]


@dataclass
class Difference:
    """Changes block k of a model, or the way it is called; `leaf` has the modules that are kept whole."""

    change: Callable[[Model, int], None] = lambda _, __: None
    way: Way | None = None
    other_ways: Way = plain
    block: Made | None = None
    leaf: Callable[[int], list[str]] = field(default=lambda _: [])


def _set(path: str, value: Any) -> Callable[[Model, int], None]:
    def change(model: Model, k: int) -> None:
        owner: Any = model.blocks[k]
        *parts, last = path.split(".")
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, last, value() if callable(value) else value)

    return change


def _replaced(make: Callable[[], nn.Module]) -> Callable[[Model, int], None]:
    def change(model: Model, k: int) -> None:
        model.blocks[k] = make().train(model.training)

    return change


def _transposed(model: Model, k: int) -> None:
    weight = model.blocks[k].part.weight  # type: ignore[union-attr]
    model.blocks[k].part.weight = nn.Parameter(weight.detach().t().contiguous().t())  # type: ignore[union-attr, operator]


def _double(model: Model, k: int) -> None:
    model.blocks[k].part.double()  # type: ignore[union-attr]


def _tied_inside(model: Model, k: int) -> None:
    model.blocks[k].other.weight = model.blocks[k].part.weight  # type: ignore[union-attr]


def _tied_outside(model: Model, k: int) -> None:
    model.blocks[k].other.weight = model.blocks[0].part.weight  # type: ignore[union-attr]


def _hook(model: Model, k: int) -> None:
    model.blocks[k].norm.register_forward_hook(lambda _, __, out: out * 2)  # type: ignore[union-attr]


class _Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def _parametrized(model: Model, k: int) -> None:
    register_parametrization(model.blocks[k].part, "weight", _Twice())  # type: ignore[arg-type]


def _own_forward(model: Model, k: int) -> None:
    block = model.blocks[k]
    block.forward = lambda x: Block.forward(block, x).cos()  # type: ignore[method-assign]


def _with_global(_: Model, block: nn.Module, x: Tensor) -> Any:
    globals()["NUMBER"] = 2.0
    try:
        return block(x)
    finally:
        globals()["NUMBER"] = 1.0


def _with_object(_: Model, block: nn.Module, x: Tensor) -> Any:
    GLOBAL.scale = 2.0
    try:
        return block(x)
    finally:
        GLOBAL.scale = 1.0


def _with_class(_: Model, block: nn.Module, x: Tensor) -> Any:
    Settings.factor = 2.0
    try:
        return block(x)
    finally:
        Settings.factor = 1.0


def _with_level(_: Model, block: nn.Module, x: Tensor) -> Any:
    Block.level = 2.0
    try:
        return block(x)
    finally:
        Block.level = 1.0


def _with_variable(_: Model, block: nn.Module, x: Tensor) -> Any:
    token = VARIABLE.set(2.0)
    try:
        return block(x)
    finally:
        VARIABLE.reset(token)


def _under(context: Callable[[], Any]) -> Way:
    def way(_: Model, block: nn.Module, x: Tensor) -> Any:
        with context():
            return block(x)

    return way


def _default_dtype(_: Model, block: nn.Module, x: Tensor) -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        return block(x)
    finally:
        torch.set_default_dtype(torch.float32)


class _Doubles(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.relu:
            return torch.sigmoid(*args)
        return func(*args, **(kwargs or {}))


class Draws(Block):
    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        return super().forward(x, *rest, **named) + torch.rand(WIDTH)


class DrawsPython(Block):
    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        random.random()
        return super().forward(x, *rest, **named)


class Counts(Block):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        self.count += 1
        return super().forward(x, *rest, **named) * self.count


class Assigns(Counts):
    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        self.count = self.count + 1
        return Block.forward(self, x, *rest, **named)


class Numbers(Block):
    """Counts its calls in a global."""

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        CALLS.append(1)
        y = super().forward(x, *rest, **named) * len(CALLS)
        if len(CALLS) > 4:
            CALLS.clear()
        return y


class ReadsConstants(Block):
    """Branches on a value that it knows."""

    def forward(self, x: Tensor, y: Any = None, *rest: Any, **named: Any) -> Any:
        out = super().forward(x)
        if y is not None and bool(y.sum() > 1):
            return out.exp()
        return out


class InPlace(Block):
    """Writes what it is given."""

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        y = super().forward(x, *rest, **named)
        x.mul_(2)
        return y


class ReturnsView(Block):
    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        return super().forward(x, *rest, **named), x[:, :2]


class Listing(Block):
    """Changes a list that it is given."""

    def forward(self, x: Tensor, y: Any = None, *rest: Any, **named: Any) -> Any:
        if isinstance(y, list):
            y.append(x)
        return super().forward(x)


class Contiguous(Block):
    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        return super().forward(x.contiguous(), *rest, **named)


class Stateful(Block):
    """Keeps something in an attribute."""

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        self.config.last = len(self.names)
        return super().forward(x, *rest, **named)


class Makes(Block):
    """Makes a tensor of the default dtype."""

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        return super().forward(x, *rest, **named) * torch.ones(WIDTH)


class Flag:
    """An object that looks like all others of its class."""

    def __init__(self, on: bool) -> None:
        self.on = on

    def __bool__(self) -> bool:
        return self.on

    def __repr__(self) -> str:
        return "flag"


class Box:
    """A container that holds more than its leaves."""

    def __init__(self, tensor: Tensor, on: bool) -> None:
        self.tensor, self.on = tensor, on


register_pytree_node(Box, lambda box: ([box.tensor], None), lambda leaves, _: Box(*leaves, on=False))


class Opens(Block):
    """Is given a container."""

    def forward(self, x: Tensor, y: Any = None, *rest: Any, **named: Any) -> Any:
        out = super().forward(x)
        return out if y is None else out * (2 if y.on else 3) + y.tensor


class Looks(Block):
    """Looks up an attribute by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 1.0

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, "hidden" if name == "scale" else name)


class Early(Block):
    """Has the buffer that comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.part.extra = torch.ones(WIDTH)


class Ends(Block):
    """Ends with a dropout."""

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        return self.drop(super().forward(x, *rest, **named))


class Fixes(Block):
    """Sets the flag of a part."""

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        self.drop.eval()
        return super().forward(x, *rest, **named)


def _late(model: Model, k: int) -> None:
    part: Any = model.blocks[k].part
    part.extra, part.late = None, torch.ones(WIDTH)


def _fixed(_: Model, block: nn.Module, x: Tensor) -> Any:
    block.drop.eval()  # type: ignore[union-attr]
    return block(x)


def _writes_view(_: Model, block: nn.Module, x: Tensor) -> Any:
    out, view = block(x)
    view.add_(1)
    return out + x


def _list_way(_: Model, block: nn.Module, x: Tensor) -> Any:
    seen: list[Tensor] = []
    return block(x, seen) * len(seen)


def _twice(_: Model, block: nn.Module, x: Tensor) -> Any:
    return block(first(block(x)))


def _reuse(model: Model, block: nn.Module, x: Tensor) -> Any:
    """The first block is called once more."""
    return block(first(model.blocks[0](x)))


def _inner(_: Model, block: nn.Module, x: Tensor) -> Any:
    """A part of the block is called by itself first."""
    return block(block.norm(x))  # type: ignore[operator]


def _gradient(_: Model, block: nn.Module, x: Tensor) -> Any:
    with torch.enable_grad():
        y = first(block(x))
        return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


def _attribute_of_tensor(_: Model, block: nn.Module, x: Tensor) -> Any:
    out = first(block(x))
    out.level = 2.0  # type: ignore[attr-defined]
    return out


DIFFERENCES: dict[str, Difference] = {
    "nothing": Difference(),
    "class": Difference(_replaced(Other)),
    "name of the class": Difference(_replaced(Alike)),
    "training": Difference(lambda model, k: model.blocks[k].train(not model.training) and None),
    "training of a part": Difference(lambda model, k: model.blocks[k].drop.train(not model.training) and None),  # type: ignore[union-attr]
    "no bias": Difference(_set("part.bias", None)),
    "extra buffer": Difference(_set("part.extra", lambda: torch.ones(WIDTH))),
    "shape": Difference(lambda model, k: _set("part.shift", lambda: torch.ones(1))(model, k)),
    "dtype": Difference(_double),
    "strides": Difference(_transposed),
    "requires_grad": Difference(lambda model, k: model.blocks[k].part.requires_grad_(False) and None),  # type: ignore[union-attr]
    "tied inside": Difference(_tied_inside),
    "tied outside": Difference(_tied_outside),
    "hook": Difference(_hook),
    "parametrization": Difference(_parametrized),
    "own forward": Difference(_own_forward),
    "number": Difference(_set("scale", 2.0)),
    "rate": Difference(_set("rate", 0.0)),
    "drop": Difference(_set("drop.p", 0.2)),
    "eps": Difference(_set("norm.eps", 1e-3)),
    "list": Difference(_set("names", lambda: ["a", "b"])),
    "object": Difference(_set("config.act", "tanh")),
    "deep": Difference(_set("config.depth", lambda: [1, 3])),
    "function": Difference(_set("function", lambda: lambda x: x.sigmoid())),
    "method": Difference(_set("function", lambda: torch.tanh)),
    "own attribute": Difference(_set("level", 3.0)),
    "global": Difference(way=_with_global),
    "global object": Difference(way=_with_object),
    "class of a global": Difference(way=_with_class),
    "attribute of the class": Difference(way=_with_level),
    "context variable": Difference(way=_with_variable),
    "literal": Difference(way=lambda _, block, x: block(x, flag=True), block=Block),
    "value": Difference(
        way=lambda _, block, x: block(x, flag=True), other_ways=lambda _, block, x: block(x, flag=False), block=Block
    ),
    "place": Difference(
        way=lambda _, block, x: block(x, many=(x.clone(),)), other_ways=lambda _, block, x: block(x, x.clone()), block=Block
    ),
    "torch's class": Difference(
        _replaced(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())),
        block=lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sigmoid()),
    ),
    "state device": Difference(_set("part.mark", lambda: torch.ones(2, device="meta"))),
    "input device": Difference(
        way=lambda _, block, x: block(x, torch.ones(4, 4, device="meta")),
        other_ways=lambda _, block, x: block(x, torch.ones(4, 4)),
        block=Block,
    ),
    "None by name": Difference(way=lambda _, block, x: block(x, flag=None), block=Block),
    "type of a literal": Difference(
        way=lambda _, block, x: block(x, flag=True), other_ways=lambda _, block, x: block(x, flag=1), block=Block
    ),
    "container": Difference(
        way=lambda _, block, x: block(x, many=[x, x]), other_ways=lambda _, block, x: block(x, many=(x, x)), block=Block
    ),
    "input shape": Difference(way=lambda _, block, x: first(block(x[:2])).repeat(2, 1)),
    "input dtype": Difference(way=lambda _, block, x: first(block(x.double())).float()),
    "input strides": Difference(way=lambda _, block, x: block(x.t().contiguous().t())),
    "input offset": Difference(way=lambda _, block, x: block(torch.cat([x, x])[4:])),
    "input requires_grad": Difference(way=lambda _, block, x: block(x.detach())),
    "same input": Difference(
        way=lambda _, block, x: block(x, x), other_ways=lambda _, block, x: block(x, x.clone()), block=Block
    ),
    "same memory": Difference(
        way=lambda _, block, x: block(x, x.view(-1, WIDTH)), other_ways=lambda _, block, x: block(x, x.clone()), block=Block
    ),
    "state as input": Difference(
        way=lambda _, block, x: block(x, block.part.weight), other_ways=lambda _, block, x: block(x, x.clone()), block=Block
    ),
    "state of another": Difference(way=lambda model, block, x: block(x, model.head.weight.t()[:, :1]), block=Block),
    "grad mode": Difference(way=_under(torch.no_grad)),
    "inference mode": Difference(way=_under(torch.inference_mode)),
    "autocast": Difference(way=_under(lambda: torch.autocast("cpu", torch.bfloat16))),
    "default dtype": Difference(way=_default_dtype, block=Makes),
    "asked grad": Difference(way=_under(torch.enable_grad), block=Modes),
    "an object": Difference(
        way=lambda _, block, x: block(x, flag=Flag(True)), other_ways=lambda _, block, x: block(x, flag=Flag(False)), block=Block
    ),
    "own container": Difference(
        way=lambda _, block, x: block(x, Box(x, True)), other_ways=lambda _, block, x: block(x, Box(x, False)), block=Opens
    ),
    "hidden": Difference(_set("hidden", 2.0), block=Looks),
    "flag set": Difference(way=_fixed, block=Block),
    "other names": Difference(_late, block=Early),
    "a tensor of nobody's": Difference(
        way=lambda _, block, x: block(x, TENSOR), other_ways=lambda _, block, x: block(x, TENSOR), block=Block
    ),
    "function mode": Difference(way=_under(_Doubles)),
    "checkpoint": Difference(way=lambda _, block, x: checkpoint(lambda x: first(block(x)), x, use_reentrant=False)),
    "all in checkpoints": Difference(
        way=lambda _, block, x: checkpoint(lambda x: first(block(x)), x, use_reentrant=False),
        other_ways=lambda _, block, x: checkpoint(lambda x: first(block(x)), x, use_reentrant=False),
    ),
    "vmap": Difference(way=lambda _, block, x: torch.vmap(lambda x: first(block(x[None]))[0], randomness="same")(x)),
    "called twice": Difference(way=_twice),
    "all called twice": Difference(way=_twice, other_ways=_twice),
    "called again": Difference(way=_reuse),
    "a part first": Difference(way=_inner, block=Block),
    "forward": Difference(way=lambda _, block, x: block.forward(x)),
    "kept whole": Difference(leaf=lambda k: [f"blocks.{k}"]),
    "a part kept whole": Difference(leaf=lambda k: [f"blocks.{k}.norm"], block=Block),
    "constant": Difference(
        way=lambda _, block, x: block(x, torch.ones(WIDTH)),
        other_ways=lambda _, block, x: block(x, torch.zeros(WIDTH)),
        block=ReadsConstants,
    ),
    "constant given": Difference(
        way=lambda _, block, x: block(x, torch.ones(4, WIDTH)),
        other_ways=lambda _, block, x: block(x, x.clone()),
        block=Block,
    ),
    "dropout before": Difference(way=lambda _, block, x: block(F.dropout(x, 0.3, False)), block=Contiguous),
    "draws": Difference(block=Draws),
    "draws from Python": Difference(block=DrawsPython),
    "counts": Difference(block=Counts),
    "assigns": Difference(block=Assigns),
    "numbers": Difference(block=Numbers),
    "in place": Difference(block=InPlace),
    "view": Difference(block=ReturnsView, way=_writes_view),
    "list given": Difference(block=Listing, way=_list_way),
    "keeps": Difference(block=Stateful),
    "fixes": Difference(block=Fixes),
    "gradient": Difference(way=_gradient),
    "attribute of a tensor": Difference(way=_attribute_of_tensor),
    "used again": Difference(way=lambda _, block, x: first(block(x)) + x, other_ways=lambda _, block, x: first(block(x)) * x),
    "dropout at the end": Difference(
        way=lambda _, block, x: block(x).contiguous(), other_ways=lambda _, block, x: block(x).contiguous(), block=Ends
    ),
    "nothing around": Difference(way=_under(nullcontext)),
}  # fmt: skip
"""Differences by name."""


def model_of(block: Made, count: int, odd: Iterable[int], difference: Difference, training: bool) -> Model:
    """So many blocks, of which those in `odd` differ."""
    torch.manual_seed(0)
    made = difference.block or block
    ways = dict.fromkeys(range(count), difference.other_ways)
    model = Model([made() for _ in range(count)], ways).train(training)
    for k in odd:
        if difference.way is not None:
            ways[k] = difference.way
        with suppress(AttributeError):  # a block without such a part
            difference.change(model, k)
    return model


def outcome(model: nn.Module, args: Any, fold: bool, leaf: Any = (), shapes: Any = None) -> list[str]:
    """The text of the traced program with the places of its batch, as runs on fake tensors show them, and its notes;
    or the error.
    """
    CALLS.clear()
    try:
        program, bindings, exported = lower(model, args, {}, shapes, leaf, batches=False, fold=fold)
    except StagecutError as error:
        return [type(error).__name__, str(error)]
    mark_batches(program, model, bindings.call, args, {}, exported, real=False, fold=fold)
    return [text(program), *bindings.notes]
