"""What a run measured: kept twice, whole after any crash, and refused where it is damaged."""

from __future__ import annotations

import csv
import errno
import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import RICH, SETTINGS, assert_alike, kept, run, same

from layerlens import files
from layerlens.errors import RunFolderError
from layerlens.files import write_atomically
from layerlens.training import loop, run_folder
from layerlens.training.checkpoint import load_state, save_checkpoint
from layerlens.training.loop import Progress
from layerlens.training.run_folder import Log, read_metrics, read_ratios


def line(number: int, **more: Any) -> dict[str, Any]:
    return {"epoch": number, "loss": 1 / (3 * number), "knn": None if number % 2 else 0.1 + 0.2, **more}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def assert_twice(log: Log, numbers: list[int]) -> None:
    """Both files hold these lines, to the last digit."""
    wanted = [line(k) for k in numbers]
    assert log.read() == wanted
    text = [{k: "" if v is None else repr(v) for k, v in one.items()} for one in wanted]
    assert rows(log.csv) == text
    assert [float(row["loss"]) for row in rows(log.csv)] == [one["loss"] for one in wanted]


@pytest.fixture
def log(tmp_path: Path) -> Log:
    made = Log(tmp_path, "metrics", "epoch")
    made.append([line(1)])
    made.append([line(2), line(3)])
    return made


# --- the log ---


def test_a_log_is_kept_twice_with_the_same_numbers(log: Log):
    assert_twice(log, [1, 2, 3])
    assert log.csv.read_text().count("epoch") == 1, "one header"


def test_appending_nothing_writes_nothing(tmp_path: Path):
    Log(tmp_path, "ratios", "step").append([])
    assert list(tmp_path.iterdir()) == []
    assert read_ratios(tmp_path) == []
    assert read_metrics(tmp_path) == []


def test_appending_only_adds_to_the_end(log: Log):
    before = [path.read_bytes() for path in (log.jsonl, log.csv)]
    log.append([line(4)])
    assert [path.read_bytes()[: len(old)] for path, old in zip((log.jsonl, log.csv), before, strict=True)] == before
    assert_twice(log, [1, 2, 3, 4])


@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_rewinding_drops_what_came_behind_and_goes_on(log: Log, last: int):
    assert log.rewind(last) == [line(k + 1) for k in range(last)]
    assert_twice(log, list(range(1, last + 1)))
    log.append([line(last + 1)])
    assert_twice(log, list(range(1, last + 2)))


def test_a_new_log_rewinds_to_nothing(tmp_path: Path):
    log = Log(tmp_path, "metrics", "epoch")
    assert log.rewind(0) == []
    log.append([line(1)])
    assert_twice(log, [1])


@pytest.mark.parametrize("cut", [1, 2, 10, 30])
def test_a_torn_last_line_is_dropped(log: Log, cut: int):
    for path in (log.jsonl, log.csv):
        path.write_bytes(path.read_bytes()[:-cut])
    assert log.rewind(2) == [line(1), line(2)]
    assert_twice(log, [1, 2])


def test_a_csv_that_lags_behind_is_made_again(log: Log):
    """Killed between the two files."""
    log.csv.write_text(log.csv.read_text().splitlines()[0] + "\n")
    log.rewind(3)
    assert_twice(log, [1, 2, 3])
    log.csv.unlink()
    log.rewind(2)
    assert_twice(log, [1, 2])


def test_a_torn_line_that_is_needed_is_refused(log: Log):
    log.jsonl.write_bytes(log.jsonl.read_bytes()[:-3])
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl' is damaged: it lacks epochs; train in a new folder"):
        log.rewind(3)


DAMAGE = {
    "a line is missing": [0, 2],
    "the first is missing": [1, 2],
    "a line comes twice": [0, 1, 1, 2],
    "lines changed places": [1, 0, 2],
    "the end is missing": [0, 1],
    "all is missing": [],
}


@pytest.mark.parametrize("order", DAMAGE.values(), ids=DAMAGE)
def test_a_log_with_other_lines_than_it_should_have_is_refused_and_unharmed(log: Log, order: list[int]):
    whole = log.jsonl.read_text().splitlines(keepends=True)
    log.jsonl.write_text("".join(whole[k] for k in order))
    before = log.jsonl.read_bytes(), log.csv.read_bytes()
    with pytest.raises(RunFolderError, match="it lacks epochs; train in a new folder"):
        log.rewind(3)
    assert (log.jsonl.read_bytes(), log.csv.read_bytes()) == before


@pytest.mark.parametrize(
    "bad", [b"{]\n", b"3\n", b"[]\n", b"null\n", b'{"loss": 1}\n', b'{"epoch": "2"}\n', b"\xff\xfe\n", b"\0\0\n", b"\n"]
)
def test_a_damaged_line_is_refused(log: Log, bad: bytes):
    whole = log.jsonl.read_bytes().splitlines(keepends=True)
    log.jsonl.write_bytes(b"".join([whole[0], bad, *whole[1:]]))
    for use in (log.read, lambda: log.rewind(3)):
        with pytest.raises(RunFolderError, match=r"metrics\.jsonl' is damaged"):
            use()


def test_numbers_that_json_does_not_know_are_no_metrics(log: Log):
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.append([line(4, wrong=float("nan"))])
    assert_twice(log, [1, 2, 3])


