"""A small model as the draft, on an executor of numbers; and how drafts are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from endside.engine.draft import FixedSize
from endside.engine.drafts import drafts_of
from endside.engine.drafts.model import ModelDrafts
from endside.engine.engine import Engine
from endside.engine.executors import Plan
from endside.engine.request import Request, SamplingConfig
from endside.errors import UserError
from tests.engine.fake import FakeExecutor
from tests.engine.tiny import HAS_CORE, awkward, checkpoint

PROMPTS = [tuple(range(1, length)) for length in (2, 9, 20)]
CONFIG = SamplingConfig(max_tokens=30, temperature=0.0)


def _answers(**more) -> tuple[list, int]:
    engine = Engine(FakeExecutor(), **more)
    handles = [engine.submit(Request(prompt, CONFIG)) for prompt in PROMPTS]
    while not engine.idle:
        engine.step()
    return [one.token_ids for one in handles], sum(one.runs for one in handles)


def test_the_model_itself_is_always_right() -> None:
    """Six levels deep: seven tokens a pass; text, tree and answers of several sequences apart."""
    plain, passes = _answers()
    assert passes == 90
    drafts = ModelDrafts(FakeExecutor(capacity=4096))
    answers, passes = _answers(drafts=drafts, size=FixedSize(40))
    assert answers == plain
    assert passes <= 3 * 6, f"{passes} passes for 90 tokens"


def test_its_pages_come_back() -> None:
    small = FakeExecutor(capacity=4096)
    before = small.free
    _answers(drafts=ModelDrafts(small), size=FixedSize(5))
    assert small.free == before
    assert any(call[0] == "verify" for call in small.calls), "it was never asked"


def test_without_room_for_it_tokens_come_one_by_one() -> None:
    plain, _ = _answers()
    small = FakeExecutor(capacity=64)
    held = small.open(64)
    answers, passes = _answers(drafts=ModelDrafts(small), size=FixedSize(5))
    assert answers == plain and passes == 90
    small.close(held)


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="vocabulary of 31 tokens, the model one of 32"):
        Engine(FakeExecutor(), drafts=ModelDrafts(FakeExecutor(vocab_size=31)))


@pytest.mark.parametrize(
    ("name", "exact", "found"),
    [
        ("auto", True, "lookup"),
        ("auto", False, None),
        ("none", True, None),
        ("lookup", False, "lookup"),
    ],
)
def test_names(name: str, exact: bool, found: str | None) -> None:
    executor = FakeExecutor()
    executor.row_exact = exact
    drafts = drafts_of(Plan(draft=name), executor)
    assert (drafts.name if drafts else None) == found


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is neither a folder nor one of auto, none"):
        drafts_of(Plan(draft=str(tmp_path / "nowhere")), FakeExecutor())


@pytest.mark.skipif(not HAS_CORE, reason="no native core here")
def test_a_folder_with_a_model_is_a_smaller_model(tmp_path: Path) -> None:
    from endside.engine.executors import create

    folder = checkpoint(tmp_path, awkward("tiny"))
    plan = Plan(executor="native", context=128, draft=str(folder.folder))
    executor = create(folder, plan)
    drafts = drafts_of(plan, executor)
    assert isinstance(drafts, ModelDrafts) and drafts.executor.context == 128
    ask = Request((5, 6, 7), CONFIG)
    engine = Engine(executor, drafts=drafts, size=FixedSize(8))
    handle = engine.submit(ask)
    assert len(list(handle)) == 30 and handle.runs < 12, "the model agrees with itself"
    other = checkpoint(tmp_path / "other", awkward("tiny", vocab_size=77))
    with pytest.raises(UserError, match="a draft made for this model"):
        Engine(create(other, Plan(executor="native", context=128)), drafts=drafts)
