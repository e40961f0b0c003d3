"""Parameters of a checkpoint folder, read by the box, whatever form its files have."""

import functools

import torch
from torch import Tensor

from accessory.checkpoint.formats import Source
from accessory.checkpoint.manifest import Manifest
from accessory.checkpoint.reader import Checkpoint
from accessory.config import ModelArgs
from accessory.parallel.box import Box


class StoredWeights:
    """An opened folder. Its files are mapped: memory is taken by what `read` returns, and by nothing else.

    Attributes:
        held: names of the parameters that the folder holds.
        folder: its path.
    """

    def __init__(self, manifest: Manifest, args: ModelArgs, *, partial: bool = False) -> None:
        """Hold the files against the sizes.

        Args:
            partial: the folder may lack parameters, as one that overlays another.

        Raises:
            CheckpointError: a tensor that the model does not have, has otherwise, or has and the folder lacks.
        """
        checkpoint = Checkpoint.open(manifest, args)
        self._files = [checkpoint.read_file(file, partial=partial) for file in range(len(manifest.shards))]
        checkpoint.check_pieces()
        self._sources: dict[str, list[Source]] = {}
        for contents in checkpoint.by_file:
            for source in contents:
                if source.key in self._files[source.file]:
                    self._sources.setdefault(source.parameter, []).append(source)
        self.held = frozenset(self._sources)
        self.folder = manifest.folder

    def dtype(self, name: str, box: Box) -> torch.dtype:
        """Of a part of a parameter that the folder holds: where its tensors differ, one that rounds none of them."""
        met = {self._tensor(source).dtype for source in self._sources[name] if box.intersect(source.box)}
        if len(met) > 1:
            # PyTorch promotes no 8-bit floats; bfloat16 holds the values of all of them.
            met = {torch.bfloat16 if dtype.itemsize == 1 else dtype for dtype in met}
        return functools.reduce(torch.promote_types, met)

    def holds(self, name: str, box: Box) -> bool:
        """Whether the folder holds this part of a parameter, whole."""
        found = (box.intersect(source.box) for source in self._sources.get(name, ()))
        return sum(common.numel for common in found if common) >= box.numel

    def read(self, name: str, box: Box) -> Tensor:
        """A part of a parameter that the folder holds."""
        part = torch.empty(box.size, dtype=self.dtype(name, box))
        self.copy(name, box, part)
        return part

    def copy(self, name: str, box: Box, part: Tensor) -> None:
        """Write a part of a parameter that the folder holds into a tensor of the box's size."""
        missing = box.numel
        for source in self._sources[name]:
            common = box.intersect(source.box)
            if common is None or missing == 0:
                continue
            stored = source.view(self._tensor(source))
            part[common.within(box)].copy_(stored[common.within(source.box)])
            missing -= common.numel
        assert missing == 0, f"{name}: {missing} elements have no source"

    def _tensor(self, source: Source) -> Tensor:
        return self._files[source.file][source.key]


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any dtype holds neither infinities nor NaN."""
    return bool(tensor.float().isfinite().all())  # of some 8-bit floats PyTorch does not ask it
