"""Batches are known: along which dims an input is divided, and how outputs are put together, is shown by evidence."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import batches
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from batches import marks, tokens, with_patches
from cluster.matrix import on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.pipelining.microbatch import TensorChunkSpec, _Replicate, sum_reducer
from torch.export import Dim

from stagecut import Driver, InputError, SplitPoint, load, pipe_split, pipeline
from stagecut.backend.ranks.filled import fillings
from stagecut.frontend.capture.batch import mark_batches
from stagecut.frontend.capture.samples import Example, Runs
from stagecut.frontend.capture.together import MIXED, Search
from stagecut.ir.errors import ParseError
from stagecut.ir.over_samples import over_samples
from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import fingerprint, text

BATCH, LENGTH = Dim("batch", min=2, max=64), Dim("length", min=2, max=64)

KINDS: dict[str, tuple[type[nn.Module], Callable[[], tuple[Any, ...]], Any, list[str], list[str]]] = {
    "seq first": (batches.SeqFirst, lambda: (tokens(8, 4),), None, ["batch(1)"], ["batch(1)"]),
    "seq first, sizes vary": (batches.SeqFirst, lambda: (tokens(8, 4),), {"tokens": {0: LENGTH, 1: BATCH}}, ["batch(1)"], ["batch(1)"]),
    "state beside": (
        batches.Recurrent, lambda: (tokens(2, 5), torch.randn(2, 2, 8)), None, ["batch(0)", "batch(1)"], ["batch(0)", "batch(1)"],
    ),
    "data decide": (batches.Detector, lambda: (torch.randn(2, 8),), None, ["batch(0)"], ["batch(0: any)"]),
    "list": (batches.Images, lambda: ([torch.randn(3, 8, 8)] * 2,), None, ["batch(item)"] * 2, ["batch(0)"]),
    "positions first": (batches.Positions, lambda: (torch.arange(6), tokens(3, 6)), None, ["", "batch(0)"], ["batch(0)"]),
    "positions first, sizes vary": (
        batches.Positions, lambda: (torch.arange(6), torch.zeros(3, 6, dtype=torch.long)),
        {"positions": {0: LENGTH}, "tokens": {0: BATCH, 1: LENGTH}}, ["", "batch(0)"], ["batch(0)"],
    ),
    "four times": (
        batches.Negatives, lambda: (torch.randn(3, 8), torch.randn(12, 8)), None, ["batch(0)", "batch(0: 4*b)"], ["batch(0)"],
    ),
    "four times, sizes vary": (
        batches.Negatives, lambda: (torch.randn(3, 8), torch.randn(12, 8)), {"anchor": {0: BATCH}, "negatives": {0: 4 * BATCH}},
        ["batch(0)", "batch(0: 4*b)"], ["batch(0)"],
    ),
    "patches": (batches.Patches, lambda: with_patches(2), None, ["batch(0)", "batch(0: 3*b)"], ["batch(0)"]),
    "patches, sizes vary": (
        batches.Patches, lambda: with_patches(2), {"tokens": {0: BATCH}, "patches": {0: Dim("patches", min=2, max=256)}},
        ["batch(0)", "batch(0: b1)"], ["batch(0)"],
    ),
    "numbers in another order": (batches.Flipped, lambda: (torch.randn(3, 4),), None, ["batch(0)"], [""]),
    "cache": (batches.Cached, lambda: (tokens(3, 1),), None, ["batch(0)"], ["batch(0)"]),
    "own loss": (
        batches.Language, lambda: (tokens(8, 6), tokens(8, 6)), None, ["batch(0)"] * 2, ["batch(mean)", "batch(0)", "batch(sum)", ""],
    ),
    "pairs": (batches.Pairs, lambda: (torch.randn(2, 4), torch.randn(2, 4)), None, ["batch(0)", "batch(0: b1)"], ["batch(0: b + b1)"]),
    "towers": (batches.Towers, lambda: (torch.randn(2, 4), torch.randn(3, 4)), None, ["batch(0)", "batch(0: b1)"], [""]),
    "norm over the batch": (batches.Pictures, lambda: (torch.randn(4, 3, 8, 8),), None, ["batch(0)"], ["batch(0)"]),
    "one sample": (batches.Pictures, lambda: (torch.randn(1, 3, 8, 8),), None, ["batch(0)"], ["batch(0)"]),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_the_batch_of_every_input_and_output_is_known(name: str) -> None:
    make, inputs, sizes, *expected = KINDS[name]
    torch.manual_seed(0)
    pipe = pipeline(make(), inputs(), dynamic_shapes=sizes, check=None)
    assert list(marks(pipe)) == expected
    again = parse(text(pipe.program))
    assert text(again) == text(pipe.program)


ON_META = ["seq first", "seq first, sizes vary", "state beside", "positions first", "cache", "own loss", "four times"]


@pytest.mark.parametrize("name", ON_META)
def test_a_model_without_values_tells_the_same(name: str) -> None:
    make, inputs, sizes, *expected = KINDS[name]
    flat = tuple(x.to("meta") for x in inputs())
    assert list(marks(pipeline(make().to("meta"), flat, dynamic_shapes=sizes, check=None))) == expected


def test_the_order_of_rows_is_not_known_without_values() -> None:
    flat = tuple(torch.randn(2, 4, device="meta") for _ in range(2))
    assert marks(pipeline(batches.Pairs().to("meta"), flat, check=None))[1] == [""]


class Both(nn.Module):
    """Rows of the same samples, all of them twice, and twice for each."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.linear(x)
        return torch.cat([y, y + 1]), y.view(-1, 4)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_blocks_and_rows_of_a_sample_are_told_apart(batch: int) -> None:
    pipe = pipeline(Both(), (torch.randn(batch, 4),), check=None)
    assert marks(pipe)[1] == ["batch(0: b + b)", "batch(0: 2*b)"]


