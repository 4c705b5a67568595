"""How a garment is drawn: a silhouette, a cloth, and marks such as seams, laces and handles.

A silhouette is its "inside distance": pixels to the edge, positive inside. A whole batch is drawn
at once: (n, 1, 1) parameters broadcast over the (28, 28) pixel grid. Every number below was found
by looking at the real images and at what a network confuses; none means anything by itself.
"""
# fmt: off

from collections.abc import Callable
from functools import partial, reduce
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Field = NDArray[Any]  # float32 (or bool), broadcasts to (n, 28, 28)
Images = NDArray[np.uint8]  # (n, 28, 28)
Span = tuple[float, float]  # lowest and highest value of a uniform draw

SIDE, MIDDLE = 28, 13.5  # pixels along an edge; the centre line between pixels 13 and 14
NOWHERE = -9.0  # the inside distance of a part that an image does not have
X: Field = np.arange(SIDE, dtype=np.float32)[None, None, :]  # (1, 1, 28) columns, left to right
Y: Field = np.arange(SIDE, dtype=np.float32)[None, :, None]  # (1, 28, 1) rows, top to bottom


class Batch:
    """Random draws for n images: parameters (n, 1, 1) and noise fields (n, 28, 28)."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.rng, self.size = rng, size

    def between(self, low: Any, high: Any) -> Field:
        """Uniform numbers from low to high, one an image."""
        return self.rng.uniform(low, high, (self.size, 1, 1)).astype(np.float32)

    def chance(self, share: float) -> Field:
        """True in that share of the images."""
        return self.rng.random((self.size, 1, 1)) < share

    def noise(self, rows: int, columns: int) -> Field:
        """Normal noise on a coarse grid, interpolated to pixels."""
        grid = self.rng.standard_normal((self.size, rows, columns), dtype=np.float32)
        up, across = (np.clip(1 - abs(np.linspace(0, n - 1, SIDE)[:, None] - np.arange(n)), 0, 1)
                      for n in (rows, columns))  # (28, n) weights of linear interpolation
        return np.asarray(up.astype(np.float32) @ grid @ across.T.astype(np.float32))

    def mark(self, cover: Field, low: float, high: float, share: float = 1.0) -> Field:
        """A change of brightness by low..high on `cover`, in that share of the images."""
        return np.asarray(cover * self.between(low, high) * self.chance(share))


def _all(*insides: Field) -> Field:
    """Inside distance of the overlap of shapes; np.maximum makes their union."""
    return reduce(np.minimum, insides)


def _cover(*insides: Field) -> Field:
    """Share of each pixel that the overlap of shapes covers: anti-aliased edges."""
    return np.clip(_all(*insides) + 0.5, 0, 1)


def _profile(at: Field, *knots: tuple[Any, Any]) -> Field:
    """Piecewise linear curve through (position, value) knots, constant outside them."""
    curve = knots[0][1]
    for (start, value), (end, next_value) in pairwise(knots):
        curve = curve + np.clip((at - start) / (end - start), 0, 1) * (next_value - value)
    return np.asarray(curve)


def _rod(x: Field, y: Field, start: tuple[Any, Any], end: tuple[Any, Any], radius: Any) -> Field:
    """Inside distance of a rod with round ends: a sleeve, a strap, a handle."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = np.clip(((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.asarray(radius - np.hypot(x - start[0] - along * dx, y - start[1] - along * dy))


def _cloth(b: Batch, x: Field, dark: float, stripes: float, checks: float, prints: float) -> Field:
    """Brightness 0..1; the shares say how often it is dark, striped, checked or printed."""
    tone = np.where(b.chance(dark), b.between(0.12, 0.48), b.between(0.58, 1))
    checked, striped = b.chance(checks), b.chance(stripes)
    waves = (np.sin(at * b.between(0.8, 2.4) + b.between(0, 6)) * 2 for at in (Y, x))
    bands, bars = (np.clip(wave + b.between(-1, 1), 0, 1) for wave in waves)
    weave = (bands * (checked | striped) + bars * (checked | b.chance(stripes / 4))) / (1 + checked)
    spots = np.clip(b.noise(18, 18) * 2 - b.between(-0.5, 1.5), 0, 1) * b.chance(prints)
    pattern = np.maximum(weave, spots) * b.between(0.1, 0.6)
    folds = b.between(0, 0.15) * b.noise(4, 12) + b.between(0, 0.2) ** 2 * b.noise(SIDE, SIDE)
    return np.asarray(tone * (1 + folds) + np.where(tone < 0.5, pattern, -pattern))


