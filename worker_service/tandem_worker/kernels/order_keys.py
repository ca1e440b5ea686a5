"""Integers that sort as floating-point numbers do, and the selection of the k-th largest by them."""

import torch
import triton
import triton.language as tl

KEY_BITS = {torch.bfloat16: 16, torch.float32: 32}
"""The bits that tell values of a type apart"""


@triton.jit
def order_key(values, BITS: tl.constexpr):
    """int32 keys that sort as the float32 values do, and are equal where these are. With 16 BITS the values must be
    bfloat16's, and the keys are in int16's range.
    """
    # The sum makes -0.0 into 0.0.
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - BITS)


@triton.jit
def kth_largest(keys, k, BITS: tl.constexpr):
    """The k-th largest of keys of so many bits, by bisection. There must be k keys; those of what is absent are
    absent_key().
    """
    low = absent_key(BITS)
    high = -1 - absent_key(BITS)
    for _ in range(BITS):
        # The mean, rounded up, without overflow.
        middle = (low | high) - ((low ^ high) >> 1)
        enough = tl.sum((keys >= middle).to(tl.int32), axis=0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def absent_key(BITS: tl.constexpr):
    """A key below those of all numbers, as an int32."""
    return tl.full([], 1, tl.int32) << 31 >> (32 - BITS)