class Blocked(nn.Module):
    """Takes four rows for each sample, but all first ones before all second ones: no chunk of them is a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.linear(rows).view(4, -1, 8).sum(0)  # type: ignore[no-any-return]


def test_a_batch_in_blocks_is_not_shown_to_be_separate() -> None:
    torch.manual_seed(0)
    model, inputs = Blocked(), (torch.randn(2, 4), torch.randn(8, 4))
    pipe = pipeline(model, inputs, check=None)
    example = Example.of(pipe._call_spec, inputs, {})
    assert example is not None
    runs = Runs(model, (inputs, {}), real=True)
    with runs.unchanged():
        shown = Search(example, runs, pipe.program).attempt({0: 0, 1: 0})
    assert shown is not None
    assert shown.state == MIXED


# --- nothing else happens ---------------------------------------------------------------------------------


SEEN: list[Any] = []


class Busy(nn.Module):
    """Leaves traces wherever it can."""

    steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("steps", torch.zeros(()))
        self.kept: dict[str, Any] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps.add_(1)
        return F.dropout(self.norm(self.linear(x)), 0.5, self.training)


def test_the_model_and_all_around_it_are_as_before() -> None:
    model, inputs = Busy(), (torch.randn(3, 4),)
    model.linear.register_forward_hook(lambda module, args, made: SEEN.append(made) or model.kept.update(last=made))
    pipe = pipeline(model, inputs, check=None)
    SEEN.clear()
    model.kept.clear()
    before, given = deepcopy(model.state_dict()), inputs[0].clone()
    own = torch.get_rng_state(), random.getstate()
    printed = io.StringIO()
    for real in (True, False):
        with redirect_stdout(printed):
            mark_batches(pipe.program, model, pipe._call_spec, inputs, {}, None, real)
        assert marks(pipe) == (["batch(0)"], ["batch(0)"])
    assert not SEEN
    assert not model.kept
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in before.items())
    assert torch.equal(given, inputs[0])
    assert torch.equal(own[0], torch.get_rng_state())
    assert own[1] == random.getstate()
    assert not printed.getvalue()


class Refuses(nn.Module):
    """Runs on two samples only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] != 2:
            raise ValueError("two samples, please")
        return self.linear(x)  # type: ignore[no-any-return]


def test_a_model_that_refuses_other_sizes_is_cut_and_nothing_is_said() -> None:
    pipe = pipeline(Refuses(), (torch.randn(2, 4),), check=None)
    assert marks(pipe) == ([""], [""])


# --- text -------------------------------------------------------------------------------------------------


PROGRAM = """program @m phase=traced {{
  input %x : f32[4,8]{0}
  %y = aten.relu.default(%x) : f32[4,8]{1}
  output (%y,)
}}
"""


@pytest.mark.parametrize("mark", ["", " batch(0)", " batch(1: 4*b)", " batch(0: b + 2*b1)", " batch(item: b2)", " batch(0: any)"])
def test_batches_are_printed_and_read(mark: str) -> None:
    source = PROGRAM.format(mark, " grad" + mark)
    assert text(parse(source)) == source
    assert fingerprint(parse(source)) == fingerprint(parse(PROGRAM.format("", " grad")))


@pytest.mark.parametrize("mark", [" batch(2)", " batch(here)", " batch(0: 4*c)", " batch(0: )", " batch(0", " batch(0: 0*b)"])
def test_what_is_no_batch_is_refused_at_its_place(mark: str) -> None:
    with pytest.raises(ParseError) as caught:
        parse(PROGRAM.format(mark, ""))
    assert caught.value.line == 2


