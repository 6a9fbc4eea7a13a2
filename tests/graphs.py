"""Graphs made by hand, as the passes leave them: what pictures and reports are tested on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributions import Bernoulli, Categorical, Distribution, Normal

from scg.estimators import ESTIMATORS
from scg.ir import Cost, CreditEdge, Dist, Graph, Input, LogProb, Node, Op, Opaque, Param, Ref, Sample, TensorType
from scg.template import flatten

aten = torch.ops.aten


class Maker:
    """Writes a graph line by line; every method returns the new node's `Ref`."""

    def __init__(self, name: str, file: str) -> None:
        self.name = name
        self.file = file
        self.nodes: dict[str, Node] = {}

    def _add(self, node: Node) -> Ref:
        self.nodes[node.name] = node
        return Ref(node.name)

    def _loc(self, line: int) -> str:
        return f"{self.file}:{line}" if line else ""

    def input(self, name: str, *shape: int) -> Ref:
        return self._add(Input(name=name, type=tensor(shape), path=name, position=len(self.nodes)))

    def param(self, path: str, *shape: int) -> Ref:
        name = path.replace(".", "_")
        return self._add(Param(name=name, type=tensor(shape), path=path, requires_grad=True))

    def op(self, name: str, target: Any, *args: Any, shape: Sequence[int] = (), scope: str = "", line: int = 0) -> Ref:
        node = Op(name=name, type=tensor(shape), target=target, args=args, scope=scope, loc=self._loc(line))
        return self._add(node)

    def linear(self, scope: str, x: Ref, d: int, o: int, batch: Sequence[int], line: int) -> Ref:
        weight, bias = self.param(f"{scope}.weight", o, d), self.param(f"{scope}.bias", o)
        name = f"linear_{len(self.nodes)}"
        return self.op(name, aten.linear.default, x, weight, bias, shape=(*batch, o), scope=scope, line=line)

    def dist(self, name: str, dist: Distribution, *params: Ref, line: int = 0) -> Ref:
        template, _ = flatten(dist)
        return self._add(Dist(name=name, template=template, params=params, loc=self._loc(line)))

    def sample(
        self, name: str, dist: Ref, shape: Sequence[int], line: int, dims: tuple[str, ...] = (), **kw: Any
    ) -> Ref:
        return self._add(Sample(name=name, type=tensor(shape, dims), dist=dist, loc=self._loc(line), **kw))

    def log_prob(self, name: str, dist: Ref, value: Ref, shape: Sequence[int], line: int = 0) -> Ref:
        return self._add(LogProb(name=name, type=tensor(shape), dist=dist, value=value, loc=self._loc(line)))

    def opaque(self, name: str, fn: Any, *args: Ref, shape: Sequence[int], line: int = 0) -> Ref:
        return self._add(Opaque(name=name, type=tensor(shape), fn=fn, args=args, loc=self._loc(line)))

    def cost(self, name: str, value: Ref, shape: Sequence[int], line: int, label: str = "") -> Ref:
        return self._add(Cost(name=name, type=tensor(shape), value=value, label=label or name, loc=self._loc(line)))

    def graph(
        self, objective: Ref, tail: Sequence[str], credit: Mapping[tuple[str, str], str], samples: int = 1
    ) -> Graph:
        """The graph; ``credit`` holds one letter for each dim of the site: t(ied) or m(ixed)."""
        words = {"t": "tied", "m": "mixed"}
        edges = {
            (site, cost): CreditEdge(
                site,
                cost,
                axes=tuple(i if letter == "t" else None for i, letter in enumerate(letters)),
                mixed=tuple(letter == "m" for letter in letters),
                words=tuple(words[letter] for letter in letters),
            )
            for (site, cost), letters in credit.items()
        }
        return Graph(self.name, self.nodes, objective, objective, credit=edges, samples=samples, tail=frozenset(tail))


