"""/v1/completions through the official client: texts, scores, streams, several answers, seeds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from http_api import ServedApi, assert_error
from models import completions, load

from accessory.model.meta import MetaModel
from accessory.serve.token_texts import TokenTexts
from accessory.tools.tiny import TinyReport

PROMPT = "The list method"


@pytest.fixture(scope="module")
def model(tiny: tuple[Path, TinyReport]) -> MetaModel:
    """The same model in this process: what the server says must be what it says."""
    return load(tiny[0])


def create(api: ServedApi, **body: Any) -> Any:
    return api.openai.completions.create(**{"model": api.app.state.server.name, "prompt": PROMPT, **body})


def greedy(model: MetaModel, prompt: str, count: int) -> tuple[list[int], list[int]]:
    """Tokens of a prompt, and those that follow it."""
    tokens = model.tokenizer.encode(prompt, bos=True, eos=False)
    (answer,) = completions(model.llma, [tokens], max_gen_len=count, eos_id=model.tokenizer.eos_id)
    return tokens, answer


def text_of(model: MetaModel, prompt: list[int], answer: list[int]) -> str:
    """What the answer adds to the prompt's text."""
    return model.tokenizer.decode([*prompt, *answer])[len(model.tokenizer.decode(prompt)) :]


def logprobs_of(model: MetaModel, tokens: list[int]) -> torch.Tensor:
    """Of every token behind the first, (tokens - 1, vocab)."""
    return model.compute_logits([tokens])[0][:-1].log_softmax(-1)


@pytest.mark.parametrize("prompt", [PROMPT, "Return the number of", "a", "x = [1, 2"])
def test_the_text_is_what_the_model_adds_to_the_prompt(api: ServedApi, model: MetaModel, prompt: str) -> None:
    tokens, answer = greedy(model, prompt, 24)
    completion = create(api, prompt=prompt, max_tokens=24, temperature=0)
    assert completion.choices[0].text == text_of(model, tokens, answer)
    assert completion.choices[0].finish_reason == "length"
    assert completion.choices[0].logprobs is None
    assert completion.usage.prompt_tokens == len(tokens)
    assert completion.usage.completion_tokens == len(answer) == 24
    assert completion.usage.total_tokens == len(tokens) + 24


def test_an_answer_has_16_tokens_unless_told(api: ServedApi) -> None:
    assert create(api, temperature=0).usage.completion_tokens == 16
    assert create(api, prompt=[5] * 120, temperature=0).usage.completion_tokens == 8  # no room for more


def test_prompts_of_every_form(api: ServedApi, model: MetaModel) -> None:
    """Texts and token ids, one or several, give the same answers in the prompts' order."""
    second = "Return the number of"
    tokens = [greedy(model, prompt, 6)[0] for prompt in (PROMPT, second)]
    expected = [text_of(model, *greedy(model, prompt, 6)) for prompt in (PROMPT, second)]
    for prompt, texts in (
        (PROMPT, expected[:1]),
        (tokens[0], expected[:1]),
        ([PROMPT, second], expected),
        (tokens, expected),
        ([tokens[0]], expected[:1]),
    ):
        completion = create(api, prompt=prompt, max_tokens=6, temperature=0)
        assert [choice.text for choice in completion.choices] == texts
        assert [choice.index for choice in completion.choices] == list(range(len(texts)))
        assert completion.usage.prompt_tokens == sum(map(len, tokens[: len(texts)]))


def test_more_prompts_than_slots_and_queue_are_answered(api: ServedApi, model: MetaModel) -> None:
    expected = text_of(model, *greedy(model, PROMPT, 2))
    completion = create(api, prompt=[PROMPT] * 30, max_tokens=2, temperature=0)
    assert [choice.text for choice in completion.choices] == [expected] * 30


def test_the_empty_prompt_is_the_beginning_of_a_text(api: ServedApi, model: MetaModel) -> None:
    tokens, answer = greedy(model, "", 8)
    completion = create(api, prompt="", max_tokens=8, temperature=0, echo=True)
    assert completion.usage.prompt_tokens == len(tokens) == 1
    assert completion.choices[0].text == model.tokenizer.decode(answer)


def mark_in(text: str) -> str:
    """Two characters that stand together in a text, and not before its fifth."""
    return next(text[at : at + 2] for at in range(4, len(text) - 1) if text.index(text[at : at + 2]) == at)


