"""The cheapest cut within a limit of bytes, beside all cuts of small networks."""

from __future__ import annotations

from itertools import chain, combinations, pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from stagecut.passes.cheapest_cut import END, START, Network

NODES = ["a", "b", "c", "d", "e", "f"]


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Nodes in a row of random length, each edge priced by bytes or by a cost, and some that no cut divides."""
    nodes = NODES[: draw(st.integers(1, 6))]
    network = Network()
    for node in nodes:
        network.price(START, node, 0, draw(st.integers(0, 9)))
        if draw(st.booleans()):
            network.price(node, END, draw(st.integers(0, 9)))
    for source, target in combinations(nodes, 2):
        kind = draw(st.sampled_from(["none", "none", "price", "follow"]))
        if kind == "price":
            network.price(source, target, draw(st.integers(0, 9)), 0)
        elif kind == "follow":
            network.follow(source, target)
    return network


def every_cut(network: Network) -> list[Any]:
    nodes = {node for edge in network.edges for node in edge} - {START, END}
    subsets = chain.from_iterable(combinations(sorted(nodes), count) for count in range(len(nodes) + 1))
    cuts = []
    for subset in subsets:
        behind = frozenset([*subset, END])
        kept = [edge for edge, price in network.edges.items() if price is None]
        if not any(source not in behind and target in behind for source, target in kept):
            cuts.append(network._cut(behind))
    return cuts


@given(networks())
def test_no_cut_with_as_few_bytes_is_cheaper(network: Network) -> None:
    cuts = every_cut(network)
    least, cheapest = network.least(), network.cheapest()
    assert (least.nbytes, least.cost) == min((cut.nbytes, cut.cost) for cut in cuts)
    assert (cheapest.cost, cheapest.nbytes) == min((cut.cost, cut.nbytes) for cut in cuts)
    chosen = [network.within(limit, least, cheapest) for limit in range(least.nbytes, cheapest.nbytes + 2)]
    for limit, cut in enumerate(chosen, least.nbytes):
        assert cut.nbytes <= limit
        assert all(other.cost >= cut.cost for other in cuts if other.nbytes <= cut.nbytes)
    assert all(more.cost >= less.cost for more, less in pairwise(chosen))
    assert chosen[-1] == cheapest


def test_equal_blocks_are_taken_one_by_one() -> None:
    network = Network()
    for block in range(4):
        network.price(START, (block, "op"), 0, 5)
        network.follow((block, "op"), (block, "value"))
        network.price((block, "value"), (block, "read"), 10)
        network.follow((block, "read"), END)
    least, cheapest = network.least(), network.cheapest()
    assert ((least.nbytes, least.cost), (cheapest.nbytes, cheapest.cost)) == ((0, 20), (40, 0))
    chosen = [network.within(limit, least, cheapest) for limit in (0, 9, 10, 25, 39, 40)]
    assert [(cut.nbytes, cut.cost) for cut in chosen] == [(0, 20), (0, 20), (10, 15), (20, 10), (30, 5), (40, 0)]


def test_a_cost_that_outweighs_is_paid_last() -> None:
    network = Network()
    for name, nbytes, cost in (("light", 10, 9), ("other", 10, 9), ("heavy", 1000, 0)):
        network.price(START, name, 0, cost)
        network.price(name, END, nbytes)
    network.price(START, "heavy", 0, network.cost_that_outweighs())
    within = network.within(1000, network.least(), network.cheapest())
    assert within.behind - {END} == {"light", "other"}
