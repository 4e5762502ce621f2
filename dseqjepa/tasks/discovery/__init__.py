"""Do saliency and regions find the objects of an image? Measured by masks or boxes, untrained."""

from dseqjepa.tasks.discovery.task import evaluate as evaluate
