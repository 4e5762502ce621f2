"""What the server of `tests.children` imports before it forks: all that takes time."""

import dseqjepa.train.pretrain
import torch.distributed.tensor
import torch.utils.data

import tests.train.tiny_runs  # noqa: F401
