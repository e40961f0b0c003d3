"""A model asked what it was trained on says it, byte for byte, at every door and in every form.

Trained by main_finetune.py as a user would, on records whose answers begin where tokens like to merge.
"""

import asyncio
import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from chat_templates import TEMPLATES
from finetuning import alone
from http_api import ServedApi
from programs import Program

from accessory.cli import main
from accessory.data.cache import CACHE_VARIABLE
from accessory.generation.sampling import Sampling
from accessory.serve.dialogue import dialogue_prompt
from accessory.serve.driver import Driver
from accessory.serve.terminal import Terminal
from accessory.serve.web.parts import written
from accessory.serve.web.session import Session
from accessory.text.form_files import find_form
from accessory.text.forms import Form
from accessory.text.tokenizer import Tokenizer
from accessory.tools.tiny import TinyReport

MARKS = ["-", "*", '"', "'", "`", "=", ":", "/", "\\", "<", "_", "#", "~", ".", ",", "(", "&", "%", "|", ">"]
ANSWERS = [
    *(f"{mark} alpha {number}\n{mark}{mark} beta" for number, mark in enumerate(MARKS)),
    "### Title\nbody\n### Next\nmore",
    "#### Deep\n###",
    "    return 1",
    "\tif x:\n\t\treturn y",
    "  two spaces",
    "\U0001f600 fine \U0001f468\u200d\U0001f469",
    "\u4f60\u597d\uff0c\u4e16\u754c",
    "42",
    "\u00e9t\u00e9",
    "<s> and </s> and [INST]",
    *(f"{mark}{mark}gamma {number}" for number, mark in enumerate(MARKS[:10])),
]
LENGTH, EPOCHS = 60, 40


@dataclass(frozen=True)
class Case:
    """A form, how it is asked for, and the control tokens that its tokenizer has beside the small one's."""

    form: str | None
    controls: tuple[str, ...] = ()
    added: tuple[str, ...] = ()  # by tokenizer_config.json


CASES = {
    "default": Case(None),
    "alpaca": Case("alpaca"),
    "mixtral v1": Case("mixtral-instruct"),
    "mixtral v3": Case("mixtral-instruct", controls=("[INST]", "[/INST]")),
    "chatml": Case("chatml.jinja", added=("<|im_start|>", "<|im_end|>")),
}


def turns(number: int, answer: str) -> list[tuple[str, str]]:
    """One turn mostly; here and there a second one that only the first explains."""
    first = (f"What is {number} of {MARKS[number % len(MARKS)]}?", answer)
    return [first, ("And then?", f"then {number} {answer[:7].strip()}")] if number % 5 == 4 else [first]


def system_of(number: int) -> str | None:
    return "Speak \u00abplainly\u00bb." if number % 7 == 3 else None


# Two of three, which begin with all kinds of tokens: five trainings take minutes.
RECORDS = [(system_of(number), turns(number, answer)) for number, answer in enumerate(ANSWERS) if number % 3]


def messages_of(system: str | None, said: list[tuple[str, str]]) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in said:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


# The older spelling of one that is trained anyway, and the form of single questions: `make soak` has them too.
SOAK = ("mixtral v1", "alpaca")
NAMES = [pytest.param(name, marks=[pytest.mark.soak] if name in SOAK else []) for name in CASES]


