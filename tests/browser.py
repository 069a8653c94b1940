"""A page in Debian's Chromium without a window: looked at, clicked and typed into over the DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

LONGEST = 60.0


def program() -> str:
    """Where Chromium is; the test fails where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    assert found is not None, "no chromium: apt-get install chromium"
    return found


class Browser:
    """One page; messages go through a pair of pipes, so that no port is opened."""

    def __init__(self, scratch: Path, width: int = 1280, height: int = 900) -> None:
        told, self._tell = os.pipe()
        self._hear, said = os.pipe()
        flags = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--no-first-run",
        )
        own = f"--user-data-dir={scratch / 'profile'}"
        size = f"--window-size={width},{height}"
        # the protocol's pipes are descriptors 3 and 4
        line = f'exec "$@" 3<&{told} 4>&{said}'
        self._process = subprocess.Popen(
            ["bash", "-c", line, "bash", program(), *flags, own, size, "--remote-debugging-pipe"],
            pass_fds=(told, said),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(told)
        os.close(said)
        self._buffer, self._asked, self._session = b"", 0, ""
        self.complaints: list[str] = []
        (page,) = (t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
        found = self.ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._session = ""
        self.ask("Browser.close")
        self._process.wait(LONGEST)
        os.close(self._tell)
        os.close(self._hear)

    def ask(self, method: str, **parameters: Any) -> Any:
        """Send a command and wait for what it gives."""
        self._asked += 1
        message = {"id": self._asked, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._tell, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + LONGEST
        while True:
            answer = self._next(until)
            if answer.get("id") == self._asked:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            if answer.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.complaints.append(json.dumps(answer["params"]))

    def _next(self, until: float) -> Any:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._hear], [], [], max(0.0, until - time.monotonic()))
            assert ready, "the browser does not answer"
            got = os.read(self._hear, 1 << 16)
            assert got, "the browser has ended"
            self._buffer += got
        line, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(line)

    def open(self, page: Path, fragment: str = "") -> None:
        """Show a page and wait until it is there."""
        self.ask("Page.navigate", url="about:blank")
        self.ask("Page.navigate", url=page.as_uri() + fragment)
        until = time.monotonic() + LONGEST
        while self.see("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < until

    def see(self, expression: str) -> Any:
        """What a JavaScript expression gives on the page."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, *keys: str) -> None:
        """Press keys one after the other, as a person would."""
        for key in keys:
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            self.ask("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, text=text,
                     windowsVirtualKeyCode={"Enter": 13, "Tab": 9, "Escape": 27}.get(key, 0))  # fmt: skip
            self.ask("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    def click(self, selector: str) -> None:
        """Press the mouse in the middle of an element."""
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def middle(self, selector: str) -> tuple[float, float]:
        """Where an element is in the window, scrolled there if it has to be."""
        x, y = self.see(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect();"
            f" return [b.x + b.width / 2, b.y + b.height / 2] }})"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        return x, y

    def picture(self, x: float, y: float, width: float = 1, height: float = 1) -> bytes:
        """What the window shows there, as a PNG."""
        left, top = self.see("[scrollX, scrollY]")
        clip = {"x": x + left, "y": y + top, "width": width, "height": height, "scale": 1}
        shot = self.ask("Page.captureScreenshot", format="png", clip=clip)
        return base64.b64decode(shot["data"])
