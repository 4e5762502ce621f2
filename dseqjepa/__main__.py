from dseqjepa.cli import main

main()
