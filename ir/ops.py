"""Facts about single ops of torch that their schemas do not say, in one table by the name of the op. No torch
here.

One op of torch has many spellings: `aten.detach.default` in an exported program, `torch.detach` and
`method.detach` in a GraphModule, `builtins.getattr(x, "data")` for an attribute. The user's own code may have
any name at all: a module `enc.data`, a function `detach`. So no rule reads a target. A rule asks for the
facts of an op, and the user's code has none. An op that the table does not know behaves as its schema says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stagecut.ir.graph import Kind, Op, Target, Value, leaves


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts about an op of torch. Each fact names its readers."""

    training: Mapping[str, int] = field(default_factory=dict)
    """Overload -> the position of its training flag. Lowering: the flag follows the module's."""
    off_is_operand: bool = False
    """It returns the very tensor that it is given when its flag is off. Lowering: the result is a view."""
    statistics: tuple[int, ...] = ()
    """Arguments that it writes when its flag is on, though its schema does not say so. Lowering."""
    copies: bool = False
    """Its result is a new tensor, though one in a trace shares storage with the operand. Lowering."""
    reshapes: bool = False
    """It gives a tensor another shape in place, or detaches it, and writes nothing in memory. Lowering takes
    the view instead.
    """
    needs_layout: bool = False
    """Its result is a view, and there is an error where the operand does not lie so that there can be one.
    The code of roles reshapes instead.
    """
    cuts_gradient: bool = False
    """Its results never carry gradient. Infer-gradients."""
    returns_operand: bool = False
    """It returns the very tensor that it is given, with its history, where there is nothing to do.
    Infer-gradients, lowering.
    """
    guard: bool = False
    """A tracer adds it to check its own assumptions; it computes nothing. Canonicalize, validator."""
    attention: bool = False
    """It is scaled_dot_product_attention. Causal-attention; costs: on a GPU it keeps operands, result and one
    number per row.
    """
    heavy: bool = False
    """It computes more than it moves. Recompute, balance: it is never done twice unasked."""
    reads_around: bool = False
    """It may read all of the storage in which its first operand lies. Rebase-views, files."""
    past_autograd: bool = False
    """Backward does not know of writes into its result. Mailbox."""
    uninitialised: bool = False
    """Its result is whatever the memory held. Constants, checks of passes."""
    norm_of_rows: bool = False
    """Costs: on a GPU it keeps its operand and one number per row."""
    takes_rows: bool = False
    """It takes the rows of its first operand whose numbers are in the second one. Costs: an example,
    and what is read.
    """
    grouped_product: bool = False
    """Costs: it is a product of matrices in groups, for which torch has no formula."""
    over_samples: str = ""
    """How its result, a number, follows from its operands: `mean` or `sum` of their elements; `same`: it is
    the operand; `scaled`: by a factor; `added`: to another; `listed`: the operands in a row. Over-samples.
    """
    reduction: int | None = None
    """The position of the argument that says whether a loss is a mean (1) or a sum (2). Over-samples."""
    fills: bool = False
    """It puts the elements of its third argument where its second one, a mask, is set. Filled."""
    expands: bool = False
    """Its result is its first operand, repeated. Filled."""
    along_dim: bool = False
    """Its results depend on all elements along the dim that is its second argument. Batch."""
    along_keys: bool = False
    """Its results depend on all rows of its second argument. Batch."""
    in_space: bool = False
    """Its results depend on neighbours along all dims but the first two. Batch."""
    takes: str = ""
    """Its result is a piece of its operand: the one `place` along a dim, or a `range` of them; the dim and
    the places are its next arguments. Overlaps.
    """
    divides: bool = False
    """Its results are pieces of its operand that have no element in common. Overlaps."""
    rearranges: bool = False
    """Its result has all elements of its operand, in another shape or order. Roles: what several such views
    end in may be the tensor that they began with.
    """
    iteration: str = ""
    """The overload that Python's own unpacking of its operand stands for. Emission."""
    bindings: Mapping[str, str] = field(default_factory=dict)
    """Overload -> torch's binding that takes the same arguments in the same order and calls just that
    overload. Emission.
    """


NOTHING = Facts()
"""The facts about the user's own code: none."""


