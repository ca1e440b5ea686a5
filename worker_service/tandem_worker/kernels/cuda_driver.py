"""The calls of the CUDA driver that launch a kernel, through ctypes. Names and layouts are those of cuda.h."""

import ctypes
import functools
from typing import Any

PROGRAMMATIC_STREAM_SERIALIZATION = 6
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
DEFAULT_SHARED_LIMIT = 48 * 1024


class LaunchAttribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid_x", ctypes.c_uint),
        ("grid_y", ctypes.c_uint),
        ("grid_z", ctypes.c_uint),
        ("block_x", ctypes.c_uint),
        ("block_y", ctypes.c_uint),
        ("block_z", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


class CudaError(RuntimeError):
    """A call of the driver failed."""


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def check(status: int) -> None:
    if status:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(status, ctypes.byref(name))
        raise CudaError(f"CUDA driver: {name.value.decode() if name.value else status}")


def load_function(cubin: bytes, name: str, shared_bytes: int) -> ctypes.c_void_p:
    """A kernel of a cubin, in the current context. Modules stay loaded for the life of the process."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    check(_driver().cuModuleLoadData(ctypes.byref(module), cubin))
    check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
    if shared_bytes > DEFAULT_SHARED_LIMIT:
        check(_driver().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes))
    return function


class Launch:
    """A kernel with a place for its parameters. Set the parameters' values, then call run."""

    def __init__(
        self, function: ctypes.c_void_p, num_threads: int, shared_bytes: int, parameters: list[Any],
        *, programmatic: bool,
    ) -> None:  # fmt: skip
        """programmatic: the kernel may start before the one before it has ended (see gdc.py)."""
        self._function = function
        self._launch = _driver().cuLaunchKernelEx
        self._config = LaunchConfig(block_x=num_threads, block_y=1, block_z=1, shared_bytes=shared_bytes)
        if programmatic:
            self._attribute = LaunchAttribute(id=PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
            self._config.attributes = ctypes.pointer(self._attribute)
            self._config.num_attributes = 1
        self._config_reference = ctypes.byref(self._config)
        self._parameters = parameters
        self._addresses = (ctypes.c_void_p * len(parameters))(*map(ctypes.addressof, parameters))

    def run(self, grid: tuple[int, ...], stream: int) -> None:
        config = self._config
        config.grid_x, config.grid_y, config.grid_z = grid
        config.stream = stream
        if status := self._launch(self._config_reference, self._function, self._addresses, None):
            check(status)
