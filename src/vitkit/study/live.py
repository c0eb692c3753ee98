"""What a person sees while a study runs: recipes, stages, progress, time left, best so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vitkit.study.plan import Plan, Stage

if TYPE_CHECKING:
    from vitkit.study.store import Store


class Live:
    """A live table on a terminal; plain lines when the output is a file; nothing when ``console`` is None.

    Args:
        console: a ``rich.console.Console`` or None.
    """

    def __init__(self, console: Any | None) -> None:
        self._console = console
        self._display: Any = None
        self._plan: Plan | None = None
        self._done: dict[str, str] = {}
        self._now: tuple[str, str, int, int] | None = None
        self._seconds: list[float] = []
        self._best: tuple[str, float] | None = None
        self._message = ""
        self._drawn = 0.0
        self._started = time.monotonic()

    def __enter__(self) -> Live:
        if self._console is not None and self._console.is_terminal:
            from rich.live import Live as RichLive

            self._display = RichLive(console=self._console, refresh_per_second=4, transient=True)
            self._display.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None

    def say(self, message: str) -> None:
        """A line about what happens between stages."""
        self._message = message
        if self._display is None and self._console is not None:
            self._console.print(message, style="dim", highlight=False)
        self._draw(force=True)

    def report(self, what: str, done: int, total: int) -> None:
        """Progress of something that is no stage, such as verifying the files."""
        self._message = f"{what}: {done} of {total}"
        self._draw()

    def plan(self, plan: Plan, done: int) -> None:
        self._plan, self._known = plan, done
        self.say(f"{len(plan.recipes)} recipes, {len(plan.stages)} stages, {done} of them already done")

    @contextmanager
    def stage(self, stage: Stage, done: int = 0, total: int = 1) -> Iterator[Callable[[str, int, int], None]]:
        """Show a stage that runs in this process; yields its progress callback."""
        self.started(stage)
        begun = time.monotonic()

        def report(what: str, done: int, total: int) -> None:
            self._now = (stage.key, what, done, total)
            self._draw()

        yield report
        self._seconds.append(time.monotonic() - begun)

    def started(self, stage: Stage) -> None:
        self._now = (stage.key, stage.title, 0, 1)
        if self._display is None and self._console is not None:
            who = ", ".join(stage.recipes[:3]) + (" …" if len(stage.recipes) > 3 else "")
            self._console.print(f"  {who + ': ' if who else ''}{stage.title}", highlight=False)
        self._draw(force=True)

    def finished(self, stage: Stage, store: Store) -> None:
        self._done[stage.key] = "done"
        if stage.kind == "predict":
            self._note_accuracy(stage, store)
        self._draw(force=True)

    def failed(self, stage: Stage, reason: str) -> None:
        self._done[stage.key] = "failed"
        if self._console is not None:
            self._console.print(
                f"  failed: {', '.join(stage.recipes) or stage.kind}: {reason}", style="red", highlight=False
            )

    def _note_accuracy(self, stage: Stage, store: Store) -> None:
        import numpy as np

        with np.load(store.folder(stage.key) / "predictions.npz") as data:
            values, labels = data["test_predictions"], data["test_labels"]
        if labels.ndim != 1 or values.ndim != 2 or labels.dtype.kind not in "iu":
            return
        accuracy = float((values.argmax(1) == labels).mean())
        if self._best is None or accuracy > self._best[1]:
            self._best = (", ".join(stage.recipes[:2]), accuracy)

    def _draw(self, force: bool = False) -> None:
        if self._display is None or (not force and time.monotonic() - self._drawn < 0.2):
            return
        self._drawn = time.monotonic()
        self._display.update(self._table())

    def _table(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table(box=None, pad_edge=False, expand=False)
        for title in ("recipe", "stage", "progress", "time left"):
            table.add_column(title, no_wrap=True)
        plan = self._plan
        if plan is None:
            table.add_row(self._message, "", "", "")
            return table
        todo = [k for k in plan.stages if k not in self._done]
        share = 0.0
        if self._now is not None and self._now[3]:
            share = min(1.0, self._now[2] / self._now[3])
        finished = self._known + len(self._done) + share
        elapsed = time.monotonic() - self._started
        gained = len(self._done) + share
        left = elapsed / gained * (len(plan.stages) - finished) if gained > 0.5 else None
        for entry in plan.recipes:
            name = entry.recipe.name
            keys = [k for k, s in plan.stages.items() if name in s.recipes]
            now = self._now if self._now and self._now[0] in keys else None
            left_over = [k for k in keys if k in todo]
            text = now[1] if now else ("done" if not left_over or self._all_known(keys) else "waiting")
            bar: Any = ProgressBar(total=max(1, now[3]), completed=now[2], width=24) if now else ""
            table.add_row(name, text, bar, "")
        best = f"best so far: {self._best[0]} {self._best[1]:.1%}" if self._best else ""
        clock = (
            f"{left / 60:.0f} min" if left is not None and left > 90 else (f"{left:.0f} s" if left is not None else "…")
        )
        overall = ProgressBar(total=len(plan.stages), completed=finished, width=24)
        table.add_row("[bold]all", best, overall, clock)
        return table

    def _all_known(self, keys: list[str]) -> bool:
        return all(k in self._done for k in keys)
