"""Pictures of matrices: which tiles were visited, what the weights are, where an answer is wrong."""

import itertools

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor

from flash_edu.figures.playing import Player, by_gid, hide, player
from flash_edu.figures.style import (
    ALARM,
    HATCH,
    INK,
    QUIET,
    TINTS,
    as_sentences,
    drawn,
    listed,
    no_frame,
    picture,
    readable_on,
)
from flash_edu.figures.trace import Rows, Trace, row_axis

_CAUSAL = {"color": INK, "linewidth": 1.3, "linestyle": (0, (4, 2))}
# Keeps a number legible where the mask's edge crosses it.
_HALO = [withStroke(linewidth=2.2, foreground="#FFFFFFB0")]
_SPECTRUM = colormaps["YlGnBu"]


@drawn
def tile_walk(
    trace: Trace | list[tuple[Rows, Rows]],
    nq: int,
    nk: int,
    *,
    causal: bool = False,
    title: str | None = None,
) -> Figure:
    """The score matrix, queries down and keys across: which tiles were visited, and in what order.

    `trace` is a Trace or what its `tiles()` returns. Numbers count visits; hatched tiles were skipped. In the
    trace of a Triton kernel every program has its own colour and counts for itself. Of several heads, the
    first is drawn.
    """
    walks = first_head_walks(trace)
    fig = picture(layout=None)
    ax = _matrix_axes(fig, nq, nk)
    visited, tiles = draw_walks(ax, walks, nq, nk, causal=causal)
    ax.set(xlabel="key (row of K)", ylabel="query (row of Q)")
    fig.text(0.02, 0.965, title or f"{visited} of {_count(tiles, 'tile')} visited", va="top", fontsize=11)
    _explain_walks(ax, walks, causal, skipped=visited < tiles)
    kind = "causal score matrix" if causal else "score matrix"
    head = f"A {kind} of {_count(nq, 'query')} and {_count(nk, 'key')}: {visited} of {_count(tiles, 'tile')} visited"
    skipped = f", {tiles - visited} never loaded" if visited < tiles else ""
    fig.description = as_sentences(title, head + skipped, _walks_in_words(walks))
    return fig


def _walks_in_words(walks: dict[tuple, list]) -> str:
    walks = {program: walk for (_, program), walk in walks.items() if walk}
    if len(walks) > 1:
        counts = listed(len(walk) for walk in walks.values())
        return f"{len(walks)} programs visit {counts} tiles"
    return "".join(f"First {tile_in_words(w[0])}, last {tile_in_words(w[-1])}" for w in walks.values())


def tile_in_words(tile: tuple[Rows, Rows]) -> str:
    """((0, 4), (8, 9)) -> "queries 0-3 with key 8"."""
    (q0, q1), (k0, k1) = tile
    queries = f"queries {q0}-{q1 - 1}" if q1 - q0 > 1 else f"query {q0}"
    return queries + (f" with keys {k0}-{k1 - 1}" if k1 - k0 > 1 else f" with key {k0}")


def _matrix_axes(fig: Figure, nq: int, nk: int):
    """Axes for nq rows and nk columns, as large as a legend beside them allows; squares stay squares if they can."""
    width, height = 3.3, 2.5
    if 1 / 5 < nq / nk < 5:
        inch = min(width / nk, height / nq)
        width, height = nk * inch, nq * inch
    full_width, full_height = fig.get_size_inches()
    width, height = width / full_width, height / full_height
    ax = fig.add_axes((0.7 / full_width, 1 - 0.45 / full_height - height, width, height))
    ax.set(xlim=(0, nk), ylim=(nq, 0))
    return ax


def first_head_walks(trace: Trace | list) -> dict[tuple, list]:
    """{(kernel, program): tiles} of the trace's first head; a plain list of tiles is one walk."""
    if not isinstance(trace, Trace):
        return {(None, None): list(trace)}
    planes = [e.plane for e in trace.events if e.name == "q" and e.kind == "load"]
    first_head = [e for e in trace.events if e.name != "q" or e.plane in (None, planes[0])]
    walks = Trace(first_head).walks()
    kernels = list(dict.fromkeys(kernel for kernel, _ in walks))
    if len(kernels) > 1:
        choice = f"trace.only(kernel={kernels[0]!r})"
        raise ValueError(f"this trace has the walks of {len(kernels)} kernels; choose one: {choice}")
    return walks


