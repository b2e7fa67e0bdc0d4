"""The picture of ``dllm-engine eval --plot``: accuracy against forward passes, a line for each rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

_STYLES = {  # colours that stay apart for colour-blind readers (Okabe and Ito)
    "topk": ("LLaDA's schedule (top-k)", "#000000", "s"),
    "threshold": ("confidence threshold", "#0072B2", "o"),
    "factor": ("factor", "#E69F00", "^"),
    "learn2pd": ("learned filter", "#009E73", "D"),
    "oracle": ("oracle (knows top-k's answers)", "#CC79A7", "*"),
}
_OTHERS = (("#009E73", "D"), ("#D55E00", "v"), ("#56B4E9", "P"), ("#8C564B", "X"), ("#7F7F7F", "<"))


def pyplot() -> Any:
    """``matplotlib.pyplot`` for files.

    Raises:
        ImportError: matplotlib is not installed; names the extra that brings it.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError("--plot: matplotlib is not installed; pip install 'dllm-engine[plots]'") from None
    matplotlib.use("agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw(records: Sequence[dict[str, Any]], file: Path) -> None:
    """Write the PNG: a panel for each cache and end of text, the points of a rule joined by their passes.

    Points that stand apart bear their value: tokens a step, threshold or factor.
    """
    plt = pyplot()
    panels = list(dict.fromkeys((r["cache"], r["end_of_text"]) for r in records))
    rules = list(dict.fromkeys(r["rule"] for r in records))
    others = iter(_OTHERS * len(rules))
    styles = {rule: _STYLES.get(rule) or (rule, *next(others)) for rule in rules}
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.2 + 6.2 * len(panels), 4.8), sharey=True, squeeze=False, layout="constrained"
    )
    lines = {
        panel: {
            rule: sorted(
                (r for r in records if (r["cache"], r["end_of_text"], r["rule"]) == (*panel, rule)),
                key=lambda r: float(r["forward_passes"]),
            )
            for rule in rules
        }
        for panel in panels
    }
    for axis, panel in zip(axes[0], panels, strict=True):
        for rule, points in lines[panel].items():
            _line(axis, points, *styles[rule])
        _dress(axis, records)
        ends = len({end for _, end in panels}) > 1
        axis.set_title(f"cache: {panel[0]}" + (f", end of text: {panel[1]}" if ends else ""), loc="left", fontsize=11)
    first = records[0]
    axes[0][0].set_ylabel("right answers, %")
    figure.suptitle(f"Accuracy against forward passes, {first['prompts']:,} prompts", x=0.01, ha="left", weight="bold")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        title="numbers: tokens a step, threshold or factor; shaded: 95 % interval",
        title_fontsize=9,
        loc="outside lower center",
        ncols=min(3 * len(panels), len(labels)),
        frameon=False,
        fontsize=9.5,
    )
    figure.canvas.draw()  # settles the layout, so that pixels are known to the labels
    for axis, panel in zip(axes[0], panels, strict=True):
        _label(axis, lines[panel], {rule: style[1] for rule, style in styles.items()})
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _line(axis: Any, points: Sequence[dict[str, Any]], label: str, colour: str, marker: str) -> None:
    x = [r["forward_passes"] for r in points]
    low, y, high = ([100 * r[name] for r in points] for name in ("accuracy_low", "accuracy", "accuracy_high"))
    if len(points) > 1:
        axis.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
    else:
        axis.vlines(x, low, high, color=colour, alpha=0.4, linewidth=1.5)
    size = 13 if marker == "*" else 6.5
    axis.plot(x, y, color=colour, marker=marker, markersize=size, linewidth=1.6, label=label, markeredgecolor="white")


def _label(axis: Any, lines: dict[str, list[dict[str, Any]]], colours: dict[str, str]) -> None:
    """Write its value beside each point that stands apart; text never lies on a point, a line or other text."""
    pixel = axis.figure.dpi / 72  # a point of type
    inside = axis.get_window_extent()
    spots: list[tuple[float, float, str, str]] = []
    taken: list[tuple[float, float, float, float]] = []
    for rule, points in lines.items():
        at = [axis.transData.transform((r["forward_passes"], 100 * r["accuracy"])) for r in points]
        for (x, y), r in zip(at, points, strict=True):
            spots.append((x, y, "" if r["value"] is None else f"{r['value']:g}", colours[rule]))
            taken.append((x - 5 * pixel, y - 5 * pixel, x + 5 * pixel, y + 5 * pixel))
        for start, end in pairwise(at):
            steps = int(max(abs(end - start)) // (3 * pixel)) + 1
            for x, y in (start + (end - start) * i / steps for i in range(steps)):
                taken.append((x - pixel, y - pixel, x + pixel, y + pixel))
    for x, y, text, colour in spots:
        near = [s for s in spots if max(abs(s[0] - x), abs(s[1] - y)) < 7 * pixel]
        if not text or len(near) > 1:
            continue
        width, height = 5.0 * len(text) * pixel, 9 * pixel
        for right, up in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            left = x - width / 2 + right * (width / 2 + 8 * pixel)
            bottom = y - height / 2 + up * (height / 2 + 7 * pixel)
            box = (left, bottom, left + width, bottom + height)
            middle = (left + width / 2, bottom + height / 2)
            if min(spots, key=lambda s: math.dist(s[:2], middle))[:2] != (x, y):
                continue  # a reader would take it for another point's
            fits = inside.x0 < box[0] and box[2] < inside.x1 and inside.y0 < box[1] and box[3] < inside.y1
            if fits and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
                taken.append(box)
                spot = axis.transData.inverted().transform(middle)
                axis.text(*spot, text, fontsize=8, color=colour, ha="center", va="center")
                break


def _dress(axis: Any, records: Sequence[dict[str, Any]]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(r["forward_passes"] for r in records), max(r["forward_passes"] for r in records)
    axis.set_xscale("log")  # a pass saved counts more where few are left
    axis.set_xlim(low / 1.15, high * 1.15)
    ticks = [m * 10**e for e in range(-1, 6) for m in (1, 1.5, 2, 3, 4, 5, 7)]
    axis.xaxis.set_major_locator(FixedLocator([t for t in ticks if low / 1.15 <= t <= high * 1.15]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("forward passes per prompt (fewer is faster)")
    axis.grid(True, color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
