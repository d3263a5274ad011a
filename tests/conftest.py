"""One thread: tiny matrices gain nothing from more, and two workers of pytest-xdist would fight for two cores."""

import torch

torch.set_num_threads(1)
