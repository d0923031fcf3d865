"""Similarity of layers by layerlens and by its peers: time, memory, and distance from the float64 definition.

    OMP_NUM_THREADS=2 python tests/benchmarks/similarity_peers.py [--cases resnet18-8 …] [--repeats 5] [--smoke]

Nothing is installed: a peer that can't be imported is named and left out, and one that fails gets a row that says how.
In each repeat the reference and every tool run once in turn, in one process; peak memory is that of a process of its
own, less that of one which only held the data (and, for a model, ran the plain forward loop). The error is the largest
difference of an entry from the definition in float64, for the estimator that the tool claims.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from similarity_peer_adapters import ESTIMATORS, Matrix, Rows, Tool, ratio_of, stacked_grams, tools
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import layerlens as ll
from layerlens.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "similarity_peers.json"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


# --- Definitions in float64 -----------------------------------------------------------------------------------------


def gram64(x: Tensor) -> Tensor:
    """X Xᵀ of the centred features in float64, shape (n, n)."""
    total = torch.zeros(len(x), len(x), dtype=torch.float64)
    for columns in x.flatten(1).split(4096, dim=1):
        centred = columns.double() - columns.double().mean(0)
        total += centred @ centred.T
    return total


def hsic_products(parts: Sequence[Tensor], *, unbiased: bool) -> Matrix:
    """HSIC of all pairs of layers by Song et al.'s formula, or the biased one, up to n², in float64."""
    n = len(parts[0])
    grams = torch.stack([gram64(x) for x in parts])  # (L, n, n), centred
    if not unbiased:
        return torch.einsum("aij,bij->ab", grams, grams)
    grams.diagonal(dim1=1, dim2=2).zero_()
    columns, sums = grams.sum(1), grams.sum((1, 2))
    cross = torch.einsum("aij,bij->ab", grams, grams)
    cross += torch.outer(sums, sums) / ((n - 1) * (n - 2)) - 2 * columns @ columns.T / (n - 2)
    return cross / (n * (n - 3))


def batch_definition(batches: Callable[[], Iterable[Sequence[Tensor]]]) -> Callable[[str], Matrix]:
    """CKA from batches of activations, by the name of the estimator; the batches are read once."""

    @cache
    def products() -> list[tuple[int, Matrix]]:
        return [(len(parts[0]), hsic_products(parts, unbiased=True)) for parts in batches()]

    def define(estimator: str) -> Matrix:
        return ratio_of(sum((n if estimator == "minibatch" else 1) * block for n, block in products()))

    return define


def uniformity64(x: Tensor) -> float:
    x, total = nn.functional.normalize(x.double()), 0.0
    for start in range(0, len(x), 1024):
        total += float(torch.cdist(x[start : start + 1024], x).square_().mul_(-2).exp_().sum())
    return math.log((total - len(x)) / (len(x) * (len(x) - 1)))


# --- Cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Data in memory, what the reference does with them, and the right answer."""

    takes: str
    size: str
    arguments: tuple[Any, ...]
    reference: Callable[[], object]
    define: Callable[[str], Any]
    threads: int | None = None


def model_problem(model: nn.Module, images: Tensor, names: Sequence[str], batch_size: int) -> Problem:
    model.eval()
    loader = DataLoader(TensorDataset(images, torch.zeros(len(images), dtype=torch.long)), batch_size)

    def forward_loop() -> None:
        with torch.inference_mode():
            for batch, _ in loader:
                model(batch)

    return Problem(
        takes="model", size=f"{len(names)} layers, {len(images)} images, batches of {batch_size}",
        arguments=(model, loader, names), reference=forward_loop,
        define=batch_definition(lambda: activations(model, loader, names)),
    )  # fmt: skip


