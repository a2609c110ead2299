"""Regions: grad modes, autocast, control flow and checkpoints, whole or cut through."""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np
import pytest
import torch
from edge import Case, Family, buffer, check, linear, t, weight
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from stagecut import SplitPoint, pipe_split, pipeline

case = Family()
X = t(4, 4)
F32 = t(4, 4, dtype=torch.float32)
L32 = {"a": lambda: nn.Linear(4, 4), "b": lambda: nn.Linear(4, 4)}
AB = {"a": linear, "b": linear}
SPLIT = r"pipe_split|split point"
CALLS = 0
SEEN = np.zeros(2)


def amp(enabled=True, dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype=dtype, enabled=enabled)


# --- grad modes ---------------------------------------------------------------------------------------


@case(X, stages=2, has=AB)
def no_grad_in_one_stage(self, x):
    with torch.no_grad():
        y = self.a(x)
    pipe_split()
    return self.b(y) + x


@case(X, stages=2, has=AB)
def no_grad_across_a_cut(self, x):
    z = self.b(x)
    with torch.no_grad():
        y = self.a(x)
        pipe_split()
        y = self.a(y)
    return self.b(y) + z


@case(X, stages=3, has=AB)
def no_grad_around_everything(self, x):
    with torch.no_grad():
        x = self.a(x)
        pipe_split()
        x = self.b(x)
        pipe_split()
        return self.a(x)


@case(X, stages=2, has=AB)
@torch.no_grad()
def no_grad_as_a_decorator(self, x):
    x = self.a(x)
    pipe_split()
    return self.b(x)


@case(X, stages=2)
class NoGradDecoratorOnASubmodule(nn.Module):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = linear()

        @torch.no_grad()
        def forward(self, x):
            return self.a(x)

    def __init__(self):
        super().__init__()
        self.f, self.b = self.Frozen(), linear()

    def forward(self, x):
        y = self.f(x)
        pipe_split()
        return self.b(y) + self.f(x)


@case(X, stages=2, has=AB)
def enable_grad_inside_no_grad(self, x):
    with torch.no_grad():
        y = self.a(x)
        with torch.enable_grad():
            z = self.b(x)
            pipe_split()
            z = self.a(z)
        w = self.b(z)
    return y + z + w


@case(X, stages=2, has=AB)
def set_grad_enabled(self, x):
    with torch.set_grad_enabled(False):
        y = self.a(x)
    pipe_split()
    with torch.set_grad_enabled(True):
        return self.b(x) + y


@case(X, stages=2, has=AB)
def grad_mode_set_without_a_region(self, x):
    torch.set_grad_enabled(False)
    y = self.a(x)
    torch.set_grad_enabled(True)
    pipe_split()
    return self.b(x) + y


@case(X, stages=2, has=AB)
def enable_grad_at_the_top(self, x):
    with torch.enable_grad():
        y = self.a(x)
        with torch.no_grad():
            z = self.b(y)
        pipe_split()
        return y * z


@case(X, stages=2, has=AB)
def detach_instead_of_no_grad(self, x):
    y = self.a(x).detach()
    pipe_split()
    return self.b(y)


@case(X, stages=2, has=AB, grad=False)
def inference_mode_in_one_stage(self, x):
    with torch.inference_mode():
        y = self.a(x)
    pipe_split()
    return y + 1


@case(X, stages=2, has=AB, grad=False)
def inference_mode_around_everything(self, x):
    with torch.inference_mode():
        x = self.a(x)
        pipe_split()
        return self.b(x)


@case(X, stages=2, has=AB)
def no_grad_result_used_with_gradient(self, x):
    with torch.no_grad():
        scale = x.abs().max()
    y = self.a(x) / scale
    pipe_split()
    return y * scale


@case(X, stages=2, has=AB)
def empty_regions(self, x):
    with torch.no_grad():
        pass
    x = self.a(x)
    with amp():
        pipe_split()
    return self.b(x)


# --- autocast -----------------------------------------------------------------------------------------


@case(F32, stages=2, has=L32, rtol=0.05)
def autocast_in_one_stage(self, x):
    with amp():
        y = self.a(x)
    pipe_split()
    return self.b(y.float())


