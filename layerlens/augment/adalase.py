"""AdaLASE: while a network trains, learn at which layer its batches should be augmented."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layerlens.augment.deep import RANDOM, Attachable
from layerlens.augment.spatial import Mix, cutmix, cutout, mixup, translate
from layerlens.augment.transforms import gaussian_noise, real_positions
from layerlens.errors import ConfigError, check_known

KINDS: dict[str, Callable[[Tensor], Tensor | tuple[Tensor, Mix]]] = {
    "mixup": lambda h: mixup(h, 1.0),
    "cutmix": lambda h: cutmix(h, 0.5),
    "cutout": lambda h: cutout(h, 0.5),
    "translation": lambda h: translate(h, max(0.2, 1 / min(h.shape[-2:]))),  # a pixel at least
    **{name: partial(transform, rate=0.5) for name, transform in RANDOM.items()},
}
MIXING = ("mixup", "cutmix")


class AdaLASE(Attachable):
    """Ratios q over arms (layer × kind), updated by how well an arm's training gradient agrees with validation's.

    Each step one arm is drawn from q and the whole batch is augmented there, nowhere else. After the step

        q_arm <- q_arm + eta · <grad L_val(theta_{t+1}), grad L_train(theta_t)>

    and every `interval` steps the mean update is applied, q is clipped to [d, 1 − d] with d = floor / K, and divided
    by its sum. Between two updates nothing is read from the device.

    Args:
        layers: Positions, in execution order; `input` for what the model is fed.
        kinds: Names of `KINDS`; an arm is a layer with a kind. Mixing kinds leave the mixture in `mix`.
        eta: Step size η; 1e-3 to 1e-1 in the paper.
        floor: d · K, above 0 and at most 1.
        interval: Steps between two updates.
        ratios: `adaptive`, `uniform` (the baseline that stays at 1/K), or fixed ratios, one per arm.

    Attributes:
        arms: (layer, kind) of each ratio.
        ratios: q, float64, shape (K,), on the CPU; sums to 1.
        active: The arm that augments now; None augments nothing.
        mix: What the last pass mixed, or None.

    Raises:
        ConfigError: No layer or kind, a parameter out of range, or ratios that do not fit the arms.

    Source:
        Takase, Karakida 2024, arXiv:2408.13426
    """

    def __init__(
        self,
        layers: Sequence[str],
        kinds: Sequence[str] = ("cutout",),
        *,
        eta: float = 0.1,
        floor: float = 0.1,
        interval: int = 10,
        ratios: str | Sequence[float] = "adaptive",
    ) -> None:
        super().__init__()
        for kind in kinds:
            check_known("kind", kind, KINDS)
        self.arms = [(layer, kind) for kind in kinds for layer in layers]
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise ConfigError(f"layers={list(layers)}, kinds={list(kinds)}; allowed: at least one of each, each once")
        if not 0 < eta < float("inf") or not 0 < floor <= 1 or interval < 1:
            raise ConfigError(f"eta={eta}, floor={floor}, interval={interval}; allowed: above 0, in (0, 1], from 1")
        self.eta, self.floor, self.interval = eta, floor, interval
        self.adaptive = ratios == "adaptive"
        self.ratios = _start(ratios, len(self.arms))
        self.active: int | None = None
        self.mix: Mix | None = None
        self._sums: Tensor | None = None  # of the inner products since the last update, per arm
        self._steps = 0

    def draw(self, generator: torch.Generator) -> int:
        """Make one arm active, drawn from the ratios by a CPU generator; returns its number."""
        self.active = int(torch.multinomial(self.ratios, 1, generator=generator))
        return self.active

    @contextmanager
    def resting(self) -> Iterator[None]:
        """No augmentation inside the block."""
        active, self.active = self.active, None
        try:
            yield
        finally:
            self.active = active

    def observe(self, train: Iterable[Tensor], validation: Iterable[Tensor]) -> None:
        """Take in one step's gradients: of the augmented batch before the step, of the validation batch after it.

        Uniform and fixed ratios stay.

        Args:
            train, validation: Gradients per parameter, of the same shapes; with several ranks the means over
                them, so that every rank comes to the same ratios.
        """
        if self.active is None:
            raise ConfigError("no arm is active; call draw() before the step")
        if not self.adaptive:
            return
        pairs = list(zip(train, validation, strict=True))
        product = torch.stack([(a * b).sum(dtype=torch.float64) for a, b in pairs]).sum()
        if self._sums is None:
            self._sums = torch.zeros(len(self.arms), dtype=torch.float64, device=product.device)
        self._sums[self.active] += product
        self._steps += 1
        if self._steps >= self.interval:
            self._update()

    def _update(self) -> None:
        assert self._sums is not None
        mean = (self._sums / self._steps).cpu()
        least = self.floor / len(self.arms)
        moved = torch.nan_to_num(self.ratios + self.eta * mean, nan=least)
        clipped = moved.clamp(least, max(1 - least, least))
        self.ratios = clipped / clipped.sum()
        self._sums, self._steps = None, 0

    def attach(self, model: nn.Module) -> None:
        """Hang on the layers of the arms until `detach`.

        Raises:
            UnknownLayerError: A layer that the model does not have; nothing stays attached.
        """
        layers = dict.fromkeys(layer for layer, _ in self.arms)
        self._hang(model, ((layer, _Position(self, layer)) for layer in layers))

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs."""
        sums = None if self._sums is None else self._sums.clone()
        return {"ratios": self.ratios.clone(), "sums": sums, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        sums = state["sums"]
        self.ratios, self._steps = state["ratios"].cpu().clone(), int(state["steps"])
        self._sums = None if sums is None else sums.clone()

    def __deepcopy__(self, _memo: object) -> AdaLASE:
        """A copy of the model shares the ratios."""
        return self


class _Position:
    """One layer's share in the arms."""

    def __init__(self, adalase: AdaLASE, layer: str) -> None:
        self.adalase, self.layer = adalase, layer

    def augment(self, h: Tensor, mask: Tensor | None = None, owner: Tensor | None = None) -> Tensor:
        if owner is not None:
            raise ConfigError(f"AdaLASE knows no graphs; {self.layer!r} has a row per node. Use DeepAugmentation there")
        active = self.adalase.active
        if active is None or self.adalase.arms[active][0] != self.layer:
            return h
        kind, real = self.adalase.arms[active][1], real_positions(h, mask)
        measures = kind == "noise" and real is not None  # padding has no part in the spread
        changed = gaussian_noise(h, 0.5, mask=mask) if measures else KINDS[kind](h)
        if isinstance(changed, Tensor):
            return changed if real is None else torch.where(real, changed, h)
        mixed, self.adalase.mix = changed
        if real is None:
            return mixed
        return torch.where(real & real[self.adalase.mix.partner], mixed, h)  # a token mixes with tokens alone

    def restart(self) -> None:
        self.adalase.mix = None


def _start(ratios: str | Sequence[float], arms: int) -> Tensor:
    if isinstance(ratios, str):
        check_known("ratios", ratios, ("adaptive", "uniform"))
        return torch.full((arms,), 1 / arms, dtype=torch.float64)
    fixed = torch.tensor(list(ratios), dtype=torch.float64)
    if len(fixed) != arms or bool((fixed < 0).any()) or not 0 < float(fixed.sum()) < float("inf"):
        raise ConfigError(f"ratios={list(ratios)} for {arms} arms; allowed: one number from 0 per arm, not all 0")
    return fixed / fixed.sum()
