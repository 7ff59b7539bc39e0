"""From a release to PTX and a cubin for one compute capability."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tdm_kernels.aot.release import Release
from tdm_kernels.aot.releases import RELEASES
from tdm_kernels.errors import BadArgument, KernelUnavailable

WARP = 32


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a launch needs: `threads` for each block, `shared_bytes` of dynamic shared memory, the parameters in order.

    `scratch_bytes` of global memory for each block, 128-byte aligned, are wanted by kernels that make TMA descriptors;
    Triton passes them by a pointer behind the parameters, and behind that one more that it uses for profiling.
    """

    release: Release
    capability: int
    entry: str
    ptx: str
    cubin: bytes
    threads: int
    shared_bytes: int
    scratch_bytes: int

    @property
    def parameters(self) -> tuple[str, ...]:
        """Types in order, such as `*bf16` and `i32`."""
        return tuple(kind.partition(":")[0] for kind in self.release.arguments.values())


def release_of(name: str) -> Release:
    """The release of that name. Raises BadArgument."""
    if name not in RELEASES:
        raise BadArgument(f"no kernel is released as {name!r}; `python -m tdm_kernels.aot list` shows all names")
    return RELEASES[name]


def compile_release(name: str, capability: int) -> Compiled:
    """Compiles `name` for `capability` (90 is 9.0). Raises BadArgument; KernelUnavailable where nothing compiles."""
    release = release_of(name)
    if capability not in release.capabilities:
        allowed = ", ".join(map(str, release.capabilities))
        raise BadArgument(f"{name} is not released for compute capability {capability}; allowed: {allowed}")
    made = _compile(release, capability)
    meta = made.metadata
    return Compiled(
        release=release,
        capability=capability,
        entry=meta.name,
        ptx=made.asm["ptx"],
        cubin=made.asm["cubin"],
        threads=meta.num_warps * WARP,  # warp specialisation adds to what was asked for
        shared_bytes=meta.shared,
        scratch_bytes=meta.global_scratch_size,
    )


def _compile(release: Release, capability: int) -> Any:
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise KernelUnavailable("kernels cannot be compiled in a process with TRITON_INTERPRET=1")
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise KernelUnavailable("triton is not installed; run: pip install 'tdm-serve[kernels]'") from error
    kernel = getattr(importlib.import_module(release.module), release.function)
    source = ASTSource(
        fn=kernel,
        signature={name: release.arguments.get(name, "constexpr").partition(":")[0] for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in release.constants.items()},
        attrs=_hints(kernel.arg_names, release.arguments),
    )
    options = {"num_warps": release.warps, "num_stages": release.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=options)


def _hints(names: list[str], arguments: Mapping[str, str]) -> dict[tuple[int], list[list[object]]]:
    """What the just-in-time compiler would see in real arguments."""
    return {
        (names.index(name),): [["tt.divisibility", int(kind.partition(":")[2])]]
        for name, kind in arguments.items()
        if ":" in kind
    }
