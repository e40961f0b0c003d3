"""The serving engine on one rank, in this process: what it answers, whoever else asks."""

import math
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_tensors, small_config, write_folder
from models import completions, load
from patience import PATIENCE
from torch import Tensor

from accessory.generation.engine import complete
from accessory.generation.sampling import Sampling, sample_each
from accessory.model.meta import MetaModel
from accessory.serve.client import Client
from accessory.serve.messages import Report, Step
from accessory.serve.ranks import serve_on_ranks
from accessory.serve.request import Busy, Engine, Event, RankLost, TokenScore
from accessory.serve.runner import Runner
from accessory.serve.stream import AnswerStream
from accessory.text.chat import Ends

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[1, *range(10 + length, 10 + 2 * length)] for length in (1, 60, 7, 3, 30, 2, 17, 45, 1, 5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Path) -> Path:
    config = small_config()
    target = tmp_path_factory.mktemp("engine") / "small"
    return write_folder(target, random_tensors(config, 3), config, files=1, tokenizer=small_tokenizer)


@pytest.fixture(scope="module")
def model(folder: Path) -> MetaModel:
    return load(folder)


def serving(folder: Path, program: Callable[[Engine], Any], **settings: Any) -> Any:
    """What a program returns that is run on an engine."""
    results: list[Any] = []
    fixed = {"max_seq_len": 128, "dtype": "fp32", "device": "cpu", "slots": 4, "prefill_tokens": 16}
    serve_on_ranks(lambda engine: results.append(program(engine)), folder, **{**fixed, **settings})
    return results[0]


def tokens_of(events: list[Event]) -> list[int]:
    return [token for event in events for token in event.tokens]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events)


def test_answers_are_those_given_alone(folder: Path, model: MetaModel) -> None:
    """Ten requests through four slots, prompts in pieces of 16 tokens, against one at a time."""
    sampling = Sampling(max_gen_len=40)

    def program(engine: Engine) -> list[list[int]]:
        streams = [engine.submit(prompt, sampling) for prompt in PROMPTS]
        return [tokens_of(list(stream)) for stream in streams]

    eos = model.tokenizer.eos_id
    alone = [completions(model.llma, [prompt], max_gen_len=40, eos_id=eos)[0] for prompt in PROMPTS]
    together = serving(folder, program)
    # The end mark is told among the tokens, but it has no text.
    assert [[token for token in tokens if token != eos] for tokens in together] == alone


