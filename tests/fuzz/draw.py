"""Random models, as a hypothesis strategy of plans.

A step is tried on real tensors before it goes into the plan, so that a plan fits together by construction: what does not
run, or gives a shape that could be mistaken for the batch, is drawn again. Hypothesis shrinks towards zeros, so what is
plainest comes first in every list, and a draw of 0 adds nothing where something can be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from fuzz.plans import (
    EXAMPLE_BATCH,
    Block,
    DrawnModule,
    Given,
    Input,
    Maker,
    Member,
    ModelPlan,
    Node,
    Step,
    Tree,
    do,
    read,
    steps_of,
)
from hypothesis import reject
from hypothesis import strategies as st
from torch import nn

T = TypeVar("T")
F64 = "dtype=torch.float64"

# Kinds of operands, by letter: m (batch, 4) floating; f floating; t any tensor; i int64; b bool; c complex; n a number that
# stands for a size; w floating and writable; W writable, of any dtype; M both m and w; s a buffer of floats; k a counter.
_OPS = """
8 mm | {0} + {1}
4 mm | {0} - {1} * 0.5
5 mm | {0}.tanh() * {1}
3 mm | torch.addcmul({0}, {1}, {1}, value=0.25)
3 mm | torch.where({0} > {1}, {0}, {1} * 2)
2 mm | torch.maximum({0}, {1})
2 mm | torch.cat([{0}, {1}], -1)[:, 2:6]
2 mm | torch.stack([{0}, {1}]).sum(0)
2 mm | torch.einsum("ij,ij->i", {0}, {1})
2 mm | {0} / ({1}.abs() + 1)
2 mm | F.mse_loss({0}, {1})
2 mm | torch.lerp({0}, {1}, 0.25)
6 ff | {0} + {1}
4 ff | {0} * {1}
3 ff | {0} @ {1}
2 ff | F.linear({0}, {1})
1 ff | torch.outer({0}.flatten()[:4], {1}.flatten()[:4])
4 f | {0}.relu()
3 f | {0}.tanh()
3 f | torch.sigmoid({0})
2 f | F.gelu({0})
2 f | {0} * 0.5 + 1
1 f | 1 - {0}
1 f | {0}.clamp(-1, 1)
2 f | F.softmax({0}, -1)
1 f | F.log_softmax({0}, -1)
2 m | F.layer_norm({0}, (4,))
1 f | {0}.cumsum(-1)
1 f | {0}.sin() ** 2
1 f | {0}.square().mean()
2 f | {0}.sum(-1, keepdim=True)
2 f | {0}.mean(0)
1 f | {0}.amax(-1)
1 f | {0}.std(-1)
1 f | {0}.norm()
1 f | {0}.flip(-1)
1 f | {0}.roll(1, -1)
2 f | {0}.sort(-1)
2 f | {0}.max(-1)
1 f | torch.topk({0}, 2)
1 f | torch.aminmax({0})
2 f | {0}.clone()
2 f | {0}.contiguous()
3 f | {0}.detach()
1 f | torch.zeros_like({0})
1 f | {0}.new_ones(4)
1 f | torch.full_like({0}, 0.5)
1 m | torch.ones({0}.shape[0], 4, dtype=torch.float64)
1 m | {0}.tril()
2 m | {0}.index_select(0, torch.tensor([0, 2, 1]))
1 m | {0}.gather(1, torch.tensor([[0, 1], [2, 3]]))
1 m | {0}[torch.tensor([1, 0])]
1 m | F.pad({0}, (0, 2))[:, 2:]
1 m | F.cross_entropy({0}, {0}.argmax(-1))
1 m | F.one_hot({0}.argmax(-1), 4)
1 m | F.scaled_dot_product_attention({0}[None], {0}[None], {0}[None]).squeeze(0)
# views
4 f | {0}.t()
3 f | {0}.transpose(0, -1)
3 f | {0}[:, :2]
2 f | {0}[:, 1::2]
2 f | {0}[..., 0]
2 f | {0}[0]
2 f | {0}[:2]
1 f | {0}[-1:]
2 f | {0}.unsqueeze(-1)
1 f | {0}.squeeze()
2 f | {0}.flatten()
2 m | {0}.reshape({0}.shape[0], 2, 2)
2 m | {0}.view({0}.shape[0], 2, 2)
2 f | {0}.reshape(-1, 4)
1 f | {0}.view(2, -1)
2 m | {0}[:1].expand(3, -1)
2 f | {0}[..., :1].expand_as({0})
3 f | {0}.chunk(2, -1)
2 f | {0}.split(2, -1)
2 f | {0}.split([1, 3], -1)
2 f | {0}.unbind(-1)
1 f | {0}.narrow(-1, 1, 2)
1 f | {0}.select(-1, 1)
1 f | {0}.diagonal()
1 m | {0}.as_strided((2, 2), (2, 1), 0)
1 f | {0}.permute(*reversed(range({0}.dim())))
1 f | torch.movedim({0}, 0, -1)
1 t | {0}.view_as({0})
# dtypes
1 f | {0}.to(torch.float32)
1 f | {0}.float()
3 f | {0}.double()
1 f | {0}.to(torch.bfloat16)
1 f | ({0} * 4).long()
2 f | {0}.argmax(-1)
2 ff | {0} > {1}
2 f | {0} > 0
1 bb | {0} & ~{1}
1 b | {0}.logical_not()
1 b | {0}.any(-1)
2 b | {0}.double()
1 b | {0}.sum(-1)
2 bff | torch.where({0}, {1}, {2})
2 bf | {1}.masked_fill({0}, 0.5)
1 t | {0}.to(torch.int64)
2 i | {0} + 1
2 i | {0}.double() / 4
1 ii | {0} * {1}
1 i | {0} % 3 == 1
1 fi | {0} + {1}
1 i | F.one_hot({0}.abs() % 4, 4)
2 ff | torch.complex({0}.double(), {1}.double())
2 cc | {0} * {1}
2 c | {0}.real
1 c | {0}.imag
1 c | {0}.abs()
1 c | {0}.conj() * 2
1 c | torch.view_as_real({0})
1 cf | {0} + {1}
# sizes
2 m | {0}.shape[0]
1 n | {0} + 1
1 n | {0} * 2
2 fn | {0} * {1}
1 fn | {0} / {1}
1 n | torch.arange({0}, dtype=torch.float64)
1 n | torch.zeros({0}, 4, dtype=torch.float64)
1 mn | {0}.reshape({1}, 2, 2)
# constants
2 m | {0} + torch.arange(4, dtype=torch.float64)
2 m | {0} * torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
1 | torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)
1 | torch.eye(4, dtype=torch.float64)
1 | torch.tensor(0.5)
# random
3 f | F.dropout({0}, 0.5, self.training)
1 f | F.dropout({0}, 0.25)
2 f | torch.rand_like({0})
1 f | torch.randn_like({0}) * 0.1 + {0}
2 f | torch.bernoulli({0}.detach().sigmoid())
1 | torch.rand(4, dtype=torch.float64)
1 m | torch.randint(0, 4, ({0}.shape[0],))
1 m | {0} + torch.empty_like({0}).normal_()
1 w | {0}.bernoulli_(0.5)
1 f | F.alpha_dropout({0}, 0.5, self.training)
# what Python chooses by the mode
1 f | {0} * (0.5 if self.training else 0.25)
1 f | ({0} if self.training else {0} * 0.5)
1 ff | ({0} + {1} if self.training else {0} - {1})
1 f | ({0} * torch.rand_like({0}) if self.training else {0}.tanh())
1 w ! {0}.mul_(0.5 if self.training else 0.25)
# in place, for their value
3 ff | ({0} * 0.5).add_({1})
2 ff | {0}.clone().mul_({1}).relu_()
2 wf | {0}.add_({1})
1 w | {0}.tanh_()
1 w | {0}.mul_(0.5)
1 w | F.relu({0}, inplace=True)
# in place, as statements
4 wf ! {0}.add_({1})
2 wf ! {0}.mul_({1})
2 wf ! {0}.sub_({1}, alpha=0.5)
2 wf ! {0}.copy_({1})
2 w ! {0}.mul_(0.5)
1 w ! {0}.relu_()
1 w ! {0}.zero_()
1 w ! {0}.fill_(0.25)
1 w ! {0}.clamp_(max=0.5)
1 w ! {0}.sigmoid_()
2 wb ! {0}.masked_fill_({1}, 0.5)
3 wf ! {0}[:, 0] = {1}[:, 1]
2 wf ! {0}[:, :2] = {1}[:, 2:] * 2
2 wf ! {0}[0] = {1}[1]
2 w ! {0}[..., 0] = 1.0
1 wf ! {0}[:, 1] += {1}[:, 0]
1 w ! {0}[:, 0] *= 2
1 wb ! {0}[{1}] = 0.0
1 wf ! {0}[torch.tensor([0, 1])] = {1}[:2]
1 wf ! {0}.index_add_(0, torch.tensor([1, 0]), {1}[:2])
1 wf ! {0}.t().add_({1}.t())
1 wf ! {0}.view(-1).sub_({1}.reshape(-1))
1 wf ! {0}.select(0, 0).copy_({1}.select(0, 0))
1 Mmm ! torch.add({1}, {2}, out={0})
1 wf ! {0}.addcmul_({1}, {1}, value=0.5)
1 W ! {0}.add_(1)
1 W ! {0}.zero_()
1 W ! {0}[0] = 1
# buffers
6 k ! {0}.add_(1)
4 sm ! {0}.mul_(0.9).add_({1}.detach().mean(0), alpha=0.1)
3 sm ! {0}.copy_({1}.detach().mean(0))
2 sm ! {0}.lerp_({1}.detach().amax(0), 0.5)
2 sm ! {0}[0] = {1}.detach().sum()
1 sm ! {0} = ({0} * 0.5 + {1}.detach().mean(0)).to({0}.dtype)
4 ms | {0} + {1}
3 ms | {0} * {1}.sigmoid()
2 fk | {0} * ({1} + 1)
1 s | {0}.clone()
1 s | {0}[:2]
"""


@dataclass(frozen=True)
class _Op:
    weight: int
    kinds: str
    code: str
    gives: bool


def _read(table: str) -> list[_Op]:
    ops = []
    for line in filter(None, table.splitlines()):
        if line.startswith("#"):
            continue
        mark = "|" if " | " in line and (" ! " not in line or line.index(" | ") < line.index(" ! ")) else "!"
        head, code = line.split(f" {mark} ", 1)
        weight, _, kinds = head.partition(" ")
        ops.append(_Op(int(weight), kinds, code, mark == "|"))
    return ops


OPS = [op for op in _read(_OPS) for _ in range(op.weight)]
"""Each as often as its weight says."""
PLANTED = _Op(1, "m", "({0} * 2 if torch._guards.detect_fake_mode() else {0} * 3)", True)
"""An op that means something else when traced, for tests of the fuzzer: no splitter can get it right."""

LAYERS: tuple[tuple[str, str], ...] = (
    ("nn.Identity()", "m"),
    ("nn.Linear(4, 4, dtype=torch.float64)", "m"),
    ("nn.Linear(4, 4, bias=False, dtype=torch.float64)", "m"),
    ("nn.LayerNorm(4, dtype=torch.float64)", "m"),
    ("nn.RMSNorm(4, dtype=torch.float64)", "m"),
    ("nn.BatchNorm1d(4, dtype=torch.float64)", "m"),
    ("nn.BatchNorm1d(4, dtype=torch.float64)", "m"),
    ("nn.BatchNorm1d(4, affine=False, dtype=torch.float64)", "m"),
    ("nn.BatchNorm1d(4, track_running_stats=False, dtype=torch.float64)", "m"),
    ("nn.InstanceNorm1d(2, affine=True, track_running_stats=True, dtype=torch.float64)", "v"),
    ("nn.GroupNorm(2, 4, dtype=torch.float64)", "m"),
    ("nn.Conv1d(2, 2, 1, dtype=torch.float64)", "v"),
    ("nn.Dropout(0.5)", "m"),
    ("nn.Dropout(0.5)", "f"),
    ("nn.ReLU(inplace=True)", "w"),
    ("nn.PReLU(dtype=torch.float64)", "m"),
    ("nn.GELU()", "f"),
    ("nn.Embedding(4, 4, dtype=torch.float64)", "e"),
    ("nn.Bilinear(4, 4, 4, dtype=torch.float64)", "mm"),
    ("nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), nn.Tanh(), nn.Linear(4, 4, dtype=torch.float64))", "m"),
    ("nn.Sequential(nn.BatchNorm1d(4, dtype=torch.float64), nn.ReLU(inplace=True), nn.Dropout(0.25))", "m"),
)
_CONTEXTS = (
    "torch.no_grad()", "torch.no_grad()", "torch.no_grad()", "torch.enable_grad()", "torch.set_grad_enabled(False)",
    'torch.autocast("cpu", dtype=torch.bfloat16)', 'torch.autocast("cpu", dtype=torch.bfloat16)', 'torch.autocast("cpu", enabled=False)',
)  # fmt: skip
_SIZES = frozenset({1, 2, 3, 4, EXAMPLE_BATCH, EXAMPLE_BATCH - 1})
_LEAVES: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    ("m", f"torch.randn(batch, 4, {F64})", (0,)), ("m", f"torch.randn(batch, 4, {F64})", (0,)),
    ("m", f"torch.randn(batch, 4, {F64}).requires_grad_()", (0,)), ("m", f"torch.randn(batch, 4, {F64}).requires_grad_()", (0,)),
    ("f", f"torch.randn(4, 4, {F64})", ()), ("f", f"torch.randn(4, batch, {F64}).t()", (0,)), ("f", "torch.randn(batch, 4)", (0,)),
    ("i", "torch.randint(0, 4, (batch,))", (0,)), ("b", "torch.rand(batch, 4) > 0.5", (0,)),
    ("c", "torch.randn(batch, 4, dtype=torch.complex128)", (0,)), ("f", "torch.randn(batch, 4, dtype=torch.bfloat16)", (0,)),
    ("-", "None", ()), ("-", "3", ()), ("-", "True", ()), ("-", "0.5", ()), ("-", '"mean"', ()),
)  # fmt: skip
_OPS_OF_LITERALS = {"3": "{0} * {1}", "True": "{0} if {1} else {0} * 2", "0.5": "{0} + {1}", "None": "{0} if {1} is None else {0} * 2"}


def fits(kind: str, name: str, item: Any) -> bool:
    """Whether a value may stand where an op wants an operand of that kind."""
    if kind == "n":
        return type(item) is int
    if not isinstance(item, torch.Tensor):
        return False
    if kind == "t":
        return True
    if kind in "wWsM" and name == "self.k0":
        return False  # a constant
    if kind == "M":
        return fits("m", name, item) and fits("w", name, item)
    if kind in "wW":
        writable = not (item.is_leaf and item.requires_grad) or not torch.is_grad_enabled()
        return writable and (kind == "W" or item.is_floating_point()) and not item.is_complex()
    if kind == "m":
        return item.is_floating_point() and item.shape == (EXAMPLE_BATCH, 4)
    if kind == "v":
        return item.dtype is torch.float64 and item.shape == (EXAMPLE_BATCH, 2, 2)
    if kind in "sk":
        state = name.startswith("self.") and not isinstance(item, nn.Parameter)
        return state and (item.dtype is torch.int64 if kind == "k" else item.is_floating_point() and item.shape == (4,))
    if kind == "e":
        return item.dtype is torch.int64 and item.numel() > 0 and bool(((item >= 0) & (item < 4)).all())
    return {"f": item.is_floating_point(), "i": item.dtype is torch.int64, "b": item.dtype is torch.bool, "c": item.is_complex()}[kind]


@dataclass
class _Scope:
    """A forward being drawn: the module as far as it is known, the values so far, and what can be called."""

    module: nn.Module
    env: dict[str, Any]
    calls: list[tuple[str, str]]
    state: list[str]
    count: int = 0
    called: set[str] = field(default_factory=set)

    def fresh(self) -> str:
        self.count += 1
        return f"v{self.count}"


class Dice:
    """Draws by hypothesis, of which 0, False and the first are the plainest."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw

    def below(self, count: int) -> int:
        """A number from 0."""
        return self._draw(_below(count))

    def chance(self, percent: float) -> bool:
        """True that often."""
        return self.below(100) >= 100 - percent

    def pick(self, items: Sequence[T]) -> T:
        """One of them."""
        return items[self.below(len(items))]

    def part(self, make: Callable[[], T]) -> T:
        """What `make` draws, as a part that can be left out by itself."""
        return self._draw(st.none().map(lambda _: make()))


