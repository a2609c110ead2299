"""Values on their way between stages: what is sent, who reads it, and what it looks like."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from edge import Case, Family, check, linear, t, weight
from torch import nn

from stagecut import SplitPoint, pipe_split

case = Family()
X = t(4, 4)
BATCH = torch.export.Dim("batch", min=2, max=64)


# --- who reads what -----------------------------------------------------------------------------------


@case(X, stages=2, has={"a": linear})
def skip_over_no_stage(self, x):
    x = self.a(x)
    pipe_split()
    return x.relu() + x


@case(X, stages=3, has={"a": linear, "b": linear})
def skip_over_one_stage(self, x):
    skip = self.a(x)
    pipe_split()
    y = self.b(skip)
    pipe_split()
    return y.tanh() + skip


@case(X, stages=6, has={"a": linear, "b": linear})
def skip_over_all_stages(self, x):
    skip = y = self.a(x)
    for _ in range(5):
        pipe_split()
        y = self.b(y)
    return y + skip


@case(X, stages=5, has={"a": linear, "b": linear})
def skips_of_every_length(self, x):
    seen = [self.a(x)]
    for _ in range(4):
        pipe_split()
        seen.append(self.b(seen[-1]) + sum(seen))
    return sum(seen)


@case(X, stages=4, has={"a": linear})
def several_consumers(self, x):
    x = self.a(x)
    pipe_split()
    a = x.relu()
    pipe_split()
    b = x.tanh()
    pipe_split()
    return a + b + x.sigmoid()


@case(X, stages=3, has={"a": linear, "b": linear})
def early_output(self, x):
    early = self.a(x)
    pipe_split()
    middle = x.tanh()
    pipe_split()
    return self.b(middle), early


@case(X, stages=3, has={"a": linear, "b": linear})
def early_output_used_later(self, x):
    early = self.a(x)
    pipe_split()
    y = self.b(early)
    pipe_split()
    return early, y + early


@case(X, stages=3, has={"a": linear})
def only_the_first_stage_returns(self, x):
    out = self.a(x)
    pipe_split()
    self.b = None
    y = out.relu().add_(1)
    pipe_split()
    y.mul_(2)
    return out


@case(X, t(4, 4) + 1, stages=3, has={"a": linear})
def input_first_used_in_the_last_stage(self, x, y):
    x = self.a(x)
    pipe_split()
    x = x.relu()
    pipe_split()
    return x * y


@case(X, t(4, 4) + 1, t(4, 4) + 2, stages=3)
def inputs_used_in_reverse_order(self, x, y, z):
    z = z.tanh()
    pipe_split()
    y = y * z
    pipe_split()
    return x - y


@case(X, t(4, 4) + 1, stages=2)
def unused_input(self, x, y):
    x = x.relu()
    pipe_split()
    return x + 1


@case(X, t(2, 3), stages=2, grad=False)
def only_the_size_of_an_input_is_used(self, x, y):
    x = x.relu()
    pipe_split()
    return x * y.shape[1]


@case(X, stages=3)
def input_used_in_every_stage(self, x):
    a = x.relu()
    pipe_split()
    b = a * x
    pipe_split()
    return b - x


SAME = t(4, 4)


@case(SAME, SAME, stages=2, has={"a": linear})
def same_tensor_twice(self, x, y):
    x = self.a(x)
    pipe_split()
    return x + y


@case(SAME, SAME, SAME, stages=3, has={"a": linear})
def same_tensor_three_times_in_three_stages(self, x, y, z):
    x = self.a(x)
    pipe_split()
    x = x * y
    pipe_split()
    return x - z


@case(X, t(4, 4) + 1, stages=2, has={"a": linear, "b": linear})
def a_stage_that_depends_on_nothing_before_it(self, x, y):
    a = self.a(x)
    pipe_split()
    return a, self.b(y)


@case(X, stages=3, has={"w": weight})
def a_stage_that_computes_from_parameters_only(self, x):
    a = x.relu()
    pipe_split()
    b = self.w.tanh() @ self.w
    pipe_split()
    return a + b


@case(X, t(4, 4) + 1, stages=4, has={"a": linear, "b": linear, "c": linear})
def branches_that_join_later(self, x, y):
    left = self.a(x)
    pipe_split()
    right = self.b(y)
    pipe_split()
    left = left.relu()
    pipe_split()
    return self.c(left * right)


@case(X, stages=4)
def diamond(self, x):
    top = x.tanh()
    pipe_split()
    left = top.relu()
    pipe_split()
    right = top.exp()
    pipe_split()
    return left * right


@case(X, stages=2)
def one_value_read_twice_by_one_op(self, x):
    x = x.relu()
    pipe_split()
    return x * x


@case(X, stages=2)
def value_in_a_list_operand(self, x):
    a, b = x.relu(), x.tanh()
    pipe_split()
    return torch.cat([a, b, a, x])


# --- where the cuts are -------------------------------------------------------------------------------


@case(X, stages=2)
def empty_repeated_leading_trailing_splits(self, x):
    pipe_split()
    pipe_split()
    x = x.relu()
    pipe_split()
    pipe_split()
    x = x + 1
    pipe_split()
    return x


@case(X, stages=1)
def only_splits(self, x):
    pipe_split()
    pipe_split()
    return x


@case(X, stages=1)
def identity(self, x):
    return x


@case(X, t(2, 2), stages=1)
def identity_of_two_in_another_order(self, x, y):
    pipe_split()
    return y, x


@case(X, stages=8)
def one_op_stages(self, x):
    for _ in range(8):
        x = x * 1.5
        pipe_split()
    return x


@case(X, stages=2)
def a_split_behind_dead_code(self, x):
    x.relu()
    pipe_split()
    x = x + 1
    pipe_split()
    return x * 2


@case(X, stages=1, has={"a": linear})
def dead_stage(self, x):
    y = self.a(x)
    pipe_split()
    y.tanh()
    return y


@case(X, stages=3, has={"count": lambda: nn.Buffer(torch.zeros(()))})
def a_stage_with_only_side_effects(self, x):
    x = x.relu()
    pipe_split()
    self.count.add_(1)
    pipe_split()
    return x + 1


@case(X, stages=4)
class SplitsAtModulesAndMarkers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[linear() for _ in range(4)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            pipe_split()
        return x


@case(X, stages=3, spec={"m.0": SplitPoint.END, "m.1": SplitPoint.BEGINNING, "m.2": SplitPoint.BEGINNING})
class AdjacentSplitPoints(nn.Module):
    def __init__(self):
        super().__init__()
        self.m = nn.Sequential(linear(), linear(), linear())

    def forward(self, x):
        return self.m(x)


@case(X, stages=2, spec={"m": SplitPoint.BEGINNING}, has={"m": lambda: nn.Sequential(nn.Identity(), linear())})
def a_module_whose_first_child_does_nothing(self, x):
    return self.m(x + 1)


@case(X, stages=2, spec={"drop": SplitPoint.END}, modes=(False,), has={"drop": nn.Dropout, "a": linear})
def split_at_a_dropout_in_eval(self, x):
    return self.a(self.drop(x))


@case(X, refused="'same'", spec={"same": SplitPoint.END}, has={"same": nn.Identity})
def split_at_an_identity(self, x):
    return self.same(x.relu()) + 1


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = linear(), linear()

    def forward(self, x):
        skip = self.a(x)
        pipe_split()
        return self.b(skip) + skip


@case(X, stages=3, has={"m": Inner})
def a_split_inside_a_module_called_twice(self, x):
    return self.m(self.m(x))


@case(X, stages=3, has={"m": lambda: nn.Sequential(Inner(), Inner())})
def splits_inside_modules(self, x):
    return self.m(x).tanh()


# --- multi-result ops ---------------------------------------------------------------------------------


@case(X, stages=2)
def split_between_op_and_getitem(self, x):
    parts = torch.split(x.relu(), 2)
    pipe_split()
    return parts[0] - parts[1]


@case(X, stages=2)
def chunks_in_different_stages(self, x):
    a, b = x.tanh().chunk(2, dim=1)
    a = a.exp()
    pipe_split()
    return a * b


@case(X, stages=3)
def topk_values_and_indices_apart(self, x):
    values, indices = (x * 2).topk(2)
    pipe_split()
    values = values.exp()
    pipe_split()
    return values, indices + 1


@case(X, stages=2)
def named_tuple_result(self, x):
    found = x.max(dim=1)
    pipe_split()
    return found.values * 2, found.indices


@case(X, stages=2)
def only_one_of_many_results_crosses(self, x):
    _, b, _, _ = (x + 1).unbind()
    pipe_split()
    return b * 2


@case(t(3, 2, 4), stages=2, has={"lstm": lambda: nn.LSTM(4, 4, 2).double()})
def lstm_results_in_another_stage(self, x):
    out, (h, c) = self.lstm(x)
    pipe_split()
    return out.tanh() + h[0] + c[1]


@case(X, stages=2)
def unbind_list_of_many(self, x):
    rows = (x * 3).unbind(0)
    pipe_split()
    return torch.stack(rows[::-1])


@case(t(4, 4) + 2 * torch.eye(4, dtype=torch.float64), stages=2)
def slogdet_results(self, x):
    sign, logdet = torch.linalg.slogdet(x @ x.mT)
    pipe_split()
    return sign * logdet


# --- what a value looks like --------------------------------------------------------------------------


@case(X, stages=2)
def transposed(self, x):
    x = x.relu().t()
    pipe_split()
    return x.exp()


@case(X, stages=2)
def transposed_and_viewed_as_strided(self, x):
    x = x.relu()[:, ::2]
    pipe_split()
    return x.t() * 2, x


@case(t(4, 1), stages=2)
def expanded(self, x):
    x = x.relu().expand(4, 3)
    pipe_split()
    return x * 2, x


@case(t(2, 3, 4, 4), stages=2, has={"conv": lambda: nn.Conv2d(3, 3, 3).double()})
def channels_last(self, x):
    x = self.conv(x).contiguous(memory_format=torch.channels_last)
    pipe_split()
    return x.relu()


@case(t(2, 3, 4, 4).to(memory_format=torch.channels_last), stages=2)
def channels_last_input(self, x):
    x = x * 2
    pipe_split()
    return x + 1


@case(t(4, 4).t(), stages=2, grad=False)
def transposed_input(self, x):
    x = x * 2
    pipe_split()
    return x + 1


@case(X, stages=3)
def zero_dim(self, x):
    s = x.sum()
    pipe_split()
    y = s * 2
    pipe_split()
    return y, x * s


@case(t(0, 4), stages=2)
def empty_tensor(self, x):
    x = x.relu()
    pipe_split()
    return x.sum(0)


@case(X, stages=2)
def bool_mask_crosses(self, x):
    mask = x > 0
    pipe_split()
    return torch.where(mask, x, -x), ~mask


@case(torch.arange(4), stages=2, has={"table": lambda: nn.Embedding(8, 4).double()})
def int_crosses(self, i):
    i = (i * 2) % 8
    pipe_split()
    return self.table(i)


@case(t(4, 4, dtype=torch.complex128), stages=2)
def complex_crosses(self, x):
    x = x * 1j
    pipe_split()
    return x.conj() * 2, x.real


@case(t(4, 4, dtype=torch.complex128), stages=2)
def conjugated_crosses(self, x):
    x = (x * 1j).conj()
    pipe_split()
    return x * 2


@case(t(4, 4, dtype=torch.complex128), stages=2)
def negated_crosses(self, x):
    x = (x * 1j).conj().imag
    pipe_split()
    return x * 2


@case(t(4, 4, dtype=torch.bfloat16), stages=2, has={"a": lambda: nn.Linear(4, 4).bfloat16()})
def bf16_crosses(self, x):
    x = self.a(x)
    pipe_split()
    return self.a(x).relu()


@case(t(4, 4, dtype=torch.float16), stages=2)
def f16_crosses(self, x):
    x = x * 2
    pipe_split()
    return x + 1


@case(t(4, 4, dtype=torch.float32), stages=2)
def f32_to_f64_crosses(self, x):
    x = x.double() * 2
    pipe_split()
    return x.float() + 1, x


@case(t(4, 4, dtype=torch.float32), stages=2, grad=False)
def float8_crosses(self, x):
    x = (x * 2).to(torch.float8_e4m3fn)
    pipe_split()
    return x.to(torch.float32) + 1, x


@case(t(4, 4).to(torch.int8), stages=2)
def int8_crosses(self, x):
    x = x * 2
    pipe_split()
    return x + 1


@case(t(4, 4).to(torch.uint8), stages=2)
def uint8_shift_crosses(self, x):
    x = (x << 1) | 1
    pipe_split()
    return x ^ 3


@case(t(4, 4).abs() > 0.5, stages=2)
def bool_input(self, x):
    x = ~x
    pipe_split()
    return x & True


@case(X, stages=2)
def complex_made_of_real(self, x):
    z = torch.complex(x, x.exp())
    pipe_split()
    return z.abs()


@case(X, stages=2)
def fft_crosses(self, x):
    z = torch.fft.rfft(x)
    pipe_split()
    return torch.fft.irfft(z * 2, n=4)


@case(X, stages=2, grad=False)
def sparse_crosses(self, x):
    s = (x * 2).to_sparse()
    pipe_split()
    return s.to_dense() + 1


# --- sizes and scalars --------------------------------------------------------------------------------


@case(X, stages=2, dynamic={"x": {0: BATCH}}, calls=((t(3, 4),), (t(7, 4),)))
def symbolic_size_used_behind_the_cut(self, x):
    n = x.shape[0]
    x = x.relu()
    pipe_split()
    return x.sum(0) / n


@case(X, stages=2, dynamic={"x": {0: BATCH}}, calls=((t(3, 4),), (t(7, 4),)))
def computed_size_crosses(self, x):
    x = x.relu()
    n = x.shape[0] * 2 + 1
    pipe_split()
    return torch.zeros(n, 4, dtype=x.dtype) + x.sum(0)


@case(X, t(4, 4) + 1, stages=3, dynamic={"x": {0: BATCH}, "y": {0: BATCH}}, calls=((t(3, 4), t(3, 4)), (t(7, 4), t(7, 4))))
def one_symbol_in_two_inputs(self, x, y):
    x = x.relu()
    pipe_split()
    z = y.view(y.shape[0] * 2, 2)
    pipe_split()
    return x.reshape(-1, 2) + z


@case(X, stages=2, dynamic={"x": {0: BATCH}}, calls=((t(3, 4),), (t(7, 4),)))
def only_a_size_crosses(self, x):
    n = x.relu().shape[0]
    y = x.exp().sum()
    pipe_split()
    return y * n, n


@case(X, stages=2, dynamic={"x": {0: BATCH}}, calls=((t(3, 4),), (t(7, 4),)))
def size_returned(self, x):
    x = x * x.shape[0]
    pipe_split()
    return x + 1, x.shape[0], x.shape[0] // 2


@case(torch.tensor([3]), X, stages=2, grad=False)
def item_crosses(self, n, x):
    k = n.item()
    y = x * 2
    pipe_split()
    return y + k


@case(torch.tensor([0.5], dtype=torch.float64), X, stages=2, grad=False)
def float_item_crosses(self, n, x):
    k = n.item()
    y = x * 2
    pipe_split()
    return y * k


@case(torch.tensor([3]), X, stages=2, grad=False)
def item_as_a_size_crosses(self, n, x):
    k = n.item()
    torch._check(k >= 1)
    torch._check(k <= 4)
    y = x * 2
    pipe_split()
    return y[:k].sum() + torch.ones(k).sum(), k


@case(X, stages=2, grad=False)
def nonzero_crosses(self, x):
    found = x.gt(0.2).nonzero()
    pipe_split()
    return found * 2


@case(X, stages=2)
def masked_select_crosses(self, x):
    found = x[x > 0.2]
    pipe_split()
    return found.exp().sum()


@case(torch.tensor([1, 2]), X, stages=2, grad=False)
def tolist_crosses(self, n, x):
    a, b = n.tolist()
    y = x * a
    pipe_split()
    return y + b


@case(X, stages=2)
def sources_move_to_their_users(self, x):
    i = torch.arange(4)
    ones = torch.ones(4, dtype=torch.float64)
    x = x + ones
    pipe_split()
    return x[i] * ones


@case(X, stages=2)
def source_that_is_written(self, x):
    ones = torch.ones(4, dtype=torch.float64)
    x = x + ones
    ones.add_(1)
    pipe_split()
    return x * ones


@case(X, stages=2)
def source_returned_from_the_first_stage(self, x):
    ones = torch.ones(4)
    x = x * 2
    pipe_split()
    return x + 1, ones


@case(X, stages=2)
def like_ops(self, x):
    z = torch.zeros_like(x)
    x = x * 2
    pipe_split()
    return x + z, z


@case(X, stages=2)
def detached_skip(self, x):
    a = x.tanh()
    b = a.detach()
    pipe_split()
    return a * b, b * 2


@case(X, stages=2, grad=False)
def nothing_requires_gradient(self, x):
    x = x.relu()
    pipe_split()
    return x * 2


@case(X, stages=1)
def returns_only_constants(self, x):
    return torch.ones(3), 5


@case(stages=2, has={"w": weight})
def no_inputs(self):
    x = self.w.relu()
    pipe_split()
    return x * 2


@pytest.mark.parametrize("one", case.params())
def test_values(one: Case) -> None:
    """What crosses arrives as it is, at everyone who reads it."""
    check(one)


def test_all_boundaries_hold_only_what_is_read() -> None:
    """A value that skips a stage is not among that stage's inputs."""
    one: Any = case.cases["skip_over_all_stages"]
    pipe = one.cut(one.build())
    assert [len(block.inputs) for block in pipe.program.stages] == [1, 1, 1, 1, 1, 2]