@torch.inference_mode()
def activations(model: nn.Module, loader: DataLoader, names: Sequence[str]) -> Iterator[Rows]:
    """Per batch a copy of each layer's output, taken before anything may write into it."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return model.get_submodule(name).register_forward_hook(lambda _m, _i, out: kept.update({name: out.clone()}))

    handles = [keep(name) for name in names]
    try:
        for batch, _ in loader:
            model(batch)
            yield [kept[name] for name in names]
    finally:
        for handle in handles:
            handle.remove()


def resnet18(names: Sequence[str], options: argparse.Namespace) -> Problem:
    torch.manual_seed(0)
    model = ll.build_model("resnet18-cifar")
    images, batch_size = (48, 16) if options.smoke else (1024, 128)
    noise = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return model_problem(model, noise, names, batch_size)


def resnet18_8(options: argparse.Namespace) -> Problem:
    return resnet18([f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)], options)


def resnet18_20(options: argparse.Namespace) -> Problem:
    blocks = [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
    inner = [name for block in blocks for name in (f"{block}.conv1", block)]
    return resnet18(["conv1", "bn1", *inner, "avgpool", "fc"], options)


def resnet56_27(options: argparse.Namespace) -> Problem:
    from layerlens.training.network import load_network

    data = ll.load_data(f"npz:{options.cifar},normalize=imagenet")
    weights = SHARED / "weights" / "akamaster_cifar10_resnet56.pt"
    model, _ = load_network(weights, model="resnet56-cifar", dataset=data)
    count, batch_size = (40, 16) if options.smoke else (options.images, 128)
    images = data.normalize(data.split("test")[0][:count])
    names = [f"layer{stage}.{block}" for stage in range(1, 4) for block in range(9)]
    return model_problem(model, images, names, batch_size)


def pooled_states(options: argparse.Namespace) -> Rows:
    """A random walk over the layers, each feature about a mean of its own, as in a transformer."""
    layers, rows, width = (5, 200, 16) if options.smoke else (13, 1500, 768)
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(layers, rows, width, generator=generator)
    states += torch.randn(layers, 1, width, generator=generator)
    return list(states.cumsum_(0).unbind())


def encoder_pooled(options: argparse.Namespace) -> Problem:
    features, rows = pooled_states(options), 64 if options.smoke else 128

    def gram_products() -> None:
        for _ in stacked_grams(features, rows):
            pass

    return Problem(
        takes="batches", size=f"{sizes(features)}, batches of {rows}", arguments=(features, rows),
        reference=gram_products,
        define=batch_definition(lambda: zip(*(f.split(rows) for f in features), strict=True)),
    )  # fmt: skip


def whole_problem(features: Rows) -> Problem:
    arrays = [f.numpy() for f in features]

    def gram_products() -> None:
        grams = np.stack([(a @ a.T).ravel() for a in arrays]).astype(np.float64)
        grams @ grams.T

    @cache
    def define(estimator: str) -> Matrix:
        return ratio_of(hsic_products(features, unbiased=estimator == "debiased"))

    return Problem(
        takes="whole", size=sizes(features), arguments=(features,), reference=gram_products, define=define, threads=1
    )


def sizes(features: Rows) -> str:
    widths = [f.shape[1] for f in features]
    return f"{len(features)} layers, {len(features[0])} rows of {min(widths)} to {max(widths)} features"


def whole_resnet18(options: argparse.Namespace) -> Problem:
    rows, shrink = (64, 64) if options.smoke else (1024, 1)
    widths = [65536] * 3 + [32768] * 2 + [16384] * 2 + [8192] * 2 + [512]
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(rows, 32, generator=generator)
    mixed = [latent @ torch.randn(32, max(w // shrink, 8), generator=generator) for w in widths]
    return whole_problem([(m + torch.randn(m.shape, generator=generator)).relu_() for m in mixed])


def whole_pooled(options: argparse.Namespace) -> Problem:
    return whole_problem(pooled_states(options))


def uniformity(rows: int) -> Callable[[argparse.Namespace], Problem]:
    def build(options: argparse.Namespace) -> Problem:
        x = torch.randn(rows // 32 if options.smoke else rows, 128, generator=torch.Generator().manual_seed(4))

        def products() -> None:
            for start in range(0, len(x), 1024):
                x[start : start + 1024] @ x[start:].T

        return Problem(
            takes="sphere", size=f"{len(x)} × 128", arguments=(x,), reference=products,
            define=lambda _: uniformity64(x),
        )  # fmt: skip

    return build


CASES: dict[str, Callable[[argparse.Namespace], Problem]] = {
    "resnet18-8": resnet18_8,
    "resnet18-20": resnet18_20,
    "encoder-pooled": encoder_pooled,
    "resnet56-27": resnet56_27,
    "whole-resnet18": whole_resnet18,
    "whole-pooled": whole_pooled,
    "uniformity": uniformity(50_000),
    "uniformity-16k": uniformity(16_384),
}


# --- Measuring ------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def call(tool: Tool, problem: Problem) -> Any:
    """Run a tool without its progress bars and warnings."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return tool.run(*problem.arguments)