@lru_cache(maxsize=1000)
def _below(count: int) -> st.SearchStrategy[int]:
    return st.integers(0, count - 1)


class _Draw:
    def __init__(self, dice: Dice, plant: bool) -> None:
        self.dice = dice
        self.blocks: list[Block] = []
        self.shares: list[tuple[str, str]] = []
        self.modules: list[tuple[Member, list[tuple[str, str]]]] = []
        self._ops = [*OPS, *[PLANTED] * 10_000] if plant else OPS
        self._count = self._keys = 0

    # --- forwards ---------------------------------------------------------------------------------

    def steps(self, scope: _Scope, count: int, depth: int = 0) -> tuple[Step, ...]:
        found: list[Step] = []
        for _ in range(count):
            found += self.dice.part(lambda: self._step(scope, depth))
        return tuple(found)

    def _step(self, scope: _Scope, depth: int) -> list[Step]:
        kind = self.dice.below(100)
        if kind == 0:
            return []
        if kind < 9:
            return [Step("pipe_split()")]
        if kind < 16 and depth < 2:
            return self._region(scope, depth)
        if kind < 41 and scope.calls:
            attr, kinds = self.dice.pick(scope.calls)
            call = f"{attr}({', '.join(f'{{{i}}}' for i in range(len(kinds)))})"
            return self._try(scope, _Op(1, kinds, call, True))
        for _ in range(8):
            made = self._try(scope, self.dice.pick(self._ops))
            if made:
                return made
        return []

    def _region(self, scope: _Scope, depth: int) -> list[Step]:
        code = self.dice.pick(_CONTEXTS)
        with eval(code, {"torch": torch}):
            body = self.steps(scope, 1 + self.dice.below(3), depth + 1)
        return [Step(code, body=body)] if body else []

    def _try(self, scope: _Scope, op: _Op) -> list[Step]:
        """A step of `op` on drawn operands, if there are such operands and it runs on them."""
        args: list[str] = []
        for kind in op.kinds:
            name = self._pick(scope, kind)
            if name is None:
                return []
            args.append(name)
        step = Step(op.code, tuple(args), ("_",) if op.gives else ())
        env = dict(scope.env)
        try:
            do(step, scope.module, env)
        except Exception:
            return []
        if not op.gives:
            return [step]
        result = env["_"]
        items = list(result) if isinstance(result, (tuple, list)) else [result]
        if not items or len(items) > 4 or not all(map(_usual, items)):
            return []
        outs = tuple(scope.fresh() for _ in items)
        scope.env.update(zip(outs, items, strict=True))
        if isinstance(result, (tuple, list)) and len(items) == 1:
            return [Step(f"{op.code}[0]", step.args, outs)]
        return [replace(step, outs=outs)]

    def _pick(self, scope: _Scope, kind: str) -> str | None:
        """A value of that kind, more often than not a recent one."""
        state = [n for n in scope.state if fits(kind, n, read(scope.module, n))]
        names = [] if kind in "sk" else [n for n, item in scope.env.items() if fits(kind, n, item)]
        if state and (not names or self.dice.chance(20)):
            names = state
        if not names:
            return None
        back = self.dice.pick(_BACK)
        return self.dice.pick(names) if back is None else names[-1 - min(back, len(names) - 1)]

    # --- modules ----------------------------------------------------------------------------------

    def block(self, depth: int) -> tuple[Block, list[str]]:
        """A class for a child module, and the kinds of its operands."""
        self._count += 1
        name = f"M{self._count}"
        members, ties, calls, state = self.members(depth)
        kinds = ["m", *(["f"] * self.dice.chance(30))]
        inputs = tuple(f"x{i}" for i in range(len(kinds)))
        blank = Block(name, inputs, members, ties)
        module = Maker((blank, *self.blocks)).module(blank)
        env: dict[str, Any] = {x: torch.randn(EXAMPLE_BATCH, 4, dtype=torch.float64) * 1.0 for x in inputs}
        scope = _Scope(module, env, calls, state)
        steps = self.steps(scope, 1 + self.dice.below(4))
        mains = [n for n, v in scope.env.items() if fits("m", n, v)]
        outputs = [mains[-1], *(self.dice.pick(list(scope.env)) for _ in range(self.dice.chance(20)))]
        block = replace(blank, steps=steps, outputs=tuple(outputs))
        self.blocks.insert(0, block)
        return block, kinds

    def members(self, depth: int) -> tuple[tuple[Member, ...], tuple[str, ...], list[tuple[str, str]], list[str]]:
        """Members, ties among them, what can be called, and the names of state."""
        dice = self.dice
        calls: list[tuple[str, str]] = []
        found = [self._param(i) for i in range(dice.pick((0, 0, 1, 1, 2, 3)))]
        picked = [dice.pick(_BUFFERS) for _ in range(dice.pick((0, 0, 0, 1, 1, 2)))]
        found += {attr: Member(attr, kind, code) for kind, attr, code in picked}.values()
        if dice.chance(10):
            found.append(Member("k0", "plain", f"torch.tensor([1.0, 2.0, 0.5, -1.0], {F64})"))
        for i in range(dice.pick((0, 1, 1, 2, 2, 3))):
            member, called = dice.part(lambda i=i: self._child(f"c{i}", depth))
            found.append(member)
            calls += called
        return tuple(found), self._ties(found), calls, _state_names(found)

    def _param(self, i: int) -> Member:
        dice = self.dice
        grad = ", requires_grad=False" if dice.chance(15) else ""
        shape = dice.pick(("4, 4", "4, 4", "4", "1, 4"))
        kind = "listed" if dice.chance(20) else "param"
        dtype = "dtype=torch.float32" if dice.chance(7) else F64
        code, share = f"nn.Parameter(torch.randn({shape}, {dtype}) / 2{grad})", ""
        if dice.chance(25):
            if self.shares and dice.chance(70):
                share, code = dice.pick(self.shares)
            else:
                share = f"p{len(self.shares)}"
                self.shares.append((share, code))
        return Member(f"p{i}", kind, code, share)

    def _child(self, attr: str, depth: int) -> tuple[Member, list[tuple[str, str]]]:
        dice = self.dice
        if self.modules and dice.chance(25):
            member, calls = dice.pick(self.modules)
            member = replace(member, attr=attr)
            return member, [(f"self.{attr}{path}", kinds) for path, kinds in calls]
        self._keys += 1
        share = f"m{self._keys}" if dice.chance(40) else ""
        if depth > 0 and dice.chance(45):
            block, kinds = self.block(depth - 1)
            member, local = Member(attr, "module", f"{block.name}()", share), [("", "".join(kinds))]
        elif dice.chance(15):
            picked = [dice.pick(LAYERS) for _ in range(1 + dice.below(3))]
            member = Member(attr, "module", f"nn.ModuleList([{', '.join(code for code, _ in picked)}])", share)
            local = [(f"[{i}]", kinds) for i, (_, kinds) in enumerate(picked)]
        else:
            code, one = dice.pick(LAYERS)
            member, local = Member(attr, "module", code, share), [("", one)]
        self.modules.append((member, local))
        return member, [(f"self.{attr}{path}", kinds) for path, kinds in local]

    def _ties(self, members: list[Member]) -> tuple[str, ...]:
        """Linear layers and embeddings with one weight."""
        weights = [m.attr for m in members if m.code.startswith(("nn.Linear(", "nn.Embedding("))]
        if len(weights) < 2 or not self.dice.chance(30):
            return ()
        return (f"self.{weights[1]}.weight = self.{weights[0]}.weight",)


