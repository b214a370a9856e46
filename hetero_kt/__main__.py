"""`python -m hetero_kt`: the same as the command `hetero-kt`."""

from hetero_kt.cli import main

main()
