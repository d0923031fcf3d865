"""Text data sets: what they hold, what they leave out, what they cost, and which files are refused."""

from __future__ import annotations

import gc
import gzip
import multiprocessing
import os
import pickle
import random
import re
import tempfile
import tracemalloc
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

from layerlens import lines as lines_module
from layerlens.errors import ConfigError, DataError, DiskFullError, UnknownNameError
from layerlens.specs import parse_spec
from layerlens.text import TEXT_SOURCES, StsTask, TextDataset, load_text, report


def load(spec: str) -> TextDataset:
    return load_text(parse_spec(spec))


def write(path: Path, content: str | bytes) -> Path:
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)
    return path


def numbered(count: int) -> str:
    return "".join(f"sentence {i}\n" for i in range(count))


def lines(folder: Path, content: str | bytes, options: str = "") -> TextDataset:
    return load(f"text:{write(folder / 'lines.txt', content)}{options}")


def scored(folder: Path, content: str, name: str = "some.csv", options: str = "") -> TextDataset:
    return load(f"sts:{write(folder / name, content)}{options}")


def pairs(folder: Path, content: str, options: str = "") -> TextDataset:
    return load(f"pairs:{write(folder / 'pairs.csv', content)}{options}")


def everything(data: TextDataset) -> list[str]:
    return sorted([*data.columns[0], *data.test])


# --- a sentence per line: content ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lines.txt", "lines.txt.gz", "lines"])
@pytest.mark.parametrize("last", ["", "\n", "\r\n", "\n\n"])
def test_text_holds_each_line_stripped(name, last, tmp_path):
    path = write(tmp_path / name, "\ufeff A cat. \r\nEin Hündchen,\tein 🐕.\n" + "x" * 5000 + "\nA\rB" + last)
    data = load(f"text:{path},test=0")
    assert list(data.columns[0]) == ["A cat.", "Ein Hündchen,\tein 🐕.", "x" * 5000, "A\rB"]
    assert [data.row(i) for i in range(len(data))] == [(sentence,) for sentence in data.columns[0]]


def test_text_agrees_with_python_on_lines_of_every_length_and_kind(tmp_path):
    rng = random.Random(0)
    blank = [b"", b" \t", "\u3000".encode()]
    pieces = [*blank, b"\xff\xfe bad", b"\xc3", b"nul \0 byte", "é".encode(), b"word " * 30]
    raw = [rng.choice(pieces) + rng.choice(pieces) * rng.randrange(100) for _ in range(3000)]
    expected, left_out = [], {"empty": 0, "invalid UTF-8": 0, "with NUL bytes": 0}
    for line in raw:
        decoded = line.decode(errors="replace").strip()
        if "\0" in decoded:
            left_out["with NUL bytes"] += 1
        elif "\ufffd" in decoded:
            left_out["invalid UTF-8"] += 1
        elif not decoded:
            left_out["empty"] += 1
        else:
            expected.append(decoded)
    data = lines(tmp_path, b"\n".join(raw), ",test=0")
    assert list(data.columns[0]) == expected
    assert [data.columns[0][i] for i in range(len(data))] == expected
    assert data.left_out == left_out
    assert min(left_out.values()) > 10  # each kind was really there


def test_lines_left_out_are_counted_and_no_count_is_zero(tmp_path):
    data = lines(tmp_path, b"one\n\n  \r\ntwo\n\xff\n")
    assert data.left_out == {"empty": 2, "invalid UTF-8": 1}
    assert lines(tmp_path, "one\ntwo\n").left_out == {}


@pytest.mark.parametrize("length", [255, 256, 257, 511, 512, 513])
def test_a_line_too_long_is_left_out_whole(length, tmp_path, monkeypatch):
    monkeypatch.setattr(lines_module, "LONGEST", 256)
    data = lines(tmp_path, b"before\n" + b"x" * length + b"\nafter\n", ",test=0")
    assert ("x" * length in data.columns[0]) == (length == 255)  # the line's end counts
    assert data.left_out == ({} if length == 255 else {"longer than 0 MiB": 1})
    assert list(data.columns[0])[:: len(data) - 1] == ["before", "after"]


