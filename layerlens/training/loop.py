"""One loop for every objective: device, ranks, precision, schedule, checkpoints, exact resume."""

from __future__ import annotations

import inspect
import io
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerlens.activations import to_device
from layerlens.augment.adalase import AdaLASE
from layerlens.augment.deep import DeepAugmentation
from layerlens.augment.dropout import TwoPassDropout
from layerlens.augment.views import Views, moco_views, usual_views, weak_views
from layerlens.data import AnyDataset, Dataset, load_data
from layerlens.devices import pick_device
from layerlens.encoders import fingerprint_of
from layerlens.errors import ConfigError, DamagedStateError, DeviceMemoryError, NonFiniteError, RunFolderError
from layerlens.files import write_atomically, write_json
from layerlens.graphs import GraphDataset, describe_graphs
from layerlens.layers import run_batch
from layerlens.models import Example
from layerlens.provenance import provenance
from layerlens.sentence_tables import has_splits
from layerlens.specs import parse_spec
from layerlens.text import TextDataset
from layerlens.training.checkpoint import fingerprint, save_checkpoint
from layerlens.training.config import RunConfig, ViewsConfig
from layerlens.training.feeds import METHODS, GraphFeed, ImageFeed, TextFeed, check_data, describe_sentences
from layerlens.training.lars import LARS
from layerlens.training.launch import launch, launched
from layerlens.training.network import (
    Start,
    adalase_layers,
    augmented_layers,
    build_start,
    frozen_modules,
    with_own_settings,
)
from layerlens.training.order import Order, generator, seed_of
from layerlens.training.ranks import gather_rows, mean_over_ranks
from layerlens.training.run_folder import Log, RunResult, claim_folder, locked, read_result, remove_leftovers
from layerlens.training.schedule import learning_rate
from layerlens.training.tensorboard import require_tensorboard, write_scalars
from layerlens.untouched import seed_everything, untouched

