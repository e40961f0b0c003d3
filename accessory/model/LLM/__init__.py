"""Model families as data, one file for each."""

from collections.abc import Mapping
from typing import Any

from accessory.errors import unknown
from accessory.model.LLM.family import Family
from accessory.model.LLM.glm4_moe import GLM4_MOE
from accessory.model.LLM.gpt_oss import GPT_OSS
from accessory.model.LLM.minimax_m2 import MINIMAX_M2
from accessory.model.LLM.mistral import MIXTRAL
from accessory.model.LLM.olmoe import OLMOE
from accessory.model.LLM.qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {
    family.name: family for family in (MIXTRAL, QWEN3_MOE, OLMOE, GLM4_MOE, MINIMAX_M2, GPT_OSS)
}


def family_of(name: object, key: str = "model_type") -> Family:
    """The family that a config.json names, by transformers' ``key`` or ours.

    Raises:
        ValueError: it is none that is known here.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(unknown(key, name, FAMILIES))
    return FAMILIES[name]


def family_of_config(values: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face config.json: by its model_type, else by its class.

    Raises:
        ValueError: what it names is not known here, or it names neither.
    """
    name, classes = values.get("model_type"), values.get("architectures")
    if name is not None:
        return family_of(name)
    if not classes:
        raise ValueError(f"it says no model_type, so its family is not known: give one of {', '.join(FAMILIES)}")
    by_class = {family.architecture: family for family in FAMILIES.values()}
    first = classes[0] if isinstance(classes, list) else classes
    if not isinstance(first, str) or first not in by_class:
        raise ValueError(unknown("architectures", first, by_class))
    return by_class[first]
