"""Settings of parameter-efficient finetuning."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accessory.config.checks import is_number, require_ints

# Names of the architecture with adapters: the same class, to which model/factory.py adds them.
PEFT_TYPES = ("mistral_peft", "mixtral_peft")

LORA_TARGETS = ("attention", "experts")


@dataclass(frozen=True, kw_only=True)
class PeftArgs:
    """What parameter-efficient finetuning adds to a model, and trains.

    Attributes:
        lora_rank: inner width of the low-rank updates (Hu et al., 2021, https://arxiv.org/abs/2106.09685); -1: none.
        lora_alpha: the updates are scaled by lora_alpha / lora_rank; lora_rank where absent, so that the scale is 1.
        rslora: by lora_alpha / sqrt(lora_rank) instead, so that updates of a high rank learn as fast as those of a low
            one (Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732).
        lora_dropout: share of an update's inputs that training sets to 0.
        lora_targets: which matrices get updates: those of the attention, those of the experts.
        bias_tuning: every matrix of attention and experts gets a bias.
        norm_tuning: the norms train as well.
    """

    lora_rank: int = -1
    lora_alpha: float | None = None
    rslora: bool = False
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = LORA_TARGETS
    bias_tuning: bool = True
    norm_tuning: bool = False

    def __post_init__(self) -> None:
        require_ints(self, positive_or_unset=("lora_rank",))
        for name in ("rslora", "bias_tuning", "norm_tuning"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if not is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be a number from 0 to below 1, not {self.lora_dropout!r}")
        if self.lora_alpha is None:
            object.__setattr__(self, "lora_alpha", float(max(self.lora_rank, 0)))
        elif not is_number(self.lora_alpha) or self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be a number above 0, not {self.lora_alpha!r}")
        targets = self.lora_targets
        if isinstance(targets, str) or not all(target in LORA_TARGETS for target in targets):
            raise ValueError(f"lora_targets must be a list of {' and '.join(LORA_TARGETS)}, not {targets!r}")
        # In one order, so that equal settings are equal.
        object.__setattr__(self, "lora_targets", tuple(target for target in LORA_TARGETS if target in targets))
        if self.lora_rank > 0 and not targets:
            raise ValueError(f"lora_rank is {self.lora_rank} but lora_targets names no matrix: give one, or rank -1")

    @property
    def trains(self) -> bool:
        """Whether anything is added or trained at all."""
        return self.lora_rank > 0 or self.bias_tuning or self.norm_tuning

    @property
    def scale(self) -> float:
        """Factor on the low-rank updates."""
        return (self.lora_alpha or 0.0) / self.width

    @property
    def width(self) -> float:
        """What lora_alpha is divided by."""
        return math.sqrt(self.lora_rank) if self.rslora else self.lora_rank

    def to_dict(self) -> dict[str, Any]:
        """Keys of a config.json; those that other tools do not know only where they say something."""
        values = {name: getattr(self, name) for name in ("lora_rank", "bias_tuning", "norm_tuning")}
        if self.lora_rank > 0 and self.lora_alpha != self.lora_rank:
            values["lora_alpha"] = self.lora_alpha
        if self.rslora:
            values["rslora"] = True
        if self.lora_dropout:
            values["lora_dropout"] = self.lora_dropout
        if self.lora_targets != LORA_TARGETS:
            values["lora_targets"] = list(self.lora_targets)
        return values


def with_adapters(values: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config.json with those that were asked for in their place.

    Whoever asks for a rank means LoRA: biases, which a config has by default, then train only where it names them.
    """
    biases = {"bias_tuning": False} if asked.get("lora_rank", -1) > 0 else {}
    return {**biases, **values, **asked}


def peft_from_dict(values: Mapping[str, Any]) -> PeftArgs:
    """The settings that such keys of a config.json stand for."""
    targets = values.get("lora_targets", LORA_TARGETS)
    if not isinstance(targets, list | tuple):
        raise ValueError(f"lora_targets must be a list of {' and '.join(LORA_TARGETS)}, not {targets!r}")
    return PeftArgs(**{**values, "lora_targets": tuple(targets)})
