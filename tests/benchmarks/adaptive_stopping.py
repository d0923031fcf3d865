"""How many images a similarity matrix, and the advice, really need: `python tests/benchmarks/adaptive_stopping.py`.

The pre-trained CIFAR-10 ResNets under shared/data, all blocks, test images in batches of 100 in three random orders.
`tolerance` stops once every 95 % interval reaches at most that far; `settle` once every edge of the recommended
regions recurs in 95 % of the resampled matrices, against the untrained twin on 1,000 images.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import layerlens as ll
from layerlens.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "adaptive_stopping.json"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
DEPTHS, ORDERS, BATCH, MOST = (20, 32, 56), 3, 100, 3000


def test_images(folder: str) -> ll.Dataset:
    path = Path(folder) / "cifar10.npz"
    words = [sys.executable, "-W", "ignore", str(SHARED / "unpack_images.py"), str(SHARED / "cifar10_full_webp.npz")]
    subprocess.run([*words, str(path), "--train-per-class", "20"], check=True, capture_output=True)
    return ll.load_data(f"npz:{path},normalize=imagenet")


def network(depth: int, data: ll.Dataset, *, untrained: bool = False):
    weights = SHARED / "weights" / f"akamaster_cifar10_resnet{depth}.pt"
    return ll.load_network(weights, model=f"resnet{depth}-cifar", dataset=data, untrained=untrained)[0]


def stopped(depth: int, data: ll.Dataset, **rule: object) -> dict:
    """Images at the stop, in each order, and the first recommended target where a rule about advice stopped."""
    images, advice = [], []
    for order in range(ORDERS):
        batches = data.batches("test", samples=MOST, batch_size=BATCH, seed=order)
        found = ll.similarity_matrix(network(depth, data), batches, "blocks", **rule)
        images.append(found.samples)
        target = next(iter(ll.recommend(found).targets), None)
        advice.append(None if target is None else f"{target.layer} {'stop' if target.stop_gradient else 'no stop'}")
    return {"images": images, "median": int(np.median(images)), "first_target": advice}


def main() -> None:
    if not SHARED.is_dir():
        sys.exit("no real data beside the repository")
    table: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = test_images(folder)
        for depth in DEPTHS:
            twin_batches = data.batches("test", samples=1000, batch_size=BATCH)
            twin = ll.similarity_matrix(network(depth, data, untrained=True), twin_batches, "blocks")
            rules = {
                "tolerance 0.02": {"tolerance": 0.02},
                "tolerance 0.01": {"tolerance": 0.01},
                "settle": {"settle": ll.settled(0.95, baseline=twin)},
            }
            table[f"resnet{depth}"] = {name: stopped(depth, data, **rule) for name, rule in rules.items()}
            print(f"resnet{depth}", {n: (r["median"], r["images"], r["first_target"]) for n, r in
                                     table[f"resnet{depth}"].items()}, flush=True)  # fmt: skip
    facts = {**provenance(), "cores": os.cpu_count()}
    RESULTS.write_text(json.dumps({"most": MOST, "batch": BATCH, **table, "environment": facts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
