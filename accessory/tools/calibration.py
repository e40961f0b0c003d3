"""What the inputs of a model's matrices are like, seen on text: for quantizing with an eye on them."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from accessory import kernels
from accessory.checkpoint.quantize import Calibration, source_to_quantize
from accessory.config import QuantArgs
from accessory.errors import CheckpointError
from accessory.model.dispatch import GatheredPairs, GroupedPairs, Pairs
from accessory.model.meta import MetaModel
from accessory.model.moe import Experts
from accessory.model.scoring import score_tokens
from accessory.parallel.layers import ColumnParallelLinear, RowParallelLinear
from accessory.products import groups
from accessory.progress import showing
from accessory.quant import InputMoments, format_of

logger = logging.getLogger(__name__)

WINDOW, MOST_TOKENS = 512, 2**17
MOST_CHARACTERS = 8 * MOST_TOKENS  # a token is about 4
_ENOUGH = 16 * WINDOW  # fewer tokens say little of experts that they seldom choose


def calibrate(
    folder: str | Path, text: str | Path, quant: QuantArgs, *, llama_config: Sequence[str | Path] | None = None
) -> Calibration:
    """Run a model over the beginning of a text and note the inputs of every matrix that quantization changes.

    Args:
        text: a file in UTF-8; of its first million characters the first 131,072 tokens are read, in windows of 512.
        quant: what it guides.
        llama_config: config files for a folder that has none, or to overrule it.

    Raises:
        ValueError: the file has no text, or is not UTF-8; the folder is quantized already, or groups do not divide
            its sizes.
        CheckpointError, FileNotFoundError, OSError: the folder or file cannot be read; a weight has infinities or NaN.
    """
    source_to_quantize(folder, quant, llama_config)
    beginning_of_text = _beginning_of(Path(text))
    model = MetaModel.from_pretrained(folder, llama_config=llama_config, device="cpu", max_seq_len=WINDOW)
    tokens = model.tokenizer.encode(beginning_of_text, bos=False, eos=False)[:MOST_TOKENS]
    if len(tokens) < _ENOUGH:
        logger.warning("%s has only %d tokens: %d or more calibrate better", text, len(tokens), _ENOUGH)
    beginning = model.tokenizer.encode("", bos=True, eos=False)
    step = WINDOW - len(beginning)
    starts = range(0, len(tokens), step)
    calibrating = showing("calibrating", len(starts), unit="windows")
    with (
        torch.inference_mode(),
        _noted_inputs(model, format_of(quant.type, quant.group_size).group) as moments,
        calibrating,
    ):
        for start in calibrating.over(starts):
            (logits_TV,) = score_tokens(model.llma, [[*beginning, *tokens[start : start + step]]])
            _check_finite(logits_TV, model, folder)
    return moments


def _beginning_of(text: Path) -> str:
    try:
        with text.open(encoding="utf-8") as file:
            beginning = file.read(MOST_CHARACTERS)
    except OSError as error:
        raise OSError(f"{text}, to calibrate with, cannot be read ({error.strerror}): check the path") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{text} is not UTF-8 ({error.reason}): convert it first") from None
    if not beginning.strip():
        raise ValueError(f"{text} has no text: give some like that which the model will meet")
    return beginning


def _check_finite(logits_TV: Tensor, model: MetaModel, folder: str | Path) -> None:
    """See, from the first window on, that the moments are no NaN: all of them may take hours."""
    if bool(logits_TV.amax(-1).isfinite().all()):  # what is no token has minus infinity
        return
    for name, parameter in model.llma.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise CheckpointError(f"{folder}: {name} has infinities or NaN: copy it again, or check how it was made")
    raise CheckpointError(f"{folder}: the model's predictions have infinities or NaN, though no weight of it has")


@contextmanager
def _noted_inputs(model: MetaModel, group_size: int) -> Iterator[dict[tuple[str, tuple[int, ...]], InputMoments]]:
    """Inputs of the matrices are added up in what is handed out, for as long as the context lasts."""
    moments: dict[tuple[str, tuple[int, ...]], InputMoments] = {}

    def note(name: str, place: tuple[int, ...], x_TD: Tensor) -> None:
        if (name, place) not in moments:
            moments[name, place] = InputMoments(x_TD.shape[-1], group_size)
        moments[name, place].add(x_TD)

    def noting(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: note(name, (), inputs[0])

    handles, changed = [], []
    for name, module in model.llma.layers.named_modules(prefix="layers"):
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            handles.append(module.register_forward_pre_hook(noting(f"{name}.weight")))
        elif isinstance(module, Experts):
            _note_experts(module, name, note)
            changed.append(module)
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()
        for experts in changed:
            del experts.hidden, experts.down


def _note_experts(experts: Experts, prefix: str, note: Callable[[str, tuple[int, ...], Tensor], None]) -> None:
    hidden, down = experts.hidden, experts.down

    def noted_hidden(pairs: Pairs) -> Tensor:
        for expert, rows in _rows_of_experts(pairs.rows, pairs):
            for half in (0, 1):
                note(f"{prefix}.w13", (expert, half), rows)
        return hidden(pairs)

    def noted_down(hidden_PF: Tensor, pairs: Pairs) -> Tensor:
        for expert, rows in _rows_of_experts(hidden_PF, pairs):
            note(f"{prefix}.w2", (expert,), rows)
        return down(hidden_PF, pairs)

    # The instance's own, in front of the class's, until they are deleted.
    experts.hidden, experts.down = noted_hidden, noted_down  # type: ignore[method-assign]


def _rows_of_experts(x_PD: Tensor, pairs: Pairs) -> Iterator[tuple[int, Tensor]]:
    if isinstance(pairs, GatheredPairs):
        for expert, own_N in kernels.pairs_by_expert(pairs.expert_P):
            yield expert, x_PD[own_N]
        return
    assert isinstance(pairs, GroupedPairs)
    for expert, rows in groups(pairs.offsets_E):
        yield expert, x_PD[rows]
