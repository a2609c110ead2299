"""Which calls of modules are traced alike: the key of a call, and the calls that have none.

This is the one place that says so. Two calls with equal keys, whose code reads equal values (`reads`), have
equal traces but for the names of their modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import SUPPORTED_NODES, tree_flatten

from stagecut.frontend.fold.reads import Block
from stagecut.frontend.marks import SYMBOLIC
from stagecut.frontend.watch.attributes import HOOKS, SIMPLE
from stagecut.ir.run.storage import storage_of

LITERALS = (*SIMPLE, torch.dtype, torch.layout, torch.device, torch.memory_format)
"""Arguments that are what they say."""

_HOOKS = (*HOOKS, "_backward_hooks", "_backward_pre_hooks")
_DEVICE_TYPES = ("cpu", "cuda", "meta")


@dataclass(frozen=True)
class Ref:
    """A node from the view of a block: a step, an argument or a state tensor of it."""

    kind: str
    key: Any


class Around(Protocol):
    """What a call finds around it, besides the model."""

    def node(self, tensor: torch.Tensor) -> fx.Node | None:
        """The node that stands for a tensor; None for a tensor that is none of the trace's."""

    def knows(self, tensor: torch.Tensor) -> bool:
        """False for a tensor that is none of the run's."""

    def facts(self, tensor: torch.Tensor) -> Any:
        """What code may ask about a tensor besides its sizes."""

    def state(self) -> Any:
        """What code may ask about the trace."""

    def counts(self, path: str) -> int:
        """How often the module at a path was called before."""

    def sets_flag(self, path: str) -> bool:
        """True for a module whose training flag forward sets."""

    def others(self, name: str) -> Iterable[str]:
        """The other names of the memory of a parameter or buffer."""


class Call:
    """One call of a block of modules."""

    def __init__(
        self, owner: nn.Module, path: str, args: Any, kwargs: Any, around: Around
    ) -> None:
        self.owner = owner
        self.path = path
        self.around = around
        self.block: Block = dict(owner.named_modules())
        self.arguments = (args, kwargs)
        self.leaves, self.spec = tree_flatten(self.arguments)
        self.tensors = [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]
        self.state = dict(_state(self.block))

    def given(self) -> list[tuple[Ref, torch.Tensor]]:
        """The tensors that the code of the block finds: its state and its arguments."""
        given = [(Ref("state", name), tensor) for name, tensor in self.state.items()]
        for place, leaf in enumerate(self.leaves):
            if isinstance(leaf, torch.Tensor):
                given.append((Ref("argument", place), leaf))
        return given

    def path_of(self, inside: str) -> str:
        """The path in the model of something in the block."""
        return f"{self.path}.{inside}" if inside else self.path

    def key(self) -> dict[str, Any] | None:
        """The key of the call; None for a call that stands for no other one."""
        for refuses in REFUSALS.values():
            if refuses(self):
                return None
        return {name: part(self) for name, part in PARTS.items()}

    def is_as_before(self, key: dict[str, Any]) -> bool:
        """True when nothing that the key holds has changed since, but how often modules were called."""
        now = Call(self.owner, self.path, *self.arguments, self.around)
        if [*map(id, now.state.values())] != [*map(id, self.state.values())]:
            return False
        return all(
            part(now) == key[name]
            for name, part in PARTS.items()
            if name != "calls before"
        )


