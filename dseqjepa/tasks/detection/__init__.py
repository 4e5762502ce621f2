"""Detection and instance segmentation with Mask R-CNN, measured as COCO does."""