_BACK = (*[0] * 36, *[1] * 18, *[2] * 9, *[3] * 4, *[4] * 3, *[None] * 30)
"""How far back an operand lies; None is anywhere."""
_BUFFERS = [
    ("buffer", "count", "torch.tensor(0)"), ("buffer", "count", "torch.tensor(0)"), ("buffer", "mean", f"torch.zeros(4, {F64})"),
    ("buffer", "mean", f"torch.zeros(4, {F64})"), ("transient", "scale", f"torch.ones(4, {F64})"),
    ("buffer", "mask", "torch.tensor([True, False, True, True])"), ("buffer", "cache", f"torch.zeros(2, 4, {F64})"),
    ("transient", "low", "torch.ones(4, dtype=torch.bfloat16)"), ("buffer", "step", "torch.zeros(1, dtype=torch.float32)"),
]  # fmt: skip


def _state_names(members: list[Member]) -> list[str]:
    listed = [m for m in members if m.kind == "listed"]
    names = {m.attr: f"self.listed[{i}]" for i, m in enumerate(listed)}
    return list(dict.fromkeys(names.get(m.attr, f"self.{m.attr}") for m in members if m.kind != "module"))


def _usual(item: Any) -> bool:
    """A tensor of a shape that cannot be mistaken for the batch, or a size."""
    if isinstance(item, torch.Tensor):
        return item.dim() <= 3 and all(n in _SIZES for n in item.shape)
    return type(item) is int


