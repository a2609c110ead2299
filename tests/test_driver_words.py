"""What a Driver says where a step trains nothing, or otherwise than was meant, and where an argument is no such thing."""

from __future__ import annotations

import copy
import traceback
import warnings
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cluster.matrix import on_ranks
from torch import nn
from torch.distributed.pipelining import ScheduleGPipe

from stagecut import Driver, InputError, Pipe, RankError, StagecutError, checkpoint, pipeline
from stagecut.backend.files.checkpoint import CheckpointError
from stagecut.backend.ranks.tied import TiedError


class Two(nn.Module):
    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.between = between or nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.between(self.a(x)))  # type: ignore[no-any-return]


X = torch.ones(4, 4)


def cut(model: nn.Module | None = None, stages: int = 1) -> Pipe:
    """The pipe of a model, for two micro-batches of X."""
    return pipeline(model or Two(), (X[:2],), stages=stages, check=None)


def mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean()


# --- no loss function ---------------------------------------------------------------------------------


def test_a_target_without_a_loss_function_is_refused_by_all_ranks() -> None:
    assert on_ranks(2, _target_for_nothing, cut(stages=2)) == ["ok", "ok"]


def _target_for_nothing(pipe: Pipe) -> str:
    driver = Driver(pipe, "GPipe", 2)
    is_last = dist.get_rank() == 1
    words = r"step was called with target=, and no loss_fn takes it.*\n  try: Driver\(\.\.\., loss_fn=.*driver\.eval\("
    with pytest.raises(InputError, match=words):
        driver.step(X, target=X)
    with pytest.raises(InputError, match=words):
        driver.step(X, target=X if is_last else None)
    with pytest.raises(InputError, match="step was called with target_mbs="):
        driver.step(arg_mbs=[(X[:2],)] * 2, target_mbs=[X[:2]] * 2)
    with pytest.raises(InputError, match="step was called with loss_kwargs="):
        driver.step(X, loss_kwargs={"smoothing": 0.1})
    with pytest.raises(InputError, match="eval was called with target="):
        driver.eval(X, target=X)
    output, _ = driver.eval(X)  # the group goes on
    assert (output is not None) == is_last
    return "ok"


def test_a_step_that_trains_nothing_is_noted_once(alone: None) -> None:
    driver = Driver(cut(), "GPipe", 2)
    driver.eval(X)
    assert driver.notes == ()
    driver.step(X)
    driver.step(X)
    (note,) = driver.notes
    assert "no gradients" in note
    assert "loss_fn=" in note


def test_a_note_on_training_is_a_warning_once_at_the_line_that_calls(alone: None) -> None:
    for driver, labels, words in (
        (Driver(cut(), "GPipe", 2), {}, "step makes no gradients"),
        (Driver(cut(Two(nn.Dropout(0.5)).eval()), "GPipe", 2, mse), {"target": X}, "the pipe is in eval mode"),
    ):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            driver.eval(X, **labels)
            driver.step(X, **labels)
            driver.step(X, **labels)
        (warning,) = (each for each in told if each.category is UserWarning)
        assert str(warning.message).startswith(words)
        assert warning.filename == __file__


def test_a_step_that_has_nothing_to_train_or_is_told_not_to_has_no_note(alone: None) -> None:
    frozen = Driver(cut(Two().requires_grad_(False)), "GPipe", 2)
    frozen.step(X)
    assert frozen.notes == ()
    driver = Driver(cut(), "GPipe", 2)
    with torch.no_grad():
        driver.step(X)
    assert driver.notes == ()


def test_a_loss_function_has_no_note(alone: None) -> None:
    for loss, labels in ((mse, {"target": X}), (lambda output: output.mean(), {})):
        driver = Driver(cut(), "GPipe", 2, loss)
        driver.step(X, **labels)
        assert driver.notes == ()


# --- a loss function that fails -----------------------------------------------------------------------


def test_ranks_go_on_after_a_loss_function_that_failed() -> None:
    assert on_ranks(2, _failing_losses, cut(stages=2), cut(Four(), stages=4)) == ["ok", "ok"]


class Four(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*(nn.Linear(4, 4) for _ in range(4)))


