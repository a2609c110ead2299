"""What ranks must agree on, compared before it can matter: the program, tied state, the arguments of a call.

A comparison is one small message of digests. Only where these differ, the ranks tell each other what they
have, and all raise the same error, which names rank and tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from stagecut.backend.ranks.faults import refuse_broken
from stagecut.backend.ranks.hosts import group_of_hosts
from stagecut.backend.stages.modules import find
from stagecut.backend.stages.staged import Staged
from stagecut.ir.errors import InputError, StagecutError
from stagecut.ir.graph import Program, StateEntry
from stagecut.ir.run.shown import shown_type, shown_value
from stagecut.ir.text.printer import fingerprint

Group = dist.ProcessGroup | None


def agree_on_program(program: Program, settings: tuple[Any, ...], group: Group) -> None:
    """Raises StagecutError on every rank when the ranks have cut different programs. Each rank may have
    traced on a device of its own. Raises RankError where a rank of the group failed before.
    """
    refuse_broken(group)
    cut = fingerprint(program)[:16]
    own = (cut, program.name, len(program.stages), *settings)
    by_rank = everywhere(own, group)
    first = by_rank[0]
    rank = next((rank for rank, other in enumerate(by_rank) if other != first), None)
    if rank is None:
        return
    hint = "build the same model with the same cuts on every rank"
    besides = {everything[1:] for everything in by_rank}
    if len(besides) == 1:
        ops = everywhere(_ops(program), group)
        if ops[rank] == ops[0]:
            order = "they have the same ops in another order, or cut elsewhere"
            hint = f"{order}: {_HASHES}"
    raise StagecutError(
        f"the ranks do not run the same program: rank {rank} has {by_rank[rank]}, rank 0 has {first}",
        where="fingerprint, model, stages, schedule, micro-batches",
        hint=hint,
    )


_HASHES = (
    "where the model goes through a set, each Python does so in an order of its own, unless all start "
    "with one number (PYTHONHASHSEED=0 torchrun ...)"
)


def _ops(program: Program) -> int:
    """A digest of the ops in any order."""
    ops = []
    for op in program.all_ops():
        line = op.loc.line if op.loc else 0
        text = f"{op.target} {line}"
        ops.append(text)
    ops.sort()
    return digest(str(ops))


def agree_on_values(pipe: Staged, homes: Sequence[int], group: Group) -> None:
    """Raises StagecutError on every rank when ranks hold different values of state that they share, or of a
    constant of the code. Values that are not there, and sharded ones, are not compared.
    """
    rank = dist.get_rank(group)
    checksums: dict[tuple[int, str], int] = {}
    for position, entry in enumerate(pipe.program.state):
        tensor = _compared(pipe, entry, homes, rank)
        if tensor is None or tensor.is_meta:
            continue
        device = ""
        if len(_ranks_of(entry, homes)) < 2:
            # a constant that was computed on another device may round otherwise
            device = tensor.device.type
        checksums[position, device] = checksum(tensor)
    by_rank = everywhere(checksums, group)
    keys = dict.fromkeys(key for others in by_rank for key in others)
    for key in keys:
        position, _ = key
        entry = pipe.program.state[position]
        of_ranks = [others.get(key) for others in by_rank]
        _compare_values(entry, of_ranks)


def _compared(
    pipe: Staged, entry: StateEntry, homes: Sequence[int], rank: int
) -> torch.Tensor | None:
    """The tensor that this rank has of a constant, or of state that stages of several ranks hold; None for
    any other.
    """
    stages = [*entry.stages]
    if len(_ranks_of(entry, homes)) > 1:
        stages = [stage for stage in stages if homes[stage] == rank]
    elif entry.kind != "const":
        return None
    if not stages:
        return None
    return _held_by(pipe, stages[0], entry)


def _ranks_of(entry: StateEntry, homes: Sequence[int]) -> set[int]:
    """The ranks whose stages hold an entry."""
    return {homes[stage] for stage in entry.stages}


def _compare_values(entry: StateEntry, checksums: Sequence[int | None]) -> None:
    """Raises StagecutError when two ranks have different checksums of an entry."""
    first: int | None = None
    for rank, number in enumerate(checksums):
        if not number:
            continue
        if first is None:
            first = rank
        if number == checksums[first]:
            continue
        hint = "seed every rank alike before the model is made, or load the same weights on each"
        said = "which their stages share"
        if entry.kind == "const":
            hint = f"seed every rank alike before the model is cut; {_HASHES}"
            said = "which is a constant of the code"
        raise StagecutError(
            f"rank {rank} and rank {first} have different values of '{entry.name}', {said}",
            where=f"stages {' and '.join(map(str, entry.stages))}",
            hint=hint,
        )


def _held_by(pipe: Staged, stage: int, entry: StateEntry) -> torch.Tensor | None:
    """The tensor that a stage holds for an entry of the program's state."""
    names = pipe.program.stages[stage].state[entry]
    return find(pipe.stages[stage], names[0])


