"""When one rank fails, all stop with an error that names it, and no rank waits for a message that will not
come.

Ranks report through the group's store. A rank that fails writes there what failed and where, then raises a
flag. During a step every rank watches the flag from a thread. When the flag goes up, the thread answers that
the rank is alive and breaks the rank's connections, so that whatever the rank waits for fails. When a rank
was killed, its neighbours see its connections close, and raise the flag for it; the rank that then neither
reports nor answers is the one that is gone. The last resort is the timeout of the group.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.pipelining import PipelineStage

from stagecut.backend.ranks.hosts import group_of_hosts
from stagecut.backend.stages.failures import place_of_failure
from stagecut.ir.blame import drop_all_steps, drop_our_steps
from stagecut.ir.errors import StagecutError

INTERVAL = 0.5
"""Seconds between two looks at the flag."""
GRACE = 5.0
"""Seconds within which a rank that is alive answers."""

_FAILED = "failed"
_UNUSED_TAG = 2**20 + 7
_TORCH_FOLDER = Path(torch.__file__).parent
_OWN_FOLDER = Path(__file__).parent


_BROKEN: WeakSet[dist.ProcessGroup] = WeakSet()
"""Groups in which a rank failed."""

Report = dict[str, Any]
"""`what` failed, `where`, in which `stage`, and a `hint`. `what` is empty where another rank is gone."""

RESTART = "start all ranks again from checkpoint.latest(folder)"


class RankError(StagecutError):
    """A rank failed; every rank of the group raises this. The group is broken, except where only the loss
    function failed. The hint says what fits the cause: a rank that was killed is started again, code that
    raised is mended first.

    `ranks` are those that failed, `where` says what failed there. On a rank that failed by itself, the error
    is `__cause__`.
    """

    __module__ = "stagecut"

    def __init__(
        self,
        what: str,
        ranks: Sequence[int] = (),
        *,
        where: str = "",
        hint: str = RESTART,
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.ranks = tuple(ranks)


def refuse_broken(group: dist.ProcessGroup | None) -> None:
    """Raises RankError for a group in which a rank failed before."""
    if (dist.group.WORLD if group is None else group) in _BROKEN:
        raise RankError(
            "a rank of this group failed before, and nothing is exchanged in it any more"
        )


class Faults:
    """Watches the joint work of the ranks of a group. Every rank makes one; `homes` are the ranks of the
    stages, by stage.
    """

    def __init__(self, group: dist.ProcessGroup | None, homes: Sequence[int]) -> None:
        self._group = group if group is not None else dist.group.WORLD
        assert self._group is not None
        self._homes = tuple(homes)
        self.rank = dist.get_rank(group)
        self.ranks = dist.get_world_size(group)
        hosts = group_of_hosts(self._group)
        self.groups: list[Any] = list(dict.fromkeys([self._group, hosts]))
        self._watching = threading.Lock()
        self._refusals = 0
        self._refused: Exception | None = None
        """What all ranks raised last, each its own."""
        self._awaited = ""
        """The call to which other ranks have to come; it stays where they did not."""
        self._awaited_since = 0.0
        self._meetings = 0
        self._told_missing = -1
        self._partly: tuple[str, tuple[int, ...]] | None = None
        """The call that only some ranks make together, and these, while they do."""
        self._partly_met: Counter[tuple[int, ...]] = Counter()
        self._skipped: Report | None = None
        token = [uuid.uuid4().hex]
        dist.broadcast_object_list(token, group=hosts, group_src=0)
        store: Any = self._group.get_group_store()
        self._store: Any = PrefixStore(f"stagecut/{token[0]}", store.clone())

    @contextmanager
    def together(self, agreed: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """All ranks do the work inside together. Raises RankError when one fails; the group is broken then.

        Errors in `agreed` are those that all ranks raise alike; so is what `alike` inside has found to be so.
        """
        if not self._watching.acquire(blocking=False):
            yield  # inside another one
            return
        done = threading.Event()
        watch = threading.Thread(target=self._watch, args=(done,), daemon=True)
        watch.start()
        try:
            yield
        except RankError:
            raise  # `alike` has told all ranks
        except agreed:
            raise
        except Exception as error:
            if error is self._refused:
                raise
            raise self._failed(error) from _origin(error)
        except BaseException as error:
            self._report(error)
            raise
        finally:
            done.set()
            watch.join()
            self._watching.release()

    @contextmanager
    def alike(self) -> Iterator[None]:
        """Every rank makes the same checks inside. When all raise, their errors are raised as they are, and
        the group can go on.

        When only some raise, they fail as in `together`.
        """
        self._refusals += 1
        try:
            yield
        except Exception as error:
            if self._all_refuse():
                self._refused = error
                raise
            raise self._failed(error) from _origin(error)

    @contextmanager
    def awaiting(self, call: str) -> Iterator[None]:
        """All ranks come to the same call inside. Those that have not come after GRACE seconds are named on
        standard error, once for each call.
        """
        self._meetings += 1
        self._awaited_since = time.monotonic()
        self._awaited = call
        try:
            yield
        except StagecutError:
            self._awaited = ""
            raise
        self._awaited = ""

    @contextmanager
    def partly(self, call: str, ranks: tuple[int, ...]) -> Iterator[None]:
        """These ranks of the group make the same call inside. Raises RankError on all ranks where one of them
        has gone on to the next call of the whole group without it.
        """
        self._partly_met[ranks] += 1
        self._partly = call, ranks
        try:
            yield
        finally:
            self._partly = None

    def _refuse_skipped(self) -> None:
        """Raises RuntimeError when the store does not answer."""
        partly = self._partly
        if partly is None:
            return
        call, ranks = partly
        for rank in ranks:
            number, other, met = self._came(rank)
            if rank == self.rank or number <= self._meetings:
                continue
            if met.get(str(ranks), 0) >= self._partly_met[ranks]:
                continue  # it has been here
            self._skipped = {
                "what": f"{self._title(rank)} calls {other}, and not {call} before, as rank {self.rank} does",
                "where": "",
                "stage": None,
                "hint": "every rank makes the same calls in the same order; mend that, then "
                + RESTART,
            }
            self._tell(self._skipped)
            return

    def _came(self, rank: int) -> tuple[int, str, dict[str, int]]:
        """The number of the call at which a rank waited last, its name, and how often the rank was at each of
        those that only some ranks make.
        """
        key = f"came {rank}"
        if not self._store.check([key]):
            return 0, "", {}
        number, call, met = json.loads(self._store.get(key))
        return number, call, met

    def _tell_missing(self) -> None:
        """Raises RuntimeError when the store does not answer."""
        call, number = self._awaited, self._meetings
        if not call or self._told_missing == number:
            return
        met = {str(ranks): count for ranks, count in self._partly_met.items()}
        # one entry for each rank, however many calls there are
        self._store.set(f"came {self.rank}", json.dumps([number, call, met]))
        waited = time.monotonic() - self._awaited_since
        if waited < GRACE:
            return
        self._told_missing = number
        came = [self._came(rank)[0] >= number for rank in range(self.ranks)]
        missing = [rank for rank in range(self.ranks) if not came[rank]]
        if missing and came.index(True) == self.rank and self._awaited == call:
            titles = " and ".join(map(self._title, missing))
            have = "have" if missing[1:] else "has"
            sys.stderr.write(
                f"stagecut: {self._title(self.rank)} calls {call} and waits: {titles} {have} not come to it "
                f"in {waited:.0f} s; every rank calls it\n"
            )
            sys.stderr.flush()

    def _all_refuse(self) -> bool:
        key = f"refusal {self._refusals}"
        try:
            self._store.add(key, 1)
            return _within(GRACE, lambda: self._store.add(key, 0) == self.ranks)
        except RuntimeError:
            return False  # the store is gone

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(INTERVAL):
            try:
                if not self._store.check([_FAILED]):
                    self._tell_missing()
                    self._refuse_skipped()
                    continue
                self._store.set(f"alive {self.rank}", "")
            except RuntimeError:
                # the rank that holds the store may just be done; when it was killed, its neighbours see it
                return
            self._break()
            return

    def _failed(self, error: Exception) -> RankError:
        """The error that this rank ends with, after all ranks were told to stop."""
        report = self._skipped or self._report(error)
        _shorten(error, report)
        if report["what"]:
            return self._error(self.rank, report)
        try:
            return self._culprit(error)
        except RuntimeError:
            what = f"the store of the group does not answer: {self._title(0)}, which mostly holds it, is gone"
            return RankError(what, [self._global(0)])

    def _report(self, error: BaseException) -> Report:
        """The other ranks can read what failed here, and nothing is exchanged any more."""
        report = _described(error)
        self._tell(report)
        return report

    def _tell(self, report: Report) -> None:
        """The other ranks can read this report, and nothing is exchanged any more."""
        try:
            self._store.set(f"report {self.rank}", json.dumps(report))
            self._store.set(_FAILED, "")
        except RuntimeError:
            # the store is gone: the others will only see that the connections break
            pass
        self._break()

    def _culprit(self, error: Exception) -> RankError:
        """The error for the rank that failed, when this rank only saw a connection break. Raises RuntimeError
        when the store does not answer.
        """
        answered: set[int] = set()
        reports: list[tuple[int, Report]] = []

        def one_has_failed() -> bool:
            for rank in range(self.ranks):
                if self._store.check([f"report {rank}"]):
                    report = json.loads(self._store.get(f"report {rank}"))
                    answered.add(rank)
                    if report["what"]:
                        reports.append((rank, report))
                elif self._store.check([f"alive {rank}"]):
                    answered.add(rank)
            return bool(reports)

        if _within(GRACE, one_has_failed):
            return self._error(*reports[0])
        gone = [rank for rank in range(self.ranks) if rank not in answered]
        if not gone:
            at = f" at {self._awaited}" if self._awaited else ""
            return RankError(
                f"the ranks lost their connection{at}, though all are alive: {_line(error)}"
            )
        does = "does not answer: it was killed, has ended, or hangs"
        if gone[1:]:
            does = "do not answer: they were killed, have ended, or hang"
        hint = RESTART
        if self._awaited:
            hint = f"every rank calls {self._awaited}, as this one did; {RESTART}"
        return RankError(
            f"{' and '.join(map(self._title, gone))} {does}",
            [self._global(rank) for rank in gone],
            hint=hint,
        )

    def failed_loss(self, failure: Report) -> RankError:
        """The error of every rank for a loss function that failed."""
        return self._error(self._homes[-1], failure)

    def _error(self, rank: int, report: Report) -> RankError:
        return RankError(
            f"{self._title(rank, report['stage'])} failed: {report['what']}",
            [self._global(rank)],
            where=report["where"],
            hint=report["hint"],
        )

    def _title(self, rank: int, stage: int | None = None) -> str:
        """`rank 2 (stage 2)`: the stage where it failed, or all the stages that the rank has."""
        stages = [index for index, home in enumerate(self._homes) if home == rank]
        if stage is not None:
            stages = [stage]
        plural = "s" if stages[1:] else ""
        numbers = " and ".join(map(str, stages))
        return f"rank {self._global(rank)} (stage{plural} {numbers})"

    def _global(self, rank: int) -> int:
        assert self._group is not None
        return dist.get_global_rank(self._group, rank)

    def _break(self) -> None:
        """Whatever this rank waits for in the group fails now, and so does whatever others wait for
        from it.
        """
        assert self._group is not None
        _BROKEN.add(self._group)
        for group in self.groups:
            _break_connections(group)


def _break_connections(group: Any) -> None:
    """No rank receives anything from this one through `group` any more.

    gloo has no abort, but a receive that times out closes all connections of its group.
    """
    for device_type in sorted(
        {"cuda", "cpu"} & {device.type for device in group._device_types}
    ):
        backend = group._get_backend(torch.device(device_type))
        if backend.name() != "gloo":
            backend.abort()
            continue
        for peer in range(group.size()):
            if peer == group.rank():
                continue
            try:
                backend.recv([torch.empty(1)], peer, _UNUSED_TAG).wait(
                    timedelta(milliseconds=1)
                )
            except RuntimeError:
                continue  # it timed out, as it should, or was closed before


def _within(seconds: float, ready: Any) -> bool:
    """True as soon as `ready()` holds, False when it did not hold within `seconds`."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            return False
        time.sleep(INTERVAL / 10)
    return True


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}"[:2000]


