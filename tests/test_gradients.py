"""Gradients between backward and update, on processes: sums of tied ones, norms, scalers. All equals one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cluster.matrix import SCHEDULES, on_ranks, stages_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from stagecut import Driver, Pipe, SplitPoint, pipeline
from stagecut.backend.ranks.gradients import NonFiniteError
from stagecut.backend.ranks.tied import TiedError
from stagecut.ir.errors import StagecutError

WIDTH, DEPTH, VOCABULARY, BATCH, COUNT = 6, 9, 11, 16, 8


class Net(nn.Module):
    """The embedding is the head, and the first block is the last one: two parameters of the first and the last stage."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.blocks[-1] = self.blocks[0]
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)  # type: ignore[no-any-return]


def loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def cut(stages: int, model: nn.Module | None = None) -> tuple[nn.Module, Pipe]:
    torch.manual_seed(0)
    model = model if model is not None else Net().double()
    at = {f"blocks.{DEPTH * i // stages}": SplitPoint.BEGINNING for i in range(1, stages)}
    return model, pipeline(model, (torch.zeros(2, 3, dtype=torch.long),), split_spec=at, check=None)


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, target = torch.randint(VOCABULARY, (2, BATCH, 3), generator=torch.Generator().manual_seed(seed))
    return tokens, target


def optimizers(named: dict[str, nn.Parameter], **options: Any) -> list[torch.optim.Optimizer]:
    """One for matrices and one for the rest, without parameters where there are none."""
    matrices = [p for p in dict.fromkeys(named.values()) if p.dim() == 2]
    rest = [p for p in dict.fromkeys(named.values()) if p.dim() != 2]
    return [torch.optim.SGD([{"params": matrices}], 0.1, momentum=0.9), torch.optim.AdamW([{"params": rest}], 0.01, **options)]


def named_of(driver: Driver) -> dict[str, nn.Parameter]:
    return {n: p for i in driver.stage_indices for n, p in driver.pipe.stages[i].named_parameters()}


def differs(driver: Driver, model: nn.Module, gradients: bool = False) -> str:
    """The first parameter of this rank that is not the unsplit model's, or its gradient."""
    want = dict(model.named_parameters(remove_duplicate=False))
    for name, mine in named_of(driver).items():
        if gradients and (mine.grad is None) != (want[name].grad is None):
            return f"gradient of '{name}' is there or not"
        pairs = [(mine, want[name]), *([(mine.grad, want[name].grad)] if gradients else [])]
        if any(a is not None and b is not None and not torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in pairs):
            return f"'{name}'"
    return ""


# --- sums and norms -----------------------------------------------------------------------------------

ACTIONS = ("step", "step", "sync", "clip 2", "clip inf", "clip 3", "update", "zero", "zeros", "closure")
PROGRAM = "step,step,clip 2,update,zero,step,sync,step,clip inf,sync,update,zeros,closure,step,clip 1,update".split(",")


