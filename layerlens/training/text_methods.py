"""What each objective for sentences does with a batch of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layerlens.augment.spatial import Mix
from layerlens.devices import device_of
from layerlens.training.methods import Method
from layerlens.training.objectives.mlm import mask_tokens
from layerlens.training.objectives.simcse import simcse


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """What a step sees of sentences.

    Attributes:
        tokens: What the network takes, on the device: `columns` · n rows, the first column's sentences first.
        columns: Sentences of a row: 1, 2 views or a pair, or 3 with a hard negative.
        draws: Generator of what is masked, on the device.
    """

    tokens: Mapping[str, Tensor]
    columns: int
    draws: torch.Generator


class _TextMethod(Method):
    """An objective over tokens."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        assert self.config.text is not None
        self.settings = self.config.text
        tokenizer: Any = self.network.tokenizer
        known, device = set(tokenizer.all_special_ids), device_of(self.network)
        self.special = torch.tensor(sorted(known), device=device)
        self.words = torch.tensor([i for i in range(len(tokenizer)) if i not in known], device=device)
        self.mask_id = tokenizer.mask_token_id

    def _masked_lm(self, batch: TokenBatch) -> Tensor:
        """Cross-entropy of the hidden tokens, in a pass of its own, which a layer's operator transforms anew."""
        ids = batch.tokens["input_ids"]
        maskable = batch.tokens["attention_mask"].bool() & ~torch.isin(ids, self.special)
        hidden, asked = mask_tokens(
            ids, maskable, mask_id=self.mask_id, words=self.words, share=self.settings.mlm_share, draws=batch.draws
        )
        logits = self.run({**batch.tokens, "input_ids": hidden, "positions": asked})
        found = F.cross_entropy(logits.float(), ids[asked], reduction="sum")
        return found / max(len(logits), 1)  # a batch without a word has nothing to ask for


class SimCSE(_TextMethod):
    """Each sentence meets itself under another dropout mask, or its partner; beside it, if asked for, masked LM."""

    def loss(self, batch: Any, latent_mix: Callable[[], Mix | None] = lambda: None) -> Tensor:
        """See `simcse`; plus `mlm_weight` times the masked-LM loss of the same sentences."""
        loss = simcse(self.run(batch.tokens), columns=batch.columns, temperature=self.temperature)
        if self.settings.mlm_weight:
            loss = loss + self.settings.mlm_weight * self._masked_lm(batch)
        return self.config.loss_scale * loss


class MaskedLM(_TextMethod):
    """The model finds the tokens that were hidden from it."""

    def loss(self, batch: Any, latent_mix: Callable[[], Mix | None] = lambda: None) -> Tensor:
        """Cross-entropy, mean over the hidden tokens."""
        return self.config.loss_scale * self._masked_lm(batch)
