"""Adapters of Hugging Face's peft library, over Hugging Face's names of the modules.

A module's update is scale * B A. Ranks and scales may differ from module to module there, and experts have one each or
one for all of a layer's fused matrices; here a model has one rank and one scale. So smaller updates are filled up with
zeros, and where a module's scale is another its B is multiplied by the quotient. What is written for fused matrices of
gate and up has twice the rank: of A one half is for each of the two, and B has zeros for the other.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accessory.checkpoint.layouts.accessory import EXPERTS, MATRICES
from accessory.checkpoint.layouts.hf import IN_LAYER, MODULES, ROOM, ROOM_5, config_of, lie_of
from accessory.checkpoint.layouts.layout import Found, Keys, Layout
from accessory.checkpoint.layouts.rows import ALL, EACH, Lie, Row, Source, by_parameter, for_all
from accessory.config import ModelArgs, read_json
from accessory.config.checks import is_number
from accessory.errors import CheckpointError, shown
from accessory.model.LLM import FAMILIES
from accessory.model.LLM.family import Family
from accessory.parallel.box import Box
from accessory.parallel.plan import split_of

CONFIG_NAME = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
_FACTORS = {"lora_a": "lora_A", "lora_b": "lora_B"}
_FUSED = re.compile(r"model\.layers\.\d+\.mlp\.experts(\.base_layer)?")
# Fused matrices by ours; they are parameters of a module, in this order, and the last one's wrapper is the outer one.
FUSED_NAMES = {"w13": "mlp.experts.gate_up_proj", "w2": "mlp.experts.down_proj"}
_WRAPPERS = {"w13": f"{IN_LAYER}mlp.experts.base_layer", "w2": f"{IN_LAYER}mlp.experts"}

# Settings of LoraConfig that make something else of A and B than B A, or need more; and what is neutral there.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "kasa_config": (),
    "velora_config": (),
    "monteclora_config": (),
    "alora_invocation_tokens": (),
    "layer_replication": (),
    "trainable_token_indices": (),
    "arrow_config": (),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "bias": ("none",),
}
# Ways to begin that change the base's weights too, so that A and B alone are not the update.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@functools.cache
def _rows(family: str) -> dict[str, tuple[Row, ...]]:
    return by_parameter(_rows_of(FAMILIES[family]))


def is_updated(module: str) -> bool:
    """Whether adapters update one of our modules in a layer."""
    return split_of(f"layers.0.{module}.weight").kind in ("attention", "dense", "shared", "router")


def modules_of(family: Family) -> dict[str, str]:
    """Its modules by ours as transformers 5 has them, whose router peft reaches by the name of its weight."""
    return {ours: theirs.replace(ROOM, ROOM_5) for ours, theirs in family.modules.items()}


def _rows_of(family: Family) -> Iterator[Row]:
    """An adapter's factors, and norms that were trained whole."""
    for ours, theirs in modules_of(family).items():
        module = f"{IN_LAYER}{theirs}"
        if ours.endswith("norm"):
            yield Row(f"layers.N.{ours}.weight", f"{module}.weight", lies=lie_of(ours))
        elif is_updated(ours):
            yield Row(f"layers.N.{ours}.lora_a.weight", f"{module}.lora_A.weight")
            yield Row(f"layers.N.{ours}.lora_b.weight", f"{module}.lora_B.weight", lies=lie_of(ours))
    for matrix, singles in MATRICES.items() if family.matrices else ():
        for single, place in singles:
            for own, theirs in _FACTORS.items():
                key = f"{IN_LAYER}{family.matrices[single]}.{theirs}.weight"
                yield Row(f"{EXPERTS}{matrix}_{own}", key, (EACH, *place))
    yield Row("norm.weight", f"{MODULES['norm']}.weight")
    for own, theirs in _FACTORS.items():
        yield Row(f"output.{own}.weight", f"{MODULES['output']}.{theirs}.weight")


# Of fused experts (E, r, in) lies as (E * r, in), and (E, out, r) as (out, r * E).
_FUSED_A = Lie(lambda shape: (shape[0] * shape[1], shape[2]), lambda stored, shape, _: stored.view(shape))
_FUSED_B = Lie(
    lambda shape: (shape[1], shape[2] * shape[0]),
    lambda stored, shape, _: stored.view(shape[1], shape[2], shape[0]).permute(2, 0, 1),
)


def _fused_half(half: int, *, by_turns: bool) -> Lie:
    """Of (E, out, r) where gate and up are one below the other, or their rows by turns, one of the two."""

    def seen(stored: Any, shape: tuple[int, ...], _: Any) -> Any:
        count, rows, rank = shape
        both = stored.view(rows, 2, rank, count).transpose(0, 1) if by_turns else stored.view(2, rows, rank, count)
        return both[half].permute(2, 0, 1)

    return Lie(lambda shape: (2 * shape[1], shape[2] * shape[0]), seen)


