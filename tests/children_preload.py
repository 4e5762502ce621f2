"""What the server of `tests.children` imports before it forks: everything slow to import."""

import tests.train.tiny_runs  # noqa: F401