def _edges(ranges: list[Rows], length: int) -> list[int]:
    """Where tiles begin and end: as visited, and in steps of the largest tile where nothing was."""
    step = max((stop - start for start, stop in ranges), default=length) or 1
    seen = {edge for rows in ranges for edge in rows}
    return sorted(seen | {0, length} | set(range(0, length, step)))


def _thinned(edges: list[int], most: float = 11) -> list[int]:
    """The edges with room for a number: the last, and of the others those far enough from the one before."""
    room = edges[-1] / most
    kept = []
    for edge in edges[:-1]:
        if (not kept or edge - kept[-1] >= room) and edges[-1] - edge >= room:
            kept.append(edge)
    return [*kept, edges[-1]]


def draw_walks(ax, walks: dict[tuple, list], nq: int, nk: int, *, causal: bool) -> tuple[int, int]:
    """The picture without its legend. Returns how many tiles were visited, and how many there are."""
    tiles = set(itertools.chain.from_iterable(walks.values()))
    row_edges, column_edges = _edges([q for q, _ in tiles], nq), _edges([k for _, k in tiles], nk)
    cells = set(itertools.product(itertools.pairwise(row_edges), itertools.pairwise(column_edges)))
    for (q0, q1), (k0, k1) in sorted(cells - tiles):
        ax.add_patch(Rectangle((k0, q0), k1 - k0, q1 - q0, gid="skipped", **HATCH))
    _draw_numbers(ax, _draw_visits(ax, walks), corner=causal)
    if causal:
        ax.plot([nk - nq, nk], [0, nq], gid="causal", **_CAUSAL)
    ax.set_xticks(_thinned(column_edges))
    ax.set_yticks(_thinned(row_edges))
    no_frame(ax)
    return len(cells & tiles), len(cells)


def _draw_visits(ax, walks: dict[tuple, list]) -> dict[tuple, list[int]]:
    """Colour the visited tiles. Returns the numbers of the visits to each."""
    visits = {}
    for colour, walk in zip(itertools.cycle(TINTS), walks.values()):
        for number, tile in enumerate(walk, 1):
            (q0, q1), (k0, k1) = tile
            if tile not in visits:
                fill = colour if len(walks) > 1 else _SPECTRUM(0.12 + 0.4 * number / len(walk))
                style = {"facecolor": fill, "edgecolor": "white", "linewidth": 1, "gid": "visited"}
                ax.add_patch(Rectangle((k0, q0), k1 - k0, q1 - q0, **style))
            visits.setdefault(tile, []).append(number)
    return visits


def _draw_numbers(ax, visits: dict[tuple, list[int]], corner: bool) -> None:
    """The numbers of a tile's visits, as large as it allows; off its diagonal if a line runs there."""
    across, down = (0.3, 0.7) if corner else (0.5, 0.5)
    one = ax.transData.transform((1, 1)) - ax.transData.transform((0, 0))
    per_key, per_query = abs(one) * 72 / ax.figure.dpi  # in points, as a font's size
    for ((q0, q1), (k0, k1)), numbers in visits.items():
        text = _visits_in_short(numbers)
        size = min(9, 0.75 * (q1 - q0) * per_query, 1.2 * (k1 - k0) * per_key / len(text))
        if size >= 4:
            style = {"ha": "center", "va": "center_baseline", "path_effects": _HALO if corner else None}
            style["gid"] = "visit"
            ax.text(k0 + across * (k1 - k0), q0 + down * (q1 - q0), text, fontsize=size, **style)


def _visits_in_short(numbers: list[int]) -> str:
    return ",".join(map(str, numbers)) if len(numbers) < 3 else f"{len(numbers)}x"


@drawn
def play_tile_walk(
    trace: Trace | list[tuple[Rows, Rows]],
    nq: int,
    nk: int,
    *,
    causal: bool = False,
    title: str | None = None,
) -> Player:
    """`tile_walk`, one visit after the other. Programs of a Triton kernel take their steps side by side."""
    fig = tile_walk(trace, nq, nk, causal=causal, title=title)
    return player(_visit_by_visit(fig, list(first_head_walks(trace).values())), fig)


