"""Clients in number and kind: those that leave midway, a fuzzer, and lm-evaluation-harness."""

import json
import os
import random
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from http_api import ServedApi
from hypothesis import HealthCheck, given, settings
from patience import wait_until
from ranks import run_command
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from talking import DIALOGUES

from accessory.serve.driver import Driver
from accessory.text.chat import Message, ids_of
from accessory.text.form_files import find_form

LM_EVAL = Path(sys.executable).with_name("lm_eval")
CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)


def leave_midway(url: str, seed: int) -> None:
    """Ask for something, and drop the connection after a random time."""
    choose = random.Random(seed)
    chat = choose.random() < 0.5
    body: dict[str, Any] = {
        "max_tokens": 60,
        "temperature": 1.5,
        "stream": choose.random() < 0.7,
        "n": choose.choice((1, 3)),
    }
    body |= (
        {"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": "The list" * choose.randint(1, 10)}
    )
    seconds = choose.uniform(0.005, 0.3)
    with (
        httpx.Client(timeout=seconds) as client,
        suppress(httpx.TimeoutException),
        client.stream("POST", f"{url}/v1/{'chat/' if chat else ''}completions", json=body) as answer,
    ):
        for _ in zip(answer.iter_raw(), range(choose.randint(0, 5)), strict=False):
            pass


def leave_together(api: ServedApi, engine: Driver, count: int) -> None:
    """So many clients leave midway, some at once; then everything is as before."""
    expected = api.complete(prompt="The list", max_tokens=8, temperature=0).json()["choices"]
    for start in range(0, count, 8):
        seeds = range(start, min(start + 8, count))
        clients = [threading.Thread(target=leave_midway, args=(api.url, seed)) for seed in seeds]
        for client in clients:
            client.start()
        for client in clients:
            client.join()

    def idle() -> bool:
        load = engine.load
        return (load.running, load.waiting, load.cache_tokens) == (
            0,
            0,
            0,
        ) and not api.app.state.server.generations.busy

    wait_until(idle)
    assert api.complete(prompt="The list", max_tokens=8, temperature=0).json()["choices"] == expected


def test_clients_that_leave_midway(api: ServedApi, tiny_engine: Driver) -> None:
    cancelled = tiny_engine.load.cancelled
    leave_together(api, tiny_engine, 24)
    assert tiny_engine.load.cancelled > cancelled
    assert tiny_engine.ready


@pytest.mark.soak
def test_500_clients_that_leave_midway(api: ServedApi, tiny_engine: Driver) -> None:
    def resident() -> int:
        """Bytes of this process and of those that it started."""
        total = 0
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
                if os.getpid() in (int(status["Pid"]), int(status["PPid"])):
                    total += int(status.get("RssAnon", "0 kB").split()[0]) * 1024
        return total

    leave_together(api, tiny_engine, 100)  # what is made once is made now
    before = resident()
    leave_together(api, tiny_engine, 500)
    assert resident() < before + 50e6


def test_a_client_that_leaves_an_answer_that_is_no_stream(api: ServedApi, tiny_engine: Driver) -> None:
    cancelled = tiny_engine.load.cancelled
    left = 'accessory_requests_total{endpoint="/v1/completions",status="499"}'
    before = api.metric(left)
    with pytest.raises(httpx.ReadTimeout):
        # Long enough not to be finished by the time that its client leaves.
        httpx.post(f"{api.url}/v1/completions", json={"prompt": "a", "max_tokens": 120, "n": 100}, timeout=0.1)
    wait_until(lambda: tiny_engine.load.cancelled > cancelled and tiny_engine.load.running == 0)
    wait_until(lambda: api.metric(left) == before + 1)


