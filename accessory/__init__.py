"""Distributed Mixture-of-Experts inference and finetuning for Mixtral and its kin.

The Python door is `accessory.model.meta.MetaModel`; the command line is `accessory` (or `python -m accessory`).
"""

from importlib import metadata

try:
    __version__ = metadata.version("accessory")
except metadata.PackageNotFoundError:  # used from its folder, without an installation
    __version__ = "not installed"
