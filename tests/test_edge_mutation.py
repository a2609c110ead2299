"""In-place writes: to values that cross, to inputs, to state, and through views of them."""

from __future__ import annotations

import pytest
import torch
from edge import Case, Family, buffer, check, linear, t, weight
from torch import nn

from stagecut import pipe_split

case = Family()
X = t(4, 4)
BACKWARD = "next step would read a stale copy"
B = {"b": lambda: buffer(4)}
ZERO = {"b": lambda: buffer(4, value=0.0)}
TWO = ZERO | {"c": lambda: buffer(4, value=1.0)}


# --- received values ----------------------------------------------------------------------------------


@case(X, stages=2)
def received_value(self, x):
    x = x * 2
    pipe_split()
    x.add_(1)
    return x * 3


@case(X, stages=2)
def received_value_with_an_earlier_reader(self, x):
    x = x * 2
    y = x.sum()
    pipe_split()
    x.add_(1)
    return x * y


@case(X, stages=3)
def received_value_read_later(self, x):
    x = x * 2
    pipe_split()
    x.add_(1)
    pipe_split()
    return x * 3


@case(X, stages=3)
def read_before_between_and_after(self, x):
    x = x * 2
    pipe_split()
    a = x + 1
    x.mul_(3)
    pipe_split()
    b = x + 1
    x.mul_(2)
    pipe_split()
    return a, b, x


@case(X, stages=3)
def written_and_returned_early(self, x):
    x = x * 2
    pipe_split()
    y = x.add_(1)
    pipe_split()
    return x, y.relu()


@case(X, stages=2)
def view_of_a_received_value(self, x):
    x = x * 2
    pipe_split()
    x[0].add_(1)
    return x * 3


@case(X, stages=2)
def a_value_and_its_view_cross(self, x):
    x = x * 2
    row = x[0]
    pipe_split()
    row.add_(1)
    return x * 3, row * 2


@case(X, stages=2)
def a_value_and_its_view_cross_base_written(self, x):
    x = x * 2
    row = x[0]
    pipe_split()
    x.add_(1)
    return row * 2


@case(X, stages=2)
def two_overlapping_views_cross(self, x):
    x = x * 2
    a, b = x[:3], x[1:]
    pipe_split()
    a.add_(1)
    return b * 2


@case(X, stages=2)
def two_disjoint_views_cross(self, x):
    x = x * 2
    a, b = x.split(2)
    pipe_split()
    a = a.exp()
    return a + b


@case(X, stages=3)
def view_written_in_the_stage_after_next(self, x):
    x = x * 2
    row = x.t()[0]
    pipe_split()
    y = x.exp()
    pipe_split()
    row.mul_(2)
    return x + y


@case(X, stages=3)
def view_made_in_the_middle(self, x):
    x = x * 2
    pipe_split()
    column = x[:, 1]
    y = x + 1
    pipe_split()
    column.add_(y[0])
    return x, column


@case(X, stages=3)
def written_before_the_view_is_made(self, x):
    x = x * 2
    pipe_split()
    x.add_(1)
    row = x.view(-1)[2:]
    pipe_split()
    row.mul_(3)
    return x


@case(X, stages=3)
def view_of_a_view_crosses(self, x):
    x = x * 2
    v = x[1:]
    pipe_split()
    w = v[:, 0]
    y = v * 1
    pipe_split()
    w.fill_(7)
    return x + 1, v, y


@case(X, stages=2)
def reshaped_value_crosses(self, x):
    x = x * 2
    flat = x.view(16)
    pipe_split()
    flat[3] = 9
    return x


@case(X, stages=2)
def permuted_value_crosses(self, x):
    x = (x * 2).permute(1, 0)
    v = x[0]
    pipe_split()
    v.add_(1)
    return x


@case(t(2, 2), stages=2)
def expanded_value_is_written_at_its_base(self, x):
    base = x[:, :1] * 2
    wide = base.expand(2, 5)
    pipe_split()
    base.add_(1)
    return wide * 2


