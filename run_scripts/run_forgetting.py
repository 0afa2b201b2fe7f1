"""`hf-distill forgetting` as a script."""

from __future__ import annotations

import sys

from hf_distill.cli.main import main


if __name__ == "__main__":
    main(["forgetting", *sys.argv[1:]])
