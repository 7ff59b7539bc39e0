"""Everything that tdm-serve raises on purpose.

TdmServeError
├── InvalidRequest        a prompt, seed, size or count that cannot be served; `param` names the field
│   └── PromptTooLong
├── UnknownModel          an id that is neither in the catalogue nor a folder
├── CheckpointError       a folder that is no checkpoint, or one with a missing, broken or pickled file
│   └── DownloadError     a published model that is gated, missing, out of reach, or too large for the disk
│   └── ArtifactError     an exported engine's folder that is incomplete, changed, or of another checkpoint
├── ConfigError           a configuration key or value that does not exist or does not fit
├── BackendUnavailable    an explicitly chosen backend that cannot run here
├── MissingExtra          an optional dependency; the message holds its pip command
├── RewardError           a reward that failed, took too long or returned what is no score; the sample is named
├── OutputError           a path that cannot be written
├── PortInUse             an address that another process listens on
├── TrainingDiverged      a loss term or gradient that exploded; the message names it and the last good state
├── EngineClosed          a request to an engine that is shutting down
├── Overloaded            a request that the queue has no room for; `retry_after_ms` says when it will
│   └── DeadlineUnreachable   one that could not be done by its deadline, so a retry would not help
├── DeadlinePassed        an accepted request that was not done by its deadline
├── Cancelled             a request that its owner called off
├── PictureFailed         one picture that could not be made, such as one with latents that are no numbers
├── OutOfDeviceMemory     a batch that did not fit the device, not even halved
├── EngineFailed          the device thread died under a request
└── NotBuiltYet           a command that is present but whose part of the product is not finished
"""

from __future__ import annotations


class TdmServeError(Exception):
    """Base of everything that tdm-serve raises on purpose. The message is a sentence for the user."""


class InvalidRequest(TdmServeError):
    """A request that cannot be served as asked. `param` is the name of the offending field, or None."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLong(InvalidRequest):
    """A prompt with more tokens than the checkpoint reads; it is never cut silently."""


class UnknownModel(TdmServeError):
    """An id that is neither in the catalogue nor a folder."""


class CheckpointError(TdmServeError):
    """A folder that is no checkpoint, or one with a missing, broken or pickled file."""


class ArtifactError(CheckpointError):
    """An exported engine's folder that is incomplete, changed, or made from or for something else."""


class DownloadError(CheckpointError):
    """A published model that could not be fetched: gated, missing, out of reach, or too large for the disk."""


class ConfigError(TdmServeError):
    """A configuration key or value that does not exist or does not fit."""


class BackendUnavailable(TdmServeError):
    """An explicitly chosen backend that cannot run here, and what would make it run."""


class MissingExtra(TdmServeError):
    """An optional dependency that is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs packages that are not installed; run: pip install 'tdm-serve[{extra}]'")
        self.extra = extra


class RewardError(TdmServeError):
    """A reward that failed, took too long or returned what is no score; the message names it and the sample."""


class OutputError(TdmServeError):
    """A path that cannot be written."""


class PortInUse(TdmServeError):
    """An address that another process listens on."""


class TrainingDiverged(TdmServeError):
    """A loss term or gradient that exploded, and where the last good state is."""


class EngineClosed(TdmServeError):
    """A request to an engine that is shutting down."""


class Overloaded(TdmServeError):
    """A request that the queue has no room for. In `retry_after_ms` milliseconds it will, if nobody else comes."""

    def __init__(self, message: str, retry_after_ms: float) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class DeadlineUnreachable(Overloaded):
    """A request that is predicted to miss its own deadline. A retry with the same deadline would not help."""


class DeadlinePassed(TdmServeError):
    """An accepted request that was not done by its deadline, and was dropped."""


class Cancelled(TdmServeError):
    """A request that its owner called off."""


class PictureFailed(TdmServeError):
    """One picture that could not be made; the others of its batch were."""


class OutOfDeviceMemory(TdmServeError):
    """A batch that did not fit the device, not even halved."""


class EngineFailed(TdmServeError):
    """The device thread died under a request."""


class NotBuiltYet(TdmServeError):
    """A command that is present but whose part of the product is not finished."""
