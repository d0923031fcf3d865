"""The command line: parse, call, show. Heavy imports happen inside the commands, so that help opens at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from layerlens import __version__
from layerlens.errors import LayerlensError

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
model_option = click.option(
    "--model",
    help="resnet18-cifar[,width=16], resnet20-cifar … resnet56-cifar, mlp, torchvision:NAME, pkg.module:factory.",
)
data_option = click.option(
    "--data",
    required=True,
    help="digits, cifar10:ROOT, cifar100:ROOT, svhn:ROOT, imagefolder:PATH, npz:PATH, pkg.module:factory.",
)
download_option = click.option("--download", is_flag=True, help="Fetch a missing CIFAR or SVHN.")
checkpoint_option = click.option("--checkpoint", type=click.Path(), help="A .safetensors or .pt file.")
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")


def analysis_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `analyze`, `recommend` and `report` look at."""
    options = [
        click.option(
            "--layers", default="auto", show_default=True, help="auto, blocks, all, or names and globs with commas."
        ),
        click.option("--samples", default=1000, show_default=True, help="Images."),
        click.option("--batch-size", default=100, show_default=True, help="Images per batch."),
        click.option("--split", default="test", show_default=True, help="test or train."),
        click.option("--kernel", default="linear", show_default=True, help="linear or rbf."),
        click.option("--estimator", default="minibatch", show_default=True, help="minibatch, debiased or biased."),
        click.option("--seed", default=0, show_default=True, help="Of images, views, twin and resampling."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="layerlens")
def cli() -> None:
    """At which layer should you intervene? Train, analyse, recommend, report."""


@cli.command()
@click.argument("model")
@click.option("--input-shape", help="channels,height,width of the images, where the model does not tell.")
@json_option
def layers(model: str, input_shape: str | None, as_json: bool) -> None:
    """List the layers of MODEL in execution order.

    Those with an index are the default targets; -1 is the input.
    """
    import torch

    from layerlens.layers import discover
    from layerlens.models import build_model, default_input_shape

    shape = _shape(input_shape) or default_input_shape(model)
    network = build_model(model, input_shape=shape)
    if shape is None:
        raise click.UsageError(
            f"{model!r} does not tell the shape of its input; give --input-shape channels,height,width"
        )
    found = discover(network, torch.zeros(2, *shape))
    rows = [
        {
            "index": f.index, "name": f.name, "kind": f.kind, "shape": list(f.shape), "neurons": f.neurons,
            "default": f.index is not None and f.index >= 0,
        }
        for f in found
    ]  # fmt: skip
    _show(rows, as_json, ["index", "name", "kind", "shape", "neurons", "default"])


@cli.command()
@click.option("--config", "config_file", type=click.Path(), help="TOML file with any setting; options here win.")
@click.option("--objective", help="simclr or supervised.")
@model_option
@click.option(
    "--data", help="digits, cifar10:ROOT, cifar100:ROOT, svhn:ROOT, imagefolder:PATH, npz:PATH, pkg.module:factory."
)
@click.option("--epochs", type=int)
@click.option("--batch-size", type=int)
@click.option("--learning-rate", type=float, help="At its peak; 0.06 · batch / 128 by default.")
@click.option("--temperature", type=float)
@click.option("--seed", type=int)
@click.option("--keep-every", type=int, help="Epochs between two kept checkpoints.")
@click.option("--init", type=click.Path(), help="Checkpoint to start from.")
@click.option("--augment-layer", help="Layer for Deep Augmentation.")
@click.option("--transform", help="dropout or pca.")
@click.option("--rate", type=float, help="Dropout rate.")
@click.option("--fraction", type=float, help="Share of the samples that are transformed.")
@click.option("--stop-gradient/--no-stop-gradient", default=None, help="Block the gradient of transformed samples.")
@click.option("--out", type=click.Path(), help="Run folder; runs/OBJECTIVE-IDENTITY by default.")
@device_option
@download_option
@json_option
def train(config_file: str | None, out: str | None, device: str, download: bool, as_json: bool, **given: Any) -> None:
    """Train a network and keep checkpoints.

    Logs loss and online k-NN; the same command goes on where an interrupted run stopped.
    """
    from layerlens.training.config import make_config, read_config
    from layerlens.training.loop import train as run_training

    settings = read_config(config_file) if config_file else {}
    config = make_config(_overlay(settings, {key: value for key, value in given.items() if value is not None}))
    with _bar("train") as advance:
        result = run_training(config, out, device=device, download=download, progress=advance)
    row = {
        "folder": result.folder,
        "run": result.run,
        "epochs": result.epochs,
        "loss": result.loss,
        "knn": result.knn,
        "wall_s": result.wall_s,
    }
    _show(
        [{**row, "checkpoints": list(result.checkpoints), "environment": result.environment}] if as_json else [row],
        as_json,
        list(row),
    )


@cli.command()
@model_option
@checkpoint_option
@data_option
@analysis_options
@click.option("--out", type=click.Path(), help="Folder; analysis/CHECKPOINT beside the run by default.")
@device_option
@download_option
@json_option
def analyze(
    model: str | None,
    checkpoint: str | None,
    data: str,
    out: str | None,
    device: str,
    download: bool,
    as_json: bool,
    **look: Any,
) -> None:
    """Look at a checkpoint: CKA, geometry, rank.

    The CKA matrix with confidence intervals, alignment, uniformity and effective rank, as JSON and figures.
    """
    from layerlens import figures

    folder = Path(out) if out else _beside(checkpoint, model)
    found, _ = _analysis(model, checkpoint, data, device, download, twin=False, folder=folder, **look)
    figures.save_figure(figures.heatmap(found.cka, title=found.label), folder / "similarity", found.cka)
    figures.save_figure(
        figures.layer_profile({found.label: found.effective_rank}), folder / "effective_rank", found.effective_rank
    )
    if as_json:
        click.echo(found.to_json())
        return
    _show(_matrix_rows(found.cka), False, ["layer", *found.cka.layers])
    ranks = [
        {"layer": n, "effective_rank": v, "low": a, "high": b} for n, v, a, b in _profile_rows(found.effective_rank)
    ]
    click.echo()
    _show(ranks, False, ["layer", "effective_rank", "low", "high"])
    g = found.geometry
    click.echo(f"\nalignment {g.alignment:.4f}   uniformity {g.uniformity:.4f}   ({g.samples} images, {g.split} split)")
    click.echo(f"intervals, figures and JSON: {folder}")


@cli.command()
@model_option
@checkpoint_option
@data_option
@analysis_options
@click.option("--no-twin", is_flag=True, help="Do not compare with the freshly initialised network.")
@click.option("--criterion", default="two-level", show_default=True, help="two-level or modularity.")
@device_option
@download_option
@json_option
def recommend(
    model: str | None,
    checkpoint: str | None,
    data: str,
    no_twin: bool,
    criterion: str,
    device: str,
    download: bool,
    as_json: bool,
    **look: Any,
) -> None:
    """Rank the layers at which to augment.

    Each with stop-gradient or without, its reason, its confidence, and cautions.
    """
    from layerlens.analysis.regions import check_criterion
    from layerlens.recommendation import recommend as advise

    check_criterion(criterion)

    found, twin = _analysis(model, checkpoint, data, device, download, twin=not no_twin, **look)
    advice = advise(
        found.cka, twin.cka if twin else None, geometry=found.geometry, criterion=criterion, seed=look["seed"]
    )
    click.echo(advice.to_json() if as_json else str(advice))


@cli.command()
@model_option
@click.option("--checkpoint", type=click.Path(), required=True, help="A .safetensors or .pt file.")
@data_option
@click.option("--layer", help="Layer whose features are scored; the embedding (input of the head) by default.")
@click.option("-k", default=200, show_default=True, help="Neighbours.")
@device_option
@download_option
@json_option
def evaluate(
    model: str | None, checkpoint: str, data: str, layer: str | None, k: int, device: str, download: bool, as_json: bool
) -> None:
    """Score frozen features: k-NN and linear probe.

    Offline test accuracy with the full training split as the bank.
    """
    from layerlens.data import load_data
    from layerlens.devices import pick_device
    from layerlens.pipeline import embedding_name
    from layerlens.pipeline import evaluate as score
    from layerlens.training.network import load_network

    where, dataset = pick_device(device), load_data(data, download=download)
    network, _ = load_network(checkpoint, model=model, dataset=dataset)
    name = layer or embedding_name(network, dataset)
    scores = score(network.to(where), dataset, layer=layer, k=k, watch=_watch)
    _show([{"layer": name, "k": k, **scores}], as_json)


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path())
@analysis_options
@click.option("--model", help="Specification, where the runs' model is somebody's factory.")
@click.option("--data", help="Where the runs' data are now, if they moved.")
@device_option
@click.option("--out", type=click.Path(), help="Folder; the run's own for one run, ./report for several.")
@json_option
def report(
    runs: tuple[str, ...],
    model: str | None,
    data: str | None,
    device: str,
    out: str | None,
    as_json: bool,
    **look: Any,
) -> None:
    """Write the report of one run or several."""
    from layerlens.data import load_data
    from layerlens.devices import pick_device
    from layerlens.pipeline import Settings, analyze_run, run_folders
    from layerlens.report import write_report

    settings, where, folders = Settings(**look), pick_device(device), run_folders(runs)
    dataset = load_data(data) if data else None
    analyses = [
        analyze_run(folder, dataset=dataset, model=model, settings=settings, device=where, watch=_watch)
        for folder in folders
    ]
    page = write_report(analyses, out or (runs[0] if len(folders) == 1 else "report"))
    if as_json:
        click.echo((page.parent / "report.json").read_text(encoding="utf-8"))
        return
    for run in analyses:
        click.echo(f"{run.name}: {run.recommendation}\n")
    click.echo(f"report: {page}")


