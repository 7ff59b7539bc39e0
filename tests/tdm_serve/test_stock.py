"""Plain diffusers folders: sampled as their stock pipeline would by default, or refused with what to do."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from tdm_serve import Pipeline
from tdm_serve.errors import CheckpointError, ConfigError, UnknownModel
from tdm_serve.models.catalog import EMBEDDED, resolve
from tdm_serve.models.entries import stock_defaults
from tdm_serve.models.families.table import INDEX
from tdm_serve.models.spec import MANIFEST
from tests.tdm_serve import tiny_folders

pytestmark = pytest.mark.filterwarnings("ignore:.*requires torchvision.*")

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def scheduled(folder: Path, scheduler: Any) -> Path:
    """A folder whose scheduler is another one."""
    scheduler.save_pretrained(folder / "scheduler")
    named(folder, type(scheduler).__name__)
    return folder


def named(folder: Path, scheduler: str) -> None:
    index = json.loads((folder / INDEX).read_text()) | {"scheduler": ["diffusers", scheduler]}
    (folder / INDEX).write_text(json.dumps(index))


def sd3(folder: Path) -> Path:
    return scheduled(tiny_folders.sd3(folder), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))


def sd3_solver(folder: Path) -> Path:
    return tiny_folders.sd3(folder)


def sd15(folder: Path) -> Path:
    return tiny_folders.sd15(folder)


def sd15_ddim(folder: Path) -> Path:
    return scheduled(
        tiny_folders.sd15(folder),
        diffusers.DDIMScheduler(**SD15, clip_sample=False, set_alpha_to_one=False, steps_offset=1),  # pyright: ignore[reportArgumentType]
    )


def pixart(folder: Path) -> Path:
    return tiny_folders.pixart(folder, sample_size=16)


@pytest.mark.parametrize("make", [sd3, sd3_solver, sd15, sd15_ddim, pixart])
def test_a_plain_folder_gives_what_its_stock_pipeline_gives(
    make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At the pipeline's own steps, guidance and size."""
    folder = make(tmp_path / "plain")
    with caplog.at_level(logging.WARNING):
        pipeline = Pipeline.from_pretrained(folder, device="cpu")
    assert f"{folder} holds no {MANIFEST}: it is served as its stock pipeline would be by default" in caplog.text
    made = pipeline("a red star", seed=4)[0]
    stock: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
    more = {"use_resolution_binning": False, "clean_caption": False} if make is pixart else {}
    expected = stock("a red star", generator=torch.Generator().manual_seed(4), output_type="np", **more).images[0]
    apart = np.abs(np.asarray(made.image, dtype=np.float32) - 255.0 * expected)
    assert apart.mean() <= 0.5 and (apart > 2).mean() <= 0.01
    defaults = stock_defaults()[pipeline.info.family]
    assert made.nfe == 2 * defaults["steps"] and made.guidance == defaults["guidance"]


def test_a_plain_folder_takes_other_steps_and_an_adapter_of_the_user(tmp_path: Path) -> None:
    folder = sd15(tmp_path / "plain")
    (tmp_path / "style.safetensors").write_bytes(b"")
    spec = resolve(f"{folder}+adapter={tmp_path / 'style.safetensors'}+name=styled")
    assert spec.id == "styled" and spec.free_steps
    assert [one.path.name for one in spec.adapters] == ["style.safetensors"]
    assert len(spec.rows(7)) == 7


def test_z_image_folders_are_read_by_their_shift(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "plain"))
    (folder / MANIFEST).unlink()
    spec = resolve(folder)
    assert (spec.family, spec.shift, len(spec.sigmas), spec.guidance) == ("zimage", 3.0, 50, 6.0)
    changed = json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) | {"use_dynamic_shifting": True}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=r"shifts by size, which is not read; .*zimage-tdm-r1\+base="):
        resolve(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"beta_start": None}, "not usable"),
        ({"prediction_type": "sample"}, "uses prediction_type sample, which is not read"),
        ({"rescale_betas_zero_snr": True}, "uses rescale_betas_zero_snr, which is not read"),
        ({"trained_betas": [0.1, 0.2]}, "uses trained_betas, which is not read"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta schedule 'squaredcos_cap_v2' is unknown"),
    ],
)
def test_schedulers_that_are_not_read(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = sd15(tmp_path / "plain")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=rf"{said}.*dreamshaper7-tdm\+base="):
        resolve(folder)


def test_a_flow_scheduler_that_is_not_known(tmp_path: Path) -> None:
    folder = sd3(tmp_path / "plain")
    named(folder, "FlowMatchHeunDiscreteScheduler")
    with pytest.raises(CheckpointError, match=r"FlowMatchHeunDiscreteScheduler, which is not known here; .*sd3-medium"):
        resolve(folder)


def test_another_scheduler_of_the_same_process_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = scheduled(sd15(tmp_path / "plain"), diffusers.PNDMScheduler(**SD15, steps_offset=1))  # pyright: ignore[reportArgumentType]
    with caplog.at_level(logging.WARNING):
        spec = resolve(folder)
    assert "has the scheduler PNDMScheduler; DPM-Solver++ samples the same process instead" in caplog.text
    assert spec.sampler == "dpmpp_2m" and len(spec.times) == 50


def test_folders_that_hold_nothing_of_the_kind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=MANIFEST):
        resolve(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(CheckpointError, match="is a FluxPipeline, a pipeline class that is not known here"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("reference", "error", "said"),
    [
        ("nowhere", UnknownModel, r"neither a known id nor a folder; known ids are default, .*hub:OWNER/NAME"),
        (
            "zimage-turbo+bse=x",
            ConfigError,
            r"has the option 'bse'; .*\+adapter=.*\+base=.*\+file=.*\+name=",
        ),
        ("zimage-turbo+base=", ConfigError, "has the option 'base'"),
        ("zimage-turbo+name=a+name=b", ConfigError, "there twice"),
        ("zimage-turbo+version=tdm", ConfigError, r"zimage-turbo takes no \+version="),
        ("default+base=x", ConfigError, r"default takes no \+base=; it takes \+name="),
        ("zimage-turbo+base=nowhere", CheckpointError, "base 'nowhere' is no folder"),
        ("hub:one", ConfigError, "write hub:OWNER/NAME"),
    ],
)
def test_references_that_cannot_be_read(reference: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        resolve(reference)


def test_files_in_the_place_of_models(tmp_path: Path) -> None:
    file = tmp_path / "network.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is a single file.*zimage-turbo\+file=.*zimage-tdm-r1\+adapter="):
        resolve(file)
    with pytest.raises(CheckpointError, match=r"for a single file write \+file="):
        resolve(f"zimage-turbo+base={file}")
    with pytest.raises(CheckpointError, match="adapter 'nothing' is not there"):
        resolve(f"zimage-tdm-r1+base={EMBEDDED}+adapter=nothing")


def test_a_folder_with_an_option_in_its_name(tmp_path: Path) -> None:
    folder = sd15(tmp_path / "one+name=two")
    assert resolve(folder).base == folder
