"""An answer's markdown as HTML that is safe to show: the page itself runs no third-party script.

    text ── markdown-it ──► blocks ── Pygments, latex2mathml ──► HTML ── nh3 ──► safe HTML

Markdown is CommonMark with tables and strike-through; raw HTML in it stays text. Formulas stand
between $ … $, $$ … $$, \\( … \\) or \\[ … \\] and become MathML, which browsers draw themselves.
Images become links: the page must not fetch anything, least of all what a model wrote. Whatever the
libraries produce passes the sanitiser last, so a fault in one of them is not a hole in the page.

While an answer grows, its blocks do not change any more once another one stands behind them. So
`render` tells how much of the text is settled, and a page asks again for the rest only: the work
for an answer grows with its length, not with its square.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

LONGEST_TEXT = 400_000  # characters of one request
LONGEST_CODE = 40_000  # of a block that is coloured; lexers are regular expressions
LONGEST_FORMULA = 4_000

_TEXT_TAGS = {
    "p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "em", "s", "del", "code", "pre",
    "blockquote", "ul", "ol", "li", "a", "span", "div", "table", "thead", "tbody", "tr", "th", "td",
}  # fmt: skip
_MATH_TAGS = {
    "math", "mrow", "mi", "mn", "mo", "mtext", "ms", "mspace", "msub", "msup", "msubsup", "munder",
    "mover", "munderover", "mfrac", "msqrt", "mroot", "mtable", "mtr", "mtd", "mstyle", "mpadded",
    "mphantom", "menclose", "merror", "mmultiscripts",
}  # fmt: skip
TAGS = frozenset(_TEXT_TAGS | _MATH_TAGS)
_FORMULA = {
    "display", "mathvariant", "stretchy", "fence", "form", "separator", "lspace", "rspace",
    "accent", "accentunder", "columnalign", "rowspacing", "columnspacing", "displaystyle",
    "scriptlevel", "linethickness", "minsize", "maxsize", "movablelimits", "notation", "width",
    "height", "depth", "columnlines", "rowlines", "symmetric", "largeop",
}  # fmt: skip
ATTRIBUTES = {
    **dict.fromkeys(_MATH_TAGS, _FORMULA),
    "a": {"href", "title"},
    "code": {"class"},
    "span": {"class"},
    "ol": {"start"},
    "th": {"class"},
    "td": {"class"},
}


@dataclass(frozen=True)
class Rendered:
    """The blocks that stay as they are, and those that may still change."""

    html: str
    tail: str
    settled: int  # length of the text of `html`, in UTF-16 units: as a page counts characters


def render(text: str) -> Rendered:
    """Safe HTML of a text with line feeds only; what follows its last complete block is `tail`."""
    parser = _parser()
    tokens = parser.parse(text)
    starts = [i for i, one in enumerate(tokens) if one.level == 0 and one.map and one.nesting >= 0]
    if len(starts) < 2:
        return Rendered("", _write(parser, tokens), 0)
    last = starts[-1]
    lines = text.split("\n")
    settled = "\n".join(lines[: tokens[last].map[0]]) + "\n"
    units = len(settled.encode("utf-16-le", "surrogatepass")) // 2
    return Rendered(_write(parser, tokens[:last]), _write(parser, tokens[last:]), units)


def _write(parser: MarkdownIt, tokens: list[Token]) -> str:
    import nh3

    return nh3.clean(
        parser.renderer.render(tokens, parser.options, {}),
        tags=set(TAGS),
        attributes={tag: set(names) for tag, names in ATTRIBUTES.items()},
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    from endside.serve.ui import formulas

    parser = MarkdownIt("commonmark", {"html": False, "highlight": _highlight})
    parser.enable(["table", "strikethrough"])
    formulas.add_to(parser)
    for name, write in {
        "image": _image, "math_inline": _formula, "math_block": _formula,
        "th_open": _cell, "td_open": _cell,
    }.items():  # fmt: skip
        parser.add_render_rule(name, write)
    return parser


def _highlight(code: str, language: str, _attributes: str) -> str:
    """Lines of code as spans with classes; an unknown language stays plain."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    name = html.escape(language.strip().lower()[:40])
    body = html.escape(code)
    if name and len(code) <= LONGEST_CODE:
        try:
            lexer = get_lexer_by_name(name, stripnl=False)
            body = highlight(code, lexer, HtmlFormatter(nowrap=True, classprefix="h-"))
        except ClassNotFound:
            pass
    return f'<pre><code class="language-{name}">{body}</code></pre>'


def _image(_self: Any, tokens: list[Token], at: int, _options: Any, _env: Any) -> str:
    source = html.escape(str(tokens[at].attrs.get("src", "")))
    return f'<a href="{source}">{html.escape(tokens[at].content) or source}</a>'


def _cell(_self: Any, tokens: list[Token], at: int, _options: Any, _env: Any) -> str:
    """A table cell, its alignment as a class: the page allows no style attributes."""
    style = str(tokens[at].attrs.get("style", ""))
    side = style.removeprefix("text-align:")
    tag = tokens[at].tag
    return f'<{tag} class="{html.escape(side)}">' if side else f"<{tag}>"


def _formula(_self: Any, tokens: list[Token], at: int, _options: Any, _env: Any) -> str:
    token = tokens[at]
    block = token.type == "math_block"
    return formula(token.content, block=block)


def formula(latex: str, *, block: bool) -> str:
    """MathML of a formula; its source as code where it cannot be read (or not yet)."""
    from latex2mathml.converter import convert

    source = f"<code>{html.escape(latex)}</code>"
    if len(latex) > LONGEST_FORMULA:
        return source
    try:
        written = convert(latex, display="block" if block else "inline")
    except _formula_errors():
        return f"<p>{source}</p>" if block else source
    return written


@lru_cache(maxsize=1)
def _formula_errors() -> tuple[type[Exception], ...]:
    """What its converter raises for unfinished input: errors without a common ancestor."""
    from latex2mathml import exceptions

    own = [one for one in vars(exceptions).values() if isinstance(one, type)]
    return (*own, LookupError, ValueError, TypeError, AttributeError, StopIteration, RecursionError)
