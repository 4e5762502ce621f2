"""Unsupervised object discovery: saliency and regions compared with masks or boxes."""

from dseqjepa.tasks.discovery.task import evaluate as evaluate
