"""Where in the user's source a node comes from: its line, its module, and the variable its value is assigned to."""

from __future__ import annotations

import ast
import functools
import itertools
import linecache
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType, TracebackType
from typing import Any

import torch

_STDLIB = os.path.dirname(os.__file__) + os.sep
_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_INSTALLED = tuple({path + os.sep for path in map(sysconfig.get_path, ("purelib", "platlib"))})

_SAME_VALUE = frozenset(
    "float double half bfloat16 long int bool to type type_as view reshape flatten detach clone contiguous squeeze "
    "unsqueeze expand expand_as transpose permute requires_grad_".split()
)
"""Methods after which the variable still names the draw: ``z = q.sample().float()``."""


@functools.cache
def is_users_file(filename: str) -> bool:
    """Whether code in that file is neither scg's, nor torch's, nor the standard library's."""
    if filename.startswith("<frozen") or filename.startswith((_OURS, _TORCH)):
        return False
    return filename.startswith(_INSTALLED) or not filename.startswith(_STDLIB)


@functools.cache
def is_local_file(filename: str) -> bool:
    """Whether code in that file is the user's own, not an installed package's."""
    return is_users_file(filename) and not filename.startswith(_INSTALLED)


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def user_frame() -> FrameType | None:
    """The innermost frame of the user's own code."""
    return next((frame for frame in _frames() if is_users_file(frame.f_code.co_filename)), None)


def describe(filename: str, line: int | None) -> str:
    """``model.py:14``."""
    return f"{os.path.basename(filename)}:{line}"


def user_loc() -> str:
    """``file.py:line`` of the user's statement in progress, or an empty string."""
    frame = next((frame for frame in _frames() if is_users_file(frame.f_code.co_filename)), None)
    return describe(frame.f_code.co_filename, frame.f_lineno) if frame is not None else ""


def where(modules: Mapping[int, str]) -> tuple[str, str, str]:
    """The user's line, the path of the innermost captured module at work (``modules``: id -> path), the variable."""
    loc, scope = _line_and_scope(modules)
    return loc, scope, assigned_name(user_frame()) or ""


def _line_and_scope(modules: Mapping[int, str]) -> tuple[str, str]:
    loc: str | None = None
    for frame in _frames():
        code = frame.f_code
        if loc is None and is_users_file(code.co_filename):
            loc = describe(code.co_filename, frame.f_lineno)
        if code.co_name == "forward" or (code.co_argcount and code.co_varnames[0] == "self" and loc is not None):
            path = modules.get(id(frame.f_locals.get("self")))
            if path is not None:
                return loc or outer_loc(frame), path
    return loc or "", ""


def outer_loc(frame: FrameType | None) -> str:
    """``file.py:line`` of the innermost user's frame from ``frame`` outwards, or an empty string."""
    while frame is not None:
        if is_users_file(frame.f_code.co_filename):
            return describe(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return ""


def traceback_loc(traceback: TracebackType | None) -> str:
    """``file.py:line`` of the innermost user frame an exception passed through."""
    found = ""
    while traceback is not None:
        filename = traceback.tb_frame.f_code.co_filename
        if is_users_file(filename):
            found = describe(filename, traceback.tb_lineno)
        traceback = traceback.tb_next
    return found


def name_of(value: Any, frame: FrameType | None) -> str | None:
    """The local variable of ``frame`` that holds this very object."""
    if frame is None:
        return None
    return next((name for name, local in frame.f_locals.items() if local is value and name.isidentifier()), None)


def assigned_name(frame: FrameType | None) -> str | None:
    """The variable that the call or operator in progress in ``frame`` is assigned to.

    ``z = q.sample()``, ``self.z = …``, ``z, w = q.sample(), p.sample()``, ``z[t] = q.sample().float()`` and
    ``zs = [q.sample() for q in qs]`` have one; a value inside a larger expression has none. What a helper returns
    is named where the helper was called.
    """
    while frame is not None and is_users_file(frame.f_code.co_filename):
        statement, target = _target(frame)
        if target is not None:
            return target
        if not isinstance(statement, (ast.Return, ast.Lambda)):
            return None
        frame = frame.f_back
        while frame is not None and not is_users_file(frame.f_code.co_filename):
            if frame.f_code.co_filename.startswith(_OURS):
                return None  # from here on it is the caller of the compiled module
            frame = frame.f_back
    return None


def _target(frame: FrameType) -> tuple[ast.AST | None, str | None]:
    """The statement that uses the value in the making unchanged, and the name it gives to it."""
    return _target_at(frame.f_code, frame.f_lasti)


@functools.lru_cache(maxsize=4096)  # a traced loop asks the same again and again
def _target_at(code: CodeType, instruction: int) -> tuple[ast.AST | None, str | None]:
    line, end_line, column, end_column = next(itertools.islice(code.co_positions(), instruction // 2, None))
    parents, made_at = _parsed("".join(linecache.getlines(code.co_filename)))
    node = made_at.get((line, column, end_line, end_column)) or made_at.get((end_line, end_column))
    while node is not None:
        parent = parents.get(node)
        if isinstance(parent, ast.Attribute) and parent.attr in _SAME_VALUE:
            call = parents.get(parent)
            if not (isinstance(call, ast.Call) and call.func is parent):
                return None, None
            node = call
        elif isinstance(parent, (ast.ListComp, ast.GeneratorExp, ast.List, ast.IfExp)):
            node = parent
        elif isinstance(parent, (ast.Return, ast.Lambda)):
            return parent, None
        elif isinstance(parent, ast.Assign):
            return parent, _name(parent.targets[0])
        elif isinstance(parent, (ast.AnnAssign, ast.NamedExpr)):
            return parent, _name(parent.target)
        elif isinstance(parent, ast.Tuple):
            return parent, _name(_unpacked(parent, node, parents.get(parent)))
        else:
            return parent, None
    return None, None


def _unpacked(values: ast.Tuple, value: ast.AST, statement: ast.AST | None) -> ast.AST | None:
    """The target that takes ``value`` in ``a, b = value, other``."""
    if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], (ast.Tuple, ast.List)):
        return None
    targets = statement.targets[0].elts
    if len(targets) != len(values.elts) or any(isinstance(target, ast.Starred) for target in targets):
        return None
    return next(target for target, candidate in zip(targets, values.elts, strict=True) if candidate is value)


def _name(target: ast.AST | None) -> str | None:
    while isinstance(target, ast.Subscript):  # z[t] = …
        target = target.value
    if isinstance(target, ast.Name):
        return target.id
    return target.attr if isinstance(target, ast.Attribute) else None


@functools.lru_cache(maxsize=64)
def _parsed(source: str) -> tuple[dict[ast.AST, ast.AST], dict[tuple[int | None, ...], ast.AST]]:
    """Of a source file: each syntax node's parent; calls by where they end, operators by where they start and end."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return {}, {}
    nodes = list(ast.walk(tree))
    parents = {child: node for node in nodes for child in ast.iter_child_nodes(node)}
    made_at: dict[tuple[int | None, ...], ast.AST] = {}
    for node in nodes:
        if isinstance(node, ast.Call):  # where the instruction of a method's call starts differs between versions
            made_at[node.end_lineno, node.end_col_offset] = node
        elif isinstance(node, (ast.BinOp, ast.UnaryOp, ast.Compare, ast.Subscript)):
            made_at[node.lineno, node.col_offset, node.end_lineno, node.end_col_offset] = node
    return parents, made_at
