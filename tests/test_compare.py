"""compare: variances and biases agree with closed forms; what it writes can be read again."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal

import scg
from scg.estimators.score_function import ScoreFunction
from scg.measure.work import peak_bytes

CHOSEN = [
    ScoreFunction(baseline=None),
    ScoreFunction(baseline="leave_one_out"),
    "disarm",
    "straight_through",
    "reparam",
]


class Toy(nn.Module):
    """The toy every paper starts with, away from the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self) -> Tensor:
        return (Bernoulli(logits=self.theta).sample() - 0.499) ** 2


class Mixed(nn.Module):
    """A site for reparam and one that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.m, self.w = nn.Parameter(torch.tensor([0.3, 0.1])), nn.Parameter(torch.tensor([0.5, -0.5]))

    def forward(self) -> Tensor:
        z = Normal(self.m, 1.0).rsample()
        b = Bernoulli(logits=self.w).sample()
        return ((z - 0.5) ** 2).sum() + ((b - z.detach()) ** 2).sum()


@pytest.fixture(scope="module")
def toy() -> scg.Comparison:
    return scg.compare(Toy(), estimators=CHOSEN, samples=(1, 2), n=2000, time_budget=60, progress=False)


def test_variances_are_those_of_the_closed_forms(toy: scg.Comparison) -> None:
    p = torch.tensor(1.0, dtype=torch.float64).sigmoid()
    v, D = p * (1 - p), 1 - 2 * 0.499
    plain = v * ((1 - p) * 0.501**2 + p * 0.499**2) ** 2
    pair = D**2 * v / 2 * (1 - 2 * v)
    found = {(row.setting.label, row.setting.samples): row for row in toy.rows}
    for key, want in {
        ("score_function(baseline=None)", 1): plain,
        ("score_function(baseline=None)", 2): plain / 2,
        ("score_function(baseline=leave_one_out)", 2): pair,
    }.items():
        assert found[key].variance == pytest.approx(float(want), rel=0.2), key
    biased = found["straight_through", 1]
    assert not biased.unbiased and biased.bias is not None
    assert biased.bias == pytest.approx(float(v * (2 * p - 1)), abs=4 * biased.bias_error)
    for row in toy.rows:
        assert row.bias is not None and (not row.unbiased or row.bias < 4 * row.bias_error)


def test_the_best_comes_first_and_misfits_have_a_reason(toy: scg.Comparison) -> None:
    works = [row.work for row in toy.rows]
    assert works == sorted(works) and toy.best.unbiased
    assert toy.best.setting.label in ("disarm", "score_function(baseline=leave_one_out)")
    assert "no rsample" in toy.refused["reparam"]
    assert "two or more" in toy.refused["score_function(baseline=leave_one_out)"]


def test_what_is_written_can_be_read(toy: scg.Comparison, tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(toy.save(tmp_path / "t.csv").read_text())))
    assert len(rows) == 2 * len(toy.rows) and {row["parameter"] for row in rows} == {"", "theta"}
    content = json.loads(toy.save(tmp_path / "t.json").read_text())
    assert [row["variance"] for row in content["rows"]] == [row.variance for row in toy.rows]
    html = toy.save(tmp_path / "t.html").read_text()
    assert html.count("<table>") == 2 and "straight_through" in html
    assert toy.save(tmp_path / "t.md").read_text().count("\n| ") == len(toy.rows) + 2
    assert "left out: reparam" in str(toy)
    with pytest.raises(ValueError, match=r"\.csv"):
        toy.save(tmp_path / "t.xls")


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs the extra 'plot'")
def test_plot(toy: scg.Comparison, tmp_path: Path) -> None:
    assert b"<svg" in toy.save(tmp_path / "t.svg").read_bytes()


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is not None, reason="matplotlib is there")
def test_plot_says_what_to_install(toy: scg.Comparison) -> None:
    with pytest.raises(ImportError, match="plot"):
        toy.plot()


def test_an_estimator_stands_where_it_fits_and_nothing_is_left_changed() -> None:
    compiled = scg.compile(Mixed(), estimator=ScoreFunction(baseline="moving_average"), example_inputs=())
    state = {key: value.clone() for key, value in compiled.state_dict().items()}
    generator = torch.get_rng_state()
    found = scg.compare(
        compiled, estimators=["reparam", "arm", {"b": "disarm"}, {"b": "enumerate"}], n=20, progress=False
    )
    assert torch.equal(generator, torch.get_rng_state())
    for key, value in compiled.state_dict().items():
        torch.testing.assert_close(value, state[key])
    chosen = {row.setting.label: set(row.setting.estimators) for row in found.rows}
    assert chosen == {"reparam": {"z"}, "arm": {"b"}, "b: disarm": {"b"}}
    assert found.refused["b: enumerate, K=1"] == "the same program as reparam"
    assert set(found.rows[0].variances) == {"m", "w"}


def test_peak_memory_is_that_of_what_is_alive() -> None:
    x = torch.randn(1000)

    def step() -> Tensor:
        y = x * 2  # 4 kB
        z = y + 1  # 4 kB more, then y is freed
        del y
        return z * 3

    assert peak_bytes(step, x.device) == 8000
