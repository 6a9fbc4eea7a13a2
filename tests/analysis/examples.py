"""Calls of every operation of the table: written out where its arguments need care, else made from its schema."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scg.ir import Graph, Input, Node, Op, Param, Ref
from tests.analysis.tools import run, type_of

ATEN = torch.ops.aten


@dataclass(frozen=True)
class Example:
    graph: Graph
    inputs: dict[str, Tensor]

    @property
    def op(self) -> Op:
        node = self.graph.nodes["y"]
        assert isinstance(node, Op)
        return node


def floats(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))) * 0.8 + 0.1


def ints(*shape: int, high: int = 3) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(sum(shape) + 1))


def flags(*shape: int) -> Tensor:
    return ints(*shape, high=2).bool()


def square(n: int = 3, batch: int = 2) -> Tensor:
    """Well-conditioned symmetric matrices."""
    x = floats(batch, n, n)
    return x @ x.mT + 2 * torch.eye(n, dtype=torch.float64)


def example(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, known: bool = False) -> Example:
    """One call as a graph; its tensors are inputs, but integers and masks are constants if ``known``."""
    nodes: dict[str, Node] = {}
    inputs: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}

    def lift(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            if known and not tree.dtype.is_floating_point and not tree.dtype.is_complex:
                name = Ref(f"c{len(constants)}")
                constants[name] = tree
                nodes[name] = Param(name=name, type=type_of(tree), path=name, role="constant")
            else:
                name = Ref(f"x{len(inputs)}")
                inputs[name] = tree
                nodes[name] = Input(name=name, type=type_of(tree), path=name, position=len(inputs))
            return name
        if isinstance(tree, tuple | list):
            return type(tree)(map(lift, tree))
        return tree

    op = Op(name="y", target=target, args=lift(args), kwargs={k: lift(v) for k, v in (kwargs or {}).items()})
    value = run(op, {**inputs, **constants})
    nodes["y"] = Op(name="y", type=type_of(value), target=target, args=op.args, kwargs=op.kwargs)
    if isinstance(value, tuple | list):
        for i, item in enumerate(value):
            if isinstance(item, Tensor):
                getter = Op(name=f"y{i}", type=type_of(item), target=operator.getitem, args=(Ref("y"), i))
                nodes[getter.name] = getter
    return Example(Graph("one", nodes, Ref("y"), Ref("y"), constants), inputs)


x, v, cube = floats(4, 3), floats(4), floats(2, 3, 4)
m, image, line = square(), floats(2, 4, 5, 5), floats(2, 4, 6)
gru = [floats(12, 3), floats(12, 4), floats(12), floats(12)]  # gates x features
lstm = [floats(12, 3), floats(12, 3), floats(12), floats(12)]

CALLS: dict[str, list[tuple[str, tuple[Any, ...]]]] = {
    "view.dtype": [("", (floats(3, 4), torch.int64))],
    "max.other": [("", (x, floats(3)))],
    "min.other": [("", (x, floats(3)))],
    "where": [("self", (flags(4, 3), x, floats(3)))],
    "masked_fill": [("Tensor", (x, flags(4, 3), floats())), ("Scalar", (x, flags(4, 1), 0.5))],
    "masked_select": [],
    "repeat_interleave": [("self_int", (x, 2, 0)), ("self_int", (x, 2))],
    "repeat": [("", (x, [2, 1, 2]))],
    "tile": [("", (x, [2, 2]))],
    "roll": [("", (x, [1], [0])), ("", (x, [2])), ("", (x, [1, -1], [0, 1]))],
    "flip": [("", (x, [0])), ("", (x, [0, 1]))],
    "rot90": [("", (x, 1, [0, 1]))],
    "pad": [
        ("", (x, [1, 2])),
        ("", (line, [2, 1], "circular")),
        ("", (line, [1, 1], "reflect")),
        ("", (x, [1, -1, 0, 1], "constant", 7.0)),
    ],
    "constant_pad_nd": [("", (x, [1, 1, 0, 2], 3.0))],
    "_pad_circular": [("", (line, [1, 2]))],
    "reflection_pad1d": [("", (line, [1, 2]))],
    "reflection_pad2d": [("", (image, [1, 2, 0, 1]))],
    "reflection_pad3d": [("", (floats(1, 2, 3, 3, 3), [1, 1, 0, 1, 1, 0]))],
    "replication_pad1d": [("", (line, [1, 2]))],
    "replication_pad2d": [("", (image, [1, 2, 0, 1]))],
    "replication_pad3d": [("", (floats(1, 2, 2, 2, 2), [1, 1, 0, 1, 1, 0]))],
    "unfold": [("", (x, 0, 2, 1)), ("", (line, 2, 3, 2))],
    "unfold_copy": [("", (x, 0, 2, 1))],
    "im2col": [("", (floats(1, 2, 3, 3), [2, 2], [1, 1], [1, 0], [1, 1]))],
    "pixel_shuffle": [("", (image, 2))],
    "pixel_unshuffle": [("", (floats(2, 1, 4, 4), 2))],
    "channel_shuffle": [("", (image, 2))],
    "view": [("", (x, [2, 6])), ("", (x, [-1]))],
    "view_copy": [("", (x, [2, 6]))],
    "_unsafe_view": [("", (x, [2, 6]))],
    "reshape": [("", (x.t(), [4, 3])), ("", (cube, [6, 4]))],
    "expand": [("", (floats(3), [4, 3])), ("", (floats(4, 1), [4, 3]))],
    "expand_copy": [("", (floats(3), [4, 3]))],
    "broadcast_to": [("", (floats(4, 1), [4, 3]))],
    "expand_as": [("", (floats(3), x))],
    "view_as": [("", (x, floats(2, 6)))],
    "reshape_as": [("", (x, floats(2, 6)))],
    "permute": [("", (cube, [2, 0, 1]))],
    "permute_copy": [("", (cube, [2, 0, 1]))],
    "moveaxis": [("intlist", (cube, [2], [0]))],
    "movedim": [("intlist", (cube, [2], [0]))],
    "unflatten": [("int", (x, 0, [2, 2]))],
    "split_with_sizes": [("", (x, [1, 3]))],
    "split_with_sizes_copy": [("", (x, [1, 3]))],
    "unsafe_split_with_sizes": [("", (x, [1, 3]))],
    "split": [("Tensor", (x, 2)), ("sizes", (x, [1, 3]))],
    "tensor_split": [("sections", (x, 2)), ("indices", (x, [1, 2]))],
    "hsplit": [("int", (floats(4, 4), 2))],
    "vsplit": [("int", (x, 2))],
    "dsplit": [("int", (cube, 2))],
    "narrow": [("", (x, 0, 1, 2))],
    "narrow_copy": [("", (x, 0, 1, 2))],
    "slice": [("Tensor", (x, 0, 1, 4, 2))],
    "slice_copy": [("Tensor", (x, 0, 1, 4, 2))],
    "select": [("int", (x, 0, 1))],
    "select_copy": [("int", (x, 1, -1))],
    "select_scatter": [("", (x, floats(3), 0, 1))],
    "slice_scatter": [("", (x, floats(2, 3), 0, 1, 4, 2))],
    "diagonal_scatter": [("", (x, floats(3)))],
    "cat": [("", ([x, floats(2, 3)],)), ("", ([x, x + 1], 1))],
    "concat": [("", ([x, floats(2, 3)],))],
    "concatenate": [("", ([x, floats(2, 3)],))],
    "stack": [("", ([x, x + 1], 1))],
    "block_diag": [("", ([x, floats(1, 2)],))],
    "cartesian_prod": [("", ([v, floats(2)],))],
    "meshgrid": [("", ([v, floats(2)],))],
    "broadcast_tensors": [("", ([x, floats(3)],))],
    "upsample_nearest1d": [("vec", (line, [9], None))],
    "upsample_nearest2d": [("vec", (image, None, [2.0, 1.0]))],
    "upsample_nearest3d": [("vec", (floats(1, 1, 2, 2, 2), [3, 4, 2], None))],
    "upsample_linear1d": [("vec", (line, [9], False, None))],
    "upsample_bilinear2d": [("vec", (image, [3, 7], False, None))],
    "upsample_trilinear3d": [("vec", (floats(1, 2, 2, 2, 2), [3, 4, 2], False, None))],
    "upsample_bicubic2d": [("vec", (image, [7, 3], False, None))],
    "_upsample_bilinear2d_aa": [("vec", (image, [3, 2], False, None))],
    "_upsample_bicubic2d_aa": [("vec", (image, [3, 2], False, None))],
    "conv1d": [
        ("", (line, floats(6, 2, 3), floats(6), [2], [1], [1], 2)),
        ("padding", (line, floats(2, 4, 3), None, [1], "same", [2])),
    ],
    "conv2d": [
        ("", (image, floats(2, 4, 3, 2), floats(2), [2, 1], [1, 0], [1, 2])),
        ("", (image[0], floats(2, 4, 3, 2))),
    ],
    "conv3d": [("", (floats(1, 2, 3, 3, 3), floats(2, 2, 2, 2, 2), None, [1, 1, 1], [1, 0, 0]))],
    "convolution": [
        ("", (line, floats(6, 2, 3), floats(6), [2], [1], [1], False, [0], 2)),
        ("", (line, floats(4, 3, 3), floats(3), [2], [1], [1], True, [1], 1)),
    ],
    "conv_transpose1d": [
        ("", (line, floats(4, 2, 3), floats(4), [2], [1], [1], 2, [2])),
        ("", (line, floats(4, 2, 2))),
    ],
    "conv_transpose2d": [("input", (floats(1, 2, 3, 3), floats(2, 2, 2, 3), None, [2, 1], [1, 0]))],
    "conv_transpose3d": [("input", (floats(1, 1, 2, 2, 2), floats(1, 2, 2, 2, 2), None, [2, 1, 1]))],
    **{
        f"{kind}_pool{n}d{tail}": [
            ("", (floats(2, 1, *[5] * n), [2] * n, [2] * n, [1] * n)),
            ("", (floats(2, 1, *[5] * n), [3] * n)),
        ]
        for kind, n, tail in [
            ("avg", 1, ""),
            ("max", 1, ""),
            ("avg", 2, ""),
            ("max", 2, ""),
            ("max", 1, "_with_indices"),
            ("max", 2, "_with_indices"),
        ]
    },
    **{
        name: [("", (floats(1, 1, 3, 3, 3), [2, 2, 2], [1, 1, 1], [1, 0, 1]))]
        for name in ("avg_pool3d", "max_pool3d", "max_pool3d_with_indices")
    },
    **{
        f"{kind}_pool{n}d": [("", (floats(2, 2, *[5, 4, 3][:n]), [3, 3, 2][:n]))]
        for kind in ("adaptive_avg", "adaptive_max", "_adaptive_avg")
        for n in (1, 2, 3)
        if (kind, n) != ("_adaptive_avg", 1)
    },
    "index": [
        ("Tensor", (x, [ints(2), ints(2)])),
        ("Tensor", (x, [None, ints(2)])),
        ("Tensor", (cube, [ints(2, high=2), None, ints(2)])),
        ("Tensor", (cube, [ints(5, 1, high=2), ints(2)])),
    ],
    "_unsafe_index": [("Tensor", (x, [ints(2), ints(2)]))],
    "index_put": [
        ("", (x, [ints(2), ints(2)], floats(2))),
        ("", (x, [ints(2), ints(2)], floats(2), True)),
        ("", (x, [None, ints(2)], floats(4, 2), True)),
    ],
    "_unsafe_index_put": [("", (x, [ints(2), ints(2)], floats(2)))],
    "gather": [("", (x, 0, ints(2, 3))), ("", (x, 1, ints(4, 2)))],
    "index_select": [("", (x, 0, ints(5))), ("", (x, 1, ints(2)))],
    "take_along_dim": [("", (x, ints(4, 2), 1))],
    "take": [("", (x, ints(2)))],
    "embedding": [("", (x, ints(2, 5)))],
    "one_hot": [("", (ints(4), 3))],
    "scatter": [
        ("src", (x, 0, torch.tensor([[1, 2, 0], [0, 1, 1]]), floats(2, 3))),
        ("value", (x, 1, torch.tensor([[1], [0]]), 0.5)),
    ],
    "scatter_add": [("", (x, 0, ints(2, 3), floats(2, 3))), ("", (x, 1, ints(3, 2), floats(4, 3)))],
    "scatter_reduce": [("two", (x, 0, ints(2, 3), floats(2, 3), "amax"))],
    "index_add": [("", (x, 0, ints(5), floats(5, 3)))],
    "index_copy": [("", (x, 0, torch.tensor([2, 0]), floats(2, 3)))],
    "index_fill": [("int_Tensor", (x, 0, ints(2), floats())), ("int_Scalar", (x, 0, ints(2), 0.5))],
    "index_reduce": [("", (x, 0, ints(5), floats(5, 3), "amax"))],
    "bucketize": [("Tensor", (x, v.sort().values))],
    "searchsorted": [("Tensor", (v.sort().values, x)), ("Tensor", (x.sort().values, floats(4, 2)))],
    "layer_norm": [("", (x, [3], floats(3), floats(3))), ("", (cube, [3, 4]))],
    "native_layer_norm": [("", (x, [3], floats(3), floats(3), 1e-5))],
    "rms_norm": [("", (x, [3], floats(3)))],
    "_fused_rms_norm": [("", (x, [3], floats(3), 1e-5))],
    "batch_norm": [
        ("", (line, floats(4), floats(4), None, None, True, 0.1, 1e-5, False)),
        ("", (x, floats(3), floats(3), floats(3), floats(3), False, 0.1, 1e-5, False)),
    ],
    "native_batch_norm": [("", (x, floats(3), floats(3), floats(3), floats(3), False, 0.1, 1e-5))],
    "_native_batch_norm_legit": [("no_stats", (line, floats(4), floats(4), True, 0.1, 1e-5))],
    "_native_batch_norm_legit_functional": [("", (x, floats(3), floats(3), floats(3), floats(3), True, 0.1, 1e-5))],
    "_native_batch_norm_legit_no_training": [("", (x, floats(3), floats(3), floats(3), floats(3), 0.1, 1e-5))],
    "cudnn_batch_norm": [],
    "instance_norm": [("", (line, floats(4), floats(4), None, None, True, 0.1, 1e-5, False))],
    "group_norm": [("", (line, 2, floats(4), floats(4)))],
    "native_group_norm": [("", (line, floats(4), floats(4), 2, 4, 6, 2, 1e-5))],
    "gru": [
        ("input", (floats(5, 2, 3), floats(1, 2, 4), gru, True, 1, 0.0, False, False, False)),
        ("input", (floats(2, 3, 3), floats(2, 2, 4), [*gru, *gru], True, 1, 0.0, False, True, True)),
    ],
    "lstm": [("input", (floats(3, 2, 3), [floats(1, 2, 3), floats(1, 2, 3)], lstm, True, 1, 0.0, False, False, False))],
    "rnn_tanh": [
        (
            "input",
            (floats(3, 2, 3), floats(1, 2, 4), [floats(4, 3), floats(4, 4), v, v], True, 1, 0.0, False, False, False),
        )
    ],
    "rnn_relu": [
        (
            "input",
            (floats(3, 2, 3), floats(1, 2, 4), [floats(4, 3), floats(4, 4), v, v], True, 1, 0.0, False, False, False),
        )
    ],
    "gru_cell": [("", (floats(2, 3), floats(2, 4), *gru))],
    "lstm_cell": [("", (floats(2, 3), [floats(2, 3), floats(2, 3)], *lstm))],
    "rnn_tanh_cell": [("", (floats(2, 3), floats(2, 4), floats(4, 3), floats(4, 4), v, v))],
    "rnn_relu_cell": [("", (floats(2, 3), floats(2, 4), floats(4, 3), floats(4, 4), v, v))],
    "scaled_dot_product_attention": [
        ("", (cube, floats(2, 5, 4), floats(2, 5, 2), floats(3, 5))),
        ("", (cube, cube + 1, cube * 2, None, 0.0, True)),
    ],
    "_scaled_dot_product_attention_math": [("", (cube, floats(2, 5, 4), floats(2, 5, 2), floats(3, 5)))],
    "_scaled_dot_product_flash_attention_for_cpu": [("", (cube[None], cube[None] + 1, cube[None] * 2))],
    "_scaled_dot_product_flash_attention": [],
    "_scaled_dot_product_efficient_attention": [],
    "mv": [("", (x, floats(3)))],
    "dot": [("", (v, v + 1))],
    "vdot": [("", (v, v + 1))],
    "inner": [("", (x, floats(2, 3)))],
    "outer": [("", (v, floats(3)))],
    "ger": [("", (v, floats(3)))],
    "mm": [("", (x, floats(3, 2)))],
    "bmm": [("", (cube, floats(2, 4, 2)))],
    "matmul": [
        ("", (x, floats(3, 2))),
        ("", (cube, v)),
        ("", (floats(3), floats(2, 3, 2))),
        ("", (cube, floats(4, 2))),
        ("", (v, v + 1)),
        ("", (floats(2, 1, 3, 4), floats(5, 4, 2))),
    ],
    "tensordot": [("", (cube, floats(4, 3, 2), [1, 2], [1, 0]))],
    "linalg_vecdot": [("", (x, x + 1))],
    "cdist": [("", (cube, floats(2, 2, 4)))],
    "_cdist_forward": [("", (cube, floats(2, 2, 4), 2.0, None))],
    "_euclidean_dist": [("", (x, floats(2, 3)))],
    "prelu": [("", (line, floats(4))), ("", (x, floats(1)))],
    "addmm": [("", (floats(2), x, floats(3, 2)))],
    "addbmm": [("", (floats(2), cube, floats(2, 4, 2)))],
    "baddbmm": [("", (floats(3, 2), cube, floats(2, 4, 2)))],
    "addmv": [("", (v, x, floats(3)))],
    "addr": [("", (x, v, floats(3)))],
    "linear": [("", (cube, floats(5, 4), floats(5)))],
    "bilinear": [("", (x, floats(4, 2), floats(5, 3, 2), floats(5)))],
    "einsum": [
        ("", ("ij,jk->ki", [x, floats(3, 2)])),
        ("", ("...i,...i->...", [cube, v])),
        ("", ("ii->i", [floats(3, 3)])),
        ("", ("bi,bj", [x, floats(4, 2)])),
    ],
    "chain_matmul": [("", ([x, floats(3, 2), floats(2, 2)],))],
    "linalg_multi_dot": [("", ([x, floats(3, 2), floats(2, 2)],))],
    "kron": [("", (floats(2, 3), floats(2, 2))), ("", (floats(3), floats(2, 2)))],
    "lu_unpack": [],
    "cholesky_solve": [("", (floats(2, 3, 2), torch.linalg.cholesky(m)))],
    "triangular_solve": [("", (floats(2, 3, 2), m.tril()))],
    "linalg_solve_triangular": [],
    "linalg_solve": [("", (m, floats(2, 3, 2))), ("", (m, floats(2, 3)))],
    "_linalg_solve_ex": [("", (m, floats(2, 3, 2)))],
    "linalg_solve_ex": [("", (m, floats(2, 3, 2)))],
    "linalg_tensorsolve": [("", (floats(2, 3, 6) + torch.eye(6).reshape(2, 3, 6), floats(2, 3)))],
    "linalg_lstsq": [("", (m, floats(2, 3, 2)))],
    "linalg_lu_solve": [],
    "cross": [("", (x, x + v[:, None], 1))],
    "linalg_cross": [("", (x, x + v[:, None]))],
    "renorm": [("", (x, 2.0, 0, 0.5))],
    "quantile": [],
    "nanquantile": [],
    "quantile.scalar": [("", (x, 0.3, 0)), ("", (x, 0.3))],
    "nanquantile.scalar": [("", (x, 0.3, 1, True))],
    "linspace": [("Tensor_Tensor", (floats(), floats() + 1, 3))],
    "logspace": [("Tensor_Tensor", (floats(), floats() + 1, 3))],
    "isin": [],
    "histc": [("", (x, 4))],
    "as_strided": [("", (x, [2, 2], [3, 2]))],
    "as_strided_copy": [("", (x, [2, 2], [3, 2]))],
    "fft_fft": [],
    "fft_ifft": [],
    "fft_fft2": [],
    "fft_ifft2": [],
    "fft_fftn": [],
    "fft_ifftn": [],
    "fft_rfft": [],
    "fft_rfft2": [],
    "fft_rfftn": [],
    "fft_ihfft": [],
    "fft_irfft": [("", (x, 6))],
    "fft_hfft": [("", (x, 6))],
    "complex": [("", (x, x + 1))],
    "view_as_complex": [("", (floats(3, 2),))],
    "view_as_real": [],
    "real": [],
    "imag": [],
    "polygamma": [("", (1, x))],
    "special_polygamma": [("", (1, x))],
    "mvlgamma": [("", (x + 2, 2))],
    "acosh": [("", (x + 1.5,))],
    "arccosh": [("", (x + 1.5,))],
    "topk": [("", (x, 2, 0))],
    "kthvalue": [("", (x, 2, 0))],
    "sort": [("", (x, 0)), ("", (x,))],
    "clamp": [("", (x, 0.2, 0.6))],
    "clip": [("Tensor", (x, floats(3) - 0.3, floats(4, 1)))],
    "linalg_matrix_norm": [("", (cube, 2)), ("", (cube, 2, [0, 1]))],
    "nuclear_norm": [("", (x,)), ("dim", (cube, [0, 1], True))],
    "frobenius_norm": [("dim", (cube, [0, 2], False))],
    "norm": [("ScalarOpt_dim", (x, 2, [0])), ("Scalar", (x, 2))],
    "linalg_vector_norm": [("", (x, 2.0, [0], True)), ("", (x,))],
    "linalg_norm": [("", (x, None, [0]))],
    "cross_entropy_loss": [("", (x, ints(4))), ("", (x, ints(4), None, 0)), ("", (x, x.softmax(1), None, 0))],
    "nll_loss": [("", (x, ints(4), floats(3), 0)), ("", (x, ints(4)))],
    "nll_loss2d": [("", (image[:, :3], ints(2, 5, 5), None, 0))],
    "nll_loss_nd": [("", (x, ints(4), None, 0))],
    "poisson_nll_loss": [("", (x, x + 1, True, False, 1e-8, 0)), ("", (x, x + 1, True, False, 1e-8, 1))],
    "ctc_loss": [],
    "multi_margin_loss": [("", (x, ints(4), 1, 1.0, None, 0))],
    "multilabel_margin_loss": [("", (x, ints(4, 3)))],
    "margin_ranking_loss": [("", (v, v.flip(0), v.round() * 2 - 1, 0.1, 0))],
    "cosine_embedding_loss": [("", (x, x.flip(0), torch.tensor([1, -1, 1, -1]), 0.1, 0))],
    "hinge_embedding_loss": [("", (x, x.flip(0).round() * 2 - 1, 1.0, 0))],
    "triplet_margin_loss": [("", (x, x.flip(0), x + 1, 1.0, 2.0, 1e-6, False, 0))],
    "grid_sampler": [("", (floats(2, 1, 3, 3), floats(2, 2, 2, 2), 0, 0, False))],
    "grid_sampler_2d": [("", (floats(2, 1, 3, 3), floats(2, 2, 2, 2), 0, 0, False))],
    "grid_sampler_3d": [("", (floats(1, 1, 2, 2, 2), floats(1, 1, 2, 2, 3), 0, 0, False))],
    "affine_grid_generator": [("", (floats(2, 2, 3), [2, 1, 2, 2], False))],
    "fold": [],
    "col2im": [("", (floats(1, 8, 4), [3, 3], [2, 2], [1, 1], [0, 0], [1, 1]))],
    "stft": [],
    "istft": [],
    "sum_to_size": [("", (x, [1, 3]))],
    "diff": [("", (x, 1, 0)), ("", (x, 2, 1))],
    "pdist": [("", (x,))],
    "trapezoid": [("dx", (x,))],
    "cumulative_trapezoid": [("dx", (x,))],
    "lerp": [("Tensor", (x, x + 1, floats(3))), ("Scalar", (x, x + 1, 0.3))],
    "dropout": [("", (x, 0.5, True)), ("", (x, 0.5, False))],
    "native_dropout": [("", (x, 0.5, True))],
    "alpha_dropout": [("", (x, 0.5, True))],
    "feature_dropout": [("", (image, 0.5, True))],
    "feature_alpha_dropout": [("", (image, 0.5, True))],
    "_fused_dropout": [],
    "normal": [("Tensor_Tensor", (x, x + 1)), ("Tensor_float", (x, 0.5))],
    "threshold_backward": [("", (x, x - 0.5, 0.0))],
    "fake_quantize_per_tensor_affine": [("", (x, 0.1, 0, 0, 10))],
    "to": [("dtype", (x, torch.float32)), ("dtype", (x, torch.int64))],
    "_to_copy": [("", (x,))],
    "convert_element_type": [],
    "glu": [("", (floats(4, 6),))],
    "linalg_pinv": [("", (m, 1e-9))],
    "matrix_power": [("", (m, 2))],
    "linalg_matrix_power": [("", (m, 2))],
}
"""Overload and arguments. No calls: it needs a device, a complex input or values that a nudge makes invalid."""

_SHAPES: list[tuple[tuple[int, ...], ...]] = [
    ((4, 3), (4, 3)),
    ((2, 3, 3), (2, 3, 3)),
    ((2, 4, 6), (2, 4, 6)),
    ((4,), (4,)),
]


def examples(name: str) -> Iterator[Example]:
    """Calls of the table's entry ``name``, each with known and with unknown indices."""
    packet, _, overload = name.partition(".")
    calls = CALLS[name] if name in CALLS else _generated(packet)
    for own, args in calls:
        target = getattr(getattr(ATEN, packet), overload or own or "default")
        for known in (False, True):
            made = example(target, args, known=known)
            if made.inputs:
                yield made
            if not _has_indices(args):
                break


