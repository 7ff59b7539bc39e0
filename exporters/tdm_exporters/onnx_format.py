"""One part as an ONNX file: torch's exporter, the checker, weights beside the graph where they are large."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Generator
from pathlib import Path

import onnx
import torch

from tdm_exporters import attention
from tdm_exporters.parts import Part

EXTERNAL_BYTES = 2**30  # a protobuf file ends at 2 GB; weights move into a file of their own well before


def write(part: Part, folder: Path, kind: str, body: bool) -> list[Path]:
    """Exports a part with attention as `kind`; returns its files, the graph first. Raises what torch or onnx does."""
    path = folder / f"{part.name}.onnx"
    with _quiet(), torch.no_grad():
        program = torch.export.export(part.module.eval(), tuple(part.inputs.values()), dynamic_shapes=part.open_axes)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=attention.OPSET,
            input_names=list(part.inputs),
            output_names=["output"],
            custom_translation_table=attention.translations(kind),
            verbose=False,
        )
    assert exported is not None
    exported.save(path, external_data=_weight_bytes(part) > EXTERNAL_BYTES)
    if kind == "plugin":
        _finish_plugin(path, body)
    onnx.checker.check_model(str(path), full_check=body)
    return [path, *sorted(folder.glob(f"{path.name}.data"))]


def _weight_bytes(part: Part) -> int:
    return sum(tensor.nbytes for tensor in part.module.state_dict().values())


def _finish_plugin(path: Path, body: bool) -> None:
    """The function's definition, and the domain's version, without touching weights in other files."""
    model = onnx.load(str(path), load_external_data=False)
    if not attention.plugin_nodes(model):
        return
    if all(entry.domain != attention.DOMAIN for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(attention.DOMAIN, 1))
    if body:
        attention.add_body(model)
    onnx.save(model, str(path))


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Without the exporter's notes on packages that are not installed and on its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
