"""Of which base an adapter is that lies alone: a few numbers of the routers, which stay as they are under it.

They stand in meta.json, and are held against the base's routers where the two are put together: rounding moves them
little, another model's are far off.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from accessory.checkpoint.folder import Folder
from accessory.config import ModelArgs
from accessory.errors import CheckpointError
from accessory.parallel.plan import parameter_shapes, split_of

_LAYERS = 4  # whose routers are looked at
# bfloat16 moves a number by 0.005 or so; those of two models differ by 1.
_NEAR = 0.1


def router_names(args: ModelArgs) -> list[str]:
    """The routers that are looked at, from the first to the last."""
    names = [name for name, _ in parameter_shapes(args) if split_of(name).kind == "router"]
    return [names[place] for place in sorted({i * (len(names) - 1) // (_LAYERS - 1) for i in range(_LAYERS)})]


def numbers_of(routers: Sequence[Tensor]) -> list[float]:
    """Two numbers of each router, of any dtype: its values against two waves, over their norm."""
    found = []
    for router in routers:
        values = router.detach().double().flatten().cpu()
        places = torch.arange(len(values), dtype=torch.float64)
        norm = max(values.norm().item(), 1e-300) / math.sqrt(2)
        found += [round((values @ wave).item() / norm, 4) for wave in (places.cos(), places.sin())]
    return found


def check_base(folders: Sequence[Folder], args: ModelArgs) -> None:
    """See that each adapter lies above the base that it was trained on, where it says which.

    Raises:
        CheckpointError: it does not.
    """
    for place, adapter in enumerate(folders):
        if place == 0 or adapter.base_routers is None:
            continue
        names = router_names(args)
        for below in reversed(folders[:place]):
            weights = below.weights(args, partial=True)
            if not set(names) <= weights.held:
                continue
            own = numbers_of([weights.whole(name) for name in names])
            said = adapter.base_routers
            if len(said) != len(own) or any(abs(a - b) > _NEAR for a, b in zip(said, own, strict=True)):
                raise CheckpointError(
                    f"{adapter.path} is an adapter of another base than {below.path}, whose routers are not those that "
                    "it was trained with: give the base that it was trained on"
                )
            break
