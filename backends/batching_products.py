"""Batching rules of linear algebra: sample dims are batch dims of the product."""

from __future__ import annotations

import string
from dataclasses import replace
from typing import Any

import torch

from scg.backends.batching_call import Call, NoRule, Rules


def _linear(call: Call) -> Any:
    x, weight, bias = *call.args[:2], call.arg(2, "bias")
    if not weight.dims and (bias is None or not bias.dims):
        return call.as_is()
    if x.ndim == 0 or weight.ndim == 1:
        raise NoRule
    ndim = max(x.ndim, 2)
    out = torch.matmul(call.batched(x, ndim), call.batched(weight, ndim).transpose(-1, -2))
    if bias is not None:
        out = out + call.batched(bias, ndim)
    return out if x.ndim > 1 else out.squeeze(-2)


def _matmul(call: Call) -> Any:
    a, b = call.args
    ndim = max(a.ndim, b.ndim, 2)
    right = call.batched(b, ndim) if b.ndim > 1 else call.batched(b, ndim - 1).unsqueeze(-1)
    out = torch.matmul(call.batched(a, ndim), right)
    if a.ndim == 1:
        out = out.squeeze(-2)
    return out if b.ndim > 1 else out.squeeze(-1)


def _addmm(call: Call) -> Any:
    if call.kwargs or len(call.args) > 3:
        raise NoRule
    bias, a, b = call.args
    return _matmul(replace(call, args=(a, b))) + call.tensor(bias, max(a.ndim, b.ndim))


def _dot(call: Call) -> Any:
    a, b = call.args
    if a.ndim != 1 or b.ndim != 1:
        raise NoRule
    left = call.batched(a)
    if call.name == "vdot" and left.is_complex():
        left = left.conj()
    return torch.sum(left * call.batched(b), -1)


def _einsum(call: Call) -> Any:
    equation, operands = call.args[:2]
    if "." in equation or "->" not in equation:
        raise NoRule
    inputs, output = equation.replace(" ", "").split("->")
    free = [letter for letter in string.ascii_uppercase + string.ascii_lowercase if letter not in equation]
    letter = dict(zip(call.union, free, strict=False))
    terms = ["".join(letter[d] for d in x.dims) + term for x, term in zip(operands, inputs.split(","), strict=True)]
    lead = "".join(letter[d] for d in call.union)
    return torch.einsum(",".join(terms) + "->" + lead + output, *(x.tensor for x in operands))


PRODUCTS: Rules = (
    ("linear", _linear),
    ("matmul mm bmm mv", _matmul),
    ("addmm baddbmm", _addmm),
    ("dot vdot inner", _dot),
    ("einsum", _einsum),
    ("tril triu cholesky linalg_cholesky linalg_solve_triangular linalg_inv inverse logdet det", Call.broadcast),
    ("cholesky_solve cholesky_inverse linalg_det linalg_slogdet slogdet", Call.broadcast),
)
