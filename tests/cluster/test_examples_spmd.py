"""The examples that use `spmd`, and the page about it, run as a user would run them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
EXAMPLES = ("heat.py", "fft.py")


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("ranks", [None, 3], ids=["by itself", "mpirun"])
def test_example(name: str, ranks: int | None, script: Callable[..., Any]) -> None:
    done = script((DOCS / "examples" / name).read_text(), ranks=ranks)
    assert done.rc == 0, done.err
    workers = 4 if ranks is None else ranks - 1
    assert f"{workers} workers" in done.out


def test_the_page(script: Callable[..., Any]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "spmd.md").read_text(), re.DOTALL | re.M)
    assert blocks
    done = script("\n".join(blocks))
    assert done.rc == 0, done.err + done.out
