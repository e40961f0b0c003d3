"""Scores of given texts: what compute_logits and evaluate_examples return."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.model.transformer import Transformer

# Examples are scored together up to this many tokens; one example may be longer by itself.
SCORE_TOKENS = 4096


@torch.no_grad()
def score_tokens(model: Transformer, examples: Sequence[Sequence[int]]) -> list[Tensor]:
    """Float32 logits (tokens, vocab) of every example, whole on every rank."""
    device = model.state.device
    result: list[Tensor] = []
    batch: list[Sequence[int]] = []
    for index, example in enumerate(examples):
        batch.append(example)
        following = len(examples[index + 1]) if index + 1 < len(examples) else SCORE_TOKENS
        if sum(map(len, batch)) + following > SCORE_TOKENS:
            lengths = [len(tokens) for tokens in batch]
            flat = torch.tensor([token for tokens in batch for token in tokens], device=device)
            # Copies: whoever keeps one example's logits should not keep the batch's.
            result += [part.to(torch.float32, copy=True) for part in model.score(flat, lengths).split(lengths)]
            batch = []
    return result


def evaluate(
    logits: Sequence[Tensor], examples: Sequence[Sequence[int]], contexts: Sequence[int] | None
) -> dict[str, list]:
    """Likelihood measures of every example's tokens behind its context.

    Args:
        logits: as `score_tokens` gives them.
        contexts: how many of each example's first tokens are not scored; None scores all but the first.

    Returns:
        Lists under log_likelihood (sum, natural logarithm), ppl (exponential of the mean negative log-likelihood),
        max_equal (would greedy decoding say the same) and non_context_logits ((scored tokens, vocab) tensors).
    """
    result: dict[str, list] = {"log_likelihood": [], "ppl": [], "max_equal": [], "non_context_logits": []}
    for index, (scores, tokens) in enumerate(zip(logits, examples, strict=True)):
        first = 1 if contexts is None else contexts[index]
        # The logits at a position are those of the next token.
        scored = scores[first - 1 : -1]
        targets = torch.tensor(tokens[first:], device=scores.device)
        losses = F.cross_entropy(scored, targets, reduction="none")
        result["log_likelihood"].append(-losses.double().sum().item())
        result["ppl"].append(losses.double().mean().exp().item())
        result["max_equal"].append(bool((scored.argmax(-1) == targets).all()))
        result["non_context_logits"].append(scored)
    return result
