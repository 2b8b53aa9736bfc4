"""How many local workers there are, and what each of them gets."""

import pytest

from workbench.errors import ConfigError
from workbench.execute import local
from workbench.execute.local import LocalExecutor, _environments


@pytest.fixture
def six_cores(monkeypatch):
    monkeypatch.setattr(local, "n_cores", lambda: 6)
    monkeypatch.setattr(local, "gpu_names", list)


@pytest.mark.usefixtures("six_cores")
def test_workers_are_as_many_as_their_threads_leave_room_for():
    assert LocalExecutor().n_workers == 1
    assert LocalExecutor(n_threads=2).n_workers == 3
    assert LocalExecutor(5, n_threads=2).n_workers == 5
    assert LocalExecutor(n_threads=2, shards=True).n_workers == 1


@pytest.mark.usefixtures("six_cores")
@pytest.mark.parametrize("n_threads", [0, 7])
def test_threads_that_are_not_there_are_refused(n_threads):
    with pytest.raises(ConfigError, match=f"between 1 and the 6 cores here; got {n_threads}"):
        LocalExecutor(n_threads=n_threads)


def test_there_is_one_worker_a_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert LocalExecutor().n_workers == 2
    assert LocalExecutor(shards=True).n_workers == 1
    places = _environments(["3", "5"], 3)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == ["3", "5", "3"]


@pytest.mark.usefixtures("six_cores")
def test_cores_are_shared_out_unless_someone_says_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [place["OMP_NUM_THREADS"] for place in _environments([], 2)] == ["3", "3"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert _environments([], 2)[0]["OMP_NUM_THREADS"] == "5"
    assert _environments([], 2, 4)[0]["OMP_NUM_THREADS"] == "4"
