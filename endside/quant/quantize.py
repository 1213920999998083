"""A model into low bits, layer by layer: one decoder layer in float32 at a time.

    hidden states of the calibration text, on the disk
      |
      v  layer i:  widen, rotate, run and gather moments, smooth, round each projection, store,
      |            run again with the rounded weights
      v
    hidden states for layer i + 1: what the layers before, as rounded, really give

The model's parameters may be mapped files; a layer's mapping is released when it is done, so memory
holds one layer, one Hessian with its factor, and a few rows of text, whatever the depth. What is
finished lies in a work folder beside the target (`stream`): after any death the same call goes on
with the layer that was begun, and ends with the same bytes.

With held-out text two more streams run along, one through the original layers and one through the
rounded ones; they give perplexity before and after, and how far the two distributions are apart,
without ever holding either model.

Steps compose: rotation first (it changes the basis), then smoothing in that basis, then rounding.
Embeddings, norms and the head stay in the stored dtype. Inputs of all projections of a layer are
gathered in one run with unrounded weights; re-running the layer after each projection gains little
and costs three more passes.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from endside.checkpoint import write_folder
from endside.errors import UserError
from endside.log import Progress, duration
from endside.model.batch import Batch
from endside.model.block import Block
from endside.model.config import ModelConfig
from endside.model.transformer import Transformer
from endside.ops.cross_entropy.reference import cross_entropy
from endside.ops.rmsnorm import rmsnorm
from endside.quant import report
from endside.quant.calibrate import FIRST, Moments, watched
from endside.quant.gptq import gptq, relative_error, values
from endside.quant.pack import QuantizedLinear, Scheme, round_to_nearest, to_arrays
from endside.quant.rotate import Rotation, rotate_block, rotation
from endside.quant.smooth import SITES, smooth
from endside.quant.stream import States, Workplace, array_source, tensor_source
from endside.shards import TensorSource

ROWS = 8192  # of an embedding that are turned at a time
TOKENS = 4096  # of text that pass through a layer at a time


@dataclass(frozen=True)
class Recipe:
    """What is done to the projections."""

    scheme: Scheme
    method: Literal["rtn", "gptq", "pgptq"] = "pgptq"
    prefix: int = 4  # first positions left out of the moments by pgptq
    smooth: bool = False
    rotate: bool = False
    act_order: bool = False
    damp: float = 0.01

    def __post_init__(self) -> None:
        if self.scheme.kind == "ternary" and self.method != "rtn":
            raise UserError("ternary weights are trained, not calibrated: use method rtn")
        if self.prefix < 0:
            raise UserError(f"--prefix is {self.prefix}: it is a number of positions, 0 or more")
        if not self.damp > 0:
            raise UserError(f"--damp is {self.damp}: it must be above 0")

    @property
    def left_out(self) -> int:
        """Positions that do not count in the moments."""
        return self.prefix if self.method == "pgptq" else 0

    @property
    def needs_text(self) -> bool:
        """Whether it cannot work without calibration text."""
        return self.method != "rtn" or self.smooth


@dataclass(frozen=True)
class Texts:
    """calibration (rows, T) int64 or None; heldout (rows, T + 1) int64 or None: perplexity."""

    calibration: torch.Tensor | None = None
    heldout: torch.Tensor | None = None


@dataclass(frozen=True)
class Target:
    """Where the result goes. describe(config) gives its config.json without the quantization."""

    folder: Path
    describe: Callable[[ModelConfig], dict[str, Any]]
    files: Mapping[str, bytes | Path]  # tokenizer and the like, written beside the weights
    identity: str  # of the source: a pass is resumed only where it reads the same
    overwrite: bool = False


def quantize(
    model: Transformer, recipe: Recipe, texts: Texts, target: Target, progress: Progress
) -> report.Report:
    """Write the quantized model and its report to `target.folder`; consumes `model`'s layers."""
    _check(model, recipe, texts, target)
    if model.config.mtp_layers:
        progress.note("the multi-token prediction layer is left out")
    plan = {
        "recipe": asdict(recipe), "source": target.identity,
        "calibration": _digest(texts.calibration), "heldout": _digest(texts.heldout),
    }  # fmt: skip
    place = target.folder.with_name(f".{target.folder.name}.quantizing")
    with Workplace(place, plan) as work, torch.inference_mode():
        run = _Pass(model, recipe, texts, work, progress)
        run.layers()
        made = report.Report(asdict(recipe), run.rows(), run.judge())
        config = target.describe(run.config)
        config["quantization_config"] = recipe.scheme.to_config()
        written = {
            **target.files,
            "config.json": report.json_bytes(config),
            "quantization.json": made.json(),
            "quantization.png": report.plot(made, work.folder / "plot.png"),
        }
        write_folder(target.folder, run.tensors(), written, overwrite=target.overwrite)
        work.discard()
    progress.close()
    return made


