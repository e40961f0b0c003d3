"""The one description of a model's sizes: what config.json and params.json hold, validated."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from accessory.config.checks import is_number, part_of_config, require_ints
from accessory.config.peft import EXPERT_KINDS, PEFT_TYPES, PeftArgs, peft_from_dict
from accessory.config.quant import QuantArgs
from accessory.errors import nearest, unknown

# Keys that some releases write and that do not change this architecture: the length of the context is the caller's
# choice.
IGNORED_KEYS = frozenset({"max_position_embeddings", "model_type", "torch_dtype"})


# No model comes near them, and to list the tensors of more, or the rank counts that divide it, would take minutes.
MOST_LAYERS, MOST_HEADS, MOST_EXPERTS = 2**10, 2**12, 2**16


QKNorm = Literal["none", "head", "full"]
Score = Literal["softmax", "sigmoid"]
RopeKind = Literal["yarn", "llama3"]


@dataclass(frozen=True, kw_only=True)
class RouterArgs:
    """What the router makes of its logits; by default what Mixtral's does.

    Attributes:
        score: an expert's score: its probability among all, or the sigmoid of its own logit.
        correction: a bias on the scores, for the choice alone (DeepSeek-V3, https://arxiv.org/abs/2412.19437), which
            some families have and balancing gives the others.
        groups: so many groups of neighbouring experts, of which the ``groups_chosen`` best are chosen from: those whose
            two best experts together score most.
        bias: the logits have a bias.
        eps: is added to the sum of the chosen experts' scores before they are divided by it.
        scale: factor on the weights.
        float32: the product that gives the logits runs in float32; else in the compute dtype.
    """

    score: Score = "softmax"
    correction: bool = False
    bias: bool = False
    groups: int = 1
    groups_chosen: int = 1
    eps: float = 0.0
    scale: float = 1.0
    float32: bool = False

    def __post_init__(self) -> None:
        if self.score not in get_args(Score):
            raise ValueError(unknown("moe.router.score", self.score, get_args(Score)))
        require_ints(self, positive=("groups", "groups_chosen"))
        if self.groups_chosen > self.groups:
            raise ValueError(f"moe.router.groups_chosen is {self.groups_chosen}, of {self.groups} groups: give fewer")
        for name in ("correction", "bias", "float32"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"moe.router.{name} must be true or false, not {getattr(self, name)!r}")
        if not is_number(self.eps) or self.eps < 0:
            raise ValueError(f"moe.router.eps must be 0 or more, not {self.eps!r}")
        if not is_number(self.scale) or self.scale <= 0:
            raise ValueError(f"moe.router.scale must be a number above 0, not {self.scale!r}")


@dataclass(frozen=True, kw_only=True)
class ClampArgs:
    """Limited gated units: (up + 1) * gate * sigmoid(alpha * gate), the gate limited from above, up on both sides.

    Attributes:
        alpha, limit: as gpt-oss has them.
    """

    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        for name in ("alpha", "limit"):
            if not is_number(getattr(self, name)) or getattr(self, name) <= 0:
                raise ValueError(f"moe.clamp.{name} must be a number above 0, not {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class MoEArgs:
    """Experts of a layer, and how many of them each token visits (top-k).

    Attributes:
        norm_topk_prob: the weights of the chosen experts add up to 1; else they are their scores.
        shared_hidden_dim: width inside the expert that every token visits beside those that it chose; 0: there is none.
        bias: the experts' matrices have biases.
        clamp: their gated units are limited; None: they are silu(gate) * up.
        router: how they are chosen.
    """

    num_experts: int = 8
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    shared_hidden_dim: int = 0
    bias: bool = False
    clamp: ClampArgs | None = None
    router: RouterArgs = field(default_factory=RouterArgs)

    def __post_init__(self) -> None:
        require_ints(self, positive=("num_experts", "num_experts_per_tok"))
        require_ints(self, positive=("shared_hidden_dim",) if self.shared_hidden_dim != 0 else ())
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"moe.num_experts_per_tok is {self.num_experts_per_tok} but there are only "
                f"{self.num_experts} experts (moe.num_experts)"
            )
        for name in ("norm_topk_prob", "bias"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"moe.{name} must be true or false, not {getattr(self, name)!r}")
        if self.shared_hidden_dim and self.clamp is not None:
            raise ValueError("moe.clamp is not known of shared experts (moe.shared_hidden_dim)")
        groups, chosen = self.router.groups, self.router.groups_chosen
        if self.num_experts % groups or (groups > 1 and self.num_experts < 2 * groups):
            raise ValueError(f"{self.num_experts} experts do not make {groups} groups of 2 or more (moe.router.groups)")
        if self.num_experts_per_tok > chosen * (self.num_experts // groups):
            raise ValueError(
                f"moe.num_experts_per_tok is {self.num_experts_per_tok}, and {chosen} of {groups} groups have fewer "
                "experts (moe.router.groups_chosen)"
            )

    def to_dict(self) -> dict[str, Any]:
        """As a config.json has it; what Mixtral's do not know is left out where it is as there."""
        values = dataclasses.asdict(self)
        own = MoEArgs()
        for name in ("norm_topk_prob", "shared_hidden_dim", "bias", "clamp", "router"):
            if getattr(self, name) == getattr(own, name):
                del values[name]
        return values


def layers_of_config(name: str, numbers: Any) -> tuple[int, ...]:
    """Numbers of layers, in their order, each once.

    Raises:
        ValueError: no such list.
    """
    listed = isinstance(numbers, list | tuple)
    if not listed or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{name} must be a list of layers' numbers, not {numbers!r}")
    return tuple(sorted(set(numbers)))


@dataclass(frozen=True, kw_only=True)
class DenseArgs:
    """Layers without experts and router: one gated unit, through which every token goes.

    Attributes:
        layers: their numbers.
        hidden_dim: width inside them.
    """

    layers: tuple[int, ...]
    hidden_dim: int

    def __post_init__(self) -> None:
        require_ints(self, positive=("hidden_dim",))
        numbers = layers_of_config("dense.layers", self.layers)
        if not numbers:
            raise ValueError(f"dense.layers must be a list of layers' numbers, not {self.layers!r}")
        object.__setattr__(self, "layers", numbers)


@dataclass(frozen=True, kw_only=True)
class AttentionArgs:
    """What queries, keys and values go through before they are turned and compared; in Mixtral nothing.

    Attributes:
        qkv_bias: their products have a bias each.
        qk_norm: an RMSNorm of queries and keys: of each "head", or of all heads' values together ("full").
        clip: queries, keys and values are limited to plus and minus this number; None: they are not.
        rotary_dim: the first numbers of each head, so many, are turned; None: all.
        o_bias: the output's product has a bias.
        sinks: beside a token's keys each head has a learned logit, which takes its share of attention and gives nothing
            (https://arxiv.org/abs/2309.17453).
        window: in the layers ``windowed`` a token sees so many, itself and those before it; None: all.
    """

    qkv_bias: bool = False
    o_bias: bool = False
    sinks: bool = False
    window: int | None = None
    windowed: tuple[int, ...] = ()
    qk_norm: QKNorm = "none"
    clip: float | None = None
    rotary_dim: int | None = None

    def __post_init__(self) -> None:
        if self.qk_norm not in get_args(QKNorm):
            raise ValueError(unknown("attention.qk_norm", self.qk_norm, get_args(QKNorm)))
        if self.clip is not None and (not is_number(self.clip) or self.clip <= 0):
            raise ValueError(f"attention.clip must be null or a number above 0, not {self.clip!r}")
        for name in ("qkv_bias", "o_bias", "sinks"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"attention.{name} must be true or false, not {getattr(self, name)!r}")
        if self.window is not None:
            require_ints(self, positive=("window",))
        object.__setattr__(self, "windowed", layers_of_config("attention.windowed", self.windowed))
        if bool(self.windowed) != (self.window is not None):
            raise ValueError("attention.window and attention.windowed must be given together")
        if self.rotary_dim is not None:
            require_ints(self, positive=("rotary_dim",))


@dataclass(frozen=True, kw_only=True)
class RopeArgs:
    """How the rotary embedding's slow frequencies are slowed down further, for contexts longer than those of training.

    Attributes:
        kind: "yarn" (https://arxiv.org/abs/2309.00071) or "llama3" (Llama 3.1's).
        factor: the slowest frequencies are divided by it.
        original: the length of the contexts before.
        beta_fast, beta_slow: yarn's; what turns so often, or so seldom, within the original length stays, or is slowed
            down wholly.
        truncate: yarn's; the bounds between these are moved to whole places.
        attention_factor: yarn's; queries and keys are multiplied by it as they are turned.
        low_freq_factor, high_freq_factor: llama3's; the same as beta_slow and beta_fast.
    """

    kind: RopeKind = "yarn"
    factor: float = 1.0
    original: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(RopeKind):
            raise ValueError(unknown("rope.kind", self.kind, get_args(RopeKind)))
        require_ints(self, positive=("original",))
        for name in ("factor", "beta_fast", "beta_slow", "attention_factor", "low_freq_factor", "high_freq_factor"):
            if not is_number(getattr(self, name)) or getattr(self, name) <= 0:
                raise ValueError(f"rope.{name} must be a number above 0, not {getattr(self, name)!r}")
        if type(self.truncate) is not bool:
            raise ValueError(f"rope.truncate must be true or false, not {self.truncate!r}")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"rope.low_freq_factor {self.low_freq_factor} must be less than high_freq_factor "
                f"{self.high_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """Sizes and constants of a model.

    Attributes:
        family: a key of `model.LLM.FAMILIES`, for what the model is called elsewhere; the other settings say all that
            is computed.
        dim: width of the residual stream.
        hidden_dim: width inside one expert.
        dense: the layers that have no experts; None: all have.
        head_dim: width of one attention head (dim / n_heads where absent).
        n_kv_heads: key/value heads, shared by groups of query heads (n_heads where absent).
        vocab_size: rows of the embedding, one for each of the tokenizer's tokens or more; -1 leaves their number open.
        rope_scaling: factor on positions before the rotary embedding (1 / Hugging Face's linear factor).
        rope: how slow frequencies are slowed down; None: they are not.
        sliding_window: so many tokens back a token sees in other programs; here a context may not be longer.
        max_batch_size: sequences that are generated at once.
        max_seq_len: a hint; the argument of from_pretrained rules.
        load_balancing_weight: factor on the load-balancing loss in training.
        z_loss_weight: factor on the router's z-loss in training; ST-MoE takes 0.001.
        peft: the adapters of a llama_type with them; None for any other. Its keys lie flat in the file.
        quant: how the matrices are quantized; None: they are not.
    """

    dim: int
    n_layers: int
    n_heads: int
    hidden_dim: int
    n_kv_heads: int = -1
    head_dim: int = -1
    vocab_size: int = -1
    norm_eps: float = 1e-5
    rope_theta: float = 1e6
    rope_scaling: float | None = None
    rope: RopeArgs | None = None
    sliding_window: int | None = None
    max_batch_size: int = 32
    max_seq_len: int = 2048
    family: str = "mixtral"
    attention: AttentionArgs = field(default_factory=AttentionArgs)
    moe: MoEArgs = field(default_factory=MoEArgs)
    dense: DenseArgs | None = None
    load_balancing_weight: float = 0.1
    z_loss_weight: float = 0.0
    peft: PeftArgs | None = None
    quant: QuantArgs | None = None

    def __post_init__(self) -> None:
        require_ints(self, positive=("dim", "n_layers", "n_heads", "hidden_dim", "max_batch_size", "max_seq_len"))
        require_ints(self, positive_or_unset=("n_kv_heads", "head_dim", "vocab_size"))
        for name in ("norm_eps", "rope_theta"):
            if not is_number(getattr(self, name)) or getattr(self, name) <= 0:
                raise ValueError(f"{name} must be a number above 0, not {getattr(self, name)!r}")
        if self.rope_scaling is not None and (not is_number(self.rope_scaling) or self.rope_scaling <= 0):
            raise ValueError(f"rope_scaling must be null or a number above 0, not {self.rope_scaling!r}")
        if self.sliding_window is not None:
            require_ints(self, positive=("sliding_window",))
        for name in ("load_balancing_weight", "z_loss_weight"):
            if not is_number(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)!r}")
        if self.n_kv_heads == -1:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if self.head_dim == -1:
            if self.dim % self.n_heads:
                raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}: give head_dim")
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        for name, most in (("n_layers", MOST_LAYERS), ("n_heads", MOST_HEADS)):
            if getattr(self, name) > most:
                raise ValueError(f"{name} {getattr(self, name)} is more than {most}: correct it")
        if self.n_layers * self.moe.num_experts > MOST_EXPERTS:
            raise ValueError(
                f"n_layers {self.n_layers} times moe.num_experts {self.moe.num_experts} is more than {MOST_EXPERTS}: "
                "correct them"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: the rotary embedding turns pairs, so it must be even")
        if self.rotary_dim == self.head_dim:  # said in one way, so that equal settings are equal
            object.__setattr__(self, "attention", dataclasses.replace(self.attention, rotary_dim=None))
        if self.rotary_dim > self.head_dim or self.rotary_dim % 2:
            raise ValueError(f"attention.rotary_dim is {self.rotary_dim}: give an even one, {self.head_dim} at most")
        if self.dense is not None and self.dense.layers[-1] >= self.n_layers:
            raise ValueError(f"dense.layers names layer {self.dense.layers[-1]}, of {self.n_layers}: correct it")
        if self.attention.windowed and self.attention.windowed[-1] >= self.n_layers:
            raise ValueError(
                f"attention.windowed names layer {self.attention.windowed[-1]}, of {self.n_layers}: correct it"
            )
        if not self.moe_layers:
            raise ValueError("dense.layers names all layers: of a model without experts nothing is known here")
        if self.rope is not None and self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be above 1 beside rope, not {self.rope_theta!r}")
        if self.peft is not None:
            self._check_adapters(self.peft)

    def _check_adapters(self, peft: PeftArgs) -> None:
        """See that what is said of low-rank updates is about matrices that the model has.

        Raises:
            ValueError: naming setting and kind of matrix.
        """
        if peft.lora_ranks and peft.lora_rank < 1:
            raise ValueError(
                f"lora_ranks is given and lora_rank, that of all other matrices, is {peft.lora_rank}: give it too"
            )
        # Of each kind of matrix the side that is not dim.
        sides = {
            "attention": ("n_kv_heads * head_dim", self.n_kv_heads * self.head_dim),
            "routed": ("hidden_dim", self.hidden_dim),
            "shared": ("moe.shared_hidden_dim", self.moe.shared_hidden_dim),
            "dense": ("dense.hidden_dim", 0 if self.dense is None else self.dense.hidden_dim),
            "router": ("moe.num_experts", self.moe.num_experts),
            "head": ("vocab_size", self.dim if self.vocab_size == -1 else self.vocab_size),
        }
        lacks = {"shared": "shared expert", "dense": "layer without experts"}
        targets = peft.lora_targets if peft.lora_rank > 0 else ()
        present = [kind for kind in targets if sides[kind][1]]
        # All three together are "experts", and there with any of them.
        absent = [] if {*EXPERT_KINDS} <= {*targets} else [kind for kind in targets if kind not in present]
        if absent:
            raise ValueError(f"lora_targets names {absent[0]}, and the model has no {lacks[absent[0]]}: leave it out")
        for kind in peft.lora_ranks:
            experts = (own for own in present if {kind, own} <= {*EXPERT_KINDS})
            if kind in present or any(peft.rank_of(own) == peft.lora_ranks[kind] for own in experts):
                continue
            why = f"the model has no {lacks[kind]}" if kind in targets else f"lora_targets does not name {kind}"
            raise ValueError(f"lora_ranks gives {kind} a rank, and {why}: leave it out")
        for kind in sorted(present, key=lambda kind: sides[kind][1]):
            label, smallest = min(sides[kind], ("dim", self.dim), key=lambda side: side[1])
            if peft.rank_of(kind) > smallest:
                name = f"lora_ranks {kind}" if kind in peft.lora_ranks else "lora_rank"
                other = "" if kind in peft.lora_ranks else f", or a smaller one to {kind} in lora_ranks"
                raise ValueError(
                    f"{name} {peft.rank_of(kind)} is larger than a matrix that it is to update ({label} is "
                    f"{smallest}): give {smallest} at most{other}"
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from the content of a config.json or params.json.

        Raises:
            ValueError: an unknown, missing, wrongly typed or contradictory key, by name.
        """
        adapters = {f.name for f in dataclasses.fields(PeftArgs)}
        known = {f.name for f in dataclasses.fields(cls)} - {"peft"}
        given = {key: value for key, value in values.items() if key not in IGNORED_KEYS}
        odd = sorted(set(given) - known - adapters)
        if odd:
            said = ", ".join(key + nearest(key, {*known, *adapters}) for key in odd)
            raise ValueError(
                f"unknown key(s) {said}; known are {', '.join(sorted(known))}, "
                f"and with adapters {', '.join(sorted(adapters))}"
            )
        required = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
        missing = sorted(required - set(given))
        if missing:
            raise ValueError(f"key(s) {', '.join(missing)} missing: add them")
        for optional in ("n_kv_heads", "head_dim", "vocab_size", "moe", "attention", "dense", "rope"):
            if optional in given and given[optional] is None:
                del given[optional]
        parts = {"moe": MoEArgs, "attention": AttentionArgs, "dense": DenseArgs, "rope": RopeArgs}
        for name, kind in parts.items():
            if name in given:
                given[name] = part_of_config(name, kind, _with_parts(given[name]) if name == "moe" else given[name])
        if given.get("quant") is not None:
            given["quant"] = part_of_config("quant", QuantArgs, given["quant"])
        peft = {key: given.pop(key) for key in adapters & given.keys()}
        return cls(**given, peft=peft_from_dict(peft) if peft else None)

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that gives these arguments back.

        Keys of this library alone stand in it only where they say something: other tools refuse what they do not know.
        """
        values = dataclasses.asdict(self)
        if self.z_loss_weight == 0:
            del values["z_loss_weight"]
        if self.sliding_window is None:
            del values["sliding_window"]
        if self.family == "mixtral":
            del values["family"]
        if self.attention == AttentionArgs():
            del values["attention"]
        if self.rope is None:
            del values["rope"]
        if self.dense is None:
            del values["dense"]
        else:
            values["dense"]["layers"] = [*self.dense.layers]
        if "attention" in values:
            values["attention"]["windowed"] = [*self.attention.windowed]
        values["moe"] = self.moe.to_dict()
        del values["peft"], values["quant"]
        values |= self.peft.to_dict() if self.peft else {}
        return values | ({"quant": self.quant.to_dict()} if self.quant else {})

    @property
    def computes_as_mixtral(self) -> bool:
        """Whether its sizes say all of the model."""
        sizes = {name: getattr(self.moe, name) for name in ("num_experts", "num_experts_per_tok")}
        plain = self.attention == AttentionArgs() and self.moe == MoEArgs(**sizes)
        return plain and self.dense is None and self.rope is None

    @property
    def owns_corrections(self) -> bool:
        """Whether the routers' correction biases are a training run's own, and not those of a base that stays."""
        return self.moe.router.correction and (self.peft is None or self.peft.balance_tuning)

    def with_corrections(self) -> Self:
        """These arguments with routers whose correction biases balancing moves, softmax ones too."""
        router = dataclasses.replace(self.moe.router, correction=True)
        peft = None if self.peft is None else dataclasses.replace(self.peft, balance_tuning=True)
        return self.replace(moe=dataclasses.replace(self.moe, router=router), peft=peft)

    def without_corrections(self) -> Self:
        """The same with routers that have none."""
        router = dataclasses.replace(self.moe.router, correction=False)
        return self.replace(moe=dataclasses.replace(self.moe, router=router))

    @property
    def rotary_dim(self) -> int:
        """So many numbers of each head are turned."""
        return self.head_dim if self.attention.rotary_dim is None else self.attention.rotary_dim

    def window_of(self, layer: int) -> int | None:
        """So many tokens a token of that layer sees; None: all."""
        return self.attention.window if layer in self.attention.windowed else None

    @functools.cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """The numbers of the layers that have experts; at least one."""
        dense = () if self.dense is None else self.dense.layers
        return tuple(layer for layer in range(self.n_layers) if layer not in dense)

    def for_type(self, llama_type: str) -> Self:
        """These arguments as a llama_type reads them: one with adapters has defaults for them, another has none.

        Raises:
            ValueError: the file asks for adapters that the type does not have.
        """
        if llama_type in PEFT_TYPES:
            return self if self.peft else self.replace(peft=PeftArgs())
        if self.peft is not None:
            raise ValueError(
                f"the config sets {', '.join(self.peft.to_dict())}, which llama_type {llama_type} does "
                f"not have: give llama_type {PEFT_TYPES[0]}, or a config without them"
            )
        return self

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)


def _with_parts(moe: Any) -> Any:
    """What stands under "moe" in a config.json, with its parts made."""
    if not isinstance(moe, Mapping):
        return moe
    parts = {"router": RouterArgs, "clamp": ClampArgs}
    made: dict[str, Any] = {
        name: part_of_config(f"moe.{name}", kind, moe[name]) for name, kind in parts.items() if name in moe
    }
    return {**moe, **made}
