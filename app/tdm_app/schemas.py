"""The wire format: OpenAI's `CreateImageRequest` and `ImagesResponse`, with our few additions.

Types are strict (no "2" for 2) and unknown fields are refused, so that a setting is either honoured or named in an
error, never dropped in silence. `null` means the default, as in OpenAI's schema. Ranges of `n`, `seed` and `size`
are the engine's to check; they are only written down here.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from tdm_serve.core import MAX_IMAGES, MAX_SEED

MAX_PROMPT_CHARACTERS = 32_000  # OpenAI's own bound; the checkpoint's bound in tokens is checked by the engine
OutputFormat = Literal["png", "jpeg", "webp"]
Quality = Literal["low", "medium", "high"]
IGNORED = "Accepted and ignored: "
# OpenAI's names for a quality, as the three that its answers may hold.
ECHOED_QUALITY: dict[str, Quality] = {"low": "low", "medium": "medium", "standard": "medium", "high": "high"}

# What OpenAI's API has and this server has not: the supported values, and how to say so.
SUPPORTED: dict[str, tuple[tuple[object, ...], str]] = {
    "response_format": (("b64_json",), "b64_json; pictures are not stored, so they have no address"),
    "background": (("opaque", "auto"), "opaque or auto; the model draws no transparency"),
    "stream": ((False,), "false"),
    "partial_images": ((0,), "0, since answers are not streamed"),
}


def _nullable(schema: dict[str, Any]) -> None:
    """Writes into the OpenAPI document that every optional field takes null."""
    for name, wanted in schema["properties"].items():
        if name not in schema.get("required", ()):
            kept = {key: wanted.pop(key) for key in ("title", "description", "default") if key in wanted}
            option = wanted.pop("anyOf", [{}])[0] | wanted
            schema["properties"][name] = {"anyOf": [option, {"type": "null"}], **kept}


class ImageRequest(BaseModel):
    """Body of `POST /v1/images/generations`."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_nullable)

    prompt: str = Field(max_length=MAX_PROMPT_CHARACTERS, description="What to draw.", examples=["two red circles"])
    model: str | None = Field(None, description="Id of the loaded model, from `/v1/models`; it is the default.")
    n: int = Field(1, description="How many pictures.", json_schema_extra={"minimum": 1, "maximum": MAX_IMAGES})
    size: str = Field("auto", description="`WIDTHxHEIGHT` in pixels, or `auto` for the model's own.")
    seed: int | None = Field(
        None,
        # In words: FastAPI writes bounds as floats, which cannot hold this one.
        description=f"Of the first picture, 0 to {MAX_SEED}; the next get seed+1, seed+2, ... Left out: random.",
    )
    num_inference_steps: int | None = Field(None, description="Steps of the sampler; default: the model's own.")
    response_format: Literal["b64_json", "url"] = Field("b64_json", description="Only `b64_json` is supported.")
    output_format: OutputFormat = Field("png", description="PNG pictures carry their recipe in text chunks.")
    output_compression: int = Field(100, ge=0, le=100, description="Quality of jpeg and webp; png takes only 100.")
    background: Literal["transparent", "opaque", "auto"] = Field("auto", description="`transparent` is not supported.")
    stream: bool = Field(False, description="Only `false` is supported.")
    partial_images: int = Field(0, ge=0, le=3, description="Only 0 is supported.")
    quality: Literal["standard", "hd", "low", "medium", "high", "auto"] = Field(
        "auto", description=f"{IGNORED}the model has one quality. The answer echoes it as low, medium or high."
    )
    style: Literal["vivid", "natural"] = Field("vivid", description=f"{IGNORED}the prompt decides.")
    moderation: Literal["low", "auto"] = Field("auto", description=f"{IGNORED}there is no moderation.")
    user: str | None = Field(None, description=f"{IGNORED}nothing is stored about users.")

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, body: object) -> object:
        if isinstance(body, dict):
            return {name: value for name, value in body.items() if value is not None}
        return body

    @field_validator(*SUPPORTED)
    @classmethod
    def _is_supported(cls, value: object, info: ValidationInfo) -> object:
        values, allowed = SUPPORTED[str(info.field_name)]
        if value not in values:
            raise _unsupported(str(info.field_name), value, allowed)
        return value

    @field_validator("output_compression")
    @classmethod
    def _png_is_lossless(cls, value: int, info: ValidationInfo) -> int:
        if value != 100 and info.data.get("output_format") == "png":
            raise _unsupported("output_compression", value, "100 for png; jpeg and webp take 0 to 100")
        return value

    @property
    def echoed_quality(self) -> Quality:
        return ECHOED_QUALITY.get(self.quality, "high")


def _unsupported(field: str, value: object, allowed: str) -> PydanticCustomError:
    """`wording` shows this message as it is."""
    shown = str(value).lower()  # only booleans, whole numbers and our own words get here
    return PydanticCustomError("unsupported_value", "{text}", {"text": f"{field} is {shown}; allowed: {allowed}"})


class ImageData(BaseModel):
    """One picture. `seed`, `nfe` and `ms` are additions to OpenAI's schema."""

    b64_json: str
    seed: int = Field(description="Makes this picture again, alone or in any batch.")
    nfe: int = Field(description="Network evaluations spent on it, counted.")
    ms: dict[str, float] = Field(description="Milliseconds per stage, and their total.")


class ImagesResponse(BaseModel):
    """Answer of `POST /v1/images/generations`. `usage` is left out: the engine reports no token counts."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    size: str
    quality: Quality
    model: str


class ModelCard(BaseModel):
    """OpenAI's model object, and what this model takes and does."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tdm-serve"
    description: str
    family: str
    checkpoint_hash: str
    nfe: int
    size: str
    size_multiple: int
    min_side: int
    max_side: int
    max_prompt_tokens: int


class ModelList(BaseModel):
    """Answer of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Answer of the two probes."""

    status: Literal["ok", "ready"]


class ErrorBody(BaseModel):
    """OpenAI's error object; all four keys are always there."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Body of every answer that is not 2xx."""

    error: ErrorBody