def _failing_losses(two: Pipe, four: Pipe) -> str:
    """Afterwards a step has the gradients that it has without a failure before it."""
    for pipe, schedule, options in (
        (two, "1F1B", {}),
        (two, "GPipe", {"normalize_by": "n", "share_losses": False}),
        (two, "1F1B", {"backward": "graph"}),
        (four, "ZBVZeroBubble", {}),
    ):
        driver = Driver(pipe, schedule, 2, partial(_counted, options), **options)  # type: ignore[arg-type]
        expected = _gradients(driver, X)
        for call in (driver.step, driver.eval):
            with pytest.raises(RankError, match=r"failed: RuntimeError: The size of tensor a \(4\)") as caught:
                call(X, target=torch.ones(4, 3))
            assert "loss_fn was given float32[2, 4] and target float32[2, 3] (a part of float32[4, 3])" in caught.value.where
            assert ("zero_grad first" in caught.value.hint) is (call == driver.step)
            assert (caught.value.__cause__ is not None) is driver.is_last
        with pytest.raises(RankError, match="loss_fn returns a str, not a loss"):
            driver.step(X, target=X, loss_kwargs={"wrong": True})
        with pytest.raises(
            RankError, match=r"target float32\[1, 3\] \(whole in each micro-batch, because no dim of it is as long as the batch, 4"
        ):
            driver.step(X, target=torch.ones(1, 3))
        assert any(note.startswith("target float32[1, 3] is whole in each of 2 micro-batches") for note in driver.notes)
        again = _gradients(driver, X)
        assert expected
        assert [*map(torch.equal, again, expected)] == [True] * len(expected)
    return "ok"


def _counted(options: dict[str, Any], output: torch.Tensor, target: torch.Tensor, wrong: bool = False) -> Any:
    if wrong:
        return "a loss"
    losses = (output - target).square()
    return (losses.sum(), {"n": losses.numel()}) if "normalize_by" in options else losses.mean()


def _gradients(driver: Driver, target: torch.Tensor) -> list[torch.Tensor]:
    for parameter in driver.parameters():
        parameter.grad = None
    driver.step(X, target=target)
    return [parameter.grad.clone() for parameter in driver.parameters() if parameter.grad is not None]


# --- a loss that trains nothing -----------------------------------------------------------------------


def test_a_loss_without_a_gradient_is_told_by_all_ranks_which_go_on() -> None:
    frozen = cut(Two().requires_grad_(False), stages=2)
    half = Four()
    half[3].requires_grad_(False)
    assert on_ranks(2, _losses_without_gradient, cut(stages=2), cut(half, stages=4), frozen) == ["ok", "ok"]


def _losses_without_gradient(two: Pipe, half: Pipe, frozen: Pipe) -> str:
    """Afterwards a step has the gradients that it has without one before it."""
    words = r"failed: the loss of micro-batch {} carries no gradient.*\n  at: (test_driver_words.py:\d+, )?{}\n  try: {}.*go on"
    for pipe, schedule, options in (
        (two, "1F1B", {}),
        (two, "GPipe", {"backward": "graph", "seed": 0}),
        (half, "ZBVZeroBubble", {}),
    ):
        driver = Driver(pipe, schedule, 2, mse, **options)  # type: ignore[arg-type]
        expected = _gradients(driver, X)
        for loss, index in ((_detached, 0), (_constant, 0), (_measured, 0), (_Second(), 1)):
            name = getattr(loss, "__name__", "_Second")
            with pytest.raises(RankError, match=words.format(index, name, "compute it from the output")):
                Driver(pipe, schedule, 2, partial(loss), **options).step(X, target=X)  # type: ignore[arg-type]
        Driver(pipe, schedule, 2, _detached).eval(X, target=X)
        again = _gradients(driver, X)
        assert expected
        assert [*map(torch.equal, again, expected)] == [True] * len(expected)
    driver = Driver(frozen, "1F1B", 2, mse)
    for _ in range(2):
        with pytest.raises(RankError, match=words.format(0, "mse", "all parameters are frozen.*driver.eval")):
            driver.step(X, target=X)
        driver.eval(X, target=X)
    frozen.requires_grad_()
    driver.step(X, target=X)
    return "ok"


