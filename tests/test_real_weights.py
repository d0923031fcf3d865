"""The pre-trained CIFAR-10 ResNets under shared/data: accuracy first, then the whole path on all their blocks."""

import subprocess
import sys

import pytest

from layerlens.data import load_data
from layerlens.pipeline import Settings, analyze_checkpoint
from layerlens.recommendation import recommend
from layerlens.training.network import load_network

TOP1 = {20: 0.9173, 32: 0.9263}  # published errors 8.27 % and 7.37 %
CHOICES = {
    20: [
        ("layer3.2", True),
        ("linear", False),
        ("layer1.2", True),
        ("layer3.1", False),
        ("relu", True),
        ("layer1.1", False),
    ],
    32: [("layer3.3", True), ("linear", False), ("layer1.1", True), ("layer3.2", False)],
}


@pytest.fixture(scope="module")
def cifar10(shared_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("cifar") / "cifar10.npz"
    words = [sys.executable, "-W", "ignore", str(shared_data / "unpack_images.py")]
    words += [str(shared_data / "cifar10_full_webp.npz"), str(path), "--train-per-class", "20"]
    subprocess.run(words, check=True, capture_output=True)
    return load_data(f"npz:{path},normalize=imagenet")


@pytest.mark.slow
@pytest.mark.parametrize("depth", TOP1)
def test_the_weights_reach_their_published_accuracy(depth, shared_data, cifar10):
    from layerlens.evaluation.classifier import classifier_accuracy

    weights = shared_data / "weights" / f"akamaster_cifar10_resnet{depth}.pt"
    network, _ = load_network(weights, model=f"resnet{depth}-cifar", dataset=cifar10)
    assert classifier_accuracy(network, cifar10.in_order("test"), cifar10.y_test) == pytest.approx(
        TOP1[depth], abs=5e-4
    )


@pytest.mark.parametrize("depth", CHOICES)
def test_the_recommendation_is_the_measured_one(depth, shared_data, cifar10):
    weights = shared_data / "weights" / f"akamaster_cifar10_resnet{depth}.pt"
    found, twin = analyze_checkpoint(
        weights, cifar10, model=f"resnet{depth}-cifar", settings=Settings(layers="blocks", samples=1000)
    )
    advice = recommend(found.cka, twin.cka, geometry=found.geometry)
    assert [(t.layer, t.stop_gradient) for t in advice.targets] == CHOICES[depth]
    assert min(t.confidence for t in advice.targets) > 0.95
    assert [c.code for c in advice.cautions] == ["LL008"]