def _visit_by_visit(fig: Figure, walks: list[list]):
    (ax,) = fig.axes
    patches = {_tile_of(patch): patch for patch in by_gid(fig, "visited")}
    labels = {tile: [t for t in by_gid(fig, "visit") if _inside(t.get_position(), tile)] for tile in patches}
    hide([*patches.values(), *by_gid(fig, "visit")])
    yield "Nothing is loaded yet."
    for step in range(max(map(len, walks))):
        now = [walk[step] for walk in walks if step < len(walk)]
        frames = []
        for tile in now:
            visits = [n + 1 for walk in walks for n, other in enumerate(walk[: step + 1]) if other == tile]
            patches[tile].set_visible(True)
            for label in labels[tile]:
                label.set(visible=True, text=_visits_in_short(visits))
            (q0, q1), (k0, k1) = tile
            style = {"fill": False, "edgecolor": ALARM, "linewidth": 2, "gid": "now"}
            frames.append(ax.add_patch(Rectangle((k0, q0), k1 - k0, q1 - q0, **style)))
        more = f" and {len(now) - 3} more" if len(now) > 4 else ""
        shown = now[: 3 if more else 4]
        where = f"{', '.join(map(tile_in_words, shown))}{more}" if more else listed(map(tile_in_words, shown))
        yield f"Step {step + 1}: {where}."
        for frame in frames:
            frame.remove()
    yield str(fig)


def _tile_of(patch: Rectangle) -> tuple[Rows, Rows]:
    (k0, q0), width, height = patch.get_xy(), patch.get_width(), patch.get_height()
    return (q0, q0 + height), (k0, k0 + width)


def _inside(position: tuple[float, float], tile: tuple[Rows, Rows]) -> bool:
    (q0, q1), (k0, k1) = tile
    return k0 < position[0] < k1 and q0 < position[1] < q1


def _explain_walks(ax, walks: dict[tuple, list], causal: bool, skipped: bool) -> None:
    programs = len(walks) > 1
    keys = []
    if programs:
        shown = list(zip(TINTS, walks.items()))[:8]
        for colour, ((_, program), walk) in shown:
            keys.append((Patch(facecolor=colour), f"program {program[0]}: {_count(len(walk), 'tile')}"))
        if len(walks) > len(shown):
            keys.append((Patch(alpha=0), f"and {len(walks) - len(shown)} programs more"))
    else:
        keys.append((Patch(facecolor=_SPECTRUM(0.4)), "visited, in this order"))
    if skipped:
        keys.append((Patch(**HATCH), "never loaded"))
    if causal:
        keys.append((Line2D([], [], **_CAUSAL), "edge of the causal mask"))
    title = "Each program counts\nits own tiles" if programs else None
    place = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "borderaxespad": 2}
    ax.legend(*zip(*keys), title=title, alignment="left", title_fontsize=8.5, **place)


def _count(n: int, thing: str) -> str:
    plural = thing[:-1] + "ies" if thing.endswith("ry") else thing + "s"
    return f"{n} {thing if n == 1 else plural}"


@drawn
def product_walk(
    by_row: Trace, by_column: Trace, m: int, n: int, k: int, *, programs=None, title: str | None = None
) -> Figure:
    """A kernel that computes C = A B, with A (m, k) and B (k, n): which tiles its programs touched, and in what order.

    Two traces of the same call, in which row_axes is 0 and 1 for "a", "b" and "c": an access is a range of rows in
    the first, and a range of columns in the second. B stands above C and A to its left, so that a tile of C has its
    tiles of A in its own rows and its tiles of B in its own columns. Numbers are the order in which a program loaded
    its tiles. `programs`: a list of (i, j); without it, all. A tile that several programs load is cut into slices.
    """
    walks = _product_tiles(by_row, by_column, programs)
    fig = picture(6, 3.9, layout=None)
    size, gap = min(2.9 / (m + k), 3.2 / (n + k)), 0.35  # inches for each number, and between matrices
    place = {"a": (0.6, 0.35, k, m), "b": (0.6 + k * size + gap, 0.35 + m * size + gap, n, k)}
    place["c"] = (0.6 + k * size + gap, 0.35, n, m)
    width, height = fig.get_size_inches()
    for name, (x, y, across, down) in place.items():
        ax = fig.add_axes((x / width, y / height, across * size / width, down * size / height))
        ax.set(xlim=(0, across), ylim=(down, 0), xticks=[], yticks=[])
        ax.add_patch(Rectangle((0, 0), across, down, gid="untouched", **HATCH))
        _draw_shares(ax, [walk[name] for walk in walks.values()], numbered=name != "c")
        no_frame(ax)
        ax.set_title(f"{name.upper()}   {down} x {across}", fontsize=9, pad=3)
    keys = [Patch(facecolor=colour) for colour, _ in zip(TINTS, walks)]
    names = [f"program ({i}, {j})" for i, j in walks][: len(keys)]
    place = (x / width - 0.01 + n * size / width, 0.35 / height)
    fig.legend([*keys, Patch(**HATCH)], [*names, "not touched"], loc="lower left", bbox_to_anchor=place, frameon=False)
    fig.text(0.02, 0.965, title or f"{_count(len(walks), 'program')} of a product", va="top", fontsize=11)
    shape = f"A is {m} x {k}, B {k} x {n}, C {m} x {n}"
    fig.description = as_sentences(title, shape, *(_product_in_words(who, walk) for who, walk in walks.items()))
    return fig


