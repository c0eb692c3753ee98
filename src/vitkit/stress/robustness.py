"""Accuracy under attack: one protocol for every attack, with the controls that tell a defence from a broken attack."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.stress.attacks.projection import Norm, random_of_norm
from vitkit.stress.attacks.result import AttackResult, account
from vitkit.stress.attacks.victim import attacked, classes_of, clean_logits, own_generator, pixels_of
from vitkit.stress.record import AttackRecord

Attack = Callable[..., AttackResult]
Progress = Callable[[str, int, int], None]

NOISE = "random-noise"


def robust_accuracy(
    model: nn.Module,
    batches: Iterable[Any],
    attack: str | Attack,
    epsilons: Sequence[float] = (1 / 255, 2 / 255, 4 / 255, 8 / 255),
    options: Mapping[str, Any] | None = None,
    data: str = "",
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> list[AttackRecord]:
    """How accuracy falls with the strength of an attack, beside no attack and random noise of the same norm.

    An image counts as robust at ε if it is answered right and neither this ε nor a smaller one of the list turned it:
    what is allowed at a smaller ε is allowed at a larger one. Images answered wrong are not attacked.

    Args:
        model: images (B, C, H, W) in [0, 1] → logits (B, K). Left as found.
        batches: ``(images, labels)`` pairs, or dicts with these keys; read once.
        attack: a method's name, or a function called like :func:`vitkit.stress.attacks.pgd.pgd`.
        epsilons: strengths in pixel units of [0, 1]; ignored by attacks without ``epsilon`` (they find their own).
        options: further arguments of the attack.
        data: name of the images for the record.
        generator: of all random draws; a fresh one of seed 0 if None.
        progress: called as ``progress(attack, batches done, -1)``.

    Returns: the row "none" (ε = 0), then for every ε in rising order the attack and random noise; for an attack
        without ``epsilon`` the row "none" and one row of its own.
    Raises: BadInput if there are no images or an ε is negative. UnknownName for an unknown attack.
    """
    run = _Run(attack, dict(options or {}), epsilons, own_generator(generator))
    for i, batch in enumerate(batches):
        images, labels = (batch["images"], batch["labels"]) if isinstance(batch, Mapping) else batch
        run.add(model, images, labels)
        if progress:
            progress(run.name, i + 1, -1)
    return run.records(data)


def robustness_table(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attacks: Sequence[Mapping[str, Any]],
    epsilons_255: Sequence[float] = (1, 2, 4, 8),
    batch_size: int = 128,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Several attacks on the same images, as plain values for a study.

    Args:
        model: images (B, C, H, W) in [0, 1] → logits (B, K). Left as found.
        images: (N, C, H, W) in [0, 1].
        labels: (N,) true classes.
        attacks: ``{"name": …, "options": {…}}``; names are those of methods, or functions.
        epsilons_255: strengths in pixel values 0…255. For norm "l2" they are root-mean-square changes of a pixel, so
            the ball's radius is ε·√(CHW).
        batch_size: images attacked at once.
        progress: called as ``progress(attack, images done, images)``.

    Returns: rows ``attack``, ``epsilon_255`` (None for attacks without a bound), ``correct`` (N bools: answered
        right, and still under this and every smaller ε), ``headline`` (the middle ε), ``extra`` (figures beyond
        accuracy), ``note``. Random noise of the largest norm used comes last, as a control.
    Raises: BadInput if there are no images or strengths. UnknownName for an unknown attack.
    """
    strengths = sorted({float(e) for e in epsilons_255 if e > 0})
    if not strengths or min(epsilons_255) < 0:
        raise BadInput(f"epsilons_255={list(epsilons_255)} must hold at least one positive strength and no negative.")
    rows: list[dict[str, Any]] = []
    noise: list[dict[str, Any]] = []
    for spec in attacks:
        options = dict(spec.get("options") or {})
        norm = options.get("norm", "linf")
        unit = math.sqrt(images[0].numel()) / 255 if norm == "l2" else 1 / 255
        run = _Run(spec["name"], options, [e * unit for e in strengths], own_generator(None), noise=not noise)
        for start in range(0, len(images), batch_size):
            run.add(model, images[start : start + batch_size], labels[start : start + batch_size])
            if progress:
                progress(run.name, min(start + batch_size, len(images)), len(images))
        records = [r for r in run.records("") if r.attack == run.name]
        note = "ε is the root-mean-square change of a pixel" if norm == "l2" else ""
        if not run.bounded:
            (record,) = records
            found = {
                "attack_success": record.attack_success,
                "median_relative_change": record.relative_change,
                "ssim": record.ssim,
            }
            rows.append(
                _row(run.name, None, run.correct(run.name, 0), extra={k: v for k, v in found.items() if v == v})
                | {"note": f"smallest change found, {record.n} images; size over the {record.goal} successes"}
            )
            continue
        for i, epsilon in enumerate([0.0, *strengths]):
            correct = run.correct(run.name, i - 1) if i else run.clean()
            rows.append(
                _row(run.name, epsilon, correct, headline=epsilon == strengths[len(strengths) // 2]) | {"note": note}
            )
        if not noise:
            noise = [_row(NOISE, 0.0, run.clean()) | {"note": note}]
            noise += [_row(NOISE, e, run.correct(NOISE, i)) | {"note": note} for i, e in enumerate(strengths)]
    return rows + noise


class _Run:
    """One attack at several strengths, batch after batch; only images still answered right are attacked again."""

    def __init__(
        self,
        attack: str | Attack,
        options: dict[str, Any],
        epsilons: Sequence[float],
        generator: torch.Generator,
        noise: bool = True,
    ) -> None:
        self.name, self._attack = _named(attack)
        takes = inspect.signature(self._attack).parameters
        unknown_options = sorted(set(options) - set(takes))
        if unknown_options:
            raise BadInput(
                f"{self.name} takes no option {unknown_options[0]!r}; it takes "
                f"{', '.join(n for n in takes if n not in ('model', 'images', 'labels', 'generator'))}."
            )
        self.bounded = "epsilon" in takes and "epsilon" not in options
        if "epsilon" in options:
            self._epsilons = [float(options["epsilon"])]
        else:
            self._epsilons = sorted({float(e) for e in epsilons}) if self.bounded else [math.nan]
        if self.bounded and (not self._epsilons or self._epsilons[0] < 0):
            raise BadInput(f"epsilons={list(epsilons)} must be at least one strength, none negative.")
        self._options, self._takes, self._noise = options, takes, noise and self.bounded
        self._norm: Norm = options.get("norm", takes["norm"].default if "norm" in takes else "linf")
        if "epsilon" not in takes:
            self._norm = "l2"
        self._generator = generator
        self._clean: list[Tensor] = []
        self._correct: dict[tuple[str, int], list[Tensor]] = {}
        self._results: dict[tuple[str, int], list[AttackResult]] = {}
        self._seconds: dict[tuple[str, int], float] = {}

    def add(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        x = pixels_of(images)
        with attacked(model) as logits_of:
            logits = clean_logits(logits_of, x)
        y = classes_of(labels, logits, "labels")
        clean = logits.argmax(1) == y
        self._clean.append(clean.cpu())
        for name in (self.name, NOISE) if self._noise else (self.name,):
            standing = clean.clone()
            for i, epsilon in enumerate(self._epsilons):
                at = standing.nonzero()[:, 0]
                if len(at):
                    started = time.perf_counter()
                    result = (
                        self._random(model, x[at], y[at], epsilon)
                        if name == NOISE
                        else self._call(model, x[at], y[at], epsilon)
                    )
                    # a target that is the image's own class is reached without an error
                    turned = (result.success & (result.log["predicted"] != y[at])).cpu()
                    self._seconds[name, i] = self._seconds.get((name, i), 0.0) + time.perf_counter() - started
                    self._results.setdefault((name, i), []).append(result)
                    standing[at[turned.to(at.device)]] = False
                self._correct.setdefault((name, i), []).append(standing.cpu().clone())

    def clean(self) -> list[bool]:
        return torch.cat(self._clean).tolist()

    def correct(self, name: str, index: int) -> list[bool]:
        return torch.cat(self._correct[name, index]).tolist()

    def records(self, data: str) -> list[AttackRecord]:
        if not self._clean:
            raise BadInput("robust accuracy needs at least one batch of images.")
        clean = torch.cat(self._clean)
        share = float(clean.double().mean())
        shared: dict[str, Any] = {"n": len(clean), "clean_accuracy": share, "norm": self._norm, "data": data}
        rows = [AttackRecord(attack="none", epsilon_255=0.0, robust_accuracy=share, attack_success=0.0, **shared)]
        # an attack that finds its own size and takes a target draws one where none is given
        targeted = self._options.get("target") is not None or ("target" in self._takes and not self._has_epsilon())
        for i, epsilon in enumerate(self._epsilons):
            for name in (self.name, NOISE) if self._noise else (self.name,):
                own = name == self.name
                rows.append(
                    AttackRecord(
                        attack=name,
                        goal="targeted" if targeted and own else "untargeted",
                        knowledge="white" if own else "black",
                        epsilon_255=None if math.isnan(epsilon) else round(epsilon * 255, 9),
                        steps=self._setting("steps", "max_iter") if own else None,
                        step_size_255=self._step_size_255(epsilon) if own else None,
                        restarts=self._setting("restarts") if own else None,
                        **shared,
                        **self._outcome(name, i, clean),
                    )
                )
        return rows

    def _has_epsilon(self) -> bool:
        return "epsilon" in self._takes

    def _outcome(self, name: str, index: int, clean: Tensor) -> dict[str, Any]:
        after = torch.cat(self._correct[name, index])
        out = {
            "robust_accuracy": float(after.double().mean()),
            "attack_success": float((clean & ~after).sum() / clean.sum()) if bool(clean.any()) else math.nan,
        }
        results = self._results.get((name, index), [])
        if not results:
            return out

        def joined(get: Callable[[AttackResult], Tensor]) -> Tensor:
            return torch.cat([get(r).cpu().double() for r in results])

        out["num_iter"] = float(joined(lambda r: r.num_iter).mean())
        out["queries"] = float(joined(lambda r: r.queries).mean())
        out["time_ms"] = 1000 * self._seconds[name, index] / sum(len(r.success) for r in results)
        turned = joined(lambda r: r.success).bool()
        if bool(turned.any()):
            l2 = joined(lambda r: r.log["l2"])[turned]
            out |= {
                "mean_l2": float(l2.mean()),
                "median_l2": float(l2.median()),
                "max_linf": float(joined(lambda r: r.log["linf"])[turned].max()),
                "relative_change": float(joined(lambda r: r.log["relative_change"])[turned].median()),
                "ssim": float(joined(lambda r: r.log["ssim"])[turned].mean()),
            }
        return out

    def _call(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> AttackResult:
        given = dict(self._options)
        if self._has_epsilon():
            given["epsilon"] = epsilon
        if "step_size" in self._takes:
            given.setdefault("step_size", self._step_size(epsilon))
        if "early_stop" in self._takes:
            # only whether an image falls is asked for here
            given.setdefault("early_stop", True)
        if "generator" in self._takes:
            given["generator"] = self._generator
        return self._attack(model, images, labels, **given)

    def _random(self, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> AttackResult:
        x_adv = (images + random_of_norm(images, epsilon, self._norm, self._generator)).clamp(0.0, 1.0)
        with attacked(model) as logits_of, torch.no_grad():
            final = logits_of(x_adv)
        once = torch.ones_like(labels)
        return account(
            images=images,
            x_adv=x_adv,
            # only images that are answered right come here
            clean=torch.nn.functional.one_hot(labels, final.shape[1]).to(final.dtype),
            final=final,
            labels=labels,
            target=None,
            success=final.argmax(1) != labels,
            num_iter=0 * once,
            queries=once,
        )

    def _setting(self, *names: str) -> Any:
        for name in names:
            if name in self._takes:
                return self._options.get(name, self._takes[name].default)
        return None

    def _step_size(self, epsilon: float) -> float:
        """2.5 ε over the steps: enough to reach any point of the ball from any start and turn around once."""
        return float(self._options.get("step_size", 2.5 * epsilon / self._setting("steps")))

    def _step_size_255(self, epsilon: float) -> float | None:
        return self._step_size(epsilon) * 255 if "step_size" in self._takes else None


def _named(attack: str | Attack) -> tuple[str, Attack]:
    if not isinstance(attack, str):
        return getattr(attack, "__name__", type(attack).__name__).replace("_", "-"), attack
    from vitkit.catalogue import resolve

    return attack, resolve(attack)


def _row(
    name: str,
    epsilon_255: float | None,
    correct: list[bool],
    headline: bool = False,
    extra: dict[str, float] | None = None,
) -> dict[str, Any]:
    return {
        "attack": name,
        "epsilon_255": epsilon_255,
        "correct": correct,
        "headline": headline,
        "extra": extra or {},
    }
