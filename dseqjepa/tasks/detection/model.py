"""torchvision's Mask R-CNN on a plain ViT.

Maps of four blocks at four scales go through a feature pyramid (Lin et al., 2017); the blocks
in between attend in windows, as in ViTDet (Li et al., 2022). Images are normalized only by the
backbone.

Suffixes: B images, C colours, D channels, H and W pixels, K objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from dseqjepa.tasks.backbone import Backbone
from dseqjepa.tasks.maps import WINDOW, DropPath, Rescale, maps_of

ANCHOR = 8
"""An anchor's side in strides of its map: 32 pixels if the finest stride is 4."""


class Pyramid(nn.Module):
    """Normalized images to the five maps that torchvision's detectors read, by their names."""

    def __init__(self, backbone: Backbone, width: int, window: int, drop_path: float) -> None:
        super().__init__()
        self.out_channels = width
        self.backbone = backbone
        self.window = window
        self.drop_path = DropPath(backbone, drop_path)
        self.rescale = Rescale(backbone.width, _layer_norm)
        self.fpn = FeaturePyramidNetwork(
            [backbone.width] * 4, width, LastLevelMaxPool(), norm_layer=_layer_norm
        )

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        maps = maps_of(self.backbone, images_BCHW, self.drop_path, self.window)
        levels = self.rescale(maps)
        return self.fpn({str(number): level for number, level in enumerate(levels)})


class FullPrecisionCoder(BoxCoder):
    """Decodes boxes in float32. torchvision's coder would round them to the head's precision: in
    bfloat16 to multiples of 4 pixels beyond 512."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        return super().decode_single(rel_codes.float(), boxes.float())


class Detector(nn.Module):
    """uint8 images of any size to objects with boxes and masks.

    Args:
        classes: number of object classes; label 0 is background.
        width: channels of the pyramid.
        head_width: width of the two layers of the box head.
        mask_width: channels of the mask head.
        longest_side: of the resized images, in pixels.
        window: side, in patches, of the attention windows of the blocks that are not read.
        drop_path: rate of the last block.
        detections: maximum number of detections per image.
        proposals: regions per image on which the heads are trained.
        score_threshold: minimum score of a reported object.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        *,
        width: int = 256,
        head_width: int = 1024,
        mask_width: int = 256,
        longest_side: int = 1024,
        window: int = WINDOW,
        drop_path: float = 0.1,
        detections: int = 100,
        proposals: int = 512,
        score_threshold: float = 0.05,
    ) -> None:
        super().__init__()
        pyramid = Pyramid(backbone, width, window, drop_path)
        steps = [backbone.patch_size * factor / 4 for factor in (1, 2, 4, 8, 16)]
        self.rcnn = MaskRCNN(
            pyramid,
            box_head=TwoMLPHead(width * 7**2, head_width),
            box_predictor=FastRCNNPredictor(head_width, classes + 1),
            mask_head=MaskRCNNHeads(width, (mask_width,) * 4, 1),
            mask_predictor=MaskRCNNPredictor(mask_width, mask_width, classes + 1),
            min_size=longest_side,  # the shorter side reaches this only if both are equal
            max_size=longest_side,
            # What comes in is normalized: (x - 0) / 1.
            image_mean=[0.0] * 3,
            image_std=[1.0] * 3,
            size_divisible=divisor(backbone.patch_size),
            rpn_anchor_generator=AnchorGenerator(
                tuple((round(ANCHOR * step),) for step in steps), ((0.5, 1.0, 2.0),) * len(steps)
            ),
            box_batch_size_per_image=proposals,
            box_detections_per_img=detections,
            box_score_thresh=score_threshold,
        )
        for part in (self.rcnn.rpn, self.rcnn.roi_heads):
            part.box_coder = FullPrecisionCoder(part.box_coder.weights)

    @property
    def backbone(self) -> Backbone:
        return self.rcnn.backbone.backbone

    def losses(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The five losses of Mask R-CNN. A target has `boxes` (K, 4), `labels` (K) and `masks`
        (K, H, W) in the image's own pixels; K may be 0."""
        return self.rcnn(self._normalized(images), [dict(target) for target in targets])

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """For each image `boxes`, `labels`, `scores` and `masks` (K, 1, H, W), as probabilities in
        the image's own pixels, best first."""
        return self.rcnn(self._normalized(images))

    def _normalized(self, images: Sequence[Tensor]) -> list[Tensor]:
        return [self.backbone.normalized(image_CHW[None])[0] for image_CHW in images]


def divisor(patch_size: int) -> int:
    """The divisor of the sides of padded images: 32 if that gives whole patches on the coarsest map
    too, else two patches."""
    return 32 if 32 % (2 * patch_size) == 0 else 2 * patch_size


def _layer_norm(channels: int) -> nn.Module:
    """Layer norm over the channels at each position, which suits small batches."""
    return LayerNorm2d(channels, eps=1e-6)
