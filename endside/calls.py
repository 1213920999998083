"""Tool calls as models write them, read into a name and arguments.

    MiniCPM3, 4   Python calls in a fence, several if the model likes; literals of Python or JSON:
                      ```python
                      weather(city="Paris", days=3)
                      ```
    MiniCPM5      <function name="weather"><param name="city">Paris</param></function>, values with
                  markup in <![CDATA[ ]]>
    others        {"name": "weather", "arguments": {"city": "Paris"}}

Python is parsed by Python's own parser and never run: only calls with literal arguments pass. Two
things that tools are named with and Python does not take are rewritten outside of strings first:
hyphens (`get-weather`) and keywords as argument names (`from=`); the real name is the tool's.

What a call names is checked against the tools of the request: an unknown function or argument and
a missing required one are refused (`Malformed`), because running it would do something else than
was meant. Without a list of tools every name passes.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Tool = Mapping[str, Any]
LITERALS = {"true": True, "false": False, "null": None}
ESCAPES = {"&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&amp;": "&"}
CDATA, CDATA_END = "<![CDATA[", "]]>"
# a string with whatever quotes; between two of them stands code
PYTHON_STRING = re.compile(
    r'''("""(?:\\.|[^\\])*?"""|'{3}(?:\\.|[^\\])*?'{3}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')''',
    re.DOTALL,
)
HYPHENATED = re.compile(r"[A-Za-z_]\w*(?:-[A-Za-z_]\w*)+")
KEYWORD_ARGUMENT = re.compile(rf"(?<=[(,\s])({'|'.join(keyword.kwlist)})(?=\s*=(?!=))")
FENCE = re.compile(r"\s*```(?:python|py)?[ \t]*\n(.*?)\n?\s*```\s*", re.DOTALL)
FUNCTION = re.compile(r"\s*<function\s+name=(?:\"([^\"<>]*)\"|'([^'<>]*)')\s*>")
PARAMETER = re.compile(r"\s*<param\s+name=(?:\"([^\"<>]*)\"|'([^'<>]*)')\s*>")


class Malformed(Exception):
    """The text is no call that may be made; says why."""


@dataclass(frozen=True)
class Call:
    """One call: arguments is the text of a JSON object."""

    name: str
    arguments: str


def read_python(text: str, tools: Sequence[Tool] | None) -> list[Call]:
    """The calls of a fenced block, or of bare Python lines."""
    fenced = FENCE.fullmatch(text)
    parts = PYTHON_STRING.split((fenced[1] if fenced else text).strip())
    names = {one.replace("-", "_"): one for code in parts[::2] for one in HYPHENATED.findall(code)}
    parts[::2] = [_python_names(one) for one in parts[::2]]
    try:
        body = _silently(ast.parse, "".join(parts)).body
        calls = [one.value for one in body if isinstance(one, ast.Expr)]
        if not body or len(calls) < len(body):
            raise Malformed("the block holds more than calls")
        return [_python_call(one, names, tools) for one in calls]
    except UNREADABLE as error:
        raise Malformed(f"the calls are no Python: {error}") from error


def read_xml(text: str, tools: Sequence[Tool] | None) -> list[Call]:
    """`<function ...>...</function>`, once or several times."""
    calls = []
    while text.strip():
        opened, end = FUNCTION.match(text), outside_data(text, "</function>")
        if not opened or end < 0:
            raise Malformed("the call has no function name, or no end")
        name = opened[1] or opened[2] or ""
        tool = _tool(name, tools)
        inner = text[opened.end() : end]
        calls.append(_checked(name, _read_parameters(name, inner, tool), tool))
        text = text[end + len("</function>") :]
    return calls


def _read_parameters(name: str, text: str, tool: Tool | None) -> dict[str, Any]:
    given: dict[str, Any] = {}
    while text.strip():
        opened, end = PARAMETER.match(text), outside_data(text, "</param>")
        if not opened or end < 0:
            raise Malformed(f"{name} has text that is no parameter")
        label = opened[1] or opened[2] or ""
        if label in given:
            raise Malformed(f"{name} has {label} twice")
        value = _plain(text[opened.end() : end])
        given[label] = _typed(value, (_parameters(tool) or {}).get(label))
        text = text[end + len("</param>") :]
    return given


def outside_data(text: str, mark: str, start: int = 0) -> int:
    """Where the mark first stands outside of CDATA; -1 where it does not, or CDATA has no end."""
    while True:
        found, data = text.find(mark, start), text.find(CDATA, start)
        if found < 0 or not 0 <= data < found:
            return found
        start = text.find(CDATA_END, data)
        if start < 0:
            return -1


def _plain(value: str) -> str:
    """A parameter's text: CDATA as it is, the rest without its XML escapes."""
    parts = re.split(r"<!\[CDATA\[(.*?)\]\]>", value, flags=re.DOTALL)
    plain = [re.sub("&[a-z]+;", _unescape, one) for one in parts[::2]]
    parts[::2] = plain if len(parts) == 1 else [one.strip() for one in plain]
    return "".join(parts)


def _unescape(found: re.Match[str]) -> str:
    return ESCAPES.get(found[0], found[0])


