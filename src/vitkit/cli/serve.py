"""``vitkit serve``: a model behind HTTP, with a page to try it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

_KEY = "VITKIT_API_KEY"


def serve(
    path: Annotated[Path, typer.Argument(help="A deployed model, a model's folder, or a study (its best model).")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"File that holds the key clients must send (or the variable {_KEY}).")
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option(help="Origin whose pages may call the server; repeat for several.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with the model in memory.")] = 1,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to read a request, and again to answer it.")] = 30.0,
    queue: Annotated[int, typer.Option(min=1, help="Images that may wait; above it clients get 429.")] = 256,
    max_images: Annotated[int, typer.Option(min=1, help="Images in one request.")] = 64,
    max_mb: Annotated[float, typer.Option(min=0.001, help="Megabytes of one image; a request may be 4 times it.")] = 16,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of one image.")] = 50_000_000,
    max_wait_ms: Annotated[float, typer.Option(min=0, help="How long a batch waits for images being decoded.")] = 2.0,
) -> None:
    """Serve a model: a page at /, POST /predict and /explain, /metrics, and documentation at /docs.

    Ctrl+C or SIGTERM stops it after it has answered what it took.
    """
    from vitkit.errors import MissingExtra

    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtra("`vitkit serve`", str(error.name), "serve") from error
    from vitkit.cli.find_model import find_model
    from vitkit.deploy.server.limits import Limits
    from vitkit.deploy.server.run import Job, run, run_several
    from vitkit.web.listen import LOOPBACK, address_of, listen

    size = int(max_mb * 2**20)
    limits = Limits(
        max_bytes=size,
        max_request_bytes=4 * size,
        max_held_bytes=16 * size,
        max_pixels=max_pixels,
        max_images=max_images,
        queue=queue,
        timeout_s=timeout,
        max_wait_ms=max_wait_ms,
    )
    folder = find_model(path)
    if folder != path:
        print(f"{folder.name} is the best of {path}.")
    job = Job(folder, limits, _read_key(api_key_file), tuple(cors or ()))
    # before the model is loaded, which takes long and would be in vain
    listener = listen(host, port)
    address = address_of(listener, host)
    if job.api_key is None and host not in LOOPBACK:
        print("Whoever reaches this address can use the model; --api-key-file asks for a key.", file=sys.stderr)
    code = run(job, listener, address) if workers == 1 else run_several(job, listener, address, workers)
    if code:
        raise typer.Exit(code)


def _read_key(file: Path | None) -> str | None:
    from vitkit.errors import BadInput

    if file is None:
        key = os.environ.get(_KEY)
        where = f"The variable {_KEY}"
    else:
        where = str(file)
        try:
            key = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(
                f"The key file {file} cannot be read: {getattr(error, 'strerror', None) or error}."
            ) from error
    if key is None:
        return None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable():
        raise BadInput(f"{where} must hold a key of printable ASCII characters, without line breaks inside.")
    return key