@case(X, stages=2, grad=False)
def as_strided_view_crosses(self, x):
    x = x * 2
    diagonal = x.as_strided((4,), (5,))
    pipe_split()
    diagonal.zero_()
    return x


@case(X, stages=2, has={"a": linear})
def as_strided_around_a_received_part(self, x):
    a = self.a(x)
    part = a[1:]
    pipe_split()
    return part.as_strided((2, 2), (4, 1), 0) * 2, part + 1


@case(X, stages=2, has={"a": linear})
def as_strided_around_a_part_of_a_parameter(self, x):
    part = self.a.weight[1:]
    x = self.a(x)
    pipe_split()
    return x * part.as_strided((4,), (4,), 0)


@case(X, stages=2, has={"a": linear})
def as_strided_around_a_view_of_what_crosses(self, x):
    a = self.a(x)
    part = a[1:]
    pipe_split()
    wide = part[1:].as_strided((2, 2), (4, 1), 0)
    wide.add_(1)
    return a * 2, part * 3


@case(X, stages=2, has={"a": linear})
def as_strided_around_all_of_what_was_written(self, x):
    a = self.a(x)
    same = a.mul_(2)
    pipe_split()
    wide = same.as_strided((2, 2), (4, 1), 0)
    same.add_(1)
    return same, wide * 3


@case(X, stages=2, grad=False)
def as_strided_around_a_written_input(self, x):
    x.relu_()
    pipe_split()
    return x.as_strided((2, 2), (4, 1), 0)


@case(X, has={"a": linear}, refused="has a part of a tensor that is written, and aten.as_strided.default may read the rest")
def as_strided_around_a_part_of_what_is_written(self, x):
    a = self.a(x)
    part = a[1:]
    a.add_(1)
    pipe_split()
    return part.as_strided((2, 2), (4, 1), 0) * 2


@case(X, stages=2)
def diagonal_view_crosses(self, x):
    x = x * 2
    d = x.diagonal()
    pipe_split()
    d.add_(1)
    return x, d


@case(X, stages=2)
def narrow_unsqueeze_select_chain(self, x):
    x = x * 2
    v = x.narrow(0, 1, 2).unsqueeze(0).select(2, 1)
    pipe_split()
    v.mul_(-1)
    return x


@case(X, stages=2, dynamic={"x": {0: torch.export.Dim("n", min=3)}}, calls=((t(3, 4),), (t(6, 4),)))
def view_of_symbolic_size_crosses(self, x):
    x = x * 2
    v = x[: x.shape[0] - 1]
    pipe_split()
    v.add_(1)
    return x


@case(X, stages=2)
def detached_alias_crosses(self, x):
    x = x * 2
    d = x.detach()
    pipe_split()
    y = d + 1
    return x * y


@case(X, stages=2, grad=False)
def detached_alias_written(self, x):
    x = x * 2
    d = x.detach()
    pipe_split()
    d.add_(1)
    return x * 3


@case(t(4, 4, dtype=torch.complex128), stages=2)
def real_part_of_a_complex_crosses(self, x):
    x = x * 2
    real = torch.view_as_real(x)
    pipe_split()
    real[..., 0].add_(1)
    return x * 2


@case(X, stages=2)
def setitem(self, x):
    x = x * 2
    pipe_split()
    x[1:3, 0] = 5.0
    return x * 3


@case(X, stages=2)
def setitem_with_a_mask(self, x):
    x = x * 2
    mask = x > 0
    pipe_split()
    x[mask] = 0.5
    return x * 3


@case(X, torch.tensor([0, 2]), stages=2)
def setitem_with_indices(self, x, i):
    x = x * 2
    pipe_split()
    x[i] = x[i] * 2 + 1
    return x * 3


@case(X, stages=3)
def setitem_from_another_stage(self, x):
    y = x * 2
    pipe_split()
    z = y.exp()
    pipe_split()
    y[0] = z[1]
    return y * z


