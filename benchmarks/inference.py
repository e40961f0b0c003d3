"""Prefill and decoding beside transformers: the same random weights, one process, one run.

    python benchmarks/inference.py                      # shape 'mid', bfloat16, 2 threads
    python benchmarks/inference.py --shape mid-qwen
    python benchmarks/inference.py --peers              # llama.cpp and vLLM as well: peers/compare.py

transformers runs with each of its experts implementations; the best of them for each row is compared. Both sides
take turns within every round, so that a noisy machine slows both, and ratios are of medians. The last table holds
quantized weights against bfloat16, ours alone, in a process of its own: memory that transformers has left in pieces
gives fewer large pages, and which weights get them would decide the ratio.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from machine import cpu_name
from mid import SHAPES, add_tokenizer, random_model, transformers_model, with_weights_of
from transformers import DynamicCache, PreTrainedModel

from accessory.checkpoint.convert import convert
from accessory.config import QuantArgs
from accessory.kernels import native_variant, tiles_serve
from accessory.model.transformer import Transformer
from accessory.quant import FORMATS
from accessory.tools.quality import quantized_copy

# batched_mm copies an expert's matrices for every token that chose it: 22 GB for this prefill.
PREFILL_IMPLEMENTATIONS = ("eager", "grouped_mm")
DECODE_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
PROMPT = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="mid", help="a shape of benchmarks/mid.py")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--decode-steps", type=int, default=8, help="decoding steps in each round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-fresh", action="store_true", help="leave out the time to the first token")
    parser.add_argument("--quantized", action="store_true", help="the last table alone")
    help_text = "beside llama.cpp and vLLM, too, each side a process of its own; --peers --help says more"
    parser.add_argument("--peers", nargs=argparse.REMAINDER, help=help_text)
    arguments = parser.parse_args()
    if arguments.peers is not None:
        from peers.compare import main as compare_peers  # its sides need not have what this file imports

        compare_peers(arguments.peers)
        return
    torch.set_num_threads(arguments.threads)
    args = SHAPES[arguments.shape]
    if arguments.quantized:
        with torch.inference_mode():
            quantized_rows(random_model(args), arguments.rounds, arguments.decode_steps)
        return
    theirs = transformers_model(args)
    ours = with_weights_of(theirs, args)
    tiles = " and tiles" if tiles_serve() else ""
    print(f"{arguments.shape}, {cpu_name()}, {arguments.threads} threads, {platform.python_version()}, ", end="")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, ", end="")
    print(f"kernels {native_variant()}{tiles}, {time.strftime('%Y-%m-%d')}")
    print(f"memory read by torch.sum: {read_bandwidth() / 1e9:.0f} GB/s\n")
    print(f"{'':26}{'accessory':>12}{'transformers':>14}{'best impl.':>12}{'ratio':>8}{'read':>12}")
    with torch.inference_mode():
        prefill_row(ours, theirs, arguments.rounds)
        for batch in (1, 8):
            decode_row(ours, theirs, batch, arguments.rounds, arguments.decode_steps)
    if not arguments.skip_fresh:
        fresh_rows(theirs)
    del ours, theirs
    subprocess.run([sys.executable, *sys.argv, "--quantized"], check=True)


def quantized_rows(plain: Transformer, rounds: int, steps: int) -> None:
    """Each quantization beside bfloat16; they take turns within every round."""
    models = {"bfloat16": plain}
    with_kernels = dict.fromkeys(form.name for form in FORMATS.values() if form.kind is not None)
    models |= {name: quantized_copy(plain, QuantArgs(type=name)) for name in with_kernels}
    prompt = torch.randint(3, plain.args.vocab_size, (PROMPT,))

    def prefill(model: Transformer) -> None:
        model.prefill(prompt, [PROMPT], [0], model.new_cache(1, PROMPT + 64))

    rows = {f"prefill {PROMPT} tokens": {name: partial(prefill, model) for name, model in models.items()}}
    for batch in (1, 8):
        length = 128 + (rounds + 1) * steps
        sides = {name: Decoding(model, batch, length) for name, model in models.items()}
        rows[f"decode, batch {batch}"] = {name: side.run(steps) for name, side in sides.items()}
    print(f"\n{'':26}" + "".join(f"{name:>20}" for name in models))
    for label, sides in rows.items():
        times: dict[str, list[float]] = {name: [] for name in sides}
        for round_number in range(rounds + 1):
            for name, run in sides.items():
                elapsed = seconds(run)
                if round_number:
                    times[name].append(elapsed / (steps if label.startswith("decode") else 1))
        medians = {name: statistics.median(values) for name, values in times.items()}
        cells = (f"{own * 1e3:.1f} ms ({own / medians['bfloat16']:.2f})" for own in medians.values())
        print(f"{label:26}" + "".join(f"{cell:>20}" for cell in cells), flush=True)


class Decoding:
    """A batch of prompts that has been read, and goes on token by token."""

    def __init__(self, model: Transformer, batch: int, length: int) -> None:
        self.model, self.slots = model, list(range(batch))
        self.active = torch.ones(batch, dtype=torch.bool)
        self.cache = model.new_cache(batch, length)
        prompt = torch.randint(3, model.args.vocab_size, (batch * 128,))
        self.tokens = model.prefill(prompt, [128] * batch, self.slots, self.cache).argmax(-1)

    def run(self, steps: int) -> Callable[[], None]:
        """What takes so many steps."""

        def step() -> None:
            for _ in range(steps):
                self.tokens = self.model.decode(self.tokens, self.cache, self.active).argmax(-1)
                self.cache.extend(self.slots, [1] * len(self.slots))

        return step


def prefill_row(ours: Transformer, theirs: PreTrainedModel, rounds: int) -> None:
    tokens = torch.randint(3, ours.args.vocab_size, (1, PROMPT))

    def run_ours() -> None:
        ours.prefill(tokens[0], [PROMPT], [0], ours.new_cache(1, PROMPT + 64))

    def run_theirs() -> None:
        theirs(tokens, use_cache=True, logits_to_keep=1)

    medians, best = compare(run_ours, run_theirs, theirs, rounds, PREFILL_IMPLEMENTATIONS)
    print_row(f"prefill {PROMPT} tokens", medians, best, "")


def decode_row(ours: Transformer, theirs: PreTrainedModel, batch: int, rounds: int, steps: int) -> None:
    prompt = torch.randint(3, ours.args.vocab_size, (batch, 128))
    run_ours = Decoding(ours, batch, 128 + (rounds + 1) * len(DECODE_IMPLEMENTATIONS) * steps).run(steps)
    read = bytes_read(ours, batch)

    theirs.set_experts_implementation("eager")
    past = DynamicCache(config=theirs.config)
    first = theirs(prompt, cache=past, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
    their_state = {"token": first}

    def run_theirs() -> None:
        for _ in range(steps):
            out = theirs(their_state["token"][:, None], cache=past, use_cache=True)
            their_state["token"] = out.logits[:, -1].argmax(-1)

    with read as touched:
        medians, best = compare(run_ours, run_theirs, theirs, rounds, DECODE_IMPLEMENTATIONS)
    medians = tuple(median / steps for median in medians)
    print_row(f"decode, batch {batch}", medians, best, f"{touched() / medians[0] / 1e9:.0f} GB/s")


def compare(
    run_ours: Callable[[], None],
    run_theirs: Callable[[], None],
    theirs: PreTrainedModel,
    rounds: int,
    names: tuple[str, ...],
) -> tuple[tuple[float, float], str]:
    """Median seconds of ours and of transformers' best implementation, and which that is."""
    our_times: list[float] = []
    their_times: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(rounds + 1):
        for name in names:
            theirs.set_experts_implementation(name)
            elapsed = seconds(run_theirs)
            if round_number:  # the first round warms up
                their_times[name].append(elapsed)
            elapsed = seconds(run_ours)
            if round_number:
                our_times.append(elapsed)
    medians = {name: statistics.median(times) for name, times in their_times.items()}
    best = min(medians, key=lambda name: medians[name])
    return (statistics.median(our_times), medians[best]), best


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def print_row(label: str, medians: tuple[float, ...], best: str, read: str) -> None:
    ours, theirs = medians
    print(
        f"{label:26}{ours * 1e3:>9.1f} ms{theirs * 1e3:>11.1f} ms{best:>12}{theirs / ours:>7.2f}x{read:>12}", flush=True
    )