def test_lines_can_be_sliced_and_counted_from_the_end(tmp_path):
    column = lines(tmp_path, numbered(9), ",test=0").columns[0]
    expected = numbered(9).split("\n")[:-1]
    assert isinstance(column, Sequence)
    assert column[-1] == expected[-1]
    assert list(column[2:7:2]) == expected[2:7:2]
    assert list(column[::-1]) == expected[::-1]
    with pytest.raises(IndexError):
        column[9]


# --- a sentence per line: the split ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50, 99])
def test_test_lines_lie_at_even_distances_and_the_others_train_in_order(count, tmp_path):
    data = lines(tmp_path, numbered(100), f",test={count}")
    train, test = ([int(s.split()[1]) for s in part] for part in (data.columns[0], data.test))
    assert len(test) == count
    assert train == [i for i in range(100) if i not in test]
    gaps = [b - a for a, b in pairwise(test)]
    assert all(abs(gap - 100 / count) < 1 for gap in gaps)
    assert abs(test[0] - (99 - test[-1])) <= 1 + 100 % count  # as much before the first as after the last


@pytest.mark.parametrize(("count", "tests"), [(2, 1), (5, 2), (8, 4), (40, 4), (200, 20), (12_000, 1000)])
def test_a_tenth_is_for_tests_but_at_most_1000_and_of_few_some(count, tests, tmp_path):
    data = lines(tmp_path, numbered(count))
    assert (len(data), len(data.test)) == (count - tests, tests)
    assert everything(data) == sorted(numbered(count).split("\n")[:-1])


@pytest.mark.parametrize("options", [",test=0", ""])
def test_without_a_split_the_test_sentences_are_those_of_training(options, tmp_path):
    data = lines(tmp_path, numbered(20 if options else 1), options)
    assert data.test is data.columns[0]
    assert len(data) == (20 if options else 1)


def test_splits_have_names_and_there_are_no_labels(tmp_path):
    data = lines(tmp_path, numbered(20))
    assert data.split("train") is data.columns[0]
    assert data.split("test") is data.test
    with pytest.raises(UnknownNameError, match="no split 'dev'; allowed: train, test"):
        data.split("dev")
    assert (data.y_train, data.y_test, data.classes, data.tasks) == (None, None, (), ())


# --- a sentence per line: files, memory, processes -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lines.txt", "lines.txt.gz"])
def test_memory_is_8_bytes_per_line(name, tmp_path):
    count = 100_000
    path = write(tmp_path / name, "".join(f"this is sentence {i} of many\n" for i in range(count)))
    load(f"text:{write(tmp_path / f'small-{name}', numbered(3))}").fingerprint()  # what the first call alone costs
    tracemalloc.start()
    try:
        data = load(f"text:{path},test=20")
        data.fingerprint()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(data) == count - 20
    assert held < 9 * count
    assert peak < 9 * count + 3 * 2**20  # of which 2 MiB while gzip is unpacked; the text itself is 3 MB


def test_a_gzip_leaves_nothing_in_the_temporary_folder(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    data = load(f"text:{write(tmp_path / 'lines.txt.gz', numbered(50))}")
    assert len(everything(data)) == 50
    assert not list(folder.iterdir())


def test_a_gzip_without_its_suffix_is_unpacked_too(tmp_path):
    assert len(everything(lines(tmp_path, gzip.compress(numbered(30).encode())))) == 30


@pytest.mark.parametrize("name", ["lines.txt", "lines.txt.gz"])
def test_the_file_is_closed_with_the_last_that_needs_it(name, tmp_path):
    data = load(f"text:{write(tmp_path / name, numbered(30))}")
    test, stream = data.test, data.test._file.stream
    del data
    gc.collect()
    assert test[0] == "sentence 3"
    del test
    gc.collect()
    assert stream.closed


@pytest.mark.parametrize("name", ["lines.txt", "lines.txt.gz"])
def test_a_pickled_data_set_reads_the_same_elsewhere(name, tmp_path, monkeypatch):
    write(tmp_path / name, numbered(3000))
    monkeypatch.chdir(tmp_path)
    data = load(f"text:{name}")
    content = pickle.dumps(data)
    assert len(content) < 9 * 3000  # places, not sentences
    monkeypatch.chdir("/")
    copy = pickle.loads(content)
    assert (list(copy.columns[0]), list(copy.test)) == (list(data.columns[0]), list(data.test))
    assert copy.fingerprint() == data.fingerprint()
    assert copy.columns[0]._file is copy.test._file  # opened once


def test_a_spawned_process_reads_the_same(tmp_path):
    data = load(f"text:{write(tmp_path / 'lines.txt.gz', numbered(500))}")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(list, data.columns[0]).result() == list(data.columns[0])


def test_threads_may_read_at_once(tmp_path):
    data = lines(tmp_path, numbered(4000), ",test=0")
    expected = numbered(4000).split("\n")[:-1]

    def read(seed: int) -> bool:
        order = random.Random(seed).sample(range(4000), 1000)
        return [data.row(i)[0] for i in order] == [expected[i] for i in order] and list(data.columns[0]) == expected

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(16)))


