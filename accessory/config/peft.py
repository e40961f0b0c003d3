"""Settings of parameter-efficient finetuning."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accessory.config.checks import is_number, require_ints

# Names of the architecture with adapters: the same class, to which model/factory.py adds them.
PEFT_TYPES = ("mistral_peft", "mixtral_peft")

# Kinds of matrices, as the plan's rows of adapters have them: "routed" are those of the experts that a router chooses.
LORA_KINDS = ("attention", "routed", "shared", "dense", "router", "head")
# And one word for all matrices of feed-forward parts.
EXPERT_KINDS = ("routed", "shared", "dense")
LORA_TARGETS = ("attention", "experts", *LORA_KINDS[1:])
_DEFAULT_TARGETS = ("attention", "experts")


@dataclass(frozen=True, kw_only=True)
class PeftArgs:
    """What parameter-efficient finetuning adds to a model, and trains.

    Attributes:
        lora_rank: inner width of the low-rank updates (Hu et al., 2021, https://arxiv.org/abs/2106.09685); -1: none.
        lora_ranks: that of some kinds of matrices, where it is another; of "experts" for the three at once.
        lora_alpha: the updates are scaled by lora_alpha over their rank; where absent by 1, whatever their ranks. None
            is left only beside lora_ranks.
        rslora: by lora_alpha / sqrt(lora_rank) instead, so that updates of a high rank learn as fast as those of a low
            one (Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732).
        lora_dropout: share of an update's inputs that training sets to 0.
        lora_targets: the kinds of matrices that get updates, of LORA_KINDS; "experts" stands for those of all
            feed-forward parts: the experts that are chosen, shared ones, and layers without experts.
        bias_tuning: every matrix of attention and experts gets a bias.
        norm_tuning: the norms train as well.
        balance_tuning: balancing has moved the routers' correction biases, which therefore belong to the adapter.
    """

    lora_rank: int = -1
    lora_ranks: Mapping[str, int] = field(default_factory=dict, hash=False)
    lora_alpha: float | None = None
    rslora: bool = False
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = _DEFAULT_TARGETS
    bias_tuning: bool = True
    norm_tuning: bool = False
    balance_tuning: bool = False

    def __post_init__(self) -> None:
        require_ints(self, positive_or_unset=("lora_rank",))
        for name in ("rslora", "bias_tuning", "norm_tuning", "balance_tuning"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if not is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be a number from 0 to below 1, not {self.lora_dropout!r}")
        object.__setattr__(self, "lora_ranks", self._own_ranks())
        if self.lora_alpha is None:
            if not self.lora_ranks:
                object.__setattr__(self, "lora_alpha", float(max(self.lora_rank, 0)))
        elif not is_number(self.lora_alpha) or self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be a number above 0, not {self.lora_alpha!r}")
        targets = self.lora_targets
        if isinstance(targets, str) or not all(target in LORA_TARGETS for target in targets):
            raise ValueError(_odd_targets(targets))
        # In one order and by one name, so that equal settings are equal.
        meant = {kind for target in targets for kind in _kinds(target)}
        object.__setattr__(self, "lora_targets", tuple(kind for kind in LORA_KINDS if kind in meant))
        if self.lora_rank > 0 and not targets:
            raise ValueError(f"lora_rank is {self.lora_rank} but lora_targets names no matrix: give one, or rank -1")

    def _own_ranks(self) -> dict[str, int]:
        """Of each kind whose rank is another than that of all; a kind's own name rules over "experts"."""
        given = self.lora_ranks
        if not isinstance(given, Mapping):
            raise ValueError(f"lora_ranks must be an object of kinds of matrices and their ranks, not {given!r}")
        odd = next((name for name in given if name not in LORA_TARGETS), None)
        if odd is not None:
            raise ValueError(f"lora_ranks names {odd!r}: give ranks to {_either(LORA_TARGETS)}")
        for name, rank in given.items():
            if type(rank) is not int or rank < 1:
                raise ValueError(f"lora_ranks {name} must be a whole number above 0, not {rank!r}")
        ranks = {kind: given[name] for name in ("experts", *LORA_KINDS) if name in given for kind in _kinds(name)}
        return {kind: rank for kind, rank in ranks.items() if rank != self.lora_rank}

    @property
    def trains(self) -> bool:
        """Whether anything is added or trained at all."""
        return self.lora_rank > 0 or self.bias_tuning or self.norm_tuning

    def rank_of(self, kind: str) -> int:
        """Rank of the updates of a kind of matrices; 0: they get none."""
        return max(self.lora_ranks.get(kind, self.lora_rank), 0) if kind in self.lora_targets else 0

    def alpha_of(self, kind: str) -> float:
        """`lora_alpha` of a kind of matrices that get updates."""
        return float(self.rank_of(kind)) if self.lora_alpha is None else self.lora_alpha

    def scale_of(self, kind: str) -> float:
        """Factor on the low-rank updates of a kind of matrices that get them."""
        rank = self.rank_of(kind)
        return self.alpha_of(kind) / (math.sqrt(rank) if self.rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """Keys of a config.json; those that other tools do not know only where they say something."""
        values = {name: getattr(self, name) for name in ("lora_rank", "bias_tuning", "norm_tuning")}
        if self.lora_ranks:
            values["lora_ranks"] = _folded(self.lora_ranks)
        if self.lora_rank > 0 and self.lora_alpha != (None if self.lora_ranks else self.lora_rank):
            values["lora_alpha"] = self.lora_alpha
        values |= {name: True for name in ("rslora", "balance_tuning") if getattr(self, name)}
        if self.lora_dropout:
            values["lora_dropout"] = self.lora_dropout
        if (targets := list(_folded(dict.fromkeys(self.lora_targets, 0)))) != list(_DEFAULT_TARGETS):
            values["lora_targets"] = targets
        return values


def _kinds(target: str) -> tuple[str, ...]:
    return EXPERT_KINDS if target == "experts" else (target,)


def _folded(kinds: Mapping[str, int]) -> dict[str, int]:
    """By "experts" what is alike of its three, as configs had it before these could be told apart."""
    if len({kinds.get(kind) for kind in EXPERT_KINDS}) > 1 or "routed" not in kinds:
        return dict(kinds)
    folded = {"experts" if kind == "routed" else kind: kinds[kind] for kind in LORA_KINDS if kind in kinds}
    return {name: value for name, value in folded.items() if name not in EXPERT_KINDS}


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _odd_targets(targets: Any) -> str:
    return f"lora_targets must be a list of {_either(LORA_TARGETS)}, not {targets!r}"


def with_adapters(values: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config.json with those that were asked for in their place.

    Whoever asks for a rank means LoRA: biases, which a config has by default, then train only where it names them.
    """
    biases = {"bias_tuning": False} if asked.get("lora_rank", -1) > 0 else {}
    return {**biases, **values, **asked}


def peft_from_dict(values: Mapping[str, Any]) -> PeftArgs:
    """The settings that such keys of a config.json stand for."""
    targets = values.get("lora_targets", _DEFAULT_TARGETS)
    if not isinstance(targets, list | tuple):
        raise ValueError(_odd_targets(targets))
    return PeftArgs(**{**values, "lora_targets": tuple(targets)})
