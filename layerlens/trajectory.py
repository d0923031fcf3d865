"""What the kept checkpoints of a run are worth, one after the other, on the run's own data or on others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from layerlens.analysis.results import Result
from layerlens.augment.views import usual_views
from layerlens.data import SPLITS, AnyDataset, Dataset
from layerlens.errors import ConfigError
from layerlens.evaluation.classifier import classifier_accuracy
from layerlens.pipeline import Settings, Watch, evaluate, measure_geometry, own_data, read_run_config, silent
from layerlens.provenance import provenance
from layerlens.training.config import make_config
from layerlens.training.loop import train
from layerlens.training.network import load_network
from layerlens.training.run_folder import read_result


@dataclass(frozen=True, kw_only=True)
class Trajectory(Result):
    """Scores and geometry of each kept checkpoint of a run.

    Attributes:
        name: Of the run folder.
        data: What the checkpoints were scored on.
        rows: Per checkpoint `epoch`, the scores of `evaluate` (in [0, 1]), and alignment and uniformity under SimCLR's
            views on the train and the test split.
        facts: Run, data, settings and environment.
    """

    name: str
    data: str
    rows: tuple[dict[str, Any], ...]
    facts: dict[str, Any]

    def to_frame(self) -> Any:
        """One row per checkpoint (a pandas DataFrame)."""
        import pandas as pd

        return pd.DataFrame(list(self.rows)).assign(run=self.name, data=self.data)


def evaluate_run(
    folder: str | Path,
    *,
    dataset: AnyDataset | None = None,
    model: str | None = None,
    k: int = 200,
    protocol: str | None = None,
    labelled: bool = True,
    last: bool = False,
    settings: Settings | None = None,
    device: str | torch.device = "cpu",
    watch: Watch[Any] | None = None,
) -> Trajectory:
    """Score every kept checkpoint of a finished run; with another `dataset`, the transfer to it.

    Args:
        folder: The run.
        dataset: Another data set of the same image shape; the run's own by default. Its training split is the bank
            of the k-NN and the probe's training set, its test split is scored. Of a run over sentences, scored pairs
            (`sts:PATH`); its dev pairs by default.
        model: Specification, where the run's model is somebody's factory.
        k, protocol: As for `evaluate`.
        labelled: Whether to score; without, only the geometry is measured, which needs no labels.
        last: Only the last checkpoint.
        settings: Images and seed of the geometry; `split` is not used, both are measured.
        device: Where to run.
        watch: For a progress bar.

    Raises:
        RunFolderError: No finished run there.
        ConfigError: Data without labels.
    """
    folder, chosen, see = Path(folder).resolve(), settings or Settings(), watch or silent
    config, result = read_run_config(folder), read_result(folder)
    data = dataset or own_data(config, folder)
    rows = []
    for name in see(result.checkpoints[-1:] if last else result.checkpoints, "checkpoints"):
        network, metadata = load_network(folder / name, model=model, dataset=data)
        network = network.to(device)
        scores = evaluate(network, data, k=k, protocol=protocol, seed=config.seed) if labelled else {}
        row: dict[str, Any] = {"epoch": metadata.get("epoch"), **scores}
        for split in reversed(SPLITS) if isinstance(data, Dataset) else ("test",):
            views = usual_views(flip=data.flip) if isinstance(data, Dataset) else None
            where = measure_geometry(network, data, replace(chosen, split=split), views=views)
            row |= {f"alignment_{split}": where.alignment, f"uniformity_{split}": where.uniformity}
        rows.append(row)
    facts = {
        "run": result.run, "data_sha256": data.fingerprint(), "k": k, "protocol": protocol, "settings": vars(chosen),
        "environment": provenance(device),
    }  # fmt: skip
    return Trajectory(name=folder.name, data=data.name, rows=tuple(rows), facts=facts)


def finetune(
    checkpoint: str | Path,
    dataset: AnyDataset,
    folder: str | Path,
    *,
    model: str | None = None,
    epochs: int = 10,
    device: str = "auto",
    watch: Watch[Any] | None = None,
    **settings: Any,
) -> float:
    """Test accuracy after training the whole network with a fresh classifier, from a checkpoint's weights.

    Args:
        checkpoint: Where to start; it stays as it is.
        dataset: Trained on its training split, scored on its test split, after the last epoch.
        folder: A run folder for it; finished work there is not done again.
        model: Specification, where the checkpoint is not layerlens' own.
        epochs: Passes over the training split.
        device: `auto`, `cpu` or `cuda`.
        watch: For a progress bar.
        **settings: Any other field of `RunConfig`, such as `learning_rate` or `train_samples`.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ConfigError: Data without labels, or an unknown setting.
    """
    if not isinstance(dataset, Dataset) or dataset.y_test is None:
        raise ConfigError(f"{dataset.name} has no labels; fine-tuning needs images with y_train and y_test")
    spec = model or load_network(checkpoint, dataset=dataset)[1].get("model")
    fields = {
        "objective": "supervised", "model": spec, "data": dataset.name, "epochs": epochs, "init": str(checkpoint),
        "holdout": 0.0, "keep_every": epochs, "batch_size": min(256, len(dataset.x_train)), **settings,
    }  # fmt: skip
    result = train(make_config(fields), folder, dataset=dataset, device=device)
    network, _ = load_network(Path(folder) / result.checkpoints[-1], model=model, dataset=dataset)
    batches = (watch or silent)(dataset.in_order("test"), "fine-tuned")
    return classifier_accuracy(network, batches, dataset.y_test)
