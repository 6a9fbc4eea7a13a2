"""The page of estimators is up to date and says of each what users must know."""

from __future__ import annotations

from pathlib import Path

import scg
from scg.estimators import GROUPS
from scg.estimators.docs import page, section

PAGE = Path(__file__).parents[2] / "docs" / "estimators.md"


def test_the_page_is_up_to_date() -> None:
    command = "python -c \"from scg.estimators.docs import page; print(page(), end='')\" > docs/estimators.md"
    assert PAGE.read_text() == page(), f"write it anew: {command}"


def test_every_estimator_has_what_the_page_shows() -> None:
    for name, cls in scg.ESTIMATORS.items():
        assert cls.name == name and cls.reference and cls.formula, name
        text = section(cls)
        assert "$$" in text, f"{name}: no formula in its docstring"
        assert "iased" in text, f"{name}: its docstring does not say whether it is biased"


def test_every_estimator_stands_in_one_group() -> None:
    listed = [cls.name for group in GROUPS.values() for cls in group]
    assert sorted(listed) == sorted(scg.ESTIMATORS)
