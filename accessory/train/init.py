"""Initial weights for a model that is trained from nothing."""

import torch

from accessory.model.lora import begin_adapters
from accessory.model.transformer import Transformer
from accessory.parallel.box import Box
from accessory.parallel.ops import local
from accessory.parallel.plan import parameter_shapes, split_of
from accessory.train.sharding import own_boxes

ROUTER_STD = 0.02
# Of what does not begin at 1 / sqrt(inputs).
_STD = {"embedding": 1.0, "router": ROUTER_STD}


@torch.no_grad()
def init_weights(model: Transformer, *, seed: int) -> None:
    """Normal weights that keep a signal's size: deviation 1 / sqrt(inputs) for matrices, 1 for the embedding.

    Norms are 1, biases and sinks 0. The router starts nearly even (0.02). What adds to the residual stream is scaled by
    1 / sqrt(2 layers), as GPT-2's is (Radford et al., 2019): the stream's variance then does not grow with depth.

    The whole model is the same to the bit however it is split and sharded: each rank draws every parameter whole,
    one after another, and keeps its own piece. Adapters begin untrained, and change nothing for the others.
    """
    device = model.state.device
    generator = torch.Generator(device=device).manual_seed(seed)
    residual_scale = (2 * model.args.n_layers) ** -0.5
    shapes, boxes = dict(parameter_shapes(model.args)), own_boxes(model)
    for name, parameter in model.named_parameters():
        own, row = local(parameter), split_of(name)
        if row.adapter:
            begin_adapters({name: own}, boxes, [name], model.args, seed=seed)
            continue
        if row.kind == "norm":
            own.fill_(1.0)
            continue
        if row.kind in ("bias", "sink", "correction"):
            own.zero_()
            continue
        shape = shapes[name]
        std = _STD.get(row.kind, shape[-1] ** -0.5)
        whole = torch.empty(shape, dtype=parameter.dtype, device=device)
        whole.normal_(0.0, std * (residual_scale if row.to_residual else 1.0), generator=generator)
        own.copy_(whole[boxes[name].within(Box.whole(shape))])
