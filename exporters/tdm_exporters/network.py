"""What building an engine takes in TensorRT and TensorRT-RTX alike: reading a graph, profiles, weights to replace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdm_exporters.parts import Part
from tdm_serve.errors import InvalidRequest

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """The shapes that an input may have: smallest, the one that kernels are chosen for, and largest."""

    least: Shape
    usual: Shape
    most: Shape


def spans(part: Part) -> dict[str, Span]:
    """A part's profile: all lengths that its graph takes, with kernels chosen for the largest."""
    return {name: _span(tuple(tensor.shape), part.axes[name]) for name, tensor in part.inputs.items()}


def _span(shape: Shape, axes: Mapping[int, Any]) -> Span:
    """An axis without limits, or with None for them, is as long as in the example."""
    limits = {axis: (int(one.min), int(one.max)) for axis, one in axes.items() if one is not None}
    least, most = (tuple(limits.get(axis, (size, size))[end] for axis, size in enumerate(shape)) for end in (0, 1))
    return Span(least, most, most)


def listener(trt: Any) -> Any:
    """A logger that keeps errors for the sentence that the user gets."""

    class Listener(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

    return Listener()


def parse(parser: Any, graph: Path, library: str) -> None:
    """Reads an ONNX file into the parser's network. Raises InvalidRequest with the library's reasons."""
    if not parser.parse_from_file(str(graph)):
        reasons = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise InvalidRequest(f"{library} cannot read {graph.name}: {reasons}")


def profile_of(builder: Any, network: Any, spans: Mapping[str, Span], graph: Path) -> Any:
    """Every input with open axes has a span that fits them. Raises InvalidRequest."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape: Shape = tuple(tensor.shape)
        if -1 not in shape:
            continue
        span = spans.get(tensor.name)
        if span is None or not all(_fits(shape, one) for one in (span.least, span.usual, span.most)):
            raise InvalidRequest(f"{graph.name}: the profile of {tensor.name} is {span}; its shape is {shape}")
        if not all(low <= usual <= high for low, usual, high in zip(span.least, span.usual, span.most, strict=True)):
            raise InvalidRequest(f"{graph.name}: the profile of {tensor.name} is {span}; sizes must not fall")
        profile.set_shape(tensor.name, span.least, span.usual, span.most)
    return profile


def _fits(shape: Shape, chosen: Shape) -> bool:
    return len(shape) == len(chosen) and all(a in (-1, b) for a, b in zip(shape, chosen, strict=True))


def mark_refittable(network: Any, names: Iterable[str], graph: Path) -> None:
    """Weights that an engine will take anew, by their names in the graph. Raises InvalidRequest for others."""
    for name in names:
        if not network.mark_weights_refittable(name):
            raise InvalidRequest(f"{graph.name} has no weight {name!r} that an engine could take anew")
