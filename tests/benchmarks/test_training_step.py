"""What a training step costs beyond its network; `make benchmark` runs it. `training.py` is the whole comparison."""

import pytest
import torch
from training import MOST, Tool, host_syncs, makers, noise_images, parse, ratios, two_sided_nt_xent, views_per_second

from layerlens.training.objectives.simclr import nt_xent

pytestmark = pytest.mark.benchmark
REPEATS = 9


def small_tools(device: str, *names: str) -> dict[str, Tool]:
    words = ["--device", device, "--batch", "128", "--images", "2000", "--tools", *names]
    options = parse(words)
    options.at_width = 16
    tools = {name: make() for name, make in makers(options, noise_images(options.images)).items()}
    for tool in tools.values():
        views_per_second(tool, 2, device)
    return tools


def test_deep_augmentation_at_layer4_costs_at_most_a_fiftieth():
    tools = small_tools("cpu", "b", "b2")
    speeds = {name: [] for name in tools}
    for repeat in range(REPEATS):
        for name in list(tools)[:: -1 if repeat % 2 else 1]:
            speeds[name].append(views_per_second(tools[name], 2, "cpu"))
    found = ratios(speeds)
    print(f"\n{found}")
    for name in ("cost b2 / b", "cost b2-stop / b"):
        assert found[name]["interval"][0] <= MOST  # fails if the cost is above, beyond what other work could explain


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_waits_for_the_device():
    assert host_syncs(small_tools("cuda", "b")["b"]) == "none"


def test_the_formula_that_stands_for_lightly_is_the_same_loss():
    first, second = torch.randn(2, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = nt_xent(torch.cat([first, second]), temperature=0.5)
    torch.testing.assert_close(two_sided_nt_xent(first, second, temperature=0.5), ours)
