"""Functions that are sent once to a process, and kept there for the calls that follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpcdist._collective.value_copies import Layout, ValueCopies
from hpcdist._maps.boards import Address, Boards
from hpcdist._runtime.node import Node, Service
from hpcdist._wire import codec
from hpcdist._wire.frames import Body, Buffer
from hpcdist._wire.messages import Place

Token = tuple[int, int]  # names a kept function: the process that sent it, and a number of its own

_FORGOTTEN_MOST = 4096
_PATIENCE = 60.0  # seconds for a function to be unpickled, by another turn


class Forgotten(Exception):
    """The sender has dropped the function that a call names."""


class Unmapped(Exception):
    """The function lies in memory that cannot be opened from here: another container's, say."""


class _Broken:
    """Stands for a function that could not be unpickled here."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


_UNMAPPED = object()  # stands for a function in memory that cannot be opened


class KeptFunctions(Service):
    """The functions that others have sent to this process."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._boards = node.service(Boards)
        self._copies = node.service(ValueCopies)
        self._kept: dict[Token, Any] = {}
        # The last ones that were dropped: what names them may still be in the queue.
        self._forgotten: dict[Token, None] = {}
        self._arrived = node.machine.condition()  # guards both, and tells of new ones
        node.on_death.append(self._on_death)

    def keep(self, token: Token, body: Body, buffers: Sequence[Buffer], board: Address) -> None:
        """Take in a function for the batches that follow, and the board of their map."""
        self._boards.attach(token[0], board)
        with self._arrived:
            if self._kept.get(token) is _UNMAPPED:
                del self._kept[token]  # with several turns: it is coming now, do not ask again
        try:
            value = codec.loads(body, buffers)
        except BaseException as exc:  # its caller gets it
            value = _Broken(exc)
        self._keep(token, value)

    def keep_shared(self, token: Token, place: Place, layout: Layout, board: Address) -> None:
        """Take in a function that lies in shared memory, and the board of its map."""
        value: Any = _UNMAPPED
        copy = None
        try:
            copy = self._copies.mapped_copy(place, layout, ())
            self._boards.attach(token[0], board)
            if token not in self._forgotten:
                value = codec.loads(copy.body, [codec.copied(b) for b in copy.buffers])
        except BaseException as exc:  # its caller gets it
            if copy is not None or not isinstance(exc, OSError):
                value = _Broken(exc.with_traceback(None))
        del copy  # and so says that we have no view any more
        self._keep(token, value)

    def _keep(self, token: Token, value: object) -> None:
        with self._arrived:
            is_late = value is _UNMAPPED and token in self._kept
            if not is_late and not self._is_dropped(token):
                self._kept[token] = value
            self._arrived.notify_all()

    def get(self, token: Token) -> Any:
        """Give a kept function; with several turns its arrival may be going on beside us.

        Raises:
            Forgotten: Its sender has dropped it.
            Unmapped: It has to be sent another way.
        """
        found = self._kept.get(token)
        if found is None:
            is_settled = lambda: token in self._kept or self._is_dropped(token)
            with self._arrived:
                self._arrived.wait_for(is_settled, _PATIENCE)
                found = self._kept.get(token)
        if found is None:
            raise Forgotten
        if found is _UNMAPPED:
            raise Unmapped
        if type(found) is _Broken:
            raise found.error
        return found

    def forget(self, tokens: Sequence[Token]) -> None:
        """Drop kept functions."""
        with self._arrived:
            for token in tokens:
                self._kept.pop(token, None)
                self._forgotten[token] = None
            while len(self._forgotten) > _FORGOTTEN_MOST:
                del self._forgotten[next(iter(self._forgotten))]
            self._arrived.notify_all()

    def call_first(self, token: Token, f: Any, args: tuple[Any, ...], kw: dict[str, Any]) -> Any:
        """Keep a function and call it."""
        with self._arrived:
            if not self._is_dropped(token):
                self._kept[token] = f
        return f(*args, **kw)

    def _is_dropped(self, token: Token) -> bool:
        """Tell whether its sender has dropped it, or has died: what it had sent may come later."""
        return token in self._forgotten or token[0] in self.node.members.gone

    def _on_death(self, pid: int) -> None:
        self.forget([token for token in list(self._kept) if token[0] == pid])


# What runs on the process that a function is sent to.


def keep(token: Token, body: Body, buffers: Sequence[Buffer], board: Address) -> None:
    """Take in a function for the batches that follow."""
    KeptFunctions.here().keep(token, body, buffers, board)


def keep_shared(token: Token, place: Place, layout: Layout, board: Address) -> None:
    """Take in a function that lies in shared memory."""
    KeptFunctions.here().keep_shared(token, place, layout, board)


def call_first(token: Token, f: Any, args: tuple[Any, ...], kw: dict[str, Any]) -> Any:
    """Keep a function and call it."""
    return KeptFunctions.here().call_first(token, f, args, kw)


def call_kept(token: Token, args: tuple[object, ...], kw: dict[str, Any]) -> Any:
    """Call a kept function."""
    return KeptFunctions.here().get(token)(*args, **kw)