@st.composite
def plans(draw: st.DrawFn, plant: bool = False, graphs: float = 0.0) -> ModelPlan:
    """Plans that fit together, though nobody has gone through them backward.

    A share of them, `graphs`, is traced symbolically: there `pipe_split()` leaves no node, so something else must cut.
    """
    dice = Dice(draw)
    try:
        plan = _plan(dice, plant)
    except RuntimeError:
        reject()  # a view of what was written is of no use to torch any more
    return _as_graph(dice, plan) if dice.chance(100 * graphs) else plan


def _plan(dice: Dice, plant: bool) -> ModelPlan:
    torch.default_generator.manual_seed(0)
    drawing = _Draw(dice, plant)
    given, items = _draw_inputs(dice)
    members, ties, calls, state = drawing.members(2)
    blank = Block("Net", (), members, ties)
    module: DrawnModule = Maker((blank, *drawing.blocks)).module(blank).train()
    env: dict[str, Any] = {"torch": torch, "batch": EXAMPLE_BATCH}
    for leaf in given:
        env[leaf.name] = eval(leaf.code, env)
    values = {leaf.name: env[leaf.name] for leaf in given}
    scope = _Scope(module, {n: v for n, v in values.items() if isinstance(v, torch.Tensor)}, calls, state)
    steps = _uses_of_literals(dice, given, scope) + drawing.steps(scope, 4 + dice.below(9))
    output = _draw_output(dice, scope, values)
    plan = ModelPlan((replace(blank, steps=steps), *drawing.blocks), given, items, output)
    return _with_settings(dice, plan)


