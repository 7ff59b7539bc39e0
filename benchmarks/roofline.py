"""How near a stage comes to what its machine can do at best.

Counted are the operations that must touch memory or multiply: matrix products, convolutions, attention. FLOPs follow
from their shapes (a multiplication and an addition are two), bytes are their operands and results, weights among them,
each once per operation; all that is elementwise is thought to be fused into them. So the least time of a stage is

    max(FLOPs / matrix ceiling, bytes / copy ceiling)

with both ceilings measured on the same machine in the same run, and the share reached is that time over the one taken.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import harness  # noqa: F401 - first: it sets the OpenMP policy before torch loads
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tdm_serve.core import Request
from tdm_serve.engine import Engine

WARMUP, REPEATS = 3, 10
ATTENTION = {  # attention that torch's own counter does not know; all take (B, H, S, D) of q and k first
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "tdm::joint_attention",
    "tdm::joint_attention_lse",
}


@dataclass(frozen=True, slots=True)
class Cost:
    """What a stage asks of a machine."""

    flops: float
    bytes: float


class Counter(TorchDispatchMode):
    """Adds up the costs of what runs inside the block, on any device and in inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flops_of(func)
        if formula is None:
            with self:  # what is made of other operations is counted as those
                result = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result
        result = func(*args, **kwargs)
        self.flops += formula(*args, **kwargs, out_val=result)
        self.bytes += size_of((args, kwargs, result))
        return result


def flops_of(func: Any) -> Callable[..., float] | None:
    """The formula of an operation that counts; None for the others."""
    return attention_flops if func.name() in ATTENTION else flop_registry.get(func.overloadpacket)


def attention_flops(q: Tensor, k: Tensor, *_: Any, **__: Any) -> float:
    """Two products: of (B, H, S, D) with T keys each is 2 B H S T D. Keys behind `kv_len` are counted, too."""
    batch, heads, queries, width = q.shape
    return 4.0 * batch * heads * queries * k.shape[-2] * width


def size_of(tree: Any) -> int:
    """Bytes of all tensors in it."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def counted(call: Callable[[], Any]) -> Cost:
    """The cost of a call, which runs once."""
    with Counter() as counter:
        call()
    return Cost(counter.flops, counter.bytes)


def stage_costs(engine: Engine, requests: Sequence[Request]) -> dict[str, Cost]:
    """Of a batch's text, of one evaluation ("evaluation"), of all of them ("denoise") and of its decoding.

    The engine must be an eager one, whose operations can be seen, without a prompt cache. Compiled or not, on the same
    device in the same types, the work is the same.
    """
    engine.generate(requests)  # time's rows are kept from now on
    samples: list[Any] = []
    text = counted(lambda: samples.extend(engine.start(requests)))
    evaluation = counted(lambda: engine.step(samples))
    while not samples[0].done:
        engine.step(samples)
    decode = counted(lambda: engine.finish(samples))
    steps = len(samples[0].rows)
    denoise = Cost(steps * evaluation.flops, steps * evaluation.bytes)
    return {"text": text, "evaluation": evaluation, "denoise": denoise, "decode": decode}


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What this machine does at best: GFLOP/s of a large matrix product in `dtype`, GB/s of a large copy."""
    side, copied = (8192, 1 << 30) if device.startswith("cuda") else (1536, 1 << 27)
    a, b = torch.randn(2, side, side, device=device, dtype=torch.float32).to(dtype)
    source, target = torch.ones(2, copied, dtype=torch.int8, device=device)
    return {
        "matmul_gflops": round(2 * side**3 / median_s(lambda: a @ b, device) / 1e9, 1),
        "copy_gbps": round(2 * copied / median_s(lambda: target.copy_(source), device) / 1e9, 1),  # read and written
    }


def median_s(call: Callable[[], Any], device: str) -> float:
    """Seconds of a call, the median of some after a warm-up."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else int
    taken: list[float] = []
    for _ in range(WARMUP + REPEATS):
        wait()
        started = time.perf_counter()
        call()
        wait()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[WARMUP:])


def shares(
    costs: Mapping[str, Cost], milliseconds: Mapping[str, float], found: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """FLOPs, bytes, share reached and what binds, of every stage that has both a cost and a time."""
    return {
        stage: bound(cost, milliseconds[stage], found)
        for stage, cost in costs.items()
        if milliseconds.get(stage, 0) > 0
    }


def bound(cost: Cost, milliseconds: float, found: Mapping[str, float]) -> dict[str, Any]:
    """One stage's part of `shares`."""
    least = {"matmul": cost.flops / found["matmul_gflops"] / 1e6, "copy": cost.bytes / found["copy_gbps"] / 1e6}
    binds = max(least, key=least.__getitem__)
    share = round(least[binds] / milliseconds, 3)
    return {"flops": cost.flops, "bytes": cost.bytes, "share": share, "bound": binds}


def table(rows: Mapping[str, Mapping[str, Any]], found: Mapping[str, float]) -> str:
    """For people."""
    named = ", ".join(f"{name} {value:g}" for name, value in found.items())
    lines = [f"ceilings of this run: {named}"]
    for stage, row in rows.items():
        work = f"{row['flops'] / 1e9:>10.2f} GFLOP {row['bytes'] / 1e6:>10.1f} MB"
        lines.append(f"  {stage:<12}{work}  {row['share']:>6.1%} of what {row['bound']} allows")
    return "\n".join(lines)