def _detached(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return mse(output.detach(), target)


def _constant(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.tensor(1.0)


def _measured(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return mse(output, target)


class _Second(nn.Module):
    """A loss that has no gradient in the second micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return mse(output, target) if self.calls == 1 else _constant(output, target)


class Rounded(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).detach()


def test_outputs_without_a_gradient_are_told(alone: None) -> None:
    with pytest.raises(RankError, match=r"(?s)carries no gradient.* try: no output of the model carries one"):
        Driver(cut(Rounded()), "GPipe", 2, mse, group=dist.new_group()).step(X, target=X)


def test_a_loss_may_train_parameters_of_its_own(alone: None) -> None:
    centers = torch.zeros(4, requires_grad=True)
    driver = Driver(cut(Two().requires_grad_(False)), "GPipe", 2, lambda output, target: mse(output + centers, target))
    driver.step(X, target=X)
    assert centers.grad is not None


def test_a_failing_loss_of_torchs_own_has_a_place() -> None:
    for text in on_ranks(2, _misshapen, cut(stages=2)):
        assert "at: CrossEntropyLoss, where loss_fn was given float32[2, 4] and target" in text


def _misshapen(pipe: Pipe) -> str:
    driver = Driver(pipe, "GPipe", 2, nn.CrossEntropyLoss())
    with pytest.raises(RankError) as caught:
        driver.step(X, target=torch.ones(4, 3, 3))
    with pytest.raises(RankError, match=r"at: test_driver_words.py:\d+, _three, where loss_fn was given"):
        Driver(pipe, "GPipe", 2, _three).step(X, target=X)
    return str(caught.value)


def _three(output: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return mse(output, target) * weight


# --- the mode of the pipe -----------------------------------------------------------------------------


class Rows(nn.Module):
    """The output of an LSTM."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x[None])[0][0]  # type: ignore[no-any-return]


MODES = [
    (lambda: nn.Dropout(0.5), True),
    (lambda: nn.BatchNorm1d(4), True),
    (lambda: nn.RReLU(), True),
    (lambda: Rows(nn.LSTM(4, 4, 2, dropout=0.5)), True),
    (lambda: nn.Dropout(0.0), False),
    (lambda: Rows(nn.LSTM(4, 4)), False),
    (lambda: nn.ReLU(), False),
]


@pytest.mark.parametrize(("between", "follows"), MODES)
def test_training_in_eval_mode_is_noted_where_the_mode_changes_something(alone: None, between: Any, follows: bool) -> None:
    driver = Driver(cut(Two(between()).eval()), "GPipe", 2, mse)
    driver.eval(X, target=X)
    assert driver.notes == ()
    driver.step(X, target=X)
    driver.step(X, target=X)
    assert ["the pipe is in eval mode" in note and "driver.train()" in note for note in driver.notes] == [True] * follows


def test_a_pipe_in_train_mode_has_no_note(alone: None) -> None:
    dropping = Two(nn.Dropout(0.5))
    driver = Driver(cut(dropping), "GPipe", 2, mse)
    driver.step(X, target=X)
    switched = Driver(cut(dropping.eval()), "GPipe", 2, mse).train()
    switched.step(X, target=X)
    assert driver.notes == switched.notes == ()


def test_ranks_in_different_modes_are_told_and_go_on() -> None:
    assert on_ranks(2, _modes, cut(Two(nn.Dropout(0.5)).eval(), stages=2)) == ["ok", "ok"]


def _modes(pipe: Pipe) -> str:
    driver = Driver(pipe, "GPipe", 2, mse, eval_mode=False)
    if driver.is_last:
        driver.train()
    for call in (driver.step, driver.eval):
        with pytest.raises(InputError, match=r"is in train mode on rank 1, and in eval mode on rank 0\n  try: driver.train"):
            call(X, target=X)
    Driver(pipe, "GPipe", 2, mse).eval(X, target=X)  # in eval mode everywhere
    driver.train()
    driver.step(X, target=X)
    return "ok"


def test_a_branch_and_a_module_kept_whole_may_follow_the_mode(alone: None) -> None:
    for pipe in (cut(Two(Branch()).eval()), pipeline(Two(nn.Dropout(0.5)).eval(), (X[:2],), leaf_modules=["between"], check=None)):
        driver = Driver(pipe, "GPipe", 2, mse)
        driver.step(X, target=X)
        assert "eval mode" in driver.notes[0]


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rand_like(x) if self.training else x


def test_a_driver_prints_the_mode_of_its_pipe(alone: None) -> None:
    driver = Driver(cut(), "GPipe", 2, mse)
    assert "2 micro-batches, train mode, this is rank 0" in str(driver)
    assert "2 micro-batches, eval mode, this is rank 0" in str(driver.train(False))


# --- arguments that there are not ---------------------------------------------------------------------


def test_an_argument_that_nobody_knows_is_named_where_the_target_is_missing(alone: None) -> None:
    driver = Driver(cut(), "GPipe", 2, mse)
    words = r"without one; the model's forward has no argument 'targets'\n.*\n  try: .*target=...\) in the place of targets="
    with pytest.raises(InputError, match=words):
        driver.step(X, targets=X)
    with pytest.raises(InputError, match="has no arguments 'labels', 'targets'"):
        driver.step(X, labels=X, targets=X)
    with pytest.raises(InputError, match="called without one\n"):
        driver.step(X)
    with pytest.raises(InputError, match="called without one\n"):
        driver.step(x=X)
    with pytest.raises(InputError, match="forward names no argument 'targets'"):
        driver.step(X, target=X, targets=X)
    driver.step(X, target=X)


def test_an_argument_that_nobody_knows_is_named_by_a_pipe_without_names(alone: None) -> None:
    program = torch.export.export(Two(), (X[:2],))
    driver = Driver(pipeline(program, stages=1), "GPipe", 2, mse)
    with pytest.raises(InputError, match="has no argument 'targets'"):
        driver.step(X, targets=X)


# --- numbers of micro-batches -------------------------------------------------------------------------


def test_too_few_micro_batches_are_refused_before_a_step() -> None:
    pipes = [cut(stages=2), cut(Four(), stages=4)]
    assert on_ranks(2, _too_few, pipes) == ["ok", "ok"]


def _too_few(pipes: list[Pipe]) -> str:
    two, four = pipes
    words = r"1F1B has no order for 2 stages on 2 ranks and 1 micro-batches: .*\n  try: .*Driver\(pipe, \"1F1B\", 4, loss_fn\)"
    with pytest.raises(StagecutError, match=words):
        Driver(two, "1F1B", loss_fn=mse)
    with pytest.raises(StagecutError, match="DualPipeV has no order for 4 stages on 2 ranks and 3 "):
        Driver(four, "DualPipeV", 3, mse)
    with pytest.raises(StagecutError, match="Interleaved1F1B has no order for 4 stages on 2 ranks and 5 "):
        Driver(four, "Interleaved1F1B", 5, mse)
    assert Driver(two, "1F1B").parameters()
    for schedule in ("GPipe", "1F1B"):
        Driver(two, schedule, 2, mse).step(X, target=X)
    return "ok"


# --- optimizers of other parameters -------------------------------------------------------------------


def test_an_optimizer_of_what_this_rank_does_not_train_is_refused() -> None:
    model = Two()
    assert on_ranks(2, _attached, model, cut(model, stages=2)) == ["ok", "ok"]


def _attached(model: nn.Module, pipe: Pipe) -> str:
    driver = Driver(pipe, "GPipe", 2, mse)
    own, other = driver.parameters(), pipe.stages[1 - dist.get_rank()]
    missing = "a" if driver.is_last else "b"
    words = rf"AdamW has '{missing}\.weight' and 1 more parameters of stages that other ranks train\n  try: .*driver.parameters\(\)"
    for parameters in ([*own, *other.parameters()], [*other.parameters()]):
        with pytest.raises(InputError, match=words):
            driver.attach(torch.optim.AdamW(parameters))
    with pytest.raises(InputError, match=r"SGD has none of the parameters.*\n  at: 4 parameters, the first of shape \[4, 4\]"):
        driver.attach(torch.optim.SGD(Two().parameters()))
    centers = torch.zeros(4, requires_grad=True)
    for groups in ([{"params": []}], [{"params": own[:1]}], [{"params": own}, {"params": [centers]}]):
        driver.attach(torch.optim.SGD(groups, 0.1))
    return "ok"


# --- clipping -----------------------------------------------------------------------------------------


def test_values_of_tied_gradients_are_clipped_when_they_are_whole() -> None:
    torch.manual_seed(0)
    model = Tied()
    pipe = cut(model, stages=2)
    mse(model(X), 3 * X).backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_value_(model.parameters(), 0.05)
    expected = {name: p.grad for name, p in model.named_parameters()}
    first, last = on_ranks(2, _clipped, pipe)
    tied = expected["a.weight"]
    assert tied is not None
    assert (tied.abs() == 0.05).any()
    for found in (first, last):
        assert torch.allclose(found.pop("weight"), tied, atol=1e-6)
    biases = {**first, **last}
    assert torch.allclose(biases["a.bias"], expected["a.bias"], atol=1e-6)
    assert torch.allclose(biases["b.bias"], expected["b.bias"], atol=1e-6)


def _clipped(pipe: Pipe) -> dict[str, torch.Tensor]:
    driver = Driver(pipe, "GPipe", 2, mse)
    with pytest.raises(InputError, match=r"clip_value=.* is a list\n  try: driver.clip_grad_value_"):
        driver.clip_grad_value_(driver.parameters())  # type: ignore[arg-type]
    driver.step(X, target=3 * X)
    driver.clip_grad_value_(0.05)
    found: dict[str, torch.Tensor] = {}
    for name, parameter in pipe.stages[dist.get_rank()].named_parameters():
        assert parameter.grad is not None
        found[name if name.endswith("bias") else "weight"] = parameter.grad
    return found


# --- arguments of the wrong kind ----------------------------------------------------------------------


def test_what_is_no_pipe_is_refused(alone: None) -> None:
    for wrong in (Two(), cut().module(), None, Two):
        with pytest.raises(InputError, match=r"a Driver runs a pipe, and was given a \w+\n  try: pipe = pipeline\(model, "):
            Driver(wrong, "1F1B", 4, mse)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [mse, nn.MSELoss(), None, 4, ScheduleGPipe])
def test_what_is_no_schedule_is_refused(alone: None, wrong: Any) -> None:
    with pytest.raises(InputError, match=r"(?s)schedule=.* is a \w+\n  try: its name.* Driver\(pipe, \"1F1B\", 8, loss_fn\)"):
        Driver(cut(), wrong, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_fn": 4}, "loss_fn=4 is a int\n  try: loss_fn="),
        ({"loss_fn": nn.MSELoss}, r"loss_fn is the class MSELoss\n  try: loss_fn=MSELoss\("),
        ({"group": [0]}, r"group=\[0\] is a list\n  try: group="),
        ({"group": "x"}, "group='x' is a str"),
        ({"device": 3.5}, "device=3.5 is no device\n  try: device="),
        ({"device": "nonsense"}, "device='nonsense' is no device"),
        ({"wrap": 3}, "wrap=3 is a int"),
        ({"normalize_by": 3}, "normalize_by=3 is a int"),
        ({"seed": 1.5}, "seed=1.5 is a float"),
        ({"compare_steps": None}, "compare_steps=None is a NoneType"),
        ({"compare_steps": "all"}, "compare_steps='all' is a str"),
        ({"args_chunk_spec": 3}, "args_chunk_spec=3 is a int"),
        ({"kwargs_chunk_spec": [1]}, r"kwargs_chunk_spec=\[1\] is a list"),
        ({"schedule_kwargs": 3}, "schedule_kwargs=3 is a int"),
        ({"order": [[]]}, r"order=\[\[\]\] is a list\n  try: order=pipe.plan.order"),
    ],
)
def test_an_option_of_the_wrong_kind_is_named(alone: None, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Driver(cut(), "GPipe", 2, **options)


@pytest.mark.parametrize("how", ["step", "eval"])
@pytest.mark.parametrize("wrong", [3, "x", [("weight", 1.0)]])
def test_loss_kwargs_are_named_and_the_group_goes_on(alone: None, how: str, wrong: Any) -> None:
    driver = Driver(cut(), "GPipe", 2, mse)
    with pytest.raises(InputError, match=r"loss_kwargs=.* is a \w+\n  try: loss_kwargs=\{"):
        getattr(driver, how)(X, target=X, loss_kwargs=wrong)
    with pytest.raises(InputError, match=r"kwarg_mbs holds a int.*\n  try: write \[\{"):
        getattr(driver, how)(kwarg_mbs=[1, 2], target_mbs=[X[:2]] * 2)
    getattr(driver, how)(X, target=X)


def test_methods_name_what_is_no_optimizer_no_scaler_and_no_norm(alone: None) -> None:
    driver = Driver(cut(), "GPipe", 2, mse)
    optimizer = torch.optim.SGD(driver.parameters(), 0.1)
    wrong: dict[str, Any] = {
        r"optimizer=\[SGD .* is a list\n  try: .*driver.attach\(each\)": lambda: driver.attach([optimizer]),  # type: ignore[arg-type]
        r"scaler=SGD .* is a SGD": lambda: driver.attach_scaler(optimizer),  # type: ignore[arg-type]
        r"max_norm=.* is a list\n  try: driver.clip_grad_norm_\(1.0\), which knows": lambda: driver.clip_grad_norm_(
            driver.parameters(), 1.0
        ),  # type: ignore[arg-type]
        r"max_norm='x' is a str": lambda: driver.clip_grad_norm_("x"),  # type: ignore[arg-type]
        r"norm_type='two' is no number": lambda: driver.clip_grad_norm_(1.0, "two"),  # type: ignore[arg-type]
    }
    for words, call in wrong.items():
        with pytest.raises(InputError, match=f"(?s){words}"):
            call()
    driver.step(X, target=X)
    driver.clip_grad_norm_(1.0, "inf")  # type: ignore[arg-type]
    driver.clip_grad_norm_(torch.tensor(1.0))  # type: ignore[arg-type]


def test_checkpoints_name_what_is_no_optimizer_and_no_mapping(alone: None, tmp_path: Path) -> None:
    driver = Driver(cut(), "GPipe", 2, mse)
    checkpoint.save(driver, None, tmp_path / "run")
    for call in (partial(checkpoint.save, driver, folder=tmp_path / "other"), partial(checkpoint.load, driver, folder=tmp_path / "run")):
        for optimizer in (3, [3], "adam"):
            with pytest.raises(CheckpointError, match=r"optimizer=.* is a \w+\n  try: .* or None"):
                call(optimizer=optimizer)
        for copies in (3, None, ["ema"], {"ema": X}):
            with pytest.raises(CheckpointError, match=r"(?s)copies.* is a \w+\n  try: copies=\{"):
                call(optimizer=None, copies=copies)
    with pytest.raises(CheckpointError, match="extra=3 is a int\n  try: extra="):
        checkpoint.save(driver, None, tmp_path / "other", 3)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"'ema' has a int for 'a\.weight'"):
        checkpoint.save(driver, None, tmp_path / "other", copies={"ema": {"a.weight": 3}})  # type: ignore[dict-item]
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_of_another_kind_of_optimizer_is_refused(alone: None, tmp_path: Path) -> None:
    driver = Driver(cut(), "GPipe", 2, mse)
    kinds: dict[str, Any] = {
        "SGD": partial(torch.optim.SGD, lr=0.1),
        "AdamW": torch.optim.AdamW,
        "Adam": torch.optim.Adam,
        "RMSprop": torch.optim.RMSprop,
    }
    for name, make in kinds.items():
        optimizer = make(driver.parameters())
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        driver.step(X, target=X)
        optimizer.step()
        checkpoint.save(driver, optimizer, tmp_path / name)
    for name, saved in product(kinds, kinds):
        optimizer = kinds[name](driver.parameters())
        if {name, saved} <= {"Adam", "AdamW"} or name == saved:
            checkpoint.load(driver, optimizer, tmp_path / saved)
            continue
        with pytest.raises(
            CheckpointError, match=rf"the checkpoint has an optimizer with .*, and this one, {name}, has .* instead\n  at: "
        ):
            checkpoint.load(driver, optimizer, tmp_path / saved)
        checkpoint.load(driver, None, tmp_path / saved)


# --- tracebacks ---------------------------------------------------------------------------------------


def test_a_failing_rank_shows_its_line_and_the_others_no_step_that_waited() -> None:
    other, failing = on_ranks(2, _fails, cut(stages=2))
    for text in (other, failing):
        assert "rank 1 (stage 1) failed: ZeroDivisionError: no loss" in text
        assert "contextlib.py" not in text
        assert text.rpartition("Traceback")[2].count("File ") == 1
    assert "in _bad_loss" in failing
    assert other.count("Traceback") == 1
    assert "schedules.py" not in other


def _bad_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("no loss")


def _fails(pipe: Pipe) -> str:
    driver = Driver(pipe, "GPipe", 2, _bad_loss, group=dist.new_group())
    with pytest.raises(RankError) as caught:
        driver.step(X, target=X)
    return "".join(traceback.format_exception(caught.value))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))  # type: ignore[no-any-return]


