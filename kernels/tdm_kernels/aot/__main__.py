"""Ahead-of-time compilation from a shell.

python -m tdm_kernels.aot list
python -m tdm_kernels.aot report NAME@90 ...        one line of JSON for each: registers, spills, instructions
python -m tdm_kernels.aot build NAME@90 -o FOLDER   NAME-sm90.ptx (for plugins), .cubin, .json (how to launch it)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tdm_kernels.aot.binary import contents
from tdm_kernels.aot.compiling import Compiled, compile_release
from tdm_kernels.aot.ptx import embeddable
from tdm_kernels.aot.releases import RELEASES
from tdm_kernels.errors import BadArgument, KernelError


def parsed(target: str) -> tuple[str, int]:
    """NAME@90 as name and capability."""
    name, _, capability = target.rpartition("@")
    if not name or not capability.isdigit():
        raise BadArgument(f"{target!r} is not NAME@CAPABILITY, such as NAME@90")
    return name, int(capability)


def launch_facts(compiled: Compiled) -> dict[str, object]:
    """What a launch needs beside the binary."""
    return {
        "name": compiled.release.name,
        "capability": compiled.capability,
        "entry": compiled.entry,
        "parameters": compiled.parameters,
        "constants": dict(compiled.release.constants),
        "threads": compiled.threads,
        "shared_bytes": compiled.shared_bytes,
        "scratch_bytes": compiled.scratch_bytes,
    }


def report(targets: list[str]) -> None:
    """Prints a line for each target; a failed compilation is a line with `error`."""
    for name, capability in map(parsed, targets):
        try:
            compiled = compile_release(name, capability)
        except (RuntimeError, AssertionError) as error:  # what Triton's passes raise
            line: dict[str, object] = {"name": name, "capability": capability, "error": repr(error)}
        else:
            found = contents(compiled.cubin)
            line = launch_facts(compiled) | {
                "registers": found.registers,
                "stack_bytes": found.stack_bytes,
                "spills": found.spills,
                "instructions": found.instructions,
            }
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


def build(targets: list[str], folder: Path) -> None:
    """Writes the files of each target."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, capability in map(parsed, targets):
        compiled = compile_release(name, capability)
        stem = folder / f"{name}-sm{capability}"
        stem.with_name(stem.name + ".ptx").write_text(embeddable(compiled))
        stem.with_name(stem.name + ".cubin").write_bytes(compiled.cubin)
        stem.with_name(stem.name + ".json").write_text(json.dumps(launch_facts(compiled), indent=2) + "\n")


def main() -> int:
    """Exit code 2 and one sentence where something is wrong."""
    parser = argparse.ArgumentParser(prog="tdm_kernels.aot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=("list", "report", "build"))
    parser.add_argument("targets", nargs="*", metavar="NAME@CAPABILITY")
    parser.add_argument("-o", "--output", type=Path, default=Path("kernels-aot"), metavar="FOLDER")
    args = parser.parse_args()
    try:
        if args.command == "list":
            sys.stdout.write("\n".join(RELEASES) + "\n")
        elif args.command == "report":
            report(args.targets)
        else:
            build(args.targets, args.output)
    except KernelError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
