"""Run tests side by side; run what failed once more, alone.

    python -m tests._once_more -n 4 -- tests/unit tests/cluster

Arguments before `--` are for the first run only. Side by side, more processes than cores make a
machine slow, and now and then a test that waits for the scheduler's or the kernel's word gives up
too soon. The second run tells such a fault from others, and excuses none: it is a fault of the
test, or of something that shows only under load.
"""

import json
import subprocess
import sys
from pathlib import Path

_FAILED = 1  # pytest's exit code where tests have failed; others say that it could not do its work
_MANY = 20  # more is no bad luck
_CACHE = Path(".pytest_cache/v/cache/lastfailed")


def failed() -> set[str]:
    """Return the tests that failed in the last run."""
    try:
        return set(json.loads(_CACHE.read_text()))
    except FileNotFoundError:
        return set()


def pytest(*arguments: str) -> int:
    """Run pytest; return its exit code."""
    return subprocess.call([sys.executable, "-m", "pytest", *arguments])


def main(arguments: list[str]) -> int:
    """Return the exit code of the first run: what failed in it has failed."""
    at = arguments.index("--")
    first, common = arguments[:at], arguments[at + 1 :]
    _CACHE.unlink(missing_ok=True)
    code = pytest(*first, *common)
    suspects = failed()
    if code != _FAILED or not 0 < len(suspects) <= _MANY:
        return code
    print(f"== tests that failed side by side, once more: {len(suspects)}", flush=True)
    pytest("--last-failed", "--last-failed-no-failures", "none", *common)
    for name in sorted(suspects - failed()):
        print(f"PASSED ONLY ALONE {name}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