def first_run(tool: Tool, problem: Problem) -> dict[str, Any]:
    """The warm-up: is the answer right, and what is left behind?"""
    row: dict[str, Any] = {"tool": tool.name, "estimator": tool.estimator, "notes": [tool.notes] if tool.notes else []}
    truth = torch.as_tensor(problem.define(tool.estimator), dtype=torch.float64)
    start = time.perf_counter()
    try:
        answer = torch.as_tensor(call(tool, problem), dtype=torch.float64)
        row["first_s"] = time.perf_counter() - start
        difference = (answer - truth).abs()
        row["nan_entries"] = int(difference.isnan().sum())
        row["error"] = float(difference.nan_to_num(0.0).max())
    except Exception as error:  # whatever a peer raises becomes its row
        row["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:110] if str(error) else ''}"
        row["notes"].append(row["failed"])
    if left := strip_hooks(problem):
        row["notes"].append(f"leaves {left} hooks on the model")
    if row.get("nan_entries"):
        row["notes"].append(f"{row['nan_entries']} entries are NaN")
    return row


def strip_hooks(problem: Problem) -> int:
    """Remove the hooks that a tool left on the model, and count them."""
    modules = [m for a in problem.arguments if isinstance(a, nn.Module) for m in a.modules()]
    left = sum(len(m._forward_hooks) for m in modules)
    for module in modules:
        module._forward_hooks.clear()
    return left


def measure(problem: Problem, chosen: Sequence[Tool], options: argparse.Namespace) -> dict[str, Any]:
    """Warm up, then time the reference and each tool in turn; too slow a tool keeps the time of its first run."""
    threads = problem.threads or options.threads
    torch.set_num_threads(threads)
    with threadpool_limits(threads):
        problem.reference()
        rows = [first_run(tool, problem) for tool in chosen]
        timed = [(t, r) for t, r in zip(chosen, rows, strict=True) if r.get("first_s", math.inf) <= options.patience]
        reference, times = [], {id(row): [] for _, row in timed}
        for _ in range(options.repeats):
            reference.append(seconds(problem.reference))
            for tool, row in timed:
                times[id(row)].append(seconds(lambda tool=tool: call(tool, problem)))
                strip_hooks(problem)
    for row in rows:
        if "failed" not in row:
            add_times(row, times.get(id(row)), reference)
    return {"size": problem.size, "threads": threads, "reference_s": [round(s, 4) for s in reference], "rows": rows}


def add_times(row: dict[str, Any], measured: list[float] | None, reference: list[float]) -> None:
    if measured is None:
        row["notes"].append("slow: timed once, without a warm-up")
    first = row.pop("first_s")
    held = measured or [first] * len(reference)
    ratios = [a / b for a, b in zip(held, reference, strict=True)]
    row["time_s"] = [round(s, 4) for s in measured or [first]]
    row["ratio_median"], row["ratio_range"] = round(median(ratios), 3), [round(min(ratios), 3), round(max(ratios), 3)]


def peak_mib() -> float:
    status = Path("/proc/self/status").read_text().splitlines()  # getrusage would count the parent's peak before exec
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def report_peak(case: str, tool: Tool, options: argparse.Namespace) -> None:
    """In a process of its own: the peak after the tool has run, or with `--idle` without it."""
    tiny = argparse.Namespace(**{**vars(options), "smoke": True})
    call(tool, CASES[case](tiny))  # so that what it imports late does not count
    problem = CASES[case](options)
    threads = problem.threads or options.threads
    torch.set_num_threads(threads)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the data
    with threadpool_limits(threads):
        if problem.takes == "model":
            problem.reference()
        if not options.idle:
            call(tool, problem)
    print(peak_mib())


def memory_above_baseline(case: str, tool: Tool, options: argparse.Namespace) -> float | None:
    words = [sys.executable, "-W", "ignore", __file__, "--cases", case, "--peak", f"{tool.takes}:{tool.name}"]
    words += ["--threads", str(options.threads), "--images", str(options.images), "--cifar", str(options.cifar)]
    words += ["--smoke"] if options.smoke else []
    runs = [subprocess.run([*words, *more], capture_output=True, text=True) for more in ([], ["--idle"])]
    if any(run.returncode for run in runs):
        return None
    used, idle = (float(run.stdout.split()[-1]) for run in runs)
    return round(used - idle, 1)


# --- What comes out -------------------------------------------------------------------------------------------------


def importable(every: Sequence[Tool]) -> list[Tool]:
    """The tools whose module can be imported; the others are named on stderr."""
    reasons: dict[str, str] = {}
    for module in {tool.module: None for tool in every}:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(module)
        except Exception as error:  # an import may fail in any way
            reasons[module] = str(error)
            print(f"left out: {module} ({error})", file=sys.stderr)
    return [tool for tool in every if tool.module not in reasons]


def environment(chosen: Sequence[Tool]) -> dict[str, Any]:
    facts = provenance()
    facts["versions"].update({tool.package: metadata.version(tool.package) for tool in chosen})
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {**facts, "processor": names[0] if names else "unknown", "cores": os.cpu_count()}


def table(measured: dict[str, dict[str, Any]]) -> str:
    head = ["case", "tool", "estimator", "time s", "× reference", "peak MiB above", "error", "notes"]
    lines = [head, ["---"] * len(head)]
    for case, result in measured.items():
        lines.append([case, "reference", "", f"{median(result['reference_s']):.3f}", "1", "", "", result["size"]])
        lines += [[case, *cells(row)] for row in result["rows"]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cells(row: dict[str, Any]) -> list[str]:
    named = [row["tool"], row["estimator"]]
    notes = "; ".join(row["notes"])
    if "failed" in row:
        return [*named, "failed", "", "", "", notes]
    low, high = row["ratio_range"]
    memory = "" if row.get("peak_mib") is None else f"{row['peak_mib']:.0f}"
    time_s, ratio = f"{median(row['time_s']):.3f}", f"{row['ratio_median']:.2f} ({low:.2f} to {high:.2f})"
    return [*named, time_s, ratio, memory, f"{row['error']:.1e}", notes]


def save(measured: dict[str, dict[str, Any]], chosen: Sequence[Tool], out: Path) -> None:
    """Lay the cases over what the file holds already; each carries the environment that it was measured in."""
    held = json.loads(out.read_text()) if out.exists() else {}
    facts = environment(chosen)
    held.update({case: {**result, "environment": facts} for case, result in measured.items()})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(held, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def run_case(case: str, chosen: Sequence[Tool], options: argparse.Namespace) -> dict[str, Any]:
    print(f"{case} …", file=sys.stderr)
    problem = CASES[case](options)
    fitting = [tool for tool in chosen if tool.takes == problem.takes]
    result = measure(problem, fitting, options)
    del problem
    for tool, row in zip(fitting, result["rows"], strict=True):
        if "failed" not in row and not options.no_memory:
            row["peak_mib"] = memory_above_baseline(case, tool, options)
            if row["peak_mib"] is None:
                row["notes"].append("the process for its memory failed")
    return result


def unpack_into(options: argparse.Namespace, folder: str) -> bool:
    """CIFAR-10's test images as an npz file, named in the options; False where the shared data are missing."""
    if not SHARED.is_dir():
        return False
    options.cifar = Path(folder) / "cifar10.npz"
    words = [sys.executable, "-W", "ignore", str(SHARED / "unpack_images.py"), str(SHARED / "cifar10_full_webp.npz")]
    subprocess.run([*words, str(options.cifar), "--train-per-class", "20"], check=True, capture_output=True)
    return True


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--tools", nargs="+", help="only tools whose names begin so")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of all cases but the whole-set ones, which use 1")
    parser.add_argument("--images", type=int, default=1024, help="of resnet56-27, at most 10,000")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds; a slower tool is timed once")
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that measure memory")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; saved only if --out is given")
    parser.add_argument("--out", type=Path)
    for internal in ("--peak", "--cifar"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--idle", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.peak:
        tool = next(tool for tool in tools() if f"{tool.takes}:{tool.name}" == options.peak)
        report_peak(options.cases[0], tool, options)
        return
    chosen = [t for t in importable(tools()) if not options.tools or t.name.startswith(tuple(options.tools))]
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        if "resnet56-27" in options.cases and not unpack_into(options, folder):
            print("resnet56-27 skipped: no real data beside the repository", file=sys.stderr)
            options.cases.remove("resnet56-27")
        for case in options.cases:
            measured[case] = run_case(case, chosen, options)
    print(table(measured))
    print("\n" + "\n".join(f"{name}: {meaning}" for name, meaning in ESTIMATORS.items()))
    if out := options.out or (None if options.smoke else RESULTS):
        save(measured, chosen, out)


if __name__ == "__main__":
    main()
