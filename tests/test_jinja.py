"""Chat templates as text: to the byte what transformers makes of them, and nothing that a hostile one may do."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jinja2
import pytest
from chat_templates import TEMPLATES
from hypothesis import example, given, settings
from hypothesis import strategies as st
from patience import PATIENCE
from transformers.utils.chat_template_utils import _normalize_chat_messages, render_jinja_template

from accessory.text import jinja
from accessory.text.jinja import Rendered, TemplateError, render, render_each

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

texts = st.one_of(
    st.text(st.characters(), max_size=12),  # surrogates too
    st.sampled_from(
        [
            "",
            " ",
            "\n",
            " a\n",
            "\ta ",
            "{{ x }}",
            "{% if %}",
            "{# a #}",
            "<think>\nHm\n</think>\n\nYes",
            "stop",
            "<&>'\"",
        ]
    ),
)
tool_calls = st.lists(
    st.fixed_dictionaries(
        {"function": st.fixed_dictionaries({"name": texts, "arguments": texts | st.just({"a": 1.5})})}
    ),
    max_size=2,
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "user", "assistant", "system", "tool"])},
    optional={
        "content": texts
        | texts
        | st.none()
        | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts})),
        "name": texts | st.none(),
        "tool_calls": tool_calls | st.none(),
        "reasoning": texts,
        "thinking": texts | st.none(),
        "reasoning_content": texts | st.none(),
    },
)


@st.composite
def alternating(draw: st.DrawFn) -> list[dict[str, Any]]:
    said = draw(st.lists(texts, min_size=1, max_size=5))
    first = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


variables = st.fixed_dictionaries(
    {"messages": alternating() | st.lists(message, max_size=4), "add_generation_prompt": st.booleans()},
    optional={
        "tools": st.none() | st.lists(st.fixed_dictionaries({"type": st.just("function"), "name": texts}), max_size=2),
        "documents": st.none() | st.lists(st.fixed_dictionaries({"title": texts}), max_size=1),
        "enable_thinking": st.booleans(),
    },
)


def theirs(template: str, given: dict[str, Any]) -> Rendered:
    rest = {name: value for name, value in given.items() if name != "messages"}
    (text,), (spans,) = render_jinja_template(
        [_normalize_chat_messages(given["messages"])],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **rest,
    )
    return Rendered(text, tuple(spans))


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(chat=variables)
@example(chat={"messages": [{"role": "user", "content": "\ud83d\ude00 \U0001f600 \ud800"}]})
def test_text_and_spans_are_transformers(name: str, chat: dict[str, Any]) -> None:
    asked = {"add_generation_prompt": False, **TOKENS, **chat}
    try:
        expected = theirs(TEMPLATES[name], asked)
    except Exception as error:
        reason = " ".join(str(error).split()) if type(error) is jinja2.TemplateError else "the chat template fails"
        with pytest.raises(TemplateError, match="^" + re.escape(reason)):
            render(TEMPLATES[name], asked)
    else:
        assert render(TEMPLATES[name], asked) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_usual_chat_is_rendered(name: str) -> None:
    """Else the two might agree because both fail."""
    system = [] if name in ("gemma", "mistral-v1") else [{"role": "system", "content": "Be brief."}]
    chat = [*system, {"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Ho."}]
    chat += [{"role": "user", "content": "ä\n"}]
    rendered = render(TEMPLATES[name], {"messages": chat, **TOKENS, "add_generation_prompt": True})
    assert all(part["content"].strip() in rendered.text for part in chat if part["role"] != "system")
    assert [rendered.text[start:end] for start, end in rendered.generated] == (
        ["Ho.</s>"] if name == "generation" else []
    )


def test_several_cases_go_at_once() -> None:
    cases = [{"messages": [{"role": "user", "content": str(i)}]} for i in range(3)]
    assert [part.text for part in render_each("{{ messages[0].content }}!", cases)] == ["0!", "1!", "2!"]
    assert render_each("{{ 1 }}", []) == []


def test_what_is_not_given_is_as_transformers_has_it() -> None:
    template = "{{ tools }} {{ documents }} {{ add_generation_prompt }} {{ bos_token is defined }}"
    assert render(template, {"messages": []}) == theirs(template, {"messages": []})


def test_the_caller_keeps_its_messages() -> None:
    chat = [{"role": "user", "content": None, "reasoning": "x"}]
    assert render("{{ messages[0] }}", {"messages": chat}).text == str(
        {"thinking": "x", "role": "user", "reasoning": "x", "reasoning_content": "x"}
    )
    assert chat == [{"role": "user", "content": None, "reasoning": "x"}]


def test_a_block_whose_place_is_unknown_is_left_out() -> None:
    template = "{% macro say(x) %}<a>{% generation %}{{ x }}{% endgeneration %}{% endmacro %}{{ say('hello') }}"
    assert render(template, {}) == Rendered("<a>hello", ())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('No\n  system ') }}", "No system"),
        ("a\n{% if %}", "line 2 of the chat template: Expected an expression, got 'end of statement block'"),
        ("a\n\n{{ x | nothing }}", "line 3 of the chat template: No filter named 'nothing'."),
        ("{{ x.y }}", "the chat template fails: UndefinedError: 'x' is undefined"),
        ("{{ 'a' + 1 }}", 'the chat template fails: TypeError: can only concatenate str (not "int") to str'),
        ("{{ raise_exception('a' * 100000) }}", "a" * 1000),
    ],
)
def test_errors_are_one_line(template: str, message: str) -> None:
    with pytest.raises(TemplateError) as error:
        render(template, {})
    assert str(error.value) == message


def test_too_deeply_nested_variables() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(TemplateError, match="nested too deeply"):
        render("", {"deep": deep})


HOSTILE = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by item": "{{ ''['__class__']['__mro__'] }}",
    "class by filter": "{{ (''|attr('__class__')).mro() }}",
    "class by map": "{{ ['']|map(attribute='__class__')|map(attribute='__mro__')|list }}{{ 1/0 }}",
    "globals": "{{ raise_exception.__globals__['os'] }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch MARK').read() }}",
    "strftime": "{{ strftime_now.__self__.today() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "joiner": "{{ joiner.__init__.__globals__ }}{{ joiner().x.y }}",
    "self": "{{ self._TemplateReference__context.x.y }}",
    "config": "{{ config.__class__.__init__.__globals__['os'] }}",
    "get_flashed": "{{ request.application.__globals__ }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format by map": "{{ ('{0.__class__.__mro__}',)|map('format', '')|list }}{{ ''.join(['a'], 1) }}",
    "format_map": "{{ '{a.__class__.__mro__}'.format_map({'a': ''}) }}",
    "format by attr": "{{ ('{0.__class__.__mro__}'|attr('format'))('') }}",
    "append": "{{ messages.append(1) }}",
    "clear": "{{ messages[0].clear() }}",
    "update": "{{ messages[0].update({'role': 'system'}) }}",
    "namespace": "{% set ns = namespace() %}{% set ns.__class__ = dict %}",
    "namespace by value": "{{ namespace({'__class__': 1}) }}",
    "namespace by name": "{{ namespace(_Namespace__attrs=1) }}",
    "dict class": "{{ dict.__class__.mro() }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "from": "{% from 'os' import system %}",
    "extends": "{% extends '/etc/passwd' %}",
    "python": "{% import os %}",
    "generator": "{% set g = messages|map('upper') %}{{ g.gi_frame.f_globals }}",
    "macro": "{% macro m() %}{% endmacro %}{{ m._environment.x }}{{ m._func.__globals__ }}",
    "extension": "{{ _generation_support.x }}{{ caller.x }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_reaches_nothing(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(TemplateError) as error:
        render(HOSTILE[name].replace("MARK", str(mark)), {"messages": [{"role": "user", "content": "Hi"}]})
    assert "\n" not in str(error.value)
    assert not mark.exists()


def worker() -> int:
    render("", {})
    process = jinja._RENDERER._process
    assert process
    return process.pid


def test_the_worker_has_next_to_no_rights(monkeypatch: pytest.MonkeyPatch) -> None:
    jinja._RENDERER._end()
    monkeypatch.setenv("SECRET", "1")
    folder = Path(f"/proc/{worker()}")
    assert b"SECRET" not in (folder / "environ").read_bytes()
    assert sorted(entry.name for entry in (folder / "fd").iterdir()) == ["0", "1", "2"]
    assert os.readlink(folder / "cwd") == "/"
    assert os.readlink(folder / "fd" / "2") == "/dev/null"
    limits = {line[:26].strip(): line[26:].split()[:2] for line in (folder / "limits").read_text().splitlines()[1:]}
    assert limits["Max open files"] == ["3", "3"]
    assert limits["Max processes"] == limits["Max file size"] == limits["Max core file size"] == ["0", "0"]
    assert int(limits["Max address space"][1]) < 2**30


MEMORY, TIME, OTHER = "more than 256 MB", "more than 2 s", "the chat template fails: "
RECURSION = OTHER + "RecursionError"
HEAVY = {
    "constant": ("{{ 'a' * 500000000 }}", MEMORY),
    "constants": ("{{ ('a' * 50000000) ~ ('b' * 50000000) }}", MEMORY),
    "format": ("{{ '%999999999d' | format(1) }}", MEMORY),
    "str.format": ('{{ "{:>999999999}".format("x") }}', MEMORY),
    "width of width": ("{{ '{:{}}'.format('x', 10 ** 9) }}", MEMORY),
    "center": ("{{ x | string | center(1000000000) }}", MEMORY),
    "indent": ("{{ [1] | tojson(indent=1000000000) }}", MEMORY),
    "output": ("{% for i in range(100000) %}{{ 'x' * 10000 }}{% endfor %}", MEMORY),
    "doubling": (
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        MEMORY,
    ),
    "list": ("{{ (range(100000) | list * 1000) | length }}", MEMORY),
    "variable": ("{{ messages[0].content * 100000000 }}", MEMORY),
    "loops": ("{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}", TIME),
    "power": ("{{ 9 ** (9 ** 9) }}", f"{TIME}|{MEMORY}"),
    "words": ("{{ lipsum(n=1000000) }}", f"{TIME}|{MEMORY}"),
    "macros": ("{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}", TIME),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", RECURSION),
    "recursive loop": ("{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}", RECURSION),
    "range": ("{{ range(1000000000) | list }}", OTHER + "OverflowError"),
    "width": ("{{ '%99999999999999999999d' | format(1) }}", OTHER + "ValueError"),
    "nested list": (
        "{% set n = namespace(x=[]) %}{% for i in range(99999) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}",
        RECURSION,
    ),
    "nested reason": (
        "{% set n = namespace(x=[]) %}{% for i in range(9999) %}{% set n.x = [n.x] %}{% endfor %}"
        "{{ raise_exception(n.x) }}",
        RECURSION,
    ),
    "parentheses": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", RECURSION),
    "sum": ("{{ 1" + " + 1" * 20000 + " }}", RECURSION),
    "blocks": ("{% for a in [1] %}" * 50 + "{% endfor %}" * 50, OTHER + "SyntaxError"),
}


@pytest.mark.parametrize("name", HEAVY)
def test_a_heavy_template_ends(name: str) -> None:
    template, message = HEAVY[name]
    worker()
    began = time.monotonic()
    with pytest.raises(TemplateError, match=message) as error:
        render(template, {"messages": [{"role": "user", "content": "Hi"}]})
    assert time.monotonic() - began < 15  # 2 s of the processor's time; the tests may share it
    assert "\n" not in str(error.value)
    assert render("{{ 1 + 1 }}", {}).text == "2"


def test_heavy_templates_take_little_memory() -> None:
    """The most that one of the workers took, as the kernel tells who waited for them."""
    script = f"""
