"""Perplexity of quantized weights beside bfloat16, as decoding meets them, on text that was not trained on.

accessory tiny --out runs/tiny
python benchmarks/quality.py runs/tiny      # the trained tiny model, and a random one of the shape 'mid'
"""

import argparse
import math
import time
from pathlib import Path

import torch
from machine import cpu_name
from mid import ARGS
from torch import Tensor

from accessory.config import QuantArgs
from accessory.model.meta import MetaModel
from accessory.model.transformer import Transformer
from accessory.parallel.state import ParallelState
from accessory.tools.corpus import documentation_corpus
from accessory.tools.quality import decoding_loss, quantized_copy
from accessory.tools.tiny import HELD_BACK, token_stream
from accessory.train.init import init_weights

LENGTH = 128
FORMS = {
    "int8": QuantArgs(type="int8"),
    "int4, groups of 64": QuantArgs(type="int4"),
    "int4, groups of 32": QuantArgs(type="int4", group_size=32),
    "nf4": QuantArgs(type="nf4"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tiny", type=Path, help="folder that `accessory tiny` wrote")
    parser.add_argument("--windows", type=int, default=127, help="of 128 tokens, for the tiny model")
    parser.add_argument("--mid-windows", type=int, default=16, help="the same for the shape 'mid'")
    arguments = parser.parse_args()
    tiny = MetaModel.from_pretrained(arguments.tiny, dtype="bf16", device="cpu", max_seq_len=LENGTH)
    stream = token_stream(documentation_corpus()[::HELD_BACK], tiny.tokenizer)
    windows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    mid = Transformer(ARGS, ParallelState.single("cpu"), dtype=torch.bfloat16).eval()
    init_weights(mid, seed=0)
    columns = {"tiny, trained": rises(tiny.llma, windows[-arguments.windows :])}
    columns["mid, random"] = rises(mid, windows[-arguments.mid_windows :])
    print(f"{cpu_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for form in ("bfloat16", *FORMS):
        print(f"| {form} | " + " | ".join(column[form] for column in columns.values()) + " |")


def rises(plain: Transformer, windows: Tensor) -> dict[str, str]:
    """Perplexity in bfloat16, and by how much each quantization raises it."""
    before = decoding_loss(plain, windows)
    cells = {"bfloat16": f"perplexity {math.exp(before):.2f}"}
    for form, quant in FORMS.items():
        rise = math.exp(decoding_loss(quantized_copy(plain, quant), windows) - before) - 1
        cells[form] = f"{rise:+.2%}"
    return cells


if __name__ == "__main__":
    main()
