"""How many bytes of a Generate reply an output token takes, without its text, whose size is not known beforehand."""

REPLY_ADVICE = (
    "use GenerateStream, fewer tokens, choices or log-probabilities, or say in the metadata tandem-max-reply-bytes "
    "that more is taken, up to 8 MiB"
)

FLOAT_BYTES = 5
"""A float with its tag."""


def max_reply_size(vocab_size: int, num_logprobs: int | None) -> int:
    """The most bytes of one output token: its id, and its log-probabilities if the request asks for them."""
    id_bytes = _varint_size(vocab_size - 1)
    if num_logprobs is None:
        return id_bytes
    top = 2 + (1 + id_bytes) + FLOAT_BYTES
    report = (1 + id_bytes) + FLOAT_BYTES + num_logprobs * top
    return id_bytes + 1 + _varint_size(report) + report


def min_reply_size(num_logprobs: int | None) -> int:
    """The fewest bytes of one output token. Protobuf leaves zeros out, but of several tokens only one can have the id 0
    or the log-probability 0.
    """
    return 1 if num_logprobs is None else 3 + max(0, num_logprobs - 1) * (4 + FLOAT_BYTES)


def _varint_size(number: int) -> int:
    return max(1, -(-number.bit_length() // 7))
