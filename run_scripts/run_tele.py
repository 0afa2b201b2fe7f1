"""`hf-distill tele` as a script."""

from __future__ import annotations

import sys

from hf_distill.cli.main import main


if __name__ == "__main__":
    main(["tele", *sys.argv[1:]])