@pytest.mark.parametrize(
    ("ops", "kind"),
    [
        ("%r = aten.mean.default(%x) : f32[]", "mean"),
        ("%r = aten.sum.default(%x) : f32[]", "sum"),
        ("%m = aten.mean.default(%x) : f32[]\n  %r = aten.mul.Tensor(%m, 0.5) : f32[]", "mean"),
        ("%m = aten.mean.default(%x) : f32[]\n  %r = aten.mul.Tensor(%m, 4) : f32[]", ""),
        ("%m = aten.sum.default(%x) : f32[]\n  %r = aten.div.Tensor(%m, 4) : f32[]", ""),
        ("%m = aten.mean.default(%x) : f32[]\n  %r = aten.sqrt.default(%m) : f32[]", ""),
        ("%m = aten.mean.default(%x) : f32[]\n  %n = aten.sum.default(%x) : f32[]\n  %r = aten.add.Tensor(%m, %n) : f32[]", ""),
        ("%m = aten.mean.default(%x) : f32[]\n  %n = aten.div.Tensor(%m, %m) : f32[]\n  %r = aten.detach.default(%n) : f32[]", ""),
        (
            "%m = aten.mean.default(%x) : f32[]\n  %s = aten.stack.default([%m, %m]) : f32[2]\n  %r = aten.sum.default(%s) : f32[]",
            "mean",
        ),
        ("%r = aten.mse_loss.default(%x, %x) : f32[]", "mean"),
        ("%r = aten.mse_loss.default(%x, %x, 2) : f32[]", "sum"),
        ("%r = aten.cross_entropy_loss.default(%x, %x, None, 1) : f32[]", "mean"),
    ],
)
def test_means_and_sums_are_told_by_the_ops(ops: str, kind: str) -> None:
    program = parse(f"program @m phase=traced {{\n  input %x : f32[4,8]\n  {ops}\n  output (%r,)\n}}\n")
    assert over_samples(program.outputs[0]) == kind


# --- one property -----------------------------------------------------------------------------------------


MOVES = ("transpose", "rows", "columns", "twice", "beside", "other", "square", "scale")


class Moves(nn.Module):
    """Moves the elements of two inputs around."""

    def __init__(self, plan: tuple[str, ...]) -> None:
        super().__init__()
        self.plan, self.weight = plan, nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Both inputs are [b, 4, 2]."""
        for move in self.plan:
            if move == "transpose":
                x, y = x.transpose(0, 1), y.transpose(0, 1)
            elif move == "rows":
                x, y = x.reshape(-1, *x.shape[2:], 1), y.reshape(-1, *y.shape[2:], 1)
            elif move == "columns":
                x, y = x.flatten(1).unsqueeze(-1), y.flatten(1).unsqueeze(-1)
            elif move == "twice":
                x, y = torch.cat([x, x + 1]), torch.cat([y, y + 1])
            elif move == "beside":
                x, y = torch.cat([x, x + 1], -1), torch.cat([y, y + 1], -1)
            elif move == "other":
                x = torch.cat([x, y])
            elif move == "square":
                x = x * x
        return x * self.weight


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(MOVES), max_size=5).map(tuple), st.integers(1, 3))
def test_outputs_are_joined_as_runs_at_two_sizes_show(alone: None, plan: tuple[str, ...], batch: int) -> None:
    torch.manual_seed(1)
    model = Moves(plan)
    x, y = torch.randn(3 * batch, 4, 2), torch.randn(3 * batch, 4, 2)
    pipe = pipeline(model, (x[:batch], y[:batch]), check=None)
    whole = model(x, y)
    parts = [model(*pair) for pair in zip(x.split(batch), y.split(batch), strict=True)]
    plain = [
        dim
        for dim in range(whole.dim())
        if torch.cat(parts, dim).shape == whole.shape and torch.equal(torch.cat(parts, dim), whole)
    ]  # fmt: skip
    output, _ = Driver(pipe, "GPipe", 3).eval(x, y)
    (mark,) = marks(pipe)[1]
    if isinstance(output, torch.Tensor):
        assert mark
        torch.testing.assert_close(output, whole)
    else:
        assert not plain, (plan, mark)
        for part, expected in zip(output, parts, strict=True):
            torch.testing.assert_close(part, expected)


# --- one process: what is divided -------------------------------------------------------------------------


def driver_of(model: nn.Module, example: tuple[Any, ...], count: int = 4, **options: Any) -> Driver:
    specs = {name: options.pop(name) for name in list(options) if name.endswith("_spec") and name != "split_spec"}
    loss = options.pop("loss", None)
    return Driver(pipeline(model, example, check=None, **options), "GPipe", count, loss, **specs)


def test_the_example_as_the_whole_batch_is_an_error(alone: None) -> None:
    inputs = (tokens(8, 6), tokens(8, 6))
    driver = driver_of(batches.Language(), inputs)
    with pytest.raises(InputError, match=r"nothing is divided among 4 micro-batches: input 'tokens' has shape \[8, 6\]"):
        driver.step(*inputs)


def test_inputs_that_go_together_have_as_many_samples(alone: None) -> None:
    driver = driver_of(batches.Language(), (tokens(2, 6), tokens(2, 6)))
    with pytest.raises(InputError, match=r"input 'labels' has a batch of 2, and input 'tokens', which goes with it, one of 8"):
        driver.step(tokens(8, 6), tokens(2, 6))


def test_a_batch_of_another_size_is_refused_with_its_sizes(alone: None) -> None:
    driver = driver_of(batches.Language(), (tokens(2, 6), tokens(2, 6)))
    with pytest.raises(InputError, match="input 'tokens' has a batch of 9, which 4 micro-batches do not divide"):
        driver.step(tokens(9, 6), tokens(9, 6))
    with pytest.raises(InputError, match=r"4 micro-batches of \[2, 6\], as traced, have 8 along dim 0"):
        driver.step(tokens(12, 6), tokens(12, 6))
    with pytest.raises(InputError, match="n_microbatches=8, or pass dynamic_shapes"):
        driver.step(tokens(16, 6), tokens(16, 6))


def test_an_input_that_is_left_out_is_named(alone: None) -> None:
    driver = driver_of(batches.Language(), (tokens(2, 6), tokens(2, 6)))
    with pytest.raises(InputError, match=r"input 'labels' is missing, or None, .* shape \[2, 6\]"):
        driver.step(tokens(8, 6), None)


class OwnLoss(nn.Module):
    """Computes its loss from an argument whose name is near to the driver's word."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
        out = self.layer(x)
        return out.mean(1) if targets is None else (out - targets).square().mean(1) * scale


