"""Exceptions that users meet, and others' put briefly."""

import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# How PyTorch begins to say it, of a GPU and of the host.
_SHORTAGE = re.compile(r"\b(CUDA|HIP) (driver )?(error: )?out of memory|can't allocate memory")
_ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.]+ \w+)", re.IGNORECASE)
_REMEDY = (
    "hold the model on more ranks or in fewer bits (quant), or let it do less at once "
    "(a smaller max_seq_len, fewer slots, fewer or shorter prompts)"
)
_CARD = re.compile(r"GPU \d+ has a total capacity of [\d.]+ \w+ of which [\d.]+ \w+ is free")


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used; the message names the file or tensor and the way out."""


class OutOfMemory(MemoryError):
    """Memory that a model or its work would take is not there; the message names the ways out."""


def out_of_memory(error: Exception, remedy: str = _REMEDY) -> OutOfMemory | None:
    """What an error says of memory that was not there, in one line; None where it is about something else."""
    if isinstance(error, OutOfMemory):
        return error
    text = str(error)
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and _SHORTAGE.search(text)):
        return None
    facts = [f"{match[1]} more were asked for" for match in _ASKED.finditer(text)]
    facts += [match[0] for match in _CARD.finditer(text)]
    known = f" ({', '.join(facts)})" if facts else ""
    return OutOfMemory(f"out of memory{known}: {remedy}")


def first_line(text: str, *, otherwise: str) -> str:
    """The first line of a message that may be a page, without its full stop; ``otherwise`` where there is none."""
    return next(iter(text.strip().splitlines()), otherwise).rstrip(".")


def shown(value: Any, *, most: int = 60) -> str:
    """What a user gave, for a message: its repr, cut to ``most`` characters; of a large value little is looked at."""
    brief = reprlib.Repr()
    brief.maxlist = brief.maxdict = 20
    brief.maxstring = brief.maxother = brief.maxlong = 3 * most  # it cuts in the middle
    text = brief.repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def first_of(names: Sequence[str], most: int = 3) -> str:
    """The first of several names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def counted(number: int, thing: str) -> str:
    """How many of a thing, as "1 example" and "1,234 examples"."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def nearest(name: Any, known: Iterable[str], *, likeness: float = 0.6) -> str:
    """What somebody may have meant by an unknown name, to be put behind it; "" where no known one is near.

    Args:
        likeness: 0 to 1, the least that two names must have in common (difflib's ratio).

    Example: nearest("ratoi", ["path", "ratio"]) is " (did you mean ratio?)".
    """
    # Capitals and the two ways to join words are no other names, and what all options begin with is not likeness.
    given, plain = str(name)[:100], dict[str, list[str]]()
    for other in known:
        plain.setdefault(_plain(other), []).append(other)
    found = difflib.get_close_matches(_plain(given), plain, n=1, cutoff=likeness)
    if not found:
        return ""
    # Of several spellings the one with the joints that were typed, else the first.
    joint = next((mark for mark in "-_" if mark in given.lstrip("-")), "")
    spellings = plain[found[0]]
    return f" (did you mean {next((one for one in spellings if joint in one.lstrip('-')), spellings[0])}?)"


def unknown(what: str, name: Any, known: Iterable[str]) -> str:
    """That a name is none of those which are known, for a message.

    Example: unknown("quant", "int3", ["int8", "nf4"]) is "quant 'int3' is unknown (did you mean int8?): choose from
    int8, nf4".
    """
    known = list(known)
    return f"{what} {shown(name)} is unknown{nearest(name, known)}: choose from {', '.join(known)}"


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").lstrip("-")


def shown_bytes(count: float) -> str:
    """So many bytes, to be read.

    Example: shown_bytes(16_500_000) is "16.50 MB".
    """
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} bytes"


def shown_keys(record: Mapping[Any, Any]) -> str:
    """The keys that a user's record has, for a message about one that it lacks."""
    return shown(sorted(map(str, record)), most=300)