def _product_tiles(by_row: Trace, by_column: Trace, programs) -> dict[tuple, dict[str, list]]:
    """{(i, j): {"a": [(rows, columns), ...] in order of load, "b": ..., "c": in order of store}}"""
    walks = {}
    for one, other in zip(by_row.events, by_column.events, strict=True):
        if (one.kind, one.name, one.program) != (other.kind, other.name, other.program):
            raise ValueError("by_row and by_column are not traces of the same call")
        who = one.program[:2]
        if one.name in ("a", "b", "c") and (programs is None or who in programs):
            walk = walks.setdefault(who, {"a": [], "b": [], "c": []})
            walk[one.name].append(((one.start, one.stop), (other.start, other.stop)))
    return walks


def _draw_shares(ax, walks: list[list], numbered: bool) -> None:
    """Each tile in the colours of those who touched it, side by side, with the numbers of their visits."""
    owners = {}
    for colour, walk in zip(itertools.cycle(TINTS), walks):
        for number, tile in enumerate(walk, 1):
            owners.setdefault(tile, []).append((colour, number))
    for ((r0, r1), (c0, c1)), shares in owners.items():
        step = (c1 - c0) / len(shares)
        for place, (colour, number) in enumerate(shares):
            left = c0 + place * step
            ax.add_patch(Rectangle((left, r0), step, r1 - r0, facecolor=colour, gid="touched"))
            if numbered:
                ax.text(left + step / 2, (r0 + r1) / 2, number, ha="center", va="center_baseline", fontsize=8, gid="visit")
        ax.add_patch(Rectangle((c0, r0), c1 - c0, r1 - r0, fill=False, edgecolor="white", linewidth=1.5))


def _product_in_words(who: tuple, walk: dict[str, list]) -> str:
    rows, columns = (listed(f"{a}-{b - 1}" for a, b in sorted({tile[side] for tile in walk["c"]})) for side in (0, 1))
    loads = f"loads {_count(len(walk['a']), 'tile')} of A and {_count(len(walk['b']), 'tile')} of B"
    return f"Program {who} {loads} and stores rows {rows}, columns {columns} of C"


