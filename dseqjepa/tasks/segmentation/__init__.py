"""Semantic segmentation with UPerNet: heads, crops, inference in windows, mIoU."""
