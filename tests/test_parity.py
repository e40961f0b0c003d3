"""The model against transformers' Mixtral, at several rank counts and placements."""

from pathlib import Path

import torch
import torch.distributed as dist

from accessory.model.meta import MetaModel
from checkpoints import random_mixtral, write_checkpoint


def logits_on_rank(folder: Path, placement: str, examples: list[list[int]]) -> list[torch.Tensor]:
    model = MetaModel.from_pretrained(
        folder, mp_group=dist.group.WORLD, dtype="fp32", max_seq_len=256, expert_placement=placement
    )
    return model.compute_logits(examples)


def test_smoke(ranks, small_tokenizer, tmp_path):
    hf = random_mixtral(0)
    folder = write_checkpoint(tmp_path / "c", hf, small_tokenizer, files=4)
    examples = [[1, *torch.randint(3, 384, (n,)).tolist()] for n in (20, 3, 7)]
    with torch.no_grad():
        truth = [hf(torch.tensor([example])).logits[0] for example in examples]
    for size in (1, 2, 4, 8):
        for placement in ("expert", "tensor"):
            for logits in ranks(size).run(logits_on_rank, folder, placement, examples):
                for ours, theirs in zip(logits, truth, strict=True):
                    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
