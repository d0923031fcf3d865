"""Lines of text files of any size, plain or gzip, each read when it is asked for."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import tempfile
import weakref
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
import numpy.typing as npt

from layerlens.errors import DataError, DiskFullError

Starts = npt.NDArray[np.int64]
LONGEST = 1 << 20  # bytes; a longer line is no sentence, and must not fill the memory
BOM = b"\xef\xbb\xbf"
NEEDS = {
    "text": "UTF-8 text with a sentence per line, plain or .gz",
    "sts": "a csv file (or .csv.gz) with score, sentence1 and sentence2, or a folder of such files",
    "pairs": "a csv file (or .csv.gz) with sentence1 and sentence2, and perhaps negative",
}


class Lines(Sequence[str]):
    """Lines of a file, stripped, each read when it is asked for; only where they start is kept.

    Any number of threads and processes may read at once. When pickled, the file's path goes along, not its content.
    """

    def __init__(self, file: TextFile, starts: Starts) -> None:
        self._file, self._starts = file, starts

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Lines: ...

    def __getitem__(self, index: int | slice) -> str | Lines:
        if isinstance(index, slice):
            return Lines(self._file, self._starts[index])
        block = self._file.block(int(self._starts[index]), 1 << 10)
        return self._file.sentence(block.partition(b"\n")[0])

    def __iter__(self) -> Iterator[str]:
        block, base = b"", 0
        for begin in range(0, len(self), 4096):  # in parts, as a list of all starts would be long
            for start in self._starts[begin : begin + 4096].tolist():
                end = block.find(b"\n", start - base) if start >= base else -1
                if end < 0:
                    block, base = self._file.block(start, 1 << 16), start
                    end = block.find(b"\n")
                yield self._file.sentence(block[start - base : end if end >= 0 else None])


class TextFile:
    """An open file of text, unpacked if it was gzip; pickled as its path, and opened again where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with readable(path, "text") as stream:
            self._stamp = _stamp(path)
            packed = isinstance(stream, gzip.GzipFile)
            self.stream = _unpacked(stream, path) if packed else open(path, "rb")  # noqa: SIM115
        weakref.finalize(self, self.stream.close)

    def block(self, start: int, size: int) -> bytes:
        """At least `size` bytes from `start` on, and the whole of the line there, as far as the file goes."""
        found = b""
        while more := os.pread(self.stream.fileno(), max(size, len(found)), start + len(found)):  # shares no position
            found += more
            if b"\n" in more:
                break
        return found

    def sentence(self, line: bytes) -> str:
        """The text of a line that the scan found good."""
        try:
            if text := line.decode().strip():
                return text
        except UnicodeDecodeError:
            pass
        raise self._changed()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.path, self._stamp)

    def check(self, stamp: tuple[int, int]) -> None:
        """Refuse a file that is not the one of which this was the stamp."""
        if stamp != self._stamp:
            raise self._changed()

    def _changed(self) -> DataError:
        return DataError(f"{str(self.path)!r} has changed since it was loaded; load it again, and leave it as it is")


def _reopened(path: Path, stamp: tuple[int, int]) -> TextFile:
    file = TextFile(path)
    file.check(stamp)
    return file


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@contextmanager
def readable(path: Path, kind: str) -> Iterator[BufferedIOBase]:
    """The bytes of a file, unpacked as they are read if it is gzip; what fails in the block ends as one line."""
    try:
        if not path.is_file():  # asked first, as opening a pipe would wait
            came = "is a folder" if path.is_dir() else "is no file but a device" if path.exists() else "is not there"
            raise DataError(f"{str(path)!r} {came}; {kind}:PATH needs {NEEDS[kind]}")
        with open(path, "rb") as raw:
            packed = path.suffix == ".gz" or raw.peek(2)[:2] == b"\x1f\x8b"
            with gzip.GzipFile(fileobj=raw) if packed else raw as stream:
                yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{str(path)!r} is not a whole gzip file ({error}); fetch or pack it again") from error
    except OSError as error:
        raise DataError(f"can't read {str(path)!r}: {error.strerror or error}") from error


def _unpacked(stream: BufferedIOBase, path: Path) -> IO[bytes]:
    """All of a stream in a temporary file that has no name, so that it goes with the process whatever happens."""
    try:
        with ExitStack() as undo:
            plain = undo.enter_context(tempfile.TemporaryFile(prefix="layerlens-"))
            shutil.copyfileobj(stream, plain, 1 << 20)
            plain.flush()
            undo.pop_all()
            return plain
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"no room in the temporary folder {tempfile.gettempdir()!r} to unpack {str(path)!r}"
        raise DiskFullError(f"{where}; set TMPDIR to a larger disk, or unpack it yourself") from error


def scan(file: TextFile) -> tuple[Starts, dict[str, int]]:
    """Where each usable line starts, and why how many others are left out."""
    stream, starts, left_out = file.stream, array("q"), Counter[str]()
    stream.seek(0)
    head = stream.read(len(BOM))
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{str(file.path)!r} is UTF-16; write it anew: iconv -f UTF-16 -t UTF-8 OLD > NEW")
    place = stream.seek(len(BOM) if head == BOM else 0)
    while line := stream.readline(LONGEST):
        if fault := _fault(line):
            left_out[fault] += 1
        else:
            starts.append(place)
        place += len(line)
        while _is_cut(line):  # the rest of a line that is too long belongs to it
            line = stream.readline(LONGEST)
            place += len(line)
    return np.frombuffer(starts, dtype=np.int64), dict(left_out)


def _is_cut(line: bytes) -> bool:
    return len(line) == LONGEST and not line.endswith(b"\n")


def _fault(line: bytes) -> str:
    """Why a line can't be used; nothing if it can."""
    if _is_cut(line):
        return f"longer than {LONGEST >> 20} MiB"
    if b"\0" in line:
        return "with NUL bytes"
    try:
        return "" if line.decode().strip() else "empty"
    except UnicodeDecodeError:
        return "invalid UTF-8"
