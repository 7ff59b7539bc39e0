"""What the hub's client raises, in one sentence each that says what to do."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tdm_serve.models.sources import Hub

AGAIN = "run the command again, what is whole is kept"


def sentence(hub: Hub, error: Exception) -> str | None:
    """The sentence for an error under a repository; None for one that has nothing to do with hubs."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # the client looked for what it has, because the hub answered with an error
    kinds = (  # the more special ones first
        (errors.RepositoryNotFoundError, _closed),
        (errors.RevisionNotFoundError, _no_revision),
        (errors.RemoteEntryNotFoundError, _lost_file),
        (errors.LocalEntryNotFoundError, _out_of_reach),
        (errors.OfflineModeIsEnabled, _out_of_reach),
        (errors.HFValidationError, _no_name),
        (errors.HfHubHTTPError, _refused),
        (OSError, _disk),
    )
    words = next((words for kind, words in kinds if isinstance(error, kind)), None)
    if words is None and _is_transport(error):
        words = _out_of_reach if type(error).__name__.startswith("Connect") else _broken
    return words and words(hub, error)


def _closed(hub: Hub, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError

    if isinstance(error, GatedRepoError):
        return (
            f"{hub.repo} is gated: accept its terms on its page at the hub with your account, then log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    return f"the hub has no model {hub.repo}, or it is private: check the name, or log in with `hf auth login`"


def _no_revision(hub: Hub, _error: Exception) -> str:
    return f"{hub.repo} has no revision {hub.revision!r}; name a commit, tag or branch of it"


def _lost_file(hub: Hub, error: Exception) -> str:
    return f"{hub} has lost a file that its listing names ({_short(error)}); name another revision"


def _no_name(hub: Hub, error: Exception) -> str:
    return f"{hub} is no name that a hub knows: {_short(error)}"


def _out_of_reach(hub: Hub, error: Exception) -> str:
    from huggingface_hub import constants

    what = f"{hub} is not, or not whole, in the cache {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        return f"{what}, and HF_HUB_OFFLINE forbids to fetch it; unset it once, or name a folder with +base="
    why = _short(error.__cause__ or error)
    return (
        f"{what}, and the hub at {constants.ENDPOINT} cannot be reached ({why}); check the network and HF_ENDPOINT, or "
        "name a folder with +base="
    )


def _refused(hub: Hub, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the hub refuses {hub.repo} (HTTP {status}): accept its terms on its page, or log in: `hf auth login`"
    return f"the hub could not give {hub} ({_short(error)}); {AGAIN}"


def _disk(hub: Hub, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full under the download of {hub}; make room, or set HF_HOME to a folder on another disk, and "
            f"{AGAIN}"
        )
    return f"{hub} could not be fetched ({_short(error)}); {AGAIN}"


def _broken(hub: Hub, error: Exception) -> str:
    return f"the download of {hub} broke off ({_short(error)}); {AGAIN}"


def _is_transport(error: Exception) -> bool:
    """Errors of the HTTP client below Hugging Face's, which has changed its name before."""
    return type(error).__module__.partition(".")[0] in ("httpcore", "httpx", "httpx2", "requests", "urllib3")


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
