"""Models of the library as the tests load and run them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.config import ModelArgs
from accessory.generation.engine import complete
from accessory.generation.sampling import Sampling
from accessory.model.meta import MetaModel
from accessory.model.transformer import Transformer
from accessory.parallel.box import Box
from accessory.parallel.plan import local_box, parameter_shapes, trains

FIRST_LETTER = 0x4E00


def load(
    folder: Path | Sequence[Path],
    placement: str = "auto",
    max_seq_len: int = 128,
    dtype: str = "fp32",
    quant: str | None = None,
) -> MetaModel:
    """On the ranks of a pool, over all of them; in the test's own process, on it alone."""
    group = dist.group.WORLD if dist.is_initialized() else None
    return MetaModel.from_pretrained(
        folder,
        mp_group=group,
        dtype=dtype,
        device="cpu",
        max_seq_len=max_seq_len,
        expert_placement=placement,
        quant=quant,
    )


class Letters:
    """Every token is one distinct character, so that equal texts are equal tokens. Nothing ends a text by default."""

    def __init__(self, eos_id: int = -1) -> None:
        self.eos_ids = frozenset({eos_id})

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(FIRST_LETTER + token) for token in ids)

    def is_control(self, token_id: int) -> bool:
        return False

    def joins_next(self, token_id: int) -> bool:
        return False


def completions(
    llma: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_gen_len: int = 64,
    temperature: float = 0.0,
    top_p: float = 0.95,
    eos_id: int = -1,
) -> list[list[int]]:
    """The token ids that the engine adds to each prompt."""
    sampling = Sampling(max_gen_len=max_gen_len, temperature=temperature, top_p=top_p)
    texts: dict[int, str] = {}
    for step in complete(llma, Letters(eos_id), prompts, sampling):
        for progress in step:
            assert progress.index not in texts, "a finished sequence moved again"
            if progress.finish:
                texts[progress.index] = progress.text
    return [[ord(letter) - FIRST_LETTER for letter in texts[index]] for index in range(len(prompts))]


def assembled(by_rank: list[dict[str, Tensor]], args: ModelArgs, placement: Any) -> dict[str, Tensor]:
    """Whole gradients from the ranks' slices; where ranks hold the same elements, they must agree to the bit."""
    whole = {}
    for name, shape in parameter_shapes(args):
        if not trains(name, args):
            continue
        whole[name] = torch.full(shape, float("nan"))
        for rank, gradients in enumerate(by_rank):
            box = local_box(name, shape, args, placement=placement, rank=rank, size=len(by_rank))
            target = whole[name][box.within(Box.whole(shape))]
            assert gradients[name].shape == target.shape, name
            assert torch.equal(gradients[name], target) or target.isnan().all(), f"{name}: rank {rank} differs"
            target.copy_(gradients[name])
    return whole
