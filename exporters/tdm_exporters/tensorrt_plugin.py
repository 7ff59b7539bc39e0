"""`tdm::joint_attention` as a TensorRT plugin whose kernel is compiled while an engine is built.

TensorRT 10.14 and newer take a "quickly deployable" plugin: a few Python functions, of which one returns PTX and how to
launch it, in expressions of the inputs' shapes. The kernel is the released one of `tdm_kernels`; the finished engine
holds it, and needs neither Python nor Triton. `tdm::joint_attention` takes q, k, v (B, H, S, D), as in our ONNX files;
`tdm::joint_attention_ragged` takes kv_len (B,) int32 besides.

A plugin's kernel gets its inputs, then integers, then outputs, and no floating numbers, which is how the released
kernels are written. TMA variants need scratch memory that TensorRT cannot give, so a tactic is a pointer variant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from inspect import Parameter, Signature
from typing import Any

from tdm_exporters.tensorrt_library import bindings, plugin_module
from tdm_kernels.aot.attention import attention_name
from tdm_kernels.aot.compiling import Compiled, compile_release
from tdm_kernels.aot.ptx import embeddable
from tdm_kernels.attention.variants import CAPABILITIES, HEAD_DIMS, VARIANTS, fitting
from tdm_serve.errors import InvalidRequest

PLAIN, RAGGED = "tdm::joint_attention", "tdm::joint_attention_ragged"
INPUTS = {PLAIN: ("q", "k", "v"), RAGGED: ("q", "k", "v", "kv_len")}
TYPES = {"BF16": "bf16", "HALF": "fp16"}  # TensorRT's names, and the kernels'
KIND = Parameter.POSITIONAL_OR_KEYWORD
TACTICS = {number: name for number, name in enumerate(VARIANTS, 1) if VARIANTS[name].loads == "pointer"}


def tactics(head_dim: int, capability: int) -> list[int]:
    """The numbers of the variants that fit a card (90 is 9.0), best guess first. Raises InvalidRequest for a head."""
    if head_dim not in HEAD_DIMS:
        raise InvalidRequest(
            f"the plugin's attention has head dimension {head_dim}; allowed: {', '.join(map(str, HEAD_DIMS))}. "
            "Export with --attention standard"
        )
    fit = fitting(head_dim, divmod(capability, 10))
    numbers = {name: number for number, name in TACTICS.items()}
    return [numbers[name] for name in fit if name in numbers]


@cache
def kernel(dtype: str, head_dim: int, tactic: int, ragged: bool, capability: int) -> tuple[Compiled, str]:
    """A compiled release, and its PTX with the parameters that TensorRT passes and no other."""
    compiled = compile_release(attention_name(dtype, head_dim, TACTICS[tactic], ragged=ragged), capability)
    return compiled, embeddable(compiled)


def integers(q: Sequence[Any], k: Sequence[Any]) -> list[Any]:
    """The kernel's 15 integers for shapes (B, H, S, D), of numbers or of expressions; all tensors are contiguous.

    Strides of batch, head and line for q, k, v and the output, then the lines of q, the lines of k, and the heads.
    """
    of_q, of_k = _steps(q), _steps(k)
    return [*of_q, *of_k, *of_k, *of_q, q[2], k[2], q[1]]


def _steps(shape: Sequence[Any]) -> list[Any]:
    head = shape[2] * shape[3]
    return [shape[1] * head, head, shape[3]]


def grid(q: Sequence[Any], tactic: int, cdiv: Callable[[Any, int], Any]) -> tuple[Any, Any, Any]:
    """One block for every tile of queries of every head of every picture; `cdiv` divides and rounds up."""
    return cdiv(q[2], VARIANTS[TACTICS[tactic]].rows), q[1], q[0]


def register(capability: int, *, lazy: bool = False) -> None:
    """Makes both plugins known to TensorRT's ONNX parser, with kernels for one compute capability (90 is 9.0).

    `lazy` leaves the registry alone, for networks that are made without the parser. Raises InvalidRequest for a card
    without kernels, and where this process has registered them for another one (TensorRT keeps a name for good).
    """
    if capability not in CAPABILITIES:
        allowed = ", ".join(str(card / 10) for card in CAPABILITIES)
        raise InvalidRequest(
            f"the attention plugin has no kernels for compute capability {capability / 10}; allowed: {allowed}. Export "
            "with --attention standard"
        )
    for name in INPUTS:
        known = _registered.get(name, capability)
        if known != capability:
            raise InvalidRequest(
                f"this process has registered the attention plugin for compute capability {known / 10}, and "
                f"{capability / 10} was asked for; build that engine in a process of its own"
            )
        if name not in _registered:
            _register(name, capability, lazy)
            _registered[name] = capability


_registered: dict[str, int] = {}  # compute capabilities by plugin


def _register(name: str, capability: int, lazy: bool) -> None:
    """TensorRT reads the signatures of the functions, so they get those that belong to the plugin's inputs."""
    trtp = plugin_module()
    desc, outputs = trtp.TensorDesc, Parameter("outputs", KIND, annotation=tuple[trtp.TensorDesc])
    inputs = [Parameter(one, KIND, annotation=desc) for one in INPUTS[name]]
    tactic = Parameter("tactic", KIND, annotation=int)
    kinds = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]
    describe = _signed(_like_q, inputs, desc)
    tune = _signed(_tuner(name, capability), [*inputs, outputs], list[trtp.AutoTuneCombination])
    make = _signed(_maker(name, capability), [*inputs, outputs, tactic], kinds)
    trtp.register(name, lazy_register=lazy)(describe)
    trtp.autotune(name)(tune)
    trtp.aot_impl(name)(make)


