from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from vitkit.deploy.server import make_app, pages
from vitkit.deploy.server.run import Server

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"),
]


def test_only_the_pages_own_style_and_script_may_run():
    page = pages.index()
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page.html, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in page.policy
    # neither attributes nor other elements would be allowed by these hashes
    assert not re.search(r"\son\w+=|\sstyle=|<script\s|<style\s|javascript:", page.html)
    assert "innerHTML" not in page.html and "eval" not in page.html


def test_the_page_names_its_parts_for_those_who_do_not_see_it():
    html = pages.index().html
    ids = set(re.findall(r'\sid="([^"]+)"', html))
    assert set(re.findall(r'\s(?:for|aria-labelledby)="([^"]+)"', html)) <= ids
    assert set(re.findall(r'\$\("([^"]+)"\)', html)) <= ids
    assert '<html lang="en">' in html and 'aria-live="polite"' in html and 'role="alert"' in html
    for tag in ("header", "main", "footer", "h1", "h2", "fieldset", "legend", "figcaption", "caption"):
        assert f"<{tag}" in html or f'"{tag}"' in html


def test_text_of_others_is_escaped_in_the_documentation():
    schema = {
        "info": {"title": "<script>1</script>", "description": "a & `b<c`"},
        "paths": {"/x": {"get": {"description": "<b>", "responses": {"200": {"description": "<i>"}}}}},
    }
    html = pages.documentation(schema).html
    assert "<script" not in html and "<b>" not in html and "<i>" not in html
    assert "a &amp; <code>b&lt;c</code>" in html


