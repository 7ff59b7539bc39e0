"""What the compiler must make of each kernel: one gate a row, checked by test_compiled.py.

Registers are of one thread and were read off the compiler; a kernel that needs more lost something. All kernels must
keep their registers (no spills) and fit the shared memory of their card.
"""

from __future__ import annotations

from dataclasses import dataclass

from tdm_kernels.aot.releases import attention_name

MATRIX = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


@dataclass(frozen=True, slots=True)
class Gate:
    """`needs` are instructions that must be there; `slow` gates run with the slow tests."""

    name: str
    capability: int
    registers: int
    needs: tuple[str, ...]
    slow: bool = False

    @property
    def target(self) -> str:
        """As `python -m tdm_kernels.aot report` takes it."""
        return f"{self.name}@{self.capability}"


def pointer(head_dim: int, variant: str, capability: int, registers: int, *, slow: bool = False) -> Gate:
    name = attention_name("bf16", head_dim, f"pointer-{variant}")
    return Gate(name, capability, registers, (MATRIX[capability], "LDGSTS"), slow)


def specialised(head_dim: int, variant: str, *, slow: bool = False) -> Gate:
    """168 registers are what setmaxnreg starts from with 12 warps; the compiler hands them over inside."""
    name = attention_name("bf16", head_dim, f"tma-{variant}")
    return Gate(name, 90, 168, ("HGMMA", "UTMALDG", "USETMAXREG"), slow)


GATES = [
    pointer(64, "128x64-w4-s3", 80, 255),
    pointer(64, "128x64-w4-s3", 86, 255, slow=True),
    pointer(64, "128x64-w4-s3", 89, 255, slow=True),
    pointer(64, "128x64-w4-s3", 90, 240),
    pointer(64, "128x64-w4-s3", 100, 232, slow=True),
    pointer(64, "128x64-w8-s3", 90, 128, slow=True),
    pointer(64, "128x64-w8-s3", 120, 184),
    pointer(64, "128x128-w8-s2", 90, 192, slow=True),
    pointer(128, "128x64-w8-s3", 80, 255, slow=True),
    pointer(128, "128x64-w8-s3", 86, 255),
    pointer(128, "128x64-w8-s3", 89, 255),
    pointer(128, "128x64-w8-s3", 90, 184),
    pointer(128, "128x64-w8-s3", 100, 184),
    pointer(128, "128x64-w8-s3", 120, 255, slow=True),
    pointer(128, "128x128-w8-s2", 90, 255, slow=True),
    pointer(128, "128x128-w8-s2", 100, 248, slow=True),
    specialised(64, "128x128-s2"),
    specialised(64, "128x128-s3", slow=True),
    specialised(64, "128x64-s3", slow=True),
    specialised(128, "128x128-s2"),
    specialised(128, "128x64-s3", slow=True),
]