def test_texts_are_metamodels_up_to_the_stop_string(folder: Path, model: MetaModel) -> None:
    prompts = ["The list method", "Return the", "a"]
    plain = model.generate(prompts, max_gen_len=30)
    stops = [text[len(text) // 2 :][:2] for text in plain]
    expected = [
        model.generate([prompt], max_gen_len=30, additional_stop_symbols=[stop])[0]
        for prompt, stop in zip(prompts, stops, strict=True)
    ]

    def program(engine: Engine) -> list[list[Event]]:
        streams = [
            engine.submit(engine.tokenizer.encode(prompt, True, False), Sampling(max_gen_len=30, stop=(stop,)))
            for prompt, stop in zip(prompts, stops, strict=True)
        ]
        return [list(stream) for stream in streams]

    answers = serving(folder, program)
    assert [text_of(events) for events in answers] == expected
    assert [events[-1].finish for events in answers] == ["stop"] * 3
    assert all(event.finish is None for events in answers for event in events[:-1])


def test_an_answer_ends_as_the_form_of_its_prompt_has_it(folder: Path, model: MetaModel) -> None:
    """Stop ids, lead and tail from an answer's own tokens; what both engines make of them."""
    decode = model.tokenizer.decode

    def program(engine: Engine) -> list[list[Event]]:
        plain = [tokens_of(list(engine.submit(prompt, Sampling(max_gen_len=12)))) for prompt in PROMPTS[2:6]]
        for prompt, tokens in zip(PROMPTS[2:6], plain, strict=True):
            before, cut = decode(prompt), next(n for n in range(8, 12) if tokens.index(tokens[n]) == n)
            parts = [decode([*prompt, *tokens[:count]])[len(before) :] for count in (1, cut - 1, cut)]
            tail = parts[2].removeprefix(parts[1])
            sampling = Sampling(max_gen_len=12).with_ends(Ends(stop_ids=(tokens[cut],), lead=parts[0], tail=tail))
            asked.append((prompt, sampling, parts[1].removeprefix(parts[0])))
        return [list(engine.submit(prompt, sampling)) for prompt, sampling, _ in asked]

    asked: list[tuple[list[int], Sampling, str]] = []
    for (prompt, sampling, expected), events in zip(asked, serving(folder, program), strict=True):
        assert text_of(events) == expected
        assert events[-1].finish == "stop"
        assert tokens_of(events)[-1:] == list(sampling.stop_ids)
        (last,) = list(complete(model.llma, model.tokenizer, [prompt], sampling))[-1]
        assert last.text == expected


def test_a_seed_gives_the_same_answer_in_any_company(folder: Path) -> None:
    hot = Sampling(max_gen_len=30, temperature=1.5, top_p=0.9)

    def program(engine: Engine) -> list[list[int]]:
        alone = list(engine.submit(PROMPTS[2], hot, seed=11))
        streams = [engine.submit(prompt, hot) for prompt in PROMPTS[3:6]]
        beside = list(engine.submit(PROMPTS[2], hot, seed=11))
        other = list(engine.submit(PROMPTS[2], hot, seed=12))
        for stream in streams:
            list(stream)
        return [tokens_of(events) for events in (alone, beside, other)]

    alone, beside, other = serving(folder, program)
    assert alone == beside != other


def test_how_busy_it_is_is_told_while_a_prompt_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int, int]] = []
    take = Client.take

    def note(client: Client, report: Report) -> None:
        if isinstance(report, Step):
            told.append((len(report.events), report.load.running, report.load.prompt_tokens))
        take(client, report)

    monkeypatch.setattr(Client, "take", note)
    serving(folder, lambda engine: list(engine.submit(PROMPTS[1], Sampling(max_gen_len=1))))
    assert told == [(0, 1, 16), (0, 1, 32), (0, 1, 48), (1, 0, 61)]


