import gc

import pytest
import torch


@pytest.fixture(autouse=True)
def freed_memory() -> None:
    """Of what went before: runners and their graphs refer to each other, and a test may measure what is free."""
    gc.collect()
    torch.cuda.empty_cache()
