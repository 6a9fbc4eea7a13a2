"""What each step of credit assignment is worth, on the example of docs/credit.md: the order of the variances."""

from __future__ import annotations

import pytest

from examples.credit_on_a_chain import RUNGS, variances


@pytest.mark.slow
def test_variance_falls_from_total_cost_to_cost_to_go_to_critic() -> None:
    """Twenty steps with a cost each, fixed seeds: with room for the noise of 300 estimates."""
    found = {
        name: variances(*RUNGS[name], steps=20, training=training, n=300)
        for name, training in (("total cost", 0), ("cost-to-go", 0), ("less a critic", 400))
    }
    total, to_go, critic = (float(variance.sum()) for variance in found.values())
    assert to_go < total / 2, found
    assert critic < to_go / 3, found
    # the later the step, the more of the total cost it cannot change
    gain = found["total cost"] / found["cost-to-go"]
    assert gain[15:].mean() > 3 * gain[:5].mean() > 3, found
