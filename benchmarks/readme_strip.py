"""The picture in the README: the report's strip of the demo, as one PNG.

make demo && python -m benchmarks.readme_strip runs/demo docs/strip.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from milkglass.report import read_results, strip_png


def main() -> None:
    """Write the strip of all runs in a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    arguments.picture.write_bytes(strip_png(read_results(arguments.runs)))


if __name__ == "__main__":
    main()
