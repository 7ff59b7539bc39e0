"""One ONNX graph as an engine of NVIDIA TensorRT, for the GPU of this machine. Written, and never run.

Networks are strongly typed: they compute in the types of the graph. The attention is the operator of the standard, or
our plugin; whether the parser took the plugin is counted, because a graph that carries a body for it builds without.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import torch

from tdm_exporters import tensorrt_plugin
from tdm_exporters.attention import plugin_nodes
from tdm_exporters.network import Span, listener, mark_refittable, parse, profile_of
from tdm_exporters.tensorrt_library import bindings, driver_version
from tdm_serve.errors import BackendUnavailable, InvalidRequest
from tdm_serve.files import write_atomically

LIBRARY = "TensorRT"


@dataclass(frozen=True, slots=True)
class Place:
    """What an engine is bound to. It runs nowhere else."""

    gpu: str
    capability: int  # 90 is 9.0
    driver: int  # the CUDA version that the driver speaks, such as 13000
    tensorrt: str


@dataclass(frozen=True, slots=True)
class Target:
    """What an engine is built for. `refit` names weights that may be replaced later, as the ONNX graph calls them.

    `timings` is a file with what earlier builds measured on this card; it is read, and written anew.
    """

    profile: Mapping[str, Span]
    refit: tuple[str, ...] = ()
    timings: Path | None = None


@dataclass(frozen=True, slots=True)
class Built:
    """An engine that was built. Nothing here says that it was run."""

    place: Place
    plugins: int  # attention layers that are our kernel
    inputs: Mapping[str, str]  # types by name
    bytes: int


def here() -> Place:
    """This machine. Raises BackendUnavailable without a GPU, and what `bindings` raises."""
    version = bindings().__version__
    if not torch.cuda.is_available():
        raise BackendUnavailable("TensorRT builds an engine for the GPU of the machine that it runs on; here is none")
    major, minor = torch.cuda.get_device_capability()
    return Place(torch.cuda.get_device_name(), major * 10 + minor, driver_version(), version)


def cache_name(checkpoint_hash: str, part: str, target: Target, place: Place) -> str:
    """A file name that is the same where an engine that was built before can be used, and nowhere else."""
    timings = {"timings": None}  # how long other builds took to measure changes nothing of what is built
    key = {"checkpoint": checkpoint_hash, "part": part, "target": asdict(target) | timings, "place": asdict(place)}
    return f"{part}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.engine"


def build(graph: Path, engine: Path, target: Target) -> Built:
    """Writes `engine` from an ONNX file. Raises InvalidRequest for what TensorRT cannot build, and as `here`."""
    place, trt = here(), bindings()
    wanted = plugin_nodes(onnx.load(str(graph), load_external_data=False))
    if wanted:
        tensorrt_plugin.register(place.capability)
    log = listener(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_flags(trt))
    parse(trt.OnnxParser(network, log), graph, LIBRARY)
    plugins = count_plugins(trt, network)
    if plugins != wanted:
        raise InvalidRequest(
            f"{graph.name} has {wanted} attention nodes for the plugin, and TensorRT {trt.__version__} took {plugins}; "
            "export it with --no-function-body"
        )
    mark_refittable(network, target.refit, graph)
    config = configuration(trt, builder, target)
    config.add_optimization_profile(profile_of(builder, network, target.profile, graph))
    made = builder.build_serialized_network(network, config)
    if made is None:
        reason = log.errors[-1] if log.errors else "it gives no reason"
        raise InvalidRequest(f"TensorRT cannot build {graph.name}: {reason}")
    if target.timings is not None:
        write_atomically(target.timings, bytes(config.get_timing_cache().serialize()))
    write_atomically(engine, bytes(made))
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    return Built(place, plugins, {tensor.name: tensor.dtype.name for tensor in tensors}, made.nbytes)


def _flags(trt: Any) -> int:
    """TensorRT 11 has only strongly typed networks; 10 has to be told. Plugins come with a compiled kernel."""
    kinds = trt.NetworkDefinitionCreationFlag
    return 1 << int(kinds.STRONGLY_TYPED) | 1 << int(kinds.PREFER_AOT_PYTHON_PLUGINS)


def count_plugins(trt: Any, network: Any) -> int:
    """Layers of a network that are plugins."""
    return [network.get_layer(index).type for index in range(network.num_layers)].count(trt.LayerType.PLUGIN_V3)


def configuration(trt: Any, builder: Any, target: Target) -> Any:
    """One stream, so that a CUDA graph captures all of it; layers in detail, so that an inspector can tell fusions."""
    config = builder.create_builder_config()
    config.max_aux_streams = 0
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if target.refit:
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    if target.timings is not None:
        known = target.timings.read_bytes() if target.timings.is_file() else b""
        if not config.set_timing_cache(config.create_timing_cache(known), False):  # of another card or version
            config.set_timing_cache(config.create_timing_cache(b""), False)
    return config