def test_the_drivers_own_word_is_told_from_an_argument_of_the_model(alone: None) -> None:
    x = torch.ones(8, 4)
    driver = driver_of(OwnLoss(), (x[:2], x[:2], 2.0), loss=lambda out: out.mean())
    own = r"the model's argument 'targets' is missing: `target=` is the driver's own word.*\n.*driver.step\(\.\.\., targets="
    with pytest.raises(InputError, match=own):
        driver.step(x, target=x)
    with pytest.raises(InputError, match=own):
        driver.step(x=x, target=x, scale=2.0)
    with pytest.raises(InputError, match=r"'targets' is missing: `target_mbs=` is"):
        driver.step(kwarg_mbs=[{"x": x[:2]}] * 4, target_mbs=[x[:2]] * 4)
    with pytest.raises(InputError, match="has no 'y'"):
        driver.step(y=x, target=x)
    with pytest.raises(InputError, match="input 'targets' is missing, or None"):
        driver.step(x, scale=2.0)


def test_the_drivers_own_word_goes_to_the_loss(alone: None) -> None:
    """The model needs nothing of that name, or has it."""
    x = torch.ones(8, 4)
    whole = driver_of(OwnLoss(), (x[:2],), loss=lambda out, target: (out - target[:, 0]).mean())
    whole.step(x, target=x)
    both = driver_of(OwnLoss(), (x[:2], x[:2]), loss=lambda out, target: (out - target[:, 0]).mean())
    both.step(x, x, target=x)
    both.step(x, targets=x, target=x)


@pytest.mark.parametrize("count", [0, -1, 2.0])
def test_a_batch_has_a_whole_number_of_micro_batches(alone: None, count: int) -> None:
    pipe = pipeline(batches.Language(), (tokens(2, 6), tokens(2, 6)))
    with pytest.raises(InputError, match="n_microbatches="):
        Driver(pipe, "GPipe", count)


def test_where_no_batch_is_known_the_driver_asks(alone: None) -> None:
    driver = driver_of(Refuses(), (torch.randn(2, 4),))
    with pytest.raises(InputError, match=r"it is not known that samples lie along dim 0.*\n.*args_chunk_spec"):
        driver.eval(torch.randn(8, 4))
    with pytest.raises(InputError, match=r"it is not known along which dims.*\n.*args_chunk_spec"):
        driver.eval(torch.randn(2, 4))


def test_torch_s_specs_say_what_the_program_does_not(alone: None) -> None:
    model, x = Refuses(), torch.randn(8, 4)
    expected = torch.cat([model(part) for part in x.split(2)])
    chunk = TensorChunkSpec(0)
    output, _ = driver_of(model, (x[:2],), args_chunk_spec=(chunk,)).eval(x)
    assert isinstance(output, list)
    driver = driver_of(model, (x[:2],), args_chunk_spec=(chunk,), output_merge_spec=chunk)
    torch.testing.assert_close(driver.eval(x)[0], expected)
    assert not driver.notes
    by_name = driver_of(model, (x[:2],), kwargs_chunk_spec={"x": chunk}, output_merge_spec=chunk)
    torch.testing.assert_close(by_name.eval(x=x)[0], expected)


