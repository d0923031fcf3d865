"""The linear probes, and that an evaluation leaves the backbone bit-identical."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from layerlens.data import Dataset, dataset_from_arrays
from layerlens.errors import ConfigError, NonFiniteError, ShapeError
from layerlens.evaluation.probe import PROTOCOLS, linear_probe, probe_accuracy
from layerlens.models import build_model
from layerlens.pipeline import evaluate


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


# --- the probe by SGD --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels in [0, 1], 1,297 for training and 500 for the test."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels)
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[shuffled[:1297]], y[shuffled[:1297]], x[shuffled[1297:]], y[shuffled[1297:]]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_tells_separable_classes_apart(protocol):
    assert linear_probe(*blobs(90, 40, 0), *blobs(60, 40, 1), **PROTOCOLS[protocol]) == 1.0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_agrees_with_logistic_regression_on_digits(digits, protocol):
    assert linear_probe(*digits, **PROTOCOLS[protocol]) == pytest.approx(probe_accuracy(*digits), abs=0.02)


def test_the_defaults_are_the_papers():
    parameters = inspect.signature(linear_probe).parameters
    assert all(parameters[name].default == value for name, value in PROTOCOLS["deep-augmentation"].items())
    assert all(set(protocol) < set(parameters) for protocol in PROTOCOLS.values())


def reference(train, train_labels, test, labels, *, seed, **settings) -> float:
    """The same recipe by torch's own layer, loss, optimiser and schedule."""
    classifier = nn.Linear(train.shape[1], int(train_labels.max()) + 1)
    for parameter in classifier.parameters():
        nn.init.zeros_(parameter)
    names = {"learning_rate": "lr", "momentum": "momentum", "weight_decay": "weight_decay"}
    optimizer = torch.optim.SGD(classifier.parameters(), **{names[key]: settings[key] for key in names})
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, settings["milestones"], settings["decay"])
    order = torch.Generator().manual_seed(seed)
    for _ in range(settings["epochs"]):
        for rows in torch.randperm(len(train), generator=order).split(settings["batch_size"]):
            optimizer.zero_grad()
            nn.functional.cross_entropy(classifier(train[rows]), train_labels[rows]).backward()
            optimizer.step()
        schedule.step()
    return float((classifier(test).argmax(1) == labels).double().mean())


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 12, "batch_size": 64, "learning_rate": 0.5, "milestones": (3, 6, 9), "decay": 0.2},
        {"epochs": 5, "batch_size": 200, "learning_rate": 2.0, "milestones": (), "weight_decay": 0.1, "momentum": 0.0},
        {"epochs": 1, "batch_size": 4096, "learning_rate": 0.1, "milestones": (1,)},
    ],
)
def test_each_step_is_torchs_own_sgd(settings):
    """Overlapping classes and a short training: another step anywhere moves the accuracy."""
    case = (*blobs(450, 1, 0), *blobs(3000, 1, 1))
    settings = {"momentum": 0.9, "weight_decay": 0.0, "decay": 0.5, **settings}
    assert linear_probe(*case, seed=3, **settings) == pytest.approx(reference(*case, seed=3, **settings), abs=1e-3)


def test_the_seed_alone_decides():
    case = (*blobs(90, 1, 0), *blobs(3000, 1, 1))
    quick = {"epochs": 2, "batch_size": 8}
    first = linear_probe(*case, **quick, seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        before = torch.get_rng_state()
        assert linear_probe(*case, **quick, seed=1) == first
        assert torch.equal(torch.get_rng_state(), before)
    assert {linear_probe(*case, **quick, seed=seed) for seed in range(2, 6)} != {first}


def test_features_and_labels_are_left_as_they_were():
    case = (*blobs(60, 1, 0), *blobs(60, 1, 1))
    copies = [tensor.clone() for tensor in case]
    linear_probe(*case, epochs=2)
    assert all(torch.equal(one, other) for one, other in zip(case, copies, strict=True))


def test_class_numbers_need_not_be_consecutive():
    train, labels = blobs(90, 40, 0)
    test, truth = blobs(60, 40, 1)
    names = torch.tensor([7, 2, 100])
    assert linear_probe(train, names[labels], test, names[truth]) == 1.0


def test_a_class_without_training_samples_counts_as_wrong():
    train, labels = blobs(90, 40, 0)
    test, truth = blobs(60, 40, 1)
    known = labels != 1
    assert linear_probe(train[known], labels[known], test, truth) == pytest.approx(2 / 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision_of_features_will_do(dtype):
    train, labels = blobs(90, 40, 0)
    test, truth = blobs(60, 40, 1)
    assert linear_probe(train.to(dtype), labels, test.to(dtype), truth) == 1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("batch_size", 0), ("learning_rate", 0.0), ("learning_rate", float("inf")), ("momentum", 1.0),
     ("momentum", -0.1), ("weight_decay", -1.0), ("decay", 0.0), ("decay", 1.5), ("learning_rate", float("nan"))],
)  # fmt: skip
def test_settings_outside_their_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"{name}={value}; allowed"):
        linear_probe(*blobs(9, 1, 0), *blobs(9, 1, 1), **{name: value})


def test_one_class_is_refused_by_sgd_too():
    with pytest.raises(ConfigError, match="at least two classes"):
        linear_probe(torch.ones(4, 2), torch.zeros(4).long(), torch.ones(2, 2), torch.zeros(2).long())


@pytest.mark.parametrize(
    ("rows", "labels", "test", "truth"),
    [((4, 2), 3, (2, 2), 2), ((4, 2), 4, (2, 3), 2), ((4, 2), 4, (2, 2), 3), ((4, 2, 1), 4, (2, 2, 1), 2),
     ((0, 2), 0, (2, 2), 2), ((4, 2), 4, (0, 2), 0)],
)  # fmt: skip
def test_features_and_labels_that_do_not_fit_are_refused(rows, labels, test, truth):
    with pytest.raises(ShapeError, match="do not fit"):
        linear_probe(torch.ones(rows), torch.arange(labels), torch.ones(test), torch.arange(truth))


@pytest.mark.parametrize("side", [0, 2])
def test_features_that_are_not_finite_are_refused(side):
    case = [*blobs(9, 1, 0), *blobs(9, 1, 1)]
    case[side][3, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or infinity in the features"):
        linear_probe(*case)


def test_a_training_that_diverges_says_what_to_try():
    with pytest.raises(NonFiniteError, match=r"diverged at learning_rate=30.0, weight_decay=1.0; try a smaller"):
        linear_probe(*blobs(90, 1, 0), *blobs(9, 1, 1), learning_rate=30.0, weight_decay=1.0, milestones=())