class bytes_read:  # noqa: N801 - used as a function
    """Counts the bytes of weights that a decoding step has to read, from the experts that were really chosen."""

    def __init__(self, model: Transformer, batch: int) -> None:
        self.model, self.batch = model, batch
        self.experts: list[int] = []
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Callable[[], float]:
        for block in self.model.layers:
            self.handles.append(block.feed_forward.gate.register_forward_hook(self._note))
        return self._per_step

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _note(self, module: object, inputs: object, routing: object) -> None:
        self.experts.append(routing.experts_TK.unique().numel())

    def _per_step(self) -> float:
        size = {name: p.numel() * p.element_size() for name, p in self.model.named_parameters()}
        one_expert = sum(count for name, count in size.items() if ".experts." in name)
        args = self.model.args
        one_expert /= args.n_layers * args.moe.num_experts
        rest = sum(count for name, count in size.items() if ".experts." not in name and "embeddings" not in name)
        return rest + statistics.mean(self.experts) * args.n_layers * one_expert


def read_bandwidth() -> float:
    """Bytes per second of summing 1 GB."""
    block = torch.ones(2**28)
    times = [seconds(block.sum) for _ in range(5)]
    return block.numel() * 4 / statistics.median(times)


OURS_FRESH = """
import sys, torch
torch.set_num_threads({threads})
from accessory.model.meta import MetaModel
model = MetaModel.from_pretrained(sys.argv[1], max_seq_len=2048, dtype=torch.bfloat16, device="cpu")
model.generate(["The best programming language in the world is"], max_gen_len=1)
"""
THEIRS_FRESH = """
import sys, torch
torch.set_num_threads({threads})
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.generate(torch.tensor([[1, 415, 1489, 15549, 3842, 297, 272, 1526, 349]]), max_new_tokens=1, do_sample=False)
"""


def fresh_rows(theirs: PreTrainedModel) -> None:
    """Whole processes: imports, loading the weights from the page cache, and one token."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        their_folder, our_folder = Path(folder) / "theirs", Path(folder) / "ours"
        theirs.save_pretrained(their_folder)
        add_tokenizer(their_folder)
        convert(their_folder, our_folder, to="accessory", mp=4)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(4):
            for kept, code, path in (
                (times[0], OURS_FRESH, our_folder),
                (times[1], THEIRS_FRESH, their_folder),
            ):
                command = [sys.executable, "-c", code.format(threads=torch.get_num_threads()), str(path)]
                kept.append(seconds(lambda command=command: subprocess.run(command, check=True, capture_output=True)))
        medians = tuple(statistics.median(kept[1:]) for kept in times)
        print_row("first token, new process", medians, "default", "")


if __name__ == "__main__":
    main()
