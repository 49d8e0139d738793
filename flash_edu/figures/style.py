"""How every picture looks: size, colours that colour-blind eyes tell apart, and how a notebook shows it."""

import functools
import io

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
    """A matplotlib figure that shows itself: pyplot does not know it, so a notebook displays it once."""

    def _repr_png_(self) -> bytes:
        return self.png(self.dpi)

    def png(self, dpi: float) -> bytes:
        """With a palette of 256 colours: a third of the size, and pictures are kept in git."""
        rgb, png = io.BytesIO(), io.BytesIO()
        self.savefig(rgb, format="png", dpi=dpi, facecolor="white")
        image = Image.open(rgb).convert("RGB")
        image = image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        image.save(png, format="png", optimize=True)
        return png.getvalue()


def picture(width: float = 6, height: float = 3.5, layout: str | None = "constrained") -> Picture:
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
