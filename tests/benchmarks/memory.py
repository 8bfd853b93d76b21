"""How near the plan's estimates of memory come to what workers take, as a Markdown table.

    python tests/benchmarks/memory.py [FOLDER]

Random Llamas, two optimizer steps of every kind of training, on a CPU. FOLDER keeps what was run, so that a second call
goes on. Stages run with glibc giving back what is freed, and again with glibc as it comes (see docs/memory.md).
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from memory_shapes import EXACT, Size, compared

SIZES = (
    Size(hidden=256, layers=4, heads=8, kv_heads=4, intermediate=768, vocabulary=8192, length=256),
    Size(hidden=384, layers=6, heads=6, kv_heads=3, intermediate=1152, vocabulary=16384, length=256),
)
TINY = Size(hidden=64, layers=2, heads=2, kv_heads=1, intermediate=128, vocabulary=512, length=32)
"""Too small to count: what its workers take is Python and its libraries."""
MIB = 2**20


def main(folder: Path) -> None:
    plain = [compared(folder / f"plain-{number}", size) for number, size in enumerate(SIZES)]
    os.environ |= EXACT
    tiny = compared(folder / "tiny", TINY, ("sft", "reward", "kto", "ppo"))
    print(f"{TINY}: {', '.join(f'{name} {found / MIB:,.0f} MiB' for name, (_, _, found) in tiny.items())}\n")
    for number, size in enumerate(SIZES):
        columns = ("stage", "estimate, MiB", "measured, MiB", "ratio", "held: estimate", "measured", "ratio")
        print(f"{size}:\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
        for name, (_, held, exact) in compared(folder / f"exact-{number}", size).items():
            foretold, _, found = plain[number][name]
            print(f"| {name} | {_cells(foretold, found)} | {_cells(held, exact)} |")
        print()


def _cells(foretold: float, found: float) -> str:
    return f"{foretold / MIB:,.0f} | {found / MIB:,.0f} | {foretold / found:.2f}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]).absolute())
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
