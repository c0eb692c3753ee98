"""What the prediction server costs: the engine alone, the server with clients on loopback, and a soak.

    python benchmarks/server.py [--model FOLDER] [--clients 8] [--images 1] [--seconds 10] [--requests 10000]
                                [--rounds 3] [--json FILE]

Three processes: this one times the engine alone, the server is `vitkit serve` as users run it, and the clients are
threads of a third one, each with a kept connection and its next request as soon as the last is answered. Engine and
server take turns, and the share of a round is the server's rate over the engine's at the faster of the batch sizes that
the two processes found best. Targets: a median share of at least 85 %, p99 under 5 times p50, and 10,000 requests of
which 10 % are malformed with a 4xx for every bad one, a 200 for every good one, and less than 5 % growth of the
server's memory after its first tenth.

Without --model a ViT-Ti/16 at 224 pixels with fresh weights is served; images are JPEG of the model's input size.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitkit.deploy.served import Served
from vitkit.deploy.server.run import open_served

SERVE = "import typer; from vitkit.cli.serve import serve; typer.run(serve)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="deployed model, model folder or study")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--images", type=int, default=1, help="images in a request")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each half of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=10_000, help="of the soak; 0 leaves it out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or example(Path(folder) / "vit_tiny")
        served = open_served(model)
        size = [int(v) for v in served.describe()["image_size"]]
        process, port = start(model)
        try:
            batches = sorted({served.best_batch, int(json.loads(get(port, "/model"))["best_batch"])})
            body = form([jpeg(size, seed) for seed in range(options.images)])
            own: list[float] = []
            rates: list[float] = []
            times: list[float] = []
            statuses: Counter[int] = Counter()
            for _ in range(options.rounds):
                own.append(max(engine_alone(served, size, b, options.seconds / len(batches)) for b in batches))
                measured = in_process(load, port, body, options.clients, options.seconds)
                rates.append(options.images * len(measured["ms"]) / options.seconds)
                times += measured["ms"]
                statuses.update(measured["statuses"])
            shares = [rate / alone for rate, alone in zip(rates, own)]
            p50, p95, p99 = (float(np.percentile(times, q)) for q in (50, 95, 99))
            result: dict[str, Any] = {
                "model": str(options.model or "vit_tiny_patch16_224, fresh weights"), "image_size": size,
                "clients": options.clients, "images_per_request": options.images, "best_batches": batches,
                "engine_images_per_s": [round(v, 2) for v in own], "server_images_per_s": [round(v, 2) for v in rates],
                "share_of_engine": round(statistics.median(shares), 4), "shares": [round(v, 4) for v in shares],
                "p50_ms": round(p50, 2), "p95_ms": round(p95, 2), "p99_ms": round(p99, 2),
                "p99_over_p50": round(p99 / p50, 2), "mean_batch": mean_batch(port), "statuses": dict(statuses),
                "python": platform.python_version(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
            }  # fmt: skip
            if options.requests:
                result["soak"] = soak(process.pid, port, size, options.clients, options.requests)
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(60)
        result["exit_code"] = code
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def example(folder: Path) -> Path:
    from vitkit.models.io import ModelConfig, construct, save_model

    config = ModelConfig(base="vit_tiny_patch16_224", base_options={"num_classes": 10}, classes=tuple("abcdefghij"))
    save_model(construct(config), config, folder)
    return folder


def engine_alone(served: Served, size: list[int], batch: int, seconds: float) -> float:
    """Images a second."""
    images = np.repeat(served.prepare(jpeg(size, 0), "x.jpg")[None], batch, 0)
    served.run(images)
    times: list[float] = []
    while sum(times) < seconds or len(times) < 5:
        started = time.perf_counter()
        served.run(images)
        times.append(time.perf_counter() - started)
    # a rate over all of them, slow moments included, as the server's is
    return batch * len(times) / sum(times)


def start(model: Path) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-c", SERVE, str(model), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout or ():
        if found := re.search(r" on http://.*:(\d+)", line):
            return process, int(found[1])
    raise SystemExit("The server did not start.")


def jpeg(size: list[int], seed: int) -> bytes:
    """A smooth picture, as photographs are; noise would be many times larger and slower to decode."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def form(images: list[bytes]) -> tuple[str, bytes]:
    head = b'--b\r\nContent-Disposition: form-data; name="images"; filename="x.jpg"\r\n\r\n'
    body = b"".join(head + image + b"\r\n" for image in images)
    return "multipart/form-data; boundary=b", body + b"--b--\r\n"


