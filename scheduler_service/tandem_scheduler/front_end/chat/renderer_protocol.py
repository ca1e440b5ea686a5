"""What a front end and its renderers' processes say to each other, over pipes.

A message is a length of four bytes, and then as many bytes. The front end's are pickled: first the templates, then each
conversation with the most characters that its text may have. The answers, which the front end does not trust, are a
letter and plain text.
"""

import struct

LENGTH = struct.Struct(">I")
READY, TEXT, REFUSED, EXHAUSTED = b"S", b"T", b"R", b"X"
"""The first bytes of answers: the process has started; the text; path, line break and reason of a refusal; the memory
did not suffice."""

KWARGS = "chat_template_kwargs"
"""The field of a conversation that has further variables of the template."""
