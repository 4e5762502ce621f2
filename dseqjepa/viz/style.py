"""The colours of all pictures: distinguishable by everyone, with one meaning each.

Ranks, clusters and runs use `PALETTE`; continuous values use `HEAT`.
"""

from __future__ import annotations

import numpy as np

# For normal, protan, deutan and tritan vision (Machado et al., 2009), any two are at least 33
# apart in CIELAB.
PALETTE = np.array(
    [
        (255, 158, 4),
        (41, 45, 241),
        (0, 142, 108),
        (135, 64, 172),
        (224, 203, 132),
        (38, 222, 255),
        (171, 26, 6),
        (70, 0, 42),
        (216, 255, 230),
    ]
)
# Low to high saliency in steps of equal CIELAB lightness, from 12 to 95.
HEAT = np.array(
    [(15, 27, 76), (94, 46, 126), (192, 52, 129), (245, 106, 88), (255, 177, 77), (255, 242, 164)]
)
PAPER, INK, BORDER = (255, 255, 255), (40, 40, 40), (255, 255, 255)
VEIL = (208, 211, 217)  # over left-out areas: darker than paper, so that white images show
MUTED, RULE = (105, 105, 105), (222, 222, 222)  # secondary text, and lines behind the data
LINES = PALETTE[[1, 0, 2, 3, 6, 7]]  # dark enough for a thin line on paper
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))  # for lines that coincide
