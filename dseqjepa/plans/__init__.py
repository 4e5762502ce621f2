"""Where to look, what to predict and in which order: tensors in, tensors out, no model."""
