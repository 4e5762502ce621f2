"""What the server of `tests.children` imports before it forks: everything slow to import."""

# ruff: noqa: F401

import dseqjepa.report.page
import dseqjepa.studies.run
import dseqjepa.tasks.run
import dseqjepa.train.rehearsal
import dseqjepa.viz.show
import tests.train.tiny_runs
