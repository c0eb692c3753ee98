"""The images of a request: read within limits, kept in memory, never a path, never an address that is fetched."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from fastapi import Request
from PIL import Image
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from vitkit.deploy.server.limits import Limits, Refused
from vitkit.errors import BadInput

FIELDS = ("images", "image")
#: what decoders of the server are for; others (PostScript) run programs or follow references
FORMATS = frozenset(["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP"])
_LONGEST_NAME = 200
_JSON, _MULTIPART = "application/json", "multipart/form-data"


@dataclass(frozen=True)
class Upload:
    """One image as it came: the name its sender gave it (for messages only) and its bytes."""

    name: str
    data: bytes


class Held:
    """Bytes of all requests that are in memory now."""

    def __init__(self, limit: int) -> None:
        self.limit, self.now = limit, 0

    @contextmanager
    def meter(self) -> Iterator[Meter]:
        """Count the bytes of one request; they are given back at the end."""
        meter = Meter(self)
        try:
            yield meter
        finally:
            self.now -= meter.taken


class Meter:
    """The bytes of one request."""

    def __init__(self, held: Held) -> None:
        self.held, self.taken = held, 0

    def add(self, count: int) -> None:
        """Raises: Refused (429) if all requests together would hold too much."""
        if self.held.now + count > self.held.limit:
            raise Refused(429, "The server is busy with other uploads; try again later.", {"Retry-After": "1"})
        self.held.now += count
        self.taken += count


async def read_uploads(request: Request, limits: Limits, meter: Meter) -> list[Upload]:
    """Read the images of a request.

    Args:
        request: ``multipart/form-data`` with files in the field ``images`` or ``image``, or ``application/json``
            ``{"images": ["<base64>", …]}`` or ``{"image": "<base64>"}``.
        limits: enforced while reading, whatever length the request claims.
        meter: counts the bytes that stay in memory.

    Returns: at least one upload.

    Raises: Refused with 400, 408, 413, 415 or 429.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refused(415, "Compressed bodies are not accepted; send it without Content-Encoding.")
    claimed = request.headers.get("content-length", "")
    if claimed.isdigit() and int(claimed) > limits.max_request_bytes:
        raise _too_large(limits)
    try:
        async with asyncio.timeout(limits.timeout_s):
            if kind == _MULTIPART.encode():
                return await _multipart(_chunks(request, limits, meter), options.get(b"boundary", b""), limits)
            if kind == _JSON.encode():
                body = b"".join([chunk async for chunk in _chunks(request, limits, meter)])
                # base64 of many megabytes would stop all other requests
                return await asyncio.to_thread(_from_json, body, limits)
    except TimeoutError as error:
        message = f"The request was not complete after {limits.timeout_s:g} s; send it faster or in smaller pieces."
        raise Refused(408, message) from error
    seen = kind.decode("latin-1")[:80] or "none"
    raise Refused(415, f"The content type is {seen}; send {_MULTIPART} with files in the field images, or {_JSON}.")


async def _chunks(request: Request, limits: Limits, meter: Meter) -> AsyncIterator[bytes]:
    length = 0
    async for chunk in request.stream():
        length += len(chunk)
        if length > limits.max_request_bytes:
            raise _too_large(limits)
        meter.add(len(chunk))
        yield chunk
    if not length:
        raise Refused(400, "The body is empty (0 bytes); it must hold at least one image.")


def _too_large(limits: Limits) -> Refused:
    return Refused(413, f"The request is larger than the limit of {limits.max_request_bytes:,} bytes.")


def _image_too_large(name: str, limits: Limits) -> Refused:
    return Refused(413, f"{name} is larger than the limit of {limits.max_bytes:,} bytes for one image.")


def _too_many(limits: Limits) -> Refused:
    return Refused(413, f"More than {limits.max_images} images in one request; send them in several.")


