"""What the package says to its users: in the language of the door that they came through."""

import argparse
import ast
import re
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_imports import MODULES, layer_of

from accessory import cli
from accessory.arguments import Parser
from accessory.commands import demos
from accessory.errors import nearest, unknown
from accessory.serve.options import add_rank_arguments
from accessory.train import options

# Both doors lead through these layers: a flag is none of Python's, and a keyword argument none of the shell's.
SHARED = {"kernels", "ground", "quant", "parallel", "launch", "text", "checkpoint", "generation"}
SHARED |= {"metamodel", "llm", "wrapper", "blocks"}
FLAGS = {"accessory.config.quant", "accessory.arguments", "accessory.launch.local"}  # only commands go through them
FLAG = re.compile(r"(?<![\w-])--[a-z]\w+")
KEYWORD = re.compile(r"\b[a-z_]+=([\"'\[{]|None\b|True\b|False\b|\d)")
SPEAKS = {"debug", "info", "warning", "error", "say_once"}


def texts_of(node: ast.AST) -> str:
    parts = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str))
    return re.sub(r"`[^`]*`", "", " ".join(parts))  # a command is named as one


def said(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of all that a module raises or logs."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            yield node.lineno, texts_of(node.exc)
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in SPEAKS or name.endswith("Error"):
                yield node.lineno, texts_of(node)


def test_what_both_doors_lead_through_speaks_neither_language() -> None:
    found = []
    for module, path in MODULES.items():
        if layer_of(module) not in SHARED or module in FLAGS:
            continue
        for line, text in said(path.read_text()):
            if (match := FLAG.search(text) or KEYWORD.search(text)) is not None:
                found.append(f"{module}:{line} says {match[0]!r}: {text[:100]}")
    assert not found, "\n".join(sorted(set(found)))


def programs() -> list[Parser]:
    multi_turn = demos._parser("multi_turn.py", "A page.")
    add_rank_arguments(multi_turn)
    found = [cli._parser(), options.finetune_parser(), multi_turn]
    for action in found[0]._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += action.choices.values()
    return found


PROGRAMS = {parser.prog: parser for parser in programs()}


@pytest.mark.parametrize("parser", PROGRAMS.values(), ids=PROGRAMS)
def test_every_program_has_one_parser_and_says_what_it_is_for(parser: Parser) -> None:
    assert isinstance(parser, Parser)
    assert parser.description
    assert all(action.help for action in parser._actions if not isinstance(action, argparse._SubParsersAction))
    if parser.prog.startswith("accessory "):
        assert (parser.epilog or "").startswith(f"example: {parser.prog} ")


def misspelt(name: str, place: int, kind: str) -> str:
    place %= len(name) - 1
    if kind == "lost":
        return name[:place] + name[place + 1 :]
    if kind == "twice":
        return name[:place] + name[place] + name[place:]
    return name[:place] + name[place + 1] + name[place] + name[place + 2 :]


@settings(max_examples=300, deadline=None)
@given(
    program=st.sampled_from(sorted(PROGRAMS)),
    which=st.integers(0, 10**6),
    place=st.integers(0, 40),
    kind=st.sampled_from(["lost", "twice", "swapped"]),
    value=st.booleans(),
)
def test_a_misspelt_option_is_said_first_with_the_one_that_was_meant(
    program: str, which: int, place: int, kind: str, value: bool
) -> None:
    """Whatever else is missing."""
    parser = PROGRAMS[program]
    names = [name for name in parser._option_string_actions if len(name) > 5 and name.startswith("--")]
    meant = names[which % len(names)]
    wrong = "--" + misspelt(meant[2:], place, kind)
    if any(name.startswith(wrong) for name in names):
        return  # an abbreviation, or the same
    message = refusal(parser, [wrong, *(["x"] if value else [])])
    assert message.startswith(f"{program}: error: unknown option {wrong} (did you mean --")
    guess = re.search(r"did you mean (\S+)\?", message)
    assert guess is not None
    # Another name may be as near; it is mostly the same one in its other spelling.
    assert guess[1].replace("_", "-") == meant.replace("_", "-") or distance(guess[1], wrong) <= 2


def distance(one: str, other: str) -> int:
    """Edits between two words (Levenshtein), a hyphen and an underscore being the same."""
    one, other = one.replace("_", "-"), other.replace("_", "-")
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, start=1):
        last, row[0] = row[0], number
        for place, theirs in enumerate(other, start=1):
            last, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, last + (letter != theirs))
    return row[-1]


def refusal(parser: argparse.ArgumentParser, arguments: list[str]) -> str:
    import contextlib
    import io

    written = io.StringIO()
    with contextlib.redirect_stderr(written), pytest.raises(SystemExit) as caught:
        parser.parse_args(arguments)
    assert caught.value.code == 2
    (line,) = written.getvalue().splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["generate", "x", "--promt", "hi"],
            "accessory generate: error: unknown option --promt (did you mean --prompt?)",
        ),
        (["genrate", "x"], "unknown command 'genrate' (did you mean generate?): choose from tiny, "),
        (["generate", "x", "--prompt", "-1x"], "unknown option -1x; a value that begins so is given as --prompt=-1x"),
        (
            ["generate", "x", "--prompt", "a", "--dtype", "bf61"],
            "unknown value 'bf61' (did you mean bf16?): choose from",
        ),
        (["generate", "x", "--max-gen-length", "3"], "--max-gen-length (did you mean --max-gen-len?)"),
        (["generate", "x", "--max_gen_length", "3"], "--max_gen_length (did you mean --max_gen_len?)"),
        (["show", "x", "--maxwords", "3"], "--maxwords (did you mean --max_words?)"),
        (["generate", "x", "--Prompt", "a"], "unknown option --Prompt (did you mean --prompt?)"),
        (["generate", "x"], "one of the arguments --prompt --prompt-file/--prompt_file is required"),
        (["generate"], "the following arguments are required: PATH, --prompt (or --prompt-file); see "),
        (["generate", "--prompt-f", "x"], "the following arguments are required: PATH; see "),
        (["finetune"], "are required: --data_config, --pretrained_path (or --llama_config); see "),
        (["finetune", "--llama_config", "x"], "the following arguments are required: --data_config; see "),
        (["show"], "the following arguments are required: DATA.yaml, --model; see "),
        (["split", "a", "b", "c"], "c is one too many: accessory split takes SOURCE and DESTINATION"),
    ],
)
def test_what_is_wrong_with_arguments(arguments: list[str], says: str) -> None:
    assert says in refusal(PROGRAMS["accessory"], arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompt", "-"],
        ["--prompt", "- a list"],
        ["--prompt", "-1.5"],
        ["--prompt=--raw"],
        ["--prompt=-x", "--max-g", "4"],
        ["--prompt", "a", "--stop", "-5"],
    ],
)
def test_values_that_look_like_options_pass(arguments: list[str]) -> None:
    given = PROGRAMS["accessory"].parse_args(["generate", "x", *arguments])
    assert given.prompt


def test_names_that_are_near() -> None:
    assert nearest("ratoi", ["path", "ratio"]) == " (did you mean ratio?)"
    assert nearest("MAX_WORDS", ["max-words"]) == " (did you mean max-words?)"
    assert nearest("zebra", ["path", "ratio"]) == nearest("", ["path"]) == nearest(3, ["path"]) == ""
    assert (
        unknown("key", "pth", ["path", "type"]) == "key 'pth' is unknown (did you mean path?): choose from path, type"
    )
