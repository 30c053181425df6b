"""What processes do together, each with a state of its own: two of them in one interpreter."""

import pickle
from typing import Any

import pytest

from hpcdist._collective import trees
from hpcdist._collective.everywhere import CodeForAll
from hpcdist._collective.trees import FAILED, OK, Branch, Job, Outcome, Part, Root, Trees
from hpcdist._collective.value_copies import ValueCopies
from hpcdist._items.progress_bars import LoopBars
from hpcdist._runtime.node import Node
from hpcdist._runtime.references import Reference
from hpcdist._transport.router import Peer
from hpcdist._wire import messages
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import CONTROL
from hpcdist._wire.messages import Down, Store, Up
from hpcdist._worker.services import EVERY_PROCESS


@pytest.fixture
def two() -> tuple[Node, Node]:
    one, other = Node(), Node()
    for node in (one, other):
        node.serve(EVERY_PROCESS)
    return one, other


def deliver(node: Node, message: Any, body: bytes = b"") -> None:
    number = messages.NUMBERS[type(message)]
    node.deliver(None, CONTROL, 0, 0, number, messages.encode(message, body), ())  # type: ignore[arg-type]


def share_of(root: int, kind: int, **more: Any) -> Down:
    return Down(
        root=root,
        number=1,
        kind=kind,
        forwards=True,
        combines=False,
        with_refs=False,
        position=0,
        below=more.pop("below", ()),
        above=(root, -1),
        oldest=1,
    )


def test_a_share_is_that_of_the_process_it_came_to(two: tuple[Node, Node]) -> None:
    one, other = two
    started: list[Job] = []
    for node in two:
        node.service(Trees).starters[77] = lambda job, *rest: started.append(job)
    deliver(one, share_of(5, 77))
    assert [job.trees for job in started] == [one.service(Trees)]
    assert list(one.service(Trees).jobs) == [(5, 1, 0)]
    assert not other.service(Trees).jobs


def test_every_kind_of_job_has_a_starter(two: tuple[Node, Node]) -> None:
    kinds = {trees.CALL, trees.LOOP, trees.REDUCE, trees.MAP, trees.RECEIVE, trees.DROP}
    for node in two:
        assert set(node.service(Trees).starters) == kinds


def test_a_share_whose_root_dies_is_dropped(two: tuple[Node, Node]) -> None:
    one, other = two
    for node in two:
        node.service(Trees).starters[77] = lambda job, *rest: None
        deliver(node, share_of(5, 77))
    one.died(5, one.members.death(5))
    assert not one.service(Trees).jobs
    assert other.service(Trees).jobs


def test_who_is_asked_again_asks_those_again_that_have_answered(
    two: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others' outcomes are on their way: they would come twice."""
    one, _ = two
    service = one.service(Trees)
    service.starters[77] = lambda job, *rest: None
    asked: list[int] = []
    monkeypatch.setattr(service, "send", lambda pid, *rest, **kw: asked.append(pid) or True)
    share = share_of(5, 77, below=(Branch(1, 8), Branch(2, 9)))
    deliver(one, share)
    deliver(one, Up(5, 1, 0, 1, [(1, OK, b"", 0, False)]))
    deliver(one, share)
    assert asked == [8, 9, 8]


class Held(Reference):
    """A value of process 1."""

    where, whence, id = 1, 1, 70

    def _facts(self) -> tuple[()]:
        return ()


def test_references_are_announced_once_however_often_work_is_sent(
    two: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who gets the work twice takes in the references inside with the first."""
    one, _ = two
    service = one.service(Trees)
    monkeypatch.setattr(service, "send", lambda *args, **kw: True)
    root = Root(service, 77, [8, 9], combines=False)
    payload = Payload(b"", (), [Held()])
    root.send(Part(Branch(0, 8, (Branch(1, 9),)), (1, -1), payload, True), 1, False)
    root.send(Part(Branch(1, 9), (1, -1), payload, True), 1, False)
    assert service.references.owned[1, 70].counts == {8: 1, 9: 1}


def test_an_outcome_that_comes_as_its_job_ends_leaves_nothing(
    two: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job, interrupted, ends between the look for it and what it takes in."""
    one, _ = two
    service = one.service(Trees)
    service.starters[77] = lambda job, *rest: None
    below = (Branch(1, 1), Branch(2, 1))
    deliver(one, share_of(5, 77, below=below)._replace(combines=True, forwards=False))
    (job,) = service.jobs.values()
    take = Job.take

    def take_late(self: Job, *outcome: Any) -> None:
        self.fail([Outcome(0, FAILED, b"")])
        take(self, *outcome)

    monkeypatch.setattr(Job, "take", take_late)
    deliver(one, Up(5, 1, 0, 1, [tuple(Outcome(1, OK, b""))]))
    assert job.ended
    assert not service.jobs
    deliver(one, Up(5, 1, 0, 2, [tuple(Outcome(2, OK, b""))]))
    assert not service._in_vain
    assert not service._early


def test_a_job_that_nobody_waits_for_ends_with_its_last_outcome(two: tuple[Node, Node]) -> None:
    """Ctrl-C came between its beginning and the wait for it."""
    one, _ = two
    service = one.service(Trees)
    root = Root(service, 77, [5, 6], combines=False)
    root.waiting = {0: Branch(0, 5), 1: Branch(1, 6)}
    service.jobs[root.key] = root
    number = root.key[1]
    deliver(one, Up(one.me, number, -1, 0, [tuple(Outcome(0, OK, b""))]))
    assert service.jobs
    deliver(one, Up(one.me, number, -1, 1, [tuple(Outcome(1, OK, b""))]))
    assert root.is_done()
    assert not service.jobs


def test_what_could_not_start_fails_at_its_root(two: tuple[Node, Node]) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("no")

    one, _ = two
    ours = one.service(Trees)
    ours.starters[77] = refuse
    root = trees.Root(ours, 77, [1], combines=False)
    branches = trees.flat([1], [0])
    root.hand_out([trees.Part(b, (1, -1), root.payload, True) for b in branches], branches)
    assert root.is_done()
    assert not root.went_well()
    assert root.sorted()[0].how != OK


def test_a_value_is_held_by_the_process_that_it_came_to(two: tuple[Node, Node]) -> None:
    one, other = two
    peer = Peer(5, one.progress)
    said = Store((5, 9), False)
    number = messages.NUMBERS[Store]
    body = messages.encode(said, pickle.dumps([1, 2]))
    one.deliver(peer, CONTROL, 0, 4, number, body, ())
    held = one.service(ValueCopies).held
    assert held[5, 9].load() == [1, 2]
    assert not other.service(ValueCopies).held
    one.died(5, one.members.death(5))
    assert not held


def test_a_bar_is_moved_at_its_own_process(two: tuple[Node, Node]) -> None:
    one, other = (node.service(LoopBars) for node in two)
    shown = one.show(10, 1)
    other.count(shown.place, 4)
    assert shown._left == 10
    one.count(shown.place, 4)
    assert shown._left == 6
    shown.end(0)


def test_code_for_later_workers_is_kept_by_the_process_that_said_it(
    two: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (node.service(CodeForAll) for node in two)
    monkeypatch.setattr(one, "gather", lambda *_: [])
    one.everywhere("x = 1", None, True)
    assert len(one._later) == 1
    assert not other._later
