"""What of text lies beside a checkpoint's weights: its tokenizer, the form in which it is asked, where answers end."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Sequence
from os.path import isfile
from pathlib import Path
from typing import Any

from accessory.errors import nearest, shown
from accessory.files import write_json
from accessory.gguf_header import SUFFIX, folder_of
from accessory.text.added_tokens import GENERATION_NAME
from accessory.text.equivalents import equivalent_template
from accessory.text.forms import FORMS, AlpacaForm, DefaultForm, Form, MistralForm
from accessory.text.gguf import find_gguf, templates_in
from accessory.text.instruction import PROMPT_NAMES
from accessory.text.jinja import TemplateError
from accessory.text.template import TEMPLATE_NAME, TemplateForm
from accessory.text.tokenizer import BESIDE_NAMES, CONFIG_NAME, JSON_NAME, SENTENCEPIECE_NAME, Tokenizer

TEXT_NAMES = (SENTENCEPIECE_NAME, JSON_NAME, *BESIDE_NAMES, TEMPLATE_NAME)
MORE_TEMPLATES = "additional_chat_templates"
META_NAME = "meta.json"
# Of meta.json; the second are settings that a config of another form cannot say.
FORM_KEY = "prompt_form"
SETTINGS_KEY = "settings"
MODELS_OWN = "model"
_LARGEST = 1 << 20  # bytes of a template

logger = logging.getLogger(__name__)


def find_form(tokenizer: Tokenizer, folders: Sequence[str | Path], asked: str | None = None) -> Form:
    """The form in which a model is asked.

    Args:
        folders: of the checkpoint; the last one that says something rules, and then the tokenizer's own.
        asked: a name of FORMS or of a template in the folders, a template's file, or "model" for what the folders
            say; None: the same, else the default form. That is what meta.json names, else the template.

    Raises:
        ValueError, FileNotFoundError: naming the setting or the file.
    """
    own = tokenizer.path.parent  # another model's, perhaps, which says nothing of how this one was trained
    places = [Path(folder) for folder in reversed(folders)] or [own]
    records = [_recorded(place) for place in places]
    if asked in (None, MODELS_OWN):
        form = next((form for pair in zip(places, records, strict=True) if (form := _lying(tokenizer, *pair))), None)
        form = form or _lying(tokenizer, own, None)
        if form is None and asked == MODELS_OWN:
            raise ValueError(f"chat_template model: no chat template lies in {places[0]}: give a file or a name")
        form = form or DefaultForm(tokenizer, learns_end=False)
    elif asked in FORMS:
        alike = (record for record in records if record and record["name"] == asked)
        form = form_of_record(tokenizer, next(alike, {"name": asked}))
    else:
        templates = next((found for place in (*places, own) if (found := templates_of(place))), {})
        form = _templated(tokenizer, templates, asked)
    return form


def _lying(tokenizer: Tokenizer, folder: Path, record: dict[str, Any] | None) -> Form | None:
    """The form that a folder says: its meta.json, else its template."""
    if record is not None and record["name"] in FORMS:
        return form_of_record(tokenizer, record)
    template = templates_of(folder).get("default")
    if record is not None and template is None:
        raise ValueError(f"{folder} has no {TEMPLATE_NAME}, the form that its {META_NAME} names: copy it there")
    return None if template is None else _made(tokenizer, *template)


def form_for_training(tokenizer: Tokenizer, folders: Sequence[str | Path], asked: str) -> Form:
    """The form on which a model is trained; a dialogue's end is then learned as new runs do. Raises as above."""
    return FORMS[asked](tokenizer) if asked in FORMS else find_form(tokenizer, folders, asked)


def trained_form(
    tokenizer: Tokenizer, folders: Sequence[str | Path], asked: Form | None, recorded: dict[str, Any] | None
) -> Form | None:
    """The form that a model was trained on, which is said of it from then on.

    Args:
        folders: of the checkpoint that it was trained from: a run on raw text leaves its form, None where it has none.
        asked: of `form_for_training`; None: the records' own.
        recorded: what is said of the records' form; None: they were raw text.
    """
    if recorded is None:
        found = find_form(tokenizer, folders)
        return None if found.assumed else found
    if asked is None:
        # By name: a template that this run does not use need not be one that can be rendered.
        names = (name for folder in reversed(folders) if (name := _name_of_lying(Path(folder))) is not None)
        before = next(names, recorded["name"])
        if before != recorded["name"]:
            change = f'the checkpoint has the form "{before}", and these records have "{recorded["name"]}"'
            logger.warning("%s: the chat_template model would keep it", change)
    return form_of_record(tokenizer, recorded) if recorded["name"] in FORMS else asked


