"""The charts of a comparison's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tlora.report import svg
from tlora.report.comparison import Curve, Results

_PANEL = (168, 124)
_LEFT, _RIGHT, _TOP, _BOTTOM = 36, 14, 8, 22


def strips(results: Results) -> dict[str, str]:
    """Return charts of each method's scores on a shared axis."""
    scored = [(m, m.score) for m in results.methods if m.score is not None]
    values = [v for m, _ in scored for v in m.scores.values()]
    values += [
        end for _, s in scored for end in (s.low, s.high) if end is not None and _near(end, values)
    ]
    scale = svg.Scale.over(values, 0, 1)
    name = results.comparison.metric
    return {
        m.label: svg.strip(
            score,
            [*m.scores.values()],
            (scale.low, scale.high),
            f"{m.label}: {name} of each seed "
            + ", ".join(f"{value:.4f}" for value in m.scores.values()),
        )
        for m, score in scored
    }


def _near(end: float, values: Sequence[float]) -> bool:
    """Whether an interval's end lies within one score range of the scores; the wide intervals of
    two seeds would flatten everything else."""
    low, high = min(values), max(values)
    return low - (high - low) <= end <= high + (high - low)


def learning_rates(results: Results) -> dict[str, str]:
    """Return charts of each method's validation score against the learning rate."""
    lines = {m.label: sorted(m.tuning_means.items()) for m in results.methods}
    tried = [rate for m in results.methods for rate in m.tuning]
    scores = [s for m in results.methods for row in m.tuning.values() for s in row if s is not None]
    if not scores:
        return {}
    frame = _frame(tried, scores, log_y=False)
    ticks = [(value, svg.short(value)) for value in frame.x.ticks(3)]
    drawn = {}
    for method in results.methods:
        seeds = [(r, s) for r, row in method.tuning.items() for s in row if s is not None]
        others = [line for label, line in lines.items() if label != method.label]
        parts = frame.axes(ticks, frame.y.ticks(3))
        parts += svg.lines(frame, lines[method.label], others, svg.dots(frame, seeds, "seed"))
        if method.learning_rate is not None:
            best = (method.learning_rate, method.tuning_means[method.learning_rate])
            parts += svg.dots(frame, [best], "chosen", 5)
        said = ", ".join(f"{score:.4f} at {rate:g}" for rate, score in lines[method.label])
        drawn[method.label] = svg.panel(
            frame, parts, f"{method.label}: mean validation {results.comparison.metric} {said}"
        )
    return drawn


def curves(results: Results) -> dict[str, str]:
    """Return charts of each method's training loss by step, averaged over the final seeds."""
    return losses({m.label: m.curve("loss") for m in results.methods})


def losses(lines: Mapping[str, Curve]) -> dict[str, str]:
    """Return charts of each method's training loss by step, with the others in gray."""
    lines = {label: [(s, v) for s, v in line if v > 0] for label, line in lines.items()}
    steps = [step for line in lines.values() for step, _ in line]
    values = [loss for line in lines.values() for _, loss in line]
    if not values:
        return {}
    frame = _frame(steps, values, log_y=True, log_x=False)
    ticks = [(value, svg.short(value)) for value in frame.x.ticks(3) if value == int(value)]
    drawn = {}
    for label, line in lines.items():
        if line:
            others = [other for name, other in lines.items() if name != label]
            parts = [*frame.axes(ticks, frame.y.ticks(3)), *svg.lines(frame, line, others, [])]
            said = f"from {line[0][1]:.3g} at step {line[0][0]:g} to {line[-1][1]:.3g}"
            drawn[label] = svg.panel(frame, parts, f"{label}: training loss {said}")
    return drawn


def panels(curves: Mapping[str, Sequence[Curve]], about: str, log_y: bool = True) -> dict[str, str]:
    """Return charts with one line per module and shared axes, by caption.

    Args:
        curves: the lines, by caption; the x axis marks whole numbers.
        about: description of the lines, for screen readers.
        log_y: whether the y axis is logarithmic.
    """
    points = [point for lines in curves.values() for line in lines for point in line]
    if not points:
        return {}
    frame = _frame([x for x, _ in points], [y for _, y in points], log_y, log_x=False)
    ticks = [(value, svg.short(value)) for value in frame.x.ticks(4) if value == int(value)]
    drawn = {}
    for caption, lines in curves.items():
        parts = frame.axes(ticks, frame.y.ticks(4))
        for line in lines:
            parts += svg.lines(frame, line, [], [])
        drawn[caption] = svg.panel(frame, parts, f"{caption}: {about}, {len(lines)} modules")
    return drawn


def parameters(results: Results, width: int) -> str:
    """Return the test score against trainable parameters by method, ``width`` pixels wide."""
    points = [
        (float(m.parameters), m.score.mean, m.label)
        for m in results.methods
        if m.score is not None and m.parameters
    ]
    if not points:
        return ""
    height = 340
    frame = svg.Frame(
        svg.Scale.over([x for x, *_ in points], 48, width - 14, log=True),
        svg.Scale.over([y for _, y, _ in points], height - 42, 24),
        width,
        height,
    )
    ticks = [(value, svg.short(value)) for value in frame.x.ticks(5 if width > 500 else 3)]
    parts = frame.axes(ticks, frame.y.ticks(5)) + svg.labeled(frame, points)
    parts += svg.caption(frame, "trainable parameters", f"test {results.comparison.metric}")
    said = "; ".join(f"{name} {x:,.0f}, {y:.4f}" for x, y, name in points)
    return svg.panel(frame, parts, f"Trainable parameters and test score: {said}")


def _frame(xs: Sequence[float], ys: Sequence[float], log_y: bool, log_x: bool = True) -> svg.Frame:
    width, height = _PANEL
    return svg.Frame(
        svg.Scale.over(xs, _LEFT, width - _RIGHT, log=log_x),
        svg.Scale.over(ys, height - _BOTTOM, _TOP, log=log_y),
        width,
        height,
    )