def _signed(function: Callable[..., Any], parameters: list[Parameter], result: Any) -> Callable[..., Any]:
    def call(*tensors: Any) -> Any:
        return function(*tensors)

    call.__signature__ = Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
    return call


def _like_q(q: Any, *_: Any) -> Any:
    """The output is as the queries are."""
    return q.like()


def _tuner(name: str, capability: int) -> Callable[..., Any]:
    """Which types and tactics TensorRT may time: all floats of one type, in plain memory order."""

    def tune(q: Any, *_: Any) -> list[Any]:
        floats = "|".join(TYPES)
        lengths = ["|".join(["INT32"] * len(TYPES))] * (name == RAGGED)
        kinds = ", ".join([floats] * 3 + lengths + [floats])
        return [plugin_module().AutoTuneCombination(kinds, "LINEAR", tactics(head_dimension(q), capability))]

    return tune


def _maker(name: str, capability: int) -> Callable[..., Any]:
    """The kernel's name and PTX, how many blocks and threads it is launched with, and its integers."""

    def make(q: Any, k: Any, *others: Any) -> tuple[str, str, Any, Any]:
        trtp, tactic = plugin_module(), others[-1]
        compiled, ptx = kernel(_dtype(q), head_dimension(q), tactic, name == RAGGED, capability)
        blocks = grid(q.shape_expr, tactic, trtp.cdiv)
        launch = trtp.KernelLaunchParams(*blocks, block_x=compiled.threads, shared_mem=compiled.shared_bytes)
        numbers = integers(q.shape_expr, k.shape_expr)
        arguments = trtp.SymIntExprs(len(numbers))
        for index, number in enumerate(numbers):
            arguments[index] = trtp.SymInt32(number)
        return compiled.entry, ptx, launch, arguments

    return make


def head_dimension(q: Any) -> int:
    """Of a tensor's description. Raises InvalidRequest where the graph leaves it open."""
    width = int(q.shape[3])
    if width < 0:
        raise InvalidRequest("the plugin's attention has an open head dimension; it must be fixed in the ONNX file")
    return width


def _dtype(q: Any) -> str:
    found = {getattr(bindings().DataType, name): ours for name, ours in TYPES.items()}.get(q.dtype)
    if found is None:
        raise InvalidRequest(f"the plugin's attention computes in {q.dtype}; allowed: {', '.join(TYPES.values())}")
    return found
