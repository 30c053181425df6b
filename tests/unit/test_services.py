"""Services: two processes in one interpreter, each with a state of its own."""

import threading
from typing import NamedTuple

import pytest

from hpcdist._remote.cells import Cells
from hpcdist._remote.channel_owners import OwnedChannels
from hpcdist._runtime.node import Mail, Node, Service, here, on
from hpcdist._runtime.references import References
from hpcdist._wire import messages
from hpcdist._wire.frames import CONTROL, OURS
from hpcdist._wire.messages import Left, Sent


class Leavers(Service):
    """Those that have left."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.pids: list[int] = []

    @on(Left)
    def _on_left(self, said: Left, mail: Mail) -> None:
        self.pids.extend(said.pids)


class Twice(Leavers):
    """Overrides a handler, which stays one handler."""

    @on(Left)
    def _on_left(self, said: Left, mail: Mail) -> None:
        self.pids.extend(said.pids * 2)


def deliver(node: Node, message: NamedTuple) -> None:
    number = messages.NUMBERS[type(message)]
    node.deliver(None, CONTROL, 0, 0, number, messages.encode(message), ())  # type: ignore[arg-type]


def test_a_node_makes_one_service_of_a_kind() -> None:
    node = Node()
    assert node.service(References) is node.service(References)
    assert Node().service(References) is not node.service(References)


def test_a_message_reaches_the_service_of_its_node() -> None:
    one, other = Node(), Node()
    for node in (one, other):
        node.serve([Leavers])
    deliver(one, Left([7]))
    assert one.service(Leavers).pids == [7]
    assert other.service(Leavers).pids == []


def test_a_handler_can_be_overridden() -> None:
    node = Node()
    node.serve([Twice])
    deliver(node, Left([7]))
    assert node.service(Twice).pids == [7, 7]


def test_references_are_counted_at_their_own_node() -> None:
    one, other = Node(), Node()
    for node in (one, other):
        node.service(References).count((1, 5), 3, 1)
    deliver(one, Sent(1, 5, 4))
    assert one.service(References).owned[1, 5].counts == {3: 1, 4: 1}
    assert other.service(References).owned[1, 5].counts == {3: 1}


def test_a_result_lies_at_its_own_node() -> None:
    one, other = Node(), Node()
    one.service(Cells).settle(3, 5, OURS, "result")
    assert one.service(Cells).cell_of((3, 5)).body == "result"
    assert one.service(References).owned[3, 5].counts == {3: 1}
    assert (3, 5) not in other.service(References).owned


def test_a_channel_is_made_at_its_own_node() -> None:
    one, other = Node(), Node()
    one.service(OwnedChannels).make((1, 5), 3, 2)
    assert one.service(OwnedChannels).channel((1, 5)).size == 2
    with pytest.raises(ValueError, match="not found"):
        other.service(OwnedChannels).channel((1, 5))


def test_a_thread_is_in_one_process() -> None:
    usual, mine, seen = here.node, Node(), []

    def run() -> None:
        here.node = mine
        seen.append(References.here())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [mine.service(References)]
    assert here.node is usual
    assert References.here() is usual.service(References)
