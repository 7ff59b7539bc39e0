"""One part as a compiled package: `torch.export`, then AOTInductor. It is loaded without compiling anything."""

from __future__ import annotations

import logging
import shutil
import warnings
from pathlib import Path

import torch
from torch._inductor import aoti_compile_and_package  # torch documents it under this name
from torch.export import ExportedProgram

from tdm_exporters.attention import as_plain_attention
from tdm_exporters.parts import Part
from tdm_serve.errors import BackendUnavailable

COMPILERS = ("g++", "c++", "clang++")


def check_compiler() -> None:
    """Raises BackendUnavailable where no C++ compiler is on the PATH."""
    if not any(map(shutil.which, COMPILERS)):
        raise BackendUnavailable(
            f"--format pt2 compiles with C++, and none of {', '.join(COMPILERS)} is on the PATH; install one, or "
            "choose --format onnx"
        )


def write(part: Part, folder: Path) -> list[Path]:
    """Exports and compiles a part; returns its file."""
    path = folder / f"{part.name}.pt2"
    logger = logging.getLogger("torch._inductor")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the compiler's own deprecations
            program = torch.export.export(
                part.module.eval(), tuple(part.inputs.values()), dynamic_shapes=part.open_axes
            )
            aoti_compile_and_package(_plain(program), package_path=str(path))
    finally:
        logger.setLevel(before)
    return [path]


def _plain(program: ExportedProgram) -> ExportedProgram:
    """With our attention as torch's own, which the compiler knows."""
    table = as_plain_attention()
    ours = any(node.target in table for node in program.graph.nodes)
    return program.run_decompositions(dict(table)) if ours else program