def test_a_spec_overrules_the_program(alone: None) -> None:
    model = batches.Towers()
    query, document = torch.randn(8, 4), torch.randn(12, 4)
    driver = driver_of(
        model, (query[:2], document), args_chunk_spec=(TensorChunkSpec(0), _Replicate()), output_merge_spec=TensorChunkSpec(0)
    )
    torch.testing.assert_close(driver.eval(query, document)[0], model(query, document))
    with pytest.raises(InputError, match=r"argument 'document' of shape \[2, 4\] cannot be divided along dim 0 among 4"):
        driver_of(model, (query[:2], document), args_chunk_spec=(None, TensorChunkSpec(0))).eval(query, document[:2])
    with pytest.raises(InputError, match="its chunk spec a int that does not fit"):
        driver_of(model, (query[:2], document), args_chunk_spec=(0, None)).eval(query, document)


def test_reducers_put_numbers_together(alone: None) -> None:
    model, inputs = batches.Language(), (tokens(8, 6), tokens(8, 6))
    chunk = TensorChunkSpec(0)
    merge = {"loss": sum_reducer, "logits": chunk, "count": sum_reducer, "size": sum_reducer}
    output, _ = driver_of(model, tuple(x[:2] for x in inputs), output_merge_spec=merge).eval(*inputs)
    parts = [model(*pair) for pair in zip(*(x.split(2) for x in inputs), strict=True)]
    for name in ("loss", "count", "size"):
        torch.testing.assert_close(output[name], sum((p[name] for p in parts), torch.tensor(0.0)), check_dtype=False)
    with pytest.raises(InputError, match="output_merge_spec does not fit"):
        driver_of(model, tuple(x[:2] for x in inputs), output_merge_spec={"loss": chunk}).eval(*inputs)


def test_means_are_averaged_counts_summed_and_the_rest_is_listed_with_a_note(alone: None) -> None:
    model, inputs = batches.Language(), (tokens(8, 6), tokens(8, 6))
    driver = driver_of(model, tuple(x[:2] for x in inputs))
    output, _ = driver.eval(*inputs)
    expected = model(*inputs)
    for name in ("loss", "logits", "count"):
        torch.testing.assert_close(output[name], expected[name])
    assert [tuple(part.shape) for part in output["size"]] == [()] * 4
    assert len(driver.notes) == 1
    assert "output 'size' is a list" in driver.notes[0]


def test_rows_of_two_batches_are_joined_block_by_block(alone: None) -> None:
    model, pair = batches.Pairs(), (torch.randn(8, 4), torch.randn(8, 4))
    output, _ = driver_of(model, tuple(x[:2] for x in pair)).eval(*pair)
    torch.testing.assert_close(output, model(*pair))


def test_one_of_two_batches_may_be_the_same_for_all(alone: None) -> None:
    model, query, document = batches.Towers(), torch.randn(8, 4), torch.randn(3, 4)
    output, _ = driver_of(model, (query[:2], document)).eval(query, document)
    assert len(output) == 4
    torch.testing.assert_close(torch.cat(output), model(query, document))


def test_batches_that_grow_differently_are_not_paired(alone: None) -> None:
    sizes = {"query": {0: BATCH}, "document": {0: Dim("documents", min=2, max=64)}}
    driver = driver_of(batches.Towers(), (torch.randn(2, 4), torch.randn(3, 4)), dynamic_shapes=sizes)
    with pytest.raises(InputError, match=r"inputs 'query' and 'document' have batches of 8 and 24, in the example 2 and 3"):
        driver.eval(torch.randn(8, 4), torch.randn(24, 4))


class Expanded(batches.Patches):
    """The mask is expanded to the shape of what it fills, as in transformers."""

    def forward(self, tokens: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        x = x.masked_scatter((tokens == 19).unsqueeze(-1).expand_as(x), self.tower(patches))
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [batches.Patches, Expanded])
@pytest.mark.parametrize("varying", [False, True])
def test_samples_that_take_unequal_parts_of_an_input_are_not_divided_equally(alone: None, make: type[nn.Module], varying: bool) -> None:
    sizes = {"tokens": {0: BATCH}, "patches": {0: Dim("patches", min=2, max=256)}} if varying else None
    model = make()
    driver = driver_of(model, with_patches(2), dynamic_shapes=sizes)
    even = with_patches(8)
    torch.testing.assert_close(driver.eval(*even)[0], model(*even))
    uneven, patches = with_patches(8)
    uneven[0, 1], uneven[7, 5] = 0, 19
    with pytest.raises(InputError, match=r"a micro-batch has 48 numbers to put where a mask has 40 places"):
        driver.eval(uneven, patches)
    if varying:
        mbs = [(uneven[:2], patches[:5]), (uneven[2:4], patches[5:11]), (uneven[4:6], patches[11:17]), (uneven[6:], patches[17:])]
        output, _ = driver.eval(arg_mbs=mbs)
        torch.testing.assert_close(output, model(uneven, patches))


# --- one process: targets ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    rows: torch.Tensor
    weights: torch.Tensor
    name: str


@dataclass(slots=True)
class Slotted:
    inner: dict[str, Wanted]


