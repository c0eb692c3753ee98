"""Summaries of papers, one after the other, by any writer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from vitkit.catalogue.digests.row import Row, tidy
from vitkit.catalogue.summaries.figures import mark
from vitkit.errors import VitkitError

#: papers without summary one after the other, after which no more are tried
GIVE_UP_AFTER = 5

#: gets a row with title and abstract, and returns its summary
Writer = Callable[[Row], str]


class NoSummary(VitkitError):
    """Raised by a writer that cannot summarise one paper but may well summarise the next."""


def summarise(
    rows: Iterable[Row],
    writer: Writer,
    progress: Callable[[int, int], None] | None = None,
    *,
    keep: Callable[[Row], None] | None = None,
    failed: Callable[[Row, str], None] | None = None,
    again: bool = False,
) -> list[Row]:
    """Give papers summaries; figures that the abstract does not have are marked, as by :func:`figures.mark`.

    ::

        with Library() as library:
            library.merge(digest)
            summarise(
                library.papers(),
                extractive.write,
                keep=lambda row: library.set_summary(row.arxiv_id, row.summary),
                failed=lambda row, reason: print(row.versioned_id, reason),
            )

    Args:
        rows: those without abstract, and those that have a summary, stay as they are.
        writer: :func:`extractive.write`, an :class:`endpoint.Endpoint`, or any function of a row.
        progress: called with the number of papers done and of all that need a summary.
        keep: called with each row that got one, at once, so that an interrupt loses one summary at most.
        failed: called with a row that got none and the reason. Without it the first such row ends all.
        again: summarise those with a summary, too.

    Returns: the rows in their order, with the summaries.

    Raises: NoSummary if there is no ``failed``; VitkitError if the writer cannot go on, or if
        :data:`GIVE_UP_AFTER` papers one after the other got no summary.
    """
    done = list(rows)
    chosen = [i for i, row in enumerate(done) if row.abstract and (again or not row.summary)]
    in_a_row = 0
    for number, i in enumerate(chosen, 1):
        row = done[i]
        try:
            text = tidy(writer(row))
            if not text:
                raise NoSummary("The summary is empty.")
        except NoSummary as error:
            if failed is None:
                raise
            failed(row, str(error))
            in_a_row += 1
            if in_a_row == GIVE_UP_AFTER:
                raise VitkitError(
                    f"{GIVE_UP_AFTER} papers one after the other got no summary, so the others were not tried. "
                    f"The last reason: {error}"
                ) from error
        else:
            in_a_row = 0
            done[i] = replace(row, summary=mark(text, row.abstract, row.title))
            if keep:
                keep(done[i])
        if progress:
            progress(number, len(chosen))
    return done
