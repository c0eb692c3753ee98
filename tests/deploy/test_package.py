"""The package ``vitkit.deploy`` can be called like the function in it."""

from __future__ import annotations

import subprocess
import sys

import vitkit
from vitkit.deploy import artefact, tuner


def test_calling_the_package_calls_the_tuner(monkeypatch):
    monkeypatch.setattr(tuner, "deploy", lambda *args, **options: (args, options))
    assert vitkit.deploy("model", "images", max_drop=0.5) == (("model", "images"), {"max_drop": 0.5})
    assert vitkit.deploy.load is artefact.load


def test_it_is_there_after_importing_vitkit_and_loads_no_torch():
    code = (
        "import sys, vitkit; assert callable(vitkit.deploy) and vitkit.deploy.load; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
