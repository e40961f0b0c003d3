"""An adapter as a folder of Hugging Face's peft library."""

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from accessory.checkpoint.companions import ADAPTER_CONFIG
from accessory.checkpoint.folder import Folder, Weights, is_finite
from accessory.checkpoint.layouts import BASE, HF, PEFT, Source, own_key
from accessory.checkpoint.layouts.hf import MODULES
from accessory.checkpoint.layouts.peft import FUSED_NAMES, is_updated, modules_of
from accessory.checkpoint.manifest import write_manifest
from accessory.checkpoint.write import Writer
from accessory.config import ModelArgs, PeftArgs
from accessory.errors import CheckpointError, first_of
from accessory.files import new_folder, write_json
from accessory.model.LLM import FAMILIES
from accessory.parallel.box import Box
from accessory.parallel.plan import rows_of_model, split_of
from accessory.text.template import TEMPLATE_NAME


def export_adapter(
    adapter: str | Path, destination: str | Path, *, llama_config: Sequence[str | Path] | None = None
) -> None:
    """Write adapter_config.json and adapter_model.safetensors; norms that trained go along as modules_to_save.

    The chat template of the form that was trained goes along too.

    Args:
        llama_config: config files for a folder that has none, or to overrule it.

    Raises:
        ValueError: the folder has no LoRA, or biases that are not zero, for which Hugging Face's models have no place.
        FileExistsError: the destination is not empty.
        CheckpointError, FileNotFoundError: the folder cannot be read, or holds infinities or NaN.
        OSError: the disk is full.
    """
    folder = Folder(adapter)
    args = folder.with_vocabulary(folder.load_args(llama_config))
    if args.peft is None or args.peft.lora_rank < 1:
        raise ValueError(f"{folder.path} has no LoRA (its config has no lora_rank): there is nothing to export")
    if args.owns_corrections or HF.unsaid(args):
        raise ValueError(
            f"{folder.path} has correction biases of its own (balance_tuning), for which peft has no place: merge it "
            "and keep accessory's form, or train without balancing routers by it"
        )
    weights = folder.weights(args, partial=True)
    _refuse_biases(weights)
    norms = {name for name in weights.held if args.peft.norm_tuning and split_of(name).kind == "norm"}
    factors = {name for name in weights.held if split_of(name).kind == "lora"}
    if not factors:
        raise ValueError(f"{folder.path} holds no lora_a and lora_b: it is a base, not an adapter")

    def read(target: Source, box: Box) -> Tensor:
        values = weights.read(target.parameter, box)
        if not is_finite(values):
            raise CheckpointError(
                f"{folder.path}: {own_key(target)} has infinities or NaN: copy the folder again, or take "
                "an earlier step's"
            )
        return values

    with new_folder(Path(destination)) as aside:
        writer = Writer(aside, PEFT, args, held=norms | factors, dtype=weights.dtype_of)
        writer.fill(read)
        write_json(aside / ADAPTER_CONFIG, _config(args, norms=bool(norms)))
        if (template := folder.path / TEMPLATE_NAME).is_file():
            shutil.copyfile(template, aside / TEMPLATE_NAME)
        write_manifest(aside, writer.sums)


def _refuse_biases(weights: Weights) -> None:
    sources = (one for one in BASE.sources(weights.args, 1) if one.parameter in weights.held)
    biases = (one for one in sources if split_of(one.parameter).adapter == "bias")
    biased = [one.key for one in biases if bool(weights.read(one.parameter, one.box).any())]
    if biased:
        raise ValueError(
            f"{weights.folder.path}: {first_of(biased, 1)} is not zero, and Hugging Face's models have no place for "
            "it: train with bias_tuning false, or merge the adapter and keep the format"
        )


def _config(args: ModelArgs, *, norms: bool) -> dict[str, object]:
    assert args.peft is not None
    peft, family = args.peft, FAMILIES[args.family]
    present = {row.pattern for row in rows_of_model(args)}
    theirs = {own: name for own, name in modules_of(family).items() if f"layers.N.{own}.weight" in present}
    saved = [_last(name) for own, name in theirs.items() if own.endswith("norm")]
    of_kind: dict[str, list[str]] = {kind: [] for kind in peft.lora_targets}
    for own, name in theirs.items():
        # Of feed-forward parts peft takes modules' names that end as those of experts do for experts'.
        kind = split_of(f"layers.N.{own}.weight").kind
        if is_updated(own) and kind in of_kind:
            of_kind[kind].append(_last(name) if kind == "attention" else f"{name}.weight")
    if "routed" in of_kind:
        of_kind["routed"] = [_last(name) for name in family.matrices.values()]
    if "head" in of_kind:
        of_kind["head"] = [MODULES["output"]]
    parameters = [name for kind in ("dense", "shared", "router") for name in of_kind.get(kind, ())]
    fused = "routed" in of_kind and not family.matrices
    parameters += FUSED_NAMES.values() if fused else ()
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        **_ranks(peft, of_kind, fused=fused),
        **({"use_rslora": True} if peft.rslora else {}),
        "lora_dropout": 0.0,  # of training, which is over; peft has none for stacked experts
        "bias": "none",
        "target_modules": [
            *dict.fromkeys(name for kind in ("attention", "routed", "head") for name in of_kind.get(kind, ()))
        ],
        "target_parameters": parameters or None,
        "modules_to_save": [*saved, MODULES["norm"]] if norms else None,
        "inference_mode": True,
    }


def _ranks(peft: PeftArgs, of_kind: Mapping[str, Sequence[str]], *, fused: bool) -> dict[str, object]:
    """Rank and alpha of most matrices, and of those that have others, by patterns of their names.

    Most are the experts': peft makes patterns for them itself, of what it is told of all. Where gate and up are written
    as one matrix, it has twice the rank, and the same scale.
    """
    most = "routed" if "routed" in of_kind else max(of_kind, key=lambda kind: peft.rank_of(kind) == peft.lora_rank)
    values: dict[str, object] = {"r": peft.rank_of(most), "lora_alpha": _number(peft.alpha_of(most))}
    of_both = math.sqrt(2) if peft.rslora else 2
    for key, value_of, times in (("rank_pattern", peft.rank_of, 2), ("alpha_pattern", peft.alpha_of, of_both)):
        others = {kind: names for kind, names in of_kind.items() if value_of(kind) != value_of(most)}
        pattern = {re.escape(name): _number(value_of(kind)) for kind, names in others.items() for name in names}
        pattern |= {_last(FUSED_NAMES["w13"]): _number(times * value_of("routed"))} if fused else {}
        values |= {key: pattern} if pattern else {}
    return values


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _last(module: str) -> str:
    return module.rpartition(".")[2]