def tensor(shape: Sequence[int], dims: tuple[str, ...] = ()) -> TensorType:
    return TensorType(torch.float32, tuple(shape), sample=dims)


def vae(b: int = 128) -> Graph:
    """A discrete VAE after the passes."""
    m = Maker("VAE", "vae.py")
    x = m.input("x", b, 784)
    h = m.op("h", aten.tanh.default, m.linear("enc.0", x, 784, 200, (b,), 9), shape=(b, 200), scope="enc.1", line=9)
    q = m.dist("q", Bernoulli(logits=torch.zeros(b, 32)), m.linear("enc.2", h, 200, 32, (b,), 9), line=9)
    loo = ESTIMATORS["score_function"]()
    why = "support 2^32 is too large to sum; leave-one-out over K"
    z = m.sample("z", q, (b, 32), 10, ("K",), estimator=loo, reason=why, credits=("nll", "kl"))
    g = m.op("g", aten.tanh.default, m.linear("dec.0", z, 32, 200, (b,), 11), shape=(b, 200), scope="dec.1", line=11)
    p = m.dist("p", Bernoulli(logits=torch.zeros(b, 784)), m.linear("dec.2", g, 200, 784, (b,), 11), line=11)
    ll = m.op("ll", aten.neg.default, m.log_prob("lp", p, x, (b, 784), 11), shape=(b, 784), line=11)
    nll = m.cost("nll", m.op("s", aten.sum.dim_IntList, ll, [-1], shape=(b,), line=11), (b,), 11)
    prior = m.dist("prior", Bernoulli(logits=torch.zeros(32)), m.param("prior_logits", 32), line=12)
    lq, lr = m.log_prob("lq", q, z, (b, 32), 12), m.log_prob("lr", prior, z, (b, 32), 12)
    kl = m.cost("kl", m.op("d", aten.sub.Tensor, lq, lr, shape=(b, 32), line=12), (b, 32), 12)
    tail = [
        m.op("t1", aten.sum.dim_IntList, kl, [-1], shape=(b,)),
        m.op("t2", aten.add.Tensor, nll, Ref("t1"), shape=(b,)),
    ]
    loss = m.op("loss", aten.mean.default, tail[-1])
    return m.graph(loss, [*tail, loss], {("z", "nll"): "tm", ("z", "kl"): "tt"}, samples=4)


def belief_net(b: int = 100) -> Graph:
    """Two stochastic layers and three costs."""
    m = Maker("SigmoidBeliefNet", "sbn.py")
    x = m.input("x", b, 784)
    score = ESTIMATORS["score_function"]()
    q1 = m.dist("q1", Bernoulli(logits=torch.zeros(b, 200)), m.linear("enc1", x, 784, 200, (b,), 7))
    z1 = m.sample(
        "z1", q1, (b, 200), 8, ("K",), estimator=score, reason="support too large", credits=("nll", "kl1", "kl2")
    )
    q2 = m.dist("q2", Bernoulli(logits=torch.zeros(b, 200)), m.linear("enc2", z1, 200, 200, (b,), 9))
    z2 = m.sample("z2", q2, (b, 200), 10, ("K",), estimator=score, reason="support too large", credits=("kl1", "kl2"))
    p0 = m.dist("p0", Bernoulli(logits=torch.zeros(b, 784)), m.linear("dec1", z1, 200, 784, (b,), 11))
    nll = m.cost("nll", m.op("n", aten.neg.default, m.log_prob("lx", p0, x, (b, 784)), shape=(b, 784)), (b, 784), 11)
    p1 = m.dist("p1", Bernoulli(logits=torch.zeros(b, 200)), m.linear("dec2", z2, 200, 200, (b,), 12))
    lq1, lp1 = m.log_prob("lq1", q1, z1, (b, 200)), m.log_prob("lp1", p1, z1, (b, 200))
    kl1 = m.cost("kl1", m.op("k1", aten.sub.Tensor, lq1, lp1, shape=(b, 200)), (b, 200), 12)
    top = m.dist("top", Bernoulli(logits=torch.zeros(200)), m.param("prior_logits", 200))
    lq2, lp2 = m.log_prob("lq2", q2, z2, (b, 200)), m.log_prob("lp2", top, z2, (b, 200))
    kl2 = m.cost("kl2", m.op("k2", aten.sub.Tensor, lq2, lp2, shape=(b, 200)), (b, 200), 13)
    sums = [m.op(f"s{i}", aten.sum.default, cost) for i, cost in enumerate((nll, kl1, kl2))]
    tail = [*sums, m.op("t1", aten.add.Tensor, *sums[:2]), m.op("t2", aten.add.Tensor, Ref("t1"), sums[2])]
    loss = m.op("loss", aten.div.Tensor, tail[-1], b)
    edges = {("z1", "nll"): "tm", ("z1", "kl1"): "tm", ("z1", "kl2"): "tm", ("z2", "kl1"): "tm", ("z2", "kl2"): "tt"}
    return m.graph(loss, [*tail, loss], edges, samples=4)


