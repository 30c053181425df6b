"""What a process takes from its computer: the time, locks, threads, signals, chance, its name."""

from __future__ import annotations

import atexit
import faulthandler
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import asyncio

_END = 5.0  # seconds that the end of a process may take
MAIN = threading.main_thread().ident or 0
SignalHandler = Callable[[int, FrameType | None], None]


def _end_within(seconds: float) -> None:
    """End this process with all its stacks after so long, or at least end it."""
    try:
        faulthandler.dump_traceback_later(seconds, exit=True)
    except RuntimeError:  # there is no memory for the thread that would watch
        signal.alarm(math.ceil(seconds))


class Machine:
    """The computer as it is. A simulation puts its own in its place."""

    main = MAIN  # the main thread: it runs a worker's calls, and gets Ctrl-C
    signalled = MAIN  # the thread that gets the signals of the operating system
    shares_memory = True  # whether processes of one host may map each other's memory
    now = staticmethod(time.monotonic)
    clock = staticmethod(time.perf_counter_ns)
    time = staticmethod(time.time)  # of day, in seconds since 1970
    hostname = staticmethod(socket.gethostname)
    pid = staticmethod(os.getpid)
    # Any function in C: behind it comes what another thread has raised in this one.
    settle = staticmethod(threading.get_ident)
    lock = staticmethod(threading.Lock)
    rlock = staticmethod(threading.RLock)
    condition = staticmethod(threading.Condition)
    random_bytes = staticmethod(os.urandom)

    def start(self, work: Callable[[], None], name: str) -> None:
        """Run something on a thread of its own, which does not hold up the process's end."""
        threading.Thread(target=work, name=name, daemon=True).start()

    def event_loop(self) -> asyncio.AbstractEventLoop:
        """Make an event loop, which has not started."""
        import asyncio  # 30 ms, which a process without coroutines saves

        return asyncio.new_event_loop()

    def exit(self, code: int, clear_away: Callable[[], None], *, by_libc: bool = False) -> NoReturn:
        """End this process at once, without the interpreter's own end.

        Args:
            code: The exit code.
            clear_away: Called last.
            by_libc: Run the C library's exit handlers.
        """
        try:
            _end_within(_END)
            if threading.get_ident() == self.main:
                atexit._run_exitfuncs()
        finally:  # whatever goes wrong, as without memory anything may: never back to the caller
            try:
                clear_away()
                for stream in (sys.__stdout__, sys.__stderr__):
                    try:
                        if stream is not None:
                            stream.flush()
                    except (OSError, ValueError):
                        pass
                if by_libc:
                    import ctypes

                    ctypes.CDLL(None).exit(code)
            finally:
                os._exit(code)

    def catch_sigint(self, handler: SignalHandler) -> None:
        """Let a handler have Ctrl-C, if nobody else wants it and this is the main thread."""
        on_main = threading.get_ident() == self.main
        if on_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, handler)

    def interrupt_main(self) -> None:
        """Have the handler of Ctrl-C called on the main thread."""
        signal.pthread_kill(self.main, signal.SIGINT)

    def aim(self, thread: int, error: type[BaseException]) -> Callable[[], object]:
        """Return what raises an error in another thread as soon as that runs Python code.

        It is written in C: no other thread runs between a test and this call.
        """
        import ctypes  # 4 ms: not at start-up

        raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
        return partial(raise_in, ctypes.c_ulong(thread), ctypes.py_object(error))

    def die(self) -> None:
        """End this process at once, whatever it does."""
        os.kill(os.getpid(), 9)

    def at_exit(self, work: Callable[[], None]) -> None:
        """Run something at the program's end, before what was registered earlier."""
        atexit.register(work)

    def before_exit(self, work: Callable[[], None]) -> None:
        """Run something at the program's end, before its threads are joined.

        That is where `concurrent.futures` ends its own executors.
        """
        threading._register_atexit(work)  # type: ignore[attr-defined]