def test_an_update_that_is_refused_shows_no_step_of_ours() -> None:
    pipe = cut(Tied(), stages=2)
    assert on_ranks(2, _updates, pipe) == ["ok", "ok"]


def _updates(pipe: Pipe) -> str:
    driver = Driver(pipe, "GPipe", 2, mse)
    driver.step(X, target=X)
    optimizer = torch.optim.SGD(driver.parameters(), 0.1)
    for steps in (optimizer.step, partial(optimizer.step, lambda: 0.0)):
        with pytest.raises(TiedError) as caught:
            steps()
        files = [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert not [file for file in files if "/backend/" in file]
    return "ok"


# --- errors that were torch's or Python's -------------------------------------------------------------


def test_what_is_given_to_a_driver_in_a_wrong_way_is_told_with_what_to_write(alone: None, tmp_path: Path) -> None:
    driver = Driver(cut(), "GPipe", 2, mse)
    sparse = X.to_sparse()
    for bad, words in (
        (lambda: driver.step(sparse, target=X), r"sparse_coo is not divided.*\n.*\n  try: give it dense: tensor\.to_dense"),
        (lambda: driver.step(X, target=sparse), r"sparse_coo is not divided.*\n.*\n  try: give it dense: tensor\.to_dense"),
        (lambda: driver.step(X, X, target=X), r"2 positional arguments, but .* 1\n  try: those of the model are x; .*target="),
        (lambda: driver.train(True, 1), r"Driver\.train\(\) takes mode by position, and was given 1 besides"),
    ):
        with pytest.raises(InputError, match=words):
            bad()
    with pytest.raises(CheckpointError, match=r"extra\['sampler'\] cannot be pickled: .*\n  try: numbers, texts"):
        checkpoint.save(driver, None, tmp_path / "never", extra={"step": 1, "sampler": lambda: 1})
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"device='cuda', and torch finds 0 GPUs here\n  try: device=.cpu"):
            Driver(cut(), device="cuda")
    with pytest.raises(StagecutError, match=r"2 stages, 1 rank\n  try: start 2 processes, .*, or cut into 1 stage$"):
        Driver(cut(stages=2))