def test_targets_are_divided_wherever_they_are(alone: None) -> None:
    seen: list[Any] = []

    def loss(output: torch.Tensor, target: Any) -> torch.Tensor:
        seen.append(target)
        return (output.mean(-1) - target.inner["a"].rows).square().mean()

    driver = driver_of(nn.Sequential(nn.Linear(4, 3)), (torch.randn(2, 4),), loss=loss)
    rows = torch.arange(8.0)
    driver.step(torch.randn(8, 4), target=Slotted({"a": Wanted(rows, torch.ones(3), "x")}))
    assert [type(target) for target in seen] == [Slotted] * 4
    torch.testing.assert_close(torch.cat([target.inner["a"].rows for target in seen]), rows)
    assert all(target.inner["a"].weights.shape == (3,) and target.inner["a"].name == "x" for target in seen)


def test_a_target_is_divided_along_the_dim_of_the_samples(alone: None) -> None:
    seen: list[Any] = []

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append(target)
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    driver = driver_of(batches.SeqFirst(), (tokens(8, 2),), loss=loss)
    target = tokens(8, 8)
    driver.step(tokens(8, 8), target=target)
    torch.testing.assert_close(torch.cat(seen, 1), target)


def test_a_target_for_blocks_is_divided_block_by_block(alone: None) -> None:
    seen: list[Any] = []

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append(target)
        return F.mse_loss(output, target)

    driver = driver_of(batches.Pairs(), (torch.randn(2, 4), torch.randn(2, 4)), loss=loss)
    target = torch.arange(16.0)[:, None]
    driver.step(torch.randn(8, 4), torch.randn(8, 4), target=target)
    assert seen[1].flatten().tolist() == [2, 3, 10, 11]


def test_a_target_that_could_be_divided_in_two_ways_is_asked_about(alone: None) -> None:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return output.mean() + target.mean()

    model = batches.Recurrent()
    inputs = tokens(8, 5), torch.randn(2, 8, 8)
    example = inputs[0][:2], inputs[1][:, :2]
    with pytest.raises(InputError, match=r"target of shape \[8, 8\]: dims \[0, 1\].*\n.*target_chunk_spec"):
        driver_of(model, example, loss=lambda out, target: loss(out[0], target)).step(*inputs, target=torch.ones(8, 8))
    said = driver_of(model, example, loss=lambda out, target: loss(out[0], target), target_chunk_spec=TensorChunkSpec(0))
    assert len(said.step(*inputs, target=torch.ones(8, 8))[1]) == 4


# --- one process: ready micro-batches ---------------------------------------------------------------------


def test_micro_batches_are_taken_as_they_are_with_any_number_of_samples(alone: None) -> None:
    model = batches.Packed()
    sizes = {"tokens": {0: Dim("tokens", min=2, max=64)}, "ends": {0: Dim("ends", min=2, max=64)}}
    example = (tokens(7), torch.tensor([3, 7]))
    driver = driver_of(model, example, 3, dynamic_shapes=sizes, loss=lambda out, target: F.cross_entropy(out, target))
    mbs = [(tokens(7), torch.tensor([3, 7])), (tokens(4), torch.tensor([1, 4])), (tokens(9), torch.tensor([2, 5, 9]))]
    targets = [tokens(7), tokens(4), tokens(9)]
    single = deepcopy(model)
    output, losses = driver.step(arg_mbs=mbs, target_mbs=targets)
    expected = [single(*args) for args in mbs]
    want = [F.cross_entropy(out, target) for out, target in zip(expected, targets, strict=True)]
    torch.testing.assert_close(torch.stack(losses), torch.stack(want))
    parts = output if isinstance(output, list) else output.split([7, 4, 9])
    for mine, one in zip(parts, expected, strict=True):
        torch.testing.assert_close(mine, one)


def test_outputs_of_other_lengths_are_a_list(alone: None) -> None:
    """Sequences of each micro-batch are as long as its longest one: their logits are of no common size."""
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))
    driver = driver_of(model, (tokens(2, 6),), 3, dynamic_shapes=({0: BATCH, 1: LENGTH},))
    mbs = [(tokens(2, 5),), (tokens(3, 7),), (tokens(2, 3),)]
    output, _ = driver.eval(arg_mbs=mbs)
    for part, (words,) in zip(output, mbs, strict=True):
        torch.testing.assert_close(part, model(words))
    assert "is a list with the value of each micro-batch" in driver.notes[0]


def test_lists_of_unequal_numbers_of_samples_are_refused(alone: None) -> None:
    image = torch.ones(4)
    driver = driver_of(batches.Shaded(), ([image] * 2, [image] * 2))
    output, _ = driver.eval([image] * 8, [image] * 8)
    assert output.shape == (8, 4)
    with pytest.raises(InputError, match="'masks' has a batch of 2, and input 'images', which goes with it, one of 8"):
        driver.eval([image] * 8, [image] * 2)


