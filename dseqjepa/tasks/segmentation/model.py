"""UPerNet (Xiao et al., 2018) on a plain ViT, with an auxiliary FCN head.

The heads' parameters have the names of transformers' `UperNetHead` and `UperNetFCNHead`, and
equal weights give equal maps.

Suffixes: B images, K classes, D width of the ViT, H and W pixels, h and w of a map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dseqjepa.tasks.backbone import Backbone
from dseqjepa.tasks.maps import DropPath, Rescale, maps_of
from dseqjepa.tasks.segmentation.norm import BatchNorm2d

POOLS = (1, 2, 3, 6)
AUXILIARY_MAP = 2
"""The third map, which has the size of the ViT's grid."""
AUXILIARY_WEIGHT = 0.4


class ConvModule(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.batch_norm = BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.batch_norm(self.conv(x)))


class UPerHead(nn.Module):
    """Pyramid pooling on the coarsest map, a feature pyramid over all, and a classifier.

    Args:
        inputs: channels of the maps, finest first.
        classes: K.
        width: internal channels.
        dropout: rate for whole channels before the classifier.
    """

    def __init__(
        self, inputs: Sequence[int], classes: int, width: int = 512, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), ConvModule(inputs[-1], width, 1))
            for size in POOLS
        )
        self.bottleneck = ConvModule(inputs[-1] + len(POOLS) * width, width, 3)
        self.lateral_convs = nn.ModuleList(
            ConvModule(channels, width, 1) for channels in inputs[:-1]
        )
        self.fpn_convs = nn.ModuleList(ConvModule(width, width, 3) for _ in inputs[:-1])
        self.fpn_bottleneck = ConvModule(len(inputs) * width, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits (B, K, h, w) at the size of the finest map."""
        coarse = maps[-1]
        pooled = [resized(pool(coarse), coarse.shape[-2:]) for pool in self.psp_modules]
        top = self.bottleneck(torch.cat([coarse, *pooled], dim=1))
        outputs = [top]
        for lateral, conv, level in reversed(
            [*zip(self.lateral_convs, self.fpn_convs, maps[:-1], strict=True)]
        ):
            side = lateral(level)
            top = side + resized(top, side.shape[-2:])
            outputs.insert(0, conv(top))
        size = outputs[0].shape[-2:]
        joined = torch.cat([resized(output, size) for output in outputs], dim=1)
        return self.classifier(self.dropout(self.fpn_bottleneck(joined)))


class FCNHead(nn.Module):
    """One convolution and a classifier on one map."""

    def __init__(self, inputs: int, classes: int, width: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvModule(inputs, width, 3))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, level: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.convs(level)))


class Segmenter(nn.Module):
    """A backbone with UPerNet: images to logits of every pixel.

    Class k of the logits is label k + 1; label 0 is ignored.
    """

    def __init__(
        self, backbone: Backbone, classes: int, *, width: int = 512, auxiliary_width: int = 256,
        drop_path: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone = backbone
        self.classes = classes
        self.drop_path = DropPath(backbone, drop_path)
        self.rescale = Rescale(backbone.width, BatchNorm2d)
        self.head = UPerHead([backbone.width] * 4, classes, width)
        self.auxiliary = FCNHead(backbone.width, classes, auxiliary_width)
        for module in (self.rescale, self.head, self.auxiliary):
            initialize(module)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, K, H, W) at the size of the images, uint8 or normalized."""
        maps = self.rescale(maps_of(self.backbone, images_BCHW, self.drop_path))
        return resized(self.head(maps), images_BCHW.shape[-2:])

    def losses(self, images_BCHW: Tensor, label_BHW: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of both heads over the labelled pixels."""
        maps = self.rescale(maps_of(self.backbone, images_BCHW, self.drop_path))
        return {
            "loss_decode": pixel_loss(self.head(maps), label_BHW),
            "loss_auxiliary": AUXILIARY_WEIGHT
            * pixel_loss(self.auxiliary(maps[AUXILIARY_MAP]), label_BHW),
        }


def pixel_loss(logits_BKhw: Tensor, label_BHW: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled pixels; 0 if there are none."""
    logits_BKHW = resized(logits_BKhw, label_BHW.shape[-2:]).float()
    total = F.cross_entropy(logits_BKHW, label_BHW - 1, ignore_index=-1, reduction="sum")
    return total / (label_BHW > 0).sum().clamp(min=1)


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resizing without aligned corners."""
    if x.shape[-2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


@torch.no_grad()
def initialize(module: nn.Module) -> None:
    """He initialization for layers before a ReLU, 0.01 for classifiers; zero biases."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            if part.bias is None:
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.normal_(part.weight, std=0.01)
                nn.init.zeros_(part.bias)