@case(X, stages=2)
def out_argument(self, x):
    y = torch.empty(4, 4, dtype=torch.float64)
    z = x.detach() * 2
    pipe_split()
    torch.add(z, 1, out=y)
    return y * 2 + x


@case(X, stages=2, grad=False)
def out_argument_that_is_resized(self, x):
    made = torch.empty(0, dtype=torch.float64)
    pipe_split()
    torch.add(x, x, out=made)
    return made * 2


@case(X, stages=2)
def functional_inplace_relu(self, x):
    x = x * 2
    pipe_split()
    return torch.nn.functional.relu(x, inplace=True) + x


@case(X, stages=2, has={"act": lambda: nn.ReLU(inplace=True), "a": linear})
def inplace_module_at_a_cut(self, x):
    x = self.a(x)
    pipe_split()
    return self.act(x)


@case(X, stages=2)
def iadd_on_a_skip(self, x):
    x = x * 2
    skip = x
    pipe_split()
    y = x * 3
    y += skip
    skip = skip + 1
    return y * skip


@case(X, stages=2)
def written_value_given_to_autograd_twice(self, x):
    y = x.exp() * 1
    pipe_split()
    z = y * 2
    y.add_(1)
    return y + z


@case(X, stages=2)
def fill_and_zero(self, x):
    x = x * 2
    pipe_split()
    x[0].zero_()
    x[1].fill_(3)
    return x * x.sum()


@case(X, stages=2)
def scatter_and_index_add(self, x):
    x = x * 2
    pipe_split()
    x.index_add_(0, torch.tensor([0, 2]), torch.ones(2, 4, dtype=torch.float64))
    return x.scatter_(0, torch.zeros(1, 4, dtype=torch.int64), 4.0) * 2


@case(X, stages=2)
def copy_into_a_received_value(self, x):
    x = x * 2
    y = x * 3
    pipe_split()
    x.copy_(y)
    return x + y


@case(X, stages=2, grad=False)
def resized_after_it_was_made(self, x):
    y = x * 2
    pipe_split()
    y.t_()
    return y * 3


# --- inputs -------------------------------------------------------------------------------------------


@case(X, stages=2, grad=False)
def input_in_its_first_stage(self, x):
    x.add_(1)
    y = x * 2
    pipe_split()
    return y + 1


@case(X, stages=2, grad=False)
def input_written_then_read_in_the_next_stage(self, x):
    x.add_(1)
    y = x * 2
    pipe_split()
    return y * x


@case(X, stages=2, grad=False)
def input_read_then_written_in_the_next_stage(self, x):
    y = x * 2
    pipe_split()
    x.add_(1)
    return y + x


@case(X, stages=3, grad=False)
def input_written_in_two_stages(self, x):
    x.add_(1)
    y = x * 2
    pipe_split()
    x.mul_(y)
    pipe_split()
    return x - y


@case(X, stages=2, grad=False)
def input_written_and_returned(self, x):
    x.add_(1)
    y = x * 2
    pipe_split()
    return y.relu(), x


@case(X, stages=2, grad=False)
def view_of_an_input_written(self, x):
    y = x * 2
    pipe_split()
    x[0].add_(1)
    return y + 1


@case(X, stages=2, grad=False)
def view_of_an_input_crosses_and_is_written(self, x):
    row = x[1]
    y = x * 2
    pipe_split()
    row.add_(1)
    return y + x


@case(X, stages=1, grad=False)
def only_an_input_is_written(self, x):
    x.zero_()


@case(X, stages=2, grad=False)
def input_setitem(self, x):
    x[:, 0] = 3
    y = x * 2
    pipe_split()
    return y * x


SAME = t(4, 4)


@case(SAME, SAME, stages=2, grad=False, how=("pipe",))
def one_tensor_given_twice_and_written(self, x, y):
    x.add_(1)
    z = x * 2
    pipe_split()
    return z + y


@case(SAME, SAME[0], stages=2, grad=False, how=("pipe",))
def a_tensor_and_its_view_given_and_written(self, x, y):
    x.add_(1)
    z = x * 2
    pipe_split()
    return z + y


