"""What `make docs` adds to the pages: one for each estimator, the texts of all errors, and formulas as MathML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from scg.backends.mathml import mathml
from scg.error_index import index
from scg.estimators import GROUPS
from scg.estimators.docs import facts, section

_PLOTS = "variance"
_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Adds ``estimators/NAME.md``."""
    for title, group in GROUPS.items():
        for cls in group:
            text = section(cls).replace(f"### `{cls.name}`", f"# {cls.name}", 1)
            plot = _plot(cls.name, (Path(config.docs_dir) / _PLOTS / f"{cls.name}.svg").exists())
            page = f"{text}\n\n{facts(cls)}\n\n{plot}\n\nGroup: {title}. [All estimators](../estimators.md)\n"
            files.append(File.generated(config, f"estimators/{cls.name}.md", content=page))
    return files


def _plot(name: str, exists: bool) -> str:
    """The measured variance, or why there is none."""
    head = "## Measured variance\n\n"
    if not exists:
        return f"{head}None: its draws are given, so that their variance is that of whoever drew them."
    return (
        f"{head}![Variance of the gradient by {name}, and without a baseline](../{_PLOTS}/{name}.svg)\n\n"
        "Variance of the gradient of one step with two draws (four for a bound), summed over its coordinates, on small "
        "programs; learned parts after 40 steps of training. An unbiased estimator's mean was compared with the exact "
        "gradient. Evaluations are those of the cost a step. Made by `make variance`."
    )


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Formulas between dollars, outside code; a link to its own page below each estimator; the index of errors."""
    if page.file.src_uri == "estimators.md":
        markdown = re.sub(
            r"^### `(\w+)`$", r"### `\1` { #\1 }\n\n[A page of its own](estimators/\1.md)", markdown, flags=re.M
        )
    if page.file.src_uri == "errors.md":
        markdown = markdown.replace("::: scg.errors", f"{index()}\n## The classes\n\n::: scg.errors")
    parts = _CODE.split(markdown)
    parts[::2] = [re.sub(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", _formula, part, flags=re.DOTALL) for part in parts[::2]]
    return "".join(parts)


def _formula(match: re.Match[str]) -> str:
    block = match[1] is not None
    return mathml((match[1] or match[2]).strip(), display=block)
