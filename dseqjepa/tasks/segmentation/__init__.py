"""Semantic segmentation with UPerNet: heads, crops, inference in windows, mIoU."""

from dseqjepa.tasks.segmentation.task import evaluate as evaluate
