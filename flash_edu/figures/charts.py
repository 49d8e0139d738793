"""Pictures of numbers: a softmax as it grows, memory against length, values side by side, a roofline, losses."""

from itertools import cycle

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator, NullLocator

from flash_edu.figures.playing import Player, by_gid, player
from flash_edu.figures.style import (
    COLOURS,
    HATCH,
    INK,
    QUIET,
    as_sentences,
    drawn,
    human_bytes,
    listed,
    no_frame,
    picture,
    readable_on,
)


@drawn
def softmax_evolution(history: list[dict], *, title: str | None = None) -> Figure:
    """One row of attention, block by block: m, l, the weights after each block, and O if it was recorded.

    history: a dict per block, {"scores": the block, "m": m, "l": l} and perhaps "o": the row of O so far. m
    and l are those after the block. The weights are exp(score - m) / l of all scores seen so far.
    """
    scores = [_numbers(step["scores"]) for step in history]
    m, l = (np.array([float(step[name]) for step in history]) for name in ("m", "l"))
    ends = np.cumsum([len(block) for block in scores])
    has_o = all("o" in step for step in history)
    fig = picture(7.6 if has_o else 6, 3.5)
    panels = fig.subplot_mosaic(
        [["m", "w"], ["l", "w"]] if not has_o else [["m", "w", "o"], ["l", "w", "o"]],
        width_ratios=[1.05, 1.25, 0.85] if has_o else [1, 1.3],
    )
    _draw_scores(panels["m"], np.concatenate(scores), m, ends)
    _draw_sum(panels["l"], l)
    _draw_weights(panels["w"], np.concatenate(scores), m, l, ends)
    if has_o:
        _draw_output(panels["o"], np.stack([_numbers(step["o"]) for step in history]))
    if title:
        fig.suptitle(title, x=0.02, ha="left", fontsize=11)
    blocks = f"{len(ends)} block" + ("s" if len(ends) != 1 else "")
    story = f"A softmax over {ends[-1]} scores in {blocks}: {softmax_in_words(history, len(ends))}"
    path = f"m went {', '.join(f'{x:.3g}' for x in m)}; l went {', '.join(f'{x:.3g}' for x in l)}"
    fig.description = as_sentences(title, story, path if len(ends) <= 8 else None)
    return fig


@drawn
def play_softmax(history: list[dict], *, title: str | None = None) -> Player:
    """`softmax_evolution`, one block after the other."""
    fig = softmax_evolution(history, title=title)
    return player(_block_by_block(fig, history), fig, pause_ms=1200)


def _block_by_block(fig: Figure, history: list[dict]):
    for ax in fig.axes:
        ax.autoscale(False)
    (scores,), (m,) = by_gid(fig, "scores"), by_gid(fig, "m")
    (x, y), stairs = scores.get_data(), m.get_data()
    curves = [(line, *line.get_data()) for line in by_gid(fig, "o")]
    below = by_gid(fig, "weight") + by_gid(fig, "unseen")  # a row of the panel for each block
    ends = np.cumsum([len(_numbers(step["scores"])) for step in history])
    for block, end in enumerate(ends, start=1):
        scores.set_data(x[:end], y[:end])
        m.set_data(stairs.values[:block], stairs.edges[: block + 1])
        for artist in below:
            artist.set_visible(_height_of(artist) < block + 0.5)
        for artist in by_gid(fig, "l"):
            artist.set_visible(_place_of(artist) < block + 0.5)
        for line, steps, values in curves:
            line.set_data(steps[:block], values[:block])
        for line in by_gid(fig, "o at the end"):
            line.set_visible(block == len(history))
        said = softmax_in_words(history, block)
        yield f"{said[0].upper()}{said[1:]}."


def _height_of(artist) -> float:
    """Of a square its upper edge, of a number its middle."""
    return artist.get_y() if isinstance(artist, Rectangle) else artist.get_position()[1]


def _place_of(artist) -> float:
    return artist.get_x() if isinstance(artist, Rectangle) else artist.get_position()[0]


def softmax_in_words(history: list[dict], blocks: int) -> str:
    """Where m, l, the weights and O stand after so many blocks."""
    step = history[blocks - 1]
    m, l = float(step["m"]), float(step["l"])
    said = f"after block {blocks}, m = {m:.3g}, l = {l:.3g}"
    scores = np.concatenate([_numbers(past["scores"]) for past in history[:blocks]])
    if len(scores) <= 8:
        said += f", weights {_row(np.exp(scores - m) / l)}"
    if "o" in step and len(o := _numbers(step["o"])) <= 8:
        said += f", O {_row(o)}"
    return said


