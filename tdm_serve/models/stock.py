"""Plain diffusers folders, without a manifest of ours: served as their stock pipeline would serve them by default.

The scheduler's configuration tells the process; steps and guidance are the pipeline's own defaults. That suits a
multi-step model. A few-step one was trained for a schedule that no folder tells: it is named with the catalogue entry
that it is like.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from tdm_serve.errors import CheckpointError, ConfigError
from tdm_serve.models.entries import catalogue, stock_defaults
from tdm_serve.models.families.table import detect, read_index
from tdm_serve.models.folders import network_of
from tdm_serve.models.manifest import spec_of
from tdm_serve.models.spec import MANIFEST, Adapter, ModelSpec

logger = logging.getLogger(__name__)

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


def stock_spec(folder: Path, model_id: str, adapters: tuple[Adapter, ...] = ()) -> ModelSpec:
    """The spec of a diffusers folder by its scheduler. Raises CheckpointError where that is not known."""
    family = detect(folder)
    process = _process(folder, family)
    size = _own_size(folder, family)
    defaults = stock_defaults()[family]
    fields = {**defaults, **process, "limits": {**defaults["limits"], **size}, "family": family, "free_steps": True}
    try:
        spec = spec_of(fields, folder, model_id, "stock", adapters)
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(
            f"the scheduler of {folder} is not usable: {error!r}; {_advice(folder, family)}"
        ) from error
    logger.warning(
        "%s holds no %s: it is served as its stock pipeline would be by default, %d steps at guidance weight %g; %s",
        *(folder, MANIFEST, len(spec.rows()), spec.guidance, _advice(folder, family)),
    )
    return spec


def _advice(folder: Path, family: str) -> str:
    like = [name for name, one in catalogue().items() if one.base and one.fields["family"] == family]
    named = " or ".join(f"{name}+base={folder}" for name in like)
    return f"a few-step model is named with the entry that it is like ({named}), or has its own {MANIFEST}"


def _process(folder: Path, family: str) -> dict[str, Any]:
    """Sampler and noise process, in a manifest's fields."""
    config = _read(folder / "scheduler" / "scheduler_config.json")
    name = str((read_index(folder).get("scheduler") or [None, config.get("_class_name")])[1])  # as diffusers takes it
    if "beta_start" in config and not config.get("use_flow_sigmas"):
        return _diffusion(config, name, folder, family)
    if config.get("use_dynamic_shifting"):
        raise CheckpointError(f"the scheduler of {folder} shifts by size, which is not read; {_advice(folder, family)}")
    if name == "DPMSolverMultistepScheduler":
        return {"sampler": "dpmpp_2m", "grid": "solver", "shift": float(config.get("flow_shift", 1.0))}
    if name == "FlowMatchEulerDiscreteScheduler":
        grid = "linear" if family == "zimage" else "flow_match"  # Z-Image's pipeline gives the sigmas itself
        return {"sampler": "euler", "grid": grid, "shift": float(config.get("shift", 1.0))}
    raise CheckpointError(f"{folder} has the scheduler {name}, which is not known here; {_advice(folder, family)}")


def _diffusion(config: Mapping[str, Any], name: str, folder: Path, family: str) -> dict[str, Any]:
    odd = [key for key in ("trained_betas", "rescale_betas_zero_snr") if config.get(key)]
    prediction = str(config.get("prediction_type", "epsilon"))
    if odd or prediction not in PREDICTIONS:
        what = odd[0] if odd else f"prediction_type {prediction}"
        raise CheckpointError(f"the scheduler of {folder} uses {what}, which is not read; {_advice(folder, family)}")
    if name not in ("DDIMScheduler", "DPMSolverMultistepScheduler"):
        logger.warning("%s has the scheduler %s; DPM-Solver++ samples the same process instead", folder, name)
    times = _leading(config, int(stock_defaults()[family]["steps"])) if name == "DDIMScheduler" else ()
    return {
        "times": times,
        "sampler": "ddim" if name == "DDIMScheduler" else "dpmpp_2m",
        "prediction": PREDICTIONS[prediction],
        "betas": {
            "start": config["beta_start"],
            "end": config["beta_end"],
            "schedule": config.get("beta_schedule", "linear"),
            "steps": config.get("num_train_timesteps", 1000),
            "final": "zero" if _ends_clean(config, name) else "sigma_min",
        },
    }


def _leading(config: Mapping[str, Any], steps: int) -> tuple[float, ...]:
    """DDIM's usual times: whole strides from an offset up. Other spacings are the solver's."""
    if config.get("timestep_spacing", "leading") != "leading":
        return ()
    stride, offset = int(config.get("num_train_timesteps", 1000)) // steps, int(config.get("steps_offset", 0))
    return tuple(float(stride * i + offset) for i in reversed(range(steps)))


def _ends_clean(config: Mapping[str, Any], name: str) -> bool:
    """Whether the last step leaves no noise at all."""
    if name == "DDIMScheduler":
        return bool(config.get("set_alpha_to_one", True))
    return name != "DPMSolverMultistepScheduler" or config.get("final_sigmas_type", "zero") == "zero"


def _own_size(folder: Path, family: str) -> dict[str, int]:
    """Width and height where the network's configuration says its own, in latents."""
    side = _read(folder / network_of(family) / "config.json").get("sample_size")
    blocks = _read(folder / "vae" / "config.json").get("block_out_channels") or ()
    pixels = int(side) * 2 ** (len(blocks) - 1) if isinstance(side, int) and blocks else None
    return {} if pixels is None else {"width": pixels, "height": pixels}


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return cast(Mapping[str, Any], found)