# --- what failed, and where ---------------------------------------------------------------------------


def failure_of_loss(
    error: Exception, stage: int, place: str, given: str, how: str
) -> Report | None:
    """A report of an error that the loss function at this `place` raised, `given` such arguments, for all
    ranks: they can go on, though `how` they were called has no result. None where they cannot.
    """
    report = _described(error)
    if not report["what"] or isinstance(error, _FATAL):
        return None
    report["stage"] = stage
    if not isinstance(error, StagecutError):
        line = report["where"] or place
        report["where"] = f"{line}, where loss_fn was given {given}"
        report["hint"] = "mend what fails there"
    report["hint"] += "; the ranks can go on"
    if how == "step":
        report["hint"] += (
            ": zero_grad first, since this step has left parts of gradients"
        )
    drop_our_steps(error)
    return report


_FATAL = torch.OutOfMemoryError, MemoryError, OSError


def _described(error: BaseException) -> Report:
    """A report of the error: what, where, in which stage, and a hint. `what` is empty when the error only
    says that another rank is gone.
    """
    error = _origin(error)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    stage = next(
        (
            index
            for frame in reversed(frames)
            if (index := _stage_of(frame)) is not None
        ),
        None,
    )
    if isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or (frames and _waits(frames[-1]))
    ):
        return {"what": "", "where": "", "stage": stage, "hint": RESTART}
    told = error.where if isinstance(error, StagecutError) else ""
    where = place_of_failure(error, _is_models, told)
    return {
        "what": _line(error) if not isinstance(error, StagecutError) else error.what,
        "where": where,
        "stage": stage,
        "hint": _advice(error),
    }


