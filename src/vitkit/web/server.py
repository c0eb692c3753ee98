"""The HTTP server behind the pages."""

from __future__ import annotations

import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI


class Server(uvicorn.Server):
    """Says when it listens, and ends with exit code 0 on Ctrl+C and SIGTERM.

    Args:
        app: what is served.
        announcement: printed when the server listens.
    """

    def __init__(self, app: FastAPI, announcement: str = "") -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=5,
            )
        )
        self.announcement = announcement

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.announcement:
            print(self.announcement, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: answer what was asked. Second: end now."""
        # uvicorn's own would raise the signal again at the end, as if something had gone wrong
        self.force_exit = self.should_exit
        self.should_exit = True