def read_json(text: str, tools: Sequence[Tool] | None) -> list[Call]:
    """One object, or a list of them, with "name" and "arguments"."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the call is no JSON: {error}") from error
    calls = []
    for one in found if isinstance(found, list) else [found]:
        name = one.get("name") if isinstance(one, dict) else None
        given = one.get("arguments", one.get("parameters", {})) if isinstance(one, dict) else None
        if not isinstance(name, str) or not isinstance(given, dict):
            raise Malformed("the call is no object with a name and arguments")
        calls.append(_checked(name, given, _tool(name, tools)))
    return calls


Read = Callable[[str, Sequence[Tool] | None], list[Call]]
# what Python's parser and json raise for a text that is neither
UNREADABLE = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)


def _silently(read: Callable[[str], Any], text: str) -> Any:
    """`read` without Python's warnings about unknown escapes in strings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read(text)


def _python_names(code: str) -> str:
    code = HYPHENATED.sub(lambda found: found[0].replace("-", "_"), code)
    return KEYWORD_ARGUMENT.sub(r"\1_", code)


def _python_call(node: ast.expr, names: Mapping[str, str], tools: Sequence[Tool] | None) -> Call:
    """names: identifier -> how the model wrote it, with hyphens."""
    if not isinstance(node, ast.Call):
        raise Malformed("the block holds more than calls")
    name = ".".join(names.get(one, one) for one in _dotted(node.func))
    tool = _tool(name, tools)
    known = _parameters(tool)
    if len(node.args) > len(known or ()):
        raise Malformed(f"{name} has arguments without names")
    given = dict(zip(known or (), map(_literal, node.args)))
    for one in node.keywords:
        if one.arg is None:
            raise Malformed(f"{name} has arguments without names")
        label = _same(one.arg, known or ()) or names.get(one.arg) or _without_mark(one.arg)
        if label in given:
            raise Malformed(f"{name} has {label} twice")
        given[label] = _literal(one.value)
    return _checked(name, given, tool)


def _without_mark(label: str) -> str:
    bare = label.removesuffix("_")
    return bare if keyword.iskeyword(bare) else label


def _dotted(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Attribute):
        return [*_dotted(node.value), node.attr]
    if not isinstance(node, ast.Name):
        raise Malformed("what is called has no name")
    return [node.id]


def _literal(node: ast.expr) -> Any:
    """The value of a literal of Python or JSON."""
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        if any(one is None for one in node.keys):
            raise Malformed("an argument is no literal")
        keys = [_literal(one) for one in node.keys if one is not None]
        if not all(isinstance(one, str) for one in keys):
            raise Malformed("an object has a key that is no text")
        return dict(zip(keys, map(_literal, node.values)))
    if isinstance(node, ast.Name) and node.id in LITERALS:
        return LITERALS[node.id]
    value = ast.literal_eval(node) if isinstance(node, ast.Constant | ast.UnaryOp) else node
    if not isinstance(value, str | int | float | None):
        raise Malformed("an argument is no literal of JSON")
    return value


def _tool(name: str, tools: Sequence[Tool] | None) -> Tool | None:
    """The tool of that name, as it is spelled in Python; None where no tools are known."""
    if tools is None:
        return None
    listed = {one["name"]: one for one in (tool.get("function", tool) for tool in tools)}
    found = _same(name, listed)
    if found is None:
        raise Malformed(f"there is no tool {name}")
    return listed[found]


def _same(name: str, known: Mapping[str, Any] | Sequence[str]) -> str | None:
    """The known name that this one stands for, exactly or in Python's spelling."""
    if name in known:
        return name
    spelled = {name.replace("-", "_"), _without_mark(name)}
    return next((one for one in known if one.replace("-", "_") in spelled), None)


def _parameters(tool: Tool | None) -> dict[str, Any] | None:
    """Name -> schema of the tool's arguments; None where it does not say."""
    listed = ((tool or {}).get("parameters") or {}).get("properties")
    return listed if isinstance(listed, dict) else None


def _checked(name: str, given: dict[str, Any], tool: Tool | None) -> Call:
    known = _parameters(tool)
    schema = (tool or {}).get("parameters") or {}
    if known is not None and not schema.get("additionalProperties"):
        strange = [one for one in given if one not in known]
        if strange:
            raise Malformed(f"{name} has no argument {strange[0]}")
    missing = [one for one in schema.get("required") or () if one not in given]
    if missing:
        raise Malformed(f"{name} needs the argument {missing[0]}")
    try:
        text = json.dumps(given, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except UNREADABLE as error:
        raise Malformed(f"{name} has an argument that is no JSON: {error}") from error
    return Call(tool["name"] if tool else name, text)


def _typed(text: str, schema: Any) -> Any:
    """The value that a parameter's text stands for, by the type that its schema names."""
    kinds = _kinds(schema)
    if kinds == {"string"}:
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            value = _silently(read, text.strip())
        except UNREADABLE:
            continue
        if "string" in kinds and value is not None:
            return text
        if isinstance(value, str | int | float | list | tuple | dict | None):
            return value
    return text


def _kinds(schema: Any) -> set[str]:
    """Types that a schema names; a choice of schemas counts as one."""
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type")
    kinds = {named} if isinstance(named, str) else {*named} if isinstance(named, list) else set()
    for one in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        kinds |= _kinds(one)
    return kinds or {"string" for one in schema.get("enum", ()) if isinstance(one, str)}
