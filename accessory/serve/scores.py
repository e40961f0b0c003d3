"""How probable the model found tokens, as `TokenScore`s.

Shape letters: T tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from accessory.serve import batch
from accessory.serve.request import TokenScore


def token_scores(logits_TV: Tensor, tokens: Sequence[int], alternatives: int) -> list[TokenScore]:
    """Scores of tokens in the places that the logits predict, with so many of the most probable ones."""
    logprobs_TV = torch.log_softmax(logits_TV.float(), dim=-1)
    chosen = logprobs_TV.gather(-1, torch.tensor(tokens, device=logprobs_TV.device)[:, None]).squeeze(-1).tolist()
    if not alternatives:
        return [TokenScore(token, logprob) for token, logprob in zip(tokens, chosen, strict=True)]
    best = logprobs_TV.topk(min(alternatives, logprobs_TV.shape[-1]), dim=-1)
    tops = (tuple(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return [TokenScore(*scored) for scored in zip(tokens, chosen, tops, strict=True)]


def score_prompt(sequence: batch.Sequence, logits_TV: Tensor) -> None:
    """Note how probable the tokens behind the next ones to be read are."""
    asked, first = sequence.request, sequence.read + 1
    following = asked.tokens[first : first + logits_TV.shape[0]]
    if following and asked.prompt_logprobs is not None:
        sequence.prompt_scores += token_scores(logits_TV[: len(following)], following, asked.prompt_logprobs)
