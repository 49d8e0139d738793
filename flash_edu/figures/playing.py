"""A picture that grows step by step, with buttons, where scripts may run; the last step of it everywhere else.

JupyterLab, nbconvert and probably GitHub prefer text/html to image/png when an output has both, and an untrusted
notebook shows the html without its scripts. So a player is two outputs: first the finished picture, as a plain PNG;
then html which is nothing but a script, and so nothing at all where scripts are removed. The script takes the place
of the picture above it. It never starts by itself, and can be used by keyboard.
"""

import base64
import io
import json

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from flash_edu.figures.style import Picture

_SCRIPT = """<script>(() => {
const here = document.currentScript.parentElement, {words, frames} = DATA;
const above = here.closest(".jp-OutputArea-child")?.previousElementSibling;
const still = above?.querySelector(".jp-RenderedImage");
const make = (kind, into, more) => into.appendChild(Object.assign(document.createElement(kind), more));
const mine = control => { control.dataset.lmSuppressShortcuts = "true"; };  // else JupyterLab takes the arrow keys
const box = make("div", here, {className: "flash-edu-player"});
make("style", box, {textContent: `STYLE`});
const screen = make("div", box, {className: "screen"}), bar = make("div", box, {className: "bar"});
screen.setAttribute("role", "img");
const images = frames.map(png => make("img", screen, {src: "data:image/png;base64," + png, alt: ""}));
const button = (text, label, onclick) => {
  make("button", bar, {type: "button", textContent: text, title: label, onclick}).setAttribute("aria-label", label);
  mine(bar.lastChild);
  return bar.lastChild;
};
const last = frames.length - 1;
let at = last, timer = null;
button("|\\u25C0", "first step", () => go(0));
button("\\u25C0", "one step back", () => go(at - 1));
const play = button("\\u25B6 play", "play", () => timer ? stop() : start());
button("\\u25B6", "one step on", () => go(at + 1));
const slider = make("input", bar, {type: "range", min: 0, max: last, oninput: () => go(+slider.value)});
slider.setAttribute("aria-label", "step");
mine(slider);
const caption = make("div", box, {className: "words"});
caption.setAttribute("aria-live", "polite");
function show(step) {
  at = Math.max(0, Math.min(last, step));
  images.forEach((image, i) => { image.style.visibility = i > at ? "hidden" : "visible"; });
  slider.value = at;
  caption.textContent = words[at];
  screen.setAttribute("aria-label", words[at]);
}
function stop() { clearInterval(timer); timer = null; play.textContent = "\\u25B6 play"; }
function go(step) { stop(); show(step); }
function start() {
  show(at === last ? 0 : at);
  play.textContent = "\\u275A\\u275A pause";
  timer = setInterval(() => {
    if (!box.isConnected) return stop();
    show(at + 1);
    if (at === last) stop();
  }, PAUSE);
}
show(last);
if (still) still.style.display = "none";
})();</script>"""

_STYLE = """
.flash-edu-player { color: var(--jp-content-font-color1, currentColor); font-size: var(--jp-ui-font-size1, 13px);
  font-family: var(--jp-ui-font-family, sans-serif); max-width: 760px; }
.flash-edu-player .screen { position: relative; display: inline-block; line-height: 0; background: white; }
.flash-edu-player .screen img { display: block; max-width: 100%; margin: 0; }
.flash-edu-player .screen img + img { position: absolute; inset: 0; }
.flash-edu-player .bar { display: flex; gap: 4px; align-items: center; margin: 6px 0; max-width: 480px; }
.flash-edu-player .bar input { flex: 1; min-width: 60px; accent-color: var(--jp-brand-color1, #0072B2); }
.flash-edu-player .bar button { font: inherit; color: inherit; cursor: pointer; padding: 2px 9px; border-radius: 3px;
  background: var(--jp-layout-color2, transparent); border: 1px solid var(--jp-border-color1, currentColor); }
.flash-edu-player .bar button:focus-visible { outline: 2px solid var(--jp-brand-color1, #0072B2); }
.flash-edu-player .words { min-height: 1.4em; }
"""


_CLEAR = 255  # the index of what an overlay leaves as it is


class Player:
    """What `player` returns: last in a cell it is shown. `player.picture` is the last frame, an ordinary figure."""

    def __init__(self, picture: Picture, frames: list[bytes], words: list[str], pause_ms: int):
        self.picture, self.frames, self.words, self.pause_ms = picture, frames, words, pause_ms

    def __repr__(self) -> str:
        return repr(self.picture)

    def html(self) -> str:
        frames = [base64.b64encode(frame).decode() for frame in self.frames]
        data = json.dumps({"words": self.words, "frames": frames}).replace("</", "<\\/")  # may not end the script
        style = _STYLE.replace("\n", " ").strip()
        return _SCRIPT.replace("STYLE", style).replace("PAUSE", str(self.pause_ms)).replace("DATA", data)

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.picture)
        plain = f"A player of {len(self.frames)} steps, where scripts may run."
        display({"text/html": self.html(), "text/plain": plain}, raw=True)


def player(steps, picture: Picture, *, pause_ms: int = 600) -> Player:
    """Show `picture` step by step.

    steps: an iterator that changes `picture` in place, yields a sentence about what is to be seen now, and so on;
    what it yields last must be the finished picture. Each yield becomes a frame. Only what differs from the frame
    before is stored, so a step costs about 1 KiB.
    """
    canvas, frames, words = FigureCanvasAgg(picture), [], []
    if picture.get_layout_engine() is not None:
        canvas.draw()  # lays it out, with all that it will show
        picture.set_layout_engine("none")
    for sentence in steps:
        canvas.draw()
        frames.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
        words.append(sentence)
    if not frames:
        raise ValueError("a player needs at least one step")
    return Player(picture, _differences(frames), words, pause_ms)


def _differences(frames: list[np.ndarray]) -> list[bytes]:
    """The first frame as a PNG; of the others what is new in each, all else transparent. One palette for all."""
    height = frames[0].shape[0]
    strip = Image.fromarray(np.concatenate(frames)).quantize(255, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    indices, palette = np.asarray(strip).reshape(len(frames), height, -1), strip.getpalette()
    pngs = [_png(indices[0], palette)]
    for before, now in zip(indices, indices[1:]):
        pngs.append(_png(np.where(now == before, _CLEAR, now), palette))
    return pngs


def _png(indices: np.ndarray, palette: list[int]) -> bytes:
    """With the colours that it has, which are few; the last one, if it is _CLEAR, is transparent."""
    used, packed = np.unique(indices, return_inverse=True)
    colours = np.array(palette + [0] * (3 * 256 - len(palette)), dtype=np.uint8).reshape(256, 3)
    image = Image.fromarray(packed.reshape(indices.shape).astype(np.uint8))
    image.putpalette(colours[used].tobytes())
    png = io.BytesIO()
    image.save(png, format="png", optimize=True, **({"transparency": len(used) - 1} if used[-1] == _CLEAR else {}))
    return png.getvalue()


def hide(artists) -> None:
    for artist in artists:
        artist.set_visible(False)


def by_gid(fig: Figure, gid: str) -> list:
    """The artists that were given this gid, in the order in which they were drawn."""
    return [artist for ax in fig.axes for artist in ax.get_children() if artist.get_gid() == gid]
