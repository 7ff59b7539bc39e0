"""How attention is written into an ONNX graph: one plugin node, the standard operator, or plain matrix products.

`plugin` is one node `tdm::joint_attention`. TensorRT finds a plugin by the node's domain and name; everything else
inlines the function of that name that goes with the model. torch's exporter would inline a function too early, so the
bare node is exported and the function is added afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import onnx
import torch
from onnx import helper
from onnxscript import values
from onnxscript.onnx_opset import opset23
from torch import Tensor

from tdm_serve.errors import ConfigError

standard: Any = opset23  # typed for scripted functions, which these are not
OPSET = 23  # the first with Attention, RMSNormalization and RotaryEmbedding
DOMAIN, NAME = "tdm", "joint_attention"
QKV = ("q", "k", "v")

Table = dict[Callable[..., Any], Callable[..., Any]]


def translations(attention: str) -> Table:
    """How torch's exporter writes attention, by operator. An empty table leaves it to torch: the standard operator."""
    if attention == "plugin":
        _register_schema()
    write = {"plugin": _plugin, "standard": _standard, "decomposed": _decomposed}.get(attention)
    if write is None:
        raise ConfigError(f"attention is {attention!r}; it must be plugin, standard or decomposed")
    ours = _joint_operator()
    table: Table = {} if ours is None else {ours: write}
    if attention != "standard":  # which torch writes by itself, with masks
        table[torch.ops.aten.scaled_dot_product_attention.default] = write
    return table


def _joint_operator() -> Callable[..., Any] | None:
    """`tdm::joint_attention`, where the kernels' package has registered it."""
    try:
        return torch.ops.tdm.joint_attention.default
    except AttributeError:
        return None


def _plugin(q: Any, k: Any, v: Any, mask: Any = None, *_: Any, **__: Any) -> Any:
    if mask is not None:
        return _decomposed(q, k, v, mask)
    return values.Opset(DOMAIN, 1).joint_attention(q, k, v)


def _standard(q: Any, k: Any, v: Any, mask: Any = None, *_: Any, **__: Any) -> Any:
    return standard.Attention(q, k, v, mask)


def _decomposed(q: Any, k: Any, v: Any, mask: Any = None, *_: Any, **__: Any) -> Any:
    """softmax(q kT / sqrt(D)) v; a mask is true where a key is read."""
    width = float(q.shape[-1]) ** -0.5
    scaled = standard.Mul(q, standard.CastLike(standard.Constant(value_float=width), q))
    scores = standard.MatMul(scaled, standard.Transpose(k, perm=[0, 1, 3, 2]))
    if mask is not None:
        lowest = standard.CastLike(standard.Constant(value_float=-65504.0), scores)
        scores = standard.Where(mask, scores, lowest)
    return standard.MatMul(standard.Softmax(scores, axis=-1), v)


@cache
def _register_schema() -> None:
    """Once a process: onnxscript builds nodes only of operators that onnx knows."""
    types = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    inputs = [onnx.defs.OpSchema.FormalParameter(name, "T") for name in QKV]
    outputs = [onnx.defs.OpSchema.FormalParameter("y", "T")]
    onnx.defs.register_schema(
        onnx.defs.OpSchema(
            NAME, DOMAIN, 1, inputs=inputs, outputs=outputs, type_constraints=[("T", types, "floating point")]
        )
    )


def add_body(model: onnx.ModelProto) -> None:
    """Defines the plugin's node as a function of standard operators, for everything that has no plugin."""
    node = helper.make_node("Attention", list(QKV), ["y"])
    function = helper.make_function(DOMAIN, NAME, list(QKV), ["y"], [node], [helper.make_opsetid("", OPSET)])
    model.functions.append(function)


def plugin_nodes(model: onnx.ModelProto) -> int:
    """How many nodes wait for a plugin or a function."""
    return sum(node.domain == DOMAIN and node.op_type == NAME for node in model.graph.node)


def as_plain_attention() -> Mapping[Any, Callable[..., Tensor]]:
    """A decomposition for `torch.export`: our operator as torch's own attention, for compilers that know only that."""
    ours = _joint_operator()

    def plain(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None = None) -> Tensor:
        assert kv_len is None, "families attend to all keys, padding included"
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    return {} if ours is None else {ours: plain}
