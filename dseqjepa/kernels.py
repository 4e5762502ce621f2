"""How many compiled kernels a process keeps on a CPU; to be said before torch is loaded.

torch and oneDNN each keep the last 1,024, about a megabyte each. Packed batches have another number
of tokens in every step, and kernels for numbers that do not come again are all that fills them: a
small ViT in bfloat16 grew by 860 MB in 120 steps, and by 50 with these limits. A step needs about a
hundred.
"""

from __future__ import annotations

import os

CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
KEPT = 128


def keep_few() -> None:
    """Set what the environment does not say yet."""
    for cache in CACHES:
        os.environ.setdefault(cache, str(KEPT))