class Run:
    """One script on a rank, and beside it in one process."""

    def __init__(self, model: nn.Module, pipe: Pipe, schedule: str) -> None:
        self.model, self.driver, self.batch = deepcopy(model), Driver(pipe, schedule, COUNT, loss_of), 0
        self.mine = optimizers(named_of(self.driver))
        self.theirs = optimizers(dict(self.model.named_parameters()))
        for optimizer in self.mine:
            self.driver.attach(optimizer)
            self.driver.attach(optimizer)

    def play(self, actions: Sequence[str]) -> str:
        """'ok', or the first thing that differs."""
        for number, action in enumerate([*actions, "sync"]):
            wrong = self._norm(*action.split()) if action.startswith("clip") else self._act(action)
            wrong = wrong or differs(self.driver, self.model, action in ("sync", "update"))
            if wrong:
                return f"{actions} {number}: {action}: {wrong}"
        return "ok"

    def _norm(self, _: str, order: str) -> str:
        norm = self.driver.clip_grad_norm_(0.05, float(order))
        want = nn.utils.clip_grad_norm_(self.model.parameters(), 0.05, float(order))
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, norm)
        close = torch.allclose(norm.to(want.dtype), want, rtol=1e-9)
        return "" if close and all(torch.equal(other, norm) for other in everywhere) else f"norm {everywhere}, expected {want}"

    def _act(self, action: str) -> str:
        if action == "step":
            self._backward()
        elif action == "sync":
            self.driver.sync_shared_gradients()
        elif action in ("zero", "zeros"):
            self._zero(action == "zero")
        elif action == "update":
            for optimizer in (*self.mine, *self.theirs):
                optimizer.step()
        else:
            self._closures()
        return ""

    def _backward(self, mine: bool = True, theirs: bool = True) -> None:
        tokens, target = batch(self.batch)
        self.batch += 1
        if mine:
            self.driver.step(tokens, target=target)
        if theirs:
            loss_of(self.model(tokens), target).backward()

    def _zero(self, none: bool) -> None:
        for optimizer in (*self.mine, *self.theirs):
            optimizer.zero_grad(none)

    def _closures(self) -> None:
        """Every optimizer steps with a closure that makes the gradients anew."""
        for mine, theirs in zip(self.mine, self.theirs, strict=True):
            self._zero(True)
            mine.step(lambda: self._backward(theirs=False))  # type: ignore[arg-type]
            self.batch -= 1
            theirs.step(closure=lambda: self._backward(mine=False))  # type: ignore[arg-type,call-overload]