def test_stop_strings_are_cut_off(api: ServedApi) -> None:
    settings = {"max_tokens": 24, "temperature": 1, "seed": 5}
    whole = create(api, **settings).choices[0].text
    mark = mark_in(whole)
    for stop in (mark, [mark], ["\u2603", mark, "\u2604", "\u2605", "\u2606"]):
        choice = create(api, **settings, stop=stop).choices[0]
        assert choice.finish_reason == "stop"
        assert choice.text == whole[: whole.index(mark)]


def test_a_stop_string_may_be_the_space_that_begins_an_answer(api: ServedApi, model: MetaModel) -> None:
    tokens, answer = greedy(model, PROMPT, 24)
    texts = TokenTexts(model.tokenizer)
    word = next(place for place, token in enumerate(answer) if texts[token].text.startswith(" "))
    choice = create(api, prompt=[*tokens, *answer[:word]], max_tokens=8, temperature=0, stop=" ").choices[0]
    assert (choice.text, choice.finish_reason) == ("", "stop")


def test_tokens_of_a_stop_string_are_not_among_the_scores(api: ServedApi) -> None:
    settings = {"max_tokens": 24, "temperature": 1, "seed": 5, "logprobs": 0}
    mark = mark_in(create(api, **settings).choices[0].text)
    choice = create(api, **settings, stop=mark).choices[0]
    assert "".join(choice.logprobs.tokens).startswith(choice.text)
    assert len("".join(choice.logprobs.tokens[:-1])) < len(choice.text)  # each token shows a part of the text


def test_equal_seeds_give_equal_answers(api: ServedApi) -> None:
    def sampled(**body: Any) -> list[str]:
        return [choice.text for choice in create(api, max_tokens=16, temperature=1.5, **body).choices]

    first = sampled(seed=7, n=3)
    assert len(set(first)) == 3
    assert sampled(seed=7, n=3) == first
    assert sampled(seed=7) == first[:1]
    assert sampled(seed=8) != first[:1]
    assert sampled(seed=-(2**63)) == sampled(seed=-(2**63))


def test_without_temperature_it_samples(api: ServedApi) -> None:
    """OpenAI's default is 1."""
    assert len({create(api, max_tokens=16).choices[0].text for _ in range(3)}) > 1


def test_scores_are_the_models(api: ServedApi, model: MetaModel) -> None:
    tokens, answer = greedy(model, PROMPT, 12)
    expected = logprobs_of(model, [*tokens, *answer])
    scores = create(api, max_tokens=12, temperature=0, logprobs=3).choices[0].logprobs
    assert len(scores.tokens) == len(answer)
    for place, token in enumerate(answer):
        row = expected[len(tokens) - 1 + place]
        assert scores.token_logprobs[place] == pytest.approx(row[token].item(), abs=1e-4)
        best = row.topk(3)
        assert list(scores.top_logprobs[place].values()) == pytest.approx(best.values.tolist(), abs=1e-4)
    assert scores.text_offset[0] == 0


def test_scores_of_a_sampled_token_that_is_not_among_the_best(api: ServedApi) -> None:
    scores = create(api, max_tokens=24, temperature=2, seed=3, logprobs=1).choices[0].logprobs
    sizes = {len(top) for top in scores.top_logprobs}
    assert sizes == {1, 2}
    for token, logprob, top in zip(scores.tokens, scores.token_logprobs, scores.top_logprobs, strict=True):
        assert top[token] == logprob


@pytest.mark.parametrize("as_tokens", [False, True])
def test_echo_scores_the_prompt_too(api: ServedApi, model: MetaModel, as_tokens: bool) -> None:
    tokens, answer = greedy(model, PROMPT, 3)
    prompt = tokens if as_tokens else PROMPT
    choice = create(api, prompt=prompt, max_tokens=3, temperature=0, logprobs=2, echo=True).choices[0]
    assert choice.text == PROMPT + text_of(model, tokens, answer)
    scores = choice.logprobs
    everything = [*tokens, *answer]
    assert len(scores.tokens) == len(everything)
    assert scores.tokens[0] == "<s>"
    assert "".join(scores.tokens[1:]) == choice.text
    assert scores.token_logprobs[0] is None
    assert scores.top_logprobs[0] is None
    assert all(token in top for token, top in zip(scores.tokens[1:], scores.top_logprobs[1:], strict=True))
    expected = logprobs_of(model, everything)
    for place, token in enumerate(everything[1:]):
        assert scores.token_logprobs[place + 1] == pytest.approx(expected[place, token].item(), abs=1e-4)
    for token, offset in zip(scores.tokens[1:], scores.text_offset[1:], strict=True):
        assert choice.text[offset:].startswith(token)