def _finish(b: Batch, inside: Field, tone: Field) -> Images:
    """Cut out the silhouette, sharpen (as the real images were), and vary the exposure."""
    image = np.broadcast_to(_cover(inside) * np.clip(tone, 0.02, 1), (b.size, SIDE, SIDE))
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    blurred = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]) / 9
    sharp = np.clip(image + b.between(0.2, 1.2) * (image - blurred), 0, 1)
    return np.asarray(b.between(230, 255) * sharp ** b.between(0.8, 1.2), dtype=np.uint8)


def _top(b: Batch, bare: float = 0, short: float = 0.03, neck: Span = (3.4, 6),
         shoulder: Span = (7, 8.6), waist: Span = (5.5, 7.4), flare: Span = (-0.7, 0.7),
         hem: Span = (21, 29), slope: Span = (0.7, 2.2), collar: Span = (0, 2),
         depth: Span = (0.5, 4), buttons: float = 0.02, zipped: float = 0.05, logo: float = 0.28,
         cloth: tuple[float, float, float, float] = (0.25, 0.15, 0.02, 0.1)) -> Images:
    """A pullover by default; `bare` and `short` are the shares without and with short sleeves."""
    x = X - MIDDLE - b.between(-0.7, 0.7) - b.between(-0.03, 0.03) * (Y - MIDDLE)
    ax, kind, base, end = abs(x), b.between(0, 1), b.between(*collar), b.between(*hem)
    throat, side, middle = b.between(*neck), b.between(*shoulder), b.between(*waist)
    top = base + b.between(*slope)
    width = _profile(Y, (0, throat * b.between(0.7, 1)), (base + 0.1, throat), (top, side),
                     (top + 4, side * 0.93), (15, middle), (28, middle + b.between(*flare)))
    body = _all(width - ax, end - Y + b.between(-0.02, 0.03) * ax * ax)
    thick, cuff = b.between(1.6, 2.8), 27.5 - b.between(0, 2.5) ** 2
    cuff = np.where(kind < bare + short, top + b.between(3, 9), cuff)
    sleeve = _rod(ax, Y, (side - thick * 0.6, top + thick * 0.7),
                  (side + b.between(-0.2, 2.5), cuff), thick)
    sleeve = np.where(kind < bare, NOWHERE, sleeve)
    deep = (0.5 + b.between(*depth) * b.between(0, 1)) * np.where(kind < bare, 1.5, 1)
    drop = np.clip((Y + 0.5 - base * b.chance(0.4)) / deep, 0, 2)
    opening = throat * b.between(0.6, 1) * (1 - drop ** b.between(0.8, 4)) - ax  # from V to U
    tone = _cloth(b, x, *cloth) * (1 + b.between(-0.15, 0.2) * (ax / 9) ** 2)
    tone += tone * b.mark(_cover(sleeve), -0.1, 0.25)
    armpit = top + b.between(2, 6)  # below it the sleeve hangs beside the body
    tone += b.mark(_cover(0.5 - abs(sleeve), body - 0.5, Y - armpit), -0.25, 0.6)
    line = _cover(b.between(0.1, 0.8) - ax)
    dots = line * (np.sin(Y * b.between(1.2, 2.2) + b.between(0, 6)) > 0.6)
    tone += b.chance(buttons) * (b.mark(line, -0.25, 0.25) + b.mark(dots, -0.45, 0.45))
    tone += b.mark(line, -0.5, 0.5, zipped)
    chest = _cover(Y - b.between(5, 10), b.between(10, 18) - Y, b.between(1.5, 4.5) - ax)
    art = chest * np.clip(b.noise(14, 14) * 2 + b.between(-0.5, 1.5), 0, 1)
    tone += b.mark(art, 0.2, 0.9, logo) * np.sign(0.5 - tone)
    tone += b.mark(_cover(Y - end + b.between(1, 2.5)), -0.25, 0.2, 0.5)
    tone += b.mark(_cover(opening + b.between(0.8, 2.2)), -0.3, 0.4, 0.7)
    hole = np.where(b.chance(0.6), opening - b.between(0, 2.5), NOWHERE)
    tone = np.where(opening > 0, b.between(0.3, 1), tone)
    return _finish(b, _all(np.maximum(body, sleeve), -hole), tone)