def everywhere(own: Any, group: Group) -> list[Any]:
    """What each rank has."""
    by_rank: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(by_rank, own, group_of_hosts(group))
    return by_rank


@dataclass(frozen=True)
class Agreed:
    """changed: the changes that some rank has noticed. has: argument -> the ranks that were given it."""

    changed: list[bool]
    has: Mapping[str, frozenset[int]]


def _ranks_with(column: Sequence[int]) -> frozenset[int]:
    ranks: set[int] = set()
    for rank, number in enumerate(column):
        if number:
            ranks.add(rank)
    return frozenset(ranks)


_MODES = {True: "train", False: "eval"}
"""Whether a pipe is training -> the name of its mode."""


class Calls:
    """Compares the mode and the arguments of each call of the driver: sizes in every call, contents in the
    first `steps`.

    Ranks that are given nothing for an argument are left out.
    """

    def __init__(self, group: Group, steps: int) -> None:
        self._group = group_of_hosts(group)
        self._left = steps

    def agree(
        self,
        how: str,
        training: bool,
        arguments: Mapping[str, Any],
        changed: Sequence[bool],
    ) -> Agreed:
        """What all ranks know of this call. Raises InputError on every rank when arguments differ, or modes.

        `changed` has the changes that this rank has noticed, in an order that all ranks know.
        """
        types: list[dict[str, str]] = []
        contents: list[dict[str, int]] = []
        for name, tree in arguments.items():
            types.append(dict(_described(name, tree)))
            checksums: dict[str, int] = {}
            if self._left > 0:
                checksums = dict(_contents(name, tree))
            contents.append(checksums)
        self._left -= 1
        row = [*map(int, changed), digest(how), digest(_MODES[training])]
        row += map(_digest_of, types)
        row += map(_digest_of, contents)
        columns = self._columns(row)
        changes = columns[: len(changed)]
        compared = columns[len(changed) :]
        if any(map(_differ, compared)):
            self._refuse(how, training, types, contents)
        has: dict[str, frozenset[int]] = {}
        for name, column in zip(arguments, compared[2:], strict=False):
            has[name] = _ranks_with(column)
        return Agreed([any(column) for column in changes], has)

    def _columns(self, row: list[int]) -> list[list[int]]:
        """For each number of `row`, what each rank has in its place."""
        own = torch.tensor(row)
        ranks = dist.get_world_size(self._group)
        rows = [torch.empty_like(own) for _ in range(ranks)]
        dist.all_gather(rows, own, group=self._group)
        columns: list[list[int]] = torch.stack(rows, dim=1).tolist()
        return columns

    def _refuse(
        self,
        how: str,
        training: bool,
        types: list[dict[str, str]],
        contents: list[dict[str, int]],
    ) -> None:
        """Raises InputError for the first difference between two ranks."""
        calls = everywhere(how, self._group)
        for rank, other in enumerate(calls):
            if other != calls[0]:
                raise InputError(
                    f"rank {rank} calls driver.{other}, rank 0 calls driver.{calls[0]}",
                    hint="every rank makes the same calls in the same order",
                )
        modes = everywhere(_MODES[training], self._group)
        for rank, mode in enumerate(modes):
            if mode != modes[0]:
                raise InputError(
                    f"the pipe is in {mode} mode on rank {rank}, and in {modes[0]} mode on rank 0",
                    hint="driver.train() on every rank, or driver.train(False)",
                )
        by_rank = everywhere((types, contents), self._group)
        for position in range(len(types)):
            _compare(
                [rank_types[position] for rank_types, _ in by_rank],
                "is {0} on rank {1}, and {2} on rank {3}",
            )
            _compare(
                [rank_contents[position] for _, rank_contents in by_rank],
                "has other values on rank {1} than on rank {3}",
            )


