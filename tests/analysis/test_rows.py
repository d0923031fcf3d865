"""RowStore: the same rows whether they lie in memory or on disk, and nothing left behind."""

import errno
import gc
import io
import os
import tempfile
import warnings
import weakref

import pytest
import torch

from layerlens.analysis import rows as rows_module
from layerlens.analysis.rows import MIB, RowStore
from layerlens.errors import ConfigError, ShapeError

NOTHING, PLENTY = 1e-6, 64  # MiB: all rows on disk, all in memory


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def store_of():
    """Makes stores that are closed again."""
    made = []

    def make(layers, memory_mib, batch=7):
        store = RowStore([f"layer{i}" for i in range(len(layers))], memory_mib)
        made.append(store)
        for batches in zip(*(x.split(batch) for x in layers), strict=True):
            for position, activation in enumerate(batches):
                store.append(position, activation)
        return store

    yield make
    for store in made:
        store.close()


def columns_of(store, position, start, stop):
    return torch.cat(list(store.centred_columns(position, start, stop)), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 7, 30, 40])
def test_rows_on_disk_are_the_rows_in_memory(batch, dtype, store_of):
    layers = [draw(30, 5).to(dtype), 100 + draw(30, 3, 2, 2, seed=1).to(dtype)]
    memory, disk = store_of(layers, PLENTY, batch), store_of(layers, NOTHING, batch)
    assert (memory.on_disk, disk.on_disk) == (False, True)
    for store in (memory, disk):
        assert store.samples == 30
        assert store.widths == [5, 12]
        assert store.bytes == 30 * 17 * dtype.itemsize
        assert store.dtype(1) == store.given(1) == dtype
        assert store.device(1) == torch.device("cpu")
    for position, x in enumerate(layers):
        for start, stop in [(0, None), (0, 30), (6, 8), (7, 14), (5, 29), (29, 30), (28, 99)]:
            expected = x.flatten(1)[start:stop]
            assert torch.equal(memory.read(position, start, stop), expected)
            assert torch.equal(disk.read(position, start, stop), expected)


