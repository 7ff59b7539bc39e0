"""Run by test_tensorrt_build.py: every name and call of TensorRT in given sources, against NVIDIA's bindings.

Code that nobody can run here is at least held to names that exist and to calls that their signatures allow. Prints
JSON: what does not fit, and how many uses were looked at.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorrt_bindings as trt

sys.modules["tensorrt"] = trt  # NVIDIA's package of that name only forwards to the bindings
NAMES: dict[str, Any] = {
    "trt": trt,
    "trtp": importlib.import_module("tensorrt_bindings.plugin"),
    "builder": trt.Builder,
    "network": trt.INetworkDefinition,
    "config": trt.IBuilderConfig,
    "parser": trt.OnnxParser,
    "profile": trt.IOptimizationProfile,
    "tensor": trt.ITensor,
    "kinds": trt.NetworkDefinitionCreationFlag,
}
GIVEN: dict[str, Any] = {
    "bindings": trt,
    "plugin_module": NAMES["trtp"],
    "get_timing_cache": trt.ITimingCache,
    "get_layer": trt.ILayer,
    "get_input": trt.ITensor,
    "get_error": trt.ParserError,
}
ARGUMENT = re.compile(r"(\w+): [^,()=]+(=)?")


def owner(node: ast.expr) -> Any:
    """What an expression is in TensorRT, or None where it is something else."""
    if isinstance(node, ast.Name):
        return NAMES.get(node.id)
    if isinstance(node, ast.Call):
        function = node.func
        return GIVEN.get(getattr(function, "attr", None) or getattr(function, "id", ""))
    if isinstance(node, ast.Attribute) and (known := owner(node.value)) is not None:
        found = getattr(known, node.attr, None)
        return found if isinstance(found, type) else None
    return None


def counts(method: Any) -> list[tuple[int, int]]:
    """Fewest and most arguments of every way to call a method, as its documentation spells them."""
    text = method.__doc__ or ""
    ways = re.findall(rf"^(?:\d+\. )?{method.__name__}\((self: [^)]*)\)", text, re.MULTILINE)
    found = [ARGUMENT.findall(way)[1:] for way in ways]
    return [(sum(not default for _, default in way), len(way)) for way in found]


def complaints(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and sentence; an empty sentence for a use that is right."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (known := owner(node.value)) is not None:
            wrong = not hasattr(known, node.attr)
            yield node.lineno, f"{known.__name__} has no {node.attr}" if wrong else ""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            method = getattr(owner(node.func.value), node.func.attr, None)
            bound = type(method).__name__ == "instancemethod" and not node.func.attr.startswith("__")
            ways = counts(method) if bound else []
            given = len(node.args) + len(node.keywords)
            wrong = bool(ways) and not any(low <= given <= high for low, high in ways)
            yield node.lineno, f"{node.func.attr} takes {ways}, and gets {given}" if wrong else ""


def main() -> None:
    found = {path: list(complaints(ast.parse(Path(path).read_text()))) for path in sys.argv[1:]}
    uses = {path: len(lines) for path, lines in found.items()}
    wrong = [f"{Path(path).name}:{line}: {said}" for path, lines in found.items() for line, said in lines if said]
    sys.stdout.write("\n" + json.dumps({"uses": uses, "wrong": wrong}))


main()