@case({"a": X, "b": t(4, 4) + 1}, stages=2, grad=False)
def input_in_a_dict_is_written(self, d):
    d["a"].add_(d["b"])
    y = d["a"] * 2
    pipe_split()
    return y + d["a"]


# --- buffers ------------------------------------------------------------------------------------------


@case(X, stages=2, has=ZERO)
def buffer_in_one_stage(self, x):
    self.b.add_(x.detach()[0])
    y = x + self.b
    pipe_split()
    return y * 2


@case(X, stages=2, has=ZERO)
def buffer_in_the_last_stage(self, x):
    y = x * 2
    pipe_split()
    self.b.add_(x.detach()[0])
    return y + self.b


@case(X, stages=2, has=ZERO)
def buffer_written_before_it_is_read_later(self, x):
    self.b.add_(1)
    y = x * 2
    pipe_split()
    return y + self.b


@case(X, stages=2, has={"a": linear}, feedback=r"stage 1 writes %linear through \.data")
def written_past_autograd_behind_a_cut(self, x):
    y = self.a(x)
    z = y * y
    pipe_split()
    y.data.add_(1)
    return z + y


@case(X, stages=2, has={"a": linear, "b": linear})
def written_past_autograd_in_one_stage(self, x):
    x = self.a(x)
    pipe_split()
    y = x * 2
    z = y * y
    y.data.add_(1)
    self.b.weight.data.mul_(0.5)
    return self.b(z) + y, y.data


@case(X, stages=2, has={"a": linear})
def data_of_what_crosses(self, x):
    y = self.a(x)
    d = y.data
    pipe_split()
    return y * 2, d * 2


@case(X, stages=2, has=ZERO, feedback=BACKWARD)
def buffer_read_before_it_is_written_later(self, x):
    y = x + self.b
    pipe_split()
    self.b.add_(1)
    return y * 2


@case(X, stages=3, has=ZERO, feedback=BACKWARD)
def buffer_read_on_both_sides_of_its_write(self, x):
    y = x + self.b
    pipe_split()
    self.b.add_(1)
    y = y * 2
    pipe_split()
    return y + self.b


@case(X, stages=2, has=ZERO, feedback=BACKWARD)
def buffer_written_in_two_stages(self, x):
    self.b.add_(1)
    y = x + self.b
    pipe_split()
    self.b.mul_(2)
    return y + self.b


@case(X, stages=3, has=ZERO)
def buffer_written_once_and_read_in_two_later_stages(self, x):
    self.b.add_(1)
    x = x * 2
    pipe_split()
    x = x + self.b
    pipe_split()
    return x * self.b


@case(X, stages=2, has=ZERO)
def buffer_reassigned(self, x):
    self.b = self.b + 1
    y = x + self.b
    pipe_split()
    return y * 2


@case(X, stages=2, has=ZERO)
def buffer_reassigned_then_read_later(self, x):
    self.b = self.b + 1
    y = x * 2
    pipe_split()
    return y + self.b


@case(X, stages=2, has=ZERO)
def buffer_reassigned_in_the_last_stage(self, x):
    y = x * 2
    pipe_split()
    self.b = self.b * 0.5 + x.detach()[0]
    return y + self.b


@case(X, stages=2)
class BufferOfASubmoduleReassigned(nn.Module):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = buffer(4, value=0.0)

        def forward(self, x):
            self.b = self.b + 1
            return x + self.b

    def __init__(self):
        super().__init__()
        self.c = self.Counting()

    def forward(self, x):
        x = self.c(x)
        pipe_split()
        return x * 2


@case(X, stages=2, has=ZERO)
def buffer_reassigned_with_old_saved_for_backward(self, x):
    y = x * self.b
    self.b = self.b * 0.5 + 1
    y = y * self.b
    pipe_split()
    return y * 2


@case(
    X,
    stages=2,
    has={"b": lambda: buffer(4, value=0.0), "c": lambda: buffer(4, value=1.0)},
)
def two_buffers_swapped(self, x):
    self.b, self.c = self.c, self.b
    y = x + self.b
    pipe_split()
    return y * 2


