"""What a result was made with: versions, commit, hardware."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("layerlens-torch", "torch", "torchvision", "numpy", "scikit-learn")
_EXTRAS = ("transformers", "tokenizers", "sentence-transformers", "torch-geometric")  # named where they are installed


@cache
def _software() -> dict[str, Any]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    for name in _EXTRAS:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {"python": platform.python_version(), "versions": versions, "commit": git_commit()}


def provenance(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions, git commit of layerlens (None outside a checkout), device and threads."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {**_software(), "device": f"{device.type} ({name})", "threads": torch.get_num_threads()}


def git_commit() -> str | None:
    """Commit of the checkout that layerlens runs from, with "+" if it was changed; None outside one."""
    here = Path(__file__).resolve().parent
    try:
        head = _git(here, "rev-parse", "HEAD")
        tracked = _git(here, "ls-files", "--error-unmatch", "__init__.py")
        dirty = _git(here, "status", "--porcelain", "--untracked-files=no", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}{'+' if dirty else ''}" if tracked else None


def _git(where: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(where), *words], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
