"""Make the pictures of the docs: `python -m tests.pictures`, where there is a chromium."""

import tempfile
import threading
import time
from pathlib import Path

import hpcdist
from tests.browser import Browser

_PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "dashboard.png"
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


def main() -> None:
    """Have some work shown, and take a picture of it."""
    pids = hpcdist.addprocs(6)
    with hpcdist.dashboard() as page, tempfile.TemporaryDirectory() as profile:
        mapping = lambda: hpcdist.pmap(
            simulate, range(400), pool=hpcdist.WorkerPool(pids[:4]), batch_size=1
        )
        threading.Thread(target=mapping, daemon=True).start()
        for k in (4, 5):
            hpcdist.remote_do(exchange, pids[k], pids[9 - k])
        browser = Browser(page.url, Path(profile))
        time.sleep(_LOOKS_FOR)
        _PICTURE.write_bytes(browser.picture())
        browser.close()
    hpcdist.interrupt(*pids)


if __name__ == "__main__":
    main()
