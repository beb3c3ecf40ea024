"""Where a run came from: code, packages, machine and command line, one entry for every session that trained it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from stepladder.core.files import read_json, source_digest, write_json
from stepladder.core.redact import redact

PACKAGE = Path(__file__).resolve().parent.parent
_PACKAGES = ("numpy", "pydantic", "safetensors", "tokenizers")


def record(run_dir: Path, device: torch.device, step: int) -> list[dict[str, Any]]:
    """Add this session, which begins at ``step``, to provenance.json; returns all sessions, this one last."""
    path = run_dir / "provenance.json"
    sessions = read_json(path)["sessions"] if path.exists() else []
    sessions.append(redact(_session(device, step)))
    write_json(path, {"sessions": sessions})
    return sessions


def _session(device: torch.device, step: int) -> dict[str, Any]:
    return {
        "from_step": step,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "code": code(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {"torch": str(torch.__version__), **{name: importlib.metadata.version(name) for name in _PACKAGES}},
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def device_name(device: torch.device) -> str:
    """The processor's name: that of the GPU, or "cpu" with its instruction set."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def code() -> dict[str, Any]:
    """Version, SHA-256 over the package's Python files and, if they are under version control, the commit."""
    tracked = _git("ls-files", "--error-unmatch", "run.py") is not None  # not just inside somebody's repository
    changes = _git("status", "--porcelain", "--", ".") if tracked else None
    return {
        "version": importlib.metadata.version("stepladder"),
        "sources": source_digest(PACKAGE),
        "commit": _git("rev-parse", "HEAD") if tracked else None,
        "modified": None if changes is None else bool(changes),
    }


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(PACKAGE), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
