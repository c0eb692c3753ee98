from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import socket
import threading
from pathlib import Path

import pytest

from vitkit.deploy.server import make_app
from vitkit.deploy.server.run import Server
from vitkit.testing.browser import browsing, chromium
from vitkit.web import pages

READY = "typeof model !== 'undefined'"
PAGE = pages.read("vitkit.deploy.server")


def test_only_the_pages_own_style_and_script_may_run():
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE.html, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in PAGE.policy
    # neither attributes nor other elements would be allowed by these hashes
    assert not re.search(r"\son\w+=|\sstyle=|<script\s|<style\s|javascript:", PAGE.html)
    assert "innerHTML" not in PAGE.html and "eval" not in PAGE.html


def test_the_page_names_its_parts_for_those_who_do_not_see_it():
    html = PAGE.html
    ids = set(re.findall(r'\sid="([^"]+)"', html))
    assert set(re.findall(r'\s(?:for|aria-labelledby)="([^"]+)"', html)) <= ids
    assert set(re.findall(r'\$\("([^"]+)"\)', html)) <= ids
    assert '<html lang="en">' in html and 'aria-live="polite"' in html and 'role="alert"' in html
    for tag in ("header", "main", "footer", "h1", "h2", "fieldset", "legend", "figcaption", "caption"):
        assert f"<{tag}" in html or f'"{tag}"' in html


@contextlib.contextmanager
def serving(served, **options):
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(make_app(served, **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join(20)


@pytest.fixture
def browser(tmp_path):
    if chromium() is None:
        pytest.skip("needs Chromium")
    with browsing(tmp_path / "profile") as made:
        yield made


@pytest.mark.slow
def test_in_a_browser(browser, served, red, blue, tmp_path):
    image, other, text = tmp_path / "a red <b>one.png", tmp_path / "blue.jpg", tmp_path / "text.png"
    image.write_bytes(red)
    other.write_bytes(blue)
    text.write_text("hello")
    with serving(served) as url:
        browser.open(url, READY)
        browser.wait("model")
        assert browser.js("document.title") == "colours"

        browser.choose("#file", image)
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

        browser.choose("#file", other)
        browser.wait("document.querySelector('#answer p').textContent === 'blue.jpg: blue'")
        browser.choose("#file", text)
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
        browser.open(url, READY)
        browser.wait("!document.querySelector('#door').hidden")
        assert browser.js("document.activeElement.id") == "key"
        browser.type("s3cret")
        browser.press("Enter", 13, "\r")
        browser.wait("model && document.querySelector('#door').hidden")
        browser.choose("#file", tmp_path / "x.png")
        browser.wait("document.querySelectorAll('#maps img').length === 1")
    assert browser.problems == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(browser, served, scheme):
    """WCAG 2.1 AA: 4.5 for text, 3 for the borders of controls."""
    with serving(served) as url:
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        browser.open(url, READY)
        for ground in ("--ground", "--panel"):
            for text, least in (("--text", 7), ("--soft", 4.5), ("--accent", 4.5), ("--bad", 4.5), ("--line", 3)):
                assert browser.contrast(text, ground) >= least, (text, ground)
        if folder := os.environ.get("VITKIT_PICTURES"):
            browser.picture(Path(folder) / f"{scheme}.png")
