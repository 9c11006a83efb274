"""Asks pip for the newest version of every package that pyproject.toml names bounds of: docs/newest.json."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path

from generate import promised


def main(target: Path) -> None:
    """Writes the date and the newest version of each package into the file ``target``."""
    found = {name: newest(name) for name in promised()}
    written = {"date": datetime.date.today().isoformat(), "versions": found}
    target.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    print(target.read_text(encoding="utf-8"))


def newest(name: str) -> str:
    """Returns the newest release that pip finds for this Python and machine."""
    command = [sys.executable, "-m", "pip", "index", "versions", name]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    # name (version)
    return text.partition("(")[2].partition(")")[0].partition("+")[0]


if __name__ == "__main__":
    main(Path(__file__).with_name("newest.json"))
