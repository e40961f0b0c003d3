"""Model families as data, one file for each."""

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
