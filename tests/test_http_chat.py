"""/v1/chat/completions through the official client, and the routes about the model and its tokens."""

from pathlib import Path
from typing import Any

import pytest
from http_api import ServedApi
from models import load

from accessory.model.meta import MetaModel
from accessory.serve.driver import Driver
from accessory.text.chat import Message
from accessory.text.conversation import default_conversation
from accessory.text.forms import FORMS
from accessory.tools.tiny import TinyReport

MESSAGES = [{"role": "user", "content": "Return a list."}]


@pytest.fixture(scope="module")
def model(tiny: tuple[Path, TinyReport]) -> MetaModel:
    return load(tiny[0])


def create(api: ServedApi, **body: Any) -> Any:
    settings = {"model": api.app.state.server.name, "messages": MESSAGES, **body}
    return api.openai.chat.completions.create(**settings)


def test_an_answer_is_the_models_to_the_default_conversation(api: ServedApi, model: MetaModel) -> None:
    conversation = default_conversation()
    conversation.load_qas([["Return a list.", None]])
    prompt = conversation.get_prompt()
    stop = api.app.state.server.form.ends.stop
    (expected,) = model.generate([prompt], max_gen_len=24, additional_stop_symbols=stop)
    answer = create(api, max_tokens=24, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected.removeprefix(" ")
    assert answer.usage.prompt_tokens == len(model.tokenizer.encode(prompt, bos=True, eos=False))


@pytest.mark.parametrize("template", ["alpaca", "mixtral-instruct"])
def test_another_template(tiny_engine: Driver, template: str) -> None:
    messages = [Message("system", "S"), Message("user", "Return a list.")]
    form = FORMS[template](tiny_engine.tokenizer)
    expected = form.prompt(messages)
    with ServedApi(tiny_engine, form=form) as api:
        body = [{"role": "developer", "content": "S"}, *MESSAGES]
        answer = create(api, messages=body, max_tokens=5, temperature=0)
        same = api.complete(prompt=expected, max_tokens=5, temperature=0).json()
    assert answer.usage.prompt_tokens == len(expected)
    assert answer.choices[0].message.content == same["choices"][0]["text"].removeprefix(form.ends.lead)


def test_an_answer_may_take_all_the_room_there_is(api: ServedApi, tiny_engine: Driver) -> None:
    """Unless told otherwise it goes on to the context's end; a token id cannot end it at temperature 0 here."""
    answer = create(api, temperature=0)
    if answer.choices[0].finish_reason == "length":
        assert answer.usage.total_tokens == tiny_engine.args.max_seq_len
    else:
        assert answer.usage.total_tokens < tiny_engine.args.max_seq_len


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_a_length(api: ServedApi, name: str) -> None:
    assert create(api, **{name: 3}).usage.completion_tokens <= 3


def test_parts_of_text_are_joined(api: ServedApi) -> None:
    parts = [{"type": "text", "text": "Return "}, {"type": "text", "text": "a list."}]
    whole = create(api, max_tokens=8, temperature=0)
    assert create(api, messages=[{"role": "user", "content": parts}], max_tokens=8, temperature=0).usage == whole.usage


def test_a_message_may_be_sent_back_as_it_came(api: ServedApi) -> None:
    message = create(api, max_tokens=4, temperature=0).choices[0].message
    again = create(api, messages=[*MESSAGES, message.model_dump(), *MESSAGES], max_tokens=4)
    assert again.choices[0].message.content is not None


def test_fields_that_ask_for_nothing_are_taken(api: ServedApi) -> None:
    nothing = {
        "tools": [], "tool_choice": "none", "logit_bias": {}, "response_format": {"type": "text"}, "user": "someone",
        "presence_penalty": 0, "frequency_penalty": 0.0, "metadata": {"a": "b"}, "store": False,
    }  # fmt: skip
    assert create(api, max_tokens=2, **nothing).usage.completion_tokens <= 2


def test_scores_are_those_of_completions(api: ServedApi) -> None:
    form = api.app.state.server.form
    tokens = form.prompt([Message("user", "Return a list.")])
    answer = create(api, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2)
    body = {"prompt": tokens, "max_tokens": 8, "temperature": 0, "logprobs": 2, "stop": list(form.ends.stop)}
    expected = api.complete(**body).json()["choices"][0]["logprobs"]
    told = answer.choices[0].logprobs.content
    first = int(expected["tokens"][0] == form.ends.lead)  # the form's, not the answer's
    logprobs = expected["token_logprobs"][first : first + len(told)]
    assert [entry.logprob for entry in told] == pytest.approx(logprobs, abs=1e-4)
    assert [len(entry.top_logprobs) for entry in told] == [2] * len(told)
    assert "".join(entry.token for entry in told).startswith(answer.choices[0].message.content)
    for entry in told:
        assert entry.token == entry.top_logprobs[0].token  # the best one was chosen
        assert entry.bytes == list(entry.token.encode())


def test_the_end_of_a_turn_is_never_shown(api: ServedApi) -> None:
    """A stop string that comes in several tokens stands for a template's mark; scores leave it out as the text does."""
    settings = {"max_tokens": 24, "temperature": 1, "seed": 5, "logprobs": True}
    whole = create(api, **settings).choices[0].message.content
    mark = next(whole[at : at + 3] for at in range(4, len(whole) - 2) if whole.index(whole[at : at + 3]) == at)
    cut = whole[: whole.index(mark)]
    answer = create(api, **settings, stop=mark).choices[0]
    assert answer.message.content == cut
    assert answer.finish_reason == "stop"
    parts = [part.choices[0] for part in create(api, **settings, stop=mark, stream=True)]
    assert "".join(part.delta.content or "" for part in parts) == cut
    for tokens in (
        [entry.token for entry in answer.logprobs.content],
        [entry.token for part in parts if part.logprobs for entry in part.logprobs.content],
    ):
        assert "".join(tokens).startswith(cut)
        assert len("".join(tokens[:-1])) < len(cut)


def test_a_stream_says_what_the_whole_answer_does(api: ServedApi) -> None:
    settings = {"max_tokens": 16, "temperature": 1.2, "seed": 5, "n": 2, "logprobs": True, "top_logprobs": 1}
    whole = create(api, **settings)
    parts = list(create(api, **settings, stream=True, stream_options={"include_usage": True}))
    assert {part.object for part in parts} == {"chat.completion.chunk"}
    assert parts[-1].usage == whole.usage
    for choice in whole.choices:
        own = [part.choices[0] for part in parts[:-1] if part.choices[0].index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert own[-1].finish_reason == choice.finish_reason
        told = [entry.token for part in own if part.logprobs for entry in part.logprobs.content]
        assert told == [entry.token for entry in choice.logprobs.content]


def test_models(api: ServedApi, tiny_engine: Driver) -> None:
    (model,) = api.openai.models.list()
    assert model.id == tiny_engine.name
    assert model.model_extra == {"max_model_len": 128}
    assert api.openai.models.retrieve(tiny_engine.name) == model


def test_a_name_for_the_model(tiny_engine: Driver) -> None:
    with ServedApi(tiny_engine, model_name="gpt-small") as api:
        assert [model.id for model in api.openai.models.list()] == ["gpt-small"]
        assert create(api, max_tokens=1).model == "gpt-small"


def test_a_name_with_slashes(tiny_engine: Driver) -> None:
    name = "mistralai/Mixtral-8x7B-Instruct-v0.1"
    with ServedApi(tiny_engine, model_name=name) as api:
        assert api.openai.models.retrieve(name).id == name
        assert api.client.get(f"/v1/models/{name}").json()["id"] == name
        assert api.client.get(f"/v1/models/{name}/x").status_code == 404
        assert api.metric('accessory_requests_total{endpoint="/v1/models/{model}",status="200"}') == 2


def test_tokens_and_back(api: ServedApi, tiny_engine: Driver) -> None:
    tokenizer = tiny_engine.tokenizer
    text = "Return a list. \u2603"
    for special in (True, False):
        answer = api.client.post("/tokenize", json={"prompt": text, "add_special_tokens": special}).json()
        assert answer["tokens"] == tokenizer.encode(text, bos=special, eos=False)
        assert answer["count"] == len(answer["tokens"])
        assert answer["max_model_len"] == 128
        assert api.client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
    info = api.client.get("/tokenizer_info").json()
    for name, token in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        assert api.client.post("/tokenize", json={"prompt": info[name]}).json()["tokens"] == [token]


def test_metrics_count_what_happens(api: ServedApi, tiny_engine: Driver) -> None:
    names = (
        'accessory_requests_total{endpoint="/v1/chat/completions",status="200"}',
        "accessory_time_to_first_token_seconds_count",
        "accessory_time_per_output_token_seconds_count",
        "accessory_generated_tokens_total",
        'accessory_expert_tokens_total{expert="0",layer="0"}',
    )
    before = [api.metric(name) for name in names]
    answer = create(api, max_tokens=6, temperature=0)
    grown = [api.metric(name) - old for name, old in zip(names, before, strict=True)]
    assert grown[:4] == [1, 1, 1, answer.usage.completion_tokens]
    experts = tiny_engine.args.moe.num_experts
    total = sum(
        api.metric(f'accessory_expert_tokens_total{{expert="{expert}",layer="0"}}') for expert in range(experts)
    )
    assert total > 0
    assert api.metric("accessory_ready") == 1
    assert api.metric("accessory_slots") == 4
    assert api.metric("accessory_cache_capacity_tokens") == 4 * 128


def test_paths_that_are_not_there_share_a_label(api: ServedApi) -> None:
    line = 'accessory_requests_total{endpoint="other",status="404"}'
    before = api.metric(line)
    for path in ("/a", "/b", "/v1/"):
        assert api.client.get(path).status_code == 404
    assert api.metric(line) == before + 3
