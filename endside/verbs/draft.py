"""`endside draft rank|train`: what speculation needs of its own.

    endside draft rank TOKENIZER CORPUS FILE.npy     how frequent tokens are, for FR-Spec
    endside draft train CONFIG.toml [key=value …]    a draft for a model: a head, or with
                                                     kind = "bita" mask tokens for the model itself

Training first lets the model write: each text begins with tokens of `text.prompts` and goes on as
the model wills, through the engine and with the sampling that is said. The texts become token
shards in `text.shards`, so an interrupted or repeated run writes them once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from endside.errors import UserError
from endside.verbs import parse

if TYPE_CHECKING:
    from endside.data.document import Document
    from endside.train.draft import DraftConfig

HELDOUT = 0.05  # of the texts that the model writes: what acceptance is measured on
USE = "use: endside draft rank TOKENIZER CORPUS FILE.npy, or endside draft train CONFIG.toml"


@dataclass(frozen=True)
class Rank:
    """Count the tokens of a corpus; the file lists them, the most frequent first."""

    model: Positional[Path]
    """Folder with the tokenizer: the model's."""
    corpus: Positional[Path]
    """Text: a folder, a file, or a published freq_….pt list to be imported."""
    out: Positional[Path]
    """File to write, .npy."""
    tokens: int = 0
    """How many to keep; 0: all that occur."""


@dataclass(frozen=True)
class Train:
    """Train a draft head; run it again to resume."""

    config: Positional[Path]
    """The TOML file of the run: model, kind (eagle2, eagle3, mtp, bita), text.prompts, steps."""
    overrides: Positional[tuple[str, ...]] = ()
    """key=value pairs that win over the file, such as steps=2000."""


def main(argv: list[str]) -> None:
    """The verb's own verbs."""
    verbs = {"rank": (Rank, rank), "train": (Train, train)}
    if not argv or argv[0] not in verbs:
        if argv and argv[0] in ("-h", "--help"):
            print(__doc__)
            return
        raise UserError(f"draft {argv[0] if argv else ''}: {USE}")
    flags, run = verbs[argv[0]]
    run(parse(flags, argv[1:], f"draft {argv[0]}"))


def rank(flags: Rank) -> None:
    """Write the ranking, and say how much of the text the first quarter of it holds."""
    from endside.atomic import atomic_file
    from endside.formats.draft_head import ranking_bytes, read_ranking
    from endside.tokenizer import Tokenizer

    if flags.out.suffix != ".npy":
        raise UserError(f"{flags.out}: rankings are .npy files")
    tokenizer = Tokenizer.load(flags.model)
    if flags.corpus.suffix == ".pt":
        ids = read_ranking(flags.corpus, tokenizer.vocab_size)
        counts = None
    else:
        counts = _count(flags.corpus, tokenizer)
        ids = _ranked(counts, tokenizer, flags.tokens)
    with atomic_file(flags.out) as file:
        file.write(ranking_bytes(ids))
    print(f"{len(ids):,} of {tokenizer.vocab_size:,} tokens -> {flags.out}")
    if counts is not None:
        total, quarter = sum(counts.values()), set(ids[: tokenizer.vocab_size // 4].tolist())
        held = sum(count for token, count in counts.items() if token in quarter)
        print(f"the first {len(quarter):,} are {held / total:.1%} of the corpus's {total:,} tokens")


def _count(corpus: Path, tokenizer: Any) -> Counter[int]:
    from endside.data import corpus as texts

    counts: Counter[int] = Counter()
    for document in texts.read(corpus):
        counts.update(tokenizer.encode(document.text, bos=False))
    if not counts:
        raise UserError(f"{corpus} holds no text to count")
    return counts


def _ranked(counts: Counter[int], tokenizer: Any, keep: int) -> Any:
    """Ids by falling count; what ends an answer is always among those kept."""
    import numpy as np

    order = sorted(counts, key=lambda token: (-counts[token], token))
    if not keep:
        return np.array([*order, *(end for end in tokenizer.eos_ids if end not in counts)])
    ends = list(dict.fromkeys(tokenizer.eos_ids))
    others = [token for token in order if token not in ends][: max(0, keep - len(ends))]
    return np.array([*others, *ends])


def train(flags: Train) -> None:
    """Let the model write, train the head on that, and print where it lies."""
    from endside import config as configuration
    from endside.data.pack import open_packed
    from endside.formats import hf
    from endside.train import draft
    from endside.train.pretrain import deterministic
    from endside.train.run_folder import RunFolder

    data = configuration.override(configuration.read(flags.config), flags.overrides)
    cfg = configuration.build(draft.DraftConfig, data, source=str(flags.config))
    folder = Path(cfg.run) if cfg.run else flags.config.with_suffix("")
    if not cfg.text.shards:
        raise UserError(f"{flags.config} lacks text.shards: name the folder of the model's text")
    with RunFolder(folder) as run:
        if not Path(cfg.text.shards).exists():
            _write(cfg, run.progress)
        model = hf.load(cfg.model, dtype="float32", attention="dense")
        with deterministic(cfg):
            print(draft.train(cfg, model, open_packed(cfg.text.shards), run))


def _write(cfg: DraftConfig, progress: Any) -> None:
    """Token shards of what the model writes behind beginnings of other text."""
    import numpy as np

    from endside.api import LLM
    from endside.data.document import Document
    from endside.data.loader import Windows
    from endside.data.pack import Encoder, PackConfig, open_packed, pack

    text = cfg.text
    if not text.prompts:
        raise UserError("text.prompts is missing: name token shards whose beginnings are continued")
    windows = Windows(open_packed(text.prompts), "train", text.prompt)
    order = np.random.default_rng(cfg.seed).permutation(len(windows))[: text.rows]
    llm = LLM(cfg.model, context=text.prompt + text.tokens, max_batch=1)

    def documents() -> Iterator[Document]:
        for place, number in enumerate(order):
            prompt = windows.read(int(number))[0][: text.prompt].tolist()
            made = llm.generate(
                prompt, max_tokens=text.tokens, temperature=text.temperature, seed=place
            )
            progress.update(f"text {place + 1}/{len(order)} of the model's own")
            ids = [*prompt, *made.token_ids]
            yield Document(f"own-{place}", " ".join(map(str, ids)), source="the model")

    encoder = Encoder(
        lambda ids: [int(one) for one in ids.split()],
        vocab_size=llm.engine.executor.vocab_size,
        eos=llm.tokenizer.eos_ids[0],
        fingerprint=llm.tokenizer.fingerprint,
    )
    pack(documents(), Path(text.shards), encoder, PackConfig(HELDOUT))