@case(X, stages=2, has=ZERO)
def buffer_reassigned_then_written(self, x):
    self.b = self.b * 0.5 + x.detach().mean(0)
    self.b.copy_(x.detach().sum(0))
    y = x * 2
    pipe_split()
    return y + self.b


@case(X, stages=2, has=ZERO)
def buffer_reassigned_then_a_row_written(self, x):
    self.b = self.b * 0.5 + x.detach().mean(0)
    self.b[1] = 7.0
    y = x * 2
    pipe_split()
    return y + self.b


@case(X, stages=2, has=TWO)
def old_value_moves_to_another_buffer(self, x):
    self.c = self.b
    self.b = x.detach().sum(0) + self.b
    y = x + self.c
    pipe_split()
    return y * 2


@case(X, stages=2, has=ZERO, grad=False)
def buffer_reassigned_to_an_input_that_is_written(self, x):
    self.b = x[0]
    x.add_(1)
    y = x * 1
    pipe_split()
    return y * 2


@case(X, refused="second name")
class BufferWithTwoNamesReassignedUnderOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = buffer(4, value=0.0)
        self.two = self.one

    def forward(self, x):
        self.one = self.one + 1
        y = x * 2
        pipe_split()
        return y + self.two


@case(X, has=TWO, refused="second name")
def two_buffers_made_one(self, x):
    self.c = self.b
    self.b.add_(1)
    y = x * 2
    pipe_split()
    return y + self.c


@case(X, has=ZERO, refused="size")
def buffer_that_grows(self, x):
    self.b = torch.cat([self.b, x[0].detach()])
    y = x * 2
    pipe_split()
    return y + self.b.sum()


@case(X, has={"b": lambda: buffer(4)}, refused="removes state")
def buffer_set_to_none(self, x):
    self.b = None
    y = x * 2
    pipe_split()
    return y + 1


@case(X, refused="'k'")
def buffer_registered_in_forward(self, x):
    self.register_buffer("k", torch.zeros(4, dtype=x.dtype))
    y = x * 2
    pipe_split()
    return y + self.k


@case(X, has={"w": weight}, refused="optimizer")
def parameter_reassigned(self, x):
    self.w = nn.Parameter(self.w * 2)
    y = x * 2
    pipe_split()
    return y @ self.w


@case(X, stages=2, has=ZERO, grad=False)
def buffer_reassigned_to_an_input(self, x):
    y = x + self.b
    self.b = x[0] * 1
    pipe_split()
    return y * 2


@case(X, stages=2, has=ZERO, feedback=BACKWARD)
def buffer_read_then_reassigned_later(self, x):
    y = x + self.b
    pipe_split()
    self.b = self.b + 1
    return y * 2


@case(X, stages=3, has=ZERO, feedback=BACKWARD)
def buffer_reassigned_in_two_stages(self, x):
    self.b = self.b + 1
    y = x + self.b
    pipe_split()
    self.b = self.b * 2
    y = y + self.b
    pipe_split()
    return y * self.b


@case(X, stages=2, has=ZERO)
def old_and_new_of_a_reassigned_buffer(self, x):
    old = self.b
    self.b = self.b + 1
    y = x * self.b
    pipe_split()
    return y + old


@case(X, stages=2, has=ZERO)
def buffer_returned_after_a_write(self, x):
    y = x * 2
    pipe_split()
    self.b.add_(1)
    return y + 1, self.b


@case(X, stages=2, has=ZERO)
def buffer_returned_before_a_write_in_place(self, x):
    b = self.b
    y = x * 2
    pipe_split()
    b.add_(1)
    return y + 1, b


@case(X, stages=2, has=ZERO, owns=False)
def buffer_written_reassigned_and_returned(self, x):
    self.b.mul_(0.5)
    self.b = self.b * 0.5 + x.detach().mean(0)
    pipe_split()
    return x * 2, self.b


