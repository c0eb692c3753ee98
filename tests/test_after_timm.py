"""`import vitkit` makes our networks known to timm, in whichever order the two are imported, and imports no timm."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    "imports", ["import vitkit, timm", "import timm, vitkit", "import vitkit.models.presets, timm"]
)
def test_networks_are_registered(imports):
    assert run(f"{imports}; print(timm.is_model('vit_pico'), timm.is_model('ecvit_tiny'))") == "True True"


def test_vitkit_alone_imports_neither_timm_nor_torch():
    assert run("import vitkit, sys; print('timm' in sys.modules, 'torch' in sys.modules)") == "False False"


def test_timm_looks_as_if_imported_without_us():
    code = "import vitkit, timm, importlib; print(type(timm.__spec__.loader).__name__); importlib.reload(timm)"
    assert run(code) == "SourceFileLoader"


@pytest.mark.parametrize(
    "first", ["vitkit.anatomy", "vitkit.models.vit", "vitkit.compress.cost", "vitkit.train", "vitkit.testing"]
)
def test_any_room_may_be_imported_first(first):
    assert run(f"import {first}, timm; print(timm.is_model('ecvit_tiny'))") == "True"
