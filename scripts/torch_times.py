#!/usr/bin/env python3
"""PyTorch's times of what ``tokenmill bench kernels`` measures, under the same names, as JSON on stdout.

Operands are normally distributed and weights take turns, so that products read memory; operations
are captured in a CUDA graph and replayed, as tokenmill's are. ``tokenmill bench record torch FILE``
keeps what this prints.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as attend

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 4096, 14336, 32, 8, 128, 1024
WEIGHTS_BYTES = 512 << 20
MILLISECONDS = 200
BF16: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}


def microseconds(run: Callable[[int], Any], turns: int = 1) -> float:
    """Of one call, which is told whose turn it is."""
    count = turns * -(-16 // turns)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for turn in range(3):
            run(turn % turns)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(count):
            run(turn % turns)

    def replayed(times: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    # The first reading warms up and says how many fill the time.
    once = max(replayed(2) / 2, 1e-3)
    times = max(int(MILLISECONDS / once), 1)
    replayed(max(times // 4, 1))
    return 1000 * replayed(times) / times / count


def copies(weight: torch.Tensor) -> list[torch.Tensor]:
    """As many of a weight that no cache holds them."""
    num_bytes = weight.numel() * weight.element_size()
    return [weight] + [weight.clone() for _ in range(WEIGHTS_BYTES // num_bytes)]


def main() -> None:
    """Measures and prints."""
    rows: list[dict[str, Any]] = []
    missing: list[str] = []

    def note(operation: str, case: str, run: Callable[[int], Any], turns: int = 1) -> None:
        try:
            rows.append({"operation": operation, "case": case, "microseconds": microseconds(run, turns)})
        except (RuntimeError, AttributeError, TypeError) as error:
            # An older PyTorch lacks the operation, or the GPU does.
            missing.append(f"{operation} {case}: {str(error)[:200]}")

    source = torch.randn(1 << 28, **BF16)
    target = torch.empty_like(source)
    note("copy", f"{source.numel() * 2 / 1e9:.2f} GB read and written", lambda _: target.copy_(source))
    del source, target
    weight = torch.randn(INTERMEDIATE, HIDDEN, **BF16)
    weights = copies(weight)
    for n in (1, 8, 64, 2048, 8192):
        x = torch.randn(n, HIDDEN, **BF16)
        note("matmul", f"bf16, {n} rows", lambda turn, x=x: x @ weights[turn].T, len(weights))
    one = torch.ones((), device="cuda")
    codes = weight.to(torch.float8_e4m3fn)
    for n in (64, 2048, 8192):
        x = torch.randn(n, HIDDEN, **BF16).to(torch.float8_e4m3fn)
        note("codes", f"fp8, {n} rows", lambda _, x=x: torch._scaled_mm(
            x, codes.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16))
    integers = (32 * weight).to(torch.int8)
    for n in (64, 2048, 8192):
        x = (32 * torch.randn(n, HIDDEN, **BF16)).to(torch.int8)
        note("codes", f"int8, {n} rows", lambda _, x=x: torch._int_mm(x, integers.T))
    for operation, batch, queries in (("decode", 64, 1), ("prefill", 1, CONTEXT)):
        q = torch.randn(batch, HEADS, queries, HEAD_DIM, **BF16)
        k, v = (torch.randn(batch, KV_HEADS, CONTEXT, HEAD_DIM, **BF16) for _ in range(2))
        note(operation, f"bf16 cache, {batch} × {CONTEXT}", lambda _, q=q, k=k, v=v: attend(
            q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True))
    print(json.dumps({"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "rows": rows,
                      "missing": missing}, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
