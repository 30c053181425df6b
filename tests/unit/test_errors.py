"""The errors: what they are, what they show, and that they travel."""

import copy
import doctest
import errno
import pickle
import random
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import cloudpickle
import pytest

from hpcdist import _errors
from hpcdist._errors import (
    ChannelClosed,
    CompositeException,
    HpcdistError,
    LaunchError,
    ProcessExitedException,
    RemoteCause,
    RemoteException,
    decode_error,
    encode_error,
)
from hpcdist._frames import OWN_FOLDER


class TwoArguments(Exception):
    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


class Slotted(Exception):
    __slots__ = ("code",)

    def __init__(self, code: int) -> None:
        self.code = code


class OwnText(Exception):
    def __str__(self) -> str:
        return "its own text"


class OwnNew(Exception):
    def __new__(cls, code: int, more: str) -> "OwnNew":
        made = super().__new__(cls, code)
        made.more = more  # type: ignore[attr-defined]
        return made

    def __init__(self, *args: object) -> None:
        pass


class OwnReduce(Exception):
    def __init__(self, left: int, right: int) -> None:
        super().__init__("sum")
        self.sum = left + right

    def __reduce__(self):
        return OwnReduce, (self.sum, 0)


class BrokenText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text today")

    __repr__ = __str__


@dataclass(frozen=True)
class Frozen(Exception):
    code: int


class Registry(Exception):
    known: ClassVar[list[type]] = []

    def __init_subclass__(cls, *, required: str) -> None:
        Registry.known.append(cls)


class OwnAttributes(Exception):
    @property
    def pid(self) -> int:
        raise RuntimeError("not this one")

    def __getattr__(self, name: str) -> object:
        raise RuntimeError(f"no {name}")


class Picky(type):
    def __new__(mcs, name: str, bases: tuple[type, ...], space: dict[str, object]) -> type:
        if len(bases) > 1:
            raise TypeError("one base only")
        return super().__new__(mcs, name, bases, space)


class OneBase(Exception, metaclass=Picky):
    pass


class NoLoad(Exception):
    def __reduce__(self):
        return _refuse, ()


def _refuse() -> None:
    raise RuntimeError("not to be rebuilt")


class LoadsAsText(Exception):
    def __reduce__(self):
        return str, ("surprise",)


class ExitsAtLoad(Exception):
    def __reduce__(self):
        return sys.exit, (3,)


def raised(make: Callable[[], BaseException]) -> BaseException:
    try:
        raise make()
    except BaseException as exc:
        return exc


def sent(exc: BaseException, pid: int = 2) -> RemoteException:
    return decode_error(encode_error(exc, pid, hide=""))


def compiled(text: str) -> BaseException:
    try:
        compile(text, "their.py", "exec")
    except SyntaxError as exc:
        return exc
    raise AssertionError("it compiles")


def test_doctests() -> None:
    # Not `testmod`: it leaves out classes that say they are another module's.
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    for name in _errors.__all__:
        for test in finder.find(getattr(_errors, name), name, module=False, globs=vars(_errors)):
            runner.run(test)
    tried = runner.summarize()
    assert tried.attempted >= 7
    assert tried.failed == 0


