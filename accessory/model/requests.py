"""Checking what a model is asked, on every rank, before the first collective."""

import logging
from collections.abc import Sequence
from typing import Any

from accessory.errors import shown
from accessory.generation.sampling import Sampling
from accessory.model.transformer import Transformer
from accessory.parallel.state import agreed
from accessory.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Examples = Sequence[str | Sequence[int]]


def refuse_images(images: Any) -> None:
    """Raise ValueError where an image was given."""
    if images is not None:
        raise ValueError("an image was given, but this model reads text only: pass None")


def prompt_tokens(
    llma: Transformer, tokenizer: Tokenizer, prompts: Any, sampling: Sampling, *, images: Any
) -> list[list[int]]:
    """Token ids of prompts, each cut to leave room for its completion; collective over the model's ranks.

    A prompt that is too long keeps its beginning-of-sequence token and its last tokens, with a warning.

    Raises:
        ValueError: naming the argument; on every rank alike.
    """
    limit = llma.args.max_seq_len

    def check() -> list[list[int]]:
        return encode_prompts(tokenizer, prompts, sampling, images=images, limit=limit)

    encoded = agreed(llma.state, check, (prompts, sampling))
    return cut_prompts(encoded, limit - sampling.max_gen_len, say=llma.state.is_first)


def encode_prompts(
    tokenizer: Tokenizer, prompts: Any, sampling: Sampling, *, images: Any, limit: int
) -> list[list[int]]:
    """Token ids of prompts, however many they are.

    Raises:
        ValueError: naming the argument.
    """
    refuse_images(images)
    sampling.check(limit)
    return _tokens_of(prompts, tokenizer, bos=True, eos=False, name="prompts")


def cut_prompts(encoded: Sequence[list[int]], room: int, *, say: bool = True) -> list[list[int]]:
    """The prompts, each of at most ``room`` tokens: its first and its last ones.

    Args:
        say: warn of what is cut.
    """
    cut = []
    for index, tokens in enumerate(encoded):
        if len(tokens) > room:
            if say:
                logger.warning(
                    "prompts[%d] has %d tokens, more than max_seq_len - max_gen_len = %d: only its last are kept",
                    index,
                    len(tokens),
                    room,
                )
            tokens = [tokens[0], *tokens[len(tokens) - room + 1 :]]
        cut.append(tokens)
    return cut


def example_tokens(
    llma: Transformer,
    tokenizer: Tokenizer,
    examples: Examples,
    *,
    images: Any,
    bos: bool,
    eos: bool,
    contexts: Examples | None = None,
    scored: bool = False,
) -> tuple[list[list[int]], list[int] | None]:
    """Token ids of examples, and how many of each are context; collective over the model's ranks.

    Args:
        contexts: for each example the text or tokens with which it begins.
        scored: demand that every example has a token to score behind its context.

    Raises:
        ValueError: naming the argument; on every rank alike.
    """
    limit = llma.args.max_seq_len

    def check() -> tuple[list[list[int]], list[int] | None]:
        refuse_images(images)
        tokens = _tokens_of(examples, tokenizer, bos=bos, eos=eos, name="examples")
        for index, example in enumerate(tokens):
            if len(example) > limit:
                raise ValueError(
                    f"examples[{index}] has {len(example)} tokens, more than max_seq_len {limit}: "
                    "load the model with a larger max_seq_len or shorten it"
                )
        if not scored:
            return tokens, None
        given = None if contexts is None else _context_lengths(examples, contexts, tokenizer, bos=bos)
        for index, (example, context) in enumerate(zip(tokens, given or [1] * len(tokens), strict=True)):
            if context >= len(example):
                raise ValueError(
                    f"examples[{index}] has no token to score: it needs one behind its {context} of context"
                )
            if context < 1:
                raise ValueError(f"contexts[{index}] has no tokens: the first token of a text cannot be scored")
        return tokens, given

    return agreed(llma.state, check, (examples, contexts, bos, eos))


def _tokens_of(examples: Examples, tokenizer: Tokenizer, *, bos: bool, eos: bool, name: str) -> list[list[int]]:
    """Token ids of texts; lists of ids are taken as they are.

    Raises:
        ValueError: a bare string, an empty list, an empty example, or a token outside the vocabulary.
    """
    if isinstance(examples, str) or not isinstance(examples, Sequence) or not examples:
        raise ValueError(f"{name} must be a non-empty list of texts or of token lists, not {shown(examples)}")
    result = []
    for index, example in enumerate(examples):
        if isinstance(example, str):
            tokens = tokenizer.encode(example, bos=bos, eos=eos)
        elif isinstance(example, Sequence) and not isinstance(example, bytes) and set(map(type, example)) <= {int}:
            tokens = [int(token) for token in example]
        else:
            raise ValueError(f"{name}[{index}] must be a text or a list of token ids, not {shown(example)}")
        if not tokens:
            raise ValueError(f"{name}[{index}] has no tokens: give it at least one")
        if not all(0 <= token < tokenizer.n_words for token in tokens):
            raise ValueError(f"{name}[{index}] has a token outside the vocabulary of {tokenizer.n_words}")
        result.append(tokens)
    return result


def _context_lengths(examples: Examples, contexts: Examples, tokenizer: Tokenizer, *, bos: bool) -> list[int]:
    """How many tokens of each example belong to its context: of a text those that end within it."""
    if isinstance(contexts, str) or not isinstance(contexts, Sequence) or not contexts:
        raise ValueError(f"contexts must be a non-empty list of texts or of token lists, not {shown(contexts)}")
    if len(contexts) != len(examples):
        raise ValueError(f"{len(examples)} examples were given with {len(contexts)} contexts; give one for each")
    lengths = []
    for index, (example, context) in enumerate(zip(examples, contexts, strict=True)):
        if isinstance(context, str) != isinstance(example, str) or list(example[: len(context)]) != list(context):
            raise ValueError(f"contexts[{index}] is not the beginning of examples[{index}]")
        if isinstance(example, str):
            _, spans = tokenizer.encode_with_spans(example)
            # Some bytes of the character behind the context may end where it does: their span is empty, at its begin.
            within = sum(begin < len(context) and end <= len(context) for begin, end in spans)
            lengths.append(int(bos) + within)
        else:
            lengths.append(len(context))
    return lengths
