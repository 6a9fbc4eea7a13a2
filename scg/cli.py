"""The command line: look at a model of a file without writing a script.

    scg render vae.py:model --output vae.svg
    scg explain vae.py:VAE --estimator disarm --samples 2

``FILE.py:NAME`` names a module, a class of modules that needs no arguments, a function, or a compiled module. A model
with arguments is called with those of ``example_inputs()`` or ``INPUTS`` of the same file.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from scg.errors import ScgError

FAILED = 1
"""Exit code where the model cannot be compiled; 2 is for a wrong command line, as in every program."""
USAGE = 2


class UsageError(Exception):
    """A mistake in what was typed, or in the file it names."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except UsageError as error:
        print(f"scg: {error}", file=sys.stderr)
        return USAGE
    except (ScgError, ValueError, OSError) as error:
        print(f"scg: {error}", file=sys.stderr)
        return FAILED
    return 0


# -- commands -------------------------------------------------------------------------------------------------------
def render(arguments: argparse.Namespace) -> None:
    """Draws the model to a file."""
    target = arguments.output or Path(_split(arguments.model)[0]).with_suffix(".svg").name
    print(_compiled(arguments).render(target, view=arguments.view, fold=not arguments.unfold))


def explain(arguments: argparse.Namespace) -> None:
    """What was decided for every site, and why."""
    report = _compiled(arguments).explain()
    _write(report.to_markdown() if arguments.markdown else f"{report}\n", arguments.output)


def formula(arguments: argparse.Namespace) -> None:
    """LaTeX of the objective, the gradient estimates and the surrogate."""
    _write(f"{_compiled(arguments).formula()}\n", arguments.output)


def code(arguments: argparse.Namespace) -> None:
    """The generated Python code."""
    _write(_compiled(arguments).code, arguments.output)


def passes(arguments: argparse.Namespace) -> None:
    """What each pass changed in the graph, as a diff of its text form."""
    from scg.debug import diff
    from scg.estimators import get_estimator
    from scg.passes import InsertEstimators, pipeline
    from scg.pipeline import trace

    model, inputs = load(arguments.model)
    graph = trace(getattr(model, "_callable", model), *inputs)
    insert = InsertEstimators(default=get_estimator(arguments.estimator) or "auto", samples=arguments.samples)
    texts = [str(graph)]
    for name, rewrite in pipeline(insert, "element"):
        before, graph = graph, rewrite(graph)
        texts.append(diff(before, graph, name) or f"{name}: nothing changed")
    _write("\n\n".join(texts) + "\n", arguments.output)


def estimators(arguments: argparse.Namespace) -> None:
    """The table of all estimators."""
    from scg.estimators.docs import table

    _write(table() + "\n", arguments.output)


# -- the model ------------------------------------------------------------------------------------------------------
def load(spec: str) -> tuple[Any, tuple[Any, ...]]:
    """The model that ``FILE.py:NAME`` names, and the arguments to call it with."""
    path, name = _split(spec)
    module = _import(Path(path))
    if not hasattr(module, name):
        from scg.estimators.lookup import near_miss

        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UsageError(f"{path}: {near_miss('name', name, known)}")
    model = getattr(module, name)
    if inspect.isclass(model):
        try:
            model = model()
        except TypeError as error:
            raise UsageError(f"{path}: {name} is a class that needs arguments ({error}); name an instance") from error
    if not callable(model):
        raise UsageError(f"{path}: {name} is of type {type(model).__name__}; name a module or a function")
    return model, _inputs(module, path)


def _split(spec: str) -> tuple[str, str]:
    path, colon, name = spec.rpartition(":")
    if not colon or not name.isidentifier():
        raise UsageError(f"{spec!r} must be FILE.py:NAME, as in vae.py:model")
    return path, name


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UsageError(f"{path}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # so that classes find the module they name
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        raise UsageError(f"{path}: {type(error).__name__} at {where}: {error}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module


def _inputs(module: ModuleType, path: str) -> tuple[Any, ...]:
    found = module.example_inputs() if hasattr(module, "example_inputs") else getattr(module, "INPUTS", ())
    if isinstance(found, torch.Tensor):
        return (found,)
    if not isinstance(found, (tuple, list)):
        raise UsageError(f"{path}: the example inputs are a {type(found).__name__}; give a tuple of arguments")
    return tuple(found)


def _compiled(arguments: argparse.Namespace) -> Any:
    from scg.pipeline import CompiledModule, compile

    model, inputs = load(arguments.model)
    own = model if isinstance(model, CompiledModule) else None
    if own is None:
        own = compile(model, estimator=arguments.estimator, samples=arguments.samples)
    elif (arguments.estimator, arguments.samples) != ("auto", 1):
        raise UsageError(f"{arguments.model} is compiled already; its estimator and samples are set in the file")
    try:
        own._bound(inputs, {})
    except TypeError as error:
        path = _split(arguments.model)[0]
        raise UsageError(
            f"{arguments.model} cannot be called with its example inputs: {error}; define example_inputs() or INPUTS "
            f"in {path}"
        ) from error
    return own


def _write(text: str, output: str | None) -> None:
    if output is None:
        print(text, end="")
    else:
        Path(output).write_text(text, encoding="utf-8")
        print(output)


# -- arguments ------------------------------------------------------------------------------------------------------
def _parser() -> argparse.ArgumentParser:
    from scg.backends.pictures import SUFFIXES
    from scg.backends.views import VIEWS

    parser = argparse.ArgumentParser(prog="scg", description="Look at what scg makes of a model.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    made: dict[str, argparse.ArgumentParser] = {}
    for command in (render, explain, formula, code, passes, estimators):
        made[command.__name__] = _command(commands, command)
    for name, sub in made.items():
        if name == "estimators":
            continue
        sub.add_argument("model", metavar="FILE.py:NAME", help="a module, a class of modules, or a function")
        sub.add_argument("--estimator", default="auto", help="for every site: a name of `scg estimators`")
        sub.add_argument("--samples", type=int, default=1, metavar="K", help="draws of the whole program")
    made["render"].add_argument("--view", default="stochastic", choices=[view for view in VIEWS if view != "variance"])
    made["render"].add_argument("--unfold", action="store_true", help="draw repeated structure one by one")
    made["explain"].add_argument("--markdown", action="store_true", help="as Markdown")
    for name, sub in made.items():
        what = f"a file that ends in {', '.join(SUFFIXES)}" if name == "render" else "a file instead of the screen"
        sub.add_argument("--output", "-o", metavar="PATH", help=what)
    return parser


def _command(commands: Any, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    what = (run.__doc__ or "").rstrip(".")
    sub: argparse.ArgumentParser = commands.add_parser(run.__name__, help=what, description=run.__doc__)
    sub.set_defaults(command=run)
    return sub


if __name__ == "__main__":
    sys.exit(main())