def _name_of_lying(folder: Path) -> str | None:
    record = _recorded(folder)
    return record["name"] if record else TEMPLATE_NAME if "default" in templates_of(folder) else None


def templates_of(place: Path) -> dict[str, tuple[str, Path]]:
    """A checkpoint's chat templates by name, each with the file that it is from. "default" is the one for chats.

    Args:
        place: its folder, or its GGUF file in a folder of several.

    Raises:
        ValueError: a file is not UTF-8, or too large.
    """
    found = {}
    folder = folder_of(place)
    config = folder / CONFIG_NAME
    if config.is_file():
        try:
            said = json.loads(config.read_bytes()).get("chat_template")
        except (ValueError, AttributeError, RecursionError):  # the tokenizer's own reader says so where it matters
            said = None
        listed = [{"name": "default", "template": said}] if isinstance(said, str) else said
        for one in listed if isinstance(listed, list) else ():
            if isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str):
                found[one["name"]] = (one["template"], config)
    for file in sorted((folder / MORE_TEMPLATES).glob("*.jinja")):
        found[file.stem] = (_read(file), file)
    if (file := folder / TEMPLATE_NAME).is_file():
        found["default"] = (_read(file), file)
    if not found and (gguf := find_gguf(place)) is not None:
        found = {name: (template, gguf) for name, template in templates_in(gguf).items()}
    return found


def write_text(tokenizer: Tokenizer, form: Form | None, folder: Path) -> dict[str, Any]:
    """Write a tokenizer's files and a form into a folder; returns what its meta.json is to say of the form.

    For the named forms an equivalent chat template is written, for use by other programs.
    """
    for file in tokenizer.files:
        # A sentencepiece model may have any name, and any tokenizer may lie within another file.
        if file != tokenizer.path or file.suffix == ".json":
            shutil.copyfile(file, folder / file.name)
        else:
            _write_tokens(tokenizer, folder)
    config = folder / CONFIG_NAME
    if tokenizer.is_json and not config.exists():
        _write_names(tokenizer, config)
    if form is None:
        return {}
    if config.is_file():  # its template is of the model before
        settings = json.loads(config.read_bytes())
        write_json(config, {key: value for key, value in settings.items() if key != "chat_template"})
    (folder / TEMPLATE_NAME).write_text(equivalent_template(form), encoding="utf-8")
    return {FORM_KEY: form.recorded()}


