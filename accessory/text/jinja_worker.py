"""The process that renders chat templates: ``python -I jinja_worker.py SECONDS MEGABYTES [PATH...]``.

At stdin and stdout a job and its answer are a length in 8 bytes and so much JSON. A template is a program that somebody
else wrote: beside jinja's sandbox this process has next to no rights, and one that takes more than its share ends it,
by SIGPROF where it is time and with the status ENOMEM where it is memory.
"""

import errno
import json
import os
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from importlib import import_module
from typing import Any

if __name__ == "__main__":
    sys.path.extend(sys.argv[3:])  # -I leaves out a user's own folders, where jinja2 may lie
try:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
    from jinja2.utils import Namespace
except ImportError:
    sys.exit(errno.ENOPKG)


class Generation(Extension):
    """The tag ``generation``, around what the assistant says."""

    tags = {"generation"}  # noqa: RUF012
    written = 0  # characters before the piece that is being made
    said: list[tuple[int, str]]

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_keep"), [], [], inside, lineno=line)

    def _keep(self, caller: Any) -> str:
        text: str = caller()
        self.said.append((self.written, text))
        return text


class TemplateNamespace(Namespace):
    """A namespace in which no name leads inside Python."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            TemplateNamespace.__setitem__(self, name, value)

    def __setitem__(self, name: Any, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace has no field {name!r}")
        super().__setitem__(name, value)


class TemplateDict:
    """What templates know as `dict`: no class, whose attributes would lead on."""

    __call__: Any = staticmethod(dict)
    fromkeys = staticmethod(dict.fromkeys)


def raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
# Under names that jinja has too: its own tojson escapes for HTML, its dict and namespace let more through.
jinja.globals.update(raise_exception=raise_exception, dict=TemplateDict(), namespace=TemplateNamespace)
jinja.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: json.dumps(
    x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
)
generation: Any = jinja.extensions[Generation.identifier]
compiled = lru_cache(maxsize=4)(jinja.from_string)


def as_expected(given: dict[str, Any]) -> dict[str, Any]:
    """A message without fields that are None, and its reasoning under both names that templates read."""
    message = {key: value for key, value in given.items() if value is not None}
    for name in ("reasoning_content", "thinking", "reasoning"):
        if name in message:
            return {"thinking": message[name], **message, "reasoning_content": message[name]}
    return message


def render(template: str, variables: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    if "messages" in variables:
        variables["messages"] = [as_expected(message) for message in variables["messages"]]
    generation.written, generation.said, pieces = 0, [], []
    usual = {"tools": None, "documents": None, "add_generation_prompt": False}
    for piece in compiled(template).generate({**usual, **variables}):
        generation.written += len(piece)
        pieces.append(piece)
    text = "".join(pieces)
    # Where a block within a macro, a filter or another block stands is unknown; such a block is left out.
    return text, [(start, start + len(said)) for start, said in generation.said if text.startswith(said, start)]


def answer(request: bytes, seconds: float) -> dict[str, Any]:
    try:
        job = json.loads(request.decode("utf-8", "surrogatepass"))
        jinja.globals["strftime_now"] = datetime.fromisoformat(job["now"]).strftime
        rendered = []
        for variables in job["cases"]:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            rendered.append(render(job["template"], variables))
        return {"rendered": rendered}
    except MemoryError:
        raise
    except jinja2.TemplateSyntaxError as error:
        reason = f"line {error.lineno} of the chat template: {error.message}"
    except Exception as error:
        own = type(error) is jinja2.TemplateError  # raise_exception's: nothing else raises the base
        reason = str(error) if own else f"the chat template fails: {type(error).__name__}: {error}"
    return {"error": " ".join(reason.split())[:1000]}


def give_up_rights(megabytes: int) -> None:
    """From here on no file, socket or process can be had, and only so much more memory."""
    for late in ("pprint", "textwrap", "jinja2.constants", "jinja2.debug", "encodings.unicode_escape"):
        import_module(late)  # else it would be when a template comes to it
    with open("/proc/self/statm") as pages:
        memory = int(pages.read().split()[0]) * resource.getpagesize() + megabytes * 2**20
    for name, most in {"AS": memory, "NOFILE": 3, "NPROC": 0, "FSIZE": 0, "CORE": 0}.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        most = min(most, resource.getrlimit(kind)[1] % 2**64)  # where there is none it says -1
        resource.setrlimit(kind, (most, most))


def main(seconds: float, megabytes: int) -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they are meant for who asks
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    give_up_rights(megabytes)
    jobs, answers = sys.stdin.buffer, sys.stdout.buffer
    try:
        while size := jobs.read(8):
            result = answer(jobs.read(int.from_bytes(size, "big")), seconds)
            data = json.dumps(result, ensure_ascii=False).encode("utf-8", "surrogatepass")
            signal.setitimer(signal.ITIMER_PROF, 0)
            answers.write(len(data).to_bytes(8, "big"))
            answers.write(data)
            answers.flush()
    except MemoryError:
        os._exit(errno.ENOMEM)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
