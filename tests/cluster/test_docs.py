"""What the documentation shows runs as shown, and so do the examples of the public names."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hpcdist

pytestmark = pytest.mark.any_mpi

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Pages of many programs are run by test_coming_from.py.
ONE_PROGRAM = [page for page in PAGES if not page.name.startswith("from-")]

# Runs the blocks of a page, one after the other, in one process: those with prompts as doctests,
# the others as they are. Takes the page's path.
RUN_PAGE = r"""
import doctest, re, sys

def blocks(text):
    for found in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield text[: found.start(1)].count("\n"), found[1]

class Checker(doctest.OutputChecker):
    # Compares tracebacks, too: code at a prompt comes from <stdin>.
    def check_output(self, want, got, optionflags):
        got = re.sub('File "<doctest .*>"', 'File "<stdin>"', got)
        return super().check_output(want, got, optionflags)

def run_page(path, main):
    text = open(path).read()
    # doctest makes blanks of the tabs it expects: compare words.
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(Checker(), optionflags=flags)
    for line, block in blocks(text):
        if ">>> " not in block:
            exec(compile("\n" * line + block, path, "exec"), main)
            continue
        test = doctest.DocTestParser().get_doctest(block, {}, path, path, line)
        test.globs = main  # not a copy: what it defines is the workers' too
        runner.run(test, clear_globs=False)
    return runner.failures

failures = run_page(sys.argv[1], globals())
sys.exit(failures > 0)
"""

RUN_DOCTESTS = r"""
import doctest, sys
import hpcdist

globals().update((name, getattr(hpcdist, name)) for name in sys.argv[1:])

failed = []
for name in sys.argv[1:]:
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    # Without a module: they name the facade as theirs, where doctest would not find their methods.
    finder = doctest.DocTestFinder(exclude_empty=True)
    for test in finder.find(getattr(hpcdist, name), name, module=False):
        test.globs = globals()
        runner.run(test, clear_globs=False)
    if runner.failures:
        failed.append(name)
    hpcdist.shutdown()
sys.exit(" ".join(failed) or 0)
"""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("page", ONE_PROGRAM, ids=name_of)
def test_the_code_of_a_page_runs(page: Path, script: Callable[..., Any]) -> None:
    if "```python" not in page.read_text():
        pytest.skip("no code in it")
    done = script(RUN_PAGE, args=[str(page)], timeout=120)
    assert done.rc == 0, f"{done.out}\n{done.err}"


@pytest.mark.timeout(240)
def test_the_examples_of_public_names_run(script: Callable[..., Any]) -> None:
    homes = hpcdist._HOME
    done = script(RUN_DOCTESTS, args=sorted(homes), timeout=200)
    assert done.rc == 0, f"{done.out}\n{done.err}"


def test_the_readme_shows_the_program_of_the_demo() -> None:
    text = (ROOT / "README.md").read_text()
    shown = re.search(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert shown is not None
    assert shown[1] == (ROOT / "docs" / "examples" / "first.py").read_text()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing == []
