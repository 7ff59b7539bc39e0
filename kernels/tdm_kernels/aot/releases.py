"""Every released kernel by name."""

from __future__ import annotations

from itertools import chain

from tdm_kernels.aot import attention, norms
from tdm_kernels.aot.release import Release

RELEASES: dict[str, Release] = {release.name: release for release in chain(attention.releases(), norms.releases())}
