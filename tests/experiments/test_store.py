"""A store tells what is done, running, failed and missing; damage costs one run, never a wrong answer."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from layerlens.errors import RunFolderError, UnknownNameError
from layerlens.experiments import store as store_module
from layerlens.experiments.store import LOG_LINES, SCHEMA, Row, Store, time_left_s
from layerlens.files import read_json, write_json

FILES = ("analysis/study-cka-1.json", "analysis/study-scores-1.json")
RESULT: dict[str, Any] = {
    "run": "x", "epochs": 2, "loss": 1.0, "knn": None, "wall_s": 4.0,
    "checkpoints": ["checkpoints/epoch-0002.safetensors"], "environment": {},
}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def finish(store: Store, key: str, *, wall_s: float = 4.0, epochs: int = 2, files: tuple[str, ...] = FILES) -> Path:
    """A run folder as a finished run leaves it."""
    folder = store.run_folder(key)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "epoch-0002.safetensors").write_bytes(b"weights")
    begin(store, key, epochs=epochs)
    for name in files:
        write_json(folder / name, {})
    write_json(folder / "result.json", {**RESULT, "wall_s": wall_s, "epochs": epochs})
    return folder


def begin(store: Store, key: str, *, epochs: int) -> Path:
    """A run folder with some finished epochs."""
    folder = store.run_folder(key)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"epoch": n + 1, "loss": 1.0}) + "\n" for n in range(epochs)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def planned(
    key: str, *, epochs: int = 2, files: tuple[str, ...] = FILES, seed: int = 0, arm: str = "a"
) -> dict[str, Any]:
    return {"key": key, "arm": arm, "values": {"rate": 0.5}, "seed": seed, "epochs": epochs, "files": list(files)}


@contextmanager
def worked_on(folder: Path) -> Iterator[None]:
    """The lock that a worker holds."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


# --- whose folder it is ---


def test_a_store_begins_with_its_first_study_and_is_opened_again(tmp_path: Path):
    Store(tmp_path / "deep" / "down").write_plan("s", {"runs": []})
    assert read_json(tmp_path / "deep" / "down" / "store.json") == {"schema": SCHEMA}
    assert Store(tmp_path / "deep" / "down").studies() == ["s"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden").write_text("")
    Store(str(tmp_path / "empty")).write_plan("s", {"runs": []})
    assert (tmp_path / "empty" / "store.json").exists()


def test_a_look_at_a_store_that_is_not_there_leaves_nothing(tmp_path: Path):
    store = Store(tmp_path / "none")
    assert store.studies() == []
    assert not store.is_done("k")
    assert not store.is_running("k")
    with pytest.raises(UnknownNameError, match="none was begun here"):
        store.status("s")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("schema", [SCHEMA + 1, 99, "2", None, [1]])
def test_a_store_of_a_newer_schema_is_refused_in_one_line(tmp_path: Path, schema: Any):
    write_json(tmp_path / "store.json", {"schema": schema})
    with pytest.raises(RunFolderError) as caught:
        Store(tmp_path)
    assert str(caught.value) == (
        f"{str(tmp_path)!r} was written by a newer layerlens (store schema {schema!r}, this one knows {SCHEMA}); "
        "update layerlens, or choose another --store"
    )


@pytest.mark.parametrize("what", ["a file in it", "a folder in it", "a file in its place"])
def test_a_folder_that_is_no_store_is_refused_and_left_alone(tmp_path: Path, what: str):
    place = tmp_path / "place"
    if what == "a file in its place":
        place.write_text("mine")
    else:
        (place / "photos").mkdir(parents=True)
        if what == "a file in it":
            (place / "photos").rmdir()
            (place / "photos").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunFolderError, match="exists and is no store; choose a new or empty one with --store"):
        Store(place)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_damaged_store_file_is_named(tmp_path: Path, text: str):
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"store\.json' is damaged"):
        Store(tmp_path)


def test_what_a_damaged_store_file_asks_for_helps(store: Store):
    finish(store, "k")
    (store.folder / "store.json").write_text("{")
    with pytest.raises(RunFolderError, match="delete it to have it made again"):
        Store(store.folder)
    (store.folder / "store.json").unlink()
    assert Store(store.folder).is_done("k")


def test_two_processes_may_make_a_store_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The other one is quicker, between this one's look at store.json and its look at the folder."""
    exists, made = Path.exists, []

    def slow(self: Path, **options: Any) -> bool:
        found = exists(self, **options)
        if self.name == "store.json" and not made:
            made.append(self)
            write_json(self, {"schema": SCHEMA})
        return found

    monkeypatch.setattr(Path, "exists", slow)
    Store(tmp_path / "store")