def _facts() -> dict[str, Facts]:
    table: dict[str, Facts] = {}

    def know(names: str | Iterable[str], **facts: Any) -> None:
        for name in names.split() if isinstance(names, str) else names:
            table[name] = replace(table.get(name, NOTHING), **facts)

    for name in (
        "dropout",
        "feature_dropout",
        "alpha_dropout",
        "feature_alpha_dropout",
    ):
        know((name, f"{name}_"), training={"default": 2}, off_is_operand=True)
    know("native_dropout", training={"default": 2})
    know("rrelu rrelu_", training={"default": 3})
    know(
        "batch_norm native_batch_norm cudnn_batch_norm miopen_batch_norm instance_norm",
        training={"default": 5},
        statistics=(3, 4),
    )
    know("lstm gru rnn_tanh rnn_relu", training={"input": 6, "data": 7})
    know("_cudnn_rnn", training={"default": 12})
    know("miopen_rnn", training={"default": 10})
    know("embedding embedding_bag _embedding_bag", takes_rows=True)
    know("lift_fresh_copy", copies=True)
    know(
        "t_ transpose_ swapaxes_ swapdims_ unsqueeze_ squeeze_ as_strided_ detach_",
        reshapes=True,
    )
    know("view _unsafe_view", needs_layout=True)

    know("data detach detach_", cuts_gradient=True)
    know(
        "zeros_like ones_like full_like empty_like rand_like randn_like randint_like",
        cuts_gradient=True,
    )
    know(
        "new_zeros new_ones new_full new_empty new_empty_strided new_tensor",
        cuts_gradient=True,
    )
    know(
        "to type_as contiguous flatten positive lift_fresh broadcast_tensors atleast_1d atleast_2d "
        "atleast_3d",
        returns_operand=True,
    )
    know(
        "float double half bfloat16 int long bool cpu cuda real conj resolve_conj resolve_neg",
        returns_operand=True,
    )
    know(
        "dropout feature_dropout alpha_dropout feature_alpha_dropout",
        returns_operand=True,
    )
    know(
        "_assert_tensor_metadata _assert_scalar sym_constrain_range sym_constrain_range_for_size",
        guard=True,
    )

    know(
        "mm bmm addmm baddbmm addbmm matmul linear bilinear einsum dot vdot mv addmv addr cdist tensordot "
        "chain_matmul",
        heavy=True,
    )
    know(
        "conv1d conv2d conv3d convolution _convolution conv_transpose1d conv_transpose2d conv_transpose3d",
        heavy=True,
    )
    know(
        "convolution_overrideable convolution_backward cudnn_convolution _slow_conv2d_forward _scaled_mm",
        heavy=True,
    )
    know("scaled_dot_product_attention lstm gru rnn_tanh rnn_relu", heavy=True)
    # a layer is a loop of products of matrices
    know("mkldnn_rnn_layer _cudnn_rnn miopen_rnn", heavy=True)
    for kernel in ("_flash_attention", "_efficient_attention"):
        know((f"{kernel}_forward", f"{kernel}_backward"), heavy=True)
    for kernel in ("flash", "efficient", "cudnn"):
        know(
            (
                f"_scaled_dot_product_{kernel}_attention",
                f"_scaled_dot_product_{kernel}_attention_backward",
            ),
            heavy=True,
        )
    know("higher_order.flex_attention higher_order.flex_attention_backward", heavy=True)
    know("scaled_dot_product_attention", attention=True)
    know("rms_norm _fused_rms_norm", norm_of_rows=True)
    know(
        "_grouped_mm grouped_mm transformers.grouped_mm_fallback",
        grouped_product=True,
        heavy=True,
    )

    know("as_strided as_strided_ as_strided_copy as_strided_scatter", reads_around=True)
    know("select", takes="place")
    know("slice", takes="range")
    know("split split_with_sizes chunk tensor_split unbind", divides=True)
    know("data", past_autograd=True)
    know(
        "empty empty_like empty_strided empty_permuted empty_quantized new_empty new_empty_strided",
        uninitialised=True,
    )
    know(
        "_empty_affine_quantized _empty_per_channel_affine_quantized",
        uninitialised=True,
    )

    for names, known in _OF_BATCHES:
        know(names, **known)
    know(
        "t transpose permute view _unsafe_view unsqueeze squeeze",
        rearranges=True,
    )
    know("unbind", iteration="int")
    for home, overloads in _BINDINGS.items():
        for spelled in overloads.split():
            name, _, overload = spelled.partition(".")
            know((name,), bindings={overload: f"{home}.{name}"})
    return table


_OF_BATCHES: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "softmax _softmax _safe_softmax log_softmax _log_softmax cumsum cumprod",
        {"along_dim": True},
    ),
    (
        "scaled_dot_product_attention _scaled_dot_product_flash_attention "
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
        "_scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math "
        "_scaled_dot_product_fused_attention_overrideable",
        {"along_keys": True},
    ),
    ("conv1d conv2d conv3d convolution", {"in_space": True}),
    ("masked_scatter masked_scatter_", {"fills": True}),
    ("expand expand_as", {"expands": True}),
    ("mean", {"over_samples": "mean"}),
    ("sum count_nonzero", {"over_samples": "sum"}),
    (
        "clone detach alias to _to_copy view reshape squeeze contiguous float double neg",
        {"over_samples": "same"},
    ),
    ("mul div", {"over_samples": "scaled"}),
    ("add sub", {"over_samples": "added"}),
    ("stack", {"over_samples": "listed"}),
    (
        "mse_loss l1_loss smooth_l1_loss huber_loss kl_div soft_margin_loss multilabel_margin_loss",
        {"reduction": 2},
    ),
    (
        "cross_entropy_loss nll_loss nll_loss_nd nll_loss2d binary_cross_entropy",
        {"reduction": 3},
    ),
    ("binary_cross_entropy_with_logits", {"reduction": 4}),
)
"""The facts that tell how a batch goes through an op."""

