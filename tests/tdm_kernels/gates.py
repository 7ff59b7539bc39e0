"""What the compiler must make of each kernel: one gate a row, checked by test_compiled.py.

Registers are of one thread and were read off the compiler; a kernel that needs more lost something. All kernels must
keep their registers (no spills) and fit the shared memory of their card.
"""

from __future__ import annotations

from dataclasses import dataclass

from tdm_kernels.aot.attention import attention_name, quantised_name

MATRIX = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
FP8 = {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA", 120: "QMMA"}
INTEGERS = {80: "IMMA", 86: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "IMMA", 120: "IMMA"}
SPECIALISED = ("UTMALDG", "USETMAXREG")


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
    return Gate(name, 90, 168, ("HGMMA", *SPECIALISED), slow)


def quantised(values: str, head_dim: int, capability: int, registers: int, *, slow: bool = False) -> Gate:
    products = (FP8 if values == "fp8" else MATRIX)[capability]
    needs = (INTEGERS[capability], products, "LDGSTS")
    return Gate(quantised_name(values, head_dim, "pointer"), capability, registers, needs, slow)


def quantised_specialised(values: str, head_dim: int, *, slow: bool = False) -> Gate:
    products = (FP8 if values == "fp8" else MATRIX)[90]
    return Gate(quantised_name(values, head_dim, "tma"), 90, 168, ("IGMMA", products, *SPECIALISED), slow)


def streaming(name: str, capability: int, registers: int, *, slow: bool = False, stores: bool = True) -> Gate:
    """Memory-bound kernels read, and where they write as much, write 16 bytes at once."""
    return Gate(name, capability, registers, ("LDG.128", *(["STG.128"] * stores)), slow)


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
    quantised("bf16", 64, 90, 128, slow=True),
    quantised("bf16", 128, 80, 240),
    quantised("bf16", 128, 90, 168, slow=True),
    quantised("bf16", 128, 100, 216, slow=True),
    quantised("bf16", 128, 120, 240, slow=True),
    quantised("fp8", 64, 90, 128, slow=True),
    quantised("fp8", 128, 89, 248),
    quantised("fp8", 128, 90, 224, slow=True),
    quantised("fp8", 128, 100, 224, slow=True),
    quantised("fp8", 128, 120, 248, slow=True),
    quantised_specialised("bf16", 64, slow=True),
    quantised_specialised("bf16", 128, slow=True),
    quantised_specialised("fp8", 64, slow=True),
    quantised_specialised("fp8", 128),
    streaming("group_norm_silu-moments-bf16-c4", 90, 80, stores=False),
    streaming("group_norm_silu-apply-bf16-c4", 90, 96),
    streaming("group_norm_silu-moments-bf16-c16", 80, 80, stores=False, slow=True),
    streaming("group_norm_silu-apply-bf16-c16", 80, 96, slow=True),
    streaming("qk_norm_rope-bf16-d128-pairs", 90, 72),
    streaming("qk_norm_rope-bf16-d128-halves", 90, 72, slow=True),
    streaming("qk_norm_rope-bf16-d64-pairs", 90, 48, slow=True),
    streaming("quantise_qk-sums-bf16-d128-pairs", 90, 104, stores=False, slow=True),
    streaming("quantise_qk-keys-bf16-d128-pairs", 90, 168, slow=True),
    streaming("quantise_qk-queries-bf16-d128-pairs", 90, 168, slow=True),
]
