"""Draw the table "Gold, KL and variety" of README.md beside it.

    python tests/benchmarks/plot.py     README.md -> frontier.svg

Gold over KL (logarithmic, so that best-of-n is seen), the distinct-2 of each point as its label.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

HERE = Path(__file__).parent
WIDTH, HEIGHT, LEFT, BELOW = 720, 420, 60, 40
KL, GOLD = (0.15, 30.0), (0.65, 1.0)
COLOURS = {"PPO": "#c2410c", "DPO": "#1d4ed8", "best of": "#15803d"}


def table() -> list[tuple[str, float, float, float]]:
    """Return name, gold, KL and distinct-2 of each row."""
    section = (HERE / "README.md").read_text("utf-8").split("## Gold, KL and variety")[1]
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", section, flags=re.M)
    return [(name, float(gold), float(kl), float(variety)) for name, gold, kl, variety in rows]


def place(kl: float, gold: float) -> tuple[float, float]:
    """Return where a point lies on the drawing."""
    right = math.log(kl / KL[0]) / math.log(KL[1] / KL[0])
    up = (gold - GOLD[0]) / (GOLD[1] - GOLD[0])
    return LEFT + right * (WIDTH - LEFT - 20), HEIGHT - BELOW - up * (HEIGHT - BELOW - 20)


def text(x: float, y: float, words: str, colour: str = "#333", anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" fill="{colour}" text-anchor="{anchor}">{words}</text>'


def drawing() -> str:
    parts = []
    for kl in (0.2, 0.5, 1, 2, 5, 10, 20):
        x, _ = place(kl, GOLD[0])
        parts.append(f'<line x1="{x:.0f}" y1="20" x2="{x:.0f}" y2="{HEIGHT - BELOW}" stroke="#ddd"/>')
        parts.append(text(x, HEIGHT - BELOW + 16, f"{kl:g}", anchor="middle"))
    for gold in (0.7, 0.8, 0.9, 1.0):
        _, y = place(KL[0], gold)
        parts.append(f'<line x1="{LEFT}" y1="{y:.0f}" x2="{WIDTH - 20}" y2="{y:.0f}" stroke="#ddd"/>')
        parts.append(text(LEFT - 8, y + 4, f"{gold:g}", anchor="end"))
    parts.append(
        text(WIDTH / 2, HEIGHT - 6, "KL to the base, nats a story (the labels are distinct-2)", anchor="middle")
    )
    parts.append(text(LEFT, 14, "gold: VADER compound"))
    for series, colour in COLOURS.items():
        rows = sorted((kl, gold, variety) for name, gold, kl, variety in table() if name.startswith(series))
        points = [place(kl, gold) for kl, gold, _ in rows]
        joined = " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}"/>')
        for (x, y), (_, _, variety) in zip(points, rows, strict=True):
            parts.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4" fill="{colour}"/>')
            parts.append(text(x + 7, y + 14, f"{variety:.2f}", colour))
        parts.append(text(points[0][0] - 7, points[0][1] - 8, series, colour, "end"))
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif" font-size="12">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>", ""])


if __name__ == "__main__":
    (HERE / "frontier.svg").write_text(drawing(), "utf-8")
