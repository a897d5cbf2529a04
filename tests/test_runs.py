"""Files are whole or absent, and a run folder holds one run."""

import errno
import fcntl
import json
import mmap
import os
import shutil
import signal
import stat
import sys
import threading
from pathlib import Path

import pytest
import torch

from ddpp import runs, seeds
from ddpp.config import Config
from ddpp.errors import UserError


def test_tensors_come_back_with_their_metadata(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).reshape(2, 3).t(), "b": torch.tensor(2.5)}
    runs.write_tensors(tmp_path / "x.safetensors", tensors, {"step": 3})
    found, meta = runs.read_tensors(tmp_path / "x.safetensors", "checkpoint")
    assert meta == {"step": 3}
    assert torch.equal(found["a"], tensors["a"]) and torch.equal(found["b"], tensors["b"])


def _fail_half_way(path: Path) -> None:
    with runs.replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    runs.write_text(tmp_path / "x", "old")
    with pytest.raises(UserError, match=r"the disk is full: .*x was not written"):
        _fail_half_way(tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write"):
        runs.write_text(tmp_path / "x", "text")


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="there is no checkpoint at"):
        runs.read_tensors(path, "checkpoint")
    runs.write_tensors(path, {"a": torch.zeros(100)}, {})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="is damaged or no checkpoint"):
        runs.read_tensors(path, "checkpoint")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, str(path))
    with pytest.raises(UserError, match="but no checkpoint written by ddpp"):
        runs.read_tensors(path, "checkpoint")


