"""Train a Learn2PD filter on traces: minutes on a CPU, the same weights again under the same seed.

Differences to the published recipe (arXiv 2509.25188), which `kind="block"` follows: prompts, not steps, are split into
training, validation and test; decided positions are no part of a "position" filter's loss; and the operating threshold
is read off the validation prompts for a stated risk, the share of its commits that are wrong.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_engine.features import position_features
from dllm_engine.filter import HIDDEN, LearnedFilter

LEAST_RISK = 1e-9  # less cannot be told from any number of rows
BINS = 10


@dataclass(frozen=True)
class Figures:
    """How a filter does on rows (undecided positions of steps) it was not trained on.

    Attributes:
        rows: how many. final: share whose prediction was final. loss: cross-entropy, nats a row.
        threshold: operating point. committed: share of rows above it. wrong: share of those that were not final.
        found: share of the final ones above it. calibration: (mean probability, share final, rows) of ten equal bins.
    """

    rows: int
    final: float
    loss: float
    threshold: float
    committed: float
    wrong: float
    found: float
    calibration: list[tuple[float, float, int]]


def train(
    traces: dict[str, Tensor],
    *,
    kind: str = "position",
    risk: float = 0.0003,
    hidden: int = HIDDEN,
    epochs: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[LearnedFilter, dict[str, Figures]]:
    """Fit a filter to the traces of `traces.collect`.

    Args:
        kind: ``"position"`` (ours) or ``"block"`` (as published: full batch, AdamW, 3e-3).
        risk: share of wrong commits that the threshold may cause on the validation prompts, 0 to 1.
        hidden: units of a ``"position"`` filter.
        epochs: passes over the training rows; 60 for ``"position"``, 4,000 for ``"block"``.

    Returns:
        The filter with its threshold, and `Figures` of the "validation" and "test" prompts.

    Raises:
        ValueError: a bad argument, or fewer than ten prompts in the traces.

    Warns:
        UserWarning: too few validation rows to tell such a risk, a filter that commits nothing, or one that was wrong
            more often on the test prompts.
    """
    if not LEAST_RISK <= risk < 1:
        raise ValueError(f"risk: {risk} given; {LEAST_RISK:g} or more and less than 1 allowed")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs: {epochs} given; at least 1 is needed")
    if hidden < 1:
        raise ValueError(f"hidden: {hidden} given; at least 1 is needed")
    generator = torch.Generator().manual_seed(seed)
    parts = split(traces["prompt"], generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LearnedFilter(traces["final"].shape[1], kind=kind, hidden=hidden)
    inputs, final = _inputs(traces, kind), traces["final"]
    # as published, the block filter's loss counts decided positions too
    counted = traces["undecided"] if kind == "position" else torch.ones_like(final)
    fit = _fit_rows if kind == "position" else _fit_blocks
    fit(model, inputs[parts["train"]], final[parts["train"]], counted[parts["train"]], epochs, generator, progress)
    model.eval().requires_grad_(False)

    scored = {}
    for name in ("validation", "test"):
        undecided = traces["undecided"][parts[name]]
        scored[name] = model(inputs[parts[name]])[undecided].sigmoid(), final[parts[name]][undecided]
    model.threshold = threshold_for(*scored["validation"], risk)
    found = {name: figures(p, y, model.threshold) for name, (p, y) in scored.items()}
    _warn(found["validation"], found["test"], risk)
    return model, found


def split(prompt: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Masks over the steps, bool [N]: 80 % of the prompts train, 10 % validation, 10 % test."""
    count = int(prompt.max()) + 1
    if count < 10:
        raise ValueError(f"traces: of {count} prompts; at least 10 are needed to train, validate and test")
    tenth = torch.randperm(count, generator=generator)[prompt] * 10 // count
    return {"train": tenth < 8, "validation": tenth == 8, "test": tenth == 9}


def threshold_for(probability: Tensor, final: Tensor, risk: float) -> float:
    """The lowest threshold above which at most ``risk`` of the rows are not final; 1.0 if no threshold is that safe."""
    order = probability.argsort(descending=True, stable=True)
    p, wrong = probability[order].double(), (~final[order]).double().cumsum(0)
    counts = torch.arange(1, len(p) + 1)
    ends = torch.cat((p[:-1] > p[1:], torch.ones(1, dtype=torch.bool)))  # a threshold cannot part equal rows
    safe = torch.where(ends & (wrong / counts <= risk), counts, 0)
    n = int(safe.max())
    if n == 0:
        return 1.0
    below = float(p[n]) if n < len(p) else 0.0
    return (float(p[n - 1]) + below) / 2