@pytest.mark.parametrize("memory_mib", [NOTHING, PLENTY])
@pytest.mark.parametrize("batch", [7, 30])
def test_rows_are_centred_over_all_samples_whichever_way_they_are_read(batch, memory_mib, store_of):
    layers = [draw(30, 5), 100 + draw(30, 3, 2, 2, seed=1)]
    wide = [x.double().flatten(1) for x in layers]
    expected = [(x - x.mean(0)).float() for x in wide]
    store = store_of(layers, memory_mib, batch)
    for position, x in enumerate(expected):
        for start, stop in [(0, 30), (6, 8), (28, 30)]:
            torch.testing.assert_close(store.centred(position, start, stop), x[start:stop], atol=1e-6, rtol=0)
            torch.testing.assert_close(columns_of(store, position, start, stop), x[start:stop], atol=1e-6, rtol=0)
        assert store.offset(position) == pytest.approx(30 * float(wide[position].mean(0).square().sum()), rel=1e-6)
    pieces = list(store.pieces(8))
    assert [[len(x) for x in piece] for piece in pieces] == [[8, 8], [8, 8], [8, 8], [6, 6]]
    for position, x in enumerate(expected):
        torch.testing.assert_close(torch.cat([piece[position] for piece in pieces]), x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("memory_mib", [NOTHING, PLENTY])
@pytest.mark.parametrize("mean", [0.0, 100.0, 1e4])
def test_centring_leaves_a_mean_below_a_millionth_of_the_spread(mean, memory_mib, store_of):
    store = store_of([mean + draw(500, 40)], memory_mib, batch=64)
    found = {
        "columns, before the mean was taken": columns_of(store, 0, 0, 500),
        "columns, after it": columns_of(store, 0, 0, 500),
        "rows": store.centred(0),
        "parts": torch.cat([store.centred(0, 0, 250), store.centred(0, 250, 500)]),
    }
    for way, x in found.items():
        x = x.double()
        assert float((x.mean(0).abs() / x.std(0)).max()) < 1e-6, way


@pytest.mark.parametrize("columns", [1, 9, 1 << 20])
def test_width_of_the_column_pieces_changes_no_number(columns, store_of, monkeypatch):
    x = 100 + draw(30, 300)
    for memory_mib in (NOTHING, PLENTY):
        store = store_of([x], memory_mib)
        whole = store.centred(0)
        monkeypatch.setattr(rows_module, "_COLUMN_BLOCK", columns * 30)
        for start, stop in [(0, 30), (3, 9)]:
            pieces = list(store.centred_columns(0, start, stop))
            torch.testing.assert_close(torch.cat(pieces, 1), whole[start:stop], atol=2e-6, rtol=0)
        monkeypatch.undo()


def test_mean_follows_rows_that_are_added_after_it_was_taken(store_of):
    x = draw(40, 5) + torch.arange(40)[:, None]
    for memory_mib in (NOTHING, PLENTY):
        store = store_of([x[:20]], memory_mib)
        first = store.centred(0).clone()
        torch.testing.assert_close(first, x[:20] - x[:20].mean(0), atol=1e-5, rtol=0)
        store.append(0, x[20:])
        torch.testing.assert_close(store.centred(0), x - x.mean(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("memory_mib", [NOTHING, PLENTY])
def test_rows_may_be_read_between_batches(memory_mib, store_of):
    x = draw(40, 5)
    store = store_of([x[:20]], memory_mib)
    assert torch.equal(store.read(0, 3, 5), x[3:5])
    store.append(0, x[20:])
    assert torch.equal(store.read(0), x)


def test_rows_stay_in_memory_within_the_bound_and_all_go_to_disk_beyond_it(store_of):
    x = draw(512, 512)  # 1 MiB
    assert not store_of([x], 4, batch=64).on_disk
    assert store_of([x], 1, batch=64).on_disk
    late = store_of([x[:64]], 1, batch=64)
    assert not late.on_disk
    for part in x[64:].split(64):
        late.append(0, part)
    assert late.on_disk
    assert torch.equal(late.read(0), x)
    assert late.bytes == MIB


def test_all_layers_go_to_disk_in_the_middle_of_a_batch(store_of):
    layers = [draw(40, 64), draw(40, 1024, seed=1), draw(40, 64, seed=2)]
    store = store_of(layers, 0.15, batch=20)
    assert store.on_disk
    for position, x in enumerate(layers):
        assert torch.equal(store.read(position), x)


@pytest.mark.parametrize("memory_mib", [NOTHING, PLENTY])
def test_another_width_than_before_is_refused_and_changes_nothing(memory_mib, store_of):
    store = store_of([draw(8, 4)], memory_mib)
    with pytest.raises(ShapeError, match=r"'layer0' gives 5 features per row after 4.*reduce='pool'"):
        store.append(0, draw(8, 5))
    assert store.samples == 8
    assert torch.equal(store.read(0), draw(8, 4))


def test_layers_with_other_sample_counts_are_named(store_of):
    store = store_of([draw(8, 4), draw(8, 4), draw(8, 4)], PLENTY)
    store.append(2, draw(3, 4))
    with pytest.raises(ShapeError, match=r"8 for 'layer0', 11 for 'layer2'"):
        _ = store.samples


@pytest.mark.parametrize("memory_mib", [NOTHING, PLENTY])
@pytest.mark.parametrize("shape", [(8, 6), (8, 3, 2), (8, 3, 4, 4)])
def test_a_later_change_of_the_activation_has_no_effect(shape, memory_mib, store_of):
    x = draw(*shape)
    kept = x.clone()
    store = store_of([x], memory_mib, batch=100)
    x.mul_(-7)
    assert torch.equal(store.read(0), kept.flatten(1))


def test_a_later_change_of_channels_last_maps_has_no_effect(store_of):
    x = draw(8, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    store = store_of([x], PLENTY, batch=100)
    before = store.read(0).clone()
    x.zero_()
    assert torch.equal(store.read(0), before)
    assert before.any()


def test_without_a_copy_the_tensor_itself_is_kept():
    x, store = draw(8, 6), RowStore(["a"], PLENTY)
    store.append(0, x, copy=False)
    assert store.read(0).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("memory_mib", [NOTHING, PLENTY])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_numbers_below_float32_are_kept_in_float32(dtype, memory_mib, store_of):
    x = (8 * draw(20, 6)).to(dtype)
    store = store_of([x], memory_mib)
    assert (store.dtype(0), store.given(0)) == (torch.float32, dtype)
    assert torch.equal(store.read(0), x.float())
    torch.testing.assert_close(store.centred(0), x.float() - x.float().mean(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kinds", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_batches_of_another_type_are_the_same_rows_on_disk(kinds):
    """float64 numbers that float32 holds exactly, so that either type may be kept."""
    x = draw(20, 6)
    for memory_mib in (PLENTY, NOTHING):
        store = RowStore(["a"], memory_mib)
        for part, kind in zip(x.split(10), kinds, strict=True):
            store.append(0, part.to(kind))
        try:
            assert torch.equal(store.read(0).double(), x.double())
        finally:
            store.close()


def test_batches_of_maps_in_another_memory_format_have_their_features_in_the_same_order(store_of):
    x = draw(20, 3, 4, 4)
    store = store_of([x[:10]], PLENTY)
    store.append(0, x[10:].contiguous(memory_format=torch.channels_last))
    assert torch.equal(store.read(0), x.flatten(1))


def test_a_strided_part_of_a_tensor_is_stored_as_its_values(store_of):
    x = draw(20, 12)
    for part in (x[:, ::3], x[::2], draw(12, 20).T, x[:1].expand(20, 12)):
        for memory_mib in (NOTHING, PLENTY):
            assert torch.equal(store_of([part], memory_mib).read(0), part)


def test_one_number_per_sample_is_one_feature(store_of):
    store = store_of([draw(20)], PLENTY)
    assert store.widths == [1]
    assert torch.equal(store.read(0)[:, 0], draw(20))


def test_gradients_are_not_kept(store_of):
    store = store_of([draw(20, 3).requires_grad_()], PLENTY)
    assert not store.read(0).requires_grad


@pytest.mark.parametrize("memory_mib", [0, -1, float("nan")])
def test_a_bound_that_is_not_positive_is_refused(memory_mib):
    with pytest.raises(ConfigError, match=r"memory_mib=.*allowed: above 0"):
        RowStore(["a"], memory_mib)


def open_files(store):
    return [file.fileno() for file in store._files]


def is_open(descriptor):
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_files_have_no_name_in_the_temporary_folder_and_are_closed_by_close(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = RowStore(["a", "b"], NOTHING)
    store.append(0, draw(8, 4))
    store.append(1, draw(8, 4))
    files = open_files(store)
    assert len(files) == 2
    assert all(map(is_open, files))
    assert not list(tmp_path.iterdir())
    store.close()
    assert not any(map(is_open, files))
    assert not store.on_disk


def test_close_lets_go_of_rows_in_memory():
    store = RowStore(["a"], PLENTY)
    store.append(0, draw(8, 4))
    kept = weakref.ref(store._parts[0][0])
    assert kept() is not None
    store.close()
    assert kept() is None


def test_files_are_closed_without_a_warning_with_a_store_that_nobody_holds():
    store = RowStore(["a"], NOTHING)
    store.append(0, draw(8, 4))
    files = open_files(store)
    assert all(map(is_open, files))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del store
        gc.collect()
    assert not caught
    assert not any(map(is_open, files))


class FullDisk:
    """A temporary file on a disk with no space left, from some write on."""

    def __init__(self, writes=0):
        self.left = writes

    def write(self, data):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)

    def close(self):
        pass


@pytest.mark.parametrize("writes", [0, 2])
def test_a_full_disk_is_answered_with_what_to_do(writes, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(rows_module.tempfile, "TemporaryFile", lambda **_: FullDisk(writes))
    store = RowStore(["a"], NOTHING)
    for _ in range(writes):
        store.append(0, draw(1024, 1024))
    with pytest.raises(ConfigError, match="No space left on device") as caught:
        store.append(0, draw(1024, 1024))
    message = str(caught.value)
    assert f"{4 * (writes + 1)} MiB of rows" in message
    assert repr(str(tmp_path)) in message
    for way_out in ("raise memory_mib", "pool the maps", "set TMPDIR"):
        assert way_out in message
    assert isinstance(caught.value.__cause__, OSError)


class FullDevice(io.RawIOBase):
    """A raw file on a disk with no space left."""

    def readable(self):
        return True

    def writable(self):
        return True

    def seekable(self):
        return True

    def seek(self, *_):
        return 0

    def write(self, _):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_shows_at_once_and_not_when_a_buffer_is_written_later(monkeypatch):
    made = []

    def file(buffering=-1, **_):
        made.append(FullDevice() if buffering == 0 else io.BufferedRandom(FullDevice()))
        return made[-1]

    monkeypatch.setattr(rows_module.tempfile, "TemporaryFile", file)
    try:
        with pytest.raises(ConfigError, match="No space left on device"):
            RowStore(["a"], NOTHING).append(0, draw(8, 4))
    finally:
        for opened in made:
            opened.close() if isinstance(opened, FullDevice) else opened.detach()


def test_a_file_that_takes_a_part_of_a_write_gets_the_rest(monkeypatch, store_of):
    class Slow:
        """Takes at most 100 bytes at a time, as a file may."""

        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:100])

        def __getattr__(self, name):
            return getattr(self.file, name)

    open_file = tempfile.TemporaryFile
    monkeypatch.setattr(rows_module.tempfile, "TemporaryFile", lambda **options: Slow(open_file(**options)))
    x = draw(40, 6)
    assert torch.equal(store_of([x], NOTHING).read(0), x)


def test_a_temporary_folder_that_is_not_there_is_answered_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="set TMPDIR"):
        RowStore(["a"], NOTHING).append(0, draw(8, 4))
