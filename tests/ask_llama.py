"""llama.cpp with a GGUF file, in a process of its own that ends at once: its server's threads are none of the tests'.

Run as a program it reads {"path", "prompts", "count", "texts", "marked"} as JSON from its input, and writes {"said",
"tokens"}.
"""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE

# Of each token that is said: it, and the most likely ones with their logarithmic probabilities.
Said = list[tuple[int, dict[int, float]]]


def ask_llama_cpp(
    path: Path,
    *,
    prompts: Sequence[Sequence[int]] = (),
    count: int = 1,
    texts: Sequence[str] = (),
    marked: Sequence[str] = (),
) -> tuple[list[Said], list[list[int]]]:
    """What it says greedily to each of the prompts, and the tokens of each text; then of those whose control tokens are
    meant by their names.

    One thread, everything in float32, no flash attention. A byte's token is never said: the server holds those back
    until they make up a character.
    """
    pytest.importorskip("xllamacpp")
    asked = {"path": str(path), "prompts": list(map(list, prompts)), "count": count}
    asked |= {"texts": list(texts), "marked": list(marked)}
    command = [sys.executable, __file__]
    done = subprocess.run(
        command, input=json.dumps(asked), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    said = [[(token, dict(map(tuple, best))) for token, best in own] for own in found["said"]]
    return said, found["tokens"]


def says_as_transformers(path: Path, hf: Any, *, prompts: Sequence[Sequence[int]], count: int) -> int:
    """Hold what it says to what transformers' model does; how many tokens were clear enough to be compared."""
    from checkpoints import hf_logits

    compared = 0
    answers, _ = ask_llama_cpp(path, prompts=prompts, count=count)
    for prompt, answer in zip(prompts, answers, strict=True):
        text = list(prompt)
        for said, best in answer:
            truth = hf_logits(hf, text)[-1].log_softmax(-1)
            for token, probability in best.items():
                assert abs(probability - truth[token].item()) < 1e-3
            truth[3:259] = -float("inf")
            first, second = truth.topk(2).values.tolist()
            if first - second > 1e-3:
                assert said == truth.argmax().item()
                compared += 1
            text.append(said)
    return compared


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = asked["path"]
    params.n_ctx, params.n_parallel, params.warmup, params.fit_params = 256, 1, False, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.verbosity = 0
    server = xllamacpp.Server(params)
    never = [[token, False] for token in range(3, 259)]
    settings = {"temperature": 0, "n_probs": 8, "cache_prompt": False, "samplers": ["top_k"], "top_k": 1}
    said = []
    for prompt in asked["prompts"]:
        own = {"prompt": prompt, "n_predict": asked["count"], "logit_bias": never, **settings}
        answer = server.handle_completions(own)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        steps = answer["choices"][0]["logprobs"]["content"]
        said.append([(step["id"], [(own["id"], own["logprob"]) for own in step["top_logprobs"]]) for step in steps])
    tokens = []
    for text, special in [(text, kind == "marked") for kind in ("texts", "marked") for text in asked[kind]]:
        body = json.dumps({"content": text, "add_special": True, "parse_special": special}).encode()
        header = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}/tokenize", body, header)
        with urllib.request.urlopen(request) as response:
            tokens.append(json.load(response)["tokens"])
    return {"said": said, "tokens": tokens}


if __name__ == "__main__":
    sys.stdout.write(f"\n{json.dumps(_answer(json.load(sys.stdin)))}\n")
    sys.stdout.flush()
    os._exit(0)
