"""How often the 95 % intervals hold the population value: `python tests/benchmarks/interval_coverage.py`.

Two layers are linear images of Gaussian (or heavy-tailed, elliptical) factors, so that the population values are
known: CKA = ‖Σxy‖² / (‖Σxx‖ ‖Σyy‖), canonical correlations and Procrustes from the covariances; others are taken from a
sample of 20,000. Each case is drawn anew 1,000 times. Adaptive stopping is checked the same way: the interval is
the one at which `tolerance` stopped. Takes about half an hour on one core.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch

from layerlens.analysis.cka import StreamingCKA
from layerlens.analysis.measures import MEASURES
from layerlens.analysis.pairs import PairAccumulator
from layerlens.analysis.whole_set import WholeSetCKA
from layerlens.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "interval_coverage.json"
FACTORS = 8


def images(shared: float, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps of 24 factors to two layers that have a share of their factors in common."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(4, FACTORS, width, generator=generator)
    a, b = torch.zeros(3 * FACTORS, width), torch.zeros(3 * FACTORS, width)
    a[:FACTORS], b[:FACTORS] = shared**0.5 * maps[0], shared**0.5 * maps[1]
    a[FACTORS : 2 * FACTORS], b[2 * FACTORS :] = (1 - shared) ** 0.5 * maps[2], (1 - shared) ** 0.5 * maps[3]
    return a, b


def factors(count: int, tails: str, generator: torch.Generator) -> torch.Tensor:
    """Independent factors of variance one; heavy tails have six degrees of freedom."""
    z = torch.randn(count, 3 * FACTORS, generator=generator)
    if tails == "gauss":
        return z
    chi = torch.randn(count, 6, generator=generator).square().sum(1, keepdim=True)
    return z * (4 / chi).sqrt()


def population(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm()))


def covered(low: float, high: float, truth: float) -> bool:
    return bool(low <= truth <= high)


def cka_case(shared: float, width: int, samples: int, batch: int, tails: str, repeats: int) -> dict:
    """Coverage of minibatch and debiased CKA."""
    a, b = images(shared, width)
    truth, generator = population(a, b), torch.Generator().manual_seed(1)
    hits, widths = np.zeros(2), []
    for _ in range(repeats):
        z = factors(samples, tails, generator)
        x, y = z @ a, z @ b
        stream, whole = StreamingCKA(["x", "y"]), WholeSetCKA(["x", "y"])
        for rows in zip(x.split(batch), y.split(batch), strict=True):
            stream.update(rows)
        whole.update([x, y])
        found = [state.compute() for state in (stream, whole)]
        hits += [covered(m.low[0, 1], m.high[0, 1], truth) for m in found]
        widths.append(found[0].high[0, 1] - found[0].low[0, 1])
    return {
        "population": round(truth, 4), "minibatch": hits[0] / repeats, "debiased": hits[1] / repeats,
        "width": round(float(np.mean(widths)), 4),
    }  # fmt: skip


def stopping_case(shared: float, width: int, batch: int, tolerance: float, repeats: int, most: int = 400) -> dict:
    """Coverage of the interval at which `tolerance` stops, and the samples that it took."""
    a, b = images(shared, width)
    truth, generator = population(a, b), torch.Generator().manual_seed(1)
    hits, samples = 0, []
    for _ in range(repeats):
        state, found = StreamingCKA(["x", "y"]), None
        for number in range(1, most + 1):
            z = factors(batch, "gauss", generator)
            state.update([z @ a, z @ b])
            if number >= 4:
                found = state.compute()
                if max(found.high[0, 1] - found.values[0, 1], found.values[0, 1] - found.low[0, 1]) <= tolerance:
                    break
        hits += covered(found.low[0, 1], found.high[0, 1], truth)
        samples.append(found.samples)
    return {"population": round(truth, 4), "coverage": hits / repeats, "samples": int(np.median(samples))}


def measure_case(name: str, width: int, samples: int, repeats: int) -> dict:
    """Coverage of another measure's jackknife interval."""
    a, b = images(0.6, width)
    generator = torch.Generator().manual_seed(1)
    truth = true_value(name, a, b, samples, generator)
    hits = 0
    for _ in range(repeats):
        found = of_measure(name, factors(samples, "gauss", generator), a, b, groups=10)
        hits += covered(found.low[0, 1], found.high[0, 1], truth)
    return {"population": round(truth, 4), "coverage": hits / repeats}


def of_measure(name: str, z: torch.Tensor, a: torch.Tensor, b: torch.Tensor, groups: int):
    state = PairAccumulator(["x", "y"], MEASURES[name], MEASURES[name].options, groups=groups)
    state.take(0, z @ a)
    state.take(1, z @ b)
    state.end_batch()
    return state.compute()


def true_value(name: str, a: torch.Tensor, b: torch.Tensor, samples: int, generator: torch.Generator) -> float:
    """From the covariances where they tell it; else the mean over many samples.

    Mutual k-NN depends on the number of samples: its value is the expectation at that number.
    """
    if name in ("mean_cca", "procrustes", "procrustes_squared"):
        a64, b64 = a.double(), b.double()
        xx, yy, xy = a64.T @ a64, b64.T @ b64, a64.T @ b64
        if name == "mean_cca":
            roots = [torch.linalg.inv(torch.linalg.cholesky(m)) for m in (xx, yy)]
            return float(torch.linalg.svdvals(roots[0] @ xy @ roots[1].T).mean())
        cosine = float(torch.linalg.svdvals(xy).sum() / (xx.trace() * yy.trace()).sqrt())
        return 2 - 2 * cosine if name == "procrustes_squared" else math.acos(cosine)
    if name == "mutual_knn":
        return float(
            np.mean([of_measure(name, factors(samples, "gauss", generator), a, b, 0).values[0, 1] for _ in range(400)])
        )
    large = 4000 if name.startswith("rsa") else 20_000
    draws = 20 if name.startswith("rsa") else 4
    return float(
        np.mean([of_measure(name, factors(large, "gauss", generator), a, b, 0).values[0, 1] for _ in range(draws)])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    begun, table = time.perf_counter(), {"cka": [], "stopping": [], "measures": []}
    for shared in (0.0, 0.3, 0.7, 0.95):
        for width in (20, 200):
            for samples, batch in ((256, 32), (512, 128), (1000, 100)):
                for tails in ("gauss", "heavy"):
                    case = {"shared": shared, "width": width, "samples": samples, "batch": batch, "tails": tails}
                    show(table["cka"], {**case, **cka_case(repeats=given.repeats, **case)})
    for shared in (0.0, 0.3, 0.7, 0.95):
        for tolerance in (0.05, 0.02):
            case = {"shared": shared, "width": 50, "batch": 64, "tolerance": tolerance}
            show(table["stopping"], {**case, **stopping_case(repeats=given.repeats, **case)})
    for name, measure in MEASURES.items():
        if measure.over == "pairs" and name != "cka":
            case = {"name": name, "width": 6, "samples": 400}
            show(table["measures"], {**case, **measure_case(repeats=given.repeats, **case)})
    facts = {**provenance(), "cores": os.cpu_count(), "wall_s": round(time.perf_counter() - begun)}
    given.out.write_text(json.dumps({"repeats": given.repeats, **table, "environment": facts}, indent=1) + "\n")


def show(rows: list, row: dict) -> None:
    rows.append(row)
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
