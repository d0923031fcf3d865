"""One fit() for every objective: device, schedule, views, checkpoints, resume."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerlens.activations import features
from layerlens.augment.deep import DeepAugmentation
from layerlens.augment.views import Views, usual_views
from layerlens.data import Batches, Dataset, load_data, to_unit
from layerlens.devices import pick_device
from layerlens.errors import ConfigError, NonFiniteError, RunFolderError
from layerlens.evaluation.knn import knn_accuracy
from layerlens.layers import discover, select
from layerlens.provenance import provenance
from layerlens.training.checkpoint import (
    fingerprint,
    load_into,
    read_json,
    save_checkpoint,
    write_atomically,
    write_json,
)
from layerlens.training.config import SCHEMA, RunConfig, ViewsConfig
from layerlens.training.network import build_network, head_of
from layerlens.training.objectives.simclr import nt_xent
from layerlens.untouched import seed_everything

SAVE_EVERY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is: `step` of `steps`, and what the last finished epoch measured."""

    step: int
    steps: int
    epoch: int
    metrics: dict[str, float | int | None]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: Where it lies.
        run: The identity of its configuration.
        epochs: Epochs trained.
        loss: Mean training loss of the last epoch, in nats.
        knn: Online k-NN accuracy on the held-out part of the training split, in [0, 1]; None without labels.
        wall_s: Seconds of training, interruptions not counted.
        checkpoints: Kept checkpoints, first to last.
        environment: Versions, commit, hardware.
    """

    folder: str
    run: str
    epochs: int
    loss: float
    knn: float | None
    wall_s: float
    checkpoints: tuple[str, ...]
    environment: dict[str, Any]


def train(
    config: RunConfig,
    folder: str | Path | None = None,
    *,
    dataset: Dataset | None = None,
    download: bool = False,
    device: str = "auto",
    progress: Callable[[Progress], None] | None = None,
) -> RunResult:
    """Train a network and write its run folder; a run that was interrupted goes on where it stopped.

    The folder holds `config.json`, `checkpoints/epoch-NNNN.safetensors` (0 is the start), `metrics.jsonl`,
    `resume.pt` while it runs, and `result.json`, written last. All random draws are functions of the seed, the
    epoch and the step, so an interrupted run ends with the same weights as an undisturbed one.

    Args:
        config: What to run.
        folder: Where to; `runs/<objective>-<identity>` by default.
        dataset: The data, if already loaded.
        download: Let the data set be fetched.
        device: `auto`, `cpu` or `cuda`.
        progress: Called after each step.

    Raises:
        ConfigError: A batch larger than the training split, an unknown device.
        UnknownLayerError: The augmented layer does not exist.
        RunFolderError: The folder belongs to another run, is in use, or can't be written.
        NonFiniteError: The loss became NaN or infinite; the last good state is kept.
    """
    dataset = dataset or load_data(config.data, download=download)
    config = resolve(config, dataset)
    folder = Path(folder or f"runs/{config.objective}-{config.identity()}")
    if (folder / "result.json").exists():
        claim_folder(folder, config)
        return read_result(folder)
    trainer = _Trainer(config, dataset, folder, device, progress)  # refuses what can't run before it writes anything
    claim_folder(folder, config)
    with _locked(folder):
        claim_folder(folder, config)  # another process may have claimed it at the same moment
        return read_result(folder) if (folder / "result.json").exists() else trainer.run()


def resolve(config: RunConfig, dataset: Dataset) -> RunConfig:
    """The configuration with everything filled in that depends on the data or on files."""
    settings: dict[str, Any] = {"data_sha256": dataset.fingerprint()}
    if config.views is None:
        settings["views"] = ViewsConfig(**asdict(usual_views(flip=dataset.flip)))
    if config.init is not None:
        settings["init_sha256"] = fingerprint(config.init)
    return config.model_copy(update=settings)


def claim_folder(folder: Path, config: RunConfig) -> None:
    """Make the run's folder with its `config.json`, or see that it belongs to this run.

    Raises:
        RunFolderError: It holds another run (the first difference is named), other files, or can't be written.
    """
    wanted = {"schema": SCHEMA, "run": config.identity(), "config": config.model_dump(mode="json")}
    path = folder / "config.json"
    if path.exists():
        found = read_json(path)
        if found.get("run") != wanted["run"]:
            raise RunFolderError(
                f"{str(folder)!r} belongs to another run ({_difference(found, wanted)}); choose another --out"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(p.name[0] != "." for p in folder.iterdir())):
        raise RunFolderError(f"{str(folder)!r} exists and is no run folder; choose a new or empty one with --out")
    write_json(path, wanted)


def read_result(folder: Path) -> RunResult:
    """The result of a finished run."""
    content = read_json(folder / "result.json")
    try:
        made = RunResult(**{**content, "folder": str(folder), "checkpoints": tuple(content["checkpoints"])})
    except (TypeError, KeyError) as error:
        raise RunFolderError(f"{str(folder / 'result.json')!r} is damaged; delete it and run again") from error
    if not made.checkpoints or not all((folder / str(name)).is_file() for name in made.checkpoints):
        raise RunFolderError(f"{str(folder)!r} lacks checkpoints that its result.json names; train in a new folder")
    return made


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    old = found.get("config")
    if not isinstance(old, dict):
        return "its configuration is unreadable"
    for key, value in wanted["config"].items():
        if key not in ("init", "data") and old.get(key) != value:
            return f"{key} is {old.get(key)!r} there and {value!r} here"
    return "its settings are the same, but another version of layerlens wrote it"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process, however it ends."""
    with ExitStack() as stack:
        try:
            stream = stack.enter_context((folder / ".lock").open("w"))
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(
                f"another process is training in {str(folder)!r}; wait for it or choose another --out"
            ) from error
        except OSError as error:
            raise RunFolderError(f"can't write in {str(folder)!r}: {error.strerror}; choose another --out") from error
        yield


