"""`layerlens study`: many runs from one statement. Parse, call, show, as in `cli`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from layerlens.show import json_option, show

store_option = click.option(
    "--store", default="studies", show_default=True, type=click.Path(), help="Folder of the runs of all studies."
)


@click.group()
def study() -> None:
    """Run, resume and read studies: tables of many runs.

    A study is a TOML file, or one of the ready ones (`layerlens study list`).
    """


@study.command("list")
@click.argument("name", required=False)
@json_option
def list_studies(name: str | None, as_json: bool) -> None:
    """List the ready studies, or print the one called NAME."""
    from layerlens.experiments.study import read_study, study_names, study_text

    if name:
        text = study_text(name)
        click.echo(json.dumps({"name": name, "toml": text}) if as_json else text.rstrip())
        return
    found = [read_study(each) for each in study_names()]
    show([{"name": f.name, "about": f.about} for f in found], as_json)


@study.command()
@click.argument("what", metavar="NAME|FILE")
@store_option
@click.option("--scale", help="smoke (minutes on 2 cores), hour, or published; hour by default for a ready study.")
@click.option("--model", help="As for `layerlens train`.")
@click.option("--data", help="As for `layerlens train`.")
@click.option("--dev", help="As for `layerlens train`: the scored pairs of a study of sentences.")
@click.option("--epochs", type=int, help="Of every run.")
@click.option("--seeds", type=int, help="How many, counted from 0.")
@click.option("--name", help="What the study is called in the store.")
@click.option("--engine", default="local", show_default=True, help="local, ray or slurm.")
@click.option("--workers", type=int, help="Runs at once; one per GPU, or else per CPU core by default.")
@click.option("--threads", type=int, help="CPU threads of each worker; the cores divided by the workers by default.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Of the engine, such as partition=gpu.")
@click.option("--retries", default=2, show_default=True, help="Failed attempts without a further epoch, of a run.")
@click.option("--limit-s", default=0.0, help="Seconds that one attempt at a run may take; no limit by default.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--download", is_flag=True, help="Fetch a missing CIFAR, SVHN or TU data set.")
@click.option("--dry-run", is_flag=True, help="Say how many runs, how long, how much disk; time a few steps for it.")
@json_option
def run(
    what: str,
    store: str,
    scale: str | None,
    model: str | None,
    data: str | None,
    dev: str | None,
    epochs: int | None,
    seeds: int | None,
    name: str | None,
    engine: str,
    workers: int | None,
    threads: int | None,
    options: tuple[str, ...],
    retries: int,
    limit_s: float,
    device: str,
    download: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Do what is missing of a study, then print its table and draw its figures.

    Finished runs are never done again; the same command goes on where an interrupted one stopped, and two of them at
    the same time share the work.
    """
    from functools import partial

    from layerlens.data import load_data
    from layerlens.devices import pick_device
    from layerlens.errors import check_known
    from layerlens.experiments.cost import estimate
    from layerlens.experiments.engines import ENGINES, make_engine
    from layerlens.experiments.engines.local import LocalEngine
    from layerlens.experiments.grid import make_plan
    from layerlens.experiments.results import collect
    from layerlens.experiments.runner import check_patience, manifest, run_plan
    from layerlens.experiments.store import Store

    chosen = _study(what, scale, name, seeds, {"model": model, "data": data, "dev": dev, "epochs": epochs})
    more, here = _pairs(options), engine == "local"
    check_known("engine", engine, ENGINES)
    check_patience(retries, limit_s)
    if here or dry_run:
        pick_device(device)
    plan, place = make_plan(chosen, load=partial(load_data, download=download)), Store(store)
    if dry_run:
        local = LocalEngine(workers=workers, threads=threads, **(more if here else {}))
        at_once, share = (len(local.workers), local.threads) if here else (workers or 1, threads or 1)
        _show_cost(estimate(plan, place, workers=at_once, threads=share, device=device, say=_say), as_json)
        return
    made = make_engine(engine, workers=workers, threads=threads, **more)
    with _bar(len(plan.distinct), chosen.name) as advance:
        outcome = run_plan(
            plan, place, made, retries=retries, limit_s=limit_s, device=device, progress=advance, say=_say
        )
    found, folder = collect(place, chosen.name, plan=manifest(plan)), place.study_folder(chosen.name)
    undrawn = _write(found, folder)
    _show_result(found, None, as_json)
    if not as_json:
        click.echo(f"\n{len(outcome.done)} runs, {len(outcome.fresh)} of them now; tables, figures and JSON: {folder}")
    if outcome.failed:
        _say(f"{len(outcome.failed)} runs failed; `layerlens study status {chosen.name} --store {store}` says why")
    if outcome.failed or undrawn:
        sys.exit(1)


