"""docs/operating.md: its tables and examples are what the service has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tdm_app.settings import Settings
from tdm_app.settings_sources import load
from tdm_serve.cli.main import build_parser, main


@pytest.fixture(scope="module")
def text(root: Path) -> str:
    return (root / "docs" / "operating.md").read_text(encoding="utf-8")


def test_every_setting_is_in_the_table(text: str) -> None:
    table = text.partition("| setting |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| (?:`([^`]*)`)? ?\| (.*) \|$", table, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(Settings.model_fields)
    for name, default, meaning in rows:
        field = Settings.model_fields[name]
        assert meaning == field.description, name
        if field.default_factory is None:
            value = field.default
            shown = ",".join(value) if isinstance(value, tuple) else value
            assert default == ("" if shown is None else str(shown).lower()), name


def test_the_file_is_one(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    file = tmp_path / "serve.toml"
    file.write_text(block)
    assert load({"config": str(file)})[0].model == ("default", "default-teacher")
    assert main(["serve", "--config", str(file), "--print-config"]) == 0
    assert f"feedback = true  # {file}" in capsys.readouterr().out


def test_the_commands_exist(text: str) -> None:
    commands = re.findall(r"tdm-serve ((?:keys|feedback) [^\n`]+?)(?=[`\n])", text)
    assert len(commands) >= 5
    for command in commands:
        arguments = [part.strip('"') for part in re.findall(r'"[^"]*"|\S+', command)]
        if len(arguments) > 2:
            assert build_parser().parse_args(arguments).action == arguments[1]
