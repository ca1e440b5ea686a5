import gc

import pytest
import torch


@pytest.fixture(autouse=True)
def freed_memory() -> None:
    """Frees the memory of earlier tests, as a test may measure what is free. Runners and their graphs refer to each
    other, so it takes a collection.
    """
    gc.collect()
    torch.cuda.empty_cache()
