"""Run by test_tensorrt_plugin.py: our plugin in NVIDIA's own classes, as TensorRT's builder would call them.

Only the expressions of shapes are made here, because those come from libnvinfer. Prints JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import tensorrt_bindings as trt

from tdm_serve.errors import InvalidRequest

sys.modules["tensorrt"] = trt  # NVIDIA's package of that name only forwards to the bindings
trtp: Any = importlib.import_module("tensorrt_bindings.plugin")
sys.modules["tensorrt.plugin"] = trtp

ours: Any = importlib.import_module("tdm_exporters.tensorrt_plugin")

Shape = Sequence[int]
Environment = dict[str, int]


class Expression:
    """A number that is only known when an engine runs, or a constant."""

    def __init__(self, value: Callable[[Environment], int], constant: bool = False) -> None:
        self.value, self.constant = value, constant

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        assert self.constant, "an open axis has no value while an engine is built"
        return self.value({})


class Expressions:
    """What libnvinfer's IExprBuilder does."""

    def constant(self, value: int) -> Expression:
        return Expression(lambda _: value, constant=True)

    def operation(self, kind: Any, a: Expression, b: Expression) -> Expression:
        name = kind.name
        does: dict[str, Callable[[int, int], int]] = {
            "SUM": lambda x, y: x + y,
            "PROD": lambda x, y: x * y,
            "CEIL_DIV": lambda x, y: -(-x // y),
        }
        return Expression(lambda known: does[name](a.value(known), b.value(known)), a.constant and b.constant)


class Arguments(dict[int, Any]):
    """Where a plugin puts its extra arguments, and their number as `nbSymExprs`."""


def handed_over(number: Any) -> Any:
    assert isinstance(number, trtp.SymInt32), "kernels take 32-bit integers"
    return SimpleNamespace(expr=number._expr)


def described(dims: Sequence[int], kind: Any) -> Any:
    found = trt.DynamicPluginTensorDesc()
    inner = trt.PluginTensorDesc()
    inner.dims, inner.type, inner.format = trt.Dims(list(dims)), kind, trt.TensorFormat.LINEAR
    found.desc = inner
    return found


def axes(name: str, head_dim: int, constant: Callable[[int], Expression]) -> list[list[Expression]]:
    def axis(letter: str) -> Expression:
        return Expression(lambda known: known[letter])

    width = constant(head_dim)
    q = [axis("batch"), axis("heads"), axis("queries"), width]
    k = [axis("batch"), axis("heads"), axis("keys"), width]
    return [q, k, k, *([[axis("batch")]] if name == ours.RAGGED else [])]


def built(name: str, kind: str, head_dim: int, tactic: int | None, shapes: list[Environment]) -> dict[str, Any]:
    """The builder's calls in their order; a tactic of None stops before a kernel is compiled."""
    builder = Expressions()
    space, short = name.split("::")
    lib = importlib.import_module("tensorrt_bindings.plugin._lib")
    creator = lib._TemplatePluginCreator(short, space, {})
    plugin = creator.create_plugin(short, space, [], None, trt.QuickPluginCreationRequest.STRICT_AOT)
    inputs = axes(name, head_dim, builder.constant)
    dtype = getattr(trt.DataType, kind)
    kinds = [dtype] * 3 + [trt.DataType.INT32] * (len(inputs) - 3)
    [result] = plugin.get_output_data_types(kinds, [len(shape) for shape in inputs])
    [out] = plugin.get_output_shapes(inputs, [], builder)
    open_dims = [[head_dim if axis.constant else -1 for axis in shape] for shape in [*inputs, list(out)]]
    tensors = [described(dims, one) for dims, one in zip(open_dims, [*kinds, result], strict=True)]
    offered = plugin.get_supported_format_combinations(tensors, len(inputs))
    plugin.configure_plugin(tensors[:-1], tensors[-1:])
    answer: dict[str, Any] = {
        "same_type": result == dtype,
        "out": [[axis.value(known) for axis in out] for known in shapes],
        "offered": [[one.type.name, one.format.name] for one in offered],
        "tactics": sorted(plugin.get_valid_tactics()),
    }
    if tactic is None:
        return answer
    plugin.set_tactic(tactic)
    launch, arguments = SimpleNamespace(), Arguments()
    plugin.get_launch_params(inputs, tensors, len(inputs), launch, arguments, builder)
    entry, ptx = plugin.get_kernel([one.desc for one in tensors[:-1]], [one.desc for one in tensors[-1:]])
    assert vars(arguments)["nbSymExprs"] == len(arguments)
    numbers = [arguments[index] for index in range(len(arguments))]
    return answer | {
        "entry": entry,
        "ptx": ptx.decode(),
        "launches": [
            {field: value.expr.value(known) for field, value in vars(launch).items()}
            | {"integers": [one.expr.value(known) for one in numbers]}
            for known in shapes
        ],
    }


def main() -> None:
    trt.IDimensionExpr = Expression  # NVIDIA's classes take nothing else for an expression
    trt.DimsExprs = lambda length: [None] * length
    tensor = importlib.import_module("tensorrt_bindings.plugin._tensor")
    tensor.SymExprImpl = handed_over  # the last step, which puts a C++ pointer into a C++ object
    asked = json.loads(sys.argv[1])
    ours.register(asked["capability"], lazy=True)
    ours.register(asked["capability"], lazy=True)
    found = {key: built(*case, asked["shapes"]) for key, case in asked["cases"].items()}
    refused: dict[str, str] = {}
    for key, call in {
        "head": lambda: built(ours.PLAIN, "BF16", 96, None, []),
        "open": lambda: built(ours.PLAIN, "BF16", -1, None, []),
        "card": lambda: ours.register(89, lazy=True),
    }.items():
        try:
            call()
        except InvalidRequest as error:
            refused[key] = str(error)
    sys.stdout.write(json.dumps({"version": trt.__version__, "found": found, "refused": refused}))


main()
