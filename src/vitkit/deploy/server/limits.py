"""What one request may cost, and the error that says no."""

from __future__ import annotations

from dataclasses import dataclass

from vitkit.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server takes.

    Args:
        max_bytes: of one image file.
        max_request_bytes: of the body of one request.
        max_held_bytes: of all bodies that are in memory at once; above it new ones get 429.
        max_pixels: of one image, known before it is decoded.
        max_images: in one request.
        queue: images that are accepted and not answered yet; above it new requests get 429.
        timeout_s: to read a request, and again to answer it.
        max_wait_ms: how long the model waits for images that are being decoded, to run them in the same batch.

    Raises: BadInput if a value is not positive or ``queue`` is smaller than ``max_images``.
    """

    max_bytes: int = 16 * 2**20
    max_request_bytes: int = 64 * 2**20
    max_held_bytes: int = 256 * 2**20
    max_pixels: int = 50_000_000
    max_images: int = 64
    queue: int = 256
    timeout_s: float = 30.0
    max_wait_ms: float = 2.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0 or (value == 0 and name != "max_wait_ms"):
                raise BadInput(f"{name} = {value} must be positive.")
        if self.queue < self.max_images:
            raise BadInput(
                f"queue = {self.queue} must be at least max_images = {self.max_images}, or a full request never fits."
            )


class Refused(Exception):
    """A request that gets an error as its answer.

    Args:
        status: of HTTP, 400 to 599.
        message: a sentence for the client.
        headers: of the answer.
    """

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}
