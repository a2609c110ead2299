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

from stagecut.backend.stages.modules import find
from stagecut.backend.stages.staged import Staged
from stagecut.ir.errors import InputError, StagecutError
from stagecut.ir.graph import Program
from stagecut.ir.text.printer import fingerprint

Group = dist.ProcessGroup | None


def agree_on_program(program: Program, settings: tuple[Any, ...], group: Group) -> None:
    """Raises StagecutError on every rank when the ranks have cut different programs. Each rank may have
    traced on a device of its own.
    """
    mine = (fingerprint(program)[:16], program.name, len(program.stages), *settings)
    found = everywhere(mine, group)
    odd = [rank for rank, other in enumerate(found) if other != found[0]]
    if odd:
        raise StagecutError(
            f"the ranks do not run the same program: rank {odd[0]} has {found[odd[0]]}, rank 0 has "
            f"{found[0]}",
            where="fingerprint, model, stages, schedule, micro-batches",
            hint="build the same model with the same cuts on every rank",
        )


def agree_on_tied(pipe: Staged, homes: Sequence[int], group: Group) -> None:
    """Raises StagecutError on every rank when ranks hold different values of state that they share. State
    without values, and sharded state, is not compared.
    """
    rank = dist.get_rank(group)
    shared = [
        (place, entry)
        for place, entry in enumerate(pipe.program.state)
        if len({homes[stage] for stage in entry.stages}) > 1
    ]
    if not shared:
        return
    mine = {}
    for place, entry in shared:
        here = [stage for stage in entry.stages if homes[stage] == rank]
        for stage in here[:1]:
            name = pipe.program.stages[stage].state[entry][0]
            tensor = find(pipe.stages[stage], name)
            if tensor is not None and not tensor.is_meta:
                mine[place] = checksum(tensor)
    found = everywhere(mine, group)
    for place, entry in shared:
        sums = {r: sums[place] for r, sums in enumerate(found) if sums.get(place)}
        for other, number in sums.items():
            first = min(sums)
            if number != sums[first]:
                raise StagecutError(
                    f"rank {other} and rank {first} have different values of '{entry.name}', which their "
                    "stages share",
                    where=f"stages {' and '.join(map(str, entry.stages))}",
                    hint="seed every rank alike before the model is made, or load the same weights on each",
                )