@drawn
def meetings(trace: Trace, name: str, *, title: str | None = None) -> Figure:
    """Where along the tensor `name` each program of a kernel was; framed where one stored what another touched.

    Programs go down. A place is a row of the tensor, or an element if it has one dimension. A frame is a race: what is read
    or left there depends on which program comes first.
    """
    events = [e for e in trace.events if e.name == name and e.program]
    if not events:
        raise ValueError(f"no program touches {name!r} in this trace; it has {', '.join(trace.names)}")
    rows = max(e.stop for e in events)
    who = list(dict.fromkeys(e.program for e in events))
    stored, touched = np.zeros((2, len(who), rows), dtype=bool)
    for e in events:
        touched[who.index(e.program), e.start : e.stop] = True
        stored[who.index(e.program), e.start : e.stop] |= e.kind == "store"
    met = touched & (stored.sum(0) - stored > 0) | stored & (touched.sum(0) > 1)
    fig = picture(6, min(3.5, 1.3 + 0.4 * len(who)))
    ax = fig.subplots()
    for i, j in np.argwhere(touched):
        fill = TINTS[i % len(TINTS)] if stored[i, j] else "white"
        edge = {"edgecolor": ALARM, "linewidth": 2} if met[i, j] else {"edgecolor": "white", "linewidth": 1}
        ax.add_patch(Rectangle((j + 0.06, i + 0.08), 0.88, 0.84, facecolor=fill, gid="met" if met[i, j] else "own", **edge))
    ax.set(xlim=(0, rows), ylim=(len(who), 0), xlabel=f"place in {name}")
    ax.set_xticks(np.arange(rows)[:: -(-rows // 16)] + 0.5, np.arange(rows)[:: -(-rows // 16)])
    ax.set_yticks(np.arange(len(who)) + 0.5, [f"program {program[0]}" for program in who])
    no_frame(ax)
    many = int((met.sum(0) > 0).sum())
    headline = f"Programs meet in {many} of {_count(rows, 'place')} of {name}" if many else "No two programs meet"
    ax.set_title(title or headline)
    each = (f"Program {program[0]} touches {_in_ranges(touched[i])}" for i, program in enumerate(who[:8]))
    fig.description = as_sentences(title, headline, *each)
    return fig


def _in_ranges(chosen: np.ndarray) -> str:
    """[True, True, False, True] -> "places 0-1, 3"."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen.astype(int), [0]]))).reshape(-1, 2)
    return "places " + ", ".join(f"{a}-{b - 1}" if b - a > 1 else str(a) for a, b in edges)



@drawn
def weights(matrix, words=None, *, columns=None, title: str | None = None, decimals: int = 2) -> Figure:
    """A small matrix, each number in its cell: queries down, keys across. -inf and nan are drawn as masked."""
    matrix = torch.as_tensor(matrix).detach().cpu().double().numpy()
    if matrix.ndim != 2:
        raise ValueError(
            f"weights draws a matrix, not shape {matrix.shape}: choose a head, as in matrix[0, 0]"
        )
    rows, cols = matrix.shape
    if columns is None and words is not None and len(words) == cols:
        columns = words
    fig = picture(*_matrix_size(rows, cols))
    ax = fig.subplots()
    finite = np.isfinite(matrix)
    low, high = min(0.0, matrix[finite].min(initial=0)), matrix[finite].max(initial=1e-9)
    shade, gap = colormaps["Blues"], 1.5 if cols <= 16 else 0.5
    for i, j in np.ndindex(rows, cols):
        if not finite[i, j]:
            ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, gid="masked", **HATCH))
            label, colour = ("masked" if cols <= 8 else ""), QUIET
        else:
            fill = shade(0.85 * (matrix[i, j] - low) / (high - low))
            style = {"facecolor": fill, "edgecolor": "white", "linewidth": gap}
            ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, **style))
            label, colour = f"{matrix[i, j]:.{decimals}f}", readable_on(fill)
        if cols <= 16:
            size = (10 if finite[i, j] else 8) if cols <= 8 else 6.5
            ax.text(j, i, label, ha="center", va="center", color=colour, fontsize=size)
    ax.set(xlim=(-0.5, cols - 0.5), ylim=(rows - 0.5, -0.5), aspect="equal", xlabel="key", ylabel="query")
    _name_ticks(ax.set_xticks, cols, columns)
    _name_ticks(ax.set_yticks, rows, words)
    ax.xaxis.set_label_position("top")
    ax.xaxis.tick_top()
    no_frame(ax)
    if title:
        ax.set_title(title)
    fig.description = as_sentences(title, *_matrix_in_words(matrix, words, columns, decimals))
    return fig


@drawn
def masks(panels: dict[str, tuple[Tensor, Trace | list[tuple[Rows, Rows]]]], *, title: str | None = None) -> Figure:
    """Masks side by side, and the tiles they were made in: {name: (mask, walk)}, queries down and keys across.

    mask (rows, columns) bool: a filled square is True. walk: a Trace, or a list of tiles as `tile_walk` takes it; its tiles
    are outlined, and numbered in the order of visit if there is room.
    """
    if not panels:
        raise ValueError("masks draws at least one mask")
    arrays = {name: np.asarray(torch.as_tensor(mask).detach().cpu()) for name, (mask, _) in panels.items()}
    for name, mask in arrays.items():
        if mask.ndim != 2 or mask.dtype != bool:
            raise ValueError(f"masks draws bool matrices; {name} is {mask.dtype} of shape {mask.shape}")
    rows, cols = next(iter(arrays.values())).shape
    width = min(3.4, 7.2 / len(panels))
    fig = picture(max(3.0, width * len(panels)), max(1.9, min(4.2, width * rows / cols + 0.9)))
    for ax, (name, mask) in zip(np.atleast_1d(fig.subplots(1, len(panels))), arrays.items()):
        (rows, cols), (walk,) = mask.shape, first_head_walks(panels[name][1]).values()
        ax.imshow(mask, cmap="Blues", vmin=0, vmax=1.9, extent=(0, cols, rows, 0), interpolation="nearest")
        for number, ((q0, q1), (k0, k1)) in enumerate(walk, 1):
            style = {"fill": False, "edgecolor": ALARM, "linewidth": 1.1, "gid": "tile"}
            ax.add_patch(Rectangle((k0, q0), k1 - k0, q1 - q0, **style))
            if len(walk) <= 24:
                at = ((k0 + k1) / 2, (q0 + q1) / 2)
                ax.text(*at, number, ha="center", va="center", fontsize=9, path_effects=_HALO, gid="visit")
        edges = [_edges([tile[axis] for tile in walk], length) for axis, length in ((0, rows), (1, cols))]
        room = 11 * 4 / (len(panels) * len(str(cols)))  # numbers of some digits, in a part of the width
        ax.set(yticks=_thinned(edges[0]), xticks=_thinned(edges[1], most=min(11, room)), aspect="equal", xlabel="key")
        ax.set_title(name, fontsize=9.5)
        no_frame(ax)
    fig.axes[0].set_ylabel("query")
    if title:
        fig.suptitle(title, fontsize=11, x=0.02, ha="left")
    walks = {name: next(iter(first_head_walks(panels[name][1]).values())) for name in panels}
    fig.description = as_sentences(title, *_masks_in_words(arrays, walks))
    return fig


def _masks_in_words(arrays: dict[str, np.ndarray], walks: dict[str, list]):
    """How much of each is True, in which tiles; and whether the others equal the first."""
    first, *others = arrays
    for name, mask in arrays.items():
        walk = walks[name]
        sizes = (max(stop - start for start, stop in ranges) for ranges in zip(*walk))
        tiles = f"{_count(len(walk), 'tile')} of {' x '.join(map(str, sizes))}"
        shape = f"{_count(mask.shape[0], 'query')} and {_count(mask.shape[1], 'key')}"
        yield f"{name}: {shape}, {int(mask.sum())} of {mask.size} are kept, in {tiles}, {tile_in_words(walk[0])} first"
    for name in others:
        if arrays[name].shape == arrays[first].shape:
            wrong = int((arrays[name] != arrays[first]).sum())
            yield f"{name} and {first} " + (f"differ in {_count(wrong, 'place')}" if wrong else "are equal")


def _matrix_in_words(matrix: np.ndarray, words, columns, decimals: int):
    """Each row's numbers if there are few; of many, the largest of the row."""
    rows, cols = matrix.shape
    yield f"A matrix of {_count(rows, 'row')} (queries) and {_count(cols, 'column')} (keys)"
    names = [f"{i} ({words[i]})" if words is not None else str(i) for i in range(rows)]
    for name, row in zip(names[:16], matrix):
        if cols <= 8:
            numbers = (f"{x:.{decimals}f}" if np.isfinite(x) else "masked" for x in row)
            yield f"Row {name}: {', '.join(numbers)}"
        elif np.isfinite(row).any():
            best = int(np.where(np.isfinite(row), row, -np.inf).argmax())
            key = f"{best} ({columns[best]})" if columns is not None else best
            yield f"Row {name}: largest {row[best]:.{decimals}f}, at key {key}"


def _name_ticks(set_ticks, n: int, names) -> None:
    ticks = range(n) if names is not None else range(0, n, -(-n // 16))
    set_ticks(ticks, names if names is not None else ticks)


def _matrix_size(rows: int, cols: int) -> tuple[float, float]:
    cell = min(0.62, 4.6 / cols, 3.4 / rows)
    return max(3.2, cols * cell + 1.3), max(1.6, rows * cell + 0.9)


@drawn
def error_map(got: Tensor, want: Tensor, *, tile: int | None = None, title: str | None = None) -> Figure:
    """|got - want| for every number of an output, rows down, on a logarithmic scale.

    Of (B, H, N, D) the head with the largest error is drawn. `tile` draws a line every so many rows and marks
    the tail: the rows of a last tile that is not full. Numbers that are nan or infinite in `got` alone stand
    out.
    """
    if got.shape != want.shape:
        shapes = f"got {tuple(got.shape)} and want {tuple(want.shape)}"
        raise ValueError(f"error_map compares tensors of one shape; {shapes}")
    error, place = _worst_plane(got, want)
    n, d = error.shape
    broken = ~np.isfinite(error)
    largest = error[~broken].max(initial=0)
    fig = picture()
    ax = fig.subplots()
    if largest > 0:
        scale = LogNorm(max(largest * 1e-4, error[~broken & (error > 0)].min()) * 0.999, largest)
        cmap = colormaps["cividis"].with_extremes(bad="white")
        style = {"norm": scale, "cmap": cmap, "aspect": "auto", "interpolation": "nearest"}
        image = ax.imshow(np.clip(error, scale.vmin, None), **style)
        fig.colorbar(image, ax=ax, label="|got - want|", pad=0.12 if tile else 0.02)
    else:
        ax.imshow(np.zeros((n, d)), cmap="Blues", vmin=-1, vmax=9, aspect="auto")
    for i, j in np.argwhere(broken):
        ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=ALARM, gid="not finite"))
    if tile:
        _mark_tiles(ax, n, d, tile)
    ax.set(xlabel="column of the output", ylabel="row (query)")
    headline = _error_headline(error, broken, largest, place)
    ax.set_title(title or headline)
    size = f"The error of {_count(n, 'row')} with {_count(d, 'number')} each"
    tail = f"The tail has {_count(n % tile, 'row')}" if tile and n % tile and n > tile else None
    fig.description = as_sentences(title, f"{size}: {headline}", tail)
    return fig


def _worst_plane(got: Tensor, want: Tensor) -> tuple[np.ndarray, str]:
    """|got - want| as (N, D), of the head where it is largest, and the name of that head."""
    got, want = (x.detach().cpu().double() for x in (got, want))
    same = (got == want) | (got.isnan() & want.isnan())  # inf - inf is nan, and no error
    error = (got - want).abs().masked_fill(same, 0.0)
    axis = row_axis(error.shape)
    lead, n = error.shape[:axis], error.shape[axis]
    planes = error.reshape(lead.numel(), n, -1)
    worst = int(planes.nan_to_num(nan=torch.inf).amax(dim=(1, 2)).argmax())
    if lead.numel() == 1:
        return planes[worst].numpy(), ""
    index = np.unravel_index(worst, lead)
    return planes[worst].numpy(), ", ".join(f"{name} {i}" for name, i in zip(("batch", "head"), index))


def _error_headline(error: np.ndarray, broken: np.ndarray, largest: float, place: str) -> str:
    where = f" ({place})" if place else ""
    if broken.any():
        first = np.argwhere(broken)[0][0]
        return f"{broken.sum()} of {error.size} numbers are not finite, first in row {first}{where}"
    if largest == 0:
        return "equal in every number"
    row, column = np.unravel_index(error.argmax(), error.shape)
    return f"largest error {largest:.1e}, row {row}, column {column}{where}"


def _mark_tiles(ax, n: int, d: int, tile: int) -> None:
    for edge in range(tile, n, tile):
        ax.axhline(edge - 0.5, color="white", linewidth=1.2)
        ax.axhline(edge - 0.5, color=INK, linewidth=0.7, linestyle=(0, (3, 2)))
    tail = n % tile
    if tail and n > tile:
        middle = n - tail / 2 - 0.5
        style = {"color": ALARM, "clip_on": False}
        ax.plot([1.02 * d - 0.5] * 2, [n - tail - 0.5, n - 0.5], linewidth=3, gid="tail", **style)
        rows = f"rows {n - tail}-{n - 1}" if tail > 1 else f"row {n - 1}"
        ax.text(1.04 * d - 0.5, middle, f"tail:\n{rows}", va="center", fontsize=8, **style)
    ax.set_xlim(-0.5, d - 0.5)
    ax.set_ylim(n - 0.5, -0.5)
