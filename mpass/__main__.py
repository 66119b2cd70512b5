"""`python -m mpass`: the command line, where the console script is not on the path."""

from mpass.cli.app import main

main()