def test_a_file_that_changed_is_refused_where_it_is_unpickled(tmp_path):
    content = pickle.dumps(lines(tmp_path, numbered(20)))
    shuffled = "".join(reversed(numbered(20).splitlines(keepends=True)))
    os.utime(write(tmp_path / "lines.txt", shuffled), ns=(0, 0))
    with pytest.raises(DataError, match=r"lines\.txt' has changed since it was loaded; load it again"):
        pickle.loads(content)


@pytest.mark.parametrize("content", [b"", b"\n" * 400, b"\xff" * 400])
def test_a_file_that_changes_while_it_is_read_is_refused(content, tmp_path):
    data = lines(tmp_path, numbered(20))
    write(tmp_path / "lines.txt", content)
    for read in (lambda: data.row(3), lambda: list(data.columns[0])):
        with pytest.raises(DataError, match="has changed since it was loaded"):
            read()


# --- a sentence per line: refusals -----------------------------------------------------------------------------------


def test_a_missing_file_a_folder_and_a_device_are_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"none\.txt' is not there; text:PATH needs UTF-8 text with a sentence per line"
    ):
        load(f"text:{tmp_path / 'none.txt'}")
    with pytest.raises(DataError, match="is a folder; text:PATH needs UTF-8 text"):
        load(f"text:{tmp_path}")
    with pytest.raises(DataError, match="is no file but a device; text:PATH needs UTF-8 text"):
        load("text:/dev/null")
    with pytest.raises(DataError, match="'text:' names no file; text:PATH needs UTF-8 text"):
        load("text:")
    with pytest.raises(DataError, match=r"can't read '.*': File name too long"):
        load(f"text:{tmp_path / ('x' * 300)}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no line at all"),
        (b"\xef\xbb\xbf", "no line at all"),
        (b"\n \n", "2 empty"),
        (b"\xff\n\n", "1 invalid UTF-8, 1 empty"),
    ],
)
@pytest.mark.parametrize("name", ["lines.txt", "lines.txt.gz"])
def test_a_file_without_a_sentence_is_refused(content, said, name, tmp_path):
    with pytest.raises(DataError, match=f"no sentence in '.*{name}': {said}.*needs UTF-8 text"):
        load(f"text:{write(tmp_path / name, content)}")


@pytest.mark.parametrize("name", ["lines.txt", "lines.txt.gz"])
def test_utf16_is_refused_with_what_to_do(name, tmp_path):
    with pytest.raises(DataError, match="is UTF-16; write it anew: iconv -f UTF-16 -t UTF-8"):
        load(f"text:{write(tmp_path / name, numbered(5).encode('utf-16'))}")


def damaged(how: str) -> bytes:
    packed = gzip.compress(random.Random(0).randbytes(5000).hex().encode())
    return {"cut": packed[:-100], "other": b"plain text\n", "wrong": packed[:-8] + b"\0" * 8,
            "bits": packed[:2000] + b"\xff" * 50 + packed[2050:]}[how]  # fmt: skip


