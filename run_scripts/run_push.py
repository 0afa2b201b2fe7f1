"""`hf-distill push` as a script, for those who start scripts."""

from __future__ import annotations

import sys

from hf_distill.cli.main import main


if __name__ == "__main__":
    main(["push", *sys.argv[1:]])
