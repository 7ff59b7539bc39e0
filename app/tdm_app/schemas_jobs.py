"""The wire format of jobs: pictures that are asked for now and fetched later."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, field_validator

from tdm_app.schemas import ErrorBody, ImagesResponse, PictureRequest, unsupported

JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class JobRequest(PictureRequest):
    """Body of `POST /v1/jobs`: as for pictures at once, but `stream`. `partial_images` are sent to who listens."""

    @field_validator("stream")
    @classmethod
    def _listens_elsewhere(cls, value: bool) -> bool:
        if value:
            raise unsupported("stream", value, "false; GET /v1/jobs/{id}/events streams a job")
        return value


class Job(BaseModel):
    """A job. Times are Unix seconds."""

    id: str
    object: Literal["job"] = "job"
    status: JobStatus
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    expires_at: float | None = Field(default=None, description="When a finished job and its pictures are forgotten.")
    model: str
    n: int
    seed: int = Field(description="Of the first picture, also where the request named none.")
    position: int = Field(description="Pictures of others that come before these; 0 when running or finished.")
    eta_ms: float | None = Field(
        description="Milliseconds until it is predicted to be done; null when finished or not warm."
    )
    result: ImagesResponse | None = Field(
        default=None, description="As of `/v1/images/generations`; null before success."
    )
    error: ErrorBody | None = Field(default=None, description="Null unless failed.")


class JobList(BaseModel):
    """Answer of `GET /v1/jobs`: the newest first, without pictures. `last_id` is what the next page comes `after`."""

    object: Literal["list"] = "list"
    data: list[Job]
    first_id: str | None
    last_id: str | None
    has_more: bool


class JobProgress(BaseModel):
    """Event `job.progress`: evaluation `step` of `total` of picture `image_index` is done."""

    id: str
    image_index: int
    step: int
    total: int
    b64_json: str | None = Field(default=None, description="The predicted picture, where one was asked for.")