@pytest.mark.parametrize("kind", TEXT_SOURCES)
@pytest.mark.parametrize("how", ["cut", "other", "wrong", "bits"])
def test_a_damaged_gzip_is_refused(how, kind, tmp_path):
    path = tmp_path / "data.csv.gz"
    path.write_bytes(damaged(how))
    with pytest.raises(DataError, match=r"data\.csv\.gz' is not a whole gzip file \(.+\); fetch or pack it again"):
        load(f"{kind}:{path}")


def test_no_room_to_unpack_is_said(tmp_path, monkeypatch):
    path = write(tmp_path / "lines.txt.gz", numbered(20))
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    full = open("/dev/full", "wb")  # noqa: SIM115  closed by what is tested
    monkeypatch.setattr(lines_module.tempfile, "TemporaryFile", lambda **_: full)
    with pytest.raises(DiskFullError, match=r"no room in the temporary folder .*lines\.txt\.gz'; set TMPDIR"):
        load(f"text:{path}")
    assert full.closed


@pytest.mark.parametrize("count", ["20", "-1", "0.5", "many", "true"])
def test_an_impossible_number_of_tests_is_refused(count, tmp_path):
    came = {"true": "True"}.get(count, count)
    with pytest.raises(DataError, match=f"test={came} of 20 sentences; allowed: 0 to 19"):
        lines(tmp_path, numbered(20), f",test={count}")


def test_unknown_kinds_and_options_are_refused(tmp_path):
    with pytest.raises(UnknownNameError, match="unknown text data 'txt'; closest: text"):
        load("txt:lines.txt")
    with pytest.raises(ConfigError, match="has no option 'tests'; closest: test"):
        lines(tmp_path, numbered(20), ",tests=3")
    with pytest.raises(ConfigError, match="has no option 'test'"):
        load("sts:some.csv,test=3")


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_the_sentences_not_of_the_file(tmp_path):
    text = "A cat.\nA dog.\nEin Hündchen.\nA cow.\nA hen.\n"
    plain = lines(tmp_path, text).fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", plain)
    for name, content in (
        ("other.txt", text), ("lines.txt.gz", text), ("bom.txt", "\ufeff" + text), ("empty.txt", f"\n\n{text}  \n"),
        ("crlf.txt", text.replace("\n", "\r\n")),
    ):  # fmt: skip
        assert load(f"text:{write(tmp_path / name, content)}").fingerprint() == plain, name


def test_a_fingerprint_changes_with_all_that_counts():
    task = StsTask(name="STS12", first=("a",), second=("b",), scores=(1.0,))
    variants = [
        {}, {"columns": (["ab", "c"],)}, {"columns": (["b", "ac"],)}, {"columns": (["ac", "b"],)}, {"test": ["d"]},
        {"columns": (["a"],), "test": ["bc", "c"]}, {"columns": (["a", "bc"],) * 2}, {"tasks": (task,)},
        {"tasks": (StsTask(name="STS13", first=("a",), second=("b",), scores=(1.0,)),)},
        {"tasks": (StsTask(name="STS12", first=("b",), second=("a",), scores=(1.0,)),)},
        {"tasks": (StsTask(name="STS12", first=("a",), second=("b",), scores=(2.0,)),)},
    ]  # fmt: skip
    made = [TextDataset(**{"name": "x", "columns": (["a", "bc"],), "test": ["c"], **v}).fingerprint() for v in variants]
    assert len(set(made)) == len(variants)
    same = TextDataset(name="y", columns=(("a", "bc"),), test=("c",), left_out={"empty": 3})
    assert same.fingerprint() == made[0]


def test_a_fingerprint_is_made_once(tmp_path):
    data = lines(tmp_path, numbered(30))
    before = data.fingerprint()
    write(tmp_path / "lines.txt", "")
    assert data.fingerprint() == before


# --- scored pairs ----------------------------------------------------------------------------------------------------

HEADER = "score,sentence1,sentence2\n"


def test_sts_holds_pairs_scores_and_the_distinct_sentences(tmp_path):
    data = scored(tmp_path, HEADER + '4.5, A cat.,"A ""big"" cat, here"\n\n0,A cat.,A dog. \n5,"two\nlines",A cat.\n')
    (task,) = data.tasks
    assert task == StsTask(
        name="some",
        first=("A cat.", "A cat.", "two\nlines"),
        second=('A "big" cat, here', "A dog.", "A cat."),
        scores=(4.5, 0.0, 5.0),
    )
    assert data.columns == (("A cat.", "two\nlines", 'A "big" cat, here', "A dog."),)
    assert data.test is data.columns[0]


