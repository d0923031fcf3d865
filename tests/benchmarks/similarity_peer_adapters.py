"""Adapters: what a user of each library writes to get the similarity of all pairs of layers.

`similarity_peers.py` runs them. Importing this file imports no peer; each adapter imports its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import layerlens as ll

ESTIMATORS = {
    "minibatch": "HSIC₁ averaged over batches by their sizes, then one ratio",
    "minibatch-equal": "the same, every batch counting alike, however short",
    "debiased": "unbiased HSIC over all rows",
    "biased": "biased HSIC over all rows",
    "uniformity": "log mean Gaussian potential of all pairs",
}
Matrix = Tensor
Rows = list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Tool:
    """One way to the answer.

    Args:
        name: As the table shows it.
        takes: `model` (model, loader, names), `batches` (features, rows per batch), `whole` (features) or `sphere`.
        estimator: A key of ESTIMATORS; the error is taken against its definition.
        module: What must be importable.
        package: Its name in the registry, for the version.
        notes: What it lacks, or what its user must know.
    """

    name: str
    takes: str
    estimator: str
    run: Callable[..., Any]
    module: str
    package: str
    notes: str = ""


def layerlens_model(model: nn.Module, loader: DataLoader, names: Sequence[str]) -> Matrix:
    return torch.as_tensor(ll.cka_matrix(model, loader, names).values)


def layerlens_batches(*, errors: bool) -> Callable[[Rows, int], Matrix]:
    def run(features: Rows, rows: int) -> Matrix:
        cka = ll.StreamingCKA(layer_names(features), errors=errors)
        for batch in zip(*(f.split(rows) for f in features), strict=True):
            cka.update(list(batch))
        return torch.as_tensor(cka.compute().values)

    return run


def layerlens_whole(estimator: str, *, errors: bool) -> Callable[[Rows], Matrix]:
    def run(features: Rows) -> Matrix:
        cka = ll.WholeSetCKA(layer_names(features), estimator=estimator, errors=errors)
        cka.update(features, copy=False)
        return torch.as_tensor(cka.compute().values)

    return run


def layerlens_uniformity(x: Tensor) -> float:
    return ll.uniformity(x)


def layer_names(features: Rows) -> list[str]:
    return [f"layer{i}" for i in range(len(features))]


def torch_cka_model(model: nn.Module, loader: DataLoader, names: Sequence[str]) -> Matrix:
    from torch_cka import CKA

    cka = CKA(model, model, "first", "second", list(names), list(names), device="cpu")
    with torch.no_grad():  # in its favour: by itself it builds the graph
        cka.compare(loader)
    return cka.export()["CKA"]


def pytorch_cka_model(model: nn.Module, loader: DataLoader, names: Sequence[str]) -> Matrix:
    from cka import compute_cka

    return compute_cka(model, model, loader, layers=list(names), device="cpu", progress=False)[0]


def pytorch_cka_batches(features: Rows, rows: int) -> Matrix:
    from cka import hsic_cross

    return ratio_of(sum(hsic_cross(grams, grams) for grams in stacked_grams(features, rows)))


def pytorch_cka_whole(features: Rows) -> Matrix:
    from cka import cka_from_features

    return cka_from_features(features, features)


def cka_pytorch_model(model: nn.Module, loader: DataLoader, names: Sequence[str]) -> Matrix:
    from cka_pytorch import CKACalculator

    calculator = CKACalculator(model, model, model1_layers=list(names), verbose=False)
    matrix = calculator.calculate_cka_matrix(loader, num_epochs=1)
    found = calculator.hook_manager1.module_names  # more than was asked for where a short name fits several
    chosen = [found.index(name) for name in names]
    return matrix[chosen][:, chosen]


def cka_pytorch_batches(features: Rows, rows: int) -> Matrix:
    from cka_pytorch.hsic import hsic1

    return ratio_of(sum(all_pairs(hsic1, grams) for grams in stacked_grams(features, rows)))


def ckatorch_model(model: nn.Module, loader: DataLoader, names: Sequence[str]) -> Matrix:
    from ckatorch import CKA

    images = TensorDataset(loader.dataset.tensors[0])  # it hands every entry of a batch to forward()
    return CKA(model, model, list(names), device="cpu")(DataLoader(images, loader.batch_size), epochs=1)


def ckatorch_batches(features: Rows, rows: int) -> Matrix:
    from ckatorch import hsic1

    doubled = [f.double() for f in features]  # as its own cka_batch does
    return ratio_of(sum(all_pairs(hsic1, grams) for grams in stacked_grams(doubled, rows)))


def ckatorch_whole(features: Rows) -> Matrix:
    from ckatorch import cka_base

    return pairwise(lambda x, y: cka_base(x, y, unbiased=True), features)


def thingsvision_whole(features: Rows) -> Matrix:
    from thingsvision.core.cka import get_cka

    return pairwise(get_cka("torch", m=len(features[0]), unbiased=True, device="cpu").compare, features)


def repsim_whole(estimator: str) -> Callable[[Rows], Matrix]:
    def run(features: Rows) -> Matrix:
        import repsim

        return torch.as_tensor(repsim.cka([f.numpy() for f in features], "linear", estimator))

    return run


def rsatoolbox_whole(features: Rows) -> Matrix:
    from rsatoolbox.data import Dataset
    from rsatoolbox.rdm import calc_rdm, compare, concat

    rdms = concat([calc_rdm(Dataset(f.numpy()), method="euclidean") for f in features])
    return torch.as_tensor(compare(rdms, rdms, method="cosine_cov"))  # its own formula for linear CKA


def lightly_uniformity(x: Tensor) -> float:
    from lightly.loss.hypersphere_loss import HypersphereLoss

    refuse_all_distances(x)
    return float(HypersphereLoss(t=2.0)(x, x))  # the alignment of x with itself is 0


def pdist_uniformity(x: Tensor) -> float:
    refuse_all_distances(x)
    return float(torch.pdist(nn.functional.normalize(x)).square().mul(-2).exp().mean().log())


def refuse_all_distances(x: Tensor, most: int = 20_000) -> None:
    if len(x) > most:
        gib = len(x) * (len(x) - 1) / 2 * 4 / 2**30
        raise MemoryError(f"pdist of {len(x):,} rows makes several arrays of {gib:.1f} GiB; not run above {most:,}")


def stacked_grams(features: Rows, rows: int) -> Iterator[Tensor]:
    """Per batch the Gram matrices of all layers, shape (L, n, n); the layers have equal widths."""
    for parts in zip(*(f.split(rows) for f in features), strict=True):
        stack = torch.stack(parts)
        yield torch.bmm(stack, stack.transpose(1, 2))


def all_pairs(hsic: Callable[[Tensor, Tensor], Tensor], grams: Tensor) -> Matrix:
    """A peer's HSIC of two stacks, called once for all pairs i <= j."""
    i, j = torch.triu_indices(len(grams), len(grams))
    matrix = grams.new_zeros(len(grams), len(grams))
    matrix[i, j] = matrix[j, i] = hsic(grams[i], grams[j])
    return matrix


