"""The first kernels of a step: block table updates, and each token's embedding.

A rank of a tensor-parallel group holds the embeddings of its shard of the vocabulary, and gives zeros for other tokens;
the sum over the ranks is the embedding.
"""

import torch
import triton
import triton.language as tl

from tandem_worker.kernels.launcher import Kernel

UPDATES = 256
"""Block table updates that one program applies"""


@triton.jit
def _copy_embedding(token, embedding, first_token, num_tokens, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    index = token.to(tl.int64) - first_token
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    is_here = (index >= 0) & (index < num_tokens)
    values = tl.load(embedding + index * SIZE + columns, mask=mask & is_here, other=0.0)
    tl.store(out + columns, values, mask=mask)


@triton.jit
def _begin_decode(
    rows, updates, block_tables, context_lens, last_tokens, embedding, x, first_token, num_tokens, num_rows,
    table_stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, UPDATES: tl.constexpr,
):  # fmt: skip
    """The first num_rows programs add a token to a row's context and copy its embedding; the others update tables."""
    index = tl.program_id(0)
    if index < num_rows:
        row = tl.load(rows + index)
        if row >= 0:
            tl.store(context_lens + row, tl.load(context_lens + row) + 1)
            out = x + index.to(tl.int64) * SIZE
            _copy_embedding(tl.load(last_tokens + row), embedding, first_token, num_tokens, out, SIZE, BLOCK)
    else:
        # updates holds their number, then row, index in the row's table and block of each.
        number = (index - num_rows) * UPDATES + tl.arange(0, UPDATES)
        is_update = number < tl.load(updates)
        place = updates + 1 + 3 * number
        updated_row = tl.load(place, mask=is_update, other=0).to(tl.int64)
        where = updated_row * table_stride + tl.load(place + 1, mask=is_update, other=0)
        tl.store(block_tables + where, tl.load(place + 2, mask=is_update, other=0), mask=is_update)


@triton.jit
def _embed(
    token_ids, last_tokens, embedding, x, first_token, num_tokens, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program copies one token's embedding. A token id of -1 - row stands for the row's last sampled token."""
    index = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids + index)
    if token < 0:
        token = tl.load(last_tokens - 1 - token)
    _copy_embedding(token, embedding, first_token, num_tokens, x + index * SIZE, SIZE, BLOCK)


_begin_decode_kernel = Kernel(_begin_decode)
_embed_kernel = Kernel(_embed)


def begin_decode(
    rows: torch.Tensor, updates: torch.Tensor, block_tables: torch.Tensor, context_lens: torch.Tensor,
    last_tokens: torch.Tensor, embedding: torch.Tensor, first_token: int = 0,
) -> torch.Tensor:  # fmt: skip
    """The embedding of the last token of each of `rows`, (n, hidden_size). The rows' context_lens grow by one.

    rows (n,) int32, of which negative ones are padding. updates int32: their number, then (row, index, block) of each,
    to be written to block_tables. context_lens and last_tokens (all rows,) int32. embedding (tokens, hidden_size) is
    that of the vocabulary from first_token on.
    """
    size = embedding.shape[1]
    x = torch.empty(len(rows), size, dtype=embedding.dtype, device=embedding.device)
    num_programs = len(rows) + triton.cdiv((len(updates) - 1) // 3, UPDATES)
    _begin_decode_kernel(
        (num_programs, 1, 1), rows, updates, block_tables, context_lens, last_tokens, embedding, x, first_token,
        len(embedding), len(rows), block_tables.stride(0),
        SIZE=size, BLOCK=triton.next_power_of_2(size), UPDATES=UPDATES,
    )  # fmt: skip
    return x


def embed(
    token_ids: torch.Tensor, last_tokens: torch.Tensor, embedding: torch.Tensor, out: torch.Tensor, first_token: int = 0
) -> torch.Tensor:
    """Writes the tokens' embeddings to out, (tokens, hidden_size), and returns it. token_ids (tokens,) int32, where
    -1 - row stands for that row's last token. For embedding and first_token see begin_decode.
    """
    size = embedding.shape[1]
    _embed_kernel(
        (len(token_ids), 1, 1), token_ids, last_tokens, embedding, out, first_token, len(embedding),
        SIZE=size, BLOCK=triton.next_power_of_2(size),
    )  # fmt: skip
    return out
