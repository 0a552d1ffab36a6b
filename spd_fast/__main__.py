"""``python -m spd_fast``."""

from spd_fast.cli import main

main()
