"""The named forms as Hugging Face's chat templates, for programs that know no other: the same text, to the byte."""

from __future__ import annotations

from accessory.text.conversation import SYSTEM
from accessory.text.forms import AlpacaForm, DefaultForm, Form, MistralForm
from accessory.text.instruction import instruction_prompt
from accessory.text.template import TemplateForm

_SYSTEM = "{%- set system = messages[0].content if messages[0].role == 'system' else none -%}\n"
_DEFAULT = r"""{{- BEGIN + (system if system is not none else OPENING) + '\n\n###' -}}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- ' Human: ' + message.content.strip() + '\n###' -}}
    {%- elif message.role == 'assistant' -%}
        {{- ' Assistant: ' + message.content.rstrip() + '\n###' + (eos_token if loop.last else '') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' Assistant:' -}}{%- endif -%}
"""
_ALPACA = r"""{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- BEGIN + (OPENING if system is none else system + BEHIND_SYSTEM) -}}
        {{- QUESTION + ASKING -}}
    {%- elif message.role == 'assistant' -%}
        {{- message.content + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
# Where v1 writes [INST] as a word, a space stands before each but the first.
_MISTRAL = r"""{{- BEGIN -}}
{%- set questions = messages | selectattr('role', 'equalto', 'user') | list -%}
{%- set ns = namespace(asked=0) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- set ns.asked = ns.asked + 1 -%}
        {%- set said = (system + '\n\n' if system and ns.asked == PLACE else '') + message.content -%}
        {{- (BETWEEN if ns.asked > 1 else '') + '[INST]' + (' ' if said else EMPTY) + said + CLOSING -}}
    {%- elif message.role == 'assistant' -%}
        {%- set said = ANSWER -%}
        {{- (' ' if said else '') + said + eos_token -}}
    {%- elif OWN_SYSTEM -%}
        {{- '[SYSTEM_PROMPT]' + (' ' if message.content else '') + message.content + '[/SYSTEM_PROMPT]' -}}
    {%- endif -%}
{%- endfor -%}
"""


def equivalent_template(form: Form) -> str:
    """The chat template of a form, a template's own. A named form's takes messages in turn, the system's first."""
    if isinstance(form, TemplateForm):
        return form.template
    begin = "''" if form.tokenizer.bos_id is None else "bos_token"
    if isinstance(form, DefaultForm):
        return _SYSTEM + _filled(_DEFAULT, BEGIN=begin, OPENING=_quoted(SYSTEM))
    if isinstance(form, AlpacaForm):
        kind = form.prompt_types[0]
        opening, asking = instruction_prompt("\0", sys_name=kind).split("\0")
        behind, _ = instruction_prompt("\0", sys_name=kind, system="").split("\0")
        return _SYSTEM + _filled(
            _ALPACA,
            BEGIN=begin,
            OPENING=_quoted(opening),
            BEHIND_SYSTEM=_quoted(behind),
            QUESTION="message.content" + ("" if kind == "None" else ".strip()"),
            ASKING=_quoted(asking),
        )
    assert isinstance(form, MistralForm)
    word = form.version == 1
    return _SYSTEM + _filled(
        _MISTRAL,
        BEGIN=begin,
        BETWEEN="' '" if word else "''",
        EMPTY="' '" if word else "''",
        CLOSING="' [/INST]'" if word else "'[/INST]'",
        ANSWER="message.content" if word else "message.content.rstrip(' ')",
        PLACE={1: "1", 3: "questions | length", 7: "0"}[form.version],
        OWN_SYSTEM=str(form.version == 7).lower(),
    )


def _filled(template: str, **values: str) -> str:
    for name, value in values.items():
        template = template.replace(name, value)
    return template


def _quoted(text: str) -> str:
    """A string as Jinja writes it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
