"""The native model against the PyTorch reference that rounds as it does, over 256 tokens of text.

Two numbers say how near they are, and both are printed: the largest difference of any logit and the
mean Kullback-Leibler divergence. Where the reference's best token leads by more than twice the
first, the native core must choose the same one; nearly every position must be such, or the demand
would be empty.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.native.whole_model import Pair, build, native_logits, reference_logits, text

SCORED = 256  # tokens
LENGTH = {False: 300, True: 640}  # tokens; sparse: 3 of 10 blocks are seen at the end


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def _compare(pair: Pair, tokens: np.ndarray) -> tuple[float, float, float]:
    """Largest logit error, mean KL, share of positions whose argmax is decided; asserts argmax."""
    truth = reference_logits(pair, tokens)[-SCORED:]
    got, seen = native_logits(pair, tokens)
    got = got[-SCORED:]
    error = float(np.abs(got - truth).max())
    wanted, given = _log_softmax(truth), _log_softmax(got)
    divergence = float((np.exp(wanted) * (wanted - given)).sum(-1).mean())
    best = np.sort(truth, axis=-1)
    clear = best[:, -1] - best[:, -2] > 2 * error
    assert (truth.argmax(-1) == got.argmax(-1))[clear].all(), "a decided token differs"
    if pair.config.sparse is not None:
        available = np.arange(len(tokens) - SCORED, len(tokens)) + 1
        share = float((seen[:, -SCORED:] / available[None, :, None]).mean())
        print(f"visible / available {share:.3f}")
        assert share < 0.5, "sparsity does not act"
    return error, divergence, float(clear.mean())


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    ("kind", "group", "cache"),
    [
        ("int4", 32, "f16"), ("int8", 64, "f16"), ("ternary", 32, "f16"), ("int4", 128, "f16"),
        ("int4", 128, "bf16"), ("int8", 32, "bf16"),
    ],
)  # fmt: skip
def test_logits_over_realtext(kind: str, group: int, cache: str, sparse: bool) -> None:
    pair = build(kind, group=group, sparse=sparse, cache=cache)
    error, divergence, clear = _compare(pair, text(LENGTH[sparse]))
    spread = "sparse" if sparse else "dense"
    print(f"{kind} g{group} {cache} {spread}: max {error:.2e}, KL {divergence:.2e}, "
          f"decided {clear:.1%}")  # fmt: skip
    assert clear >= 0.9, "too few positions are decided for the comparison to say anything"
    assert divergence < 1e-4
