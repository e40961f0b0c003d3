"""transformers as a side of the comparison: {"folder", "threads"}, Hugging Face's form.

A variant is an implementation of its experts; with "compiled " before it what runs it is torch.compile'd.
"""

import copy
from typing import Any

import torch
import transformers
from protocol import serve
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

# Tokens of a long prompt that are read in one pass.
CHUNK = 2048


class Transformers:
    facts: dict[str, Any] = {}  # noqa: RUF012 - of the class, and empty

    def __init__(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.about = f"torch {torch.__version__}, transformers {transformers.__version__}"
        self.prompts: dict[int, DynamicCache] = {}
        self.compiled: dict[str, Any] = {}
        self.run: Any = self.model

    def use(self, variant: str) -> None:
        implementation = variant.removeprefix("compiled ")
        self.model.set_experts_implementation(implementation)
        self.run = self.model
        if implementation != variant:
            if variant not in self.compiled:
                self.compiled[variant] = torch.compile(self.model.forward)
            self.run = self.compiled[variant]

    def prefill(self, tokens: list[int]) -> None:
        self._read(tokens, DynamicCache(config=self.model.config), self.run)

    def start(self, prompt: list[int], last: list[int], steps: int) -> None:
        if len(prompt) not in self.prompts:
            self.prompts[len(prompt)] = DynamicCache(config=self.model.config)
            self._read(prompt, self.prompts[len(prompt)], self.model)
        self.past: Any = copy.deepcopy(self.prompts[len(prompt)])
        self.past.batch_repeat_interleave(len(last))
        if self.run is not self.model:
            # Of shapes that stay, or every step would be compiled anew.
            whole = StaticCache(config=self.model.config, max_cache_len=len(prompt) + steps)
            for number, layer in enumerate(self.past.layers):
                whole.update(layer.keys, layer.values, number)
            self.past = whole
        self.tokens = torch.tensor(last)

    def step(self) -> None:
        out = self.run(self.tokens[:, None], cache=self.past, use_cache=True)
        self.tokens = out.logits[:, -1].argmax(-1)

    def stop(self) -> dict[str, Any]:
        del self.past
        return {}

    def _read(self, tokens: list[int], past: DynamicCache, run: Any) -> None:
        for part in torch.tensor([tokens]).split(CHUNK, dim=1):
            run(part, cache=past, use_cache=True, logits_to_keep=1)


def load(asked: dict[str, Any]) -> Transformers:
    torch.set_num_threads(asked["threads"])
    return Transformers(asked["folder"])


if __name__ == "__main__":
    with torch.inference_mode():
        serve(load)