def test_the_losses_of_a_step_say_where_the_loss_of_the_batch_is(alone: None) -> None:
    _, losses = Driver(cut(), "GPipe", 2, mse).step(X, target=X)
    assert not hasattr(losses, "item")
    with pytest.raises(AttributeError, match=r"has no attribute 'item': it is the list .*\n  try: losses\.batch\.item"):
        losses.item()
    with pytest.raises(AttributeError, match=r"'backward': driver\.step has made the gradients$"):
        losses.backward()
    copied = copy.deepcopy(losses)
    assert losses.batch is not None
    assert copied.batch is not None
    assert torch.equal(losses.batch, copied.batch)


def test_a_driver_whose_group_was_destroyed_says_so(tmp_path: Path) -> None:
    assert on_ranks(2, _destroyed, cut(stages=2), tmp_path / "never") == ["ok", "ok"]


def _destroyed(pipe: Pipe, folder: Path) -> str:
    group = dist.new_group([0, 1])
    driver = Driver(pipe, "GPipe", 2, mse, group=group)
    dist.destroy_process_group(group)
    for call in (
        lambda: driver.step(X, target=X),
        lambda: driver.eval(X),
        lambda: driver.clip_grad_norm_(1.0),
        lambda: checkpoint.save(driver, None, folder),
        lambda: Driver(pipe, "GPipe", 2, mse, group=group),
    ):
        with pytest.raises(InputError, match=r"the process group of these ranks was destroyed\n  try: "):
            call()
    assert "2 stages on 2 ranks" in repr(driver)
    return "ok"
