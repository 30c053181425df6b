"""The errors of hpcdist.

    HpcdistError                      everything below; `except HpcdistError` catches all of it
    ├── RemoteException               a call failed, on another process or by a self call
    │   └── RemoteException[X]        the same, and an X too: made on demand, so `except X` works
    ├── ProcessExitedException        a process that was needed is gone
    ├── ChannelClosed                 put on, or take from, a closed channel
    ├── LaunchError                   workers did not come up
    └── CompositeException            several of these at once; an ExceptionGroup
    RemoteCause                       stands in for a cause that could not travel

Workers import this module before anything else, so the heavier parts of the standard library
(pickle, traceback, weakref) are imported where they are used.
"""

from __future__ import annotations

from hpcdist._error_parts import (
    args_of,
    from_parts,
    members,
    parts,
    pickles_by_default,
    set_parts,
    static_base,
)
from hpcdist._frames import OWN_FOLDER, drop_frames, without_top
from hpcdist._numbers import clock
from hpcdist._public import public

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from traceback import TracebackException
    from typing import Any, Self
    from weakref import WeakKeyDictionary, ref

__all__ = [
    "ChannelClosed",
    "CompositeException",
    "HpcdistError",
    "LaunchError",
    "ProcessExitedException",
    "RemoteCause",
    "RemoteException",
    "decode_error",
    "encode_error",
]

_INDENT = "    "
_REMOTE = "_hpcdist_remote"  # the one key of ours in the __dict__ of a RemoteException


@public
class HpcdistError(Exception):
    """Base of every error that hpcdist raises about the cluster."""


class RemoteCause(Exception):
    """Stands in for an exception that could not be pickled, or not rebuilt on this side.

    Args:
        type_name: The class it stands for, with its module.
        text: What Python prints below a traceback of it: the type and the message.
    """

    type_name = "Exception"

    def __init__(self, type_name: str, text: str) -> None:
        super().__init__(type_name, text)
        self.type_name = type_name

    def __str__(self) -> str:
        return str(self.args[1])


@public
class RemoteException(HpcdistError):
    """A call failed on process `pid`.

    An instance is made by `RemoteException.make`, and then is also an instance of the original's
    class wherever such a class can be made.

    >>> error = RemoteException.make(2, ZeroDivisionError("division by zero"), "")
    >>> isinstance(error, ZeroDivisionError), error.pid, error.cause
    (True, 2, ZeroDivisionError('division by zero'))
    >>> print(error)
    On worker 2:
    ZeroDivisionError: division by zero
    """

    # The user's class may bring its own versions of these, which expect its own __init__ to have
    # run, or refuse to be written to. RemoteException comes first among the bases, so these win.
    __getattribute__ = Exception.__getattribute__
    __setattr__ = Exception.__setattr__
    __eq__ = Exception.__eq__
    __hash__ = Exception.__hash__

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        return static_base(cls).__new__(cls)

    def __init__(self, pid: int, cause: BaseException, traceback: str = "") -> None:
        # Not super(): that would run the __init__ of the user's class.
        BaseException.__init__(self, *args_of(cause))
        self.__dict__[_REMOTE] = (pid, cause, traceback)
        # Python prints __cause__ above this exception. The text of a nested RemoteException is
        # long and stands in our own str() already: it would be shown twice.
        self.__cause__ = None if isinstance(cause, RemoteException) else cause
        self.__suppress_context__ = True

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Stop here: the user's class must not take ours for a new subclass of its own."""

    @staticmethod
    def make(pid: int, cause: BaseException, traceback_text: str) -> RemoteException:
        """Return the error for `cause` on process `pid`, catchable as the cause's own class."""
        try:
            kind = _remote_class(type(cause))
            made = kind.__new__(kind)
            if kind is not RemoteException:
                set_parts(made, *_visible_parts(cause))
            RemoteException.__init__(made, pid, cause, traceback_text)
            repr(made)
        except Exception:  # Any class of the user's may be in the way; the plain form never is.
            return RemoteException(pid, cause, traceback_text)
        return made

    @property
    def pid(self) -> int:
        """The process on which the call failed."""
        pid: int = self.__dict__[_REMOTE][0]
        return pid

    @property
    def cause(self) -> BaseException:
        """The original exception, or a `RemoteCause` in its place."""
        cause: BaseException = self.__dict__[_REMOTE][1]
        return cause

    @property
    def traceback(self) -> str:
        """The traceback as that process would have printed it."""
        text: str = self.__dict__[_REMOTE][2]
        return text

    def __str__(self) -> str:
        if not self.traceback:
            return f"{self._place()}\n{_exception_only(self.cause)}"
        first, text = _summary(self.cause), self.traceback.rstrip()
        if text == first:  # no frames but ours: it was raised in C
            return f"{self._place()}\n{text}"
        return f"{self._place()}\n{first}\n{text}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}(pid={self.pid}, cause={_safely(repr, self.cause)})"

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        data = _encode(self.pid, self.cause, self.traceback)
        # Not the item itself: it may be of any size, and its text stands in the note.
        return _rebuild_remote, (data, self.__dict__.get("__notes__"), self.__dict__.get("index"))

    def _place(self) -> str:
        return f"On {'process' if self.pid == 1 else 'worker'} {self.pid}:"