import resource, sys
from accessory.text.jinja import TemplateError, render
for template in {[template for template, message in HEAVY.values() if MEMORY in message]!r}:
    try:
        render(template, {{"messages": [{{"role": "user", "content": "Hi"}}]}})
        sys.exit("it was rendered")
    except TemplateError:
        pass
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
    done = run(script)
    assert int(done.stdout) < (jinja.MEGABYTES + 64) * 1024


def run(script: str) -> subprocess.CompletedProcess[str]:
    """A program of its own, in which any warning is an error and says so."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done


def test_threads_take_turns() -> None:
    def ask(i: int) -> str:
        return render("{{ messages[0].content }}", {"messages": [{"content": str(i) * (i % 50)}]}).text

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(800))) == [str(i) * (i % 50) for i in range(800)]


def test_signals_do_not_end_the_worker() -> None:
    pid = worker()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)
    assert os.getsid(pid) == pid
    assert worker() == pid


def test_a_worker_that_was_killed_is_replaced() -> None:
    pid = worker()
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert worker() != pid


def test_an_interrupted_rendering_leaves_no_answer_behind() -> None:
    class Interrupt(Exception):
        pass

    def interrupt(*_: Any) -> None:
        raise Interrupt

    worker()
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Interrupt):
            render(HEAVY["loops"][0], {})
    finally:
        signal.signal(signal.SIGALRM, before)
    assert render("next", {}).text == "next"


def in_a_fork(pid: int) -> None:
    assert worker() != pid


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_its_own_worker() -> None:
    pid = worker()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            assert render("{{ 1 }}", {}).text == "1"

    asking = threading.Thread(target=ask)
    asking.start()  # it holds the lock, most of the time
    try:
        for _ in range(3):
            child = multiprocessing.get_context("fork").Process(target=in_a_fork, args=(pid,))
            child.start()
            child.join(PATIENCE)
            assert child.exitcode == 0
            child.close()
    finally:
        stop.set()
        asking.join()
    assert worker() == pid


@pytest.fixture
def killed() -> Iterator[list[int]]:
    pids: list[int] = []
    yield pids
    for pid in pids:
        if is_there(pid):
            os.kill(pid, signal.SIGKILL)


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("template", ["", HEAVY["loops"][0]], ids=["idle", "in a loop"])
def test_the_worker_ends_with_who_asks(template: str, killed: list[int]) -> None:
    script = f"""
import time
from accessory.text import jinja
jinja.render("", {{}})
print(jinja._RENDERER._process.pid, flush=True)
jinja.render({template!r}, {{}})
time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout
        pid = int(asking.stdout.readline())
        killed.append(pid)
        time.sleep(0.2)
        assert is_there(pid)
        asking.kill()
    until = time.monotonic() + 20
    while is_there(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_there(pid)


def test_nothing_is_left_at_the_end() -> None:
    """No warning about a process or a pipe, and no process."""
    script = "from accessory.text import jinja; jinja.render('', {}); print(jinja._RENDERER._process.pid)"
    assert not is_there(int(run(script).stdout))


def test_without_jinja2_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]; sys.argv = sys.argv[:3]\n"
    script = Path(jinja.__file__).with_name("jinja_worker.py").read_text()
    process = subprocess.run([sys.executable, "-I", "-c", bare + script, "2", "256"], capture_output=True)
    assert process.returncode in jinja._ENDS
    assert "pip install jinja2" in jinja._ENDS[process.returncode]
    monkeypatch.setattr(jinja.sys, "executable", "/nowhere/python")
    jinja._RENDERER._end()
    with pytest.raises(TemplateError, match=r"does not start: .*/nowhere/python"):
        render("", {})
