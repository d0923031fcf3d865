"""Checkpoints: atomic writing, and reading that executes nothing."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from layerlens import files as module
from layerlens.errors import CheckpointError, RunFolderError
from layerlens.files import read_json, write_atomically, write_json
from layerlens.training.checkpoint import (
    fingerprint,
    load_into,
    load_state,
    save_checkpoint,
)


def net(out: int = 2, seed: int = 0) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, out))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator))
    return model


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class WritesFile:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


# --- writing ---


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    path = tmp_path / "state.bin"
    write_atomically(path, b"old")

    def full(*_args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(module.os, call, full)
        with pytest.raises(RunFolderError, match=r"can't write '.*state\.bin': No space left on device; make room"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "state.bin"
    write_atomically(path, b"old")

    def interrupt(*_args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_writing_makes_the_folders_above(tmp_path: Path):
    write_atomically(tmp_path / "a" / "b" / "c.bin", b"x")
    assert (tmp_path / "a" / "b" / "c.bin").read_bytes() == b"x"


def test_a_file_where_a_folder_should_be_is_an_error_of_ours(tmp_path: Path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(RunFolderError, match=r"can't write .*choose another folder"):
        write_atomically(tmp_path / "taken" / "x.bin", b"x")


def test_json_round_trip(tmp_path: Path):
    content = {"a": [1, 2.5, None], "b": {"c": "ä"}}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_without_nan(tmp_path: Path, value: float):
    write_json(tmp_path / "x.json", {"kept": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"bad": value})
    assert read_json(tmp_path / "x.json") == {"kept": 1}


def test_reading_missing_or_damaged_json(tmp_path: Path):
    with pytest.raises(RunFolderError, match=r"can't read .*No such file"):
        read_json(tmp_path / "x.json")
    for content in (b'{"a": ', b"", b"\xff\xfe"):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(RunFolderError, match=r"x\.json' is damaged"):
            read_json(tmp_path / "x.json")


# --- round trips ---


def test_weights_buffers_and_metadata_come_back_bit_identical(tmp_path: Path):
    model, path = net(), tmp_path / "m.safetensors"
    model(torch.ones(4, 3))  # moves num_batches_tracked
    save_checkpoint(path, model, {"epoch": 3, "head": {"kind": "linear", "out": 2}})
    state, metadata = load_state(path)
    assert same(state, model.state_dict())
    assert metadata == {"epoch": 3, "head": {"kind": "linear", "out": 2}}
    other = net(seed=1)
    assert not same(other.state_dict(), model.state_dict())
    assert load_into(other, path) == metadata
    assert same(other.state_dict(), model.state_dict())


def test_channels_last_weights_come_back(tmp_path: Path):
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    save_checkpoint(tmp_path / "m.safetensors", model, {})
    assert same(load_state(tmp_path / "m.safetensors")[0], model.state_dict())


def test_tied_weights_come_back(tmp_path: Path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    save_checkpoint(tmp_path / "m.safetensors", model, {})
    assert same(load_state(tmp_path / "m.safetensors")[0], model.state_dict())


@pytest.mark.parametrize("name", ["model", "module", "backbone"])
def test_a_model_whose_only_child_has_any_name_comes_back(tmp_path: Path, name: str):
    model, other = nn.Module(), nn.Module()
    model.add_module(name, net())
    other.add_module(name, net(seed=1))
    save_checkpoint(tmp_path / "m.safetensors", model, {})
    load_into(other, tmp_path / "m.safetensors")
    assert same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_other_peoples_state_dicts_load(tmp_path: Path, key: str | None, prefix: str):
    model, other = net(), net(seed=1)
    state: Any = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({key: state, "epoch": 4} if key else state, tmp_path / "m.pt")
    assert load_into(other, tmp_path / "m.pt") == {}
    assert same(other.state_dict(), model.state_dict())


def test_other_peoples_safetensors_load_without_metadata(tmp_path: Path):
    save_file(net().state_dict(), tmp_path / "m.safetensors")
    state, metadata = load_state(str(tmp_path / "m.safetensors"))
    assert same(state, net().state_dict())
    assert metadata == {}


def test_a_prefix_that_only_some_names_have_stays(tmp_path: Path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "m.pt")
    assert set(load_state(tmp_path / "m.pt")[0]) == {"module.a", "b"}


# --- files that are no checkpoint ---


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_a_missing_checkpoint_is_named(tmp_path: Path, name: str):
    for read in (load_state, fingerprint, lambda path: load_into(net(), path)):
        with pytest.raises(CheckpointError, match=rf"no checkpoint '.*{name}'; give a \.safetensors or \.pt file"):
            read(tmp_path / name)


def test_a_folder_is_no_checkpoint(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_state(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, suffix: str, share: float):
    path = tmp_path / f"m{suffix}"
    if suffix == ".pt":
        torch.save(net().state_dict(), path)
    else:
        save_checkpoint(path, net(), {})
    assert load_state(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"truncated|damaged"):
        load_state(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("seed", range(5))
def test_random_bytes_are_refused(tmp_path: Path, suffix: str, seed: int):
    path = tmp_path / f"m{suffix}"
    path.write_bytes(torch.randint(256, (500,), generator=torch.Generator().manual_seed(seed)).byte().numpy().tobytes())
    with pytest.raises(CheckpointError, match=r"truncated|damaged"):
        load_state(path)


@pytest.mark.parametrize("form", ["raw pickle", "torch zip", "inside a state dict"])
def test_code_in_a_pickle_is_never_executed(tmp_path: Path, form: str):
    made, path = tmp_path / "made", tmp_path / "m.pt"
    if form == "raw pickle":
        path.write_bytes(pickle.dumps(WritesFile(made), protocol=2))
        pickle.loads(path.read_bytes()).close()
    else:
        torch.save(WritesFile(made) if form == "torch zip" else {"w": torch.ones(1), "x": WritesFile(made)}, path)
        found = torch.load(path, weights_only=False)
        (found["x"] if isinstance(found, dict) else found).close()
    assert made.exists(), "the file must be dangerous for this test to mean anything"
    made.unlink()
    with pytest.raises(CheckpointError, match=r"never executes; save `model\.state_dict\(\)` alone"):
        load_state(path)
    assert not made.exists()


def test_a_pickled_module_is_refused(tmp_path: Path):
    torch.save(net(), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="never executes"):
        load_state(tmp_path / "m.pt")


@pytest.mark.parametrize("content", [torch.ones(2), [torch.ones(2)], {}, {"a": 1}, {"state_dict": {"a": "b"}}])
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: Any):
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="holds no state dict of tensors"):
        load_state(tmp_path / "m.pt")


def test_safetensors_without_tensors_are_refused(tmp_path: Path):
    save_file({}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        load_state(tmp_path / "m.safetensors")


def test_metadata_that_is_no_json_is_refused(tmp_path: Path):
    save_file(net().state_dict(), tmp_path / "m.safetensors", {"layerlens": '{"model": '})
    with pytest.raises(CheckpointError, match=r"m\.safetensors"):
        load_state(tmp_path / "m.safetensors")


def test_metadata_that_is_no_dict_counts_as_none(tmp_path: Path):
    save_file(net().state_dict(), tmp_path / "m.safetensors", {"layerlens": json.dumps([1, 2])})
    assert load_state(tmp_path / "m.safetensors")[1] == {}


# --- another architecture ---


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (lambda: net(out=5), r"2\.weight is \(5, 4\) in the file, \(2, 4\) in the model; 2\.bias is \(5,\) .*\(2 in"),
        (lambda: nn.Sequential(nn.Linear(3, 4)), r"1\.weight is missing in the file; .*\(6 in all\)"),
        (lambda: net().append(nn.Linear(2, 2)), r"3\.bias is only in the file; 3\.weight is only in the file \(2 in"),
    ],
    ids=["shapes", "missing", "extra"],
)
def test_another_architecture_is_named_and_nothing_is_loaded(tmp_path: Path, other: Any, match: str):
    save_checkpoint(tmp_path / "m.safetensors", other(), {})
    model = net(seed=3)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="is of another architecture: " + match):
        load_into(model, tmp_path / "m.safetensors")
    assert same(model.state_dict(), before)


def test_a_file_from_before_num_batches_tracked_loads(tmp_path: Path):
    state = {name: value for name, value in net().state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "m.pt")
    model = net(seed=1)
    load_into(model, tmp_path / "m.pt")
    assert torch.equal(model[0].weight, net()[0].weight)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["2.weight", "1.running_var"])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, name: str, value: float):
    broken = net()
    broken.state_dict()[name].view(-1)[-1] = value
    save_checkpoint(tmp_path / "m.safetensors", broken, {})
    model = net(seed=3)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=rf"NaN or infinity in {name}; use an earlier checkpoint"):
        load_into(model, tmp_path / "m.safetensors")
    assert same(model.state_dict(), before)


def test_fingerprint_is_the_sha256_of_the_content(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"abc")
    assert fingerprint(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