_late_reasons: dict[int, str] = {}  # by pid; pids are never given twice


@public
class ProcessExitedException(HpcdistError):
    """A process is gone, and with it what was asked of it.

    Args:
        pid: The process.
        why: A signal, an exit code, a scheduler's verdict: as much as is known.
        host: Where it ran.
        stderr: The last lines that the calls wrote there which it has not answered.
        older: The last lines from before these, as far as they were ours to collect.
        peak_rss: The most memory it has had, in bytes, where that is known.

    Attributes:
        call: The function that it ran, where the process that raises this had called it.
        call_seconds: How long that call had run.

    >>> print(ProcessExitedException(3, "killed by signal 9 (SIGKILL)", "node7"))
    Worker 3 on node7 has exited: killed by signal 9 (SIGKILL).
    """

    def __init__(
        self,
        pid: int,
        why: str = "",
        host: str = "",
        stderr: Iterable[str] = (),
        older: Iterable[str] = (),
        peak_rss: int | None = None,
    ) -> None:
        self.pid = pid
        self._why = why
        self.host = host
        self.stderr = list(stderr)
        self.older = list(older)
        self.peak_rss = peak_rss
        self.call = ""
        self.call_seconds: float | None = None
        super().__init__(*self.facts)

    @property
    def facts(self) -> tuple[int, str, str, list[str], list[str], int | None]:
        """What it is made of, and what all processes are told."""
        return self.pid, self.why, self.host, self.stderr, self.older, self.peak_rss

    def note_call(self, call: str, seconds: float) -> None:
        """Note what it ran, and for how long."""
        self.call, self.call_seconds = call, max(0.0, seconds)

    def like(self, other: ProcessExitedException) -> Self:
        """Say of what it ran what another error of the same death says."""
        self.call, self.call_seconds = other.call, other.call_seconds
        return self

    def copy(self, why: str | None = None) -> ProcessExitedException:
        """Make one more error of the same death, for another waiter."""
        pid, known, host, stderr, older, peak_rss = self.facts
        text = known if why is None else why
        return ProcessExitedException(pid, text, host, stderr, older, peak_rss).like(self)

    @property
    def why(self) -> str:
        """The reason. A scheduler's verdict may come a little later, and stands here then."""
        return _late_reasons.get(self.pid, self._why)

    @why.setter
    def why(self, text: str) -> None:
        self._why = text

    def amend(self, why: str) -> None:
        """Take a reason that has come late, for every exception about this process."""
        _late_reasons[self.pid] = why

    def __str__(self) -> str:
        who = f"{'Process' if self.pid == 1 else 'Worker'} {self.pid}"
        place = f" on {self.host}" if self.host else ""
        why = f": {self.why.rstrip().rstrip('.')}" if self.why else ""
        why += f" (it was running {self.call})" if self.call else ""
        lines = [f"{who}{place} has exited{why}.{self._figures()}", *_indented(self.stderr)]
        if self.older and not self.stderr:
            since = "that call" if self.call else "its end"
            lines += [f"Older lines of its stderr, from before {since}:", *_indented(self.older)]
        return "\n".join(lines)

    def _figures(self) -> str:
        """Say how long the call had run, and how much memory the process has had."""
        said = []
        if self.call_seconds is not None:
            took = self.call_seconds
            said.append(f"the call had run for {f'{took:.3g} s' if took < 60 else clock(took)}")
        if self.peak_rss is not None:
            said.append(f"the process's memory had reached {self.peak_rss / 1e6:,.0f} MB")
        text = ", and ".join(said)
        return f" {text[0].upper()}{text[1:]}." if text else ""


@public
class ChannelClosed(HpcdistError):
    """The channel is closed, and what it still held has been taken."""

    def __init__(self, message: str = "the channel is closed") -> None:
        super().__init__(message)


