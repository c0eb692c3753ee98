"""The one table that says what exists: papers, what they provide, and how to get at it by name."""

from __future__ import annotations

from vitkit.catalogue.reader import KINDS, Entry, Method, clear_cache, find, load, methods, resolve

__all__ = ["KINDS", "Entry", "Method", "clear_cache", "find", "load", "methods", "resolve"]
