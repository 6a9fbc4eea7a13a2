"""Plots of the variance of each estimator's gradient, for its page in the documentation.

python -m benchmarks.variance --out docs/variance

Small programs whose exact gradient is known, at several places of the parameter. One step estimates the gradient of
`_COPIES` independent copies of each place; estimators with learned parts are trained first. What an estimator that says
``unbiased`` gives is compared with the exact gradient on the way.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal

import scg
from scg.backends.dot import FONT, PALETTE
from scg.estimators import ESTIMATORS, Estimator
from scg.estimators.reparam import Reparam
from scg.estimators.score_function import ScoreFunction

_COPIES = 50
"""Independent estimates of a step at each place."""
_STEPS = 20
_TRAINING = 40
"""Steps of Adam for the learned parts."""
_WEIGHTS = torch.tensor([1.0, -0.7, 0.5])
_TABLES = torch.tensor([[0.9, -0.4, 0.3, -1.1], [-0.6, 0.8, 0.1, -0.2]])
_LOGITS = torch.tensor([1.0, 0.3, -0.4, -0.9])


class Bits(nn.Module):
    """Three bits that meet in one cost; ``theta [N, 3]``, ``x [N, 1]`` their logit."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(n, 3))

    def forward(self, x: Tensor) -> Tensor:
        z = Bernoulli(logits=x + self.theta).sample()
        return ((z @ _WEIGHTS - 0.6) ** 2).sum()


class Choices(nn.Module):
    """Two draws of four categories each; ``theta [N, 2, 4]``, ``x [N, 1]`` how far the logits lie apart."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(n, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        z = Categorical(logits=x[:, :, None] * _LOGITS + self.theta).sample()
        return ((_TABLES[0][z[:, 0]] + _TABLES[1][z[:, 1]] - 0.5) ** 2).sum()


class Normals(nn.Module):
    """Three normal draws; ``theta [N, 3]``, ``x [N, 1]`` their mean."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(n, 3))

    def forward(self, x: Tensor) -> Tensor:
        z = Normal(x + self.theta, 1.0).sample()
        return ((z @ _WEIGHTS - 0.6) ** 2).sum()