def in_process(work: Any, *args: Any) -> Any:
    """Run in another process: clients must not take turns with what is measured here."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(work, args)


def load(port: int, body: tuple[str, bytes], clients: int, seconds: float) -> dict[str, Any]:
    """Closed-loop clients for some time, after a second that does not count."""
    begin = time.perf_counter() + 1
    end = begin + seconds
    times: list[float] = []
    statuses: Counter[int] = Counter()

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while (started := time.perf_counter()) < end:
            connection.request("POST", "/predict", body[1], {"Content-Type": body[0]})
            answer = connection.getresponse()
            answer.read()
            statuses[answer.status] += 1
            finished = time.perf_counter()
            # by their end alone: of those under way at the edges, one set is counted for the other that is not
            if begin <= finished <= end:
                times.append(1000 * (finished - started))

    together([client] * clients)
    return {"ms": times, "statuses": dict(statuses)}


def together(work: list[Any]) -> None:
    threads = [threading.Thread(target=w) for w in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def get(port: int, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    return connection.getresponse().read().decode()


def mean_batch(port: int) -> float:
    text = get(port, "/metrics")
    total, count = (
        float(re.search(rf"^vitkit_batch_images_{name} (\S+)", text, re.MULTILINE)[1])  # type: ignore[index]
        for name in ("sum", "count")
    )
    return round(total / count, 2)


def malformed(good: bytes) -> list[tuple[str, bytes]]:
    """One of each kind of bad request."""
    kind, form_type = "application/json", "multipart/form-data; boundary=b"
    return [
        form([b"not an image"]),
        form([b""]),
        form([good[: len(good) // 2]]),
        form([b"x"] * 1000),
        (form_type, form([good])[1][:-20]),
        (form_type, b"garbage"),
        ("multipart/form-data", b"garbage"),
        (kind, b""),
        (kind, b'{"images": ["/etc/passwd"]}'),
        (kind, b"[" * 100_000),
        (kind, b'{"images": [' + b'"AAAA",' * 100 + b'"AAAA"]}'),
        ("text/plain", b"hello"),
        ("image/jpeg", good),
    ]


def soak(pid: int, port: int, size: list[int], clients: int, requests: int) -> dict[str, Any]:
    first = in_process(storm, port, size, clients, requests // 10, 0)
    before = resident(pid)
    rest = in_process(storm, port, size, clients, requests - requests // 10, 1)
    after = resident(pid)
    total = {kind: dict(Counter(first[kind]) + Counter(rest[kind])) for kind in ("good", "bad")}
    return {
        "requests": requests, **total, "without_message": first["without_message"] + rest["without_message"],
        "broken_connections": first["broken"] + rest["broken"],
        "memory_mib": [round(before, 1), round(after, 1)], "growth": round(after / before - 1, 4),
    }  # fmt: skip


def storm(port: int, size: list[int], clients: int, requests: int, seed: int) -> dict[str, Any]:
    """Requests of which every tenth is malformed; counts statuses of good and of bad ones."""
    picture = jpeg(size, seed)
    good, bad = form([picture]), malformed(picture)
    found: dict[str, Any] = {"good": Counter(), "bad": Counter(), "without_message": 0, "broken": 0}
    lock, numbers = threading.Lock(), iter(range(requests))

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            kind = "bad" if number % 10 == 9 else "good"
            content_type, body = bad[number // 10 % len(bad)] if kind == "bad" else good
            try:
                connection.request("POST", "/predict", body, {"Content-Type": content_type})
                answer = connection.getresponse()
                said = json.loads(answer.read())
            except (OSError, http.client.HTTPException):
                connection.close()
                with lock:
                    found["broken"] += 1
                continue
            with lock:
                found[kind][answer.status] += 1
                found["without_message"] += kind == "bad" and not said.get("error")

    together([client] * clients)
    return {**found, "good": dict(found["good"]), "bad": dict(found["bad"])}


def resident(pid: int) -> float:
    """Memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
