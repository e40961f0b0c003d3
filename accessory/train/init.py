"""Initial weights for a model that is trained from nothing."""

import torch
from torch import nn

from accessory.model.LLM.mistral import Transformer

ROUTER_STD = 0.02


@torch.no_grad()
def init_weights(model: Transformer, *, seed: int) -> None:
    """Normal weights that keep a signal's size: deviation 1 / sqrt(inputs) for matrices, 1 for the embedding.

    Norms are 1. The router starts nearly even (0.02). What adds to the residual stream is scaled by
    1 / sqrt(2 layers), as GPT-2's is (Radford et al., 2019): the stream's variance then does not grow with depth.
    """
    generator = torch.Generator(device=model.state.device).manual_seed(seed)
    residual_scale = (2 * model.args.n_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
            continue
        if name.endswith("tok_embeddings.weight"):
            std = 1.0
        elif name.endswith("gate.weight"):
            std = ROUTER_STD
        else:
            std = parameter.shape[-1] ** -0.5
        adds_to_residual = name.endswith((".wo.weight", ".w2"))
        parameter.normal_(0.0, std * (residual_scale if adds_to_residual else 1.0), generator=generator)
