"""Everything that can be set about the service, in one class.

A field is the single place where a setting has its name, type, bounds, default and help. Its flag (`--max-batch`), its
environment variable (`TDM_SERVE_MAX_BATCH`) and its key in the TOML file (`max_batch`) follow from it, and the first of
these that gives a value wins. `settings_sources.load` adds sentences to what pydantic finds wrong; `Settings(...)` in a
program takes the environment and the file into account, too.

No torch here: `tdm-serve serve --help` and `--print-config` are made from this class.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from tdm_serve.core import MAX_IMAGES
from tdm_serve.errors import ConfigError, InvalidRequest
from tdm_serve.validation import parse_size

PREFIX = "TDM_SERVE_"
NONE = "none"  # how a flag or a variable says None
DAY_S = 86_400
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
WEAKEST_KEY = 20  # characters; a shorter admin key could be guessed


def split(value: Any) -> Any:
    """Commas separate the items of a list in a flag or a variable."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


Texts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def default_state_dir() -> Path:
    """Where the freedesktop rules put what a program has to remember."""
    try:
        base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError as error:
        raise ConfigError("this user has no home folder; name one for the state with --state-dir") from error
    return Path(base) / "tdm-serve"


class Settings(BaseSettings):
    """The service's settings, as docs/operating.md lists them. Immutable: `bound_to` and `model_copy` change copies."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, protected_namespaces=()
    )

    config: Path | None = Field(None, description="TOML file with settings")
    state_dir: Path = Field(default_factory=default_state_dir, description="folder for jobs, keys, feedback, pictures")

    model: Texts = Field(
        ("default",), min_length=1, description="ids from `tdm-serve models` or folders; first is default"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16")
    backend: str = Field(
        "auto", description="auto, eager or compiled; with an engine: onnx, onnx-cpu, onnx-cuda, onnx-tensorrt or pt2"
    )
    engine: Path | None = Field(None, description="folder of an exported engine of the model (`tdm-serve export`)")
    adapters: Literal["fused", "separate"] = Field(
        "fused", description="fused is fast; separate needs less memory, and requests may choose an `adapter_scale`"
    )
    strict: bool | None = Field(
        None, description="bitwise equal pixels in every batch; none: on a CPU, where it is cheap"
    )
    memory_mb: Count | None = Field(None, description="device memory for models; the least used is unloaded beyond it")
    max_memory: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="GB that the base takes on its device at most; none: what is free"
    )
    offload: Literal["none", "text"] = Field("none", description="text: text encoders stay on the host")
    quantise: Literal["none", "fp8"] = Field("none", description="fp8: the network's weights in eight bits")
    random_weights: bool = Field(False, description="full size without a download; pictures are noise")
    cache_mb: int = Field(64, ge=0, description="memory for prompt embeddings")
    warm: Texts = Field((), description="sizes WIDTHxHEIGHT to warm up before /readyz; empty: the model's own")

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; 127.0.0.1 is this machine only")
    port: int = Field(8000, ge=0, le=65_535, description="0 takes any free one")
    page: bool = Field(True, description="serve the web page beside the API")
    public_url: str | None = Field(
        None, pattern=r"^https?://[^\s?#]+$", description="address in links to pictures; none: as the client reached us"
    )

    max_batch: Count | None = Field(None, description="most pictures in one batch; none: what the profile finds best")
    max_waiting: Count = Field(256, description="most pictures that wait; beyond it requests get 429")
    max_jobs: Count = Field(1000, description="most jobs that wait; beyond it new ones get 429")
    max_wait_s: Seconds = Field(60, description="longest predicted wait; beyond it requests get 429")

    hang_s: Seconds | None = Field(
        60, description="an evaluation that takes longer, and 20 times its prediction, is a hang; none: no watch"
    )

    auth: Literal["auto", "on", "off"] = Field(
        "auto", description="ask for API keys; auto: unless the address is local"
    )
    allow_open: bool = Field(False, description="allow a public address without API keys")
    admin_key: SecretStr | None = Field(None, description="an admin's API key beside those of `tdm-serve keys`")
    requests_per_minute: Count | None = Field(None, description="of each API key or, without keys, address")
    pictures_per_minute: Count | None = Field(None, description="of each API key or, without keys, address")
    cors_origins: Texts = Field((), description="web pages of other addresses that may call the API, or *")
    allowed_hosts: Texts = Field(
        (), description="names that clients may call us by; empty: local names, or any if public"
    )

    max_body_bytes: Count = Field(2**20, description="largest request body")
    max_prompt_chars: Count = Field(32_000, description="longest prompt; a model's limit in tokens holds as well")
    max_pixels: Count | None = Field(None, description="most pixels in a picture; none: what the model can do")
    max_images: int = Field(MAX_IMAGES, ge=1, le=MAX_IMAGES, description="most pictures a request")

    url_lifetime_s: Seconds = Field(3600, description="how long a link to a picture works")
    store_mb: Count = Field(1024, description="most picture files kept; the oldest go first")
    job_retention_s: Seconds = Field(DAY_S, description="how long finished jobs and their pictures are kept")
    picture_retention_s: Seconds = Field(7 * DAY_S, description="how long a picture can be rated")
    feedback: bool = Field(False, description="keep people's ratings and the recipes of what they rate")
    feedback_retention_s: Seconds = Field(365 * DAY_S, description="how long ratings are kept")

    online_training: bool = Field(False, description="train new versions from ratings, beside serving")
    online_min_ratings: Count = Field(40, description="new ratings of a version that begin a training by themselves")
    online_threads: Count = Field(1, description="CPU threads of the trainer, which has the lowest priority")
    online_config: str = Field(
        "online", min_length=1, description="config of `finetune tdm-r1`: a TOML file, or a shipped one's name"
    )

    metrics: bool = Field(True, description="serve /metrics")
    log_format: Literal["text", "json"] = Field("text", description="lines for people or for programs")
    log_level: Literal["debug", "info", "warning", "error"] = Field("warning", description="least that is logged")
    log_prompts: bool = Field(False, description="write prompts into the line of each request")
    keepalive_s: Seconds = Field(15, description="silence after which a stream gets a comment, so that proxies keep it")
    drain_s: Seconds = Field(30, description="how long running requests may take to end after SIGTERM")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags (a program's arguments), then the environment, then the file."""
        del dotenv_settings, file_secret_settings
        return init_settings, env_settings, TomlFile(settings_cls)

    @model_validator(mode="before")
    @classmethod
    def _none_in_words(cls, values: dict[str, Any]) -> dict[str, Any]:
        """`none` is None where a setting can be."""
        optional = {
            name for name, field in cls.model_fields.items() if type(None) in getattr(field.annotation, "__args__", ())
        }
        return {
            name: None if name in optional and isinstance(value, str) and value.lower() == NONE else value
            for name, value in values.items()
        }

    @field_validator("warm")
    @classmethod
    def _sizes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for size in value:
            try:
                parse_size(size)
            except InvalidRequest as error:
                raise ValueError(str(error)) from error
        return value

    @field_validator("admin_key")
    @classmethod
    def _not_guessable(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < WEAKEST_KEY:
            raise ValueError(f"it has {len(value.get_secret_value())} characters; allowed: {WEAKEST_KEY} or more")
        return value

    def bound_to(self, loopback: bool) -> Settings:
        """The settings once the address is known: `auth` and `allowed_hosts` take their automatic values.

        On loopback every program of the machine can come in, and so can web pages whose name is made to point here;
        hence the list of names. ConfigError for a public address without keys, unless that was asked for.
        """
        auth = self.auth if self.auth != "auto" else "off" if loopback or self.allow_open else "on"
        if auth == "off" and not loopback and not self.allow_open:
            raise ConfigError(
                f"host is {self.host!r}, which others can reach, and auth is 'off'; "
                "allowed: auth on (keys: `tdm-serve keys create`), or --allow-open to let everybody in"
            )
        hosts = self.allowed_hosts or (LOCAL_HOSTS if loopback else ())
        return self.model_copy(update={"auth": auth, "allowed_hosts": hosts})


class TomlFile(PydanticBaseSettingsSource):
    """The file that the stronger sources name as `config`."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Unused: `__call__` gives all values at once, so that unknown keys are seen, too."""
        del field
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        path = self.current_state.get("config")
        return read_toml(Path(path)) if path else {}


def read_toml(path: Path) -> dict[str, Any]:
    """The table of a settings file. ConfigError where it cannot be read or is no TOML."""
    try:
        with path.open("rb") as file:
            table: Mapping[str, Any] = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read the settings file {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from error
    if "config" in table:
        raise ConfigError(f"{path}: a settings file cannot name another one with 'config'")
    return dict(table)
