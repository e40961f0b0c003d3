"""The command evaluate: how well a checkpoint predicts held-out records, or a plain text."""

import argparse
import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accessory.arguments import add_nproc_argument, given_count, given_name, given_path
from accessory.commands.output import say, show
from accessory.files import check_writable, growing
from accessory.log import global_rank
from accessory.serve.options import add_model_arguments, add_template_argument, model_settings

if TYPE_CHECKING:
    from accessory.evaluation.measure import Measured, Rows
    from accessory.parallel.state import ParallelState

logger = logging.getLogger(__name__)


def add_commands(commands: Any) -> None:
    """Give a parser's subparsers the command."""
    evaluate = commands.add_parser(
        "evaluate",
        help="measure loss, perplexity and token accuracy",
        description="Measure how well a model predicts what the records of a data yaml teach, or a plain text: the "
        "mean cross-entropy of a token (loss), its exponential (perplexity), and how often the most probable token is "
        "the right one. Finetuning measures its held-out data in the same way.",
        epilog="example: accessory evaluate runs/finetuned/epoch11 --data_config held_out.yaml --max_seq_len 256",
    )
    add_model_arguments(evaluate, positional=True)
    add_nproc_argument(evaluate)
    help_text = "ranks that hold one model together; the others hold models of their own and share the data "
    evaluate.add_argument(
        *("--model_parallel_size", "--model-parallel-size"),
        type=given_count,
        metavar="M",
        help=help_text + "(default: all ranks together)",
    )
    data = evaluate.add_argument_group("data")
    what = data.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--data_config", "--data-config", type=given_name, metavar="YAML", help="yaml file as finetuning takes it"
    )
    what.add_argument("--text", type=given_path, metavar="FILE", help="a plain text, read by windows of --max_seq_len")
    help_text = "tokens from one window of a text to the next (default: --max_seq_len, no token is read twice)"
    data.add_argument("--stride", type=given_count, metavar="S", help=help_text)
    add_template_argument(data)
    data.add_argument("--dialog", action="store_true", help="records are dialogues; Alpaca records are refused")
    help_text = "fields of records to pass over, separated by commas"
    data.add_argument("--ignore_fields", "--ignore-fields", default="", metavar="A,B", help=help_text)
    help_text = "leave bad records out, and list them"
    data.add_argument("--skip_bad_records", "--skip-bad-records", action="store_true", help=help_text)
    output = evaluate.add_argument_group("output")
    help_text = "write one JSON object: loss, perplexity, token_accuracy, balance_loss, tokens, records"
    output.add_argument("--json", action="store_true", help=help_text)
    help_text = "write a JSON object on a line for each record: record, place, loss, tokens, hits"
    output.add_argument("--per_record", "--per-record", type=given_path, metavar="OUT.jsonl", help=help_text)
    evaluate.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    from accessory.evaluation.measure import measure, name_not_finite
    from accessory.launch.rendezvous import process_group_of_launcher
    from accessory.model.meta import MetaModel
    from accessory.parallel.state import ParallelState, agreed, on_first

    with process_group_of_launcher(arguments.device, say=say) as everyone:
        # Loading a large model takes minutes: what is wrong is said before, and once for all ranks.
        members = ParallelState.from_group(everyone)
        on_first(members, lambda: _check(arguments))
        state = agreed(members, lambda: _layout(members, arguments.model_parallel_size))
        # One rank tokenises, and finds what is wrong; the others map its files.
        first = agreed(members, lambda: _rows(arguments) if members.is_first else None)
        rows, loading = agreed(members, lambda: (first or _rows(arguments), model_settings(arguments)))
        # The ranks of one model raise together; agreed, those of the others do not wait for them.
        path, mp_group = arguments.pretrained_path, state.mp_group
        model = agreed(members, lambda: MetaModel.from_pretrained(path, mp_group=mp_group, **loading))
        measured = measure(model, rows, state=state, shown="evaluating" if global_rank() == 0 else "")
        if members.is_first and (bad := name_not_finite(measured, rows)):
            logger.warning("%s", bad)
        if arguments.per_record is not None:
            on_first(members, lambda: _write(arguments.per_record, measured.per_row(rows)))
        show(_told(measured, "records" if arguments.text is None else "windows", as_json=arguments.json))


