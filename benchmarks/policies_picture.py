"""The picture of policies_report.py: accuracy against tokens per forward, the mean and a panel for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm_engine.cli_plot import pyplot

_COLOURS = (  # dark enough for thin lines, far apart in hue or lightness; the marker tells neighbours apart
    "#000000", "#8C8C8C", "#0072B2", "#E69F00", "#009E73", "#5B4636", "#B08D57", "#CC79A7", "#56B4E9", "#D55E00",
    "#7B3294", "#1B7837", "#B2182B", "#35978F", "#C51B7D", "#4D4DFF", "#7FBC41", "#8C510A", "#F46D43", "#01665E",
)  # fmt: skip
_MARKERS = "osD^vP*X<>"
_COLUMNS = 4


def draw(
    records: Sequence[dict[str, Any]], named: Sequence[dict[str, Any]], titles: Mapping[str, str], file: Path
) -> None:
    """Write the PNG: settings with the dual cache, those of a rule joined, its default large.

    Args:
        records, named: as `policies_report.record` makes them; ``named`` bear their setting in the mean's panel.
        titles: of the tasks' panels, by task.
    """
    plt = pyplot()
    drawn = [r for r in records if r["cache"] == "dual"] or list(records)
    rules = list(dict.fromkeys(r["rule"] for r in drawn))
    styles = {
        rule: (_COLOURS[i % len(_COLOURS)], _MARKERS[(i + i // len(_COLOURS)) % len(_MARKERS)])
        for i, rule in enumerate(rules)
    }
    panels = list(titles)
    beside = 2 * (_COLUMNS - 2)  # panels on the right of the mean's, which takes two rows of two
    half = beside // 2
    rows = [["mean", "mean", *panels[:half]], ["mean", "mean", *panels[half:beside]]]
    rows += [panels[first : first + _COLUMNS] for first in range(beside, len(panels), _COLUMNS)]
    rows = [row + ["."] * (_COLUMNS - len(row)) for row in rows]
    figure, axes = plt.subplot_mosaic(rows, figsize=(4.1 * _COLUMNS, 3.3 * len(rows) + 1.2), layout="constrained")
    for name, axis in axes.items():
        large = name == "mean"
        for rule in rules:
            points = [(r["figures"][name], r["default"]) for r in drawn if r["rule"] == rule]
            _line(axis, points, rule, *styles[rule], size=9 if large else 6)
        _dress(axis, "mean of the learned tasks" if large else titles[name], large)
    _crop(axes["mean"], drawn)
    _name(axes["mean"], [r for r in named if r in drawn], styles)
    for axis in axes.values():
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("right answers, %")
    first = drawn[0]["figures"]
    count = next(first[task]["prompts"] for task in titles)
    figure.suptitle(
        f"Every rule with the dual cache: accuracy against tokens per forward, {count} questions a task",
        x=0.01, ha="left", weight="bold",
    )  # fmt: skip
    handles, labels = axes["mean"].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=10, frameon=False, fontsize=10,
        title="large: the rule's default; upright lines: 95 % interval; named: not beaten in both at once",
    )  # fmt: skip
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _line(
    axis: Any, points: Sequence[tuple[dict[str, Any], bool]], label: str, colour: str, marker: str, size: float
) -> None:
    points = sorted(points, key=lambda point: float(point[0]["tokens_per_forward"]))
    x = [figures["tokens_per_forward"] for figures, _ in points]
    low, y, high = ([100 * f[name] for f, _ in points] for name in ("accuracy_low", "accuracy", "accuracy_high"))
    axis.vlines(x, low, high, color=colour, alpha=0.15, linewidth=1.2)
    style = {"color": colour, "marker": marker, "markeredgecolor": "white", "markeredgewidth": 0.6}
    axis.plot(x, y, linewidth=1.1, alpha=0.9, markersize=0.65 * size, label=label, **style)
    default = [(a, b) for a, b, (_, is_default) in zip(x, y, points, strict=True) if is_default]
    if default:
        axis.plot(*zip(*default, strict=True), linestyle="none", markersize=size, **style)


def _crop(axis: Any, records: Sequence[dict[str, Any]]) -> None:
    """Rules that are never within 30 points of the best would press all others into a line; their names stay."""
    best: dict[str, float] = {}
    for r in records:
        best[r["rule"]] = max(best.get(r["rule"], 0.0), 100 * r["figures"]["mean"]["accuracy"])
    far = [rule for rule, height in best.items() if height < max(best.values()) - 30]
    shown = [100 * r["figures"]["mean"]["accuracy"] for r in records if r["rule"] not in far]
    if far:
        axis.set_ylim(max(-3.0, min(shown) - 5), 101)
        axis.set_title(axis.get_title("left") + f" (below the edge: {', '.join(far)})", loc="left", fontsize=12)


def _name(axis: Any, records: Sequence[dict[str, Any]], styles: Mapping[str, tuple[str, str]]) -> None:
    """Settings beside their points, each on a height of its own so that no two names meet."""
    ordered = sorted(records, key=lambda r: -float(r["figures"]["mean"]["accuracy"]))
    for i, r in enumerate(ordered):
        at = (r["figures"]["mean"]["tokens_per_forward"], 100 * r["figures"]["mean"]["accuracy"])
        axis.annotate(
            r["setting"], at, xytext=(0.99, 0.985 - 0.045 * i), textcoords="axes fraction", ha="right", va="top",
            fontsize=8.5, color=styles[r["rule"]][0],
            arrowprops={"arrowstyle": "-", "color": styles[r["rule"]][0], "alpha": 0.45, "linewidth": 0.7},
        )  # fmt: skip


def _dress(axis: Any, title: str, large: bool) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_xscale("log", base=2)
    low, high = axis.get_xlim()
    if large:
        axis.set_xlim(low, high * 1.9)  # room for the names
    ticks = [t for t in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32) if low <= t <= high]
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_ylim(-3, 103)
    axis.set_title(title, loc="left", fontsize=12 if large else 10.5)
    axis.set_xlabel("tokens per forward (more is faster)", fontsize=9)
    axis.grid(True, color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
