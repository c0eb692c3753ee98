"""The same images across recipes, with heat maps laid over them, as data URIs for the report."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitkit.study.results import Explanation, Gallery, GalleryImage

SIDE = 112


def _uri(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _enlarge(image: NDArray[np.uint8]) -> Image.Image:
    """(C, H, W) uint8 → RGB picture of at most SIDE pixels; small images keep their pixels visible."""
    shown = image[:3] if image.shape[0] >= 3 else np.repeat(image[:1], 3, axis=0)
    picture = Image.fromarray(np.ascontiguousarray(shown.transpose(1, 2, 0)))
    scale = SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)


def overlay(image: NDArray[np.uint8], heat: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Lay a heat map (h, w) over an image (C, H, W); the map is stretched to its own range."""
    from matplotlib import colormaps

    picture = _enlarge(image)
    spread = float(heat.max() - heat.min())
    unit = (heat - heat.min()) / spread if spread > 0 else np.zeros_like(heat)
    grown = Image.fromarray(unit.astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR)
    values = np.asarray(grown)
    colours = colormaps["inferno"](values)[..., :3] * 255
    grey = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32)
    # the map's own strength is its opacity, so that what is not highlighted stays recognisable
    weight = (0.25 + 0.55 * values)[..., None]
    return ((1 - weight) * grey + weight * colours).round().clip(0, 255).astype(np.uint8)


def make_gallery(folders: dict[str, Path], classes: tuple[str, ...]) -> Gallery | None:
    """Collect the galleries of all recipes.

    Args:
        folders: recipe name → folder of its finished explain stage.
        classes: names of the classes.
    """
    images: list[GalleryImage] = []
    explanations: list[Explanation] = []
    for recipe, folder in folders.items():
        with np.load(folder / "gallery.npz") as data:
            pictures, labels = data["images"], data["labels"]
            if not images:
                images = [
                    GalleryImage(key=str(key), label=_class(classes, label), png=_uri(np.asarray(_enlarge(picture))))
                    for key, label, picture in zip(data["keys"], labels, pictures)
                ]
            for name in (n for n in data.files if n.startswith("map_")):
                explanations.append(
                    Explanation(
                        recipe=recipe,
                        explainer=name.removeprefix("map_"),
                        predicted=[_class(classes, p) for p in data["predicted"]],
                        probability=[float(p) for p in data["probability"]],
                        heatmaps=[_uri(overlay(picture, heat)) for picture, heat in zip(pictures, data[name])],
                    )
                )
    return Gallery(images=images, explanations=explanations) if images else None


def _class(classes: tuple[str, ...], index: int) -> str:
    return classes[int(index)] if int(index) < len(classes) else str(int(index))