class Bound(nn.Module):
    """An importance-weighted bound; ``theta [N, 1]``, ``x [N, 1]`` the mean of what draws, 0.96 the posterior's."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(n, 1))

    def forward(self, x: Tensor) -> Tensor:
        q = Normal(x + self.theta, 0.5)
        z = q.sample()
        log_weight = Normal(0.0, 1.0).log_prob(z) + Normal(z, 0.5).log_prob(torch.tensor(1.2)) - q.log_prob(z)
        return scg.multisample(-log_weight, "iwae").sum()


def _summed(program: Program) -> Tensor:
    """By summing over all outcomes.  ``[places, *event]``"""
    x = program.grid()[:, None]
    model = program.model(len(x))
    scg.compile(model, estimator="enumerate", example_inputs=(x,))(x).backward()
    assert isinstance(model.theta, nn.Parameter) and model.theta.grad is not None
    return model.theta.grad


def _quadratic(program: Program) -> Tensor:
    """``E[(w z - c)^2] = (w mu - c)^2 + w w``.  ``[places, 3]``"""
    x = program.grid()[:, None]
    return 2 * (x * _WEIGHTS.sum() - 0.6) * _WEIGHTS


@dataclass(frozen=True)
class Program:
    """A small program, and how to plot over its parameter."""

    title: str
    axis: str
    model: Callable[[int], nn.Module]
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    plain: Estimator
    """What the others are compared with."""
    exact: Callable[[Program], Tensor] | None
    samples: int = 2

    def grid(self) -> Tensor:
        return torch.linspace(self.low, self.high, 9)


_PLAIN = ScoreFunction(baseline=None)
_PERCENT = ((-4.0, "2 %"), (-2.0, "12 %"), (0.0, "50 %"), (2.0, "88 %"), (4.0, "98 %"))
PROGRAMS = {
    "bits": Program("three bits", "probability of a one", Bits, -4.0, 4.0, _PERCENT, _PLAIN, _summed),
    "choices": Program(
        "two draws of four categories", "distance of the logits", Choices, 0.0, 4.0,
        tuple((float(t), str(t)) for t in range(5)), _PLAIN, _summed,
    ),
    "normals": Program(
        "three normal draws", "mean", Normals, -2.0, 2.0, tuple((float(t), str(t)) for t in range(-2, 3)), _PLAIN,
        _quadratic,
    ),
    "bound": Program(
        "a bound of four draws", "mean of the proposal", Bound, -0.5, 2.5,
        tuple((t / 2, str(t / 2)) for t in range(-1, 6)), Reparam(), None, samples=4,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """What was measured at each place."""

    variance: tuple[float, ...]
    """Of the gradient, summed over its coordinates."""
    bias: tuple[float, ...] = ()
    """Its square, where the estimator is biased and the exact gradient known."""
    rows: str = ""
    """Evaluations of the cost a step."""


def measure(program: Program, estimator: Estimator, seed: int = 0) -> Curve | None:
    """Mean and variance of the gradient over the copies; None where the estimator does not fit.

    Raises:
        ArithmeticError: if the mean of an estimator that says ``unbiased`` is far from the exact gradient.
    """
    torch.manual_seed(seed)
    grid = program.grid()
    x = grid.repeat_interleave(_COPIES)[:, None]
    model = program.model(len(x))
    try:
        step = scg.compile(model, estimator=estimator, samples=program.samples, example_inputs=(x,))
    except scg.EstimatorError:
        return None
    if step.graph.sites["z"].estimator != estimator.name:
        return None
    if learned := list(step.estimator_parameters()):
        optimizer = torch.optim.Adam(learned, lr=0.02)
        for _ in range(_TRAINING):
            step.zero_grad()
            step(x).backward()
            optimizer.step()
    found = []
    for _ in range(_STEPS):
        model.zero_grad()
        step(x).backward()
        found.append(next(model.parameters()).grad.clone().reshape(len(grid), _COPIES, -1))  # type: ignore[union-attr]
    estimates = torch.cat(found, 1).double()  # places, estimates, coordinates
    variance, mean, n = estimates.var(1), estimates.mean(1), estimates.shape[1]
    bias: tuple[float, ...] = ()
    if program.exact is not None:
        exact = program.exact(program).flatten(1)
        distance, noise = ((mean - exact) ** 2).sum(-1), variance.sum(-1) / n
        if not estimator.unbiased:
            bias = tuple((distance - noise).clamp(min=0).tolist())
        elif bool((distance > 36 * noise + 1e-10).any()):
            raise ArithmeticError(f"{estimator.name} on {program.title}: {mean}, but the exact gradient is {exact}")
    (row,) = step.explain().rows
    return Curve(tuple(variance.sum(-1).tolist()), bias, row.rows)


# -- the picture ------------------------------------------------------------------------------------------------------
_WIDTH, _HEIGHT = 290, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 66, 44
_COLUMNS = 2
_DECADES = 6
"""The lowest value that is drawn lies so many powers of ten below the highest."""


def figure(name: str, panels: Sequence[tuple[Program, Curve, Curve]]) -> str:
    """An SVG: one panel a program, the estimator's curve over that of the plain one."""
    parts = []
    for i, (program, plain, own) in enumerate(panels):
        drawn = "".join(_panel(i % _COLUMNS * _WIDTH, name, program, plain, own))
        row = i // _COLUMNS
        parts.append(f'<g transform="translate(0,{row * _HEIGHT})">{drawn}</g>' if row else drawn)
    width, height = _WIDTH * min(len(panels), _COLUMNS), _HEIGHT * math.ceil(len(panels) / _COLUMNS)
    roles = {"ink": "ink", "muted": "muted", "own": "site line", "bias": "cost line", "rule": "cluster line"}
    style = "".join(f".{role}{{--c:{PALETTE[colour][0]}}}" for role, colour in roles.items())
    dark = "".join(f".{role}{{--c:{PALETTE[colour][1]}}}" for role, colour in roles.items())
    label = f"Variance of the gradient by {name} on {', '.join(program.title for program, _, _ in panels)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{escape(label)}" '
        f'font-family="{FONT}" font-size="11"><title>{escape(label)}</title><style>{style}'
        f"@media(prefers-color-scheme:dark){{{dark}}}text{{fill:var(--c)}}path{{fill:none;stroke:var(--c)}}</style>"
        f"{''.join(parts)}</svg>\n"
    )


