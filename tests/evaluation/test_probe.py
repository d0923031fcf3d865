"""The linear probe, and that an evaluation leaves the backbone bit-identical."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from layerlens.data import Dataset, dataset_from_arrays
from layerlens.errors import ConfigError
from layerlens.evaluation.probe import probe_accuracy
from layerlens.models import build_model
from layerlens.pipeline import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


def blobs(n: int, gap: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    return torch.randn(n, 4, generator=generator) + gap * torch.eye(3, 4)[labels], labels


def tiny_data() -> Dataset:
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 3
    images = (rng.random((48, 1, 8, 8)) * 100 + labels[:, None, None, None] * 70).astype(np.uint8)
    return dataset_from_arrays("tiny", images[:36], labels[:36], images[36:], labels[36:])


def test_separable_classes_are_told_apart():
    assert probe_accuracy(*blobs(90, 40, 0), *blobs(60, 40, 1)) == 1.0


def test_labels_without_relation_to_the_features_are_guessed():
    train, labels = blobs(300, 0, 0)
    test, truth = blobs(300, 0, 1)
    assert probe_accuracy(train, labels, test, truth) == pytest.approx(1 / 3, abs=0.1)


def test_the_probe_is_deterministic_whatever_the_global_state():
    case = (*blobs(60, 1, 0), *blobs(60, 1, 1))
    first = probe_accuracy(*case)
    assert 0.4 < first < 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        assert probe_accuracy(*case) == first


def test_the_probe_ignores_scale_and_offset_of_each_feature():
    train, labels = blobs(60, 1, 0)
    test, truth = blobs(60, 1, 1)
    scale, offset = torch.tensor([1e3, 1.0, 1e-3, 7.0]), torch.tensor([0.0, 50.0, 0.0, -5.0])
    assert probe_accuracy(train, labels, test, truth) == probe_accuracy(
        train * scale + offset, labels, test * scale + offset, truth
    )


def test_c_weakens_the_penalty():
    """Nearly no freedom: the probe falls back on the more frequent class."""
    train = torch.tensor([[1.0], [1.1], [-1.0], [-1.1], [-0.9]])
    labels, test, truth = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1])
    assert probe_accuracy(train, labels, test, truth) == 1.0
    assert probe_accuracy(train, labels, test, truth, c=1e-2) == 0.5


def test_a_feature_that_never_changes_does_no_harm():
    train, labels = blobs(90, 40, 0)
    test, truth = blobs(60, 40, 1)
    train[:, 3], test[:, 3] = 5.0, 5.0
    assert probe_accuracy(train, labels, test, truth) == 1.0


def test_one_class_is_refused():
    with pytest.raises(ConfigError, match="at least two classes"):
        probe_accuracy(torch.ones(4, 2), torch.zeros(4).long(), torch.ones(2, 2), torch.zeros(2).long())


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_leaves_the_backbone_bit_identical(training: bool):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_model("resnet20-cifar", input_shape=(1, 8, 8)).train(training)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    scores = evaluate(network, tiny_data(), k=5)
    assert set(scores) == {"knn", "knn10", "probe"}
    assert all(0 <= score <= 1 for score in scores.values())
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert network.training is training
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert evaluate(network, tiny_data(), k=5) == scores
