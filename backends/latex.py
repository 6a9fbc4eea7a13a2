r"""LaTeX of what is minimised, of each site's gradient estimate and of the surrogate, in the names of the program.

The estimators' formulas are their own (`Estimator.formula`); what their letters stand for at a site is said beside
them, for the letters that occur.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from scg.backends.coefficients import CoefficientRule
from scg.estimators.base import EnumeratingEstimator, Estimator, RowEstimator, ScoreEstimator
from scg.estimators.relaxed import Relaxation
from scg.estimators.score_function import ScoreFunction
from scg.ir import Cost, Dist, Expected, Graph, Input, LogProb, Op, Opaque, Param, Ref, Sample
from scg.report import estimator_texts

_GREEK = "alpha beta gamma delta epsilon eta theta lambda mu nu phi psi rho sigma tau omega".split()

_MOST = 6
"""Terms of a sum that are written out."""


@dataclass(frozen=True)
class Formula:
    """The answer of ``formula()``: ``str`` of it is LaTeX, and a notebook shows it typeset."""

    objective: str
    costs: tuple[str, ...]
    """What each cost is: a cost of the user's may have been cut into parts that go by its name."""
    sites: tuple[str, ...]
    """The law of each site, in terms of what its parameters read."""
    gradients: tuple[str, ...]
    """The gradient estimate of each site that has an estimator."""
    surrogate: str
    """What is differentiated in the place of the objective."""

    def __str__(self) -> str:
        lines = [self.objective, *self.costs, *self.sites, *self.gradients, self.surrogate]
        return "\n".join([r"\begin{aligned}", " \\\\\n".join(lines), r"\end{aligned}"])

    def _repr_latex_(self) -> str:
        return f"$$\n{self}\n$$"


def formula(graph: Graph, order: int = 1) -> Formula:
    """The formulas of ``graph`` after the passes.

    Args:
        graph: with estimators and costs.
        order: 2 for the surrogate of which every derivative is right.
    """
    return _Writer(graph, order).write()


