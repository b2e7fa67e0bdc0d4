"""Runs GPU kernels without a GPU: what Triton and nvcc make of them, as strictly as a GPU may (`ptx.machine`).

``DLLM_TEST_PTX=90 pytest tests/test_block_attention.py`` runs the tests of a kernel so, compiled for sm_90.
"""
