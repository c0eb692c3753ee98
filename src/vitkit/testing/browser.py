"""A real browser for tests of pages: Chromium without a window, driven over its debugging pipe."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"),
)

_CONTRAST = """(a, b) => {
  const light = name => {
    const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim().slice(1);
    const parts = [0, 2, 4].map(i => parseInt(hex.slice(i, i + 2), 16) / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] + 0.05;
  };
  const [x, y] = [light(a), light(b)];
  return Math.max(x, y) / Math.min(x, y);
}"""


def chromium() -> str | None:
    """The program, if there is one on the path."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """A browser with one empty page, closed at the end.

    Args:
        profile: a folder for what it writes.

    Raises: FileNotFoundError without Chromium.
    """
    browser = Browser(profile)
    try:
        yield browser
    finally:
        browser.close()


class Browser:
    """One page. See :func:`browsing`.

    Attributes:
        requests: addresses the page has asked for.
        problems: errors nobody caught, errors on the console, and what the page's policy forbade.
    """

    def __init__(self, profile: Path) -> None:
        program = chromium()
        if program is None:
            raise FileNotFoundError("Chromium is not on the path.")
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        # the shell puts the pipe's ends where Chromium looks for them
        command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._read, self._write = os.fdopen(ours_in, "rb", buffering=0), os.fdopen(ours_out, "wb", buffering=0)
        self._rest, self._number, self._session = b"", 0, ""
        self.requests: list[str] = []
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "DOM", "Log", "Accessibility"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer.get("method"), answer.get("params", {}))

    def js(self, expression: str) -> Any:
        """The value of an expression, awaited."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = 20) -> None:
        """Until a condition of the page holds; fails with the page's text if that takes too long."""
        self.js(
            f"new Promise((yes, no) => {{ const end = Date.now() + {1000 * seconds}; (function look() {{ "
            f"if ({condition}) yes(); else if (Date.now() > end) no(new Error(document.body.innerText)); "
            "else setTimeout(look, 20); })(); })"
        )

    def open(self, url: str, ready: str = "true") -> None:
        """Go to an address, and wait until the page is complete and ``ready`` holds."""
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && ({ready})")

    def choose(self, selector: str, path: Path) -> None:
        """Put a file into a file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def press(self, key: str, code: int, text: str = "") -> None:
        """One key. Its code is that of Windows, e.g. 9 for Tab; ``text`` is what it writes."""
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def type(self, text: str) -> None:
        """One key after the other."""
        for character in text:
            self.press(character, ord(character.upper()), character)

    def contrast(self, a: str, b: str) -> float:
        """The contrast of two colours by WCAG 2.1, given by the names of the style's variables."""
        return self.js(f"({_CONTRAST})('{a}', '{b}')")

    def picture(self, path: Path) -> None:
        """The page as PNG, as far down as it goes."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def close(self) -> None:
        """End the browser."""
        self.process.kill()
        self.process.wait()
        self._read.close()
        self._write.close()

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            chunk = self._read.read(65536)
            assert chunk, "Chromium ended"
            self._rest += chunk
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def _note(self, event: str | None, about: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.problems.append(str(about))
        elif event == "Runtime.consoleAPICalled" and about["type"] == "error":
            self.problems.append(str(about["args"]))
        elif event == "Log.entryAdded" and about["entry"]["source"] == "security":
            self.problems.append(about["entry"]["text"])
