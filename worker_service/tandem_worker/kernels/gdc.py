"""Programmatic dependent launch inside kernels: a kernel may start while the one before it still runs.

The rule that makes it safe: a kernel waits (gdc_wait) before it reads or writes anything but weights and what was
written two or more kernels earlier, and lets its successor start (gdc_launch_dependents) only after that wait. So when
a kernel runs, everything before its predecessor is complete.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr):
    """Waits for the kernel before this one to end, then lets the one after it start."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
