"""The dtype of a run's products, and what comes with it."""

import contextlib
from collections.abc import Iterator

import torch

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