def test_looking_at_a_store_imports_no_torch():
    code = "import sys, layerlens.experiments.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- damage ---

DAMAGE = {
    "truncated": json.dumps(RESULT)[:40], "empty": "", "no object": "[1, 2]", "null": "null", "a text": '"done"',
    "not UTF-8": b"\xff\xfe{}", "no pace": json.dumps({**RESULT, "wall_s": "4"}), "no fields": "{}",
    "no checkpoints": json.dumps({k: v for k, v in RESULT.items() if k != "checkpoints"}), "zeros": b"\x00" * 64,
}  # fmt: skip


def damage(store: Store, key: str, content: str | bytes) -> Path:
    path = store.run_folder(key) / "result.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_result_is_no_result_and_is_set_aside_with_a_message(store: Store, kind: str):
    finish(store, "k")
    path = damage(store, "k", DAMAGE[kind])
    content, said = path.read_bytes(), []
    assert not store.is_done("k", FILES)
    store.set_damage_aside("k", said.append)
    assert said == [f"{str(path)!r} was damaged; it is 'result.json.damaged-1' now and the run is done again"]
    assert path.with_name("result.json.damaged-1").read_bytes() == content
    assert not path.exists()
    assert not list(path.parent.glob("analysis/*")), "what was measured belonged to it"
    store.set_damage_aside("k", said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    "content",
    [
        {**RESULT, "checkpoints": []}, {**RESULT, "checkpoints": 5}, {**RESULT, "wall_s": True},
        {**RESULT, "wall_s": float("nan")}, {k: v for k, v in RESULT.items() if k != "loss"},
        {**RESULT, "checkpoints": ["checkpoints/epoch-0009.safetensors"]},
    ],
    ids=["no checkpoint", "a number", "a truth", "no number", "a key less", "a checkpoint that is gone"],
)  # fmt: skip
def test_a_result_that_read_result_refuses_is_damaged(store: Store, content: dict[str, Any]):
    finish(store, "k")
    damage(store, "k", json.dumps(content))
    assert not store.is_done("k", FILES)


def test_results_that_are_damaged_again_and_again_all_stay(store: Store):
    for n in (1, 2, 3):
        finish(store, "k")
        damage(store, "k", f"{{{n}")
        store.set_damage_aside("k", lambda _: None)
    names = {p.name: p.read_text() for p in store.run_folder("k").glob("result.json*")}
    assert names == {f"result.json.damaged-{n}": f"{{{n}" for n in (1, 2, 3)}


def test_a_good_result_and_a_run_without_one_are_left_alone(store: Store):
    finish(store, "k")
    begin(store, "half", epochs=1)
    before = {p: p.read_bytes() for p in store.folder.rglob("*") if p.is_file()}
    for key in ("k", "half", "none"):
        store.set_damage_aside(key, pytest.fail)
    assert {p: p.read_bytes() for p in store.folder.rglob("*") if p.is_file()} == before


def test_two_processes_may_set_the_same_damage_aside(store: Store, monkeypatch: pytest.MonkeyPatch):
    finish(store, "k")
    damage(store, "k", "{")
    replace = store_module.os.replace

    def other_first(source: Path, target: Path) -> None:
        replace(source, target)
        replace(source, target)

    monkeypatch.setattr(store_module.os, "replace", other_first)
    store.set_damage_aside("k", lambda _: None)


# --- what is done, what runs ---


def test_a_run_is_done_once_everything_that_is_asked_for_is_there(store: Store):
    assert not store.is_done("k")
    folder = finish(store, "k", files=())
    assert store.is_done("k")
    assert not store.is_done("k", FILES)
    write_json(folder / FILES[0], {})
    assert not store.is_done("k", FILES)
    write_json(folder / FILES[1], {})
    assert store.is_done("k", FILES)


def test_a_run_whose_folder_is_locked_is_running(store: Store):
    assert not store.is_running("k")
    folder = begin(store, "k", epochs=1)
    assert not store.is_running("k")
    with worked_on(folder):
        assert store.is_running("k")
        assert store.is_running("k"), "looking leaves the lock as it is"
    assert not store.is_running("k")


