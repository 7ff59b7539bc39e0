"""Files from a model hub, through Hugging Face's client: its cache, its log-in, its resumed and atomic downloads.

Only the files that a family reads are fetched. What is at hand whole is used without asking the hub, where a revision
is pinned; `HF_HUB_OFFLINE` and `HF_ENDPOINT` are the client's own switches and hold here, too.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdm_serve.errors import ConfigError, DownloadError
from tdm_serve.models.families.table import FAMILIES, INDEX
from tdm_serve.models.folders import network_of, stem_of
from tdm_serve.models.hub_errors import sentence

logger = logging.getLogger(__name__)

PREFIX = "hub:"
ABOUT = (INDEX, "tdm_serve.json")  # what tells which other files are wanted
ADAPTERS = "adapters/*"  # of a checkpoint with a manifest of ours
GB = 1e9


@dataclass(frozen=True, slots=True)
class Hub:
    """A repository at one commit, tag or branch; without a revision it is whatever is newest."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}" + (f"@{self.revision}" if self.revision else "")


def hub_of(text: str) -> Hub:
    """The repository that `hub:OWNER/NAME` or `hub:OWNER/NAME@REVISION` names."""
    found = re.fullmatch(rf"{PREFIX}([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", text)
    if found is None:
        raise ConfigError(f"{text!r} is no repository; write hub:OWNER/NAME or hub:OWNER/NAME@REVISION")
    return Hub(found[1], found[2])


def wanted(family: str, *, network: bool = True) -> tuple[str, ...]:
    """Patterns of the files that a family reads, without the network's weights where they come from elsewhere.

    Exact names, because repositories hold the same weights in several precisions and as pickles beside them.
    """
    entry, patterns = FAMILIES[family], [*ABOUT, "scheduler/scheduler_config.json"]
    elsewhere = None if network else network_of(family)
    for name in entry.components:
        stem = f"{name}/{stem_of(name)}"
        weights = (f"{stem}.safetensors", f"{stem}-?????-of-?????.safetensors", f"{stem}.safetensors.index.json")
        patterns += [f"{name}/config.json", *(weights if name != elsewhere else ())]
    return (*patterns, *(f"{name}/*" for name in entry.tokenizers))


def fetch(hub: Hub, patterns: Sequence[str]) -> Path:
    """The folder of a repository with all files that match, downloaded where they are not in the client's cache.

    Progress goes to stderr. A connection that breaks is resumed; of a download that was given up, whole files are kept,
    and nothing of it is used before it is whole. Raises DownloadError.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    if (folder := at_hand(hub, patterns)) is not None and hub.revision is not None:
        return folder
    if hub.revision is None:
        logger.warning("%s is not pinned to a revision: the newest is taken, and may be another tomorrow", hub)
    with _explained(hub):
        try:
            _check_room(hub, patterns)
        except DryRunError as error:  # the hub is out of reach, or refuses
            if folder is not None:
                return folder
            raise (error.__cause__ or error) from error
        return Path(snapshot_download(hub.repo, revision=hub.revision, allow_patterns=list(patterns)))


def at_hand(hub: Hub, patterns: Sequence[str]) -> Path | None:
    """The folder of `fetch` where the client's cache has it whole, without asking the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(hub.repo, revision=hub.revision, allow_patterns=list(patterns), local_files_only=True)
        )
    except LocalEntryNotFoundError:
        return None


def fetch_file(hub: Hub, pattern: str) -> Path:
    """The one file of a repository that matches a name or pattern, downloaded if need be."""
    return one_of(hub, fetch(hub, [pattern]), pattern)


def one_of(hub: Hub, folder: Path, pattern: str) -> Path:
    """The one file in a fetched folder that matches; of several, the one with the name that diffusers gives."""
    found = sorted(folder.glob(pattern))
    usual = [path for path in found if path.name == "pytorch_lora_weights.safetensors"]
    if len(found) == 1 or usual:
        return (usual or found)[0]
    names = ", ".join(path.name for path in found) or "none"
    raise DownloadError(f"{hub} has {names} for the file {pattern}, where one is needed; name a file of your own")


def _check_room(hub: Hub, patterns: Sequence[str]) -> None:
    """Raises DownloadError where the disk has less room than the missing files need. Unknown sizes pass."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"disable": True}))

    options: dict[str, Any] = {"revision": hub.revision, "allow_patterns": list(patterns), "tqdm_class": Silent}
    files = snapshot_download(hub.repo, dry_run=True, **options)
    needed = sum(file.file_size or 0 for file in files if file.will_download)
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(path for path in (cache, *cache.absolute().parents) if path.exists())).free
    if needed > free:
        raise DownloadError(
            f"{hub} needs {needed / GB:.1f} GB more, and the disk of {cache} has {free / GB:.1f} GB free; make room, "
            "or set HF_HOME to a folder on another disk"
        )


@contextmanager
def _explained(hub: Hub) -> Generator[None]:
    """Turns what the client raises into one sentence that says what to do."""
    try:
        yield
    except Exception as error:
        if (words := sentence(hub, error)) is None:
            raise
        raise DownloadError(words) from error