@case(X, stages=2, has={"count": lambda: nn.Buffer(torch.zeros((), dtype=torch.int64))})
def counter(self, x):
    self.count += 1
    y = x * 2
    pipe_split()
    return y * self.count


@case(X, stages=2, has={"b": lambda: buffer(4, persistent=False, value=0.0)})
def non_persistent_counter(self, x):
    self.b += 1
    y = x * 2
    pipe_split()
    return y * self.b


@case(X, stages=2, has={"ema": lambda: buffer(4, value=1.0), "a": linear})
def moving_average(self, x):
    x = self.a(x)
    pipe_split()
    with torch.no_grad():
        self.ema.mul_(0.9).add_(x.mean(0), alpha=0.1)
    return x / self.ema


@case(X, stages=2, has={"ema": lambda: buffer(4, value=1.0), "a": linear}, feedback=BACKWARD)
def moving_average_read_a_stage_earlier(self, x):
    x = self.a(x) + self.ema
    pipe_split()
    with torch.no_grad():
        self.ema.lerp_(x.mean(0), 0.1)
    return x * 2


@case(t(1, 4), torch.tensor(1), stages=2, has={"k": lambda: buffer(8, 4, value=0.0)}, grad=False)
def key_value_cache(self, x, at):
    self.k.index_copy_(0, at.view(1), x)
    y = x @ self.k.t()
    pipe_split()
    return y.softmax(-1)


@case(t(1, 4), torch.tensor(1), has={"k": lambda: buffer(8, 4, value=0.0)}, grad=False, refused="data in a tensor", traced_since="2.14")
def cache_written_at_a_tensor_index(self, x, at):
    self.k[at] = x[0]
    pipe_split()
    return (x @ self.k.t()).softmax(-1)


@case(t(1, 4), torch.tensor(1), stages=2, has={"k": lambda: buffer(8, 4, value=0.0)}, grad=False)
def cache_written_in_one_stage_read_in_the_next(self, x, at):
    self.k.index_copy_(0, at[None], x)
    y = x * 2
    pipe_split()
    return (y @ self.k.t()).softmax(-1)


@case(X, stages=2, has=ZERO)
def row_of_a_buffer(self, x):
    self.b[1] = x.detach().sum()
    y = x * 2
    pipe_split()
    return y + self.b[1:3].sum()


@case(X, stages=2, has={"b": lambda: buffer(4, 4, value=0.0)})
def view_of_a_buffer_crosses_and_is_written(self, x):
    row = self.b[0]
    y = x + 1
    pipe_split()
    row.add_(1)
    return y + row


@case(X, stages=2, has={"b": lambda: buffer(4, 4, value=0.0)}, feedback=BACKWARD)
def view_of_a_buffer_written_where_the_buffer_was_read(self, x):
    y = x + self.b
    row = self.b[0]
    pipe_split()
    row.add_(1)
    return y + row


@case(X, stages=2, modes=(True, False), switch=True, has={"norm": lambda: nn.BatchNorm1d(4).double()})
def batch_norm(self, x):
    x = self.norm(x)
    pipe_split()
    return x * 2


@case(X, stages=2, modes=(True,), has={"norm": lambda: nn.BatchNorm1d(4).double()}, feedback=BACKWARD)
def batch_norm_shared_by_two_stages(self, x):
    x = self.norm(x)
    pipe_split()
    return self.norm(x * 2)


@case(
    X,
    stages=2,
    modes=(False,),
    has={"norm": lambda: nn.BatchNorm1d(4).double()},
)
def batch_norm_shared_by_two_stages_in_eval(self, x):
    x = self.norm(x)
    pipe_split()
    return self.norm(x * 2)


@case(X, stages=2, has={"norm": lambda: nn.BatchNorm1d(4).double()})
def running_mean_read_in_the_next_stage(self, x):
    x = self.norm(x)
    pipe_split()
    return x + self.norm.running_mean


@case(X, stages=2, has={"norm": lambda: nn.BatchNorm1d(4, momentum=None).double()})
def batch_norm_with_a_cumulative_average(self, x):
    x = self.norm(x)
    pipe_split()
    return x * 2