@pytest.fixture(scope="module", params=NAMES)
def trained(
    request: pytest.FixtureRequest, tiny: tuple[Path, TinyReport], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a model that was finetuned on RECORDS in one of the forms."""
    case, folder = CASES[request.param], tmp_path_factory.mktemp("trained")
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes((tiny[0] / "tokenizer.model").read_bytes() + b"".join(map(control_piece, case.controls)))
    if case.added:
        first = Tokenizer(tokenizer).n_words
        decoder = {first + place: {"content": name, "special": True} for place, name in enumerate(case.added)}
        settings = {"added_tokens_decoder": decoder, "bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    # Two layers of four learn as well, in half the time.
    release = torch.load(tiny[0] / "consolidated.00.pth")
    release = {name: own for name, own in release.items() if not name.startswith(("layers.2.", "layers.3."))}
    for name in ("tok_embeddings.weight", "output.weight"):  # a padded vocabulary
        release[name] = torch.cat([release[name], 0.02 * torch.randn(64, release[name].shape[1])])
    sizes = json.loads((tiny[0] / "params.json").read_text())
    (folder / "base").mkdir()
    torch.save(release, folder / "base" / "consolidated.00.pth")
    sizes |= {"n_layers": 2, "vocab_size": len(release["output.weight"])}
    (folder / "base" / "params.json").write_text(json.dumps(sizes))
    tokenizer.rename(folder / "base" / "tokenizer.model")
    if case.added:
        (folder / "tokenizer_config.json").rename(folder / "base" / "tokenizer_config.json")
    (folder / "chatml.jinja").write_text(TEMPLATES["chatml"])
    (folder / "data.json").write_text(json.dumps([{"messages": messages_of(*record)} for record in RECORDS]))
    (folder / "data.yaml").write_text(f"META: [{{path: {folder}/data.json}}]")
    options = {
        "pretrained_path": folder / "base", "data_config": folder / "data.yaml", "output_dir": folder / "run",
        "epochs": EPOCHS, "batch_size": 8, "lr": 3e-3, "min_lr": 1e-4, "warmup_epochs": 2, "max_words": 256,
        "precision": "fp32", "device": "cpu", "save_interval": 1000, "save_iteration_interval": 0,
        "load_balancing_weight": 0,
    }  # fmt: skip
    if case.form is not None:
        options["chat_template"] = folder / case.form if case.form.endswith(".jinja") else case.form
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    with Program(alone(arguments), {CACHE_VARIABLE: str(folder / "cache")}) as program:
        assert program.wait(400) == 0, program.text
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["loss"] < 0.02
    return folder / "run" / f"epoch{EPOCHS - 1}"


def control_piece(name: str) -> bytes:
    """A further piece of a sentencepiece model: its name and the kind of control tokens."""
    piece = bytes([0x0A, len(name.encode())]) + name.encode() + b"\x18\x03"
    return bytes([0x0A, len(piece)]) + piece


def test_every_door_gives_every_trained_answer(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = [said for system, said in RECORDS if system is None]
    questions = [said[0][0] for said in plain]
    asked = [word for question in questions for word in ("--prompt", question)]
    settings = ["--dtype", "fp32", "--device", "cpu", "--max_seq_len", "512", "--max-gen-len", str(LENGTH)]
    assert main(["generate", str(trained), "--json", *settings, *asked]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]
    assert [(one["prompt"], one["completion"]) for one in found] == [said[0] for said in plain]
    with Driver(trained, slots=4, max_seq_len=512, dtype="fp32", device="cpu") as engine:
        form = find_form(engine.tokenizer, [trained])
        with ServedApi(engine) as api:
            for system, said in RECORDS:
                for place, (_, answer) in enumerate(said):
                    messages = messages_of(system, said[: place + 1])[:-1]
                    body = api.chat(messages=messages, temperature=0, max_tokens=LENGTH).json()
                    assert body["choices"][0]["message"]["content"] == answer
                    assert body["choices"][0]["finish_reason"] == "stop"
        for said in plain:
            lines = io.StringIO("".join(f"{question}\n" for question, _ in said))
            sink = io.StringIO()
            Terminal(engine, Sampling(max_gen_len=LENGTH), form=form, source=lines, sink=sink).run()
            assert sink.getvalue() == "".join(f"{answer}\n" for _, answer in said)
            assert asyncio.run(on_the_page(engine, form, [question for question, _ in said])) == said


async def on_the_page(engine: Driver, form: Form, questions: list[str]) -> list[tuple[str, str]]:
    """The turns of the demo's page, asked these questions."""
    session = Session()
    for question in questions:

        def request(question: str = question) -> tuple[tuple[int, ...], Sampling]:
            prompt = dialogue_prompt(form, session.turns, question, room=400)
            return prompt.tokens, Sampling(max_gen_len=LENGTH).with_ends(form.ends)

        async for answer in written(engine, session, request):
            assert not isinstance(answer, Exception), answer
        session.turns.append((question, answer.text))
    return session.turns
