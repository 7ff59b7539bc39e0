"""The wire format of pictures: OpenAI's `CreateImageRequest` and `ImagesResponse`, with our few additions.

Types are strict (no "2" for 2) and unknown fields are refused, so that a setting is either honoured or named in an
error, never dropped in silence. `null` means the default, as in OpenAI's schema. Ranges of `n`, `seed`, `size` and
the like are the engine's to check; they are only written down here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from tdm_serve.core import MAX_IMAGES, MAX_PRIORITY, MAX_SEED, MIN_PRIORITY
from tdm_serve.validation import MAX_ADAPTER_SCALE, MAX_GUIDANCE, MAX_STEPS

MAX_PROMPT_CHARACTERS = 32_000  # OpenAI's own bound; the checkpoint's bound in tokens is checked by the engine
MAX_USER_CHARACTERS = 256
MAX_DEADLINE_MS = 24 * 3600 * 1000
MAX_PARTIAL_IMAGES = 3
OutputFormat = Literal["png", "jpeg", "webp"]
Quality = Literal["low", "medium", "high"]
IGNORED = "Accepted and ignored: "
UNTRAINED = "Whether its number of steps is one that the model was not trained for."
TRUNCATED = "Whether a prompt was longer than the model reads, and was cut."
SCALED = "What the model's adapter was multiplied by."
# OpenAI's names for a quality, as the three that its answers may hold.
ECHOED_QUALITY: dict[str, Quality] = {"low": "low", "medium": "medium", "standard": "medium", "high": "high"}


def _nullable(schema: dict[str, Any]) -> None:
    """Writes into the OpenAPI document that every optional field takes null."""
    for name, wanted in schema["properties"].items():
        if name not in schema.get("required", ()):
            kept = {key: wanted.pop(key) for key in ("title", "description", "default") if key in wanted}
            option = wanted.pop("anyOf", [{}])[0] | wanted
            schema["properties"][name] = {"anyOf": [option, {"type": "null"}], **kept}


def _bounds(minimum: float, maximum: float) -> dict[str, Any]:
    """For the document only: the engine checks these, so that all its front doors have one sentence for them."""
    return {"minimum": minimum, "maximum": maximum}


class PictureRequest(BaseModel):
    """What pictures are asked for, whether at once or as a job."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_nullable)

    prompt: str = Field(max_length=MAX_PROMPT_CHARACTERS, description="What to draw.", examples=["two red circles"])
    negative_prompt: str | None = Field(
        None,
        max_length=MAX_PROMPT_CHARACTERS,
        description="What to stay away from. Refused where guidance is off, since it would have no effect.",
    )
    model: str | None = Field(None, description="Id of a served model, from `/v1/models`; the first is the default.")
    n: int = Field(1, description="How many pictures.", json_schema_extra=_bounds(1, MAX_IMAGES))
    size: str = Field("auto", description="`WIDTHxHEIGHT` in pixels, or `auto` for the model's own.")
    seed: int | None = Field(
        None,
        # In words: FastAPI writes bounds as floats, which cannot hold this one.
        description=f"Of the first picture, 0 to {MAX_SEED}; the next get seed+1, seed+2, ... Left out: random.",
    )
    num_inference_steps: int | None = Field(
        None,
        description="Steps of the sampler; default: the model's own. A few-step model was trained for no other number, "
        "which is refused unless `allow_untrained_schedule` is true.",
        json_schema_extra=_bounds(1, MAX_STEPS),
    )
    allow_untrained_schedule: bool = Field(
        False, description="Take a number of steps that the model was not trained for. The answer says so."
    )
    guidance_scale: float | None = Field(
        None,
        allow_inf_nan=False,
        description=f"Classifier-free guidance, 0 to {MAX_GUIDANCE:g}, in the convention of the model's family: "
        "`/v1/capabilities` tells the value that turns it off (0 for Z-Image, 1 for others) and the default. Off costs "
        "one evaluation a step, on two.",
        json_schema_extra=_bounds(0, MAX_GUIDANCE),
    )
    truncate_prompt: bool = Field(
        False,
        description="Cut a prompt that is longer than the model reads, as the stock pipeline does, instead of refusing "
        "it. The answer says so.",
    )
    adapter_scale: float | None = Field(
        None,
        allow_inf_nan=False,
        description=f"Multiplies what the model's adapter adds to its base, 0 to {MAX_ADAPTER_SCALE:g}: 0 is the base, "
        "1 the default. Refused where adapters are not kept separate (`adapter` of `/v1/models`).",
        json_schema_extra=_bounds(0, MAX_ADAPTER_SCALE),
    )
    deadline_ms: float | None = Field(
        None,
        gt=0,
        le=MAX_DEADLINE_MS,
        allow_inf_nan=False,
        description="Milliseconds from now by which the pictures are of use. Refused at once if they cannot be there.",
    )
    priority: int = Field(
        0,
        ge=MIN_PRIORITY,
        le=MAX_PRIORITY,
        description=f"Higher goes first, {MIN_PRIORITY} to {MAX_PRIORITY}.",
    )
    response_format: Literal["b64_json", "url"] = Field(
        "b64_json", description="The pictures themselves, or addresses that expire where they can be fetched."
    )
    output_format: OutputFormat = Field("png", description="PNG pictures carry their recipe in text chunks.")
    output_compression: int = Field(100, ge=0, le=100, description="Quality of jpeg and webp; png takes only 100.")
    background: Literal["transparent", "opaque", "auto"] = Field("auto", description="`transparent` is not supported.")
    stream: bool = Field(False, description="Send events while the pictures are made.")
    partial_images: int = Field(
        0,
        ge=0,
        le=MAX_PARTIAL_IMAGES,
        description="How many predicted pictures come before each final one, spread over its steps.",
    )
    quality: Literal["standard", "hd", "low", "medium", "high", "auto"] = Field(
        "auto", description=f"{IGNORED}the model has one quality. The answer echoes it as low, medium or high."
    )
    style: Literal["vivid", "natural"] = Field("vivid", description=f"{IGNORED}the prompt decides.")
    moderation: Literal["low", "auto"] = Field("auto", description=f"{IGNORED}there is no moderation.")
    user: str | None = Field(
        None,
        max_length=MAX_USER_CHARACTERS,
        description="Whose request this is. Where there are no API keys, users get fair shares by it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, body: object) -> object:
        if isinstance(body, dict):
            return {name: value for name, value in body.items() if value is not None}
        return body

    @field_validator("background")
    @classmethod
    def _is_opaque(cls, value: str) -> str:
        if value == "transparent":
            raise unsupported("background", value, "opaque or auto; the model draws no transparency")
        return value

    @field_validator("output_compression")
    @classmethod
    def _png_is_lossless(cls, value: int, info: ValidationInfo) -> int:
        if value != 100 and info.data.get("output_format") == "png":
            raise unsupported("output_compression", value, "100 for png; jpeg and webp take 0 to 100")
        return value

    @property
    def echoed_quality(self) -> Quality:
        return ECHOED_QUALITY.get(self.quality, "high")


class ImageRequest(PictureRequest):
    """Body of `POST /v1/images/generations`."""

    @field_validator("partial_images")
    @classmethod
    def _only_in_a_stream(cls, value: int, info: ValidationInfo) -> int:
        if value and info.data.get("stream") is False:
            raise unsupported("partial_images", value, "0 where stream is false")
        return value

    @field_validator("stream")
    @classmethod
    def _events_carry_pictures(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("response_format") == "url":
            raise unsupported("stream", value, "false with response_format url, since events carry the pictures")
        return value


def unsupported(field: str, value: object, allowed: str) -> PydanticCustomError:
    """What OpenAI has and this server has not; `wording` shows this message as it is."""
    shown = str(value).lower()  # only booleans, whole numbers and our own words get here
    return PydanticCustomError("unsupported_value", "{text}", {"text": f"{field} is {shown}; allowed: {allowed}"})


class TokenDetails(BaseModel):
    """What kinds of tokens went in."""

    text_tokens: int
    image_tokens: int = 0


class Usage(BaseModel):
    """OpenAI's count of work: the prompt's tokens, and of a picture its blocks of `size_multiple` pixels squared."""

    total_tokens: int
    input_tokens: int
    output_tokens: int
    input_tokens_details: TokenDetails


class ImageData(BaseModel):
    """One picture, as `b64_json` or `url`. All the rest are additions to OpenAI's schema."""

    b64_json: str | None = None
    url: str | None = Field(default=None, description="Expires; the answer to `GET` is the file.")
    image_id: str = Field(description="What `/v1/feedback` calls this picture.")
    seed: int = Field(description="Makes this picture again, alone or in any batch.")
    nfe: int = Field(description="Network evaluations spent on it, counted.")
    ms: dict[str, float] = Field(description="Milliseconds per stage, and their total.")
    untrained_schedule: bool = Field(default=False, description=UNTRAINED)
    truncated: bool = Field(default=False, description=TRUNCATED)
    adapter_scale: float = Field(default=1.0, description=SCALED)


class ImagesResponse(BaseModel):
    """Answer of `POST /v1/images/generations`."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    size: str
    quality: Quality
    usage: Usage
    model: str


class ErrorBody(BaseModel):
    """OpenAI's error object; all four keys are always there."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Body of every answer that is not 2xx."""

    error: ErrorBody


class _ImageEvent(BaseModel):
    """What the events of a stream have in common; `image_index` is an addition for requests with `n` over 1."""

    b64_json: str
    created_at: int
    size: str
    quality: Quality
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    image_index: int = Field(default=0, description="Which of the `n` pictures this is about, from 0.")


class PartialImageEvent(_ImageEvent):
    """A picture as it is predicted after one of its steps."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    partial_image_index: int


class CompletedEvent(_ImageEvent):
    """A finished picture. `usage` is of this picture."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    usage: Usage
    image_id: str
    seed: int
    nfe: int
    ms: dict[str, float]
    untrained_schedule: bool = Field(default=False, description=UNTRAINED)
    truncated: bool = Field(default=False, description=TRUNCATED)
    adapter_scale: float = Field(default=1.0, description=SCALED)
    model: str


ImageEvent = Annotated[PartialImageEvent | CompletedEvent, Field(discriminator="type")]
