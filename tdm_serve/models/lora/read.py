"""One door for all adapter formats: open, tell the format, read, check against the base."""

from __future__ import annotations

from pathlib import Path

from tdm_serve.errors import CheckpointError, ConfigError
from tdm_serve.models.lora.base import Base
from tdm_serve.models.lora.core import Lora, check_fits
from tdm_serve.models.lora.ema_list import read_list
from tdm_serve.models.lora.files import LIST_KEY, Contents, open_adapter
from tdm_serve.models.lora.named import check_kind, is_kohya, read_dotted, read_kohya
from tdm_serve.models.lora.settings import Settings, Stated, settings_of

FORMATS = ("auto", "diffusers", "peft", "kohya", "ema-list")


def read_lora(path: Path, base: Base | None = None, format: str = "auto", stated: Stated | None = None) -> Lora:  # noqa: A002 - what users call it
    """The adapter in a file or folder. With a `base` it is checked to fit; kohya keys and lists need one.

    Raises CheckpointError for a file that cannot be used, ConfigError for what is stated wrongly.
    """
    stated = stated or Stated()
    contents = open_adapter(path)
    check_kind(contents.named or {}, str(path))
    found = _format_of(contents)
    _check_format(format, found, path)
    if found in ("kohya", "ema-list") and base is None:
        raise ConfigError(f"adapter {path} has format {found}, whose modules only its base can name; state the base")
    if contents.named is None:
        assert base is not None
        lora = read_list(contents.listed, base, str(path), stated)
    elif found == "kohya":
        assert base is not None
        lora = read_kohya(contents.named, settings_of({}, str(path), stated), base)
    else:
        lora = _read_dotted(contents, path, stated, base)
    if base is not None:
        check_fits(lora, base)
    return lora


def _read_dotted(contents: Contents, path: Path, stated: Stated, base: Base | None) -> Lora:
    assert contents.named is not None
    config = contents.config
    if config is None:
        config = {key.split(".", 1)[-1]: value for key, value in contents.metadata.items() if _is_denoisers(key)}
    settings = settings_of(config, str(path), stated)
    lora = read_dotted(contents.named, settings)
    if base is not None:
        _check_complete(lora, settings, base)
    return lora


def _is_denoisers(key: str) -> bool:
    """Metadata keys carry the component's name, or none where a model saved its adapter itself."""
    return key.startswith(("transformer.", "unet.")) or "." not in key


def _check_complete(lora: Lora, settings: Settings, base: Base) -> None:
    """PEFT saves every module that its targets match, so one that is not there was lost."""
    missing = [name for name in base.targeted(settings.targets) if name not in lora.modules]
    if missing and any(name in base.layers for name in lora.modules):
        raise CheckpointError(
            f"adapter {lora.source} lacks {missing[0]} and {len(missing) - 1} more modules that its own target modules "
            f"match in {base.name}; the file is incomplete or was made for another base"
        )


def _format_of(contents: Contents) -> str:
    if contents.named is None:
        return "ema-list"
    if is_kohya(contents.named):
        return "kohya"
    dotted = contents.config is not None or any(key.startswith("base_model.model.") for key in contents.named)
    return "peft" if dotted else "diffusers"


def _check_format(wanted: str, found: str, path: Path) -> None:
    if wanted not in FORMATS:
        raise ConfigError(f"adapter format {wanted!r} is unknown; choose {', '.join(FORMATS)}")
    if wanted not in ("auto", found) and {wanted, found} != {"diffusers", "peft"}:  # these two share their keys
        holds = f"a list {LIST_KEY!r}" if found == "ema-list" else f"{found} keys"
        raise ConfigError(f"adapter {path} was stated to be {wanted}, but holds {holds}; state {found} or auto")
