import os
import sys

# `python -m` looks for modules in the folder where it is typed, first: it may be a stranger's.
if not sys.flags.safe_path and sys.path[0] == os.getcwd():
    del sys.path[0]

from rlhf_recipes.cli import main  # noqa: E402

main()
