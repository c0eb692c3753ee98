from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import faulthandler, gc, signal, subprocess, sys
import numpy as np, openvino as ov
from vitkit.deploy.signal_stack import kept_signal_stack

faulthandler.enable()
signal.signal(signal.SIGCHLD, lambda *a: None)
x = ov.opset13.parameter([1, 4], np.float32)
model = ov.Model([ov.opset13.relu(x)], [x])
cores = []
for _ in range(2):
    with kept_signal_stack():
        core = ov.Core()
        cores.append((core, core.compile_model(model, "CPU")))
while cores:
    del core, cores[0]
    gc.collect()
    core = None
for _ in range(3):
    subprocess.run([sys.executable, "-c", "pass"])
print("alive")
"""


def test_cores_that_go_in_the_order_they_came_do_not_kill_the_process():
    pytest.importorskip("openvino")
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "alive\n", done.stderr