def _draw_inputs(dice: Dice) -> tuple[tuple[Given, ...], tuple[Input, ...]]:
    given = [Given("x0", f"torch.randn(batch, 4, {F64})" + ".requires_grad_()" * dice.chance(40), (0,))]
    for i in range(1, dice.pick((1, 2, 2, 3, 4))):
        _, code, dims = dice.pick(_LEAVES)
        if dice.chance(6):
            code, dims = dice.pick([("x0", (0,)), (given[-1].code, given[-1].dims)])
        given.append(Given(f"x{i}", code, dims))
    items: list[Input] = []
    rest = list(given)
    while rest:
        taken = [rest.pop(0) for _ in range(min(len(rest), dice.pick((1, 1, 1, 2, 3))))]
        nested = len(taken) > 1 or dice.chance(10)
        tree = _nest(dice, [g.name for g in taken]) if nested else taken[0].name
        name = f"n{len(items)}" if nested else taken[0].name
        items.append(Input(name, tree, keyword=dice.chance(25)))
    return tuple(given), tuple(sorted(items, key=lambda i: i.keyword))


def _nest(dice: Dice, names: list[str]) -> Tree:
    cut = 1 + dice.below(len(names))
    items: list[Tree] = [*names[:cut]]
    if names[cut:]:
        items.append(_nest(dice, names[cut:]))
    kind = dice.pick(("tuple", "list", "dict"))
    return Node(kind, tuple(items), tuple("pqrs"[: len(items)]) if kind == "dict" else ())