def _compare(by_rank: list[dict[str, Any]], words: str) -> None:
    """Raises InputError when two ranks that have something have different things."""
    ranks = [rank for rank, leaves in enumerate(by_rank) if leaves]
    for rank in ranks:
        first = by_rank[ranks[0]]
        leaves = by_rank[rank]
        for path in first | leaves:
            expected = first.get(path, "absent")
            leaf = leaves.get(path, "absent")
            if leaf == expected:
                continue
            difference = words.format(leaf, rank, expected, ranks[0])
            raise InputError(
                f"the ranks were called with different data: {path} {difference}",
                where=f"rank {rank}, {path}",
                hint="give every rank the same batch, or only one of them: Driver(data_on='first')",
            )


def _differ(column: Sequence[int]) -> bool:
    numbers = set(column)
    numbers.discard(0)
    return len(numbers) > 1


def leaves_by_path(name: str, tree: Any) -> Iterator[tuple[str, Any]]:
    """`name['mask'][0]` -> what is there in the argument of that name."""
    if name in ("args", "kwargs") and not tree:
        return
    leaves, _ = tree_flatten_with_path(tree)
    for path, leaf in leaves:
        if leaf is not None:
            yield f"{name}{keystr(path)}", leaf


def _contents(name: str, tree: Any) -> Iterator[tuple[str, int]]:
    for path, leaf in leaves_by_path(name, tree):
        if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
            yield path, checksum(leaf)


def _described(name: str, tree: Any) -> Iterator[tuple[str, str]]:
    for path, leaf in leaves_by_path(name, tree):
        if isinstance(leaf, torch.Tensor):
            yield path, shown_type(leaf)
        elif isinstance(leaf, bool | int | float | str):
            yield path, repr(leaf)
        else:
            yield path, shown_value(leaf)


def digest(text: str) -> int:
    """A number for a text, never 0."""
    hashed = hashlib.blake2b(text.encode(), digest_size=8).digest()
    number = int.from_bytes(hashed, signed=True)
    return number or 1


def _digest_of(leaves: Mapping[str, Any]) -> int:
    """A number for what an argument has, 0 for an argument that was not given."""
    if not leaves:
        return 0
    return digest(repr(leaves))


_PART = 2**20
"""Numbers that are summed at a time."""


def checksum(tensor: torch.Tensor) -> int:
    """A number that depends on every bit of a tensor and on where it stands."""
    if isinstance(tensor, DTensor):
        return 0
    if tensor.layout is not torch.strided:
        return 0
    resolved = tensor.detach().resolve_conj().resolve_neg()
    flat = resolved.contiguous().view(-1)
    if flat.is_quantized or not flat.numel():
        return 0
    bits = _in_words(flat.view(torch.uint8))
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for part in bits.view(torch.int64).split(_PART):
        weights = torch.arange(1, 2 * len(part), 2, device=part.device)
        weighted = part * weights
        total = total * 31 + weighted.sum()
    number = int(total)
    shape = list(tensor.shape)
    return digest(f"{number} {tensor.dtype} {shape}")


def _in_words(bits: torch.Tensor) -> torch.Tensor:
    """The same bytes, with zeros behind them, as they can be read eight at a time."""
    missing = -len(bits) % 8
    if missing or bits.data_ptr() % 8 or bits.storage_offset() % 8:
        return torch.cat([bits, bits.new_zeros(missing)])
    return bits
