"""`hf-distill pretrain` as a script, also for `accelerate launch`."""

from __future__ import annotations

import sys

from hf_distill.cli.main import main


if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]])
