"""vLLM's CPU build as a side of the comparison: {"folder", "threads"}, Hugging Face's form, weights really read.

In one process and step by step, so that what is timed is the engine, and no queue before it. Sequences that share a
prompt share its blocks in vLLM's cache, where the other sides have a copy for each: a step at a far position reads less
here than elsewhere.
"""

import glob
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from protocol import serve

# Tokens that one step takes, as the other sides' passes.
CHUNK = 2048
LONGEST = 8448
# Of the cache: 8,000 positions of either shape, and 32 sequences that go on from there.
CACHE_GIB = "1"
# Tokens that the first of many sequences may be ahead of the last, whose prompt is still to be read.
SPARE = 8


class Vllm:
    facts: dict[str, Any] = {}  # noqa: RUF012 - of the class, and empty

    def __init__(self, folder: str) -> None:
        import torch
        import vllm

        self.sampling = vllm.SamplingParams
        self.engine = vllm.LLM(
            folder,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=LONGEST,
            max_num_batched_tokens=CHUNK,
            max_num_seqs=32,
            enable_prefix_caching=True,
            seed=0,
        ).llm_engine
        self.about = f"vllm {vllm.__version__}, torch {torch.__version__} on {torch.get_num_threads()} threads"
        self.count = 0

    def use(self, variant: str) -> None:
        raise ValueError(f"there is no variant {variant!r} of vllm")

    def prefill(self, tokens: list[int]) -> None:
        self._add(tokens, 1)
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def start(self, prompt: list[int], last: list[int], steps: int) -> None:
        self._add(prompt, 1)  # its blocks are found by those that come
        while self.engine.has_unfinished_requests():
            self.engine.step()
        self.sequences = len(last)
        waiting = {self._add([*prompt, token], steps + SPARE) for token in last}
        while waiting:
            waiting -= {out.request_id for out in self.engine.step()}

    def step(self) -> None:
        tokens = len(self.engine.step())
        if tokens != self.sequences:
            raise ValueError(f"a step gave {tokens} tokens for {self.sequences} sequences")

    def stop(self) -> dict[str, Any]:
        self.engine.abort_request([str(number) for number in range(self.count)])
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return {}

    def _add(self, tokens: list[int], new: int) -> str:
        """Ask for so many tokens behind a prompt; the request's name."""
        name = str(self.count)
        self.count += 1
        sampling = self.sampling(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        self.engine.add_request(name, {"prompt_token_ids": tokens}, sampling)
        return name


def load(asked: dict[str, Any]) -> Vllm:
    return Vllm(asked["folder"])


def preloaded() -> list[str]:
    """Libraries that vLLM loads before all others in the processes that it starts: here there is but this one."""
    torch, vllm = (Path(importlib.util.find_spec(name).origin).parent for name in ("torch", "vllm"))
    patterns = (torch.parent / "torch.libs" / "libgomp*", torch / "lib" / "libgomp*", vllm / "libs" / "libtcmalloc*")
    return [path for pattern in patterns for path in glob.glob(str(pattern))]


if __name__ == "__main__":
    if "LD_PRELOAD" not in os.environ:
        os.environ |= {"LD_PRELOAD": ":".join(preloaded()), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": CACHE_GIB, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        os.execv(sys.executable, [sys.executable, *sys.argv])
    import vllm  # noqa: F401 - importing is no part of loading

    serve(load)