SAVE_EVERY_S = 60.0
CHECK_EVERY = 50  # steps on a GPU between two looks at the loss, which make the host wait


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is: `step` of `steps`, and what the last finished epoch measured."""

    step: int
    steps: int
    epoch: int
    metrics: dict[str, float | int | None]


def train(
    config: RunConfig,
    folder: str | Path | None = None,
    *,
    dataset: AnyDataset | None = None,
    download: bool = False,
    device: str = "auto",
    progress: Callable[[Progress], None] | None = None,
    tensorboard: bool = False,
    say: Callable[[str], None] | None = None,
) -> RunResult:
    """Train a network and write its run folder; a run that was interrupted goes on where it stopped.

    The folder holds `config.json`, `checkpoints/epoch-NNNN.safetensors` (0 is the start), `metrics.jsonl` and `.csv`,
    with AdaLASE `ratios.jsonl` and `.csv`, with `text.dev_every` `dev.jsonl` and `.csv`, with `text.dev` the best
    checkpoint as `checkpoints/best.safetensors`, `resume.pt` while it runs, and `result.json`, written last. All random
    draws are functions of the seed, the epoch, the step and the rank, so an interrupted run ends with the same
    weights as an undisturbed one.

    Args:
        config: What to run.
        folder: Where to; `runs/<objective>-<identity>` by default.
        dataset: The data, if already loaded.
        download: Let the data set be fetched.
        device: `auto`, `cpu` or `cuda`. With `config.devices` above 1, that many processes are started, unless
            torchrun has started them; a script that calls this needs the guard `if __name__ == "__main__":`.
        progress: Called after each step.
        tensorboard: Also write the numbers of each epoch as TensorBoard events.
        say: Takes lines about the sentences or graphs that are trained on: how many, what was left out, what is cut.

    Raises:
        ConfigError: A batch larger than the training split, labels missing, an unknown device.
        UnknownLayerError: A layer that does not exist.
        RunFolderError: The folder belongs to another run, is in use, or can't be written.
        NonFiniteError: The loss became NaN or infinite; the last good state is kept.
        DeviceMemoryError: Out of memory.
    """
    dataset = dataset or load_data(config.data, download=download)
    config = resolve(config, dataset)
    if tensorboard:
        require_tensorboard()
    folder = Path(folder or f"runs/{config.objective}-{config.identity()}")
    if launched() and launched() != config.devices:
        raise ConfigError(f"devices={config.devices} but torchrun started {launched()} processes; make them agree")
    if (folder / "result.json").exists():
        claim_folder(folder, config)
        return _finished(folder)
    given = (config, dataset, folder, device, progress, tensorboard, say)
    if launched():
        return _train_among_ranks(config, folder, _Trainer(*given))
    if config.devices == 1:
        with _memory_errors(config):
            trainer = _Trainer(*given)  # refuses before it writes
    else:
        _check_device(config, device)
        network = check_run(config, dataset)
        if say is not None:
            _describe(dataset, network, say)
    claim_folder(folder, config)
    with locked(folder):
        claim_folder(folder, config)  # another process may have claimed it at the same moment
        if (folder / "result.json").exists():
            return _finished(folder)
        remove_leftovers(folder)
        if config.devices == 1:
            return trainer.run()
        launch(_train_rank, config.devices, (config, dataset, folder, device, tensorboard), progress)
        return read_result(folder)


def check_run(config: RunConfig, dataset: AnyDataset) -> nn.Module:
    """See that a run can begin, on whatever device: its data, its network, its layers, what hangs on them.

    Returns:
        The network as it is before the first step.

    Raises:
        LayerlensError: What `train` would raise before its first step.
    """
    check_data(config, dataset)
    _check_labels(config, dataset)
    Order(config, dataset)
    Views(**(config.views or ViewsConfig()).model_dump())
    start = build_start(config, dataset)
    _freeze(start.network, frozen_modules(config, start.network, start.example))
    build_operators(config, start.network, start.example)
    return start.network


def _describe(dataset: AnyDataset, network: nn.Module, say: Callable[[str], None]) -> None:
    if isinstance(dataset, GraphDataset):
        say(describe_graphs(dataset))
    for line in describe_sentences(dataset, network) if isinstance(dataset, TextDataset) else ():
        say(line)


def _train_among_ranks(config: RunConfig, folder: Path, trainer: _Trainer) -> RunResult:
    """Under torchrun: the first rank answers for the folder."""
    with ExitStack() as stack:
        if trainer.rank == 0:
            claim_folder(folder, config)
            stack.enter_context(locked(folder))
            remove_leftovers(folder)
        return trainer.run()


def _finished(folder: Path) -> RunResult:
    """A run that is done, without the state that a process killed at its very end has left."""
    result = read_result(folder)
    (folder / "resume.pt").unlink(missing_ok=True)
    return result


def _train_rank(
    report: Callable[[Any], None], config: RunConfig, dataset: AnyDataset, folder: Path, device: str,
    tensorboard: bool,
) -> None:  # fmt: skip
    """One rank's share, in a process of its own."""
    _Trainer(config, dataset, folder, device, report, tensorboard).run()


def resolve(config: RunConfig, dataset: AnyDataset) -> RunConfig:
    """The configuration with everything filled in that depends on the data or on files."""
    check_data(config, dataset)
    settings: dict[str, Any] = {"data_sha256": dataset.fingerprint()}
    if config.text is not None:
        text = with_own_settings(config).text
        assert text is not None
        found: dict[str, Any] = {"model_sha256": fingerprint_of(config.model)}
        if text.dev is not None:
            found["dev_sha256"] = load_dev(text.dev).fingerprint()
        settings["text"] = text.model_copy(update=found)
    if config.views is None and isinstance(dataset, Dataset):
        usual = {"moco": moco_views, "supervised": weak_views}.get(config.objective, usual_views)
        settings["views"] = ViewsConfig(**asdict(usual(flip=dataset.flip)))
    if config.init is not None:
        settings["init_sha256"] = fingerprint(config.init)
    if config.moco is not None and config.moco.queue is None and isinstance(dataset, Dataset):
        settings["moco"] = config.moco.model_copy(update={"queue": _usual_queue(config, dataset)})
    return config.model_copy(update=settings)


def load_dev(spec: str) -> TextDataset:
    """Scored pairs to choose by; of a file with several splits those of `dev`, unless it says which.

    Raises:
        ConfigError: Other data.
    """
    parsed = parse_spec(spec)
    if parsed.kind == "sts" and "split" not in parsed.options and has_splits(Path(parsed.argument)):
        spec = f"{spec},split=dev"
    found = load_data(spec)
    if not isinstance(found, TextDataset) or not found.tasks:
        raise ConfigError(f"text.dev={spec!r} holds no scored pairs of sentences; allowed: sts:PATH")
    return found


