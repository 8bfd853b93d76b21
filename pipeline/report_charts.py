"""Charts as inline SVG: no script, colours from the page's style sheet, the numbers in titles that a pointer shows.

Everything is made of `tag`, which escapes what it is given, so no name and no answer can become markup.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from markupsafe import Markup

from align_pipeline.pipeline.files import clean

Point = tuple[float, float]

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BELOW = 48, 18, 12, 36
BESIDE = 84
"""Left of distributions, for their names."""
MOST_POINTS = 160
"""Points of a line; more are drawn as the mean of each stretch inside the band of its least and largest value."""
COLOURS = 8


def flat(text: str) -> str:
    """Return text for one line of a drawing."""
    return " ".join(clean(text).split())


def tag(name: str, *inside: str, **attributes: str | float | None) -> Markup:
    """Return an element; text inside and attributes are escaped, None is left out, `class_` is `class`."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    content = "".join(one if isinstance(one, Markup) else escape(flat(one)) for one in inside)
    return Markup(f"<{name}{given}>{content}</{name}>")


def _attribute(value: str | float) -> str:
    return escape(flat(value)) if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")


@dataclass(frozen=True)
class Series:
    """Named points of one colour, ordered by x."""

    label: str
    points: Sequence[Point]
    colour: int = 0


@dataclass(frozen=True)
class Stretch:
    """Neighbouring points as one: their mean, between their least and their largest value."""

    x: float
    y: float
    low: float
    high: float


def drawable(value: float) -> bool:
    """Tell whether a number has a place in a chart; sums and differences of some finite ones are infinite."""
    return abs(value) < 1e100


