"""RowStore: the rows of all samples for every layer, in memory up to a bound and in temporary files beyond it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
import torch
from torch import Tensor

from layerlens.analysis.kernels import BURDEN
from layerlens.errors import ConfigError, ShapeError

MIB = 2**20
_COLUMN_BLOCK = 1 << 20  # numbers in a piece of columns


class RowStore:
    """Rows of L layers over all samples.

    Up to three quarters of `memory_mib` the rows stay where the model put them; beyond that all of them lie in
    temporary files on disk, which vanish with the store, and are read in pieces.

    Args:
        layers: Names, for messages.
        memory_mib: Bound on the memory for rows and for what is computed from them.
    """

    def __init__(self, layers: Sequence[str], memory_mib: float) -> None:
        if not 0 < memory_mib < float("inf"):
            raise ConfigError(f"memory_mib={memory_mib}; allowed: above 0, in MiB")
        self.layers, self.memory = tuple(layers), int(memory_mib * MIB)
        self._parts: list[list[Tensor]] = [[] for _ in layers]
        self._files: list[IO[bytes]] = []
        self._shapes: list[list[int]] = [[0, 0] for _ in layers]  # rows, width
        self._types: list[torch.dtype] = [torch.float32 for _ in layers]
        self._given: list[torch.dtype] = [torch.float32 for _ in layers]
        self._means: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, position: int, activation: Tensor, *, copy: bool = True) -> None:
        """Keep one layer's rows of a batch.

        Args:
            position: Of the layer.
            activation: Shape (n, …).
            copy: False keeps the tensor itself, which then must stay as it is.

        Raises:
            ShapeError: Another width than before.
        """
        shape = self._shapes[position]
        kind = self._types[position] if shape[0] else torch.promote_types(activation.dtype, torch.float32)
        flat = activation.detach().flatten(1) if activation.ndim > 1 else activation.detach().unsqueeze(1)
        rows = flat.to(kind)  # features in one order, whatever the memory format of a batch
        if shape[0] and shape[1] != rows.shape[1]:
            raise ShapeError(
                f"layer {self.layers[position]!r} gives {rows.shape[1]} features per row after {shape[1]} in earlier "
                "batches; pool its maps with reduce='pool'"
            )
        self._types[position], self._given[position] = rows.dtype, activation.dtype
        shape[0], shape[1] = shape[0] + len(rows), rows.shape[1]
        self._means.pop(position, None)
        if self._files:
            self._write(position, rows)
            return
        same = rows.data_ptr() == activation.data_ptr()
        self._parts[position].append(rows.clone(memory_format=torch.contiguous_format) if same and copy else rows)
        if self.bytes > self.memory * 3 // 4:
            self.spill()

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
        parts = self._parts[position]
        return parts[0].device if parts else torch.device("cpu")

    def dtype(self, position: int) -> torch.dtype:
        """Of a layer's rows: at least float32."""
        return self._types[position]

    def given(self, position: int) -> torch.dtype:
        """What a layer's activations came in, below float32 too: how finely its numbers are rounded."""
        return self._given[position]

    def offset(self, position: int) -> float:
        """n·‖mean‖² of a layer, what centring takes off its squared norm."""
        coarse, fine = self._mean_in_two(position)
        return self._shapes[position][0] * float((coarse.double() + fine.double()).square().sum())

    def read(self, position: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start to stop of a layer, shape (stop - start, p); a view where they are in memory in one piece."""
        count, width = self._shapes[position]
        stop = count if stop is None else min(stop, count)
        if not self._files:
            return _rows_between(self._parts[position], start, stop)
        kind = np.dtype(str(self._types[position]).removeprefix("torch."))
        file = self._files[position]
        file.seek(start * width * kind.itemsize)
        found = np.frombuffer(bytearray(file.read((stop - start) * width * kind.itemsize)), dtype=kind)
        file.seek(0, 2)
        return torch.from_numpy(found.reshape(stop - start, width))

    def uncentred(self, position: int) -> Tensor | None:
        """All rows of a layer as they are, where they lie in one piece on a CPU and their mean is no burden.

        That is where its square is at most four times the variance, over up to 512 columns spread over all.
        """
        parts = self._parts[position]
        if len(parts) != 1 or parts[0].device.type != "cpu":
            return None
        some = parts[0][:, :: -(-parts[0].shape[1] // 512)].double()
        mean = some.mean(0)
        variance = (some - mean).square().sum() / len(some)
        return parts[0] if bool(mean.square().sum() <= BURDEN * variance) else None

    def centred(self, position: int, start: int = 0, stop: int | None = None) -> Tensor:
        """The same rows less the mean over all samples; a copy.

        The mean is taken off in two steps, so that a large one leaves no rounding behind.
        """
        rows, (coarse, fine) = self.read(position, start, stop), self._mean_in_two(position)
        return (rows - coarse).sub_(fine)

    def centred_columns(self, position: int, start: int, stop: int) -> Iterator[Tensor]:
        """The same in pieces of columns, side by side, each about 4 MiB on a CPU."""
        if position not in self._means and not self._files and (start, stop) == (0, self._shapes[position][0]):
            yield from self._centre_all(position)
            return
        coarse, fine = self._mean_in_two(position)
        whole = self.read(position, start, stop) if self._files else None
        for columns in self._cuts(position, stop - start):
            block = self._block(position, start, stop, columns) if whole is None else whole[:, columns]
            yield (block - coarse[columns]).sub_(fine[columns])

    def pieces(self, rows: int) -> Iterator[list[Tensor]]:
        """Centred rows of all layers, some samples at a time."""
        for start in range(0, self.samples, rows):
            yield [self.centred(i, start, start + rows) for i in range(len(self.layers))]

    def close(self) -> None:
        """Let go of all rows."""
        for file in self._files:
            file.close()
        self._files, self._parts = [], [[] for _ in self.layers]

    def _mean_in_two(self, position: int) -> tuple[Tensor, Tensor]:
        """The mean of a layer's features in its own type, and what rounding left of it; found once all rows are in."""
        if position not in self._means and self._files:
            count, width = self._shapes[position]
            step = max(1, _COLUMN_BLOCK // max(width, 1))
            total = torch.zeros(width, dtype=torch.float64)
            for start in range(0, count, step):
                total += self.read(position, start, start + step).sum(0, dtype=torch.float64)
            mean = total / count
            coarse = mean.to(self._types[position])
            self._means[position] = coarse, (mean - coarse.double()).to(coarse.dtype)
        for _ in self._centre_all(position) if position not in self._means else ():
            pass
        return self._means[position]

    def _centre_all(self, position: int) -> Iterator[Tensor]:
        """Centred columns of all rows in memory; the mean is kept on the way."""
        count, parts = self._shapes[position][0], []
        share = torch.full((count,), 1 / count, dtype=self._types[position], device=self.device(position))
        for columns in self._cuts(position, count):
            block = self._block(position, 0, count, columns)
            coarse = torch.mv(block.T, share)  # twice as fast as `mean`, and what it leaves goes below
            centred = block - coarse
            fine = torch.mv(centred.T, share)
            parts.append((coarse, fine))
            yield centred.sub_(fine)
        self._means[position] = torch.cat([c for c, _ in parts]), torch.cat([f for _, f in parts])

    def _cuts(self, position: int, rows: int) -> list[slice]:
        width = self._shapes[position][1]
        step = width if self.device(position).type != "cpu" else max(64, _COLUMN_BLOCK // max(rows, 1))
        return [slice(begin, begin + step) for begin in range(0, width, max(step, 1))]

    def _block(self, position: int, start: int, stop: int, columns: slice) -> Tensor:
        return _rows_between([part[:, columns] for part in self._parts[position]], start, stop)

    def spill(self) -> None:
        """Move all rows to temporary files."""
        try:
            self._files = [tempfile.TemporaryFile(prefix="layerlens-", buffering=0) for _ in self.layers]  # noqa: SIM115
        except OSError as error:
            raise self._no_room(error) from error
        for position, parts in enumerate(self._parts):
            while parts:
                self._write(position, parts.pop(0))

    def _write(self, position: int, rows: Tensor) -> None:
        try:
            left = np.ascontiguousarray(rows.cpu().numpy()).data.cast("B")
            while len(left):  # one write may take a part only
                left = left[self._files[position].write(left) :]
        except OSError as error:
            raise self._no_room(error) from error

    def _no_room(self, error: OSError) -> ConfigError:
        try:
            where = repr(tempfile.gettempdir())
        except OSError:
            where = "that TMPDIR names"
        return ConfigError(
            f"{self.bytes // MIB} MiB of rows do not fit in the temporary folder {where}: {error.strerror}; raise "
            "memory_mib, pool the maps, or set TMPDIR to a larger disk"
        )

    def __del__(self) -> None:
        for file in getattr(self, "_files", ()):
            file.close()


def owners(counts: Sequence[Tensor], rows: int) -> Tensor:
    """The sample that each row is of, shape (rows,), from the rows that each sample of each batch gave."""
    if not counts:
        return torch.arange(rows)
    every = torch.cat(list(counts))
    return torch.repeat_interleave(torch.arange(len(every)), every)


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
