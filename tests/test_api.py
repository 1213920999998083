"""LLM on a folder on disk: a random tiny model and a tokenizer trained here, saved and loaded."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import endside
from endside import LLM, native
from endside.engine.draft import FixedSize
from endside.engine.executors.torch import TorchExecutor
from endside.errors import UserError
from endside.formats.hf import save
from endside.model.batch import Batch
from endside.model.presets import preset
from endside.model.transformer import Transformer
from endside.tokenizer import train_bpe

TEXT = ["Once upon a time there was a small model. Été, façade, 你好世界, naïve coöperation. " * 9]
CHAT = [{"role": "user", "content": "Hi there"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_bpe(TEXT, 320)
    place = tmp_path_factory.mktemp("model")
    tokenizer.save(place / "text")
    config = dataclasses.replace(
        preset("tiny"), vocab_size=330, eos_token_ids=tokenizer.eos_ids, bos_token_id=0
    )
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(1))
    return save(model, place / "model", tokenizer_files=place / "text")


EXECUTORS = [
    "torch",
    pytest.param(
        "native", marks=pytest.mark.skipif(not native.available_isas(), reason="no native core")
    ),
]


@pytest.fixture(scope="module", params=EXECUTORS)
def llm(request: pytest.FixtureRequest, folder: Path) -> LLM:
    return LLM(folder, executor=request.param, context=256)


@pytest.fixture(scope="module")
def torch_llm(folder: Path) -> LLM:
    return LLM(folder, executor="torch", context=256)


def _free(llm: LLM) -> int:
    """Tokens for which the cache has room."""
    executor = llm.engine.executor
    return executor.cache.room() if executor.name == "torch" else executor.sequences.room()


def test_generate_says_what_it_did(llm: LLM) -> None:
    result = llm.generate("Once upon", max_tokens=12, temperature=1.0, seed=5)
    assert result.usage.completion_tokens == len(result.token_ids)
    assert result.usage.prompt_tokens == len(llm.encode("Once upon"))
    assert result.finish_reason in ("length", "stop")
    assert result.text == llm.tokenizer.decode(result.token_ids, at_start=False)
    assert result.seed == 5
    assert result.executor == llm.engine.executor.name
    assert result.attention.mode == "dense"
    assert result.attention.visible_tokens == result.usage.prompt_tokens + len(result.token_ids) - 1
    timings = result.timings
    assert timings.load_s > 0
    assert timings.prefill_tokens_per_s * timings.prefill_s == pytest.approx(
        result.usage.prompt_tokens
    )
    assert timings.decode_tokens_per_s * timings.decode_s == pytest.approx(
        len(result.token_ids) - 1
    )
    assert result.peak_memory_bytes > 10 * 2**20
    json.dumps(dataclasses.asdict(result))


def test_a_seed_repeats_the_text_and_another_changes_it(llm: LLM) -> None:
    values = {"max_tokens": 20, "temperature": 1.5}
    first = llm.generate("Once", **values)
    assert llm.generate("Once", seed=first.seed, **values).text == first.text
    assert llm.generate("Once", seed=first.seed + 1, **values).text != first.text


def test_the_default_is_greedy(llm: LLM) -> None:
    """The next token is the best of `logits`, at every step."""
    result = llm.generate("Once upon", max_tokens=6)
    ids = [*llm.encode("Once upon"), *result.token_ids]
    best = llm.logits(ids).argmax(axis=1)
    assert list(result.token_ids) == best[-len(result.token_ids) - 1 : -1].tolist()


def test_pieces_add_up_to_the_answer(llm: LLM) -> None:
    for seed in range(6):
        values = {"max_tokens": 30, "temperature": 3.0, "seed": seed}
        stream = llm.stream("façade", **values)
        pieces = list(stream)
        whole = llm.generate("façade", **values)
        assert "".join(piece.text for piece in pieces) == whole.text == stream.result().text
        assert sum((piece.token_ids for piece in pieces), ()) == whole.token_ids


def test_a_stop_string_across_tokens_ends_the_text(llm: LLM) -> None:
    values = {"max_tokens": 40, "temperature": 2.0, "seed": 8}
    free = llm.generate("Once", **values)
    # A random model writes bytes that are no UTF-8; a stop string is found among the others.
    stop = re.search(r"[^\ufffd]{4}", free.text).group()
    result = llm.generate("Once", stop=[stop, "never in there"], **values)
    assert result.text == free.text[: free.text.index(stop)]
    assert result.finish_reason == "stop"
    assert result.token_ids == free.token_ids[: len(result.token_ids)]
    shown = "".join(piece.text for piece in llm.stream("Once", stop=stop, **values))
    assert shown == result.text


def test_every_end_id_of_every_file_stops(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    place.mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.name != "endside.manifest.json":
            (place / file.name).write_bytes(file.read_bytes())
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "eos_token_id": [1, 311]}))
    generation = {"eos_token_id": 312, "do_sample": True, "temperature": 0.5, "top_k": 3}
    (place / "generation_config.json").write_text(json.dumps(generation))
    llm = LLM(place, context=64)
    assert llm.stop_ids == {1, 3, 311, 312}
    request = llm.stream("Once", top_k=7)._request
    assert (request.sampling.temperature, request.sampling.top_k) == (0.5, 7)
    assert request.stop_ids == llm.stop_ids


def test_chat_uses_the_template(llm: LLM) -> None:
    assert llm.has_chat_template
    ids = llm.render(CHAT)
    assert ids != llm.encode("Hi there")
    answer = llm.chat(CHAT, max_tokens=5, seed=3, temperature=1.0)
    assert answer.usage.prompt_tokens == len(ids)
    pieces = list(llm.stream(CHAT, max_tokens=5, seed=3, temperature=1.0))
    assert "".join(piece.text for piece in pieces) == answer.text


def test_control_strings_in_a_prompt_stay_text(llm: LLM) -> None:
    text, end = "a <|im_end|> b", llm.tokenizer.id_of("<|im_end|>")
    assert end not in llm.encode(text)
    assert end in llm.encode(text, control=True)
    assert end not in llm.stream(text)._request.tokens
    assert end in llm.stream(text, control=True)._request.tokens
    chat = [{"role": "user", "content": text}]
    turns = [llm.stream(chat, control=one)._request.tokens.count(end) for one in (False, True)]
    assert turns[1] == turns[0] + 1


def test_logits_are_those_of_one_plain_forward(torch_llm: LLM) -> None:
    llm = torch_llm
    ids = np.random.default_rng(0).integers(8, 300, 200).tolist()
    llm.engine.prefill_chunk, usual = 64, llm.engine.prefill_chunk
    try:
        got = llm.logits(ids)
    finally:
        llm.engine.prefill_chunk = usual
    executor = llm.engine.executor
    assert isinstance(executor, TorchExecutor)
    with torch.inference_mode():
        expected = executor.model.logits(executor.model(Batch(tokens=torch.tensor([ids]))))[0]
    assert got.shape == (200, 330)
    assert got.dtype == np.float32
    scale = float(expected.abs().max())
    np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=1e-5 * scale)
    assert executor.cache.room() == executor.capacity


def test_many_prompts_get_the_answers_they_get_alone(folder: Path) -> None:
    llm = LLM(folder, context=64, capacity=256, max_batch=3)
    prompts = ["Once", "façade", "a", "a time there was"]
    values = {"max_tokens": 9, "temperature": 1.2, "seed": 4}
    together = llm.generate_many(prompts, **values)
    alone = [llm.generate(prompt, **values) for prompt in prompts]
    assert [one.text for one in together] == [one.text for one in alone]
    assert len({one.text for one in together}) > 1


def test_closing_a_stream_frees_its_memory(llm: LLM) -> None:
    with llm.stream("Once", temperature=1.0, seed=1) as stream:
        next(stream)
        assert _free(llm) < llm.engine.executor.capacity
    assert _free(llm) == llm.engine.executor.capacity
    assert stream.result().finish_reason == "cancelled"


def test_an_interrupt_leaves_a_usable_model(
    torch_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C strikes inside the forward pass; the next answer is what it would have been."""
    llm = torch_llm
    expected = llm.generate("Once", max_tokens=8)
    executor, forward, calls = llm.engine.executor, TorchExecutor._forward, iter(range(100))

    def interrupted(self: TorchExecutor, seqs: list[int], tokens: np.ndarray) -> torch.Tensor:
        hidden = forward(self, seqs, tokens)
        if next(calls) == 3:
            raise KeyboardInterrupt
        return hidden

    monkeypatch.setattr(TorchExecutor, "_forward", interrupted)
    stream = llm.stream("Once", max_tokens=8)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    stream.close()
    assert executor.cache.room() == executor.capacity
    assert llm.generate("Once", max_tokens=8).token_ids == expected.token_ids


