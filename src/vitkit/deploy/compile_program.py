"""Compile an exported program into a package, in a process of its own that can be stopped.

python -m vitkit.deploy.compile_program PROGRAM PACKAGE
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch

from vitkit.errors import BadInput


def compile_program(program: torch.export.ExportedProgram, package: Path, seconds: float) -> None:
    """Write the AOTInductor package of a program.

    Args:
        program: to compile.
        package: path of the ``.pt2`` file.
        seconds: after which it is given up.

    Raises: BadInput if it takes longer or the compiler fails.
    """
    saved = package.with_suffix(".program.pt2")
    torch.export.save(program, saved)
    command = [sys.executable, "-m", "vitkit.deploy.compile_program", str(saved), str(package)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise BadInput(f"compiling it takes longer than the {seconds:.0f} s that are left of the budget") from error
    finally:
        saved.unlink(missing_ok=True)
    if done.returncode or not package.is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise BadInput(f"Inductor cannot compile it: {said[-1] if said else 'no reason given'}")


def main() -> None:
    source, target = sys.argv[1:]
    # programs may hold tensors of torchao's and operators of ours
    with suppress(ImportError):
        import torchao  # noqa: F401
    import vitkit.models.scan_engine  # noqa: F401

    torch._inductor.aoti_compile_and_package(torch.export.load(source), package_path=target)


if __name__ == "__main__":
    main()
