"""``vitkit papers serve``: the library and the catalogue in a browser."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def papers_serve(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8010,
) -> None:
    """Look through your library and the catalogue in a browser: search, filter, read, copy the command.

    Nothing is changed by it. Ctrl+C or SIGTERM stops it.
    """
    from vitkit.errors import MissingExtra

    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtra("`vitkit papers serve`", str(error.name), "serve") from error
    from vitkit.catalogue.library import Library, library_path
    from vitkit.catalogue.page import make_app
    from vitkit.web.listen import LOOPBACK, address_of, listen
    from vitkit.web.server import Server

    path = library_path()
    if path.exists():
        # a damaged one is better told here than in the browser
        Library(path).close()
    listener = listen(host, port)
    address = address_of(listener, host)
    if host not in LOOPBACK:
        print("Whoever reaches this address can read your library.", file=sys.stderr)
    what = "Your library and the catalogue" if path.exists() else "The catalogue"
    app = make_app(path, LOOPBACK if host in LOOPBACK else None)
    Server(app, f"{what} on {address}\nCtrl+C stops.").run(sockets=[listener])