@case(F32, stages=2, has=L32, rtol=0.05)
def autocast_across_a_cut(self, x):
    with amp():
        y = self.a(x)
        pipe_split()
        y = self.b(y)
    return y + 1


@case(F32, stages=2, has=L32, rtol=0.05)
def autocast_around_everything(self, x):
    with amp():
        x = self.a(x)
        pipe_split()
        return self.b(x)


@case(F32, stages=3, has=L32, rtol=0.05)
def disabled_island(self, x):
    with amp():
        x = self.a(x)
        with amp(enabled=False):
            x = self.b(x.float())
            pipe_split()
            x = self.a(x)
        x = self.b(x)
        pipe_split()
        return self.a(x)


@case(F32, stages=2, has=L32, rtol=0.05)
def autocast_inside_no_grad_across_a_cut(self, x):
    with torch.no_grad(), amp():
        y = self.a(x)
        pipe_split()
        y = self.b(y)
    return self.a(y.float())


@case(F32, stages=2, has=L32, rtol=0.05)
def no_grad_inside_autocast(self, x):
    with amp():
        with torch.no_grad():
            y = self.a(x * 1)
        pipe_split()
        return self.b(y) + x.relu()


@case(F32, stages=2, has=L32, rtol=0.05)
def nested_autocast_of_two_dtypes(self, x):
    with amp():
        y = self.a(x)
        with amp(dtype=torch.float16):
            pipe_split()
            z = self.b(x * 1)
        return y.float() + z.float()


@case(F32, stages=2, has=L32, rtol=0.05)
def same_weight_cast_in_two_stages(self, x):
    with amp():
        x = self.a(x)
        x = self.a(x)
        pipe_split()
        return self.a(x)


# --- control flow -------------------------------------------------------------------------------------


@case(X, stages=3, has=AB, grad=False, compare_grad=False)
def cond(self, x):
    x = self.a(x)
    pipe_split()
    x = torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x,))
    pipe_split()
    return self.b(x)


@case(X, stages=2, has=AB, grad=False, compare_grad=False)
def cond_with_parameters(self, x):
    x = self.a(x)
    pipe_split()
    return torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x), (x,))


@case(X, stages=2, has=AB, grad=False, compare_grad=False)
def nested_cond(self, x):
    def inner(x):
        return torch.cond(x[0, 0] > 0, lambda x: x * 3, lambda x: self.b(x), (x,))

    x = self.a(x)
    pipe_split()
    return torch.cond(x.sum() > 0, inner, lambda x: x - 1, (x,))


@case(X, stages=2, has=AB, grad=False, compare_grad=False)
def cond_reads_an_outer_value(self, x):
    y = self.a(x)
    pipe_split()
    return torch.cond(x.sum() > 0, lambda x, y: x + y, lambda x, y: x - y, (x, y))


@case(X, stages=2, has={"w": weight}, grad=False, compare_grad=False)
def cond_with_a_parameter_of_the_root(self, x):
    x = x @ self.w
    pipe_split()
    return torch.cond(x.sum() > 0, lambda x: x @ self.w, lambda x: x + self.w, (x,))


@case(X, has=AB, grad=False, refused="vmap")
def vmap_in_a_cond(self, x):
    x = self.b(x)
    pipe_split()
    return torch.cond(x.sum() > 0, lambda x: torch.vmap(lambda row: row * row.sum())(self.a(x)), lambda x: x - 1, (x,))


@case(X, has=AB, grad=False, refused=SPLIT)
def split_inside_a_cond(self, x):
    def yes(x):
        x = self.a(x)
        pipe_split()
        return self.b(x)

    return torch.cond(x.sum() > 0, yes, lambda x: x - 1, (x,))


@case(X, stages=3, grad=False, compare_grad=False)
def while_loop(self, x):
    x = x * 2
    pipe_split()
    n = torch.zeros((), dtype=torch.int64)
    n, x = torch._higher_order_ops.while_loop(lambda n, x: n < 3, lambda n, x: (n + 1, x * 2), (n, x))
    pipe_split()
    return x + n


@case(X, stages=2, has=AB, grad=False, compare_grad=False)
def scan(self, x):
    x = self.a(x)
    pipe_split()
    from torch._higher_order_ops.scan import scan

    last, ys = scan(lambda c, y: (c + y, c * y), x[0], x, dim=0)
    return last + ys


