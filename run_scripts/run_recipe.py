"""`hf-distill recipe` as a script; it starts the processes of each stage itself."""

from __future__ import annotations

import sys

from hf_distill.cli.main import main


if __name__ == "__main__":
    main(["recipe", *sys.argv[1:]])
