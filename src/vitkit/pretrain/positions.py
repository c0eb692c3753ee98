"""Fixed sine–cosine codes of places; see :mod:`vitkit.models.sincos`."""

from __future__ import annotations

from vitkit.models.sincos import sincos_2d, sincos_clip

__all__ = ["sincos_2d", "sincos_clip"]
