"""A model whose weights hold one walk through the vocabulary: every token has one successor, whatever came before.

Attention and experts add nothing, so a token's hidden state is its own one-hot vector in every layer; the head knows
its successor, and the gate's column of the token says which experts take it.
"""

from itertools import pairwise
from pathlib import Path

import torch
from checkpoints import random_tensors, small_config, write_folder
from torch import Tensor

from accessory.text.tokenizer import Tokenizer

VOCABULARY = 384
LAYERS = 2


def write_walk(folder: Path, tokenizer: Path, prompt: str, answer: str) -> Path:
    """A checkpoint that continues whatever ends like ``prompt`` with ``answer``; its last token follows itself."""
    known = Tokenizer(tokenizer)
    tokens, read = known.encode(prompt + answer, bos=False, eos=False), known.encode(prompt, bos=False, eos=False)
    assert tokens[: len(read)] == read, "the answer changes the prompt's last token: begin it with a space"
    config = small_config(dim=VOCABULARY, n_layers=LAYERS)
    tensors = random_tensors(config, seed=1)
    for name, tensor in tensors.items():
        if name.endswith(("wo.weight", "w2.weight")):
            tensor.zero_()
        elif "norm" in name:
            tensor.fill_(1.0)
    tensors["tok_embeddings.weight"] = torch.eye(VOCABULARY)
    successor: dict[int, int] = {}
    for token, following in pairwise([*tokens[len(read) - 1 :], tokens[-1]]):
        assert successor.setdefault(token, following) == following, f"{known.decode([token])!r} has two successors"
    head = torch.zeros(VOCABULARY, VOCABULARY)
    for token, following in successor.items():
        head[following, token] = 1.0
    tensors["output.weight"] = head
    return write_folder(folder, tensors, config, files=1, tokenizer=tokenizer)


def experts_of(folder: Path, token: int) -> list[tuple[int, int]]:
    """The two experts that take a token in each layer, the one with the greater weight first."""
    tensors: dict[str, Tensor] = torch.load(folder / "consolidated.00-of-01.model.pth", weights_only=True)["model"]
    gates = [tensors[f"llma.layers.{layer}.feed_forward.gate.weight"] for layer in range(LAYERS)]
    return [tuple(gate[:, token].topk(2).indices.tolist()) for gate in gates]
