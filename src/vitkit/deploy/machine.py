"""What times depend on besides the model."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("vitkit", "torch", "timm", "openvino", "nncf", "onnx", "onnxruntime", "torchao", "numpy")


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Processor, its cores and the extensions that decide which arithmetic is fast."""
    name, flags = platform.processor() or platform.machine(), ""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = value
    fast = [
        f
        for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "bf16")
        if f in flags.split()
    ]
    return {"cpu": name, "cores": cores(), "extensions": fast, "system": platform.system()}


def versions() -> dict[str, str]:
    """Versions of the packages that make or run artefacts; absent ones are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def fingerprint() -> str:
    """Digest of :func:`machine` and :func:`versions`."""
    return hashlib.sha256(json.dumps([machine(), versions()], sort_keys=True).encode()).hexdigest()[:16]
