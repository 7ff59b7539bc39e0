"""A checkpoint folder for one new version of a base that lies elsewhere: the base's files are links, nothing is copied.

What came out of a training run becomes a checkpoint like any other: it can be served, trained from and evaluated.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tdm_serve.errors import CheckpointError, OutputError
from tdm_serve.models.spec import MANIFEST

OWN = frozenset({MANIFEST, "adapters", "training"})  # what belongs to versions, and not to the base


def linked_checkpoint(base: Path, folder: Path, name: str, version: Mapping[str, Any], adapter: Path) -> Path:
    """Makes `folder`, with the one version `name`, whose entry in the manifest is `version` with a copy of `adapter`.

    What is there already is replaced. Raises CheckpointError where `base` has no manifest, OutputError where the folder
    cannot be written.
    """
    try:
        manifest: dict[str, Any] = json.loads((base / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{base} holds no readable {MANIFEST}, which a new version of it starts from") from error
    file = Path("adapters") / f"{name}{adapter.suffix}"
    manifest |= {"default": name, "versions": {name: {**version, "adapter": str(file)}}}
    made = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        shutil.rmtree(made, ignore_errors=True)
        (made / "adapters").mkdir(parents=True)
        for part in base.resolve().iterdir():
            if part.name not in OWN:
                (made / part.name).symlink_to(part.resolve())
        shutil.copy2(adapter, made / file)
        (made / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        made.replace(folder)
    except OSError as error:
        shutil.rmtree(made, ignore_errors=True)
        raise OutputError(f"cannot write the checkpoint {folder}: {error.strerror or error}") from error
    return folder
