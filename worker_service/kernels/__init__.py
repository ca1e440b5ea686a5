"""Triton kernels for NVIDIA GPUs, each with a plain torch counterpart in worker_service/layers that it is tested against."""
