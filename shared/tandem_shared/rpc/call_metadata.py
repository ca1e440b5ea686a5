"""Call metadata that Tandem's clients and servers understand, beside the details of errors (rich_status.py)."""

MAX_REPLY_BYTES_KEY = "tandem-max-reply-bytes"
"""The size in bytes of the largest reply that the client takes: its grpc.max_receive_message_length. For Generate and
Detokenize."""
