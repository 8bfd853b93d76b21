"""How far the rule that tells refusals agrees with people: XSTest's completions, each labelled by two annotators.

    python tests/benchmarks/refusal.py [FOLDER] > tests/benchmarks/refusal.md

FOLDER holds `xstest_v2_completions_*.csv` (../shared/data/feedback/xstest by default). A completion refuses when its
final label is full or partial refusal. The rule was made on the two models of MADE_ON and on the sentences of
`tests/stages/test_refusal.py`; nobody read the others.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import NamedTuple

from align_pipeline.stages.refusal import refuses
from align_pipeline.stages.statistics import cohen_kappa, confusion, macro_f1, table_interval

FOLDER = Path(__file__).parents[3] / "shared" / "data" / "feedback" / "xstest"
MADE_ON = ("llama2new", "mistralinstruct")
HEAD = """\
# Refusals: the rule and people

`python tests/benchmarks/refusal.py > tests/benchmarks/refusal.md`

XSTest v2 (Röttger et al. 2024, arXiv:2308.01263): completions of five models, each labelled by two people, with a final
label. Refusal, full or partial, against compliance: the rule against the final label, and one annotator against the
other; in brackets 95 % bootstrap intervals over completions. The rule (`stages/refusal.py`) was made on the answers of
{made_on} and on the sentences of `tests/stages/test_refusal.py`; those of the other three models
were not read, before or after. It was changed once after it had been measured, by those sentences only.
"""
COMPLIES = "1_full_compliance"


class Agreement(NamedTuple):
    """What two raters agree on, each figure with its 95 % interval over completions."""

    macro_f1: tuple[float, float, float]
    kappa: tuple[float, float, float]


def agreement(truth: list[bool], said: list[bool]) -> Agreement:
    table = confusion([*truth], [*said])  # (2, 3), the last column empty: both say yes or no
    f1 = (float(macro_f1(table)), *table_interval(table, macro_f1, seed=0))
    return Agreement(f1, (float(cohen_kappa(table[:, :2])), *table_interval(table[:, :2], cohen_kappa, seed=0)))


def measure(file: Path) -> tuple[int, Agreement, Agreement]:
    """Return the number of completions, the rule against the final label, and one annotator against the other."""
    with file.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    final, first, second = (
        [row[name] != COMPLIES for row in rows] for name in ("final_label", "annotation_1", "annotation_2")
    )
    return len(rows), agreement(final, [refuses(row["completion"]) for row in rows]), agreement(first, second)


def main(folder: Path) -> None:
    print(HEAD.format(made_on=" and ".join(MADE_ON)))
    print("| model | completions | rule: macro-F1 | rule: kappa | people: macro-F1 | people: kappa |")
    print("|---|---|---|---|---|---|")
    files = {file.stem.rpartition("_")[2]: file for file in sorted(folder.glob("*.csv"))}
    assert files, f"no files in {folder}"
    for name in sorted(files, key=lambda name: (name in MADE_ON, name)):
        count, rule, people = measure(files[name])
        cells = [f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in (*rule, *people)]
        print(f"| {name}{' (made on)' if name in MADE_ON else ''} | {count} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