# What is written of (E, 2, r, in) and (E, 2, out, r) for fused matrices whose rows lie by turns.
_BOTH_A = Lie(lambda shape: (math.prod(shape[:3]), shape[3]), lambda stored, shape, _: stored.view(shape))
_BOTH_B = Lie(
    lambda shape: (2 * shape[2], 2 * shape[3] * shape[0]),
    lambda stored, shape, _: (
        stored.view(shape[2], 2, 2, shape[3], shape[0]).diagonal(dim1=1, dim2=2).permute(2, 3, 0, 1)
    ),
)


def _fused_of(family: Family) -> dict[str, tuple[Row, ...]]:
    """What is written of a family whose experts have no modules of their own."""
    return {} if family.matrices else by_parameter(_written_fused_rows())


def _written_fused_rows() -> Iterator[Row]:
    lies = {"w13": (_BOTH_A, _BOTH_B), "w2": (_FUSED_A, _FUSED_B)}
    for parameter, wrapper in _WRAPPERS.items():
        for (own, theirs), lie in zip(_FACTORS.items(), lies[parameter], strict=True):
            yield Row(f"{EXPERTS}{parameter}_{own}", f"{wrapper}.{theirs}.weight", lies=lie)


def _fused_rows(module: str, parameter: str, *, by_turns: bool) -> Iterator[Row]:
    """Of a layer's fused experts; their A is that of both halves of gate_up."""
    for own, theirs in _FACTORS.items():
        key, name = f"{module}.{theirs}.weight", f"{EXPERTS}{parameter}_{own}"
        if parameter == "w2":
            yield Row(name, key, (ALL,), _FUSED_A if own == "lora_a" else _FUSED_B)
        else:
            for half in (0, 1):
                lies = _FUSED_A if own == "lora_a" else _fused_half(half, by_turns=by_turns)
                yield Row(name, key, (ALL, half), lies)


@dataclass(frozen=True, kw_only=True)
class AdapterLayout(Layout):
    """The layout of one adapter's file, whose own ranks and scales it has.

    Attributes:
        ranks: of each tensor of a factor, by its key.
        factors: what tensors of lora_b are multiplied by, by their keys, where it is not 1.
    """

    ranks: Mapping[str, int] = field(repr=False)
    factors: Mapping[str, float] = field(repr=False)

    def sources(self, args: ModelArgs, files: int) -> Iterator[Source]:
        """As of any layout; boxes end where a tensor's own rank does."""
        for source in super().sources(args, files):
            if source.key in self.ranks:
                axis = split_of(source.parameter).shape.index("rank")
                size = [*source.box.size]
                size[axis] = self.ranks[source.key]
                box = Box(source.box.start, tuple(size))
                source = dataclasses.replace(source, box=box, factor=self.factors.get(source.key, 1.0))
            yield source


# peft (0.19 and later) turns experts one by one itself into updates of transformers 5's fused ones, and other programs
# read them as they are.
PEFT = AdapterLayout(
    name="peft",
    shown="an adapter of peft's",
    rows=lambda args: _rows(args.family) | _fused_of(FAMILIES[args.family]),
    cut=None,
    prefix=PREFIX,
    strips=PREFIX,
    file_name=lambda file, files, ending: _FILES[0],
    # Beside an update of the head peft saves the base's own.
    passed_over=re.compile(rf"{re.escape(MODULES['output'])}\.base_layer\.weight"),
    config=config_of,
    ranks={},
    factors={},
)


@dataclass(frozen=True)
class _Module:
    """A module that has an update: its name as peft's patterns meet it, its keys' beginning, and its rank."""

    name: str
    begins: str
    rank: int


def find_peft(folder: Path, names: Sequence[str]) -> Found | None:
    """adapter_config.json with adapter_model.safetensors, or .bin."""
    file = next((name for name in _FILES if name in names), None)
    if file is None or CONFIG_NAME not in names:
        return None
    path = folder / CONFIG_NAME
    return Found(
        form="peft", files=((file,),), layout=partial(_layout, path), rules=True, adapter=partial(_settings, path)
    )


def _layout(path: Path, keys: Keys, args: ModelArgs, probe: int) -> AdapterLayout:
    del probe
    config = _checked(path)
    shapes = _shapes(path, keys)
    modules = list(_modules(shapes, args, path))
    fused = {module.begins: module.name.rpartition(".")[2] for module in modules if module.name != module.begins}
    rows = [row for own in _rows(args.family).values() for row in own]
    by_turns = not FAMILIES[args.family].matrices
    for begins, name in {(re.sub(r"\.\d+\.", ".{N}.", begins), name) for begins, name in fused.items()}:
        rows += _fused_rows(begins, "w13" if name == "gate_up_proj" else "w2", by_turns=by_turns)
    assert args.peft is not None
    factors = {
        f"{module.begins}.lora_B.weight": _scale(module, config) / args.peft.scale_of(kind)
        for module in modules
        if (kind := _kind(module, args)) is not None
    }
    return dataclasses.replace(
        PEFT,
        rows=for_all(rows),
        pads=True,
        ranks={f"{module.begins}.{factor}.weight": module.rank for module in modules for factor in _FACTORS.values()},
        factors={key: factor for key, factor in factors.items() if not math.isclose(factor, 1, rel_tol=1e-12)},
    )