def _row(numbers) -> str:
    return f"[{', '.join(f'{x:.2f}' for x in numbers)}]"


def _numbers(x) -> np.ndarray:
    return torch.as_tensor(x).detach().cpu().double().flatten().numpy()


def _draw_scores(ax, scores: np.ndarray, m: np.ndarray, ends: np.ndarray) -> None:
    starts = np.concatenate([[0], ends[:-1]])
    for start, end, shade in zip(starts, ends, np.arange(len(ends)) % 2):
        ax.axvspan(start - 0.5, end - 0.5, color="#F1F1F1" if shade else "white", linewidth=0)
    ax.plot(scores, "o", color=QUIET, markersize=4.5 if len(scores) <= 32 else 2.5, label="score", gid="scores")
    edges = np.concatenate([starts, ends[-1:]]) - 0.5
    ax.stairs(m, edges, baseline=None, color=COLOURS[1], linewidth=2, label="m", gid="m")
    ax.set(title="m, the largest so far", xlim=(-0.5, ends[-1] - 0.5), ylabel="score")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    ax.set_xlabel("key")


def _draw_sum(ax, l: np.ndarray) -> None:
    steps = np.arange(1, len(l) + 1)
    ax.bar(steps, l, color=COLOURS[0], width=0.6, gid="l")
    if len(l) <= 6:
        for x, y in zip(steps, l):
            ax.text(x, y, f"{y:.3g}", ha="center", va="bottom", fontsize=8, gid="l")
    ax.set(title="l, sum of exp(score - m)", xlabel="after block", ylim=(0, l.max() * 1.22))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _draw_weights(ax, scores: np.ndarray, m: np.ndarray, l: np.ndarray, ends: np.ndarray) -> None:
    shade = colormaps["Blues"]
    for step, end in enumerate(ends):
        seen = np.exp(scores[:end] - m[step]) / l[step]
        for j, weight in enumerate(seen):
            fill = shade(0.85 * weight)
            ax.add_patch(Rectangle((j - 0.5, step + 0.54), 1, 0.92, facecolor=fill, gid="weight"))
            if len(scores) <= 8:
                style = {"ha": "center", "va": "center", "fontsize": 8.5, "color": readable_on(fill)}
                style["gid"] = "weight"
                ax.text(j, step + 1, f"{weight:.2f}", **style)
        if end < len(scores):
            ax.add_patch(Rectangle((end - 0.5, step + 0.54), len(scores) - end, 0.92, gid="unseen", **HATCH))
    ax.set(xlim=(-0.5, len(scores) - 0.5), ylim=(len(ends) + 0.5, 0.5), xlabel="key")
    ax.set_ylabel("after block", labelpad=10)  # there are no tick marks to keep it off the numbers
    ax.set_title("weights: exp(score - m) / l")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    no_frame(ax)


def _draw_output(ax, o: np.ndarray) -> None:
    steps = np.arange(1, len(o) + 1)
    for column in range(min(o.shape[1], len(COLOURS))):
        ax.plot(steps, o[:, column], "o-", color=COLOURS[column], markersize=4, gid="o")
        ax.axhline(o[-1, column], color=COLOURS[column], linewidth=0.8, linestyle=":", gid="o at the end")
    ax.set(title="O, the row so far", xlabel="after block", ylabel="value")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))


@drawn
def memory_curve(
    curves: dict[str, tuple[list[int], list[float]]], *, title: str | None = None, ylabel: str = "memory"
) -> Figure:
    """{name: (lengths, bytes)} on logarithmic axes, with the slopes of N and N^2 to compare by."""
    fig = picture()
    ax = fig.subplots()
    draw_memory(ax, curves)
    ax.set(xlabel="N, sequence length (tokens)", ylabel=ylabel)
    if title:
        ax.set_title(title)
    ends = (f"{name}, {_curve_in_words(*curve)}" for name, curve in curves.items())
    fig.description = as_sentences(title, f"{ylabel.capitalize()} against sequence length: {'; '.join(ends)}")
    return fig


def _curve_in_words(ns, nbytes) -> str:
    (first, *_, last), (low, *_, high) = (ns, nbytes) if len(ns) > 1 else (list(ns) * 2, list(nbytes) * 2)
    return f"{human_bytes(low)} at {first:,} to {human_bytes(high)} at {last:,}"


