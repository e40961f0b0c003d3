"""/v1/chat/completions through the official client, and the routes about the model and its tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_api import ServedApi, assert_error
from hypothesis import given, settings
from hypothesis import strategies as st
from models import load

from accessory.model.meta import MetaModel
from accessory.serve.driver import Driver
from accessory.text.chat import Message, ids_of
from accessory.text.conversation import default_conversation
from accessory.text.forms import FORMS
from accessory.text.jinja import render
from accessory.text.template import TemplateForm
from accessory.tools.tiny import TinyReport

# A template that tells names, and lets whoever will speak next.
TEMPLATE = (
    "{{ bos_token }}{% for one in messages %}[{{ one.role }}{% if one.name %} {{ one.name }}{% endif %}]"
    "{{ one.content }}{% if one.role == 'assistant' and not loop.last %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Return a list."}]


@pytest.fixture(scope="module")
def model(tiny: tuple[Path, TinyReport]) -> MetaModel:
    return load(tiny[0])


@pytest.fixture(scope="module")
def templated(tiny_engine: Driver) -> Iterator[ServedApi]:
    with ServedApi(tiny_engine, form=TemplateForm(tiny_engine.tokenizer, TEMPLATE, "a test's")) as api:
        yield api


@pytest.fixture(scope="module")
def instructed(tiny_engine: Driver) -> Iterator[ServedApi]:
    with ServedApi(tiny_engine, form=FORMS["alpaca"](tiny_engine.tokenizer)) as api:
        yield api


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


def tokens_of(api: ServedApi, messages: list[dict[str, Any]], **body: Any) -> list[int]:
    answer = api.client.post("/tokenize", json={"messages": messages, **body})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert told["count"] == len(told["tokens"])
    assert told["max_model_len"] == 128
    return told["tokens"]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_parts_of_text_are_lines(api: ServedApi) -> None:
    """As in vLLM."""
    whole = user("Return\na list.\n")
    parts = [{"type": "text", "text": "Return"}, "a list.", {"type": "text", "text": ""}]
    answers = [create(api, messages=[message], max_tokens=8, temperature=0) for message in (whole, user(parts))]
    assert answers[0].usage == answers[1].usage
    assert answers[0].choices[0].message == answers[1].choices[0].message


def a_message(roles: tuple[str, ...]) -> st.SearchStrategy[dict[str, Any]]:
    text = st.text("ab \n<>/s[]#\u2603", max_size=6)
    part = st.one_of(text, st.builds(lambda said: {"type": "text", "text": said}, text))
    return st.fixed_dictionaries(
        {"role": st.sampled_from(roles), "content": st.one_of(text, st.lists(part, min_size=1, max_size=3))},
        optional={"name": text, "reasoning_content": text},
    )


def as_forms_take_it(message: dict[str, Any]) -> Message:
    content = message["content"]
    if not isinstance(content, str):
        content = "\n".join(part if isinstance(part, str) else part["text"] for part in content)
    role = {"developer": "system"}.get(message["role"], message["role"])
    return Message(role, content, name=message.get("name"), reasoning=message.get("reasoning_content", ""))


CHATS = {
    "any": st.lists(a_message(("system", "developer", "user", "assistant")), min_size=1, max_size=4),
    "usual": st.builds(
        lambda *chat: list(chat),
        a_message(("developer",)),
        *(a_message((who,)) for who in ("user", "assistant", "user")),
    ),
}


@pytest.mark.parametrize("served", ["api", "instructed", "templated"])
@pytest.mark.parametrize("kind", CHATS)
def test_the_prompt_is_the_forms(served: str, kind: str, request: pytest.FixtureRequest) -> None:
    api: ServedApi = request.getfixturevalue(served)
    form = api.app.state.server.form

    @settings(max_examples=25, deadline=None, database=None)
    @given(messages=CHATS[kind])
    def check(messages: list[dict[str, Any]]) -> None:
        chat = [as_forms_take_it(message) for message in messages]
        for ending, segments in (
            ({}, lambda: form.segments(chat, ask=True)),
            ({"add_generation_prompt": False}, lambda: form.unasked(chat)),
            ({"add_generation_prompt": False, "continue_final_message": True}, lambda: form.continued(chat)),
        ):
            refused = ""
            try:
                expected = ids_of(segments(), form.tokenizer)
            except ValueError as error:
                refused = str(error)
            if refused:
                answer = api.client.post("/tokenize", json={"messages": messages, **ending})
                assert assert_error(answer, 400, refused)["param"] == "messages"
            else:
                assert tokens_of(api, messages, **ending) == expected

    check()


def test_a_name_is_told_where_the_template_tells_it(api: ServedApi, templated: ServedApi) -> None:
    named = [{**MESSAGES[0], "name": "Ann"}]
    assert "[user Ann]" in templated.engine.tokenizer.decode(tokens_of(templated, named))
    assert tokens_of(templated, named) != tokens_of(templated, MESSAGES)
    assert tokens_of(api, named) == tokens_of(api, MESSAGES)
    answer = create(templated, messages=named, max_tokens=2)
    assert answer.usage.prompt_tokens == len(tokens_of(templated, named))


def test_the_system_may_speak_in_between(templated: ServedApi) -> None:
    chat = [
        user("Hi"),
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Or not."},
        user("a"),
    ]
    tokens = tokens_of(templated, chat)
    assert "Hi[system]Be brief.[system]Or not.[user]a" in templated.engine.tokenizer.decode(tokens)
    assert create(templated, messages=chat, max_tokens=2).usage.prompt_tokens == len(tokens)


ONWARD = {"continue_final_message": True, "add_generation_prompt": False}


@pytest.mark.parametrize("served", ["api", "instructed", "templated"])
@pytest.mark.parametrize("begun", ["The", "The list is", "x = [1", "a\n", "I"])
def test_the_last_message_is_gone_on_with(served: str, begun: str, request: pytest.FixtureRequest) -> None:
    """The answer is what the model adds, as /v1/completions has it; where that begins with a space it is kept."""
    api: ServedApi = request.getfixturevalue(served)
    form = api.app.state.server.form
    messages = [*MESSAGES, {"role": "assistant", "content": begun}]
    tokens = tokens_of(api, messages, **ONWARD)
    assert tokens == ids_of(form.continued([as_forms_take_it(message) for message in messages]), form.tokenizer)
    body = {"max_tokens": 6, "temperature": 0}
    same = api.complete(prompt=tokens, logprobs=0, stop=list(form.ends.stop), **body).json()["choices"][0]
    answer = create(api, messages=messages, extra_body=ONWARD, logprobs=True, **body)
    assert answer.choices[0].message.content == same["text"]
    assert answer.usage.prompt_tokens == len(tokens)
    assert [entry.token for entry in answer.choices[0].logprobs.content] == same["logprobs"]["tokens"]
    parts = [part.choices[0] for part in create(api, messages=messages, extra_body=ONWARD, stream=True, **body)]
    assert "".join(part.delta.content or "" for part in parts) == same["text"]


def test_several_answers_go_on_with_the_last_message(api: ServedApi) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "The list"}]
    body = {"max_tokens": 6, "temperature": 1, "seed": 5, "n": 3, "stop": ["\n###"]}
    tokens = tokens_of(api, messages, **ONWARD)
    same = api.complete(prompt=tokens, **body).json()
    answer = create(api, messages=messages, extra_body=ONWARD, **body)
    assert [one.message.content for one in answer.choices] == [one["text"] for one in same["choices"]]
    assert answer.usage.model_dump()["completion_tokens"] == same["usage"]["completion_tokens"]


@pytest.mark.parametrize("served", ["api", "instructed", "templated"])
def test_an_answer_of_which_nothing_is_said_yet(served: str, request: pytest.FixtureRequest) -> None:
    api: ServedApi = request.getfixturevalue(served)
    empty = [*MESSAGES, {"role": "assistant", "content": ""}]
    body = {"max_tokens": 6, "temperature": 0}
    assert tokens_of(api, empty, **ONWARD) == tokens_of(api, MESSAGES)
    answer = create(api, messages=empty, extra_body=ONWARD, **body)
    assert answer.choices[0].message == create(api, **body).choices[0].message


def test_a_chat_that_asks_for_nothing(api: ServedApi, templated: ServedApi) -> None:
    unasked = {"add_generation_prompt": False}
    for served, end in ((api, "\n###"), (templated, "Return a list.")):
        tokens = tokens_of(served, MESSAGES, **unasked)
        assert served.engine.tokenizer.decode(tokens).endswith(end)
        body = {"max_tokens": 6, "temperature": 0}
        same = served.complete(prompt=tokens, **body).json()["choices"][0]["text"]
        assert create(served, extra_body=unasked, **body).choices[0].message.content == same


def test_an_assistant_that_spoke_last_is_answered_where_the_template_can(api: ServedApi, templated: ServedApi) -> None:
    """vLLM lets it speak again. A named form cannot, and says how to go on."""
    messages = [*MESSAGES, {"role": "assistant", "content": "[]"}]
    tokens = tokens_of(templated, messages)
    assert templated.engine.tokenizer.decode(tokens).endswith("[assistant][][assistant]")
    assert create(templated, messages=messages, max_tokens=2).usage.prompt_tokens == len(tokens)
    answer = api.chat(messages=messages)
    assert assert_error(answer, 400, "continue_final_message", "must be from the user")["param"] == "messages"


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


def test_clients_are_told_the_template(api: ServedApi, instructed: ServedApi, templated: ServedApi) -> None:
    chat = [Message("user", "Hi"), Message("assistant", "a"), Message("user", "b")]
    for served in (api, instructed, templated):
        form = served.app.state.server.form
        info = served.client.get("/tokenizer_info").json()
        variables = {"messages": [{"role": one.role, "content": one.content} for one in chat]}
        names = {name: info[name] for name in ("bos_token", "eos_token")}
        text = render(info["chat_template"], {**variables, **names, "add_generation_prompt": True}).text
        assert text == "".join(segment.text for segment in form.segments(chat, ask=True))


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
