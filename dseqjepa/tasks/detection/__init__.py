"""Detection and instance segmentation with Mask R-CNN, measured as COCO does."""

from dseqjepa.tasks.detection.task import evaluate as evaluate
