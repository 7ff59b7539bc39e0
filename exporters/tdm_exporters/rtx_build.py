"""One ONNX graph as a TensorRT-RTX engine: strongly typed, one optimisation profile, for named compute capabilities.

Building needs no GPU; running, and so every number of an engine, does. TensorRT-RTX takes an Attention operator as one
indivisible layer and refuses it where it has no kernel that does all of it, so a graph whose attention is still whole
in the network that was built has fused attention in its engine. (The library's own inspector only reads an engine that
a GPU has loaded.) Timing caches do nothing in TensorRT-RTX: kernels are chosen when an engine first runs. Only an
engine with weights that may be replaced asks for a GPU while it is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdm_exporters.network import Span, listener, mark_refittable, parse, profile_of
from tdm_exporters.rtx_library import bindings, capabilities
from tdm_serve.errors import BackendUnavailable, InvalidRequest
from tdm_serve.files import write_atomically

NO_KERNEL = "not supported by a dedicated kernel"
NO_GPU = "CHECK(status == CUDA_SUCCESS) failed"


@dataclass(frozen=True, slots=True)
class Target:
    """What an engine is built for. `refit` names weights that may be replaced later, as the ONNX graph calls them."""

    compute_capabilities: tuple[str, ...]
    profile: Mapping[str, Span]
    refit: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Built:
    """An engine that was built. Nothing here says that it was run.

    `fused_attention` counts attention that is one layer, `loose_softmax` softmax outside of it.
    """

    version: str  # of TensorRT-RTX
    compute_capabilities: tuple[str, ...]
    fused_attention: int
    loose_softmax: int
    inputs: Mapping[str, str]  # types by name
    refit: tuple[str, ...]
    bytes: int


def build(graph: Path, engine: Path, target: Target) -> Built:
    """Writes `engine` from an ONNX file.

    Raises InvalidRequest for what TensorRT-RTX cannot build, BackendUnavailable where it needs a GPU for that,
    MissingExtra without its packages.
    """
    trt, chosen = bindings(), capabilities(target.compute_capabilities)
    log = listener(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parse(trt.OnnxParser(network, log), graph, "TensorRT-RTX")
    mark_refittable(network, target.refit, graph)
    config = _configuration(trt, builder, chosen, bool(target.refit))
    config.add_optimization_profile(profile_of(builder, network, target.profile, graph))
    made = builder.build_serialized_network(network, config)
    if made is None:
        if target.refit and any(NO_GPU in error for error in log.errors):
            raise BackendUnavailable(f"TensorRT-RTX builds {graph.name} with weights to replace only beside a GPU")
        raise InvalidRequest(_refusal(graph, log.errors))
    write_atomically(engine, bytes(made))
    return _facts(trt, network, target, made.nbytes)


def _configuration(trt: Any, builder: Any, chosen: Iterable[Any], refit: bool) -> Any:
    config = builder.create_builder_config()
    listed = list(chosen)
    config.num_compute_capabilities = len(listed)
    for index, capability in enumerate(listed):
        config.set_compute_capability(capability, index)
    if refit:
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    return config


def _refusal(graph: Path, errors: list[str]) -> str:
    if any(NO_KERNEL in error for error in errors):
        return (
            f"TensorRT-RTX has no fused attention for the type of {graph.name}; use --dtype fp16 or bf16, or "
            "--attention decomposed"
        )
    return f"TensorRT-RTX cannot build {graph.name}: {errors[-1] if errors else 'it gives no reason'}"


def _facts(trt: Any, network: Any, target: Target, size: int) -> Built:
    kinds = [network.get_layer(index).type for index in range(network.num_layers)]
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    return Built(
        version=trt.__version__,
        compute_capabilities=tuple(dict.fromkeys(target.compute_capabilities)),
        fused_attention=kinds.count(trt.LayerType.ATTENTION_OUTPUT),
        loose_softmax=kinds.count(trt.LayerType.SOFTMAX),
        inputs={tensor.name: tensor.dtype.name for tensor in tensors},
        refit=target.refit,
        bytes=size,
    )
