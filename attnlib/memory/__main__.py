"""`python -m attnlib.memory`: the commands of `python -m attnlib` under their older name."""

from attnlib.__main__ import main

raise SystemExit(main(program="python -m attnlib.memory"))