class _Trainer:
    """The state of one run in progress."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        folder: Path,
        device: str,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        from lightning_fabric import Fabric

        self.fabric = Fabric(accelerator=pick_device(device).type, devices=1, precision=config.precision)
        self.config, self.dataset, self.folder, self.progress = config, dataset, folder, progress
        self.device = self.fabric.device
        self._split_training_data()
        self.steps = len(self.rows) // config.batch_size
        if not self.steps:
            raise ConfigError(
                f"batch_size={config.batch_size} but only {len(self.rows)} training images; use a smaller batch"
            )
        self._build()
        self.views = Views(**config.views.model_dump()) if config.views else Views()
        self.epoch, self.step, self.loss_sum, self.wall_s = 0, 0, 0.0, 0.0
        self.rate = 0.0  # learning rate of the last step
        self.metrics: dict[str, Any] = {}

    def _split_training_data(self) -> None:
        total = len(self.dataset.x_train)
        held = int(total * self.config.holdout) if self.dataset.y_train is not None else 0
        order = torch.randperm(total, generator=_generator(self.config.seed, "holdout"))
        self.held_out, self.rows = order[:held], order[held:]
        self.images = self.dataset.x_train.to(self.device)
        self.labels = None if self.dataset.y_train is None else self.dataset.y_train.to(self.device)

    def _build(self) -> None:
        config = self.config
        network = build_network(config, self.dataset)
        self.metadata = {
            "schema": SCHEMA, "model": config.model, "input_shape": list(self.dataset.input_shape),
            "head": head_of(config, self.dataset), "data": config.data, "run": config.identity(),
        }  # fmt: skip
        if config.init is not None:
            load_into(network, config.init)
        if config.augment is not None:
            select(network, discover(network, torch.zeros(2, *self.dataset.input_shape)), [config.augment.layer])
            with DeepAugmentation(**config.augment.model_dump()).attached(network):
                pass
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(
            network.parameters(), lr=config.learning_rate or 0.0, momentum=config.momentum,
            weight_decay=config.weight_decay,
        )  # fmt: skip
        self.network = network
        self.wrapped, self.optimizer = self.fabric.setup(network, optimizer)

    def run(self) -> RunResult:
        self._resume()
        augment = self.config.augment
        operator = DeepAugmentation(**augment.model_dump()).attached(self.network) if augment else nullcontext()
        self.saved_at = time.monotonic()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), operator:
            if self.epoch == 0 and self.step == 0:
                self._keep()
            while self.epoch < self.config.epochs:
                self._run_epoch()
        return self._finish()

    def _run_epoch(self) -> None:
        order = self.rows[torch.randperm(len(self.rows), generator=_generator(self.config.seed, "order", self.epoch))]
        self.network.train()
        total = torch.tensor(self.loss_sum, dtype=torch.float64, device=self.device)
        mark = time.monotonic()
        while self.step < self.steps:
            rows = order[self.step * self.config.batch_size :][: self.config.batch_size]
            total += self._train_step(rows.to(self.device))
            self.step += 1
            if self.device.type == "cpu" or self.step == self.steps:
                self._check(total)
            if self.progress:
                done = self.epoch * self.steps + self.step
                self.progress(
                    Progress(step=done, steps=self.config.epochs * self.steps, epoch=self.epoch, metrics=self.metrics)
                )
            if time.monotonic() - self.saved_at > SAVE_EVERY_S and self.step < self.steps:
                self._check_weights()
                self.loss_sum, self.wall_s = total.item(), self.wall_s + time.monotonic() - mark
                mark = time.monotonic()
                self._save()
        self.wall_s += time.monotonic() - mark
        self._end_epoch(total.item() / self.steps)

    def _train_step(self, rows: Tensor) -> Tensor:
        draws = _generator(self.config.seed, "views", self.epoch, self.step)
        seed_everything(_seed(self.config.seed, "model", self.epoch, self.step), self.device)
        self.rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(to_unit(self.images[rows]), rows, draws)
        self.fabric.backward(loss)
        self.optimizer.step()
        return loss.detach()

    def _loss(self, images: Tensor, rows: Tensor, draws: torch.Generator) -> Tensor:
        if self.config.objective == "supervised":
            labels = self.labels[rows] if self.labels is not None else None
            logits = self._forward(self.views(images, draws))
            return nn.functional.cross_entropy(logits.float(), labels)  # type: ignore[arg-type]
        z = self._forward(self.views(torch.cat([images, images]), draws))
        return nt_xent(z, temperature=self.config.temperature, scale=self.config.loss_scale)

    def _forward(self, images: Tensor) -> Tensor:
        ready = self.dataset.normalize(images).contiguous(memory_format=torch.channels_last)
        return self.wrapped(ready)  # type: ignore[no-any-return]

    def _learning_rate(self) -> float:
        """Linear warm-up, then half a cosine down to 0; by step."""
        config = self.config
        now, end = self.epoch + self.step / self.steps, float(config.epochs)
        peak, warm = config.learning_rate or 0.0, min(config.warmup_epochs, config.epochs / 10)
        if now < warm:
            return peak * (now + 1 / self.steps) / (warm + 1 / self.steps)
        return peak * 0.5 * (1 + math.cos(math.pi * (now - warm) / (end - warm)))

    def _check(self, total: Tensor) -> None:
        if not bool(total.isfinite()):
            raise NonFiniteError(
                f"the loss became NaN or infinite at step {self.step} of epoch {self.epoch + 1}; the last good state "
                f"is kept in {str(self.folder)!r}. Try a lower learning_rate (it was {self.config.learning_rate:g}) or "
                "32-bit precision"
            )

    def _check_weights(self) -> None:
        """A finite loss can be followed by an update that is not."""
        bad = [name for name, value in self.network.state_dict().items() if not bool(value.isfinite().all())]
        if bad:
            raise NonFiniteError(
                f"the weights of {bad[0]!r} became NaN or infinite in epoch {self.epoch + (self.step > 0)}; the last "
                f"good state is kept in {str(self.folder)!r}. Try a lower learning_rate than "
                f"{self.config.learning_rate:g}"
            )

    def _end_epoch(self, loss: float) -> None:
        self.epoch, self.step, self.loss_sum = self.epoch + 1, 0, 0.0
        last = self.epoch == self.config.epochs
        self._check_weights()
        due = last or self.epoch % self.config.knn_every == 0
        self.metrics = {
            "epoch": self.epoch, "loss": loss, "learning_rate": self.rate,
            "knn": self._online_knn() if due else None, "wall_s": round(self.wall_s, 3),
        }  # fmt: skip
        if last or self.epoch % self.config.keep_every == 0:
            self._keep()
        lines = [line for line in read_metrics(self.folder) if line["epoch"] < self.epoch]
        _write_metrics(self.folder, [*lines, self.metrics])
        self._save()

    def _online_knn(self) -> float | None:
        """k-NN accuracy of the held-out training images against the others."""
        if self.labels is None or not len(self.held_out):
            return None
        bank, queries = self.rows[:4096], self.held_out[:1024]
        found = [features(self.network, self._unaugmented(rows)) for rows in (bank, queries)]
        labels = self.labels.cpu()
        return knn_accuracy(found[0], labels[bank], found[1], labels[queries])

    def _unaugmented(self, rows: Tensor) -> Batches:
        return Batches(self.dataset, self.dataset.x_train, None, rows, 512)

    def _keep(self) -> None:
        path = self.folder / "checkpoints" / f"epoch-{self.epoch:04d}.safetensors"
        save_checkpoint(path, self.network, {**self.metadata, "epoch": self.epoch})

    def _save(self) -> None:
        state = {
            "model": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "epoch": self.epoch,
            "step": self.step, "loss_sum": self.loss_sum, "wall_s": self.wall_s,
            "rate": self.rate, "precision": self.fabric.strategy.precision.state_dict(),
        }  # fmt: skip
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.folder / "resume.pt", buffer.getvalue())
        self.saved_at = time.monotonic()

    def _resume(self) -> None:
        path = self.folder / "resume.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.network.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.fabric.strategy.precision.load_state_dict(state["precision"])
            self.epoch, self.step = int(state["epoch"]), int(state["step"])
            self.loss_sum, self.wall_s = float(state["loss_sum"]), float(state["wall_s"])
            self.rate = float(state["rate"])
        except Exception as error:  # whatever a damaged file makes torch raise, the answer is the same
            raise RunFolderError(f"{str(path)!r} is damaged; delete it to start this run from the beginning") from error
        self.metrics = next((m for m in reversed(read_metrics(self.folder)) if m["epoch"] == self.epoch), {})

    def _finish(self) -> RunResult:
        kept = sorted(
            str(path.relative_to(self.folder)) for path in self.folder.glob("checkpoints/epoch-*.safetensors")
        )
        last = self.metrics
        if last.get("epoch") != self.epoch:
            raise RunFolderError(f"{str(self.folder / 'metrics.jsonl')!r} lacks the last epoch; train in a new folder")
        result = RunResult(
            folder=str(self.folder), run=self.config.identity(), epochs=self.epoch, loss=last["loss"], knn=last["knn"],
            wall_s=round(self.wall_s, 3), checkpoints=tuple(kept), environment=provenance(self.device),
        )  # fmt: skip
        content = asdict(result)
        del content["folder"]
        write_json(self.folder / "result.json", content)
        (self.folder / "resume.pt").unlink(missing_ok=True)
        return result


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """What each finished epoch of a run measured, in order."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise RunFolderError(f"{str(path)!r} is damaged: {error}") from error
    if not all(isinstance(line, dict) and isinstance(line.get("epoch"), int) and "loss" in line for line in lines):
        raise RunFolderError(f"{str(path)!r} is damaged: a line without epoch and loss; train in a new folder")
    return lines


def _write_metrics(folder: Path, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    write_atomically(folder / "metrics.jsonl", text.encode())


def _seed(*parts: object) -> int:
    """A number in [0, 2^63) for one purpose, so that draws need no state."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(*parts))
