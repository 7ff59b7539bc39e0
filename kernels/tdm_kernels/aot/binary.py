"""What a cubin holds: registers, stack, shared memory and instructions, read with the tools that Triton brings."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tdm_kernels.errors import KernelUnavailable

SHARED_LIMITS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that one block can ask for
REGISTERS = 65536  # of a multiprocessor, which at least one block has to fit into
# Matrix products by generation and operands (HGMMA and HMMA 16-bit, QGMMA fp8, IGMMA and IMMA int8, UTC... sm_100), TMA
# loads, asynchronous copies, the hand-over of registers between specialised warps, and traffic of spilled registers.
TOLD_APART = re.compile(
    r"\b(HGMMA|QGMMA|IGMMA|UTCHMMA|UTCQMMA|UTCIMMA|HMMA|QMMA|IMMA|UTMALDG|LDGSTS|USETMAXREG|LDL|STL)\b"
)
WIDE = re.compile(r"\b(LDG|STG)\b[.\w]*\.128\b")  # 16 bytes at once; counted as LDG.128 and STG.128
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True, slots=True)
class Contents:
    """`stack_bytes` for each thread: above 0 where registers are spilled."""

    registers: int
    stack_bytes: int
    instructions: Counter[str]

    @property
    def spills(self) -> int:
        """Instructions that move spilled registers."""
        return self.instructions["LDL"] + self.instructions["STL"]


def tool(name: str) -> Path:
    """A program of Triton's wheel (ptxas, cuobjdump, ...), found without importing Triton."""
    spec = find_spec("triton")
    path = Path(spec.origin).parent / "backends/nvidia/bin" / name if spec and spec.origin else None
    if path is None or not path.is_file():
        raise KernelUnavailable(f"{name} comes with triton; run: pip install 'tdm-serve[kernels]'")
    return path


def contents(cubin: bytes) -> Contents:
    """Reads a cubin with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = USAGE.search(_dump("-res-usage", file.name))
        assert usage is not None, "cuobjdump tells the registers of every kernel"
        listing = _dump("-sass", file.name)
    wide = [f"{kind}.128" for kind in WIDE.findall(listing)]
    return Contents(int(usage[1]), int(usage[2]), Counter(TOLD_APART.findall(listing) + wide))


def _dump(*arguments: str) -> str:
    return subprocess.run([tool("cuobjdump"), *arguments], capture_output=True, text=True, check=True).stdout
