"""What machine a number was made on, for checkpoints, artifacts and result rows."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "diffusers", "transformers", "peft", "triton", "onnxruntime")


def versions() -> dict[str, str]:
    """Installed versions of the packages that numbers depend on."""
    found: dict[str, str] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Commit of the checkout that this package runs from, "-dirty" if it was edited; None in an installed wheel."""
    if not _git("ls-files", Path(__file__).name):  # an installed package may lie inside somebody else's repository
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=12", "--match=")


def _git(*arguments: str) -> str | None:
    """What git prints in this file's folder; None where git is missing, slow, fails or prints nothing."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def stamp() -> dict[str, Any]:
    """Machine, threads, OpenMP policy, versions and commit as one JSON-ready dict."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "commit": commit(),
        "versions": versions(),
    }
