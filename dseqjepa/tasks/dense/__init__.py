"""What single patches of a frozen encoder say of their pixels."""

from dseqjepa.tasks.dense.task import evaluate

__all__ = ["evaluate"]
