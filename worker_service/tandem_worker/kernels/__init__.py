"""Triton kernels for NVIDIA GPUs, each tested against plain torch."""