def test_the_official_client_goes_on_with_an_answer(talking: Path) -> None:
    """A model that was taught an answer says the rest of it, with nothing lost or doubled where it was cut."""
    question, answer = DIALOGUES[0][0]
    chat: list[Any] = [{"role": "user", "name": "Ann", "content": [{"type": "text", "text": question}]}]
    onward = {"continue_final_message": True, "add_generation_prompt": False}
    with Driver(talking, slots=2, dtype="fp32", device="cpu", max_seq_len=256) as engine:
        form = find_form(engine.tokenizer, [talking])
        with ServedApi(engine, form=form) as api:

            def said(messages: list[Any], **more: Any) -> Any:
                settings = {"model": engine.name, "temperature": 0, **more}
                return api.openai.chat.completions.create(messages=messages, **settings)

            whole = said(chat).choices[0]
            assert (whole.message.content, whole.finish_reason) == (answer, "stop")
            begun = said(chat, max_tokens=5).choices[0].message
            assert 0 < len(begun.content) < len(answer)
            assert answer.startswith(begun.content)
            rest = said([*chat, begun], extra_body=onward)
            assert begun.content + rest.choices[0].message.content == answer
            messages = [Message("user", question), Message("assistant", begun.content)]
            tokens = ids_of(form.continued(messages), engine.tokenizer)
            assert rest.usage.prompt_tokens == len(tokens)
            same = api.openai.completions.create(
                model=engine.name, prompt=tokens, max_tokens=64, temperature=0, stop=list(form.ends.stop)
            )
            assert same.choices[0].text.removesuffix(form.ends.tail) == rest.choices[0].message.content
            both = [*tokens, *engine.tokenizer.cont(same.choices[0].text)]
            scored = api.openai.completions.create(model=engine.name, prompt=both, max_tokens=0, echo=True, logprobs=1)
            assert min(scored.choices[0].logprobs.token_logprobs[len(tokens) :]) > -1  # as it was taught
            told = said([{"role": "developer", "content": "Be brief."}, *chat], max_tokens=1)
            assert told.usage.prompt_tokens == len(
                form.prompt([Message("system", "Be brief."), Message("user", question)])
            )


def fuzz(api: ServedApi, examples: int) -> None:
    """Ask for what the OpenAPI page allows and for what it does not; no answer may be a mistake of the server."""
    name = api.app.state.server.name
    answered = 'accessory_requests_total{endpoint="/v1/completions",status="200"}'
    before = api.metric(answered)
    schema = schemathesis.openapi.from_url(f"{api.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} > {"/v1/completions", "/v1/chat/completions", "/health"}
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and operation.method == "get":
                continue  # there is nothing about them that could be wrong

            @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                    case.body["model"] = name  # nobody guesses it
                case.call_and_validate(checks=CHECKS, timeout=600)  # 109 answers to each of 14 prompts take their time

            check()
    assert api.metric(answered) > before


def test_a_fuzzer_finds_no_mistake_of_the_server(api: ServedApi) -> None:
    fuzz(api, 12)


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_a_fuzzer_finds_no_mistake_of_the_server_in_long(api: ServedApi) -> None:
    fuzz(api, 400)


PAIRS = [
    ("The list", " method of the object"),
    ("Return the number of", " words in a string."),
    ("x = [1, 2", ", 3]\n"),
    ("a", " b c"),
]


def test_lm_eval_measures_what_the_model_does(api: ServedApi, tiny_engine: Driver, tmp_path: Path) -> None:
    name = tiny_engine.name
    lines = [json.dumps({"context": context, "continuation": continuation}) for context, continuation in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    task = {
        "task": "pairs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "pairs.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{continuation}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    (tmp_path / "pairs.yaml").write_text(json.dumps(task))  # JSON is YAML
    arguments = f"model={name},base_url={api.url}/v1/completions,num_concurrent=2,max_retries=1,tokenized_requests=True"
    command = [LM_EVAL, "--model", "local-completions", "--model_args", arguments, "--tasks", "pairs"]
    command += ["--include_path", tmp_path, "--output_path", tmp_path / "out", "--log_samples", "--batch_size", "2"]
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = run_command(command, env=environment)
    assert done.returncode == 0, done.stderr
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    told = {}
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        told[sample["doc"]["context"]] = sample["filtered_resps"][0]
    assert told.keys() == {context for context, _ in PAIRS}

    def encode(text: str) -> list[int]:
        return tiny_engine.tokenizer.encode(text, bos=False, eos=False)

    for context, continuation in PAIRS:
        scores = tiny_engine.call("evaluate_examples", [encode(context + continuation)], contexts=[encode(context)])
        likelihood, greedy = told[context]
        assert float(likelihood) == pytest.approx(scores["log_likelihood"][0], abs=1e-4)
        assert (str(greedy) == "True") is scores["max_equal"][0]
