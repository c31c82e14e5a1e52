from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgeglm.core.errors import UserError
from edgeglm.core.store import Store, default_store_root

KEY = "k" * 64


def write_text(text: str):
    def write(folder: Path) -> dict[str, int]:
        (folder / "sub").mkdir()
        (folder / "sub" / "data.txt").write_text(text)
        return {"length": len(text)}

    return write


def must_not_run(folder: Path) -> dict[str, int]:
    raise AssertionError(f"made again in {folder}")


def test_finished_work_is_reused_with_its_provenance(tmp_path: Path):
    made, reused = Store(tmp_path).put(KEY, "pairs", write_text("hello"))
    again, reused_again = Store(tmp_path).put(KEY, "pairs", must_not_run)
    assert (reused, reused_again) == (False, True)
    assert again == made
    assert again.provenance == {"length": 5}
    assert again.file("sub/data.txt").read_text() == "hello"


def test_an_entry_cannot_be_written_to_by_accident(tmp_path: Path):
    artifact, _ = Store(tmp_path).put(KEY, "pairs", write_text("hello"))
    assert artifact.file("sub/data.txt").stat().st_mode & 0o222 == 0


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "add", "record", "schema"])
def test_a_damaged_entry_is_made_again_and_never_returned(tmp_path: Path, harm: str):
    store = Store(tmp_path)
    artifact, _ = store.put(KEY, "pairs", write_text("hello"))
    file, record = artifact.file("sub/data.txt"), artifact.path.parent / "entry.json"
    file.chmod(0o644)
    record.chmod(0o644)
    if harm == "flip":
        file.write_text("jello")
    elif harm == "truncate":
        file.write_text("hel")
    elif harm == "remove":
        file.unlink()
    elif harm == "add":
        (artifact.path / "more").write_text("")
    elif harm == "record":
        record.write_bytes(record.read_bytes()[:-20])
    else:
        record.write_text(json.dumps({**json.loads(record.read_text()), "schema": 99}))
    assert store.get(KEY) is None
    again, reused = store.put(KEY, "pairs", write_text("hello"))
    assert not reused
    assert again.files == artifact.files


@pytest.mark.parametrize("broken", ["edgeglm.core.artifact.sha256_file", "os.scandir"])
def test_an_entry_that_cannot_be_read_just_now_is_not_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
):
    store = Store(tmp_path)
    store.put(KEY, "teacher", write_text("hours of training"))

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as disk:
        disk.setattr(broken, fail)
        with pytest.raises(UserError, match="try again, or remove that folder"):
            store.put(KEY, "teacher", must_not_run)
    assert store.put(KEY, "teacher", must_not_run)[1]


def test_a_failing_writer_leaves_nothing_behind(tmp_path: Path):
    store = Store(tmp_path)

    def fail(folder: Path) -> dict[str, int]:
        (folder / "half").write_text("x")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        store.put(KEY, "pairs", fail)
    assert store.get(KEY) is None
    assert list((tmp_path / "scratch").iterdir()) == []


_KILLED = """
import sys, time
from pathlib import Path
from edgeglm.core.store import Store

def write(folder):
    (folder / "half").write_text("x" * 1000)
    print("writing", flush=True)
    time.sleep(60)
    return {}

Store(Path(sys.argv[1])).put(sys.argv[2], "pairs", write)
"""


def test_kill_9_while_writing_loses_only_the_unfinished_entry(tmp_path: Path):
    store = Store(tmp_path)
    store.put("d" * 64, "pairs", write_text("done"))
    victim = subprocess.Popen([sys.executable, "-c", _KILLED, str(tmp_path), KEY], stdout=subprocess.PIPE)
    assert victim.stdout is not None
    assert victim.stdout.readline() == b"writing\n"
    left = [path for path in (tmp_path / "scratch").iterdir() if path.is_dir()]
    assert len(left) == 1
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    victim.stdout.close()

    assert store.get(KEY) is None
    _, reused = store.put(KEY, "pairs", write_text("hello"))
    assert not reused
    assert store.put("d" * 64, "pairs", must_not_run)[1]
    assert list((tmp_path / "scratch").iterdir()) == [], "what the killed process left is swept"


