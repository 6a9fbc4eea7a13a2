"""The operation table: what every analysis and pass needs to know of an ATen operation, said once.

    mul      kind pointwise      linear in its first or its second argument
    round    kind pointwise      a break: its value jumps
    softmax  kind mix over dim   smooth
    dropout  kind pointwise      random: draws noise of its own

`lookup(node.target)` finds an entry by the name of the overload packet (``add`` of ``aten.add.Tensor``). To add an
operation, put its name into the group that moves data as it does; the perturbation tests then cover it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from scg.ir import Op, Ref, TensorType, refs_in

Kind = Literal[
    "pointwise",  # output element a reads element a of every broadcast operand
    "choice",  # pointwise, and a constant mask says which operand is read
    "movement",  # copies elements about (views too): runs as itself on bounds
    "reduction",  # joins over ``dims``
    "mix",  # every element along ``dims`` reads every other one (softmax, sort, topk)
    "contraction",  # sum of products after ``equation``
    "scan",  # running along ``dims``: element t reads elements up to t
    "convolution",
    "transposed_convolution",
    "pool",
    "adaptive_pool",
    "resize",  # interpolation: mixes the spatial dims
    "index",  # x[i, j], tensors as indices
    "gather",
    "index_select",
    "embedding",
    "spread",  # adds trailing dims: one_hot, view_as_real
    "scatter",  # writes along a dim at indices
    "index_write",  # index_add, index_copy, index_fill: whole slices along a dim
    "index_put",
    "layer_norm",  # mixes trailing dims
    "batch_norm",
    "group_norm",
    "recurrent",
    "cell",  # one step of a recurrent layer
    "attention",
    "matrix",  # linear algebra on the trailing ``trailing`` dims
    "kron",
    "solve",  # linear systems
    "search",  # bucketize, searchsorted: where values stand among others
    "whole",  # every output element reads everything
    "loss",  # pointwise, then reduced if its ``reduction`` says so
    "composite",  # known to be smooth; its elements are followed through what it consists of
    "nothing",  # reads no values: shapes only, or noise without parameters
]
"""How the elements of an operation's outputs depend on those of its inputs."""


@dataclass(frozen=True)
class Operation:
    """One entry of the table."""

    kind: Kind
    dims: str | tuple[int, ...] = "dim"
    """Of reductions, mixes and scans: the dims, or the argument that names them (absent or None: all)."""
    equation: str = ""
    """Of contractions: ``mat1 ik, mat2 kj -> ij``; tensors it does not name are added, broadcast."""
    trailing: int = 2
    """Of matrix operations: how many trailing dims of each operand are read as a whole."""
    linear: tuple[frozenset[int], ...] = ()
    """Sets of argument positions in which the operation is jointly affine while the others stand still."""
    separate: bool = False
    """Linear in each tensor of a list alone, not jointly (einsum)."""
    discontinuous: bool = False
    """Its value jumps, or its derivative is zero where the value is not constant."""
    guard: bool = False
    """Tests for what a valid program never meets (isnan): not discontinuous on its way."""
    random: bool = False
    """Draws noise."""
    impure: bool = False
    """Changes a tensor it was given (running statistics) without declaring it."""


def _positions(*groups: tuple[int, ...]) -> tuple[frozenset[int], ...]:
    return tuple(frozenset(group) for group in groups)


def _entries(entry: Operation, names: str) -> dict[str, Operation]:
    return dict.fromkeys(names.split(), entry)


def _contractions(linear: tuple[frozenset[int], ...], equations: Mapping[str, str]) -> dict[str, Operation]:
    return {name: Operation("contraction", equation=text, linear=linear) for name, text in equations.items()}


_FIRST = _positions((0,))
_PAIR = _positions((0, 1))  # jointly linear in both
_EACH = _positions((0,), (1,))  # linear in either one, not in both
_AFFINE = _positions((0, 1), (0, 2))  # addmm: the input, and one factor
_WEIGHTED = _positions((0, 2), (1, 2))  # linear(x, weight, bias)

_POINTWISE = Operation("pointwise")
_JUMP = Operation("pointwise", discontinuous=True)
_MOVE = Operation("movement", linear=_FIRST)
_REDUCE = Operation("reduction")
_MIX = Operation("mix")
_NOTHING = Operation("nothing")
_NOISE = Operation("nothing", random=True)

