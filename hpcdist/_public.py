"""What users see goes by its public name, `hpcdist.Future`, in whichever room it is defined."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    Thing = TypeVar("Thing")


def public(thing: Thing) -> Thing:
    """Let a class or function name `hpcdist` as its module: in tracebacks, help and pickles."""
    thing.__module__ = __package__
    return thing


def public_in(module: str) -> Callable[[Thing], Thing]:
    """Let a class or function name a public module of hpcdist as its own."""

    def name(thing: Thing) -> Thing:
        thing.__module__ = f"{__package__}.{module}"
        return thing

    return name
