"""What a model was trained to be asked in goes with it: into exports, and into what is made of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import random_adapter, write_adapter
from checkpoints import random_tensors, small_config, write_folder
from finetuning import Setting, finetune_on_rank
from test_tokenizer import train_json

from accessory.checkpoint.adapter_export import export_adapter
from accessory.checkpoint.convert import split
from accessory.checkpoint.merge import merge
from accessory.checkpoint.quantize import quantize_checkpoint
from accessory.config import QuantArgs
from accessory.model.meta import MetaModel
from accessory.text.chat import Message
from accessory.text.form_files import find_form, write_text
from accessory.text.forms import AlpacaForm, DefaultForm, Form, MistralForm
from accessory.text.template import TemplateForm
from accessory.text.tokenizer import BESIDE_NAMES, Tokenizer
from accessory.train.export import export_checkpoint

TEMPLATE = "{{ bos_token }}{% for one in messages %}({{ one.role }}: {{ one.content }}){{ eos_token }}{% endfor %}"
OTHERS = "{% for one in messages %}<{{ one.content }}>{% endfor %}"
QUESTION = [Message("user", "Why?")]
CONFIG = small_config(dim=32, hidden_dim=64, head_dim=8, moe={"num_experts": 2, "num_experts_per_tok": 2}, n_layers=1)
FORMS: dict[str, Callable[[Tokenizer], Form]] = {
    "default": DefaultForm,
    "alpaca": lambda tokenizer: AlpacaForm(tokenizer, ("qg", "None")),
    "mixtral-instruct": MistralForm,
    "template": lambda tokenizer: TemplateForm(tokenizer, TEMPLATE, "own.jinja"),
}


@pytest.fixture(scope="module")
def base(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of which nothing is said."""
    where = tmp_path_factory.mktemp("forms") / "base"
    return write_folder(where, random_tensors(CONFIG, 3), CONFIG, files=1, tokenizer=small_tokenizer)


def load(*folders: Path) -> MetaModel:
    return MetaModel.from_pretrained(list(folders), dtype="fp32", device="cpu", max_seq_len=64)


def prompt(*folders: Path) -> list[int]:
    """What a question becomes that is put to a checkpoint of which the user says nothing."""
    return find_form(Tokenizer(folders[-1]), folders).prompt(QUESTION)


def exported(base: Path, name: str, folder: Path, *overlays: Path, only_trainable: bool = False) -> Path:
    model = load(base, *overlays)
    form = FORMS[name](model.tokenizer)
    return export_checkpoint(model, folder, dtype=torch.float32, form=form, only_trainable=only_trainable)


def assert_asked_in(name: str, folder: Path, *below: Path) -> None:
    """The folder says its form, with a template for other programs."""
    tokenizer = Tokenizer(folder)
    form = FORMS[name](tokenizer)
    assert json.loads((folder / "meta.json").read_text())["prompt_form"] == form.recorded()
    found = find_form(tokenizer, [*below, folder])
    assert found.recorded() == form.recorded()
    assert found.ends == form.ends
    assert prompt(*below, folder) == form.prompt(QUESTION)
    template = TemplateForm(tokenizer, (folder / "chat_template.jinja").read_text(), "chat_template.jinja")
    if name == "template":
        assert template.template == TEMPLATE
    text = "".join(one.text for one in form.segments(QUESTION, ask=True))
    assert template.text(QUESTION, ask=True) == text


def quantized(source: Path, folder: Path) -> None:
    quantize_checkpoint(source, folder, QuantArgs(type="int8"))


