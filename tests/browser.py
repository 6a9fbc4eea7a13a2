"""A headless Chromium, driven over its debugging pipe with nothing but the standard library."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
).split()


def find() -> str | None:
    """The program, where there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a browser of its own.

    Attributes:
        errors: what the page wrote to the console as an error, and exceptions that nothing caught.
        requests: addresses that the page asked for, its own file and data apart.
    """

    def __init__(self, program: str, width: int = 1440, height: int = 900) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._profile = tempfile.TemporaryDirectory()
        hear, self._write = os.pipe()  # Chromium reads its commands from descriptor 3 and answers on 4
        self._read, say = os.pipe()
        command = [program, *FLAGS, f"--user-data-dir={self._profile.name}", f"--window-size={width},{height}"]
        moved = (
            "import os, sys; from fcntl import F_DUPFD, fcntl; "
            f"a, b = (fcntl(f, F_DUPFD, 10) for f in ({hear}, {say})); "
            "os.dup2(a, 3); os.dup2(b, 4); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", moved, *command, "about:blank"], pass_fds=(hear, say), stderr=subprocess.DEVNULL
        )
        os.close(hear)
        os.close(say)
        self._left, self._count, self._session, self._loaded = b"", 0, "", False
        try:
            self._begin(width, height)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def _begin(self, width: int, height: int) -> None:
        """Opens the page, without a network."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._read)
        os.close(self._write)
        for _ in range(20):  # helpers of the browser may still be writing there
            try:
                return self._profile.cleanup()
            except OSError:
                time.sleep(0.1)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the debugging protocol, and its answer."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(60)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self, seconds: float) -> dict[str, Any]:
        """The next message; events are noted on the way."""
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._read], [], [], seconds)
            assert ready, "the browser does not answer"
            part = os.read(self._read, 1 << 20)
            assert part, "the browser has ended"
            self._left += part
        text, _, self._left = self._left.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"].get("exception", {}).get("description", params)))
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(str(params["args"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(str(params["entry"]["text"]))
        elif event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("file:", "data:", "about:", "blob:")):
                self.requests.append(url)

    def open(self, path: Path) -> float:
        """Loads a file and returns after how many seconds it could be used."""
        start, self._loaded = time.perf_counter(), False
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self._loaded:
            self._next(60)
        self.value("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
        return time.perf_counter() - start

    def value(self, script: str) -> Any:
        """What a JavaScript expression, or the promise it gives, evaluates to."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def metric(self, name: str) -> float:
        """A figure of the page's, as ``ThreadTime``: seconds of processor time of its main thread."""
        figures = self.call("Performance.getMetrics")["metrics"]
        return next(float(figure["value"]) for figure in figures if figure["name"] == name)

    def click(self, selector: str) -> None:
        """A real click on the middle of the first element that fits."""
        place = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{place}.scrollIntoView({{block: 'nearest'}})")
        box = self.value(f"(r => [r.left + r.width / 2, r.top + r.height / 2])({place}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)
        self.settle()

    def type(self, text: str) -> None:
        """Keys into what has the focus; a line end is Enter."""
        for char in text:
            enter = char == "\n"
            keys = {"key": "Enter" if enter else char, "text": "\r" if enter else char}
            code = {"windowsVirtualKeyCode": 13} if enter else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", **keys, **code)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=keys["key"], **code)
        self.settle()

    def settle(self) -> None:
        """Waits until what was set off is drawn."""
        self.value("new Promise(done => setTimeout(() => requestAnimationFrame(done), 50))")

    def dark(self, on: bool = True) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
        return path
