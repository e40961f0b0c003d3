"""Initial weights for a model that is trained from nothing."""

import torch
from torch import nn

from accessory.model.LLM.mistral import Transformer

STD = 0.02


@torch.no_grad()
def init_weights(model: Transformer, *, seed: int) -> None:
    """Normal with deviation 0.02, norms 1; what adds to the residual stream is scaled by 1 / sqrt(2 layers).

    The scaling is GPT-2's (Radford et al., 2019): the stream's variance then does not grow with depth.
    """
    generator = torch.Generator(device=model.state.device).manual_seed(seed)
    residual_scale = (2 * model.args.n_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
            continue
        adds_to_residual = name.endswith((".wo.weight", ".w2"))
        parameter.normal_(0.0, STD * (residual_scale if adds_to_residual else 1.0), generator=generator)