def test_a_prompt_can_be_scored_alone(api: ServedApi, model: MetaModel) -> None:
    tokens = model.tokenizer.encode(PROMPT, bos=True, eos=False)
    for prompt in (PROMPT, tokens):
        settings = {"prompt": [prompt, prompt], "echo": True, "logprobs": 2}
        answer = create(api, **settings, max_tokens=0)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == 2 * len(tokens)
        assert answer.usage.completion_tokens == 0
        longer = create(api, **settings, max_tokens=1)
        for choice, other in zip(answer.choices, longer.choices, strict=True):
            assert (choice.text, choice.finish_reason) == (PROMPT, "length")
            scores, both = choice.logprobs, other.logprobs
            assert scores.tokens == both.tokens[:-1]
            assert scores.text_offset == both.text_offset[:-1]
            assert [scores.token_logprobs[0], scores.top_logprobs[0]] == [None, None]
            assert scores.token_logprobs[1:] == pytest.approx(both.token_logprobs[1:-1], abs=1e-4)
            assert [len(top) for top in scores.top_logprobs[1:]] == [len(top) for top in both.top_logprobs[1:-1]]


def test_a_prompt_that_fills_the_context_can_be_scored(api: ServedApi, model: MetaModel) -> None:
    tokens = [model.tokenizer.bos_id, *range(5, 132)]
    assert len(tokens) == 128
    (choice,) = create(api, prompt=tokens, max_tokens=0, echo=True, logprobs=0).choices
    expected = logprobs_of(model, tokens)[range(127), tokens[1:]].tolist()
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert choice.text == model.tokenizer.decode(tokens)
    assert_error(api.complete(prompt=[*tokens, 5], max_tokens=0, echo=True), 400, "the prompt's 129 with 0 of")
    assert_error(api.complete(prompt=tokens, max_tokens=1, echo=True), 400, "the prompt's 128 with 1 of")


def test_a_prompt_alone_in_every_other_way(api: ServedApi, model: MetaModel) -> None:
    nothing = {"max_tokens": 0, "echo": True}
    for prompt in (PROMPT, "", model.tokenizer.encode("caf\u2603", bos=True, eos=False)[:-1]):
        text = prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)  # it ends within a character
        answer = create(api, **nothing, prompt=prompt, n=2)
        assert [(choice.text, choice.logprobs, choice.finish_reason) for choice in answer.choices] == [
            (text, None, "length")
        ] * 2
        parts = list(create(api, **nothing, prompt=prompt, stream=True, stream_options={"include_usage": True}))
        assert [part.choices[0].text for part in parts[:-1]] == [text]
        assert parts[0].choices[0].finish_reason == "length"
        assert parts[-1].usage.completion_tokens == 0
    expected = text_of(model, *greedy(model, PROMPT, 8))
    assert create(api, max_tokens=8, temperature=0).choices[0].text == expected  # in a slot that only read


def test_a_stream_says_what_the_whole_answer_does(api: ServedApi) -> None:
    settings = {"max_tokens": 24, "temperature": 1.2, "seed": 5, "n": 2, "logprobs": 1, "echo": True}
    whole = create(api, **settings)
    parts = list(create(api, **settings, stream=True, stream_options={"include_usage": True}))
    assert [part.usage for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1].choices == []
    assert parts[-1].usage == whole.usage
    assert len({part.id for part in parts}) == 1
    for choice in whole.choices:
        own = [part.choices[0] for part in parts[:-1] if part.choices[0].index == choice.index]
        assert len(own) > 3
        assert "".join(part.text for part in own) == choice.text
        assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            told = [value for part in own for value in getattr(part.logprobs, name)]
            if name == "token_logprobs":
                assert told[1:] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-4)
            elif name != "top_logprobs":
                assert told == getattr(choice.logprobs, name)


def test_a_stream_without_usage_tells_none(api: ServedApi) -> None:
    parts = list(create(api, max_tokens=4, stream=True))
    assert all(part.usage is None and len(part.choices) == 1 for part in parts)


def test_the_form_of_a_stream(api: ServedApi) -> None:
    answer = api.complete(prompt=PROMPT, max_tokens=2, temperature=0, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in answer.headers
    lines = [line for line in answer.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert "usage" not in json.loads(lines[0].removeprefix("data: "))