def test_metrics_without_a_loss_are_refused(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    with pytest.raises(RunFolderError, match="a line without loss; train in a new folder"):
        read_metrics(tmp_path)


def test_a_finished_run_has_both_logs(tmp_path: Path):
    run(tmp_path, SETTINGS[RICH])
    assert [one["epoch"] for one in read_metrics(tmp_path)] == [1, 2, 3]
    ratios = read_ratios(tmp_path)
    assert [one["step"] for one in ratios] == list(range(1, 10))
    arms = [key for key in ratios[0] if key not in ("step", "arm")]
    for one in ratios:
        assert one["arm"] in arms
        assert sum(one[arm] for arm in arms) == pytest.approx(1, abs=1e-12)
    assert rows(tmp_path / "ratios.csv")[0] == {key: str(value) for key, value in ratios[0].items()}


# --- a disk that is full ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(folder, SETTINGS[RICH])
    return folder


def assert_good(folder: Path, whole: Path) -> None:
    """All that has its name can be used."""
    expected = kept(whole)
    for name, state in kept(folder).items():
        assert same(state, expected[name])
    for path in folder.glob("resume.pt"):
        torch.load(path, weights_only=True)
    assert not [path for path in folder.rglob(".*.*") if path.is_file()], "no half-written file stays"


@pytest.mark.parametrize("call", [2, 4, 6, 7, 9, 11, 12, 14])
@pytest.mark.parametrize("function", ["fsync", "replace", "open"])
def test_a_full_disk_costs_no_more_than_what_was_not_written(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: int
):
    count = 0

    def full(name: str, real: Any) -> Any:
        def maybe(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count >= call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **options)

        return maybe

    place, name = (files.tempfile, "NamedTemporaryFile") if function == "open" else (os, function)
    monkeypatch.setattr(loop, "SAVE_EVERY_S", -1.0)
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(place, name, full(name, getattr(place, name)))
        with pytest.raises(RunFolderError, match=r"^can't write '.*': No space left on device; [^\n]+$"):
            run(folder, SETTINGS[RICH])
    assert count >= call
    assert not (folder / "result.json").exists()
    assert_good(folder, whole)
    run(folder, SETTINGS[RICH])
    assert_alike(folder, whole)


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.csv"])
def test_a_device_that_is_really_full_is_said_in_one_line(tmp_path: Path, whole: Path, name: str):
    """/dev/full takes the place of a log; what fails is the kernel's own write."""
    folder = tmp_path / "run"

    def fill(progress: Progress) -> None:
        if progress.step == 5:
            kept_lines.append((folder / name).read_bytes())
            (folder / name).unlink()
            (folder / name).symlink_to("/dev/full")

    kept_lines: list[bytes] = []
    with pytest.raises(
        RunFolderError, match=rf"can't write '.*{name}': No space left on device; what was saved before"
    ):
        run(folder, SETTINGS[RICH], progress=fill)
    (folder / name).unlink()
    (folder / name).write_bytes(kept_lines[0])
    assert_good(folder, whole)
    run(folder, SETTINGS[RICH])
    assert_alike(folder, whole)


def test_a_resume_file_that_outgrows_the_disk_leaves_the_old_one(tmp_path: Path, whole: Path):
    """The limit of the process stands for that of the disk: the kernel cuts a real write short."""
    folder, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    old: list[bytes] = []

    def fill(progress: Progress) -> None:
        if progress.step == 5:
            old.append((folder / "resume.pt").read_bytes())
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(old[0]) // 2, before[1]))

    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(RunFolderError, match=r"^can't write '.*': File too large; [^\n]+$"):
            run(folder, SETTINGS[RICH], progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert (folder / "resume.pt").read_bytes() == old[0]
    assert_good(folder, whole)
    run(folder, SETTINGS[RICH])
    assert_alike(folder, whole)


def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Root may write anywhere, so the refusal is played."""

    def refuse(*_args: Any, **_options: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files.tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(RunFolderError, match="Permission denied; choose another folder with --out"):
        run(tmp_path / "run")


@pytest.mark.parametrize("function", ["fsync", "replace", "chmod"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
):
    model, path = torch.nn.Linear(2, 2), tmp_path / "epoch-0001.safetensors"
    save_checkpoint(path, model, {"epoch": 1})
    before = path.read_bytes()

    def full(*_args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(RunFolderError, match="No space left on device"):
            write_atomically(path, b"new")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert same(load_state(path)[0], model.state_dict())


# --- results ---


def test_a_result_whose_checkpoint_is_gone_is_refused(tmp_path: Path):
    run(tmp_path)
    (tmp_path / "checkpoints" / "epoch-0002.safetensors").unlink()
    with pytest.raises(RunFolderError, match=r"lacks checkpoints that its result\.json names; train in a new folder"):
        run_folder.read_result(tmp_path)


def test_a_result_tells_what_its_file_holds(tmp_path: Path):
    made = run(tmp_path)
    content = json.loads((tmp_path / "result.json").read_text())
    assert "folder" not in content, "a run folder may be moved"
    moved = tmp_path.parent / "moved"
    tmp_path.rename(moved)
    found = run_folder.read_result(moved)
    assert (found.folder, found.loss, found.checkpoints) == (str(moved), made.loss, made.checkpoints)
    moved.rename(tmp_path)
