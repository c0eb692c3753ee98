from __future__ import annotations

import base64
import io
import json
import struct
import subprocess
import sys
import zlib
from urllib.parse import unquote

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from vitkit.deploy.server import Limits, make_app

SMALL = Limits(
    max_bytes=20_000, max_request_bytes=60_000, max_held_bytes=200_000, max_pixels=10_000, max_images=4, queue=8
)


@pytest.fixture
def client(served):
    with TestClient(make_app(served, SMALL)) as client:
        yield client


def files(*images: bytes, field: str = "images") -> list:
    return [(field, (f"{i}.png", data, "image/png")) for i, data in enumerate(images)]


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_importing_the_server_needs_no_torch():
    code = "import vitkit.deploy.server.app, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_predict_by_form(client, red, blue):
    answer = client.post("/predict", files=files(red, blue), params={"top": 2})
    assert answer.status_code == 200
    body = answer.json()
    assert [row["label"] for row in body["predictions"]] == ["red", "blue"]
    assert [row["image"] for row in body["predictions"]] == ["0.png", "1.png"]
    probabilities = body["predictions"][0]["probabilities"]
    assert next(iter(probabilities)) == "red" and len(probabilities) == 2
    # the fake's logits are ten times the channel means
    z = np.exp(10 * np.array([200, 10, 10]) / 255)
    assert probabilities["red"] == pytest.approx(z[0] / z.sum(), abs=1e-5)
    assert body["model"] == "colours"
    assert set(body["latency_ms"]) == {"read", "decode", "wait", "model", "total"}


@pytest.mark.parametrize("field", ["images", "image"])
def test_predict_by_json(client, blue, field):
    text = base64.b64encode(blue).decode()
    answer = client.post("/predict", json={field: [text] if field == "images" else text})
    assert answer.status_code == 200 and answer.json()["predictions"][0]["label"] == "blue"


@pytest.mark.parametrize(
    "task, key, value",
    [
        ("multilabel", "label", ["red"]),
        ("regress", "values", {"red": 2000 / 255, "green": 100 / 255, "blue": 100 / 255}),
    ],
)
def test_other_tasks(served, red, task, key, value):
    served.task = task
    with TestClient(make_app(served)) as client:
        row = client.post("/predict", files=files(red)).json()["predictions"][0]
    assert row[key] == (value if task == "multilabel" else pytest.approx(value, rel=1e-5))


def test_outputs_without_names_are_numbered(served, red):
    served.labels = ()
    with TestClient(make_app(served)) as client:
        assert client.post("/predict", files=files(red)).json()["predictions"][0]["label"] == "0"
        assert client.post("/explain?method=nothing&target=2", files=files(red)).headers["x-target"] == "2"
        assert client.post("/explain?method=nothing&target=3", files=files(red)).status_code == 404


def test_one_unreadable_image_among_several(client, red):
    answer = client.post("/predict", files=files(red, b"no image"))
    good, bad = answer.json()["predictions"]
    assert answer.status_code == 200
    assert good["label"] == "red" and bad == {
        "image": "1.png",
        "error": "1.png cannot be used: it holds text, not an image.",
    }


ZIP = b"PK\x03\x04" + bytes(60)
UNREADABLE = {
    "text": (b"hello", "it holds text"),
    "nothing": (b"", "0 bytes"),
    "html": (b"<html><script>alert(1)</script></html>", "it holds text"),
    "zip": (ZIP, "no image format"),
    "noise": (bytes(range(256)) * 4, "no image format"),
    "cut png": (png_header(10, 10), "cannot be used"),
    "bomb of 200 megapixels": (png_header(20_000, 10_000), "its pixels are more than the limit of 10,000"),
    "bomb of 100 megapixels": (png_header(10_000, 10_000), "100,000,000 pixels are more than the limit of 10,000"),
    "bomb beyond Pillow's own bound": (png_header(2**31 - 1, 2**31 - 1), "more than the limit"),
    "program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", "EPS files are not"),
}


