"""`python -m hf_distill VERB ...`, which is `hf-distill VERB ...`; launchers start it this way."""

from __future__ import annotations

import sys

from .cli.main import main


if __name__ == "__main__":
    sys.argv[0] = "hf-distill"
    main()
