"""How a stock diffusers pipeline samples a version: the scheduler of its folder, and the arguments of the call.

A scheduler makes its own noise levels from a number of steps. Where those are the version's, the number is all that a
caller must give; otherwise the call has to name the levels, as sigmas or as the network's times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from tdm_serve.errors import CheckpointError
from tdm_serve.models.families.table import FAMILIES
from tdm_serve.models.spec import Betas, ModelSpec
from tdm_serve.sampling import sigma_grid

NEAR = 1e-4  # what a scheduler's float32 may make of a noise level
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}
# beside steps, size and guidance: what makes stock read a prompt, and draw a size, as it is here
READING = {"sd3": ("max_sequence_length",), "pixart": ("max_sequence_length", "use_resolution_binning")}


@dataclass(frozen=True, slots=True)
class StockCall:
    """A scheduler that is ready to be saved, and keyword arguments of the pipeline beside the prompt."""

    scheduler: Any
    arguments: dict[str, Any]


def stock_call(spec: ModelSpec) -> StockCall:
    """Of a version at its own size. Raises CheckpointError for a table that no stock scheduler can be told."""
    if spec.betas is not None:
        scheduler, steps = _diffusion(spec, spec.betas)
    elif spec.sampler == "euler" and _plain_times(spec):
        scheduler, steps = _euler(spec)
    else:
        scheduler, steps = _flow_solver(spec)
    extra = {"max_sequence_length": spec.max_prompt_tokens, "use_resolution_binning": False}
    guidance = spec.guidance - 1.0 + FAMILIES[spec.family].guidance_off
    called = {"width": spec.width, "height": spec.height, "guidance_scale": guidance}
    return StockCall(scheduler, steps | called | {name: extra[name] for name in READING.get(spec.family, ())})


def _plain_times(spec: ModelSpec) -> bool:
    """Whether the network's times are those that flow matching has by itself."""
    return not spec.times or _near(spec.times, [1000.0 * sigma for sigma in spec.sigmas], 1000.0)


def _euler(spec: ModelSpec) -> tuple[Any, dict[str, Any]]:
    """Under the version's shift where a pipeline's own grid, or an even one, is the table; else the sigmas as they are.

    Z-Image's pipeline gives its scheduler an even grid, SD3's leaves it to the scheduler.
    """
    steps = len(spec.sigmas)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=spec.shift, use_dynamic_shifting=False)
    even = _near(spec.sigmas, sigma_grid(steps, spec.shift))
    if even and spec.family == "zimage":
        return scheduler, {"num_inference_steps": steps}
    scheduler.set_timesteps(steps)
    if _near(spec.sigmas, scheduler.sigmas[:-1].tolist()):
        return scheduler, {"num_inference_steps": steps}
    if even:
        return scheduler, {"sigmas": [1.0 - i / steps for i in range(steps)]}
    return FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False), {"sigmas": list(spec.sigmas)}


def _flow_solver(spec: ModelSpec) -> tuple[Any, dict[str, Any]]:
    """DPM-Solver++ with flow sigmas, of first order for Euler's steps; it takes no grid but its own."""
    steps = len(spec.sigmas)
    scheduler: Any = DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        flow_shift=spec.shift,
        final_sigmas_type="zero",
        solver_order=_order(spec),
    )
    scheduler.set_timesteps(steps)
    same = _near(spec.sigmas, scheduler.sigmas[:-1].tolist())
    if not same or not _near([row.t for row in spec.rows()], scheduler.timesteps.tolist(), 1000.0):
        raise CheckpointError(f"{spec.id} was trained on a table that stock diffusers cannot be configured for")
    return scheduler, {"num_inference_steps": steps}


def _diffusion(spec: ModelSpec, betas: Betas) -> tuple[Any, dict[str, Any]]:
    """DPM-Solver++ on the base's betas, of first order for DDIM's steps, which it equals; it takes any times."""
    steps, times = len(spec.times), [int(time) for time in spec.times]
    final: Any = betas.final  # these two are of types that diffusers declares as literals
    prediction: Any = PREDICTIONS[spec.prediction]
    scheduler: Any = DPMSolverMultistepScheduler(
        num_train_timesteps=betas.steps,
        beta_start=betas.start,
        beta_end=betas.end,
        beta_schedule=betas.schedule,
        prediction_type=prediction,
        final_sigmas_type=final,
        solver_order=_order(spec),
    )
    scheduler.set_timesteps(steps)
    if scheduler.timesteps.tolist() == times:
        return scheduler, {"num_inference_steps": steps}
    return scheduler, {"timesteps": times}


def _order(spec: ModelSpec) -> int:
    return 2 if spec.sampler == "dpmpp_2m" else 1


def _near(ours: Any, theirs: Any, scale: float = 1.0) -> bool:
    return len(ours) == len(theirs) and bool(np.allclose(ours, theirs, rtol=0, atol=NEAR * scale))
