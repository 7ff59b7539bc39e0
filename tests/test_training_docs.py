"""docs/training.md names options and shipped configs that exist."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from tdm_finetune.cli import PRESETS
from tdm_finetune.tdm_r1 import TdmR1Config


def test_options_and_configs_exist(root: Path) -> None:
    text = (root / "docs" / "training.md").read_text()
    section = text.split("### Options that change the method")[1].split("### ")[0]
    options = {
        name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert options >= {"interval", "reference", "eta"}
    assert options <= {field.name for field in dataclasses.fields(TdmR1Config)}
    said = section.split("Shipped configs")[1]
    named = set(re.findall(r"`([a-z0-9-]+)`", said)) - {"tdm", "tdm-r1", "micro"}
    assert named <= {path.stem for path in PRESETS.glob("*/*.toml")}
    assert named >= {path.stem for path in (PRESETS / "tdm-r1").glob("*.toml")}
    assert all((root / "docs" / target).is_file() for target in re.findall(r"!\[.*?\]\((.*?)\)", text))
