"""A real browser, driven by its debugging pipe: for pages of ours, where there is a chromium."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

COMMAND = shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """A page in a chromium without a window.

    Args:
        url: What it shows.
        profile: A folder for what it keeps.
        dark: Whether its user likes pages dark.
    """

    def __init__(self, url: str, profile: Path, dark: bool = False) -> None:
        assert COMMAND is not None
        their_end, self._to = os.pipe()
        self._from, their_other = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += ["--window-size=1100,900", f"--user-data-dir={profile}"]
        options += ["--remote-debugging-pipe"]
        words = [COMMAND, *options]
        # It reads from descriptor 3 and writes to 4.
        dance = f'exec "$@" 3<&{their_end} 4>&{their_other} {their_end}<&- {their_other}>&-'
        self._process = subprocess.Popen(
            ["bash", "-c", dance, "bash", *words],
            pass_fds=(their_end, their_other),
            env={**os.environ, "HOME": str(profile)},
            stderr=subprocess.DEVNULL,
        )
        os.close(their_end)
        os.close(their_other)
        self._number = 0
        self._rest = b""
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[feature])
        self._call("Page.navigate", url=url)

    def _call(self, method: str, **params: Any) -> Any:
        self._number += 1
        said: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            said["sessionId"] = self._session
        os.write(self._to, json.dumps(said).encode() + b"\0")
        while True:
            heard = self._hear()
            if heard.get("id") == self._number:
                assert "error" not in heard, heard["error"]
                return heard["result"]

    def _hear(self) -> Any:
        while b"\0" not in self._rest:
            more = os.read(self._from, 65536)
            assert more, "the browser has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def evaluate(self, expression: str) -> Any:
        """Return what a JavaScript expression gives in the page."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def text(self) -> str:
        """Return what the page says."""
        return str(self.evaluate("document.body ? document.body.innerText : ''"))

    def picture(self) -> bytes:
        """Take a picture of the page."""
        return base64.b64decode(self._call("Page.captureScreenshot")["data"])

    def close(self) -> None:
        """End the browser."""
        self._session = None
        self._call("Browser.close")
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
