"""The report in a real browser: nothing runs, nothing is fetched, nothing overflows, the numbers are the artifacts'."""

from __future__ import annotations

import json
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from align_pipeline.pipeline import report_cli
from harness import align
from made import HOSTILE, Made, all_done
from tiny import write_tiny_model

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]
WIDE, NARROW = 1280, 390
SECTIONS = "flow gates warnings evaluation reward-models curves data resources lineage".split()
THINGS = ("tea", "jam", "soap", "rice", "salt", "milk", "figs", "nuts", "eggs", "oats", "corn", "beer")
PIPELINE = """\
name: shop
model: file:base
lora: {r: 4}
stages:
  sft: {type: sft, data: file:rows.jsonl, batch_size: 4, epochs: 2, learning_rate: 1e-2}
  reward: {type: reward, model: stage:sft, data: file:pairs.jsonl, batch_size: 4, epochs: 4, learning_rate: 1e-2}
  ppo:
    type: ppo
    policy: stage:sft
    reward: stage:reward
    prompts: file:prompts.jsonl
    episodes: 32
    batch_size: 8
    max_new_tokens: 6
    require: {reward_above_chance: off}
  evaluate:
    type: evaluate
    models: {sft: stage:sft, ppo: stage:ppo}
    baseline: sft
    scorer: stage:reward
    prompts: file:prompts.jsonl
    max_new_tokens: 6
"""
LOOK = """
const found = {};
for (const frame of document.querySelectorAll("iframe")) {
  const page = frame.contentWindow, doc = frame.contentDocument;
  for (const one of doc.querySelectorAll("details")) one.open = true;
  const wide = doc.documentElement.clientWidth;
  found[frame.name] = {
    title: doc.title,
    ran: page.ran === undefined && window.ran === undefined ? null : "a script ran",
    sections: [...doc.querySelectorAll("main > section")].map(one => one.id),
    values: [...doc.querySelectorAll("data")].map(one => one.value),
    words: doc.body.textContent,
    requests: page.performance.getEntriesByType("resource").map(one => one.name),
    active: doc.querySelectorAll("script, img, link, object, embed, iframe, form, [style], [onerror]").length,
    overflow: doc.scrollingElement.scrollWidth - wide,
    outside: [...doc.querySelectorAll("body *:not(.scroll *)")]
      .filter(one => one.getBoundingClientRect().right > wide + 1).map(one => one.outerHTML.slice(0, 80)),
    graphs: [...doc.querySelectorAll("svg.flow")].filter(one => one.getBoundingClientRect().width > 0).length,
    background: page.getComputedStyle(doc.body).backgroundColor,
    bullets: page.getComputedStyle(doc.querySelector("nav")).display,
  };
}
const text = document.createElement("pre");
text.textContent = JSON.stringify(found);
document.body.replaceChildren(text);
"""


def browse(folder: Path, pages: dict[str, Path], *, dark: bool = False) -> dict[str, dict[str, Any]]:
    """Open each page wide and narrow; return what the browser says of it, by `NAME WIDTH`."""
    frames = "".join(
        f'<iframe name="{name} {width}" src="{path.as_uri()}" width="{width}" height="900"></iframe>'
        for name, path in pages.items()
        for width in (WIDE, NARROW)
    )
    (folder / "look.html").write_text(f"<body>{frames}<script>onload = () => {{ {LOOK} }}</script>")
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
        "--allow-file-access-from-files", "--disable-background-networking", f"--user-data-dir={folder / 'profile'}",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []), (folder / "look.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    return json.loads(unescape(done.stdout.split("<pre>")[1].split("</pre>")[0]))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline whose four stages really ran, on a tiny model."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "base").mkdir()
    write_tiny_model(
        folder / "base", [f"where is the {one}? on the shelf" for one in THINGS], vocab_size=300, positions=64
    )
    asked = [f"where is the {one}?" for one in THINGS]
    write(folder / "prompts.jsonl", [{"prompt": one} for one in asked])
    write(folder / "rows.jsonl", [{"prompt": one, "completion": " shelf shelf"} for one in asked])
    write(folder / "pairs.jsonl", [{"prompt": one, "chosen": " shelf shelf", "rejected": " no"} for one in asked * 4])
    (folder / "p.yaml").write_text(PIPELINE)
    printed = align(folder, "run", "p.yaml")
    assert printed.endswith("report: runs/shop/report.html\n")
    return folder


def test_a_real_pipeline_and_a_hostile_one_are_pages_that_only_show(real: Path, tmp_path: Path) -> None:
    made = Made(tmp_path)
    all_done(made, text=HOSTILE)
    report_cli.report(made.file, tmp_path / "hostile.html", store=made.store.root)
    pages = {"real": real / "runs" / "shop" / "report.html", "hostile": tmp_path / "hostile.html"}
    seen = browse(tmp_path, pages)
    assert set(seen) == {f"{name} {width}" for name in pages for width in (WIDE, NARROW)}
    for name, page in seen.items():
        assert page["title"] == ("shop" if "real" in name else "clerk") + " – align report"
        assert page["ran"] is None and page["active"] == 0
        assert page["requests"] == []
        assert page["sections"] == SECTIONS
        assert page["overflow"] <= 0 and page["outside"] == [], name
        assert page["graphs"] == 1
        assert page["bullets"] == "flex", "the style sheet is the one that the policy allows"
    assert "<script>window.ran=1</script>" in seen["hostile 390"]["words"]

    values = {float(value) for value in seen["real 390"]["values"]}
    for stage in ("sft", "reward", "ppo", "evaluate"):
        record = json.loads((real / "runs" / "shop" / stage / "artifact.json").read_text())
        assert set(record["metrics"].values()) <= values
        assert record["resources"]["seconds"] in values and record["resources"]["peak_memory_bytes"] in values
        assert record["digest"] in seen["real 390"]["words"]


def test_it_is_dark_where_the_reader_wants_it(real: Path, tmp_path: Path) -> None:
    pages = {"real": real / "runs" / "shop" / "report.html"}
    light, dark = (
        sum(map(int, browse(tmp_path, pages, dark=on)[f"real {WIDE}"]["background"][4:-1].split(",")))
        for on in (False, True)
    )
    assert light > 600 and dark < 150
