"""The command table, quick help, and what bad input looks like: exit code 2 and one sentence."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest

from tdm_serve.cli import main as cli_main
from tdm_serve.cli.main import COMMANDS, Command, main

HEAVY = ("diffusers", "fastapi", "gradio", "numpy", "torch", "transformers")

LIGHT_COMMANDS = [
    [],
    ["--help"],
    ["--version"],
    ["no-such-command"],
    *([name, "--help"] for name in COMMANDS if name != "eval"),
]

# A message tells the value and what is allowed.
BAD_INPUT = {
    "no command": ([], ["COMMAND"]),
    "unknown command": (["paint"], ["paint", "generate"]),
    "no prompt": (["generate"], ["PROMPT"]),
    "empty prompt": (["generate", "  "], ["empty"]),
    "prompt that is no text": (["generate", "circle \udcff"], ["UTF-8"]),
    "second prompt empty": (["generate", "two red circles", ""], ["empty"]),
    "size without x": (["generate", "a star", "--size", "128"], ["128", "128x128"]),
    "size of words": (["generate", "a star", "--size", "bigxsmall"], ["bigxsmall"]),
    "n of zero": (["generate", "a star", "-n", "0"], ["0", "1 to 10"]),
    "n too large": (["generate", "a star", "-n", "11"], ["11", "1 to 10"]),
    "negative seed": (["generate", "a star", "--seed", "-1"], ["-1", "0 to"]),
    "huge seed": (["generate", "a star", "--seed", str(2**63)], [str(2**63), str(2**63 - 1)]),
    "seed of words": (["generate", "a star", "--seed", "lucky"], ["lucky"]),
    "no steps": (["generate", "a star", "--steps", "0"], ["0", "1 or more"]),
    "guidance not finite": (["generate", "a star", "--guidance-scale", "nan"], ["nan", "finite"]),
    "folder missing": (["generate", "a star", "-o", "no/such/folder/a.png"], ["no/such/folder"]),
    "not a png": (["generate", "a star", "-o", "a.jpg"], ["a.jpg", ".png"]),
    "engine missing": (["generate", "a star", "--engine", "no-engine"], ["no-engine"]),
    "port too large": (["serve", "--port", "65536"], ["65536", "65535"]),
    "host of another": (["serve", "--host", "192.0.2.1", "--port", "0"], ["192.0.2.1"]),
    "no batch": (["serve", "--max-batch", "0"], ["0", "1 or more"]),
    "convert to nowhere": (["convert", "default"], ["--output"]),
    "unknown format": (["export", "default", "--format", "coreml", "-o", "x"], ["coreml", "onnx"]),
    "bad sizes": (["export", "default", "--format", "onnx", "-o", "x", "--sizes", "64x64,7"], ["7"]),
    "bad batch": (["export", "default", "--format", "onnx", "-o", "x", "--batch", "4-1"], ["4-1", "MIN-MAX"]),
    "plugin in pt2": (["export", "default", "--format", "pt2", "-o", "x", "--attention", "plugin"], ["plugin", "onnx"]),
    "not built yet": (["export", "default", "--format", "tensorrt", "-o", "x"], ["not built yet", "onnx"]),
    "unknown stage": (["finetune", "dream"], ["dream", "pretrain"]),
}


@pytest.mark.parametrize("arguments", LIGHT_COMMANDS, ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str], environment: dict[str, str]) -> None:
    code = (
        "import sys\n"
        "from tdm_serve.cli.main import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert answer.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there(name: str) -> None:
    module = import_module(COMMANDS[name].module)
    assert callable(module.add_arguments)
    assert callable(module.run)
    assert COMMANDS[name].help


@pytest.mark.parametrize(("arguments", "words"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gives_a_sentence(
    arguments: list[str], words: list[str], refused: Callable[[list[str]], str]
) -> None:
    complaint = refused(arguments)
    for word in words:
        assert word in complaint


def test_port_in_use(refused: Callable[[list[str]], str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        complaint = refused(["serve", "--port", str(port)])
    assert complaint == f"error: 127.0.0.1:{port} is in use by another process; choose another --port\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tdm-serve ")


@pytest.mark.parametrize(("given", "kept"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_openmp_waits_passively_unless_told_otherwise(
    given: str | None, kept: str, environment: dict[str, str]
) -> None:
    variables = {name: value for name, value in environment.items() if name != "OMP_WAIT_POLICY"}
    if given:
        variables["OMP_WAIT_POLICY"] = given
    code = "import os, tdm_serve.cli.main; print(os.environ['OMP_WAIT_POLICY'])"
    answer = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=60, check=True
    )
    assert answer.stdout.strip() == kept


@pytest.fixture
def extra_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A command whose module is `path`; the test writes it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(COMMANDS, "extra", Command("extra_command_of_a_test", "for a test"))
    yield tmp_path / "extra_command_of_a_test.py"
    sys.modules.pop("extra_command_of_a_test", None)


def test_missing_extra_prints_its_pip_command(
    extra_command: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # what Python itself does for "not importable"
    extra_command.write_text("def add_arguments(parser): pass\ndef run(args):\n    import gradio\n")
    assert _exit_code(["extra"]) == 2
    assert capsys.readouterr().err == (
        "error: `tdm-serve extra` cannot import gradio: it needs packages that are not installed; "
        "run: pip install 'tdm-serve[demo]'\n"
    )


def test_missing_core_package_prints_its_pip_command(extra_command: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra_command.write_text("import no_such_package_anywhere\n")
    assert _exit_code(["extra"]) == 2
    assert "no_such_package_anywhere" in capsys.readouterr().err


def test_missing_part_of_an_installed_package_is_a_bug(extra_command: Path) -> None:
    extra_command.write_text("import json.no_such_part\n")
    with pytest.raises(ModuleNotFoundError):
        main(["extra"])


def test_extras_that_are_named_exist(root: Path) -> None:
    import tomllib

    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(cli_main.EXTRA_OF.values()) <= set(extras)


def test_interrupt_exits_130(extra_command: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra_command.write_text("def add_arguments(parser): pass\ndef run(args):\n    raise KeyboardInterrupt\n")
    assert _exit_code(["extra"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_reader_that_goes_away_is_no_error(environment: dict[str, str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    variables = {name: value for name, value in environment.items() if name != "PYTHONUNBUFFERED"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tdm_serve.cli", "--help"],
            env=variables,
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)
    assert done.returncode == 141
    assert done.stderr == b""


def _exit_code(arguments: list[str]) -> int:
    """argparse exits, our own errors return; a shell sees no difference."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