def reward(state: Any, action: Any) -> Any:
    """Stands for a simulator."""
    return state


def policy(steps: int = 4, b: int = 32) -> Graph:
    """A policy rolled out for some steps; each action is credited with the rewards that follow it."""
    m = Maker("Rollout", "policy.py")
    state = m.input("s", b, 4)
    weight, bias = m.param("pi.weight", 3, 4), m.param("pi.bias", 3)
    enumeration, score = ESTIMATORS["enumerate"](), ESTIMATORS["score_function"]()
    edges: dict[tuple[str, str], str] = {}
    costs: list[Ref] = []
    for t in range(steps):
        last = t == steps - 1
        logits = m.op(f"logits_{t}", aten.linear.default, state, weight, bias, shape=(b, 3), scope="pi", line=6)
        pi = m.dist(f"pi_{t}", Categorical(logits=torch.zeros(b, 3)), logits, line=6)
        name, later = f"a_{t}" if t else "a", tuple(f"cost_{i}" for i in range(t, steps))
        estimator, why = (enumeration, "3 outcomes") if last else (score, "what follows cannot be enumerated")
        action = m.sample(name, pi, (b,), 7, ("K",), estimator=estimator, reason=why, credits=later)
        edges |= {(name, cost): "t" for cost in later}
        r = m.opaque(f"r_{t}", reward, state, action, shape=(b,), line=8)
        costs.append(m.cost(f"cost_{t}", m.op(f"neg_{t}", aten.neg.default, r, shape=(b,), line=9), (b,), 9))
        if not last:
            moved = m.op(f"shift_{t}", aten.unsqueeze.default, action, -1, shape=(b, 1), line=10)
            state = m.op(f"s_{t}", aten.add.Tensor, state, moved, shape=(b, 4), line=10)
    total = m.op("total", aten.stack.default, costs, shape=(steps, b))
    loss = m.op("loss", aten.sum.default, total)
    return m.graph(loss, [total, loss], edges, samples=2)


def hostile() -> Graph:
    """Names that break careless writers of DOT, SVG, HTML and JavaScript."""
    m = Maker('</script><b>"g"&amp;\\N', 'a "b" <c>.py')
    evil = '<script>alert("1")</script> & \\N \\" ünïcode ∑ %s {{x}}'
    loc = m.param(evil, 2)
    dist = m.dist("d", Normal(torch.zeros(2), torch.ones(2)), loc, m.param("σ\x00\x1b", 2))
    z = m.sample(evil + "z", dist, (2,), 1, method="rsample", estimator=ESTIMATORS["reparam"](), credits=(evil + "c",))
    cost = m.cost(evil + "c", m.op("sq", aten.square.default, z, shape=(2,)), (2,), 2)
    return m.graph(m.op("loss", aten.sum.default, cost), ["loss"], {(z, cost): "t"})
