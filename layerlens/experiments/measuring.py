"""What is measured at every kept checkpoint of a run, and kept beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerlens.data import AnyDataset, Dataset
from layerlens.devices import pick_device
from layerlens.files import write_json
from layerlens.graphs import GraphDataset
from layerlens.pipeline import Settings, film_strip
from layerlens.training.run_folder import locked, remove_leftovers
from layerlens.trajectory import evaluate_run


def measure_run(
    folder: Path,
    kind: str,
    file: str,
    *,
    dataset: AnyDataset,
    model: str,
    measure: dict[str, Any],
    device: str = "auto",
) -> None:
    """Measure each kept checkpoint of a finished run, unless that was done, and write it atomically.

    Args:
        folder: The run.
        kind: `scores` (k-NN, probe or Spearman, alignment, uniformity), `last-scores` (of the last checkpoint only) or
            `cka` (similarity of all layers).
        file: Where to, within the folder.
        dataset: The run's own data, or others to score on.
        model: The run's, as its settings name it.
        measure: Fields of `study.Measure`.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        FolderInUseError: Another process measures it.
    """
    with locked(folder):
        remove_leftovers(folder)
        if (folder / file).exists():
            return
        settings = Settings(samples=measure["samples"], batch_size=min(measure["batch_size"], measure["samples"]))
        where = pick_device(device)
        if kind == "cka":
            found: Any = film_strip(folder, dataset=dataset, model=model, settings=settings, device=where)
        else:
            chosen = {"k": measure["k"], "protocol": measure["protocol"], "settings": settings}
            chosen["last"] = kind == "last-scores"
            scored: AnyDataset | None = dataset
            if isinstance(dataset, Dataset | GraphDataset):
                chosen["labelled"] = dataset.y_train is not None
            elif not dataset.tasks:  # sentences to train on: the run's dev pairs have the scores
                scored = None
            found = evaluate_run(folder, dataset=scored, model=model, device=where, **chosen)
        write_json(folder / file, found.to_dict())
