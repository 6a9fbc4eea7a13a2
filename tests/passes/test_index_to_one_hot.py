"""A drawn index as its one-hot: the gradient of the program written with one-hots, and refusals that say where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, OneHotCategorical

import scg
from scg.errors import EstimatorError
from tests.law2 import assert_unbiased
from tests.problems import Problem

ONE_HOT = [name for name, cls in scg.ESTIMATORS.items() if cls.one_hot]
B, D, C = 4, 2, 3


def _parameter(seed: int, *shape: int) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator))


LOGITS, TABLE, SQUARE, PRIOR = _parameter(1, B, D, C), _parameter(2, C + 1, 3), _parameter(3, C, C), _parameter(4, C)
PARAMETERS = (LOGITS, TABLE, SQUARE, PRIOR)
ROWS = torch.arange(B)
MASKED = torch.tensor([0.0, -1.0, -torch.inf], dtype=torch.float64)

Written = Callable[[Any, Tensor], Tensor]

USES: dict[str, tuple[Written, Written]] = {
    "embedding": (lambda q, z: F.embedding(z, TABLE), lambda q, h: h @ TABLE[:C]),
    "index": (lambda q, z: TABLE[z], lambda q, h: h @ TABLE[:C]),
    "second dim": (lambda q, z: TABLE.T[:, z], lambda q, h: (h @ TABLE[:C]).permute(2, 0, 1)),
    "scalar before": (lambda q, z: TABLE.T[1, z], lambda q, h: h @ TABLE[:C, 1]),
    "beside arange": (lambda q, z: LOGITS[:, 0][ROWS, z[:, 0]], lambda q, h: (LOGITS[:, 0] * h[:, 0]).sum(-1)),
    "three at once": (lambda q, z: LOGITS[ROWS[:, None], torch.arange(D), z], lambda q, h: (LOGITS * h).sum(-1)),
    "apart": (lambda q, z: LOGITS[ROWS, :, z[:, 0]], lambda q, h: (LOGITS * h[:, :1]).sum(-1)),
    "two draws": (lambda q, z: SQUARE[z[:, 0], z[:, 1]], lambda q, h: ((h[:, 0] @ SQUARE) * h[:, 1]).sum(-1)),
    "gather": (lambda q, z: LOGITS.gather(-1, z.unsqueeze(-1)).squeeze(-1), lambda q, h: (LOGITS * h).sum(-1)),
    "gather first": (lambda q, z: LOGITS.permute(2, 0, 1).gather(0, z[None])[0], lambda q, h: (LOGITS * h).sum(-1)),
    "take_along_dim": (lambda q, z: LOGITS.take_along_dim(z[..., None], -1)[..., 0], lambda q, h: (LOGITS * h).sum(-1)),
    "index_select": (lambda q, z: SQUARE.index_select(1, z[:, 0]), lambda q, h: (h[:, 0] @ SQUARE.T).T),
    "take": (lambda q, z: SQUARE.take(z), lambda q, h: h @ SQUARE[0]),
    "one_hot": (lambda q, z: F.one_hot(z, C).double() * LOGITS, lambda q, h: h * LOGITS),
    "wider one_hot": (lambda q, z: F.one_hot(z, C + 1).to(TABLE) @ TABLE, lambda q, h: h @ TABLE[:C]),
    "views": (
        lambda q, z: TABLE[torch.stack([z[:, 1], z[:, 0]], 1).view(-1).long().expand(2, -1).T[1:]],
        lambda q, h: (h.flip(1) @ TABLE[:C]).reshape(-1, 1, 3).expand(-1, 2, -1)[1:],
    ),
    "own log_prob": (lambda q, z: q.log_prob(z), lambda q, h: q.log_prob(h)),
    "another's": (
        lambda q, z: Categorical(logits=PRIOR).log_prob(z),
        lambda q, h: OneHotCategorical(logits=PRIOR).log_prob(h),
    ),
}  # fmt: skip


def _loss(value: Tensor) -> Tensor:
    return (value**2 + 0.1 * value**3).sum()


def _gradients(estimator: Any, model: Callable[[], Any], state: dict[str, Any]) -> tuple[Any, Any, Tensor]:
    compiled = scg.compile(model, estimator=estimator, samples=2, example_inputs=())
    compiled.load_state_dict(state, strict=False)
    state.update({key: value for key, value in compiled.state_dict().items() if key.startswith("estimators.")})
    torch.manual_seed(5)
    loss, z = compiled()
    return compiled, torch.autograd.grad(loss, PARAMETERS, allow_unused=True, materialize_grads=True), z


def _equal_to_one_hot(estimator: str, index: Written, one_hot: Written) -> None:
    def indexed() -> tuple[Tensor, Tensor]:
        q = Categorical(logits=LOGITS)
        z = q.sample()
        return _loss(index(q, z)), z

    def written_out() -> tuple[Tensor, Tensor]:
        q = OneHotCategorical(logits=LOGITS)
        z = q.sample()
        return _loss(one_hot(q, z)), z

    state: dict[str, Any] = {}
    compiled, found, z = _gradients(estimator, indexed, state)
    _, wanted, drawn = _gradients(estimator, written_out, state)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    assert z.dtype == torch.int64 and torch.equal(z, drawn.argmax(-1))
    site = compiled.graph.sites["z"]
    assert (site.distribution, site.shape, site.estimator) == ("Categorical", (B, D), estimator)


@pytest.mark.parametrize("use", USES)
def test_gradient_of_the_program_with_one_hots(use: str) -> None:
    _equal_to_one_hot("reinmax", *USES[use])


@pytest.mark.parametrize("estimator", ONE_HOT)
def test_for_every_estimator_of_one_hots(estimator: str) -> None:
    def both(first: str, second: str, which: int) -> Written:
        a, b = USES[first][which], USES[second][which]
        return lambda q, z: a(q, z).sum((-2, -1)) * b(q, z).sum(-1)

    _equal_to_one_hot(estimator, both("embedding", "own log_prob", 0), both("embedding", "own log_prob", 1))


class _Chain(nn.Module):
    """Two indices, the second's logits a row that the first looks up; a masked table of rewards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rows, self.table = _parameter(5, C), _parameter(6, C, C), _parameter(7, C, C)

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        a = Categorical(logits=self.first).sample()
        b = Categorical(logits=self.rows[a]).sample()
        reward = torch.log_softmax(self.table[0] + MASKED, -1).exp()
        return self.table[a, b] ** 2 + reward[b] * self.table[b].sum(), (a == b).float(), torch.stack([a, b])


