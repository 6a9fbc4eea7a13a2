r"""LaTeX to MathML, for as much of LaTeX as the formulas are written in: no script and no font is needed to show it.

>>> print(mathml(r"\frac{1}{2} z_i", display=False))
<math><mrow><mfrac><mn>1</mn><mn>2</mn></mfrac><msub><mi>z</mi><mi>i</mi></msub></mrow></math>
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\d+(?:\.\d+)?|\s+|.", re.DOTALL)

_LETTERS = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ϵ", "eta": "η", "theta": "θ", "lambda": "λ",
    "mu": "μ", "nu": "ν", "phi": "ϕ", "psi": "ψ", "pi": "π", "rho": "ρ", "sigma": "σ", "tau": "τ", "omega": "ω",
    "Delta": "Δ", "Sigma": "Σ", "ell": "ℓ", "infty": "∞", "bot": "⊥", "top": "⊤", "square": "□", "xi": "ξ", "zeta": "ζ",
    "kappa": "κ", "chi": "χ", "Phi": "Φ", "Gamma": "Γ", "Lambda": "Λ", "emptyset": "∅", "nabla": "∇",
}  # fmt: skip
_SIGNS = {
    "partial": "∂", "in": "∈", "sim": "∼", "succ": "≻", "setminus": "∖", "mid": "∣", "cdot": "⋅",
    "cdots": "⋯", "dots": "…", "ldots": "…", "times": "×", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠",
    "to": "→", "approx": "≈", "propto": "∝", "prod": "∏", "int": "∫", "sum": "∑", "pm": "±", "lfloor": "⌊",
    "rfloor": "⌋", "lceil": "⌈", "rceil": "⌉", "odot": "⊙", "oplus": "⊕", "notin": "∉", "subset": "⊂", "cup": "∪",
    "{": "{", "}": "}", "|": "‖", "_": "_", "%": "%", "&": "&", "#": "#", "$": "$", "vert": "|", "equiv": "≡",
    "langle": "⟨", "rangle": "⟩", "neq": "≠", "ll": "≪", "gg": "≫", "wedge": "∧", "vee": "∨", "circ": "∘",
    "rightleftharpoons": "⇌",
}  # fmt: skip
_WORDS = frozenset("log exp min max arg det sin cos sup inf Pr ln lim".split())
_SPACES = {",": "0.17em", ";": "0.28em", ":": "0.22em", "!": "0em", " ": "0.25em", "quad": "1em", "qquad": "2em"}
_ACCENTS = {"hat": "^", "tilde": "~", "bar": "¯", "vec": "→", "dot": "˙", "overline": "¯"}
_FONTS = {
    "mathrm": "", "text": "", "operatorname": "", "mathit": "font-style:italic", "mathtt": "font-family:monospace",
    "textit": "font-style:italic", "mathbf": "font-weight:bold", "mathsf": "font-family:sans-serif",
}  # fmt: skip
_ALPHABETS = {"mathcal": {"L": "ℒ", "S": "𝒮", "N": "𝒩", "F": "ℱ"}, "mathbb": {"E": "𝔼", "R": "ℝ", "P": "ℙ", "1": "𝟙"}}
_SIZES = frozenset("big Big bigg Bigg left right bigl bigr Bigl Bigr".split())
_IGNORED = frozenset("textstyle displaystyle limits nolimits".split())
_TEXT = {"backslash": "\\", "hat": "^", "sim": "~"}


def mathml(latex: str, display: bool = True) -> str:
    """One ``math`` element; what is not known is shown as its own name."""
    block = ' display="block"' if display else ""
    return f"<math{block}>{_Reader(latex).all()}</math>"


def unknown(latex: str) -> set[str]:
    """Commands in ``latex`` that `mathml` does not know."""
    found = {token[1:] for token in _TOKEN.findall(latex) if token.startswith("\\")}
    known = [_LETTERS, _SIGNS, _WORDS, _SPACES, _ACCENTS, _FONTS, _ALPHABETS, _SIZES, _IGNORED, _TEXT]
    return (
        found - {"frac", "tfrac", "dfrac", "sqrt", "\\", "begin", "end"} - {name for names in known for name in names}
    )


class _Reader:
    def __init__(self, latex: str) -> None:
        self.tokens: list[str] = _TOKEN.findall(latex)
        self.at = 0

    def all(self) -> str:
        return _row(list(self._until(None)))

    def _peek(self) -> str | None:
        while self.at < len(self.tokens) and self.tokens[self.at].isspace():
            self.at += 1
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def _take(self) -> str | None:
        token = self._peek()
        self.at += token is not None
        return token

    def _until(self, end: str | None) -> Iterator[str]:
        while (token := self._peek()) is not None and token != end:
            yield self._scripted()
        self._take()

    def _scripted(self) -> str:
        """An atom with what stands below and above it."""
        under_sum = self._peek() in ("\\sum", "\\prod")
        base = self._atom()
        scripts: dict[str, str] = {}
        while (token := self._peek()) in ("_", "^") and token is not None and token not in scripts:
            self._take()
            scripts[token] = self._atom()
        sub, sup = scripts.get("_"), scripts.get("^")
        low, high = ("under", "over") if under_sum else ("sub", "sup")
        if sub and sup:
            return f"<m{low}{high}>{base}{sub}{sup}</m{low}{high}>"
        if sub:
            return f"<m{low}>{base}{sub}</m{low}>"
        return f"<m{high}>{base}{sup}</m{high}>" if sup else base

    def _atom(self) -> str:
        token = self._take()
        if token is None:
            return "<mrow></mrow>"
        if token == "{":
            return _row(list(self._until("}")))
        if token.startswith("\\"):
            return self._command(token[1:])
        if token[0].isdigit():
            return f"<mn>{token}</mn>"
        if token.isalpha():
            return f"<mi>{escape(token)}</mi>"
        if token == "&":
            return "<mrow></mrow>"
        return f'<mo stretchy="false">{escape({"-": "−"}.get(token, token))}</mo>'

    def _command(self, name: str) -> str:
        if name in _LETTERS:
            return f"<mi>{_LETTERS[name]}</mi>"
        if name in _WORDS:
            return f'<mo lspace="0.17em" rspace="0.17em">{name}</mo>'
        if name in _SPACES:
            return f'<mspace width="{_SPACES[name]}"/>'
        if name in ("frac", "tfrac", "dfrac"):
            return f"<mfrac>{self._argument()}{self._argument()}</mfrac>"
        if name == "sqrt":
            return f"<msqrt>{self._argument()}</msqrt>"
        if name in _ACCENTS:
            return f'<mover accent="true">{self._argument()}<mo stretchy="false">{_ACCENTS[name]}</mo></mover>'
        if name in _ALPHABETS:
            text = self._text()
            return f"<mi>{''.join(_ALPHABETS[name].get(char, escape(char)) for char in text)}</mi>"
        if name in _FONTS:
            style = f' style="{_FONTS[name]}"' if _FONTS[name] else ""
            return f"<mtext{style}>{escape(self._text())}</mtext>"
        if name in _SIZES:
            sign = self._take() or ""
            sign = _SIGNS.get(sign[1:], sign[1:]) if sign.startswith("\\") else sign
            return f'<mo stretchy="true" minsize="1.6em" maxsize="1.6em">{escape(sign)}</mo>' if sign != "." else ""
        if name in _IGNORED:
            return ""
        if name in _SIGNS:
            return f"<mo>{escape(_SIGNS[name])}</mo>"
        return f"<mtext>{escape(name)}</mtext>"

    def _argument(self) -> str:
        r"""A group, or the next token; of ``12`` the first digit alone, as in ``\tfrac12``."""
        token = self._peek()
        if token is not None and len(token) > 1 and token.isdigit():
            self.tokens[self.at] = token[1:]
            return f"<mn>{token[0]}</mn>"
        return self._atom()

    def _text(self) -> str:
        """The letters of a group, escapes undone."""
        if self._peek() != "{":
            return self._take() or ""
        self._take()
        parts: list[str] = []
        depth = 1
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            self.at += 1
            depth += {"{": 1, "}": -1}.get(token, 0)
            if depth == 0:
                break
            if token not in ("{", "}"):
                known = token[1:]
                parts.append(_TEXT.get(known, _SIGNS.get(known, known)) if token.startswith("\\") else token)
        return "".join(parts)


def _row(items: list[str]) -> str:
    return items[0] if len(items) == 1 and items[0] else f"<mrow>{''.join(items)}</mrow>"
