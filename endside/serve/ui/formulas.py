"""Where a formula begins and ends in markdown: rules for the parser.

    inline   \\( … \\)    and    $ … $   on one line or a few
    block    \\[ … \\]    and    $$ … $$ at the start of a line

A dollar sign is common in prose, so a single one opens a formula only if no space follows it, and
closes it only if no space stands before it and no digit behind it ("$5 and $7" has no formula:
pandoc's rule). A backslash before the sign keeps it text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_block import StateBlock
    from markdown_it.rules_inline import StateInline

LONGEST_INLINE = 1_000  # characters; looking further for each of many dollars would take forever
BLOCKS = {"$$": "$$", "\\[": "\\]"}
INLINES = {"$$": "$$", "\\(": "\\)", "\\[": "\\]"}  # a block's marks inside a line of prose


def add_to(parser: MarkdownIt) -> None:
    """Adds both rules; \\( would otherwise be an escaped bracket."""
    parser.inline.ruler.before("escape", "math_inline", _inline)
    stops = {"alt": ["paragraph", "reference", "blockquote", "list"]}
    parser.block.ruler.before("fence", "math_block", _block, stops)


def _inline(state: StateInline, silent: bool) -> bool:
    found = _span(state.src, state.pos, state.posMax)
    if found is None:
        return False
    start, end, after = found
    if not silent:
        token = state.push("math_inline", "math", 0)
        token.content = state.src[start:end].strip()
        token.markup = state.src[state.pos : start]
    state.pos = after
    return True


def _span(text: str, at: int, limit: int) -> tuple[int, int, int] | None:
    """(first character, end, position after the closing mark) of the formula that opens at `at`."""
    mark, limit = text[at : at + 2], min(limit, at + LONGEST_INLINE)
    if mark in INLINES:
        end = text.find(INLINES[mark], at + 2, limit)
        return (at + 2, end, end + 2) if end > at + 2 else None
    if text[at] != "$" or text[at + 1 : at + 2] in ("", " ", "\t", "\n"):
        return None
    end = _closing_dollar(text, at + 1, limit)
    return (at + 1, end, end + 1) if end > at + 1 else None


def _closing_dollar(text: str, start: int, limit: int) -> int:
    """Where a single dollar closes what opened before `start`; -1: nowhere."""
    at = start
    while (at := text.find("$", at, limit)) >= 0:
        escaped = text[at - 1] == "\\"
        digit = text[at + 1 : at + 2].isdigit()
        if not escaped and not digit and not text[at - 1].isspace():
            return at
        at += 1
    return -1


def _block(state: StateBlock, first: int, last: int, silent: bool) -> bool:
    begin, end = state.bMarks[first] + state.tShift[first], state.eMarks[first]
    mark = state.src[begin : begin + 2]
    if mark not in BLOCKS or state.is_code_block(first):
        return False
    close = BLOCKS[mark]
    lines, line = [state.src[begin + 2 : end]], first
    while not lines[-1].rstrip().endswith(close):
        line += 1
        if line >= last or state.sCount[line] < state.blkIndent or state.isEmpty(line):
            return False
        lines.append(state.src[state.bMarks[line] + state.tShift[line] : state.eMarks[line]])
    if silent:
        return True
    token = state.push("math_block", "math", 0)
    token.content = "\n".join(lines).rstrip().removesuffix(close).strip()
    token.markup, token.map, token.block = mark, [first, line + 1], True
    state.line = line + 1
    return True
