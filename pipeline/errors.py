"""What can go wrong in a way that a user can mend.

AlignError            1  a stage failed, the store cannot be written: place, value, rule, remedy in the message
├── StageFailed       1  a worker ended without finishing its stage
├── GateFailed        1  a stage is done, but not good enough for what needs it
├── ConfigError       2  the YAML file is wrong; holds every problem that was found
├── InputError        3  an input does not exist, does not resolve or does not fit
├── DataError         3  rows that cannot be trained on; holds every address that was found
├── Locked            4  another run is making the same thing, and `--no-wait` was given
└── Interrupted     130  Ctrl-C: the worker was ended, and running again continues

The number is the exit code of the command. Anything else that is raised is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class AlignError(Exception):
    """A problem that the user can mend; `str(error)` is what the user reads."""

    exit_code = 1


class StageFailed(AlignError):
    """A stage's worker ended without finishing; running again continues where it was."""


class GateFailed(AlignError):
    """What a stage made does not hold what is required of it: each gate as `file:line: field: value, rule; remedy`."""


class ConfigError(AlignError):
    """The pipeline file is wrong: all problems at once, each as `file:line: field: what; remedy`."""

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class InputError(AlignError):
    """An input that cannot be found, resolved or used here."""

    exit_code = 3


class DataError(AlignError):
    """Rows that cannot be used: each problem as `file:line: field: what, rule, remedy`."""

    exit_code = 3

    SHOWN = 200
    """Lines; the gate sums up long before, so this only bounds what nobody summed up."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        shown = list(self.problems[: self.SHOWN])
        if len(self.problems) > self.SHOWN:
            shown.append(f"... and {len(self.problems) - self.SHOWN} more")
        super().__init__("\n".join(shown))


class Locked(AlignError):
    """Another process holds the lock and the caller did not want to wait."""

    exit_code = 4


class Interrupted(AlignError):
    """The user pressed Ctrl-C."""

    exit_code = 130


ERRORS: dict[str, type[AlignError]] = {
    cls.__name__: cls for cls in (AlignError, StageFailed, ConfigError, InputError, DataError, Locked)
}
"""By name, so that a worker's error reaches its runner with its exit code."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the nearest of `known`, or an empty string when nothing is near."""
    from difflib import get_close_matches

    near = get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def near_or_all(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?`, or the whole choice when nothing is near."""
    names = list(known)
    return did_you_mean(word, names) or f"; choose {', '.join(names)}"
