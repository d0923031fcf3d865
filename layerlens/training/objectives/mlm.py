"""Masked language modelling: which tokens are hidden from the model, and what stands in their place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerlens.errors import ConfigError

MASKED, REPLACED = 0.8, 0.1  # of the tokens asked for; the rest stand as they are


def mask_tokens(
    input_ids: Tensor,
    maskable: Tensor,
    *,
    mask_id: int,
    words: Sequence[int] | Tensor,
    share: float = 0.15,
    draws: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Hide tokens as BERT does: of those asked for 80 % become the mask, 10 % a random token, 10 % stay.

    Args:
        input_ids: Token ids, shape (n, t).
        maskable: Whether a token may be asked for (no padding, no special token), shape (n, t), bool.
        mask_id: Of the mask token.
        words: Ids that a random token is drawn from.
        share: Probability in (0, 1) that a token is asked for; one is, where none was drawn, if there is any.
        draws: Where the draws come from; the global generator by default.

    Returns:
        The ids that the model gets, and which tokens are asked for, both (n, t).

    Raises:
        ConfigError: A share outside (0, 1).

    Source:
        Devlin et al. 2019, arXiv:1810.04805, section 3.1
    """
    if not 0 < share < 1:
        raise ConfigError(f"share={share}; allowed: between 0 and 1")
    place = draws.device if draws is not None else input_ids.device
    drawn = torch.rand(3, *input_ids.shape, generator=draws, device=place).to(input_ids.device)
    first = torch.where(maskable, drawn[0], torch.inf)
    asked = (first < share) | (maskable & (first == first.min()) & (first >= share).all())
    vocabulary = torch.as_tensor(words, device=input_ids.device)
    random = vocabulary[(drawn[2] * len(vocabulary)).long().clamp_max(len(vocabulary) - 1)]
    hidden = torch.where(asked & (drawn[1] < MASKED), torch.full_like(input_ids, mask_id), input_ids)
    hidden = torch.where(asked & (drawn[1] >= MASKED) & (drawn[1] < MASKED + REPLACED), random, hidden)
    return hidden, asked
