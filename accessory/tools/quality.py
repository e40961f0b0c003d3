"""How well a model predicts a text as in decoding, and its quantized copies, to compare them with it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.config import QuantArgs
from accessory.model.transformer import Transformer
from accessory.quant import QuantizedParameter

ROWS = 16  # windows that are read side by side


@torch.inference_mode()
def decoding_loss(llma: Transformer, windows_NL: Tensor) -> float:
    """Mean cross-entropy (natural logarithm) of every token of the windows but the first of each.

    A pass over whole windows would not do for a quantized model: the products of few tokens round activations.

    Args:
        windows_NL: int64 (windows, tokens).
    """
    length, total = windows_NL.shape[1], 0.0
    for rows in windows_NL.split(ROWS):
        slots, active = list(range(len(rows))), torch.ones(len(rows), dtype=torch.bool)
        cache = llma.new_cache(len(rows), length)
        logits = llma.prefill(rows[:, 0], [1] * len(rows), slots, cache)
        for place in range(1, length):
            total += F.cross_entropy(logits.float(), rows[:, place], reduction="sum").item()
            if place + 1 < length:
                logits = llma.decode(rows[:, place], cache, active)
                cache.extend(slots, [1] * len(rows))
    return total / (windows_NL.numel() - len(windows_NL))


@torch.no_grad()
def quantized_copy(model: Transformer, quant: QuantArgs) -> Transformer:
    """The same model with its matrices quantized."""
    args = model.args.replace(quant=quant)
    copy = Transformer(args, model.state, dtype=model.dtype, n_tokens=model.n_tokens).eval()
    copy.leave_out(model.gaps)
    plain = dict(model.named_parameters())
    for name, module in copy.named_modules():
        if isinstance(module, QuantizedParameter):
            module.to_local().write(plain[name])
    for name, parameter in copy.named_parameters():
        if name in plain:
            parameter.copy_(plain[name])
    return copy
