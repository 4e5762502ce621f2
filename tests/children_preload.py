"""What the server of `tests.children` imports before it forks: all that takes time."""

import tests.train.tiny_runs  # noqa: F401