@case(t(1, 2, 16, 16), stages=2, compare_grad=False, grad=False)
def flex(self, x):
    x = x * 2
    pipe_split()
    return flex_attention(x, x, x, score_mod=lambda s, b, h, q, k: s + (q - k))


@case(X, stages=2, has=AB)
def checkpointed_region_in_one_stage(self, x):
    x = checkpoint(lambda x: self.a(x).tanh(), x, use_reentrant=False)
    pipe_split()
    return self.b(x)


@case(X, stages=3, has=AB)
def checkpointed_regions_in_every_stage(self, x):
    for _ in range(3):
        x = checkpoint(lambda x: self.b(self.a(x)).tanh(), x, use_reentrant=False)
        pipe_split()
    return x


@case(X, stages=2, has={"a": linear, "drop": nn.Dropout})
def dropout_in_a_checkpoint(self, x):
    x = checkpoint(lambda x: self.drop(self.a(x)), x, use_reentrant=False)
    pipe_split()
    return self.drop(x)


@case(X, stages=2, has={"m": lambda: nn.Sequential(linear(), nn.BatchNorm1d(4).double())})
def batch_norm_in_a_checkpoint(self, x):
    x = checkpoint(self.m, x, use_reentrant=False)
    pipe_split()
    return x * 2


@case(X, has=AB, refused=SPLIT)
def split_inside_a_checkpoint(self, x):
    def block(x):
        x = self.a(x)
        pipe_split()
        return self.b(x)

    return checkpoint(block, x, use_reentrant=False)


@case(X, stages=2, has=AB)
def reentrant_checkpoint(self, x):
    x = checkpoint(lambda x: self.a(x).tanh(), x, use_reentrant=True)
    pipe_split()
    return self.b(x)


@case(X, stages=2, has=AB)
def checkpoint_in_a_checkpoint(self, x):
    def outer(x, y):
        y = checkpoint(lambda x: self.a(x).sin(), x, use_reentrant=False) + y
        return self.b(y).tanh(), y.relu_()

    x, y = checkpoint(outer, x, x * 2, use_reentrant=False)
    pipe_split()
    return x + y


@case(X, stages=2, has={"a": linear, "n": buffer})
def writes_in_a_checkpoint(self, x):
    scale = x.detach() * 0 + 1

    def block(x):
        self.n.add_(1)
        scale.mul_(2)
        return self.a(x).tanh() * x

    x = checkpoint(block, x, use_reentrant=False) + scale
    pipe_split()
    return x * 2 + self.n


@case(X, stages=2, has=AB)
def no_grad_and_checkpoint(self, x):
    def block(x):
        with torch.no_grad():
            y = self.a(x)
        return self.b(x).tanh() * y

    with torch.no_grad():
        y = checkpoint(block, x, use_reentrant=False)
    x = checkpoint(block, x, use_reentrant=False) + y
    pipe_split()
    return self.b(x)


@case(t(4, 8), stages=3, modes=(True, False), spec={"blocks.1": SplitPoint.BEGINNING, "blocks.2": SplitPoint.BEGINNING})
class CheckpointedBlocks(nn.Module):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.drop = nn.Linear(8, 16).double(), nn.Linear(16, 8).double(), nn.Dropout()

        def forward(self, x):
            return x + self.drop(self.down(self.up(x).relu()))

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


@case(t(4, 8), refused="split point", spec={"blocks.1.down": SplitPoint.BEGINNING})
class CheckpointedBlocksCutInside(CheckpointedBlocks):
    pass


@case(X, stages=2)
def vmap_in_one_stage(self, x):
    x = x * 2
    pipe_split()
    return torch.vmap(lambda row: row.sin() * row.sum())(x)


@case(X, refused=SPLIT)
def split_inside_a_vmap(self, x):
    def row_wise(row):
        row = row.sin()
        pipe_split()
        return row * row.sum()

    return torch.vmap(row_wise)(x * 2)


# --- what tracing loses -------------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """A gradient that is not the derivative."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 7


@case(X, stages=2, has=AB)
def custom_autograd_function(self, x):
    x = Doubled.apply(self.a(x))
    pipe_split()
    return self.b(x)


