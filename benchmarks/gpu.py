"""Decoding and prefill on one GPU: shapes 'mid' and that of Mixtral-8x7B, random weights in bfloat16.

    python benchmarks/gpu.py                  # some layers of 8x7B's 32, as fit beside their quantized copies
    python benchmarks/gpu.py --kernels        # the products alone before, by tiles
    python benchmarks/gpu.py --profile .      # where a decoding step's time goes

transformers runs on the same weights in the same memory. Both sides take turns within every round; numbers are medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_products import product_rows, seconds
from mid import ARGS, random_model, transformers_config
from transformers import DynamicCache, MixtralForCausalLM

from accessory.config import QUANT_FORMS, QuantArgs
from accessory.model.transformer import Transformer
from accessory.quant import lay_out_for_gpu
from accessory.tools.quality import quantized_copy

# Mixtral-8x7B's sizes, and some of its 32 layers.
LARGE = ARGS.replace(dim=4096, hidden_dim=14336, n_heads=32, n_kv_heads=8, head_dim=128)
PROMPT = 512
DECODE_IMPLEMENTATIONS = ("grouped_mm", "batched_mm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16, help="decoding steps in each round")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--layers", type=int, default=LARGE.n_layers, help="of the shape of Mixtral-8x7B")
    parser.add_argument("--context", type=int, default=128, help="tokens of each prompt before decoding")
    parser.add_argument(
        "--forms", nargs="*", default=("int8", "int4", "nf4"), choices=QUANT_FORMS, help="beside bfloat16"
    )
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--kernels", action="store_true", help="first the products alone, by tiles; then with the best")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="where a decoding step's time goes, to a folder")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print(f"a copy moves {copy_bandwidth() / 1e9:.0f} GB/s, counting what is read and what is written")
    with torch.inference_mode():
        if arguments.kernels:
            product_rows()
            torch.cuda.empty_cache()
        shapes = {"mid": ARGS, f"8x7B, {arguments.layers} layers": LARGE.replace(n_layers=arguments.layers)}
        for name, args in shapes.items():
            plain = random_model(args.replace(max_seq_len=16 * PROMPT), "cuda")
            if arguments.profile:
                profile(name.split(",")[0], plain, arguments)
            else:
                print(f"\n{name}")
                rows(plain, arguments)
            del plain
            torch.cuda.empty_cache()


def rows(plain: Transformer, arguments: argparse.Namespace) -> None:
    models = {"bfloat16": plain}
    models |= {form: quantized_copy(plain, QuantArgs(type=form)) for form in arguments.forms}
    for model in models.values():
        lay_out_for_gpu(model)
    theirs = None if arguments.without_transformers else transformers_on(plain)
    sides: dict[str, Callable[[], None]] = {}
    for name, model in models.items():
        sides[name] = partial(prefill, model)
    if theirs is not None:
        tokens = torch.randint(3, plain.args.vocab_size, (1, PROMPT), device="cuda")
        sides["transformers"] = lambda: theirs(tokens, use_cache=True, logits_to_keep=1)
    show(f"prefill {PROMPT}", medians(sides, arguments.rounds), 1)
    sides = {name: Continued(model, 8 * PROMPT).run for name, model in models.items()}
    show(f"prefill {PROMPT} behind {8 * PROMPT}", medians(sides, arguments.rounds), 1)
    for batch in arguments.batches:
        steps, length = arguments.steps, arguments.context + (arguments.rounds + 2) * arguments.steps * 2
        sides = {}
        for name, model in models.items():
            sides[name] = partial(Decoding(model, batch, arguments.context, length).run, steps)
        sides["kernel by kernel"] = partial(Decoding(plain, batch, arguments.context, length, graphs=False).run, steps)
        if theirs is not None:
            for implementation in DECODE_IMPLEMENTATIONS[: 1 if batch > 1 else 2]:
                sides[implementation] = partial(
                    TheirDecoding(theirs, implementation, batch, arguments.context).run, steps
                )
        show(f"decode, batch {batch}", medians(sides, arguments.rounds), steps)


def prefill(model: Transformer) -> None:
    prompt = torch.randint(3, model.args.vocab_size, (PROMPT,), device="cuda")
    model.prefill(prompt, [PROMPT], [0], model.new_cache(1, PROMPT))


class Continued:
    """A prompt whose next piece is read, again and again."""

    def __init__(self, model: Transformer, before: int) -> None:
        self.model, self.cache = model, model.new_cache(1, before + PROMPT)
        self.tokens = torch.randint(3, model.args.vocab_size, (before,), device="cuda")
        model.prefill(self.tokens, [before], [0], self.cache)

    def run(self) -> None:
        before = self.tokens.shape[0]
        self.model.prefill(self.tokens[:PROMPT], [PROMPT], [0], self.cache)
        self.cache.free(0)
        self.cache.extend([0], [before])


class Decoding:
    """A batch of prompts that has been read, and goes on token by token."""

    def __init__(self, model: Transformer, batch: int, context: int, length: int, *, graphs: bool = True) -> None:
        self.model, self.slots, self.graphs = model, list(range(batch)), graphs
        self.active = torch.ones(batch, dtype=torch.bool, device="cuda")
        self.cache = model.new_cache(batch, length)
        prompt = torch.randint(3, model.args.vocab_size, (batch * context,), device="cuda")
        self.tokens = model.prefill(prompt, [context] * batch, self.slots, self.cache).argmax(-1)

    def run(self, steps: int) -> None:
        self.model.cuda_graphs = self.graphs
        for _ in range(steps):
            self.tokens = self.model.decode(self.tokens, self.cache, self.active).argmax(-1)
            self.cache.extend(self.slots, [1] * len(self.slots))
        self.model.cuda_graphs = True


class TheirDecoding:
    """The same with transformers."""

    def __init__(self, model: Any, implementation: str, batch: int, context: int) -> None:
        self.model, self.implementation = model, implementation
        self.past = DynamicCache(config=model.config)
        model.set_experts_implementation(DECODE_IMPLEMENTATIONS[0])  # the other copies a matrix for every token
        prompt = torch.randint(3, model.config.vocab_size, (batch, context), device="cuda")
        out = model(prompt, past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.tokens = out.logits[:, -1].argmax(-1)

    def run(self, steps: int) -> None:
        self.model.set_experts_implementation(self.implementation)
        for _ in range(steps):
            out = self.model(self.tokens[:, None], past_key_values=self.past, use_cache=True)
            self.tokens = out.logits[:, -1].argmax(-1)


def transformers_on(ours: Transformer) -> Any:
    """transformers' model of the same sizes whose weights are ours, without a copy. Its q and k expect another order
    of rows, which random weights do not notice."""
    config = transformers_config(ours.args)
    with torch.device("meta"):
        theirs = MixtralForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    names = {"embed_tokens": ours.tok_embeddings.weight, "norm": ours.norm.weight}
    state = {f"model.{name}.weight": weight for name, weight in names.items()} | {"lm_head.weight": ours.output.weight}
    for number, block in enumerate(ours.layers):
        layer = f"model.layers.{number}."
        for theirs_name, weight in zip("qkvo", (getattr(block.attention, f"w{c}") for c in "qkvo"), strict=True):
            state[f"{layer}self_attn.{theirs_name}_proj.weight"] = weight.weight
        state[f"{layer}input_layernorm.weight"] = block.attention_norm.weight
        state[f"{layer}post_attention_layernorm.weight"] = block.ffn_norm.weight
        state[f"{layer}mlp.gate.weight"] = block.feed_forward.gate.weight
        state[f"{layer}mlp.experts.gate_up_proj"] = block.feed_forward.experts.w13.flatten(1, 2)
        state[f"{layer}mlp.experts.down_proj"] = block.feed_forward.experts.w2
    theirs.load_state_dict(state, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to("cuda")
    return theirs


# ---- timing ------------------------------------------------------------------------------------------------


def medians(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 2):
        for name, run in sides.items():
            elapsed = seconds(run)
            if number > 1:  # compiling, and capturing
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def show(label: str, found: dict[str, float], steps: int) -> None:
    first = found["bfloat16"]
    cells = (f"{name} {value / steps * 1e3:.3f} ms ({value / first:.2f})" for name, value in found.items())
    print(f"{label}: " + ", ".join(cells), flush=True)


def copy_bandwidth() -> float:
    source = torch.empty(2**31, dtype=torch.int8, device="cuda").random_(0, 127)
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source)) for _ in range(10)]
    return 2 * source.numel() / statistics.median(times)


def profile(name: str, model: Transformer, arguments: argparse.Namespace) -> None:
    """The kernels of 4 replayed steps by their time, of each form and batch, to FOLDER/NAME-FORM-BATCH.txt."""
    for form in ("bfloat16", "int4"):
        own = model if form == "bfloat16" else quantized_copy(model, QuantArgs(type=form))
        lay_out_for_gpu(own)
        for batch in arguments.batches:
            decoding = Decoding(own, batch, arguments.context, arguments.context + 64)
            decoding.run(8)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
                decoding.run(4)
                torch.cuda.synchronize()
            table = recorded.key_averages().table(
                sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90
            )
            (arguments.profile / f"{name}-{form}-{batch}.txt").write_text(table)


if __name__ == "__main__":
    main()
