"""Kernels that are launched before the one ahead of them has ended (programmatic dependent launch, sm_90).

What does not depend on that one, the launch itself above all, then costs no time of its own. Such a kernel may touch
nothing that another one writes before `begin` returns, and every thread must come through it: that a kernel has ended
then means that all before it have.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from dllm_engine.kernel_limits import release, too_old

if release(triton.__version__) >= (3, 5):
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    MISSING = ""
else:  # 3.4 has them, but they do not compile
    gdc_launch_dependents = gdc_wait = None
    MISSING = f"Triton 3.5 is needed, this is {triton.__version__}"


def unavailable(device: torch.device) -> str:
    """Why kernels cannot be launched early on ``device``, "" if they can."""
    if MISSING:
        return MISSING
    if device.type != "cuda":
        return f"a CUDA device is needed, this is {device}"
    return too_old(device, 9)


@triton.jit
def begin(EARLY: tl.constexpr):
    """The next kernel may come; what the ones before have written is there from here on."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


def launch_early(early: bool) -> dict[str, Any]:
    """Options of a launch."""
    return {"launch_pdl": True} if early else {}
