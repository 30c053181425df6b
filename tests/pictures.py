"""Make the pictures of the docs: `python -m tests.pictures`, where there is a chromium."""

import html
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import hpcdist
from tests.browser import Browser

_DOCS = Path(__file__).parents[1] / "docs"
_PICTURES = _DOCS / "pictures"
_LOOKS_FOR = 25  # seconds until the page has something to show


def simulate(k: int) -> float:
    """Take a while."""
    time.sleep(1 + k % 3)
    return k / 3


def exchange(other: int) -> None:
    """Talk to another worker now and then."""
    while True:
        hpcdist.remotecall_fetch(len, other, bytes(100_000))
        hpcdist.sleep(0.2)


def compute(k: int) -> float:
    """Compute for some milliseconds, the longer the greater `k` is."""
    return sum(i**0.5 for i in range(20_000 + 2_000 * k))


def terminal(text: str) -> str:
    """Draw what stands on a terminal, as SVG."""
    lines = text.rstrip("\n").split("\n")
    width, height = 8.4 * max(map(len, lines)) + 24, 18 * len(lines) + 20
    rows = "".join(
        f'<text x="12" y="{24 + 18 * k}" xml:space="preserve">{html.escape(line)}</text>\n'
        for k, line in enumerate(lines)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        f'width="{width:.0f}" height="{height}">\n'
        '<rect width="100%" height="100%" rx="6" fill="#1d2330"/>\n'
        '<g font-family="monospace" font-size="14" fill="#d8dee9">\n'
        f"{rows}</g>\n</svg>\n"
    )


def command(*words: str) -> str:
    """Run a command of hpcdist's, and return what it prints."""
    argv = [sys.executable, "-m", "hpcdist", *words]
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout


def dashboard_and_top(profile: Path) -> None:
    """Have some work shown: in browsers of both kinds, and on a terminal."""
    pids = hpcdist.addprocs(6)
    with hpcdist.dashboard() as page:
        mapping = lambda: hpcdist.pmap(
            simulate, range(400), pool=hpcdist.WorkerPool(pids[:4]), batch_size=1
        )
        threading.Thread(target=mapping, daemon=True).start()
        for k in (4, 5):
            hpcdist.remote_do(exchange, pids[k], pids[9 - k])
        browsers = [Browser(page.url, profile / str(dark), dark=dark) for dark in (False, True)]
        time.sleep(_LOOKS_FOR)
        for browser, name in zip(browsers, ("dashboard", "dashboard-dark"), strict=True):
            (_PICTURES / f"{name}.png").write_bytes(browser.picture())
            browser.close()
        shown = command("top", str(os.getpid()), "--once")
        (_PICTURES / "top.svg").write_text(terminal(f"$ hpcdist top\n{shown}"))
    hpcdist.interrupt(*pids)
    hpcdist.shutdown()


def trace(profile: Path) -> None:
    """Trace a map and a reduction, and take a picture of the page made of it."""
    hpcdist.addprocs(4)
    file, page = profile / "run.json", profile / "run.html"
    with hpcdist.trace(file):
        hpcdist.pmap(compute, range(60))
        hpcdist.reduce(max, compute, 5)
    command("trace", str(file), "-o", str(page))
    browser = Browser(page.as_uri(), profile / "trace")
    time.sleep(2)
    (_PICTURES / "trace.png").write_bytes(browser.picture())
    browser.close()
    hpcdist.shutdown()


def main() -> None:
    """Make all of them."""
    with tempfile.TemporaryDirectory() as folder:
        dashboard_and_top(Path(folder))
        trace(Path(folder))
    subprocess.run(  # a program of its own: it draws
        [sys.executable, _DOCS / "examples" / "mandelbrot.py", _PICTURES / "mandelbrot.png"],
        check=True,
    )


if __name__ == "__main__":
    main()
