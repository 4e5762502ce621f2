"""From a config to a run on disk: the training loop, schedules, checkpoints and log."""
