"""The prompts of single instructions, under the name by which users' programs import them."""

from accessory.text.instruction import PROMPT_NAMES, format_prompt

__all__ = ["PROMPT_NAMES", "format_prompt"]
