"""llama.cpp as a side of the comparison, through llama-cpp-python: {"folder": a GGUF file, "threads"}.

As a program with the arguments quantize SOURCE DESTINATION TYPE it writes a file by llama.cpp's own quantizer, whose
output head stays in bfloat16, as ours does.
"""

import ctypes
import sys
from typing import Any

import llama_cpp
import numpy as np
from protocol import serve

# Tokens that one call takes at most; of these llama.cpp itself makes passes of 512.
CHUNK = 2048
# Of what it says of itself, warnings and errors: two of ggml_log_level.
TOLD = (3, 4)
GGML_TYPE_BF16 = 30  # of ggml_type
# The cache has whole multiples of so many places for a sequence.
BLOCK = 256


class LlamaCpp:
    facts: dict[str, Any] = {}  # noqa: RUF012 - of the class, and empty

    def __init__(self, path: str, threads: int) -> None:
        self.threads = threads
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise ValueError(f"llama.cpp does not load {path}")
        self.words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        features = llama_cpp.llama_print_system_info().decode().replace("CPU : ", "")
        on = [name.split("=")[0].strip() for name in features.split("|") if name.strip().endswith("= 1")]
        self.about = f"llama-cpp-python {llama_cpp.__version__}, {' '.join(on)}"
        # Of a prompt's tokens, and of a token of each sequence. The first is filled as arrays: a loop over 2,048 tokens
        # would take a hundredth of the time of reading them.
        self.prompt, self.next = (llama_cpp.llama_batch_init(CHUNK, 0, 1) for _ in range(2))
        for place in range(CHUNK):
            self.prompt.n_seq_id[place] = self.next.n_seq_id[place] = self.next.logits[place] = 1
            self.prompt.seq_id[place][0] = 0
        fields = (self.prompt.token, self.prompt.pos, self.prompt.logits)
        self.ids, self.positions, self.wanted = (np.ctypeslib.as_array(field, (CHUNK,)) for field in fields)
        self.prompts: dict[tuple[int, int], Any] = {}
        self.reading = self._context(CHUNK, 1)

    def use(self, variant: str) -> None:
        raise ValueError(f"there is no variant {variant!r} of llama.cpp")

    def prefill(self, tokens: list[int]) -> None:
        if len(tokens) > CHUNK:
            raise ValueError(f"a prompt of {len(tokens)} tokens: this side reads {CHUNK} at most")
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.reading), True)
        self._read(self.reading, tokens)

    def start(self, prompt: list[int], last: list[int], steps: int) -> None:
        self.context = self._context(len(prompt) + steps, len(last))
        key = len(prompt), len(last)  # a state fits into a context of as many sequences only
        if key not in self.prompts:
            self._read(self.context, prompt)
            size = llama_cpp.llama_state_seq_get_size(self.context, 0)
            held = (ctypes.c_uint8 * size)()
            if llama_cpp.llama_state_seq_get_data(self.context, held, size, 0) != size:
                raise ValueError("llama.cpp does not give a sequence's state")
            self.prompts[key] = held
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        held = self.prompts[key]
        for row in range(len(last)):
            if not llama_cpp.llama_state_seq_set_data(self.context, held, len(held), row):
                raise ValueError("llama.cpp does not take a sequence's state")
        self.tokens, self.position = last, len(prompt)

    def step(self) -> None:
        for row, token in enumerate(self.tokens):
            self.next.token[row], self.next.pos[row] = token, self.position
            self.next.seq_id[row][0] = row
        self._decode(self.context, self.next, len(self.tokens))
        self.position += 1
        self.tokens = [int(self._logits(self.context, row).argmax()) for row in range(len(self.tokens))]

    def stop(self) -> dict[str, Any]:
        llama_cpp.llama_free(self.context)
        return {}

    def _context(self, length: int, rows: int) -> Any:
        """Room for so many sequences of some length."""
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = -(-length // BLOCK) * BLOCK * rows
        params.n_seq_max, params.n_batch = rows, CHUNK
        params.n_threads = params.n_threads_batch = self.threads
        params.no_perf = True
        context = llama_cpp.llama_init_from_model(self.model, params)
        if not context:
            raise ValueError(f"llama.cpp has no room for {rows} sequences of {length} tokens")
        return context

    def _read(self, context: Any, tokens: list[int]) -> None:
        for start in range(0, len(tokens), CHUNK):
            part = tokens[start : start + CHUNK]
            self.ids[: len(part)] = part
            self.positions[: len(part)] = range(start, start + len(part))
            self.wanted[:] = 0
            self.wanted[len(part) - 1] = 1
            self._decode(context, self.prompt, len(part))
        self._logits(context, -1)  # waits for them

    def _decode(self, context: Any, batch: Any, count: int) -> None:
        """Compute the first tokens of a batch."""
        batch.n_tokens = count
        if code := llama_cpp.llama_decode(context, batch):
            raise ValueError(f"llama_decode gave {code}")

    def _logits(self, context: Any, place: int) -> Any:
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, place), (self.words,))


def load(asked: dict[str, Any]) -> LlamaCpp:
    return LlamaCpp(asked["folder"], asked["threads"])


def quantize(source: str, destination: str, kind: str) -> None:
    """Write a GGUF file as another type."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.output_tensor_type = GGML_TYPE_BF16
    code = llama_cpp.llama_model_quantize(source.encode(), destination.encode(), ctypes.byref(params))
    if code:
        sys.exit(f"llama.cpp's quantizer ended with {code}: {source} as {kind}")


@llama_cpp.llama_log_callback
def tell(level: int, text: bytes, _: object) -> None:
    if level in TOLD:
        sys.stderr.write(text.decode(errors="replace"))


if __name__ == "__main__":
    llama_cpp.llama_log_set(tell, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    if sys.argv[1:2] == ["quantize"]:
        quantize(*sys.argv[2:])
    else:
        serve(load)