@contextlib.contextmanager
def serving(served, **options):
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(make_app(served, **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join(20)


class Browser:
    """Chromium over its debugging pipe: messages are JSON and end with a zero byte."""

    def __init__(self, profile: Path) -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        # the shell puts the pipe's ends where Chromium looks for them
        command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.read, self.write = os.fdopen(ours_in, "rb", buffering=0), os.fdopen(ours_out, "wb", buffering=0)
        self.rest, self.number, self.session = b"", 0, None
        self.requests: list[str] = []
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "DOM", "Log", "Accessibility"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.write.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self.message()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            elif answer.get("method") == "Runtime.exceptionThrown":
                self.problems.append(str(answer["params"]))
            elif answer.get("method") == "Log.entryAdded" and answer["params"]["entry"]["source"] == "security":
                self.problems.append(answer["params"]["entry"]["text"])

    def message(self):
        while b"\0" not in self.rest:
            chunk = self.read.read(65536)
            assert chunk, "Chromium ended"
            self.rest += chunk
        text, _, self.rest = self.rest.partition(b"\0")
        return json.loads(text)

    def js(self, expression: str):
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        self.js(
            "new Promise((yes, no) => { const end = Date.now() + 20000; (function look() { "
            f"if ({condition}) yes(); else if (Date.now() > end) no(new Error(document.body.innerText)); "
            "else setTimeout(look, 20); })(); })"
        )

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && typeof model !== 'undefined'")

    def choose(self, path: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def press(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.read.close()
        self.write.close()


@pytest.fixture
def browser(tmp_path):
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    made = Browser(tmp_path / "profile")
    yield made
    made.close()


@pytest.mark.slow
def test_in_a_browser(browser, served, red, blue, tmp_path):
    image, other, text = tmp_path / "a red <b>one.png", tmp_path / "blue.jpg", tmp_path / "text.png"
    image.write_bytes(red)
    other.write_bytes(blue)
    text.write_text("hello")
    with serving(served) as url:
        browser.open(url)
        browser.wait("model")
        assert browser.js("document.title") == "colours"

        browser.choose(image)
        browser.wait("document.querySelectorAll('#maps img').length === 1")
        assert browser.js("document.querySelector('#answer p').textContent") == "a red <b>one.png: red"
        rows = browser.js("[...document.querySelectorAll('#answer tbody tr')].map(r => r.innerText)")
        assert rows[0].split() == ["red", "99.9", "%"] and len(rows) == 3
        assert "Calibrated" in browser.js("document.querySelector('caption').textContent")
        assert "model" in browser.js("document.querySelector('#latency').textContent")
        widths = browser.js("[...document.querySelectorAll('.bar')].map(b => b.getBoundingClientRect().width)")
        assert widths[0] > 100 * max(widths[1:]) / 2 > 0
        assert browser.js("document.querySelector('#maps img').alt") == "Heat map of left-half for red"

        # the second method stands beside the first, and goes when its box is cleared
        browser.js("document.querySelectorAll('#choices input')[1].click()")
        browser.wait("document.querySelectorAll('#maps figure').length === 2")
        tops = browser.js("[...document.querySelectorAll('#maps figure')].map(f => f.getBoundingClientRect().top)")
        assert tops[0] == tops[1]
        browser.js(
            "document.querySelector('#target').value = '2'; document.querySelector('#target')"
            ".dispatchEvent(new Event('change'))"
        )
        browser.wait(
            "[...document.querySelectorAll('figcaption')].filter(c => c.textContent.endsWith('blue')).length === 2"
        )
        browser.js("document.querySelectorAll('#choices input')[0].click()")
        browser.wait("document.querySelectorAll('#maps figure').length === 1")
        if folder := os.environ.get("VITKIT_PICTURES"):
            browser.picture(Path(folder) / "page.png")

        browser.choose(other)
        browser.wait("document.querySelector('#answer p').textContent === 'blue.jpg: blue'")
        browser.choose(text)
        browser.wait("document.querySelector('#error').textContent.includes('it holds text')")
        assert browser.js("document.querySelectorAll('#maps figure').length") == 0

        # the keyboard alone gets everywhere, in the order of the page
        browser.js("document.activeElement.blur(); window.getSelection().removeAllRanges()")
        seen = []
        for _ in range(7):
            browser.press("Tab", 9)
            seen.append(
                browser.js(
                    "document.activeElement.id || document.activeElement.value || document.activeElement.textContent"
                )
            )
        assert seen[:5] == ["file", "left-half", "nothing", "target", "About this model"] and "API" in seen
        names = {
            node["role"]["value"]: node["name"]["value"]
            for node in browser.call("Accessibility.getFullAXTree")["nodes"]
            if not node["ignored"]
            and node["role"]["value"] in ("button", "checkbox", "combobox", "group", "main", "alert")
        }
        assert names["combobox"] == "Class to explain" and names["checkbox"] == "nothing"
        assert names["group"] == "Heat maps, side by side"

        browser.call("Page.navigate", url=f"{url}docs")
        browser.wait("document.readyState === 'complete' && document.querySelectorAll('h2').length > 5")
    assert browser.problems == []
    assert all(r.startswith((url, "blob:", "data:", "about:")) for r in browser.requests), browser.requests


@pytest.mark.slow
def test_a_server_with_a_key_asks_for_it(browser, served, red, tmp_path):
    (tmp_path / "x.png").write_bytes(red)
    with serving(served, api_key="s3cret") as url:
        browser.open(url)
        browser.wait("!document.querySelector('#door').hidden")
        assert browser.js("document.activeElement.id") == "key"
        for character in "s3cret":
            browser.press(character, ord(character.upper()), character)
        browser.press("Enter", 13, "\r")
        browser.wait("model && document.querySelector('#door').hidden")
        browser.choose(tmp_path / "x.png")
        browser.wait("document.querySelectorAll('#maps img').length === 1")
    assert browser.problems == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(browser, served, scheme):
    """WCAG 2.1 AA: 4.5 for text, 3 for the borders of controls."""
    ratio = """(a, b) => {
      const light = name => {
        const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim().slice(1);
        const parts = [0, 2, 4].map(i => parseInt(hex.slice(i, i + 2), 16) / 255)
          .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] + 0.05;
      };
      const [x, y] = [light(a), light(b)];
      return Math.max(x, y) / Math.min(x, y);
    }"""
    with serving(served) as url:
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        browser.open(url)
        for ground in ("--ground", "--panel"):
            for text, least in (("--text", 7), ("--soft", 4.5), ("--accent", 4.5), ("--bad", 4.5), ("--line", 3)):
                assert browser.js(f"({ratio})('{text}', '{ground}')") >= least, (text, ground)
        if folder := os.environ.get("VITKIT_PICTURES"):
            browser.picture(Path(folder) / f"{scheme}.png")
