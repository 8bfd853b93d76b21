"""The report: its numbers are the artifacts', every text is escaped, every state of a pipeline has its sentence."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from align_pipeline.pipeline import forget, report_cli, report_page
from align_pipeline.pipeline import report_charts as charts
from align_pipeline.pipeline.errors import ConfigError, InputError
from align_pipeline.pipeline.report_facts import Facts, gather
from align_pipeline.pipeline.report_page import page
from align_pipeline.pipeline.stage import usage
from align_pipeline.pipeline.store import damages
from align_pipeline.stages import reward
from harness import Align
from made import HOSTILE, SCORES, Made, all_done, evaluation, write_log

SECTIONS = "flow gates warnings evaluation reward-models curves data resources lineage".split()
TAGS = set(
    "html head meta title style body header main footer nav section article div span p b small br h1 h2 h3 h4 h5 ul li "
    "dl dt dd a table thead tbody tfoot tr th td code pre details summary figure figcaption data bdi svg g path line "
    "rect circle text".split()
)
ATTRIBUTES = set(
    "lang charset http-equiv content name id class href tabindex role aria-label scope dir value open viewbox width "
    "height x y x1 x2 y1 y2 cx cy r rx d text-anchor".split()
)


class Parsed(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: set[str] = set()
        self.ids: list[str] = []
        self.values: list[float] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        found = {name: value or "" for name, value in attrs}
        self.attributes |= found.keys()
        self.links |= {found["href"]} if "href" in found else set()
        self.ids += [found["id"]] if "id" in found else []
        self.values += [float(found["value"])] if tag == "data" else []

    def handle_data(self, data: str) -> None:
        self.words += data


def made_page(made: Made) -> tuple[str, Facts]:
    facts = gather(made.planner())
    return page(facts, "now"), facts


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_artifacts(tmp_path: Path) -> None:
    made = Made(tmp_path)
    all_done(made)
    text, facts = made_page(made)
    parsed = Parsed(text)
    assert [one for one in parsed.ids if one in SECTIONS] == SECTIONS
    for artifact in made.done.values():
        for name, value in artifact.record["metrics"].items():
            assert value in parsed.values and name.rpartition("/")[2].replace("_", " ") in parsed.words.replace(
                "_", " "
            )
        assert artifact.digest in parsed.words and artifact.key in parsed.words
    won = "ppo won: by the scorer it beats sft in 75.0% [70.0%, 80.0%] of the comparisons on 4 prompts"
    assert f"{won}, at a KL of 0.75 nats an answer." in parsed.words
    assert "All 4 stages are up to date." in parsed.words
    assert "The chosen answer is longer in 71% of pairs." in parsed.words
    assert "the longer answer is chosen in 71% of the pairs" in parsed.words.split("Evaluation")[1]
    assert "half of the answers are empty" in parsed.words, "a warning of the log"
    assert "accuracy: 0.7, must be > 0.6" in parsed.words
    assert "ppo says 3" in parsed.words and "question 3" in parsed.words
    assert {40.0, 36.0, 2.0, 51.0} <= set(parsed.values), "rows, trained on, rejected, the length of 95 %"
    assert "0.010" in parsed.words, "36 device seconds are a hundredth of an hour"
    assert "rows.jsonl:41: chosen: equals rejected" in parsed.words
    assert "secret-host" not in text and str(tmp_path) not in text.replace(facts.file, "")


def test_calibration_is_that_of_the_reward_stage(tmp_path: Path) -> None:
    made = Made(tmp_path)
    all_done(made)
    error = reward._calibration_error([chosen - rejected for chosen, rejected in SCORES])
    text, _ = made_page(made)
    assert f"Calibration error {error:.3f} on 5 held-out pairs" in text
    assert "1 pairs: 57.4% sure, 100.0% right" in text, "sigmoid(0.3), the pair (0.4, 0.1)"


def test_the_frontier_has_every_model_and_the_way_of_a_ppo_that_is_measured_alike(tmp_path: Path) -> None:
    made = Made(tmp_path)
    all_done(made)
    text, _ = made_page(made)
    assert "sft: reward 0.425 [0.325, 0.525] at KL 0<" in text and "ppo: reward 1.05 [0.95, 1.15] at KL 0.75<" in text
    assert "ppo while it learnt: reward 0.2 at KL 0.5<" in text
    other = dict(made.done["evaluate"].record["inputs"], scorer={"ref": "x:y", "digest": "sha256:other"})
    record = {**made.done["evaluate"].record, "inputs": other}
    (made.done["evaluate"].path / "artifact.json").write_text(json.dumps(record))
    text, _ = made_page(made)
    assert "ppo while it learnt" not in text and "ppo has no line: it started from another model or learnt" in text


def test_speeds_are_shown_where_they_were_measured(tmp_path: Path) -> None:
    made = Made(tmp_path)
    all_done(made)
    path = made.done["evaluate"].path / "artifact.json"
    figure = {"value": 0.025, "low": 0.0125, "high": 0.5}
    of_one = {"first_token_seconds": {"p50": figure}, "tokens_per_second": figure, "requests_per_second": figure}
    record = json.loads(path.read_text())
    record["resources"]["speed"] = {"engine": "vllm", "models": {"ppo": {"16": of_one}}}
    assert "first token" not in made_page(made)[0]
    path.write_text(json.dumps(record))
    parsed = Parsed(made_page(made)[0])
    assert "first token, ms" in parsed.words and {25.0, 12.5, 500.0, 0.025} <= set(parsed.values)


@pytest.mark.parametrize(
    ("rewards", "says"),
    [
        (
            [0.0] * 4,
            "Every model is worse than sft: ppo, the best, wins only 12.5% [7.5%, 17.5%] of the comparisons on 4",
        ),
        ([0.0, 1.0, 1.5, 0.2], "No model is surely better than sft: ppo wins 62.5% [57.5%"),
    ],
)
def test_the_outcome_in_words(tmp_path: Path, rewards: list[float], says: str) -> None:
    made = Made(tmp_path)
    found = evaluation({"sft": [0.0, 1.0, 0.5, 0.2], "ppo": rewards}, {"ppo": 0.5}, "sft")
    if "surely" in says:
        found["metrics"]["ppo/win_rate_low"] = 0.5
        says = says.replace("57.5%", "50.0%")
    all_done(made, rewards={"sft": [0.0, 1.0, 0.5, 0.2], "ppo": rewards})
    record = made.done["evaluate"].path / "artifact.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "metrics": found["metrics"]}))
    assert says in made_page(made)[0]


def test_curves_are_kept_and_a_step_taken_again_counts_as_it_was_taken_last(tmp_path: Path) -> None:
    made = Made(tmp_path)
    log = [{"step": step, "total": 3, "loss": loss, "gpu_utilization": 80} for step, loss in ((1, 9.0), (2, 8.0))]
    log += [{"step": step, "total": 3, "loss": loss, "pid": 2} for step, loss in ((2, 4.0), (3, 2.0))]
    artifact = made.publish("sft", {"train_loss": 1.0}, log=log)
    assert (artifact.path / ".progress.jsonl").exists() and not made.store.work_path(artifact.key).exists()
    assert not list(damages(artifact.path)) and ".progress.jsonl" not in artifact.record["files"]
    text, facts = made_page(made)
    assert [point["loss"] for point in facts.stages[0].points] == [9.0, 4.0, 2.0]
    assert "step 2: training 4<" in text and "step 1: at each log line 80<" in text

    (tmp_path / "again").mkdir()
    assert Made(tmp_path / "again").publish("sft", {"train_loss": 1.0}).digest == artifact.digest, "a log is no content"


def test_a_long_run_is_a_small_page_at_once(tmp_path: Path) -> None:
    made = Made(tmp_path)
    names = ("rewards/chosen", "rewards/rejected", "learning_rate", "entropy", "kl", "length", "score", "accuracy")
    points = [
        {"step": step, "loss": math.sin(step) + 5000 / step, "grad_norm": step % 7, **dict.fromkeys(names, 1 / step)}
        for step in range(1, 10_001)
    ]
    log = [{"step": step, "total": 10_000, "loss": 1.0, "gpu_utilization": step % 100} for step in range(1, 10_001)]
    for name in ("sft", "reward", "ppo"):
        made.publish(name, {"accuracy": 1.0}, {"curve.jsonl": points}, log=log)
    before = time.process_time()
    report_cli.report(made.file, tmp_path / "r.html", store=made.store.root)
    spent = time.process_time() - before
    size = (tmp_path / "r.html").stat().st_size
    print(f"{spent:.2f} s of CPU, {size:,} bytes")
    assert spent < 3 and size < 5e6


def test_a_stretch_of_points_keeps_its_extremes() -> None:
    points = [(float(x), 100.0 if x == 777 else -5.0 if x == 31 else 1.0) for x in range(1, 1001)]
    found = charts.stretches([*points, (1001.0, math.nan)], most=50)
    assert len(found) == 50 and found[-1].x == 1000
    assert max(one.high for one in found) == 100 and min(one.low for one in found) == -5
    assert sum(one.y for one in found) / 50 == pytest.approx(sum(y for _, y in points) / 1000)
    assert charts.ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert charts.ticks(-3.1, 12.0) == pytest.approx([0, 5, 10])


def test_numbers_of_any_size_have_a_place() -> None:
    """Every pair of these as a curve, a distribution and a model: the drawing holds numbers only, all inside it."""
    sizes = [0.0, 1.0, -1.0, 5e-324, 1e-310, -3e-7, 1e16, 1e16 + 2, -1e99, 1e308, math.inf, math.nan]
    for one in sizes:
        for other in sizes:
            values = [value for value in (one, other) if charts.drawable(value)]
            if not values:
                continue
            drawn = charts.curves([charts.Series("a", [(1.0, one), (2.0, other)])], "curve")
            drawn += charts.distributions([("a", values, 0)], "rewards", "reward")
            drawn += charts.frontier(
                [charts.Model("m", abs(values[0]), values[-1], values[-1], values[-1], 0)], [], "x"
            )
            places = re.findall(r' (?:x|y|x1|x2|y1|y2|cx|cy|width|height)="([^"]*)"', drawn)
            assert all(-1 <= float(place) <= 401 for place in places), (one, other)


def test_the_use_of_a_gpu_is_logged_where_it_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses() -> int:
        raise NotImplementedError("a MIG slice")

    cuda = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, max_memory_allocated=lambda: 5,
        get_device_name=lambda: "H100", utilization=lambda: 93,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert usage()["gpu_utilization"] == 93
    cuda.utilization = refuses
    assert usage()["gpu"] == "H100" and "gpu_utilization" not in usage()


# --- what must do no harm ---------------------------------------------------------------------------------------------


def test_hostile_text_is_only_text(tmp_path: Path) -> None:
    made = Made(tmp_path)
    all_done(made, text=HOSTILE)
    planner = made.planner()
    planner.manifest.stages["sft"]["status"] = "failed"
    text, _ = made_page(made)
    parsed = Parsed(text)
    assert parsed.tags <= TAGS, parsed.tags - TAGS
    assert parsed.attributes <= ATTRIBUTES, parsed.attributes - ATTRIBUTES
    assert all(re.fullmatch(r"#[\w-]+", link) for link in parsed.links)
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    assert "{{7*7}}" in parsed.words and "שלום 👩‍🚀" in parsed.words and "\ufffd" in parsed.words
    assert re.search(r"99\d,\d{3} more characters are left out", text)
    assert len(text) < 1_000_000
    assert text.count("http") == text.count("http-equiv"), "no address at all"
    assert "default-src 'none'" in text


def test_names_and_paths_with_quotes(tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s "here" <b>'
    folder.mkdir()
    made = Made(folder)
    all_done(made)
    parsed = Parsed(made_page(made)[0])
    assert parsed.tags <= TAGS and 'it\'s "here" <b>' in parsed.words


def test_numbers_that_are_none_are_left_out(tmp_path: Path) -> None:
    made = Made(tmp_path)
    all_done(made, rewards={"sft": [0.0, 1.0], "ppo": [math.nan, math.inf]})
    path = made.done["sft"].path / "curve.jsonl"
    broken = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": 3.0}, {"step": 3, "loss": -math.inf}]
    path.write_text("".join(json.dumps(point) + "\n" for point in broken))
    record = json.loads((made.done["sft"].path / "artifact.json").read_text())
    record["files"]["curve.jsonl"]["bytes"] = path.stat().st_size
    (made.done["sft"].path / "artifact.json").write_text(json.dumps(record))
    text, _ = made_page(made)
    assert "step 2: training 3<" in text
    assert not re.search(r'(x|y|d|cx|cy|height|width)="[^"]*(nan|inf)', text)


@pytest.mark.parametrize("scheme", [0, 1])
def test_the_colours_can_be_told_from_their_ground(scheme: int) -> None:
    """Contrast as WCAG 2 defines it: 4.5 for text, 3 for lines and dots; scheme 0 is light, 1 dark."""
    style = (Path(report_page.__file__).parent / "report.css").read_text()
    found = dict(re.findall(r"--([\w-]+): (#\w{6});", style.split("@media")[scheme]))

    def luminance(name: str) -> float:
        parts = [int(found[name][place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    texts = [(name, ground) for name in ("ink", "quiet", "link", "warn") for ground in ("paper", "card")]
    texts += [("good", "good-soft"), ("bad", "bad-soft"), ("warn", "warn-soft"), ("busy", "busy-soft")]
    texts += [("quiet", "idle-soft"), ("ink", "idle-soft"), ("ink", "bad-soft"), ("link", "bad-soft")]
    assert [pair for pair in texts if contrast(*pair) < 4.5] == []
    assert [n for n in range(charts.COLOURS) if contrast(f"c{n}", "paper") < 3] == []


def test_forgetting_a_user_deletes_the_pages_that_may_quote_them(tmp_path: Path) -> None:
    made = Made(tmp_path)
    all_done(made)
    report_cli.report(made.file, out=None, store=made.store.root)
    assert (made.store.root / "clerk" / "report.html").is_file()
    forget._clear(made.store)
    assert sorted(path.name for path in (made.store.root / "clerk").iterdir() if path.is_file()) == [
        ".lock", "manifest.json",
    ]  # fmt: skip


# --- every state ------------------------------------------------------------------------------------------------------


def failed(made: Made) -> None:
    planner = made.planner()
    key = planner.step("sft", {}).key
    assert key
    write_log(made.store.work_path(key), [{"step": 1, "total": 9, "loss": 7.5}, {"step": 2, "total": 9, "loss": 6.5}])
    (made.store.work_path(key) / "scratch").mkdir()
    (made.store.work_path(key) / "log.txt").write_text("Traceback\nValueError: no <b>such</b> tensor\n")
    planner.manifest.failed("sft", f"work/{key}", 2, "stage sft failed: ValueError", "align run p.yaml sft")
    planner.manifest.save(list(planner.pipeline.stages))


def gate_failed(made: Made) -> None:
    made.publish("sft", {"train_loss": 1.0})
    made.publish("reward", {**reward.judge(SCORES), "accuracy": 0.55})


def blocked(made: Made) -> None:
    made.file.write_text(made.file.read_text().replace('    require: {accuracy: "> 0.6"}\n', ""))
    made.publish("sft", {"train_loss": 1.0})
    made.publish("reward", {**reward.judge(SCORES), "accuracy": 0.55, "n": 20.0})


def no_manifest(made: Made) -> None:
    all_done(made)
    (made.store.root / "clerk" / "manifest.json").unlink()


def outdated(made: Made) -> None:
    all_done(made)
    made.file.write_text(made.file.read_text().replace("policy: stage:sft", "policy: stage:sft\n    kl_coef: 0.2"))


def old_version(made: Made) -> None:
    all_done(made)
    (made.done["sft"].path / ".progress.jsonl").unlink()
    (made.done["reward"].path / "held_out_scores.jsonl").unlink()
    record = made.done["reward"].path / "artifact.json"
    old = json.loads(record.read_text())
    old["files"] = {}
    record.write_text(json.dumps(old))


def damaged(made: Made) -> None:
    all_done(made)
    (made.done["sft"].path / "curve.jsonl").write_text("cut")


@pytest.mark.parametrize(
    ("state", "statuses", "says"),
    [
        (lambda made: None, "new waits waits waits", ["Nothing has run yet; align run p.yaml starts it."]),
        (failed, "failed waits waits waits", [
            "sft failed: ValueError", "align run p.yaml sft", "no <b>such</b> tensor", "training 6.5",
        ]),
        (gate_failed, "done done blocked blocked", [
            "A gate of reward failed, so what depends on it does not run: accuracy: 0.55, must be > 0.6.",
        ]),
        (blocked, "done done blocked blocked", [
            "ppo does not start, as its gate failed: reward_above_chance: stage:reward tells 55.0%",
        ]),
        (no_manifest, "done done done done", ["ppo won", "accuracy: 0.7, must be > 0.6"]),
        (outdated, "done done outdated outdated", [
            "config: kl_coef 0.05 -> 0.2", "2 of 4 stages are up to date; out of date: ppo, evaluate",
                "Before the last change: ppo won",
        ]),
        (old_version, "done done done done", ["ppo won", "Its scores of held-out pairs were not kept"]),
        (damaged, "damaged done done done", ["sft is damaged", "has 3 bytes instead of", "cannot be planned now"]),
    ],
)  # fmt: skip
def test_every_state_has_its_sentence(
    tmp_path: Path, state: Callable[[Made], None], statuses: str, says: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = Made(tmp_path)
    state(made)
    text, facts = made_page(made)
    assert [stage.status for stage in facts.stages] == statuses.split()
    for sentence in says:
        assert sentence in Parsed(text).words, sentence
    assert Parsed(text).tags <= TAGS


def test_a_stage_that_is_being_made_and_one_that_was_stopped(tmp_path: Path) -> None:
    made = Made(tmp_path)
    key = made.planner().step("sft", {}).key
    assert key
    (made.store.work_path(key) / "scratch").mkdir(parents=True)
    write_log(made.store.work_path(key), [{"step": 1, "total": 9, "loss": 7.5}])
    text, facts = made_page(made)
    assert facts.stages[0].status == "unfinished" and "0 of 4 stages are up to date; not finished: sft" in text
    with made.store.lock(key, wait=False, say=print):
        text, facts = made_page(made)
    assert facts.stages[0].status == "running" and "sft is running now, started by" in text
    assert "training 7.5" in text, "its curve so far"


def test_after_a_run_only_its_targets_are_planned(tmp_path: Path) -> None:
    """The rows of the others may be large, or lie where nobody has been yet."""
    made = Made(tmp_path)
    all_done(made)
    (tmp_path / "rows.jsonl").write_text("changed")
    facts = gather(made.planner(), ["sft"])
    assert [stage.status for stage in facts.stages] == ["outdated", "done", "done", "done"] and not facts.problems


def test_a_pipeline_without_evaluate_and_a_comparison_of_its_models(tmp_path: Path) -> None:
    made = Made(tmp_path, "name: clerk\nmodel: file:base\nstages:\n  sft: {type: sft, data: file:rows.jsonl}\n")
    artifact = made.publish("sft", {"train_loss": 1.0})
    text, _ = made_page(made)
    assert "The one stage is up to date; no evaluation compares what it made." in text

    found = evaluation({"A": [0.0, 0.0], "B": [1.0, 1.0]}, {"B": 0.5}, "A")
    of_b = {"ref": f"stage:{artifact.key}", "digest": artifact.digest, "artifact": artifact.key}
    inputs = {"models.A": {"ref": "hub:x/y", "digest": "git:1", "artifact": None}, "models.B": of_b}
    work = made.store.work_path("evaluate-1") / "out"
    work.mkdir(parents=True)
    (work / "report.json").write_text(json.dumps(found["files"]["report.json"]))
    record = {**artifact.record, "kind": "report", "metrics": found["metrics"], "inputs": inputs}
    kept = {name: value for name, value in record.items() if name not in ("key", "digest", "files")}
    compared = made.store.publish("evaluate-1", kept)
    entry = {"status": "done", "artifact": compared.key, "digest": compared.digest}
    (made.store.root / ".compare").mkdir()
    (made.store.root / ".compare" / "manifest.json").write_text(json.dumps({"stages": {"compare": entry}}))
    text, _ = made_page(made)
    assert "B won (align compare): by the scorer it beats A in 100.0%" in text
    assert f"stage:{artifact.key}" in text, "what A and B are"


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_and_its_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    monkeypatch.chdir(tmp_path)
    made = Made(tmp_path)
    with pytest.raises(InputError, match=r"runs/clerk: there is no such folder .* `align run p.yaml` makes it"):
        report_cli.report(Path("p.yaml"), store=Path("runs"), out=None)
    made.publish("sft", {"train_loss": 1.0})
    report_cli.report(Path("p.yaml"), store=Path("runs"), out=None)
    assert capsys.readouterr().out == "report: runs/clerk/report.html\n"  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="no/such: there is no such folder .* name another file with -o"):
        report_cli.report(Path("p.yaml"), out=Path("no/such/r.html"), store=Path("runs"))
    with pytest.raises(InputError, match="base: is a folder; name the file, as in -o base/report.html"):
        report_cli.report(Path("p.yaml"), out=Path("base"), store=Path("runs"))
    with pytest.raises(InputError, match="rows.jsonl: there is no such folder"):
        report_cli.report(Path("p.yaml"), out=Path("rows.jsonl/r.html"), store=Path("runs"))
    with pytest.raises(InputError, match="p.yaml: is there and no page of align's"):
        report_cli.report(Path("p.yaml"), out=Path("base/../p.yaml"), store=Path("runs"))
    os.mkfifo("pipe")
    with pytest.raises(InputError, match="pipe: is there and no page"):
        report_cli.report(Path("p.yaml"), out=Path("pipe"), store=Path("runs"))
    Path("link.html").symlink_to("target.html")
    report_cli.report(Path("p.yaml"), out=Path("link.html"), store=Path("runs"))
    assert Path("link.html").is_symlink() and "<!doctype html>" in Path("target.html").read_text()
    with pytest.raises(ConfigError):
        report_cli.report(Path("p.yaml"), out=None, store=Path("runs"), overrides=["stages.sft.epoch=2"])


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = Made(tmp_path)
    before = report_cli.MARK.decode() + "the page before"
    Path("r.html").write_text(before)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match=r"r.html: cannot be written \(No space left on device\)"):
        report_cli.report(Path("p.yaml"), out=Path("r.html"), store=made.store.root)
    assert Path("r.html").read_text() == before and not list(tmp_path.glob(".r.html*"))


def test_every_run_writes_it_and_no_run_fails_by_it(tmp_path: Path, align: Align) -> None:
    """Toys that count: a run that fails, one that goes on, one whose page cannot be written, and --force."""
    text = "name: toys\nstages:\n  one: {type: toy, fail: defect}\n  two: {type: toy_report, models: {a: stage:one}}\n"
    (tmp_path / "p.yaml").write_text(text)
    result = align("run", "p.yaml")
    page_path = tmp_path / "runs" / "toys" / "report.html"
    assert result.returncode == 1 and result.stdout.endswith("report: runs/toys/report.html\n")
    words = Parsed(page_path.read_text()).words
    assert "one failed: RuntimeError: a defect of ours" in words
    assert "align run p.yaml" in words and "training 0.5" in words, "the curve so far"

    (tmp_path / "p.yaml").write_text(text.replace(", fail: defect", ""))
    result = align("run", "p.yaml")
    assert result.returncode == 0 and result.stdout.endswith("manifest.json\nreport: runs/toys/report.html\n")
    facts = Parsed(page_path.read_text())
    assert "All 2 stages are up to date; no evaluation compares what they made." in facts.words
    record = json.loads((tmp_path / "runs" / "toys" / "one" / "artifact.json").read_text())
    assert record["metrics"]["total"] in facts.values and record["resources"]["seconds"] in facts.values

    page_path.unlink()
    page_path.mkdir()
    result = align("run", "p.yaml", "--force", "one")
    assert (
        result.returncode == 0 and "warning: runs/toys/report.html was not written (IsADirectoryError" in result.stdout
    )
    logs = {path.parent.name.partition("~")[2] for path in (tmp_path / "runs" / "store").glob("toy-*/.progress.jsonl")}
    assert logs == {"", "1"}, "the log went aside with its artifact"
    assert not [line for path in (tmp_path / "runs" / "store").iterdir() for line in damages(path)]
    assert align("report", "p.yaml", "-o", "new.html").stdout == "report: new.html\n"
