"""Feedback: the thumbs, edits and comparisons of a product's users become preference pairs and unpaired rows.

Its artifact feeds `dpo` and `reward` with the pairs and `kto` with the unpaired rows; what it keeps for testing is
their held-out rows. The way from events to rows is `data/feedback/convert.py`, that to better answers `complete.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from align_pipeline.data.feedback.settings import Settings
from align_pipeline.pipeline.errors import DataError
from align_pipeline.pipeline.stage import File, Inputs, Kind, Metrics, Stage, Work
from align_pipeline.stages.complete import Complete, Completer


class Feedback(Settings, Stage):
    """Turn feedback logs into preference pairs and unpaired rows."""

    produces: ClassVar[Kind] = "dataset"
    version: ClassVar[int] = 2

    type: Literal["feedback"] = "feedback"
    logs: File | dict[str, File]
    """A log, a folder of logs, or several of either under names."""
    complete: Complete | None = None
    """Make pairs of unpaired disliked answers and better ones that a model gives; `pairs` hold them too."""

    def measures(self) -> Mapping[str, str]:
        from align_pipeline.data.feedback.lineage import FILES

        names = ("events", "used", "invalid_share", "confidence")
        known = dict.fromkeys((*names, *(name.replace(".", "_") for name in FILES)), "")
        return {**known, "completed": "" if self.complete else "needs complete"}

    def run(self, inputs: Inputs, work: Work) -> Metrics:
        from align_pipeline.data.feedback.convert import convert
        from align_pipeline.data.feedback.report import invalid_lines, invalid_share, problems

        shutil.rmtree(work.out, ignore_errors=True)
        work.out.mkdir(parents=True)
        logs = [one for name, one in inputs.items() if name.split(".")[0] == "logs"]
        report = convert(
            [(Path(str(log.path)), log.ref.removeprefix("file:")) for log in logs],
            self,
            work.out,
            scratch=work.scratch / "feedback",
            private=work.private,
            place=f"store/{work.folder.name}",
            say=lambda line: work.log(step=0, total=0, note=line),
            step=lambda what, done, total: work.log(step=done, total=total),
            complete=Completer(self.complete, self, inputs, work, self.how.micro_batch) if self.complete else None,
        )
        for note in report["notes"]:
            work.log(step=0, total=0, warning=note)
        if wrong := problems(report, self.max_invalid_share):
            raise DataError([*invalid_lines(report), *wrong])
        work.report_rows("logs", report)
        events, rows, pairs = report["events"], report["rows"], report["pairs"]
        return {
            "events": float(events["read"]),
            "used": float(events["used"]),
            "invalid_share": invalid_share(report),
            **{name.replace(".", "_"): float(count) for name, count in rows.items()},
            **({"completed": float(pairs["completed"])} if self.complete else {}),
            "confidence": report["confidence"]["mean"] or 0.0,
        }
