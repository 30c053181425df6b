"""The low-level part: for managers that bring their own transport."""

from __future__ import annotations

from typing import Any, NoReturn

from hpcdist._managers import roster
from hpcdist._managers.worker import work
from hpcdist._runtime.node import node


def start_worker(join: str, *, stdin: Any = None) -> NoReturn:
    """Be a worker of the launch that a join file describes. Never returns."""
    work(join)


def cluster_cookie(cookie: str | None = None, /) -> str:
    """Return the cluster's cookie, or set it before the first worker."""
    raise NotImplementedError


def init_worker(cookie: str, manager: Any = None) -> None:
    raise NotImplementedError


def process_messages(reader: Any, writer: Any, incoming: bool = True) -> Any:
    raise NotImplementedError


def worker_id_from_socket(x: Any) -> int:
    raise NotImplementedError


_ = (node, roster)
