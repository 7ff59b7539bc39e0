"""PTX for runtimes that are not Triton's.

Triton gives every kernel two more parameters than the source has: pointers to scratch memory, one for TMA descriptors
and one for profiling. A TensorRT plugin cannot pass them. Most kernels never read them, so they can go.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from tdm_kernels.aot.binary import tool
from tdm_kernels.aot.compiling import Compiled
from tdm_kernels.errors import KernelUnavailable

HEADER = re.compile(r"(\.entry\s+\w+\s*\()([^)]*)(\))")
NAME = re.compile(r"\w+$")
TARGET = re.compile(r"^\.target\s+(\w+)", re.MULTILINE)


def embeddable(compiled: Compiled) -> str:
    """PTX that takes exactly `compiled.parameters`, and was assembled once. Raises KernelUnavailable."""
    if compiled.scratch_bytes:
        raise KernelUnavailable(
            f"{compiled.release.name} needs {compiled.scratch_bytes} bytes of scratch memory for each block, which "
            "only Triton's own launcher gives; embed a pointer variant"
        )
    ptx = strip_scratch(compiled.ptx, len(compiled.parameters))
    assemble(ptx)
    return ptx


def parameters(ptx: str) -> list[str]:
    """The declarations of the kernel's parameters, as written."""
    header = HEADER.search(ptx)
    assert header is not None, "PTX of a kernel has an entry"
    return [declaration.strip() for declaration in header[2].split(",") if declaration.strip()]


def strip_scratch(ptx: str, keep: int) -> str:
    """`ptx` with its first `keep` parameters. Raises KernelUnavailable where the kernel reads one of the others."""
    header = HEADER.search(ptx)
    assert header is not None, "PTX of a kernel has an entry"
    declarations = parameters(ptx)
    body = ptx[header.end() :]
    for declaration in declarations[keep:]:
        name = NAME.search(declaration)
        assert name is not None, declaration
        if re.search(rf"\b{name[0]}\b", body):
            raise KernelUnavailable(f"the kernel reads its parameter {name[0]}, so it cannot do without it")
    kept = ",\n\t".join(declarations[:keep])
    return f"{ptx[: header.start()]}{header[1]}\n\t{kept}\n{header[3]}{body}"


def assemble(ptx: str) -> bytes:
    """The cubin of `ptx` for the target that it names. Raises KernelUnavailable with the assembler's words."""
    target = TARGET.search(ptx)
    assert target is not None, "PTX names its target"
    blackwell = int(re.sub(r"\D", "", target[1])) >= 100
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        program = tool("ptxas-blackwell" if blackwell else "ptxas")
        command = [program, f"--gpu-name={target[1]}", source, "-o", binary]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise KernelUnavailable(f"ptxas refuses the kernel for {target[1]}: {done.stderr.strip()}")
        return binary.read_bytes()