@study.command()
@click.argument("name", required=False)
@store_option
@click.option("--runs", is_flag=True, help="Every run, not only those that failed.")
@json_option
def status(name: str | None, store: str, runs: bool, as_json: bool) -> None:
    """Say what of each study is done, running, failed and missing, and the time left."""
    from layerlens.experiments.store import STATES, Store, time_left_s

    place = Store(store)
    names = [name] if name else place.studies()
    found = {each: place.status(each) for each in names}
    rows: list[dict[str, Any]] = []
    for each, lines in found.items():
        once = {line.key: line for line in lines}.values()
        counts = {state: sum(line.state == state for line in once) for state in STATES}
        rows.append({"study": each, "runs": len(once), **counts, "left_s": time_left_s(lines)})
    if as_json:
        detail = {each: [vars(line) for line in lines] for each, lines in found.items()} if runs else {}
        click.echo(json.dumps([{**row, **({"of": detail[row["study"]]} if runs else {})} for row in rows]))
        return
    if not rows:
        click.echo(f"no study was begun in {store!r}")
        return
    show([{**row, "left_s": _duration(row["left_s"])} for row in rows], False, ["study", "runs", *STATES, "left_s"])
    for each, lines in found.items():
        _show_runs(each, [line for line in lines if runs or line.state == "failed"])


@study.command()
@click.argument("name")
@store_option
@click.option("--metric", help="probe, knn, knn10, linear, top1, alignment_test, uniformity_test …; probe by default.")
@click.option("--epoch", type=int, help="Of the checkpoints; the last ones by default.")
@click.option("--on", "data", default="", help="Other data that were scored; the runs' own by default.")
@click.option("--format", "form", type=click.Choice(["table", "csv", "latex", "long"]), default="table")
@json_option
def table(name: str, store: str, metric: str | None, epoch: int | None, data: str, form: str, as_json: bool) -> None:
    """Print the table of study NAME, as far as it is done: means with 95 % intervals, gains over the baseline.

    `long` is every number of every checkpoint, as CSV.
    """
    from layerlens.experiments.results import collect
    from layerlens.experiments.store import Store
    from layerlens.experiments.tables import latex

    found = collect(Store(store), name)
    if form == "long":
        click.echo(found.to_frame().to_csv(index=False), nl=False)
    elif form != "table" and not data and not found.metrics(""):
        raise click.UsageError(f"{name}: its runs are without scores (scores = false)")
    elif form == "csv":
        click.echo(found.table(_metric(found, metric), epoch=epoch, data=data).to_csv(index=False), nl=False)
    elif form == "latex":
        click.echo(latex(found, _metric(found, metric), epoch=epoch, data=data), nl=False)
    else:
        _show_result(found, metric, as_json, epoch=epoch, data=data)


def _study(what: str, scale: str | None, name: str | None, seeds: int | None, given: dict[str, Any]) -> Any:
    """The study that the words of a command mean; settings of its own give it a name of its own."""
    from layerlens.experiments.study import make_study, read_study

    found = read_study(what)
    if scale is None and "hour" in found.scales and not what.endswith(".toml"):
        scale = "hour"
        _say(f"{what} at --scale hour; smoke and published are the others")
    settings = {key: value for key, value in given.items() if value is not None}
    tables = {"text": {"dev": settings["dev"]}} if "dev" in settings else {}
    plain = {key: value for key, value in settings.items() if key != "dev"}
    content = found.at_scale(scale, **plain, **tables).model_dump()
    words = [
        re.sub(r"[^A-Za-z0-9.]+", "-", str(value).rpartition("/")[2]).strip("-.")[:30] for value in settings.values()
    ]
    content["name"] = name if name is not None else "-".join([content["name"], *words])[:100]
    return make_study(content if seeds is None else {**content, "seeds": seeds})


def _metric(found: Any, metric: str | None) -> str:
    """The asked-for score, or the first of the usual ones that the study has."""
    known = found.metrics("")
    return metric or next((m for m in ("probe", "top1", "knn") if m in known), known[0] if known else "probe")


