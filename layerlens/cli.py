"""The command line: parse, call, show. Heavy imports happen inside the commands, so that help opens at once."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layerlens import __version__
from layerlens.cli_studies import study
from layerlens.errors import LayerlensError
from layerlens.show import json_option, show

if TYPE_CHECKING:
    from layerlens.training.config import RunConfig
    from layerlens.training.run_folder import RunResult

model_option = click.option(
    "--model",
    help="resnet18-cifar[,width=16], resnet50-cifar[,width=16], resnet20-cifar … resnet56-cifar, convnet-quick, mlp, "
    "torchvision:NAME, pkg.module:factory; for sentences hf:PATH, hf-config:bert-tiny,tokenizer=PATH; for graphs gin, "
    "gcn, graphsage.",
)
KINDS_OF_DATA = (
    "digits, cifar10:ROOT, cifar100:ROOT, svhn:ROOT, imagefolder:PATH, npz:PATH, pkg.module:factory; sentences: "
    "text:PATH, pairs:PATH, sts:PATH; graphs: tu:NAME@ROOT, graphs-npz:PATH."
)
data_option = click.option("--data", required=True, help=KINDS_OF_DATA)
download_option = click.option("--download", is_flag=True, help="Fetch a missing CIFAR, SVHN or TU data set.")
checkpoint_option = click.option("--checkpoint", type=click.Path(), help="A .safetensors or .pt file.")
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")


def analysis_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `analyze`, `recommend` and `report` look at."""
    options = [
        click.option(
            "--layers", default="auto", show_default=True, help="auto, blocks, all, or names and globs with commas."
        ),
        click.option("--samples", default=1000, show_default=True, help="Images, sentences or graphs."),
        click.option("--batch-size", default=100, show_default=True, help="Of them per batch."),
        click.option("--split", default="test", show_default=True, help="test or train."),
        click.option("--kernel", default="linear", show_default=True, help="linear or rbf."),
        click.option("--estimator", default="minibatch", show_default=True, help="minibatch, debiased or biased."),
        click.option(
            "--reduce",
            default="flatten",
            show_default=True,
            help="flatten, pool or positions[,grid=N]; of graphs graphs[,pool=mean] (meant by flatten) or nodes.",
        ),
        click.option(
            "--memory-mib", default=2048.0, show_default=True, help="Bound for measures over all samples at once."
        ),
        click.option("--seed", default=0, show_default=True, help="Of samples, views, twin and resampling."),
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
@click.option("--input-shape", help="channels,height,width of the images; of graphs, the features of a node.")
@json_option
def layers(model: str, input_shape: str | None, as_json: bool) -> None:
    """List the layers of MODEL in execution order.

    Those with an index are the default targets; -1 is the input.
    """
    import torch

    from layerlens.graph_models import reads_graphs
    from layerlens.layers import discover
    from layerlens.models import build_model, default_input_shape, reads_sentences

    network: Any
    if reads_sentences(model):
        if input_shape:
            raise click.UsageError(f"--input-shape is for images; {model!r} reads sentences")
        network = build_model(model)
        found = discover(network, network.example())
    else:
        shape = _shape(input_shape) or default_input_shape(model)
        network = build_model(model, input_shape=shape)
        if shape is None:
            raise click.UsageError(
                f"{model!r} does not tell the shape of its input; give --input-shape channels,height,width"
            )
        found = discover(network, network.example() if reads_graphs(model) else torch.zeros(2, *shape))
    rows = [
        {
            "index": f.index, "name": f.name, "kind": f.kind, "shape": list(f.shape), "neurons": f.neurons,
            "default": f.index is not None and f.index >= 0,
        }
        for f in found
    ]  # fmt: skip
    show(rows, as_json, ["index", "name", "kind", "shape", "neurons", "default"])


@cli.command()
@click.option("--config", "config_file", type=click.Path(), help="TOML file with any setting; options here win.")
@click.option("--recipe", help="A published setting, see `layerlens recipes`; options here win.")
@click.option(
    "--objective", help="simclr, supcon, moco or supervised; on sentences simcse, pairs or mlm; on graphs graphcl."
)
@model_option
@click.option("--data", help=KINDS_OF_DATA)
@click.option("--epochs", type=int)
@click.option("--batch-size", type=int, help="Images per step.")
@click.option("--learning-rate", type=float, help="At its peak; 0.06 · batch / 128 by default.")
@click.option("--temperature", type=float)
@click.option("--labels", type=float, help="Share of the training images whose labels supcon and moco see.")
@click.option("--train-samples", type=int, help="Train on so many images or sentences only.")
@click.option("--seed", type=int)
@click.option("--keep-every", type=int, help="Epochs between two kept checkpoints.")
@click.option("--init", type=click.Path(), help="Checkpoint to start from.")
@click.option("--augment-layer", help="Layer for Deep Augmentation; several with commas, or all.")
@click.option("--transform", help="dropout, channel-dropout, position-dropout, noise or pca.")
@click.option("--rate", type=float, help="Rate of Deep Augmentation; [dropout] has its own, in a file.")
@click.option("--fraction", type=float, help="Share of the samples that are transformed.")
@click.option("--stop-gradient/--no-stop-gradient", default=None, help="Block the gradient of transformed samples.")
@click.option("--freeze", help="before or after: what of the network does not learn, parted at the augmented layer.")
@click.option("--pooling", help="Of sentences: cls, cls-before-head, mean or first-last-mean.")
@click.option("--max-length", type=int, help="Tokens of a sentence that are read.")
@click.option("--model-dropout", type=float, help="Every dropout of an encoder; its own if left out.")
@click.option("--mlm-weight", type=float, help="Factor on a masked-LM loss beside simcse.")
@click.option("--dev", help="sts:PATH: scored pairs, whose Spearman correlation is logged and the best kept.")
@click.option("--dev-every", type=int, help="Steps between two looks at them; each epoch if left out.")
@click.option("--graph-views", help="Of graphs: node-drop, edge-perturb, feature-mask, subgraph, with commas; or none.")
@click.option("--precision", help="32-true, bf16-mixed or 16-mixed.")
@click.option("--devices", type=int, help="GPUs, or processes on the CPU.")
@click.option("--out", type=click.Path(), help="Run folder; runs/OBJECTIVE-IDENTITY by default.")
@click.option("--tensorboard", is_flag=True, help="Also write TensorBoard events.")
@device_option
@download_option
@json_option
def train(
    config_file: str | None,
    recipe: str | None,
    out: str | None,
    tensorboard: bool,
    device: str,
    download: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Train a network and keep checkpoints.

    Logs loss and online k-NN, or on sentences the correlation with --dev; the same command goes on where an interrupted
    run stopped. Every other setting has its
    place in a --config file.
    """
    from layerlens.devices import keep_freed_memory
    from layerlens.training.config import make_config, read_config
    from layerlens.training.launch import end_rank, first_rank, launched
    from layerlens.training.loop import train as run_training
    from layerlens.training.recipes import read_recipe

    if recipe and config_file:
        raise click.UsageError("--recipe and --config exclude each other; copy the recipe's text into your file")
    settings = read_recipe(recipe) if recipe else read_config(config_file) if config_file else {}
    config = make_config(_overlay(settings, {key: value for key, value in given.items() if value is not None}))
    keep_freed_memory()
    with _bar("train") as advance:
        result = run_training(
            config, out, device=device, download=download, progress=advance, tensorboard=tensorboard, say=_say
        )
    if first_rank():
        _show_run(config, result, as_json)
    if launched():
        end_rank()


def _show_run(config: RunConfig, result: RunResult, as_json: bool) -> None:
    from layerlens import figures
    from layerlens.training.run_folder import read_ratios

    if ratios := read_ratios(Path(result.folder)):
        drawn = figures.ratio_areas(ratios, window=max(len(ratios) // 200, 1))
        figures.save_figure(drawn, Path(result.folder) / "ratios_over_training", ratios)
    row = {
        "folder": result.folder,
        "run": result.run,
        "epochs": result.epochs,
        "loss": result.loss,
        "knn": result.knn,
        "wall_s": result.wall_s,
    }
    if config.reads_text:
        row = {**row, "dev": result.dev, "best": result.best}
        del row["knn"]
    show(
        [{**row, "checkpoints": list(result.checkpoints), "environment": result.environment}] if as_json else [row],
        as_json,
        list(row),
    )


@cli.command()
@click.argument("name", required=False)
@json_option
def recipes(name: str | None, as_json: bool) -> None:
    """List the published settings, or print the one called NAME."""
    from layerlens.training.recipes import list_recipes, recipe_text

    if name:
        click.echo(json.dumps({"name": name, "toml": recipe_text(name)}) if as_json else recipe_text(name).rstrip())
        return
    show(list_recipes(), as_json, ["name", "about"])


@cli.command()
@model_option
@checkpoint_option
@data_option
@analysis_options
@click.option(
    "--measure", "measures", multiple=True, help="One of `layerlens measures`, with options; may be repeated."
)
@click.option("--permutations", default=0, help="Wrong pairings for the null of each entry.")
@click.option("--groups", default=10, show_default=True, help="Of samples, for intervals of measures other than CKA.")
@click.option("--tolerance", type=float, help="Stop once every interval reaches at most this far to either side.")
@click.option("--settle", type=click.Choice(["recommendation"]), help="Stop once the advice is settled.")
@click.option("--influence", is_flag=True, help="Also say which images move the CKA matrix most.")
@click.option("--out", type=click.Path(), help="Folder; analysis/CHECKPOINT beside the run by default.")
@device_option
@download_option
@json_option
def analyze(
    model: str | None,
    checkpoint: str | None,
    data: str,
    measures: tuple[str, ...],
    out: str | None,
    device: str,
    download: bool,
    as_json: bool,
    **look: Any,
) -> None:
    """Look at a checkpoint: CKA, geometry, rank.

    The CKA matrix with confidence intervals, alignment, uniformity and effective rank, as JSON and figures; or, with
    --measure, any other measure.
    """
    from layerlens import figures

    folder = Path(out) if out else _beside(checkpoint, model)
    extras = {name: look.pop(name) for name in ("permutations", "groups", "tolerance", "settle", "influence")}
    if measures or extras["influence"]:
        _measure(model, checkpoint, data, device, download, measures, folder, as_json, extras, look)
        return
    if extras["permutations"] or extras["tolerance"] is not None or extras["settle"]:
        raise click.UsageError("--permutations, --tolerance and --settle go with --measure, such as --measure cka")
    found, _ = _analysis(model, checkpoint, data, device, download, twin=False, folder=folder, **look)
    figures.save_figure(figures.heatmap(found.cka, title=found.label), folder / "similarity", found.cka)
    figures.save_figure(
        figures.layer_profile({found.label: found.effective_rank}), folder / "effective_rank", found.effective_rank
    )
    if as_json:
        click.echo(found.to_json())
        return
    show(_matrix_rows(found.cka), False, ["layer", *found.cka.layers])
    ranks = [
        {"layer": n, "effective_rank": v, "low": a, "high": b} for n, v, a, b in _profile_rows(found.effective_rank)
    ]
    click.echo()
    show(ranks, False, ["layer", "effective_rank", "low", "high"])
    g = found.geometry
    close = f"{g.alignment:.4f}" if g.alignment == g.alignment else "unknown (no scored pairs)"
    where = f"({g.samples} samples, {g.split} split)"
    click.echo(f"\nalignment {close}   uniformity {g.uniformity:.4f}   {where}")
    click.echo(f"intervals, figures and JSON: {folder}")


@cli.command()
@json_option
def measures(as_json: bool) -> None:
    """List every measure: range, direction, invariances, cost, source."""
    from layerlens.analysis.measures import MEASURES

    if as_json:
        click.echo(json.dumps([_declared(measure) for measure in MEASURES.values()], allow_nan=False))
        return
    for measure in MEASURES.values():
        options = ", ".join(f"{name}={value}" for name, value in measure.options.items())
        click.echo(f"{measure.name}: {measure.about}")
        click.echo(
            f"  of {measure.over}; {_range(measure)}; higher is {measure.higher}; by {', '.join(measure.estimators)}"
        )
        click.echo(f"  unchanged by {', '.join(measure.invariances)}")
        click.echo(f"  cost {measure.cost}" + (f"; options {options}" if options else ""))
        click.echo(f"  {measure.source}; checked against {measure.oracle}\n")


@cli.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--model", "model_a", help="Architecture of A, where its checkpoint is not layerlens' own.")
@click.option("--other-model", "model_b", help="Architecture of B, likewise; that of A by default.")
@data_option
@analysis_options
@click.option("--other-layers", help="Layers of B; as for A by default.")
@click.option("--measure", default="cka", show_default=True, help="One of `layerlens measures` over pairs.")
@click.option("--permutations", default=0, help="Wrong pairings for the null of each entry.")
@click.option("--groups", default=10, show_default=True, help="Of samples, for intervals of measures other than CKA.")
@click.option("--out", type=click.Path(), help="Folder for JSON and figures; ./compare by default.")
@device_option
@download_option
@json_option
def compare(
    first: str,
    second: str,
    model_a: str | None,
    model_b: str | None,
    data: str,
    device: str,
    download: bool,
    out: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Compare all layers of A with all layers of B.

    Each is a checkpoint or a model name; architectures may differ.
    """
    from layerlens import figures
    from layerlens.devices import pick_device
    from layerlens.pipeline import Settings
    from layerlens.pipeline import compare as across

    extras = {name: given.pop(name) for name in ("other_layers", "measure", "permutations", "groups")}
    settings, where, dataset = Settings(**given), pick_device(device), _data(data, download)
    facts = _facts(settings, dataset, measured=[first, second], models=[model_a, model_b or model_a], **extras)
    folder, stem = Path(out or "compare"), re.sub(r"[^\w.=-]+", "_", extras["measure"])
    _claim(folder / f"{stem}.json", facts)
    one = _network(first, model_a, dataset, settings.seed)
    two = _network(second, model_b or model_a, dataset, settings.seed, option="--other-model")
    labels = _two_labels(first, second)
    found = across(one.to(where), two.to(where), dataset, settings=settings, labels=labels, watch=_watch, **extras)
    title = f"{labels[0]} and {labels[1]}"
    figures.save_figure(figures.heatmap(found, title=title), folder / stem, found, facts=facts)
    if as_json:
        click.echo(json.dumps({**found.to_dict(), "facts": facts}, allow_nan=False))
        return
    show(_matrix_rows(found), False, ["layer", *found.columns])
    _tell(found, folder)


@cli.command()
@click.argument("run", type=click.Path())
@analysis_options
@click.option("--measure", default="cka", show_default=True, help="One of `layerlens measures` over pairs.")
@click.option("--model", help="Specification, where the run's model is somebody's factory.")
@click.option("--data", help="Where the run's data are now, if they moved.")
@click.option("--out", type=click.Path(), help="Folder; the run's analysis/ by default.")
@device_option
@json_option
def film(
    run: str,
    measure: str,
    model: str | None,
    data: str | None,
    out: str | None,
    device: str,
    as_json: bool,
    **look: Any,
) -> None:
    """Show how the similarity matrix of RUN changes over its checkpoints.

    Red marks are the layers that each checkpoint recommends, with the first one as the untrained twin.
    """
    from layerlens import figures
    from layerlens.analysis.measures import parse_measure
    from layerlens.devices import pick_device
    from layerlens.pipeline import Settings, film_strip
    from layerlens.recommendation import advice_over

    strip = film_strip(
        run, dataset=_data(data) if data else None, model=model, measure=measure, settings=Settings(**look),
        device=pick_device(device), watch=_watch,
    )  # fmt: skip
    folder = Path(out) if out else Path(run) / "analysis"
    facts = _facts(Settings(**look), None, measured=run, measure=measure)
    advice = advice_over(strip) if parse_measure(measure)[0].name == "cka" else []
    drawn = figures.film_strip(strip, targets=[found.targets if found else () for found in advice])
    figures.save_figure(drawn, folder / "film", strip, facts=facts)
    if as_json:
        click.echo(json.dumps({**strip.to_dict(), "facts": facts}, allow_nan=False))
        return
    show(_film_rows(strip), False)
    click.echo(f"\nmatrices, tests of each change and figure: {folder}")


@cli.command()
@model_option
@checkpoint_option
@data_option
@analysis_options
@click.option("--no-twin", is_flag=True, help="Do not compare with the freshly initialised network.")
@click.option("--criterion", default="two-level", show_default=True, help="two-level or modularity.")
@click.option("--out", type=click.Path(), help="Folder for the heat map with its regions and marks, and JSON.")
@device_option
@download_option
@json_option
def recommend(
    model: str | None,
    checkpoint: str | None,
    data: str,
    no_twin: bool,
    criterion: str,
    out: str | None,
    device: str,
    download: bool,
    as_json: bool,
    **look: Any,
) -> None:
    """Rank the layers at which to augment.

    Each with stop-gradient or without, its reason, its confidence, and cautions.
    """
    from layerlens import figures
    from layerlens.analysis.regions import check_criterion
    from layerlens.recommendation import recommend as advise

    check_criterion(criterion)

    found, twin = _analysis(model, checkpoint, data, device, download, twin=not no_twin, **look)
    advice = advise(
        found.cka, twin.cka if twin else None, geometry=found.geometry, criterion=criterion, seed=look["seed"]
    )
    if out is not None:
        drawn = figures.heatmap(found.cka, regions=advice.regions, targets=advice.targets, title=found.label)
        source = {"similarity": found.cka, "recommendation": advice}
        figures.save_figure(drawn, Path(out) / "recommendation", source, facts=found.facts)
    click.echo(advice.to_json() if as_json else str(advice))


@cli.command()
@model_option
@checkpoint_option
@click.option("--run", type=click.Path(), help="Score every kept checkpoint of this run instead.")
@click.option("--data", help="As for train; with --run another data set shows the transfer to it.")
@click.option("--layer", help="Layer whose features are scored; the embedding (input of the head) by default.")
@click.option("--folds", type=int, help="Of graphs: of the cross-validation; 10 by default.")
@click.option("--splits", type=int, help="Of graphs: how often they are shared out into folds; 5 by default.")
@click.option("-k", type=int, help="Neighbours; 200 by default.")
@click.option("--protocol", help="Also a linear probe by SGD: deep-augmentation or moco.")
@click.option("--finetune", type=int, metavar="EPOCHS", help="Also train the whole network with a classifier.")
@click.option("--out", type=click.Path(), help="Folder for what --run and --finetune keep; beside the run by default.")
@device_option
@download_option
@json_option
def evaluate(
    model: str | None,
    checkpoint: str | None,
    run: str | None,
    data: str | None,
    layer: str | None,
    folds: int | None,
    splits: int | None,
    k: int | None,
    protocol: str | None,
    finetune: int | None,
    out: str | None,
    device: str,
    download: bool,
    as_json: bool,
) -> None:
    """Score frozen features: k-NN and linear probe; on sts:PATH Spearman's correlation per task.

    Offline test accuracy with the full training split as the bank; the weights stay as they are. Graphs: SVM and
    logistic regression, 10-fold.
    """
    from layerlens.devices import pick_device
    from layerlens.graphs import GraphDataset
    from layerlens.models import reads_sentences
    from layerlens.pipeline import embedding_name
    from layerlens.pipeline import evaluate as score
    from layerlens.text import TextDataset
    from layerlens.training.network import load_network
    from layerlens.trajectory import finetune as tune

    if run is not None:
        if checkpoint or layer or finetune:
            raise click.UsageError("--run goes with neither --checkpoint nor --layer nor --finetune")
        _evaluate_run(run, data, model, 200 if k is None else k, protocol, out, device, download, as_json)
        return
    if not data or not (checkpoint or (model and reads_sentences(model))):
        raise click.UsageError("give --checkpoint and --data, or --run; for sentences --model hf:PATH will do")
    where, dataset = pick_device(device), _data(data, download)
    network, _ = load_network(checkpoint, model=model, dataset=dataset)
    name = layer or embedding_name(network, dataset)
    if isinstance(dataset, TextDataset):
        if k is not None or finetune is not None:
            raise click.UsageError("-k and --finetune are for images; sentences are scored by their cosines")
        _say_cut(network, dataset.split("test"))
        scores = score(network.to(where), dataset, layer=layer, protocol=protocol, watch=_watch)
        show([{"layer": name, **scores}], as_json)
        return
    if isinstance(dataset, GraphDataset):
        if k is not None or finetune is not None:
            raise click.UsageError("-k and --finetune are for images; graphs are scored by cross-validation")
        cut = {"folds": 10 if folds is None else folds, "splits": 5 if splits is None else splits}
        scores = score(network.to(where), dataset, layer=layer, protocol=protocol, watch=_watch, **cut)
        show([{"layer": name, **cut, **scores}], as_json)
        return
    if folds is not None or splits is not None:
        raise click.UsageError("--folds and --splits are for graphs")
    k = 200 if k is None else k
    scores = score(network.to(where), dataset, layer=layer, k=k, protocol=protocol, watch=_watch)
    if finetune is not None and checkpoint is not None:
        folder = Path(out) if out else _beside(checkpoint, model).parent.parent / "finetune" / Path(checkpoint).stem
        scores["finetuned"] = tune(checkpoint, dataset, folder, model=model, epochs=finetune, device=device)
    show([{"layer": name, "k": k, **scores}], as_json)


@cli.command()
@click.option("--data", required=True, help="text:PATH, pairs:PATH or sts:PATH; the training split is read.")
@click.option("--vocabulary", default=8192, show_default=True, help="Tokens.")
@click.option("--cased", is_flag=True, help="Keep capitals; without it all is lower case.")
@click.option("--out", type=click.Path(), required=True, help="Folder; `hf-config:bert-tiny,tokenizer=FOLDER` uses it.")
@json_option
def tokenizer(data: str, vocabulary: int, cased: bool, out: str, as_json: bool) -> None:
    """Learn a WordPiece vocabulary from sentences, for models without weights."""
    from layerlens.encoders import train_tokenizer
    from layerlens.text import TextDataset

    dataset = _data(data)
    if not isinstance(dataset, TextDataset):
        raise click.UsageError(f"{data!r} holds no sentences; allowed: text:PATH, pairs:PATH, sts:PATH")
    sentences = (sentence for column in dataset.columns for sentence in column)
    train_tokenizer(sentences, out, vocabulary=vocabulary, lowercase=not cased)
    show([{"folder": out, "sentences": len(dataset) * len(dataset.columns)}], as_json)


@cli.command()
@click.argument("checkpoint", type=click.Path())
@click.option("--out", type=click.Path(), required=True, help="A new folder.")
@json_option
def export(checkpoint: str, out: str, as_json: bool) -> None:
    """Write CHECKPOINT of an encoder as a folder for SentenceTransformer(FOLDER)."""
    from layerlens.encoders import SentenceEncoder
    from layerlens.training.network import load_network

    network, _ = load_network(checkpoint)
    if not isinstance(network, SentenceEncoder):
        raise click.UsageError(f"{checkpoint!r} is no encoder of sentences; export takes runs of simcse, pairs or mlm")
    network.save_sentence_transformer(out)
    show([{"folder": out, "pooling": network.pooling}], as_json)


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
    from layerlens.devices import pick_device
    from layerlens.pipeline import Settings, analyze_run, run_folders
    from layerlens.report import write_report

    settings, where, folders = Settings(**look), pick_device(device), run_folders(runs)
    dataset = _data(data) if data else None
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
    from layerlens.devices import keep_freed_memory
    from layerlens.pipeline import demo as run_demo
    from layerlens.report import write_report

    keep_freed_memory()
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
    if "tqdm" in sys.modules:  # an open bar would share the message's line
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()
    print(f"layerlens: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(code)


def _overlay(settings: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Options over a file's settings; those of Deep Augmentation, sentences and graphs go into their tables."""
    settings, given = _overlay_text(settings, dict(given))
    if (kinds := given.pop("graph_views", None)) is not None:
        if not isinstance(settings.get("graph") or {}, dict):
            raise click.UsageError(f"graph={settings['graph']!r} in the file; it is a table: [graph] with kinds = […]")
        chosen = [] if kinds == "none" else [name.strip() for name in kinds.split(",")]
        settings = {**settings, "graph": {**(settings.get("graph") or {}), "kinds": chosen}}
    if not isinstance(settings.get("augment", {}), dict):
        raise click.UsageError(f"augment={settings['augment']!r} in the file; it is a table: [augment] with layer = …")
    names = ("transform", "rate", "fraction", "stop_gradient")
    inner: dict[str, Any] = {key: given.pop(key) for key in names if key in given}
    if not isinstance(settings.get("freeze") or {}, dict):
        raise click.UsageError(f"freeze={settings['freeze']!r} in the file; it is a table: [freeze] with part = …")
    if "freeze" in given:
        given["freeze"] = {**(settings.get("freeze") or {}), "part": given["freeze"]}
    if "augment_layer" in given:
        inner["layer"] = given.pop("augment_layer")
    if not inner:
        return {**settings, **given}
    augment = {**(settings.get("augment") or {}), **inner}
    if "layer" not in augment:
        raise click.UsageError(f"--{next(iter(inner)).replace('_', '-')} needs --augment-layer")
    return {**settings, **given, "augment": augment}


def _overlay_text(settings: dict[str, Any], given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    names = ("pooling", "max_length", "model_dropout", "mlm_weight", "dev", "dev_every")
    inner = {key: given.pop(key) for key in names if key in given}
    if not isinstance(settings.get("text") or {}, dict):
        raise click.UsageError(f"text={settings['text']!r} in the file; it is a table: [text] with pooling = …")
    return ({**settings, "text": {**(settings.get("text") or {}), **inner}} if inner else settings), given


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
    from layerlens.devices import pick_device
    from layerlens.pipeline import Settings, analyze_checkpoint

    if not model and not checkpoint:
        raise click.UsageError("give --checkpoint, --model, or both")
    settings, where = Settings(**look), pick_device(device)
    found = analyze_checkpoint(
        checkpoint, _data(data, download), model=model, settings=settings, twin=twin, device=where,
        folder=folder, watch=_watch,
    )  # fmt: skip
    if cut := found[0].facts.get("sentences_cut"):
        _say(f"{cut:,} of the sentences have more tokens than the encoder reads and are cut there")
    return found


def _say(line: str) -> None:
    click.echo(line, err=True)


def _say_cut(encoder: Any, sentences: Iterable[str]) -> None:
    if cut := encoder.too_long(sentences):
        _say(f"{cut:,} sentences have more than {encoder.max_length} tokens and are cut there")


def _data(spec: str, download: bool = False) -> Any:
    """A data set; of sentences and graphs, what was read and what was decided or left out is said on stderr."""
    from layerlens.data import load_data
    from layerlens.graphs import GraphDataset, describe_graphs
    from layerlens.text import TextDataset, report

    dataset = load_data(spec, download=download)
    if isinstance(dataset, GraphDataset):
        _say(describe_graphs(dataset))
    if isinstance(dataset, TextDataset):
        click.echo(report(dataset), err=True)
    return dataset


def _evaluate_run(
    run: str,
    data: str | None,
    model: str | None,
    k: int,
    protocol: str | None,
    out: str | None,
    device: str,
    download: bool,
    as_json: bool,
) -> None:
    """Every kept checkpoint of a run: a table, and JSON and figure beside the run."""
    from layerlens import figures
    from layerlens.devices import pick_device
    from layerlens.trajectory import evaluate_run

    dataset = _data(data, download) if data else None
    found = evaluate_run(
        run, dataset=dataset, model=model, k=k, protocol=protocol, device=pick_device(device), watch=_watch
    )
    folder = Path(out) if out else Path(run) / "analysis"
    stem = "scores" if data is None else "scores_" + re.sub(r"[^\w.=-]+", "_", data)
    key = next(key for key in ("knn", "svm", "mean") if key in found.rows[0])
    figures.save_figure(figures.score_curves({found.name: found}, key=key), folder / stem, found)
    if as_json:
        click.echo(found.to_json())
        return
    show(list(found.rows), False)
    click.echo(f"\nfigure and JSON: {folder / stem}")


def _measure(
    model: str | None,
    checkpoint: str | None,
    data: str,
    device: str,
    download: bool,
    measures: Sequence[str],
    folder: Path,
    as_json: bool,
    extras: dict[str, Any],
    look: dict[str, Any],
) -> None:
    """Any measures of a checkpoint: print them, and keep JSON and figure of each."""
    from layerlens import figures
    from layerlens.analysis.measures import parse_measure
    from layerlens.analysis.results import SimilarityMatrix
    from layerlens.devices import pick_device
    from layerlens.files import write_json
    from layerlens.pipeline import Settings, influence_of_samples, measure_network
    from layerlens.recommendation import settled
    from layerlens.training.network import load_network

    if not model and not checkpoint:
        raise click.UsageError("give --checkpoint, --model, or both")
    settings, influence = Settings(**look), extras.pop("influence")
    extras["settle"] = settled(settings.level, seed=settings.seed) if extras["settle"] else None
    pairs = [name for name in measures if parse_measure(name)[0].over == "pairs"]
    if not pairs and (extras["permutations"] or extras["tolerance"] is not None or extras["settle"]):
        raise click.UsageError(
            "--permutations, --tolerance and --settle need a measure of pairs, such as --measure cka"
        )
    single = {"groups": extras["groups"]}
    dataset = _data(data, download)
    network = load_network(checkpoint, model=model, dataset=dataset, seed=settings.seed)[0].to(pick_device(device))
    facts = _facts(
        settings, dataset, measured=checkpoint or model, **{k: v for k, v in extras.items() if k != "settle"}
    )
    found: list[Any] = []
    names = list(dict.fromkeys(name.replace("-", "_") for name in measures))
    if (extras["tolerance"] is not None or extras["settle"]) and any(parse_measure(n)[0].name != "cka" for n in pairs):
        raise click.UsageError("--tolerance and --settle are for CKA, whose intervals come batch by batch")
    for measure in names:
        more = extras if parse_measure(measure)[0].over == "pairs" else single
        stem = re.sub(r"[^\w.=-]+", "_", measure)
        _claim(folder / f"{stem}.json", facts)
        result = measure_network(network, dataset, measure, settings=settings, watch=_watch, **more)
        if isinstance(result, SimilarityMatrix):
            drawn = figures.heatmap(result)
        else:
            drawn = figures.layer_profile({Path(checkpoint).stem if checkpoint else str(model): result})
        figures.save_figure(drawn, folder / stem, result, facts=facts)
        found.append(result)
    if influence:
        found.append(influence_of_samples(network, dataset, settings, watch=_watch))
        write_json(folder / "influence.json", {**found[-1].to_dict(), "facts": facts})
    if as_json:
        rows = [{**result.to_dict(), "facts": facts} for result in found]
        click.echo(json.dumps(rows if len(rows) > 1 else rows[0], allow_nan=False))
        return
    for result in found:
        _print(result)
    click.echo(f"intervals, figures and JSON: {folder}")


def _print(result: Any) -> None:
    from layerlens.analysis.results import SampleInfluence, SimilarityMatrix

    if isinstance(result, SimilarityMatrix):
        click.echo(f"{result.measure} ({result.samples} rows, {result.estimator}, {result.reduce})")
        show(_matrix_rows(result), False, ["layer", *result.layers])
        _tell(result, None)
    elif isinstance(result, SampleInfluence):
        order = sorted(range(result.samples), key=lambda i: -result.largest[i])[:10]
        show(
            [
                {"sample": i, "largest_change": float(result.largest[i]), "z_score": float(result.z_score[i])}
                for i in order
            ],
            False,
        )
        stand_out = result.outliers()
        click.echo(f"{len(stand_out)} of {result.samples} samples stand out")
    else:
        rows = [{"layer": n, result.measure: v, "low": a, "high": b} for n, v, a, b in _profile_rows(result)]
        show(rows, False, ["layer", result.measure, "low", "high"])
        for caution in result.cautions:
            click.echo(f"{caution.code} {caution.text}")
    click.echo()


def _tell(matrix: Any, folder: Path | None) -> None:
    """What stands behind a matrix, below its table."""
    import numpy as np

    from layerlens.analysis.measures import MEASURES

    apart = np.isfinite(matrix.values)
    if matrix.rows == matrix.columns:
        apart &= ~np.eye(len(matrix.rows), dtype=bool)
    finite = np.isfinite(matrix.high) & apart
    if finite.any():
        reach = float(np.max((matrix.high - matrix.low)[finite]) / 2)
        click.echo(f"{matrix.level:.0%} intervals reach up to ±{reach:.3f}; {matrix.samples} rows")
    known = apart if matrix.null is None else apart & np.isfinite(matrix.null.bound)
    if matrix.null is not None and known.any():
        higher = MEASURES[matrix.measure].higher_is_alike
        beyond = matrix.values > matrix.null.bound if higher else matrix.values < matrix.null.bound
        click.echo(
            f"{float(np.mean(beyond[known])):.0%} of the entries are more alike than {matrix.null.level:.0%} of "
            f"{matrix.null.permutations} wrong pairings of the samples"
        )
    for caution in matrix.cautions:
        click.echo(f"{caution.code} {caution.text}")
    if folder is not None:
        click.echo(f"intervals, figure and JSON: {folder}")


def _network(what: str, model: str | None, dataset: Any, seed: int, *, option: str = "--model") -> Any:
    """A network from a checkpoint file, or from a model's name."""
    from layerlens.errors import CheckpointError
    from layerlens.training.network import load_network

    run = (Path(what) / "config.json").is_file()
    if run or Path(what).is_file() or Path(what).suffix in (".safetensors", ".pt", ".pth", ".ckpt"):
        try:
            return load_network(what, model=model, dataset=dataset, seed=seed)[0]
        except CheckpointError as error:
            raise CheckpointError(str(error).replace("--model", option)) from error
    return load_network(None, model=what, dataset=dataset, seed=seed)[0]


def _facts(settings: Any, dataset: Any, **more: Any) -> dict[str, Any]:
    """What a kept result was made from: settings, data, files and their digests, versions and commit."""
    from layerlens.provenance import provenance
    from layerlens.training.checkpoint import fingerprint

    files = more["measured"] if isinstance(more["measured"], list) else [more["measured"]]
    digests = {Path(name).name: fingerprint(name) for name in files if Path(name).is_file()}
    data = None if dataset is None else {"name": dataset.name, "sha256": dataset.fingerprint()}
    return {**more, "sha256": digests, "data": data, "settings": vars(settings), "environment": provenance()}


def _claim(path: Path, facts: dict[str, Any]) -> None:
    """See that a file holds no result of something else."""
    from layerlens.errors import RunFolderError
    from layerlens.files import read_json

    kept = (read_json(path).get("facts") if path.exists() else None) or {}
    for key in ("measured", "sha256", "data", "settings") if kept else ():
        if json.loads(json.dumps(facts[key])) != kept.get(key):
            raise RunFolderError(f"{str(path)!r} holds a result with other {key}; choose another --out")


def _two_labels(first: str, second: str) -> tuple[str, str]:
    """Short names that differ: file stems, with their run in front where those are the same."""
    names = [Path(name).stem if Path(name).exists() else name for name in (first, second)]
    if names[0] == names[1]:
        names = [str(Path(name).with_suffix("")) for name in (first, second)]
    return (names[0], names[1]) if names[0] != names[1] else (f"{names[0]} (A)", f"{names[1]} (B)")


def _film_rows(strip: Any) -> list[dict[str, Any]]:
    """Per checkpoint the mean similarity of neighbouring layers and of all, and how many entries changed since."""
    import numpy as np

    rows = []
    for k, (label, frame) in enumerate(zip(strip.labels, strip.frames, strict=True)):
        upper = np.triu_indices(len(frame.layers), 1)
        change = strip.changes[k - 1] if k and strip.changes else None
        rows.append(
            {
                "checkpoint": label, "neighbours": _mean(frame.values.diagonal(1)),
                "all_pairs": _mean(frame.values[upper]),
                "entries_changed": int((change.adjusted[upper] < 1 - change.level).sum()) if change else None,
            }
        )  # fmt: skip
    return rows


def _mean(values: Any) -> float | None:
    """Mean of the numbers that there are; None if there are none."""
    known = values[values == values]
    return float(known.mean()) if len(known) else None


def _declared(measure: Any) -> dict[str, Any]:
    from dataclasses import asdict

    known = {**asdict(measure), "options": dict(measure.options)}
    return {k: None if isinstance(v, float) and abs(v) == float("inf") else v for k, v in known.items() if k != "home"}


def _range(measure: Any) -> str:
    low, high = (f"{end:.4g}" if abs(end) != float("inf") else "∞" for end in (measure.low, measure.high))
    return f"from {low} to {high}" if high != "∞" else f"from {low}"


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
        shown = {
            k: round(v, 4)
            for k, v in progress.metrics.items()
            if k in ("epoch", "loss", "knn", "dev") and v is not None
        }
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
    """The items with a progress bar on stderr, which begins with the first of them."""
    from tqdm import tqdm

    yield from tqdm(items, desc=title, leave=False, file=sys.stderr)


def _matrix_rows(matrix: Any) -> list[dict[str, Any]]:
    return [
        {"layer": name, **dict(zip(matrix.columns, map(float, row), strict=True))}
        for name, row in zip(matrix.rows, matrix.values, strict=True)
    ]


def _profile_rows(profile: Any) -> Iterable[tuple[str, float, float, float]]:
    return zip(profile.layers, profile.values, profile.low, profile.high, strict=True)


cli.add_command(study)

if __name__ == "__main__":
    main()
