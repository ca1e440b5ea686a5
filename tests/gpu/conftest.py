import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    """Runners and their graphs refer to each other, and the next test may measure what is free."""
    yield
    gc.collect()
    torch.cuda.empty_cache()