def draw_memory(ax, curves: dict[str, tuple[list[int], list[float]]]) -> None:
    """The picture without its labels."""
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    lengths = sorted({n for ns, _ in curves.values() for n in ns})
    values = [b for _, bs in curves.values() for b in bs if b > 0]
    for marker, (name, (ns, nbytes)) in zip("osD^vP*X", curves.items()):
        ax.plot(ns, nbytes, marker=marker, markersize=5, label=name)
    _draw_slopes(ax, curves)
    ax.set_xticks(lengths[:: -(-len(lengths) // 7)], [f"{n:,}" for n in lengths[:: -(-len(lengths) // 7)]])
    ax.xaxis.set_minor_locator(NullLocator())
    powers = range(int(np.floor(np.log2(min(values)))), int(np.ceil(np.log2(max(values)))) + 1)
    ticks = [2.0**p for p in powers][:: -(-len(powers) // 7)]
    ax.set_yticks(ticks, [human_bytes(t) for t in ticks])
    ax.grid(True, axis="y", color="#E6E6E6", linewidth=0.8)
    ax.legend(loc="upper left")


def _draw_slopes(ax, curves: dict[str, tuple[list[int], list[float]]]) -> None:
    """A dotted line of slope N and one of slope N^2, through the last point of the curve each fits best."""
    limits = ax.get_ylim()
    for power in (1, 2):
        ns, nbytes = min(curves.values(), key=lambda curve: abs(_slope(*curve) - power))
        x = np.array([ns[0], ns[-1]], dtype=float)
        y = nbytes[-1] * (x / ns[-1]) ** power
        ax.plot(x, y, ":", color=QUIET, linewidth=1.2, zorder=1, gid=f"slope {power}")
        label = "grows as N" if power == 1 else "grows as N²"
        style = {"textcoords": "offset points", "color": QUIET, "fontsize": 8.5, "va": "center"}
        ax.annotate(label, (x[-1], y[-1]), (6, 0), **style)
    ax.set_ylim(limits)


def _slope(ns, nbytes) -> float:
    return float(np.polyfit(np.log(ns), np.log(nbytes), 1)[0]) if len(ns) > 1 else 0.0


@drawn
def bars(values: dict[str, float], unit: str, *, title: str | None = None, log: bool = False) -> Figure:
    """A horizontal bar for each value, with its number. Unit "B" is written as KiB, MiB, GiB."""
    fig = picture(6, max(1.4, 0.42 * len(values) + 0.8))
    ax = fig.subplots()
    names, numbers = list(values), [float(x) for x in values.values()]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
    labels = [human_bytes(x) if unit == "B" else f"{_short(x)} {unit}" for x in numbers]
    ax.barh(names, numbers, color=colours, height=0.62, log=log)
    for i, (x, label) in enumerate(zip(numbers, labels)):
        ax.annotate(label, (x, i), (5, 0), textcoords="offset points", va="center", fontsize=9)
    ax.invert_yaxis()
    ax.margins(x=0.18)
    if unit == "B":
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: human_bytes(x)))
        ax.xaxis.set_major_locator(_byte_ticks(max(numbers, default=1))) if not log else None
    fig.description = as_sentences(title, "Bars: " + listed(f"{n} {x}" for n, x in zip(names, labels)))
    ax.set_xlabel("" if unit == "B" else unit)  # bytes have theirs on the ticks
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    if title:
        ax.set_title(title)
    return fig


def _short(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def _byte_ticks(largest: float):
    """Ticks at round numbers of KiB, MiB, ..., which are not round numbers of bytes."""
    unit = 1024.0 ** int(np.log(max(largest, 1)) / np.log(1024))
    rough = largest / unit / 4
    nice = 10.0 ** np.floor(np.log10(rough))
    return MultipleLocator(unit * next(nice * f for f in (1, 2, 5, 10) if nice * f >= rough))


@drawn
def roofline(
    points: dict[str, tuple[float, float, float | None]],
    *,
    peak: float,
    bandwidth: float,
    title: str | None = None,
) -> Figure:
    """Flops per second against flops per byte, below the roof min(peak, intensity * bandwidth).

    points: {name: (flops, bytes, seconds)}. With seconds, the point was measured and is filled; with None it is
    modelled: hollow, on the roof, and called a model in the legend. peak is in flops per second, bandwidth in
    bytes per second. ValueError for a point without flops, bytes or time, which has no place on these axes.
    (Williams, Waterman and Patterson 2009.)
    """
    places = {name: _on_roofline(name, *point, peak, bandwidth) for name, point in points.items()}
    ridge = peak / bandwidth
    x = [ridge / 16, ridge * 16, *(x for x, _ in places.values())]
    ends = np.array([min(x) / 2, ridge, max(x) * 2])
    roof = np.minimum(peak, ends * bandwidth)
    fig = picture(6.8, 3.7)
    ax = fig.subplots()
    ax.loglog(ends, roof, color=INK, linewidth=1.8, gid="roof", zorder=1)
    ax.axvline(ridge, color=QUIET, linewidth=1, linestyle=":", gid="ridge", zorder=0)
    style = {"textcoords": "offset points", "fontsize": 8.5, "color": QUIET}
    ax.annotate(f"ridge: {_short(ridge)}", (ridge, peak), (0, 5), ha="center", **style)
    for i, ((name, (x, y)), marker) in enumerate(zip(places.items(), cycle("osD^vP*X"))):
        colour, modelled = COLOURS[i % len(COLOURS)], points[name][2] is None
        ax.plot(
            [x], [y], marker, color=colour, markerfacecolor="white" if modelled else colour, markersize=7.5,
            markeredgewidth=1.8, gid="modelled" if modelled else "measured", zorder=3,
            label=f"{name} (model)" if modelled else f"{name} (measured)",
        )  # fmt: skip
    lowest = min([*(y for _, y in places.values()), *roof])
    ax.set(xlim=(ends[0], ends[-1]), ylim=(lowest / 2, max([peak, *(y for _, y in places.values())]) * 2.5))
    ax.set(xlabel="flops per byte", ylabel="flops per second")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _rate(y)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_locator(NullLocator())
    ax.set_axisbelow(True)
    ax.grid(True, color="#EDEDED", linewidth=0.8)
    if points:
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    said = (
        f"{name}, {'a model' if points[name][2] is None else 'measured'}, {_rate(y)} at {x:.3g} flops per byte"
        for name, (x, y) in places.items()
    )
    roof_in_words = f"A roofline of {_rate(peak)} flops per second, with its ridge at {ridge:.3g} flops per byte"
    fig.description = as_sentences(title, f"{roof_in_words}: {'; '.join(said)}" if points else roof_in_words)
    if title:
        ax.set_title(title, pad=14)
    return fig


def _on_roofline(name, flops, nbytes, seconds, peak, bandwidth) -> tuple[float, float]:
    """(flops per byte, flops per second): as measured, or else as the roof allows."""
    if not (flops > 0 and nbytes > 0 and (seconds is None or seconds > 0)):
        raise ValueError(f"{name}: flops, bytes and seconds must be above 0, got {(flops, nbytes, seconds)}")
    intensity = flops / nbytes
    return intensity, min(peak, intensity * bandwidth) if seconds is None else flops / seconds


def _rate(y: float) -> str:
    """2e12 -> "2 T"."""
    power = int(np.clip(np.floor(np.log10(y) / 3), 0, 5)) if y >= 1 else 0
    return f"{y / 1000.0**power:.3g} {' kMGTP'[power]}".rstrip()


@drawn
def loss_curves(
    histories: dict[str, list], *, baseline=None, title: str | None = None, ylabel: str = "loss (nats)", xlabel: str = "step"
) -> Figure:
    """{name: losses}, one a step, or {name: [(step, loss), ...]}. `baseline`: a number, or (label, number)."""
    fig = picture()
    ax = fig.subplots()
    styles, said = ("-", "--", "-.", ":"), []
    for i, (name, history) in enumerate(histories.items()):
        points = [p if isinstance(p, tuple | list) else (step, float(p)) for step, p in enumerate(history, 1)]
        (first, low), (last, high) = points[0], points[-1]
        said.append(f"{name}, {float(low):.3g} at {xlabel} {first} to {float(high):.3g} at {xlabel} {last}")
        ax.plot(*zip(*points), label=name, linestyle=styles[i % len(styles)], linewidth=1.8)
    if baseline is not None:
        label, level = baseline if isinstance(baseline, tuple | list) else ("baseline", baseline)
        said.append(f"{label} is {float(level):.3g}")
        ax.axhline(float(level), color=INK, linewidth=1, linestyle=(0, (1, 2)), gid="baseline")
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        style = {"ha": "left", "va": "center", "fontsize": 8.5}  # outside, where no curve can be
        ax.annotate(f"{label}: {float(level):.3g}", (1, float(level)), (4, 0), **place, **style)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(True, axis="y", color="#E6E6E6", linewidth=0.8)
    ax.legend(loc="best")
    fig.description = as_sentences(title, f"{ylabel.capitalize()} against {xlabel}: {'; '.join(said)}")
    if title:
        ax.set_title(title)
    return fig