def test_damaged_and_absent_tables_are_named(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(UserError, match=r"holds no results\.json: it is no finished run"):
        runs.read_json(path, "it is no finished run")
    for text in ('{"a": ', "[1]", "\x00"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"results\.json is damaged: .* Remove it, or restore it from a copy"):
            runs.read_json(path)
    runs.write_json(path, {"a": 1})
    assert runs.read_json(path) == {"a": 1}


def test_a_log_continues_at_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = runs.Log(path, 0)
    for step in range(5):
        log.add({"step": step})
    log.flush()
    with open(path, "a") as file:
        file.write('{"step": 5, "lo')  # a crash in the middle of a line
    log = runs.Log(path, 3)
    log.add({"step": 3})
    log.flush()
    log.add({"step": 4})
    log.flush()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, which is always full")
def test_a_log_on_a_full_disk_is_said(tmp_path: Path) -> None:
    log = runs.Log(tmp_path / "log.jsonl", 0)
    log.add({"step": 0})
    log.flush()
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    log.add({"step": 1})
    with pytest.raises(UserError, match=r"the disk is full: .*log.jsonl was not written"):
        log.flush()


def opened(path: Path, config: Config, data: dict[str, str], *, resume: bool) -> Path:
    """A run folder that was opened and left."""
    with runs.open_folder(path, config, data, resume=resume) as folder:
        return folder


def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    folder, config, data = tmp_path / "run", Config(), {"fingerprint": "a"}
    opened(folder, config, data, resume=False)
    other = config.with_values({"distill": {"ipc": 10}}, "test")
    with pytest.raises(UserError, match=r"was made with other options \(distill.ipc is 1 there and 10 here\)"):
        opened(folder, other, data, resume=True)
    with pytest.raises(UserError, match=r"unfinished run\. Continue it with --resume, or choose another --out\."):
        opened(folder, config, data, resume=False)
    elsewhere = config.with_values({"run": {"threads": 3, "device": "cpu"}}, "test")
    with pytest.raises(
        UserError, match=r"was made with other options \(run.device is 'auto' there and 'cpu' here, run.threads"
    ):
        opened(folder, elsewhere, data, resume=False)
    assert opened(folder, elsewhere, data, resume=True) == folder and runs.saved_config(folder) == elsewhere
    opened(folder, config, data, resume=True)
    (folder / "results.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds a finished run\. Choose another --out\."):
        opened(folder, config, data, resume=False)
    with pytest.raises(UserError, match=r"absent is no run folder of ddpp\.distill: it holds no config\.toml"):
        runs.saved_config(tmp_path / "absent")
    assert opened(folder, config, data, resume=True) == folder
    with pytest.raises(UserError, match="holds no run to resume"):
        opened(tmp_path / "absent", config, data, resume=True)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is not a run folder"):
        opened(tmp_path / "foreign", config, data, resume=False)


def test_what_a_killed_process_left_keeps_nobody_out(tmp_path: Path) -> None:
    folder, config, data = tmp_path / "run", Config(), {"fingerprint": "a"}
    folder.mkdir()
    (folder / f"{runs.TEMPORARY}config-x.toml").write_text("[da")
    assert opened(folder, config, data, resume=False) == folder
    (folder / f"{runs.TEMPORARY}checkpoint-x.safetensors").write_bytes(b"half")
    assert opened(folder, config, data, resume=True) == folder
    assert {path.name for path in folder.iterdir()} == {"config.toml", "data.json"}


def test_two_that_begin_at_once_see_a_run_in_use(tmp_path: Path) -> None:
    """The second may come upon the first one's files before or after they are whole."""
    folder, config, data = tmp_path / "run", Config(), {"fingerprint": "a"}
    with runs.alone(folder, "distill"):
        for name in ("data.json", f"{runs.TEMPORARY}config-x.toml"):
            (folder / name).write_text("{}")
            with pytest.raises(runs.InUse):
                opened(folder, config, data, resume=False)


def test_a_peak_of_memory_can_be_forgotten() -> None:
    cpu = torch.device("cpu")
    runs.forget_peak_memory(cpu)
    before = runs.peak_memory_mb(cpu)
    with mmap.mmap(-1, 160_000_000) as held:  # past the allocator, which may have as much that it does not give back
        held.write(b"x" * len(held))
    grown = runs.peak_memory_mb(cpu)
    runs.forget_peak_memory(cpu)
    assert grown > before + 100
    if sys.platform == "linux":
        assert runs.peak_memory_mb(cpu) < grown - 100


def test_a_file_system_that_syncs_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def files_alone(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(handle)

    monkeypatch.setattr(os, "fsync", files_alone)
    runs.write_text(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_a_run_goes_on_with_the_same_data_wherever_they_are(tmp_path: Path) -> None:
    config, moved = (Config().with_values({"data": {"data_root": name}}, "test") for name in ("here", "there"))
    opened(tmp_path / "run", config, {"fingerprint": "a"}, resume=False)
    with pytest.raises(UserError, match="distilled from other data than its data set holds now; check --data-root"):
        opened(tmp_path / "run", moved, {"fingerprint": "b"}, resume=True)
    assert runs.saved_config(tmp_path / "run") == config
    opened(tmp_path / "run", moved, {"fingerprint": "a"}, resume=True)
    assert runs.saved_config(tmp_path / "run") == moved
    (tmp_path / "run" / "data.json").unlink()  # as in a run of an earlier version
    opened(tmp_path / "run", config, {"fingerprint": "b"}, resume=True)
    runs.discard(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_in_the_hands_of_one_process(tmp_path: Path) -> None:
    folder, config, data = tmp_path / "run", Config(), {"fingerprint": "a"}
    for resume in (False, True):
        with runs.open_folder(folder, config, data, resume=resume):
            for other in (False, True):
                with pytest.raises(runs.InUse, match=f"another process runs ddpp.distill on {folder}. Wait for it"):
                    opened(folder, config, data, resume=other)
            with runs.alone(folder, "evaluate"):
                pass
    assert {path.name for path in folder.iterdir()} == {"config.toml", "data.json"}
    with runs.open_folder(tmp_path / "empty", config, data, resume=False) as path:
        runs.discard(path)
    assert not (tmp_path / "empty").exists()


def test_a_folder_of_a_killed_process_that_had_written_nothing_is_free(tmp_path: Path) -> None:
    runs.lock_of(tmp_path, "distill").write_text("")
    assert opened(tmp_path, Config(), {"fingerprint": "a"}, resume=False) == tmp_path


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    with runs.claimed(path) as first, runs.claimed(path) as second:
        assert (first, second) == (True, False)
    with runs.claimed(path) as third:
        assert third
    assert not path.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"), runs.claimed(tmp_path / "file" / "lock"):
        pass


def test_who_waits_for_a_lock_is_not_fooled_by_its_removal(tmp_path: Path) -> None:
    """Threads that each open the file are to the system what processes are."""
    path, holders, most = tmp_path / "lock", [], []

    def work() -> None:
        for _ in range(100):
            with runs.claimed(path, wait=True) as ours:
                holders.append(ours)
                most.append(len(holders))
                holders.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 400 and max(most) == 1 and not path.exists()


def test_a_lock_is_not_removed_by_who_had_the_folder_before(tmp_path: Path) -> None:
    path = tmp_path / "run" / "lock"
    first = runs.claimed(path)
    assert first.__enter__()
    shutil.rmtree(path.parent)
    with runs.claimed(path) as second:
        first.__exit__(None, None, None)
        with runs.claimed(path) as third:
            assert second and not third


def test_a_file_system_without_locks_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    told = pytest.warns(UserWarning, match="keeps no locks .*: run one process there at a time")
    with told, runs.claimed(tmp_path / "lock") as first, runs.claimed(tmp_path / "lock", wait=True) as second:
        assert first and second


def test_unused_folder_counts_up(tmp_path: Path) -> None:
    assert runs.unused_folder(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    (tmp_path / "a-2").mkdir()
    assert runs.unused_folder(tmp_path / "a") == tmp_path / "a-3"


def test_signals_are_noted_and_a_second_one_ends(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background of a script
    with runs.Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_may_run_a_stage() -> None:
    entered: list[int | None] = []

    def work() -> None:
        with runs.Interruption() as interruption:
            entered.append(interruption.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [None]


def test_draws_depend_on_seed_and_place_alone() -> None:
    first = torch.rand(3, generator=seeds.generator(1, "a", 2))
    torch.rand(7)
    assert torch.equal(first, torch.rand(3, generator=seeds.generator(1, "a", 2)))
    assert not torch.equal(first, torch.rand(3, generator=seeds.generator(1, "a", 3)))
    assert not torch.equal(first, torch.rand(3, generator=seeds.generator(2, "a", 2)))


def test_lines_of_a_log_that_lack_what_is_needed_are_left_out(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 0, "loss": 1}\n{"a": 1}\n{"step": 1}\n')
    assert runs.read_log(log, ["step", "loss"]) == [{"step": 0, "loss": 1}]


@pytest.mark.parametrize("damage", [b"\xff\xfe\x80\n", b"[1, 2]\n", b"5\n", b'{"other": 1}\n'])
def test_damaged_lines_of_a_log_or_ledger_are_left_out(damage: bytes, tmp_path: Path) -> None:
    log, ledger = tmp_path / "log.jsonl", tmp_path / "ledger.jsonl"
    log.write_bytes(b'{"step": 0}\n' + damage + b'{"step": 1}\n')
    assert [row["step"] for row in runs.Log(log, 2).rows] == [0, 1]
    runs.Ledger(ledger, {}).add("first", 1)
    with open(ledger, "ab") as file:
        file.write(damage)
    assert runs.Ledger(ledger, {}).get("first") == 1
    ledger.write_bytes(damage)
    assert runs.Ledger(ledger, {}).get("first") is None


def test_a_ledger_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = runs.Ledger(path, {"seed": 1, "groups": ("a", "b")})
    ledger.add("first", [1.5, None])
    ledger.add("first", [2.5, None])  # what is kept stays
    with open(path, "a") as file:
        file.write('{"part": "second", "fou')  # a line cut short
    again = runs.Ledger(path, {"seed": 1, "groups": ("a", "b")})
    assert again.get("first") == [1.5, None] and again.get("second") is None
    again.add("second", 2)
    assert runs.Ledger(path, {"seed": 1, "groups": ("a", "b")}).get("second") == 2


def test_a_ledger_of_another_computation_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    runs.Ledger(path, {"seed": 1}).add("first", 1)
    other = runs.Ledger(path, {"seed": 2})
    assert other.get("first") is None
    other.add("first", 3)
    assert runs.Ledger(path, {"seed": 2}).get("first") == 3