def _show_result(found: Any, metric: str | None, as_json: bool, *, epoch: int | None = None, data: str = "") -> None:
    from layerlens.experiments.tables import sentences

    if as_json:
        click.echo(found.to_json())
        return
    if not found.runs:
        click.echo(f"{found.name}: no run is finished; {found.missing} are missing, {len(found.failed)} failed")
        return
    if not data and not found.metrics(""):
        click.echo(f"{found.name}: {len(found.runs)} runs, without scores (scores = false)")
        return
    chosen = _metric(found, metric)
    rows = found.table(chosen, epoch=epoch, data=data)
    click.echo(f"{found.name}: {chosen}, mean over n seeds with 95 % interval; gain over the baseline, seed by seed")
    show(_plain(rows), False)
    if found.missing or found.failed:
        click.echo(f"\n{found.missing} runs are missing, {len(found.failed)} failed")
    for line in sentences(found, chosen) if epoch is None and not data else ():
        click.echo(f"\n{line}")


def _plain(rows: Any) -> list[dict[str, Any]]:
    """A table's rows with None for what is not there, and truth in words."""
    words = {True: "yes", False: "no"}
    return [
        {k: None if v is None or v != v else words[v] if isinstance(v, bool) else v for k, v in record.items()}
        for record in rows.to_dict(orient="records")
    ]


def _write(found: Any, folder: Path) -> bool:
    """Result, tables and figures of a study; whether a figure could not be drawn."""
    from layerlens import figures, study_figures
    from layerlens.errors import LayerlensError
    from layerlens.experiments.study import Drawing
    from layerlens.experiments.tables import latex
    from layerlens.files import write_atomically, write_json

    write_json(folder / "result.json", found.to_dict())
    write_atomically(folder / "long.csv", found.to_frame().to_csv(index=False).encode())
    if found.metrics(""):
        metric = _metric(found, None)
        write_atomically(folder / f"{metric}.csv", found.table(metric).to_csv(index=False).encode())
        write_atomically(folder / f"{metric}.tex", latex(found, metric).encode())
    undrawn = False
    for asked in found.study["figures"]:
        source = {"study": found.name, "figure": asked, "drawn_from": "../result.json"}
        try:
            drawn = study_figures.draw(found, Drawing.model_validate(asked))
            figures.save_figure(drawn, folder / "figures" / asked["name"], source)
        except LayerlensError as error:  # a word about a figure must not hide hours of training
            undrawn = True
            _say(f"figure {asked['name']!r} is not drawn: {error}")
    return undrawn


def _show_cost(cost: Any, as_json: bool) -> None:
    if as_json:
        click.echo(cost.to_json())
        return
    click.echo(f"{cost.runs} runs, {cost.runs - cost.done} of them missing")
    click.echo(
        f"about {_duration(cost.wall_s)} with {cost.workers} workers: {_duration(cost.train_s)} of training and "
        f"{_duration(cost.measure_s)} of measuring on one"
    )
    click.echo(f"about {cost.disk_mib:.0f} MiB of disk")
    for line in cost.timed:
        click.echo(f"timed: {line}")


def _show_runs(name: str, lines: list[Any]) -> None:
    if not lines:
        return
    click.echo()
    show(
        [
            {
                "run": line.key, "arm": line.arm, "values": " ".join(f"{k}={v}" for k, v in line.values.items()),
                "state": line.state, "epochs": f"{line.epochs}/{line.of}", "problem": (line.problem or "")[:200],
            }
            for line in lines
        ],
        False,
    )  # fmt: skip


def _pairs(options: tuple[str, ...]) -> dict[str, str]:
    for option in options:
        if "=" not in option:
            raise click.UsageError(f"--option {option!r}; it takes KEY=VALUE")
        if (key := option.partition("=")[0]) in ("", "name", "workers", "threads"):
            raise click.UsageError(f"--option {option!r}; option {key!r} is none of an engine, see docs/studies.md")
    return dict(option.split("=", 1) for option in options)


def _duration(seconds: float | None) -> str:
    """Seconds as people say them.

    >>> _duration(75), _duration(7300), _duration(200000), _duration(None)
    ('1 min 15 s', '2 h 1 min', '2 d 7 h', '-')
    """
    if seconds is None:
        return "-"
    whole = round(seconds)
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // small} {small_unit}"
    return f"{whole} s"


def _say(line: str) -> None:
    """A line on stderr, above an open progress bar."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


@contextmanager
def _bar(total: int, title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr that counts runs; it begins with the first one."""
    from tqdm import tqdm

    bars: list[Any] = []

    def advance(done: int, _of: int, line: str) -> None:
        if not bars:
            bars.append(tqdm(total=total, desc=title, unit="run", file=sys.stderr))
        bars[0].set_postfix_str(line, refresh=False)
        bars[0].update(done - bars[0].n)

    try:
        yield advance
    finally:
        for bar in bars:
            bar.close()