class _Parts:
    """Takes the pieces a multipart parser finds and refuses as soon as a limit is passed."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.uploads: list[Upload] = []
        self.complete = False
        self.headers: dict[bytes, bytes] = {}
        self.key, self.value, self.data = bytearray(), bytearray(), bytearray()
        self.name = ""

    def on_part_begin(self) -> None:
        if len(self.uploads) == self.limits.max_images:
            raise _too_many(self.limits)
        self.headers, self.data = {}, bytearray()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self.key += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self.value += data[start:end]

    def on_header_end(self) -> None:
        self.headers[bytes(self.key).lower()] = bytes(self.value)
        self.key, self.value = bytearray(), bytearray()

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self.headers.get(b"content-disposition"))
        field = options.get(b"name", b"").decode("utf-8", "replace")
        if field not in FIELDS:
            raise Refused(400, f"The form has a field {field[:80]!r}; images belong in the field 'images'.")
        given = options.get(b"filename", b"").decode("utf-8", "replace")
        self.name = given[-_LONGEST_NAME:] or f"{field}[{len(self.uploads)}]"

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if len(self.data) + end - start > self.limits.max_bytes:
            raise _image_too_large(self.name, self.limits)
        self.data += data[start:end]

    def on_part_end(self) -> None:
        self.uploads.append(Upload(self.name, bytes(self.data)))

    def on_end(self) -> None:
        self.complete = True


async def _multipart(chunks: AsyncIterator[bytes], boundary: bytes, limits: Limits) -> list[Upload]:
    parts = _Parts(limits)
    names = [name for name in vars(_Parts) if name.startswith("on_")]
    try:
        if not boundary:
            raise Refused(400, f"The content type {_MULTIPART} lacks its boundary.")
        parser = MultipartParser(boundary, {name: getattr(parts, name) for name in names})  # type: ignore[arg-type]
        async for chunk in chunks:
            parser.write(chunk)
    except FormParserError as error:
        raise Refused(400, f"The multipart body is malformed: {error}.") from error
    if not parts.complete:
        raise Refused(400, "The multipart body ends before its last boundary.")
    if not parts.uploads:
        raise Refused(400, "The form holds no image; send files in the field images.")
    return parts.uploads


def _from_json(body: bytes, limits: Limits) -> list[Upload]:
    wanted = 'must be {"images": ["<base64>", …]} or {"image": "<base64>"}'
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"The body is not valid JSON ({error}); it {wanted}.") from error
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in FIELDS:
        raise Refused(400, f"The body {wanted}, without other keys.")
    field, found = next(iter(value.items()))
    several = isinstance(found, list)
    texts = found if several else [found]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise Refused(400, f"{field} must hold texts in base64; the body {wanted}.")
    if len(texts) > limits.max_images:
        raise _too_many(limits)
    uploads = []
    for i, text in enumerate(texts):
        name = f"{field}[{i}]" if several else field
        if len(text) // 4 * 3 - 2 > limits.max_bytes:
            raise _image_too_large(name, limits)
        try:
            uploads.append(Upload(name, base64.b64decode(text, validate=True)))
        except (binascii.Error, ValueError) as error:
            message = f"{name} is not base64 ({error}); paths, addresses and data: links are not read."
            raise Refused(400, message) from error
    return uploads


def look(upload: Upload, max_pixels: int) -> None:
    """Refuse what must not reach a decoder: too many pixels (told by the header alone), or a format that runs code.

    What is no image at all passes: the decoder has the better words for it.

    Args:
        upload: an image.
        max_pixels: of all its pages together.

    Raises: BadInput, naming the image.
    """
    pixels, kind = _header(upload)
    if kind and kind not in FORMATS:
        raise BadInput(f"{upload.name} cannot be used: {kind} files are not accepted; send PNG, JPEG, TIFF or WebP.")
    if pixels > max_pixels:
        count = f"{pixels:,} pixels" if pixels < math.inf else "pixels"
        raise BadInput(
            f"{upload.name} cannot be used: its {count} are more than the limit of {max_pixels:,} (a decompression "
            "bomb?)."
        )


def _header(upload: Upload) -> tuple[float, str]:
    """Number of pixels an image claims to have, and its format; (0, "") where its header cannot be read."""
    if upload.name.lower().endswith(".npy"):
        return _npy_pixels(upload.data), ""
    try:
        with Image.open(io.BytesIO(upload.data)) as image:
            pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
            return math.prod(image.size) * pages, image.format or ""
    except Image.DecompressionBombError:
        # above Pillow's own bound it does not say how many
        return math.inf, ""
    except Exception:
        # plugins raise anything from KeyError to zlib.error on damaged headers
        return _tiff_pixels(upload.data), ""


def _npy_pixels(data: bytes) -> int:
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, _ = read(stream)
    except Exception:
        # the decoder tells why
        return 0
    return math.prod(sorted(shape)[-2:])


def _tiff_pixels(data: bytes) -> int:
    """Of a TIFF that Pillow has no mode for; it is read with another library, which has no bound of its own."""
    if data[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return 0
    try:
        import tifffile

        with tifffile.TiffFile(io.BytesIO(data)) as file:
            # four values a pixel are what an image of colour and opacity has
            return max(math.prod(s.shape) // 4 for s in file.series)
    except Exception:
        # the decoder tells why, also where tifffile is absent
        return 0
