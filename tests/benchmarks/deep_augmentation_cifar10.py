"""Does augmenting at the recommended layer help? SimCLR on 10,000 CIFAR-10 images, then on with Deep Augmentation.

    python tests/benchmarks/deep_augmentation_cifar10.py DATA.npz RUNS --epochs 100 --more 5 --workers 2

DATA.npz: `unpack_images.py cifar10_full_webp.npz DATA.npz --train-per-class 1000 --test-per-class 200`.
Trains SimCLR (seed 0) for `--epochs`, recommends from its last checkpoint, then continues from that checkpoint for
`--more` epochs in each arm, three seeds each: plain SimCLR (the baseline), the first recommended layer, and two other
layers with the same operator. Scores test k-NN (k = 200) of the last checkpoint, never of a chosen one. Finished runs
are not trained again. Writes tests/benchmarks/results/deep_augmentation_cifar10.json and its figure.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from scipy import stats

from layerlens.analysis.regions import RegionSet
from layerlens.data import load_data
from layerlens.figures import heatmaps, save_figure
from layerlens.pipeline import Settings, analyze_checkpoint, evaluate
from layerlens.provenance import provenance
from layerlens.recommendation import Recommendation, recommend
from layerlens.training.network import load_network

HERE = Path(__file__).parent
MODEL = "resnet18-cifar,width=16"
SEEDS = (0, 1, 2)


def command(data: str, out: Path, epochs: int, seed: int, *more: str) -> Path:
    """Train in a process of its own, on one thread; return the last checkpoint."""
    words = ["train", "--objective", "simclr", "--model", MODEL, "--data", data, "--epochs", str(epochs)]
    words += ["--batch-size", "256", "--seed", str(seed), "--device", "cpu", "--out", str(out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "layerlens.cli", *words], check=True, env=environment)
    return max(out.glob("checkpoints/epoch-*.safetensors"))


def arms(advice: Recommendation, layers: tuple[str, ...]) -> dict[str, list[str]]:
    """Options of each arm: none, the first choice, and two layers that were not recommended, early and middle."""
    chosen = advice.targets[0] if advice.targets else None
    layer, stop = (chosen.layer, chosen.stop_gradient) if chosen else ("layer4", True)
    targets = {t.layer for t in advice.targets}
    others = [name for name in layers[:-1] if name not in targets and name != layer]
    flag = "--stop-gradient" if stop else "--no-stop-gradient"
    made = {"SimCLR on": []}
    for name in (layer, others[0], others[len(others) // 2]):
        made[f"{name}, {'stop' if stop else 'no stop'}"] = ["--augment-layer", name, flag]
    return made


def interval(scores: list[float]) -> list[float]:
    """95 % Student interval of the mean over seeds."""
    reach = stats.t.ppf(0.975, len(scores) - 1) * np.std(scores, ddof=1) / len(scores) ** 0.5
    return [round(float(np.mean(scores) - reach), 4), round(float(np.mean(scores) + reach), 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("runs", type=Path)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--more", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--start", type=Path, help="an existing SimCLR checkpoint to continue from")
    options = parser.parse_args()
    data = f"npz:{options.data}"
    start = options.start or command(data, options.runs / "simclr", options.epochs, 0)
    dataset = load_data(data)
    found, twin = analyze_checkpoint(start, dataset, settings=Settings(samples=1000))
    advice = recommend(found.cka, twin.cka, geometry=found.geometry)
    print(advice, file=sys.stderr)
    jobs = {(arm, seed): words for arm, words in arms(advice, found.cka.layers).items() for seed in SEEDS}

    def work(job):
        (arm, seed), words = job
        out = options.runs / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
        last = command(data, out, options.more, seed, "--init", str(start), *words)
        return evaluate(load_network(last, dataset=dataset)[0], dataset)

    before = evaluate(load_network(start, dataset=dataset)[0], dataset)
    untrained = evaluate(load_network(start, dataset=dataset, untrained=True)[0], dataset)
    with ThreadPoolExecutor(options.workers) as pool:
        scores = dict(zip(jobs, pool.map(work, jobs.items()), strict=True))
    table = {}
    for arm in dict.fromkeys(arm for arm, _ in jobs):
        knn, probe = ([scores[arm, seed][key] for seed in SEEDS] for key in ("knn", "probe"))
        gain = [a - scores["SimCLR on", seed]["knn"] for a, seed in zip(knn, SEEDS, strict=True)]
        table[arm] = {
            "knn": knn, "knn_mean": round(float(np.mean(knn)), 4), "knn_interval": interval(knn), "probe": probe,
            "gain_over_simclr": None if arm == "SimCLR on" else interval(gain),
        }  # fmt: skip
    result = {
        "model": MODEL, "images": len(dataset.x_train), "epochs": options.epochs, "more_epochs": options.more,
        "untrained": untrained, "simclr": before, "arms": table, "recommendation": advice.to_dict(),
        "environment": provenance(),
    }  # fmt: skip
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "deep_augmentation_cifar10.json").write_text(json.dumps(result, indent=1) + "\n")
    regions: dict[str, RegionSet] = {"SimCLR": advice.regions}
    drawn = heatmaps({"untrained": twin.cka, "SimCLR": found.cka}, regions=regions, targets={"SimCLR": advice.targets})
    source = {"untrained": twin.cka, "SimCLR": found.cka, "recommendation": advice}
    save_figure(drawn, HERE.parent.parent / "figures" / "cifar10_simclr" / "similarity", source)
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
