"""Distributed Mixture-of-Experts inference and finetuning for Mixtral checkpoints.

The Python door is `accessory.model.meta.MetaModel`; the command line is `accessory` (or `python -m accessory`).
"""