def test_sts_takes_columns_by_name_with_a_bom_and_windows_line_ends(tmp_path):
    data = scored(tmp_path, "\ufeffsentence2,id,relatedness,sentence1\r\nB,7,2.5,A\r\n")
    assert data.tasks == (StsTask(name="some", first=("A",), second=("B",), scores=(2.5,)),)


@pytest.mark.parametrize(
    ("file", "name"),
    [("stsb_test.csv", "STS-B"), ("STS-B.csv", "STS-B"), ("stsbenchmark.csv.gz", "STS-B"), ("sick_r.csv.gz", "SICK-R"),
     ("SICK.csv", "SICK-R"), ("mine.v2.csv", "mine.v2")],
)  # fmt: skip
def test_a_task_is_named_after_its_file(file, name, tmp_path):
    assert [task.name for task in scored(tmp_path, HEADER + "1,a,b\n", file).tasks] == [name]


def test_a_year_is_one_task_of_all_its_subsets(tmp_path):
    data = scored(
        tmp_path, "year,source,score,sentence1,sentence2\n2016,x,1,a,b\n2012,x,2,c,d\n2016,y,3,e,f\n2013,x,4,g,h\n"
    )
    assert [(task.name, task.first, task.scores) for task in data.tasks] == [
        ("STS12", ("c",), (2.0,)), ("STS13", ("g",), (4.0,)), ("STS16", ("a", "e"), (1.0, 3.0)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "kept"), [("", ["b"]), (",split=train", ["a", "c"]), (",split=all", ["a", "b", "c"])]
)
def test_a_split_keeps_its_own_rows(options, kept, tmp_path):
    rows = "split,score,sentence1,sentence2\ntrain,1,a,x\ntest,2,b,x\ntrain,3,c,x\n"
    assert list(scored(tmp_path, rows, options=options).tasks[0].first) == list(kept)


def test_rows_of_another_split_are_not_judged(tmp_path):
    rows = "split,score,sentence1,sentence2\ntrain,none yet,a,x\ntest,2,b,x\n"
    assert scored(tmp_path, rows).tasks[0].first == ("b",)


def test_pairs_with_an_empty_sentence_are_left_out_and_counted(tmp_path):
    data = scored(tmp_path, HEADER + "1,a,b\n2, ,b\n3,a,\n4,c,d\n")
    assert data.tasks[0].scores == (1.0, 4.0)
    assert data.left_out == {"empty": 2}


def folder_of_tasks(folder: Path) -> Path:
    body = HEADER + "1,a,b\n"
    for name in (
        "zebra.csv",
        "sick.csv.gz",
        "stsb_test.csv",
        "stsb_train.csv",
        "stsb_dev.csv.gz",
        "apple.csv",
        ".~some.csv",
    ):
        write(folder / name, body)
    write(folder / "years.csv.gz", "year,score,sentence1,sentence2\n2014,1,a,b\n2012,1,a,c\n")
    write(folder / "other.csv", "label,text\n1,a\n")
    write(folder / "notes.txt", "notes")
    write(folder / "none.csv", "")
    return folder


def test_a_folder_holds_its_test_files_in_the_usual_order(tmp_path):
    data = load(f"sts:{folder_of_tasks(tmp_path)}")
    assert [task.name for task in data.tasks] == ["STS12", "STS14", "STS-B", "SICK-R", "apple", "zebra"]
    assert data.columns == (("a", "c", "b"),)


def test_two_files_of_one_task_are_refused(tmp_path):
    write(folder_of_tasks(tmp_path) / "stsb.csv.gz", HEADER + "1,a,b\n")
    with pytest.raises(DataError, match=r"'stsb\.csv\.gz' and 'stsb_test\.csv' in '.*' both hold STS-B; name one file"):
        load(f"sts:{tmp_path}")


