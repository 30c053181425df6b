"""What the pages say of the code, where a test can tell whether it is so."""

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hpcdist
import hpcdist.managers
import hpcdist.testing
from hpcdist import _config

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def test_what_a_star_import_leaves_out() -> None:
    text = (DOCS / "coming-from-julia.md").read_text()
    (said,) = re.findall(
        r"leaves out names that would hide everyday ones: (.*?)\. Write", text, re.S
    )
    assert set(re.findall(r"`(\w+)`", said)) == hpcdist._SHADOWING
    assert not hpcdist._SHADOWING & set(hpcdist.__all__)


def test_every_page_is_in_the_table_of_contents() -> None:
    """Each page is in the navigation, and in the table of the first page."""
    pages = {page.name for page in DOCS.glob("*.md")}
    navigation = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r": ([\w-]+\.md)$", navigation, re.MULTILINE))
    assert listed == pages
    index = (DOCS / "index.md").read_text()
    table = set(re.findall(r"^\| \[[^\]]+\]\(([\w-]+\.md)\)", index, re.MULTILINE))
    assert table | {"index.md"} == pages


REFERENCE = runpy.run_path(str(DOCS / "reference.py"))  # the hook of mkdocs: see `make lint`


def test_every_public_name_is_in_the_reference_once() -> None:
    names = REFERENCE["names_in"]((DOCS / "reference.md").read_text())
    assert len(names) == len(set(names))
    theirs = {f"managers.{name}" for name in hpcdist.managers.__all__}
    theirs |= {f"testing.{name}" for name in hpcdist.testing.__all__}
    assert set(names) == set(hpcdist._HOME) | theirs


def test_the_reference_shows_docstrings_with_their_members() -> None:
    page = REFERENCE["on_page_markdown"]((DOCS / "reference.md").read_text())
    for name in (*hpcdist._HOME, "managers.Scheduler", "testing.Simulation"):
        begins = REFERENCE["doc_of"](REFERENCE["find"](name)).partition("\n")[0]
        assert f"### {name} {{#{name}}}\n" in page
        assert begins in page, name
    for member in ("Future.add_done_callback", "Launch.wait", "RemoteChannel.take", "Pool.starmap"):
        assert f"#### {member} {{#{member}}}\n" in page
    assert ":::" not in page
    assert page.count("```") % 2 == 0


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith(("http://", "https://", "mailto:")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def launches(block: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The managers of a program for a cluster, and the options given with them."""
    for call in ast.walk(ast.parse(block)):
        if isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Call):
            made = call.args[0]
            if isinstance(made.func, ast.Name) and made.func.id.endswith("Manager"):
                manager = getattr(hpcdist, made.func.id)(*map(ast.literal_eval, made.args))
                yield manager, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}


def test_options_that_pages_show_for_clusters_are_known() -> None:
    seen = 0
    for page in [*DOCS.glob("*.md"), ROOT / "README.md"]:
        for block in re.findall(r"^```py\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            for manager, options in launches(block):
                if isinstance(manager, hpcdist.SlurmManager):
                    options["mpi"] = "pmi2"  # or else Slurm would be asked
                for of_executor in ("name", "retries"):
                    options.pop(of_executor, None)
                seen += "hpcdist" in manager.job_script(**options)
    assert seen > 10


def test_pictures_are_shown_and_there() -> None:
    shown = {
        name
        for page in DOCS.glob("*.md")
        for name in re.findall(r"!\[[^\]]+\]\(pictures/([\w.-]+)\)", page.read_text())
    }
    assert shown == {file.name for file in (DOCS / "pictures").iterdir()}


def anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub and mkdocs make it."""
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


def test_anchors_that_mkdocs_does_not_see_are_there() -> None:
    seen = 0
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target, part in re.findall(r"\]\(([^)#:]+)#([^)]+)\)", (ROOT / name).read_text()):
            seen += 1
            headings = re.findall(r"^#+ (.+)$", (ROOT / target).read_text(), re.MULTILINE)
            assert part in map(anchor, headings), f"{name}: {target}#{part}"
    assert seen


def test_all_rooms_of_design_are_there() -> None:
    """Rooms that the design names exist, and the other way round."""
    text = (DOCS / "design.md").read_text()
    table = text[text.index("| | room |") : text.index("## The words")]
    named = set(re.findall(r"^\| \d+ \| (.+?) \|", table, re.MULTILINE))
    named = {room for cell in named for room in re.findall(r"`(\w+)`", cell)} - {"__init__"}
    package = ROOT / "hpcdist"
    rooms = {path.relative_to(package).parts[0] for path in package.rglob("*.py")}
    rooms = {room.removesuffix(".py") for room in rooms}
    assert named == rooms - {"__init__", "__main__"}


def source() -> str:
    """All our modules, texts that stand on several lines put together."""
    text = "\n".join(path.read_text() for path in (ROOT / "hpcdist").rglob("*.py"))
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_every_setting_is_on_the_page_with_its_default() -> None:
    page = (DOCS / "settings.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `([^`]+)` \|", page, re.MULTILINE)
    keys = {name: str(default) for name, (_, default) in _config._KEYS.items()}
    assert {name: default for name, _, default in rows} == keys
    assert all(variable == f"HPCDIST_{name.upper()}" for name, variable, _ in rows)
    tables = set(re.findall(r"^\| `\[(\w+)[\].]", page, re.MULTILINE))
    assert tables == set(_config._TABLES)


def test_every_variable_of_ours_is_a_setting_or_internal() -> None:
    known = {f"HPCDIST_{name.upper()}" for name in _config._KEYS}
    internal = {f"HPCDIST_{name}" for name in _config._INTERNAL}
    named = set(re.findall(r"HPCDIST_[A-Z_]+[A-Z]", source()))
    gone = {f"HPCDIST_{name}" for name in _config._GONE} | {"HPCDIST_TEST"}
    assert named <= known | internal | gone
    for page in [*DOCS.glob("*.md"), ROOT / "README.md"]:
        assert set(re.findall(r"HPCDIST_[A-Z_]+[A-Z]", page.read_text())) <= known, page.name


# What programs of others say.
OTHERS = (
    *("mpiexec has detected an attempt to run as root", "There are not enough slots available"),
    *("cannot pickle '_thread.lock' object", "SIGBUS", "SIGSEGV", "NameError", "No module named"),
    *("killed by SIGKILL", "assignment destination is read-only"),
)


def test_messages_in_troubleshooting_are_ours_to_the_letter() -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    text = source()
    seen = 0
    for first in re.findall(r"^\| (.*?) \|", page, re.MULTILINE):
        for message in re.findall(r"`([^`]+)`", first):
            for part in filter(None, map(str.strip, message.split("…"))):
                seen += 1
                assert part in text or part.startswith(OTHERS), part
    assert seen > 20
