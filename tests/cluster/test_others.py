"""Libraries of others at work on hpcdist's workers: what `docs/executor.md` says of them."""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hpcdist
from hpcdist import comm, everywhere, myid, spmd

any_mpi = pytest.mark.any_mpi


def rosenbrock(x: Any) -> float:
    return float(((1 - x[0]) ** 2) + 100 * (x[1] - x[0] ** 2) ** 2)


def where_and_square(x: int) -> tuple[int, int]:
    return myid(), x * x


def summed(chunk: Any) -> Any:
    return chunk.assign(sum=chunk.a + chunk.b, pid=myid())


def write_share(path: str, count: int) -> int:
    """Write a file together with the other ranks of this task: each its own share."""
    from mpi4py import MPI

    world = comm()
    file = MPI.File.Open(world, path, MPI.MODE_CREATE | MPI.MODE_WRONLY)
    mine = np.full(count, world.rank, dtype="i4")
    file.Write_at_all(world.rank * mine.nbytes, mine)
    file.Close()
    return world.size


def there_and_back(count: int) -> tuple[bool, int]:
    """Transform an array that lies distributed over the ranks of this task, and back."""
    import mpi4py_fft as fft  # on workers alone: it initialises MPI

    plan = fft.PFFT(comm(), [count] * 3, axes=(0, 1, 2), dtype=float)
    array = fft.newDistArray(plan, False)
    array[:] = np.random.default_rng(comm().rank).random(array.shape)
    back = plan.backward(plan.forward(array), fft.newDistArray(plan, False))
    return bool(np.allclose(array, back)), array.size


def fill_years(path: str, first: int, count: int) -> int:
    """Write some years of a dataset that others fill at the same moment: chunks of its own."""
    zarr = pytest.importorskip("zarr")
    years = np.arange(first, first + count)
    zarr.open_array(path, path="rain", mode="r+")[years[0] : years[-1] + 1] = years[:, None]
    return myid()


@any_mpi
def test_scipy_minimises_with_our_map(pids: list[int]) -> None:
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
    with hpcdist.Executor() as executor:
        found = optimize.differential_evolution(
            rosenbrock, [(-2, 2)] * 2, workers=executor.map, updating="deferred", seed=1, maxiter=30
        )
    assert found.fun < 1e-3
    alone = optimize.differential_evolution(
        rosenbrock, [(-2, 2)] * 2, updating="deferred", seed=1, maxiter=30
    )
    assert (found.x == alone.x).all()


@any_mpi
def test_dask_computes_on_our_workers(pids: list[int]) -> None:
    dask = pytest.importorskip("dask", reason="dask is not installed")
    squares = [dask.delayed(where_and_square)(x) for x in range(20)]
    with hpcdist.Executor() as executor:
        (found,) = dask.compute(squares, scheduler=executor)
    assert [square for _, square in found] == [x * x for x in range(20)]
    assert {pid for pid, _ in found} <= set(pids)


@any_mpi
def test_asyncio_runs_tasks_in_our_executor(pids: list[int]) -> None:
    async def main() -> list[tuple[int, int]]:
        loop = asyncio.get_running_loop()
        with hpcdist.Executor() as executor:
            asked = [loop.run_in_executor(executor, where_and_square, x) for x in range(20)]
            return list(await asyncio.gather(*asked))

    found = asyncio.run(main())
    assert [square for _, square in found] == [x * x for x in range(20)]
    assert {pid for pid, _ in found} <= set(pids)


@any_mpi
def test_a_bar_as_of_tqdm_contrib(pids: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    tqdm = pytest.importorskip("tqdm", reason="tqdm is not installed")

    def executor_map(kind: type[Executor], f: Callable[..., Any], *items: Iterable[Any]) -> Any:
        """Do what `tqdm.contrib.concurrent.process_map` does, with an executor of any kind."""
        with kind() as executor:
            return list(tqdm.tqdm(executor.map(f, *items), total=20))

    assert executor_map(hpcdist.Executor, pow, range(20), [2] * 20) == [x * x for x in range(20)]
    assert "20/20" in capsys.readouterr().err


@any_mpi
def test_a_table_of_pandas_in_chunks(pids: list[int]) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    table = pandas.DataFrame({"a": range(1000), "b": range(1000, 2000)})
    chunks = [table.iloc[start : start + 100] for start in range(0, 1000, 100)]
    whole = pandas.concat(hpcdist.pmap(summed, chunks))
    assert (whole["sum"] == table.a + table.b).all()
    assert set(whole["pid"]) <= set(pids)


@any_mpi
def test_chunks_of_a_dataset_are_written_side_by_side(pids: list[int], tmp_path: Path) -> None:
    pytest.importorskip("zarr", reason="zarr is not installed")
    xarray = pytest.importorskip("xarray", reason="xarray is not installed")
    path, count = str(tmp_path / "rain.zarr"), 10
    whole = xarray.Dataset({"rain": (("year", "place"), np.zeros((60, 5)))}, {"year": range(60)})
    whole.to_zarr(path, consolidated=False, encoding={"rain": {"chunks": (count, 5)}})
    wrote = hpcdist.pmap(lambda first: fill_years(path, first, count), range(0, 60, count))
    assert set(wrote) <= set(pids)
    with xarray.open_dataset(path, engine="zarr", consolidated=False) as written:
        assert (written.rain.values == written.year.values[:, None]).all()
        assert written.rain.encoding["chunks"] == (count, 5)


def test_mpi_files_are_written_by_tasks_of_several_ranks(pids: list[int], tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{k}.bin") for k in range(6)]
    asked = [spmd.submit(write_share, path, 1000, ranks=2) for path in paths]
    assert [future.fetch(60) for future in asked] == [2] * 6
    for path in paths:
        written = np.fromfile(path, dtype="i4")
        assert (written == np.repeat([0, 1], 1000)).all()
    assert set(everywhere.call(myid, pids=pids)) == set(pids)


@pytest.mark.skipif(
    find_spec("mpi4py_fft") is None, reason="mpi4py-fft is not installed: it needs FFTW's headers"
)
def test_a_distributed_array_is_transformed(pids: list[int]) -> None:
    assert spmd(there_and_back, 8, pids=pids[:2]) == [(True, 256)] * 2
    assert spmd.submit(there_and_back, 8, ranks=2).fetch() == (True, 256)