OPERATIONS: dict[str, Operation] = {
    # -- pointwise, smooth or at least continuous -----------------------------------------------------------------
    **_entries(
        _POINTWISE,
        """abs absolute acos acosh arccos arccosh arcsin arcsinh arctan arctanh asin asinh atan atanh celu clamp
        clamp_max clamp_min clip complex cos cosh deg2rad detach digamma elu erf erfc erfinv exp exp2 expm1 fill
        float_power fmax fmin gelu hardsigmoid hardswish hardtanh hypot i0 igamma igammac imag leaky_relu lgamma
        log log10 log1p log2 log_sigmoid logaddexp logaddexp2 logit maximum minimum mish mvlgamma nan_to_num
        polar polygamma pow rad2deg real reciprocal relu relu6 rsqrt selu sigmoid sigmoid_backward silu
        sin sinc sinh softplus softshrink special_entr special_erf special_erfc special_erfcx special_erfinv
        special_exp2 special_expit special_expm1 special_gammaln special_i0 special_i0e special_i1 special_i1e
        special_log1p special_log_ndtr special_logit special_ndtr special_ndtri special_polygamma special_psi
        special_sinc special_xlog1py special_xlogy special_zeta sqrt square tan tanh tanh_backward
        threshold_backward xlogy""",
    ),
    **_entries(
        Operation("loss"),
        """binary_cross_entropy binary_cross_entropy_with_logits huber_loss kl_div l1_loss mse_loss
        poisson_nll_loss smooth_l1_loss soft_margin_loss""",
    ),
    **_entries(
        Operation("composite"),
        """affine_grid_generator col2im corrcoef cosine_embedding_loss cov cross_entropy_loss ctc_loss
        cumulative_trapezoid fft_fftshift fft_ifftshift fold grid_sampler grid_sampler_2d grid_sampler_3d
        hinge_embedding_loss istft linalg_tensorsolve margin_ranking_loss multi_margin_loss
        multilabel_margin_loss nll_loss nll_loss2d nll_loss_nd pdist renorm stft sum_to_size trapezoid
        triplet_margin_loss""",
    ),
    "diff": Operation("composite", linear=_FIRST),
    "take_along_dim": Operation("composite", linear=_FIRST),
    **_entries(replace(_POINTWISE, linear=_FIRST), "alias clone conj contiguous lift_fresh neg negative positive"),
    **_entries(replace(_POINTWISE, linear=_FIRST), "_to_copy convert_element_type lift_fresh_copy to type_as"),
    **_entries(replace(_POINTWISE, linear=_PAIR), "add rsub sub subtract"),
    **_entries(replace(_POINTWISE, linear=_EACH), "mul multiply"),
    **_entries(replace(_POINTWISE, linear=_FIRST), "div divide true_divide"),
    "lerp": replace(_POINTWISE, linear=_positions((0, 1), (2,))),
    "addcmul": replace(_POINTWISE, linear=_AFFINE),
    "addcdiv": replace(_POINTWISE, linear=_positions((0, 1))),
    "where": Operation("choice", linear=_positions((1, 2))),
    "masked_fill": Operation("choice", linear=_positions((0, 2))),
    # -- pointwise, with jumps ------------------------------------------------------------------------------------
    **_entries(
        _JUMP,
        """__and__ __lshift__ __or__ __rshift__ __xor__ angle arctan2 atan2 bitwise_and bitwise_left_shift
        bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil copysign eq fake_quantize_per_tensor_affine
        fix floor floor_divide fmod frac gcd ge greater greater_equal gt hardshrink heaviside isclose lcm ldexp
        le less less_equal logical_and logical_not logical_or logical_xor lt ne nextafter not_equal remainder
        round sgn sign signbit special_round threshold trunc""",
    ),
    **_entries(replace(_POINTWISE, guard=True), "isfinite isinf isnan isneginf isposinf isreal"),
    # -- noise ----------------------------------------------------------------------------------------------------
    **_entries(
        replace(_POINTWISE, random=True, linear=_FIRST),
        "_fused_dropout alpha_dropout dropout native_dropout",
    ),
    **_entries(replace(_POINTWISE, random=True), "rrelu rrelu_with_noise"),
    **_entries(Operation("mix", dims="spatial", random=True, linear=_FIRST), "feature_alpha_dropout feature_dropout"),
    **_entries(replace(_JUMP, random=True), "_standard_gamma bernoulli binomial normal poisson"),
    "_sample_dirichlet": Operation("mix", dims=(-1,), random=True),
    "multinomial": Operation("mix", dims=(-1,), random=True, discontinuous=True),
    **_entries(
        _NOISE,
        """cauchy exponential geometric log_normal normal_functional rand rand_like randint randint_like randn
        randn_like random randperm uniform""",
    ),
    # -- values do not matter -------------------------------------------------------------------------------------
    **_entries(
        _NOTHING,
        """arange empty empty_like empty_strided eye full full_like hamming_window hann_window new_empty
        new_empty_strided new_full new_ones new_zeros ones ones_like scalar_tensor tril_indices triu_indices
        zeros zeros_like""",
    ),
    # -- views and movement ---------------------------------------------------------------------------------------
    **_entries(
        _MOVE,
        """_pad_circular _unsafe_view adjoint atleast_1d atleast_2d atleast_3d broadcast_to channel_shuffle chunk
        constant_pad_nd diag diag_embed diagflat diagonal diagonal_copy dsplit expand expand_copy flatten flip
        fliplr flipud hsplit im2col linalg_diagonal mH mT masked_select moveaxis movedim narrow narrow_copy
        numpy_T pad permute permute_copy pixel_shuffle pixel_unshuffle ravel reflection_pad1d reflection_pad2d
        reflection_pad3d repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape
        resolve_conj resolve_neg roll rot90 select select_copy slice slice_copy split split_copy
        split_with_sizes split_with_sizes_copy squeeze squeeze_copy swapaxes swapdims t t_copy tensor_split tile
        transpose transpose_copy tril triu unbind unbind_copy unflatten unfold unfold_copy unsafe_chunk
        unsafe_split unsafe_split_with_sizes unsqueeze unsqueeze_copy upsample_nearest1d upsample_nearest2d
        upsample_nearest3d view view_copy vsplit""",
    ),
    **_entries(_MOVE, "block_diag cat column_stack concat concatenate dstack hstack row_stack stack vstack"),
    **_entries(_MOVE, "broadcast_tensors cartesian_prod meshgrid"),
    **_entries(replace(_MOVE, linear=_PAIR), "diagonal_scatter select_scatter slice_scatter"),
    **_entries(_MOVE, "expand_as reshape_as view_as"),
    "view.dtype": Operation("mix", dims=(-1,), discontinuous=True),
    # -- reductions -----------------------------------------------------------------------------------------------
    **_entries(replace(_REDUCE, linear=_FIRST), "mean sum trace"),
    **_entries(
        _REDUCE,
        """amax amin aminmax dist frobenius_norm kthvalue linalg_matrix_norm linalg_norm linalg_vector_norm
        logsumexp max median min nanmean nanmedian nanquantile.scalar nansum norm nuclear_norm prod quantile.scalar
        special_logsumexp std std_mean var var_mean""",
    ),
    **_entries(_POINTWISE, "max.other min.other"),
    **_entries(replace(_REDUCE, discontinuous=True), "all any argmax argmin count_nonzero mode"),
    # -- everything along a dim reads everything ------------------------------------------------------------------
    **_entries(
        _MIX,
        """_log_softmax _safe_softmax _softmax cross fft_fft fft_fft2 fft_fftn fft_hfft fft_ifft fft_ifft2
        fft_ifftn fft_ihfft fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn glu linalg_cross
        log_softmax softmax sort special_log_softmax special_softmax topk""",
    ),
    "msort": Operation("mix", dims=(0,)),
    "argsort": replace(_MIX, discontinuous=True),
    "cosine_similarity": replace(_REDUCE),
    "pairwise_distance": Operation("reduction", dims=(-1,)),
    # -- scans ----------------------------------------------------------------------------------------------------
    "cumsum": Operation("scan", linear=_FIRST),
    **_entries(Operation("scan"), "cummax cummin cumprod logcumsumexp"),
    # -- contractions ---------------------------------------------------------------------------------------------
    **_contractions(
        _EACH,
        {
            "mm": "self ik, mat2 kj -> ij",
            "bmm": "self bik, mat2 bkj -> bij",
            "mv": "self ik, vec k -> i",
            "dot": "self i, tensor i -> ",
            "vdot": "self i, other i -> ",
            "inner": "self ...k, other ok -> ...o",
            "outer": "self i, vec2 j -> ij",
            "ger": "self i, vec2 j -> ij",
            "matmul": "",
            "tensordot": "",
            "linalg_vecdot": "x ...k, y ...k -> ...",
        },
    ),
    **_contractions(
        (),
        {
            "cdist": "x1 ...ik, x2 ...jk -> ...ij",
            "_cdist_forward": "x1 ...ik, x2 ...jk -> ...ij",
            "_euclidean_dist": "x1 ...ik, x2 ...jk -> ...ij",
            "prelu": "self nc..., weight c -> nc...",
        },
    ),
    **_contractions(
        _AFFINE,
        {
            "addmm": "mat1 ik, mat2 kj -> ij",
            "addbmm": "batch1 bik, batch2 bkj -> ij",
            "baddbmm": "batch1 bik, batch2 bkj -> bij",
            "addmv": "mat ik, vec k -> i",
            "addr": "vec1 i, vec2 j -> ij",
        },
    ),
    "linear": Operation("contraction", equation="input ...k, weight ok, bias o -> ...o", linear=_WEIGHTED),
    "bilinear": Operation(
        "contraction",
        equation="input1 ...i, input2 ...j, weight oij, bias o -> ...o",
        linear=_positions((0, 3), (1, 3), (2, 3)),
    ),
    "einsum": Operation("contraction", linear=_positions((1,)), separate=True),
    "chain_matmul": Operation("matrix", linear=_FIRST, separate=True),
    "linalg_multi_dot": Operation("matrix", linear=_FIRST, separate=True),
    "kron": Operation("kron", linear=_EACH),
    # -- windows --------------------------------------------------------------------------------------------------
    **_entries(Operation("convolution", linear=_WEIGHTED), "conv1d conv2d conv3d convolution"),
    **_entries(
        Operation("transposed_convolution", linear=_WEIGHTED),
        "conv_transpose1d conv_transpose2d conv_transpose3d",
    ),
    **_entries(
        Operation("pool", linear=_FIRST),
        "avg_pool1d avg_pool2d avg_pool3d",
    ),
    **_entries(
        Operation("pool"),
        "max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices",
    ),
    **_entries(
        Operation("adaptive_pool", linear=_FIRST),
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d",
    ),
    **_entries(
        Operation("adaptive_pool"),
        "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d",
    ),
    **_entries(
        Operation("resize", linear=_FIRST),
        """_upsample_bicubic2d_aa _upsample_bilinear2d_aa upsample_bicubic2d upsample_bilinear2d upsample_linear1d
        upsample_trilinear3d""",
    ),
    **_entries(Operation("search", discontinuous=True), "bucketize searchsorted"),
    # -- indexing -------------------------------------------------------------------------------------------------
    **_entries(Operation("index", linear=_FIRST), "_unsafe_index index"),
    **_entries(Operation("gather", linear=_FIRST), "gather"),
    "index_select": Operation("index_select", linear=_FIRST),
    "embedding": Operation("embedding", linear=_FIRST),
    "one_hot": Operation("spread", discontinuous=True),
    "view_as_real": Operation("spread"),
    "view_as_complex": Operation("reduction", dims=(-1,)),
    "scatter_add": Operation("scatter", linear=_positions((0, 3))),
    # of two writes to one place one wins, but the backward sends the gradient to both: linear in self alone
    "scatter": Operation("scatter", linear=_FIRST),
    "scatter_reduce": Operation("scatter"),
    **_entries(Operation("index_write", linear=_positions((0, 3))), "index_add index_fill"),
    "index_copy": Operation("index_write", linear=_FIRST),
    "index_reduce": Operation("index_write"),
    **_entries(Operation("index_put", linear=_FIRST), "_unsafe_index_put index_put"),
    # -- normalisation --------------------------------------------------------------------------------------------
    **_entries(Operation("layer_norm"), "_fused_rms_norm layer_norm native_layer_norm rms_norm"),
    **_entries(
        Operation("batch_norm", impure=True),
        "batch_norm native_batch_norm cudnn_batch_norm _native_batch_norm_legit instance_norm",
    ),
    **_entries(
        Operation("batch_norm"),
        "_native_batch_norm_legit_functional _native_batch_norm_legit_no_training",
    ),
    **_entries(
        Operation("group_norm"),
        "group_norm native_group_norm",
    ),
    # -- layers ---------------------------------------------------------------------------------------------------
    **_entries(Operation("recurrent", random=True), "gru lstm rnn_relu rnn_tanh"),
    **_entries(Operation("cell"), "gru_cell lstm_cell rnn_relu_cell rnn_tanh_cell"),
    **_entries(
        Operation("attention", random=True),
        """_scaled_dot_product_attention_math _scaled_dot_product_efficient_attention
        _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu
        scaled_dot_product_attention""",
    ),
    # -- linear algebra on the last two dims ----------------------------------------------------------------------
    **_entries(
        Operation("matrix"),
        """_linalg_det _linalg_eigh _linalg_slogdet _linalg_svd cholesky cholesky_inverse cholesky_solve det
        inverse linalg_cholesky linalg_cholesky_ex linalg_det linalg_eig linalg_eigh linalg_eigvalsh linalg_inv
        linalg_inv_ex linalg_lu linalg_matrix_exp linalg_matrix_power linalg_pinv linalg_qr linalg_slogdet
        linalg_solve_triangular linalg_svd linalg_svdvals logdet lu_unpack matrix_exp matrix_power pinverse qr
        slogdet svd triangular_solve""",
    ),
    **_entries(Operation("matrix", discontinuous=True), "linalg_matrix_rank"),
    **_entries(Operation("solve", linear=_positions((1,))), "_linalg_solve_ex linalg_solve linalg_solve_ex"),
    # -- not followed: everything reads everything ----------------------------------------------------------------
    **_entries(Operation("whole", linear=_FIRST), "as_strided as_strided_copy take"),
    **_entries(
        Operation("whole"),
        "linalg_lstsq linalg_lu_factor linalg_lu_solve linspace logspace nanquantile quantile",
    ),
    **_entries(
        Operation("whole", discontinuous=True),
        "histc isin",
    ),
}
"""Every classified operation, by the name of its overload packet."""


