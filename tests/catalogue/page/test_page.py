"""The page of papers in a browser."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import threading
from pathlib import Path

import pytest

from vitkit.catalogue.digests import Digest, Row
from vitkit.catalogue.library import Library
from vitkit.catalogue.page import make_app
from vitkit.testing.browser import browsing, chromium
from vitkit.web import pages
from vitkit.web.server import Server

PAGE = pages.read("vitkit.catalogue.page")
LISTED = "found && document.querySelector('#items').getAttribute('aria-busy') === 'false'"
FOCUS = "document.activeElement.id || document.activeElement.closest('li')?.dataset.id || ''"
TITLES = "[...document.querySelectorAll('#items a.title')].map(a => a.textContent)"


def test_nothing_is_ever_taken_for_markup():
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|DOMParser|srcdoc", PAGE.html)
    assert not re.search(r"\son\w+=|\sstyle=|<script\s|<style\s|javascript:|https?://\w", PAGE.html)
    assert "'unsafe" not in PAGE.policy and PAGE.policy.count("sha256") == 2


def test_the_page_names_its_parts_for_those_who_do_not_see_it():
    ids = set(re.findall(r'\sid="([^"]+)"', PAGE.html))
    controls = set(re.findall(r'<(?:input|select) id="([^"]+)"', PAGE.html))
    assert set(re.findall(r'\sfor="([^"]+)"', PAGE.html)) == controls
    assert set(re.findall(r'aria-labelledby="([^"]+)"', PAGE.html)) <= ids
    assert set(re.findall(r'\$\("([^"]+)"\)', PAGE.html)) <= ids
    for part in (
        '<html lang="en">',
        'role="search"',
        'role="alert"',
        '<p id="count" role="status">',
        "<nav ",
        "<main ",
    ):
        assert part in PAGE.html


@contextlib.contextmanager
def serving(path):
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(make_app(path))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture
def browser(tmp_path):
    if chromium() is None:
        pytest.skip("needs Chromium")
    with browsing(tmp_path / "profile") as made:
        yield made


def window(browser, width, height=800):
    browser.call(
        "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
    )


def fits(browser) -> bool:
    """Whether nothing is wider than the window."""
    return browser.js("document.documentElement.scrollWidth <= innerWidth")


def choose(browser, name, value):
    browser.js(f"$({name!r}).value = {value!r}; $({name!r}).dispatchEvent(new Event('change'))")


@pytest.mark.slow
def test_the_keyboard_is_enough(browser, path, hostile):
    with serving(path) as url:
        window(browser, 1200)
        browser.open(url, LISTED)
        everything = browser.js("document.querySelector('#count').textContent")

        # a query, and one of its papers
        browser.press("/", 191, "/")
        assert browser.js(FOCUS) == "q"
        browser.type("zebras")
        browser.wait("document.querySelector('#count').textContent === '2 papers'")
        assert hostile in browser.js(TITLES)
        browser.press("ArrowDown", 40)
        first = browser.js(FOCUS)
        browser.press("j", 74, "j")
        second = browser.js(FOCUS)
        assert {first, second} == {"9901.00001", "hep-th/9901001"}
        browser.press("j", 74, "j")
        assert browser.js(FOCUS) == second
        browser.press("k", 75, "k")
        browser.press("ArrowDown", 40)
        browser.press("ArrowUp", 38)
        assert browser.js(FOCUS) == first
        browser.press("Enter", 13, "\r")
        browser.wait("opened && !document.querySelector('#detail').hidden")
        assert browser.js(FOCUS) == "detail-title" and browser.js("state.paper") == first
        assert browser.js("document.querySelector('li[aria-current]').dataset.id") == first

        # Escape and Back
        browser.press("Escape", 27)
        browser.wait("document.querySelector('#detail').hidden")
        assert browser.js(FOCUS) == first
        browser.js("history.back()")
        browser.wait(f"opened === {first!r}")
        browser.js("history.back()")
        browser.wait("!opened && state.q === 'zebras'")
        # all that was typed is one step
        browser.js("history.back()")
        browser.wait(f"document.querySelector('#count').textContent === {everything!r}")
        assert browser.js("document.querySelector('#q').value") == ""
        browser.js("history.forward()")
        browser.wait("document.querySelector('#q').value === 'zebras' && found.total === 2")

        # everything is reached by Tab, in the order of the page
        browser.js("document.activeElement.blur(); getSelection().removeAllRanges()")
        browser.call("Page.reload")
        browser.wait(f"document.readyState === 'complete' && {LISTED}")
        seen = []
        for _ in range(10):
            browser.press("Tab", 9)
            seen.append(browser.js("document.activeElement.id || document.activeElement.textContent"))
        assert seen[:7] == ["q", "family", "implemented", "evidence", "section", "sort", "clear"]
        assert hostile in seen and "code" in seen
    assert browser.problems == []


@pytest.mark.slow
def test_filters_and_what_they_leave(browser, path):
    with serving(path) as url:
        window(browser, 1200)
        browser.open(url, LISTED)
        options = browser.js("[...document.querySelector('#implemented').options].map(o => o.textContent)")
        assert options[0] == "any" and options[3] == "not in vitkit (2)"
        choose(browser, "implemented", "yes")
        browser.wait("found.facets.implemented.yes === found.total")
        choose(browser, "evidence", "shown")
        browser.wait("found.papers.every(p => p.evidence === 'shown') && state.evidence")
        assert browser.js("location.search") == "?implemented=yes&evidence=shown"
        choose(browser, "section", "Quantization")
        browser.wait("found.total === 1")
        assert browser.js("document.querySelectorAll('#bar span').length") == 1
        assert "Experiments here: 1 shown" in browser.js("document.querySelector('#glance').textContent")

        # the address is enough to be there again, with the paper open
        browser.js("document.querySelector('#items a.title').click()")
        browser.wait("opened")
        assert browser.js("[...document.querySelectorAll('pre')].map(p => p.textContent)") == [
            "vitkit study ./my-images --recipes vit,gptaq",
            "vitkit show gptaq",
        ]
        assert "shown" in browser.js("document.querySelector('#about .facts').textContent")
        assert browser.js("document.querySelectorAll('#about .scroll tbody tr').length") > 1
        there = browser.js("location.href")
        browser.open("about:blank")
        browser.open(there, f"{LISTED} && opened")
        assert browser.js("document.querySelector('#section').value") == "Quantization"
        assert browser.js("document.title").startswith("GPTAQ")

        browser.js("document.querySelector('#clear').click()")
        browser.wait("found.total > 200")
        assert "section" not in browser.js("location.search")
        # an address that is wrong says so, and can be left
        browser.open(f"{url}?section=gone", "document.querySelector('#error').textContent")
        assert "No section is called 'gone'" in browser.js("document.querySelector('#error').textContent")
        browser.js("document.querySelector('#clear').click()")
        browser.wait(f"{LISTED} && !document.querySelector('#error').textContent")
        browser.open(f"{url}?paper=gone", "document.querySelector('#error').textContent")
        assert browser.js("document.querySelector('#detail').hidden")
    assert all(r.startswith((url, "data:", "about:")) for r in browser.requests), browser.requests


@pytest.mark.slow
def test_hostile_text_is_text(browser, path, hostile):
    with serving(path) as url:
        browser.open(f"{url}?q=zebras&paper=9901.00001", f"{LISTED} && opened")
        assert hostile in browser.js(TITLES)
        assert browser.js("document.querySelector('#detail-title').textContent") == hostile
        assert hostile in browser.js("document.querySelector('#about').textContent")
        # the title of a window is text, too
        assert browser.js("document.title") == f"{' '.join(hostile.split())} · Papers"
        assert browser.js("document.querySelectorAll('main img, main script, main b, main i').length") == 0
        links = browser.js("[...document.querySelectorAll('main a[target]')].map(a => a.href)")
        assert links and all(
            link.startswith(("https://arxiv.org/abs/", "https://example.org/zebras")) for link in links
        )
        assert browser.js("[...document.querySelectorAll('main a[target]')].every(a => a.rel.includes('noopener'))")
        assert "javascript:alert(1)" in browser.js("document.querySelector('#about').textContent")
        assert browser.js("[...$('section').options].some(o => o.value === 'Zebras \"><i>')")
    assert browser.problems == []


@pytest.mark.slow
def test_lines_are_copied_or_selected(browser, path):
    with serving(path) as url:
        browser.open(f"{url}?paper=2504.02692", f"{LISTED} && opened")
        browser.js(
            "window.copied = ''; navigator.clipboard.writeText = async text => { copied = text; };"
            "document.querySelector('.line button').click()"
        )
        browser.wait("document.querySelector('#said').textContent === 'Copied.'")
        assert browser.js("copied") == "vitkit study ./my-images --recipes vit,gptaq"
        browser.js(
            "navigator.clipboard.writeText = async () => { throw new Error('no'); };"
            "document.querySelector('.line button').click()"
        )
        browser.wait("document.querySelector('#said').textContent.includes('selected')")
        assert browser.js("String(getSelection())") == "vitkit study ./my-images --recipes vit,gptaq"
        # options and Python come when they are asked for
        assert not any("api/methods" in request for request in browser.requests)
        browser.js("document.querySelector('#about summary').click()")
        browser.wait("document.querySelector('#about details pre')", seconds=120)
        assert "import gptaq" in browser.js("document.querySelector('#about details').textContent")
    assert browser.problems == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_on_a_telephone(browser, path, scheme):
    with serving(path) as url:
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        window(browser, 360)
        browser.open(url, LISTED)
        assert fits(browser)
        if folder := os.environ.get("VITKIT_PICTURES"):
            browser.picture(Path(folder) / f"papers_{scheme}.png")
        for paper in ("9901.00001", "2504.02692", "2504.16275"):
            browser.open(f"{url}?paper={paper}", f"{LISTED} && opened")
            assert fits(browser)
            # the paper takes the place of the list
            assert not browser.js("document.querySelector('#list').offsetParent")
        browser.press("j", 74, "j")
        browser.wait("opened && opened !== '2504.16275'")
        browser.press("Escape", 27)
        browser.wait("document.querySelector('#detail').hidden && document.querySelector('#list').offsetParent")
        for ground in ("--ground", "--panel"):
            names = ("--text", "--soft", "--accent", "--bad", "--good", "--open")
            for text, least in (*((name, 4.5) for name in names), ("--line", 3)):
                assert browser.contrast(text, ground) >= least, (text, ground)
    assert browser.problems == []


@pytest.mark.slow
def test_ten_thousand_papers(browser, tmp_path, record_property):
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioulnrst", k=draw.randint(3, 9))) for _ in range(3000)]
    weights = [1 / rank for rank in range(1, 3001)]

    def text(length):
        return " ".join(draw.choices(words, weights, k=length))

    rows = tuple(
        Row(
            arxiv_id=f"99{1 + i % 12:02}.{i:05}",
            title=text(9),
            abstract=text(120),
            date=f"1999-{1 + i % 12:02}-01",
            section=f"Section {i % 7}",
            form="table",
        )
        for i in range(10_000)
    )
    with Library(tmp_path / "papers.db") as library:
        library.merge(Digest(rows=rows))
    with serving(tmp_path / "papers.db") as url:
        browser.open(url, LISTED)
        total = browser.js("found.total")
        assert total > 10_000 and browser.js("document.querySelectorAll('#items li').length") == 50
        # the commonest word of all
        browser.js("document.querySelector('#q').focus(); window.typed = performance.now()")
        browser.type(words[0])
        browser.wait(f"state.q === {words[0]!r} && {LISTED} && found.total < {total}")
        took = browser.js("performance.now() - typed")
        record_property("typed_to_shown_ms", round(took))
        print(f"\ntyped to shown: {took:.0f} ms for {browser.js('found.total')} papers")

        # pages, by keyboard as well
        assert browser.js("document.querySelector('#page').textContent") == "1 to 50"
        browser.js("links()[49].focus()")
        browser.press("j", 74, "j")
        browser.wait("found.offset === 50")
        browser.wait("document.activeElement === links()[0]")
        assert "offset=50" in browser.js("location.search")
        browser.press("k", 75, "k")
        browser.wait("found.offset === 0 && document.activeElement === links()[49]")
        browser.js("document.querySelector('#next').click()")
        browser.wait("document.querySelector('#page').textContent === '51 to 100'")
        # a page that is no more is not shown empty
        browser.open(f"{url}?offset=900000", f"{LISTED} && !state.offset")
        assert browser.js("document.querySelectorAll('#items li').length") == 50
    assert browser.problems == []
