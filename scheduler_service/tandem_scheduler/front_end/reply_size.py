"""How many bytes of a Generate reply a token takes, without texts, whose sizes are not known beforehand: the output's,
and the text and bytes of each token whose log-probability is reported.
"""

REPLY_ADVICE = (
    "use GenerateStream, fewer tokens, choices or log-probabilities, or say in the metadata tandem-max-reply-bytes "
    "that more is taken, up to 8 MiB"
)

FLOAT_BYTES = 5
"""A float with its tag."""

TEXT_FIELDS_BYTES = 4
"""The tags and lengths of a token's bytes and text."""


def max_reply_size(vocab_size: int, num_logprobs: int | None, num_requested: int = 0) -> int:
    """The most bytes of one output token: its id, and its log-probabilities if the request asks for them."""
    id_bytes = _varint_size(vocab_size - 1)
    return id_bytes + (0 if num_logprobs is None else max_report_size(vocab_size, num_logprobs, num_requested))


def max_report_size(vocab_size: int, num_logprobs: int, num_requested: int = 0) -> int:
    """The most bytes of the log-probabilities in the place of one token."""
    token = (1 + _varint_size(vocab_size - 1)) + FLOAT_BYTES + TEXT_FIELDS_BYTES
    rank = 1 + _varint_size(vocab_size)
    report = token + rank + (num_logprobs + num_requested) * (3 + token)
    return 1 + _varint_size(report) + report


def min_reply_size(num_logprobs: int | None, num_requested: int = 0) -> int:
    """The fewest bytes of one output token. Protobuf leaves zeros out, but of several tokens only one can have the id 0
    or the log-probability 0. A rank is never 0.
    """
    if num_logprobs is None:
        return 1
    return 5 + (max(0, num_logprobs - 1) + max(0, num_requested - 1)) * (4 + FLOAT_BYTES)


def _varint_size(number: int) -> int:
    return max(1, -(-number.bit_length() // 7))
