"""`python -m dseqjepa` is `dseqjepa`."""

from dseqjepa.cli import main

main()
