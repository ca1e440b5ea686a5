"""The fast runner, for NVIDIA GPUs: cuda_runner.py opens with its theory of operation."""
