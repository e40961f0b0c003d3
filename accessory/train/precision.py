"""The dtype of a run's products, and what comes with it."""

import contextlib
import math
from collections.abc import Iterator

import torch

from accessory.parallel.state import on_all_ranks
from accessory.train.options import Precision

COMPUTE_DTYPES: dict[Precision, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}


@contextlib.contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """Let float32 products use TensorFloat-32 where that was asked for, and nowhere else."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def loss_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler | None:
    """For float16, whose gradients would vanish below 6e-8 without one; None for the others."""
    return torch.amp.GradScaler(device.type) if precision == "fp16" else None


def judge_step(scaler: torch.amp.GradScaler | None, loss: float, rest: float, grad_norm: float) -> bool:
    """Whether a step may be taken: its numbers are finite. The scaler follows what they are.

    Not GradScaler.step: the numbers are those of all ranks, which so come to one judgement.

    Args:
        rest: the sum of the other losses.

    Raises:
        FloatingPointError: they are not, and no scaler makes another try of them; on every rank alike.
    """
    finite = math.isfinite(loss + rest + grad_norm)
    if scaler is None:
        if not finite:
            what = f"loss {loss} with gradient norm {grad_norm} is not finite"
            raise on_all_ranks(FloatingPointError(f"{what}; lower the learning rate or clip the gradients harder"))
    elif finite:
        scaler.update()
    else:
        scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
        scaler.load_state_dict({**scaler.state_dict(), "_growth_tracker": 0})
        if scaler.get_scale() < 1:
            what = f"loss {loss} overflows float16 at every loss scale down to 1"
            raise on_all_ranks(FloatingPointError(f"{what}; use --precision bf16 or lower the learning rate"))
    return finite
