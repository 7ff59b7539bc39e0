"""Every number in the README's prose has a source: a committed file, or a fact of the code, that says the same.

The tables between generation marks are made from the result files; `report.py --check` and `supported.py --check` hold
those, and commands run in `test_readme.py`. What remains is prose: the phrases below are written with the numbers that
their sources have now. Each must stand in the README, and no number may stand there beside them.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tdm_serve.models.catalog import evaluations, resolve

TRAINING = Path("tdm_serve", "checkpoints", "scenes", "training")
NAMES = r"\bv1\b|TDM-R1|Qwen3|SD1\.5|SD3\.5|SD3|Apache-2\.0"  # digits that are part of a name


def prose(text: str) -> str:
    """The README without code, links, generated tables and names with digits, in one line."""
    for pattern in (r"```.*?```", r"<!-- (\w+): begin.*?<!-- \1: end -->", r"\]\([^)]*\)", r"https?://\S+", NAMES):
        text = re.sub(pattern, " ", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", text)


def config(root: Path, stage: str) -> dict[str, Any]:
    return json.loads((root / TRAINING / stage / "config.json").read_text())["config"]


def minutes(root: Path, stage: str) -> str:
    """How long a stage of the shipped checkpoint's training took, by its own log."""
    last = (root / TRAINING / stage / "log.jsonl").read_text().splitlines()[-1]
    return f"{json.loads(last)['elapsed_s'] / 60:.0f}"


def pictures(root: Path) -> str:
    """Millions of pictures that the teacher saw."""
    legs = [config(root, stage) for stage in ("pretrain/start", "pretrain")]
    return f"{sum(leg['steps'] * leg['batch'] for leg in legs) / 1e6:.2f}"


def phrases(root: Path) -> Iterator[str]:
    """What the README says with numbers, as the sources have them."""
    default, tdm, teacher = (resolve(name) for name in ("default", "default-tdm", "default-teacher"))
    four, distilled, many = (evaluations(one.sigmas, one.guidance) for one in (default, tdm, teacher))
    autoencoder = json.loads((default.base / "vae" / "config.json").read_text())
    python = tomllib.loads((root / "pyproject.toml").read_text())["project"]["requires-python"]
    yield f"into a {four}-step generator"
    yield f"an {2 ** (len(autoencoder['block_out_channels']) - 1)}x autoencoder"
    yield f"the teacher at {many} evaluations, its {distilled}-step version"
    yield f"the multi-step teacher at {many} evaluations, its distilled version at {distilled}"
    yield f"the reinforced one at {four}."
    yield f"From Python {python.removeprefix('>=')} on"
    yield f"`partial_images: {four - 1}`"  # the last evaluation is the picture itself
    legs = f"{minutes(root, 'pretrain/start')} and {minutes(root, 'pretrain')} minutes"
    yield f"saw {pictures(root)} million pictures in {legs}"
    yield f"distillation took {minutes(root, 'tdm')} minutes, and reinforcement {minutes(root, 'tdm-r1')}"
    yield f"sigma table ({', '.join(f'{sigma:g}' for sigma in default.sigmas)}) is the scheduler's shift of 3"
    yield "at most 2 of 255 apart"  # tests/tdm_serve/test_convert.py


def test_prose_says_what_the_sources_say(root: Path) -> None:
    said = prose((root / "README.md").read_text())
    for phrase in phrases(root):
        assert phrase in said, f"the README does not say {phrase!r}"
        said = said.replace(phrase, "", 1)
    left = re.findall(r".{0,40}\d.{0,40}", said)
    assert not left, f"numbers without a source: {left}"
