"""Timing on a GPU: CUDA-graph replay with a cold L2 cache, and the ceilings that kernels are held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import torch

FLUSH_BYTES = 512 << 20  # several times the largest L2 cache
WARMUP, REPEATS = 5, 40
Call = Callable[[], Any]


def graph_of(call: Call) -> torch.cuda.CUDAGraph:
    """`call` as one graph, so that no launch costs of Python are timed. Compiles and warms up first."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def milliseconds(calls: dict[str, Call], repeats: int = REPEATS) -> dict[str, dict[str, float]]:
    """p20, p50, p80 of every call. They take turns, and the cache is overwritten before each."""
    graphs = {name: graph_of(call) for name, call in calls.items()}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            taken[name].append(start.elapsed_time(end))
    return {name: harness.percentiles(values) for name, values in taken.items()}


def ceilings() -> dict[str, float]:
    """What this card does at best: TFLOP/s of a bfloat16 matrix product, GB/s of a copy (read and write)."""
    size, copied = 8192, 1 << 30
    a, b = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    source, target = torch.empty(2, copied, dtype=torch.int8, device="cuda")
    times = milliseconds({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)})
    return {
        "matmul_tflops": round(2 * size**3 / times["matmul"]["p50"] / 1e9, 1),
        "copy_gbps": round(2 * copied / times["copy"]["p50"] / 1e6, 1),
    }
