"""What a layout is: the form in which a checkpoint's files hold a model's tensors."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from accessory.checkpoint.blocks import Coding
from accessory.checkpoint.layouts.rows import Row, Source, expand
from accessory.config import ModelArgs
from accessory.errors import CheckpointError
from accessory.parallel.placement import cut_groups
from accessory.parallel.plan import Placement, cut_widths, split_of

# What some releases keep beside the weights, and follows from the sizes.
BUFFERS = re.compile(r"(.+\.)?(rotary_emb\.inv_freq|rope\.freqs)")

# What balancing gives a model whose family has none.
CORRECTIONS = "the routers' correction biases (moe.router.correction)"


def coded(source: Source, wanted: Coding) -> Coding:
    """How a tensor is coded that is to have a dtype: as that, but for biases of routers, which are float32 always."""
    return torch.float32 if split_of(source.parameter).kind == "correction" else wanted


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A form of checkpoints.

    Attributes:
        name: as `accessory convert --to` has it.
        shown: the same for a reader.
        rows: of `by_parameter`, of a model of these sizes.
        cut: how its files cut the parameters, as so many ranks do; None: every tensor is whole, in one of them.
        prefix: what is written before the names in the files.
        strips: what may stand before them in those that are read.
        file_name: of file i of n, with another ending where one is given.
        one_file: whether it is one, however large.
        coded: how a tensor is coded that is to have a dtype, or GGUF's type.
        metadata: what its files say of the model's sizes, by the coding of most weights and the model's name.
        index_name: of the file that says which of several holds which tensor.
        passed_over: keys that are not of weights.
        config: name and content of the file that says a model's sizes, by the dtype of most of its weights; None: the
            files of weights say them.
        plain: whether it holds neither adapters nor quantized matrices.
        unsaid: what its config has no words for of a model's computation; empty where it says all.
        says_ends: whether generation_config.json says where an answer ends.
        pads: whether what it lacks of a parameter is zero.
    """

    name: str
    shown: str
    rows: Callable[[ModelArgs], Mapping[str, Sequence[Row]]] = field(repr=False)
    cut: Placement | None
    prefix: str = ""
    strips: str = ""
    file_name: Callable[[int, int, str | None], str] = field(repr=False)
    one_file: bool = False
    coded: Callable[[Source, Coding], Coding] = field(repr=False, default=coded)
    metadata: Callable[[ModelArgs, Coding, str], dict[str, Any]] | None = field(repr=False, default=None)
    index_name: str | None = None
    passed_over: re.Pattern[str] = BUFFERS
    config: Callable[[ModelArgs, torch.dtype], tuple[str, dict[str, Any]]] | None = field(repr=False)
    plain: bool = False
    unsaid: Callable[[ModelArgs], str] = field(repr=False, default=lambda args: "")
    says_ends: bool = False
    pads: bool = False

    def sources(self, args: ModelArgs, files: int) -> Iterator[Source]:
        """What ``files`` files hold of a model of these sizes."""
        return expand(self.rows(args), args, cut=self.cut, files=files)

    def obstacles(self, args: ModelArgs, files: int) -> list[str]:
        """Why ``files`` files cannot hold this model; empty where they can."""
        if self.cut is None:
            return []
        counts = [("dim", args.dim), ("n_heads", args.n_heads), ("n_kv_heads", args.n_kv_heads)]
        counts += [("vocab_size", args.vocab_size)] if args.vocab_size != -1 else []
        counts += cut_widths(args)
        of_experts = ("hidden_dim", args.hidden_dim), ("moe.num_experts", args.moe.num_experts)
        counts.append(of_experts[self.cut == "expert"])
        found = [f"{label} {count} is not a multiple of {files}" for label, count in counts if count % files]
        if not found and args.quant is not None:
            found += cut_groups(args, self.cut, files)
        return found


@dataclass(frozen=True, kw_only=True)
class Found:
    """The weight files of one form in a folder.

    Attributes:
        form: the form, as error messages and `accessory inspect` name it.
        files: in order; several names are one file that lies cut into several.
        layout: which layout they have, by the keys of files, the sizes, and the number of a file that is opened.
        rules: whether they are taken where other forms lie in the folder too.
        adapter: of an adapter for any base: the keys of our config about it, by the files' and the base's sizes.
        config: which of them says the model's sizes, of a form whose files do.
        unusable: why they cannot be read, where their names say it already.
    """

    form: str
    files: tuple[tuple[str, ...], ...]
    layout: Callable[["Keys", ModelArgs, int], Layout]
    rules: bool = False
    adapter: Callable[["Keys", ModelArgs], dict[str, Any]] | None = None
    config: str | None = None
    unusable: str | None = None


# The tensors of a file by its number, under the keys that stand there.
Keys = Callable[[int], Mapping[str, Any]]


def numbered(folder: Path, matches: Sequence[re.Match[str]], name: str, *, first: int = 0) -> tuple[tuple[str], ...]:
    """The names of a complete set of shards in their order.

    Args:
        matches: of names, whose group ``file`` is a shard's number, and ``files`` (where there is one) their count.
        name: of any shard, with {} for its number and for their count.
        first: the number of the first.

    Raises:
        CheckpointError: a gap, shards of several sets, or two with one number.
    """
    found = {int(match["file"]) - first: match.string for match in matches}
    count = max(found) + 1
    if "files" in matches[0].groupdict():
        counts = sorted({int(match["files"]) for match in matches})
        if len(counts) > 1:
            raise CheckpointError(
                f"{folder} holds shards of several runs (of {' and of '.join(map(str, counts))} files): "
                f"{matches[0].string}, {matches[-1].string}; keep the files of one run"
            )
        count = counts[0]
    extra = [own for index, own in found.items() if not 0 <= index < count]
    if extra:
        raise CheckpointError(f"{folder} holds {extra[0]}, which numbers beyond its own total of {count}: remove it")
    if len(found) < count:
        lacking = list(islice((index for index in range(count) if index not in found), 3))  # a name may say any count
        named = ", ".join(name.format(index + first, count) for index in lacking)
        more = count - len(found) - len(lacking)
        raise CheckpointError(
            f"{folder} lacks {named}{f' and {more} more' if more else ''} ({len(found)} of {count} shards found): "
            "copy the rest"
        )
    twice = [match.string for match in matches if found[int(match["file"]) - first] != match.string]
    if twice:
        raise CheckpointError(
            f"{folder} holds two files with one shard number, {twice[0]} and another: remove one of them"
        )
    return tuple((found[index],) for index in range(count))
