"""The catalogue's figures against what they come from, and the commands and documents that show them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest

from tdm_serve.errors import ConfigError
from tdm_serve.models.architectures import architecture_of
from tdm_serve.models.catalog import evaluations, resolve
from tdm_serve.models.entries import CATALOGUE, EMBEDDED, Entry, catalogue, read_catalogue, stock_defaults
from tdm_serve.models.families.table import FAMILIES
from tdm_serve.models.load import load
from tdm_serve.models.lora import read_base
from tests.conftest import Cli

NAMES = [
    "default", "default-tdm", "default-teacher", "zimage-tdm-r1", "zimage-turbo", "sd3-medium-tdm", "sd35-medium-tdm",
    "dreamshaper7-tdm", "pixart-alpha-512",
]  # fmt: skip
PUBLISHED = [name for name in NAMES if catalogue()[name].base is not None]
SANA: Any = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "final_sigmas_type": "zero"}
# the scheduler's configuration of stable-diffusion-v1-5, which the card of the DreamShaper adapter takes
SD15: Any = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def spec_of(name: str) -> Any:
    return catalogue()[name].spec(Path())


def test_these_are_the_models() -> None:
    assert list(catalogue()) == NAMES


def test_evaluations_and_guidance() -> None:
    found = {name: spec_of(name) for name in PUBLISHED}
    counted = {name: evaluations(spec.sigmas, spec.guidance) for name, spec in found.items()}
    assert counted.pop("zimage-turbo") == 8 and counted.pop("pixart-alpha-512") == 40
    assert set(counted.values()) == {4}
    assert {name for name, spec in found.items() if spec.guidance != 1.0} == {"pixart-alpha-512"}
    assert [name for name, spec in found.items() if spec.free_steps] == ["pixart-alpha-512"]


def test_z_image_tables_are_those_of_its_scheduler() -> None:
    assert spec_of("zimage-tdm-r1").sigmas == (1.0, 0.9, 0.75, 0.5)
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    for name, steps in (("zimage-tdm-r1", 4), ("zimage-turbo", 8)):
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])  # as the pipeline calls it
        assert spec_of(name).sigmas == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=1e-6)


@pytest.mark.parametrize("name", ["sd3-medium-tdm", "sd35-medium-tdm"])
@pytest.mark.parametrize(("side", "shift"), [(1024, 6.0), (512, 3.0)])
def test_sd3_tables_are_those_of_the_cards_scheduler(name: str, side: int, shift: float) -> None:
    scheduler: Any = diffusers.DPMSolverMultistepScheduler(flow_shift=shift, **SANA)
    scheduler.set_timesteps(4)
    rows = spec_of(name).rows(None, side, side)
    assert [row.sigma for row in rows] == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=1e-6)
    assert [row.t for row in rows] == scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    ("name", "steps", "config"),
    [("dreamshaper7-tdm", 4, SD15), ("pixart-alpha-512", 20, {"beta_start": 0.0001, "beta_end": 0.02})],
)
def test_times_of_epsilon_models_are_those_of_the_cards_scheduler(name: str, steps: int, config: Any) -> None:
    scheduler: Any = diffusers.DPMSolverMultistepScheduler(**config)
    scheduler.set_timesteps(steps)
    spec = spec_of(name)
    assert list(spec.times) == scheduler.timesteps.tolist()
    kept = scheduler.alphas_cumprod[scheduler.timesteps]
    assert [1 - sigma**2 for sigma in spec.sigmas] == pytest.approx(kept.tolist(), abs=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_bases_are_pinned_and_adapters_complete(name: str, tmp_path: Path) -> None:
    entry = catalogue()[name]
    assert entry.base is not None and re.fullmatch(r"[0-9a-f]{40}", entry.base.revision or "")
    architecture = architecture_of(entry.base.repo)
    assert architecture.family == entry.fields["family"]
    for adapter in entry.adapters:
        assert adapter.hub.revision or any("adapter's revision is not pinned" in note for note in entry.notes)
        if adapter.tensors is not None:
            architecture.write(tmp_path, tiny=False, without=frozenset())
            targeted = read_base(tmp_path).targeted(adapter.stated.targets)
            assert adapter.tensors == 2 * len(targeted)
            assert (adapter.stated.rank, adapter.stated.alpha) == (32, 64.0)


def test_what_the_issue_says_of_adapters() -> None:
    def adapter(name: str) -> Any:
        (one,) = catalogue()[name].adapters
        return one

    assert adapter("zimage-tdm-r1").tensors == 272 and adapter("zimage-tdm-r1").file == "tdmr1_zimage_ema.ckpt"
    assert adapter("sd3-medium-tdm").stated.scale == 0.125
    assert adapter("sd35-medium-tdm").tensors == 382
    assert any("scale is unsure" in note for note in catalogue()["sd35-medium-tdm"].notes)
    assert adapter("dreamshaper7-tdm").hub.repo == "Luo-Yihong/TDM_dreamshaper_LoRA"


def test_nothing_is_claimed_that_was_not_seen() -> None:
    known = {"tiny parity", "full-size random", "real weights"}
    for name, entry in catalogue().items():
        assert entry.verified and set(entry.verified) <= known, name
        assert ("real weights" in entry.verified) == (entry.base is None), name


def test_every_family_has_stock_defaults() -> None:
    assert stock_defaults().keys() == FAMILIES.keys()


@pytest.mark.parametrize(
    ("old", "new"), [("guidance = 4.5", "gudance = 4.5"), ('file = "tdm_dream', 'fle = "tdm_dream')]
)
def test_an_unknown_key_is_refused(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "catalog.toml"
    path.write_text(CATALOGUE.read_text().replace(old, new))
    with pytest.raises(ValueError, match=rf"has {new.partition(' ')[0]}; known are"):
        read_catalogue(path)


def test_embedded_entries_take_a_name() -> None:
    spec = resolve("default-tdm+name=mine")
    assert (spec.id, spec.version, spec.base) == ("mine", "tdm", EMBEDDED)


def test_two_models_of_one_id_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"of default, default one id is twice; give one another \+name="):
        load(["default", f"{EMBEDDED}+name=default"], "cpu")


def test_local_adapters_say_their_own_rank_where_they_can(tmp_path: Path) -> None:
    published: Entry = catalogue()["sd35-medium-tdm"]
    (adapter,) = published.adapters
    listed, named = adapter.at(tmp_path / "list.ckpt"), adapter.at(tmp_path / "named.safetensors")
    assert (listed.rank, listed.alpha, listed.targets) == (32, 64.0, adapter.stated.targets)
    assert (named.rank, named.alpha, named.targets, named.scale) == (None, None, (), 1.0)


def test_the_command_lists_them(cli: Cli, tmp_path: Path) -> None:
    table = cli("models", cwd=tmp_path)
    assert table.returncode == 0, table.stderr
    lines = table.stdout.splitlines()
    assert lines[0].split() == ["ID", "FAMILY", "NFE", "GUIDANCE", "AT", "HAND", "DESCRIPTION"]
    assert [line.split()[0] for line in lines[1:]] == NAMES
    models = json.loads(cli("models", "--json", cwd=tmp_path).stdout)["models"]
    assert [one["id"] for one in models] == NAMES
    turbo = next(one for one in models if one["id"] == "zimage-turbo")
    assert turbo["state"] in ("needs download", "downloaded") and turbo["nfe"] == 8 and turbo["guidance_scale"] == 0.0
    assert turbo["base"].startswith("hub:Tongyi-MAI/Z-Image-Turbo@")


def test_the_command_tells_all_of_one(cli: Cli, tmp_path: Path) -> None:
    shown = cli("models", "sd35-medium-tdm", cwd=tmp_path).stdout
    assert "The scale is unsure" in shown and "shift 3" in shown and "gated" in shown and "tiny parity" in shown
    assert "0.6664 at 1024x1024" in shown and "0.4997 at 512x512" in shown
    missing = cli("models", "nothing", cwd=tmp_path)
    assert missing.returncode == 2 and "model 'nothing' is not in the catalogue; it has default" in missing.stderr


def test_the_readme_has_the_table(root: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, str(root / "benchmarks" / "supported.py"), "--check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"run benchmarks/supported.py\n{done.stderr}"
