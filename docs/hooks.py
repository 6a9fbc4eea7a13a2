"""What `make docs` adds to the pages: a page for each estimator, from the registry, and formulas as MathML."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.structure.files import File, Files

from scg.backends.mathml import mathml
from scg.estimators import GROUPS
from scg.estimators.docs import facts, section

_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Adds ``estimators/NAME.md``."""
    for title, group in GROUPS.items():
        for cls in group:
            text = section(cls).replace(f"### `{cls.name}`", f"# {cls.name}", 1)
            page = f"{text}\n\n{facts(cls)}\n\nGroup: {title}. [All estimators](../estimators.md)\n"
            files.append(File.generated(config, f"estimators/{cls.name}.md", content=page))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Formulas between dollars, outside code; on the page of all estimators, each heading leads to its own page."""
    if page.file.src_uri == "estimators.md":
        markdown = re.sub(
            r"^### `(\w+)`$", r"### `\1` { #\1 }\n\n[A page of its own](estimators/\1.md)", markdown, flags=re.M
        )
    parts = _CODE.split(markdown)
    parts[::2] = [re.sub(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", _formula, part, flags=re.DOTALL) for part in parts[::2]]
    return "".join(parts)


def _formula(match: re.Match[str]) -> str:
    block = match[1] is not None
    return mathml((match[1] or match[2]).strip(), display=block)
