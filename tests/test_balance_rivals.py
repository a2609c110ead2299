"""Every way to balance makes a partition, and each does what its description says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate, combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecut.tools.bench.rivals import blockpartition, equal_counts, equal_sums, partition_balanced

Costs = Sequence[float]
RIVALS: dict[str, Callable[[Costs, int], list[int]]] = {
    "equal_counts": lambda costs, k: equal_counts(len(costs), k),
    "equal_sums": equal_sums,
    "blockpartition": blockpartition,
    "partition_balanced": partition_balanced,
}


def sums_of(costs: Costs, lengths: list[int]) -> list[Fraction]:
    """The sum of each block, exactly."""
    ends = list(accumulate(lengths, initial=0))
    return [sum(map(Fraction, costs[start:end]), Fraction()) for start, end in pairwise(ends)]


def least_bottleneck(costs: Costs, k: int) -> Fraction:
    """The least largest sum of all partitions into `k` blocks, by trying all."""
    cuts = ([0, *inner, len(costs)] for inner in combinations(range(1, len(costs)), k - 1))
    return min(max(sums_of(costs, [end - start for start, end in pairwise(c)])) for c in cuts)


@st.composite
def chains(draw: st.DrawFn, longest: int = 40) -> tuple[Costs, int]:
    """Costs, whole or not, some of them 0, and a number of blocks they suffice for."""
    cost = draw(st.sampled_from([st.integers(0, 3), st.integers(0, 10**12), st.floats(0, 1e9), st.sampled_from([0.1, 0.2, 0.7])]))
    costs: list[float] = draw(st.lists(cost, min_size=1, max_size=longest))
    return costs, draw(st.integers(1, len(costs)))


@pytest.mark.parametrize("name", RIVALS)
@given(chains())
def test_a_result_is_a_partition_into_blocks_that_are_not_empty(name: str, chain: tuple[Costs, int]) -> None:
    costs, k = chain
    lengths = RIVALS[name](costs, k)
    assert len(lengths) == k
    assert sum(lengths) == len(costs)
    assert min(lengths) >= 1


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (15, 1), (15, 15), (16, 8), (126, 7)])
def test_equal_layers_that_divide_are_divided(name: str, n: int, k: int) -> None:
    assert RIVALS[name]([0.1] * n, k) == [n // k] * k


@pytest.mark.parametrize("name", RIVALS)
def test_fifteen_equal_layers_in_eight_stages_are_never_three_in_one(name: str) -> None:
    assert sorted(RIVALS[name]([7] * 15, 8)) == [1, *[2] * 7]


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize(("costs", "k"), [([1.0], 2), ([], 1), ([1.0], 0), ([1.0, 2.0], -1)])
def test_too_few_layers_are_refused(name: str, costs: Costs, k: int) -> None:
    with pytest.raises(ValueError, match="layers make no"):
        RIVALS[name](costs, k)


@pytest.mark.parametrize("name", [name for name in RIVALS if name != "equal_counts"])
def test_a_negative_cost_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="negative"):
        RIVALS[name]([1.0, -1.0], 2)


def test_equal_counts_puts_the_longer_blocks_first() -> None:
    assert equal_counts(11, 4) == [3, 3, 3, 2]
    assert equal_counts(9, 8) == [2, 1, 1, 1, 1, 1, 1, 1]


def test_equal_sums_cuts_where_the_sum_so_far_reaches_its_share() -> None:
    assert equal_sums([1, 1, 1, 9], 2) == [3, 1]  # the fourth layer would reach 6 of 12, and a block is left for it
    assert equal_sums([9, 1, 1, 1], 2) == [1, 3]
    assert equal_sums([4, 1, 1, 1, 1, 4], 3) == [1, 4, 1]
    assert equal_sums([0.1] * 30, 3) == [10, 10, 10]  # 0.1 ten times is less than 1 when each sum is rounded


@given(chains())
def test_equal_sums_are_above_their_share_by_no_more_than_a_layer(chain: tuple[Costs, int]) -> None:
    costs, k = chain
    assert max(sums_of(costs, equal_sums(costs, k))) <= Fraction(sum(map(Fraction, costs))) / k + Fraction(max(costs))


@given(chains())
def test_blockpartition_leaves_no_more_than_the_largest_cost_between_two_blocks(chain: tuple[Costs, int]) -> None:
    costs, k = chain
    sums = sums_of(costs, blockpartition(costs, k))
    assert max(sums) - min(sums) <= Fraction(max(costs))


def test_blockpartition_moves_layers_through_the_blocks_between() -> None:
    assert blockpartition([5, 5, 5, 1, 1, 1], 3) == [1, 1, 4]  # by way of [2, 1, 3] and [2, 0, 4]
    assert blockpartition([1, 1, 1, 5, 5, 5], 3) == [4, 1, 1]


def test_blockpartition_stops_short_of_the_best() -> None:
    assert blockpartition([5, 3, 3, 1], 2) == [2, 2]  # 8 and 4 are within 5 of each other; 5 and 7 are better
    assert least_bottleneck([5, 3, 3, 1], 2) == 7


@given(chains(longest=9))
def test_partition_balanced_is_the_best_up_to_its_precision(chain: tuple[Costs, int]) -> None:
    costs, k = chain
    assert max(sums_of(costs, partition_balanced(costs, k))) <= least_bottleneck(costs, k) * Fraction(1000, 999)


def test_partition_balanced_fills_each_block_as_far_as_it_goes() -> None:
    assert partition_balanced([1, 1, 1, 1, 1], 4) == [2, 1, 1, 1]  # DeepSpeed up to 0.10.3: [2, 2, 1, 0], its pull request 4312
    assert partition_balanced([5, 3, 3, 1], 2) == [1, 3]
    assert partition_balanced([100, 1, 1, 1], 2) == [1, 3]


def test_partition_balanced_may_stop_at_its_precision() -> None:
    assert partition_balanced([1000, 1, 1, 1], 2) == [2, 2]
    assert partition_balanced([1000, 1, 1, 1], 2, eps=Fraction()) == [1, 3]