def test_scores_of_answer_and_prompt_are_those_of_a_pass_over_the_whole(folder: Path, model: MetaModel) -> None:
    prompt = PROMPTS[1]  # read in four pieces

    def program(engine: Engine) -> list[list[Event]]:
        asked = engine.submit(prompt, Sampling(max_gen_len=8), logprobs=2, prompt_logprobs=3)
        beside = engine.submit(PROMPTS[4], Sampling(max_gen_len=8))
        return [list(asked), list(beside)]

    events, plain = serving(folder, program)
    assert not any(event.scores or event.prompt_scores for event in plain)
    answer = tokens_of(events)
    logprobs = model.compute_logits([[*prompt, *answer]])[0].log_softmax(-1)
    assert events[0].prompt_scores[0] is None
    assert not any(event.prompt_scores for event in events[1:])
    found = [*events[0].prompt_scores[1:], *(score for event in events for score in event.scores)]
    assert len(found) == len(prompt) + len(answer) - 1
    for place, score in enumerate(found):
        assert isinstance(score, TokenScore)
        assert score.token == [*prompt, *answer][place + 1]
        assert math.isclose(score.logprob, float(logprobs[place, score.token]), abs_tol=1e-4)
        best = logprobs[place].topk(3 if place < len(prompt) - 1 else 2)
        assert [token for token, _ in score.top] == best.indices.tolist()
        assert [value for _, value in score.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_routes_are_those_of_a_pass_over_the_whole(folder: Path, model: MetaModel) -> None:
    prompt = PROMPTS[4]

    def program(engine: Engine) -> tuple[list[Event], tuple[tuple[int, ...], ...]]:
        events = list(engine.submit(prompt, Sampling(max_gen_len=8), routes=True))
        return events, engine.load.expert_tokens

    events, counts = serving(folder, program)
    answer = tokens_of(events)
    routes = [route for event in events for route in event.routes]
    assert len(routes) == len(answer) - 1
    read = [*prompt, *answer[:-1]]
    experts: list[Tensor] = []
    hooks = [
        layer.get_submodule("feed_forward.gate").register_forward_hook(
            lambda module, inputs, routing: experts.append(routing.experts_TK)
        )
        for layer in model.llma.layers
    ]
    model.compute_logits([read])
    for hook in hooks:
        hook.remove()
    expected = torch.stack(experts, 1)
    assert torch.tensor(routes).equal(expected[len(prompt) :])
    for layer, row in enumerate(counts):
        tally = Counter(expected[:, layer].flatten().tolist())
        assert list(row) == [tally[expert] for expert in range(8)]


def test_routes_and_scores_are_the_same_while_other_prompts_are_read(folder: Path) -> None:
    def asked(engine: Engine) -> AnswerStream:
        return engine.submit(PROMPTS[4], Sampling(max_gen_len=40), routes=True, logprobs=2)

    def program(engine: Engine) -> tuple[list[Event], list[Event]]:
        alone = list(asked(engine))
        stream = asked(engine)
        others = [engine.submit([1, 20 + n] * 30, Sampling(max_gen_len=3), prompt_logprobs=n % 2) for n in range(6)]
        together = list(stream)
        for other in others:
            list(other)
        return alone, together

    alone, together = serving(folder, program)
    assert tokens_of(together) == tokens_of(alone)
    assert [event.routes for event in together] == [event.routes for event in alone]
    for one, other in zip(alone, together, strict=True):
        for score, expected in zip(other.scores, one.scores, strict=True):
            assert score.logprob == pytest.approx(expected.logprob, abs=1e-4)


def test_cancelling_ends_within_two_steps_and_the_next_request_works(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order is given while a step is reported, and the steps that the model still takes are counted."""
    steps: list[int] = []
    write = Runner.write
    monkeypatch.setattr(Runner, "write", lambda self, command: (steps.append(len(steps)), write(self, command))[1])

    def program(engine: Engine) -> tuple[list[Event], int, list[Event], Any]:
        got: list[Any] = []
        over = threading.Event()
        begun = threading.Event()

        def on_event(event: Event | Exception) -> None:
            begun.wait()
            got.append(event)
            if len(got) == 5:
                stream.cancel()
                stream.cancel()
                steps.clear()
            if isinstance(event, Exception) or event.finish:
                over.set()

        stream = engine.submit(PROMPTS[1], Sampling(max_gen_len=60), on_event=on_event)
        begun.set()
        assert over.wait(PATIENCE)
        taken = len(steps)
        stream.cancel()
        return got, taken, list(engine.submit(PROMPTS[0], Sampling(max_gen_len=3))), engine.load

    got, taken, after, now = serving(folder, program, slots=1)
    assert got[-1] == Event(finish="cancelled")
    assert taken <= 2
    assert len(tokens_of(after)) == 3
    assert (now.running, now.waiting, now.cache_tokens, now.cancelled, now.finished) == (0, 0, 0, 1, 1)


def test_leaving_an_iteration_cancels(folder: Path) -> None:
    def program(engine: Engine) -> Any:
        for _ in engine.submit(PROMPTS[1], Sampling(max_gen_len=60)):
            break
        list(engine.submit(PROMPTS[0], Sampling(max_gen_len=3)))
        return engine.load

    assert serving(folder, program, slots=1).cancelled == 1


def test_more_than_may_wait_are_turned_away_and_find_room_later(folder: Path) -> None:
    def program(engine: Engine) -> list[Any]:
        short = Sampling(max_gen_len=60)
        streams = [engine.submit(PROMPTS[0], short) for _ in range(3)]
        try:
            engine.submit(PROMPTS[0], short)
        except Busy as error:
            busy = error
        answers = [tokens_of(list(stream)) for stream in streams]
        return [busy, *answers, tokens_of(list(engine.submit(PROMPTS[0], short)))]

    busy, *answers = serving(folder, program, slots=1, queue=2)
    assert busy.waiting == 2
    assert busy.retry_after >= 1
    assert all(answer == answers[0] for answer in answers)


def test_requests_share_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    for name in ("read", "write"):
        method = getattr(Runner, name)
        monkeypatch.setattr(
            Runner, name, lambda self, command, run=method: (steps.append(len(command.slots)), run(self, command))[1]
        )

    def program(engine: Engine) -> int:
        streams = [engine.submit([1, 20 + number], Sampling(max_gen_len=50)) for number in range(16)]
        return sum(len(tokens_of(list(stream))) for stream in streams)

    total = serving(folder, program, slots=16)
    assert total > 16 * 20
    assert len(steps) < total / 8


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        ([], {}, "no tokens"),
        ([1, 384], {}, "token 1 of the prompt is 384, outside the vocabulary of 384"),
        ([1, -1], {}, "token 1 of the prompt is -1"),
        ([1, True], {}, "token 1 of the prompt is True"),
        ([1] * 100, {"sampling": Sampling(max_gen_len=40)}, "ask for at most 28 tokens"),
        ([1], {"sampling": Sampling(max_gen_len=0)}, "max_gen_len"),
        ([1], {"sampling": Sampling(max_gen_len=4, temperature=-1.0)}, "temperature"),
        ([1], {"sampling": Sampling(max_gen_len=4, stop_ids=(True,))}, "stop_ids"),
        ([1], {"sampling": Sampling(max_gen_len=4, stop_ids=("</s>",))}, "stop_ids"),  # type: ignore[arg-type]
        ([1], {"seed": "x"}, "seed"),
        ([1], {"logprobs": -1}, "logprobs"),
        ([1], {"prompt_logprobs": 1.5}, "prompt_logprobs"),
    ],
)
def test_requests_that_make_no_sense_are_refused(
    folder: Path, tokens: list[int], settings: dict[str, Any], message: str
) -> None:
    def program(engine: Engine) -> int:
        with pytest.raises(ValueError, match=message):
            engine.submit(tokens, **{"sampling": Sampling(max_gen_len=4), **settings})
        return len(tokens_of(list(engine.submit([1], Sampling(max_gen_len=4)))))

    assert serving(folder, program) == 4


def test_calls_come_between_steps_and_raise_where_they_were_made(folder: Path, model: MetaModel) -> None:
    def program(engine: Engine) -> Any:
        stream = engine.submit(PROMPTS[1], Sampling(max_gen_len=50))
        found = engine.call("evaluate_examples", ["The list method"], contexts=["The"])
        with pytest.raises(ValueError, match="non-empty list"):
            engine.call("evaluate_examples", "text")
        with pytest.raises(TypeError, match="no_such_argument"):
            engine.call("compute_logits", ["a"], no_such_argument=1)
        with pytest.raises(ValueError, match="'train' cannot be called"):
            engine.call("train")
        return found, tokens_of(list(stream))

    found, answer = serving(folder, program)
    expected = model.evaluate_examples(["The list method"], contexts=["The"])
    assert found["log_likelihood"] == pytest.approx(expected["log_likelihood"])
    assert len(answer) == 50


def test_logits_that_are_not_finite_end_one_request_and_leave_the_slot_clean(
    tmp_path: Path, small_tokenizer: Path
) -> None:
    config = small_config()
    tensors = random_tensors(config, 3)
    tensors["tok_embeddings.weight"][9] = math.nan
    damaged = write_folder(tmp_path / "damaged", tensors, config, files=1, tokenizer=small_tokenizer)

    def program(engine: Engine) -> Any:
        long = Sampling(max_gen_len=50)
        before = tokens_of(list(engine.submit(PROMPTS[0], long)))
        good = engine.submit(PROMPTS[0], long)
        with pytest.raises(FloatingPointError, match="not finite"):
            list(engine.submit([1, *range(20, 60), 9], long))
        beside = tokens_of(list(good))
        # One that is cancelled while its prompt is read leaves nothing either.
        engine.submit([1, 9, *range(20, 90)], Sampling(max_gen_len=5)).cancel()
        both = [engine.submit(PROMPTS[0], long) for _ in range(2)]  # one in each slot
        return before, [beside, *(tokens_of(list(stream)) for stream in both)]

    before, others = serving(damaged, program, slots=2)
    assert len(before) == 50
    assert others == [before] * 3


def test_a_receiver_that_fails_harms_no_other(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def program(engine: Engine) -> int:
        def fail(event: Event | Exception) -> None:
            raise OSError("the page is gone")

        engine.submit(PROMPTS[0], Sampling(max_gen_len=5), on_event=fail)
        return len(tokens_of(list(engine.submit(PROMPTS[0], Sampling(max_gen_len=5)))))

    assert serving(folder, program) == 5
    assert "could not be handed on" in caplog.text


def test_an_engine_that_fails_says_so_to_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Runner, command: Any) -> None:
        raise RuntimeError("out of memory\nand a page of where")

    monkeypatch.setattr(Runner, "write", fail)

    def program(engine: Engine) -> Any:
        with pytest.raises(RankLost, match="out of memory"):
            list(engine.submit(PROMPTS[0], Sampling(max_gen_len=5)))
        assert not engine.ready
        with pytest.raises(RankLost, match="out of memory"):
            engine.submit(PROMPTS[0], Sampling(max_gen_len=5))
        with pytest.raises(RankLost, match="out of memory"):
            engine.call("compute_logits", ["a"])
        assert engine.failure == "out of memory"

    with pytest.raises(RankLost, match="out of memory"):
        serving(folder, program)
    assert "the engine has failed" in caplog.text


@pytest.mark.parametrize("setting", [{"slots": 0}, {"queue": -1}, {"prefill_tokens": 0}, {"timeout": 0.0}])
def test_settings_that_make_no_sense_are_refused(folder: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        serving(folder, lambda engine: None, **setting)


def test_what_is_left_when_the_program_ends_is_told(folder: Path) -> None:
    left = serving(folder, lambda engine: engine.submit(PROMPTS[0], Sampling(max_gen_len=100)))
    with pytest.raises(RankLost, match="closed"):
        list(left)


# --- sampling of each sequence by its own settings

LOGITS = torch.tensor([0.05, 0.5, 0.3, 0.15]).log()


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (0.0, 0.9, [0.0, 1.0, 0.0, 0.0]),
        (1.0, 0.0, [0.0, 1.0, 0.0, 0.0]),
        (1.0, 1.0, [0.05, 0.5, 0.3, 0.15]),
        # 0.5 + 0.3 reach 0.7; the other two tokens never come.
        (1.0, 0.7, [0.0, 0.625, 0.375, 0.0]),
        # Temperature 1/2 squares the probabilities: 0.0025 + 0.25 + 0.09 + 0.0225 = 0.365.
        (0.5, 1.0, [0.0025 / 0.365, 0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365]),
    ],
)
def test_draws_fall_as_often_as_they_should(temperature: float, top_p: float, expected: list[float]) -> None:
    """Numbers spread evenly over [0, 1) take each token by its share, whatever other rows ask for."""
    count = 1000
    one, other = Sampling(temperature=temperature, top_p=top_p), Sampling(temperature=0.7, top_p=0.8)
    draws = [(number + 0.5) / count for number in range(count) for _ in range(2)]
    tokens = sample_each(LOGITS.repeat(2 * count, 1), [one, other] * count, draws)[::2].tolist()
    assert [tokens.count(token) / count for token in range(4)] == pytest.approx(expected, abs=0.002)


def test_the_ends_of_chance_take_tokens_that_are_possible() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]]).repeat(2, 1)
    for top_p in (1.0, 0.9999):
        how = [Sampling(temperature=1.0, top_p=top_p)] * 2
        assert set(sample_each(logits, how, [0.0, 1.0 - 2**-53]).tolist()) == {1, 2}


def test_rows_that_are_not_finite_are_told_apart() -> None:
    logits = torch.tensor([[0.0, math.nan], [math.inf, 0.0], [0.0, 1.0], [-math.inf, 1.0]])
    for how in (Sampling(), Sampling(temperature=1.0, top_p=0.5), Sampling(temperature=1.0, top_p=1.0)):
        tokens = sample_each(logits, [how] * 4, [0.5] * 4).tolist()
        assert tokens[:2] == [-1, -1]
        assert min(tokens[2:]) >= 0