def _check(model: Transformer, recipe: Recipe, texts: Texts, target: Target) -> None:
    """Everything that can be known before the first layer."""
    if target.folder.is_file():
        raise UserError(f"{target.folder} is a file: give the name of a new folder")
    if target.folder.exists() and any(target.folder.iterdir()) and not target.overwrite:
        raise UserError(f"{target.folder} already holds files: give a new folder, or --overwrite")
    if recipe.rotate:
        rotation(model.config.hidden_size)
    if recipe.needs_text and texts.calibration is None:
        raise UserError(f"--method {recipe.method} with these steps needs calibration text")
    if texts.calibration is not None and texts.calibration.shape[1] <= recipe.left_out:
        raise UserError(
            f"--length {texts.calibration.shape[1]} leaves nothing beside --prefix "
            f"{recipe.left_out}: use longer rows"
        )
    for tokens in (texts.calibration, texts.heldout):
        if tokens is not None and tokens.max() >= model.config.vocab_size:
            raise UserError(
                f"the text holds token {tokens.max()}, the model knows {model.config.vocab_size}: "
                "use the tokenizer that the model was trained with"
            )


def _digest(tokens: torch.Tensor | None) -> str | None:
    return None if tokens is None else hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


class _Pass:
    """One walk through the layers. Streams: calibration, before (original weights), after."""

    def __init__(
        self, model: Transformer, recipe: Recipe, texts: Texts, work: Workplace, progress: Progress
    ) -> None:
        self.model, self.recipe, self.work, self.progress = model, recipe, work, progress
        self.turned = rotation(model.config.hidden_size) if recipe.rotate else None
        untied = model.config.tie_word_embeddings and not recipe.rotate
        self.config = replace(model.config, mtp_layers=0, tie_word_embeddings=untied)
        self.heldout = texts.heldout
        self.streams = {"calibration": texts.calibration}
        if texts.heldout is not None:
            self.streams |= {"before": texts.heldout[:, :-1], "after": texts.heldout[:, :-1]}
        self.streams = {name: text for name, text in self.streams.items() if text is not None}
        self.dtype = model.embed_tokens.weight.dtype
        self._begun, self._first = time.monotonic(), work.finished

    def layers(self) -> None:
        """Finish every layer that is not finished yet."""
        count = self.config.num_hidden_layers
        if self.work.finished == 0:
            self._start()
        elif self.work.finished < count:
            self.progress.note(f"going on with layer {self.work.finished + 1} of {count}")
        for layer in range(self.work.finished, count):
            self._layer(layer)

    def rows(self) -> list[dict[str, Any]]:
        """The report's rows, one per projection."""
        layers = range(self.config.num_hidden_layers)
        return [row for layer in layers for row in self.work.note(layer)["rows"]]

    def tensors(self) -> dict[str, TensorSource]:
        """Every tensor of the result, read when its turn comes."""
        model, found = self.model, {}
        embedding = model.embed_tokens.weight
        found["model.embed_tokens.weight"] = self._rows_source(embedding, None)
        for layer in range(self.config.num_hidden_layers):
            found |= self.work.tensors(layer)
        norm = torch.ones_like(model.norm.weight) if self.turned else model.norm.weight
        found["model.norm.weight"] = tensor_source(norm)
        if not self.config.tie_word_embeddings:
            head = embedding if model.config.tie_word_embeddings else model.lm_head.weight
            found["lm_head.weight"] = self._rows_source(head, model.norm.weight)
        return found

    def judge(self) -> report.Heldout | None:
        """What the held-out text says of the original weights and of the rounded ones."""
        if self.heldout is None:
            return None
        last = self.config.num_hidden_layers
        heads = {name: self._head(turned) for name, turned in (("before", False), ("after", True))}
        losses, gaps = {"before": 0.0, "after": 0.0}, []
        streams = (self._states(last, name).read(1) for name in heads)
        for before, after, tokens in zip(*streams, self.heldout, strict=True):
            logs = {}
            for name, states in (("before", before), ("after", after)):
                logits = self._logits(states[0], *heads[name])
                losses[name] += cross_entropy(logits, tokens[1:]).item()
                logs[name] = logits.log_softmax(-1)
            gaps.append((logs["before"].exp() * (logs["before"] - logs["after"])).sum(-1))
        apart, rows = torch.stack(gaps), len(self.heldout)
        perplexities = (math.exp(loss / rows) for loss in losses.values())
        later = apart[:, FIRST:].mean().item() if apart.shape[1] > FIRST else math.nan
        return report.Heldout(*perplexities, apart.mean().item(), later, apart.numel())

    def _start(self) -> None:
        """The embedded text of each stream."""
        for name, tokens in self.streams.items():
            turned = None if name == "before" else self.turned
            self._states(0, name).write(
                self._turn(self.model.embed_tokens.weight[batch], turned).float()
                * self.config.scale_emb
                for batch in tokens.split(self._batch(name))
            )

    def _layer(self, layer: int) -> None:
        block = _widened(self.model.layers[layer], self.config, layer)
        if "before" in self.streams:
            self._tell(layer, "original weights on the held-out text")
            self._advance(block, layer, "before")
        if self.turned is not None:
            rotate_block(block, self.turned)
        moments = self._moments(block, layer)
        alphas: dict[str, float] = {}
        if self.recipe.smooth:
            self._tell(layer, "smoothing")
            alphas = smooth(block, moments, self.recipe.scheme, self.dtype)
        rows, tensors = [], {}
        for site in SITES:
            seen = moments.pop(site.readers[0], None)
            for name in site.readers:
                self._tell(layer, name)
                linear, row = self._round(block, name, seen)
                rows.append({"layer": layer, **row, "alpha": alphas.get(site.readers[0])})
                stored = to_arrays(f"model.layers.{layer}.{name}", linear)
                tensors |= {part: array_source(array) for part, array in stored.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            weight = block.get_submodule(name).weight.data.to(self.dtype)
            tensors[f"model.layers.{layer}.{name}.weight"] = tensor_source(weight)
        for name in ("calibration", "after"):
            if name in self.streams:
                self._tell(layer, f"rounded weights, {name}")
                self._advance(block, layer, name)
        self.work.finish(layer, tensors, {"rows": rows})
        self.model.layers[layer].to("meta")  # releases the mapped weights

    def _moments(self, block: Block, layer: int) -> dict[str, Moments]:
        if "calibration" not in self.streams:
            return {}
        self._tell(layer, "calibration text")
        names = [site.readers[0] for site in SITES]
        moments = {
            name: Moments(block.get_submodule(name).weight.shape[1], self.recipe.left_out)
            for name in names
        }
        with watched(block, moments):
            for _ in self._run(block, layer, "calibration"):
                pass
        for one in moments.values():
            one.close()
        return moments

    def _round(
        self, block: Block, name: str, seen: Moments | None
    ) -> tuple[QuantizedLinear, dict[str, Any]]:
        """Round one projection in place; the codes, and the report's row."""
        module, recipe = block.get_submodule(name), self.recipe
        weight, scheme = module.weight.data, recipe.scheme
        hessian = None if seen is None else seen.hessian
        linear = nearest = round_to_nearest(
            weight.numpy(), scheme.kind, scheme.group, symmetric=scheme.symmetric
        )
        if recipe.method != "rtn":
            assert hessian is not None, "checked before the first layer"
            linear = gptq(weight, hessian, scheme, damp=recipe.damp, act_order=recipe.act_order)
        row = {
            "name": name,
            "shape": [*weight.shape],
            "rtn_error": relative_error(weight, nearest, hessian),
        }
        row["error"] = row["rtn_error"]
        if linear is not nearest:
            row["error"] = relative_error(weight, linear, hessian)
        if seen is not None:
            row |= {"peak_first": seen.peak_first, "peak_rest": seen.peak_rest}
        module.weight.data = values(linear)
        return linear, row

    def _run(self, block: Block, layer: int, stream: str) -> Iterator[torch.Tensor]:
        """The layer's outputs on a stream, batch by batch."""
        length = self.streams[stream].shape[1]
        rope = self.model.rope(torch.arange(length)[None])
        for states in self._states(layer, stream).read(self._batch(stream)):
            yield block(states, rope, Batch(torch.empty(states.shape[:2])), None)

    def _advance(self, block: Block, layer: int, stream: str) -> None:
        self._states(layer + 1, stream).write(self._run(block, layer, stream))

    def _states(self, layer: int, stream: str) -> States:
        shape = (*self.streams[stream].shape, self.config.hidden_size)
        return self.work.states(layer, stream, shape)

    def _batch(self, stream: str) -> int:
        return max(1, TOKENS // self.streams[stream].shape[1])

    def _turn(self, rows: torch.Tensor, turned: Rotation | None) -> torch.Tensor:
        return rows if turned is None else turned.turn(rows).to(self.dtype)

    def _rows_source(self, weight: torch.Tensor, norm: torch.Tensor | None) -> TensorSource:
        """weight (V, C) as it is, or rotated with the norm's weight in it, a few rows at a time."""
        plain = tensor_source(weight)
        if self.turned is None:
            return plain
        return replace(plain, read=lambda: tensor_source(self._turned(weight, norm)).read())

    def _turned(self, weight: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        parts = [
            self._turn(part.float() if norm is None else part.float() * norm.float(), self.turned)
            for part in weight.split(ROWS)
        ]
        return torch.cat(parts)

    def _head(self, rounded: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of the head and of the norm before it, in float32."""
        model = self.model
        tied = model.config.tie_word_embeddings
        head = model.embed_tokens.weight if tied else model.lm_head.weight
        norm = model.norm.weight
        if rounded and self.turned is not None:
            return self._turned(head, norm).float(), torch.ones_like(norm).float()
        return head.float(), norm.float()

    def _logits(self, states: torch.Tensor, head: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        final = rmsnorm(states, norm, self.config.rms_norm_eps)
        return final / self.config.logit_divisor @ head.T

    def _tell(self, layer: int, what: str) -> None:
        done, count = layer - self._first, self.config.num_hidden_layers
        left = ""
        if done:
            each = (time.monotonic() - self._begun) / done
            left = f"  {duration(each * (count - layer))} left"
        self.progress.update(f"layer {layer + 1}/{count}  {what}{left}")


def _widened(layer: Block, config: ModelConfig, index: int) -> Block:
    """A float32 copy of a layer."""
    with torch.device("meta"):
        wide = Block(config, index)
    state = {name: p.detach().to(torch.float32, copy=True) for name, p in layer.named_parameters()}
    wide.load_state_dict(state, assign=True)
    return wide
