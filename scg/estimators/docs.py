"""The page ``docs/estimators.md``, written from the registry.

python -c "from scg.estimators.docs import page; print(page(), end='')" > docs/estimators.md
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Dirichlet,
    Distribution,
    Exponential,
    Gamma,
    Geometric,
    Laplace,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    Poisson,
    StudentT,
    VonMises,
    Weibull,
)

from scg.estimators import GROUPS
from scg.estimators.base import (
    EnumeratingEstimator,
    Estimator,
    PathwiseEstimator,
    RerunEstimator,
    RowEstimator,
    SiteInfo,
)
from scg.template import flatten

_HEAD = """# Estimators

Written by `scg.estimators.docs.page()` from the registry `scg.ESTIMATORS`; each formula stands beside the code that
computes it, in `scg/estimators/`.

Ask for one by name or as an object, for every site or for some:

```python
import torch, scg
from torch.distributions import Bernoulli

theta = torch.nn.Parameter(torch.zeros(3))


def loss():
    z = Bernoulli(logits=theta).sample()
    return ((z - 0.499) ** 2).mean()


compiled = scg.compile(loss, estimator="reinmax", estimators={"z": "disarm"}, samples=2)
compiled().backward()
```

An estimator that does not fit a site is an error that says why, and names those that fit; `allow_biased=False` makes a
biased choice an error too. Those that need a draw to move continuously (the relaxations, `rebar`, `relax`, `muprop`,
`double_cv`, `rodeo`) take a `Categorical` too: its index is written as a one-hot where every use on the way to the loss
is a look-up (`table[z]`, `embedding`, `gather`, `take`, `index_select`), a `one_hot` or a categorical's log density;
another use is an error that names it and its line. "Evaluations" counts how often the costs below one scalar site are
evaluated a draw.

"""

_ANNEALING = """## Annealing a temperature

A temperature may be a tensor of one element: it is read at every step, so that changing it in place needs no new trace.
It is the caller's to keep and to save; one on the CPU serves every device.

```python
import math
from scg.estimators.gumbel_softmax import GumbelSoftmax

tau = torch.tensor(1.0)
relaxed = scg.compile(loss, estimator=GumbelSoftmax(temperature=tau))
for step in range(3):
    tau.fill_(max(0.5, math.exp(-1e-4 * step)))
    relaxed().backward()
```
"""


def _families() -> Iterator[Distribution]:
    """One scalar site of each family the page speaks of."""
    one, three = torch.tensor(1.0), torch.full((3,), 1 / 3)
    yield from (Bernoulli(one / 2), Categorical(three), OneHotCategorical(three), Binomial(3, one / 2))
    yield from (
        Geometric(one / 2),
        Poisson(one),
        Normal(one, one),
        Laplace(one, one),
        StudentT(one),
        VonMises(one, one),
    )
    yield from (Exponential(one), Gamma(one, one), Beta(one, one), Dirichlet(three), Weibull(one, one))
    yield MultivariateNormal(three, torch.eye(3))
    yield MixtureSameFamily(Categorical(three), Normal(three, three))


def _info(dist: Distribution) -> SiteInfo:
    template, _ = flatten(dist)
    support: Tensor | None = None
    if dist.has_enumerate_support:
        support = dist.enumerate_support(expand=False)
    shape = tuple(dist.batch_shape + dist.event_shape)
    rows = None if support is None else len(support)
    return SiteInfo("z", template, shape, len(dist.event_shape), support=support, rows=rows)


def _way(cls: type[Estimator]) -> str:
    ways = {
        PathwiseEstimator: "pathwise",
        RowEstimator: "several coupled draws",
        RerunEstimator: "reruns",
        EnumeratingEstimator: "sum",
    }
    return next((way for base, way in ways.items() if issubclass(cls, base)), "score")


def _evaluations(cls: type[Estimator], fitting: list[SiteInfo]) -> str:
    counts = sorted({cls().evaluations(site) for site in fitting})
    return f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else "".join(map(str, counts))


def _fitting(cls: type[Estimator]) -> list[SiteInfo]:
    """The sites of `_families` that it fits; where it fits none that is drawn, those that it fits replayed."""
    sites = [_info(dist) for dist in _families()]
    several = (dist.expand(torch.Size([4, *dist.batch_shape])) for dist in _families())
    replayed = [dataclasses.replace(_info(dist), replayed=True) for dist in several]
    return [site for site in sites if cls().check(site)] or [site for site in replayed if cls().check(site)]


def table() -> str:
    """One line an estimator."""
    lines = ["| name | biased | how | evaluations | distributions |", "|---|---|---|---|---|"]
    everything = len(list(_families()))
    for cls in (cls for group in GROUPS.values() for cls in group):
        fitting = _fitting(cls)
        families = "all" if len(fitting) == everything else ", ".join(site.family for site in fitting)
        biased = "" if cls.unbiased else "yes"
        name = f"[`{cls.name}`](#{cls.name})"
        lines.append(f"| {name} | {biased} | {_way(cls)} | {_evaluations(cls, fitting)} | {families} |")
    return "\n".join(lines)


def facts(cls: type[Estimator]) -> str:
    """Reference, bias, cost and distributions, as a table."""
    fitting = _fitting(cls)
    rows = {
        "reference": cls.reference,
        "biased": "no" if cls.unbiased else "yes",
        "how": _way(cls),
        "evaluations": _evaluations(cls, fitting),
        "distributions": ", ".join(site.family for site in fitting),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def section(cls: type[Estimator]) -> str:
    """An estimator's docstring in Markdown, with its options."""
    blocks = [f"### `{cls.name}`", "\n\n".join(_blocks(inspect.getdoc(cls) or ""))]
    options = [f for f in dataclasses.fields(cls) if f.name != "samples"]
    if options:
        signature = ", ".join(f"{option.name}={option.default!r}" for option in options)
        blocks.append(f"Defaults: `{cls.__name__}({signature})`.")
    return "\n\n".join(blocks)


def _blocks(doc: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", doc):
        if block.startswith(".. math::"):
            formula = " ".join(line.strip() for line in block.removeprefix(".. math::").splitlines())
            yield f"$$ {formula.strip()} $$"
        elif block.startswith("Args:"):
            entries = re.split(r"\n    (?=\w+: )", block)[1:]
            yield "\n".join("- " + re.sub(r"^(\w+):", r"`\1`:", _inline(entry)) for entry in entries)
        elif block.startswith("    "):  # a formula or an example that began in the block before
            yield f"$$ {' '.join(line.strip() for line in block.splitlines())} $$"
        else:
            yield _inline(block)


def _inline(text: str) -> str:
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = re.sub(r"``([^`]*)``", r"`\1`", text)
    return re.sub(r"\s*\n\s*", " ", text)


def page() -> str:
    """The page."""
    parts = [_HEAD + table()]
    for title, group in GROUPS.items():
        parts.append(f"## {title}")
        parts.extend(section(cls) for cls in group)
    return "\n\n".join([*parts, _ANNEALING])
