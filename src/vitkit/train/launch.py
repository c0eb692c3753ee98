"""Several training processes from one call, and their result back in the caller's objects."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import queue
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing, nn

from vitkit.errors import BadInput, VitkitError
from vitkit.train.checkpoint import load_checkpoint, save_checkpoint

Progress = Callable[[str, int, int], None]


def launched() -> bool:
    """Whether this process is one of several that a launcher (``torchrun``, or :func:`spawn`) started."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def spawn(
    worker: Callable[..., Any], objective: nn.Module, processes: int, progress: Progress | None, **rest: Any
) -> Any:
    """Run ``worker(objective, progress=…, **rest)`` in ``processes`` processes.

    ``worker`` returns weights and plain data; the first process's data are returned, its weights are copied into
    ``objective``. The processes find each other through the variables that ``torchrun`` sets.

    Raises: VitkitError as the worker raised it; BadInput if something cannot be sent to another process.
    """
    context = multiprocessing.get_context("spawn")
    # from a GPU every process would take its copy on that same GPU
    sent = copy.deepcopy(objective).cpu()
    messages = context.Queue()
    with tempfile.TemporaryDirectory(prefix="vitkit-") as folder:
        # torch's C++ side warns that parameters without a gradient are looked for; it reads the level as it is loaded
        level = os.environ.get("TORCH_CPP_LOG_LEVEL")
        os.environ["TORCH_CPP_LOG_LEVEL"] = level or "ERROR"
        try:
            group = multiprocessing.spawn(
                _process,
                args=(worker, sent, processes, _free_port(), messages, folder, rest),
                nprocs=processes,
                join=False,
            )
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise BadInput(
                f"The objective or its loaders cannot be sent to other processes ({error}); define their functions and "
                "classes at the top of a module, start your script with torchrun, or use devices=1."
            ) from error
        finally:
            if level is None:
                del os.environ["TORCH_CPP_LOG_LEVEL"]
        try:
            while not group.join(timeout=0.2):
                _forward(messages, progress)
        except multiprocessing.ProcessRaisedException as error:
            told = Path(folder) / "error"
            if told.is_file():
                raise VitkitError(told.read_text(encoding="utf-8")) from error
            raise
        _forward(messages, progress)
        found = load_checkpoint(folder)
        if found is None:
            raise VitkitError("The training processes ended without a result.")
        weights, result = found
        objective.load_state_dict(weights)
        return result


def _process(
    rank: int,
    worker: Callable[..., Any],
    objective: nn.Module,
    processes: int,
    port: int,
    messages: Any,
    folder: str,
    rest: dict[str, Any],
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "vitkit",
    }
    # "registered process 1 of 2" is news to nobody
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    # what arrives lies in memory shared by all processes; each trains weights of its own
    objective = copy.deepcopy(objective)
    report = (lambda *message: messages.put(message)) if rank == 0 else None
    try:
        weights, result = worker(objective, progress=report, **rest)
    except VitkitError as error:
        told = Path(folder) / "error"
        if not told.exists():
            told.write_text(str(error), encoding="utf-8")
        raise
    if rank == 0:
        save_checkpoint(folder, 0, weights, result)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _forward(messages: Any, progress: Progress | None) -> None:
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        try:
            message = messages.get_nowait()
        except queue.Empty:
            return
        if progress is not None:
            progress(*message)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
