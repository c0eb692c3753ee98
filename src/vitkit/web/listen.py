"""Taking a port."""

from __future__ import annotations

import socket

from vitkit.errors import BadInput

#: addresses that only this machine reaches
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def listen(host: str, port: int) -> socket.socket:
    """Take a port; who connects waits until a server is there.

    Args:
        host: name or address of this machine.
        port: 0 takes a free one.

    Raises: BadInput if it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise BadInput(f"--host {host} is no address of this machine: {error.strerror or error}.") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # two programs may both bind a port with the option above; only one of them may listen
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise BadInput(
            f"Port {port} of {host} cannot be used: {error.strerror or error}. Choose another one with --port, or 0 "
            "for any free one."
        ) from error
    return listener


def address_of(listener: socket.socket, host: str) -> str:
    """What to type into a browser, e.g. ``http://127.0.0.1:8000``."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"
