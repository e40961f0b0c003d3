"""This library as a side of the comparison: {"folder", "threads"}, a checkpoint of any form and number format."""

from typing import Any

import torch
from protocol import serve

from accessory.kernels import native_variant, tiles_serve
from accessory.model.meta import MetaModel

# Tokens of a prompt that are read in one pass, as the server does.
CHUNK = 2048
# Steps behind those that are timed: counting what they read takes time.
COUNTED_STEPS = 4


class Accessory:
    def __init__(self, folder: str) -> None:
        self.model = MetaModel.from_pretrained(folder, max_seq_len=16384, dtype=torch.bfloat16, device="cpu").llma
        size = {name: p.numel() * p.element_size() for name, p in self.model.named_parameters()}
        experts = sum(count for name, count in size.items() if ".experts." in name)
        embeddings = sum(count for name, count in size.items() if "embeddings" in name)
        kernels = f"{native_variant()}{' and tiles' if tiles_serve() else ''}"
        self.about = f"torch {torch.__version__}, kernels {kernels}"
        self.facts = {"expert_bytes": experts, "other_bytes": sum(size.values()) - experts - embeddings}
        self.prompts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def use(self, variant: str) -> None:
        raise ValueError(f"there is no variant {variant!r} of accessory")

    def prefill(self, tokens: list[int]) -> None:
        cache = self.model.new_cache(1, len(tokens))
        self._read(torch.tensor(tokens), cache)

    def start(self, prompt: list[int], last: list[int], steps: int) -> None:
        if len(prompt) not in self.prompts:
            cache = self.model.new_cache(1, len(prompt))
            self._read(torch.tensor(prompt), cache)
            self.prompts[len(prompt)] = cache.k, cache.v
        self.slots = list(range(len(last)))
        self.cache = self.model.new_cache(len(last), len(prompt) + steps + COUNTED_STEPS)
        for own, kept in zip((self.cache.k, self.cache.v), self.prompts[len(prompt)], strict=True):
            own[:, :, : len(prompt)] = kept
        self.cache.extend(self.slots, [len(prompt)] * len(last))
        self.tokens, self.active = torch.tensor(last), torch.ones(len(last), dtype=torch.bool)

    def step(self) -> None:
        self.tokens = self.model.decode(self.tokens, self.cache, self.active).argmax(-1)
        self.cache.extend(self.slots, [1] * len(self.slots))

    def stop(self) -> dict[str, Any]:
        """How many experts a layer has to read for a step, on average over a few more."""
        chosen: list[int] = []

        def note(module: object, inputs: object, routing: Any) -> None:
            chosen.append(routing.experts_TK.unique().numel())

        hooks = [block.feed_forward.gate.register_forward_hook(note) for block in self.model.layers]
        for _ in range(COUNTED_STEPS):
            self.step()
        for hook in hooks:
            hook.remove()
        del self.cache
        return {"experts": sum(chosen) / len(chosen)}

    def _read(self, tokens: torch.Tensor, cache: Any) -> None:
        for part in tokens.split(CHUNK):
            self.model.prefill(part, [len(part)], [0], cache)


def load(asked: dict[str, Any]) -> Accessory:
    torch.set_num_threads(asked["threads"])
    return Accessory(asked["folder"])


if __name__ == "__main__":
    with torch.inference_mode():
        serve(load)
