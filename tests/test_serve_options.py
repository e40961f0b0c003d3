"""The arguments that demos, chat and serve share."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
from checkpoints import small_config, write_folder

from accessory.arguments import Parser, add_nproc_argument
from accessory.config import QuantArgs
from accessory.serve.options import (
    Account,
    add_batch_arguments,
    add_model_arguments,
    add_page_arguments,
    add_rank_arguments,
    add_template_argument,
    driver_settings,
    form_of,
    model_settings,
)
from accessory.text.forms import Form


def demo() -> argparse.ArgumentParser:
    parser = Parser()
    add_model_arguments(parser)
    add_batch_arguments(parser, slots=4)
    add_page_arguments(parser)
    add_rank_arguments(parser)
    return parser


def test_underscores_and_hyphens_say_the_same() -> None:
    words = "--pretrained_path base adapter --max_seq_len 256 --n_gpus 2 --master_port 23456 --llama_type mistral"
    given = demo().parse_args(words.split())
    assert given == demo().parse_args(words.replace("_", "-").split())
    assert given.pretrained_path == ["base", "adapter"]
    settings = driver_settings(given)
    expected = {"max_seq_len": 256, "ranks": 2, "master_port": 23456, "llama_type": "mistral", "slots": 4, "queue": 64}
    assert expected.items() <= settings.items()
    assert "gpu_ids" not in settings


def test_what_is_not_said() -> None:
    given = demo().parse_args(["--pretrained_path", "base"])
    assert (given.server_name, given.server_port, given.share, given.auth) == ("127.0.0.1", None, False, None)
    assert model_settings(given) == {
        "llama_type": None,
        "llama_config": None,
        "tokenizer_path": None,
        "max_seq_len": 4096,
        "dtype": "auto",
        "device": None,
        "quant": None,
        "expert_placement": "auto",
    }
    assert not {"ranks", "gpu_ids", "master_port"} & driver_settings(given).keys()


def test_quantization_and_cards() -> None:
    given = demo().parse_args(["--pretrained_path", "base", "--quant", "int8", "--gpu_ids", "4", "5"])
    settings = driver_settings(given)
    assert settings["quant"] == QuantArgs(type="int8")
    assert settings["gpu_ids"] == [4, 5]
    with pytest.raises(ValueError, match="give --quant TYPE as well"):
        driver_settings(demo().parse_args(["--pretrained_path", "base", "--quant_head"]))


def test_a_command_that_starts_ranks_itself() -> None:
    parser = Parser()
    add_model_arguments(parser, positional=True)
    add_nproc_argument(parser)
    assert driver_settings(parser.parse_args(["base", "--nproc", "2"]))["ranks"] == 2
    assert "slots" not in driver_settings(parser.parse_args(["base"]))


def test_a_form(small_tokenizer: Path, tmp_path: Path) -> None:
    """What the checkpoint says, unless a name or a template's file is given; no weights are read for it."""
    config = small_config()
    folder = write_folder(tmp_path / "base", {}, config, files=1, tokenizer=small_tokenizer)
    parser = Parser()
    add_model_arguments(parser, positional=True)
    add_template_argument(parser)

    def form(*words: str) -> Form:
        return form_of(parser.parse_args([str(folder), *words]))

    assert form().recorded() == {"name": "default"}, "of a model of which nothing is said"
    assert form("--chat_template", "alpaca").name == "alpaca"
    with pytest.raises(ValueError, match=r"'mixtral' is no file .*did you mean mixtral-instruct.*: .* default, alpaca"):
        form("--chat-template", "mixtral")
    (tmp_path / "mine.jinja").write_text("{% for one in messages %}({{ one.content }}){% endfor %}")
    assert form("--chat_template", f"{tmp_path}/mine.jinja").name == f"{tmp_path}/mine.jinja"
    with pytest.raises(ValueError, match=f"no chat template lies in {folder}: give a file or a name"):
        form("--chat_template", "model")
    shutil.copyfile(tmp_path / "mine.jinja", folder / "chat_template.jinja")
    assert form().name == form("--chat_template", "model").name == "chat_template.jinja"
    (folder / "meta.json").write_text(json.dumps({"llama_type": "mistral", "prompt_form": {"name": "alpaca"}}))
    assert form().name == "alpaca", "a form that was trained rules"
    with pytest.raises(SystemExit):
        form("--chat_template", "")
    (folder / "meta.json").write_text(json.dumps({"llama_type": "mistral", "prompt_form": {"name": "vicuna"}}))
    with pytest.raises(ValueError, match=r"meta\.json: prompt_form is .*'vicuna'.*, and no form is known by that"):
        form()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--server_port 70000", "'70000' given: give a port from 1 to 65535"),
        ("--n_gpus 0", "'0' given: give a whole number of at least 1"),
        ("--n_gpus 2 --gpu_ids 0 1", "not allowed with argument"),
        ("--max_seq_len many", "'many' given"),
        ("--dtype fp64", "unknown value 'fp64' (did you mean fp16?)"),
        ("--auth ann", "give a name and a password as USER:PASSWORD"),
    ],
)
def test_what_makes_no_sense(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo().parse_args(["--pretrained_path", "base", *words.split()])
    assert said in capsys.readouterr().err


def test_a_password_shows_nowhere() -> None:
    given = demo().parse_args(["--pretrained_path", "base", "--auth", "ann:top:secret"])
    assert given.auth == Account(user="ann", password="top:secret")
    assert "secret" not in repr(given)
