from __future__ import annotations

import subprocess

import numpy as np
import pytest
import torch
from torch import nn

from vitkit.deploy import compile_program as module
from vitkit.deploy.compile_program import compile_program
from vitkit.errors import BadInput


@pytest.fixture
def program():
    torch.manual_seed(0)
    return torch.export.export(nn.Linear(4, 2).eval(), (torch.zeros(3, 4),))


def test_a_compiler_that_takes_too_long_is_stopped(program, tmp_path):
    with pytest.raises(BadInput, match="longer than the 0 s"):
        compile_program(program, tmp_path / "m.pt2", 0.05)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("said", ["Traceback\n  no compiler\n\n", ""])
def test_a_compiler_that_fails_is_quoted(program, tmp_path, monkeypatch, said):
    def run(command, **options):
        # the program is on disk while the compiler runs
        assert torch.export.load(command[-2]) is not None
        return subprocess.CompletedProcess(command, 1, "", said)

    monkeypatch.setattr(module.subprocess, "run", run)
    with pytest.raises(BadInput, match="no compiler" if said else "no reason given"):
        compile_program(program, tmp_path / "m.pt2", 10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_package_answers_like_the_program(program, tmp_path):
    compile_program(program, tmp_path / "m.pt2", 500)
    x = torch.randn(3, 4)
    found = torch._inductor.aoti_load_package(str(tmp_path / "m.pt2"))(x)
    np.testing.assert_allclose(found.numpy(), program.module()(x).detach().numpy(), atol=1e-6)
