"""Stands in for a stage's command in the tests of the stage graph: slow in small steps, resumable, killable.

python recipe_command.py VERB --config FILE     adds up what its inputs hold, 20 steps, one file a step
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import yaml


STEPS = 20


def main(verb: str, config: str) -> None:
    settings = yaml.safe_load(Path(config).read_text())
    folder = Path(settings["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    if settings.get("fail"):
        sys.exit("error: told to fail")
    total = float(settings.get("amount", 0))
    for value in settings.values():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and (Path(one) / "total.json").is_file():
                total += json.loads((Path(one) / "total.json").read_text())
    for step in range(STEPS):
        part = folder / f"step-{step}.json"
        if not part.exists():
            time.sleep(float(settings.get("pause", 0)))
            temporary = part.with_suffix(".tmp")
            temporary.write_text(json.dumps(total * (step + 1)))
            os.replace(temporary, part)
            print(f"{verb} step {step}", flush=True)
    done = sum(json.loads((folder / f"step-{step}.json").read_text()) for step in range(STEPS))
    (folder / "total.json").write_text(json.dumps(done % 1009))
    (folder / "metadata.json").write_text(json.dumps({"rows": int(done), "columns": ["scores"]}))
    (folder / "metrics.json").write_text(json.dumps({"micro/test": {"trained": {"nDCG@10": done % 7 / 7}}}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[3])
