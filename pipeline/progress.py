"""Progress: what workers report in `progress.jsonl`, shown live in a terminal and as plain lines in a pipe."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_pipeline.pipeline.files import clean

if TYPE_CHECKING:
    from rich.live import Live

    from align_pipeline.pipeline.store import Artifact

PLAIN_EVERY_SECONDS = 10.0
COUNTED = ("tokens", "samples")
RESERVED = {
    "step",
    "total",
    "at",
    "pid",
    "launcher",
    "cpu_seconds",
    "peak_memory_bytes",
    "peak_device_memory_bytes",
    "devices",
    "gpu",
    "gpu_utilization",
    "warning",
    "note",
}


@dataclass
class Summary:
    """What all attempts at a stage used so far, and where the last one stands."""

    step: int = 0
    total: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    device_seconds: float = 0.0
    peak_memory_bytes: float = 0.0
    """Resident memory of the attempt that took most: the sum of its ranks' peaks, each with what they share."""
    peak_device_memory_bytes: float | None = None
    counts: dict[str, float] = field(default_factory=dict)
    rate_per_second: dict[str, float] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of each phase that a worker names: values called `..._seconds`, counted from its start."""
    said: list[str] = field(default_factory=list)
    """Notes and warnings, in their order."""
    attempts: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    gpu: str | None = None
    started: float = 0.0
    first_step: tuple[float, int] | None = None

    def resources(self) -> dict[str, Any]:
        """Return what artifact.json records: times, memory, work done and its rates."""
        return {
            "seconds": round(self.seconds, 2),
            "cpu_seconds": round(self.cpu_seconds, 2),
            "device_seconds": round(self.device_seconds, 2),
            "peak_memory_bytes": int(self.peak_memory_bytes),
            "peak_device_memory_bytes": self.peak_device_memory_bytes,
            "attempts": self.attempts,
            **{name: int(count) for name, count in self.counts.items()},
            **{f"{name}_per_second": round(rate, 2) for name, rate in self.rate_per_second.items()},
            **{name: round(seconds, 2) for name, seconds in self.phases.items()},
        }

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the steps of this attempt; None before there are any."""
        if self.first_step is None or self.step <= self.first_step[1] or self.total <= self.step:
            return None
        spent, steps = time.time() - self.first_step[0], self.step - self.first_step[1]
        return spent / steps * (self.total - self.step)


