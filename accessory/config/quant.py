"""How the matrices of a model are quantized."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from accessory.errors import unknown

QuantForm = Literal["int8", "int4", "nf4", "fp8", "mxfp4"]
QUANT_FORMS: tuple[QuantForm, ...] = get_args(QuantForm)
DEFAULT_FORM: QuantForm = "nf4"
# Inputs that share a scale, of the formats that offer a choice. quant/formats.py says what the formats are.
GROUP_SIZES: dict[str, tuple[int, ...]] = {"int4": (32, 64)}
DEFAULT_GROUP_SIZE = 64
# Formats for the matrices of experts: the others stay plain.
_OF_EXPERTS: tuple[QuantForm, ...] = ("mxfp4",)


@dataclass(frozen=True, kw_only=True)
class QuantArgs:
    """Weight-only quantization of the matrices of attention and experts, or of some of them.

    Attributes:
        type: "int8", "int4", "nf4", "fp8", or "mxfp4" of experts alone; docs/quantization.md describes them.
        group_size: inputs that share a scale, 32 or 64; of int4 alone (`GROUP_SIZES`).
        head: the output head is quantized as well.
    """

    type: QuantForm = DEFAULT_FORM
    group_size: int = DEFAULT_GROUP_SIZE
    head: bool = False

    def __post_init__(self) -> None:
        if self.type not in QUANT_FORMS:
            raise ValueError(unknown("quant", self.type, QUANT_FORMS))
        known = {size for sizes in GROUP_SIZES.values() for size in sizes}
        if self.group_size not in known or not isinstance(self.group_size, int):  # 64.0 is among them
            allowed = " or ".join(map(str, sorted(known)))
            raise ValueError(f"the group size of quantization must be {allowed}, not {self.group_size!r}")
        if self.group_size not in GROUP_SIZES.get(self.type, (DEFAULT_GROUP_SIZE,)):
            offer = ", ".join(form for form, sizes in GROUP_SIZES.items() if self.group_size in sizes)
            raise ValueError(f"group size {self.group_size} is for {offer}: {self.type} has none to choose")
        if not isinstance(self.head, bool):
            raise ValueError(f"quant's head must be true or false, not {self.head!r}")
        if self.head and self.type in _OF_EXPERTS:
            raise ValueError(f"{self.type} is for experts alone: it quantizes no output head")

    def covers(self, kind: str) -> bool:
        """Whether it quantizes matrices of such a kind, "attention", "expert", "head" or another of the plan's."""
        if self.type in _OF_EXPERTS:
            return kind == "expert"
        return kind != "head" or self.head

    @property
    def matrices(self) -> str:
        """Those that it quantizes, for people."""
        names = {"attention": "attention", "expert": "experts", "head": "output head"}
        *most, last = (name for kind, name in names.items() if self.covers(kind))
        return f"{', '.join(most)} and {last}" if most else last

    @classmethod
    def of(cls, quant: "bool | str | Self | None") -> Self | None:
        """What an argument ``quant`` stands for: True is nf4, False and None are none.

        Raises:
            ValueError: an unknown name.
        """
        if quant is None or quant is False:
            return None
        if isinstance(quant, cls):
            return quant
        if quant is True:
            return cls()
        return cls(type=quant)  # type: ignore[arg-type]  # it checks

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def add_quant_flags(parser: Any, *, always: bool = False) -> None:
    """Give a command the flags --quant, --group-size and --quant-head.

    Args:
        parser: an argparse parser, or a group of one.
        always: the command quantizes whether it is told so or not.
    """
    kinds = f"{', '.join(QUANT_FORMS[:-1])} or {QUANT_FORMS[-1]}"
    loading = f"quantize the matrices of attention and experts (mxfp4: of experts) while loading: {kinds} "
    loading += f"({DEFAULT_FORM} without TYPE)"
    parser.add_argument(
        "--quant",
        nargs="?",
        const=DEFAULT_FORM,
        metavar="TYPE",
        help=f"{kinds} (default {DEFAULT_FORM})" if always else loading,
    )
    parser.add_argument(
        "--group_size",
        "--group-size",
        type=int,
        default=DEFAULT_GROUP_SIZE,
        metavar="N",
        help="of int4: inputs that share a scale, 32 or 64 (default 64)",
    )
    parser.add_argument("--quant_head", "--quant-head", action="store_true", help="quantize the output head as well")


def quant_of_flags(quant: str | None, *, group_size: int, head: bool) -> QuantArgs | None:
    """What the three flags ask for.

    Raises:
        ValueError: an unknown type or group size, or one of the others without --quant.
    """
    if quant is not None:
        return QuantArgs(type=quant, group_size=group_size, head=head)  # type: ignore[arg-type]  # it checks
    if head or group_size != QuantArgs.group_size:
        raise ValueError("--group-size and --quant-head say how to quantize: give --quant TYPE as well")
    return None