def test_a_folder_without_tasks_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no file of scored pairs; its csv files: none; allowed: score, sentence1"):
        load(f"sts:{tmp_path}")
    write(tmp_path / "stsb_train.csv", HEADER + "1,a,b\n")
    with pytest.raises(DataError, match=r"its csv files: stsb_train\.csv; allowed: .*no train or dev in the name"):
        load(f"sts:{tmp_path}")


@pytest.mark.parametrize("score", ["5.01", "-0.1", "nan", "inf", "", "four"])
def test_a_score_out_of_range_is_refused_with_its_line(score, tmp_path):
    rows = HEADER + f'1,"two\nlines",b\n\n2,a,b\n{score},a,"c\nd"\n'  # the sixth line is where that row starts
    with pytest.raises(
        DataError, match=rf"some\.csv', line 6: score '{score}'; allowed: numbers from 0 to 5\. Mend or"
    ):
        scored(tmp_path, rows)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("score,text\n1,a\n", r"lacks the columns sentence1, sentence2; it has score, text"),
        ("sentence1,sentence2\na,b\n", r"lacks the columns score or relatedness; it has sentence1, sentence2"),
        ("score\tsentence1\tsentence2\n", r"lacks the columns .*; it has score\tsentence1\tsentence2"),
        ("", r"lacks the columns score or relatedness, sentence1, sentence2; it has none"),
        (HEADER, r"has no rows below its header"),
        (HEADER + "1,,b\n", r"has no pair of sentences, both with text"),
        (HEADER + "1,a,b\n2,a\n", r"line 3: 2 fields; allowed: 3, as in its header"),
        (HEADER + "1,a,b\n1,a\0,b\n", r"line 3: a NUL byte; write the file anew as UTF-8"),
        (HEADER + "1,a,b,c\n", r"line 2: 4 fields; allowed: 3"),
        (HEADER + '1,a,b\n2,"a,b\n3,a,b\n', r"line 3: unexpected end of data; write it as comma-separated values"),
        (HEADER + '1,"a"b,c\n', r"line 2: .*expected.*; write it as comma-separated values"),
        ("year,score,sentence1,sentence2\n12,1,a,b\n", r"line 2: year '12'; allowed: four digits, such as 2012"),
        ("split,score,sentence1,sentence2\ntrain,1,a,b\ntrial,1,a,b\n", r"split=test; allowed: train, trial, all"),
    ],
)  # fmt: skip
def test_a_damaged_table_is_refused(content, said, tmp_path):
    with pytest.raises(DataError, match=r"some\.csv'.*" + said):
        scored(tmp_path, content)


@pytest.mark.parametrize("kind", ["sts", "pairs"])
@pytest.mark.parametrize("name", ["some.csv", "some.csv.gz"])
def test_invalid_utf8_in_a_table_is_refused_with_its_line(kind, name, tmp_path):
    path = write(tmp_path / name, (HEADER + "1,a,b\n2,c,d\n").encode() + b"3,\xe9,f\n")
    with pytest.raises(DataError, match=r"some\.csv.*', line 4: invalid UTF-8; write the file anew as UTF-8"):
        load(f"{kind}:{path}" + (",positive=1" if kind == "pairs" else ""))


def test_a_split_of_a_file_without_splits_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"split=train of '.*some\.csv', which has no column split"):
        scored(tmp_path, HEADER + "1,a,b\n", options=",split=train")
    for kind in ("sts", "pairs"):
        with pytest.raises(DataError, match=rf"none\.csv' is not there; {kind}:PATH needs a csv file"):
            load(f"{kind}:{tmp_path / 'none.csv'}")


# --- pairs to train on -----------------------------------------------------------------------------------------------


def pair_rows(count: int, negative: bool = False) -> str:
    return "".join(f"a{i},b{i}{f',c{i}' if negative else ''}\n" for i in range(count))


