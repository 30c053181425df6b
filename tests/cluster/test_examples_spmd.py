"""The examples that use `spmd`, and the pages about it, run as a user would run them."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
EXAMPLES = ("heat.py", "fft.py")
PAGES = ("spmd.md", "executor.md")


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("ranks", [None, 3], ids=["by itself", "mpirun"])
def test_example(name: str, ranks: int | None, script: Callable[..., Any]) -> None:
    done = script((DOCS / "examples" / name).read_text(), ranks=ranks)
    assert done.rc == 0, done.err
    workers = 4 if ranks is None else ranks - 1
    assert f"{workers} workers" in done.out


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.M)
    assert blocks
    driver = tmp_path / "page.py"
    driver.write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, driver], cwd=DOCS.parent, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr + done.stdout
