"""Triton kernels for GPUs and their launches, under the names of what calls them."""
