"""What requests may say: the fields of OpenAI's API that act here, and a few of our own.

Unknown fields are passed over, as every server of this API does: clients send many that mean
nothing to a local model. Values are checked where they are used (SamplingConfig, chat.render), so
that the command line and the server refuse alike.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

LARGEST_WHOLE = 2**31 - 1
Whole = Annotated[int, Field(ge=0, le=LARGEST_WHOLE)]
Positive = Annotated[int, Field(ge=1, le=LARGEST_WHOLE)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=4_000_000)]


class Body(BaseModel):
    """Fields of every request."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """stream_options."""

    include_usage: bool = False


class Sampling(Body):
    """How tokens are chosen; None: the model's own default."""

    model: str | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Whole | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def options(self) -> dict[str, Any]:
        """The fields of SamplingConfig that were given."""
        names = (
            "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
            "frequency_penalty", "logit_bias",
        )  # fmt: skip
        found = {name: getattr(self, name) for name in names}
        found["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return found


class JsonSchema(Body):
    """response_format.json_schema."""

    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """response_format."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class TemplateOptions(Body):
    """chat_template_kwargs."""

    enable_thinking: bool | None = None


class NamedFunction(Body):
    """The function of a tool_choice."""

    name: str


class NamedTool(Body):
    """tool_choice that names a tool."""

    type: Literal["function"] = "function"
    function: NamedFunction


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=10_000)]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=1_000)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    thinking_budget: Whole | None = None
    regex: Text | None = None
    grammar: Text | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Text | list[Text] | list[Whole] | list[list[Whole]]
    max_tokens: Positive | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: Text | None = None
    best_of: Annotated[int, Field(ge=1, le=16)] | None = None
    regex: Text | None = None
    grammar: Text | None = None
    json_schema: dict[str, Any] | None = None


class TokenizeRequest(Body):
    """POST /tokenize: a text, or a conversation rendered with the chat template."""

    prompt: Text | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: Annotated[list[Whole], Field(max_length=1_000_000)]
