"""The template of our own and the sandbox that runs templates.

`CHATML` is jinja text, so a checkpoint that carries it can be used by other programs as well. The
environment has what published templates expect of it: blocks that leave no blank lines, `tojson`
without escapes, `raise_exception`, `strftime_now`, and `generation` blocks. A template is code from
a stranger: the sandbox keeps it from everything but its arguments.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from endside.errors import UserError

if TYPE_CHECKING:
    import jinja2

# Tools are listed as Python functions and called in a fenced block, as the MiniCPM3 and 4 families
# learned it. A turn without reasoning shows an empty block wherever thinking is switched off, so a
# conversation only ever grows at its end.
CHATML = '''
{%- set python = {"string": "str", "integer": "int", "number": "float", "boolean": "bool",
                  "array": "list", "object": "dict"} %}
{%- macro function(tool) %}
{%- set it = tool.function or tool %}
{%- set fields = (it.parameters or {}).properties or {} %}
{%- set needed = (it.parameters or {}).required or [] %}
def {{ it.name }}(
    {%- for name in needed if name in fields %}
        {{- ", " if not loop.first }}{{ name }}: {{ kind(fields[name]) }}
    {%- endfor %}
    {%- for name in fields if name not in needed %}
        {{- ", " if needed or not loop.first }}{{ name }}: {{ kind(fields[name]) }} = None
    {%- endfor %}):
    """{{ it.description or it.name }}
    {%- if fields %}


    Args:
        {%- for name in fields %}

        {{ name }}: {{ fields[name].description or "" }}
        {%- if fields[name].enum %} One of {{ fields[name].enum | tojson }}.{% endif %}
        {%- endfor %}

    {%- endif %}

    """

{% endmacro %}
{%- macro kind(field) -%}
{{ python[field.type] or "Any" if field.type is string else "Any" }}
{%- endmacro %}
{%- macro system(content) -%}
<|im_start|>system
{{ content }}
{%- if tools %}
{{- "\n\n" if content -}}
# Functions
You can call these Python functions:
```python
{% for tool in tools %}
{{- function(tool) }}
{%- endfor -%}
```
To call some, write one call per line with keyword arguments in one block of this form, then wait:
<|tool_call_start|>
```python
name(argument="value")
```
<|tool_call_end|>
If none is needed, answer directly.
{%- endif -%}
<|im_end|>
{% endmacro %}
{%- if messages and messages[0].role != "system" and tools %}
{{- system("") }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == "system" and loop.first %}
{{- system(message.content) }}
{%- else %}
{{- "<|im_start|>" + message.role + "\n" }}
{%- if message.role == "assistant" %}
{%- if message.reasoning_content %}
{{- "<think>\n" + message.reasoning_content + "\n</think>\n" }}
{%- elif enable_thinking is defined and not enable_thinking
         and not message.content.startswith("<think>") %}
{{- "<think>\n\n</think>\n" }}
{%- endif %}
{%- if message.tool_calls %}
{{- "<|tool_call_start|>\n```python\n" }}
{%- for call in message.tool_calls %}
{%- set it = call.function or call %}
{{- it.name + "(" }}
{%- for name in it.arguments or {} %}
{{- ", " if not loop.first }}{{ name }}={{ it.arguments[name] | tojson }}
{%- endfor %}
{{- ")\n" }}
{%- endfor %}
{{- "```\n<|tool_call_end|>\n" }}
{%- endif %}
{%- endif %}
{{- message.content + "<|im_end|>\n" }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|im_start|>assistant\n" }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- "<think>\n\n</think>\n" }}
{%- endif %}
{%- endif %}
'''


def run(source: str, **variables: Any) -> str:
    """The text a template writes; UserError with its own words where it refuses."""
    from jinja2.exceptions import TemplateError

    try:
        return _compile(source).render(**variables)
    except (
        TemplateError,
        TypeError,
        ValueError,
        AttributeError,
        LookupError,
        OverflowError,
    ) as error:
        raise UserError(f"the chat template refuses the conversation: {error}") from error


@lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    """The environment that published templates are written for."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words; they are found without it."""

        tags = frozenset({"generation"})

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)
