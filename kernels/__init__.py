"""Triton kernels, installed as ``dllm_engine.kernels``. Importing this imports nothing else."""
