"""Writes the reference: a hook of mkdocs, for pages that ask for docstrings: `::: name name`."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import hpcdist

_ASKS = re.compile(r"^:::((?: [\w.]+)+)$", re.MULTILINE)
_SECTION = re.compile(r"^(Args|Attributes|Example|Raises|Returns):$")
_TITLES = {"Args": "Arguments", "Attributes": "Attributes"}
_ENTRY = re.compile(r"^(\*{0,2}\w[\w., *]*): (.*)")
# Of classes that have methods for hpcdist's own use, those that are the user's.
_OF_USERS = {
    "Executor": "submit map shutdown",
    "Launch": "wait cancel log workers_wanted history",
    "Pool": "apply apply_async map map_async imap imap_unordered starmap starmap_async close "
    "terminate join",
    "managers.BatchManager": "job_script",
    **dict.fromkeys(["LSFManager", "PBSManager", "SGEManager", "SlurmManager"], "job_script"),
    **dict.fromkeys(["ElasticManager", "LocalManager", "MPIManager", "SSHManager"], ""),
}
# Nobody else makes these: how they are made is no matter of users.
_MADE_BY_US = {"Dashboard", "JobFuture", "Launch", "Removal", "RemoteValue", "WorkerStatus"}


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put docstrings into a page: mkdocs calls it for each."""
    return _ASKS.sub(lambda asked: "\n".join(map(entry, asked[1].split())), markdown)


def names_in(markdown: str) -> list[str]:
    """List the names that a page asks for."""
    return [name for asked in _ASKS.findall(markdown) for name in asked.split()]


def find(name: str) -> Any:
    """Find what a public name stands for, without making this process a driver."""
    *folder, last = name.split(".")
    if folder:
        return getattr(importlib.import_module(f"hpcdist.{folder[0]}"), last)
    return getattr(importlib.import_module(f"hpcdist.{hpcdist._HOME[name]}"), name)


def entry(name: str) -> str:
    """Write what the reference says of a public name."""
    thing = find(name)
    parts = [f"### {name} {{#{name}}}", *_own(name, thing)]
    for member, what in _members(name, thing):
        parts += [f"#### {name}.{member} {{#{name}.{member}}}", *_own(f"{name}.{member}", what)]
    return "\n\n".join(parts) + "\n"


def _own(name: str, thing: Any) -> Iterator[str]:
    shown = _signature(name, thing)
    if shown:
        yield f"```python\n{shown}\n```"
    yield _page_of(doc_of(thing))


def doc_of(thing: Any) -> str:
    """Return its docstring; of a constant, what it is."""
    return f"`{thing!r}`" if isinstance(thing, str) else inspect.getdoc(thing) or ""


def _members(name: str, thing: Any) -> Iterator[tuple[str, Any]]:
    cls = thing if isinstance(thing, type) else type(thing)
    if not cls.__module__.startswith("hpcdist") or inspect.isroutine(thing):
        return
    wanted = _OF_USERS[name].split() if name in _OF_USERS else None
    seen = set()
    for base in cls.__mro__:
        if not base.__module__.startswith("hpcdist"):
            continue
        for member, what in vars(base).items():
            if member.startswith("_") or member in seen or not _is_documented(what):
                continue
            if wanted is None or member in wanted:
                seen.add(member)
                yield member, what


def _is_documented(what: Any) -> bool:
    what = what.__func__ if isinstance(what, classmethod | staticmethod) else what
    return (inspect.isfunction(what) or isinstance(what, property)) and bool(what.__doc__)


def _signature(name: str, thing: Any) -> str:
    """Say how it is called, without types: a line, or one for each argument where that is long."""
    if isinstance(thing, property | str) or name in _MADE_BY_US:
        return ""
    thing = thing.__func__ if isinstance(thing, classmethod | staticmethod) else thing
    try:
        parameters = [*inspect.signature(thing).parameters.values()]
    except ValueError:  # an exception of no arguments of its own
        return ""
    if parameters and parameters[0].name == "self":
        parameters = parameters[1:]
    untyped = [p.replace(annotation=p.empty) for p in parameters]
    words = str(inspect.Signature(untyped))[1:-1]
    words = re.sub(r"<object object at 0x\w+>", "...", words)
    shown = f"{name}({words})"
    if len(shown) > 90:
        shown = f"{name}(\n    " + words.replace(", ", ",\n    ") + ",\n)"
    return shown


def _page_of(doc: str) -> str:
    """Turn a docstring into Markdown: its sections into lists, its examples into blocks."""
    lines: list[str] = []
    section = ""
    for line in doc.splitlines():
        begins = _SECTION.match(line)
        if begins:
            if section == "Example":
                lines += ["```", ""]
            section = begins[1]
            lines += _heading(section)
        elif section and line and not line.startswith(" "):
            lines += ["```", ""] if section == "Example" else [""]
            section = ""
            lines.append(line)
        else:
            lines.append(_line(section, line))
    if section == "Example":
        lines.append("```")
    return _loose_examples("\n".join(lines))


def _loose_examples(text: str) -> str:
    """Make blocks of the examples that stand between sentences."""
    return re.sub(r"(?<=\n\n)>>> (?:.+\n?)+", r"```python\n\g<0>\n```\n", text)


def _heading(section: str) -> list[str]:
    if section == "Example":
        return ["", "```python"]
    return ["", f"**{_TITLES.get(section, section)}**", ""]


def _line(section: str, line: str) -> str:
    if section == "Example":
        return line.removeprefix("    ")
    text = line.removeprefix("    ") if section else line
    named = _ENTRY.match(text) if section in ("Args", "Attributes", "Raises") else None
    if named:
        return f"- `{named[1]}`: {named[2]}"
    return text
