"""`hf-distill reproduce` as a script, for those who start scripts."""

from __future__ import annotations

import sys

from hf_distill.cli.main import main


if __name__ == "__main__":
    main(["reproduce", *sys.argv[1:]])
