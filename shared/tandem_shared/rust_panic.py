"""Panics of libraries written in Rust. Knows no such library."""


def is_rust_panic(error: BaseException) -> bool:
    """Whether it is a library's panic, which pyo3 makes a BaseException of, so that `except Exception` misses it.

    Each library has a class of its own, and exports none.
    """
    return type(error).__name__ == "PanicException"