class _Writer:
    def __init__(self, graph: Graph, order: int) -> None:
        self.graph, self.order = graph, order
        self.weights = self._weights()
        sites: list[Sample] = graph.of(Sample)
        self.sites = sites
        self.learned = [site for site in sites if site.estimator is not None and not site.data]

    def write(self) -> Formula:
        drawn = _listed(symbol(site.name) for site in self.sites)
        total = self._total(self.weights) or symbol(str(self.graph.objective))
        expectation = rf"\mathbb{{E}}_{{{drawn}}}\Big[ {total} \Big]" if drawn else total
        return Formula(
            rf"\mathcal{{L}}(\theta) &= {expectation}",
            tuple(f"{symbol(c.label)} &= {self._expression(c.value)}" for c in self.graph.costs.values()),
            tuple(self._law(site) for site in self.sites),
            tuple(self._gradient(site) for site in self.learned),
            self._surrogate(total),
        )

    # -- the objective ----------------------------------------------------------------------------------------------
    def _weights(self) -> dict[str, float | None]:
        """The coefficient of every cost in the objective; None where it differs between elements or steps."""
        if not self.graph.costs:
            return {}
        rule = CoefficientRule(self.graph)
        fixed = rule.fixed if rule.constant else [None] * len(rule.costs)
        return {cost: w if isinstance(w, float) else None for cost, w in zip(rule.costs, fixed, strict=True)}

    def _total(self, costs: Iterable[str], below: str = "") -> str:
        """The costs as they stand in the objective; of their elements, those that the site ``below`` influences."""
        terms = [self._term(self.graph.costs[cost], below) for cost in costs]
        if len(terms) > _MOST:
            terms = [*terms[:2], r"\cdots", terms[-1]]
        return " + ".join(terms).replace("+ -", "- ")

    def _term(self, cost: Cost, below: str) -> str:
        name, weight = symbol(cost.label), self.weights[cost.name]
        many = math.prod(cost.tensor.shape) > 1
        element = f"{{{name}}}_e" if many and (below or weight is None) else name
        over = (rf"\sum_{{e \succ {below}}} " if below else r"\sum_e " if weight is None else r"\sum ") if many else ""
        return over + f"w_e\\, {element}" if weight is None else _number(weight) + over + element

    def _expression(self, ref: Ref, depth: int = 2) -> str:
        """What a node computes, down to ``depth`` operations."""
        node = self.graph[ref]
        if isinstance(node, LogProb):
            return r"\log " + self._family(node.dist, self._expression(node.value, 0) + r";\, ")
        if isinstance(node, Expected):
            families = r" \,\|\, ".join(map(self._family, node.dists))
            return rf"\mathrm{{{_escape(node.form_name)}}}\big({families}\big)"
        if isinstance(node, Op) and depth:
            reads = ", ".join(self._expression(read, depth - 1) for read in node.inputs)
            name = node.op_name.partition(".")[0]
            return f"-{reads}" if name == "neg" else rf"\mathrm{{{_escape(name)}}}({reads})"
        if isinstance(node, Opaque):
            return rf"\mathtt{{{_escape(node.fn.__name__)}}}({', '.join(self._reads(node.inputs)[1])})"
        return symbol(node.path if isinstance(node, (Input, Param)) else node.name)

    # -- one site -----------------------------------------------------------------------------------------------------
    def _law(self, site: Sample) -> str:
        law = self._family(site.dist)
        return rf"{symbol(site.name)} &\sim {law}" + (r"\quad\text{(replayed)}" if site.value is not None else "")

    def _family(self, ref: Ref, prefix: str = "") -> str:
        dist = self.graph[ref]
        assert isinstance(dist, Dist)
        slots = ", ".join(map(self._slot, dist.template.names, dist.params))
        return rf"\mathrm{{{_escape(dist.template.family)}}}({prefix}{slots})"

    def _slot(self, name: str, ref: Ref) -> str:
        """``logits_{enc}(x)``: a parameter, what it learns by and what it reads."""
        owners, arguments = self._reads([ref])
        subscript = f"_{{{', '.join(owners)}}}" if owners else ""
        last = name.rpartition(".")[2].strip("_")
        return rf"\mathrm{{{_escape(last)}}}{subscript}" + (f"({', '.join(arguments)})" if arguments else "")

    def _reads(self, refs: Iterable[Ref]) -> tuple[list[str], list[str]]:
        """Owners of the parameters, and the inputs and sites, that values depend on without another site between."""
        owners: dict[str, None] = {}
        arguments: dict[str, None] = {}
        seen: set[str] = set()
        stack = list(refs)
        while stack:
            node = self.graph[stack.pop()]
            if node.name in seen:
                continue
            seen.add(node.name)
            if isinstance(node, Param) and node.role == "parameter":
                owners[rf"\mathtt{{{_escape(node.path.partition('.')[0])}}}"] = None
            elif isinstance(node, Input):
                arguments[symbol(node.path)] = None
            elif isinstance(node, Sample):
                arguments[symbol(node.name)] = None
            else:
                stack.extend(reversed(node.inputs))
        return list(owners), list(arguments)

    def _gradient(self, site: Sample) -> str:
        estimator: Estimator = site.estimator
        text = estimator.formula or rf"\text{{{_escape(estimator.name)}}}"
        return rf"\hat g_{{{symbol(site.name)}}} &= {text}" + "".join(
            rf",\quad {letter} = {meaning}" for letter, meaning in self._meanings(site, estimator) if letter != meaning
        )

    def _meanings(self, site: Sample, estimator: Estimator) -> list[tuple[str, str]]:
        """What the letters of the site's formula stand for."""
        bare = re.sub(r"\\(mathrm|text)\{[^}]*\}", "", estimator.formula)
        letters = set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", bare)))
        found = []
        dist = self.graph[site.dist]
        assert isinstance(dist, Dist)
        if r"\nabla \theta" in bare or r"\nabla_\theta \theta" in bare:
            found.append((r"\theta", ", ".join(map(self._slot, dist.template.names, dist.params))))
        elif r"\theta" in bare and (owners := self._reads(dist.params)[0]):
            found.append((r"\theta", ", ".join(owners)))
        outcome = "z" if "z" in letters else "D" if isinstance(estimator, Relaxation) else "b"
        if outcome in letters and not isinstance(estimator, ScoreFunction) or outcome == "z":
            found.append((outcome, symbol(site.name)))
        signal = next((letter for letter in "Qf" if letter in letters), None)
        if signal is not None:
            credited = [cost for name, cost in self.graph.credit if name == site.name]
            found.append((signal, self._total(dict.fromkeys(credited), symbol(site.name)) or "0"))
        if isinstance(estimator, ScoreFunction):
            baseline = [*estimator_texts(self.graph, site), "0"][1]
            found.append(("b", "0" if baseline == "0" else rf"\text{{{_escape(baseline)}}}"))
        return found

    # -- the surrogate ------------------------------------------------------------------------------------------------
    def _surrogate(self, total: str) -> str:
        averages = [self._average(site) for site in self.learned]
        mean = "".join(averages if len(averages) <= _MOST else [*averages[:2], r"\cdots ", averages[-1]])
        if self.graph.samples > 1:
            mean = rf"\frac{{1}}{{{self.graph.samples}}} \sum_k {mean}"
        scored = [symbol(site.name) for site in self.learned if isinstance(site.estimator, ScoreEstimator)]
        body = rf"{mean}\Big[ {total} \Big]" if mean else total
        if not scored:
            return rf"\mathcal{{S}} &= {body}"
        over = rf"\sum_{{s \in \{{{_listed(scored)}\}}}}"
        if self.order > 1:
            boxed = rf"{mean}\Big[ \square\big(\textstyle{over} \log p_s\big) \big( {total} \big) \Big]"
            return (
                rf"\mathcal{{S}} &= {boxed} + {over} (1 - \square(\log p_s))\, b_s,\quad "
                rf"\square(x) = \exp(x - \bot(x)),\quad \bot = \text{{stop}}"
            )
        return (
            rf"\mathcal{{S}} &= {body} + {over} (t_s - \bot(t_s)),\quad \nabla t_s = \hat g_s,\quad "
            r"\bot = \text{stop}"
        )

    def _average(self, site: Sample) -> str:
        """How the outcomes of one site are averaged: a sum over all, or over its own draws."""
        estimator: Estimator = site.estimator
        name = symbol(site.name)
        if isinstance(estimator, EnumeratingEstimator):
            return rf"\sum_{{{name}}} p({name})\, "
        if isinstance(estimator, RowEstimator):
            if site.row_dim != site.name:  # averaged with the rows of its sequence
                return ""
            return rf"\sum_r w^{{{name}}}_r " if estimator.weighted else rf"\frac{{1}}{{{estimator.rows}}} \sum_r "
        return rf"\frac{{1}}{{{estimator.samples}}} \sum_j " if (estimator.samples or 1) > 1 else ""


