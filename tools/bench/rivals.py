"""Other ways to balance a chain of layers, written anew from their published descriptions, to compare with.

All take the layers in order and how many blocks to make, and return the block lengths: [2, 3] is layers 0 and
1, then 2 to 4. There are exactly `k` blocks and none is empty. They compute in integers: no result depends on
how a sum is rounded.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from math import lcm


def equal_counts(n: int, k: int) -> list[int]:
    """The same number of layers in each block, up to one; the longer blocks come first. This is how tutorials
    cut a list of layers by hand.
    """
    _check(n, k)
    return [n // k + (block < n % k) for block in range(k)]


def equal_sums(weights: Sequence[float], k: int) -> list[int]:
    """Block i ends with the layer at which the sum so far reaches i / k of the total. The weights are usually
    parameter counts.
    """
    _check(len(weights), k)
    reached = list(accumulate(_integers(weights), initial=0))
    cuts = [
        bisect_left(reached, i * reached[-1], key=lambda x: x * k) for i in range(k)
    ]
    return _fill([end - start for start, end in pairwise([*cuts, len(weights)])])


def blockpartition(costs: Sequence[float], k: int) -> list[int]:
    """The sums of two blocks differ by no more than the largest cost. This is how torchgpipe balances.

    I. Bárány and V. S. Grinberg, Block Partitions of Sequences, 2013: of any partition fix a largest block.
    The smallest block nearest to it takes one layer from its neighbour on that side, again and again, until
    the fixed block has lost one; then fix a largest block anew. This starts from equal counts. An emptied
    block is the next to take, so none stays empty.
    """
    chain, lengths = _integers(costs), equal_counts(len(costs), k)
    sums = list(_sums(chain, lengths))
    widest = max(chain)
    while (largest := max(sums)) > min(sums) + widest:
        fixed = sums.index(largest)
        giver = -1
        while giver != fixed and largest > min(sums) + widest:
            smallest = min(sums)
            taker = min(
                (b for b in range(k) if sums[b] == smallest),
                key=lambda b: abs(b - fixed),
            )
            giver = taker - 1 if fixed < taker else taker + 1
            moved = chain[
                sum(lengths[:taker]) - 1 if giver < taker else sum(lengths[:giver])
            ]
            _move(lengths, giver, taker, 1)
            _move(sums, giver, taker, moved)
    return lengths


def partition_balanced(
    weights: Sequence[float], k: int, eps: Fraction = Fraction(1, 1000)
) -> list[int]:
    """The largest sum is no more than `eps` of itself above the least possible. This is how DeepSpeed
    balanced up to 0.10.

    A bisection finds the least bottleneck, up to `eps`, with which `k` blocks suffice when each takes as many
    layers as fit. DeepSpeed leaves blocks at the end empty when fewer suffice; here those take layers, and no
    sum rises above the bottleneck.
    """
    _check(len(weights), k)
    chain = _integers(weights)
    reached = list(accumulate(chain, initial=0))
    lower, upper = max(*chain, -(-reached[-1] // k)), reached[-1]
    while upper - lower > eps * upper:
        middle = (lower + upper) // 2
        if sum(_greedy(reached, k, middle)) == len(chain):
            upper = middle
        else:
            lower = middle + 1
    return _fill(_greedy(reached, k, upper))


def _greedy(reached: Sequence[int], k: int, bottleneck: int) -> list[int]:
    """The lengths of `k` blocks, each as long as its sum stays within the bottleneck. Layers may be left
    over.
    """
    cuts = [0]
    for _ in range(k):
        cuts.append(bisect_right(reached, reached[cuts[-1]] + bottleneck) - 1)
    return [end - start for start, end in pairwise(cuts)]


def _fill(lengths: list[int]) -> list[int]:
    """No block is empty: an empty one takes a layer from the nearest block of several, and all blocks between
    them move by one.

    No sum is above both the largest sum before and the largest cost.
    """
    for empty in [block for block, length in enumerate(lengths) if not length]:
        giver = min(
            (b for b, length in enumerate(lengths) if length > 1),
            key=lambda b: abs(b - empty),
        )
        _move(lengths, giver, empty, 1)
    return lengths


def _move(amounts: list[int], giver: int, taker: int, amount: int) -> None:
    amounts[giver] -= amount
    amounts[taker] += amount


def _sums(chain: Sequence[int], lengths: Sequence[int]) -> Iterator[int]:
    start = 0
    for length in lengths:
        yield sum(chain[start : start + length])
        start += length


def _integers(costs: Sequence[float]) -> list[int]:
    """Integers in the exact ratios of the costs."""
    if any(cost < 0 for cost in costs):
        raise ValueError("a cost is negative")
    ratios = [cost.as_integer_ratio() for cost in costs]
    scale = lcm(*(below for _, below in ratios))
    return [above * (scale // below) for above, below in ratios]


def _check(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"{n} layers make no {k} blocks")