@pytest.mark.parametrize(
    "exc",
    [
        ZeroDivisionError("division by zero"),
        KeyError("a"),
        OSError(errno.ENOENT, "No such file", "x.txt"),
        FileNotFoundError(errno.ENOENT, "No such file", "x.txt", None, "y.txt"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        ImportError("no", name="mod", path="/p"),
        AttributeError("no x"),
        NameError("no y"),
        TwoArguments(7, reason="late"),
        Slotted(7),
        OwnText(1, 2),
        OwnNew(1, "more"),
        OwnReduce(1, 2),
        BrokenText(1),
        Frozen(5),
        OwnAttributes("x"),
        compiled("a b"),
        MemoryError(),
        subprocess.CalledProcessError(3, ["ls"], b"out", b"err"),
    ],
    ids=lambda exc: type(exc).__name__,
)
def test_is_also_an_instance_of_the_original_class(exc: Exception) -> None:
    error = sent(raised(lambda: exc))
    with pytest.raises(type(exc)) as caught:
        raise error
    assert caught.value is error
    assert isinstance(error, RemoteException)
    assert type(error).__name__ == f"RemoteException[{type(exc).__name__}]"
    assert error.pid == 2
    assert type(error.cause) is type(exc)
    assert error.args == exc.args
    where, what, *_ = str(error).splitlines()
    assert where == "On worker 2:"
    assert what.split(":")[0].endswith(type(exc).__name__)
    assert error.traceback.rstrip() in str(error)
    assert repr(error).startswith(f"RemoteException[{type(exc).__name__}](pid=2, cause=")


def test_details_of_the_original_are_there() -> None:
    missing = sent(FileNotFoundError(errno.ENOENT, "No such file", "x.txt"))
    assert isinstance(missing, OSError)
    assert (missing.errno, missing.strerror, missing.filename) == (2, "No such file", "x.txt")
    assert str(missing.cause) == "[Errno 2] No such file: 'x.txt'"

    undecodable = sent(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"))
    assert isinstance(undecodable, UnicodeDecodeError)
    assert (undecodable.object, undecodable.start, undecodable.end) == (b"\xff", 0, 1)

    wrong = sent(compiled("a b"))
    assert isinstance(wrong, SyntaxError)
    assert (wrong.filename, wrong.lineno) == ("their.py", 1)
    expected = compiled("a b")
    assert isinstance(expected, SyntaxError)
    assert wrong.msg == expected.msg

    late = sent(TwoArguments(7, reason="late"))
    assert isinstance(late, TwoArguments)
    assert (late.code, late.reason) == (7, "late")
    assert isinstance(late.cause, TwoArguments)
    assert late.cause.reason == "late"

    slotted = sent(Slotted(7))
    assert isinstance(slotted, Slotted)
    assert slotted.code == 7
    assert "KeyError: 'a'" in str(sent(KeyError("a")))


def test_own_pickling_is_respected() -> None:
    error = sent(OwnReduce(1, 2))
    assert isinstance(error, OwnReduce)
    assert error.sum == 3


def test_attributes_of_ours_win_over_the_users() -> None:
    error = sent(OwnAttributes("x"))
    assert (error.pid, type(error.cause)) == (2, OwnAttributes)


@pytest.mark.parametrize(
    "exc",
    [
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        StopIteration(1),
        StopAsyncIteration(),
        TimeoutError("too late"),
        ExceptionGroup("two", [ValueError("a"), KeyError("b")]),
        Exception("nothing special"),
        ChannelClosed(),
        ProcessExitedException(3, "gone"),
        OneBase("x"),
    ],
    ids=lambda exc: type(exc).__name__,
)
def test_stays_plain(exc: BaseException) -> None:
    error = sent(raised(lambda: exc))
    assert type(error) is RemoteException
    assert type(error.cause) is type(exc)
    assert repr(error.args) == repr(exc.args)
    assert repr(error) == f"RemoteException(pid=2, cause={error.cause!r})"


def test_their_subclass_hook_does_not_run() -> None:
    error = sent(Registry("x"))
    assert isinstance(error, Registry)
    assert Registry.known == []


@pytest.mark.parametrize("kind", [NoLoad, LoadsAsText, ExitsAtLoad])
def test_what_cannot_be_rebuilt_becomes_a_stand_in(kind: type[Exception]) -> None:
    error = sent(raised(lambda: kind("the message")))
    assert type(error) is RemoteException
    assert isinstance(error.cause, RemoteCause)
    assert error.cause.type_name == f"{__name__}.{kind.__name__}"
    assert str(error.cause) == f"{__name__}.{kind.__name__}: the message"
    assert f"{kind.__name__}: the message" in str(error)


def test_what_cannot_be_pickled_becomes_a_stand_in() -> None:
    error = sent(ValueError(threading.Lock()))
    assert isinstance(error.cause, RemoteCause)
    assert error.cause.type_name == "ValueError"
    again = sent(error.cause)
    assert isinstance(again.cause, RemoteCause)
    assert again.cause.type_name == "ValueError"


def test_missing_module_becomes_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("only_there")
    monkeypatch.setitem(sys.modules, "only_there", module)
    exec("class Here(Exception): pass", vars(module))
    data = encode_error(module.Here("x"), 2)
    monkeypatch.delitem(sys.modules, "only_there")
    error = decode_error(data)
    assert isinstance(error.cause, RemoteCause)
    assert error.cause.type_name == "only_there.Here"


def test_local_classes_travel_by_value() -> None:
    class Local(Exception):
        pass

    data = encode_error(Local("x"), 2)
    assert isinstance(decode_error(data), Local)
    text = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from hpcdist._errors import decode_error\n"
            "print(repr(decode_error(sys.stdin.buffer.read())))",
        ],
        input=data,
        capture_output=True,
        timeout=30,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    ).stdout.decode()
    assert text == "RemoteException[Local](pid=2, cause=Local('x'))\n"