def _panel(left: float, name: str, program: Program, plain: Curve, own: Curve) -> Iterator[str]:
    values = [v for curve in (plain.variance, own.variance, own.bias) for v in curve if v > 0]
    top = math.ceil(math.log10(max(values)))
    bottom = max(math.floor(math.log10(min(values))), top - _DECADES)

    def across(x: float) -> float:
        share = (x - program.low) / (program.high - program.low)
        return left + _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def down(v: float) -> float:
        share = (math.log10(max(v, 1e-30)) - bottom) / (top - bottom)
        return _HEIGHT - _BOTTOM - max(share, -0.04) * (_HEIGHT - _TOP - _BOTTOM)

    def curve(ys: Sequence[float], role: str, look: str) -> str:
        points = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in zip(program.grid().tolist(), ys, strict=True))
        return f'<path class="{role}" d="M{points}" {look}/>'

    yield f'<text class="ink" x="{left + 10}" y="16" font-weight="bold">{program.title}</text>'
    yield from _legend(left, name, program, plain, own)
    for decade in range(bottom, top + 1):
        if (top - decade) % max(1, (top - bottom) // 3) == 0:
            y = down(10.0**decade)
            yield f'<path class="rule" d="M{across(program.low):.1f},{y:.1f} {across(program.high):.1f},{y:.1f}"/>'
            power = f'10<tspan dy="-4" font-size="8">{decade}</tspan>'
            yield f'<text class="muted" x="{left + _LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{power}</text>'
    for at, text in program.ticks:
        yield f'<text class="muted" x="{across(at):.1f}" y="{_HEIGHT - 27}" text-anchor="middle">{text}</text>'
    middle = across((program.low + program.high) / 2)
    yield f'<text class="muted" x="{middle:.1f}" y="{_HEIGHT - 9}" text-anchor="middle">{program.axis}</text>'
    yield curve(plain.variance, "muted", 'stroke-width="1.5"')
    if own.bias:
        yield curve(own.bias, "bias", 'stroke-width="1.8" stroke-dasharray="2 3"')
    if any(own.variance):
        yield curve(own.variance, "own", 'stroke-width="2.4"')


def _legend(left: float, name: str, program: Program, plain: Curve, own: Curve) -> Iterator[str]:
    evaluations = f"{own.rows} evaluations" if own.rows.isdigit() else own.rows
    says = "" if any(own.variance) else ": no variance"
    entries = [
        ("own", 'stroke-width="2.4"', f"{name}, {evaluations}{says}", left + 10, 32),
        ("muted", 'stroke-width="1.5"', f"plain {program.plain.name}, {plain.rows}", left + 10, 48),
    ]
    if own.bias:
        entries.append(("bias", 'stroke-width="1.8" stroke-dasharray="2 3"', "squared bias", left + 198, 48))
    for role, look, text, x, y in entries:
        yield f'<path class="{role}" d="M{x},{y - 4} {x + 18},{y - 4}" {look}/>'
        yield f'<text class="ink" x="{x + 24}" y="{y}">{escape(text)}</text>'


def figures(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and SVG of each of these estimators that some program has a site for."""
    plain: dict[str, Curve] = {}
    for name in names:
        panels = []
        for key, program in PROGRAMS.items():
            if (own := measure(program, ESTIMATORS[name]())) is not None:
                if key not in plain:
                    plain[key] = measure(program, program.plain) or own
                panels.append((program, plain[key], own))
        if panels:
            yield name, figure(name, panels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/variance"), help="folder for the SVG files")
    parser.add_argument("--only", nargs="*", default=list(ESTIMATORS), help="names of estimators; all by default")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, drawn in figures(options.only):
        (options.out / f"{name}.svg").write_text(drawn)
        print(name)


if __name__ == "__main__":
    main()
