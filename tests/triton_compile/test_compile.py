"""Every kernel of InfLLM v2 compiles for sm_80, sm_89 and sm_90, fits and does not spill."""

from __future__ import annotations

import pytest
import torch

from endside.ops.infllm import triton as fast
from endside.ops.infllm.config import SparseConfig
from endside.ops.infllm.triton import layout
from tests.triton_compile.ahead import SHARED_LIMIT, compile_for, record

TRAINING = {
    "_compress", "_select", "_common_forward", "_union", "_chosen_forward",
    "_delta", "_common_dq", "_chosen_dq", "_dkv",
}  # fmt: skip
DECODING = {"_compress", "_select", "_split", "_merge"}

# (new tokens, group, head width, type, capability): the 8B shape everywhere, the 0.5B one on Hopper
CASES = [
    (64, 16, 128, torch.bfloat16, 90),
    (64, 16, 128, torch.bfloat16, 89),
    (64, 16, 128, torch.float16, 80),
    (64, 8, 64, torch.bfloat16, 90),
    (1, 16, 128, torch.bfloat16, 90),
    (1, 16, 128, torch.bfloat16, 80),
]
# Bytes of stack per thread that count as none: up to four registers.
STACK = 16


@pytest.mark.parametrize("new,group,width,dtype,capability", CASES)
def test_kernels_compile(new, group, width, dtype, capability, monkeypatch) -> None:
    monkeypatch.setattr(layout, "has_warpgroups", lambda x: capability == 90)
    sparse = SparseConfig()
    q = torch.zeros(1, new, 2 * group, width, dtype=dtype)
    k = torch.zeros(1, sparse.dense_len + 256, 2, width, dtype=dtype)
    v = torch.zeros_like(k)

    def call() -> None:
        with torch.set_grad_enabled(new > 1):
            out = fast.attend(q.requires_grad_(new > 1), k, v, sparse=sparse)
            if new > 1:
                torch.autograd.grad(out.sum(), q)

    launches = record(call)
    assert {x.kernel.fn.__name__ for x in launches} == (TRAINING if new > 1 else DECODING)
    for launch in launches:
        name, used = launch.kernel.fn.__name__, compile_for(launch, capability)
        print(f"sm_{capability} {name}: {used}")
        assert used.shared <= SHARED_LIMIT[capability], f"{name}: {used.shared} bytes shared"
        assert used.stack <= STACK, f"{name} spills: {used.stack} bytes of stack per thread"