def _usual_queue(config: RunConfig, dataset: Dataset) -> int:
    """MoCo's 65,536 keys, or as many batches as half of the images: a longer queue holds the query's own old keys."""
    images = config.train_samples or int(len(dataset.x_train) * (1 - config.holdout))
    keys = config.batch_size // config.accumulate
    return max(min(65536, images // 2) // keys, 1) * keys


class _Trainer:
    """The state of one run in progress, on one rank."""

    def __init__(
        self,
        config: RunConfig,
        dataset: AnyDataset,
        folder: Path,
        device: str,
        progress: Callable[[Progress], None] | None,
        tensorboard: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.config, self.folder, self.progress = config, folder, progress
        check_data(config, dataset)
        _check_labels(config, dataset)
        self.order = Order(config, dataset)
        self.steps = self.order.steps
        start = build_start(config, dataset)
        self.fabric = _fabric(config, device)
        self.device, self.rank = self.fabric.device, self.fabric.global_rank
        self.tensorboard = tensorboard and self.rank == 0
        self.feed = _feed(config, dataset, self.order, start, self.device)
        if say is not None and self.rank == 0:
            _describe(dataset, start.network, say)
        self._build(start)
        self.epoch, self.step, self.wall_s = 0, 0, 0.0
        self.loss_sums = [0.0] * config.devices  # of this epoch's steps, per rank
        self.rate = 0.0  # learning rate of the last step
        self.metrics: dict[str, Any] = {}
        self.validation_rows: Tensor | None = None  # of this epoch, for AdaLASE
        self.log, self.ratio_log = Log(folder, "metrics", "epoch"), Log(folder, "ratios", "step")
        self.ratio_lines: list[dict[str, Any]] = []  # of the steps since the last save
        self.dev_log = Log(folder, "dev", "look")
        self.dev_lines: list[dict[str, Any]] = []
        self.looked: dict[str, Any] | None = None  # the last look at the dev pairs
        self.best: dict[str, Any] | None = None  # and the best one

    def _build(self, start: Start) -> None:
        config, network = self.config, start.network
        self.metadata = start.metadata
        if config.channels_last:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        network = network.to(self.device)
        frozen = frozen_modules(config, network, start.example)
        self.learning = _freeze(network, frozen)
        self.network = network
        views = Views(**config.views.model_dump()) if config.views else Views()
        autocast = self.fabric.autocast
        run, normalize = self._forward, self.feed.normalize
        self.method = METHODS[config.objective](config, network, run, views, normalize, autocast)
        self.statistics = [m for m in frozen if isinstance(m, _BatchNorm)]
        names = {name for name, m in network.named_modules() if m in set(self.statistics)}
        for other in self.method.modules():
            self.statistics += [m for name, m in other.named_modules() if name in names]
        self.operators, self.adalase = build_operators(config, network, start.example)
        callable_network = torch.compile(network) if config.compile else network
        self.wrapped, self.optimizer = self.fabric.setup(callable_network, _optimizer(config, self.learning))

    # --- the run ---

    def run(self) -> RunResult:
        with _memory_errors(self.config):
            return self._run()

    def _run(self) -> RunResult:
        self._resume()
        self.saved_at = time.monotonic()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), ExitStack() as stack:
            if self.config.compile:  # code compiled for a network without our hooks must not run one with them
                from torch._dynamo import config as compiler

                stack.enter_context(compiler.patch(skip_nnmodule_hook_guards=False))
            for operator in self.operators:
                stack.enter_context(operator.attached(self.network))
            if self.epoch == 0 and self.step == 0:
                self._keep()
            while self.epoch < self.config.epochs:
                self._run_epoch()
        return self._finish()

    def _run_epoch(self) -> None:
        order = self.order.epoch(self.epoch)[:, self.rank].to(self.feed.rows_on)  # (steps, accumulate, part)
        self._set_modes()
        self.validation_rows = self._validation_rows() if self.adalase is not None else None
        total = torch.tensor(self.loss_sums[self.rank], dtype=torch.float64, device=self.device)
        self.first_bad = torch.full((), self.steps, device=self.device)  # first step whose loss was not finite
        mark = time.monotonic()
        while self.step < self.steps:
            loss = self._train_step(order[self.step])
            total += loss
            self.first_bad = torch.where(loss.isfinite(), self.first_bad, self.first_bad.clamp_max(self.step))
            self.step += 1
            self._look_at_dev()
            due = False
            if self.device.type == "cpu" or self.step == self.steps or self.step % CHECK_EVERY == 0:
                self._check_loss()
                due = self._save_is_due()
            if self.progress and self.rank == 0:
                done, steps = self.epoch * self.steps + self.step, self.config.epochs * self.steps
                self.progress(Progress(step=done, steps=steps, epoch=self.epoch, metrics=self.metrics))
            if due:
                self._check_weights()
                self.wall_s, mark = self.wall_s + time.monotonic() - mark, time.monotonic()
                self._save(gather_rows(total[None]).tolist())
        self.wall_s += time.monotonic() - mark
        self._end_epoch(float(mean_over_ranks(total)) / self.steps)

    def _save_is_due(self) -> bool:
        """The first rank's clock decides for all."""
        due = time.monotonic() - self.saved_at > SAVE_EVERY_S and self.step < self.steps
        return bool(self.fabric.broadcast(due)) if self.config.devices > 1 else due

    def _set_modes(self) -> None:
        self.network.train()
        for other in self.method.modules():
            other.train()
        for module in self.statistics:
            module.eval()

    def _train_step(self, rows: Tensor) -> Tensor:
        """One optimizer step on rows of shape (accumulate, part); the mean loss of its parts."""
        config = self.config
        draws = generator(*self._now("views"), device=self.device)
        seed_everything(seed_of(*self._now("model")), self.device)
        self.rate = learning_rate(config, self.epoch + self.step / self.steps, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        if self.adalase is not None:
            self.adalase.draw(generator(config.seed, "position", self.epoch, self.step))
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for k, part in enumerate(rows):
            last = k == len(rows) - 1
            with self.fabric.no_backward_sync(self.wrapped, enabled=not last):
                loss = self.method.loss(self.feed.batch(part, draws), self._latent_mix) / len(rows)
                self.fabric.backward(loss)
            total += loss.detach()
        before = self._gradients() if self.adalase is not None and self.adalase.adaptive else []
        if config.clip:
            self.fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=config.clip, error_if_nonfinite=False)
        self.optimizer.step()
        self.method.after_step()
        if self.adalase is not None:
            self._observe(self.adalase, before)
        return total

    def _now(self, purpose: str) -> tuple[object, ...]:
        place = (self.epoch, self.step)
        return (self.config.seed, purpose, *place) if not self.rank else (self.config.seed, purpose, *place, self.rank)

    def _forward(self, inputs: Any) -> Tensor:
        return self.feed.run(self.wrapped, inputs)

    # --- AdaLASE ---

    def _latent_mix(self) -> Any:
        return self.adalase.mix if self.adalase is not None else None

    def _gradients(self) -> list[Tensor | None]:
        """As they are before the step: some optimizers work in their memory."""
        return [None if p.grad is None else p.grad.clone() for p in self.learning]

    def _observe(self, adalase: AdaLASE, before: list[Tensor | None]) -> None:
        if adalase.adaptive:
            found = zip(before, self._validation_gradient(), strict=True)
            both = [(train, after) for train, after in found if train is not None and after is not None]
            adalase.observe([train for train, _ in both], [validation for _, validation in both])
        if self.rank == 0:
            names = [f"{layer}/{kind}" for layer, kind in adalase.arms]
            line = {"step": self.epoch * self.steps + self.step + 1, "arm": names[adalase.active or 0]}
            self.ratio_lines.append({**line, **dict(zip(names, adalase.ratios.tolist(), strict=True))})

    def _validation_gradient(self) -> list[Tensor | None]:
        """Of the epoch's pseudo-validation batch, from the images trained on, after the step; statistics stay."""
        assert self.config.adalase is not None
        mine = self._validation_rows() if self.validation_rows is None else self.validation_rows
        turned = replace(self.method.views, rotation=self.config.adalase.rotation)
        with ExitStack() as stack:
            for operator in self.operators:
                stack.enter_context(operator.resting())
            stack.enter_context(_statistics_kept(self.network))
            stack.enter_context(self.method.seeing(turned))
            stack.enter_context(self._bare_network())
            loss = self.method.loss(self.feed.batch(mine, self._validation_draws(self.rank, self.device)))
            gradients = torch.autograd.grad(loss, self.learning, allow_unused=True)
        return [None if g is None else mean_over_ranks(g) for g in gradients]

    def _validation_rows(self) -> Tensor:
        """This rank's share of the epoch's batch, on the device."""
        size = self.config.part * self.config.devices
        rows = self.order.rows[torch.randperm(len(self.order.rows), generator=self._validation_draws())[:size]]
        return rows.view(self.config.devices, -1)[self.rank].to(self.device)

    def _validation_draws(self, rank: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
        """Of the rows, on the CPU and alike on all ranks, or of one rank's views."""
        return generator(self.config.seed, "validation", self.epoch, *([rank] if rank else []), device=device)

    @contextmanager
    def _bare_network(self) -> Iterator[None]:
        """Passes inside the block do not go through DDP, which would wait for a backward pass."""
        wrapped = self.wrapped

        def run(images: Tensor) -> Tensor:
            with self.fabric.autocast():
                return self.network(images)  # type: ignore[no-any-return]

        self.wrapped = run
        try:
            yield
        finally:
            self.wrapped = wrapped

    # --- what must not go wrong ---

    def _check_loss(self) -> None:
        step = int(self.first_bad)
        if step < self.steps:
            raise NonFiniteError(
                f"the loss became NaN or infinite at step {step + 1} of epoch {self.epoch + 1}; the last good state "
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

    # --- what is kept ---

    def _end_epoch(self, loss: float) -> None:
        self.epoch, self.step, self.loss_sums = self.epoch + 1, 0, [0.0] * self.config.devices
        last = self.epoch == self.config.epochs
        self._check_weights()
        due = last or self.epoch % self.config.knn_every == 0
        if self.rank == 0:
            self.metrics = {
                "epoch": self.epoch, "loss": loss, "learning_rate": self.rate, **self.feed.unscored,
                **(self._score() if due else {}), "wall_s": round(self.wall_s, 3),
            }  # fmt: skip
            if last or self.epoch % self.config.keep_every == 0:
                self._keep()
            self.log.append([self.metrics])
            if self.tensorboard:
                write_scalars(self.folder, self.metrics, self.epoch)
        self._save(self.loss_sums)
        self.fabric.barrier()

    def _score(self) -> dict[str, float | None]:
        """What the objective is judged by at an epoch's end, on data that are not tested on."""
        done = self.epoch * self.steps
        if self.looked is not None and self.looked["step"] == done:
            return {"dev": self.looked["dev"]}
        found = self.feed.score(self.network)
        if "dev" in found and self._looks(done) == 0:
            self._compare_with_best(done, found["dev"])
        return found

    def _look_at_dev(self) -> None:
        """Every `dev_every` steps, and after the last."""
        done = self.epoch * self.steps + self.step
        if self.rank or self._looks(done) == self._looks(done - 1):
            return
        self._check_loss()
        self._check_weights()
        score = self.feed.score(self.network)["dev"]
        self.looked = {"look": self._looks(done), "step": done, "dev": score}
        self.dev_lines.append(self.looked)
        self._compare_with_best(done, score)

    def _looks(self, steps: int) -> int:
        """How many looks at the dev pairs so many steps hold."""
        every = self.config.text.dev_every if self.config.text is not None else None
        return 0 if every is None else steps // every + (steps == self.config.epochs * self.steps and steps % every > 0)

    def _compare_with_best(self, step: int, score: float | None) -> None:
        if score is not None and (self.best is None or score > self.best["dev"]):
            self.best = {"step": step, "dev": score}
            self._keep("best", {"step": step, "dev": score})

    def _keep(self, name: str | None = None, facts: dict[str, Any] | None = None) -> None:
        if self.rank == 0:
            path = self.folder / "checkpoints" / f"{name or f'epoch-{self.epoch:04d}'}.safetensors"
            save_checkpoint(path, self.network, {**self.metadata, **(facts or {"epoch": self.epoch})})

    def _save(self, loss_sums: list[float]) -> None:
        self.saved_at = time.monotonic()
        if self.rank:
            return
        self.ratio_log.append(self.ratio_lines)
        self.dev_log.append(self.dev_lines)
        self.ratio_lines, self.dev_lines = [], []
        state = {
            "model": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "epoch": self.epoch,
            "step": self.step, "loss_sums": loss_sums, "wall_s": self.wall_s, "rate": self.rate,
            "precision": self.fabric.strategy.precision.state_dict(),
            "beside": [module.state_dict() for module in self.method.modules()],
            "adalase": None if self.adalase is None else self.adalase.state_dict(), "best": self.best,
        }  # fmt: skip
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.folder / "resume.pt", buffer.getvalue())

    def _resume(self) -> None:
        path = self.folder / "resume.pt"
        if path.exists():
            try:
                self._load(torch.load(path, map_location=self.device, weights_only=True))
            except Exception as error:  # whatever a damaged file makes torch raise, the answer is the same
                raise DamagedStateError(
                    f"{str(path)!r} is damaged; delete it to start this run from the beginning"
                ) from error
        self.fabric.barrier()
        if self.rank == 0:
            lines = self.log.rewind(self.epoch)
            self.metrics = lines[-1] if lines else {}
            if self.best is None:  # a killed process may have left one
                (self.folder / "checkpoints" / "best.safetensors").unlink(missing_ok=True)
            if self.adalase is not None:
                self.ratio_log.rewind(self.epoch * self.steps + self.step)
            if self.config.text is not None and self.config.text.dev_every is not None:
                self.dev_log.rewind(self._looks(self.epoch * self.steps + self.step))

    def _load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        for module, kept in zip(self.method.modules(), state["beside"], strict=True):
            module.load_state_dict(kept)
        if self.adalase is not None:
            self.adalase.load_state_dict(state["adalase"])
        self.epoch, self.step = int(state["epoch"]), int(state["step"])
        self.loss_sums, self.wall_s = [float(value) for value in state["loss_sums"]], float(state["wall_s"])
        self.rate, self.best = float(state["rate"]), state.get("best")

    def _finish(self) -> RunResult:
        if self.rank == 0:
            self._write_result()
        self.fabric.barrier()
        return read_result(self.folder)

    def _write_result(self) -> None:
        kept = sorted(
            str(path.relative_to(self.folder)) for path in self.folder.glob("checkpoints/epoch-*.safetensors")
        )
        last = self.metrics
        if last.get("epoch") != self.epoch:
            raise RunFolderError(f"{str(self.folder / 'metrics.jsonl')!r} lacks the last epoch; train in a new folder")
        result = RunResult(
            folder=str(self.folder), run=self.config.identity(), epochs=self.epoch, loss=last["loss"], knn=last["knn"],
            wall_s=round(self.wall_s, 3), checkpoints=tuple(kept), environment=provenance(self.device),
            dev=last.get("dev"), best=self.best,
        )  # fmt: skip
        content = asdict(result)
        del content["folder"]
        write_json(self.folder / "result.json", content)
        (self.folder / "resume.pt").unlink(missing_ok=True)


def _feed(
    config: RunConfig, dataset: AnyDataset, order: Order, start: Start, device: torch.device
) -> ImageFeed | TextFeed | GraphFeed:
    if isinstance(dataset, Dataset):
        return ImageFeed(config, dataset, order, device)
    if isinstance(dataset, GraphDataset):
        return GraphFeed(config, dataset, order, device)
    assert config.text is not None
    dev = load_dev(config.text.dev).tasks if config.text.dev is not None else ()
    tokenize: Any = start.network.tokenize
    return TextFeed(config, dataset, tokenize, dev, device)


def build_operators(config: RunConfig, network: nn.Module, example: Example) -> tuple[list[Any], AdaLASE | None]:
    """Everything that hangs on layers while the run trains, and which of it is AdaLASE; nothing is attached yet.

    Raises:
        ConfigError, UnknownLayerError: What can't be attached to this network.
    """
    operators: list[Any] = []
    adalase = None
    if config.augment is not None:
        settings = {**config.augment.model_dump(), "layer": augmented_layers(config, network, example)}
        operators.append(DeepAugmentation(**settings))
    if config.adalase is not None:
        settings = config.adalase.model_dump(exclude={"rotation"})
        adalase = AdaLASE(**{**settings, "layers": adalase_layers(config, network, example)})
        if config.adalase.layers == "auto" and len(adalase.arms) == 1:
            raise ConfigError(
                f"[adalase] finds one arm, {'/'.join(adalase.arms[0])}: nothing to choose; name layers or other kinds"
            )
        operators.append(adalase)
    if config.dropout is not None:
        settings = config.dropout.model_dump()
        names = [name.strip() for name in settings["layers"].split(",")]
        chosen = "auto" if names == ["auto"] else names
        operators.append(TwoPassDropout(settings.pop("kind"), **{**settings, "layers": chosen}))
    _try(operators, adalase, network, example)
    return operators, adalase


def _try(operators: list[Any], adalase: AdaLASE | None, network: nn.Module, example: Example) -> None:
    """One small pass with everything attached, for each arm: a layer of the wrong shape shows now, not in mid-run."""
    example = to_device(example, next(network.parameters()).device)
    with untouched(network), torch.no_grad(), ExitStack() as stack:
        for operator in operators:
            stack.enter_context(operator.attached(network))
        network.train()
        for arm in range(len(adalase.arms)) if adalase is not None else [None]:
            if adalase is not None:
                adalase.active = arm
            run_batch(network, example)
    if adalase is not None:
        adalase.active = None


def _check_labels(config: RunConfig, dataset: AnyDataset) -> None:
    if not METHODS[config.objective].needs_labels and not (config.objective == "moco" and config.labels):
        return
    if dataset.y_train is None:
        raise ConfigError(
            f"{config.objective} training needs labels; {dataset.name} has none. Use --objective simclr, or moco with "
            "labels=0"
        )


def _check_device(config: RunConfig, device: str) -> str:
    where = pick_device(device).type
    if where == "cuda" and config.devices > torch.cuda.device_count():
        raise ConfigError(f"devices={config.devices} but {torch.cuda.device_count()} GPUs are here; ask for fewer")
    if where == "cpu" and config.precision == "16-mixed":
        raise ConfigError("precision='16-mixed' needs a GPU; use 'bf16-mixed' or '32-true' on the CPU")
    return where


def _fabric(config: RunConfig, device: str) -> Any:
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    where = _check_device(config, device)
    many: dict[str, Any] = {}
    if config.devices > 1:
        many["strategy"] = DDPStrategy(**_never_sync_buffers()) if config.reads_text else "ddp"
    fabric = Fabric(accelerator=where, devices=config.devices, precision=config.precision, **many)
    if config.devices > 1:
        fabric.launch()
    return fabric


def _never_sync_buffers() -> dict[str, bool]:
    """An encoder's buffers are constants, and writing them anew would spoil the first of two passes for its backward.

    torch 2.15 has another name for the option.
    """
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    return {next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in known): False}


def _freeze(network: nn.Module, frozen: list[nn.Module]) -> list[nn.Parameter]:
    """Hold the parameters of some modules, and return those that learn."""
    for module in frozen:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
    learning = [p for p in network.parameters() if p.requires_grad]
    if not learning:
        raise ConfigError("nothing is left to train: [freeze] holds every parameter; freeze less")
    return learning


def _optimizer(config: RunConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        kinds = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
        decays = (config.weight_decay, 0.0)  # none of biases and norms, as transformers' trainer does
        groups = [{"params": ps, "weight_decay": decay} for ps, decay in zip(kinds, decays, strict=True) if ps]
        return torch.optim.AdamW(groups, lr=config.learning_rate or 0.0)
    kind: Any = {"sgd": torch.optim.SGD, "lars": LARS}[config.optimizer]
    return kind(  # type: ignore[no-any-return]
        parameters, lr=config.learning_rate or 0.0, momentum=config.momentum, weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )  # fmt: skip


@contextmanager
def _statistics_kept(network: nn.Module) -> Iterator[None]:
    """Batch norm uses the batch's statistics inside the block, and notes none of them."""
    noting = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for module in noting:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in noting:
            module.track_running_stats = True


@contextmanager
def _memory_errors(config: RunConfig) -> Iterator[None]:
    """Out of memory, on a GPU or on the host, becomes one clear line."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        full = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not full:
            raise
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
        raise DeviceMemoryError(
            f"out of memory with batch_size={config.batch_size}, {config.part} {config.samples} in a pass; "
            f"{_smaller(config)}"
        ) from error


def _smaller(config: RunConfig) -> str:
    """What to try instead: half the batch, or the same one in smaller passes, where these are allowed."""
    rounds, half = config.accumulate * config.devices, config.batch_size // 2
    advice = [f"batch_size={half}"] if half >= 4 and half % rounds == 0 and half // rounds >= 2 else []
    for passes in range(2 * config.accumulate, config.batch_size // 2 + 1):
        if config.batch_size % (passes * config.devices) == 0 and config.batch_size // (passes * config.devices) >= 2:
            advice.append(f"the same batch in smaller passes with accumulate={passes}")
            break
    return "try " + " or ".join(advice) if advice else "try a smaller model"


_BatchNorm = nn.modules.batchnorm._BatchNorm
