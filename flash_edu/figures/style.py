"""How every picture looks: size, colours that colour-blind eyes tell apart, and how a notebook shows it."""

import functools
import io
import sys

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's palette, without its yellow, which is too light for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F5B34", "#5B5B5B")
TINTS = ("#A6CBE3", "#F2BE99", "#9ED5C3", "#E9CCDC", "#F5D99A", "#C4E4F6", "#D2C1AF", "#CFCFCF")
INK = "#222222"
QUIET = "#777777"
ALARM = "#D55E00"
HATCH = {"facecolor": "#F7F7F7", "edgecolor": "#C8C8C8", "hatch": "////", "linewidth": 0.6}

_RC = {
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white",
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": QUIET,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10.5, "axes.titlelocation": "left",
    "axes.labelsize": 9, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5, "legend.frameon": False,
    "lines.linewidth": 2, "hatch.linewidth": 0.6, "hatch.color": "#C8C8C8",
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
}  # fmt: skip


class Picture(Figure):
    """A matplotlib figure that shows itself: pyplot does not know it, so a notebook displays it once.

    It says in words what it shows. The words are stored with the picture: as its plain text, and as `alt` in the
    picture's metadata, where IPython and nbconvert look for the text of readers who do not see. (JupyterLab 4.6
    stores both and gives neither to the browser.)
    """

    description = ""

    def __repr__(self) -> str:
        return self.description or _in_words(self)

    __str__ = __repr__

    def _repr_png_(self) -> tuple[bytes, dict]:
        return self.png(self.dpi), {"alt": repr(self)}

    def png(self, dpi: float) -> bytes:
        """With a palette of 256 colours: a third of the size, and pictures are kept in git."""
        rgb, png = io.BytesIO(), io.BytesIO()
        with matplotlib.style.context(["default", _RC]):
            self.savefig(rgb, format="png", dpi=dpi, facecolor="white")
        image = Image.open(rgb).convert("RGB")
        image = image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        image.save(png, format="png", optimize=True)
        return png.getvalue()


def _in_words(fig: Figure) -> str:
    """What can be read off any figure: titles, labels, and what its legend lists."""
    parts = [fig.get_suptitle()]
    for ax in fig.axes:
        labels = ", ".join(filter(None, [ax.get_ylabel(), ax.get_xlabel()]))
        entries = ", ".join(ax.get_legend_handles_labels()[1])
        parts.append(": ".join(filter(None, [ax.get_title(loc="left") or ax.get_title(), labels, entries])))
    return as_sentences(*parts) or "A picture without a title."


def as_sentences(*parts: str | None) -> str:
    """Joined, each with a full stop at its end; empty ones are left out."""
    parts = [part.strip() for part in parts if part and part.strip()]
    return " ".join(part if part.endswith((".", "?", "!")) else f"{part}." for part in parts)


def listed(things) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    *most, last = map(str, things)
    return f"{', '.join(most)} and {last}" if most else last


def _outrank_pyplot() -> None:
    """In a notebook pyplot registers a way to show every Figure; a Picture keeps its own."""
    ipython = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    if shell:
        shell.display_formatter.formatters["image/png"].for_type(Picture, Picture._repr_png_)


def picture(width: float = 6, height: float = 3.5, layout: str | None = "constrained") -> Picture:
    _outrank_pyplot()
    fig = Picture(figsize=(width, height), dpi=100, layout=layout)
    if layout == "constrained":
        fig.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return fig


def drawn(function):
    """Draw in our style, whatever style the reader's notebook has set."""

    @functools.wraps(function)
    def draw(*args, **kwargs):
        with matplotlib.style.context(["default", _RC]):
            return function(*args, **kwargs)

    return draw


def human_bytes(n: float, digits: int = 3) -> str:
    """1536 -> "1.5 KiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while abs(n) >= 1024 and power < len(units) - 1:
        n, power = n / 1024, power + 1
    return f"{n:.{digits}g} {units[power]}" if abs(n) < 1000 else f"{n:.0f} {units[power]}"


def no_frame(ax: Axes) -> None:
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def readable_on(colour) -> str:
    """Black or white text, whichever stands out on this colour."""
    r, g, b = colour[:3]
    return "white" if 0.299 * r + 0.587 * g + 0.114 * b < 0.55 else INK
