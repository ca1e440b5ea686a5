"""What all tests need of this process before anything else is imported."""

import os
import signal

import hypothesis
import torch

# No test is timed: a busy machine may take long for an example.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

# Without a GPU the Triton kernels run through Triton's interpreter, which must be said before anything imports triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A script's background commands start with SIGINT ignored, and their children inherit that. The commands under test are
# to be interrupted by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