MADE: dict[str, Callable[[Path, Path], Any]] = {
    "export": lambda source, folder: shutil.copytree(source, folder),
    "split": lambda source, folder: split(source, folder, mp=2),
    "quantize": quantized,
}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("name", FORMS)
def test_a_model_carries_its_form(made: str, name: str, base: Path, tmp_path: Path) -> None:
    source = exported(base, name, tmp_path / "source")
    MADE[made](source, tmp_path / "made")
    assert_asked_in(name, tmp_path / "made")
    assert (tmp_path / "made" / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("name", FORMS)
def test_adapters_carry_their_form_and_give_it_to_the_merged_model(name: str, base: Path, tmp_path: Path) -> None:
    other = "default" if name == "alpaca" else "alpaca"
    below = exported(base, other, tmp_path / "below")
    blank = write_adapter(
        tmp_path / "blank", random_adapter(CONFIG, 4), CONFIG, files=1, tokenizer=base / "tokenizer.model"
    )
    assert prompt(below, blank) == prompt(below), "an adapter that says nothing is asked as its base"
    merge(below, blank, tmp_path / "of base")
    assert_asked_in(other, tmp_path / "of base")
    adapter = exported(below, name, tmp_path / "adapter", blank, only_trainable=True)
    assert_asked_in(name, adapter, below)
    merge(below, adapter, tmp_path / "merged")
    assert_asked_in(name, tmp_path / "merged")
    plain = {"lora_rank": 4, "lora_alpha": 6, "bias_tuning": False, "norm_tuning": False}
    alone = random_adapter(CONFIG, 4, biases=False)
    write_adapter(tmp_path / "plain", alone, CONFIG, files=1, tokenizer=base / "tokenizer.model", peft=plain)
    adapter = exported(base, name, tmp_path / "small", tmp_path / "plain", only_trainable=True)
    export_adapter(adapter, tmp_path / "hf")
    template = (tmp_path / "hf" / "chat_template.jinja").read_bytes()
    assert template == (adapter / "chat_template.jinja").read_bytes()


def test_a_base_whose_template_stands_in_its_tokenizers_settings(base: Path, tmp_path: Path) -> None:
    """An adapter that says no form leaves it as it was, though it has a tokenizer without those settings."""
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    blank = write_adapter(
        tmp_path / "blank", random_adapter(CONFIG, 4), CONFIG, files=1, tokenizer=base / "tokenizer.model"
    )
    expected = TemplateForm(Tokenizer(base), TEMPLATE, "").prompt(QUESTION)
    assert prompt(tmp_path / "base") == prompt(tmp_path / "base", blank) == expected
    merge(tmp_path / "base", blank, tmp_path / "merged")
    assert prompt(tmp_path / "merged") == expected
    adapter = exported(tmp_path / "base", "alpaca", tmp_path / "adapter", blank, only_trainable=True)
    merge(tmp_path / "base", adapter, tmp_path / "asked")
    assert_asked_in("alpaca", tmp_path / "asked")
    (adapter / "tokenizer.model").unlink()
    merge(tmp_path / "base", adapter, tmp_path / "bare")
    assert_asked_in("alpaca", tmp_path / "bare")


def test_all_files_of_a_tokenizer_go_along(tmp_path: Path) -> None:
    """As of an Instruct release of Hugging Face's: several templates, and ends in generation_config.json."""
    config = {**CONFIG, "vocab_size": 512}
    source = write_folder(tmp_path / "source", random_tensors(config, 3), config, files=1)
    train_json("byte_fallback", source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    (source / "special_tokens_map.json").write_text('{"pad_token": "<unk>"}')
    (source / "added_tokens.json").write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "short.jinja").write_text(OTHERS)
    expected = TemplateForm(Tokenizer(source), TEMPLATE, "").prompt(QUESTION)
    assert prompt(source) == expected
    text = {"tokenizer.json", *BESIDE_NAMES}
    for made in ("split", "quantize"):
        MADE[made](source, tmp_path / made)
        assert prompt(tmp_path / made) == expected
        for name in (*text, "additional_chat_templates/short.jinja"):
            assert (tmp_path / made / name).read_bytes() == (source / name).read_bytes(), name
        assert Tokenizer(tmp_path / made).eos_ids == {2, 5}
        short = find_form(Tokenizer(tmp_path / made), [tmp_path / made], "short")
        assert short.recorded() == {"name": "chat_template.jinja"}
        assert "prompt_form" not in json.loads((tmp_path / made / "meta.json").read_text())
    trained = exported(source, "default", tmp_path / "trained")
    assert_asked_in("default", trained)
    assert {path.name for path in trained.iterdir()} >= text
    assert "chat_template" not in json.loads((trained / "tokenizer_config.json").read_text())
    assert Tokenizer(trained).eos_ids == {2, 5}


# -- runs


CHATS = [
    {"messages": [{"role": "system", "content": "Be."}, *turns]}
    for turns in [[{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": "list"}] for n in range(8)]
]
ALPACA = [{"instruction": f"Say {n}", "output": "list"} for n in range(8)]
TEXT = [{"text": f"the value {n} of the list"} for n in range(8)]


@pytest.fixture
def setting(base: Path, tmp_path: Path) -> Setting:
    shutil.copytree(base, tmp_path / "base")
    return Setting(tmp_path, 256)


def trained(setting: Setting, ranks: Any, sources: list[tuple[list[Any], str]], **options: Any) -> Path:
    """The folder that two steps on these records leave."""
    entries = []
    for number, (records, kind) in enumerate(sources):
        file = setting.folder / f"{number}.json"
        file.write_text(json.dumps(records))
        entries.append({"path": str(file), "prompt_type": kind})
    (setting.folder / "data.yaml").write_text(json.dumps({"META": entries}))
    output = setting.folder / "out"
    changes = {"epochs": 1, "warmup_epochs": 0, "max_steps": 2, **options}
    ranks(1).run(finetune_on_rank, setting, setting.arguments(output, **changes))
    (folder,) = output.glob("epoch0*")
    return folder


@pytest.mark.parametrize("asked", ["default", "alpaca", "mixtral-instruct", "FILE", "model"])
def test_a_run_in_a_form_that_was_named(asked: str, setting: Setting, ranks: Any) -> None:
    """Chats, instructions and raw text together; a question is put to the model as it was trained, with no flag."""
    (setting.folder / "own.jinja").write_text(TEMPLATE)
    tokenizer = Tokenizer(setting.model)
    if asked == "model":
        (setting.model / "chat_template.jinja").write_text(TEMPLATE)
    given = str(setting.folder / "own.jinja") if asked == "FILE" else asked
    folder = trained(setting, ranks, [(CHATS, "alpaca"), (ALPACA, "alpaca"), (TEXT, "alpaca")], chat_template=given)
    form = TemplateForm(tokenizer, TEMPLATE, given) if asked in ("FILE", "model") else FORMS[asked](tokenizer)
    recorded = {"name": "alpaca", "prompt_types": ["alpaca"]} if asked == "alpaca" else form.recorded()
    assert json.loads((folder / "meta.json").read_text())["prompt_form"] == recorded
    if asked == "alpaca":
        form = AlpacaForm(tokenizer)
    found = find_form(Tokenizer(folder), [folder])
    assert (found.prompt(QUESTION), found.ends) == (form.prompt(QUESTION), form.ends)
    chat = [Message("system", "Be."), Message("user", "Say 1"), Message("assistant", "list")]
    (segments,) = found.parts(chat)
    assert segments == form.parts(chat)[0]


def test_prompt_types_are_told(setting: Setting, ranks: Any) -> None:
    folder = trained(setting, ranks, [(ALPACA, "shortqa"), (ALPACA, "qg")])
    assert json.loads((folder / "meta.json").read_text())["prompt_form"] == {
        "name": "alpaca",
        "prompt_types": ["shortqa", "qg"],
    }
    assert prompt(folder) == AlpacaForm(Tokenizer(folder), ("shortqa",)).prompt(QUESTION)


@pytest.mark.parametrize("name", [*FORMS, None])
def test_a_run_on_raw_text_leaves_the_form_as_it_was(name: str | None, setting: Setting, ranks: Any) -> None:
    if name is not None:
        form = FORMS[name](Tokenizer(setting.model))
        (setting.folder / "text").mkdir()
        said = write_text(Tokenizer(setting.model), form, setting.folder / "text")
        shutil.copytree(setting.folder / "text", setting.model, dirs_exist_ok=True)
        (setting.model / "meta.json").write_text(json.dumps({"llama_type": "mistral", **said}))
    folder = trained(setting, ranks, [(TEXT, "alpaca")])
    if name is None:
        assert json.loads((folder / "meta.json").read_text()) == {"llama_type": "mistral"}
        assert not (folder / "chat_template.jinja").exists()
        assert prompt(folder) == prompt(setting.model)
    else:
        assert_asked_in(name, folder)