def _advice(error: BaseException) -> str:
    """A hint on what to do about an error of a rank. A restart meets most of them again."""
    if isinstance(error, StagecutError):
        return error.hint
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return (
            "more and smaller micro-batches, checkpointing, or other cuts (pipe.report()); "
            f"then {RESTART}"
        )
    if isinstance(error, OSError | dist.DistError | KeyboardInterrupt | SystemExit):
        return RESTART
    return f"mend what fails there, which a restart would meet again; then {RESTART}"


def _origin(error: BaseException) -> BaseException:
    """The error that torch's schedules wrap."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _shorten(error: BaseException, report: Report) -> None:
    """The error that torch's schedules wrap has no steps where it only says that another rank is gone, since
    they only waited; one of ours has none of ours.
    """
    origin = _origin(error)
    if not report["what"]:
        drop_all_steps(origin)
    elif isinstance(origin, StagecutError):
        drop_our_steps(origin)


def _stage_of(frame: FrameType) -> int | None:
    """The stage that a frame is about."""
    me = frame.f_locals.get("self")
    for candidate in (me, frame.f_locals.get("stage"), getattr(me, "_stage", None)):
        if isinstance(candidate, PipelineStage):
            return candidate.stage_index
    return None


def _waits(frame: FrameType) -> bool:
    """True for the code of torch that waits for other ranks."""
    return (
        frame.f_code.co_name == "_wait_batch_p2p"
        or frame.f_code.co_filename == dist.distributed_c10d.__file__
    )


def _is_models(frame: FrameType) -> bool:
    """True for code of the model's, emitted or its own, and for code of ours that is not about ranks."""
    return not (_in(frame, _TORCH_FOLDER) or _in(frame, _OWN_FOLDER))


def _in(frame: FrameType, folder: Path) -> bool:
    return frame.f_code.co_filename.startswith(f"{folder}/")