@public
class LaunchError(HpcdistError):
    """Workers did not come up.

    Args:
        message: One sentence: what went wrong.
        phase: How far the launch had come, such as "submit" or "connect".
        command: What was run.
        output: The last lines it printed.
        fix: The likely remedy, as a sentence.
        pids: Workers that did come up, and stay.
        jobs: The scheduler's ids of the jobs concerned.

    >>> print(LaunchError("mpiexec was not found", phase="start", command=["mpiexec", "-n", "2"],
    ...                   fix="Load the MPI module first."))
    mpiexec was not found (phase: start)
    Command: mpiexec -n 2
    Load the MPI module first.
    """

    def __init__(
        self,
        message: str = "the workers did not come up",
        *,
        phase: str = "",
        command: str | Sequence[str] = (),
        output: str | Iterable[str] = (),
        fix: str = "",
        pids: Iterable[int] = (),
        jobs: Iterable[str] = (),
    ) -> None:
        super().__init__(message)
        self.phase = phase
        self.command = command
        self.output = output.splitlines() if isinstance(output, str) else list(output)
        self.fix = fix
        self.pids = list(pids)
        self.jobs = list(jobs)

    def __str__(self) -> str:
        lines = [str(self.args[0]) + (f" (phase: {self.phase})" if self.phase else "")]
        if self.jobs:
            lines.append("Jobs: " + ", ".join(map(str, self.jobs)))
        if self.command:
            lines.append("Command: " + _command_line(self.command))
        if self.output:
            lines += ["Its last output:", *_indented(self.output)]
        if self.pids:
            lines.append("Workers that have started: " + ", ".join(map(str, self.pids)))
        if self.fix:
            lines.append(self.fix)
        return "\n".join(lines)


@public
class CompositeException(HpcdistError, ExceptionGroup[Exception]):
    """Several errors of one operation, usually one per process.

    >>> errors = [RemoteException.make(pid, ValueError("no"), "") for pid in (2, 3, 4)]
    >>> print(CompositeException("everywhere failed", errors))
    On worker 2: ValueError: no …and 2 more
    """

    @classmethod
    def of_processes(cls, message: str, errors: Iterable[Exception]) -> CompositeException:
        """Put the errors of several processes together, in order of pid."""
        return cls(message, sorted(errors, key=lambda error: getattr(error, "pid", 0)))

    def derive(self, excs: Sequence[Any]) -> CompositeException:  # type: ignore[override]
        """Return the same with other members; `split` and `except*` ask for it."""
        return CompositeException(self.message, excs)

    def __str__(self) -> str:
        first, *others = self.exceptions
        return _summary(first) + (f" …and {len(others)} more" if others else "")


def encode_error(exc: BaseException, pid: int, *, hide: str = OWN_FOLDER) -> bytes:
    """Return the bytes from which `decode_error` makes a RemoteException; drop its frames here.

    Never fails: what cannot be pickled is replaced by its name and its text. The frames hold the
    arguments of the call, and often the exception itself: they would stay until the garbage
    collector happens to run.

    Args:
        exc: The exception, as caught where the call ran.
        pid: The process it was caught on.
        hide: Outermost frames of files below this path are left out of the traceback's text.
    """
    data = _encode(pid, exc, traceback_text(exc, hide))
    drop_frames(exc)
    return data


def decode_error(data: bytes) -> RemoteException:
    """Return the RemoteException that `encode_error` described."""
    import pickle

    pid, type_name, text, traceback_text, body = pickle.loads(data)
    return RemoteException.make(pid, _load_cause(type_name, text, body), traceback_text)


def _encode(pid: int, cause: BaseException, traceback_text: str) -> bytes:
    import pickle

    if isinstance(cause, RemoteCause):  # It stands for something: a second one would not.
        type_name, text, body = cause.type_name, str(cause), None
    else:
        type_name, text, body = _type_name(cause), _exception_only(cause), _dump_cause(cause)
    return pickle.dumps((pid, type_name, text, traceback_text, body), protocol=5)


def _rebuild_remote(
    data: bytes, notes: list[str] | None, index: int | None = None
) -> RemoteException:
    error = decode_error(data)
    if index is not None:
        error.__dict__.setdefault("index", index)
    for note in notes or ():
        error.add_note(note)
    return error


def _dump_cause(cause: BaseException) -> bytes | None:
    """Return the pickled cause, or None when that is impossible."""
    try:
        return _dumps(parts(cause) if pickles_by_default(type(cause)) else cause)
    except Exception:  # Pickling runs the user's code: it may raise whatever it likes.
        return None


def _load_cause(type_name: str, text: str, body: bytes | None) -> BaseException:
    """Return the cause, or the stand-in that names it."""
    import pickle

    if body is not None:
        try:
            loaded = pickle.loads(body)
            if isinstance(loaded, tuple):
                loaded = from_parts(*loaded)
            if isinstance(loaded, BaseException):
                return loaded
        except (Exception, SystemExit):  # Unpickling runs the user's code, missing modules and all.
            pass
    return RemoteCause(type_name, text)


def _dumps(value: object) -> bytes:
    """Pickle by reference what an import finds on the other side, and the rest by value."""
    import pickle

    try:
        data = pickle.dumps(value, protocol=5)
        if b"__main__" not in data:  # The other side has a __main__ of its own.
            return data
    except Exception:  # Whatever plain pickle trips over, cloudpickle may manage.
        pass
    from hpcdist import _pickler

    return _pickler.dumps(value)


