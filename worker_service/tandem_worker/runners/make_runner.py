"""Chooses the runner for a model."""

import torch

from tandem_shared.step_plan import WorkerInfo
from tandem_worker.layers.operations import TorchOperations
from tandem_worker.models.model import Model
from tandem_worker.runners.batch import Batch
from tandem_worker.runners.grammar_rows import GrammarRows
from tandem_worker.runners.logits_stage import Grammars
from tandem_worker.runners.runner import Runner
from tandem_worker.runners.torch_runner import TorchRunner


def make_runner(
    model: Model, cache: torch.Tensor, info: WorkerInfo, grammars: Grammars | None = None, *, use_graphs: bool
) -> Runner:
    """The fast runner where the model's operations are kernels, the plain one where they are plain torch.

    cache (layers, 2, blocks, block_size, KV heads, head_dim). use_graphs: the fast runner captures CUDA graphs.
    Without `grammars`, a row that has a grammar can't sample.
    """
    batch = Batch(
        num_rows=info.max_num_rows,
        num_blocks=info.num_blocks,
        block_size=info.block_size,
        max_model_len=info.max_model_len,
        max_num_batched_tokens=info.max_num_batched_tokens,
        vocab_size=info.vocab_size,
    )
    grammars = grammars or GrammarRows(None, info.vocab_size, info.eos_token_ids)
    if isinstance(model.operations, TorchOperations):
        return TorchRunner(model, cache, batch, info, grammars)
    from tandem_worker.runners.cuda.cuda_runner import CudaRunner

    return CudaRunner(model, cache, batch, info, grammars, use_graphs=use_graphs)
