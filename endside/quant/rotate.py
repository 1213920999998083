"""Hadamard rotation of the residual stream: massive channels are spread over all of them.

RMSNorm without its weight commutes with any rotation Q of the channels, so the whole stream can
turn once the norms' weights are inside the projections that follow (QuaRot, arXiv 2404.00456):

    E' = E Q      W_in' = W_in diag(norm) Q      W_out' = Q^T W_out      head' = head diag(norm) Q

with W_in = q, k, v, gate, up and W_out = o, down. The function stays the same; what changes is that
no channel is special any more, which is what a group scale wants. Q is a Hadamard matrix with
random signs, applied as two small factors instead of one C x C product. A tied head gets a tensor
of its own, because it takes the last norm and the embedding does not.

Not done: rotations inside a layer that need work while the model runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from endside.errors import UserError
from endside.model.block import Block

INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)
OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Rotation:
    """Q = diag(signs) (left x right) / sqrt(C), with Kronecker's product: (C, C), orthogonal."""

    signs: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    def turn(self, rows: torch.Tensor) -> torch.Tensor:
        """rows (..., C) -> rows Q, in float32 at least."""
        wide = rows if rows.dtype == torch.float64 else rows.float()
        left, right = self.left.to(wide.dtype), self.right.to(wide.dtype)
        cut = (wide * self.signs.to(wide.dtype)).unflatten(-1, (len(left), len(right)))
        return (left.T @ cut @ right).flatten(-2) / (len(left) * len(right)) ** 0.5


def rotation(width: int, seed: int = 0) -> Rotation:
    """The rotation of `width` channels. Raises UserError where no Hadamard matrix is known."""
    draw = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (width,), generator=draw).float() * 2 - 1
    odd, power = width, 1
    while odd % 2 == 0:
        odd, power = odd // 2, power * 2
    core = 1 if odd == 1 else _paley_multiple(odd, power)
    if core is None:
        raise UserError(
            f"no Hadamard matrix is known here for a width of {width}: quantize without --rotate"
        )
    rest = width // core
    left = 1
    while left * left * core < rest:
        left *= 2
    right = torch.kron(_paley(core), _sylvester(rest // left))
    return Rotation(signs, _sylvester(left), right)


def rotate_block(block: Block, turned: Rotation) -> None:
    """Move a layer, in place, into the rotated stream; its norms become ones."""
    norms = (block.input_layernorm, block.post_attention_layernorm)
    for norm, names in zip(norms, INPUTS, strict=True):
        for name in names:
            weight = block.get_submodule(name).weight
            weight.data = turned.turn(weight.data * norm.weight.data)
        norm.weight.data = torch.ones_like(norm.weight.data)
    for name in OUTPUTS:
        weight = block.get_submodule(name).weight
        weight.data = turned.turn(weight.data.T).T.contiguous()


def _sylvester(size: int) -> torch.Tensor:
    """The Hadamard matrix of a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def _paley_multiple(odd: int, power: int) -> int | None:
    """The smallest odd * 2^i, 2^i <= power, that is a prime of the form 4 n + 3 plus one."""
    size = odd
    while size <= odd * power:
        if size % 4 == 0 and _is_prime(size - 1):
            return size
        size *= 2
    return None


def _paley(size: int) -> torch.Tensor:
    """Paley's first construction, size - 1 a prime of the form 4 n + 3; size 1 is one."""
    if size == 1:
        return torch.ones(1, 1)
    prime = size - 1
    squares = {x * x % prime for x in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if x in squares else -1.0 for x in range(1, prime)])
    steps = torch.arange(prime)
    skew = torch.zeros(size, size)
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    skew[1:, 1:] = character[(steps[None] - steps[:, None]) % prime]
    return skew + torch.eye(size)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
