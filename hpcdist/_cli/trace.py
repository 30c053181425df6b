"""`hpcdist trace FILE -o run.html`: a page that says what a trace tells."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from hpcdist._cli.schedulers import leave, print_line
from hpcdist._cli.trace_page import page
from hpcdist._cli.trace_summary import summarize
from hpcdist._events.chrome import convert

_PICKLED = b"\x80"


def main(options: argparse.Namespace) -> int:
    """Make the page."""
    out = options.output or os.path.splitext(options.file)[0] + ".html"
    try:
        if os.path.exists(out) and os.path.samefile(options.file, out):
            leave(options, 2, f"{out} is the trace itself: say -o PAGE.html")
        events = read_trace(options.file)
        text = page(summarize(events), os.path.basename(options.file))
        with open(out, "w", encoding="utf-8") as file:
            file.write(text)
    except (OSError, ValueError) as exc:
        leave(options, 1, str(exc))
    print_line(f"wrote {out}")
    return 0


def read_trace(path: str) -> list[dict[str, Any]]:
    """Read the events of a trace, also of one that was broken off.

    Raises:
        OSError: It cannot be read.
        ValueError: It is something else.
    """
    with open(path, "rb") as raw:
        if raw.peek(1)[:1] == _PICKLED:  # it grew while the program ran, which was then killed
            text = "".join(convert(raw))
        else:
            text = raw.read().decode(errors="replace")
    try:
        found = _parsed(text)
    except ValueError:
        found = _up_to_the_break(text)
    if isinstance(found, dict):  # the format's other form
        found = found.get("traceEvents")
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ValueError(f"{path} is no trace; `with hpcdist.trace(FILE):` makes one")
    return found


def _up_to_the_break(text: str) -> Any:
    """Read a file that was broken off: the format allows that. Each line has an event."""
    last = text.rfind("},\n")
    try:
        return _parsed(text[: last + 1] + "]") if last >= 0 else None
    except ValueError:
        return None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as exc:
        raise ValueError("it is nested too deeply") from exc