@cli.command()
@click.option("--out", default="demo", show_default=True, type=click.Path(), help="Folder for run and report.")
@json_option
def demo(out: str, as_json: bool) -> None:
    """Do it all on handwritten digits, in minutes."""
    from layerlens.pipeline import demo as run_demo
    from layerlens.report import write_report

    with _bar("train") as advance:
        found = run_demo(out, progress=advance, watch=_watch)
    page = write_report([found], out)
    click.echo(found.recommendation.to_json() if as_json else f"{found.recommendation}\n\nreport: {page}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    sys.path.insert(0, "")  # pkg.module:factory may lie in the working folder, as with `python -m`
    try:
        cli.main(arguments, prog_name="layerlens", standalone_mode=False)
    except click.UsageError as error:
        where = f"{error.ctx.command_path} --help" if error.ctx else "layerlens --help"
        _fail(f"{error.format_message()} (see `{where}`)", 2)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; what is finished is kept, and the same command goes on where it stopped", 130)
    except LayerlensError as error:
        _fail(str(error), 2)
    except BrokenPipeError:  # `layerlens … | head`
        sys.stderr.close()


def _fail(text: str, code: int) -> None:
    print(f"layerlens: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(code)


def _overlay(settings: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Options over a file's settings; the four that belong to Deep Augmentation go into its table."""
    if not isinstance(settings.get("augment", {}), dict):
        raise click.UsageError(f"augment={settings['augment']!r} in the file; it is a table: [augment] with layer = …")
    names = ("transform", "rate", "fraction", "stop_gradient")
    inner: dict[str, Any] = {key: given.pop(key) for key in names if key in given}
    if "augment_layer" in given:
        inner["layer"] = given.pop("augment_layer")
    if not inner:
        return {**settings, **given}
    augment = {**(settings.get("augment") or {}), **inner}
    if "layer" not in augment:
        raise click.UsageError(f"--{next(iter(inner)).replace('_', '-')} needs --augment-layer")
    return {**settings, **given, "augment": augment}


def _analysis(
    model: str | None,
    checkpoint: str | None,
    data: str,
    device: str,
    download: bool,
    *,
    twin: bool,
    folder: Path | None = None,
    **look: Any,
) -> Any:
    from layerlens.data import load_data
    from layerlens.devices import pick_device
    from layerlens.pipeline import Settings, analyze_checkpoint

    if not model and not checkpoint:
        raise click.UsageError("give --checkpoint, --model, or both")
    settings, where = Settings(**look), pick_device(device)
    return analyze_checkpoint(
        checkpoint, load_data(data, download=download), model=model, settings=settings, twin=twin, device=where,
        folder=folder, watch=_watch,
    )  # fmt: skip


def _beside(checkpoint: str | None, model: str | None) -> Path:
    """`RUN/analysis/CHECKPOINT` for a run's checkpoint, `analysis/CHECKPOINT` or `analysis/MODEL` for any other."""
    path = Path(checkpoint or str(model).replace("/", "_").replace(":", "_"))
    run = path.parent.parent if path.parent.name == "checkpoints" else Path()
    stem = path.stem if checkpoint else path.name
    return (run if (run / "config.json").exists() else Path()) / "analysis" / stem


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise click.UsageError(f"--input-shape {text!r}; it takes positive numbers with commas, such as 3,32,32")
    return shape


@contextmanager
def _bar(title: str) -> Iterator[Callable[[Any], None]]:
    """A progress bar on stderr for a training run; it begins with the first step."""
    bars: list[Any] = []

    def advance(progress: Any) -> None:
        if not bars:
            from tqdm import tqdm

            done = progress.step - 1
            bars.append(tqdm(total=progress.steps, initial=done, desc=title, unit="step", file=sys.stderr))
        shown = {k: round(v, 4) for k, v in progress.metrics.items() if k in ("epoch", "loss", "knn") and v is not None}
        bars[0].set_postfix(shown, refresh=False)
        bars[0].update(1)
        if progress.step == progress.steps:
            bars[0].close()

    try:
        yield advance
    finally:
        for bar in bars:
            bar.close()


def _watch(items: Iterable[Any], title: str) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(items, desc=title, leave=False, file=sys.stderr)  # type: ignore[no-any-return]


def _show(rows: list[dict[str, Any]], as_json: bool, columns: list[str] | None = None) -> None:
    """Rows as an aligned table, or as JSON (one object for a single row)."""
    if as_json:
        click.echo(json.dumps(rows if len(rows) != 1 else rows[0], allow_nan=False))
        return
    names = columns or list(rows[0])
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.4f}"
    return "×".join(map(str, value)) if isinstance(value, list) else str(value)


def _matrix_rows(matrix: Any) -> list[dict[str, Any]]:
    return [
        {"layer": name, **dict(zip(matrix.layers, map(float, row), strict=True))}
        for name, row in zip(matrix.layers, matrix.values, strict=True)
    ]


def _profile_rows(profile: Any) -> Iterable[tuple[str, float, float, float]]:
    return zip(profile.layers, profile.values, profile.low, profile.high, strict=True)


if __name__ == "__main__":
    main()
