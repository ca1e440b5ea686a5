"""Metadata that Tandem's clients and servers understand, besides the details of errors (rich_status.py)."""

MAX_REPLY_BYTES_KEY = "tandem-max-reply-bytes"
"""Of a Generate call: the largest reply that the client takes, its grpc.max_receive_message_length."""
