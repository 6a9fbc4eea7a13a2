"""Random finite programs as Python source: sites, operations and costs, each kept only if it runs.

The same seed gives the same program. A program is written line by line and each line is run as it is written, so that
shapes need no rules of their own: what does not fit raises, and another line is tried.
"""

from __future__ import annotations

import dataclasses
import linecache
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Binomial, Categorical, Independent, OneHotCategorical, kl_divergence

import scg
from scg.estimators.local_expectation import LocalExpectation
from scg.estimators.score_function import ScoreFunction

MAX_BITS = 5.0
"""log2 of most joint outcomes of a program."""

PARAMETERS = {"a": (), "b": (2,), "c": (2, 2), "d": (3,), "e": (2, 3), "t": (4,)}

UNARY = (
    "torch.sin({x})",
    "torch.tanh({x})",
    "torch.exp(torch.tanh({x}))",
    "torch.sigmoid({x})",
    "F.softplus({x})",
    "torch.relu({x} - 0.3)",
    "({x} - 0.7).abs()",
    "{x} ** 2",
    "-{x}",
    "1.5 * {x} - 0.2",
    "{x}.detach()",
    "{x}.clamp(-0.5, 0.9)",
    "torch.where({x} > 0.5, {x} * 2, {x} - 1)",
    "{x}.masked_fill({x} > 0.6, 0.25)",
    "({x} > 0.4).double()",
    "torch.log1p({x} ** 2)",
    "torch.round({x})",
)
MOVEMENT = (
    "{x}.t()",
    "{x}.reshape(-1)",
    "{x}.unsqueeze(0)",
    "{x}.unsqueeze(-1)",
    "{x}.squeeze()",
    "{x}[{i}]",
    "{x}[..., {i}]",
    "{x}[1:]",
    "{x}[..., :1]",
    "{x}.flip(0)",
    "{x}.roll(1, -1)",
    "{x}.expand(2, *{x}.shape)",
    "{x}.repeat(2)",
    "{x}.transpose(0, 1)",
    "torch.chunk({x}, 2)[{i}]",
    "{x}.unbind(0)[{i}]",
    "F.pad({x}, (1, 0))",
    "{x}[torch.tensor([1, 0])]",
    "{x}.gather(-1, torch.ones_like({x}, dtype=torch.long))",
    "{x}.tril()",
    "{x}.diagonal()",
    "{x}.contiguous()",
    "{x}.unfold(0, 2, 1)",
    "{x}.repeat_interleave(2)",
)
REDUCTION = (
    "{x}.sum()",
    "{x}.mean()",
    "{x}.sum(0)",
    "{x}.sum(-1)",
    "{x}.mean(0)",
    "{x}.mean(-1, keepdim=True)",
    "{x}.prod(-1)",
    "{x}.prod()",
    "torch.logsumexp({x}, -1)",
    "torch.logsumexp({x}, 0)",
    "{x}.amax(-1)",
    "{x}.max(0)[0]",
    "{x}.var()",
    "{x}.softmax(-1)",
    "F.log_softmax({x}, 0)",
    "{x}.cumsum(0)",
    "{x}.cumsum(-1)",
    "{x} - {x}.mean(0)",
    "F.layer_norm({x}, {x}.shape[-1:])",
    "{x}.sort(-1)[0]",
)
BINARY = (
    "{x} + {y}",
    "{x} - {y}",
    "{x} * {y}",
    "{x} * ({y} - 0.4)",
    "torch.maximum({x}, {y} * 1.1)",
    "torch.where({x} > 0.3, {y}, 2 * {y})",
    "torch.where({y} > 0.5, {x}, -{x})",
    "{x} @ {y}",
    "{x} / (1.5 + {y} ** 2)",
    "torch.outer({x}, {y})",
    "torch.stack([{x}, {y}])",
    "torch.stack([{x}, {y}], -1)",
    "torch.cat([{x}, {y}])",
    "torch.cat([{x}, {y}], -1)",
    "torch.einsum('i,j->ij', {x}, {y})",
    "torch.einsum('i,i->', {x}, {y})",
    "torch.einsum('ij,j->i', {x}, {y})",
    "torch.lerp({x}, {y}, 0.3)",
    "F.linear({x}, {y})",
    "torch.addcmul({x}, {x}, {y}, value=0.5)",
    "torch.dot({x}, {y})",
    "torch.addmm({x}, {x}, {y})",
    "{x}.scatter(-1, torch.zeros_like({x}, dtype=torch.long), {y}.expand_as({x}))",
    "torch.zeros(2, dtype=F64).index_add(0, torch.tensor([0, 1]), {x} * {y})",
)
LOOKUP = (
    "self.t[{z}.long()]",
    "self.b[{z}.long().clamp(0, 1)]",
    "F.embedding({z}.long().clamp(0, 1), self.c)",
    "torch.stack([self.b, 2 * self.b, self.b ** 2]).index_select(0, {z}.long().reshape(-1))",
    "self.e[{z}.long().clamp(0, 1), {y}.long().clamp(0, 2)]",
    "self.c[{y}.long().clamp(0, 1), {z}.long().clamp(0, 1)]",
    "F.one_hot({z}.long().clamp(0, 1), 2).double()",
    "{x}[..., {z}.long().clamp(0, {x}.shape[-1] - 1)]",
    "({z} == 1).double()",
)
IN_PLACE = (
    ("{v} = {x}.clone()", "{v}[0] = {y}", "{v}.mul_(1.5)"),
    ("{v} = {x}.clone()", "{v}[1:] = {x}[:-1] * 2"),
    ("{v} = torch.zeros(2, dtype=F64)", "{v}[0] = {x}.sum()", "{v}[1] = {y}.mean() * {v}[0]"),
    ("{v} = {x}.clone()", "{v}.view(-1)[0].add_({y}.sum())"),
)
LAWS = (
    ("Bernoulli(logits={l})", 1.0),
    ("Bernoulli(probs=torch.sigmoid({l}))", 1.0),
    ("Independent(Bernoulli(logits={l}), 1)", 1.0),
    ("Categorical(logits={l})", 0.0),
    ("OneHotCategorical(logits={l})", 0.0),
    ("Independent(Categorical(logits={l}), 1)", 0.0),
    ("Binomial(2, logits={l})", math.log2(3)),
)
"""Source, and bits an element of the parameter; 0 where its last dim counts the outcomes."""

