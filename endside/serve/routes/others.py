"""The small routes: models, tokenize, detokenize, embeddings, health, metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from endside.serve.errors import ApiError
from endside.serve.schema import DetokenizeRequest, TokenizeRequest
from endside.serve.state import State

if TYPE_CHECKING:
    from fastapi import FastAPI


def add_to(app: FastAPI, state: State) -> None:
    """The routes."""
    from fastapi import Response
    from fastapi.responses import JSONResponse

    guard = list(state.guard)

    def model() -> dict[str, Any]:
        return {
            "id": state.model, "object": "model", "created": state.created, "owned_by": "local",
            "max_model_len": state.llm.context,
        }  # fmt: skip

    @app.get("/v1/models", dependencies=guard)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{name:path}", dependencies=guard)
    async def one_model(name: str) -> dict[str, Any]:
        state.check_model(name)
        return model()

    @app.post("/tokenize", dependencies=guard)
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt")
        if body.messages is not None:
            ids = list(state.llm.render(body.messages))
        else:
            ids = state.llm.tokenizer.encode(body.prompt or "", bos=body.add_special_tokens)
        return {"tokens": list(ids), "count": len(ids), "max_model_len": state.llm.context}

    @app.post("/detokenize", dependencies=guard)
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        size = state.llm.engine.executor.vocab_size
        wrong = [one for one in body.tokens if one >= size]
        if wrong:
            raise ApiError(
                400, f"token {wrong[0]}: the model knows 0 to {size - 1}", param="tokens"
            )
        return {"prompt": state.llm.tokenizer.decode(body.tokens)}

    @app.post("/v1/embeddings", dependencies=guard)
    async def embeddings() -> dict[str, Any]:
        raise ApiError(
            404, f"{state.model} is a language model without embeddings: ask an embedding model",
            code="model_not_found",
        )  # fmt: skip

    async def health() -> Any:
        runner = state.runner
        well = runner.failure is None and not runner.closing
        status = "ok" if well else runner.failure or "shutting down"
        return JSONResponse({"status": status, "model": state.model}, 200 if well else 503)

    async def metrics() -> Any:
        return Response(runner_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    runner_text = state.runner.metrics.text
    health.__annotations__ = metrics.__annotations__ = {}
    app.get("/health")(health)
    app.get("/metrics", dependencies=guard, include_in_schema=False)(metrics)
