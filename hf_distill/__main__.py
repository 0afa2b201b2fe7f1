"""`python -m hf_distill VERB ...`, which is `hf-distill VERB ...`; launchers start it this way."""

from __future__ import annotations

import os
import sys

from .cli.main import main


if __name__ == "__main__":
    sys.argv[0] = "hf-distill"
    if "HF_DISTILL_END_WITH" in os.environ:
        from .recipes.processes import end_with

        end_with(int(os.environ["HF_DISTILL_END_WITH"]))
    main()
