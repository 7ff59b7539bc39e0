"""What runs trained on a base as new versions beside the base's own: one folder of its own, whatever the family.

The base's files are copied, so that the folder can be moved and handed on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tdm_finetune.roles import ADAPTER_FILE, FULL_FOLDER
from tdm_finetune.run import VERSION_FILE
from tdm_serve.errors import ConfigError
from tdm_serve.models.catalog import resolve
from tdm_serve.models.described import described_base, described_version
from tdm_serve.models.families.table import INDEX, read_index
from tdm_serve.models.folders import network_of
from tdm_serve.models.manifest import read_spec
from tdm_serve.models.spec import MANIFEST, Adapter, ModelSpec


def extended(base: str, runs: Mapping[str, Path], folder: Path) -> None:
    """Fills the new `folder` with the base of a reference, its versions, and one version for each of `runs`.

    A run that trained all weights takes the network's place, and is then the only version. Raises ConfigError for
    such a run beside others, and as `resolve` does.
    """
    spec = resolve(base)
    full = [name for name, run in runs.items() if (run / FULL_FOLDER).is_dir()]
    if full and len(runs) > 1:
        raise ConfigError(f"the run of {full[0]} trained all weights, so nothing can stand beside it; name it alone")
    if not runs:
        raise ConfigError("no run was named; give --tdm, --tdm-r1 or both")
    _copy_parts(spec, folder, without=network_of(spec.family) if full else "")
    versions = {} if full else {one.version: described_version(one, _Keeper(one, folder)) for one in _versions(spec)}
    described = described_base(spec)
    for name, run in runs.items():
        if full:
            shutil.copytree(run / FULL_FOLDER, folder / network_of(spec.family))
        versions[name] = _trained(name, run, folder, described)
    manifest = described | {"default": [*runs][-1], "versions": versions}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _copy_parts(spec: ModelSpec, folder: Path, without: str) -> None:
    """What the folder's index names; the index goes first."""
    shutil.copy2(spec.base / INDEX, folder / INDEX)
    for name, value in read_index(spec.base).items():
        if isinstance(value, list) and (spec.base / name).is_dir() and name != without:
            shutil.copytree(spec.base / name, folder / name)


def _versions(spec: ModelSpec) -> list[ModelSpec]:
    """All versions of a base that has a manifest; otherwise the one that was named."""
    path = spec.base / MANIFEST
    if not path.is_file():
        return [spec]
    return [read_spec(spec.base, name, name) for name in json.loads(path.read_text())["versions"]]


class _Keeper:
    """Copies a version's adapters into a folder."""

    def __init__(self, spec: ModelSpec, folder: Path) -> None:
        self.spec, self.folder, self.count = spec, folder, 0

    def __call__(self, adapter: Adapter) -> str:
        """The adapter's path in the folder."""
        self.count += 1
        path = Path("adapters") / f"{self.spec.version}-{self.count}{adapter.path.suffix}"
        (self.folder / "adapters").mkdir(exist_ok=True)
        (shutil.copytree if adapter.path.is_dir() else shutil.copy2)(adapter.path, self.folder / path)
        return str(path)


def _trained(name: str, run: Path, folder: Path, base: Mapping[str, Any]) -> dict[str, Any]:
    """A run's version, its adapter copied, with what it has otherwise than its `base`.

    What was trained at a size of its own is drawn at that size by default, and students end without noise.
    """
    version: dict[str, Any] = json.loads((run / VERSION_FILE).read_text())
    if size := version.get("lineage", {}).get("config", {}).get("size"):
        version["limits"] = {**base["limits"], "width": size, "height": size}
    if "betas" in base:
        version["betas"] = {**base["betas"], "final": "zero"}
    if (run / FULL_FOLDER).is_dir():
        return version | {"adapter": None}
    path = Path("adapters") / f"{name}.safetensors"
    (folder / "adapters").mkdir(exist_ok=True)
    shutil.copy2(run / ADAPTER_FILE, folder / path)
    return version | {"adapter": str(path)}
