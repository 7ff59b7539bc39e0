"""`tdm-serve`: finds the command in a table of strings, imports that one module, and turns failures into sentences.

Exit codes: 0 done, 1 a command's own finding (such as a failed verification), 2 bad input or a machine that cannot do
what was asked, 130 interrupted, 141 the reader of our output went away.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads; spinning threads slow small models down

import argparse
import importlib.util
import io
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module, metadata
from types import ModuleType
from typing import NamedTuple

from tdm_serve.allocator import keep_freed_memory
from tdm_serve.cli.lazy import LazyParser, add_commands
from tdm_serve.errors import MissingExtra, TdmServeError


class Command(NamedTuple):
    """Where a command lives. Its module has `add_arguments(parser)` and `run(args) -> int`."""

    module: str
    help: str


COMMANDS: dict[str, Command] = {
    "generate": Command("tdm_serve.cli.generate", "make pictures from prompts"),
    "serve": Command("tdm_serve.cli.serve", "serve the OpenAI images API and a web page"),
    "keys": Command("tdm_app.keys_cli", "make, list and revoke API keys of a service"),
    "feedback": Command("tdm_app.feedback_cli", "export or delete what people think of pictures"),
    "bench": Command("tdm_serve.cli.bench", "measure a model on this machine, stage by stage"),
    "models": Command("tdm_serve.cli.models", "list the models that have a name"),
    "finetune": Command("tdm_finetune.cli", "train a part of a model, or distil it to few steps"),
    "eval": Command("tdm_finetune.evaluate_cli", "score a checkpoint on the synthetic world's prompts"),
    "convert": Command("tdm_serve.cli.convert", "write a checkpoint or an adapter as stock diffusers loads it"),
    "export": Command("tdm_serve.cli.export", "export a checkpoint to ONNX, TensorRT or a compiled package"),
}

# Importable name -> the extra that brings it.
EXTRA_OF = {
    "fastapi": "serve",
    "gradio": "demo",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "pydantic": "serve",
    "pydantic_settings": "serve",
    "python_multipart": "serve",
    "scipy": "finetune",
    "starlette": "serve",
    "tensorboard": "finetune",
    "tensorrt": "tensorrt",
    "torchao": "fp8",
    "triton": "kernels",
    "uvicorn": "serve",
}

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    _suit_the_terminal()
    keep_freed_memory()
    try:
        try:
            return _dispatch(arguments)
        finally:
            sys.stdout.flush()  # here, so that a closed pipe does not show at interpreter exit
    except ModuleNotFoundError as error:
        if (sentence := _explain_missing(arguments, error)) is None:
            raise
        return _fail(sentence)
    except TdmServeError as error:
        return _fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit; give it a place to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; a command's own arguments appear when it is the chosen one."""
    parser = LazyParser(prog="tdm-serve", description="Text to image in a few network evaluations.")
    parser.add_argument("--version", action="version", version=f"tdm-serve {version()}")
    add_commands(
        parser, "command", {name: (command.help, partial(_fill, command)) for name, command in COMMANDS.items()}
    )
    return parser


def version() -> str:
    """The installed version, or a word where the package runs from a folder that was never installed."""
    try:
        return metadata.version("tdm-serve")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _suit_the_terminal() -> None:
    """Letters that the terminal's encoding lacks print as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _dispatch(arguments: Sequence[str]) -> int:
    args = build_parser().parse_args(arguments)
    return int(_load(COMMANDS[args.command]).run(args))


def _fill(command: Command, parser: argparse.ArgumentParser) -> None:
    _load(command).add_arguments(parser)


def _load(command: Command) -> ModuleType:
    return import_module(command.module)


def _explain_missing(arguments: Sequence[str], error: ModuleNotFoundError) -> TdmServeError | None:
    """The sentence for a package that is not installed. None for a missing part of an installed one: that is a bug."""
    root = (error.name or "").partition(".")[0]
    if not root or root.startswith("tdm_") or _is_installed(root):
        return None
    command = " ".join(["tdm-serve", *arguments[:1]])
    if root in EXTRA_OF:
        return MissingExtra(f"`{command}` cannot import {root}: it", EXTRA_OF[root])
    return TdmServeError(f"`{command}` needs the package {root!r}, which is not installed; run: pip install tdm-serve")


def _is_installed(root: str) -> bool:
    return importlib.util.find_spec(root) is not None


def _fail(error: TdmServeError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return EXIT_BAD_INPUT
