"""Ways to make a plan smaller. Not all of what comes out is a model that runs: whoever asks tries it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fuzz.plans import Block, Given, Input, Member, ModelPlan, Node, Step, Tree, leaves, steps_of


def smaller(plan: ModelPlan) -> Iterator[ModelPlan]:
    """Plans with something left out, big pieces first."""
    yield from _fewer_cuts(plan)
    yield from _plainer_outputs(plan)
    for index, block in enumerate(plan.blocks):
        root_uses = frozenset(leaves(plan.output)) if index == 0 else frozenset()
        for changed in _smaller_block(block, root_uses):
            yield _reachable(replace(plan, blocks=(*plan.blocks[:index], changed, *plan.blocks[index + 1 :])))
    yield from _fewer_members(plan)
    yield from _inlined(plan)
    yield from _fewer_inputs(plan)
    yield from _plainer_settings(plan)
    yield from _merged_outputs(plan)


# --- the root -----------------------------------------------------------------------------------------


def _fewer_cuts(plan: ModelPlan) -> Iterator[ModelPlan]:
    for i in range(len(plan.cuts)):
        yield replace(plan, cuts=plan.cuts[:i] + plan.cuts[i + 1 :])
    for i in range(len(plan.spec)):
        yield replace(plan, spec=plan.spec[:i] + plan.spec[i + 1 :])


def _plainer_settings(plan: ModelPlan) -> Iterator[ModelPlan]:
    for i in range(len(plan.after)):
        yield replace(plan, after=plan.after[:i] + plan.after[i + 1 :])
    if plan.sent or plan.again:
        yield replace(plan, sent=False, again=False)
    for i in range(len(plan.whole)):
        yield replace(plan, whole=plan.whole[:i] + plan.whole[i + 1 :])
    if plan.dynamic:
        yield replace(plan, dynamic=False)
    if plan.graph:
        yield replace(plan, graph=False)
    if plan.training:
        yield replace(plan, training=False)
    for i, given in enumerate(plan.given):
        if ".requires_grad_()" in given.code:
            plain = replace(given, code=given.code.replace(".requires_grad_()", ""))
            yield replace(plan, given=(*plan.given[:i], plain, *plan.given[i + 1 :]))


def _plainer_outputs(plan: ModelPlan) -> Iterator[ModelPlan]:
    for tree in _plainer(plan.output):
        yield _reachable(replace(plan, output=tree))


def _plainer(tree: Tree) -> Iterator[Tree]:
    """One of the items alone, all items but one, an item made plainer, a tuple instead of something else."""
    if not isinstance(tree, Node):
        return
    yield from tree.items
    for i, item in enumerate(tree.items):
        if len(tree.items) > 1:
            yield replace(tree, items=tree.items[:i] + tree.items[i + 1 :], keys=tree.keys[:i] + tree.keys[i + 1 :])
        for plainer in _plainer(item):
            yield replace(tree, items=(*tree.items[:i], plainer, *tree.items[i + 1 :]))


def _merged_outputs(plan: ModelPlan) -> Iterator[ModelPlan]:
    """Nested outputs become a flat tuple."""
    if isinstance(plan.output, Node) and any(isinstance(item, Node) for item in plan.output.items):
        yield replace(plan, output=Node("tuple", tuple(leaves(plan.output))))


def _fewer_inputs(plan: ModelPlan) -> Iterator[ModelPlan]:
    read = {a for s in steps_of(plan.blocks[0].steps) for a in s.args} | set(leaves(plan.output))
    for given in plan.given:
        if given.name not in read and len(plan.given) > 1:
            yield _without_input(plan, given)
    flat = tuple(Input(g.name, g.name) for g in plan.given)
    if flat != plan.inputs:
        yield replace(plan, inputs=flat)
    for i, item in enumerate(plan.inputs):
        if item.keyword:
            yield replace(plan, inputs=(*plan.inputs[:i], replace(item, keyword=False), *plan.inputs[i + 1 :]))


def _without_input(plan: ModelPlan, given: Given) -> ModelPlan:
    items = []
    for item in plan.inputs:
        tree = _pruned(item.tree, given.name)
        if tree is not None:
            items.append(replace(item, tree=tree))
    code = {g.name: given.code if g.code == given.name else g.code for g in plan.given}
    rest = tuple(replace(g, code=code[g.name]) for g in plan.given if g is not given)
    return replace(plan, given=rest, inputs=tuple(items))


def _pruned(tree: Tree, name: str) -> Tree | None:
    if not isinstance(tree, Node):
        return None if tree == name else tree
    kept = [(i, pruned) for i, item in enumerate(tree.items) if (pruned := _pruned(item, name)) is not None]
    keys = tuple(tree.keys[i] for i, _ in kept) if tree.keys else ()
    return replace(tree, items=tuple(item for _, item in kept), keys=keys) if kept else None


# --- blocks -------------------------------------------------------------------------------------------


def _smaller_block(block: Block, root_uses: frozenset[str]) -> Iterator[Block]:
    steps = block.steps
    for place in _places(steps):
        step = _at(steps, place)
        kept = set(block.outputs) | root_uses
        alone = _removed(steps, place, set(step.outs))
        if not kept & _lost(steps, alone):
            yield replace(block, steps=alone)
        if step.body:
            yield replace(block, steps=_replaced(steps, place, step.body))
        for other in [a for a in step.args if not a.startswith("self.")] if len(step.outs) == 1 else []:
            swap = {step.outs[0]: other}
            changed = _renamed(_replaced(steps, place, ()), swap)
            if step.outs[0] not in root_uses:
                yield replace(block, steps=changed, outputs=tuple(swap.get(o, o) for o in block.outputs))
    if len(block.outputs) > 1:
        yield from (replace(block, outputs=(output,)) for output in block.outputs)
    for i in range(len(block.ties)):
        yield replace(block, ties=block.ties[:i] + block.ties[i + 1 :])
    for i, member in enumerate(block.members):
        if member.share:
            yield replace(block, members=(*block.members[:i], replace(member, share=""), *block.members[i + 1 :]))


Place = tuple[int, ...]


def _places(steps: tuple[Step, ...], above: Place = ()) -> Iterator[Place]:
    """Where steps are, last first: what nothing depends on goes at one stroke."""
    for i in reversed(range(len(steps))):
        yield (*above, i)
        yield from _places(steps[i].body, (*above, i))


def _at(steps: tuple[Step, ...], place: Place) -> Step:
    step = steps[place[0]]
    return _at(step.body, place[1:]) if len(place) > 1 else step


def _replaced(steps: tuple[Step, ...], place: Place, by: tuple[Step, ...]) -> tuple[Step, ...]:
    i = place[0]
    if len(place) > 1:
        body = _replaced(steps[i].body, place[1:], by)
        by = (replace(steps[i], body=body),) if body else ()
    return (*steps[:i], *by, *steps[i + 1 :])


def _removed(steps: tuple[Step, ...], place: Place, gone: set[str]) -> tuple[Step, ...]:
    """The steps without the one at `place` and without all that depend on it."""
    return _without(_replaced(steps, place, ()), gone)


def _without(steps: tuple[Step, ...], gone: set[str]) -> tuple[Step, ...]:
    kept: list[Step] = []
    for step in steps:
        if gone & set(step.args):
            gone |= set(step.outs)
            continue
        if step.body:
            body = _without(step.body, gone)
            if body:
                kept.append(replace(step, body=body))
            continue
        kept.append(step)
    return tuple(kept)


def _lost(before: tuple[Step, ...], after: tuple[Step, ...]) -> set[str]:
    return {o for s in steps_of(before) for o in s.outs} - {o for s in steps_of(after) for o in s.outs}


def _renamed(steps: tuple[Step, ...], swap: dict[str, str]) -> tuple[Step, ...]:
    return tuple(replace(s, args=tuple(swap.get(a, a) for a in s.args), body=_renamed(s.body, swap)) for s in steps)


def _inlined(plan: ModelPlan) -> Iterator[ModelPlan]:
    """A child that is called becomes one that does nothing but what is needed to fit: an identity."""
    for index, block in enumerate(plan.blocks):
        for i, member in enumerate(block.members):
            if member.kind == "module" and member.code != "nn.Identity()":
                plain = replace(member, code="nn.Identity()", share="")
                changed = replace(block, members=(*block.members[:i], plain, *block.members[i + 1 :]))
                yield _reachable(replace(plan, blocks=(*plan.blocks[:index], changed, *plan.blocks[index + 1 :])))


def _fewer_members(plan: ModelPlan) -> Iterator[ModelPlan]:
    """Without all members that no line mentions, and without one of them."""
    blocks = [replace(b, members=tuple(m for m in b.members if _mentioned(plan, b, m))) for b in plan.blocks]
    yield _reachable(replace(plan, blocks=tuple(blocks)))
    for index, block in enumerate(plan.blocks):
        for i, member in enumerate(block.members):
            if not _mentioned(plan, block, member):
                changed = replace(block, members=block.members[:i] + block.members[i + 1 :])
                yield _reachable(replace(plan, blocks=(*plan.blocks[:index], changed, *plan.blocks[index + 1 :])))


def _mentioned(plan: ModelPlan, block: Block, member: Member) -> bool:
    lines = [s.line for s in steps_of(block.steps)] + list(block.ties)
    if block is plan.blocks[0]:
        lines += [
            *leaves(plan.output),
            *(f"self.{path}" for path in [*plan.whole, *(path for path, _ in plan.spec)]),
            *(line.replace("model.", "self.") for line in plan.after),
        ]
    attr = "listed" if member.kind == "listed" else member.attr
    return any(f"self.{attr}" in line for line in lines)


def _reachable(plan: ModelPlan) -> ModelPlan:
    """The plan without classes that nothing makes."""
    used = {plan.blocks[0].name}
    for block in plan.blocks:
        used |= {b.name for m in block.members for b in plan.blocks if f"{b.name}()" in m.code and block.name in used}
    return replace(plan, blocks=tuple(b for b in plan.blocks if b.name in used))
