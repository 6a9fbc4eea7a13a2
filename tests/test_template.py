"""A template and its tensors are the distribution, with and without sample dims in front."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, Independent, Normal, RelaxedOneHotCategorical

from scg.template import flatten
from tests.test_tracer import DISTRIBUTIONS, weight

SKIPPED = {"LKJCholesky"}  # keeps a batch of Betas whose shape it derives itself
NAMES = [name for name in DISTRIBUTIONS if name not in SKIPPED]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_rebuilt_is_the_same(name: str) -> None:
    dist = DISTRIBUTIONS[name](weight(2, 4).detach())
    template, params = flatten(dist)
    rebuilt = template.rebuild(params)
    torch.manual_seed(0)
    draw = dist.sample((5,))
    torch.manual_seed(0)
    assert torch.equal(rebuilt.sample((5,)), draw)
    torch.testing.assert_close(rebuilt.log_prob(draw), dist.log_prob(draw))  # one of the two has the draw in its cache
    assert (rebuilt.batch_shape, rebuilt.event_shape) == (dist.batch_shape, dist.event_shape)
    assert flatten(rebuilt)[0] == template


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", ["all", "first"])
def test_sample_dims_in_front(name: str, which: str) -> None:
    """Row k of the rebuilt distribution is the distribution with the k-th parameters."""
    make = DISTRIBUTIONS[name]
    rows = [weight(2, 4).detach() + 0.1 * k for k in range(3)]
    template, _ = flatten(make(rows[0]))
    per_row = [flatten(make(row))[1] for row in rows]
    carried = [
        name != "base_dist.temperature" and (which == "all" or slot == 0)  # torch's own takes a scalar only
        for slot, name in enumerate(template.names)
    ]
    params = [
        torch.stack([row[slot] for row in per_row]) if carries else per_row[0][slot]
        for slot, carries in enumerate(carried)
    ]
    rebuilt = template.rebuild(params, prefix=(3,))
    expected = [
        template.rebuild([row[slot] if c else per_row[0][slot] for slot, c in enumerate(carried)]) for row in per_row
    ]
    draw = make(rows[0]).sample()
    assert rebuilt.batch_shape == (3, *template.batch_shape) and rebuilt.sample().shape == (3, *draw.shape)
    values = draw.expand(3, *draw.shape)
    densities = torch.stack([dist.log_prob(draw) for dist in expected])
    torch.testing.assert_close(rebuilt.log_prob(values), densities)


def test_names_and_event_dims() -> None:
    template, _ = flatten(Independent(Normal(torch.zeros(2, 3), 1.0), 1))
    assert template.family == "Normal" and template.names == ("base_dist.loc", "base_dist.scale")
    assert template.event_dims == (1, 1) and template.reinterpreted == 1
    assert template.base is not None and template.base.names == ("loc", "scale") and template.base.event_dims == (0, 0)
    assert flatten(Categorical(logits=torch.zeros(2, 5)))[0].event_dims == (1,)
    relaxed, _ = flatten(RelaxedOneHotCategorical(torch.tensor(0.5), logits=torch.zeros(2, 5)))
    assert dict(zip(relaxed.names, relaxed.event_dims, strict=True)) == {
        "base_dist.temperature": 1, "base_dist._categorical.logits": 1,
    }  # fmt: skip


def test_cached_lazy_properties_are_not_parameters() -> None:
    dist = Categorical(logits=torch.zeros(2, 5))
    assert dist.probs.shape == (2, 5)
    assert flatten(dist)[0].names == ("logits",)
