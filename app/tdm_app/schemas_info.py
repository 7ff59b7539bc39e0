"""The wire format of what the server says about itself: models, health, capabilities."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ModelCard(BaseModel):
    """OpenAI's model object, and what this model takes and does."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tdm-serve"
    description: str
    family: str
    checkpoint_hash: str = Field(description="Of base, adapter and sigmas; equal hashes give equal pixels.")
    nfe: int = Field(description="Network evaluations per picture at the defaults.")
    sigmas: list[float] = Field(description="Noise level at each step.")
    steps: int = Field(description="Used where the request names none.")
    free_steps: bool = Field(description="Whether other numbers of steps suit it as well; false for few-step models.")
    guidance_scale: float = Field(description="Used where the request names none.")
    guidance_off: float = Field(description="A `guidance_scale` of up to this is no guidance: one evaluation a step.")
    adapter: Literal["none", "fused", "separate"] = Field(
        description="How the model's adapter is kept. Only a separate one takes an `adapter_scale`."
    )
    size: str
    size_multiple: int
    min_side: int
    max_side: int
    max_prompt_tokens: int


class ModelList(BaseModel):
    """Answer of `GET /v1/models`. The first is the default."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Answer of the two probes. `degraded` says what happened where the engine had to be restarted."""

    status: Literal["ok", "ready"]
    degraded: str | None = None


class ShapeCard(BaseModel):
    """A shape that is warm: no request of it meets a cold start."""

    size: str
    text_tokens: int = Field(description="Prompts are padded to this length.")
    guided: bool = Field(description="Whether two evaluations are made a step.")
    best_batch: int = Field(description="Pictures in one step at the highest throughput.")
    predicted_ms: dict[str, float] = Field(description="One picture on an idle device, by model.")


class GuidanceCard(BaseModel):
    """The convention of a model's family, in which requests give their `guidance_scale`."""

    default: float
    off: float = Field(description="Up to this it is no guidance: one evaluation a step, and no negative prompt.")


class Limits(BaseModel):
    """What a request may ask for. Sizes and prompt lengths differ by model; see `/v1/models`."""

    max_images: int
    max_steps: int
    max_guidance_scale: float
    max_adapter_scale: float
    max_prompt_characters: int
    max_body_bytes: int
    max_deadline_ms: int
    max_jobs: int = Field(description="Jobs that may wait at once.")
    min_priority: int
    max_priority: int


class Features(BaseModel):
    """What is switched on here."""

    stream: bool = True
    jobs: bool = True
    url: bool = True
    feedback: bool
    online_training: bool
    authentication: bool


class Capabilities(BaseModel):
    """Answer of `GET /v1/capabilities`."""

    version: str
    ready: bool
    degraded: str | None
    models: list[str]
    guidance: dict[str, GuidanceCard] = Field(description="By model.")
    shapes: list[ShapeCard]
    limits: Limits
    features: Features
