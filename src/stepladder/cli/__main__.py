"""python -m stepladder.cli."""

from stepladder.cli import main

main()
