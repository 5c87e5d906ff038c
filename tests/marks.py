"""Marks that several tests need."""

import pytest

DEEPSPEED = [
    pytest.mark.usefixtures("deepspeed_built"),
    # torch's own, in what DeepSpeed calls of it.
    pytest.mark.filterwarnings("ignore:.*torch.distributed.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning"),
]
"""For tests that run DeepSpeed's engine."""