def _listed(names: Iterable[str]) -> str:
    """``z, z_1, \\ldots, z_9``."""
    found = list(names)
    return ", ".join(found if len(found) <= _MOST else [*found[:2], r"\ldots", found[-1]])


def symbol(name: str) -> str:
    r"""A name of the program as a symbol: ``z``, ``z_{2}``, ``\theta``, ``\mathit{nll}_{1}``."""
    stem, _, index = name.rpartition("_")
    if stem and index.isdigit():
        return f"{symbol(stem)}_{{{index}}}" if "_" not in stem else rf"\mathit{{{_escape(stem)}}}_{{{index}}}"
    if match := re.fullmatch(r"([A-Za-z])(\d+)", name):
        return f"{match[1]}_{{{match[2]}}}"
    if name in _GREEK:
        return f"\\{name}"
    return name if re.fullmatch("[A-Za-z]", name) else rf"\mathit{{{_escape(name)}}}"


def _number(value: float) -> str:
    """A coefficient in front of a term: nothing for 1, a fraction where it is a simple one."""
    if value == 1.0:
        return ""
    if value == -1.0:
        return "-"
    near = Fraction(value).limit_denominator(10_000_000)
    if near and abs(near.numerator) <= 99 and math.isclose(float(near), value, rel_tol=1e-6):  # of a float32
        sign, top = ("-" if near < 0 else ""), abs(near.numerator)
        return f"{sign}{top}\\, " if near.denominator == 1 else rf"{sign}\tfrac{{{top}}}{{{near.denominator}}} "
    return rf"{value:.4g}\, ".replace("e-0", "e-")


_SPECIAL = {"\\": r"\backslash{}", **{char: f"\\{char}" for char in "_%&#${}"}, "^": r"\hat{}", "~": r"\sim{}"}


def _escape(text: str) -> str:
    return "".join(_SPECIAL.get(char, char if char.isprintable() else " ") for char in text)
