"""What holds in every process that runs tests."""

from __future__ import annotations

import torch

# Tests fork, and train in the child. Autograd refuses that when it was first used after an exporter had been loaded,
# since it then starts threads; it is used here, before any test.
torch.zeros(1, requires_grad=True).sum().backward()