def test_looking_takes_no_lock_for_longer_than_the_look(store: Store):
    folder = begin(store, "k", epochs=1)
    (folder / ".lock").touch()
    assert not store.is_running("k")
    with (folder / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_epochs_done_are_the_whole_lines(store: Store):
    assert store.epochs_done("k") == 0
    folder = begin(store, "k", epochs=3)
    assert store.epochs_done("k") == 3
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"epoch": 4, "lo')
    assert store.epochs_done("k") == 3


# --- failures and logs ---


def test_failures_are_kept_with_the_last_lines_of_the_log(store: Store):
    store.log("k").parent.mkdir(parents=True)
    store.log("k").write_text("".join(f"line {n}\n" for n in range(50)))
    assert store.failures("k") == {"attempts": [], "given_up": False}
    store.add_failure("k", "died", "signal 9", given_up=False)
    store.add_failure("k", "failed", "RuntimeError: no", given_up=True)
    known = store.failures("k")
    assert known["given_up"]
    assert [(a["kind"], a["error"]) for a in known["attempts"]] == [
        ("died", "signal 9"),
        ("failed", "RuntimeError: no"),
    ]
    assert known["attempts"][0]["log"] == [f"line {n}" for n in range(50 - LOG_LINES, 50)]
    assert {"at", "host"} <= known["attempts"][0].keys()


def test_a_history_does_not_grow_for_ever(store: Store):
    for n in range(60):
        store.add_failure("k", "died", str(n), given_up=False)
    assert [a["error"] for a in store.failures("k")["attempts"]] == [str(n) for n in range(10, 60)]


def test_one_run_s_failures_are_not_another_s(store: Store):
    store.add_failure("a", "died", "x", given_up=True)
    assert store.failures("b") == {"attempts": [], "given_up": False}


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_history_starts_anew(store: Store, text: str):
    store.add_failure("k", "died", "old", given_up=True)
    (store.folder / "failures" / "k.json").write_text(text)
    assert store.failures("k") == {"attempts": [], "given_up": False}
    store.add_failure("k", "died", "new", given_up=False)
    assert [a["error"] for a in store.failures("k")["attempts"]] == ["new"]


@pytest.mark.parametrize("text", ["{}", '{"attempts": 3, "given_up": false}'])
def test_a_history_that_lacks_a_key_starts_anew(store: Store, text: str):
    store.add_failure("k", "died", "old", given_up=True)
    (store.folder / "failures" / "k.json").write_text(text)
    store.add_failure("k", "died", "new", given_up=False)
    store.write_plan("s", {"runs": [planned("k")]})
    assert store.status("s")[0].problem == "new"


def test_the_last_lines_of_a_log_that_is_no_text_or_not_there(store: Store):
    assert store.last_lines("k") == []
    store.log("k").parent.mkdir(parents=True)
    store.log("k").write_bytes(b"a\n\xff\xfe\nb")
    assert store.last_lines("k", 2) == ["��", "b"]


# --- studies and status ---


def test_a_plan_is_read_as_it_was_written(store: Store):
    store.write_plan("b", {"runs": [planned("k")]})
    store.write_plan("a", {"runs": []})
    assert store.studies() == ["a", "b"]
    assert store.read_plan("b") == {"schema": SCHEMA, "runs": [planned("k")]}


def test_a_study_that_was_not_begun_names_the_closest(store: Store):
    with pytest.raises(UnknownNameError, match=r"no study 'x' in '.*store'; none was begun here"):
        store.read_plan("x")
    store.write_plan("freeze-ablation-smoke", {"runs": []})
    with pytest.raises(UnknownNameError, match=r"no study 'freeze-ablation' in '.*'; closest: freeze-ablation-smoke"):
        store.status("freeze-ablation")


def test_status_tells_done_running_failed_and_missing(store: Store):
    finish(store, "done", wall_s=6.0)
    begin(store, "runs", epochs=1)
    begin(store, "failed", epochs=1)
    store.add_failure("failed", "refused", "no layer 'x'", given_up=True)
    store.add_failure("retried", "died", "signal 9", given_up=False)
    finish(store, "unmeasured", files=FILES[:1])
    store.write_plan(
        "s", {"runs": [planned(key) for key in ("done", "runs", "failed", "retried", "never", "unmeasured")]}
    )
    with worked_on(store.run_folder("runs")):
        rows = {row.key: row for row in store.status("s")}
    assert {key: (row.state, row.epochs, row.wall_s, row.problem) for key, row in rows.items()} == {
        "done": ("done", 2, 6.0, None), "runs": ("running", 1, None, None),
        "failed": ("failed", 1, None, "no layer 'x'"), "retried": ("missing", 0, None, "signal 9"),
        "never": ("missing", 0, None, None), "unmeasured": ("missing", 2, 4.0, None),
    }  # fmt: skip
    assert rows["done"].values == {"rate": 0.5, "seed": 0}
    assert all(row.of == 2 for row in rows.values())
    assert {row.key: row.state for row in store.status("s")}["runs"] == "missing"


def test_a_run_that_failed_and_is_done_by_now_has_no_problem(store: Store):
    store.add_failure("k", "died", "signal 9", given_up=True)
    finish(store, "k")
    store.write_plan("s", {"runs": [planned("k")]})
    [row] = store.status("s")
    assert (row.state, row.problem) == ("done", None)


def test_a_run_that_failed_and_is_tried_again_is_running(store: Store):
    store.add_failure("k", "died", "signal 9", given_up=True)
    store.write_plan("s", {"runs": [planned("k")]})
    with worked_on(store.run_folder("k")):
        assert store.status("s")[0].state == "running"


def test_a_damaged_result_is_missing_in_status(store: Store):
    finish(store, "k")
    damage(store, "k", "{")
    store.write_plan("s", {"runs": [planned("k")]})
    [row] = store.status("s")
    assert (row.state, row.epochs, row.wall_s) == ("missing", 2, None)


def test_ten_thousand_runs_are_listed_in_seconds(store: Store, capsys: pytest.CaptureFixture[str]):
    """Half done, a tenth failed, some begun, the rest missing; 2 s is the goal, 4 s what a busy machine is given."""
    content = json.dumps(RESULT)
    for n in range(5000):
        folder = store.run_folder(f"{n:016x}")
        (folder / "analysis").mkdir(parents=True)
        (folder / "checkpoints").mkdir()
        (folder / "result.json").write_text(content)
        for name in (*FILES, *RESULT["checkpoints"]):
            (folder / name).touch()
    for n in range(5000, 6000):
        folder = store.run_folder(f"{n:016x}")
        folder.mkdir()
        (folder / ".lock").touch()
        (folder / "metrics.jsonl").write_text('{"epoch": 1}\n')
    (store.folder / "failures").mkdir()
    failure = json.dumps({"attempts": [{"error": "died"}] * 3, "given_up": True})
    for n in range(6000, 7000):
        (store.folder / "failures" / f"{n:016x}.json").write_text(failure)
    store.write_plan("s", {"runs": [planned(f"{n:016x}", seed=n) for n in range(10_000)]})
    times = []
    for _ in range(2):
        began = time.perf_counter()
        rows = store.status("s")
        left = time_left_s(rows)
        times.append(time.perf_counter() - began)
    with capsys.disabled():
        print(f" [10,000 runs: {min(times):.2f} s] ", end="")
    assert [sum(row.state == state for row in rows) for state in ("done", "failed", "missing")] == [5000, 1000, 4000]
    assert left == pytest.approx(2.0 * (1000 * 1 + 3000 * 2))
    assert min(times) < 4.0


def test_run_folders_that_are_copied_into_another_store_are_done_there(store: Store, tmp_path: Path):
    finish(store, "k")
    other = Store(tmp_path / "other")
    other.write_plan("s", {"runs": [planned("k"), planned("z")]})
    assert [row.state for row in other.status("s")] == ["missing", "missing"]
    shutil.copytree(store.run_folder("k"), other.run_folder("k"))
    assert [row.state for row in other.status("s")] == ["done", "missing"]
    assert other.is_done("k", FILES)


# --- time left ---


def row(state: str, *, epochs: int, of: int = 10, wall_s: float | None = None, key: str | None = None) -> Row:
    name = key or f"{state}{epochs}{of}{wall_s}"
    return Row(key=name, arm="a", values={}, state=state, epochs=epochs, of=of, wall_s=wall_s, problem=None)


DONE = row("done", epochs=10, wall_s=20.0)


def test_time_left_by_hand():
    """Ten epochs took 20 s and thirty took 40 s: 1.5 s each; 4 + 10 are left of what runs and of what is missing."""
    rows = [
        DONE, row("done", epochs=30, of=30, wall_s=40.0), row("running", epochs=6), row("missing", epochs=0),
        row("failed", epochs=2),
    ]  # fmt: skip
    assert time_left_s(rows) == 14 * 1.5
    assert time_left_s(rows, workers=2) == 7 * 1.5
    assert time_left_s([*rows, row("running", epochs=10)]) == 7 * 1.5, "two are at work"


def test_time_left_is_unknown_before_the_first_run_is_done():
    assert time_left_s([]) is None
    assert time_left_s([row("running", epochs=3), row("missing", epochs=0)]) is None


def test_nothing_is_left_of_a_finished_study():
    assert time_left_s([DONE]) == 0.0


def test_a_run_that_two_arms_share_is_waited_for_once():
    shared = row("missing", epochs=0, key="shared")
    assert time_left_s([DONE, DONE, shared, shared]) == 20.0


def test_a_run_that_is_only_to_be_measured_is_no_more_training():
    assert time_left_s([row("missing", epochs=10, wall_s=20.0)]) == 0.0