def packet_name(target: Callable[..., Any]) -> str | None:
    """``add`` of ``aten.add.Tensor``; None of a callable that is no operator of a torch library."""
    schema = getattr(target, "_schema", None)
    return schema.name.partition("::")[2] if schema is not None else None


def lookup(target: Callable[..., Any]) -> Operation | None:
    """The table's entry for an operator; else one inferred from torch's own tags, else None."""
    name = packet_name(target)
    if name is None:
        return None
    overload = f"{name}.{getattr(target, '_overloadname', '')}"
    if (found := OPERATIONS.get(overload, OPERATIONS.get(name))) is not None:
        return found
    tags = getattr(target, "tags", ())
    if torch.Tag.pointwise in tags:
        # Its smoothness is unknown: better a pessimist than silently wrong.
        return Operation("pointwise", discontinuous=True, random=torch.Tag.nondeterministic_seeded in tags)
    return None


def bind(node: Op) -> dict[str, Any]:
    """The arguments of an operator by their names in its schema, defaults filled in."""
    schema = node.target._schema  # type: ignore[attr-defined]
    named = {arg.name: arg.default_value if arg.has_default_value() else None for arg in schema.arguments}
    named.update(zip((arg.name for arg in schema.arguments), node.args, strict=False))
    named.update(node.kwargs)
    return named