def everywhere(mine: Any, group: Group) -> list[Any]:
    """What each rank has."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group)
    return found


@dataclass(frozen=True)
class Agreed:
    """changed: the changes that some rank has noticed. has: argument -> the ranks that were given it."""

    changed: list[bool]
    has: Mapping[str, frozenset[int]]


def _ranks_with(column: Sequence[int]) -> frozenset[int]:
    return frozenset(rank for rank, number in enumerate(column) if number)


class Calls:
    """Compares the arguments of each call of the driver: sizes in every call, contents in the first `steps`.

    Ranks that are given nothing for an argument are left out.
    """

    def __init__(self, group: Group, device: torch.device, steps: int) -> None:
        self._group, self._device, self._left = group, device, steps

    def agree(
        self, how: str, given: Mapping[str, Any], changed: Sequence[bool]
    ) -> Agreed:
        """What all ranks know of this call. Raises InputError on every rank when arguments differ.

        `changed` has the changes that this rank has noticed, in an order that all ranks know.
        """
        described = [dict(_described(name, tree)) for name, tree in given.items()]
        contents = self._contents(given) if self._left > 0 else {}
        self._left -= 1
        row = [
            *map(int, changed),
            _digest(how),
            *(_digest(repr(one)) if one else 0 for one in described),
            *(_digest(repr(contents[n])) if contents.get(n) else 0 for n in given),
        ]
        columns = list(zip(*self._rows(row), strict=True))
        changes, (calls, *arguments) = columns[: len(changed)], columns[len(changed) :]
        if any(map(_differ, (calls, *arguments))):
            self._refuse(how, described, contents)
        return Agreed(
            [any(column) for column in changes],
            {
                name: _ranks_with(column)
                for name, column in zip(given, arguments, strict=False)
            },
        )

    def _rows(self, row: list[int]) -> list[list[int]]:
        mine = torch.tensor(row, device=self._device)
        ranks = dist.get_world_size(self._group)
        rows = [torch.empty_like(mine) for _ in range(ranks)]
        dist.all_gather(rows, mine, group=self._group)
        found: list[list[int]] = torch.stack(rows).tolist()
        return found

    def _contents(self, given: Mapping[str, Any]) -> dict[str, dict[str, int]]:
        return {
            name: {
                path: checksum(leaf)
                for path, leaf in _leaves(name, tree)
                if isinstance(leaf, torch.Tensor) and not leaf.is_meta
            }
            for name, tree in given.items()
        }

    def _refuse(
        self,
        how: str,
        described: list[dict[str, str]],
        contents: dict[str, dict[str, int]],
    ) -> None:
        hows = everywhere(how, self._group)
        for rank, other in enumerate(hows):
            if other != hows[0]:
                raise InputError(
                    f"rank {rank} calls driver.{other}, rank 0 calls driver.{hows[0]}",
                    hint="every rank makes the same calls in the same order",
                )
        told = everywhere((described, [*contents.values()]), self._group)
        for place in range(len(described)):
            _compare(
                [part[place] for part, _ in told],
                "is {0} on rank {1}, and {2} on rank {3}",
            )
            _compare(
                [part[place] if part else {} for _, part in told],
                "has other values on rank {1} than on rank {3}",
            )


def _compare(rows: list[dict[str, Any]], words: str) -> None:
    """Raises InputError when two ranks that have something have different things."""
    there = [rank for rank, row in enumerate(rows) if row]
    for rank in there:
        first = rows[there[0]]
        for path in dict.fromkeys([*first, *rows[rank]]):
            one, other = first.get(path, "absent"), rows[rank].get(path, "absent")
            if one == other:
                continue
            raise InputError(
                f"the ranks were called with different data: {path} "
                f"{words.format(other, rank, one, there[0])}",
                where=f"rank {rank}, {path}",
                hint="give every rank the same batch, or only one of them: Driver(data_on='first')",
            )


def _differ(column: Sequence[int]) -> bool:
    return len({number for number in column if number}) > 1


def _leaves(name: str, tree: Any) -> Iterator[tuple[str, Any]]:
    if name in ("args", "kwargs") and not tree:
        return
    for path, leaf in tree_flatten_with_path(tree)[0]:
        if leaf is not None:
            yield f"{name}{keystr(path)}", leaf


def _described(name: str, tree: Any) -> Iterator[tuple[str, str]]:
    for path, leaf in _leaves(name, tree):
        if isinstance(leaf, torch.Tensor):
            yield path, f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
        elif isinstance(leaf, bool | int | float | str):
            yield path, repr(leaf)
        else:
            yield path, f"a {type(leaf).__name__}"


def _digest(text: str) -> int:
    """A number for a text, never 0."""
    made = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(made, signed=True) or 1


_PART = 2**20
"""Numbers that are summed at a time."""


def checksum(tensor: torch.Tensor) -> int:
    """A number that depends on every bit of a tensor and on where it stands."""
    if isinstance(tensor, DTensor) or tensor.layout is not torch.strided:
        return 0
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    if plain.is_quantized or not plain.numel():
        return 0
    bits = plain.view(torch.uint8)
    if len(bits) % 8 or bits.data_ptr() % 8 or bits.storage_offset() % 8:
        bits = torch.cat([bits, bits.new_zeros(-len(bits) % 8)])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for part in bits.view(torch.int64).split(_PART):
        weights = torch.arange(1, 2 * len(part), 2, device=part.device)
        total = total * 31 + (part * weights).sum()
    return _digest(f"{int(total)} {tensor.dtype} {list(tensor.shape)}")
