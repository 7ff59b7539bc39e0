"""What `test_quantise.py` runs in a process that has torchao: `fp8_checks.py NAME`; a failure is a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from tdm_serve import Pipeline
from tdm_serve.bench import output_of, relative_error
from tdm_serve.errors import ConfigError
from tdm_serve.models.load import load
from tdm_serve.models.quantise import linears

TINY = ("zimage-tdm-r1:tiny", "sd35-medium-tdm:tiny", "dreamshaper7-tdm:tiny", "pixart-alpha-512:tiny")
LARGEST_ERROR = 0.08  # relative, of a network's output: three bits of mantissa are a few per cent a layer


def of(pipeline: Pipeline) -> torch.Tensor:
    return output_of(pipeline.engine, pipeline.info.width, pipeline.info.height)


def families() -> None:
    """Every family's network runs with fp8 weights, close to what it was, and what is kept is kept."""
    for name in TINY:
        plain = Pipeline.from_pretrained(name, random_weights=True, dtype="bfloat16")
        fp8 = Pipeline.from_pretrained(name, random_weights=True, dtype="bfloat16", quantise="fp8")
        error = relative_error(of(fp8), of(plain))
        assert 1e-4 < error < LARGEST_ERROR, (name, error)
        model = fp8.engine.model
        taken = dict(linears(model.denoiser, model.spec.family))
        assert taken and all(type(one.weight).__name__ == "Float8Tensor" for one in taken.values()), name
        rest = [
            one for key, one in model.denoiser.named_modules() if isinstance(one, torch.nn.Linear) and key not in taken
        ]
        assert rest and all(
            one.weight.dtype == torch.bfloat16 and type(one.weight).__name__ == "Parameter" for one in rest
        )


def default() -> None:
    """The trained network stays close, with its adapter in the weights, and with several versions apart."""
    plain, fused = Pipeline.from_pretrained("default"), Pipeline.from_pretrained("default", quantise="fp8")
    apart = Pipeline.from_pretrained(["default", "default-teacher"], quantise="fp8", adapters="separate")
    for one in (fused, apart):
        assert 1e-4 < relative_error(of(one), of(plain)) < LARGEST_ERROR
    with pytest.raises(ConfigError, match='adapters="separate"'):
        load(["default", "default-teacher"], quantise="fp8")


def bench() -> None:
    """The command reports the error."""
    from tdm_serve.cli.main import main

    assert main(["bench", "--quantise", "fp8", "--repeats", "1", "--batch", "1"]) == 0


CHECKS: dict[str, Callable[[], None]] = {"families": families, "default": default, "bench": bench}

if __name__ == "__main__":
    CHECKS[sys.argv[1]]()
