"""The one model of a comparison in each side's form: the same random weights, drawn and written once."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from mid import SHAPES, add_tokenizer, transformers_model

from accessory.checkpoint.convert import convert
from accessory.checkpoint.quantize import quantize_checkpoint
from accessory.config import ModelArgs, QuantArgs
from accessory.files import new_folder
from accessory.train.flops import flops_per_token

# Longer than what is decoded: positions up to 8,000 and some.
POSITIONS = 16384
# Seconds that llama.cpp's quantizer may take for a file.
QUANTIZER_LIMIT = 600.0


def args_of(shape: str) -> ModelArgs:
    """A shape of benchmarks/mid.py with room for long sequences."""
    return SHAPES[shape].replace(max_seq_len=POSITIONS)


def written(folder: Path, args: ModelArgs) -> Path:
    """The model in Hugging Face's form, bfloat16; made where it is not there."""
    path = folder / "hf"
    if not path.exists():
        with new_folder(path) as aside:
            transformers_model(args).save_pretrained(aside)
            add_tokenizer(aside)
    return path


def quantized(folder: Path, args: ModelArgs, form: str) -> Path:
    """The model as a quantized folder of this library."""
    path = folder / form
    if not path.exists():
        quantize_checkpoint(written(folder, args), path, QuantArgs(type=form))
    return path


def gguf(folder: Path, args: ModelArgs, kind: str, quantizer: list[str]) -> Path:
    """The model as a GGUF file: our export in bfloat16, of which llama.cpp's quantizer makes every other type.

    Args:
        quantizer: the command that takes source, destination and type.

    Raises:
        ValueError: what it said, where it failed.
    """
    plain = folder / "gguf"
    if not plain.exists():
        convert(written(folder, args), plain, to="gguf", type="BF16")
    source = next(plain.glob("*.gguf"))
    if kind == "BF16":
        return source
    path = folder / f"{kind}.gguf"
    if not path.exists():
        part = path.with_suffix(".part")
        done = subprocess.run(
            [*quantizer, str(source), str(part), kind],
            capture_output=True,
            text=True,
            timeout=QUANTIZER_LIMIT,
            check=False,
        )
        if done.returncode:
            raise ValueError(
                f"llama.cpp's quantizer, {kind}: {(done.stderr.strip().splitlines() or ['said nothing'])[-1]}"
            )
        part.rename(path)
    return path


@dataclass(frozen=True)
class Bytes:
    """What a step reads of a side's weights: all but the embedding, and of the experts those that were chosen."""

    experts: int
    others: int

    def per_step(self, args: ModelArgs, experts: float) -> float:
        """Bytes where a layer's step takes so many of its experts."""
        return self.others + self.experts * experts / args.moe.num_experts


def bytes_of_gguf(path: Path) -> Bytes:
    """Of a GGUF file."""
    from gguf import GGUFReader

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    experts = sum(size for name, size in sizes.items() if "_exps" in name)
    return Bytes(experts, sum(sizes.values()) - experts - sizes["token_embd.weight"])


def cache_bytes(args: ModelArgs, batch: int, position: int) -> int:
    """Of keys and values that a step reads, in 16 bits."""
    return 2 * args.n_layers * args.n_kv_heads * args.head_dim * torch.bfloat16.itemsize * batch * position


def prefill_flops(args: ModelArgs, count: int) -> float:
    """Floating-point operations of reading a prompt, whose last token alone goes through the output head."""
    return flops_per_token(args, count) / 3 * count - 2.0 * (count - 1) * args.dim * args.vocab_size