@pytest.mark.parametrize("estimator", [name for name in ONE_HOT if scg.ESTIMATORS[name].unbiased])
@pytest.mark.parametrize("other", ["enumerate", pytest.param(None, marks=pytest.mark.slow)])
def test_unbiased(estimator: str, other: str | None) -> None:
    estimators = {} if other is None else {"a": estimator, "b": other}
    needs_two = estimator in ("double_cv", "rodeo")
    try:
        assert_unbiased(Problem(_Chain()), estimator=estimator, estimators=estimators, samples=1 + needs_two)
    except AssertionError as error:
        if "is not finite noise" not in str(error):
            raise
        pytest.skip("continuous noise: equal to the program with one-hots, which is tested by quadrature")


def test_other_outputs_stay_what_they_were() -> None:
    for estimator in ("reinmax", "gumbel_softmax"):
        compiled = scg.compile(_Chain(), estimator=estimator)
        _, same, drawn = compiled()
        assert drawn.dtype == torch.int64 and drawn.shape == (2,) and float(same) == float(drawn[0] == drawn[1])
    assert {name: site.distribution for name, site in compiled.graph.sites.items()} == dict.fromkeys(
        "ab", "Categorical"
    )
    assert "Categorical" in str(compiled.explain()) and "z_index" not in compiled.code and compiled.formula()


def test_impossible_entries_of_a_table_do_not_reach_the_others() -> None:
    def model() -> Tensor:
        z = Categorical(logits=PRIOR + MASKED).sample()
        return torch.log_softmax(PRIOR + MASKED, -1)[z]

    compiled = scg.compile(model, estimator="straight_through", samples=5)
    compiled().backward()
    assert PRIOR.grad is not None and bool(PRIOR.grad.isfinite().all())
    PRIOR.grad = None


# -- refusals ------------------------------------------------------------------------------------------------------
@scg.opaque(dtype=torch.float64)
def _reward(z: Tensor) -> Tensor:
    return z.double()


def _double(z: Tensor) -> Tensor:
    return z.double()


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "number": (_double, "to.dtype of it at .* takes the index for a number"),
    "comparison": (lambda z: TABLE[0, 0] * (z == 1), "eq.Scalar of it at .* has no meaning between two categories"),
    "arithmetic": (lambda z: TABLE[z + 1], "add.Tensor of it at .* has no meaning"),
    "opaque": (lambda z: TABLE[0, 0] * _reward(z), "opaque of it at .* has no meaning"),
    "padding": (lambda z: F.embedding(z, TABLE, padding_idx=0), "embedding of it at .*padding_idx"),
    "whole numbers": (lambda z: TABLE[F.one_hot(z, C).sum(-1)], "sum.* of it at .* takes its one_hot for whole"),
    "integer table": (lambda z: TABLE[torch.arange(C)[z]], "index.Tensor of it at .* not floating"),
    "nll": (lambda z: F.nll_loss(LOGITS[:, 0], z[:, 0]), "nll_loss.* of it at .* has no meaning"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_use_and_its_line(name: str) -> None:
    use, reason = REFUSED[name]

    def model() -> Tensor:
        z = Categorical(logits=LOGITS).sample()
        return use(z).sum()

    with pytest.raises(EstimatorError, match=f"%z .*index, which has no relaxation: {reason}") as error:
        scg.compile(model, estimator="reinmax", example_inputs=())
    assert "test_index_to_one_hot.py:" in str(error.value).split("relaxation: ")[1]


def test_one_site_is_refused_without_the_other() -> None:
    def model() -> Tensor:
        a = Categorical(logits=PRIOR).sample()
        b = Categorical(logits=PRIOR).sample()
        return TABLE[a, 0] * (b == 1)

    with pytest.raises(EstimatorError, match="%b .*eq.Scalar of it"):
        scg.compile(model, estimator="reinmax", example_inputs=())
    compiled = scg.compile(model, estimators={"a": "reinmax"}, example_inputs=())
    assert compiled.graph.sites["b"].estimator == "enumerate"


def test_other_estimators_keep_the_index() -> None:
    compiled = scg.compile(_Chain(), estimator="score_function", example_inputs=())
    assert "OneHot" not in str(compiled.graph)
