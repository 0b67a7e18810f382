"""``python -m merak_like.cli`` where the ``merak`` script is not on the path."""

from merak_like.cli import main

main()
