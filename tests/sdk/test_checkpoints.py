"""What a worker has reached is kept whole, at little cost, and read again by the one that takes its place."""

import resource
import shutil
import threading
import time

import numpy as np
import pytest

from flame.errors import WorkerError
from flame.sdk import checkpoints as module
from flame.sdk.checkpoints import Checkpoints, State
from flame.sdk.link import Link
from flame.spec.nouns import CheckpointPolicy


class Keeper(Link):
    """Keeps checkpoints, when it is let to."""

    keeps = True

    def __init__(self, folder, kept):
        super().__init__(folder)
        self.kept = kept
        kept.mkdir()
        self.rounds, self.warnings = [], []
        self.open, self.begun = threading.Event(), threading.Event()
        self.open.set()
        self.refuse = None

    def checkpoint(self, round, path, timeout=None):
        self.begun.set()
        assert self.open.wait(20)
        if self.refuse:
            raise WorkerError(self.refuse)
        shutil.move(path, self.kept / f"{round}.safetensors")
        self.rounds.append(round)

    def warning(self, message):
        self.warnings.append(message)


@pytest.fixture
def link(tmp_path, monkeypatch):
    monkeypatch.setenv("FLAME_CHECKPOINTS", str(tmp_path / "kept"))
    return Keeper(tmp_path / "out", tmp_path / "kept")


def state(value, size=10):
    return State({"model/w": np.full(size, value, np.float32), "user/n": np.array(3)}, {"noise": {"state": 1 << 100}})


def test_what_was_kept_is_read_again_as_it_was(link):
    first = Checkpoints(link, CheckpointPolicy())
    assert first.commit(4, lambda: state(1.5))
    assert first.durable == 4
    number, found = Checkpoints(link, CheckpointPolicy()).load()
    assert number == 4
    np.testing.assert_array_equal(found.part("model")["w"], np.full(10, 1.5, np.float32))
    assert found.part("user")["n"].shape == ()
    assert found.values == {"noise": {"state": 1 << 100}}


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(link):
    kept = Checkpoints(link, CheckpointPolicy())
    for number in (1, 2, 3):
        kept.commit(number, lambda number=number: state(number))
    whole = (link.kept / "3.safetensors").read_bytes()
    (link.kept / "3.safetensors").write_bytes(whole[:-5])
    (link.kept / "2.safetensors").write_bytes(b"")
    after = Checkpoints(link, CheckpointPolicy())
    assert after.load()[0] == 1
    assert len(link.warnings) == 2
    assert after.load(before=1) is None


def test_rounds_that_end_while_one_is_handed_over_and_shortly_after_are_passed_over(link, monkeypatch):
    kept = Checkpoints(link, CheckpointPolicy())
    link.open.clear()
    kept.offer(1, lambda: state(1))
    assert link.begun.wait(10)
    made = []
    kept.offer(2, lambda: made.append(2) or state(2))
    assert not made, "it costs nothing"
    link.open.set()
    assert kept.commit(3, lambda: state(3))
    assert link.rounds == [1, 3]
    kept._next = time.monotonic() + 100
    kept.offer(4, lambda: made.append(4) or state(4))
    assert not made
    kept.offer(5, lambda: state(5), last=True)
    kept.close()
    assert link.rounds == [1, 3, 5]


def test_a_small_state_may_change_at_once_and_a_large_one_after_settling(link):
    kept = Checkpoints(link, CheckpointPolicy())
    for size in (10, module.SMALL):
        arrays = state(1.0, size)
        kept._next = 0.0
        kept.offer(size, lambda arrays=arrays: arrays, last=True)
        if size == module.SMALL:
            kept.settle()
        arrays.arrays["model/w"][:] = 7
        assert kept.commit(size, lambda: state(0))
        _, found = kept.load(before=size + 1)
        assert (found.arrays["model/w"] == 1).all()


def test_every_so_many_rounds_or_never(link):
    kept = Checkpoints(link, CheckpointPolicy(every=3))
    assert [number for number in range(1, 8) if kept.due(number)] == [3, 6]
    never = Checkpoints(link, CheckpointPolicy(every=0))
    assert not never.due(3, last=True)
    assert never.commit(3, lambda: state(1)), "nothing is wanted, so nothing is missing"
    assert link.rounds == []


def test_a_full_disk_is_told_once_and_the_work_goes_on(link):
    kept = Checkpoints(link, CheckpointPolicy())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (4096, before[1])
    )  # Python ignores SIGXFSZ: writing fails as on a full disk
    try:
        assert not kept.commit(1, lambda: state(1.0, 100_000))
        assert not kept.commit(2, lambda: state(1.0, 100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(link.warnings) == 1
    assert "The job goes on" in link.warnings[0]
    assert list(link.folder.iterdir()) == [], "nothing half-written is left"
    assert kept.commit(3, lambda: state(2.0)), "there is room again"
    assert link.rounds == [3]


def test_what_the_server_refuses_or_does_not_take_is_told(link):
    kept = Checkpoints(link, CheckpointPolicy())
    link.refuse = "The disk of the server is full."
    assert not kept.commit(1, lambda: state(1))
    assert "The disk of the server is full" in link.warnings[0]
    link.refuse = None
    link.open.clear()
    late = Checkpoints(link, CheckpointPolicy())
    assert not late.commit(1, lambda: state(1), patience=0.05)
    assert "nobody has taken it within 0.05 s" in link.warnings[1]
    link.open.set()
    late.close()
    assert link.rounds == [1]