def test_class_of_main_is_the_one_of_this_main(monkeypatch: pytest.MonkeyPatch) -> None:
    def defined() -> types.ModuleType:
        module = types.ModuleType("__main__")
        exec("class Mine(Exception): pass", vars(module))
        return module

    there, here = defined(), defined()
    monkeypatch.setitem(sys.modules, "__main__", there)
    data = encode_error(there.Mine("x"), 2)
    monkeypatch.setitem(sys.modules, "__main__", here)
    assert isinstance(decode_error(data), here.Mine)


def outer() -> None:
    try:
        dict[str, int]()["missing"]
    except KeyError:
        inner()


def inner() -> None:
    raise ValueError("wrong")


def test_traceback_text_names_frames_and_chained_errors() -> None:
    exc = raised(lambda: ValueError())
    try:
        outer()
    except ValueError as caught:
        exc = caught
    exc.add_note("a note")
    text = sent(exc).traceback
    assert "in outer" in text
    assert "in inner" in text
    assert "KeyError: 'missing'" in text
    assert "During handling" in text
    assert text.rstrip().endswith("ValueError: wrong\na note")


def traceback_of_outer(hide: str) -> str:
    try:
        outer()
    except ValueError as exc:
        return decode_error(encode_error(exc, 2, hide=hide)).traceback
    raise AssertionError


def test_outermost_frames_of_ours_are_hidden() -> None:
    everything = traceback_of_outer("")
    assert "in inner" in everything
    assert traceback_of_outer(__file__) == everything  # all are below the prefix: all are shown

    namespace: dict[str, object] = {"inner": inner}
    exec(compile("def theirs():\n    inner()", "their.py", "exec"), namespace)
    try:
        namespace["theirs"]()  # type: ignore[operator]
    except ValueError as exc:
        text = decode_error(encode_error(exc, 2, hide=__file__)).traceback
    assert "their.py" in text
    assert "in inner" in text
    assert "test_outermost" not in text


def test_text() -> None:
    error = RemoteException.make(2, ValueError("wrong"), "Traceback …\nValueError: wrong\n")
    assert str(error) == "On worker 2:\nValueError: wrong\nTraceback …\nValueError: wrong"
    assert str(RemoteException.make(1, ValueError("x"), "")) == "On process 1:\nValueError: x"
    many = str(RemoteException.make(2, ValueError("one\ntwo"), "ValueError: one\ntwo"))
    assert many == "On worker 2:\nValueError: one …\nValueError: one\ntwo"


def test_uncaught_shows_the_cause_once_and_no_frames_of_its_making() -> None:
    error = sent(raised(lambda: ValueError("wrong")))
    assert error.__cause__ is error.cause
    assert error.__suppress_context__
    try:
        raise error
    except ValueError as exc:
        text = "".join(traceback.format_exception(exc))
    assert text.count("direct cause") == 1
    assert text.count("in raised") == 1
    assert text.rstrip().endswith("ValueError: wrong")


def test_nested() -> None:
    deep = sent(raised(lambda: ValueError("deep")), pid=3)
    error = sent(raised(lambda: deep), pid=2)
    assert type(error) is RemoteException
    assert error.pid == 2
    assert isinstance(error.cause, RemoteException)
    assert isinstance(error.cause, ValueError)
    assert error.cause.pid == 3
    assert str(error).startswith("On worker 2:\nOn worker 3: ValueError: deep\nTraceback")
    shown = "".join(traceback.format_exception(error))
    assert shown.count("On worker 3:\n") == 1

    # However deep, the text grows by one traceback a level, not by a factor.
    lengths = []
    for pid in range(2, 12):
        error = sent(raised(lambda error=error: error), pid=pid)
        lengths.append(len(str(error)))
    assert lengths[-1] - lengths[-2] <= 2 * (lengths[1] - lengths[0])


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])
@pytest.mark.parametrize("depth", [1, 2])
def test_pickles(dumps: Callable[[object], bytes], depth: int) -> None:
    error = sent(raised(lambda: TwoArguments(7, reason="late")), pid=5)
    for _ in range(depth - 1):
        error = sent(raised(lambda error=error: error), pid=6)
    error.add_note("noted here")
    again = pickle.loads(dumps(error))
    assert type(again) is type(error)
    assert (again.pid, again.args, again.traceback) == (error.pid, error.args, error.traceback)
    assert str(again) == str(error)
    assert again.__notes__ == ["noted here"]
    assert str(copy.copy(error)) == str(error)
    assert again != error


def test_class_is_cached() -> None:
    first, second = sent(ValueError("a")), sent(ValueError("b"))
    assert type(first) is type(second)