def read_lines(log: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a log; none when there is no log."""
    lines: list[dict[str, Any]] = []
    try:
        texts = log.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return lines
    for text in texts:
        with suppress(ValueError):  # the half line of a worker that was killed while writing it
            lines.append(json.loads(text))
    return lines


def read_progress(work: Path) -> Summary:
    """Sum up the logs of a work directory, those of all ranks."""
    ranks = sorted(work.glob("progress.*.jsonl"))
    return summed_up(read_lines(work / "progress.jsonl"), [line for rank in ranks for line in read_lines(rank)])


def summed_up(lines: Sequence[dict[str, Any]], of_other_ranks: Sequence[dict[str, Any]] = ()) -> Summary:
    """Sum up the lines of a log: attempts that were killed count up to their last line."""
    summary = Summary()
    attempts, others = _by_process(lines), _by_process(of_other_ranks)
    summary.attempts = len(attempts)
    for attempt in attempts:
        _add(summary, attempt)
    peaks: dict[int, float] = {}  # of each launch
    for last in (process[-1] for process in [*attempts, *others]):
        summary.cpu_seconds += last["cpu_seconds"]
        launch = last.get("launcher", last["pid"])
        peaks[launch] = peaks.get(launch, 0.0) + last["peak_memory_bytes"]
    summary.peak_memory_bytes = max(peaks.values(), default=0.0)
    if attempts:
        summary.started = attempts[-1][0]["at"]
    return summary


def _by_process(lines: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    processes: list[list[dict[str, Any]]] = []
    for line in lines:
        if not processes or processes[-1][-1]["pid"] != line["pid"]:
            processes.append([])
        processes[-1].append(line)
    return processes


def _add(summary: Summary, attempt: list[dict[str, Any]]) -> None:
    first, last = attempt[0], attempt[-1]
    seconds = last["at"] - first["at"]
    summary.seconds += seconds
    summary.device_seconds += seconds * last.get("devices", 0)
    for line in attempt:
        if "peak_device_memory_bytes" in line:
            known = summary.peak_device_memory_bytes or 0
            summary.peak_device_memory_bytes = max(known, line["peak_device_memory_bytes"])
        summary.gpu = line.get("gpu", summary.gpu)
    steps = [line for line in attempt if line["total"]]
    summary.first_step = (steps[0]["at"], steps[0]["step"]) if steps else None
    if steps:
        summary.step, summary.total = steps[-1]["step"], steps[-1]["total"]
        summary.values = {name: value for name, value in steps[-1].items() if name not in RESERVED}
    for line in attempt:
        summary.said += [f"warning: {line['warning']}"] if "warning" in line else []
        summary.said += [line["note"]] if "note" in line else []
    for name in sorted({name for line in steps for name in line if _is_phase(name)}):
        spent = [line[name] for line in steps if name in line][-1]
        summary.phases[name] = summary.phases.get(name, 0.0) + spent
    for name in COUNTED:
        counted = [line for line in steps if name in line]
        if counted:
            summary.counts[name] = counted[-1][name]
            spent = counted[-1]["at"] - counted[0]["at"]
            if spent > 0 and counted[-1][name] > counted[0][name]:
                summary.rate_per_second[name] = (counted[-1][name] - counted[0][name]) / spent


def _is_phase(name: str) -> bool:
    return name.endswith("_seconds") and name not in RESERVED


class Progress:
    """The one display of a run: a live line in a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._live: Live | None = None
        self._head, self._said_at, self._size, self._told = "", 0.0, -1, 0
        if sys.stdout.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(), transient=True, refresh_per_second=8)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        text = clean(text)
        if self._live and self._live.is_started:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def stage(self, number: int, total: int, name: str) -> None:
        self._head = f"[{number}/{total}] {name}"

    def cached(self, artifact: Artifact) -> None:
        self.say(f"{self._head}  cached  {artifact.key}")

    def gate(self, text: str) -> None:
        """Say that a gate holds, with its numbers."""
        self.say(f"{self._head}  gate holds: {text}")

    def started(self, status: str, reason: str) -> None:
        self.say(f"{self._head}  {status}: {reason}")
        self._said_at, self._size, self._told = time.monotonic(), -1, 0
        if self._live:
            self._live.start()
            self._show(f"{self._head}  starting")

    def _show(self, text: str) -> None:
        from rich.text import Text

        if self._live:
            self._live.update(Text(clean(text)))  # text, not markup: a loss in [brackets] is no style

    def follow(self, work: Path) -> None:
        """Show where the worker is, when it has reported something new."""
        try:
            size = (work / "progress.jsonl").stat().st_size
        except FileNotFoundError:
            return
        if size == self._size:
            return
        self._size = size
        summary = read_progress(work)
        for text in summary.said[self._told :]:
            self.say(f"{self._head}  {text}")
        self._told = len(summary.said)
        due = self._live is not None or time.monotonic() - self._said_at >= PLAIN_EVERY_SECONDS
        if not summary.total or not due:
            return
        text = f"{self._head}  {_line(summary)}"
        if self._live:
            self._show(text)
        else:
            self._said_at = time.monotonic()
            self.say(text)

    def done(self, artifact: Artifact, link: str) -> None:
        """Say what a stage made, how long it took and how well it did."""
        self.close()
        seconds = artifact.record["resources"]["seconds"]
        self.say(f"{self._head}  done in {in_words(seconds)}  {metrics_line(artifact.record['metrics'])}  -> {link}")

    def close(self) -> None:
        if self._live and self._live.is_started:
            self._live.stop()


def _line(summary: Summary) -> str:
    parts = [f"step {summary.step}/{summary.total}"]
    for name, value in summary.values.items():
        if name not in COUNTED and not _is_phase(name):
            parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    parts += [f"{rate:,.0f} {name}/s" for name, rate in summary.rate_per_second.items()]
    left = summary.seconds_left
    if left is not None:
        parts.append(f"{in_words(left)} left")
    return "  ".join(parts)


def metrics_line(metrics: Mapping[str, float], most: int = 6) -> str:
    """Return the first metrics in one line."""
    first = [f"{name} {number(value)}" for name, value in list(metrics.items())[:most]]
    return "  ".join(first) + ("  ..." if len(metrics) > most else "")


def number(value: float) -> str:
    """Return a number for people: whole ones whole, others with four digits."""
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1 else f"{value:.4g}"


def in_words(seconds: float) -> str:
    """Return a duration for people: `4.1 s`, `41 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
