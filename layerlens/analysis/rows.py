"""RowStore: the rows of all samples for every layer, in memory up to a bound and in temporary files beyond it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
import torch
from torch import Tensor

from layerlens.analysis.kernels import as_rows
from layerlens.errors import ConfigError, NonFiniteError, ShapeError

MIB = 2**20
_COLUMN_BLOCK = 1 << 20  # numbers in a piece of columns


class RowStore:
    """Rows of L layers over all samples.

    Up to half of `memory_mib` the rows stay where the model put them; beyond that all of them lie in temporary
    files on disk, which vanish with the store, and are read in pieces.

    Args:
        layers: Names, for messages.
        memory_mib: Bound on the memory for rows and for what is computed from them.
    """

    def __init__(self, layers: Sequence[str], memory_mib: float) -> None:
        if not memory_mib > 0:
            raise ConfigError(f"memory_mib={memory_mib}; allowed: above 0")
        self.layers, self.memory = tuple(layers), int(memory_mib * MIB)
        self._parts: list[list[Tensor]] = [[] for _ in layers]
        self._files: list[IO[bytes]] = []
        self._shapes: list[list[int]] = [[0, 0] for _ in layers]  # rows, width
        self._types: list[torch.dtype] = [torch.float32 for _ in layers]
        self._given: list[torch.dtype] = [torch.float32 for _ in layers]
        self._sums: list[Tensor | None] = [None for _ in layers]
        self._squares: list[Tensor | None] = [None for _ in layers]

    def append(self, position: int, activation: Tensor) -> None:
        """Keep a copy of one layer's rows of a batch.

        Raises:
            ShapeError: Another width than before.
        """
        rows, shape = as_rows(activation), self._shapes[position]
        if shape[0] and shape[1] != rows.shape[1]:
            raise ShapeError(
                f"layer {self.layers[position]!r} gives {rows.shape[1]} features per row after {shape[1]} in earlier "
                "batches; pool its maps with reduce='pool'"
            )
        wide = rows.sum(0, dtype=torch.float64)
        square = torch.linalg.vector_norm(rows, dtype=torch.float64).square()
        held = self._sums[position], self._squares[position]
        self._sums[position] = wide if held[0] is None else held[0] + wide
        self._squares[position] = square if held[1] is None else held[1] + square
        self._types[position], self._given[position] = rows.dtype, activation.dtype
        shape[0], shape[1] = shape[0] + len(rows), rows.shape[1]
        if self._files:
            self._write(position, rows)
            return
        copied = rows.data_ptr() != activation.data_ptr()
        self._parts[position].append(rows if copied else rows.clone(memory_format=torch.contiguous_format))
        if self.bytes > self.memory // 2:
            self._spill()

    @property
    def samples(self) -> int:
        """Rows of each layer.

        Raises:
            ShapeError: The layers have different numbers of rows.
        """
        counts = {name: shape[0] for name, shape in zip(self.layers, self._shapes, strict=True)}
        if len(set(counts.values())) > 1:
            raise ShapeError(f"the layers have different sample counts: {_first_two_that_differ(counts)}")
        return next(iter(counts.values()), 0)

    @property
    def widths(self) -> list[int]:
        """Features of each layer."""
        return [shape[1] for shape in self._shapes]

    @property
    def bytes(self) -> int:
        """Size of all rows."""
        return sum(n * p * t.itemsize for (n, p), t in zip(self._shapes, self._types, strict=True))

    @property
    def on_disk(self) -> bool:
        """Whether the rows have gone to disk."""
        return bool(self._files)

    def device(self, position: int) -> torch.device:
        """Where a layer's rows are handed out."""
        total = self._sums[position]
        return torch.device("cpu") if total is None or self._files else total.device

    def dtype(self, position: int) -> torch.dtype:
        """Of a layer's rows: at least float32."""
        return self._types[position]

    def given(self, position: int) -> torch.dtype:
        """What a layer's activations came in, below float32 too: how finely its numbers are rounded."""
        return self._given[position]

    def mean(self, position: int) -> Tensor:
        """Mean of a layer's features, float64, shape (p,)."""
        total = self._sums[position]
        assert total is not None
        return (total / self._shapes[position][0]).to(self.device(position))

    def squared_norm(self, position: int) -> float:
        """Squared norm of a layer's rows before centring."""
        found = self._squares[position]
        return float(found) if found is not None else 0.0

    def read(self, position: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start to stop of a layer, shape (stop - start, p); a view where they are in memory in one piece."""
        count, width = self._shapes[position]
        stop = count if stop is None else min(stop, count)
        if not self._files:
            return _rows_between(self._parts[position], start, stop)
        kind = np.dtype(str(self._types[position]).removeprefix("torch."))
        file = self._files[position]
        file.flush()
        file.seek(start * width * kind.itemsize)
        found = np.frombuffer(bytearray(file.read((stop - start) * width * kind.itemsize)), dtype=kind)
        file.seek(0, 2)
        return torch.from_numpy(found.reshape(stop - start, width))

    def centred(self, position: int, start: int = 0, stop: int | None = None) -> Tensor:
        """The same rows less the mean over all samples; a copy.

        The mean is taken off in two steps, so that a large one leaves no rounding behind.
        """
        rows, (coarse, fine) = self.read(position, start, stop), self._mean_in_two(position)
        return (rows - coarse).sub_(fine)

    def centred_columns(self, position: int, start: int, stop: int) -> Iterator[Tensor]:
        """The same in pieces of columns, side by side, each about 4 MiB on a CPU."""
        coarse, fine = self._mean_in_two(position)
        whole = self.read(position, start, stop) if self._files else None
        width = len(coarse)
        step = width if coarse.device.type != "cpu" else max(64, _COLUMN_BLOCK // (stop - start))
        for begin in range(0, width, step):
            cut = slice(begin, begin + step)
            block = self._block(position, start, stop, cut) if whole is None else whole[:, cut]
            yield (block - coarse[cut]).sub_(fine[cut])

    def pieces(self, rows: int) -> Iterator[list[Tensor]]:
        """Centred rows of all layers, some samples at a time."""
        for start in range(0, self.samples, rows):
            yield [self.centred(i, start, start + rows) for i in range(len(self.layers))]

    def refuse_non_finite(self) -> None:
        """See that no layer holds NaN or infinity.

        Raises:
            NonFiniteError: It names the first layer that does.
        """
        for name, total, square in zip(self.layers, self._sums, self._squares, strict=True):
            if total is not None and square is not None and not bool(total.isfinite().all() & square.isfinite()):
                raise NonFiniteError(
                    f"NaN or infinity in the activations of layer {name!r}, or numbers above 1e19; "
                    "check the input and the weights"
                )

    def close(self) -> None:
        """Let go of all rows."""
        for file in self._files:
            file.close()
        self._files, self._parts = [], [[] for _ in self.layers]

    def _mean_in_two(self, position: int) -> tuple[Tensor, Tensor]:
        mean = self.mean(position)
        coarse = mean.to(self._types[position])
        return coarse, (mean - coarse.double()).to(coarse.dtype)

    def _block(self, position: int, start: int, stop: int, columns: slice) -> Tensor:
        return _rows_between([part[:, columns] for part in self._parts[position]], start, stop)

    def _spill(self) -> None:
        self._files = [tempfile.TemporaryFile(prefix="layerlens-") for _ in self.layers]  # noqa: SIM115
        for position, parts in enumerate(self._parts):
            while parts:
                self._write(position, parts.pop(0))

    def _write(self, position: int, rows: Tensor) -> None:
        try:
            self._files[position].write(np.ascontiguousarray(rows.cpu().numpy()).data)
        except OSError as error:
            raise ConfigError(
                f"{self.bytes // MIB} MiB of rows do not fit in the temporary folder {tempfile.gettempdir()!r}: "
                f"{error.strerror}; raise memory_mib, pool the maps, or set TMPDIR to a larger disk"
            ) from error


def _rows_between(parts: Sequence[Tensor], start: int, stop: int) -> Tensor:
    if len(parts) == 1:
        return parts[0][start:stop]
    found, begin = [], 0
    for part in parts:
        if begin < stop and begin + len(part) > start:
            found.append(part[max(start - begin, 0) : stop - begin])
        begin += len(part)
    return found[0] if len(found) == 1 else torch.cat(found)


def _first_two_that_differ(counts: dict[str, int]) -> str:
    name, first = next(iter(counts.items()))
    other = next(n for n, c in counts.items() if c != first)
    return f"{first} for {name!r}, {counts[other]} for {other!r}"