_BINDINGS = {
    "torch": """
        add.Tensor sub.Tensor mul.Tensor div.Tensor pow.Tensor_Scalar neg.default
        rsqrt.default sqrt.default exp.default tanh.default sigmoid.default sin.default
        cos.default relu.default mean.dim softmax.int dropout.default matmul.default
        mm.default bmm.default embedding.default layer_norm.default rms_norm.default
        group_norm.default batch_norm.default conv1d.default conv2d.default cat.default
        stack.default chunk.default transpose.int permute.default unsqueeze.default
        squeeze.dim flatten.using_ints unflatten.int reshape.default t.default sum.default
        sum.dim_IntList addmm.default
    """,
    "torch.nn.functional": "linear.default gelu.default scaled_dot_product_attention.default",
    "torch.Tensor": "view.default expand.default contiguous.default",
    "torch._C._nn": "silu.default",
}

FACTS: Mapping[str, Facts] = _facts()
"""Name of an op of torch, or namespace and name of an op of another library -> its facts."""

_SYMBOLS = {"pos": "positive"}
"""Functions of `operator` that torch knows by another name."""


def facts(op: Op) -> Facts:
    """The facts about the op that `op` calls, however it is spelled. NOTHING for the user's own code."""
    return FACTS.get(base_name(op) or library_name(op), NOTHING)


def facts_of(name: str) -> Facts:
    """The facts about the op of torch of that name."""
    return FACTS.get(name, NOTHING)


ATTENTION_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
"""The arguments of scaled_dot_product_attention, in order."""


def attention_arguments(op: Op) -> dict[str, Any]:
    """The arguments of a scaled_dot_product_attention by name, as far as they are given."""
    return dict(zip(ATTENTION_ARGUMENTS, op.args, strict=False)) | op.kwargs


def base_name(op: Op) -> str:
    """The name of an op of torch without namespace and overload, however the op is spelled. '' for an op that
    is not torch's.
    """
    target = op.target
    if target.kind in (Kind.ATEN, Kind.METHOD, Kind.TORCH):
        return target.name
    if target.kind is not Kind.PYTHON:
        return ""
    if target.startswith("operator."):
        return _SYMBOLS.get(target.name, target.name)
    return _attribute(op) if target == "builtins.getattr" else ""


def _attribute(op: Op) -> str:
    name = op.args[1] if len(op.args) > 1 else ""
    return name if isinstance(name, str) else ""


def library_name(op: Op) -> str:
    """Namespace and name of an op that another library registered. '' for other ops."""
    if op.target.kind is not Kind.LIBRARY or not op.target.name:
        return ""
    return f"{op.target.split('.')[2]}.{op.target.name}"


def is_heavy(op: Op) -> bool:
    """True for an op that computes more than it moves, and for any op of another library, because nothing is
    known of it.
    """
    return facts(op).heavy or bool(library_name(op))


def module_path(op: Op) -> str:
    """The path of the module that an op calls as a whole. '' for other ops."""
    return op.target.name if op.target.kind is Kind.MODULE else ""


def state_of(op: Op) -> list[Value]:
    """The state of the module that an op calls as a whole. Nothing for other ops."""
    return list(leaves(op.args[2:3])) if module_path(op) else []


def flag_position(target: Target) -> int | None:
    """The position of the training flag among the arguments of an overload. None for an overload without one,
    and for other spellings.
    """
    return (
        facts_of(target.name).training.get(target.overload)
        if target.kind is Kind.ATEN
        else None
    )


def flag(op: Op) -> Any:
    """The training flag of an op: a bool or a mode. None for an op without one."""
    position = flag_position(op.target)
    return (
        op.args[position] if position is not None and position < len(op.args) else None
    )


def out_of_place(target: Target) -> str:
    """For an op that gives a tensor another shape in place, or detaches it: the target of the op that takes
    that view. '' for other ops.

    Nothing in the memory is written, and the other views of it keep their shapes.
    """
    if (
        target.kind not in (Kind.ATEN, Kind.METHOD, Kind.TORCH)
        or not facts_of(target.name).reshapes
    ):
        return ""
    if target.kind is not Kind.ATEN:
        return target.removesuffix("_")
    return f"aten.{target.name[:-1]}.{'int' if target.name == 'transpose_' else target.overload}"
