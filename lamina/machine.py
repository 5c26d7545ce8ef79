"""What a number may depend on beside the settings: versions, hardware, commit; and the memory it took."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from lamina import __version__


def versions() -> dict[str, str]:
    """Return the versions that a number may depend on."""
    import timm
    import torch

    return {
        "lamina": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def hardware(device: Any, processes: int = 1) -> str:
    """Describe a device in words."""
    import torch

    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {torch.get_num_threads() * processes} threads of {os.cpu_count()} cores"


def peak_memory_mb(device: Any) -> float:
    """Return the most memory this process held on its device, in units of 10**6 bytes."""
    import torch

    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


#: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD of glibc's malloc.h, in bytes
_KEPT = {-3: 2**30, -1: 2**31 - 1, -2: 2**26}


def keep_memory() -> bool:
    """Let this process keep memory that it frees, for its next step; say whether the allocator listened.

    On Linux, glibc hands large blocks back as soon as they are freed, so that every step of training on a CPU gets its
    activations from the kernel again, page by page, each cleared first: a third of the time of a step of CLAP, a
    twentieth of one of deep prompts (`benchmarks/memory.py`).
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return sum(mallopt(option, value) for option, value in _KEPT.items()) == len(_KEPT)


def commit() -> str | None:
    """Return the commit of the source, with a `+` for changes not committed; None outside a checkout."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        return (
            git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", "lamina") else "")
        ) or None
    except (OSError, subprocess.SubprocessError):
        return None