def test_never_fails_whatever_the_exception_does() -> None:
    recursive = ValueError()
    recursive.args = (recursive,)
    recursive.__cause__ = raised(lambda: KeyError(1))
    recursive.__cause__.__context__ = recursive
    assert "ValueError" in str(sent(recursive))

    def forever() -> None:
        forever()

    with pytest.raises(RecursionError) as caught:
        forever()
    assert isinstance(sent(caught.value), RecursionError)
    noted = ValueError("x")
    noted.__notes__ = 3  # type: ignore[assignment]
    assert "ValueError: x" in str(sent(noted))
    big = ValueError("x" * random.randrange(10**6, 2 * 10**6))
    assert sent(big).args == big.args


def test_process_exited() -> None:
    error = ProcessExitedException(3, "killed by signal 9 (SIGKILL)", "node7", ["a\n", "b"])
    assert str(error) == (
        "Worker 3 on node7 has exited: killed by signal 9 (SIGKILL).\n    a\n    b"
    )
    assert str(ProcessExitedException(3)) == "Worker 3 has exited."
    error.why = "OUT_OF_MEMORY"
    again = pickle.loads(pickle.dumps(error))
    assert (again.pid, again.why, again.host, again.stderr) == (
        3,
        "OUT_OF_MEMORY",
        "node7",
        ["a\n", "b"],
    )
    assert isinstance(again, HpcdistError)


def test_process_exited_with_all_that_may_be_known() -> None:
    error = ProcessExitedException(3, "exit code 3", "n7", [], ["a"], 1_250_000_000)
    assert str(error) == (
        "Worker 3 on n7 has exited: exit code 3. The process's memory had reached 1,250 MB.\n"
        "Older lines of its stderr, from before its end:\n    a"
    )
    error.note_call("f", 130.0)
    again = pickle.loads(pickle.dumps(error.copy("it was the disk")))
    assert str(again) == (
        "Worker 3 on n7 has exited: it was the disk (it was running f). The call had run for 2:10, "
        "and the process's memory had reached 1,250 MB.\n"
        "Older lines of its stderr, from before that call:\n    a"
    )
    again.stderr.append("b")
    assert str(again).splitlines()[1:] == ["    b"]


def test_channel_closed() -> None:
    assert str(ChannelClosed()) == "the channel is closed"
    assert str(pickle.loads(pickle.dumps(ChannelClosed("shut")))) == "shut"


def test_launch_error() -> None:
    error = LaunchError(
        "sbatch refused the job",
        phase="submit",
        command=["sbatch", "a b.sh"],
        output="error: no partition\n",
        fix="See sinfo for the partitions.",
        pids=[2],
        jobs=["17"],
    )
    assert str(error).splitlines() == [
        "sbatch refused the job (phase: submit)",
        "Jobs: 17",
        "Command: sbatch 'a b.sh'",
        "Its last output:",
        "    error: no partition",
        "Workers that have started: 2",
        "See sinfo for the partitions.",
    ]
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert (again.phase, again.pids, again.jobs) == ("submit", [2], ["17"])


def test_composite_is_an_exception_group() -> None:
    members = [sent(ValueError("a"), 2), sent(KeyError("b"), 3), sent(ValueError("c"), 4)]
    error = CompositeException("everywhere failed", members)
    assert isinstance(error, HpcdistError)
    assert str(error) == "On worker 2: ValueError: a …and 2 more"
    assert str(CompositeException("one", members[:1])) == "On worker 2: ValueError: a"
    values, rest = error.split(ValueError)
    assert isinstance(values, CompositeException)
    assert isinstance(rest, CompositeException)
    assert values.exceptions == (members[0], members[2])
    seen: list[int] = []
    try:
        raise error
    except* ValueError as group:
        seen += [exc.pid for exc in group.exceptions]
    except* KeyError as group:
        seen += [exc.pid for exc in group.exceptions]
    assert seen == [2, 4, 3]
    again = pickle.loads(pickle.dumps(error))
    assert [(exc.pid, type(exc)) for exc in again.exceptions] == [
        (exc.pid, type(exc)) for exc in members
    ]
    assert isinstance(sent(error).cause, CompositeException)


def test_import_is_quick_enough_for_every_worker() -> None:
    heavy = {"typing", "inspect", "dataclasses", "logging", "pickle", "re", "traceback", "weakref"}
    program = (
        "import sys; before = set(sys.modules)\n"
        "import hpcdist._errors, hpcdist._log, hpcdist._config\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    # -S: no site packages, whose .pth files import what they like; the façade is left out as well.
    command = [
        sys.executable,
        "-S",
        "-c",
        "import sys, types\n"
        "package = types.ModuleType('hpcdist'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['hpcdist'] = package\n" + program,
        OWN_FOLDER,
    ]
    loaded = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    assert not heavy & set(loaded.split())
