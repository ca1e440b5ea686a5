"""The samplers' Gumbel noise in float32: a function of (seed, choice index, position, token id), as in
runners/sampler.py, through SplitMix64 (Steele, Lea, Flood 2014). The argmax of logits plus noise is a draw from their
softmax.
"""

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    """SplitMix64's finaliser, on uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def noise_key(seed, choice_index, position):
    """The row's key for one position. seed is int64 with the bits of the uint64."""
    GAMMA: tl.constexpr = 0x9E3779B97F4A7C15
    key = _mix(seed.to(tl.uint64, bitcast=True) + GAMMA)
    key = _mix(key + choice_index.to(tl.uint64) * GAMMA + 1)
    return _mix(key + position.to(tl.uint64) * GAMMA + 2)


@triton.jit
def pair_bits(key, pair):
    """The 64 bits that token ids 2 * pair (the upper half) and 2 * pair + 1 share."""
    GAMMA: tl.constexpr = 0x9E3779B97F4A7C15
    return _mix(key + (pair + 1).to(tl.uint64) * GAMMA)


@triton.jit
def _log(x, FAST: tl.constexpr):
    if FAST:
        log2 = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
        return log2 * 0.6931471805599453
    return tl.log(x)


@triton.jit
def gumbel(bits, FAST: tl.constexpr):
    """-log(-log(u)) of u = 1 - v, for 32 random bits; computed from v, so that the large values are exact. FAST uses
    the GPU's approximate logarithm.
    """
    v = (bits ^ 0xFFFFFFFF).to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    # Near 1 the sum rounds up to it; a number below keeps the logarithm finite.
    v = tl.minimum(v, 0.99999994)
    small = v * (1.0 + v * (0.5 + v * (0.33333333 + v * 0.25)))
    return -_log(tl.where(v < 0.00390625, small, -_log(1.0 - v, FAST)), FAST)