@case(t(2, 3, 4), stages=2, has={"norm": lambda: nn.InstanceNorm1d(3, track_running_stats=True).double()})
def instance_norm_with_statistics(self, x):
    x = self.norm(x)
    pipe_split()
    return x * 2


@case(X, stages=2)
class AliasedBufferWrittenUnderOneName(nn.Module):
    def __init__(self):
        super().__init__()
        shift = torch.zeros(4, dtype=torch.float64)
        self.register_buffer("one", shift)
        self.register_buffer("two", shift)

    def forward(self, x):
        self.one.add_(1)
        y = x * 2
        pipe_split()
        return y + self.two


@case(X, stages=2)
class BufferWrittenThroughAnotherThatSharesStorage(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("whole", torch.zeros(4, 4, dtype=torch.float64))
        self.register_buffer("row", self.whole[1])

    def forward(self, x):
        self.row.add_(1)
        y = x * 2
        pipe_split()
        return y + self.whole


@case(X, stages=2, grad=False, has={"w": weight})
def parameter_written_under_no_grad(self, x):
    with torch.no_grad():
        self.w.mul_(0.9)
    x = x @ self.w
    pipe_split()
    return x * 2


@case(X, stages=2, has={"w": weight}, feedback=BACKWARD)
def parameter_written_a_stage_later(self, x):
    x = x + self.w.detach()
    pipe_split()
    with torch.no_grad():
        self.w.mul_(0.9)
    return x * 2


@case(X, stages=2, has={"a": linear})
def parameter_data_written(self, x):
    self.a.weight.data.clamp_(-0.1, 0.1)
    x = self.a(x)
    pipe_split()
    return x * 2


@case(X, stages=2, has={"a": linear})
def parameter_data_written_behind_its_use(self, x):
    x = self.a(x)
    self.a.weight.data.clamp_(-0.1, 0.1)
    pipe_split()
    return x * 2


@case(X, stages=2, has={"a": linear, "n": buffer})
def buffer_data_written(self, x):
    self.n.data += 1
    x = self.a(x) + self.n.data
    pipe_split()
    return x * 2


@case(X, has={"a": linear}, refused="data of a tensor")
def parameter_data_replaced(self, x):
    self.a.weight.data = self.a.weight.data.clamp(-0.1, 0.1)
    x = self.a(x)
    pipe_split()
    return x * 2


@case(X, stages=2)
class ParameterDataReplacedInASubmodule(nn.Module):
    class Clipped(nn.Linear):
        def forward(self, x):
            self.weight.data = self.weight.data.clamp(-0.1, 0.1)
            return super().forward(x)

    def __init__(self):
        super().__init__()
        self.a = self.Clipped(4, 4).double()

    def forward(self, x):
        x = self.a(x)
        pipe_split()
        return x * 2


@case(X, stages=2, has={"c": lambda: t(4)})
def plain_tensor_attribute_written(self, x):
    self.c.add_(1)
    y = x + self.c
    pipe_split()
    return y * 2


@case(X, stages=2, has={"c": lambda: t(4)}, feedback="'c'")
def plain_tensor_attribute_read_then_written(self, x):
    y = x + self.c
    pipe_split()
    self.c.add_(1)
    return y * 2


@case(X, stages=2, has={"c": lambda: [t(4)]})
def plain_tensor_in_a_list_written(self, x):
    self.c[0].add_(1)
    y = x + self.c[0]
    pipe_split()
    return y * 2


@case(X, stages=2)
class InplaceInASubmoduleOnItsInput(nn.Module):
    class Block(nn.Module):
        def forward(self, x):
            x.add_(1)
            return x.relu()

    def __init__(self):
        super().__init__()
        self.block = self.Block()

    def forward(self, x):
        x = x * 2
        pipe_split()
        y = self.block(x)
        return x + y


@pytest.mark.parametrize("one", case.params())
def test_mutation(one: Case) -> None:
    """Every reader sees the writes that came before it, and no other."""
    check(one)