@pytest.mark.parametrize("data, message", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_image_is_a_422_that_says_why(client, data, message):
    answer = client.post("/predict", files=files(data))
    assert answer.status_code == 422, answer.text
    assert message in answer.json()["error"] and answer.json()["predictions"][0]["error"] == answer.json()["error"]
    several = client.post("/predict", files=files(data, data))
    assert several.status_code == 422 and several.json()["error"].startswith("None of the 2 images could be read")


def lying_npy() -> bytes:
    buffer = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (90, 10**12, 90)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data, message",
    [
        (npy(np.array([{}], dtype=object)), "pickle"),
        (npy(np.full((8, 8), np.nan)), "NaN"),
        # their difference is no float32
        (npy(np.array([[3e38, -3e38], [0, 0]], np.float32)), "too large to be scaled"),
        (npy(np.zeros((101, 100), np.uint8)), "10,100 pixels are more than the limit"),
        (npy(np.zeros(5)), "no image"),
        (lying_npy(), "more than the limit"),
        (b"\x93NUMPY\x01\x00\xff\xff{", "cannot be used"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_arrays_are_refused_as_images_are(client, data, message):
    answer = client.post("/predict", files=[("images", ("x.npy", data))])
    assert answer.status_code == 422 and message in answer.json()["error"], answer.text


def test_a_tiff_of_many_channels_has_a_pixel_limit_too(client):
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer, np.zeros((300, 300, 6), np.uint8), photometric="minisblack", planarconfig="contig", compression="zlib"
    )
    answer = client.post("/predict", files=files(buffer.getvalue()))
    assert answer.status_code == 422 and "more than the limit" in answer.json()["error"]


def test_names_are_never_paths(client, red, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(red)
    answer = client.post("/predict", files=[("images", (str(secret), b"x"))])
    assert answer.status_code == 422
    for text in (str(secret), f"file://{secret}", "http://127.0.0.1/x.png", "data:image/png;base64,AAAA", "../x"):
        answer = client.post("/predict", json={"images": [text]})
        assert answer.status_code == 400 and "are not read" in answer.json()["error"]


def multipart(body: bytes, boundary: str = "b") -> dict:
    return {"content": body, "headers": {"Content-Type": f"multipart/form-data; boundary={boundary}"}}


PART = b'--b\r\nContent-Disposition: form-data; name="images"; filename="x.png"\r\n\r\n'
JSON = {"Content-Type": "application/json"}
HOSTILE = {
    "no body": ({"content": b"", "headers": JSON}, 400, "empty"),
    "no form": (multipart(b""), 400, "empty"),
    "no type": ({"content": b"x"}, 415, "none"),
    "text": ({"content": b"x", "headers": {"Content-Type": "text/plain"}}, 415, "text/plain"),
    "bare image": ({"content": b"x", "headers": {"Content-Type": "image/png"}}, 415, "image/png"),
    "url-encoded": ({"data": {"images": "x"}}, 415, "x-www-form-urlencoded"),
    "compressed": ({"content": b"x", "headers": {**JSON, "Content-Encoding": "gzip"}}, 415, "Compressed"),
    "no boundary": ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "boundary"),
    "huge boundary": (multipart(b"x", "b" * 500), 400, "malformed"),
    "wrong boundary": (multipart(PART + b"x\r\n--b--\r\n", "other"), 400, "malformed"),
    "never ends": (multipart(PART + b"x"), 400, "ends before"),
    "no part": (multipart(b"--b--\r\n"), 400, ""),
    "other field": ({"files": [("photo", ("x.png", b"x"))]}, 400, "'photo'"),
    "nameless part": (multipart(b"--b\r\n\r\nx\r\n--b--\r\n"), 400, "field ''"),
    "endless header": (multipart(b"--b\r\nX: " + b"y" * 30_000), 400, "malformed"),
    "5 files": ({"files": files(*[b"x"] * 5)}, 413, "More than 4 images"),
    "10,000 files": ({"files": files(*[b"x"] * 10_000)}, 413, ""),
    "large image": ({"files": files(bytes(20_001))}, 413, "20,000 bytes for one image"),
    "large request": ({"content": bytes(60_001), "headers": JSON}, 413, "60,000 bytes"),
    "no JSON": ({"content": b"{", "headers": JSON}, 400, "not valid JSON"),
    "no UTF-8": ({"content": b"\xff\xfe{", "headers": JSON}, 400, "not valid JSON"),
    "deep JSON": ({"content": b"[" * 50_000, "headers": JSON}, 400, "JSON"),
    "JSON list": ({"json": ["x"]}, 400, "must be"),
    "JSON without images": ({"json": {}}, 400, "must be"),
    "JSON, other key": ({"json": {"images": ["AAAA"], "path": "/etc/passwd"}}, 400, "without other keys"),
    "JSON of numbers": ({"json": {"images": [1]}}, 400, "base64"),
    "no images in JSON": ({"json": {"images": []}}, 400, "base64"),
    "no base64": ({"json": {"images": ["§"]}}, 400, "not base64"),
    "large image in JSON": ({"json": {"images": ["A" * 30_000]}}, 413, "images[0] is larger"),
    "5 images in JSON": ({"json": {"images": ["AAAA"] * 5}}, 413, "More than 4"),
    "top 0": ({"files": files(b"x"), "params": {"top": 0}}, 422, "top:"),
    "top x": ({"files": files(b"x"), "params": {"top": "x"}}, 422, "top:"),
}


@pytest.mark.parametrize("request_, status, message", HOSTILE.values(), ids=HOSTILE)
def test_bad_requests_get_the_right_status_and_a_sentence(client, red, request_, status, message):
    answer = client.post("/predict", **request_)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"] and answer.json()["error"].endswith(".")
    # and the next one is served
    assert client.post("/predict", files=files(red)).status_code == 200
    batcher = client.app.state.batcher
    assert (batcher.open, batcher._places, batcher._coming) == (0, 0, 0)


def test_a_body_without_a_length_is_cut_off_at_the_limit(client):
    sent = 0

    def endless():
        nonlocal sent
        for _ in range(1000):
            sent += 1000
            yield bytes(1000)

    answer = client.post("/predict", content=endless(), headers=JSON)
    assert answer.status_code == 413


def test_no_more_than_so_many_bytes_are_held(served, red):
    limits = Limits(max_bytes=10_000, max_request_bytes=10_000, max_held_bytes=10)
    with TestClient(make_app(served, limits)) as client:
        answer = client.post("/predict", files=files(red))
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert "busy" in answer.json()["error"]


def test_the_model_failing_is_a_500_without_secrets(client, served, red, caplog):
    served.fault = RuntimeError("secret /path")
    answer = client.post("/predict", files=files(red))
    assert answer.status_code == 500 and "secret" not in answer.text and "RuntimeError" in answer.json()["error"]
    assert "secret /path" in caplog.text
    served.fault = None
    assert client.post("/predict", files=files(red)).status_code == 200


def test_a_fault_of_the_server_itself_is_a_500(client, served, red, caplog):
    served.prepare = lambda data, name: {}["bug"]
    answer = client.post("/predict", files=files(red))
    assert answer.status_code == 500 and answer.json() == {"error": "The server failed; its log says more."}
    assert answer.headers["x-content-type-options"] == "nosniff" and "bug" in caplog.text


def test_answers_that_are_no_numbers_are_not_sent(client, served, red):
    served.probabilities = lambda logits: logits * np.nan
    answer = client.post("/predict", files=files(red))
    assert answer.status_code == 500 and "no number" in answer.json()["error"]


def test_explain(client, red, blue):
    answer = client.post("/explain", params={"method": "left-half"}, files=files(red))
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    assert answer.headers["x-target"] == "red"
    heat = np.asarray(Image.open(io.BytesIO(answer.content)))
    assert heat.shape == (8, 12) and (heat[:, :6] == 255).all() and (heat[:, 6:] == 0).all()
    over = client.post("/explain", params={"method": "left-half", "overlay": "true"}, files=files(red))
    picture = Image.open(io.BytesIO(over.content))
    assert picture.mode == "RGB" and picture.width % 12 == 0 and picture.width >= 224
    for target, named in (("green", "green"), ("2", "blue")):
        answer = client.post("/explain", params={"method": "nothing", "target": target}, files=files(blue))
        assert unquote(answer.headers["x-target"]) == named


@pytest.mark.parametrize(
    "params, images, status, message",
    [
        ({"method": "left_half"}, 1, 404, "Did you mean 'left-half'?"),
        ({"method": "left-half", "target": "grean"}, 1, 404, "Did you mean 'green'?"),
        ({"method": "left-half", "target": "3"}, 1, 404, "No output of the model is called '3'"),
        ({"method": "left-half", "target": "²"}, 1, 404, "No output"),
        ({"method": "left-half"}, 2, 400, "one at a time"),
        ({}, 1, 422, "method:"),
        ({"method": "left-half", "overlay": "maybe"}, 1, 422, "overlay:"),
    ],
)
def test_explain_says_what_is_wrong(client, red, params, images, status, message):
    answer = client.post("/explain", params=params, files=files(*[red] * images))
    assert answer.status_code == status and message in answer.json()["error"], answer.text


def test_explain_without_explainers_is_a_501(served, red):
    served.explainers = ()
    with TestClient(make_app(served)) as client:
        answer = client.post("/explain?method=rollout", files=files(red))
    assert answer.status_code == 501 and "colours has no heat maps" in answer.json()["error"]


def test_the_key_guards_all_but_page_and_probes(served, red):
    with TestClient(make_app(served, api_key="s3cret")) as client:
        for path in ("/", "/docs", "/openapi.json", "/healthz", "/readyz"):
            assert client.get(path).status_code == 200, path
        for headers in ({}, {"X-API-Key": "s3cre"}, {"X-API-Key": b"\xff\xfe"}):
            for method, path in (("get", "/metrics"), ("get", "/model"), ("post", "/predict"), ("post", "/explain")):
                answer = client.request(method, path, headers=headers)
                assert answer.status_code == 401 and "X-API-Key" in answer.json()["error"]
                assert answer.headers["www-authenticate"] == "ApiKey"
        assert served.batches == []
        assert client.post("/predict", files=files(red), headers={"X-API-Key": "s3cret"}).status_code == 200


def test_no_other_origin_by_default(served):
    origin = {"Origin": "https://a.example"}
    with TestClient(make_app(served)) as client:
        assert "access-control-allow-origin" not in client.get("/model", headers=origin).headers
    with TestClient(make_app(served, cors=("https://a.example",), api_key="k")) as client:
        answer = client.get("/model", headers=origin)
        # a refusal must be readable there, too
        assert answer.status_code == 401 and answer.headers["access-control-allow-origin"] == "https://a.example"
        other = client.get("/model", headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
        asked = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
        assert client.options("/predict", headers=asked).status_code == 200


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("get", "/nothing", 404),
        ("get", "/..%2f..%2fetc/passwd", 404),
        ("get", "/static/", 404),
        ("get", "/predict", 405),
        ("delete", "/", 405),
    ],
)
def test_other_routes(client, method, path, status):
    answer = client.request(method, path)
    assert answer.status_code == status and answer.json()["error"].endswith(".")


def test_headers_of_every_answer(client):
    for path in ("/", "/docs", "/model", "/nothing"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


def test_metrics_count(client, red):
    client.post("/predict", files=files(red, b"x"))
    client.post("/predict", files=files(b"x"))
    client.get("/surely/not/there")
    text = client.get("/metrics").text
    assert 'vitkit_requests_total{method="POST",path="/predict",status="200"} 1.0' in text
    assert 'vitkit_requests_total{method="POST",path="/predict",status="422"} 1.0' in text
    assert 'vitkit_requests_total{method="GET",path="other",status="404"} 1.0' in text
    assert 'vitkit_images_total{outcome="ok"} 1.0' in text and 'outcome="unreadable"} 2.0' in text
    assert "vitkit_waiting_images 0.0" in text and "vitkit_batch_images_sum 1.0" in text


def test_documentation_is_whole_and_offline(client):
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {"/predict", "/explain", "/model", "/healthz", "/readyz", "/metrics"}
    docs = client.get("/docs").text
    for path in schema["paths"]:
        assert path in docs
    for html in (docs, client.get("/").text):
        assert "https://" not in html and "http://" not in html and "src=" not in html
    json.dumps(client.get("/model").json(), allow_nan=False)