class Exact(torch.autograd.Function):
    """A gradient that is the derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].exp()


@case(X, stages=2, has=AB)
def custom_autograd_function_with_the_true_derivative(self, x):
    x = Exact.apply(self.a(x))
    pipe_split()
    return self.b(x)


class Scaled(torch.autograd.Function):
    """Several tensors, a number, None; a gradient of its own."""

    @staticmethod
    def forward(x, w, scale):
        return x * w * scale, x + 1, None

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad, other, _):
        x, w = ctx.saved_tensors
        return grad * w * 5, (grad * x).sum(0), None


@case(X, stages=2, has=AB | {"w": lambda: weight(4)})
def custom_autograd_function_of_several_tensors(self, x):
    y, z, nothing = Scaled.apply(self.a(x), self.w, 2.0)
    pipe_split()
    return self.b(y) + z * (1 if nothing is None else 2)


class Dirty(torch.autograd.Function):
    """Writes its input and returns it."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x.add_(torch.rand_like(x)))
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


@case(X, stages=2, has=AB)
def custom_autograd_function_in_place_and_random(self, x):
    y = Dirty.apply(self.a(x) * 2)
    pipe_split()
    return self.b(y) + torch.rand_like(y)


class Run(torch.autograd.Function):
    """A checkpoint made by hand: it is given a module."""

    @staticmethod
    def forward(ctx, module, x):
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.module(x).backward(grad)
        return None, x.grad


@case(X, stages=2, has=AB)
def custom_autograd_function_given_a_module(self, x):
    y = Run.apply(self.a, x)
    pipe_split()
    return self.b(y)


@case(X, has=AB, refused="hook|gradient")
def tensor_hook(self, x):
    x = self.a(x)
    x.register_hook(lambda grad: grad * 3)
    pipe_split()
    return self.b(x)


@case(X, stages=2)
class TensorHookInASubmodule(nn.Module):
    class Hooking(nn.Module):
        def forward(self, x):
            if x.requires_grad:
                x.register_hook(lambda grad: grad * 3)
            return x * 2

    def __init__(self):
        super().__init__()
        self.q, self.a = self.Hooking(), linear()

    def forward(self, x):
        x = self.q(self.a(x))
        pipe_split()
        return self.a(x)


class Hooked(nn.Linear):
    """A layer with a hook on itself."""

    def __init__(self, register, hook):
        super().__init__(4, 4)
        getattr(self.double(), register)(hook)


@case(X, stages=2, has={"a": lambda: Hooked("register_forward_hook", lambda module, x, y: y * 3)})
def forward_hook(self, x):
    x = self.a(x)
    pipe_split()
    return self.a(x)


@case(X, stages=2, has={"a": lambda: Hooked("register_forward_pre_hook", lambda module, x: (x[0] * 3,))})
def forward_pre_hook(self, x):
    x = self.a(x)
    pipe_split()
    return self.a(x)


