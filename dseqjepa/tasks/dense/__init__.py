"""Dense probes: what single patches of a frozen encoder know about their pixels."""

from dseqjepa.tasks.dense.task import evaluate

__all__ = ["evaluate"]