def _warn(validation: Figures, test: Figures, risk: float) -> None:
    said, least = [], math.ceil(1 / risk)
    if validation.rows < least:
        said.append(f"{validation.rows:,} validation rows cannot tell it, at least {least:,} can: give more prompts")
    if validation.threshold == 1:
        said.append("no threshold is that safe on the validation prompts: the filter commits nothing")
    if test.wrong > risk:
        said.append(f"{100 * test.wrong:.3g} % of the filter's commits on the test prompts are wrong")
    if said:
        warnings.warn(f"risk: {risk} given; " + "; ".join(said), stacklevel=3)


def figures(probability: Tensor, final: Tensor, threshold: float) -> Figures:
    """`Figures` of rows with these probabilities [R] and labels bool [R]."""
    chosen = probability > threshold
    right, count = int((chosen & final).sum()), int(chosen.sum())
    bins = []
    place = (probability * BINS).long().clamp_max(BINS - 1)
    for i in range(BINS):
        here = place == i
        if here.any():
            bins.append((probability[here].mean().item(), final[here].float().mean().item(), int(here.sum())))
    return Figures(
        rows=len(final),
        final=final.float().mean().item(),
        loss=F.binary_cross_entropy(probability.clamp(1e-7, 1 - 1e-7), final.float()).item(),
        threshold=threshold,
        committed=chosen.float().mean().item(),
        wrong=1 - right / count if count else 0.0,
        found=right / max(1, int(final.sum())),
        calibration=bins,
    )


def describe(found: dict[str, Figures]) -> dict[str, Any]:
    """The figures as JSON values, for the filter's file."""
    return {name: asdict(values) for name, values in found.items()}


def plot(found: dict[str, Figures], file: Any) -> None:
    """Reliability diagram as PNG: what the filter says against what was true.

    Raises:
        ImportError: matplotlib (the extra ``plots``) is missing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, values in found.items():
        said, true, rows = zip(*values.calibration, strict=True)
        axes.plot(said, true, marker="o", label=f"{name} ({sum(rows):,} rows)")
        axes.axvline(values.threshold, color="0.5", linestyle=":", linewidth=1)
    axes.set(
        xlabel="probability by the filter", ylabel="share of predictions that were final", xlim=(0, 1), ylim=(0, 1)
    )
    axes.legend(loc="upper left")
    figure.savefig(file, dpi=120)


def _inputs(traces: dict[str, Tensor], kind: str) -> Tensor:
    if kind == "position":
        names = ("log_odds", "margin", "entropy", "undecided", "active", "stable")
        return position_features(*(traces[name] for name in names))
    return traces["log_odds"].sigmoid().masked_fill(~traces["active"], 0.0)


def _fit_rows(
    model: LearnedFilter,
    inputs: Tensor,
    final: Tensor,
    counted: Tensor,
    epochs: int | None,
    generator: torch.Generator,
    progress: bool,
) -> None:
    from tqdm import tqdm

    epochs, size, rate = epochs or 60, 2048, 5e-3
    x, y = inputs[counted], final[counted].float()
    batches = -(-len(x) // size)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * batches)
    for _ in tqdm(range(epochs), desc="filter", unit="epoch", disable=not progress or None):
        for rows in torch.randperm(len(x), generator=generator).split(size):
            optimiser.zero_grad()
            F.binary_cross_entropy_with_logits(model(x[rows]), y[rows]).backward()
            optimiser.step()
            schedule.step()


def _fit_blocks(
    model: LearnedFilter,
    inputs: Tensor,
    final: Tensor,
    counted: Tensor,
    epochs: int | None,
    generator: torch.Generator,
    progress: bool,
) -> None:
    from tqdm import tqdm

    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    weight = counted.float()
    for _ in tqdm(range(epochs or 4000), desc="filter", unit="epoch", disable=not progress or None):
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(model(inputs), final.float(), weight=weight).backward()
        optimiser.step()
