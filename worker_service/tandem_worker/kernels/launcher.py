"""Compiles Triton kernels and launches them through the CUDA driver.

Triton's own launcher is C code that it compiles on the user's machine; this one needs no C compiler, passes the launch
attribute for programmatic dependent launch (PDL), and costs a few microseconds a launch. Under TRITON_INTERPRET=1 the
kernels run on a CPU, through Triton's interpreter.
"""

import ctypes
import functools
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction

from tandem_worker.kernels.cuda_driver import Launch, load_function

POINTER_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
PDL_CAPABILITY = (9, 0)
WARP_SIZE = 32


@functools.cache
def supports_pdl(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= PDL_CAPABILITY


num_compiled = 0
"""Variants of kernels that this process has compiled or loaded. It rises while a step waits for the compiler."""


class Kernel:
    """A @triton.jit function. Tensors must start at a multiple of 16 bytes; integers are passed as int32.

    A kernel with the constant PDL set may start while the one before it still runs: gdc.py has the rule.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._variants: dict[tuple[Any, ...], _Variant] = {}

    def __call__(
        self, grid: tuple[int, int, int], *args: torch.Tensor | int | float, num_warps: int = 4, num_stages: int = 3,
        **constants: Any,
    ) -> None:  # fmt: skip
        """args come first in the function's signature, constants (tl.constexpr) last."""
        if isinstance(self._function, InterpretedFunction):
            self._function[grid](*args, **constants)
            return
        types = [arg.dtype if isinstance(arg, torch.Tensor) else type(arg) for arg in args]
        key = (num_warps, num_stages, *types, *constants.values())
        variant = self._variants.get(key)
        if variant is None:
            variant = self._variants[key] = _Variant(self._function, args, constants, num_warps, num_stages)
            global num_compiled
            num_compiled += 1
        variant.launch(grid, args)


class _Variant:
    """A kernel compiled for types, constants and the current device."""

    def __init__(
        self, function: Any, args: tuple[Any, ...], constants: dict[str, Any], num_warps: int, num_stages: int
    ) -> None:
        self._device = torch.cuda.current_device()
        major, minor = torch.cuda.get_device_capability(self._device)
        compiled = compile_kernel(function, args, constants, num_warps, num_stages, 10 * major + minor)
        shared = compiled.metadata.shared
        handle = load_function(compiled.asm["cubin"], compiled.metadata.name, shared)
        # Triton appends two scratch pointers that these kernels don't use.
        self._values = [_c_type(arg)(0) for arg in args]
        scratch = [ctypes.c_uint64(0), ctypes.c_uint64(0)]
        self._launch = Launch(
            handle, WARP_SIZE * num_warps, shared, self._values + scratch, programmatic=bool(constants.get("PDL"))
        )

    def launch(self, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        for value, arg in zip(self._values, args, strict=True):
            value.value = arg.data_ptr() if isinstance(arg, torch.Tensor) else arg
        self._launch.run(grid, torch._C._cuda_getCurrentRawStream(self._device))


def compile_kernel(
    function: Any, args: tuple[Any, ...], constants: dict[str, Any], num_warps: int, num_stages: int, capability: int
) -> Any:
    """Compiles without a driver: also on a machine without a GPU. Triton caches the result on disk."""
    names = function.arg_names
    if names[len(args) :] != list(constants):
        raise TypeError(f"{function.__name__}: constants must be {names[len(args) :]}, are {list(constants)}")
    signature = {name: _triton_type(arg) for name, arg in zip(names, args, strict=False)}
    signature |= dict.fromkeys(constants, "constexpr")
    attributes = {
        (index,): [["tt.divisibility", 16]] for index, arg in enumerate(args) if isinstance(arg, torch.Tensor)
    }
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(
        source, GPUTarget("cuda", capability, WARP_SIZE), {"num_warps": num_warps, "num_stages": num_stages}
    )


def _triton_type(arg: torch.Tensor | int | float) -> str:
    if isinstance(arg, torch.Tensor):
        return POINTER_TYPES[arg.dtype]
    return "fp32" if isinstance(arg, float) else "i32"


def _c_type(arg: torch.Tensor | int | float) -> Any:
    if isinstance(arg, torch.Tensor):
        return ctypes.c_uint64
    return ctypes.c_float if isinstance(arg, float) else ctypes.c_int32
