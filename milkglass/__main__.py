"""`python -m milkglass` is the command `milkglass`."""

from milkglass.cli import main

main()