def _trouser(b: Batch) -> Images:
    """Two legs and the gap between them."""
    x = X - MIDDLE - b.between(-0.8, 0.8) - b.between(-0.04, 0.04) * (Y - MIDDLE)
    ax = abs(x + b.mark(np.sin(Y / 9), -1, 1, 0.3))  # some stand with a bent knee
    hip, crotch = b.between(4.6, 6.1), b.between(7, 13)
    outer = _profile(Y, (0, b.between(3.9, 5.6)), (7, hip), (27, b.between(2.6, 5.5))) - ax
    gap = _profile(Y, (crotch, -0.5), (crotch + 2, b.between(0, 0.8)), (28, b.between(0.1, 2.5)))
    legs = np.where((crotch > Y) | b.chance(0.03), outer, _all(outer, ax - gap))  # rarely a skirt
    tone = _cloth(b, x, 0.13, 0.02, 0.02, 0.06) * (1 - b.between(-0.2, 0.4) * abs(ax - hip / 2) / 4)
    tone += b.mark(_cover(b.between(0.5, 2.5) - Y), -0.2, 0.3)  # waistband
    return _finish(b, legs, tone + b.mark(_cover(0.6 - ax, crotch - Y), -0.4, 0.3))


def _shoe(b: Batch, peak: Span = (10.5, 14), tall: float = 0.25, heel: Span = (0, 0.4),
          high_heel: float = 0, front: Span = (13, 20), rise: Span = (3, 8), dip: Span = (0.65, 1),
          toe: Span = (3, 6), sole: Span = (0.5, 3), dark: float = 0.2, laced: float = 0.5,
          straps: float = 0) -> Images:
    """A sneaker by default; over `rise` columns its upper climbs to a peak at column `front`."""
    lift = b.between(*heel) + b.chance(high_heel) * b.between(1, 12)
    height = b.between(*peak) + b.chance(tall) * b.between(0, 6) + lift * 0.7
    up = MIDDLE + height / 2 - Y
    tip, crest, climb, end = b.between(*toe), b.between(*front), b.between(*rise), b.between(26, 27)
    foot = _profile(X, (0, b.between(0, 1)), (3, 0), (11, 0), (20, lift), (28, lift))
    instep = tip * 1.2 + np.clip(8 - climb, 0, 8) * height / 40 + lift * 0.3
    upper = _profile(X, (-0.5, tip * 0.4), (2, tip), (crest - climb, instep), (crest, height),
                     (crest + 3, height * b.between(*dip)), (28, height * b.between(0.7, 1)))
    shape = _all(upper - up, up - foot, end - X)
    tone = _cloth(b, X, dark, 0, 0, 0.06)
    tone += np.clip(b.noise(5, 7) * 4, -1, 1) * b.between(0, 0.35) ** 2  # sewn panels
    slant = X + up * b.between(-1.2, 1.2)
    if straps:
        bands = np.sin(slant * b.between(0.6, 1.6) + b.between(0, 6)) * 2 + b.between(-1.6, 1)
        rim = np.where(b.chance(0.6), b.between(0.5, 1.3) - upper + up, NOWHERE)
        cuff = _rod(X, up, (25, height - 1), (b.between(13, 20), height - b.between(1, 3)), 0.7)
        cuff = np.where(b.chance(0.5), cuff, NOWHERE)  # around the ankle
        cut = np.maximum(_all(shape, np.maximum(bands, rim)), cuff)
        shape = np.where(b.chance(straps), cut, shape)
    else:
        bars = np.clip(3 * np.sin(slant * b.between(0.6, 2)), 0, 1) * _cover(4 - abs(slant - 17))
        tone += b.mark(bars, -0.7, 0.4, 0.3)
    laces = _cover(1 - abs(upper - up - 1.5), crest - X) * (np.sin(X * b.between(1.6, 2.6)) > 0)
    tone += b.mark(laces, -0.3, 0.3, laced)
    block = _all(X - end + b.between(1, 7), end - X, up, lift - up)
    block = np.where(b.chance(straps / 3), _all(foot - up, up), block)  # a wedge
    base = np.maximum(block, _all(up - foot + 0.5, foot + b.between(*sole) - up, end + 0.5 - X))
    ground = np.where(b.chance(0.55), b.between(0.4, 1), b.between(0.1, 0.4))
    tone += b.mark(_cover(1 - abs(up - foot - b.between(1, 4))), -0.4, 0.3)  # stitched to the sole
    return _finish(b, np.maximum(shape, base), tone + _cover(base) * (ground - tone))