def _visible_parts(cause: BaseException) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the RemoteException for `cause` takes over from it.

    Left out is what Python would print a second time (notes), or would use to look for similar
    names in the frames of *this* process ("Did you mean …").
    """
    state = {key: value for key, value in vars(cause).items() if key != "__notes__"}
    return state, {} if isinstance(cause, NameError | AttributeError) else members(cause)


class _RemoteClasses:
    """Classes that are both ours and the user's, one for each class of causes."""

    def __init__(self) -> None:
        # Weak on both sides: a class of the user's, redefined again and again, can go.
        self._made: WeakKeyDictionary[type[BaseException], ref[type[RemoteException]]] | None = None

    def below(self, kind: type[BaseException]) -> type[RemoteException]:
        """Return the class that is both a RemoteException and a `kind`."""
        from weakref import WeakKeyDictionary, ref  # most programs never get here

        if self._made is None:
            self._made = WeakKeyDictionary()
        known = self._made.get(kind)
        made = known() if known is not None else None
        if made is None:
            name = f"RemoteException[{kind.__name__}]"
            space = {"__module__": RemoteException.__module__, "__doc__": RemoteException.__doc__}
            # A class with a metaclass needs that one; a class that refuses is shown plainly.
            metaclass: Any = type(kind)
            made = metaclass(name, (RemoteException, kind), space)
            self._made[kind] = ref(made)
        return made


_remote_classes = _RemoteClasses()


def _remote_class(kind: type[BaseException]) -> type[RemoteException]:
    """Return the class to use for causes of class `kind`: RemoteException, or one below it."""
    return _remote_classes.below(kind) if _may_be_shown_as(kind) else RemoteException


def _may_be_shown_as(kind: type[BaseException]) -> bool:
    # A StopIteration ends loops and generators silently, a TimeoutError means that a deadline of
    # ours has passed, a HpcdistError speaks of this process' cluster: not so from elsewhere.
    return (
        issubclass(kind, Exception)
        and kind not in (Exception, RemoteCause)
        and not issubclass(kind, (StopIteration, StopAsyncIteration, BaseExceptionGroup))
        and not issubclass(kind, (TimeoutError, HpcdistError))
    )


# -- Text -----------------------------------------------------------------------------------------


def _safely(show: Any, value: object) -> str:
    try:
        return str(show(value))
    except Exception:  # The user's __str__ or __repr__.
        return f"<{type(value).__name__}: no text>"


def _type_name(exc: BaseException) -> str:
    kind = type(exc)
    if kind.__module__ in ("builtins", "__main__"):
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"


def _summary(exc: BaseException) -> str:
    """Return the error in one line."""
    if isinstance(exc, RemoteException):
        return f"{exc._place()} {_summary(exc.cause)}"
    text = _safely(str, exc)
    if not isinstance(exc, RemoteCause):
        text = f"{_type_name(exc)}: {text}" if text else _type_name(exc)
    first, *more = text.splitlines() or [""]
    return f"{first} …" if more else first


def _exception_only(exc: BaseException) -> str:
    """Return what Python prints below the frames: type, message, notes."""
    if isinstance(exc, RemoteCause):
        return str(exc)
    from traceback import format_exception_only

    try:
        return "".join(format_exception_only(exc)).rstrip("\n")
    except Exception:  # Notes, names, texts: all of it is the user's.
        return _summary(exc)


def traceback_text(exc: BaseException, hide: str = OWN_FOLDER) -> str:
    """Return what Python prints of an exception, without the first frames of ours."""
    from traceback import TracebackException

    try:
        frames = without_top(exc.__traceback__, hide)
        shown = TracebackException(type(exc), exc, frames, compact=True)
        _drop_repeated_causes(shown, set())
        return "".join(shown.format())
    except Exception:  # As above; an error about an error must not take the worker down.
        return _exception_only(exc)


def _drop_repeated_causes(shown: TracebackException | None, seen: set[int]) -> None:
    """Leave out the cause of a RemoteException: its text holds it."""
    if shown is None or id(shown) in seen:
        return
    seen.add(id(shown))
    if shown.exc_type is not None and issubclass(shown.exc_type, RemoteException):
        shown.__cause__ = None
    for inner in (shown.__cause__, shown.__context__, *(shown.exceptions or ())):
        _drop_repeated_causes(inner, seen)


def _indented(lines: Iterable[str]) -> list[str]:
    return [_INDENT + line.rstrip("\n") for line in lines]


def _command_line(command: str | Sequence[str]) -> str:
    if isinstance(command, str):
        return command
    from shlex import join

    return join(map(str, command))