def write_ends(tokenizer: Tokenizer, form: Form, folder: Path) -> None:
    """Write a folder's generation_config.json: the tokens and the strings that end an answer, for transformers.

    The strings are those of a form that ends with text and not with a token; transformers wants the tokenizer handed to
    generate for them.
    """
    path = folder / GENERATION_NAME
    values: dict[str, Any] = {}
    if path.is_file():
        values = dict(json.loads(path.read_bytes()))
    ends = sorted(tokenizer.eos_ids)
    values |= {} if tokenizer.bos_id is None else {"bos_token_id": tokenizer.bos_id}
    values |= {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    if not form.assumed and form.ends.stop:
        values["stop_strings"] = list(form.ends.stop)
    write_json(path, values)


def copy_text(source: Path, folder: Path, *, form_of: Path | None = None) -> dict[str, Any]:
    """Copy a checkpoint's tokenizer and form to another folder; returns what meta.json is to say of the form.

    Args:
        source, form_of: whose tokenizer and whose form it is, folders or GGUF files; the second None: the same.
    """
    form_of = form_of or source
    for name in TEXT_NAMES:
        file = folder_of(form_of if name == TEMPLATE_NAME else source) / name
        if file.is_file():
            shutil.copyfile(file, folder / name)
    if (more := folder_of(form_of) / MORE_TEMPLATES).is_dir():
        shutil.copytree(more, folder / MORE_TEMPLATES)
    if (folder / JSON_NAME).exists() and not any(
        (folder / name).exists() for name in (CONFIG_NAME, SENTENCEPIECE_NAME)
    ):
        try:
            _write_names(Tokenizer(folder_of(source)), folder / CONFIG_NAME)
        except (ValueError, FileNotFoundError) as error:
            logger.warning("%s", error)
    _copy_from_gguf(source, folder, form_of)
    recorded = _recorded(form_of)
    return {} if recorded is None else {FORM_KEY: recorded}


def _write_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer that has no file of its own."""
    if tokenizer.is_json:
        write_json(folder / JSON_NAME, tokenizer.json_content)
    else:
        (folder / SENTENCEPIECE_NAME).write_bytes(tokenizer.sentencepiece_model)


def _write_names(tokenizer: Tokenizer, config: Path) -> None:
    """Write the settings that a tokenizer.json lacked: they may have been in a config.json, which stays behind.

    Of what lay within another file all settings are written, and so that transformers takes the file as it is.
    """
    names: dict[str, Any] = {key: name for key, name in tokenizer.names.items() if key in ("bos_token", "eos_token")}
    if tokenizer.path.suffix == SUFFIX:
        names = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.names}
    write_json(config, {**names, "add_bos_token": tokenizer.bos_id is not None})


def _copy_from_gguf(source: Path, folder: Path, form_of: Path) -> None:
    """Write what of tokenizer and form lies in GGUF files alone as files of their own."""
    found = Tokenizer.find(source)
    if found is not None and found.suffix == SUFFIX:
        try:
            tokenizer = Tokenizer(found)
        except (ValueError, FileNotFoundError) as error:
            logger.warning("%s", error)
        else:
            _write_tokens(tokenizer, folder)
            if tokenizer.is_json and not (folder / CONFIG_NAME).exists():
                _write_names(tokenizer, folder / CONFIG_NAME)
            if len(tokenizer.eos_ids) > 1 and not (folder / GENERATION_NAME).exists():
                write_json(folder / GENERATION_NAME, {"eos_token_id": sorted(tokenizer.eos_ids)})
    for name, (template, file) in templates_of(form_of).items():
        if file.suffix != SUFFIX or not re.fullmatch(r"[\w-]+", name):
            continue
        place = folder / TEMPLATE_NAME if name == "default" else folder / MORE_TEMPLATES / f"{name}.jinja"
        place.parent.mkdir(exist_ok=True)
        place.write_text(template, encoding="utf-8")


def has_form(folder: Path) -> bool:
    """Whether a folder says in which form its model is asked."""
    return _recorded(folder) is not None or bool(templates_of(folder))


def form_of_record(tokenizer: Tokenizer, recorded: dict[str, Any]) -> Form:
    """The named form of which meta.json says this."""
    if recorded["name"] == AlpacaForm.name:
        return AlpacaForm(tokenizer, prompt_types=recorded.get("prompt_types", ("alpaca",)))
    if recorded["name"] == DefaultForm.name:
        return DefaultForm(tokenizer, learns_end="answers_end_at" in recorded)
    return MistralForm(tokenizer)


def _templated(tokenizer: Tokenizer, templates: dict[str, tuple[str, Path]], asked: str) -> Form:
    """The chat template that was asked for by its name, or by its file."""
    if asked in templates:
        return _made(tokenizer, *templates[asked], name=asked)
    if isfile(asked):  # False for a name that is too long, as of a whole template
        return _made(tokenizer, _read(Path(asked)), Path(asked), name=asked)
    known = [*FORMS, MODELS_OWN, *(name for name in templates if name not in FORMS)]
    raise ValueError(
        f"chat_template {shown(asked)} is no file and unknown as a name{nearest(asked, known)}: "
        f"take a file or one of {', '.join(known)}"
    )


def _made(tokenizer: Tokenizer, template: str, file: Path, *, name: str | None = None) -> Form:
    try:
        return TemplateForm(tokenizer, template, name or file.name)
    except TemplateError as error:
        raise ValueError(f"{file}: {error}") from None


def _recorded(folder: Path) -> dict[str, Any] | None:
    """What a folder's meta.json says of the form; ValueError where that is unusable."""
    file = folder_of(folder) / META_NAME
    try:
        meta = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): correct it") from None
    said = meta.get(FORM_KEY) if isinstance(meta, dict) else None
    if said is None:
        return None
    known = isinstance(said, dict) and said.get("name") in (*FORMS, TEMPLATE_NAME)
    types = said.get("prompt_types", ["alpaca"]) if known else None
    if not isinstance(types, list) or not types or not all(one in PROMPT_NAMES for one in types):
        raise ValueError(f"{file}: {FORM_KEY} is {shown(said)}, and no form is known by that: correct or remove it")
    return dict(said)


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"the chat template {file} has more than {_LARGEST} bytes: is it one?")
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the chat template {file} is not UTF-8 (at byte {error.start}): save it as UTF-8") from None
