"""Markdown as safe HTML: what is shown, what is settled, and what must never get through."""

from __future__ import annotations

import gc
import re
import time

import pytest

from endside.serve.ui.markdown import TAGS, render

PROSE = """# Title

A line with $x^2$ and \\(a + b\\), which costs $5 and $7.

$$
\\frac{a}{b}
$$

```python
print("<b>")
```

| a | b |
|:--|--:|
| 1 | 2 |

Last words."""


def whole(text: str) -> str:
    done = render(text)
    return done.html + done.tail


def test_formulas_become_mathml_and_prices_stay_text() -> None:
    html = whole(PROSE)
    assert html.count("<math") == 3, html
    assert "<mfrac>" in html and "<msup>" in html, html
    assert "costs $5 and $7" in html, html


def test_code_is_coloured_and_escaped() -> None:
    html = whole(PROSE)
    assert 'class="language-python"' in html and 'class="h-nb">print' in html, html
    assert "&lt;b&gt;" in html and "<b>" not in html, html


def test_table_cells_keep_their_side_without_style() -> None:
    html = whole(PROSE)
    assert '<td class="right">2</td>' in html, html
    assert "style=" not in html, html


def test_settled_text_is_everything_before_the_last_block() -> None:
    done = render(PROSE)
    assert PROSE[done.settled :].strip() == "Last words."
    assert "Last words" in done.tail and "Last words" not in done.html


def test_settled_counts_utf16_units_as_a_page_does() -> None:
    first = "👋🏽 naïve 你好\n\n"
    assert render(first + "next").settled == len(first.encode("utf-16-le")) // 2


def test_growing_text_ends_as_the_whole_text() -> None:
    """What a page does: append what is settled, ask again for the rest only."""
    done, start = "", 0
    for end in range(1, len(PROSE) + 1):
        part = render(PROSE[start:end])
        done, start = done + part.html, start + part.settled
    squeeze = lambda html: re.sub(r"\s+", "", html)
    assert squeeze(done + render(PROSE[start:]).tail) == squeeze(whole(PROSE))


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "[x](javascript:alert(1))",
        "[x](JaVaScRiPt:alert(1))",
        "[x](data:text/html,<script>alert(1)</script>)",
        "![x](http://elsewhere/pixel.png)",
        '<img src=x onerror="alert(1)">',
        '```" onclick="alert(1)\ncode\n```',
        "```<script>alert(1)</script>\ncode\n```",
        "$\\text{<img src=x onerror=alert(1)>}$",
        "$\\href{javascript:alert(1)}{x}$",
        '$$\\color{red" onload="alert(1)}x$$',
        "<svg/onload=alert(1)>",
        "<a href='javascript:alert(1)'>x</a>",
        '| a |\n|:-" onclick="alert(1)-:|\n| b |',
    ],
)
def test_nothing_active_gets_through(text: str) -> None:
    html = whole(text)
    found = re.findall(r"<\s*([a-zA-Z0-9-]+)([^>]*)>", html)
    for tag, attributes in found:
        assert tag in TAGS, f"<{tag}> in {html}"
        assert not re.search(r"\bon\w+\s*=", attributes), html
        assert "javascript:" not in attributes.lower() and "data:" not in attributes, html
    assert "<script" not in html and "<img" not in html and "<svg" not in html, html


@pytest.mark.parametrize(
    "latex", ["\\frac{a", "x_", "{", "\\begin{matrix} a & b", "\\left( x", "^"]
)
def test_unfinished_formula_is_no_error(latex: str) -> None:
    assert "<math" in whole(f"${latex}$ end") or "<code>" in whole(f"${latex}$ end")


@pytest.mark.parametrize(
    "unit",
    ["$a ", "[", "![", "\\(", "\\[a", "*a ", "_a", "`", "<", "> ", "- ", "|a", "$$\n", "1. "],
)
def test_hostile_text_takes_no_longer_than_its_length_allows(unit: str) -> None:
    """Four times the text may take about four times as long, never sixteen times.

    Without the garbage collector, whose pass over everything that other tests left in the process
    takes as long as the text does, and the least of three: what the text itself needs.
    """

    def once(text: str) -> float:
        begin = time.thread_time()
        render(text)
        return time.thread_time() - begin

    def seconds(count: int) -> float:
        gc.disable()
        try:
            return min(once(unit * (count // len(unit))) for _ in range(3))
        finally:
            gc.enable()

    seconds(1000)
    short, long = seconds(8_000), seconds(32_000)
    assert long < 10 * short + 0.5, f"{short:.3f} s, then {long:.3f} s"
