"""From a config to a run on disk: the one loop, its schedules, checkpoints and log."""
