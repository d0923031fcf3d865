"""Linear probes on frozen features: logistic regression to convergence, or SGD by a published protocol."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from layerlens.errors import ConfigError, NonFiniteError, ShapeError
from layerlens.precision import full_precision

PROTOCOLS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # arXiv:2303.14537: 100 epochs, batch 512, no decay; the rest as HobbitLong/SupContrast probes SimCLR on CIFAR.
        "deep-augmentation": {
            "epochs": 100, "batch_size": 512, "learning_rate": 1.0, "momentum": 0.9, "weight_decay": 0.0,
            "milestones": (60, 75, 90), "decay": 0.2,
        },
        # He et al. 2020, arXiv:1911.05722; the same in arXiv:2310.18850.
        "moco": {
            "epochs": 100, "batch_size": 256, "learning_rate": 30.0, "momentum": 0.9, "weight_decay": 0.0,
            "milestones": (60, 80), "decay": 0.1,
        },
    }
)  # fmt: skip
"""Settings of `linear_probe` by name."""


def probe_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, labels: Tensor, *, c: float = 1.0, solver: str = "lbfgs"
) -> float:
    """Test accuracy of a logistic regression fitted to standardised training features.

    Args:
        train, test: Features, shapes (m, d) and (n, d).
        train_labels, labels: Class indices, shapes (m,) and (n,).
        c: Inverse strength of the L2 penalty, as in scikit-learn.
        solver: scikit-learn's; `newton-cholesky` is faster where samples are many and features few.

    Returns:
        Accuracy in [0, 1]. Deterministic: to convergence or 1,000 iterations, no learning rate.

    Raises:
        ConfigError: Fewer than two classes to tell apart.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(train_labels.unique()) < 2:
        raise ConfigError("a linear probe needs at least two classes in the training labels")
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000, solver=solver))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(train.numpy(), train_labels.numpy())
    return float(probe.score(test.numpy(), labels.numpy()))


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    labels: Tensor,
    *,
    epochs: int = 100,
    batch_size: int = 512,
    learning_rate: float = 1.0,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    milestones: Sequence[int] = (60, 75, 90),
    decay: float = 0.2,
    seed: int = 0,
) -> float:
    """Test accuracy of a linear softmax classifier that SGD trained on raw features, as papers report it.

    The published recipes augment the training images; here each image has the one feature vector it is given. The
    learning rates were chosen for features of their networks' scale and suit no other: nothing is standardised. The
    weights start at zero (the problem is convex), so that the seed decides about the order of the samples alone.

    Args:
        train, test: Features, shapes (m, d) and (n, d); the work is done on the device of `train`, in float32.
        train_labels, labels: Class indices, shapes (m,) and (n,).
        epochs: Passes over the training features.
        batch_size: Samples per step; a smaller last batch counts too.
        learning_rate: Of SGD; multiplied by `decay` after each of the epochs in `milestones`.
        momentum: Of SGD, in [0, 1).
        weight_decay: L2 penalty on weights and biases, 0 or more.
        milestones: Epochs after which the learning rate falls.
        decay: Factor in (0, 1].
        seed: Of the order of the samples.

    Returns:
        Accuracy in [0, 1], after the last epoch; test samples decide nothing.

    Raises:
        ShapeError: Rows and labels, or the two widths, do not fit.
        ConfigError: Fewer than two classes to tell apart, or a setting outside its range.
        NonFiniteError: NaN or infinity in the features, or a training that diverged.

    Source:
        `PROTOCOLS` says where each set of settings is from; the defaults are `deep-augmentation`.

    >>> train, classes = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]), torch.tensor([0, 0, 1, 1])
    >>> linear_probe(train, classes, torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1]), **PROTOCOLS["moco"])
    1.0
    """
    _check_settings(epochs, batch_size, learning_rate, momentum, weight_decay, decay)
    _check_features(train, train_labels, test, labels)
    device = train.device
    train, test = train.detach().float(), test.detach().to(device).float()
    classes, targets = train_labels.to(device).unique(return_inverse=True)
    order = torch.Generator().manual_seed(seed)
    weight, bias = train.new_zeros(len(classes), train.shape[1]), train.new_zeros(len(classes))
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    with torch.no_grad(), full_precision(device):
        for epoch in range(epochs):
            rate = learning_rate * decay ** sum(epoch >= milestone for milestone in milestones)
            for rows in torch.randperm(len(train), generator=order).to(device).split(batch_size):
                gradients = _softmax_gradients(train[rows], targets[rows], weight, bias)
                for parameter, gradient, v in zip((weight, bias), gradients, velocity, strict=True):
                    v.mul_(momentum).add_(gradient).add_(parameter, alpha=weight_decay)
                    parameter.sub_(v, alpha=rate)
        logits = torch.addmm(bias, test, weight.T)
    if not bool(weight.isfinite().all() and logits.isfinite().all()):
        raise NonFiniteError(
            f"the linear probe diverged at learning_rate={learning_rate}, weight_decay={weight_decay}; try a smaller "
            "learning rate, or standardise the features"
        )
    return float((classes[logits.argmax(1)] == labels.to(device)).double().mean())


def _softmax_gradients(x: Tensor, targets: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the mean cross-entropy in the weights and biases."""
    error = torch.addmm(bias, x, weight.T).softmax(1)  # (b, classes)
    error[torch.arange(len(x), device=x.device), targets] -= 1
    error /= len(x)
    return error.T @ x, error.sum(0)


def _check_settings(
    epochs: int, batch_size: int, learning_rate: float, momentum: float, weight_decay: float, decay: float
) -> None:
    checks = {
        "epochs": (epochs, epochs >= 1, "1 or more"),
        "batch_size": (batch_size, batch_size >= 1, "1 or more"),
        "learning_rate": (learning_rate, 0 < learning_rate < float("inf"), "above 0"),
        "momentum": (momentum, 0 <= momentum < 1, "0 up to, but not, 1"),
        "weight_decay": (weight_decay, 0 <= weight_decay < float("inf"), "0 or more"),
        "decay": (decay, 0 < decay <= 1, "above 0, up to 1"),
    }
    for name, (value, fits, allowed) in checks.items():
        if not fits:
            raise ConfigError(f"{name}={value}; allowed: {allowed}")


def _check_features(train: Tensor, train_labels: Tensor, test: Tensor, labels: Tensor) -> None:
    fits = train.ndim == test.ndim == 2 and train.shape[1] == test.shape[1]
    if not fits or len(train) != len(train_labels) or len(test) != len(labels) or not len(train) or not len(test):
        raise ShapeError(
            f"training features {tuple(train.shape)} with {len(train_labels)} labels and test features "
            f"{tuple(test.shape)} with {len(labels)} labels do not fit"
        )
    if len(train_labels.unique()) < 2:
        raise ConfigError("a linear probe needs at least two classes in the training labels")
    if not bool(train.isfinite().all() and test.isfinite().all()):
        raise NonFiniteError("NaN or infinity in the features; check the checkpoint's weights and the input")
