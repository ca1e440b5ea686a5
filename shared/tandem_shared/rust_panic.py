"""Recognises panics of libraries written in Rust, such as tokenizers and safetensors."""


def is_rust_panic(error: BaseException) -> bool:
    """Whether an exception is the panic of a library in Rust.

    pyo3 raises a panic as a BaseException, which `except Exception` does not catch. Each library has its own class for
    it and exports none, so the class is recognised by its name.
    """
    return type(error).__name__ == "PanicException"