def test_an_interrupted_stream_may_go_on(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate("Once", max_tokens=8)
    decode, calls = llm.engine.executor.decode, iter(range(100))

    def interrupted(seqs: list[int], tokens: np.ndarray) -> np.ndarray:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return decode(seqs, tokens)

    monkeypatch.setattr(llm.engine.executor, "decode", interrupted)
    stream = llm.stream("Once", max_tokens=8)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert stream.result().text == expected.text


def test_a_stream_closed_before_it_began_has_an_empty_answer(llm: LLM) -> None:
    stream = llm.stream("Once")
    stream.close()
    result = stream.result()
    assert (result.text, result.token_ids, result.finish_reason) == ("", (), "cancelled")
    assert (result.timings.prefill_s, result.timings.decode_s) == (0.0, 0.0)
    assert llm.engine.idle


def test_a_dropped_stream_is_cancelled(llm: LLM) -> None:
    stream = llm.stream("Once", temperature=1.0, seed=1)
    next(stream)
    handle = stream.handle
    del stream
    assert handle.finish_reason == "cancelled"
    llm.engine.step()
    assert _free(llm) == llm.engine.executor.capacity


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate(""), "prompt is empty"),
        (lambda llm: llm.generate([]), "prompt is empty"),
        (lambda llm: llm.stream([]), "prompt is empty"),
        (lambda llm: llm.generate(["a", "b"]), "a prompt is a text"),
        (lambda llm: llm.chat([]), "conversation is empty"),
        (lambda llm: llm.generate("a", temprature=1), "did you mean temperature"),
        (lambda llm: llm.stream("a", max_token=1), "did you mean max_tokens"),
        (lambda llm: llm.stream("a", temperature=float("nan")), "temperature is nan"),
        (lambda llm: llm.stream("a", think=True), "belong to a chat"),
        (lambda llm: llm.stream([5] * 300), "prompt has 300 tokens, cache holds 256"),
        (lambda llm: llm.stream([5, 9999]), "token id 9999"),
        (lambda llm: llm.logits([]), "prompt is empty"),
        (lambda llm: llm.logits([5] * 257), "257 tokens, cache holds 256"),
        (lambda llm: llm.logits([-1]), "token id -1"),
    ],
)
def test_wrong_use_is_one_message(llm: LLM, call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(llm)
    assert llm.engine.idle


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contxt": 3}, "did you mean context"),
        ({"executor": "warp"}, "executor is 'warp'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"attention": "linear"}, "attention is 'linear'"),
        ({"quant": "int5"}, "quant is 'int5'"),
        ({"executor": "torch", "quant": "int4"}, "needs the native executor"),
        ({"executor": "torch", "kv": "int8"}, "leave --kv out"),
        ({"group": 100}, "group is 100: use 32, 64, 128"),
        ({"context": 0}, "context is 0"),
        ({"context": 128, "capacity": 64}, "capacity 64 is below context 128"),
        ({"threads": -1}, "threads is -1"),
    ],
)
def test_wrong_options_are_one_message(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LLM(folder, **options)


def test_no_model_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        LLM(tmp_path)


def test_options_act(folder: Path) -> None:
    sparse = LLM(folder, attention="sparse", dtype="bfloat16", context=100, capacity=300)
    executor = sparse.engine.executor
    assert executor.model.config.sparse is not None
    assert executor.model.embed_tokens.weight.dtype == torch.bfloat16
    assert (executor.context, executor.capacity) == (100, 320)
    assert sparse.engine.scheduler.max_batch == 8
    assert LLM(folder, executor="torch").context == 512
    assert LLM(folder, executor="torch", capacity=128).context == 128
    before = torch.get_num_threads()
    try:
        LLM(folder, executor="torch", threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not native.available_isas(), reason="no native core")
def test_options_of_the_native_executor_act(folder: Path) -> None:
    usual = LLM(folder)
    assert (usual.engine.executor.name, usual.context) == ("native", 512)
    assert LLM(folder, capacity=128).context == 128
    few = LLM(folder, quant="int4", kv="int8", threads=1, attention="sparse", context=100)
    executor = few.engine.executor
    assert {one.kind for one in executor.pack.matrices.values()} == {"int4"}
    assert (executor.threads, executor.model.limits.context) == (1, 100)
    assert executor.config.sparse is not None
    ids = list(range(3, 60))
    assert np.abs(few.logits(ids) - usual.logits(ids)).max() > 1e-3


def test_drafts_are_accounted_for(folder: Path) -> None:
    ids = [5, 6, 7, 8] * 6
    answers = {}
    for draft in ("none", "lookup"):
        llm = LLM(folder, draft=draft)
        llm.engine.size = FixedSize(4)
        answers[draft] = llm.generate(ids, max_tokens=20)
    plain, drafted = answers["none"].speculative, answers["lookup"].speculative
    assert (plain.draft, plain.passes, plain.drafted, plain.mean_accepted) == ("none", 20, 0, 1.0)
    assert drafted.draft == "lookup" and drafted.drafted > 0
    assert drafted.mean_accepted == 20 / drafted.passes
    assert answers["lookup"].text == answers["none"].text


def test_a_draft_measures_the_machine_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        LLM(folder, draft="lookup").generate([5, 6, 7, 8] * 6, max_tokens=20)
        (file,) = (tmp_path / "endside" / "verify").iterdir()
    assert json.loads(file.read_text())["seconds_by_rows"]["1"] > 0


def test_a_model_in_memory_needs_no_folder(llm: LLM) -> None:
    other = LLM.of(llm.engine.executor, llm.tokenizer)
    assert other.generate("Once", max_tokens=4).text == llm.generate("Once", max_tokens=4).text


def test_the_package_offers_its_names() -> None:
    assert endside.LLM is LLM
    assert endside.Generation.__name__ == "Generation"
    assert endside.__version__
    with pytest.raises(AttributeError, match="Lllm"):
        endside.Lllm  # noqa: B018
