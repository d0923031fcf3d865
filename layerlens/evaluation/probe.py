"""Linear probe: logistic regression on frozen features."""

from __future__ import annotations

import warnings

from torch import Tensor

from layerlens.errors import ConfigError


def probe_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, labels: Tensor, *, c: float = 1.0) -> float:
    """Test accuracy of a logistic regression fitted to standardised training features.

    Args:
        train, test: Features, shapes (m, d) and (n, d).
        train_labels, labels: Class indices, shapes (m,) and (n,).
        c: Inverse strength of the L2 penalty, as in scikit-learn.

    Returns:
        Accuracy in [0, 1]. Deterministic: L-BFGS to convergence or 1,000 iterations, no learning rate.

    Raises:
        ConfigError: Fewer than two classes to tell apart.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(train_labels.unique()) < 2:
        raise ConfigError("a linear probe needs at least two classes in the training labels")
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(train.numpy(), train_labels.numpy())
    return float(probe.score(test.numpy(), labels.numpy()))
