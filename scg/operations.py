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
    """Of reductions, mixes and scans: the argument that names the dims (absent or None: all), or the dims themselves."""
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
        """abs absolute acos arccos acosh arccosh asin arcsin asinh arcsinh atan arctan atanh arctanh celu clamp clamp_max
        clamp_min clip cos cosh deg2rad digamma elu erf erfc erfinv exp exp2 expm1 float_power fmax fmin gelu hardsigmoid
        hardswish hardtanh hypot i0 leaky_relu lgamma log log10 log1p log2 log_sigmoid logaddexp logaddexp2 logit
        maximum minimum mish mvlgamma nan_to_num polygamma pow prelu rad2deg reciprocal relu relu6 rsqrt selu sigmoid silu
        sin sinc sinh softplus softshrink special_entr special_erf special_erfc special_erfcx special_erfinv special_exp2
        special_expit special_expm1 special_gammaln special_i0 special_i0e special_i1 special_i1e special_log1p
        special_log_ndtr special_logit special_ndtr special_ndtri special_psi special_sinc special_xlog1py special_xlogy
        special_zeta sqrt square tan tanh xlogy threshold_backward sigmoid_backward tanh_backward detach detach_
        polar complex real imag""",
    ),
    **_entries(
        Operation("loss"),
        """binary_cross_entropy binary_cross_entropy_with_logits mse_loss l1_loss huber_loss smooth_l1_loss kl_div
        soft_margin_loss poisson_nll_loss""",
    ),
    **_entries(
        Operation("composite"),
        """cross_entropy_loss nll_loss nll_loss2d nll_loss_nd cosine_embedding_loss hinge_embedding_loss
        margin_ranking_loss triplet_margin_loss multi_margin_loss multilabel_margin_loss ctc_loss grid_sampler
        grid_sampler_2d grid_sampler_3d linalg_solve quantile nanquantile renorm trapezoid cumulative_trapezoid
        affine_grid_generator corrcoef cov fold col2im stft istft fft_fft2 fft_ifft2 fft_fftn
        fft_ifftn fft_fftshift fft_ifftshift fft_rfft2 fft_rfftn fft_irfft2 fft_irfftn pdist""",
    ),
    "diff": Operation("composite", linear=_FIRST),
    **_entries(replace(_POINTWISE, linear=_FIRST), "neg negative positive alias clone contiguous conj lift_fresh"),
    **_entries(
        replace(_POINTWISE, linear=_FIRST), "to _to_copy type_as  lift_fresh_copy convert_element_type"
    ),
    **_entries(replace(_POINTWISE, linear=_PAIR), "add sub subtract rsub"),
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
        """angle arctan2 atan2 bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor
        bucketize ceil copysign eq fake_quantize_per_tensor_affine fix floor floor_divide fmod frac ge
        greater greater_equal gt hardshrink heaviside isclose ldexp le less
        less_equal logical_and logical_not logical_or logical_xor lt ne nextafter not_equal remainder round sgn
        sign signbit special_round threshold trunc gcd lcm __and__ __or__ __xor__ __lshift__ __rshift__""",
    ),
    **_entries(replace(_POINTWISE, guard=True), "isfinite isinf isnan isneginf isposinf isreal"),
    # -- noise ----------------------------------------------------------------------------------------------------
    **_entries(
        replace(_POINTWISE, random=True), "dropout native_dropout alpha_dropout rrelu rrelu_with_noise _fused_dropout"
    ),
    **_entries(replace(_POINTWISE, random=True, kind="mix", dims="spatial"), "feature_dropout feature_alpha_dropout"),
    **_entries(
        replace(_JUMP, random=True), "bernoulli normal poisson binomial _standard_gamma"
    ),
    "_sample_dirichlet": Operation("mix", dims=(-1,), random=True),
    "multinomial": Operation("mix", dims=(-1,), random=True, discontinuous=True),
    **_entries(
        _NOISE, """rand rand_like randn randn_like randint randint_like randperm uniform exponential geometric cauchy
        log_normal random normal_functional""",
    ),
    # -- values do not matter -------------------------------------------------------------------------------------
    **_entries(
        _NOTHING,
        """arange empty empty_like empty_strided eye full full_like linspace logspace new_empty new_empty_strided
        new_full new_ones new_zeros ones ones_like scalar_tensor tril_indices triu_indices zeros zeros_like sym_size
        sym_numel sym_stride size numel dim hann_window hamming_window""",
    ),
    # -- views and movement ---------------------------------------------------------------------------------------
    **_entries(
        _MOVE,
        """_unsafe_view atleast_1d atleast_2d atleast_3d broadcast_to channel_shuffle chunk
        diag diag_embed diagonal diagonal_copy diagflat expand expand_copy flatten flip fliplr flipud narrow narrow_copy
        permute permute_copy moveaxis movedim pixel_shuffle pixel_unshuffle ravel repeat
        repeat_interleave masked_select reshape resolve_conj resolve_neg
        roll rot90 select select_copy slice slice_copy split split_copy split_with_sizes split_with_sizes_copy squeeze
        squeeze_copy swapaxes swapdims t t_copy tensor_split tile transpose transpose_copy tril triu unbind unbind_copy
        unflatten unfold unfold_copy unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze unsqueeze_copy view
        view_copy hsplit vsplit dsplit pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d
        replication_pad1d replication_pad2d replication_pad3d _pad_circular im2col
        upsample_nearest1d upsample_nearest2d upsample_nearest3d""",
    ),
    **_entries(_MOVE, "cat concat concatenate stack hstack vstack dstack column_stack row_stack block_diag"),
    **_entries(_MOVE, "broadcast_tensors meshgrid cartesian_prod"),
    **_entries(replace(_MOVE, linear=_PAIR), "select_scatter slice_scatter diagonal_scatter"),
    **_entries(_MOVE, "expand_as view_as reshape_as"),
    "view.dtype": Operation("mix", dims=(-1,), discontinuous=True),
    # -- reductions -----------------------------------------------------------------------------------------------
    **_entries(replace(_REDUCE, linear=_FIRST), "sum mean nansum nanmean trace"),
    **_entries(
        _REDUCE,
        """amax amin aminmax linalg_vector_norm logsumexp max median min nanmedian norm prod special_logsumexp std std_mean var var_mean kthvalue linalg_matrix_norm frobenius_norm nuclear_norm""",
    ),
    **_entries(_POINTWISE, "max.other min.other"),
    **_entries(replace(_REDUCE, discontinuous=True), "all any argmax argmin count_nonzero mode"),
    # -- everything along a dim reads everything ------------------------------------------------------------------
    **_entries(
        _MIX,
        """_log_softmax _softmax log_softmax msort softmax sort special_log_softmax special_softmax topk
        fft_fft fft_ifft fft_rfft fft_irfft linalg_cross cross""",
    ),
    **_entries(replace(_MIX, discontinuous=True), "argsort"),
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
            "cdist": "x1 ...ik, x2 ...jk -> ...ij",
            "_cdist_forward": "x1 ...ik, x2 ...jk -> ...ij",
            "_euclidean_dist": "x1 ...ik, x2 ...jk -> ...ij",
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
    **_entries(Operation("transposed_convolution", linear=_WEIGHTED), "conv_transpose1d conv_transpose2d conv_transpose3d"),
    **_entries(Operation("pool", linear=_FIRST), "avg_pool1d avg_pool2d avg_pool3d"),
    **_entries(
        Operation("pool"),
        """max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices""",
    ),
    **_entries(
        Operation("adaptive_pool", linear=_FIRST),
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d",
    ),
    **_entries(Operation("adaptive_pool"), "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"),
    **_entries(
        Operation("resize", linear=_FIRST),
        """upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa
        _upsample_bicubic2d_aa""",
    ),
    # -- indexing -------------------------------------------------------------------------------------------------
    **_entries(Operation("index", linear=_FIRST), "index _unsafe_index"),
    **_entries(Operation("gather", linear=_FIRST), "gather"),
    "index_select": Operation("index_select", linear=_FIRST),
    "embedding": Operation("embedding", linear=_FIRST),
    "one_hot": Operation("spread", discontinuous=True),
    "view_as_real": Operation("spread"),
    "view_as_complex": Operation("reduction", dims=(-1,)),
    **_entries(Operation("scatter", linear=_positions((0, 3))), "scatter scatter_add"),
    "scatter_reduce": Operation("scatter"),
    **_entries(Operation("index_write", linear=_positions((0, 3))), "index_add index_copy index_fill"),
    "index_reduce": Operation("index_write"),
    **_entries(Operation("index_put", linear=_positions((0, 2))), "index_put _unsafe_index_put"),
    # -- normalisation --------------------------------------------------------------------------------------------
    **_entries(Operation("layer_norm"), "layer_norm native_layer_norm rms_norm _fused_rms_norm"),
    **_entries(
        Operation("batch_norm", impure=True),
        "batch_norm native_batch_norm cudnn_batch_norm _native_batch_norm_legit instance_norm",
    ),
    **_entries(Operation("batch_norm"), "_native_batch_norm_legit_functional _native_batch_norm_legit_no_training"),
    **_entries(Operation("group_norm"), "group_norm native_group_norm"),
    # -- layers ---------------------------------------------------------------------------------------------------
    **_entries(Operation("recurrent", random=True), "gru lstm rnn_tanh rnn_relu"),
    **_entries(Operation("cell"), "gru_cell lstm_cell rnn_tanh_cell rnn_relu_cell"),
    **_entries(
        Operation("attention", random=True),
        """scaled_dot_product_attention _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention
        _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math""",
    ),
    # -- linear algebra on the last two dims ----------------------------------------------------------------------
    **_entries(
        Operation("matrix"),
        """cholesky cholesky_inverse cholesky_solve det inverse linalg_cholesky linalg_cholesky_ex linalg_det linalg_eig
        linalg_eigh linalg_eigvalsh linalg_inv linalg_inv_ex linalg_lu linalg_matrix_exp
        linalg_matrix_power linalg_pinv linalg_qr linalg_slogdet linalg_solve_triangular linalg_svd
        linalg_svdvals logdet lu_unpack matrix_exp matrix_power pinverse qr slogdet svd triangular_solve
        _linalg_det _linalg_eigh _linalg_slogdet _linalg_svd""",
    ),
    **_entries(Operation("matrix", discontinuous=True), "linalg_matrix_rank"),
}  # fmt: skip
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

    A `detach` is not: nothing flows back through it. Of casts only the output's dtype is looked at.

    >>> x, w = Ref("x"), Ref("w")
    >>> f32 = TensorType(torch.float32, (3,))
    >>> product = Op(name="y", type=f32, target=torch.ops.aten.mul.Tensor, args=(x, w))
    >>> is_linear(product, {x}), is_linear(product, {x, w})
    (True, False)
    """
    if node.target is operator.getitem:
        return True
    op = lookup(node.target)
    if op is None or op.random or op.discontinuous:
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


def _is_guard(node: Op) -> bool:
    op = lookup(node.target)
    return op is not None and op.guard


def is_random(node: Op) -> bool:
    """Does it draw noise? (Also by torch's own tag, for operators outside the table.)"""
    op = lookup(node.target)
    return (op is not None and op.random) or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


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
