"""The public attention operations on the CPU: meaning, checks, torch.compile, torch.export, gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdm_kernels import BadArgument, joint_attention, joint_attention_lse

OPS = (torch.ops.tdm.joint_attention.default, torch.ops.tdm.joint_attention_lse.default)


def tensors(batch: int = 2, heads: int = 3, lines: int = 5, keys: int = 7, head_dim: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, tokens, heads, head_dim) for tokens in (lines, keys, keys)]
    return [torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes]


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_lengths_it_is_torchs_attention_to_the_bit(dtype: torch.dtype) -> None:
    q, k, v = (tensor.to(dtype) for tensor in tensors())
    out = joint_attention(q, k, v)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(joint_attention(q.contiguous(), k, v), out)


def test_a_sample_attends_as_if_alone_and_unpadded() -> None:
    q, k, v = tensors()
    k[1, :, 3:] = float("nan")
    v[1, :, 3:] = float("inf")
    out = joint_attention(q, k, v, lengths(7, 3))
    assert torch.equal(out[:1], joint_attention(q[:1], k[:1], v[:1]))
    assert torch.equal(out[1:], joint_attention(q[1:], k[1:, :, :3], v[1:, :, :3]))


def test_log_sum_exp_is_that_of_the_scores() -> None:
    q, k, v = tensors()
    v[1, :, 3:] = float("nan")
    out, lse = joint_attention_lse(q, k, v, lengths(7, 3))
    torch.testing.assert_close(out, joint_attention(q, k, v, lengths(7, 3)))
    scores = q[1] @ k[1, :, :3].transpose(-1, -2) * 8**-0.5
    torch.testing.assert_close(lse[1], scores.exp().sum(-1).log())
    empty, none = joint_attention_lse(q, k, v, lengths(7, 0))
    assert torch.equal(empty[1], torch.zeros_like(empty[1]))
    assert none[1].isneginf().all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kv_len", [None, lengths(7, 2)])
def test_opcheck(op: Callable[..., object], kv_len: Tensor | None) -> None:
    q, k, v = tensors()
    torch.library.opcheck(op, (q, k, v, kv_len))
    torch.library.opcheck(op, (q.contiguous(), k.contiguous(), v, kv_len))


class Layer(nn.Module):
    """Attention as a model uses it."""

    def forward(self, qkv: Tensor, kv_len: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        return joint_attention(q, k, v, kv_len).transpose(1, 2).flatten(2)


def test_torch_compile_takes_it_in_one_graph() -> None:
    qkv, kv_len = torch.randn(2, 6, 3, 2, 8), lengths(6, 4)
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (6, 5):
        part, valid = qkv[:, :size], kv_len.clamp(max=size)
        torch.testing.assert_close(compiled(part, valid), layer(part, valid))


def test_torch_export_keeps_one_node_and_open_sizes() -> None:
    qkv, kv_len = torch.randn(2, 6, 3, 2, 8), lengths(6, 4)
    batch, tokens = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(Layer(), (qkv, kv_len), dynamic_shapes=({0: batch, 1: tokens}, {0: batch}))
    nodes = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert nodes.count(torch.ops.tdm.joint_attention.default) == 1
    other, fewer = torch.randn(3, 9, 3, 2, 8), lengths(9, 1, 5)
    torch.testing.assert_close(program.module()(other, fewer), Layer()(other, fewer))


def test_gradients_are_those_of_torchs_attention() -> None:
    q, k, v = (tensor.double().requires_grad_() for tensor in tensors(keys=4, lines=3))
    joint_attention(q, k, v).sum().backward()
    mine = q.grad
    q.grad = None
    F.scaled_dot_product_attention(q, k, v).sum().backward()
    assert mine is not None
    assert torch.equal(mine, q.grad)
    assert torch.autograd.gradcheck(lambda q: joint_attention(q, k, v, lengths(4, 2)), (q,))


Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None]
WRONG: dict[str, Callable[[Tensor, Tensor, Tensor], Arguments]] = {
    "int": lambda q, k, v: (q.int(), k.int(), v.int(), None),
    "mixed": lambda q, k, v: (q, k.half(), v, None),
    "rank": lambda q, k, v: (q[0], k, v, None),
    "heads": lambda q, k, v: (q, k[:, :2], v[:, :2], None),
    "values": lambda q, k, v: (q, k, v[:, :, :3], None),
    "no keys": lambda q, k, v: (q, k[:, :, :0], v[:, :, :0], None),
    "strided": lambda q, k, v: (q.transpose(2, 3).contiguous().transpose(2, 3), k, v, None),
    "device": lambda q, k, v: (q, k, v.to("meta"), None),
    "int64 lengths": lambda q, k, v: (q, k, v, lengths(7, 3).long()),
    "count": lambda q, k, v: (q, k, v, lengths(7)),
    "lengths elsewhere": lambda q, k, v: (q, k, v, lengths(7, 3).to("meta")),
    "zero": lambda q, k, v: (q, k, v, lengths(7, 0)),
    "long": lambda q, k, v: (q, k, v, lengths(8, 7)),
}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int", "q is int32; allowed: float16, bfloat16, float32 or float64"),
        ("mixed", "k is float16, but q is float32; they must be equal"),
        ("rank", r"q has shape \(3, 5, 8\); it needs 4 dimensions \(B, H, S, D\)"),
        ("heads", r"k has shape \(2, 2, 7, 8\); in \(B, H, T, D\), H must be 3"),
        ("values", r"v has shape \(2, 3, 3, 8\); in \(B, H, T, D\), T must be 7"),
        ("no keys", r"k has shape \(2, 3, 0, 8\); T must be at least 1"),
        ("strided", r"q has strides \(120, 40, 1, 5\); the last must be 1"),
        ("device", "v is on meta, but q is on cpu; they must be on one device"),
        ("int64 lengths", "kv_len is int64; allowed: int32"),
        ("count", r"kv_len has shape \(1,\); in \(B\), B must be 2"),
        ("lengths elsewhere", "kv_len is on meta, but the other tensors are on cpu"),
        ("zero", "kv_len has values from 0 to 7; allowed: 1 to 7"),
        ("long", "kv_len has values from 7 to 8; allowed: 1 to 7"),
    ],
)
def test_mistakes_are_named_with_value_and_allowed_set(name: str, message: str) -> None:
    q, k, v, kv_len = WRONG[name](*tensors())
    with pytest.raises(BadArgument, match=message):
        joint_attention(q, k, v, kv_len)
    if name != "zero":  # which is allowed there
        with pytest.raises(BadArgument, match=message.replace("allowed: 1 to", "allowed: 0 to")):
            joint_attention_lse(q, k, v, kv_len)


def test_mistakes_are_found_when_compiling() -> None:
    with pytest.raises(Exception, match="kv_len is int64; allowed: int32"):
        torch.export.export(Layer(), (torch.randn(2, 6, 3, 2, 8), torch.tensor([6, 4])))