def _is_float(node: Op) -> bool:
    return isinstance(node.type, TensorType) and node.type.dtype.is_floating_point


def is_linear(node: Op, influenced: Collection[Ref]) -> bool:
    """Is ``node`` jointly affine in its inputs ``influenced`` while its other inputs stand still?

    A `detach` is not, as nothing flows back through it, nor is a lookup that has a row for padding. Of casts only the
    output's dtype is looked at.

    >>> x, w = Ref("x"), Ref("w")
    >>> f32 = TensorType(torch.float32, (3,))
    >>> product = Op(name="y", type=f32, target=torch.ops.aten.mul.Tensor, args=(x, w))
    >>> is_linear(product, {x}), is_linear(product, {x, w})
    (True, False)
    """
    if node.target is operator.getitem:
        return True
    op = lookup(node.target)
    if op is None or is_random(node) or op.discontinuous or is_padded(node):
        return False
    if isinstance(node.type, TensorType) and not _is_float(node):
        return False
    named = bind(node)
    if named.get("rounding_mode") is not None or named.get("reduce") is not None:
        return False
    touched = [position for position, value in enumerate(named.values()) if _touches(value, influenced)]
    if op.separate and sum(ref in influenced for ref in node.inputs) > 1:
        return False
    return any(group.issuperset(touched) for group in op.linear)