def pairwise(cka: Callable[[Tensor, Tensor], Any], features: Rows) -> Matrix:
    """A peer's CKA of two layers, called for each pair i < j."""
    matrix = torch.eye(len(features), dtype=torch.float64)
    for i, j in torch.triu_indices(len(features), len(features), 1).T.tolist():
        matrix[i, j] = matrix[j, i] = float(cka(features[i], features[j]))
    return matrix


def ratio_of(hsic: Matrix) -> Matrix:
    scale = hsic.diagonal().sqrt()
    return hsic / (scale[:, None] * scale)


def tools() -> list[Tool]:
    """Every tool that has an adapter, importable or not."""
    own = {"module": "layerlens", "package": "layerlens-torch"}
    first = {"module": "torch_cka", "package": "torch-cka"}
    second = {"module": "cka", "package": "pytorch-cka"}
    third = {"module": "cka_pytorch", "package": "cka-pytorch"}
    fourth = {"module": "ckatorch", "package": "ckatorch"}
    fifth = {"module": "repsim", "package": "repsim"}
    composed = "no batches of features: the adapter sums its HSIC"
    return [
        Tool(name="layerlens", takes="model", estimator="minibatch", run=layerlens_model, **own, notes="intervals"),
        Tool(name="torch-cka", takes="model", estimator="minibatch-equal", run=torch_cka_model, **first,
             notes="two forward passes; Gram matrices anew for each pair; here under no_grad; a later in-place ReLU "
             "changes what it kept"),
        Tool(name="pytorch-cka", takes="model", estimator="minibatch-equal", run=pytorch_cka_model, **second,
             notes="float32, clamped to [0, 1]; keeps a batch's activations; a later in-place ReLU changes them"),
        Tool(name="cka-pytorch", takes="model", estimator="minibatch-equal", run=cka_pytorch_model, **third,
             notes="two forward passes; adds 1e-4 under the root; here 1 epoch, not 10"),
        Tool(name="ckatorch", takes="model", estimator="minibatch-equal", run=ckatorch_model, **fourth,
             notes="expects (n, tokens, width); only the last batch counts"),
        Tool(name="layerlens", takes="batches", estimator="minibatch", run=layerlens_batches(errors=True), **own,
             notes="intervals"),
        Tool(name="layerlens plain", takes="batches", estimator="minibatch", run=layerlens_batches(errors=False),
             **own, notes="errors=False: no intervals"),
        Tool(name="pytorch-cka", takes="batches", estimator="minibatch-equal", run=pytorch_cka_batches, **second,
             notes=composed),
        Tool(name="cka-pytorch", takes="batches", estimator="minibatch-equal", run=cka_pytorch_batches, **third,
             notes=composed),
        Tool(name="ckatorch", takes="batches", estimator="minibatch-equal", run=ckatorch_batches, **fourth,
             notes=composed),
        Tool(name="layerlens", takes="whole", estimator="debiased", run=layerlens_whole("debiased", errors=True),
             **own, notes="intervals"),
        Tool(name="layerlens plain", takes="whole", estimator="debiased",
             run=layerlens_whole("debiased", errors=False), **own, notes="errors=False: no intervals"),
        Tool(name="layerlens biased", takes="whole", estimator="biased", run=layerlens_whole("biased", errors=True),
             **own, notes="intervals"),
        Tool(name="pytorch-cka", takes="whole", estimator="debiased", run=pytorch_cka_whole, **second,
             notes="float32, clamped to [0, 1]"),
        Tool(name="ckatorch", takes="whole", estimator="debiased", run=ckatorch_whole, **fourth,
             notes="float64; one pair a call, Gram matrices anew"),
        Tool(name="thingsvision", takes="whole", estimator="debiased", run=thingsvision_whole,
             module="thingsvision.core.cka", package="thingsvision", notes="one pair a call, six Gram matrices each"),
        Tool(name="repsim gretton", takes="whole", estimator="biased", run=repsim_whole("gretton"), **fifth,
             notes="float64"),
        Tool(name="repsim song", takes="whole", estimator="debiased", run=repsim_whole("song"), **fifth,
             notes="float64; unbiased HSIC over a biased scale"),
        Tool(name="rsatoolbox", takes="whole", estimator="biased", run=rsatoolbox_whole, module="rsatoolbox",
             package="rsatoolbox", notes="as whitened cosine of RDMs"),
        Tool(name="layerlens", takes="sphere", estimator="uniformity", run=layerlens_uniformity, **own),
        Tool(name="lightly", takes="sphere", estimator="uniformity", run=lightly_uniformity,
             module="lightly.loss.hypersphere_loss", package="lightly", notes="pdist of all rows"),
        Tool(name="torch.pdist", takes="sphere", estimator="uniformity", run=pdist_uniformity, module="torch",
             package="torch", notes="the paper's three lines"),
    ]  # fmt: skip