def stretches(points: Sequence[Point], most: int = MOST_POINTS) -> list[Stretch]:
    """Return at most so many stretches; what cannot be drawn is left out."""
    finite = [(x, y) for x, y in points if drawable(x) and drawable(y)]
    count = min(most, len(finite))
    found = []
    for start, end in pairwise(len(finite) * i // count for i in range(count + 1)) if count else ():
        values = [y for _, y in finite[start:end]]
        x = finite[end - 1][0]  # a curve ends where the run ended
        found.append(Stretch(x, sum(values) / len(values), min(values), max(values)))
    return found


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers from `low` to `high`, at most `most` of them."""
    size = (high - low) / most
    power = 10.0 ** math.floor(math.log10(size))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10, 20) if factor * power >= size * (1 - 1e-9))
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """Return a number in few characters: `0.0003`, `1.2k`, `3e-05`."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g}k"
    return f"{value:.4g}" if value else "0"


@dataclass(frozen=True)
class Frame:
    """The area of a chart: where numbers lie in it."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    height: float = HEIGHT
    left: float = LEFT

    def x(self, value: float) -> float:
        return self.left + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - self.left - RIGHT)

    def y(self, value: float) -> float:
        up = (value - self.y_low) / (self.y_high - self.y_low)
        return self.height - BELOW - up * (self.height - TOP - BELOW)

    def x_axis(self, name: str, at: Sequence[float] | None = None) -> list[Markup]:
        """Return the numbers below the chart, and what they are."""
        bottom = self.height - BELOW
        parts = []
        for value in ticks(self.x_low, self.x_high) if at is None else at:
            x = self.x(value)
            parts.append(tag("line", class_="grid", x1=x, x2=x, y1=bottom, y2=bottom + 4.0))
            parts.append(tag("text", short(value), class_="tick", x=x, y=bottom + 16.0, text_anchor="middle"))
        middle = (self.left + WIDTH - RIGHT) / 2
        return [*parts, tag("text", name, class_="axis", x=middle, y=self.height - 4.0, text_anchor="middle")]

    def y_axis(self) -> list[Markup]:
        """Return the numbers beside the chart, and a line through it at each."""
        parts = []
        for value in ticks(self.y_low, self.y_high):
            y = self.y(value)
            parts.append(tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
            parts.append(tag("text", short(value), class_="tick", x=LEFT - 6, y=y + 3.5, text_anchor="end"))
        return parts


def _apart(low: float, high: float) -> tuple[float, float]:
    """Return ends that are far enough apart for a scale: equal values get room on both sides."""
    size = max(abs(low), abs(high))
    if high - low > max(size * 1e-6, 1e-100):
        return low, high
    half = size * 0.1 if size > 1e-99 else 0.5
    return low - half, high + half


def _frame(xs: Sequence[float], ys: Sequence[float], height: float = HEIGHT) -> Frame:
    """Return a frame around values, with a little room above and below."""
    low, high = _apart(min(ys), max(ys))
    room = (high - low) * 0.05
    low = 0.0 if 0 <= low < room else low - room
    return Frame(*_apart(min(xs), max(xs)), low, high + room, height)


def drawing(
    parts: Sequence[Markup],
    label: str,
    width: float = WIDTH,
    height: float = HEIGHT,
    class_: str = "",
    role: str = "img",
) -> Markup:
    """Return the whole SVG; `label` is what it says to who cannot see it, a `group` has links inside."""
    box, name = f"0 0 {width:.0f} {height:.0f}", f"chart {class_}".strip()
    return tag("svg", *parts, viewBox=box, width=width, height=height, class_=name, role=role, aria_label=label)


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


# --- curves -----------------------------------------------------------------------------------------------------------


def curves(series: Sequence[Series], label: str, x_label: str = "step") -> Markup:
    """Return lines over steps; of many points the mean line inside the band of all values."""
    drawn = [(one, stretches(one.points)) for one in series]
    drawn = [(one, found) for one, found in drawn if found]
    every = [stretch for _, found in drawn for stretch in found]
    frame = _frame([one.x for one in every], [value for one in every for value in (one.low, one.high)])
    parts = [*frame.y_axis(), *frame.x_axis(x_label)]
    for one, found in drawn:
        if any(stretch.low != stretch.high for stretch in found):
            above = [(frame.x(stretch.x), frame.y(stretch.high)) for stretch in found]
            below = [(frame.x(stretch.x), frame.y(stretch.low)) for stretch in reversed(found)]
            parts.append(tag("path", class_=f"band c{one.colour}", d=f"{_path([*above, *below])}Z"))
    for one, found in drawn:
        line = [(frame.x(stretch.x), frame.y(stretch.y)) for stretch in found]
        parts.append(tag("path", class_=f"line c{one.colour}", d=_path(line)))
        if len(found) <= 12:
            parts += [tag("circle", class_=f"dot c{one.colour}", cx=x, cy=y, r=2.5) for x, y in line]
    return drawing([*parts, *_hover(drawn, frame, x_label)], label)


def _hover(drawn: Sequence[tuple[Series, Sequence[Stretch]]], frame: Frame, x_label: str) -> list[Markup]:
    """Return transparent strips whose titles say the values at each step."""
    said: dict[float, list[str]] = {}
    for one, found in drawn:
        for stretch in found:
            spread = f" ({short(stretch.low)} to {short(stretch.high)})" if stretch.low != stretch.high else ""
            said.setdefault(stretch.x, []).append(f"{one.label} {stretch.y:.4g}{spread}")
    places = [frame.x(value) for value in sorted(said)]
    edges = [LEFT, *((a + b) / 2 for a, b in pairwise(places)), WIDTH - RIGHT]
    strips = []
    for (left, right), value in zip(pairwise(edges), sorted(said), strict=True):
        title = tag("title", f"{x_label} {value:,.0f}: {', '.join(said[value])}")
        strips.append(
            tag("rect", title, class_="hover", x=left, y=TOP, width=max(0.1, right - left),
                height=float(frame.height - TOP - BELOW))
        )  # fmt: skip
    return strips


# --- the frontier -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A point of the frontier: its KL to the baseline, its reward, and the interval of the reward."""

    label: str
    kl: float
    reward: float
    low: float
    high: float
    colour: int


def frontier(models: Sequence[Model], paths: Sequence[Series], label: str) -> Markup:
    """Return reward over KL: a point with its interval for each model, a line for each training."""
    lines = [(one, stretches(one.points)) for one in paths]
    xs = [0.0, *(model.kl for model in models), *(place.x for _, found in lines for place in found)]
    ys = [value for model in models for value in (model.low, model.high)]
    ys += [place.y for _, found in lines for place in found]
    frame = _frame([min(xs), max(xs) * 1.18 or 1.0], ys, HEIGHT + 80)  # with room for the last name
    parts = [*frame.y_axis(), *frame.x_axis("KL to the baseline, nats an answer")]
    for one, found in lines:
        places = [(frame.x(place.x), frame.y(place.y)) for place in found]
        parts.append(tag("path", class_=f"line path c{one.colour}", d=_path(places)))
        for (x, y), place in zip(places, found, strict=True):
            title = tag("title", f"{one.label}: reward {place.y:.3g} at KL {place.x:.3g}")
            parts.append(tag("circle", title, class_=f"dot small c{one.colour}", cx=x, cy=y, r=2.2))
    taken: list[Point] = []
    for model in models:
        x, y = frame.x(model.kl), frame.y(model.reward)
        said = f"{model.label}: reward {model.reward:.3g} [{model.low:.3g}, {model.high:.3g}] at KL {model.kl:.3g}"
        low, high = frame.y(model.low), frame.y(model.high)
        whole = [tag("title", said), tag("line", x1=x, x2=x, y1=low, y2=high)]
        whole += [tag("line", x1=x - 4, x2=x + 4, y1=end, y2=end) for end in (low, high)]
        whole.append(tag("circle", cx=x, cy=y, r=5.0))
        at = _free(x + 9, y - 7, taken)
        taken.append(at)
        whole.append(tag("text", _cut(model.label, 18), class_="name", x=at[0], y=at[1]))
        parts.append(tag("g", *whole, class_=f"model c{model.colour}"))
    return drawing(parts, label, height=HEIGHT + 80)


def _free(x: float, y: float, taken: Sequence[Point]) -> Point:
    """Return a place for a name below the names that are near."""
    while any(abs(x - other) < 90 and abs(y - height) < 13 for other, height in taken):
        y += 13
    return x, y


def _cut(text: str, most: int) -> str:
    text = flat(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


# --- distributions ----------------------------------------------------------------------------------------------------


def distributions(rows: Sequence[tuple[str, Sequence[float], int]], label: str, x_label: str, bins: int = 36) -> Markup:
    """Return a histogram for each named list of values, one below the other on one axis, their means marked."""
    every = [value for _, values, _ in rows for value in values]
    low, high = _apart(min(every), max(every))
    each, gap = 50.0, 10.0
    height = TOP + BELOW + len(rows) * each
    frame = Frame(low, high, 0.0, 1.0, height, BESIDE)
    counts = [_counts(values, low, high, bins) for _, values, _ in rows]
    tallest = max(count / len(values) for (_, values, _), row in zip(rows, counts, strict=True) for count in row)
    parts = frame.x_axis(x_label)
    width = (high - low) / bins
    for number, ((name, values, colour), row) in enumerate(zip(rows, counts, strict=True)):
        bottom = TOP + (number + 1) * each
        parts.append(tag("line", class_="grid", x1=frame.left, x2=WIDTH - RIGHT, y1=bottom, y2=bottom))
        for place, count in enumerate(row):
            if not count:
                continue
            left, right = low + place * width, low + (place + 1) * width
            tall = count / len(values) / tallest * (each - gap)
            title = tag("title", f"{name}: {count:,} of {len(values):,} from {left:.3g} to {right:.3g}")
            parts.append(
                tag("rect", title, class_=f"bar c{colour}", x=frame.x(left) + 0.4, y=bottom - tall,
                    width=frame.x(right) - frame.x(left) - 0.8, height=tall)
            )  # fmt: skip
        mean = sum(values) / len(values)
        title = tag("title", f"{name}: mean {mean:.4g} of {len(values):,}")
        x = frame.x(mean)
        parts.append(tag("line", title, class_="mean", x1=x, x2=x, y1=bottom - each + gap - 4, y2=bottom))
        parts.append(tag("text", _cut(name, 13), class_=f"name c{colour}", x=2.0, y=bottom - 4))
    return drawing(parts, label, height=height)


def _counts(values: Sequence[float], low: float, high: float, bins: int) -> list[int]:
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    return counts


# --- calibration ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bin:
    """Pairs of about one confidence: how sure the scores are, and how often they are right."""

    confidence: float
    accuracy: float
    count: int


def calibration(bins: Sequence[Bin], label: str) -> Markup:
    """Return accuracy over confidence; on the diagonal a model is as often right as it is sure."""
    frame = Frame(0.5, 1.0, min(0.5, *(one.accuracy for one in bins)), 1.0, HEIGHT + 60)
    parts = [*frame.y_axis(), *frame.x_axis("confidence of the scores", [0.5, 0.6, 0.7, 0.8, 0.9, 1.0])]
    diagonal = [(frame.x(value), frame.y(value)) for value in (0.5, 1.0)]
    parts.append(tag("path", class_="ideal", d=_path(diagonal)))
    places = [(frame.x(one.confidence), frame.y(one.accuracy)) for one in bins]
    parts.append(tag("path", class_="line c0", d=_path(places)))
    largest = max(one.count for one in bins)
    for one, (x, y) in zip(bins, places, strict=True):
        title = tag("title", f"{one.count:,} pairs: {one.confidence:.1%} sure, {one.accuracy:.1%} right")
        radius = 2.5 + 7 * math.sqrt(one.count / largest)
        parts.append(tag("circle", title, class_="dot c0", cx=x, cy=y, r=radius))
    return drawing(parts, label, height=HEIGHT + 60)


# --- the flow ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """A stage in the flow."""

    name: str
    type: str
    state: str
    """Its time, or why it has none."""
    status: str
    title: str
    needs: Sequence[str]
    link: str


@dataclass(frozen=True)
class Shape:
    """How large boxes are and how far apart, in the direction of the flow (`along`) and beside it (`across`)."""

    wide: float
    tall: float
    along: float
    across: float
    upright: bool

    @property
    def step(self) -> float:
        return self.along + (self.tall if self.upright else self.wide)

    @property
    def side(self) -> float:
        return self.wide if self.upright else self.tall

    def point(self, along: float, across: float) -> str:
        return f"{across:.1f} {along:.1f}" if self.upright else f"{along:.1f} {across:.1f}"


LANE = 10.0
"""Room beside boxes for an edge that passes them."""
ACROSS = Shape(wide=140, tall=52, along=44, across=18, upright=False)
UPRIGHT = Shape(wide=108, tall=50, along=34, across=10, upright=True)

Slot = tuple[str, int]
"""A stage and a layer: the stage's own, or one that an edge of it passes."""


def flow(boxes: Sequence[Box], label: str, shape: Shape) -> Markup:
    """Return the graph of stages; each comes after what it needs."""
    depth: dict[str, int] = {}
    for box in boxes:
        depth[box.name] = 1 + max((depth[other] for other in box.needs if other in depth), default=-1)
    routes = [
        [*((other, level) for level in range(depth[other], depth[box.name])), (box.name, depth[box.name])]
        for box in boxes
        for other in box.needs
        if other in depth
    ]
    middles, whole = _middles(routes, boxes, depth, shape)
    long = (max(depth.values()) + 1) * shape.step
    parts = [tag("path", class_="edge", d=_edge(route, middles, shape)) for route in routes]
    for box in boxes:
        along, across = _start(depth[box.name], shape), middles[box.name, depth[box.name]] - shape.side / 2
        x, y = (across, along) if shape.upright else (along, across)
        parts.append(_box(box, x, y, shape))
    return drawing(parts, label, *((whole, long) if shape.upright else (long, whole)), class_="flow", role="group")


def _start(level: int, shape: Shape) -> float:
    return level * shape.step + shape.along / 2


def _middles(
    routes: Sequence[Sequence[Slot]], boxes: Sequence[Box], depth: Mapping[str, int], shape: Shape
) -> tuple[dict[Slot, float], float]:
    """Return where the middle of each slot lies across the flow, near what leads to it, and how wide all is."""
    layers: list[list[Slot]] = [[] for _ in range(max(depth.values()) + 1)]
    before: dict[Slot, list[Slot]] = {}
    for slot in [*((box.name, depth[box.name]) for box in boxes), *(slot for route in routes for slot in route)]:
        if slot not in layers[slot[1]]:
            layers[slot[1]].append(slot)
    for route in routes:
        for first, second in pairwise(route):
            before.setdefault(second, []).append(first)

    def room(slot: Slot) -> float:
        return (shape.side if depth[slot[0]] == slot[1] else LANE) + shape.across

    whole = max(sum(map(room, layer)) for layer in layers)
    middles: dict[Slot, float] = {}
    for layer in layers:
        wanted = {slot: [middles[one] for one in before.get(slot, ())] for slot in layer}
        layer.sort(key=lambda slot: sum(wanted[slot]) / max(1, len(wanted[slot])))
        at = (whole - sum(map(room, layer))) / 2
        for slot in layer:
            middles[slot] = at + room(slot) / 2
            at += room(slot)
    return middles, whole


def _edge(route: Sequence[Slot], middles: Mapping[Slot, float], shape: Shape) -> str:
    """Return a curve from the end of the first slot to the start of the last, straight through those between."""
    size = shape.step - shape.along
    along, across = _start(route[0][1], shape) + size, middles[route[0]]
    path = f"M{shape.point(along, across)}"
    for slot in route[1:]:
        there, aside = _start(slot[1], shape), middles[slot]
        half = (along + there) / 2
        path += f"C{shape.point(half, across)} {shape.point(half, aside)} {shape.point(there, aside)}"
        along, across = there + size, aside
        if slot is not route[-1]:
            path += f"L{shape.point(along, across)}"
    return path


def _box(box: Box, x: float, y: float, shape: Shape) -> Markup:
    wide, tall = shape.wide, shape.tall
    under = f"{box.type} · {box.state}"
    if box.type == box.name or len(under) > (wide - 16) / 5.8:
        under = box.state
    inside = [
        tag("title", box.title),
        tag("rect", x=x, y=y, width=wide, height=tall, rx=8.0),
        tag("circle", class_="light", cx=x + 13, cy=y + 18, r=4.5),
        tag("text", _cut(box.name, int((wide - 26) / 7.8)), class_="name", x=x + 24, y=y + 22),
        tag("text", under, class_="under", x=x + 10, y=y + 40),
    ]
    return tag("a", *inside, href=f"#{box.link}", class_=f"box is-{box.status}")


def share_bar(share: float, label: str) -> Markup:
    """Return a bar as long as a share of the whole."""
    full = tag("rect", class_="track", x=0.0, y=0.0, width=100.0, height=8.0, rx=4.0)
    part = tag("rect", class_="fill", x=0.0, y=0.0, width=max(1.0, 100 * share), height=8.0, rx=4.0)
    return drawing([full, part], label, 100.0, 8.0, "share")


def colours(names: Sequence[str]) -> Mapping[str, int]:
    """Return a colour for each name, in their order."""
    return {name: number % COLOURS for number, name in enumerate(names)}
