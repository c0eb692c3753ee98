"""What stands beside an engine's files: how to prepare images, what the outputs mean, what was measured.

Read and written with the standard library alone, so that an artefact needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vitkit.errors import BadInput
from vitkit.files import write_text

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that an artefact knows of itself.

    Args:
        name: of the model.
        engine, precision: which of :data:`vitkit.deploy.engines.ENGINES`, and in which of its precisions.
        setting: threads, streams and batch it was measured fastest with.
        files: relative path → SHA-256 of every file beside the manifest.
        image_size: (H, W) the images are brought to before they reach the engine; it normalises them itself.
        in_chans: channels of the images.
        wide, value_range: how pixels of unusual formats are read, as in
            :class:`vitkit.models.io.ModelConfig`.
        batch_sizes: "any", or the one number of images the engine takes at a time.
        side_step: 0: images have ``image_size``; else height and width may be any multiples of this.
        takes: what the engine is given: "images", (B, C, H, W) float32 in [0, 1] of ``image_size``, or "pixels",
            (B, H, W, C) uint8 of any size, which it cuts and resizes itself.
        task: "classify", "multilabel" or "regress".
        labels: names of the outputs.
        temperature: logits are divided by it before they become probabilities; 1 leaves them as they are.
        calibration: the images that chose quantization steps and temperature, in words.
        evidence: accuracy and times as measured, with intervals.
        versions: of the engine and what made the artefact.
        machine: where it was measured.
        key: digest of model, images, machine and settings; the same key needs no second measurement.
    """

    name: str
    engine: str
    precision: str
    setting: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    image_size: tuple[int, int] = (224, 224)
    in_chans: int = 3
    wide: bool = False
    value_range: tuple[float, float] | None = None
    batch_sizes: str | int = "any"
    side_step: int = 0
    takes: str = "images"
    task: str = "classify"
    labels: tuple[str, ...] = ()
    temperature: float = 1.0
    calibration: str = ""
    evidence: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    key: str = ""
    format: int = FORMAT


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write ``manifest.json``; it is the last file of an artefact, so that a folder with one is whole."""
    write_text(folder / MANIFEST, json.dumps(asdict(manifest), indent=1, ensure_ascii=False) + "\n")


def read_manifest(folder: str | Path, verify: bool = True) -> Manifest:
    """Read ``manifest.json`` and check that every file is the one that was written.

    Args:
        folder: of the artefact.
        verify: compare the files' hashes (about 1 s a gigabyte).

    Raises: BadInput if it is missing, broken, newer than this vitkit, or a file was changed or is absent.
    """
    path = Path(folder) / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadInput(
            f"{folder} is no deployed model: it has no {MANIFEST}. `vitkit deploy MODEL` makes one."
        ) from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}. Copy the whole folder again.") from error
    if not isinstance(raw, dict):
        raise BadInput(f"{path} must be a JSON object. Copy the whole folder again.")
    version = raw.get("format", 0)
    if not isinstance(version, int) or version > FORMAT:
        raise BadInput(f"{path} has format {version!r}, newer than this vitkit ({FORMAT}); upgrade vitkit.")
    known = {f.name for f in fields(Manifest)}
    strange = sorted(set(raw) - known)
    missing = [key for key in ("name", "engine", "precision", "files") if key not in raw]
    if strange or missing:
        what = f"has unknown keys: {', '.join(strange)}" if strange else f"lacks {', '.join(missing)}"
        raise BadInput(f"{path} {what}. Deploy the model again with this vitkit.")
    for key in ("image_size", "value_range", "labels"):
        if raw.get(key) is not None:
            raw[key] = tuple(raw[key])
    manifest = Manifest(**raw)
    if verify:
        _verify(manifest, Path(folder))
    return manifest


def _verify(manifest: Manifest, folder: Path) -> None:
    for name, expected in manifest.files.items():
        path = folder / name
        if path.resolve().parent != folder.resolve() and folder.resolve() not in path.resolve().parents:
            raise BadInput(f"{folder / MANIFEST} names {name!r}, which lies outside of its folder; do not use it.")
        if not path.is_file():
            raise BadInput(f"{folder} lacks {name}. Copy the whole folder again.")
        if digest(path) != expected:
            raise BadInput(
                f"{path} was changed since it was deployed: its hash is not the one in {MANIFEST}. Copy the folder "
                "again, or deploy the model anew."
            )


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_files(folder: Path) -> dict[str, str]:
    """Relative path → SHA-256 of every file below a folder but its manifest."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(folder).as_posix(): digest(p) for p in found}