def _bag(b: Batch) -> Images:
    """A box with cut corners: a clutch, or one with a round or a pointed handle."""
    carried = b.chance(0.55)  # by a handle on top: then it fills the height of the image
    handle = np.where(carried, b.between(3, 13), 0)
    width = np.where(carried, b.between(6, 14), b.between(10, 14.2))
    height = np.where(carried, SIDE - handle, b.between(14, 25))
    x = X - MIDDLE - b.between(-0.5, 0.5)
    ax, down = abs(x), Y + 0.5 - np.where(carried, handle, (SIDE - height) / 2)
    side = width * (1 - b.mark(1 - down / height, 0, 0.25, 0.5)) - ax
    within = _all(down, height - down)
    reach = width * b.between(0.2, 0.7)
    arch = abs(1 - np.hypot(ax / reach, np.minimum(down, 0) / np.maximum(handle, 1))) * reach
    peaked = _rod(ax, down, (0, -handle), (reach, 0), 0.7)
    loop = np.where(b.chance(0.5), b.between(0.5, 1.1) - arch, peaked)
    shape = np.maximum(_all(side, within, side + within - b.between(0, 5)),  # corners cut off
                       np.where(carried & (down < 1), loop, NOWHERE))
    strap = _rod(ax + x * b.between(-1, 1), down, (width, 1), (13, height * b.between(0.5, 1)), 0.6)
    shape = np.maximum(shape, np.where(b.chance(0.4), strap, NOWHERE))  # hangs down at the sides
    tone = _cloth(b, x, 0.27, 0.05, 0.03, 0.08)
    tone += b.mark(_cover(0.5 - abs(_all(side, within) - b.between(0.5, 2))), -0.3, 0.3)  # piping
    flap = abs(down - height * b.between(0.1, 0.7) + b.between(0, 0.3) * ax)
    tone += b.mark(_cover(0.5 - flap), -0.5, 0.4, 0.5)
    tone += b.mark(_cover(b.between(0.5, 2) - np.maximum(ax, flap)), -0.7, 0.5, 0.4)  # buckle
    return _finish(b, shape, tone)


DRAWERS: dict[int, Callable[[Batch], Images]] = {
    1: _trouser, 2: _top, 7: _shoe, 8: _bag,  # the others vary a pullover or a sneaker:
    0: partial(_top, bare=0.25, short=0.73, neck=(3, 5.5), shoulder=(6.2, 8.2), waist=(5, 8),
               hem=(26, 29), collar=(0, 0.5), depth=(0.5, 6), zipped=0, logo=0.45),
    3: partial(_top, bare=0.5, short=0.25, neck=(2.5, 5), shoulder=(3.8, 6.6), waist=(3.2, 6),
               flare=(-0.7, 3.5), hem=(27, 29), collar=(0, 0.5), depth=(0.5, 6), logo=0.03),
    4: partial(_top, neck=(2.8, 4.6), slope=(2, 4.5), flare=(-0.5, 1.5), collar=(0, 2.5),
               buttons=0.3, zipped=0.65, logo=0.06, cloth=(0.12, 0.1, 0.02, 0.08)),
    5: partial(_shoe, peak=(6, 12), heel=(0, 2), high_heel=0.45, front=(15, 24), rise=(3, 10),
               dark=0.25, laced=0, straps=0.97),
    6: partial(_top, bare=0.1, short=0.3, neck=(2.2, 4.5), slope=(1.3, 3.5), flare=(-0.5, 1.5),
               hem=(23, 29), buttons=0.45, logo=0.08, cloth=(0.45, 0.1, 0.14, 0.2)),
    9: partial(_shoe, peak=(13, 20), heel=(0.5, 2.5), high_heel=0.25, front=(12, 17),
               rise=(1.2, 6), dip=(0.9, 1.03), sole=(0, 1.6), dark=0.06, laced=0.2),
}