@case(X, refused="backward hook")
class FullBackwardHook(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = Hooked("register_full_backward_hook", lambda module, inputs, outputs: (inputs[0] * 3,))

    def forward(self, x):
        x = self.a(x)
        pipe_split()
        return self.a(x)


@case(X, has={"a": linear, "calls": 0}, refused="calls")
def attribute_counted_up(self, x):
    self.calls += 1
    x = self.a(x) * self.calls
    pipe_split()
    return x + 1


@case(X, stages=2)
class AttributeCountedUpInASubmodule(nn.Module):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    def __init__(self):
        super().__init__()
        self.c, self.a = self.Counting(), linear()

    def forward(self, x):
        x = self.c(self.a(x))
        pipe_split()
        return self.a(x)


@case(X, refused="CALLS")
def number_of_the_file_counted_up(self, x):
    global CALLS  # noqa: PLW0603
    CALLS += 1
    x = x * CALLS
    pipe_split()
    return x * 2


@lru_cache
def table(size):
    """A constant that is made once."""
    return torch.arange(float(size), dtype=torch.float64)


@case(X, stages=2)
def constant_in_a_cache_of_functools(self, x):
    x = x * table(4)
    pipe_split()
    return x + table(4)


class ConstantInTheClass(nn.Module):
    """Fills an attribute of its class in the first call."""

    TABLE = None

    def forward(self, x):
        if ConstantInTheClass.TABLE is None:
            ConstantInTheClass.TABLE = torch.ones(4)
        pipe_split()
        return x * self.TABLE


class CallsCountedInTheClass(nn.Module):
    """Counts its calls in its class, under a name that is not there before."""

    def forward(self, x):
        CallsCountedInTheClass.calls = getattr(self, "calls", 0) + 1
        pipe_split()
        return x * self.calls


for cls in (ConstantInTheClass, CallsCountedInTheClass):
    case(X, refused="TABLE|calls")(cls)


class ConstantInADefault(nn.Module):
    """Fills the default of an argument in the first call."""

    def made(self, size, memo={}):  # noqa: B006
        if size not in memo:
            memo[size] = torch.ones(size)
        return memo[size]

    def forward(self, x):
        x = x * self.made(4)
        pipe_split()
        return x * 2


case(X, refused="memo")(ConstantInADefault)


@case(X, has=AB, refused="saved_tensors_hooks")
def hooks_on_saved_tensors(self, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved * 2, lambda packed: packed):
        x = self.a(x).tanh()
    pipe_split()
    return self.b(x)


@case(X, stages=2, has=AB)
def saved_tensors_on_the_cpu(self, x):
    with torch.autograd.graph.save_on_cpu():
        x = self.a(x).tanh()
    pipe_split()
    return self.b(x)


@case(X, has=AB, refused="sets requires_grad")
def parameter_frozen_for_a_while(self, x):
    self.a.requires_grad_(False)
    x = self.a(x)
    self.a.requires_grad_(True)
    pipe_split()
    return self.b(x)


@case(X, has=AB, refused="sets requires_grad")
def parameter_frozen_by_assignment(self, x):
    self.a.weight.requires_grad = False
    x = self.a(x)
    pipe_split()
    return self.b(x)


@case(X, has=AB, grad=False, refused="sets requires_grad")
def input_made_to_require_gradient(self, x):
    x = self.a(x.requires_grad_())
    pipe_split()
    return self.b(x)


@case(X, stages=2, has=AB)
def requires_grad_set_to_what_it_is(self, x):
    self.a.requires_grad_(True)
    x = self.a(x.requires_grad_()).detach().requires_grad_()
    pipe_split()
    return self.b(x)


@case(X, has={"a": linear, "seen": list}, refused="seen")
def list_attribute_appended(self, x):
    self.seen.append(x.shape[0])
    x = self.a(x)
    pipe_split()
    return x + len(self.seen)


@case(X, stages=2, has={"a": linear, "last": lambda: None})
def attribute_set_to_a_tensor(self, x):
    self.last = x * 2
    x = self.a(x)
    pipe_split()
    return x + self.last


@case(X, has={"a": linear, "flag": lambda: False}, refused="flag")
def boolean_attribute_flipped(self, x):
    self.flag = not self.flag
    x = self.a(x) if self.flag else -x
    pipe_split()
    return x * 2


@case(X, has={"a": linear, "name": lambda: "a"}, refused="name")
def text_attribute_changed(self, x):
    self.name = self.name + "b"
    x = self.a(x) * len(self.name)
    pipe_split()
    return x * 2


@case(X, stages=2, has={"a": linear, "warned": False})
def attribute_set_once(self, x):
    if not self.warned:
        self.warned = True
    x = self.a(x)
    pipe_split()
    return x * 2


@case(X, stages=2, has={"a": linear, "seen": list})
def list_attribute_made_anew(self, x):
    self.seen = []
    for factor in range(3):
        self.seen.append(self.a(x) * factor)
    pipe_split()
    return torch.stack(self.seen)


@case(X, refused="count", has={"count": lambda: {"n": 0}})
def number_in_a_dict_counted_up(self, x):
    self.count["n"] += 1
    x = x * self.count["n"]
    pipe_split()
    return x * 2


@case(X, refused="seen", has={"seen": lambda: [[1], [2]]})
def nested_list_appended(self, x):
    self.seen[1].append(3)
    x = x * len(self.seen[1])
    pipe_split()
    return x * 2


class Box:
    """A plain object."""

    n = 0


@case(X, refused="box", has={"box": Box})
def number_in_an_object_counted_up(self, x):
    self.box.n += 1
    x = x * self.box.n
    pipe_split()
    return x * 2


@case(X, refused="'seen' \\(a ndarray -> a ndarray\\)", has={"seen": lambda: np.zeros(2)})
def array_attribute_counted_up(self, x):
    self.seen[0] += 1
    x = x * float(self.seen[0])
    pipe_split()
    return x * 2


@case(X, refused="'seen' \\(a bytearray -> a bytearray\\)", has={"seen": bytearray})
def bytearray_attribute_appended(self, x):
    self.seen.append(1)
    x = x * len(self.seen)
    pipe_split()
    return x * 2


@case(X, refused="SEEN")
def array_of_the_file_counted_up(self, x):
    SEEN[0] += 1
    x = x * float(SEEN[0])
    pipe_split()
    return x * 2


@case(X, refused="computes something else in each call", has={"numbers": lambda: iter(range(1, 99))})
def iterator_attribute_advanced(self, x):
    x = x * next(self.numbers)
    pipe_split()
    return x * 2


@case(X, stages=2, has={"scale": lambda: np.full(4, 3.0)})
def array_attribute_read(self, x):
    x = x * torch.from_numpy(self.scale)
    pipe_split()
    return x * float(self.scale[0])


@case(X, stages=2, has={"cache": lambda: None})
def constant_made_in_the_first_call(self, x):
    if self.cache is None:
        self.cache = torch.arange(4, dtype=x.dtype)
    y = x + self.cache
    pipe_split()
    return y * self.cache


@case(X, refused="cache", has={"cache": lambda: None})
def input_kept_in_the_first_call(self, x):
    if self.cache is None:
        self.cache = x * 2
    y = x + self.cache
    pipe_split()
    return y * self.cache


@case(X, refused="cache", has={"cache": lambda: None})
def input_kept_where_there_is_no_tensor(self, x):
    if not isinstance(self.cache, torch.Tensor):
        self.cache = x * 2
    y = x + self.cache
    pipe_split()
    return y * self.cache


@case(X, has={"a": linear}, refused="numpy|traced")
def leaving_torch(self, x):
    y = torch.from_numpy(x.detach().numpy() * 2)
    pipe_split()
    return self.a(x) + y


@case(X, has={"a": linear}, refused="this|branch|data in a tensor")
def branch_on_a_value(self, x):
    if x.sum() > 0:
        x = self.a(x)
    pipe_split()
    return x * 2


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*flex_attention.*:UserWarning", "ignore:The .grad attribute:UserWarning")
@case(X, has=AB, refused=r"forward computes gradients, which cannot be traced")
def gradient_through_a_module_in_forward(self, x):
    z = x.detach().requires_grad_()
    force = torch.autograd.grad(self.a(z).sum(), z)[0]
    pipe_split()
    return self.b(x) - force


@case(X, has=AB, spec={"b": SplitPoint.BEGINNING})
def split_at_a_module_whose_forward_is_called(self, x):
    return self.b.forward(self.a(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("one", case.params())
def test_regions(one: Case) -> None:
    """Cut or whole, a region means what it meant; what a trace cannot hold is refused."""
    check(one)


def test_a_checkpoint_is_computed_again() -> None:
    """What it computes is not kept: backward runs its ops a second time."""

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += func is torch.ops.aten.tanh.default
            return func(*args, **(kwargs or {}))

    pipe = pipeline(case.cases["checkpointed_regions_in_every_stage"].build(), (X,))
    with Count() as count:
        loss = pipe(X)[0].sum()
        forward = count.calls
        loss.backward()
    assert (forward, count.calls) == (3, 6)


def test_a_checkpoint_with_a_choice_of_its_own_is_computed_again_as_a_whole() -> None:
    """The warning says that its context_fn is lost."""
    choice = partial(create_selective_checkpoint_contexts, [torch.ops.aten.tanh.default])

    def forward(self, x):
        return checkpoint(lambda x: x.tanh(), x, use_reentrant=False, context_fn=choice)

    model = type("Chosen", (nn.Module,), {"forward": forward})()
    with pytest.warns(UserWarning, match="context_fn"):
        pipeline(model, (X,))
