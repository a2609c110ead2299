"""What ranks agree on before it can matter, and what a Driver keeps apart: data, buffers, masks, wrappers."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cluster.matrix import on_ranks
from cluster.training import WIDTH, WORDS, Hidden, Words, batch, cut, gradients_differ, micro_batches, per_token
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B
from torch.nn import functional as F

from stagecut import Balanced, Driver, InputError, Pipe, RankError, Setting, SplitPoint, StagecutError, StaleError, checkpoint, pipeline
from stagecut.backend.ranks.agree import checksum
from stagecut.backend.ranks.losses import joined_metrics, takes_no_target


def _loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return per_token(out, target)[0]


# --- arguments of a call ------------------------------------------------------------------------------


def test_ranks_that_are_called_otherwise_are_told_which_and_go_on() -> None:
    assert on_ranks(2, _called_otherwise, *cut(Words, 2)) == ["ok", "ok"]


def _called_otherwise(model: nn.Module, pipe: Pipe) -> str:
    driver, odd = Driver(pipe, "1F1B", 4, _loss), dist.get_rank() == 1
    torch.manual_seed(0)
    tokens, target = batch()
    driver.step(tokens, target=target)
    other = torch.cat([tokens, tokens]) if odd else tokens
    with pytest.raises(InputError, match=r"args\[0\] is int64\[16, 6\] on rank 1, and int64\[8, 6\] on rank 0"):
        driver.step(other, target=target)
    changed = tokens.clone()
    changed[3, 2] = (changed[3, 2] + odd) % WORDS
    driver.draws.calls = 0
    with pytest.raises(InputError, match=r"args\[0\] has other values on rank 1"):
        Driver(pipe, "1F1B", 4, _loss).step(changed, target=target)
    with pytest.raises(InputError, match="target has other values on rank 1"):
        Driver(pipe, "1F1B", 4, _loss).step(tokens, target=target + odd)
    Driver(pipe, "1F1B", 4, _loss, compare_steps=0).step(changed, target=target)
    with pytest.raises(InputError, match=r"rank 1 calls driver\.eval, rank 0 calls driver\.step"):
        (driver.eval if odd else driver.step)(tokens, target=target)
    driver.step(tokens, target=target if odd else None)  # the last rank's is enough
    with pytest.raises(InputError, match="loss_fn takes a target"):
        driver.step(tokens, target=None if odd else target)
    driver.step(tokens, target=target)
    return "ok"


def test_shared_state_of_other_values_is_noticed_when_the_driver_is_made() -> None:
    assert on_ranks(2, _other_values, *cut(Words, 2)) == ["ok", "ok"]


def _other_values(model: nn.Module, pipe: Pipe) -> str:
    with torch.no_grad():
        model.emb.weight[3, 1] += dist.get_rank() * 1e-9  # type: ignore[index,operator,union-attr]
    with pytest.raises(StagecutError, match=r"rank 1 and rank 0 have different values of 'emb\.weight'"):
        Driver(pipe, "1F1B", 4, _loss)
    return "ok"


def test_models_that_ranks_built_with_other_random_numbers_are_noted() -> None:
    assert on_ranks(2, _built_otherwise) == ["ok", "ok"]


def _built_otherwise() -> str:
    rank = dist.get_rank()
    x = torch.ones(4, 4)
    for seeds, change, noted in BUILT:
        torch.manual_seed(seeds[rank])
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        pipe = pipeline(model, (x[:2],), stages=2, check=None)
        torch.manual_seed(rank)  # for dropout
        driver = Driver(pipe, "GPipe", 2, lambda out: out.square().mean())
        change(pipe)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            driver.step(x.to(next(pipe.parameters()).dtype))
            driver.step(x.to(next(pipe.parameters()).dtype))
        assert ["as it built the model" in str(each.message) for each in told].count(True) == noted
        own = [name for name in ("0.weight", "2.weight") if name in pipe.stages[rank].state_dict()]
        words = f"the stages of this rank have '{own[0]}' and 1 more tensor as it built the model, and rank {1 - rank} built the model"
        assert [note.startswith(words) for note in driver.notes] == [True] * noted, driver.notes
    return "ok"


def _loaded(pipe: Pipe) -> None:
    """Its own stage has values of a checkpoint, and the other one those of before."""
    for parameter in pipe.stages[dist.get_rank()].parameters():
        nn.init.constant_(parameter, 0.25)


BUILT: list[tuple[tuple[int, int], Callable[[Pipe], Any], bool]] = [
    ((3, 3), lambda pipe: None, False),
    ((3, 4), lambda pipe: None, True),
    ((3, 4), lambda pipe: pipe.to(torch.bfloat16), True),
    ((3, 4), _loaded, False),
    ((3, 3), _loaded, False),
]
"""The seed of each rank, what happens between the driver and its first step, and whether that is noted."""


def test_a_shared_parameter_is_frozen_on_all_ranks_or_on_none() -> None:
    assert on_ranks(2, _frozen_on_one, *cut(Words, 2)) == ["ok", "ok"]


def _frozen_on_one(model: nn.Module, pipe: Pipe) -> str:
    driver = Driver(pipe, "1F1B", 4, _loss)
    torch.manual_seed(0)
    tokens, target = batch()
    model.emb.requires_grad_(dist.get_rank() == 0)  # type: ignore[union-attr]
    with pytest.raises(StagecutError, match=r"'emb\.weight' is frozen on rank 1, and not so on rank 0"):
        driver.step(tokens, target=target)
    model.emb.requires_grad_(True)  # type: ignore[union-attr]
    driver.step(tokens, target=target)
    return "ok"


def test_a_loss_that_read_a_stale_weight_says_so_once() -> None:
    assert on_ranks(2, _stale, *cut(Hidden, 2)) == ["ok", "ok"]


def _stale(model: Hidden, pipe: Pipe) -> str:
    pipe._model = lambda: model
    reference = deepcopy(model)
    driver = Driver(pipe, "1F1B", 4, lambda h, t: F.cross_entropy((h @ model.head.weight.t()).flatten(0, 1), t.flatten()))
    torch.manual_seed(0)
    tokens, target = batch()
    target = target.clamp(min=0)
    with torch.no_grad():  # as a checkpoint does, which loads the stages of a rank only
        reference.head.weight.mul_(2)
        model.head.weight.mul_(2 - dist.get_rank())
    with pytest.raises(StaleError, match=r"loss_fn read another 'emb\.weight' than rank 0 has"):
        driver.eval(tokens, target=target)
    _, losses = driver.eval(tokens, target=target)
    want = F.cross_entropy((reference(tokens) @ reference.head.weight.t()).flatten(0, 1), target.flatten())
    torch.testing.assert_close(losses.batch, want.detach())
    return "ok"


def test_a_loss_that_reads_a_weight_which_was_replaced_is_refused_by_name() -> None:
    assert on_ranks(2, _replaced, *cut(lambda: Words(tied=False), 2)) == ["ok", "ok"]


def _replaced(model: Words, pipe: Pipe) -> str:
    loose = deepcopy(model)  # whose tensors no stage holds
    pipe._model = lambda: loose
    driver = Driver(pipe, "1F1B", 4, lambda out, target: _loss(out, target) + loose.head.weight.sum(), group=dist.new_group())
    torch.manual_seed(0)
    tokens, target = batch()
    with pytest.raises(RankError, match=r"loss_fn reads 'head\.weight' of the model, in whose place a stage holds another") as caught:
        driver.step(tokens, target=target)
    assert "let forward return" in caught.value.hint
    return "ok"


# --- data ---------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """The second input is read by the last stage alone, and the third is returned as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(10))

    def forward(self, x: torch.Tensor, late: torch.Tensor, same: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x * late, same


def _pair_loss(out: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return ((out[0] - target) * out[1] * scale).square().mean()


def _moved(model: nn.Module, pipe: Pipe, schedule: str, way: str) -> str:
    reference, rank = deepcopy(model), dist.get_rank()
    driver = Driver(pipe, schedule, micro_batches(), _pair_loss, data_on=way)
    rows = 2 * micro_batches()
    x, late, same, target = (torch.randn(rows, WIDTH, dtype=torch.float64) for _ in range(4))
    scale = torch.rand(rows, 1, dtype=torch.float64)
    has_inputs = rank == driver.placement[0]
    has_labels = rank == driver.placement[0 if way == "first" else -1]
    args = (x, late) if has_inputs else ()
    kwargs: dict[str, Any] = {"same": same} if has_inputs else {}
    labels: dict[str, Any] = {"target": target, "loss_kwargs": {"scale": scale}} if has_labels else {}
    for _ in range(2):
        out, losses = driver.step(*args, **kwargs, **labels)
        want = reference(x, late, same)
        loss = _pair_loss(want, target, scale)
        loss.backward()
        torch.testing.assert_close(losses.batch, loss.detach())
        if driver.is_last:
            torch.testing.assert_close(out, (want[0].detach(), same))
    return gradients_differ(driver, reference)


def _cut_pair(stages: int) -> tuple[nn.Module, Pipe]:
    torch.manual_seed(3)
    model = Pair().double()
    spec = {f"layers.{10 * i // stages}": SplitPoint.BEGINNING for i in range(1, stages)}
    return model, pipeline(model, tuple(torch.randn(2, WIDTH).double() for _ in range(3)), split_spec=spec, check=None)


@pytest.mark.parametrize("way", ["first", "ends"])
def test_data_is_moved_to_the_ranks_that_read_it(way: str) -> None:
    for schedule, stages in (("1F1B", 2), ("Interleaved1F1B", 4), ("ZBVZeroBubble", 4)):
        assert on_ranks(2, _moved, *_cut_pair(stages), schedule, way) == ["", ""]


# --- what is kept apart -------------------------------------------------------------------------------


class Cache(nn.Module):
    """Keys of a sequence of four micro-batches at a time are kept in a buffer, and where it stands in another."""

    keys: torch.Tensor
    place: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("keys", torch.zeros(2, 8, 4), persistent=False)
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        self.keys.index_copy_(1, self.place, x)
        self.place.add_(1)
        return self.second(self.keys.cumsum(1))  # type: ignore[no-any-return]


def test_in_eval_mode_each_micro_batch_has_buffers_of_its_own() -> None:
    torch.manual_seed(0)
    model = Cache().eval()
    pipe = pipeline(model, (torch.randn(2, 1, 4),), split_spec={"second": SplitPoint.BEGINNING}, check=None)
    assert on_ranks(2, _decode, model, pipe) == ["ok", "ok"]


def _decode(model: nn.Module, pipe: Pipe) -> str:
    driver = Driver(pipe, "GPipe", 4)
    for prompt in range(2):
        references = [deepcopy(model) for _ in range(4)]
        with torch.no_grad():
            for part in (model, *references):
                part.get_buffer("keys").zero_()  # a new sequence, on all micro-batches
                part.get_buffer("place").fill_(0)
        for token in range(5):
            torch.manual_seed(10 * prompt + token)
            x = torch.randn(8, 1, 4)
            out, _ = driver.eval(x)
            with torch.no_grad():
                want = torch.cat([part(piece) for part, piece in zip(references, x.chunk(4), strict=True)])
            if driver.is_last:
                torch.testing.assert_close(out, want)
        if not driver.is_last:
            assert pipe.stages[0].get_buffer("place").item() == 5
    return "ok"


class Dropped(nn.Module):
    """Two dropouts of ones, in two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.middle, self.two = nn.Dropout(), nn.Linear(64, 64), nn.Dropout()
        nn.init.zeros_(self.middle.weight)
        nn.init.ones_(self.middle.bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.one(x)
        return first, self.two(self.middle(first))


def test_stages_and_micro_batches_draw_masks_of_their_own() -> None:
    pipe = pipeline(Dropped(), (torch.ones(2, 64),), split_spec={"middle": SplitPoint.BEGINNING}, check=None)
    assert on_ranks(2, _masks, pipe) == ["ok", "ok"]


def _masks(pipe: Pipe) -> str:
    driver = Driver(pipe, "GPipe", 4)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        out, _ = driver.eval(torch.ones(8, 64))
        if driver.is_last:
            found.append(torch.cat([(part > 0).flatten().view(4, -1) for part in out]))
    if driver.is_last:
        assert torch.equal(found[0], found[1])
        rows = torch.cat([found[0], found[2]]).double()
        alike = (rows[:, None] == rows[None]).double().mean(-1) - torch.eye(16)
        assert alike[~torch.eye(16).bool()].min() > 0.2
        assert alike[~torch.eye(16).bool()].max() < 0.8
    return "ok"


def test_a_stage_is_wrapped_once_for_all_drivers_of_a_pipe() -> None:
    assert on_ranks(2, _wrap_once, *cut(lambda: Words(tied=False), 2)) == ["ok", "ok"]


def _wrap_once(model: nn.Module, pipe: Pipe) -> str:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "pipe"))
    reference, group = deepcopy(model), mesh.get_group("pipe")

    def driver(schedule: str, count: int, **options: Any) -> Driver:
        return Driver(pipe, schedule, count, _loss, group=group, **options)

    def options() -> dict[str, Any]:
        return {"wrap": lambda stage, _: fully_shard(stage, mesh=mesh["data"])}

    torch.manual_seed(0)
    tokens, target = batch()
    train, check, bare = driver("1F1B", 4, **options()), driver("GPipe", 2, **options()), driver("GPipe", 1)
    train.step(tokens, target=target)
    assert check.modules == train.modules == bare.modules
    for evaluating, rows in ((check, 4), (bare, 2)):
        out, _ = evaluating.eval(tokens[:rows], target=target[:rows])
        want = reference(tokens[:rows])
        if evaluating.is_last:
            torch.testing.assert_close(out, want.detach())
    with pytest.raises(StagecutError, match="was wrapped by another function"):
        driver("GPipe", 2, wrap=lambda stage, _: stage).parameters()
    return "ok"


def test_the_same_code_around_other_values_is_another_wrap() -> None:
    assert on_ranks(2, _wrap_otherwise, *cut(Words, 2)) == ["ok", "ok"]


def _wrap_otherwise(model: nn.Module, pipe: Pipe) -> str:
    def within(kind: type[nn.Module]) -> Callable[[nn.Module, int], nn.Module]:
        return lambda stage, _: kind(stage)

    def around(stage: nn.Module, index: int, kind: type[nn.Module]) -> nn.Module:
        return kind(stage)

    class Other(nn.Sequential):
        pass

    first = Driver(pipe, "GPipe", 1, wrap=within(nn.Sequential))
    assert first.modules == Driver(pipe, "GPipe", 2, wrap=within(nn.Sequential)).modules
    again = cut(Words, 2)[1]
    first = Driver(again, "GPipe", 1, wrap=partial(around, kind=nn.Sequential))
    assert first.modules == Driver(again, "GPipe", 2, wrap=partial(around, kind=nn.Sequential)).modules
    for which, wrap in ((pipe, within(Other)), (again, partial(around, kind=Other)), (again, within(nn.Sequential))):
        with pytest.raises(StagecutError, match="was wrapped by another function"):
            Driver(which, "GPipe", 2, wrap=wrap).parameters()
    return "ok"


def test_cuts_that_were_measured_are_the_same_on_all_ranks() -> None:
    first, second = on_ranks(2, _measured)
    assert first == second


def _measured() -> list[Any]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(24)))
    found: list[Any] = []
    for stages in (2, 3, 4):
        policy = Balanced(stages, Setting(device="CPU"), tolerance=0.0, profile_on="cpu")
        pipe = pipeline(model, (torch.randn(64, 64),), split_policy=policy, check=None)
        assert pipe.plan is not None
        found.append((pipe.plan.cuts, pipe.plan.seconds))
    if dist.get_rank():
        pipeline(nn.Linear(2, 2), (torch.ones(1, 2),), stages=1)  # cut on one rank alone, waits for nobody
    return found


# --- errors and text ----------------------------------------------------------------------------------


def test_a_rank_error_advises_what_fits_its_cause() -> None:
    told = on_ranks(2, _advised, *cut(Words, 2))
    assert all("mend what fails there" in text for text in told)
    assert all(
        "no loss of one element" not in text and "return the loss, or (loss, metrics)" in text
        for text in on_ranks(2, _advised_of_ours, *cut(Words, 2))
    )


def _advised(model: nn.Module, pipe: Pipe) -> str:
    return _error_of(Driver(pipe, "1F1B", 4, lambda out, target: out.nonsense, group=dist.new_group()))


def _advised_of_ours(model: nn.Module, pipe: Pipe) -> str:
    return _error_of(Driver(pipe, "1F1B", 4, lambda out, target: out, group=dist.new_group()))


def _error_of(driver: Driver) -> str:
    torch.manual_seed(0)
    tokens, target = batch()
    with pytest.raises(RankError) as caught:
        driver.step(tokens, target=target)
    return str(caught.value)


def test_options_go_to_torch_s_schedule() -> None:
    assert on_ranks(2, _with_options, *cut(Words, 4)) == ["ok", "ok"]


def _with_options(model: nn.Module, pipe: Pipe) -> str:
    for options, words in (
        ({"defer_pp_receive": True}, "takes no 'defer_pp_receive'"),
        ({"n_microbatches": 3}, "schedule_kwargs has 'n_microbatches', which is set by the Driver's own argument"),
    ):
        with pytest.raises(InputError, match=words):
            Driver(pipe, "Interleaved1F1B", 4, schedule_kwargs=options)
    taken = inspect.signature(ScheduleInterleaved1F1B.__init__).parameters
    options = {name: True for name in ("defer_pp_recv",) if name in taken}  # since torch 2.13
    driver = Driver(pipe, "Interleaved1F1B", 4, _loss, schedule_kwargs=options)
    torch.manual_seed(0)
    tokens, target = batch()
    driver.step(tokens, target=target)
    driver.sync_shared_gradients()
    reference = deepcopy(model)
    (_loss(reference(tokens), target) / 4).backward()  # the sum of each of four micro-batches
    return gradients_differ(driver, reference) or "ok"


def test_a_driver_prints_its_schedule_its_placement_and_its_sizes() -> None:
    first, second = on_ranks(2, _printed, *cut(Words, 2))
    assert re.sub("rank [01]$| +here| +$", "", first, flags=re.MULTILINE) == re.sub("rank [01]$| +here| +$", "", second, flags=re.MULTILINE)
    assert first.splitlines()[0] == "Driver of Words: Schedule1F1B, 2 stages on 2 ranks, 4 micro-batches, train mode, this is rank 0"
    shown = [line.split() for text in (first, second) for line in text.splitlines()[1:4]]
    head, here = ["stage", "rank", "tensors", "bytes"], ["here"]
    sizes = [row[2:4] for row in shown[1:3]]
    assert shown[:3] == [head, ["0", "0", *sizes[0], *here], ["1", "1", *sizes[1]]]
    assert shown[3:] == [head, ["0", "0", *sizes[0]], ["1", "1", *sizes[1], *here]]
    assert first.splitlines()[-1] == "  input tokens : i64[2,6] batch(0)"


def _printed(model: nn.Module, pipe: Pipe) -> str:
    return str(Driver(pipe, "1F1B", 4, _loss))


def test_a_schedule_that_cannot_run_so_many_micro_batches_says_so() -> None:
    assert on_ranks(2, _too_few, *cut(Words, 4)) == ["ok", "ok"]


def _too_few(model: nn.Module, pipe: Pipe) -> str:
    torch.manual_seed(0)
    with pytest.raises(StagecutError, match="DualPipeV has no order for 4 stages on 2 ranks and 2 micro-batches"):
        Driver(pipe, "DualPipeV", 2, _loss).step(torch.randint(WORDS, (4, 6)), target=torch.randint(WORDS, (4, 6)))
    return "ok"


def test_a_driver_or_a_stage_without_a_process_group_is_refused() -> None:
    _, pipe = cut(Words, 2)
    with pytest.raises(StagecutError, match="a Driver runs on a process group, and there is none"):
        Driver(pipe)
    with pytest.raises(StagecutError, match="runs on a process group, and there is none"):
        pipe.build_stage(0, "cpu")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: checkpoint.load(None), "a checkpoint is of a Driver, not of a NoneType"),  # type: ignore[arg-type]
        (lambda: checkpoint.save(nn.Linear(1, 1), None, "x"), "not of a Linear"),  # type: ignore[arg-type]
        (lambda: checkpoint.latest(None), "None is no folder"),  # type: ignore[arg-type]
    ],
)
def test_a_checkpoint_of_nothing_is_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(checkpoint.CheckpointError, match=words):
        call()


def test_a_checkpoint_that_latest_did_not_find_is_refused() -> None:
    assert on_ranks(1, _no_checkpoint, *cut(Words, 1)) == ["ok"]


def _no_checkpoint(model: nn.Module, pipe: Pipe) -> str:
    with pytest.raises(checkpoint.CheckpointError, match="there is no checkpoint: the folder is None"):
        checkpoint.load(Driver(pipe, "GPipe", 1), None, None)
    return "ok"


# --- parts, without ranks -----------------------------------------------------------------------------


def _losses_to_call() -> Iterator[tuple[Any, bool]]:
    yield lambda out: out, True
    yield lambda out, target: out, False
    yield lambda out, target=None: out, True
    yield lambda *parts: parts, True
    yield F.cross_entropy, False
    yield nn.CrossEntropyLoss(), False
    yield torch.sum, True


@pytest.mark.parametrize(("loss_fn", "without"), list(_losses_to_call()))
def test_whether_a_loss_function_needs_a_target(loss_fn: Any, without: bool) -> None:
    assert takes_no_target(loss_fn) is without
    assert takes_no_target(lambda out, *, weight: out, ["weight"])
    assert not takes_no_target(lambda out: out, ["weight"])


def test_metrics_are_joined_by_what_they_are() -> None:
    parts = [
        {"count": 2, "mean": 1.0, "rows": torch.ones(2, 3), "number": torch.tensor(3), "name": "a", "flag": True, "none": None},
        {"count": 3, "mean": 3.0, "rows": torch.zeros(1, 3), "number": torch.tensor(4), "name": "b", "flag": False, "none": None},
    ]
    joined = joined_metrics(parts, [], None)
    assert (joined["count"], joined["mean"], joined["number"].item()) == (5, 2.0, 7)
    assert (joined["name"], joined["flag"], joined["none"], joined["rows"].shape) == (["a", "b"], [True, False], None, (3, 3))
    assert joined_metrics(parts, [torch.tensor(1.0), torch.tensor(3.0)], "count")["mean"] == 2.5
    assert joined_metrics([{"a": 1}, {"b": 1}], [], None) == [{"a": 1}, {"b": 1}]
    assert joined_metrics([{"tokens": torch.tensor(2.0)}] * 2, [torch.tensor(2.0)] * 2, "tokens")["tokens"] == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.uint8, torch.complex64, torch.int64])
def test_a_checksum_tells_values_apart_and_not_layouts(dtype: torch.dtype) -> None:
    tensor = torch.arange(21).remainder(5).reshape(3, 7).to(dtype)
    assert checksum(tensor) == checksum(tensor.t().contiguous().t()) == checksum(torch.cat([tensor, tensor])[3:])
    assert checksum(tensor) != checksum(tensor.flip(0))
    assert checksum(tensor) != checksum(tensor.reshape(7, 3))
    assert checksum(torch.zeros(9)) != checksum(torch.zeros(10))
