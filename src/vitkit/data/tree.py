"""A folder and a zip archive seen alike: names, sizes, bytes."""

from __future__ import annotations

import os
import posixpath
import threading
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

from vitkit.errors import BadInput

# a few kilobytes of zeros in an archive can unpack to the whole memory
_LARGEST_ENTRY = 2**31


class Tree(Protocol):
    """Files below one root, addressed by relative paths with forward slashes."""

    root: str
    walkable: bool

    def files(self) -> dict[str, tuple[int, str]]:
        """Path → (size in bytes, a mark that changes when the content does), in no particular order."""
        ...

    def folders(self) -> set[str]:
        """Every folder below the root, empty ones too; the root itself is not listed."""
        ...

    def exists(self, path: str) -> bool: ...

    def stamp(self, path: str) -> tuple[int, str]:
        """(size, mark) of one file, as in :meth:`files`."""
        ...

    def read(self, path: str) -> bytes:
        """The bytes of a file. Raises: OSError."""
        ...


class FolderTree:
    """Files of a folder on disk. Symbolic links to folders are followed once.

    Args:
        root: the folder.
        walkable: False if only named files are wanted; the folder of a table may be someone's whole home.
    """

    def __init__(self, root: str | Path, walkable: bool = True) -> None:
        self.root, self.walkable = str(root), walkable

    def files(self) -> dict[str, tuple[int, str]]:
        return self._walk()[0]

    def folders(self) -> set[str]:
        return self._walk()[1]

    def _walk(self) -> tuple[dict[str, tuple[int, str]], set[str]]:
        found: dict[str, tuple[int, str]] = {}
        folders: set[str] = set()
        seen = {os.path.realpath(self.root)}
        waiting = [""]
        while waiting:
            below = waiting.pop()
            try:
                with os.scandir(os.path.join(self.root, below)) as entries:
                    for entry in entries:
                        path = f"{below}/{entry.name}" if below else entry.name
                        if entry.name.startswith((".", "__MACOSX")):
                            continue
                        if entry.is_dir():
                            real = os.path.realpath(entry.path)
                            if real not in seen:
                                seen.add(real)
                                folders.add(path)
                                waiting.append(path)
                        else:
                            found[path] = self._mark(entry)
            except OSError as error:
                folder = os.path.join(self.root, below)
                raise BadInput(
                    f"The folder {folder} cannot be read: {error.strerror or error}. "
                    f"Give yourself the right (`chmod -R u+rX {self.root}`) or take it out of the data."
                ) from error
        return found, folders

    @staticmethod
    def _mark(entry: os.DirEntry[str]) -> tuple[int, str]:
        try:
            stat = entry.stat()
        except OSError:
            # a dangling link: it is listed, and found unreadable when it is opened
            return 0, "gone"
        return stat.st_size, str(stat.st_mtime_ns)

    def exists(self, path: str) -> bool:
        return os.path.isfile(os.path.join(self.root, path))

    def stamp(self, path: str) -> tuple[int, str]:
        stat = os.stat(os.path.join(self.root, path))
        return stat.st_size, str(stat.st_mtime_ns)

    def read(self, path: str) -> bytes:
        with open(os.path.join(self.root, path), "rb") as stream:
            return stream.read()


class ZipTree:
    """Files of a zip archive, read in place. Each process opens the archive for itself.

    Raises: BadInput if the file is no intact zip archive.
    """

    def __init__(self, path: str | Path) -> None:
        self.root, self.walkable = str(path), True
        self._lock = threading.Lock()
        self._open: tuple[int, zipfile.ZipFile] | None = None
        try:
            self._archive()
        except (zipfile.BadZipFile, OSError) as error:
            raise BadInput(f"{path} cannot be opened as a zip archive: {error}. Copy or download it again.") from error

    def _archive(self) -> zipfile.ZipFile:
        with self._lock:
            # a forked worker shares the parent's file position; reading through it would mix up the two
            if self._open is None or self._open[0] != os.getpid():
                self._open = (os.getpid(), zipfile.ZipFile(self.root))
            return self._open[1]

    def __getstate__(self) -> dict[str, object]:
        return {"root": self.root}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.root, self.walkable, self._lock, self._open = state["root"], True, threading.Lock(), None

    @staticmethod
    def _shown(path: str) -> bool:
        return not any(part.startswith((".", "__MACOSX")) for part in path.split("/"))

    def files(self) -> dict[str, tuple[int, str]]:
        return {
            i.filename: (i.file_size, f"{i.CRC:08x}")
            for i in self._archive().infolist()
            if not i.is_dir() and self._shown(i.filename)
        }

    def folders(self) -> set[str]:
        found: set[str] = set()
        for info in self._archive().infolist():
            path = info.filename.rstrip("/") if info.is_dir() else posixpath.dirname(info.filename)
            while path and self._shown(path):
                found.add(path)
                path = posixpath.dirname(path)
        return found

    def exists(self, path: str) -> bool:
        return path in self._archive().NameToInfo

    def stamp(self, path: str) -> tuple[int, str]:
        info = self._archive().getinfo(path)
        return info.file_size, f"{info.CRC:08x}"

    def read(self, path: str) -> bytes:
        try:
            info = self._archive().getinfo(path)
            if info.file_size > _LARGEST_ENTRY:
                raise OSError(f"the archive's entry unpacks to {info.file_size:,} bytes, too many for one image")
            return self._archive().read(info)
        except (zipfile.BadZipFile, zlib.error, KeyError, RuntimeError, NotImplementedError, EOFError) as error:
            # RuntimeError: the entry is encrypted; NotImplementedError: an unusual compression
            raise OSError(f"the archive's entry is damaged or locked ({error})") from error