@pytest.mark.parametrize(
    ("header", "columns"),
    [("sentence1,sentence2", 2), ("sent0,sent1", 2), ("sentence1,sentence2,negative", 3), ("sent0,sent1,hard_neg", 3)],
)
def test_pairs_keep_a_row_together_and_set_sentences_apart(header, columns, tmp_path):
    data = pairs(tmp_path, f"{header}\n{pair_rows(100, negative=columns == 3)}")
    assert len(data.columns) == columns
    assert (len(data), len(data.test)) == (90, 10 * columns)
    assert all(data.row(i) == tuple(f"{letter}{data.row(i)[0][1:]}" for letter in "abc"[:columns]) for i in range(90))
    assert not {sentence for column in data.columns for sentence in column} & set(data.test)
    assert data.tasks == ()


def test_test_sentences_of_pairs_occur_in_no_training_row(tmp_path):
    rows = "".join(f"premise {i // 3},hypothesis {i}\n" for i in range(60))  # as in NLI, three rows for each premise
    data = pairs(tmp_path, "sentence1,sentence2\n" + rows)
    trained_on = {sentence for column in data.columns for sentence in column}
    assert len(data) == 54
    assert sorted(data.test) == sorted({f"hypothesis {i}" for i in range(60)} - trained_on)


def test_at_most_1000_test_sentences_of_pairs_from_all_over_the_file(tmp_path):
    data = pairs(tmp_path, "sentence1,sentence2\n" + pair_rows(10_000))
    numbers = sorted(int(sentence[1:]) for sentence in data.test)
    assert (len(data), len(set(data.test))) == (9000, 1000)
    assert numbers[0] < 20
    assert numbers[-1] > 9980


def test_where_no_sentence_is_new_none_is_set_apart(tmp_path):
    data = pairs(tmp_path, "sentence1,sentence2\n" + "a,b\nb,a\n" * 10)
    assert (len(data), data.test) == (20, data.columns[0])
    assert report(data).endswith("20 pairs, none set apart for tests")


def test_positive_keeps_pairs_with_that_score_or_more(tmp_path):
    rows = "score,sentence1,sentence2\n" + "".join(f"{i % 6},a{i},b{i}\n" for i in range(60)) + "5, ,b\n"
    data = pairs(tmp_path, rows, ",positive=4")
    numbers = {int(sentence[1:]) for part in (*data.columns, data.test) for sentence in part}
    assert numbers == {i for i in range(60) if i % 6 >= 4}
    assert data.left_out == {"with a score below 4": 40, "empty": 1}


def test_pairs_train_on_the_training_split_alone(tmp_path):
    rows = "split,sentence1,sentence2\n" + "".join(f"{'test' if i % 2 else 'train'},a{i},b{i}\n" for i in range(40))
    for options, allowed in (("", {0}), (",split=test", {1}), (",split=all", {0, 1})):
        data = pairs(tmp_path, rows, options)
        assert {int(s[1:]) % 2 for part in (*data.columns, data.test) for s in part} == allowed


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ("score,sentence1,sentence2\n1,a,b\n", "", r"column score; say .* one: pairs:.*pairs\.csv,positive=4"),
        ("relatedness,sentence1,sentence2\n1,a,b\n", ",positive=high", r"relatedness; say .*, not 'high': pairs:"),
        ("score,sentence1,sentence2\n1,a,b\n", ",positive=true", r"positive one, not True"),
        ("score,sentence1,sentence2\n1,a,b\n2,a,b\n", ",positive=3", r"no pair to train on: 2 with a score below 3"),
        ("score,sentence1,sentence2\nx,a,b\n", ",positive=3", r"line 2: score 'x'; allowed: finite numbers"),
        ("sentence1,sentence2\na,b\n", ",positive=4", r"positive=4 of '.*', which has no scores; leave"),
        ("sentence1,sent1\na,b\n", "", r"columns sentence1, sent1; allowed: sentence1, sentence2\[, negative\], or"),
        ("sentence1,sentence2,negative\na,b,\n", "", r"no pair to train on: 1 empty"),
        ("sentence1,sentence2\n", "", r"has no rows below its header"),
        ("", "", r"has the columns none; allowed: sentence1"),
    ],
)  # fmt: skip
def test_pairs_without_what_they_need_are_refused(content, options, said, tmp_path):
    with pytest.raises(DataError, match=said):
        pairs(tmp_path, content, options)