NAMES = {
    "torch": torch,
    "F": F,
    "F64": torch.float64,
    "scg": scg,
    "kl_divergence": kl_divergence,
    **{law.__name__: law for law in (Bernoulli, Binomial, Categorical, Independent, OneHotCategorical)},
}


class Model(nn.Module):
    """The parameters that every program may use; `forward` is written for each."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        for name, shape in PARAMETERS.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.8
            setattr(self, name, nn.Parameter(value))


@dataclass(frozen=True)
class Program:
    """The body of a loss, and how it is compiled."""

    seed: int
    lines: tuple[str, ...]
    terms: tuple[str, ...]
    """Scalar expressions whose sum is the loss."""
    estimators: dict[str, Any]
    samples: int
    bits: float
    """log2 of its joint outcomes."""

    @property
    def source(self) -> str:
        body = [*self.lines, "return " + " + ".join(self.terms)]
        return "def forward(self):\n" + "".join(f"    {line}\n" for line in body)

    def simpler(self) -> Iterator[Program]:
        """The same loss with fewer and fewer draws: ever more of its sites are enumerated."""
        chosen = dict(self.estimators)
        yield self
        for site in chosen:
            chosen[site] = "enumerate"
            yield dataclasses.replace(self, estimators=dict(chosen))

    def model(self) -> nn.Module:
        """A module with fresh parameters, the same every time."""
        filename = f"fuzz_{self.seed}.py"
        linecache.cache[filename] = (len(self.source), None, self.source.splitlines(True), filename)
        names = dict(NAMES)
        exec(compile(self.source, filename, "exec"), names)
        return type("Fuzz", (Model,), {"forward": names["forward"]})()


class Writer:
    """Writes one program, running each line as it goes."""

    def __init__(self, seed: int) -> None:
        self.seed, self.random = seed, random.Random(seed)
        self.env: dict[str, Any] = {**NAMES, "self": Model()}
        self.lines: list[str] = []
        self.values: list[str] = [f"self.{name}" for name in PARAMETERS]
        self.moved: set[str] = set()
        """Names with a site upstream."""
        self.sites: list[str] = []
        self.laws: dict[str, str] = {}
        self.size: dict[str, float] = {}
        """Bits of each site."""
        self.count = 0

    def write(self) -> Program:
        for _ in range(self.random.randint(1, 4)):
            for _ in range(self.random.randint(0, 3)):
                self.operation()
            self.site()
        for _ in range(self.random.randint(1, 6)):
            self.operation()
        terms = [self.term() for _ in range(self.random.randint(1, 4))]
        estimators, samples = self.choose()
        return Program(self.seed, tuple(self.lines), tuple(terms), estimators, samples, sum(self.size.values()))

    # -- values ---------------------------------------------------------------------------------------------------
    def fresh(self, letter: str) -> str:
        self.count += 1
        return f"{letter}{self.count}"

    def run(self, lines: list[str], result: str) -> bool:
        """Runs and keeps ``lines`` if they give a small finite tensor under the name ``result``."""
        env = dict(self.env)
        try:
            exec("\n".join(lines), env)
            value = env[result]
            if value.requires_grad:  # an operation in place may forbid it
                torch.autograd.grad(value.sum(), list(env["self"].parameters()), retain_graph=True, allow_unused=True)
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False
        if not isinstance(value, Tensor) or not 0 < value.numel() <= 12 or value.dim() > 3:
            return False
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()) or value.abs().max() > 50:
            return False
        self.env = env
        self.lines += lines
        return True

    def value(self) -> str:
        """A name, one with a site upstream more often than not, the later the likelier."""
        kind = self.random.random()
        moved = [name for name in self.values if name in self.moved]
        return self.random.choice(
            moved[-8:] if moved and kind < 0.7 else self.values[-6:] if kind < 0.85 else self.values
        )

    def operation(self) -> str:
        for _ in range(200):
            kind = self.random.random()
            name, x, y = self.fresh("v"), self.value(), self.value()
            z = self.random.choice(self.sites) if self.sites else "self.a"
            slots = {"x": x, "y": y, "z": z, "i": self.random.randint(0, 1), "v": name}
            if kind < 0.05:
                lines = [line.format(**slots) for line in self.random.choice(IN_PLACE)]
            else:
                table: tuple[str, ...]
                table = UNARY if kind < 0.25 else MOVEMENT if kind < 0.45 else REDUCTION if kind < 0.6 else BINARY
                table = LOOKUP if kind > 0.9 and self.sites else table
                lines = [f"{name} = {self.random.choice(table).format(**slots)}"]
            if self.run(lines, name):
                self.values.append(name)
                if self.moved.intersection(re.findall(r"\w+", " ".join(lines))):
                    self.moved.add(name)
                return name
        raise AssertionError("no operation fits")

    def site(self) -> None:
        for _ in range(50):
            law, bits = self.random.choice(LAWS)
            base, shape = self.value(), self.random.choice(["()", "()", "()", "(2,)"])
            offset = self.random.choice(list(PARAMETERS))
            dist, name = self.fresh("q"), self.fresh("z")
            logits = f"torch.tanh({base}) + self.{offset}"
            lines = [f"{dist} = {law.format(l=logits)}"]
            try:
                found = eval(logits, self.env)
            except RuntimeError:
                continue
            if bits == 0.0 and (found.dim() == 0 or not 2 <= found.shape[-1] <= 3):
                continue
            each = found.numel() * bits if bits else math.log2(found.shape[-1]) * found.numel() / found.shape[-1]
            total = each * (2 if shape != "()" else 1)
            if total + sum(self.size.values()) > MAX_BITS:
                continue
            estimator = self.random.random()
            draw = f"{dist}.sample({shape})"
            if estimator < 0.2 and shape == "()":
                draw = f"scg.sample({dist}, '{name}')"
            lines.append(f"{name} = {draw}")
            float_name = self.fresh("v")
            lines.append(f"{float_name} = {name}.double()")
            env = dict(self.env)
            try:
                exec("\n".join(lines), env)
            except (RuntimeError, ValueError, IndexError):
                continue
            if env[name].numel() > 8:
                continue
            self.env = env
            self.lines += lines
            self.values.append(float_name)
            self.moved |= {name, float_name}
            self.sites.append(name)
            self.laws[name] = dist
            self.size[name] = total
            return

    # -- the loss -------------------------------------------------------------------------------------------------
    def term(self) -> str:
        kind = self.random.random()
        if kind < 0.15 and self.sites:
            site = self.random.choice(self.sites)
            return f"0.3 * {self.laws[site]}.log_prob({site}).sum()"
        x, y = self.value(), self.value()
        if kind < 0.25:
            fused = self.random.choice(
                [
                    f"F.mse_loss({x}, torch.full_like({x}, 0.3))",
                    f"F.binary_cross_entropy_with_logits({x}, torch.full_like({x}, 0.3), reduction='sum')",
                    f"F.smooth_l1_loss({x}, torch.full_like({x}, 0.3))",
                ]
            )
            return fused
        weight = self.random.choice(["", "0.5 * ", "-1.3 * ", "self.a * "])
        if kind < 0.5:
            if self.run([f"{(name := self.fresh('v'))} = {x} * {y}"], name):
                x = name
        if kind < 0.65:
            label = self.fresh("c")
            return f"{weight}scg.cost({x}, '{label}').{self.random.choice(['sum', 'mean'])}()"
        change = self.random.choice(["", " ** 2", " - 0.5", " * 2"])
        return f"{weight}({x}{change}).{self.random.choice(['sum', 'mean'])}()"

    def choose(self) -> tuple[dict[str, Any], int]:
        """An estimator for each site, and the number of samples of the whole program."""
        samples = self.random.choice([1, 1, 2])
        makers: list[Callable[[], Any]] = [
            lambda: "enumerate",
            lambda: "auto",
            lambda: ScoreFunction(baseline=None),
            lambda: ScoreFunction(baseline="moving_average"),
            lambda: LocalExpectation(),
            lambda: ScoreFunction(baseline="leave_one_out", samples=2),
            lambda: ScoreFunction(baseline=None, samples=2),
        ]
        if samples > 1:
            makers.append(lambda: ScoreFunction(baseline="leave_one_out"))
        return {site: self.random.choice(makers)() for site in self.sites}, samples