def _has_indices(args: Any) -> bool:
    if isinstance(args, Tensor):
        return not args.dtype.is_floating_point
    return isinstance(args, tuple | list) and any(map(_has_indices, args))


def _generated(packet: str) -> list[tuple[str, tuple[Any, ...]]]:
    """Up to two calls whose arguments follow from the schema alone."""
    overloads = getattr(ATEN, packet).overloads()
    found: list[tuple[str, tuple[Any, ...]]] = []
    for overload in sorted(overloads, key=lambda o: ("out" in o, "Scalar" in o, "names" in o, o)):
        target = getattr(getattr(ATEN, packet), overload)
        for shapes, dim in itertools.product(_SHAPES, (0, -1)):
            args = _arguments(target._schema, shapes, dim)
            if args is None or target._schema.is_mutable or len(found) >= 2:
                continue
            try:
                made = example(target, args)
            except Exception:
                continue  # not a call of this operation
            if made.inputs:
                found.append((overload, args))
    return found


def _arguments(schema: Any, shapes: tuple[tuple[int, ...], ...], dim: int) -> tuple[Any, ...] | None:
    args: list[Any] = []
    tensors = 0
    for arg in schema.arguments:
        if arg.kwarg_only:
            continue
        kind = str(arg.type)
        if kind == "Tensor":
            integer = schema.name.startswith(("aten::bitwise", "aten::__", "aten::gcd", "aten::lcm"))
            shape = shapes[min(tensors, 1)]
            args.append(ints(*shape) + 1 if integer else floats(*shape) + (0.05 * tensors))
            tensors += 1
        elif kind == "List[Tensor]":
            args.append([floats(*shapes[0]), floats(*shapes[1]) + 1])
        elif "dim" in arg.name and kind in ("int", "Optional[int]"):
            args.append(dim)
        elif "dim" in arg.name and "List[int]" in kind:
            args.append([dim])
        elif arg.has_default_value():
            break
        elif kind in ("int", "number", "float"):
            args.append(1 if kind == "int" else 0.5)
        elif kind == "bool":
            args.append(False)
        elif kind in ("List[int]", "Optional[List[int]]"):
            args.append([1])
        else:
            return None
    return tuple(args)
