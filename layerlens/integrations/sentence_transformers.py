"""Deep Augmentation in a training run of sentence-transformers; the `text` extra."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from torch import nn

from layerlens.augment.deep import DeepAugmentation
from layerlens.errors import ConfigError, ExtraMissingError
from layerlens.integrations import transformers as trainer
from layerlens.layers import Batch

if find_spec("sentence_transformers") is None:
    raise ExtraMissingError(f"{__name__} needs sentence-transformers: pip install 'layerlens-torch[text]'")


class DeepAugmentationCallback(trainer.DeepAugmentationCallback):
    """Deep Augmentation while a SentenceTransformerTrainer trains: one more line in an existing script.

    Each column of a batch (anchors, positives, negatives) is a pass of its own with draws of its own. Everything
    else is as for `layerlens.integrations.transformers.DeepAugmentationCallback`, the way to be safe from exceptions
    and Ctrl-C included. Losses that run a batch twice (`Cached…`) repeat the draws of the global generator, so leave
    `generator` out with them.

    Args:
        augmentation: A `DeepAugmentation`; or the layers of one, each a name as in `model.named_modules()`
            (`0.model.encoder.layer.7`) or the paper's number (0 = embeddings, 8 = output of the 8th block), with the
            rest of its settings as `settings`.
        settings: Of `DeepAugmentation`: transform, rate, fraction, stop_gradient, components, per_token, generator.

    Raises:
        ConfigError: `pairs="one"`, since a pass holds one text of each pair; or as the class above.
        TypeError: A setting that does not exist.

    Source:
        Brüel Gabrielsson, Wang, Baradad, Solomon 2023, arXiv:2303.14537

        with DeepAugmentationCallback(8, rate=0.5, stop_gradient=True) as callback:
            SentenceTransformerTrainer(model, arguments, train_dataset=pairs, loss=loss, callbacks=[callback]).train()
    """

    def __init__(self, augmentation: DeepAugmentation | str | int | Sequence[str | int], **settings: Any) -> None:
        super().__init__(augmentation, **settings)
        if self.augmentation.pairs == "one":
            raise ConfigError(
                "pairs='one' needs both texts of a pair in one pass; sentence-transformers runs each column by "
                "itself: leave it at 'independent'"
            )

    def _numbered(self, model: nn.Module) -> list[str]:
        return numbered_layers(model)


def layer_number(model: nn.Module, number: int) -> str:
    """The name of a layer of a SentenceTransformer by the paper's number: 0 = embeddings, k = output of the k-th block.

    Args:
        model: A SentenceTransformer; it runs once and is left as it was.
        number: From 0 to the number of blocks.

    Raises:
        UnknownLayerError: No such number, or a model without blocks.
    """
    return trainer.pick_numbered(model, numbered_layers(model), number)


def numbered_layers(model: nn.Module) -> list[str]:
    """The names of a SentenceTransformer's embeddings and blocks; it runs once and is left as it was.

    Raises:
        UnknownLayerError: A model without blocks, or whose first block is fed what no module gives.
    """
    return trainer.numbered_layers(model, _features(model), forward=lambda _model, batch: _model(batch))


def _features(model: Any) -> Batch:
    device = next(model.parameters()).device
    features = model.preprocess(["a sentence", "another"])
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in features.items()}
