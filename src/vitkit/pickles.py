"""Telling pickles, which can run code when they are loaded, from safetensors, which cannot."""

from __future__ import annotations

import os
from pathlib import Path

#: how files of ``torch.save`` and bare pickles are usually called
PICKLE_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


def is_pickle(path: str | os.PathLike[str]) -> bool:
    """True for a zip (``torch.save`` today) or a bare pickle (before torch 1.6), and for what is called like one.

    Raises: OSError if the file cannot be read.
    """
    file = Path(path)
    with file.open("rb") as stream:
        head = stream.read(9)
    if head[8:] == b"{":
        # eight bytes of length and a brace begin a safetensors file, and that length may itself begin like a pickle
        return False
    return head[:2] == b"PK" or head[:1] == b"\x80" or file.suffix.lower() in PICKLE_ENDINGS
