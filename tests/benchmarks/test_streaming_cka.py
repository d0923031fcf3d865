"""What the similarity of all block outputs costs beside a plain forward loop; `make benchmark` runs it.

ResNet18-CIFAR (width 64), 11 block-level outputs, 1,024 images of 3×32×32, batches of 128. The images are noise: time
and memory do not depend on them. Both sides are warmed up and timed in turn in one process; the memory of each
setting is the peak of a process of its own.
"""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from layerlens import build_model, cka_matrix
from layerlens.provenance import provenance

pytestmark = pytest.mark.benchmark
RESULTS = Path(__file__).parent / "results" / "streaming_cka.json"
REPEATS = 7
MEMORY = """
import sys, torch
from pathlib import Path
from layerlens import build_model, cka_matrix
images, similarity = int(sys.argv[1]), sys.argv[2] == "cka"
torch.manual_seed(0)
model = build_model("resnet18-cifar").eval()
loader = (torch.randn(128, 3, 32, 32) for _ in range(images // 128))
if similarity:
    cka_matrix(model, loader, "blocks")
else:
    with torch.no_grad():
        for batch in loader:
            model(batch)
lines = Path("/proc/self/status").read_text().splitlines()  # getrusage would count the parent's peak before exec
print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024)
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """All threads: what is measured is what users see."""


def record(**numbers: object) -> None:
    """Lay the numbers over what the file holds already."""
    held = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    facts = {**provenance(), "processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**held, **numbers, "environment": facts}, indent=1) + "\n")


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def test_similarity_of_all_blocks_costs_at_most_a_tenth_of_the_forward_pass():
    torch.manual_seed(0)
    model = build_model("resnet18-cifar").eval()
    batches = torch.randn(1024, 3, 32, 32).split(128)

    def forward():
        with torch.no_grad():
            for batch in batches:
                model(batch)

    def similarity():
        cka_matrix(model, batches, "blocks")

    forward(), similarity()
    pairs = [(seconds(forward), seconds(similarity)) for _ in range(REPEATS)]
    ratios = np.array([b / a for a, b in pairs])
    record(
        time={
            "forward_s": [round(a, 3) for a, _ in pairs],
            "similarity_s": [round(b, 3) for _, b in pairs],
            "ratio_median": round(float(np.median(ratios)), 3),
            "ratio_range": [round(float(ratios.min()), 3), round(float(ratios.max()), 3)],
        }
    )
    print(f"\nsimilarity / forward: {np.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f})")
    assert np.median(ratios) <= 1.10


def test_peak_memory_does_not_grow_with_the_number_of_samples():
    def peak(images: int, kind: str) -> float:
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(images), kind], capture_output=True, text=True, check=True
        )
        return float(done.stdout)

    above = {images: round(peak(images, "cka") - peak(images, "forward"), 1) for images in (512, 1024, 2048)}
    record(peak_memory_above_forward_mib=above)
    print(f"\npeak memory above the forward pass (MiB) by images: {above}")
    assert abs(above[2048] - above[512]) < 64  # allocator noise; the captured activations of 1,536 images are 1.8 GiB
