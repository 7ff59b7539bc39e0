"""What a TensorRT engine would launch, launched on a GPU without TensorRT."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tdm_exporters.tensorrt_plugin import grid, integers, kernel, tactics
from tdm_kernels.aot.ptx import parameters
from tdm_kernels.attention.variants import HEAD_DIMS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

SHAPES = [(2, 3, 333, 333), (1, 4, 1, 77), (1, 24, 1025, 1090)]  # batch, heads, queries, keys
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # relative, against float32


def checked(result: tuple[Any, ...]) -> Any:
    """What a call of the driver gives, without its status."""
    assert int(result[0]) == 0, result[0]
    return result[1] if len(result) == 2 else result[1:]


def launch(driver: Any, tensors: list[Tensor], out: Tensor, tactic: int, ragged: bool) -> None:
    """As TensorRT does it: pointers of inputs, integers, pointer of the output."""
    q, k = tensors[:2]
    major, minor = torch.cuda.get_device_capability()
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[q.dtype]
    compiled, ptx = kernel(name, q.shape[-1], tactic, ragged, major * 10 + minor)
    numbers = integers(q.shape, k.shape)
    assert len(parameters(ptx)) == len(tensors) + len(numbers) + 1
    values = [ctypes.c_void_p(one.data_ptr()) for one in tensors]
    values += [ctypes.c_int32(number) for number in numbers]
    values += [ctypes.c_void_p(out.data_ptr())]
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    module = checked(driver.cuModuleLoadData(ptx.encode() + b"\0"))
    try:
        function = checked(driver.cuModuleGetFunction(module, compiled.entry.encode()))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked((*driver.cuFuncSetAttribute(function, limit, compiled.shared_bytes), None))
        blocks = grid(q.shape, tactic, lambda number, by: -(-number // by))
        stream = torch.cuda.current_stream().cuda_stream
        threads = (compiled.threads, 1, 1)
        where = ctypes.addressof(addresses)
        started = driver.cuLaunchKernel(function, *blocks, *threads, compiled.shared_bytes, stream, where, 0)
        checked((*started, None))
        torch.cuda.synchronize()
    finally:
        driver.cuModuleUnload(module)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_plugin_s_kernel_equals_eager_attention(
    dtype: torch.dtype, head_dim: int, shape: tuple[int, int, int, int], ragged: bool
) -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="needs the package cuda-bindings")
    batch, heads, queries, keys = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(lines: int) -> Tensor:
        size = (batch, heads, lines, head_dim)
        return torch.randn(size, generator=generator, device="cuda", dtype=torch.float32).to(dtype)

    q, k, v = drawn(queries), drawn(keys), drawn(keys)
    lengths = torch.arange(batch, dtype=torch.int32, device="cuda") * 7 + keys // 2
    mask = (torch.arange(keys, device="cuda") < lengths[:, None])[:, None, None] if ragged else None
    wanted = scaled_dot_product_attention(q.float(), k.float(), v.float(), mask)
    major, minor = torch.cuda.get_device_capability()
    for tactic in tactics(head_dim, major * 10 + minor):
        out = torch.full_like(q, torch.nan)
        launch(driver, [q, k, v, *([lengths] if ragged else [])], out, tactic, ragged)
        assert ((out.float() - wanted).norm() / wanted.norm()).item() < TOLERANCE[dtype], tactic
