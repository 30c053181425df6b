"""Put the item it belongs to on an error: its index, and a short form of it."""

from __future__ import annotations

import reprlib

_short = reprlib.Repr()
_short.maxother = _short.maxstring = 60


_OURS = "_hpcdist_item"  # in the __dict__ of an error: the note, and which attributes are ours


def name_item(
    error: BaseException, index: int, item: object, what: str = "", whole: str = "map"
) -> None:
    """Put an item on an error: as a note, and as `.index` and `.item`.

    What an item was put on before is put on the new one alone: the error comes out of a map inside
    this item, or it is one object that is raised again and again. Attributes that the error has of
    the user stay.

    Args:
        error: The error.
        index: The item's place.
        item: The item; with several collections, the tuple of its arguments.
        what: What it has done.
        whole: What it is an item of.
    """
    start, end = ("Item", f" {what}") if what else ("In item", "")
    note = f"{start} {index} of the {whole}{end}: {_short.repr(item)}"
    before, ours = vars(error).get(_OURS, ("", ()))
    notes = getattr(error, "__notes__", [])
    if before in notes:
        notes.remove(before)
    error.add_note(note)
    values = {"index": index, "item": item}
    mine = tuple(name for name in values if name in ours or not hasattr(error, name))
    for name in mine:
        _set(error, name, values[name])
    vars(error)[_OURS] = (note, mine)


def take_over(error: BaseException, cause: BaseException) -> None:
    """Let an error say of which item it is, as its cause does."""
    for name in ("index", "item"):
        if name in vars(cause) and not hasattr(error, name):
            _set(error, name, vars(cause)[name])


def _set(error: BaseException, name: str, value: object) -> None:
    try:
        setattr(error, name, value)
    except Exception:  # a class of the user's that refuses: the note says it
        return