def _state(block: Block) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters and buffers of a block by their names in it."""
    for path, module in block.items():
        for kind in ("_parameters", "_buffers"):
            for name, tensor in vars(module)[kind].items():
                if tensor is not None:
                    yield f"{path}.{name}".lstrip("."), tensor


# --- the key ----------------------------------------------------------------------------------------------


def _names(call: Call) -> Any:
    """The names of parameters, buffers and modules, also those that are None."""
    kinds = ("_parameters", "_buffers", "_modules")
    return [
        (
            path,
            [
                [(name, part is None) for name, part in vars(module)[kind].items()]
                for kind in kinds
            ],
        )
        for path, module in call.block.items()
    ]


def _sizes(tensors: list[torch.Tensor]) -> Any:
    return [tuple(tensor.shape) for tensor in tensors]


def _layouts(tensors: list[torch.Tensor]) -> Any:
    return [(tensor.stride(), tensor.storage_offset()) for tensor in tensors]


def _gradients(tensors: list[torch.Tensor]) -> Any:
    return [(tensor.requires_grad, tensor.is_leaf) for tensor in tensors]


def _shared(tensors: list[torch.Tensor]) -> Any:
    """For each tensor, the first one that is the same, and the first one in the same memory."""
    same: dict[int, int] = {}
    homes: dict[int | None, int] = {}
    return [
        (
            same.setdefault(id(tensor), place),
            homes.setdefault(storage_of(tensor), place),
        )
        for place, tensor in enumerate(tensors)
    ]


def _literals(call: Call) -> Any:
    return [
        None if isinstance(leaf, torch.Tensor) else (type(leaf), repr(leaf))
        for leaf in call.leaves
    ]


def _autocasts(_: Call) -> Any:
    return [
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in _DEVICE_TYPES
        if torch.amp.is_autocast_available(kind)
    ], torch.is_autocast_cache_enabled()


def _settings(_: Call) -> Any:
    """What torch is told to do by default."""
    return (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.get_float32_matmul_precision(),
    )


def _modes(_: Call) -> Any:
    """The modes that see each function and each op."""
    return [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]


PARTS: dict[str, Callable[[Call], Any]] = {
    "classes": lambda call: [
        (path, type(module)) for path, module in call.block.items()
    ],
    "training": lambda call: [
        vars(module)["training"] for module in call.block.values()
    ],
    "state names": _names,
    "state shapes": lambda call: _sizes([*call.state.values()]),
    "state dtypes": lambda call: [tensor.dtype for tensor in call.state.values()],
    "state devices": lambda call: [tensor.device for tensor in call.state.values()],
    "state strides": lambda call: _layouts([*call.state.values()]),
    "state requires_grad": lambda call: _gradients([*call.state.values()]),
    "calls before": lambda call: [
        call.around.counts(call.path_of(path)) for path in call.block
    ],
    "structure of inputs": lambda call: call.spec,
    "literals": _literals,
    "input shapes": lambda call: _sizes(call.tensors),
    "input dtypes": lambda call: [tensor.dtype for tensor in call.tensors],
    "input devices": lambda call: [tensor.device for tensor in call.tensors],
    "input strides": lambda call: _layouts(call.tensors),
    "input requires_grad": lambda call: _gradients(call.tensors),
    "aliases": lambda call: _shared([*call.state.values(), *call.tensors]),
    "facts of inputs": lambda call: [
        call.around.facts(tensor) for tensor in call.tensors
    ],
    "autocast": _autocasts,
    "settings": _settings,
    "modes": _modes,
    "trace": lambda call: call.around.state(),
}
"""The parts of the key of a call by name."""


# --- calls without a key ----------------------------------------------------------------------------------


def _has_hooks(call: Call) -> bool:
    return any(vars(module)[name] for module in call.block.values() for name in _HOOKS)


def _is_given_objects(call: Call) -> bool:
    """True for arguments such as a cache, which code may read and change."""
    return any(not isinstance(leaf, (torch.Tensor, *LITERALS)) for leaf in call.leaves)


def _has_symbols(call: Call) -> bool:
    """True where sizes vary: the nodes that stand for them depend on what came before."""
    if any(isinstance(leaf, SYMBOLIC) for leaf in call.leaves):
        return True
    return any(varies(tensor) for tensor in (*call.state.values(), *call.tensors))


def varies(tensor: torch.Tensor) -> bool:
    """True for a tensor with a size that is not the same in each call."""
    numbers = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    return any(isinstance(number, torch.SymInt) for number in numbers)


def _has_odd_tensors(call: Call) -> bool:
    """True for tensors that are none of the trace's, or that carry what no size tells."""
    tensors = (*call.state.values(), *call.tensors)
    return any(is_odd(tensor) or not call.around.knows(tensor) for tensor in tensors)


def is_odd(tensor: torch.Tensor) -> bool:
    """True for a tensor whose copy would differ from it by more than its values."""
    if not isinstance(tensor, FakeTensor) or tensor.layout is not torch.strided:
        return True
    if tensor.is_conj() or tensor.is_neg() or tensor.is_inference():
        return True
    if (
        torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or tensor.constant is not None
    ):
        return True
    return tensor.is_quantized or tensor._backward_hooks is not None


def _has_own_lookup(call: Call) -> bool:
    """True for a class that looks up attributes by itself: nobody sees what its code reads."""
    classes = {cls for module in call.block.values() for cls in type(module).__mro__}
    return any(
        "__getattribute__" in vars(cls)
        for cls in classes
        if cls not in (object, nn.Module)
    )


def _is_in_transform(_: Call) -> bool:
    return bool(torch._C._are_functorch_transforms_active())


def _has_own_flags(call: Call) -> bool:
    """True where forward sets a flag: no op follows it."""
    return any(call.around.sets_flag(call.path_of(path)) for path in call.block)


def _shares_state(call: Call) -> bool:
    """True where something outside of the block has the memory of its state."""
    for name in call.state:
        for other in call.around.others(call.path_of(name)):
            if not other.startswith(f"{call.path}."):
                return True
    return False


def _has_own_containers(call: Call) -> bool:
    """True for arguments in containers that a user's class opens."""
    return any(
        kind not in (tuple, list, dict) and kind in SUPPORTED_NODES
        for kind in _containers(call.spec)
    )


def _containers(spec: Any) -> Iterator[Any]:
    yield spec.type
    children = getattr(spec, "children", None)
    for child in children() if callable(children) else spec.children_specs:
        yield from _containers(child)


REFUSALS: dict[str, Callable[[Call], bool]] = {
    "hooks": _has_hooks,
    "objects": _is_given_objects,
    "containers": _has_own_containers,
    "symbols": _has_symbols,
    "odd tensors": _has_odd_tensors,
    "own lookup": _has_own_lookup,
    "transforms": _is_in_transform,
    "own flags": _has_own_flags,
    "shared state": _shares_state,
}
"""Why a call stands for no other one, by name."""
