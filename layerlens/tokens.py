"""Sentences as a network takes them: batches of tokens, in an order that never changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from layerlens.batch_sizes import even_batches, fixed_choice
from layerlens.encoders import SentenceEncoder
from layerlens.text import TextDataset


class TokenBatches:
    """An iterable of batches of tokens; each is padded to its longest sentence.

    Args:
        encoder: Whose tokens.
        sentences: Read as they are needed.
        order: Which of them, shape (n,).
        batch_size: Sentences per batch, but for one more or less.
    """

    def __init__(self, encoder: SentenceEncoder, sentences: Sequence[str], order: Tensor, batch_size: int) -> None:
        self.encoder, self.sentences, self.order, self.batch_size = encoder, sentences, order, batch_size

    def __len__(self) -> int:
        return even_batches(len(self.order), self.batch_size)

    def chosen(self) -> list[str]:
        """The sentences themselves."""
        return [self.sentences[int(row)] for row in self.order]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for rows in self.order.tensor_split(len(self)):
            yield self.encoder.tokenize([self.sentences[int(row)] for row in rows])


def token_batches(
    encoder: SentenceEncoder,
    dataset: TextDataset,
    split: str = "test",
    *,
    samples: int | None = None,
    batch_size: int = 100,
    seed: int = 0,
) -> TokenBatches:
    """A fixed random choice of `samples` sentences of a split, the same at every iteration.

    Args:
        encoder: Whose tokens.
        dataset: The sentences.
        split: `train` or `test`.
        samples: How many; all if there are fewer.
        batch_size: Sentences per batch.
        seed: Of the choice.
    """
    sentences = dataset.split(split)
    return TokenBatches(encoder, sentences, fixed_choice(len(sentences), samples, seed), batch_size)