def _touches(value: Any, influenced: Collection[Ref]) -> bool:
    return any(ref in influenced for ref in refs_in(value))


def is_discontinuous(node: Op) -> bool:
    """Does its value jump, or lose its derivative, where its float inputs move? Of unknown operators: yes.

    A callable that is no operator is a custom ``autograd.Function``, whose backward is the user's own: no.
    """
    floating = _is_float(node) or isinstance(node.type, TensorType) and node.type.dtype.is_complex
    if node.target is operator.getitem or isinstance(node.type, TensorType) and not floating:
        return isinstance(node.type, TensorType) and not floating and not _is_guard(node)
    op = lookup(node.target)
    if op is None or op.discontinuous:
        return packet_name(node.target) is not None
    named = bind(node)
    return named.get("rounding_mode") is not None or named.get("ord", named.get("p")) == 0


def is_padded(node: Op) -> bool:
    """Is it a lookup in a table that has a row for padding, to which its backward sends nothing?"""
    return packet_name(node.target) == "embedding" and bind(node)["padding_idx"] >= 0


def _is_guard(node: Op) -> bool:
    op = lookup(node.target)
    return op is not None and op.guard


def is_random(node: Op) -> bool:
    """Does it draw noise, in the mode and with the rate it is called with? (Also by torch's tag, outside the table.)"""
    op = lookup(node.target)
    if op is None or not op.random:
        return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    named = bind(node)
    rate = next((named[name] for name in ("dropout_p", "dropout", "p") if name in named), None)
    idle = op.kind != "nothing" and (isinstance(rate, int | float) and rate == 0 or named.get("train") is False)
    return not idle or op.discontinuous


