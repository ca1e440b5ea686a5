"""Values at which numbers and texts of a message are likely to go wrong."""

LIMITS = [0, 1, 20, 21, 64, 65, 1023, 1024, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
"""Limits of the RPCs' rules, and of integer types."""
INTEGERS = [*LIMITS, 2, 15, 16, 63, 127, 128, 255, 256, 1023, 1024, 2**15, 2**16]
INTEGERS += [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1]
FLOATS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1.5,
    2.0,
    1e-45,
    1.2e-38,
    3.4e38,
    -3.4e38,
    float("inf"),
    float("-inf"),
    float("nan"),
]
TEXTS = ["", "\0", "\n", " ", "a" * 257, "\u202e", "\U0010ffff", "\ue000", "%s%n", "../../etc/passwd", "<|im_end|>"]
TEXTS += [
    "tandem.v1.InferenceService",
    "grpc.reflection.v1alpha.ServerReflectionRequest",
    "google.protobuf.Any",
    "e\u0301",
]
NO_UTF8 = [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"ok\x80"]
