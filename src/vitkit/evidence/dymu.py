"""Do images keep as many tokens as they need at no loss, and does virtual unmerging save a rotary reader?"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import benchmark

from vitkit.compress.merge.dymu import count_tokens, dymu
from vitkit.compress.merge.matching import forward_tokens
from vitkit.compress.merge.tome import tome
from vitkit.compress.merge.vtu import rope_angles, vtu_attention
from vitkit.evidence.record import Evidence, paired, summarise
from vitkit.models.build import build
from vitkit.testing.worlds import cifar10, fit_tiny, predict_logits, tiny_vit

N_TRAIN, N_TEST = 4000, 1000
VIT_EPOCHS, READER_EPOCHS, BATCH = 6, 6, 64
# of 64 tokens: 62 % fewer in the comparison, 87 % fewer where proportional attention is put to the test
TARGET, FEW = 24, 8
SIDES = ("none", "left", "right", "top", "bottom")


def run(seeds: tuple[int, ...] = (0, 1, 2), progress: Callable[[str, int, int], None] | None = None) -> Evidence:
    """Train a tiny ViT and a rotary reader of its tokens per seed, then merge; nothing is trained after merging.

    Args:
        seeds: of weights, batch order and which images lose a half.
        progress: called as ``progress("what, seed", steps done, steps)``.
    """
    world = cifar10(N_TRAIN, N_TEST)
    bytes_of = np.array([_jpeg_bytes(image) for image in world.x_test])
    hits: dict[str, list[Tensor]] = {}
    figures: dict[str, list[float]] = {}
    timings: dict[str, dict[str, str]] = {}
    for done, seed in enumerate(seeds):

        def tell(what: str, step: int, done: int = done, seed: int = seed) -> None:
            if progress is not None:
                progress(f"{what}, seed {seed}", 3 * done + step, 3 * len(seeds))

        tell("train", 0)
        vit = tiny_vit(world.img_size, 4, in_chans=3, num_classes=10, seed=seed)
        fit_tiny(vit, world.x_train, world.y_train, epochs=VIT_EPOCHS, seed=seed, batch=BATCH)
        tell("merge", 1)
        arms = _arms(vit, world.x_train, world.x_test)
        for name, model in arms.items():
            right = predict_logits(model, world.x_test).argmax(-1) == world.y_test
            hits.setdefault(name, []).append(right.double())
            half = _half_blank(world.x_test, seed)[0]
            kept, kept_half = (_kept(name, model, images) for images in (world.x_test, half))
            _add(figures, f"{name} tokens", kept.mean())
            _add(figures, f"{name} half tokens", kept_half.mean())
            # a constant has no correlation; it tells nothing about the image
            _add(figures, f"{name} r", np.corrcoef(kept, bytes_of)[0, 1] if kept.std() else 0.0)
        if done == 0:
            timings = _time_tiny(arms, world.x_test)
        tell("read", 2)
        for name, (label_hits, side_hits) in _read(vit, arms["DToMe"], world, seed).items():
            hits.setdefault(f"{name} label", []).append(label_hits)
            hits.setdefault(f"{name} side", []).append(side_hits)
    timings |= _time_large(world.x_train[:64])
    rows = _rows(hits, figures, timings)
    return Evidence(
        claim=(
            "Merging by learned thresholds leaves 32–85 % fewer tokens at comparable quality, more of them in complex "
            "images; virtual unmerging lets a model trained on all positions read the merged tokens."
        ),
        shown=_verdict(hits, figures),
        rows=rows,
        notes=(
            "Differences are paired over test images (an image's value is its mean over seeds) with 95 % intervals, in "
            "points. complexity: Pearson correlation of the tokens kept with the JPEG size of the image. Half blank: "
            "one random half of each test image is its mean colour. The reader answers the class and which half is "
            "blank, from one answer token after the picture; it was trained on all 64 positions. 'Sorted' puts merged "
            "tokens in the order of their mean place before the reader counts positions. Shown means: correlation "
            "above 0.5, fewer tokens on half-blank images, DToMe keeps at least 97 % of the accuracy, and the reader "
            "loses less with unmerging than without in both questions (interval above 0, against the better order). "
            "Times are medians of interleaved runs; ViT-Ti has random weights and is there for its time only. A first "
            "run with 4 epochs and batches of 128 left the reader at chance on the blank half (0.517 with all tokens), "
            "so it could not tell (with unmerging 0.518, without 0.518, sorted 0.517); batch and epochs were then set "
            "on another seed by the reader's accuracy with all tokens alone."
        ),
        settings={
            "data": f"CIFAR-10 subset, {N_TRAIN} train, {N_TEST} test; thresholds from all training images",
            "model": "4 blocks, D=64, 4 heads, patch 4 (64 tokens), class token",
            "epochs": VIT_EPOCHS,
            "reader": f"2 causal rotary blocks, D=64, 4 heads, {READER_EPOCHS} epochs, every second image half blank",
            "target_tokens": TARGET,
            "few_tokens": FEW,
            "threads": torch.get_num_threads(),
            "scaled_down": "the paper merges CLIP and SigLIP encoders of 7B language models, 576 tokens",
        },
    )


def _arms(vit: nn.Module, train: Tensor, test: Tensor) -> dict[str, nn.Module]:
    dynamic, _ = dymu(vit, train, target_tokens=TARGET, batch_size=200)
    # the very mean that DToMe keeps on the test images, so that neither has more tokens
    mean = float(count_tokens(dynamic, test, 250).float().mean())
    return {
        "not merged": vit,
        "DToMe": dynamic,
        "ToMe": tome(vit, ratio=1 - round(mean) / 64)[0],
        "ToMe, few": tome(vit, ratio=1 - FEW / 64)[0],
        "ToMe, few, not proportional": tome(vit, ratio=1 - FEW / 64, proportional=False)[0],
    }


def _kept(name: str, model: nn.Module, images: Tensor) -> np.ndarray:
    """Patch tokens left of every image; a merger with fixed numbers is asked once."""
    if name == "DToMe":
        return count_tokens(model, images, 250).numpy()
    return count_tokens(model, images[:1]).expand(len(images)).numpy()


class RopeReader(nn.Module):
    """Two causal rotary blocks that read picture tokens and answer at one more token: class and blank half.

    Args:
        dim: of the tokens.
        num_heads: divides ``dim``.
    """

    def __init__(self, dim: int = 64, num_heads: int = 4, depth: int = 2, num_answers: int = 15) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.answer = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.norms1 = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.norms2 = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(depth))
        self.proj = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_answers)

    def forward(self, tokens: Tensor, source: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Tokens (B, U, D) → (B, 15).

        Args:
            tokens: unique picture tokens.
            source: (B, N) token at each position; None: one each.
            positions: (B, N+1) of the picture and the answer; None: 0, 1, 2 …
        """
        batch, unique = tokens.shape[:2]
        if source is None:
            source = torch.arange(unique).expand(batch, -1)
        x = torch.cat([tokens, self.answer.expand(batch, -1, -1)], dim=1)
        source = F.pad(source, (0, 1), value=unique)
        length = source.shape[1]
        angles = rope_angles(torch.arange(length) if positions is None else positions, x.shape[-1] // self.num_heads)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        for norm1, qkv, proj, norm2, mlp in zip(self.norms1, self.qkv, self.proj, self.norms2, self.mlp):
            q, k, v = qkv(norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            z = vtu_attention(q, k, v, source, angles, causal)
            x = x + proj(z.transpose(1, 2).flatten(2))
            x = x + mlp(norm2(x))
        return self.head(self.norm(x[:, -1]))


def _read(vit: nn.Module, merged: nn.Module, world: Any, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Hits (class, blank half) of each way to read, per test image, half of the images blanked."""
    reader = _train_reader(vit, world.x_train, world.y_train, seed)
    images, sides = _mixed(world.x_test, seed + 1000)
    answers: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for part in images.split(250):
            answers.setdefault("all tokens", []).append(reader(_picture(vit, part)[0]))
            few, layout = _picture(merged, part)
            answers.setdefault("with VTU", []).append(reader(few, layout.source))
            valid = layout.valid if layout.valid is not None else torch.ones(few.shape[:2], dtype=torch.bool)
            answers.setdefault("without VTU", []).append(_read_packed(reader, few, valid))
            raster = layout.coords[..., 0] * 8 * 8 + layout.coords[..., 1] * 8
            order = raster.masked_fill(~valid, float("inf")).argsort(dim=1, stable=True)
            few = few.gather(1, order.unsqueeze(-1).expand_as(few))
            answers.setdefault("without VTU, sorted", []).append(_read_packed(reader, few, valid))
    found = {}
    for name, parts in answers.items():
        logits = torch.cat(parts)
        label, side = logits[:, :10].argmax(-1) == world.y_test, logits[:, 10:].argmax(-1) == sides
        found[name] = (label.double(), side.double())
    return found


def _train_reader(vit: nn.Module, images: Tensor, labels: Tensor, seed: int) -> RopeReader:
    images, sides = _mixed(images, seed)
    tokens = torch.cat([_picture(vit, part)[0] for part in images.split(250)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = RopeReader()
    both = torch.stack([labels, sides], dim=1)
    fit_tiny(reader, tokens, both, READER_EPOCHS, seed=seed, batch=BATCH, lr=2e-3, loss=_two_answers)
    return reader


def _read_packed(reader: RopeReader, tokens: Tensor, valid: Tensor) -> Tensor:
    """As a model without unmerging reads: positions are counted over the tokens there are."""
    batch, longest = valid.shape
    source = torch.arange(longest).expand(batch, -1).masked_fill(~valid, -1)
    positions = torch.cat([torch.arange(longest).expand(batch, -1), valid.sum(1, keepdim=True)], dim=1)
    return reader(tokens, source, positions)


def _two_answers(reader: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    logits = reader(tokens)
    return F.cross_entropy(logits[:, :10], labels[:, 0]) + F.cross_entropy(logits[:, 10:], labels[:, 1])


@torch.no_grad()
def _picture(vit: nn.Module, images: Tensor) -> tuple[Tensor, Any]:
    tokens, layout = forward_tokens(vit, images)
    return tokens[:, layout.num_prefix :], layout


def _half_blank(images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """One random half of every image becomes its mean colour; also which: 1 left, 2 right, 3 top, 4 bottom."""
    sides = torch.randint(1, 5, (len(images),), generator=torch.Generator().manual_seed(seed))
    middle = images.shape[-1] // 2
    place = torch.arange(images.shape[-1])
    low, high = place < middle, place >= middle
    row, column = torch.ones_like(low)[:, None], torch.ones_like(low)[None]
    masks = torch.stack([~row & ~column, row & low, row & high, low[:, None] & column, high[:, None] & column])
    mean = images.mean((2, 3), keepdim=True)
    return torch.where(masks[sides][:, None], mean, images), sides


def _mixed(images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    blanked, sides = _half_blank(images, seed)
    even = torch.arange(len(images)) % 2 == 0
    return torch.where(even[:, None, None, None], images, blanked), sides.masked_fill(even, 0)


def _jpeg_bytes(image: Tensor) -> int:
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=75)
    return file.tell()


def _time_tiny(arms: dict[str, nn.Module], images: Tensor) -> dict[str, dict[str, str]]:
    chosen = {name: arms[name] for name in ("not merged", "DToMe", "ToMe")}
    return {
        "tiny, batch 1": _interleaved(chosen, list(images[:40].split(1))),
        "tiny, batch 128": _interleaved(chosen, list(images[:768].split(128))),
    }


def _time_large(images: Tensor) -> dict[str, dict[str, str]]:
    vit = build("vit_tiny_patch16_224", num_classes=10).eval()
    images = F.interpolate(images, size=224, mode="bilinear")
    arms = {
        "not merged": vit,
        "DToMe": dymu(vit, images, ratio=0.6, batch_size=32)[0],
        "ToMe": tome(vit, ratio=0.6)[0],
    }
    return {
        "ViT-Ti 224, batch 1": _interleaved(arms, list(images[:16].split(1))),
        "ViT-Ti 224, batch 8": _interleaved(arms, list(images[:48].split(8))),
    }


@torch.inference_mode()
def _interleaved(models: dict[str, nn.Module], batches: list[Tensor]) -> dict[str, str]:
    """Median milliseconds per image; every batch goes through all models before the next one."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for warm in (True, False):
        for batch in batches[:2] if warm else batches:
            for name, model in models.items():
                model.eval()
                took = benchmark.Timer("model(batch)", globals={"model": model, "batch": batch}).timeit(1).median
                if not warm:
                    times[name].append(1000 * took / len(batch))
    return {name: f"{np.median(values):.2f}" for name, values in times.items()}


def _rows(
    hits: dict[str, list[Tensor]], figures: dict[str, list[float]], timings: dict[str, dict[str, str]]
) -> list[dict[str, Any]]:
    rows = []

    def row(measure: str, arm: str, value: str, tokens: str = "", against: str = "", difference: str = "") -> None:
        keys = ("measure", "arm", "tokens", "value", "against", "difference")
        rows.append(dict(zip(keys, (measure, arm, tokens, value, against, difference))))

    def accuracy(measure: str, key: str, arm: str, against: str, against_key: str, tokens: str) -> None:
        gain = "" if not against else _interval(hits[key], hits[against_key])
        row(measure, arm, summarise([float(h.mean()) for h in hits[key]]), tokens, against, gain)

    opponent = {
        "not merged": "",
        "DToMe": "ToMe",
        "ToMe": "not merged",
        "ToMe, few": "not merged",
        "ToMe, few, not proportional": "ToMe, few",
    }
    for name, against in opponent.items():
        accuracy("accuracy", name, name, against, against, summarise(figures[f"{name} tokens"], 1))
    kept = summarise(figures["DToMe tokens"], 1)
    accuracy("accuracy", "DToMe", "DToMe", "not merged", "not merged", kept)
    for name in ("DToMe", "ToMe"):
        row("complexity", name, summarise(figures[f"{name} r"]), summarise(figures[f"{name} tokens"], 1))
    for name in ("DToMe", "ToMe"):
        whole, half = figures[f"{name} tokens"], figures[f"{name} half tokens"]
        change = summarise([h - w for h, w in zip(half, whole)], 1)
        row("tokens, half blank", name, summarise(half, 1), "", "whole images", change)
    for question in ("label", "side"):
        for name in ("all tokens", "with VTU", "without VTU", "without VTU, sorted"):
            against = "" if name == "all tokens" else "all tokens"
            measure = "reader, class" if question == "label" else "reader, blank half"
            tokens = "64.0" if name == "all tokens" else "as DToMe"
            accuracy(measure, f"{name} {question}", name, against, f"{against} {question}", tokens)
    for setting, by_arm in timings.items():
        for name, ms in by_arm.items():
            row(f"ms/image, {setting}", name, ms)
    return rows


def _verdict(hits: dict[str, list[Tensor]], figures: dict[str, list[float]]) -> bool | None:
    """True or False where every part of the claim can be told; None while an interval holds 0."""
    adapts = np.mean(figures["DToMe r"]) > 0.5 and np.mean(figures["DToMe half tokens"]) < np.mean(
        figures["DToMe tokens"]
    )
    keeps = _mean(hits["DToMe"]) >= 0.97 * _mean(hits["not merged"])
    if not (adapts and keeps):
        return False
    unsure = False
    for question in ("label", "side"):
        others = [f"{name} {question}" for name in ("without VTU", "without VTU, sorted")]
        strongest = max(others, key=lambda name: _mean(hits[name]))
        _, low, high = paired(_per_image(hits[f"with VTU {question}"]), _per_image(hits[strongest]))
        if high < 0:
            return False
        unsure = unsure or low <= 0
    return None if unsure else True


def _interval(a: list[Tensor], b: list[Tensor]) -> str:
    mean, low, high = (100 * value for value in paired(_per_image(a), _per_image(b)))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _per_image(hits: list[Tensor]) -> list[float]:
    return torch.stack(hits).mean(0).tolist()


def _mean(hits: list[Tensor]) -> float:
    return float(torch.stack(hits).mean())


def _add(figures: dict[str, list[float]], key: str, value: float) -> None:
    figures.setdefault(key, []).append(float(value))
