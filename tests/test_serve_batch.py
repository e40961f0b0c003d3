"""The batch of a serving engine: who runs next, whatever comes and goes. No model and no processes here."""

import random

import pytest
from models import Letters

from accessory.generation.sampling import Sampling
from accessory.serve.batch import Batch, Reading, Sequence, Writing
from accessory.serve.request import Request
from accessory.text.chat import Ends


def sequence(number: int, prompt: int, answer: int = 1000, eos_id: int = -1, ends: Ends | None = None) -> Sequence:
    sampling = Sampling(max_gen_len=answer).with_ends(ends or Ends())
    return Sequence(number, Request(tokens=(1,) * prompt, sampling=sampling), Letters(eos_id))


def step(batch: Batch, token: int = 5) -> Reading | Writing | None:
    """Let a batch take its next step, with a model that says the same token for ever."""
    decided = batch.next()
    match decided:
        case Reading(rows, answers):
            for row, count in rows:
                row.read += count
            moved = [row for row, _ in rows if not row.unread] + answers
        case Writing(rows):
            moved = rows
        case None:
            moved = []
    for row in moved:
        row.push(token)
        if row.finish:
            batch.leave(row)
    return decided


def counts(decided: Reading | Writing | None) -> dict[int, int]:
    assert isinstance(decided, Reading)
    return {row.number: count for row, count in decided.rows}


def test_short_prompts_leave_their_share_to_the_long_one() -> None:
    batch = Batch(slots=4, prefill_tokens=512)
    for number, prompt in enumerate((4000, 100, 30)):
        batch.add(sequence(number, prompt))
    assert counts(step(batch)) == {0: 382, 1: 100, 2: 30}


def test_answers_go_on_while_prompts_are_read() -> None:
    batch = Batch(slots=2, prefill_tokens=8)
    batch.add(sequence(0, 3))
    assert counts(step(batch)) == {0: 3}
    assert isinstance(step(batch), Writing)
    batch.add(sequence(1, 20))
    seen = [step(batch) for _ in range(3)]
    assert [counts(each) for each in seen] == [{1: 8}, {1: 8}, {1: 4}]
    assert [[row.number for row in each.answers] for each in seen if isinstance(each, Reading)] == [[0]] * 3
    assert isinstance(last := step(batch), Writing)
    assert [row.number for row in last.rows] == [0, 1]


def test_a_free_slot_goes_to_who_came_first() -> None:
    batch = Batch(slots=1, prefill_tokens=8)
    for number in range(3):
        batch.add(sequence(number, 2, answer=2))
    order = []
    while (decided := step(batch)) is not None:
        order += [row.number for row, _ in decided.rows] if isinstance(decided, Reading) else []
    assert order == [0, 1, 2]


def test_who_waits_can_leave() -> None:
    batch = Batch(slots=1, prefill_tokens=8)
    first, second, third = (sequence(number, 2) for number in range(3))
    for each in (first, second, third):
        batch.add(each)
    step(batch)
    assert batch.leave(second) is None
    assert batch.leave(first) == 0
    assert counts(step(batch)) == {2: 2}
    assert third.slot == 0


@pytest.mark.parametrize("seed", range(40))
def test_whatever_comes_and_goes_slots_are_kept_and_all_are_served(seed: int) -> None:
    """Requests of random lengths come and are cancelled at random moments."""
    chance = random.Random(seed)
    slots, budget = chance.randint(1, 5), chance.randint(5, 40)
    batch, left = Batch(slots, budget), {}
    ended: dict[int, Sequence] = {}
    number = 0
    for moment in range(400):
        if moment < 300 and chance.random() < 0.3:
            left[number] = sequence(number, chance.randint(1, 120), answer=chance.randint(1, 30))
            batch.add(left[number])
            number += 1
        if left and chance.random() < 0.05:
            gone = left.pop(chance.choice(list(left)))
            batch.leave(gone)
            ended[gone.number] = gone
        decided = step(batch)
        rows = {}
        if isinstance(decided, Reading):
            rows = {row.number: count for row, count in decided.rows}
            assert sum(rows.values()) <= budget
            assert all(rows.values())
            rows |= {row.number: 1 for row in decided.answers}
        elif isinstance(decided, Writing):
            rows = {row.number: 1 for row in decided.rows}
        # Who has a slot is never passed over.
        assert {each.number for each in batch.running.values()} <= rows.keys()
        for done in [each for each in left.values() if each.finish]:
            ended[done.number] = left.pop(done.number)
        assert {each.slot for each in left.values()} - {None} == set(batch.running)
        assert len(batch.running) == min(slots, len(left)) or decided is not None
        assert batch.waiting == sum(each.slot is None for each in left.values())
    for _ in range(10_000):
        if step(batch) is None:
            break
    assert batch.idle
    assert all(each.finish for each in left.values())
    assert sorted(ended | left) == list(range(number))


def test_why_an_answer_ends() -> None:
    cut = sequence(0, 1, answer=2)
    assert [cut.push(5), cut.push(6)] == [Letters().decode([5]), Letters().decode([6])]
    assert cut.finish == "length"
    ended = sequence(0, 1, eos_id=7)
    ended.push(5)
    assert ended.push(7) == ""
    assert ended.finish == "stop"
    stopped = sequence(0, 1, ends=Ends(stop=(Letters().decode([5, 6]),)))
    assert stopped.push(5) == ""  # it may be the beginning of a stop string
    assert stopped.push(6) == ""
    assert stopped.finish == "stop"
    held = sequence(0, 1, ends=Ends(stop=(Letters().decode([5, 6]),)))
    held.push(5)
    assert held.push(7) == Letters().decode([5, 7])
    late = sequence(0, 1, answer=2, ends=Ends(stop=(Letters().decode([5, 6, 7]), Letters().decode([6]))))
    assert [late.push(5), late.push(6), late.finish] == ["", Letters().decode([5]), "stop"]


def test_the_forms_lead_and_tail_are_not_the_answers() -> None:
    text = Letters().decode
    ends = Ends(stop_ids=(8, 9), lead=text([5]), tail=text([6, 7]))
    for last, finish, shown in ((9, "stop", [4]), (3, "length", [4, 6, 7, 3])):
        answer = sequence(0, 1, answer=5, ends=ends)
        told = [answer.push(token) for token in (5, 4, 6, 7, last)]
        assert told[:4] == ["", text([4]), "", ""]
        assert ("".join(told), answer.text) == (text(shown), text(shown))
        assert (answer.finish, answer.written, answer.last_token) == (finish, 5, last)
    full = sequence(0, 1, answer=4, ends=ends)
    assert "".join(full.push(token) for token in (5, 4, 6, 7)) == text([4, 6, 7]), "its length ended it"


def test_equal_seeds_draw_alike_and_only_where_chance_is_asked_for() -> None:
    def drawn(seed: int | None, temperature: float) -> list[float]:
        request = Request(tokens=(1,), sampling=Sampling(temperature=temperature), seed=seed)
        one = Sequence(0, request, Letters())
        return [one.draw() for _ in range(3)]

    assert drawn(7, 1.0) == drawn(7, 1.0) != drawn(8, 1.0)
    assert drawn(None, 1.0) != drawn(None, 1.0)
    assert drawn(7, 0.0) == [0.0, 0.0, 0.0]
