"""What an export is asked to do, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tdm_serve.artifact import Size
from tdm_serve.errors import InvalidRequest, OutputError
from tdm_serve.models.catalog import Reference
from tdm_serve.pipeline import Pipeline

Score = Callable[[Pipeline], float]  # a strict score of a model, between 0 and 1


def _silent(_: str) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, slots=True)
class Options:
    """One export. `sizes` of () is the checkpoint's own size, `text` of None its longest prompt, `dtype` of None fp32.

    `score` is measured before and after, where there is one. `say` gets a line for every part.
    """

    checkpoint: Reference
    kind: str
    output: Path
    dtype: str | None = None
    sizes: tuple[Size, ...] = ()
    batch: tuple[int, int] = (1, 4)
    text: int | None = None
    attention: str = "standard"
    body: bool = True
    quantise: str = "none"
    verify: bool = True
    score: Score | None = None
    say: Callable[[str], None] = field(default=_silent)

    def check(self) -> None:
        """Raises InvalidRequest for what does not go together, OutputError for a folder that is taken."""
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise OutputError(f"{self.output} exists and is not an empty folder; name a new one")
        if self.batch[0] != 1:
            raise InvalidRequest(
                f"--batch {self.batch[0]}-{self.batch[1]} begins at {self.batch[0]}; allowed: 1-MAX, because pictures "
                "join and leave a batch one by one"
            )
        if self.attention != "standard" and self.kind != "onnx":
            raise InvalidRequest(f"--attention {self.attention} does not go with --format {self.kind}; allowed: onnx")
        if self.quantise != "none" and (self.kind, self.dtype or "fp32") != ("onnx", "fp32"):
            raise InvalidRequest(f"--quantise {self.quantise} needs --format onnx and --dtype fp32")
        if (self.kind, self.dtype, self.verify) == ("onnx", "bf16", True):
            raise InvalidRequest(
                "--dtype bf16 cannot be verified here, because ONNX Runtime has no bfloat16 kernels on a CPU; choose "
                "fp16 or fp32, or add --no-verify"
            )
        if not self.body and self.attention != "plugin":
            raise InvalidRequest(f"--no-function-body needs --attention plugin; it is {self.attention}")
        if not self.body and self.verify:
            raise InvalidRequest(
                "--no-function-body leaves a graph that only runs where the plugin is installed, so it cannot be "
                "verified here; add --no-verify"
            )
