"""MultiGpuWrapper: a model on several GPUs, used from one process."""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from accessory.generation.sampling import Sampling
from accessory.model.pretrained import Paths
from accessory.model.requests import Examples, cut_prompts, encode_prompts
from accessory.serve.driver import Driver
from accessory.text.chat import Ends

# Whoever asks for a list of answers waits for all of them: there is no crowd to turn away.
_QUEUE = 2**31
_NO_ENDS = Ends()


class MultiGpuWrapper:
    """Owns processes that hold a model together, and offers what MetaModel does, for notebooks and scripts.

    Nothing is asked of the program: no launcher, no ``if __name__ == "__main__"``. The processes end with `close`,
    with the wrapper, or with the program.

    Example:
        model = MultiGpuWrapper("runs/tiny/converted", gpus=2)
        model.generate(["The list method"], max_gen_len=64)

    Args:
        pretrained_path: a checkpoint folder, here or as hf://org/name[/sub/folder][@revision], or several of
            which later ones overlay earlier ones.
        gpus: how many GPUs hold the model; on a machine without GPUs as many CPU ranks.
        gpu_ids: which GPUs, in place of ``gpus``.
        slots: prompts that are completed at once.
        settings: of `Driver` and of `MetaModel.from_pretrained`.

    Attributes:
        tokenizer: the model's tokenizer.
        args: its sizes.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: as `MetaModel.from_pretrained`.
        RankLost: a process ended; here and in every method.
    """

    def __init__(
        self,
        pretrained_path: Paths,
        *,
        gpus: int | None = None,
        gpu_ids: Sequence[int] | None = None,
        slots: int = 16,
        **settings: Any,
    ) -> None:
        self._driver = Driver(pretrained_path, ranks=gpus, gpu_ids=gpu_ids, slots=slots, queue=_QUEUE, **settings)
        self.tokenizer, self.args = self._driver.tokenizer, self._driver.args
        self._close = weakref.finalize(self, self._driver.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        self._close()

    def generate(
        self,
        prompts: Examples,
        images: None = None,
        max_gen_len: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.95,
        additional_stop_symbols: Iterable[str] = (),
        ends: Ends = _NO_ENDS,
    ) -> list[str]:
        """As `MetaModel.generate`. To repeat a sample, seed PyTorch in this process."""
        sampling = Sampling.of(max_gen_len, temperature, top_p, additional_stop_symbols).with_ends(ends)
        streams = []
        try:
            for tokens in self._tokens(prompts, sampling, images):
                streams.append(self._driver.submit(tokens, sampling, seed=_seed()))
            return ["".join(event.text for event in stream) for stream in streams]
        finally:
            for stream in streams:
                stream.cancel()

    def stream_generate(
        self,
        prompt: str | Sequence[int],
        image: None = None,
        max_gen_len: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.95,
        additional_stop_symbols: Iterable[str] = (),
        ends: Ends = _NO_ENDS,
    ) -> Iterator[dict[str, Any]]:
        """As `MetaModel.stream_generate`; it may be left at any time."""
        sampling = Sampling.of(max_gen_len, temperature, top_p, additional_stop_symbols).with_ends(ends)
        (tokens,) = self._tokens([prompt], sampling, image)
        return self._stream(tokens, sampling)

    def compute_logits(
        self, examples: Examples, images: None = None, bos: bool = True, eos: bool = False
    ) -> list[Tensor]:
        """As `MetaModel.compute_logits`; the tensors lie on the CPU."""
        result: list[Tensor] = self._driver.call("compute_logits", examples, images=images, bos=bos, eos=eos)
        return result

    def evaluate_examples(
        self,
        examples: Examples,
        contexts: Examples | None = None,
        images: None = None,
        bos: bool = True,
        eos: bool = False,
    ) -> dict[str, list]:
        """As `MetaModel.evaluate_examples`; the tensors lie on the CPU."""
        result: dict[str, list] = self._driver.call(
            "evaluate_examples", examples, contexts=contexts, images=images, bos=bos, eos=eos
        )
        return result

    def _tokens(self, prompts: Any, sampling: Sampling, images: Any) -> list[list[int]]:
        limit = self.args.max_seq_len
        encoded = encode_prompts(self.tokenizer, prompts, sampling, images=images, limit=limit)
        return cut_prompts(encoded, limit - sampling.max_gen_len)

    def _stream(self, tokens: list[int], sampling: Sampling) -> Iterator[dict[str, Any]]:
        stream = self._driver.submit(tokens, sampling, seed=_seed())
        text = ""
        try:
            for event in stream:
                text += event.text
                yield {"text": text, "end_of_content": event.finish is not None}
        finally:
            stream.cancel()


def _seed() -> int:
    """A seed that follows from PyTorch's own."""
    return int(torch.randint(2**62, ()))