def _settings(path: Path, keys: Keys, base: ModelArgs) -> dict[str, Any]:
    """Keys of our config about adapters, above a base of these sizes."""
    config, shapes = _checked(path), _shapes(path, keys)
    modules = list(_modules(shapes, base, path))
    if not modules:
        raise CheckpointError(f"{path.parent} holds no lora_A and lora_B: it is no adapter")
    rank, rooted = max(module.rank for module in modules), bool(config.get("use_rslora"))
    kinds = [(_kind(module, base), module.rank) for module in modules]
    ranks = {kind: max(own for other, own in kinds if other == kind) for kind, _ in kinds if kind is not None}
    scales = [_scale(module, config) for module in modules]
    usual = max(set(scales), key=scales.count)
    return {
        "lora_rank": rank,
        # Without the last digits, which a root and its square have lost.
        "lora_alpha": round(usual * math.sqrt(rank), 12) if rooted else usual * rank,
        **({"rslora": True} if rooted else {}),
        "lora_ranks": ranks,
        "lora_targets": [*ranks],
        "bias_tuning": False,
        "norm_tuning": any("norm.weight" in key for key in shapes),
    }


def _checked(path: Path) -> Mapping[str, Any]:
    """adapter_config.json.

    Raises:
        CheckpointError: it is unusable, or of something else than plain LoRA.
    """
    try:
        config = read_json(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type is {shown(kind)}, and only LORA is read: merge it with peft itself")
    for name, neutral in _REFUSED.items():
        value = config.get(name)
        if value not in (None, *neutral) and value != {}:
            raise CheckpointError(
                f"{path}: {name} is {shown(value)}, which plain LoRA has not: merge it with peft itself"
            )
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{path}: init_lora_weights is {shown(begun)}, which changed the base as well: let peft convert it "
            "(path_initial_model_for_weight_conversion)"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, Mapping):
            raise CheckpointError(f"{path}: {name} must be an object, not {shown(config[name])}")
    if not is_number(config.get("lora_alpha")):
        raise CheckpointError(f"{path}: lora_alpha is {shown(config.get('lora_alpha'))}, not a number: copy it again")
    return config


def _shapes(path: Path, keys: Keys) -> dict[str, tuple[int, ...]]:
    """Of the adapter's tensors.

    Raises:
        CheckpointError: a factor without the other.
    """
    shapes = {key.removeprefix(PREFIX): tuple(tensor.shape) for key, tensor in keys(0).items()}
    for key in shapes:
        pair = [key.replace(f".lora_{one}.", f".lora_{other}.") for one, other in ("AB", "BA")]
        if any(other not in shapes for other in pair):
            other = next(other for other in pair if other not in shapes)
            raise CheckpointError(f"{path.parent} holds {key} but not {other}: copy the adapter again")
    return shapes


def _modules(shapes: Mapping[str, tuple[int, ...]], args: ModelArgs, path: Path) -> Iterator[_Module]:
    experts = args.moe.num_experts
    for key, shape in shapes.items():
        begins, dot, _ = key.partition(".lora_A.weight")
        if not dot:
            continue
        other = shapes[f"{begins}.lora_B.weight"]
        if len(shape) != 2 or len(other) != 2:
            raise CheckpointError(f"{path.parent}: {key} has shape {shape}, and not that of a factor: copy it again")
        if not _FUSED.fullmatch(begins):
            yield _Module(begins, begins, shape[0])
            continue
        if shape[0] % experts:
            raise CheckpointError(
                f"{path.parent}: {key} has shape {shape}, not one of {experts} experts: copy it again"
            )
        # One wrapper lies around the other, in the order in which they were asked for.
        sides = {"gate_up_proj": (args.dim, 2 * args.hidden_dim), "down_proj": (args.hidden_dim, args.dim)}
        name = next((name for name, own in sides.items() if own == (shape[1], other[0])), None)
        if name is None:
            raise CheckpointError(f"{path.parent}: {key} and its lora_B fit no matrix of the experts: give its base")
        yield _Module(f"{begins.removesuffix('.base_layer')}.{name}", begins, shape[0] // experts)


def _kind(module: _Module, args: ModelArgs) -> str | None:
    """Which of our matrices a module is one of, as `PeftArgs` has them; None: of none that gets updates here."""
    if module.name != module.begins:
        return "routed"
    kinds = {
        row.key: split_of(row.parameter).adapter
        for rows in PEFT.rows(args).values()
        for row in rows
        if "lora_A" in row.key
    }
    begins = module.begins
    for number in ("{N}", "{E}"):
        begins = re.sub(r"\.\d+\.", f".{number}.", begins, count=1)
    return kinds.get(f"{begins}.lora_A.weight")


def _scale(module: _Module, config: Mapping[str, Any]) -> float:
    """Factor on a module's B A, as peft has it."""
    patterns = config.get("alpha_pattern") or {}
    # What is no linear layer in transformers, as a router, peft knows by the name of its weight.
    names = module.name, f"{module.name}.weight"
    matching = (pattern for pattern in patterns if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names))
    alpha = patterns.get(next(matching, None), config["lora_alpha"])
    return float(alpha) / (math.sqrt(module.rank) if config.get("use_rslora") else module.rank)