def test_rows_are_counted_when_they_are_divided_and_when_their_places_are() -> None:
    pipe = pipeline(batches.Patches(), with_patches(2), check=None)
    assert [filling.sources for filling in fillings(pipe.program)] == [(0, 1)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"arg_mbs": [(torch.ones(2, 4),)] * 3}, "arg_mbs is a list with 3 of them: the step has 4 micro-batches"),
        ({"arg_mbs": [torch.ones(2, 4)] * 4}, "arg_mbs holds a Tensor"),
        ({"arg_mbs": 3}, "arg_mbs is a int"),
        ({"arg_mbs": [(torch.ones(2, 4),)] * 4, "x": torch.ones(8, 4)}, "beside arg_mbs"),
        ({"arg_mbs": [(torch.ones(2, 4),)] * 4, "target": torch.ones(8)}, "target_mbs"),
        ({"x": torch.ones(8, 4), "target": torch.ones(8), "target_mbs": [1, 2, 3, 4]}, "both given"),
    ],
)
def test_ready_micro_batches_that_do_not_fit_are_refused(alone: None, call: dict[str, Any], words: str) -> None:
    driver = driver_of(Refuses(), (torch.randn(2, 4),), loss=lambda out, target=None: out.mean())
    with pytest.raises(InputError, match=words):
        driver.step(**call)


def test_a_saved_pipe_knows_its_batches(alone: None, tmp_path: Path) -> None:
    model, pair = batches.Pairs(), (torch.randn(8, 4), torch.randn(8, 4))
    pipe = pipeline(model, tuple(x[:2] for x in pair), check=None)
    pipe.save(tmp_path / "pipe")
    back = load(tmp_path / "pipe")
    assert marks(back) == marks(pipe)
    torch.testing.assert_close(Driver(back, "GPipe", 4).eval(*pair)[0], model(*pair))


# --- two processes ----------------------------------------------------------------------------------------


def _mean(out: Any, target: Any) -> torch.Tensor:
    return F.cross_entropy(out.flatten(0, 1), target.flatten())


def _first(out: Any, target: Any) -> torch.Tensor:
    return F.cross_entropy(out[0].flatten(0, 1), target.flatten())


def _square(out: Any, target: Any) -> torch.Tensor:
    return F.mse_loss(out, target)


@dataclass(frozen=True)
class Case:
    """A model, the call of one micro-batch, that of a whole batch of four, its target, the loss, where to cut."""

    model: nn.Module
    example: tuple[Any, ...]
    whole: tuple[Any, ...]
    target: Any
    loss: Callable[..., torch.Tensor] | None
    cut: str
    sizes: Any = None


def cases() -> dict[str, Case]:
    """By kind."""
    torch.manual_seed(0)
    row, state = tokens(8, 16), torch.randn(2, 8, 8)
    images = [torch.randn(3, 8, 8) for _ in range(8)]
    anchor, negatives = torch.randn(8, 8), torch.randn(32, 8)
    some, patches = with_patches(8)
    pair = torch.randn(8, 4), torch.randn(8, 4)
    free = {"tokens": {0: BATCH}, "patches": {0: Dim("patches", min=2, max=256)}}
    both = {"positions": {0: LENGTH}, "tokens": {0: BATCH, 1: LENGTH}}
    four = {"anchor": {0: BATCH}, "negatives": {0: 4 * BATCH}}
    return {
        "seq first": Case(batches.SeqFirst(), (row[:, :4],), (row,), tokens(8, 16), _mean, "layer"),
        "state beside": Case(batches.Recurrent(), (row[:2, :5], state[:, :2]), (row[:, :5].clone(), state), tokens(8, 5), _first, "head"),
        "data decide": Case(batches.Detector(), (anchor[:2],), (anchor,), None, None, "head"),
        "list": Case(batches.Images(), (images[:2],), (images,), torch.randn(8, 4), _square, "head"),
        "positions first": Case(
            batches.Positions(), (torch.arange(6), tokens(3, 6)), (torch.arange(8), tokens(16, 8)), tokens(16, 8), _mean, "head", both
        ),
        "four times": Case(
            batches.Negatives(), (anchor[:3], negatives[:12]), (anchor, negatives), torch.randn(8, 8), _square, "last", four
        ),
        "patches": Case(batches.Patches(), (some[:2], patches[:6]), (some, patches), tokens(8, 6), _mean, "head", free),
        "pairs": Case(batches.Pairs(), tuple(x[:2] for x in pair), pair, torch.randn(16, 1), _square, "last"),
    }


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
def test_two_processes_give_what_one_gives(schedule: str) -> None:
    pipes = {}
    for name, case in cases().items():
        pipe = pipeline(case.model, case.example, split_spec={case.cut: SplitPoint.BEGINNING}, dynamic_shapes=case.sizes, check=None)
        assert pipe.num_stages == 2
        pipes[name] = pipe
    plain = {name: replace(case, sizes=None) for name, case in cases().items()}
    assert on_ranks(2, _like_one, pipes, plain, schedule) == [dict.fromkeys(pipes, "ok")] * 2