def _layout(everyone: "ParallelState", mp_size: int | None) -> "ParallelState":
    """Groups of `mp_size` ranks that hold one model each, laid over all ranks; collective.

    Raises:
        ValueError: the ranks are no multiple of it.
    """
    from accessory.parallel.state import ParallelState

    ranks = everyone.mp_size
    if ranks % (mp_size or ranks):
        raise ValueError(
            f"--model_parallel_size {mp_size} does not divide the number of ranks, {ranks}: give another size, or "
            "another --nproc"
        )
    return everyone if mp_size in (None, ranks) else ParallelState.init(mp_size, everyone.device)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse flags that contradict one another, and a file that cannot be written.

    Raises:
        ValueError, OSError: naming the flag.
    """
    if arguments.text is None and arguments.stride is not None:
        raise ValueError("--stride is of a plain text: give --text FILE, or leave it out")
    named = [name for name in ("chat_template", "dialog", "ignore_fields", "skip_bad_records") if vars(arguments)[name]]
    if arguments.text is not None and named:
        raise ValueError(f"--{named[0]} is about records, and --text has none: leave it out")
    if (file := arguments.per_record) is not None:
        if file.is_dir() or not file.parent.is_dir():
            wrong = "is a folder" if file.is_dir() else "lies in no folder that is there"
            raise OSError(f"--per_record {file} {wrong}: name a file to write")
        check_writable(file)


def _rows(arguments: argparse.Namespace) -> "Rows":
    """What is predicted: the records in the form that --chat_template names, else in the one that the checkpoint was
    trained on, else in their own; or the windows of the text.

    Raises:
        FileNotFoundError, CheckpointError, OSError, ValueError: naming the file, place or flag.
    """
    from accessory.data.cache import load_finetune_data
    from accessory.evaluation.windows import Windows, read_text
    from accessory.model.pretrained import Pretrained
    from accessory.text.form_files import find_form, form_for_training

    names = ("llama_type", "llama_config", "tokenizer_path", "max_seq_len")
    found = Pretrained.resolve(arguments.pretrained_path, **{name: vars(arguments)[name] for name in names})
    if arguments.text is not None:
        tokens = found.tokenizer.encode(read_text(arguments.text), bos=True, eos=False)
        return Windows(tokens, length=arguments.max_seq_len, stride=arguments.stride)
    asked = arguments.chat_template
    form = form_for_training(found.tokenizer, found.paths, asked) if asked else find_form(found.tokenizer, found.paths)
    return load_finetune_data(
        arguments.data_config,
        found.tokenizer,
        dialog=arguments.dialog,
        form=None if form.assumed else form,
        ignore_fields=[name for name in map(str.strip, arguments.ignore_fields.split(",")) if name],
        max_words=arguments.max_seq_len,
        skip_bad_records=arguments.skip_bad_records,
        progress=global_rank() == 0,
    )


def _write(file: Path, lines: Iterable[str]) -> None:
    """Write a file that has its name when it is whole; OSError, naming it, where that cannot be."""
    with growing(file) as sink:
        sink.writelines(lines)
    logger.info("wrote %s", file)


def _told(measured: "Measured", unit: str, *, as_json: bool) -> str:
    """The numbers as a JSON object, in which what is not finite is null, or as lines to read; ``unit``: of the rows."""
    numbers = measured.numbers()
    if as_json:
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        return json.dumps(finite) + "\n"
    accuracy = f"{100 * numbers['token_accuracy']:.2f} %"
    return (
        f"loss            {numbers['loss']:.6f}\n"
        f"perplexity      {numbers['perplexity']:.6g}\n"
        f"token accuracy  {accuracy}\n"
        f"balance loss    {numbers['balance_loss']:.4f}\n"
        f"tokens          {numbers['tokens']:,} of {numbers['records']:,} {unit}\n"
    )