_KILL_ANYWHERE = """
import sys
from pathlib import Path
from edgeglm.core.store import Store

store = Store(Path(sys.argv[1]))
print("ready", flush=True)
for number in range(10000):
    def write(folder):
        for part in range(5):
            (folder / f"part{part}").write_bytes(bytes([number % 251]) * 4000)
        return {"number": number}
    store.put(f"{number:064d}", "pairs", write)
"""


@pytest.mark.parametrize("delay", [0.02, 0.07, 0.15])
def test_kill_9_at_any_moment_leaves_only_whole_entries(tmp_path: Path, delay: float):
    victim = subprocess.Popen([sys.executable, "-c", _KILL_ANYWHERE, str(tmp_path)], stdout=subprocess.PIPE)
    assert victim.stdout is not None
    assert victim.stdout.readline() == b"ready\n"
    time.sleep(delay)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    victim.stdout.close()

    store = Store(tmp_path)
    present = sorted(path.name for path in (tmp_path / "entries").iterdir())
    assert present == [f"{number:064d}" for number in range(len(present))]
    for key in present:
        artifact = store.get(key)
        assert artifact is not None
        assert artifact.provenance == {"number": int(key)}
        assert len(artifact.files) == 5


def test_scratch_of_a_living_process_is_left_alone(tmp_path: Path):
    with Store(tmp_path).scratch() as mine:
        (mine / "work").write_text("precious")
        with Store(tmp_path).scratch():
            assert (mine / "work").read_text() == "precious"


def _put_counting(root: Path, counter: Path, number: int) -> None:
    def write(folder: Path) -> dict[str, int]:
        with counter.open("a") as file:
            file.write(f"{number}\n")
        time.sleep(0.05)
        (folder / "data").write_text("same")
        return {}

    Store(root).put(KEY, "pairs", write)


