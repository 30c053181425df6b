"""Which item of a map an error belongs to, and which item has ended which workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hpcdist._errors import ProcessExitedException
from hpcdist._items.item_names import name_item
from hpcdist._maps.lanes import Batch
from hpcdist._maps.sources import Part
from hpcdist._wire import codec, object_paths

_RERUNS = 2  # how often an item runs again after the death of its worker


def name_part(error: BaseException, part: Part, what: str = "") -> None:
    """Put the items on an error to one of which it belongs."""
    if part.size == 1:
        name_item(error, part.start, item_of(part), what)
    elif part.size:
        start, end = ("One", f" {what}") if what else ("In one", "")
        last = part.start + part.size - 1
        error.add_note(f"{start} of the items {part.start} to {last} of the map{end}")


def item_of(part: Part) -> Any:
    """Give the first item of a part."""
    values = tuple(column[0] for column in part.columns)
    return values if len(values) > 1 else values[0]


def name_unpicklable(error: BaseException, part: Part, f: object) -> None:
    """Let an error of pickling say which item it comes from, or what that the function brings."""
    for k in range(part.size):
        item = part.cut(k, k + 1)
        try:
            codec.dumps(item.columns)
        except Exception:
            named = [(f"item {item.start}", item_of(item))]
            object_paths.name_unpicklable(error, named)
            name_part(error, item)
            return
    object_paths.name_unpicklable(error, object_paths.parts_of_function(f))


def suspects_of(batch: Batch, first: bool, line: tuple[int, int] | None) -> tuple[int, int]:
    """Tell which items of a batch may have been running when its worker died.

    Args:
        batch: The batch.
        first: Whether no older batch was there to be run.
        line: What the batch has said on the board.
    """
    size = batch.part.size
    if line is not None:
        return min(line[0], size), min(line[1], size)
    if batch.lane.on_board or not first:
        return 0, 0
    return 0, size


class Charges:
    """The deaths that the items of one map are charged with.

    Args:
        excuses: Tells of a worker whether it has ended through no fault of its items. That may be
            known only some time after its death.
    """

    def __init__(self, excuses: Callable[[int], bool]) -> None:
        self._excuses = excuses
        self._ended: dict[int, list[int]] = {}  # by index: the workers that have died running it

    def charge(self, suspects: Part, pid: int) -> bool:
        """Note that one of these items has ended a worker; tell whether it may run again."""
        for k in range(suspects.start, suspects.start + suspects.size):
            self._ended.setdefault(k, []).append(pid)
        ended = [pid for pid in self._ended[suspects.start] if not self._excuses(pid)]
        return suspects.size != 1 or len(ended) <= _RERUNS

    def worst(self, parts: Sequence[Part]) -> Part | None:
        """Find the item among these that has ended the most workers."""
        alone = [part for part in parts if part.start in self._ended and part.size == 1]
        return max(alone, key=lambda part: len(self._ended[part.start]), default=None)

    def death(self, error: BaseException, suspects: Part) -> BaseException:
        """Make the error that ends a map: a death, and the item it is charged to."""
        if not isinstance(error, ProcessExitedException):
            return error
        made = error.copy()
        pids = self._ended.get(suspects.start) or [error.pid]
        name_part(made, suspects, f"ended worker{'s' * (len(pids) > 1)} {_listed(pids)}")
        return made


def _listed(pids: Sequence[int]) -> str:
    *most, last = map(str, pids)
    return f"{', '.join(most)} and {last}" if most else last
