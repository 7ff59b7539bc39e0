"""What benchmarks/kernel_speed.py times: each case is the work, its contenders by name, and a check of each result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from kernel_setting import Model, Setting
from torch import Tensor

from tdm_kernels import Int8, quantise_values
from tdm_kernels.attention import backends, naive, variants
from tdm_kernels.attention.launch import launch
from tdm_kernels.group_norm.launch import launch as launch_group_norm
from tdm_kernels.group_norm.naive import group_norm_silu
from tdm_kernels.norm_rope import launch as norm_rope
from tdm_kernels.norm_rope.naive import norm_rope as plain_norm_rope
from tdm_kernels.quantised.launch import Loads
from tdm_kernels.quantised.launch import launch as launch_quantised
from tdm_kernels.testing import TOLERANCES, cosine, relative_error

EPS = 1e-6
PADDED = (0.5, 0.8)  # of the keys exist, from the first sample of a ragged batch to the last

Contenders = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True, slots=True)
class Case:
    """`flops` or `traffic` (bytes) are of the work, not of what an implementation makes of it."""

    operation: str
    shape: dict[str, Any]
    contenders: Contenders
    check: Callable[[str, Any], str | None]  # why the result of a contender is wrong, or None
    flops: float = 0.0
    traffic: float = 0.0


def attention_cases(setting: Setting) -> Iterator[Case]:
    """Every model, size and batch, with all keys and with padding."""
    for model in setting.models:
        for image, text in model.tokens:
            for batch in setting.batches:
                yield attention_case(setting, model, image + text, batch, ragged=False)
                if text:
                    yield attention_case(setting, model, image + text, batch, ragged=True)


def drawn(setting: Setting, batch: int, tokens: int, model: Model) -> list[Tensor]:
    """q, k, v (B, H, S, D) as views of token-major memory, as models make them."""
    return [setting.randn(batch, tokens, model.heads, model.head_dim).transpose(1, 2) for _ in range(3)]


def lengths(setting: Setting, batch: int, keys: int) -> Tensor:
    """How many keys of each sample exist in a ragged batch."""
    shares = torch.linspace(*PADDED, batch) if batch > 1 else torch.tensor([sum(PADDED) / 2])
    return (shares * keys).int().to(setting.device)


def attention_case(setting: Setting, model: Model, tokens: int, batch: int, *, ragged: bool) -> Case:
    q, k, v = drawn(setting, batch, tokens, model)
    kv_len = lengths(setting, batch, tokens) if ragged else None
    contenders: dict[str, Callable[[], Any]] = {
        name: partial(backends.attend, name, q, k, v, kv_len) for name in ("cudnn", "sdpa", *(["flash"] * (not ragged)))
    }
    contenders["flex"] = flex(setting, q, k, v, kv_len)
    if model.head_dim in variants.HEAD_DIMS:
        for name in variants.fitting(model.head_dim, setting.capability):
            contenders[name] = partial(launch, name, q, k, v, kv_len, False)
    keys = float(kv_len.sum()) if kv_len is not None else batch * tokens
    shape = {"model": model.name, "batch": batch, "heads": model.heads, "tokens": tokens, "head_dim": model.head_dim}
    return Case(
        "joint_attention",
        shape | {"ragged": ragged},
        contenders,
        partial(check_attention, q, k, v, kv_len),
        flops=4.0 * model.heads * tokens * keys * model.head_dim,
    )


def flex(setting: Setting, q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None) -> Callable[[], Any]:
    """FlexAttention, with a block mask where keys are missing."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None
    if kv_len is not None:

        def exists(b: Tensor, h: Tensor, line: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001 - the API counts them
            return key < kv_len[b]

        mask = create_block_mask(exists, q.shape[0], None, q.shape[2], k.shape[2], device=setting.device)
    return partial(setting.compiled(flex_attention), q, k, v, block_mask=mask)


def check_attention(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, _: str, result: Any) -> str | None:
    """Two heads of the last sample against float64; all of it would not fit the memory."""
    out = cast(Tensor, result[0] if isinstance(result, tuple) else result)
    part = (slice(-1, None), slice(0, 2))
    few = None if kv_len is None else kv_len[-1:]
    exact, _ = naive.joint_attention_lse(q[part].double(), k[part].double(), v[part].double(), few)
    return too_far(exact, "", out[part])


def too_far(exact: Tensor, _: str, out: Tensor) -> str | None:
    """By the tolerance of its dtype, whoever made it."""
    error = relative_error(out, exact)
    return None if error <= TOLERANCES[out.dtype] else f"relative error {error:.3g}"


def quantised_cases(setting: Setting) -> Iterator[Case]:
    """Z-Image's attention, kernel alone and with the quantisation of q, k and v, beside cuDNN in bfloat16."""
    model = setting.models[0]
    for image, text in model.tokens:
        for batch in setting.batches:
            yield quantised_case(setting, model, image + text, batch)


def quantised_case(setting: Setting, model: Model, tokens: int, batch: int) -> Case:
    q, k, v = drawn(setting, batch, tokens, model)
    qk = quantised_qk(q, k)
    contenders: dict[str, Callable[[], Any]] = {"cudnn": partial(backends.attend, "cudnn", q, k, v, None)}
    for loads in cast(tuple[Loads, ...], ("pointer", "tma") if setting.capability[0] == 9 else ("pointer",)):
        contenders[f"int8+bf16 {loads}"] = partial(launch_quantised, loads, qk, v, None, None, setting.dtype)
        if setting.capability >= (8, 9):
            contenders[f"int8+fp8 {loads}"] = partial(
                launch_quantised, loads, qk, *quantise_values(v), None, setting.dtype
            )
            contenders[f"int8+fp8 {loads}, with quantisation"] = partial(quantise_and_attend, loads, q, k, v)
    part = (slice(-1, None), slice(0, 2))
    exact, _ = naive.joint_attention_lse(q[part].double(), k[part].double(), v[part].double())

    def check(name: str, out: Tensor) -> str | None:
        found = cosine(out[part], exact)
        return None if found >= (0.999 if "fp8" in name else 0.9998) else f"cosine {found:.5f}"

    shape = {"model": model.name, "batch": batch, "heads": model.heads, "tokens": tokens, "head_dim": model.head_dim}
    flops = 4.0 * batch * model.heads * tokens**2 * model.head_dim
    return Case("quantised_attention", shape, contenders, check, flops=flops)


def quantised_qk(q: Tensor, k: Tensor) -> Int8:
    """By the kernels, whatever TDM_SERVE_KERNELS says."""
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    how = {"eps": EPS, "INTERLEAVED": True}
    mean = norm_rope.key_mean(k, None, (None, None), None, **how)
    queries = norm_rope.to_int8(q, None, (None, None), None, None, 128, **how)
    return Int8(*queries, *norm_rope.to_int8(k, None, (None, None), mean, None, 64, **how))


def quantise_and_attend(loads: Loads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return launch_quantised(loads, quantised_qk(q, k), *quantise_values(v), None, q.dtype)


def group_norm_cases(setting: Setting) -> Iterator[Case]:
    """The blocks of a VAE decoder that makes 1024 pixels."""
    for channels, side in setting.pictures:
        x = setting.randn(1, channels, side, side).to(memory_format=torch.channels_last)
        weight, bias = setting.randn(2, channels)
        given = (x, weight, bias, 32, EPS)
        contenders = {
            "eager": partial(group_norm_silu, *given),
            "compile": partial(setting.compiled(group_norm_silu), *given),
            "triton": partial(launch_group_norm, *given),
        }
        exact = group_norm_silu(x.float(), weight.float(), bias.float(), 32, EPS)
        traffic = 3.0 * x.numel() * x.element_size()  # read for the moments, read to normalise, write
        shape = {"channels": channels, "side": side}
        yield Case("group_norm_silu", shape, contenders, partial(too_far, exact), traffic=traffic)


def norm_rope_cases(setting: Setting) -> Iterator[Case]:
    """Z-Image's queries and keys, as parts of one packed projection."""
    for tokens in setting.tokens:
        for batch in (1, 4):
            q, k = setting.randn(batch, tokens, 3, setting.heads, 128).unbind(2)[:2]
            weight = setting.randn(128)
            angles = torch.rand(tokens, 64, device=setting.device) * 6.3
            cos, sin = angles.cos(), angles.sin()
            compiled = setting.compiled(both)
            contenders = {
                "eager": partial(both, q, k, weight, cos, sin),
                "compile": partial(compiled, q, k, weight, cos, sin),
                "triton": partial(norm_rope.norm_rope, q, k, (weight, weight), (cos, sin), EPS, True),
            }
            exact = torch.stack(both(q.double(), k.double(), weight.double(), cos.double(), sin.double()))
            traffic = 4.0 * q.numel() * q.element_size()
            shape = {"batch": batch, "tokens": tokens}
            check = partial(check_stacked, exact)
            yield Case("qk_norm_rope", shape, contenders, check, traffic=traffic)


def both(q: Tensor, k: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, of queries and keys."""
    return plain_norm_rope(q, weight, cos, sin, EPS, True), plain_norm_rope(k, weight, cos, sin, EPS, True)


def check_stacked(exact: Tensor, name: str, result: tuple[Tensor, Tensor]) -> str | None:
    return too_far(exact, name, torch.stack(result))