def _play_each(subjects: dict[int, tuple[nn.Module, Pipe]], plays: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    start = {count: deepcopy(pipe.state_dict()) for count, (_, pipe) in subjects.items()}
    answers = []
    for schedule, actions in plays:
        model, pipe = subjects[stages_of(schedule, dist.get_world_size())]
        pipe.load_state_dict(start[pipe.num_stages])
        pipe.zero_grad()
        answers.append(Run(model, pipe, schedule).play(actions))
    return answers


def play_on(ranks: int, plays: Sequence[tuple[str, Sequence[str]]]) -> set[str]:
    subjects = {count: cut(count) for count in {stages_of(schedule, ranks) for schedule, _ in plays}}
    return {answer for answers in on_ranks(ranks, _play_each, subjects, plays) for answer in answers}


@pytest.mark.parametrize("ranks", [2, 4])
def test_two_optimizers_clipping_accumulation_and_closures_under_every_schedule(ranks: int) -> None:
    assert play_on(ranks, [(schedule, PROGRAM) for schedule in SCHEDULES]) == {"ok"}


PLAYS = st.tuples(st.sampled_from(("1F1B", "ZBVZeroBubble")), st.lists(st.sampled_from(ACTIONS), max_size=10))


@given(st.lists(PLAYS, min_size=12, max_size=12))
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_order_of_steps_sums_clips_and_updates_equals_one_process(plays: list[tuple[str, list[str]]]) -> None:
    assert play_on(2, plays) == {"ok"}


# --- forgotten, frozen, refused -----------------------------------------------------------------------


def test_an_update_with_a_part_of_a_gradient_is_an_error_and_no_replica_drifts() -> None:
    assert on_ranks(2, _forget, *cut(2)) == ["ok", "ok"]


def _forget(model: nn.Module, pipe: Pipe) -> str:
    driver = Driver(pipe, "1F1B", COUNT, loss_of)
    before = deepcopy(pipe.state_dict())
    optimizer = torch.optim.SGD(driver.parameters(), 0.1)
    tokens, target = batch(0)
    optimizer.step()  # nothing was accumulated
    driver.step(tokens, target=target)
    loss_of(model(tokens), target).backward()
    with pytest.raises(TiedError, match=r"part of the gradient of 'embedding.weight' and 'head.weight', which stages 0 and 1 share"):
        optimizer.step()
    with pytest.raises(TiedError, match="part of the gradient"):
        torch.optim.SGD(driver.parameters(), 0.1).step(lambda: driver.step(tokens, target=target))  # type: ignore[arg-type]
    assert all(torch.equal(before[name], tensor) for name, tensor in pipe.state_dict().items())
    driver.sync_shared_gradients()
    optimizer.step()
    loss_of(model(tokens), target).backward()  # the closure accumulated once more
    torch.optim.SGD(model.parameters(), 0.1).step()
    driver.step(tokens, target=target)
    driver.attach(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    return differs(driver, model) or "ok"


@contextmanager
def messages() -> Iterator[list[str]]:
    """What this rank exchanges by the functions that sum gradients."""
    sent: list[str] = []
    before = {name: getattr(dist, name) for name in ("all_reduce", "batch_isend_irecv")}

    def counted(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: (sent.append(name), before[name](*args, **kwargs))[1]

    try:
        for name in before:
            setattr(dist, name, counted(name))
        yield sent
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def test_frozen_replicas_send_nothing_and_a_sum_is_made_once() -> None:
    assert on_ranks(2, _count_messages, *cut(2)) == ["ok", "ok"]


def _count_messages(model: nn.Module, pipe: Pipe) -> str:
    tokens, target = batch(0)
    driver = Driver(pipe, "1F1B", COUNT, loss_of)
    driver.step(tokens, target=target)
    with messages() as sent:
        driver.sync_shared_gradients()
        assert sent
        sent.clear()
        driver.sync_shared_gradients()
        assert not sent
    for name in ("embedding.weight", "blocks.0.weight", "blocks.0.bias"):
        pipe.get_parameter(name).requires_grad_(False)
    pipe.zero_grad()
    driver.step(tokens, target=target)
    with messages() as sent:
        driver.sync_shared_gradients()
        assert not sent
    return "ok"


def test_what_is_not_finite_and_what_needs_all_parameters_is_refused_everywhere() -> None:
    assert on_ranks(2, _refuse, *cut(2)) == ["ok", "ok"]


def _refuse(model: nn.Module, pipe: Pipe) -> str:
    driver = Driver(pipe, "1F1B", COUNT, loss_of)
    assert driver.clip_grad_norm_(1.0) == 0
    driver.step(*batch(0)[:1], target=batch(0)[1])
    if dist.get_rank() == 1:
        pipe.stages[1].get_parameter("blocks.5.weight").grad[0, 0] = float("nan")  # type: ignore[index]
    with pytest.raises(NonFiniteError, match=r"norm of order 2\.0 of the gradients is nan"):
        driver.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert driver.clip_grad_norm_(1.0).isnan()
    with pytest.raises(StagecutError, match="LBFGS needs the gradients of all parameters together"):
        driver.attach(torch.optim.LBFGS(driver.parameters()))
    driver.attach(None)
    return "ok"


# --- scalers ------------------------------------------------------------------------------------------


def test_a_scaler_decides_alike_on_all_ranks_and_as_in_one_process() -> None:
    """Each way to use one, with a gradient of the last rank that overflows in the second of three steps."""
    for ranks, schedule in ((2, "1F1B"), (4, "Interleaved1F1B")):
        assert set(on_ranks(ranks, _scale_each, *cut(stages_of(schedule, ranks), Net()), schedule)) == {"ok"}


def _scale_each(model: nn.Module, pipe: Pipe, schedule: str) -> str:
    before = deepcopy(pipe.state_dict())
    # torch's sharded scaler does not work with fused optimizers, in one process neither
    for scaler_class, fused in ((GradScaler, False), (GradScaler, True), (ShardedGradScaler, False)):
        for attached, clips in product((False, True), (False, True)):
            pipe.load_state_dict(before)
            pipe.zero_grad()
            wrong = _scale(deepcopy(model), pipe, schedule, scaler_class, attached, clips, fused)
            if wrong:
                return f"{scaler_class.__name__} {attached=} {clips=} {fused=}: {wrong}"
    return "ok"


def _scale(model: nn.Module, pipe: Pipe, schedule: str, scaler_class: type[GradScaler], attached: bool, clips: bool, fused: bool) -> str:
    mine, theirs = scaler_class("cpu", init_scale=8.0), GradScaler("cpu", init_scale=8.0)
    driver = Driver(pipe, schedule, COUNT, loss_of if attached else lambda output, target: mine.scale(loss_of(output, target)))
    if attached:
        driver.attach_scaler(mine)
    else:
        mine.scale(torch.zeros(()))
    sets = optimizers(named_of(driver), fused=fused), optimizers(dict(model.named_parameters()), fused=fused)
    for optimizer in sets[0]:
        driver.attach(optimizer)
    for step in range(3):
        scale = theirs.get_scale()
        tokens, target = batch(step)
        _, losses = driver.step(tokens, target=target)
        loss = loss_of(model(tokens), target)
        theirs.scale(loss).backward()
        if driver.is_last and not torch.allclose(torch.stack(losses).mean() / (1 if attached else scale), loss):
            return f"losses {losses}, expected {loss}"
        if step == 1:
            _overflow({**named_of(driver), **dict(model.named_parameters())}.get("blocks.6.bias"))
            _overflow(named_of(driver).get("blocks.6.bias"))
        _update(mine, sets[0], driver.clip_grad_norm_ if clips else None)
        _update(theirs, sets[1], _clipping(model) if clips else None)
        if mine.get_scale() != theirs.get_scale():
            return f"step {step}: scale {mine.get_scale()}, expected {theirs.get_scale()}"
    if theirs.get_scale() != 4.0:
        return "nothing overflowed"
    want = dict(model.named_parameters(remove_duplicate=False))
    return ", ".join(name for name, p in named_of(driver).items() if not torch.allclose(p, want[name], atol=1e-6))


def _overflow(parameter: nn.Parameter | None) -> None:
    if parameter is not None and parameter.grad is not None:
        parameter.grad[0] = float("inf")


def _update(scaler: GradScaler, group: Sequence[torch.optim.Optimizer], clip: Callable[[float], torch.Tensor] | None) -> None:
    if clip is not None:
        for optimizer in group:
            scaler.unscale_(optimizer)
        clip(0.1)
    for optimizer in group:
        scaler.step(optimizer)
        optimizer.zero_grad()
    scaler.update()


def _clipping(model: nn.Module) -> Callable[[float], torch.Tensor]:
    return lambda norm: nn.utils.clip_grad_norm_(model.parameters(), norm)


class Bare(nn.Module):
    """Its last stage has no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def test_a_rank_that_trains_nothing_takes_part() -> None:
    torch.manual_seed(0)
    model = Bare()
    pipe = pipeline(model, (torch.randn(2, 4),), split_spec={"layers.3": SplitPoint.BEGINNING}, check=None)
    assert on_ranks(2, _train_nothing, model, pipe) == ["ok", "ok"]


def _train_nothing(model: nn.Module, pipe: Pipe) -> str:
    driver = Driver(pipe, "1F1B", 2, lambda output: output.square().mean())
    mine, theirs = torch.optim.AdamW([{"params": driver.parameters()}], 0.1), torch.optim.AdamW(model.parameters(), 0.1)
    scaler = GradScaler("cpu", init_scale=8.0)
    driver.attach(mine)
    driver.attach_scaler(scaler)
    for step in range(3):
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
        driver.step(x)
        model(x).square().mean().backward()
        if step == 1 and dist.get_rank() == 0:
            pipe.stages[0].get_parameter("layers.0.bias").grad[0] = float("inf")  # type: ignore[index]
        scaler.unscale_(mine)
        driver.clip_grad_norm_(0.1)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(mine)
        scaler.update()
        if step != 1:
            theirs.step()
        mine.zero_grad()
        theirs.zero_grad()
        assert scaler.get_scale() == (8.0, 4.0, 4.0)[step]
    want = dict(model.named_parameters())
    return ", ".join(n for n, p in named_of(driver).items() if not torch.allclose(p, want[n], atol=1e-6)) or "ok"
