"""The lines of `hpcdist top`: whatever the terminal's size and the number of workers."""

from typing import Any

import pytest

from hpcdist._cli.top_page import SORTS, page


def row(pid: int, **more: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "pid": pid,
        "host": "n1",
        "os_pid": 1000 + pid,
        "manager": "LocalManager",
        "job_id": None,
        "world": 1,
        "rank": pid - 2,
        "tags": [],
        "time_left": None,
        "state": "idle",
        "since": 0.0,
        "call": None,
        "age": None,
        "calls": [],
        "running": 0,
        "queued": 0,
        "cpu": 0.0,
        "rss": 40_000_000,
        "bytes_out": 100,
        "bytes_out_rate": 0,
        "bytes_in": 100,
        "bytes_in_rate": 0,
    }
    return {**made, **more}


def seen(*workers: dict[str, Any], jobs: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {
        "protocol": 1,
        "version": "1",
        "at": 0.0,
        "driver": row(1, command="python driver.py"),
        "workers": list(workers),
        "jobs": list(jobs),
        "pairs": [],
    }


BUSY = row(2, state="busy", call="simulate", age=61.0, running=1, queued=3, cpu=99.6)
UNKNOWN = row(3, state="unresponsive", running=None, queued=None, cpu=None, rss=None)


def test_a_worker_and_what_it_does() -> None:
    text = "\n".join(page(seen(BUSY, row(3, host="n2", job_id="17", time_left=3661.0))))
    assert "2 workers: 1 busy, 1 idle" in text
    assert "-- n1: 1 busy, 3 queued, CPU 100%, 40.0MB" in text
    assert "-- n2, job 17, 1:01:01 left: 1 idle" in text
    (line,) = [line for line in text.splitlines() if "simulate" in line]
    assert line.split()[:6] == ["2", "busy", "simulate", "1:01", "3", "100"]


def test_calls_that_have_no_name_or_are_many() -> None:
    text = "\n".join(page(seen(row(2, running=4, call="f", age=0.5), row(3, running=1))))
    assert "f +3" in text
    assert "(a coroutine)" in text


def test_a_job_that_waits() -> None:
    job = {"job_id": "5", "state": "PENDING", "reason": "Resources", "workers": 0, "wanted": 8}
    lines = page(seen(jobs=({**job, "time_left": None},)))
    assert "job 5 PENDING (Resources): 0 of 8 workers" in lines


def test_maps_under_way() -> None:
    known = {"function": "simulate", "done": 400, "total": 1600, "failures": 2, "workers": 8}
    lines = page({**seen(BUSY), "maps": [{**known, "rate": 8.0, "to_go": 150.0}]})
    assert "map simulate 25%: 400 of 1,600, 8 a second, 2:30 to go, 8 workers, 2 failures" in lines
    endless = {**known, "total": None, "failures": 0, "rate": 0.5, "to_go": None}
    lines = page({**seen(BUSY), "maps": [endless] * 9}, 40, height=23)
    assert lines[2] == "map simulate: 400, 0.5 a second, 8 worke"
    assert "(4 more maps)" in lines


@pytest.mark.parametrize("width", [1, 5, 20, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    lines = page(seen(BUSY, UNKNOWN, row(4, call="f" * 300, age=1e6, running=2)), width)
    assert max(map(len, lines)) <= width


def test_what_matters_most_stays_on_a_narrow_terminal() -> None:
    text = "\n".join(page(seen(BUSY), 20))
    assert "simulate" in text
    assert "MEM" not in text


def test_many_workers_are_a_line_for_each_host_and_job() -> None:
    many = [row(2 + k, host=f"n{k // 64}", state="busy", running=1) for k in range(256)]
    lines = page(seen(*many), 80, height=23)
    assert len(lines) <= 23
    assert sum(line.startswith("-- n") for line in lines) == 4
    assert any("64 busy" in line for line in lines)
    assert len(page(seen(*many))) > 256


@pytest.mark.parametrize("sort", SORTS)
def test_every_order(sort: str) -> None:
    lines = page(seen(row(3), UNKNOWN | {"pid": 4}, BUSY, row(5)), sort=sort)
    pids = [line.split()[0] for line in lines if line[:3].strip().isdigit()]
    assert pids[0] == "1"
    assert pids[1] == ("3" if sort in ("mem", "bytes") else "2")


def test_a_word_filters() -> None:
    workers = (BUSY, row(3, host="far"), row(4, tags=["gpu"]))
    for word, pid in (("simul", 2), ("far", 3), ("gpu", 4)):
        lines = page(seen(*workers), word=word)
        pids = [line.split()[0] for line in lines if line[:3].strip().isdigit()]
        assert pids == ["1", str(pid)]
