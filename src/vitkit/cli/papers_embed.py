"""``vitkit papers embed``: vectors of all papers, so that a search also finds what says the same in other words."""

from __future__ import annotations

from typing import Annotated

import typer


def papers_embed(
    model: Annotated[
        str | None,
        typer.Option(help="Sentence encoder: a folder, or a name on the Hugging Face hub (default: all-MiniLM-L6-v2)."),
    ] = None,
) -> None:
    """Make vectors of the papers of your library and of the catalogue; from then on `search` uses them.

    Papers that come later get theirs at the next search. The model is fetched from the Hugging Face hub the first time,
    unless it is a folder. After an interrupt the same command goes on.
    """
    from vitkit.catalogue.joined import meaning_of, papers
    from vitkit.catalogue.library import Library
    from vitkit.catalogue.meaning import DEFAULT_MODEL, Vectors, have_vectors
    from vitkit.cli.console import console
    from vitkit.cli.papers_report import count, fetching_bar

    vectors = Vectors(model or (None if have_vectors() else DEFAULT_MODEL))
    with Library() as library:
        texts = [meaning_of(paper) for paper in papers(library).values()]
    with fetching_bar() as bar:
        task = bar.add_task(f"loading {vectors.model}", total=None)
        made = vectors.add(
            texts, lambda done, total: bar.update(task, description="embedding", completed=done, total=total)
        )
    console().print(
        f"{count(made, 'vector')} made by {vectors.model}, {len(set(texts)) - made} were there: {vectors.path}",
        soft_wrap=True,
        markup=False,
    )
