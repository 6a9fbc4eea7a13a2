"""One parameter's bias with its confidence interval, and what is to be thought of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from scg.measure.draws import Moments
from scg.measure.reference import Reference

OK, BIASED, MEASURED, UNSURE = "ok", "BIASED", "biased, as declared", "too noisy"


@dataclass(frozen=True)
class ParameterCheck:
    """The element of one parameter whose bias stands out most; the interval holds for all elements at once."""

    name: str
    gradient: float
    """Largest element of the true gradient."""
    index: tuple[int, ...]
    bias: float
    half_width: float
    """Of the confidence interval of the bias."""
    error: float
    """Standard error of the bias."""
    scale: float | None
    """Where the whole estimate is a multiple of the true gradient, up to noise, that multiple."""
    verdict: str
    """"ok", "BIASED", "biased, as declared" or "too noisy" (the interval is wider than the gradient)."""


@dataclass(frozen=True)
class Judge:
    """The rule by which a bias is called one."""

    confidence: float
    """That no unbiased estimator is called biased, all elements of all parameters taken together."""
    tolerance: float
    """A bias below this share of the parameter's largest gradient is none."""
    declared: bool = False
    """Whether a site's estimator says that it is biased."""

    def __call__(self, moments: Moments, reference: Reference) -> tuple[ParameterCheck, ...]:
        known = {name: ~gradient.isnan() for name, gradient in reference.gradient.items()}
        tests = max(1, sum(int(mask.sum()) for mask in known.values()))
        quantile = NormalDist().inv_cdf(1 - (1 - self.confidence) / (2 * tests))
        scale = max((_largest(g[known[name]]) for name, g in reference.gradient.items()), default=0.0)
        errors, variance = moments.error(), moments.variance()
        found = []
        for name, gradient in reference.gradient.items():
            if not bool(known[name].any()):
                continue
            mean = torch.where(known[name], moments.mean[name], torch.nan)
            error = (errors[name] ** 2 + reference.error[name] ** 2).sqrt()
            dust = 1e-5 * (scale + _largest(variance[name].sqrt()))  # rounding in float32
            allowed = self.tolerance * _largest(gradient[known[name]]) + dust
            found.append(self._judge(name, gradient, mean, error, quantile, allowed))
        return tuple(found)

    def _judge(
        self, name: str, gradient: Tensor, mean: Tensor, error: Tensor, quantile: float, allowed: float
    ) -> ParameterCheck:
        bias = mean - gradient
        excess = (bias.abs() - allowed).nan_to_num(nan=-torch.inf)
        beyond = torch.where(excess > 0, excess / error.clamp_min(1e-300), 0.0)
        worst = int(beyond.argmax()) if bool((beyond > 0).any()) else int(excess.argmax())
        largest = _largest(gradient[~gradient.isnan()])
        half_width = quantile * float(error.view(-1)[worst])
        verdict = OK
        if float(beyond.view(-1)[worst]) > quantile:
            verdict = MEASURED if self.declared else BIASED
        elif half_width > largest > allowed:
            verdict = UNSURE
        return ParameterCheck(
            name=name,
            gradient=largest,
            index=tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), gradient.shape)),
            bias=float(bias.view(-1)[worst]),
            half_width=half_width,
            error=float(error.view(-1)[worst]),
            scale=_multiple(gradient, mean, error, quantile),
            verdict=verdict,
        )


def _multiple(gradient: Tensor, mean: Tensor, error: Tensor, quantile: float) -> float | None:
    """The factor between the estimate and the gradient, if the rest is noise and the factor is known to a tenth."""
    known = ~gradient.isnan()
    truth, found, noise = gradient[known], mean[known], error[known]
    power = float(truth @ truth)
    if power == 0 or float((truth * noise).norm()) * 3 > 0.1 * power:
        return None
    factor = float(truth @ found) / power
    rest = (found - factor * truth).abs()
    return factor if bool((rest <= quantile * noise + 0.01 * truth.abs().max()).all()) else None


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def failed(checks: tuple[ParameterCheck, ...]) -> Mapping[str, ParameterCheck]:
    """Those that are biased and should not be."""
    return {check.name: check for check in checks if check.verdict == BIASED}