# --- the types, and the report ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [(), ([],), (["a"], ["b", "c"]), (["a"],) * 4])
def test_columns_that_do_not_fit_are_refused(columns):
    with pytest.raises(DataError, match=r"x: columns of \[.*\] sentences; allowed: 1 to 3, equally long, not empty"):
        TextDataset(name="x", columns=columns, test=["a"])


@pytest.mark.parametrize("scores", [(), (1.0, 2.0)])
def test_a_task_with_other_counts_is_refused(scores):
    with pytest.raises(DataError, match=r"STS12: .* as many of each"):
        StsTask(name="STS12", first=("a",), second=("b",), scores=scores)


def test_the_report_counts_what_is_there_and_what_is_not(tmp_path):
    raw = numbered(1500).encode() + b"\n\n\n\xff\n"
    assert report(lines(tmp_path, raw)) == (
        f"text:{tmp_path}/lines.txt: 1,500 sentences, 150 of them for tests; left out: 3 empty, 1 invalid UTF-8"
    )
    assert report(lines(tmp_path, "one\n")).endswith("lines.txt: 1 sentence, all of them for tests")
    assert report(scored(tmp_path, HEADER + "1,a,b\n1,a,\n")).endswith(
        "some.csv: pairs of 1 task (some 1), 2 distinct sentences; left out: 1 empty"
    )
    assert report(pairs(tmp_path, "sent0,sent1,hard_neg\n" + pair_rows(100, negative=True))).endswith(
        "pairs.csv: 90 pairs with hard negatives, 30 other sentences for tests"
    )


# --- the real files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(shared_data) -> Path:
    folder = shared_data / "text"
    if not folder.is_dir():
        pytest.skip(f"no real text at {folder}")
    return folder


def test_the_real_tasks_are_those_that_pandas_reads(real):
    data = load(f"sts:{real}")
    years = pd.read_csv(real / "sts12_16.csv.gz", keep_default_na=False)
    sick = pd.read_csv(real / "sick_r.csv.gz", keep_default_na=False).rename(columns={"relatedness": "score"})
    tables = {f"STS{year - 2000}": table[table.split == "test"] for year, table in years.groupby("year")}
    tables["STS-B"] = pd.read_csv(real / "stsb_test.csv.gz", keep_default_na=False)
    tables["SICK-R"] = sick[sick.split == "test"]
    assert [task.name for task in data.tasks] == list(tables)
    for task, table in zip(data.tasks, tables.values(), strict=True):
        assert list(task.scores) == table.score.tolist()
        assert list(task.first) == table.sentence1.str.strip().tolist()
        assert list(task.second) == table.sentence2.str.strip().tolist()
    published = {"STS12": 3108 - 750, "STS13": 2250 - 750, "STS14": 3750, "STS15": 3000, "STS16": 1186,
                 "STS-B": 1379, "SICK-R": 4927}  # fmt: skip
    assert {task.name: len(task.scores) for task in data.tasks} == published  # 750 of the first two are not there
    assert len(data) == len(set(data.test)) > 20_000


def test_the_real_sentences_are_those_of_the_file(real):
    path = real / "sentences_cc0_commonvoice_en.txt.gz"
    data = load(f"text:{path}")
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        expected = sorted(line.strip() for line in stream)
    assert (len(data), len(data.test), data.left_out) == (52_594, 1000, {})
    assert everything(data) == expected


def test_the_real_running_text_has_empty_lines(real):
    data = load(f"text:{real / 'wikitext2_valid.txt.gz'}")
    assert report(data).endswith("2,461 sentences, 246 of them for tests; left out: 1,299 empty")


def test_real_pairs_are_the_alike_ones(real):
    data = load(f"pairs:{real / 'stsb_train.csv.gz'},positive=4")
    table = pd.read_csv(real / "stsb_train.csv.gz", keep_default_na=False)
    alike = table[table.score >= 4]
    kept = {tuple(pair) for pair in alike[["sentence1", "sentence2"]].apply(lambda c: c.str.strip()).to_numpy()}
    assert {data.row(i) for i in range(len(data))} <= kept
    assert data.left_out == {"with a score below 4": len(table) - len(alike)}
    assert len(data) == len(alike) - len(alike) // 10
