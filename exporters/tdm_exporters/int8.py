"""Linears in int8: weights one scale an output, activations one scale a tensor, found while running."""

from __future__ import annotations

import logging
from pathlib import Path

KEPT = ("modulation", "decoder")  # the modulation is tiny, and the decoder has convolutions


def quantise(path: Path) -> None:
    """Replaces a part's file by one with int8 matrix products."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole = path.with_name(f"{path.stem}.float.onnx")
    path.rename(whole)
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it advises on the root logger
    try:
        quantize_dynamic(
            whole, path, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8, per_channel=True
        )
    finally:
        logging.root.setLevel(level)
        whole.unlink()
