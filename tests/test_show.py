"""accessory show: examples as they are trained, what of them is learned, and what is left out."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from programs import Program
from ranks import run_command

from accessory.cli import main
from accessory.data.examples import Recipe
from accessory.data.sources import Source
from accessory.text.instruction import format_prompt
from accessory.text.tokenizer import Tokenizer

MODELS = Path(mistral_common.__file__).parent / "data"
MODEL = MODELS / "tokenizer.model.v1"
V3 = MODELS / "mistral_instruct_tokenizer_240323.model.v3"
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.\n\n###"
)
Show = Callable[..., str]


def chat(*said: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant") * len(said)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)], **more}


WHY = chat("Why?", "So.")
SHOWN = f"<s>{SYSTEM} Human: Why?\n### Assistant:⟦ So.\n###</s>⟧\n"


def yaml_of(folder: Path, records: list[Any], name: str = "data.json", **entry: Any) -> Path:
    file = folder / name
    file.write_text("\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records))
    (folder / "data.yaml").write_text(json.dumps({"META": [{"path": str(file), **entry}]}))
    return folder / "data.yaml"


@pytest.fixture
def show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Show:
    """What the command prints of records; its options as words."""

    def shown(records: list[Any], words: str = "", *, model: Path = MODEL, **entry: Any) -> str:
        code = main(["show", str(yaml_of(tmp_path, records, **entry)), "--model", str(model), *words.split()])
        told = capsys.readouterr()
        assert code == 0
        assert all(line.startswith('INFO: chats are put into the form "') for line in told.err.splitlines())
        text, _, end = told.out.rstrip("\n").rpartition("\n")
        assert re.fullmatch(rf"--- shown: \d+ of {len(records)} records of data.json", end)
        return f"{text}\n"

    return shown


def test_what_is_learned_stands_in_brackets(show: Show) -> None:
    tokenizer = Tokenizer(MODEL)
    learned = [*tokenizer.cont(" So.\n###"), tokenizer.eos_id]
    count = len([tokenizer.bos_id, *tokenizer.encode(SHOWN[3 : SHOWN.index("⟦")], False, False), *learned])
    head = f'--- data.json, record 1: {count} tokens, {len(learned)} learned; form "default"\n'
    assert show([WHY]) == head + SHOWN
    two = show([chat("Why?", "So.", "And?", "Thus.")])
    assert two.endswith(" Assistant:⟦ So.\n### Human:⟧ And?\n### Assistant:⟦ Thus.\n###</s>⟧\n")
    told = show([{"instruction": "Name one.", "output": "Blue."}, {"prompt": "The", "completion": " dog."}])
    prompt = format_prompt({"instruction": "Name one."})
    assert f"<s>{prompt}⟦Blue.</s>⟧\n" in told
    assert told.endswith("learned; raw text\n<s>The⟦ dog.</s>⟧\n")
    assert 'form "alpaca"' in told


def test_what_is_learned_has_a_colour_on_a_terminal(tmp_path: Path) -> None:
    theirs, ours = os.openpty()
    command = [sys.executable, "-m", "accessory", "show", yaml_of(tmp_path, [WHY]), "--model", MODEL, "--tokens"]
    try:
        with Program(command, terminal=ours) as program:
            assert program.wait() == 0
        told = os.read(theirs, 1 << 16).decode().replace("\r\n", "\n")
    finally:
        os.close(theirs)
        os.close(ours)
    text, tokens = SHOWN.replace("⟦", "\x1b[30;42m").replace("⟧", "\x1b[0m"), told.partition("\n  ")[2]
    assert text in told
    assert "⟦" not in told
    assert tokens.endswith("\n  \x1b[30;42m2 '</s>'\x1b[0m\n--- shown: 1 of 1 records of data.json\n")


def test_the_tokens_are_those_that_are_trained(show: Show) -> None:
    tokenizer = Tokenizer(MODEL)
    recipe = Recipe(tokenizer, 1024)
    (part,), _ = recipe.read(WHY, Source(Path("a.json")))
    tokens, labels, _ = recipe.encode(part)
    names = [f"{token} {tokenizer.name(token)!r}" for token in tokens.tolist()]
    lines = [f"  ⟦{name}⟧" if label else f"  {name}" for name, label in zip(names, labels.tolist(), strict=True)]
    told = show([WHY], "--tokens")
    assert told.endswith(SHOWN + "\n".join(lines) + "\n")
    assert lines[0] == "  1 '<s>'"
    assert lines[-1] == "  ⟦2 '</s>'⟧"


def test_a_limit_counts_the_examples_of_each_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats = [chat("Why?", f"So {number}.") for number in range(9)]
    entries = []
    for name in ("a.json", "b.jsonl"):
        yaml_of(tmp_path, chats, name)
        entries.append({"path": str(tmp_path / name)})
    (tmp_path / "both.yaml").write_text(json.dumps({"META": entries}))
    command = ["show", str(tmp_path / "both.yaml"), "--model", str(MODEL)]
    for words, count in (([], 5), (["--limit", "2"], 2), (["--limit", "99"], 9)):
        assert main([*command, *words]) == 0
        told = capsys.readouterr().out
        assert re.findall("--- shown: (.*)", told) == [
            f"{count} of 9 records of {name}" + (f"; --limit 9 looks at the other {9 - count} too" if count < 9 else "")
            for name in ("a.json", "b.jsonl")
        ]
        heads = [line.split(":")[0] for line in told.splitlines() if re.match("--- [^s]", line)]
        places = range(1, count + 1)
        assert heads == [*(f"--- a.json, record {n}" for n in places), *(f"--- b.jsonl, line {n}" for n in places)]


def test_data_that_teach_nothing_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for records in ([{"name": "Kettle", "price": "8"}] * 3, [chat("Why?", "")]):
        assert main(["show", str(yaml_of(tmp_path, records)), "--model", str(MODEL)]) == 1
        told = capsys.readouterr()
        assert "--- shown: 0 of" in told.out
        assert told.err.endswith("has no record that can be trained on: see what was left out, and why\n")


def test_a_cut_is_told_and_shown(show: Show) -> None:
    tokenizer = Tokenizer(MODEL)
    whole = Recipe(tokenizer, 1024)
    record = chat("Why?", "It is so because it is.")
    (part,), _ = whole.read(record, Source(Path("a.json")))
    tokens, labels, _ = whole.encode(part)
    asked = int((labels == 0).sum())
    told = show([record], f"--max_words {asked + 3}")
    head, _, text = told.partition("\n")
    cut = f"cut from {len(tokens)} at --max_words {asked + 3}"
    assert head.endswith(f'{asked + 3} tokens, 3 learned, {cut}; form "default"')
    assert text.endswith(" Assistant:⟦ It is so⟧\n")
    told = show([record], f"--max-words {asked - 5}")
    assert f"{asked - 5} tokens, 0 learned, cut from {len(tokens)} at" in told
    assert "; left out: nothing that is learned remains; form" in told
    assert "⟦" not in told
    assert "cut from" not in show([record], f"--max_words {len(tokens)}")


def test_what_is_left_out_is_told_with_the_reason(show: Show) -> None:
    bad = [3, {"instruction": "a"}, chat("Why?", "So.\n### Human: And?"), chat("Why?", "\ud800")]
    told = show([*bad, WHY, chat("Why?", " "), chat("Why?")])
    assert told.index(SHOWN) < told.index("--- left out: data.json, record 1: it is 3, not an object")
    for line in (
        "--- left out: data.json, record 2: it is of no known shape, having ['instruction']; ",
        "--- left out: data.json, record 3: its answer holds '\\n### Human:', at which answers end in this form\n",
        "--- left out: data.json, record 4: it holds a lone surrogate",
        "--- left out: 2 records of data.json without an answer to learn\n",
    ):
        assert line in told
    assert "--- left out: 3 more bad records of data.json\n" in show([WHY, *[3] * 8])


def test_faults_before_an_unknown_field_are_told_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = yaml_of(tmp_path, [3, WHY, {**WHY, "foo": 1}, {**WHY, "baz": 2}], "data.jsonl")
    assert main(["show", str(file), "--model", str(MODEL)]) == 1
    told = capsys.readouterr()
    assert told.out.index(SHOWN) < told.out.index("--- left out: data.jsonl, line 1: it is 3, not an object")
    fix = "(or what follows it) has the unknown ['foo', 'baz']: pass --ignore_fields foo,baz"
    assert told.err == f"ERROR: {tmp_path}/data.jsonl, line 3: it {fix}\n"


def test_an_input_that_the_prompt_leaves_out_is_told(show: Show) -> None:
    alpaca = {"instruction": "Name one.", "input": "In French.", "output": "Bleu."}
    line = '--- left out: the "input" of 2 records of data.json, by their prompt_type\n'
    assert line in show([alpaca, {**alpaca, "input": ""}, alpaca], prompt_type="qg")
    assert "--- left out" not in show([alpaca])


def test_an_answer_that_would_not_come_back_is_told(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise ValueError("its answer 'So.' does not come back")

    monkeypatch.setattr("accessory.data.examples.encode_example", refused)
    assert show([WHY]) == "--- left out: data.json, record 1: its answer 'So.' does not come back\n"


def test_a_record_may_become_several_examples(show: Show) -> None:
    """Where the form puts what the system says into the last question."""
    record = {"messages": [{"role": "system", "content": "Be."}, *chat("Why?", "So.", "And?", "Thus.")["messages"]]}
    told = show([record], "--chat_template mixtral-instruct", model=V3)
    first, second = told.split("--- data.json, record 1, example ")[1:]
    assert first.startswith("1 of 2: ")
    assert second.startswith("2 of 2: ")
    assert first.endswith('; form "mixtral-instruct"\n<s>[INST] Be.\n\nWhy?[/INST]⟦ So.</s>⟧\n')
    assert second.endswith("\n<s>[INST] Why?[/INST] So.</s>[INST] Be.\n\nAnd?[/INST]⟦ Thus.</s>⟧\n")


def test_options_are_those_of_training(show: Show, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alpaca = {"instruction": "Name one.", "output": "Blue."}
    assert "⟦ Blue.\n###</s>⟧" in show([alpaca], "--chat_template default")
    (tmp_path / "own.jinja").write_text("{% for one in messages %}({{ one.content }}){% endfor %}")
    own = str(tmp_path / "own.jinja")
    assert f'form "{own}"\n(Name one.)⟦(Blue.)⟧\n' in show([alpaca], f"--chat_template {own}")
    assert "record 1: it has no dialogue: an Alpaca record is read without --dialog" in show([alpaca, WHY], "--dialog")
    noted = {**WHY, "notes": "a", "score, all": 3}
    assert main(["show", str(yaml_of(tmp_path, [noted])), "--model", str(MODEL)]) == 1
    told = capsys.readouterr()
    assert told.err.startswith(f"ERROR: {tmp_path}/data.json, record 1: it has the unknown ['notes', ")
    assert SHOWN in show([{**WHY, "notes": "a", "more": 3}], "--ignore_fields notes,more")
    assert main(["show", str(yaml_of(tmp_path, [alpaca, WHY])), "--model", str(MODEL)]) == 1
    told = capsys.readouterr()
    assert SHOWN in told.out
    assert told.err.count("\n") == 1
    assert "the records have several prompt forms, alpaca and default, in " in told.err


def test_the_template_of_the_models_folder(show: Show, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(MODEL.read_bytes())
    (folder / "chat_template.jinja").write_text("{% for one in messages %}<{{ one.content }}>{% endfor %}")
    assert SHOWN in show([WHY], model=folder), "unless it is asked for, as in training"
    assert show([WHY], "--chat_template model", model=folder).endswith('form "chat_template.jinja"\n<Why?>⟦<So.>⟧\n')


def test_control_characters_of_the_data_are_harmless(show: Show) -> None:
    told = show(
        [
            chat("\x1b[2JWhy?\x07", "So\x9b31m.\u202e\r"),
            {"instruction": "a", "output": "\x1b]0;b\x07", "input": 3},
            chat("a", "\x1b### b\x1b\n### Human:"),
            {"text": "\x00"},
        ],
        "--tokens",
    )
    assert not set(told) & {chr(code) for code in (*range(10), *range(11, 32), *range(127, 160), 0x202E)}
    assert "␛[2JWhy?␇" in told
    assert "it has 3 under 'input'" in told


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "not valid YAML"),
        (["--model", "/absent"], "--model /absent does not exist: give a checkpoint's folder, or a tokenizer's file"),
        (
            ["--model", __file__],
            "test_show.py is not a whole sentencepiece model: copy or download it again, or give --m",
        ),
        (["--model", str(MODELS.parent)], "holds neither tokenizer.model nor tokenizer.json: copy it there"),
        (["absent.yaml"], "no data yaml absent.yaml: check the path"),
        (["--chat_template", "vicuna"], "chat_template 'vicuna' is no file and unknown as a name"),
        (["--chat_template", "model"], "no chat template lies in"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = yaml_of(tmp_path, [WHY])
    if not words:
        file.write_text("META: [{path: data.json")
    data = [str(file)] if len(words) != 1 else []
    assert main(["show", *data, "--model", str(MODEL), *words]) == 1
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert told.err.startswith("ERROR: ")
    assert says in told.err


@pytest.mark.parametrize(
    ("words", "says"), [("--limit 0", "at least 1"), ("--max_words 1", "of 2 or more"), ("", "--model")]
)
def test_wrong_arguments(words: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(MODEL)] if words else []
    with pytest.raises(SystemExit):
        main(["show", str(yaml_of(tmp_path, [WHY])), *model, *words.split()])
    assert says in capsys.readouterr().err


def test_several_ranks_are_refused(tmp_path: Path) -> None:
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [torchrun, "--standalone", "--nproc-per-node", "2", "-m", "accessory", "show"]
    done = run_command([*command, yaml_of(tmp_path, [WHY]), "--model", MODEL])
    assert done.returncode != 0
    assert done.stderr.count("ERROR: accessory show works in one process: start it without torchrun") == 1
    assert "⟦" not in done.stdout
