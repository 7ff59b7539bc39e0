"""`tdm-serve models`: what can be named, and how its family counts guidance."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tdm_serve.cli.main import main


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    assert main(["models", "--json"]) == 0
    return {model["id"]: model for model in json.loads(capsys.readouterr().out)["models"]}


def test_guidance_is_told_as_the_family_counts_it(capsys: pytest.CaptureFixture[str]) -> None:
    models = listed(capsys)
    told = {name: (models[name]["guidance_scale"], models[name]["guidance_off"]) for name in models}
    assert told["default"] == told["zimage-tdm-r1"] == (0.0, 0.0)
    assert told["default-teacher"] == (2.0, 0.0)
    assert told["sd3-medium-tdm"] == told["dreamshaper7-tdm"] == (1.0, 1.0)
    assert told["pixart-alpha-512"] == (4.5, 1.0)


def test_the_table_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    models = listed(capsys)
    assert main(["models"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["ID", "FAMILY", "NFE", "GUIDANCE"]
    assert [line.split()[0] for line in lines] == list(models)
    assert [line.split()[2] for line in lines] == [str(model["nfe"]) for model in models.values()]
    shown = {line.split()[0]: line for line in lines}
    assert "  0, off  " in shown["default"] and "  2, 0 is off  " in shown["default-teacher"]
    assert "  1, off  " in shown["sd3-medium-tdm"]