def test_two_builds_at_once_do_the_work_once(tmp_path: Path):
    counter = tmp_path / "counter"
    context = multiprocessing.get_context("spawn")
    store = tmp_path / "store"
    workers = [context.Process(target=_put_counting, args=(store, counter, number)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 3
    assert len(counter.read_text().splitlines()) == 1
    assert Store(store).get(KEY) is not None


def test_gc_removes_the_longest_unused_until_the_rest_fits(tmp_path: Path):
    store = Store(tmp_path)
    for age, name in enumerate("abc"):
        store.put(name * 64, "pairs", write_text(name * 10_000))
        os.utime(tmp_path / "used" / (name * 64), (1000 - age, 1000 - age))
    store.get("c" * 64)  # the oldest is used again
    one = store.entries()[0].size_bytes
    removed = store.collect(quota_bytes=2 * one + 100)
    assert [entry.key[0] for entry in removed] == ["b"]
    assert store.get("b" * 64) is None
    assert store.get("a" * 64) is not None
    assert store.get("c" * 64) is not None


_COLLECT = """
import sys
from pathlib import Path
from edgeglm.core.store import Store

for entry in Store(Path(sys.argv[1])).collect(quota_bytes=0):
    print(entry.key)
"""


@pytest.mark.parametrize("again", [False, True], ids=["made", "found"])
def test_gc_leaves_what_another_process_was_given_and_takes_it_afterwards(tmp_path: Path, again: bool):
    def collected() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", _COLLECT, str(tmp_path)], capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    Store(tmp_path).put("d" * 64, "pairs", write_text("of a build that is over"))
    if again:
        Store(tmp_path).put(KEY, "teacher", write_text("input of the next stage"))
    building = Store(tmp_path)
    artifact, reused = building.put(KEY, "teacher", write_text("input of the next stage"))
    assert reused == again
    assert collected() == ["d" * 64]
    assert all((artifact.path / name).is_file() for name in artifact.files)
    assert [entry.key for entry in building.collect(quota_bytes=0)] == [KEY], "its own it may give up"
    building.put(KEY, "teacher", write_text("made again"))
    assert collected() == [], "it is held anew"
    del building
    assert collected() == [KEY]


def test_gc_does_not_wait_for_what_is_being_written(tmp_path: Path):
    store, seen = Store(tmp_path), []

    def write(folder: Path) -> dict[str, int]:
        junk = tmp_path / "entries" / KEY
        junk.mkdir()
        (junk / "entry.json").write_text("{}")
        seen.append(Store(tmp_path).collect(quota_bytes=0))
        shutil.rmtree(junk)
        return {}

    store.put(KEY, "pairs", write)
    assert seen == [[]]


def test_gc_within_the_quota_removes_nothing(tmp_path: Path):
    store = Store(tmp_path)
    store.put(KEY, "pairs", write_text("hello"))
    assert store.collect() == []
    assert store.put(KEY, "pairs", must_not_run)[1]


def test_gc_removes_corrupt_entries_too(tmp_path: Path):
    store = Store(tmp_path)
    (tmp_path / "entries" / KEY).mkdir()
    (tmp_path / "entries" / KEY / "junk").write_bytes(b"x" * 100)
    assert [entry.kind for entry in store.entries()] == ["corrupt"]
    assert len(store.collect(quota_bytes=0)) == 1
    assert store.entries() == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_bad_input_with_a_remedy_and_loses_nothing(tmp_path: Path, number: int):
    store = Store(tmp_path)
    store.put("d" * 64, "pairs", write_text("done"))

    def fail(folder: Path) -> dict[str, int]:
        (folder / "half").write_text("x")
        raise OSError(number, os.strerror(number))

    with pytest.raises(UserError, match=r"edgeglm cache gc") as caught:
        store.put(KEY, "pairs", fail)
    assert str(tmp_path) in str(caught.value)
    assert store.get(KEY) is None
    assert store.put("d" * 64, "pairs", must_not_run)[1]


def test_a_write_cut_off_by_a_limit_is_not_kept(tmp_path: Path):
    store = Store(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            store.put(KEY, "pairs", write_text("x" * 100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert store.get(KEY) is None


def test_a_store_where_nothing_can_be_made_says_which_variable_to_set(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set EDGEGLM_STORE"):
        Store(tmp_path / "file" / "store")


def test_the_store_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("EDGEGLM_STORE", str(tmp_path))
    assert default_store_root() == tmp_path
    monkeypatch.delenv("EDGEGLM_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_store_root() == tmp_path / "cache" / "edgeglm"


def test_states_of_trainings_that_were_given_up_go_after_a_week(tmp_path: Path):
    store = Store(tmp_path)
    for name, days in (("fresh", 1), ("stale", 8)):
        folder = store.checkpoints / name
        folder.mkdir(parents=True)
        (folder / "heads.pt").write_bytes(b"state")
        then = time.time() - days * 24 * 3600
        for path in (folder / "heads.pt", folder):
            os.utime(path, (then, then))
    store.collect()
    assert [path.name for path in store.checkpoints.iterdir()] == ["fresh"]
    store.collect(quota_bytes=0)
    assert list(store.checkpoints.iterdir()) == []


def test_the_states_of_a_training_that_runs_stay_when_all_is_collected(tmp_path: Path):
    store = Store(tmp_path)
    state = store.checkpoints / "phase" / "heads.pt"

    def train(folder: Path) -> dict[str, int]:
        state.parent.mkdir(parents=True)
        state.write_bytes(b"state")
        Store(tmp_path).collect(quota_bytes=0)
        assert state.read_bytes() == b"state"
        return {}

    store.put(KEY, "teacher", train)
    store.collect(quota_bytes=0)
    assert not state.parent.exists()


@pytest.mark.parametrize(
    "error", [OSError("65536 requested and 512 written"), RuntimeError("unexpected pos")]
)
def test_a_full_disk_is_told_as_one_where_a_library_has_another_error_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """As numpy and torch do: it was an unexpected failure, with nothing that a user could do."""
    store = Store(tmp_path / "store")

    def write(folder: Path) -> dict[str, int]:
        raise error

    with pytest.raises(type(error)):
        store.put("0" * 64, "made", write)
    usage = shutil.disk_usage(tmp_path)._replace(free=4096)
    monkeypatch.setattr("edgeglm.core.store.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"no space is left there; free some space \(edgeglm cache gc\)"):
        store.put("0" * 64, "made", write)