def _uses_of_literals(dice: Dice, given: tuple[Given, ...], scope: _Scope) -> tuple[Step, ...]:
    steps = []
    for leaf in given:
        code = _OPS_OF_LITERALS.get(leaf.code)
        if code is not None and dice.chance(70):
            out = scope.fresh()
            steps.append(Step(code, ("x0", leaf.name), (out,)))
            literal: Any = eval(leaf.code)
            env = {"x0": scope.env["x0"], leaf.name: literal}
            do(steps[-1], scope.module, env)
            scope.env[out] = env[out]
    return tuple(steps)


def _draw_output(dice: Dice, scope: _Scope, values: dict[str, Any]) -> Tree:
    names = list(scope.env)
    found = [names[-1]]
    for _ in range(dice.pick((0, 0, 1, 1, 2, 3))):
        kind = dice.below(100)
        pool = names if kind < 75 else list(values) if kind < 87 else scope.state or names if kind < 95 else ("None", "7", "True")
        found.insert(dice.below(len(found) + 1), dice.pick(pool))
    return _nest(dice, found) if len(found) > 1 or dice.chance(30) else found[0]


def called(plan: ModelPlan) -> list[str]:
    """Paths of the children whose results the root uses."""
    called = {s.code.partition("(")[0] for s in steps_of(plan.blocks[0].steps) if s.outs and s.code.startswith("self.c")}
    return sorted(c.removeprefix("self.").replace("[", ".").replace("]", "") for c in called)