def is_impure(node: Op) -> bool:
    """Does it change a tensor it was given: declared by its schema, or running statistics in training?"""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    op = lookup(node.target)
    if op is not None and op.impure:
        named = bind(node)
        return bool(named.get("training", named.get("use_input_stats", True)))
    return bool(schema.is_mutable)


# -- the documented table -----------------------------------------------------------------------------------------
def table() -> str:
    """The table in Markdown, one line a class of operations."""
    classes: dict[Operation, list[str]] = {}
    for name, op in OPERATIONS.items():
        classes.setdefault(op, []).append(name)
    lines = ["| how elements depend | linear in | notes | operations |", "|---|---|---|---|"]
    for op, names in sorted(classes.items(), key=lambda item: (item[0].kind, item[1])):
        linear = " or ".join("{" + ", ".join(map(str, sorted(group))) + "}" for group in op.linear)
        notes = [word for word in ("discontinuous", "random", "impure", "guard") if getattr(op, word)]
        notes += [f"`{op.equation}`"] if op.equation else []
        listed = " ".join(f"`{name}`" for name in sorted(names))
        lines.append(f"| {op.kind} | {linear} | {', '.join(notes)} | {listed} |")
    return "\n".join(lines)


_PAGE = """# The operation table

Written by `scg.operations.page()`; the table itself is `OPERATIONS` in `scg/operations.py`.

Every analysis asks one table what an ATen operation does: how the elements of its outputs depend on those of its
inputs (*influence*), in which arguments it is affine (*un-reduction*: `{0, 1}` jointly in the first two, `{0} or {1}`
in either one while the other stands still), whether its value jumps (*smoothness*), whether it draws noise.
An operation outside the table is taken apart into those inside it; if that fails, every element is taken to depend on
everything, and on a path that needs a derivative it counts as a jump: higher variance, never bias.

To add an operation, put its name into the group that moves data as it does. `tests/test_operations.py` then nudges each
input element of a few calls of it (give them in `tests/analysis/examples.py` if they do not follow from the schema) and
checks that nothing changes that the table says cannot.
"""


def page() -> str:
    """The documentation page ``docs/operations.md``."""
    return f"{_PAGE}\n{table()}\n"
