"""What all tests need of this process before anything else is imported."""

import os
import signal

import torch

# Without a GPU the Triton kernels run through Triton's interpreter, which must be said before anything imports triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A script's background commands start with SIGINT ignored, and their children inherit that. The commands under test are
# to be interrupted by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