def _with_settings(dice: Dice, plan: ModelPlan) -> ModelPlan:
    """Children to freeze or to put into eval mode, where to cut, modules to keep whole and the rest of the call of `pipeline`."""
    children = [m.attr for m in plan.blocks[0].members if m.kind == "module"]
    after = [f"model.{dice.pick(children)}.eval()"] if children and dice.chance(15) else []
    after += [f"model.{dice.pick(children)}.requires_grad_(False)"] if children and dice.chance(10) else []
    paths = called(plan)
    spec = tuple((p, dice.pick(("BEGINNING", "END"))) for p in paths if dice.chance(20))
    marked = any(s.code == "pipe_split()" for b in plan.blocks for s in steps_of(b.steps))
    count = dice.pick((0, 0, 1, 1, 2))
    if spec:  # one thing says where to cut
        count = 0
    elif not marked:
        count = max(count, 1)
    return replace(
        plan,
        after=tuple(after),
        spec=spec,
        cuts=tuple(dice.below(60) for _ in range(count)),
        whole=(dice.pick(paths),) if paths and dice.chance(5) else (),
        training=dice.chance(75),
        dynamic=dice.chance(20),
        sent=dice.chance(15),
        again=dice.chance(40),
    )


def _as_graph(dice: Dice, plan: ModelPlan) -> ModelPlan:
    paths = called(plan)
    whole = (dice.pick(paths),) if paths and dice.chance(40) else ()
    cuts = (*plan.cuts, *(dice.below(60) for _ in range(dice.pick((1, 1, 2)))))
    return replace(plan, graph=True, dynamic=False, whole=whole, cuts=cuts, spec=())