def _like_one(pipes: dict[str, Any], some: dict[str, Case], schedule: str) -> dict[str, str]:
    return {name: _one_case(pipes[name], case, schedule) for name, case in some.items()}


def _one_case(pipe: Any, case: Case, schedule: str) -> str:
    driver = Driver(pipe, schedule, 4, case.loss)
    single = deepcopy(case.model)
    expected = single(*case.whole)
    if case.loss is None:
        output, losses = driver.eval(*case.whole)
    else:
        output, losses = driver.step(*case.whole, target=case.target)
        whole_loss = case.loss(expected, case.target)
        whole_loss.backward()
        if driver.is_last:
            torch.testing.assert_close(torch.stack(losses).mean(), whole_loss.detach())
        for index in driver.stage_indices:
            for name, parameter in pipe.stages[index].named_parameters():
                torch.testing.assert_close(parameter.grad, single.get_parameter(name).grad)
    if driver.is_last:
        torch.testing.assert_close(output, torch.utils._pytree.tree_map(torch.Tensor.detach, expected))
    assert not driver.notes
    return "ok"


class Ragged(nn.Module):
    """Two stages, a skip that carries gradient between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first(x))
        pipe_split()
        return self.last(y) + y


@pytest.mark.parametrize(("schedule", "stages"), [("GPipe", 2), ("1F1B", 2), ("Interleaved1F1B", 4), ("ZBVZeroBubble", 4)])
def test_unequal_micro_batches_train_as_one_process_does(schedule: str, stages: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Ragged() for _ in range(stages // 2))) if stages > 2 else Ragged()
    cuts = {"split_spec": {"1": SplitPoint.BEGINNING}} if stages > 2 else {}
    pipe = pipeline(model, (torch.randn(2, 4),), dynamic_shapes=({0: BATCH},), check=None, **cuts)
    assert pipe.num_stages == stages
    assert on_ranks(2, _unequal, model, pipe, schedule) == ["ok", "ok"]


def _unequal(model: nn.Module, pipe: Any, schedule: str) -> str:
    driver = Driver(pipe, schedule, 4, F.mse_loss)
    single = deepcopy(model)
    for sizes in ((2, 5, 3, 2), (4, 2, 2, 7)):
        torch.manual_seed(sum(sizes))
        x, target = torch.randn(sum(sizes), 4), torch.randn(sum(sizes), 4)
        output, losses = driver.step(
            arg_mbs=[(part,) for part in x.split(sizes)], target_mbs=list(target.split(sizes))
        )  # fmt: skip
        want = [F.mse_loss(single(a), b) for a, b in zip(x.split(sizes), target.split(sizes), strict=True)]
        (sum(want) / 4).backward()  # type: ignore[union-attr]
        if driver.is_last:
            torch.testing.assert_close(torch.stack(losses), torch.stack(want).detach())
            torch.testing.assert_close(output, single(x).detach())
    for index in driver.stage_indices:
        for name, parameter in pipe.stages[index].named_parameters():
            torch.testing.assert_close(parameter.grad, single.get_parameter(name).grad)
    return "ok"


def test_buffers_are_those_of_one_step_whatever_sizes_there_were() -> None:
    model = nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 4))
    pipe = pipeline(
        model, (tokens(2, 8),), split_spec={"1": SplitPoint.BEGINNING}, dynamic_shapes=({1: LENGTH},), check=None
    )  # fmt: skip
    assert on_ranks(2, _received, pipe) == ["ok", "ok"]


def _received(pipe: Any) -> str:
    driver = Driver(pipe, "1F1B", 4, lambda out: out.square().mean())
    for length in (*range(2, 40), 8):
        driver.step(tokens(8, length))
    ((_, stages),) = driver._schedules.values()
    for stage in stages:
        shapes = [tuple(info.buffer.shape) for infos in stage.args_recv_info.values() for info in infos if info.buffer is not None]
        assert shapes == ([] if stage.is_first else [(2, 8, 64)] * 4)
    return "ok"


def test_a_rank_on_meta_takes_the_batches_of_the_others(tmp_path: Path) -> None:
    pipes = []
    for device in ("meta", "cpu"):
        pair = tuple(torch.randn(2, 4, device=device) for _ in range(2))
        pipes.append(pipeline(batches.Pairs().to(device), pair, split_spec={"last": SplitPoint.BEGINNING}, check=None))
    assert marks(pipes[0]) != marks(pipes[1])
    pipes[1].save(tmp_path / "pipe")
    assert on_ranks(2, _marked, pipes) == [["batch(0)", "batch(0: b1)", "batch(0: b + b1)"]] * 2


def _marked(pipes: list[Any]) -> list[str]:
    driver = Driver(pipes[dist.get_rank()], "GPipe", 4)
    return [str(mark) for mark in driver._batch._marks.values()]
