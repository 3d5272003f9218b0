"""Procedural faces with labels and captions: the demo's dataset, without a download (data.source=synthetic_faces).

Every random number is a hash of (seed, index, name), so a face depends on (seed, index) alone. Shapes are signed distances,
converted to pixel coverage and painted back to front. Coordinates are relative: a face looks the same at every size.

    python -m dataset.synthetic_faces sheet.png      # 8 x 8 faces; prints their captions
"""
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

# ---------------------------------------------------------------- attributes and palettes

ATTRIBUTES = {
    "sex": ("female", "male"),
    "age": ("child", "adult", "old"),
    "skin": ("pale", "light", "tan", "brown", "dark"),
    "hair": ("bald", "short", "spiky", "curly", "bob", "long", "bun", "pigtails"),
    "hair_color": ("black", "brown", "blond", "red", "gray", "none"),       # none: bald
    "fringe": ("no", "yes"),
    "eye_color": ("brown", "blue", "green"),
    "smile": ("no", "yes"),
    "mouth_open": ("no", "yes"),                                            # with a smile: shows teeth
    "glasses": ("no", "yes"),
    "beard": ("no", "yes"),
    "moustache": ("no", "yes"),
    "hat": ("no", "beanie", "sun hat"),
    "earrings": ("no", "yes"),
    "freckles": ("no", "yes"),
    "clothes": ("white", "black", "red", "blue", "green", "yellow"),
    "stripes": ("no", "yes"),
    "background": ("blue", "green", "pink", "yellow", "gray", "purple"),
    "backdrop": ("plain", "gradient", "spotlight"),
    "light": ("left", "right"),
}

# Mean RGB colors, in the order of the values in ATTRIBUTES. They stay distinct after random variation and shading.
SKIN = np.array([(250, 218, 198), (232, 180, 144), (206, 148, 102), (152, 97, 62), (94, 58, 42)])
HAIR = np.array([(40, 34, 40), (112, 68, 38), (226, 184, 98), (168, 62, 28), (172, 172, 178)])
EYES = np.array([(108, 60, 24), (48, 134, 232), (66, 168, 72)])
CLOTHES = np.array([(236, 234, 230), (46, 45, 54), (198, 50, 52), (48, 88, 176), (52, 134, 82), (234, 188, 58)])
BACKGROUND = np.array([(122, 168, 216), (126, 186, 132), (234, 150, 180), (240, 206, 120), (177, 178, 179), (148, 122, 190)])
HAT = np.array([(176, 48, 60), (40, 80, 140), (226, 170, 60), (60, 120, 92), (120, 74, 132), (222, 204, 170)])
FRAME = np.array([(34, 30, 34), (112, 52, 28), (150, 28, 44), (36, 60, 120)])
JEWEL = np.array([(250, 246, 236), (36, 176, 172), (216, 40, 70)])

# P(hair | sex, age), indexed [sex][age][hair]
HAIR_STYLE = np.array([
    [[0, .05, 0, .15, .20, .20, .05, .35], [0, .08, 0, .18, .24, .25, .13, .12], [0, .15, 0, .25, .25, .05, .30, 0]],
    [[0, .45, .33, .22, 0, 0, 0, 0], [.17, .33, .20, .16, 0, .09, .05, 0], [.33, .42, 0, .18, 0, .07, 0, 0]],
])
# P(natural hair color | age), indexed [age][color]. "none" has no column, because it is the color of bald heads only.
HAIR_COLOR = np.array([[.26, .27, .27, .20, 0], [.28, .27, .22, .21, .02], [.04, .04, .02, .02, .88]])


# ---------------------------------------------------------------- random numbers by hashing

def _mix(z):
    """Finalizer of splitmix64 (Steele, Lea & Flood 2014) on uint64 arrays, modulo 2**64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class _HashRandom:
    """Random numbers for a batch of images. A number is a hash of seed, image index and the name of the random variable.

    So renaming a variable, for example "hair_colour", would change all images.
    """

    def __init__(self, seed, indices):
        indices = np.asarray(indices)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise ValueError(f"indices must be a 1-d array of integers (got shape {indices.shape}, dtype {indices.dtype})")
        if indices.size and indices.min() < 0:
            raise ValueError(f"indices must not be negative (got {indices.min()})")
        seed = _mix(np.array([seed % 2**64], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        self.key = _mix(seed ^ _mix(indices.astype(np.uint64)))                     # (B,)

    def uniform(self, name, low=0.0, high=1.0):
        """Return (B,) float64 in [low, high)."""
        bits = _mix(self.key + np.array([zlib.crc32(name.encode())], np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        return low + (high - low) * (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def choice(self, name, p):
        """Return (B,) int64 categories; p holds the probabilities, (K,) or (B, K)."""
        edges = np.cumsum(np.atleast_2d(p), axis=1)[:, :-1]
        return (self.uniform(name)[:, None] >= edges).sum(1)

    def bernoulli(self, name, p):
        """Return (B,) int64: 1 with probability p, else 0. p is a scalar or (B,)."""
        return (self.uniform(name) < p).astype(np.int64)


def _attributes(rng):
    """Sample attributes: dictionary of name -> value indices (B,) int64. `natural_hair_color` colors brows and beard."""
    a = {}
    a["sex"] = rng.bernoulli("sex", 0.5)
    a["age"] = rng.choice("age", [.18, .58, .24])
    male, not_child = a["sex"] == 1, a["age"] > 0
    a["skin"] = rng.choice("skin", [.2] * 5)
    a["hair"] = rng.choice("hair", HAIR_STYLE[a["sex"], a["age"]])
    bald, style = a["hair"] == 0, a["hair"]
    a["natural_hair_color"] = rng.choice("hair_colour", HAIR_COLOR[a["age"]])
    a["hair_color"] = np.where(bald, 5, a["natural_hair_color"])
    hat = rng.choice("hat", [.70, .15, .15])
    a["hat"] = np.where(np.isin(style, [0, 2, 6]), 0, hat)                          # bald, spiky, bun: no hat
    a["fringe"] = rng.bernoulli("fringe", 0.5) * ~(np.isin(style, [0, 2, 6]) | (a["hat"] > 0))
    a["eye_color"] = rng.choice("eye_colour", [.4, .3, .3])
    a["smile"] = rng.bernoulli("smile", 0.55)
    a["mouth_open"] = rng.bernoulli("mouth_open", np.where(a["smile"] == 1, .45, .25))
    a["glasses"] = rng.bernoulli("glasses", np.array([.15, .3, .45])[a["age"]])
    a["beard"] = rng.bernoulli("beard", 0.42) * (male & not_child)
    a["moustache"] = rng.bernoulli("moustache", np.where(a["beard"] == 1, .75, .25)) * (male & not_child)
    a["earrings"] = rng.bernoulli("earrings", np.where(male, .06, .5))
    a["freckles"] = rng.bernoulli("freckles", 0.45) * (a["skin"] <= 1)
    a["clothes"] = rng.choice("clothes", [1 / 6] * 6)
    a["stripes"] = rng.bernoulli("stripes", 0.35)
    a["background"] = rng.choice("background", [1 / 6] * 6)
    a["backdrop"] = rng.choice("backdrop", [1 / 3] * 3)
    a["light"] = rng.bernoulli("light", 0.5)
    return a


def labels(seed: int, indices: np.ndarray) -> np.ndarray:
    """Return (B, len(ATTRIBUTES)) int64, columns in the order of ATTRIBUTES."""
    a = _attributes(_HashRandom(seed, indices))
    return np.stack([a[name] for name in ATTRIBUTES], axis=1)


def captions(seed: int, indices: np.ndarray) -> list[str]:
    """Return a caption per image, which mentions visible attributes only."""
    return [_caption(dict(zip(ATTRIBUTES, row))) for row in labels(seed, indices).tolist()]


def _caption(row):
    value = {name: ATTRIBUTES[name][i] for name, i in row.items()}
    person = {"child": ("girl", "boy"), "adult": ("woman", "man"), "old": ("old woman", "old man")}[value["age"]][row["sex"]]
    if row["smile"]:
        person = "smiling " + person
    has = [f"{value['skin']} skin"]
    if value["hair"] == "bald":
        has.append("a bald head")
    else:
        style = {"bun": "hair in a bun", "pigtails": "hair in pigtails", "bob": "hair in a bob"}
        color = value["hair_color"]
        has.append(f"{color} {style[value['hair']]}" if value["hair"] in style else f"{value['hair']} {color} hair")
    if row["fringe"]:
        has.append("a fringe")
    has.append(f"{value['eye_color']} eyes")
    words = {"glasses": "glasses", "beard": "a beard", "moustache": "a moustache", "earrings": "earrings",
             "freckles": "freckles", "mouth_open": "an open mouth"}
    has += [word for name, word in words.items() if row[name]]
    wears = [f"a {'striped ' if row['stripes'] else ''}{value['clothes']} shirt"]
    if row["hat"]:
        wears.append(f"a {value['hat']}")
    article = "an" if person[0] == "o" else "a"
    caption = (f"{article} {person} with {', '.join(has[:-1])} and {has[-1]}, wearing {' and '.join(wears)}, "
               f"on a {value['background']} background")
    return caption.replace("gray", "grey")                       # existing models were trained on captions with "grey"


# ---------------------------------------------------------------- geometry and colors

def _appearance(seed, indices):
    """Return three dictionaries: attributes a (B,), geometry g (B, 1) float32 and colors c (3, B, 1) float32.

    The image is [-1, 1]^2 with y down. The head is at its center, about 0.8 wide and 1.1 high before scaling by `zoom`.
    """
    rng = _HashRandom(seed, indices)
    a = _attributes(rng)
    rnd = rng.uniform
    male, child, old, style = a["sex"] == 1, a["age"] == 0, a["age"] == 2, a["hair"]
    smile, is_open = a["smile"] == 1, a["mouth_open"] == 1

    def by(values, attribute):                                   # lookup by attribute value
        return np.array(values)[attribute]

    g = {}
    # pose: position of the head, tilt in radians, turn (the face moves sideways within the head)
    g["cx"], g["cy"] = rnd("cx", -.07, .07), rnd("cy", -.03, .05) + np.where(child, .03, 0)
    tilt = rnd("tilt", -.13, .13)
    g["zoom"] = rnd("zoom", 1.16, 1.28) * np.where(child, .90, 1)
    g["cos"], g["sin"] = 1 - tilt**2 / 2, tilt - tilt**3 / 6
    g["turn"] = rnd("turn", -.07, .07)
    # head
    g["face_w"] = rnd("face_w", .385, .425) + np.where(child, .04, 0)
    g["jaw"] = rnd("jaw", .10, .32) * np.where(male, .6, 1)
    g["square"] = rnd("square", 0, .18) + np.where(male & ~child, .22, 0)
    g["neck"] = rnd("neck", .15, .17) + np.where(male, .05, 0) - np.where(child, .03, 0)
    g["shoulder"] = rnd("shoulder", .30, .42) - np.where(male, .1, 0) + np.where(child, .25, 0)
    g["neckline"] = rnd("neckline", .70, .84)
    g["v_neck"] = rnd("v_neck", -.25, .75)
    # eyes, brows, nose, mouth
    g["eye_x"] = rnd("eye_x", .165, .19)
    g["eye_y"] = np.where(child, .08, .02)
    g["eye_w"] = rnd("eye_w", .104, .118) + np.where(child, .008, 0)
    openness = rnd("openness", .056, .072) + np.where(child, .012, 0) + np.where(male, -.006, .004)
    g["lid_top"], g["lid_low"] = openness, openness * np.where(smile, .62, .85)
    g["eye_tilt"] = rnd("eye_tilt", -.04, .12)
    g["iris"] = rnd("iris", .058, .064) + np.where(child, .007, 0)
    g["gaze"] = rnd("gaze", -.018, .018)
    g["lash"] = np.where(male, .013, .026)
    g["brow_y"] = g["eye_y"] - rnd("brow_y", .125, .155)
    g["brow_h"] = rnd("brow_h", .016, .022) + np.where(male & ~child, .012, 0) - np.where(child, .002, 0)
    g["brow_tilt"] = rnd("brow_tilt", -.11, .09)
    g["nose_y"] = rnd("nose_y", .20, .235) + np.where(child, .01, 0)
    g["nose_w"] = rnd("nose_w", .062, .088) - np.where(child, .014, 0) + np.where(male, .006, 0)
    g["mouth_y"] = rnd("mouth_y", .355, .385) + np.where(child, .005, 0)
    g["mouth_w"] = np.where(smile, rnd("mouth_w", .155, .185), np.where(is_open, .085, rnd("mouth_w", .115, .14)))
    g["bend"] = np.where(smile, rnd("bend", .085, .115), np.where(is_open, -.02, rnd("bend", -.03, -.005)))
    g["gap"] = np.where(is_open, np.where(smile, rnd("gap", .085, .11), rnd("gap", .085, .10)), 0)
    g["teeth"] = np.where(is_open & smile, .048, 0)
    g["lips"] = rnd("lips", .030, .040) * np.where(male, .75, 1.1)
    # hair: cap, curtain and blob are explained in _draw. cap_cut, curtain, blob_y and fringe_y are heights (v). At -2 or -3,
    # above the image, they remove their part. cap_cut = 2, below the image, keeps the whole cap.
    g["cap_w"] = g["face_w"] + by([-.02, .025, .03, .13, .075, .06, .015, .025], style) + rnd("cap_w", 0, .03) * (style > 0)
    g["cap_h"] = by([.40, .56, .57, .62, .60, .59, .555, .57], style) + rnd("cap_h", 0, .04)
    g["cap_h"] += rnd("afro", 0, .08) * (style == 3)
    g["cap_w"] += (rnd("afro", 0, .10) - .10 * (a["hat"] > 0)) * (style == 3)
    g["cap_cut"] = by([-2, -.04, -.08, .25, 2, 2, .02, .05], style) + rnd("cap_cut", -.05, .07)
    g["curtain"] = by([-2, -2, -2, -2, .46, .95, -2, -2], style) + rnd("curtain", -.1, .1)
    g["curtain_w"] = g["cap_w"] - by([0, 0, 0, 0, .01, .01, 0, 0], style)
    g["flare"] = by([0, 0, 0, 0, .04, .05, 0, 0], style) * rnd("flare", -.5, 1.6)
    g["wave"] = rnd("wave", 0, .03) * (style == 5)
    g["blob_x"] = by([0, 0, 0, 0, 0, 0, 0, .52], style)
    g["blob_y"] = by([-3, -3, -3, -3, -3, -3, -.66, .22], style)
    g["blob_w"] = by([.1, .1, .1, .1, .1, .1, .17, .13], style) + rnd("blob", -.02, .02)
    g["blob_h"] = by([.1, .1, .1, .1, .1, .1, .14, .28], style) + rnd("blob", -.02, .02)
    g["curl"] = np.where(style == 3, rnd("curl", .035, .055), 0)
    g["spike"] = np.where(style == 2, rnd("spike", .11, .17), 0)
    g["lean"] = rnd("lean", -.5, .5)
    g["open_x"] = rnd("part", -.09, .09)
    g["open_w"] = g["face_w"] - by([0, .035, .035, .03, .045, .045, .02, .025], style)
    g["open_h"] = rnd("hairline", .46, .50) + np.where(male & old, .03, 0) - .02 * (style == 3)
    g["fringe_y"] = np.where(a["fringe"] == 1, g["brow_y"] - rnd("fringe_y", .03, .06), -3)
    g["fringe_slope"] = rnd("fringe_slope", -.22, .22)
    # hat
    hat = a["hat"]
    g["hat_y"] = np.where(hat > 0, rnd("hat_y", -.34, -.29), -3)
    g["brim_w"], g["brim_h"] = by([.1, .1, .74], hat), by([.01, .01, .085], hat)
    g["pompom"] = np.where((hat == 1) & (rnd("pompom") < .6), .11, 0)
    # accessories
    g["square_lens"] = rnd("round", 0, .8)
    g["lens_w"], g["lens_h"] = rnd("lens_w", .135, .15), rnd("lens_h", .105, .13)
    g["freckle"] = a["freckles"] * rnd("freckle", .65, .8)
    g["wrinkle"] = np.where(old, 1.0, 0.0)
    # brightness of the backdrop: bg_0 + bg_x * x + bg_y * y + bg_r * (x^2 + y^2)
    g["bg_x"] = rnd("bg_x", -.05, .05) * (a["backdrop"] == 1)
    g["bg_y"] = by([0, .18, 0], a["backdrop"]) * np.where(rnd("bg_flip") < .35, -1, 1)
    g["bg_r"] = by([0, 0, -.22], a["backdrop"])
    g["bg_0"] = by([1, 1, 1.16], a["backdrop"])
    # light (lx < 0: from the left) and stripes
    g["lx"] = np.where(a["light"] == 0, -1, 1) * rnd("lx", .6, .9)
    g["stripe_f"] = np.where(a["stripes"] == 1, rnd("stripe_f", 5.5, 7.5), 0)
    g["stripe_slope"] = rnd("stripe_slope", -.15, .15)
    g = {k: np.broadcast_to(x, a["sex"].shape).astype(np.float32)[:, None] for k, x in g.items()}

    warm = rnd("warm", -1, 1)[:, None]
    gain = 1 + warm * np.array([.04, 0, -.05])                   # warm or cold light

    def color(table, attribute, name, jitter):
        c = np.asarray(table)[attribute] * (1 + (2 * np.stack([rnd(name + x) for x in "rgb"], 1) - 1) * jitter)
        return c * gain * (1 + rnd(name + "v", -jitter, jitter))[:, None]

    skin = color(SKIN, a["skin"], "skin", .02)
    hair = color(HAIR, a["natural_hair_color"], "hair", .05)
    cloth = color(CLOTHES, a["clothes"], "clothes", .05)
    hat_c = color(HAT, rng.choice("hat_colour", [1 / 6] * 6), "hat", .06)
    depth = 1 - .25 * (a["skin"] / 4)[:, None]                   # weaker relative shadows on dark skin
    c = {"skin": np.minimum(skin * 1.03, 255), "skin_dark": skin * (1 - (1 - np.array([.66, .52, .46])) * depth)}
    c["lip"] = skin * np.where(male[:, None], [.80, .60, .56], [.84, .42, .44]) + np.where(male[:, None], 0, [18, 0, 6])
    c["blush"] = skin * [1.0, .74, .70]
    c["freckle"] = skin * [.66, .44, .30]
    c["hair"], c["hair_dark"] = hair, hair * [.55, .52, .55]
    c["hair_light"] = hair * 1.12 + 18
    c["brow"] = hair * np.where((a["natural_hair_color"] >= 2)[:, None], .62, .8)
    c["eye"] = color(EYES, a["eye_color"], "eye", .08)
    c["bg"] = color(BACKGROUND, a["background"], "bg", .04)
    c["cloth"], c["cloth_dark"] = cloth, cloth * .62
    c["stripe"] = np.where((cloth.mean(1) > 130)[:, None], cloth * .58, cloth * .6 + 105)
    c["hat"], c["hat_dark"], c["hat_band"] = np.minimum(hat_c * 1.08, 255), hat_c * .62, hat_c * .5 + 20
    c["frame"] = color(FRAME, rng.choice("frame", [.4, .25, .2, .15]), "frame", .1)
    c["jewel"] = color(JEWEL, rng.choice("jewel", [.34, .33, .33]), "jewel", .03)
    c = {k: np.ascontiguousarray(x.T, np.float32)[:, :, None] for k, x in c.items()}
    return a, g, c


# ---------------------------------------------------------------- drawing primitives on (B, P) float32 planes of P pixels

def _ellipse(x, y, rx, ry):
    """Approximate signed distance to an ellipse, negative inside."""
    d, e = x * (1 / rx), y * (1 / ry)
    d *= d
    e *= e
    d += e
    np.sqrt(d, out=d)
    d -= 1
    d *= (rx * ry) ** 0.5
    return d


def _cover(d, sharp):
    """Convert signed distance d to the covered fraction of each pixel, in place. sharp: pixels per unit length."""
    d *= -sharp
    d += np.float32(0.5)
    np.maximum(d, 0, out=d)
    np.minimum(d, 1, out=d)
    return d


def _glow(x, y, rx, ry):
    """Soft spot: 1 at the origin, 0 outside the ellipse."""
    d, e = x * (1 / rx), y * (1 / ry)
    d *= d
    e *= e
    d += e
    np.subtract(1, d, out=d)
    np.maximum(d, 0, out=d)
    d *= d
    return d


def _parabola(x, half_width):
    """1 - (x / half_width)^2: 1 at x = 0, 0 at x = +-half_width, negative outside."""
    d = x * (1 / half_width)
    d *= d
    np.subtract(1, d, out=d)
    return d


def _ripple(t):
    """Wave of period 1 and range 0..1, made of parabolas; unlike np.sin, it rounds the same on every platform."""
    t = t - np.floor(t)
    t *= 1 - t
    t *= 4
    return t


def _rgb(*rgb):
    return np.array(rgb, np.float32)[:, None, None]


def _paint(canvas, scratch, alpha, dark, light=None, shade=None):
    """Blend a color into canvas (3, B, P) with opacity alpha (B, P). `scratch` is a buffer of at least the canvas's shape.

    The color is `dark` (3, B, 1). If `light` (3, B, 1) is given, the color goes from dark at shade 0 to light at shade 1;
    `shade` is (B, P).
    """
    t = scratch[:, :canvas.shape[1], :canvas.shape[2]]
    if light is None:
        np.subtract(dark, canvas, out=t)
    else:
        np.multiply(light - dark, shade, out=t)
        t += dark
        t -= canvas
    t *= alpha
    canvas += t


def _draw(g, c, size, canvas, scratch):
    """Paint B faces of geometry g and colors c into canvas (3, B, size * size)."""
    g = _AttributeDict(g)
    axis = (np.arange(size, dtype=np.float32) * 2 + 1) / np.float32(size) - 1
    X, Y = np.tile(axis, size)[None], np.repeat(axis, size)[None]                  # (1, P)
    sharp = g.zoom * np.float32(size / 2)                                          # (B, 1): pixels per unit of u and v
    everywhere = slice(None)

    def rows(top, bottom):
        """Return the pixels with y in [top, bottom] as a slice, because painting the whole image is slower."""
        a, b = (int(np.clip(np.floor((y + 1) / 2 * size), 0, size)) for y in (top, bottom + 2 / size))
        return slice(a * size, b * size)

    def paint(alpha, s, dark, light=None, shade=None):
        _paint(canvas[:, :, s], scratch, alpha, dark, light, shade)

    # background
    np.multiply(c["bg"], X * g.bg_x + Y * g.bg_y + (X * X + Y * Y) * g.bg_r + g.bg_0, out=canvas)

    # (u, v): coordinates of the tilted head; fu: u for the facial features, shifted when the head turns
    x, y = (X - g.cx) * (1 / g.zoom), (Y - g.cy) * (1 / g.zoom)                    # upright, for the body
    u, v = x * g.cos + y * g.sin, y * g.cos - x * g.sin
    au, u2 = np.abs(u), u * u
    fu = u + (u2 * 1.2 - 1) * g.turn

    # Hair silhouette, the union of three shapes as a signed distance:
    # - cap: an ellipse around the skull above the curve v = cap_cut - 0.4 * u^2; spikes and curls displace its outline
    # - curtain (bob, long): |u| < curtain_w + flare * v, between v = -0.05 and the lower curve v = curtain - 0.5 * u^2
    # - blob: an ellipse at (blob_x, blob_y) and its mirror image at -blob_x (pigtails), or one at u = 0 (bun)
    # A hat removes all hair above hat_y. The face is painted over the silhouette.
    cap_v, curls = v + 0.05, np.float32(0)
    if g.spike.any():
        cap_v -= _ripple((u + v * g.lean) * 3.6 + 0.5) * np.minimum(v + 0.1, 0) * (g.spike * 2)
    if g.curl.any():
        curls = _ripple(u * 4.3 + v * 3.6 + _ripple(v * 2.6) * 0.4)
        curls += _ripple(u * 3.9 - v * 4.4 + _ripple(u * 2.9) * 0.4)
        curls *= g.curl
    d_cap = _ellipse(u, cap_v, g.cap_w, g.cap_h) - curls
    d_hair = np.maximum(d_cap, v + u2 * 0.4 - g.cap_cut - curls)
    if g.curtain.max() > -1:
        fall = au + _ripple(v * 2.3) * g.wave - g.curtain_w - v * g.flare
        fall = np.maximum(np.maximum(fall, v + u2 * 0.5 - g.curtain), -0.05 - v)
        d_hair = np.minimum(d_hair, fall)
    if g.blob_y.max() > -1:
        d_hair = np.minimum(d_hair, _ellipse(au - g.blob_x, v - g.blob_y, g.blob_w, g.blob_h))
    d_hair = np.maximum(d_hair, g.hat_y - 0.02 - v)
    paint(_cover(d_hair.copy(), sharp), everywhere, c["hair_dark"])

    # Front hair, painted after the face: the silhouette minus the part of the opening that is below the fringe line.
    # The opening is half an ellipse above v = 0.1 and a vertical strip of the same width below.
    opening = _ellipse(u - g.open_x, np.minimum(v - 0.1, 0), g.open_w, g.open_h)
    fringe = v - g.fringe_y - u * g.fringe_slope - _ripple(u * 6) * 0.03
    front = np.maximum(d_hair, np.minimum(-opening, fringe))

    # Head silhouette: un^2 + vn^2 - square * un^2 * vn^2 = 1, where un and vn are u and v divided by the half-axes of
    # an ellipse. `square` deforms the ellipse toward a rectangle. `jaw` makes the head narrower below v = 0.05.
    low = np.maximum(v - 0.05, 0)
    un, vn = u * (low * low * (g.jaw * 3) + 1) * (1 / g.face_w), (v - 0.04) * (1 / 0.56)
    un2, vn2 = un * un, vn * vn
    d_face = un2 + vn2 - np.minimum(un2, 1) * np.minimum(vn2, 1) * g.square
    d_face = (np.sqrt(np.maximum(d_face, 0, out=d_face), out=d_face) - 1) * g.face_w

    # Clothes: the area below the shoulder curve. Neck: this area and a vertical strip, in skin color, both only above
    # the neckline.
    s = rows(.30, 1)
    bx, by = np.abs(x[:, s]), y[:, s]
    b2 = bx * bx
    d_body = b2 * b2 * 0.5 + b2 * g.shoulder + .60 - by
    cloth = _cover(d_body.copy(), sharp)
    paint(cloth, s, c["cloth_dark"], c["cloth"], by * -0.5 + x[:, s] * (g.lx * 0.22) + 1.15)
    if g.stripe_f.any():
        stripe = 0.55 - _ripple((by + b2 * g.stripe_slope) * g.stripe_f)
        paint(_cover(stripe, sharp / 8) * cloth * np.minimum(g.stripe_f, 1), s, c["stripe"])
    below = by + bx * g.v_neck + b2 * 0.9 - g.neckline                             # > 0 below the neckline
    paint(_cover(np.abs(below) - 0.022, sharp) * cloth, s, c["cloth_dark"])
    flare = np.maximum(by - 0.55, 0)
    d_neck = np.minimum(bx - g.neck - flare * flare * 1.5, d_body)
    d_neck = np.maximum(np.maximum(d_neck, below), 0.2 - by)
    shade = np.clip(d_face[:, s], 0, 0.3) * 2.2 + x[:, s] * (g.lx * 0.5) + 0.12    # the chin casts a shadow
    paint(_cover(d_neck, sharp), s, c["skin_dark"], c["skin"], np.clip(shade, 0, 1, out=shade))

    # ears
    s = rows(-.32, .45)
    eu, ev = au[:, s] - g.face_w, v[:, s] - 0.06
    paint(_cover(_ellipse(eu, ev, 0.075, 0.115), sharp), s, c["skin"] * 0.6 + c["skin_dark"] * 0.4)
    paint(_glow(eu - 0.02, ev, 0.05, 0.09), s, c["skin_dark"])

    # face: shade 0 gives the color skin_dark, shade 1 the color skin
    s = rows(-.75, .85)
    U, V, AU = fu[:, s], v[:, s], np.abs(fu[:, s])
    shade = 0.98 - (un2[:, s] + vn2[:, s]) * 0.26 + un[:, s] * (g.lx * 0.34) - vn[:, s] * 0.10
    shade -= np.maximum(d_face[:, s] + 0.13, 0) * 1.3                                         # outline
    shade -= _glow(AU - g.eye_x, V - g.eye_y + 0.03, 0.19, 0.14) * 0.22                       # eye sockets
    shade -= _glow(U + g.lx * 0.06, V - g.nose_y + 0.08, 0.075, 0.17) * 0.32                  # dark side of the nose
    shade += _glow(U - g.lx * 0.015, V - g.nose_y + 0.07, 0.045, 0.20) * 0.25                 # ridge and tip of the nose
    shade -= _glow(U, V - g.mouth_y - 0.095, 0.12, 0.05) * 0.25                               # below the lip
    cast = np.minimum(front[:, s], V - g.hat_y - u2[:, s] * 0.3)
    shade -= np.clip(0.32 - cast * 2.6, 0, 0.32)                                              # shadow of hair and hat
    if g.wrinkle.any():                                                                       # mouth, eyes, forehead
        shade -= _glow(AU - V * 0.35 - 0.085, V - 0.31, 0.03, 0.13) * (g.wrinkle * 0.95)
        shade -= _glow(AU - g.eye_x, V - g.eye_y - 0.105, 0.12, 0.035) * (g.wrinkle * 0.85)
        lines = _ripple(V * 12 + U * U * 2)
        lines *= lines
        shade -= lines * lines * _glow(U, V + 0.31, 0.26, 0.13) * (g.wrinkle * 0.95)
    shade = np.clip(shade, 0, 1.1, out=shade)
    paint(_cover(d_face[:, s].copy(), sharp), s, c["skin_dark"], c["skin"], shade)
    paint(_glow(AU - 0.235, V - 0.20, 0.15, 0.12) * 0.55, s, c["blush"])

    # freckles: peaks of two crossing ripples
    if g.freckle.any():
        s = rows(-.15, .5)
        U, V = fu[:, s], v[:, s]
        dots = np.maximum(_ripple(U * 13 + V * 4) * _ripple(V * 14 - U * 3) - 0.55, 0)
        dots *= _glow(np.abs(U) - 0.16, V - 0.16, 0.22, 0.15) * (g.freckle * 6)
        paint(np.minimum(dots, 0.75), s, c["freckle"])

    # beard: the lower face minus an ellipse (the cheeks) and minus the mouth; moustache: a stroke along a parabola
    if g.beard.any() or g.moustache.any():
        s = rows(-.1, .85)
        U, V = fu[:, s], v[:, s]
        beard = np.maximum(d_face[:, s] - 0.025, -_ellipse(U, V - 0.02, g.face_w * 0.86, 0.285))
        mouth = _ellipse(U, V - g.mouth_y, g.mouth_w, g.lips * 1.3 + g.gap * 0.5)
        beard = np.maximum(np.maximum(beard, -0.02 - V), 0.010 - mouth)
        paint(_cover(beard, sharp * 0.7) * (g.beard * 0.93), s, c["brow"])
        moustache = np.abs(V - (g.nose_y + g.mouth_y) * 0.5 - 0.005 - U * U * 2) - _parabola(U, 0.17) * 0.045
        paint(_cover(moustache, sharp) * g.moustache, s, c["brow"])

    # Mouth. The lips meet on the curve V = mouth_y + (parabola - 0.5) * bend. In a smile, the middle of this curve is lower
    # than its ends. Lips, gap and teeth are bands around the curve. `line` is the distance below the curve. `wide` scales
    # the thickness of the bands: 1 in the middle of the mouth, 0 at its corners. `ends` is positive beyond the corners,
    # where it cuts the bands off.
    s = rows(.15, .70)
    U, V = fu[:, s], v[:, s]
    parabola = _parabola(U, g.mouth_w)
    wide, ends = np.maximum(parabola, 0), parabola * (g.mouth_w * -0.5)
    line = V - g.mouth_y - (parabola - 0.5) * g.bend
    lip = np.maximum(-line - wide * g.lips - 0.004, line - wide * (g.lips * 1.35 + g.gap))
    paint(_cover(np.maximum(lip, ends), sharp), s, c["lip"])
    gap = np.maximum(-line - wide * 0.011, line - wide * g.gap - np.minimum(wide * 3, 1) * 0.011)
    paint(_cover(np.maximum(gap, ends), sharp) * 0.95, s, _rgb(88, 26, 32) * (c["lip"] * 0.003 + 0.45))
    if g.teeth.any():
        teeth = np.maximum(np.maximum(-line, line - np.minimum(wide * g.gap, g.teeth)), ends)
        paint(_cover(teeth + 0.004, sharp) * np.minimum(g.teeth * 100, 1), s, _rgb(250, 246, 238))

    # nostrils
    s = rows(.05, .45)
    U, V = fu[:, s], v[:, s] - g.nose_y
    paint(_glow(np.abs(U) - g.nose_w * 0.62, V, g.nose_w * 0.6, 0.032) * 0.9, s, c["skin_dark"] * 0.82)
    paint(_glow(U, V - 0.012, g.nose_w * 1.2, 0.035) * 0.6, s, c["skin_dark"])

    # Eyes. (ex, ey): coordinates relative to the center of the nearer eye. `out`: horizontal distance from this center,
    # positive away from the nose. The lids (`top`, `low`) are parabolas through both corners of the eye. The iris is a disk
    # that is visible only between the lids.
    s = rows(-.26, .34)
    U = fu[:, s]
    out, ex = np.abs(U) - g.eye_x, U - np.copysign(g.eye_x, U)
    ey = v[:, s] - g.eye_y + out * g.eye_tilt
    parabola = _parabola(out, g.eye_w)
    top, low = parabola * -g.lid_top, parabola * g.lid_low
    lash = np.maximum(top - ey - g.lash - 0.008 - np.maximum(out, 0) * (g.lash * 3), ey - low - 0.006)
    paint(_cover(lash, sharp), s, c["brow"] * 0.35)
    white = _cover(np.maximum(top - ey, ey - low), sharp)
    paint(white, s, _rgb(244, 241, 238))
    ix, iy = ex - g.gaze, ey + 0.006
    ring = _ellipse(ix, iy, g.iris, g.iris)
    paint(_cover(ring.copy(), sharp) * white, s, c["eye"] * 0.62)
    paint(_cover(ring + 0.010, sharp) * white * np.clip(iy * 9 + 0.75, 0.25, 1), s, c["eye"])
    paint(_cover(ring + g.iris * 0.6, sharp) * white, s, _rgb(18, 14, 16))
    paint(_cover(_ellipse(ix - g.lx * 0.024, iy + 0.022, 0.016, 0.016), sharp), s, _rgb(255, 255, 255))

    # brows: strokes along a parabola, thickest in the middle
    s = rows(-.36, .22)
    out = np.abs(fu[:, s]) - g.eye_x
    brow = np.abs(v[:, s] - g.brow_y + (out - 0.02) * g.brow_tilt - out * out * 1.6)
    brow -= _parabola(out - 0.005, g.eye_w * 1.3) * g.brow_h
    paint(_cover(brow, sharp) * 0.92, s, c["brow"])

    # glasses: rims (round to square, same formula as the head silhouette), a bar for bridge and temples, faint lenses
    if g.glasses.any():
        s = rows(-.36, .42)
        U, V = np.abs(fu[:, s]), v[:, s] - g.eye_y
        lx, ly = (U - g.eye_x - 0.008) * (1 / g.lens_w), (V - 0.01) * (1 / g.lens_h)
        lx *= lx
        ly *= ly
        lens = np.maximum(lx + ly - np.minimum(lx, 1) * np.minimum(ly, 1) * g.square_lens, 0)
        lens = (np.sqrt(lens, out=lens) - 1) * 0.125
        paint(_cover(lens.copy(), sharp) * (g.glasses * 0.16), s, _rgb(236, 244, 250))
        bar = np.maximum(np.abs(V + 0.02 - U * U) - 0.016, -lens)
        rim = np.minimum(np.abs(lens) - 0.017, np.maximum(bar, U - g.face_w))
        paint(_cover(rim, sharp) * g.glasses, s, c["frame"])

    # Front hair, shaded with gloss on the lit side, strands and curls.
    gloss = np.maximum(_parabola(d_cap + 0.16, 0.11), 0) * (np.clip(u * g.lx + 0.35, 0, 1) * 0.8)
    gloss += _ripple((u + g.open_x) * (7 - v * 2) + v) * 0.22 + curls * 3.2
    gloss += u * (g.lx * 0.35) - v * 0.12 + 0.22
    paint(_cover(front, sharp), everywhere, c["hair_dark"], c["hair_light"], np.clip(gloss, 0, 1, out=gloss))

    # hat: pompom, crown above a curved line, band, brim
    if g.hat.any():
        s = rows(-1, .15)
        U, V = u[:, s], v[:, s]
        line = V - g.hat_y - u2[:, s] * 0.3
        crown = _ellipse(U, V + 0.10, g.cap_w + 0.05, g.cap_h + 0.035)
        felt = c["hat_dark"], c["hat"], np.clip(_ripple(U * 9) * 0.10 + U * (g.lx * 0.5) - V * 0.2 + 0.62, 0, 1)
        pompom = _ellipse(U, V + 0.16 + g.cap_h, g.pompom + 0.001, g.pompom + 0.001)
        band = np.maximum(crown - 0.012, np.abs(line + 0.05 + (g.hat - 1) * 0.07) - 0.05)
        has_hat, has_brim = np.minimum(g.hat, 1), np.maximum(g.hat - 1, 0)
        paint(_cover(pompom, sharp) * np.minimum(g.pompom * 100, 1), s, *felt)
        paint(_cover(np.maximum(crown, line), sharp) * has_hat, s, *felt)
        paint(_cover(band, sharp) * has_hat, s, c["hat_band"])
        paint(_cover(_ellipse(U, line, g.brim_w, g.brim_h), sharp) * has_brim, s, *felt)

    # earrings, over the hair
    if g.earrings.any():
        s = rows(0, .55)
        drop = _ellipse(au[:, s] - g.face_w - 0.025, v[:, s] - 0.225, 0.048, 0.055)
        paint(_cover(drop.copy(), sharp) * g.earrings, s, c["jewel"] * 0.6)
        paint(_cover(drop + 0.014, sharp) * g.earrings, s, c["jewel"])


class _AttributeDict(dict):
    """Dictionary with attribute access, to keep formulas short."""

    __getattr__ = dict.__getitem__


# ---------------------------------------------------------------- rendering in chunks

# Number of pixels painted at once, over all images of a chunk. One float32 color channel has 512 KiB and fits in the CPU
# cache. With smaller chunks, two threads would spend most of the time waiting for Python's GIL.
CHUNK_PIXELS = 32 * 64 * 64


def render(seed: int, indices: np.ndarray, size: int) -> np.ndarray:
    """Return (B, size, size, 3) uint8 RGB; image i depends on (seed, indices[i], size) alone.

    The same (seed, index) gives the same face at every size. The size must be at least 16.
    """
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels (got {size})")
    a, g, c = _appearance(seed, indices)
    g |= {name: a[name].astype(np.float32)[:, None] for name in ("glasses", "beard", "moustache", "hat", "earrings")}
    images = np.empty((len(indices), size, size, 3), np.uint8)
    step = max(1, CHUNK_PIXELS // size**2)
    starts = range(0, len(indices), step)
    # Group similar faces, so that most chunks skip whole layers (hats, curls, beards).
    order = np.lexsort([a[name] for name in ("freckles", "earrings", "age", "beard", "glasses", "hat", "hair")])
    g, c = {k: x[order] for k, x in g.items()}, {k: x[:, order] for k, x in c.items()}

    def render_chunks(starts):
        canvas = np.empty((3, step, size * size), np.float32)
        scratch = np.empty_like(canvas)
        for i in starts:
            part = slice(i, min(i + step, len(indices)))
            view = canvas[:, :part.stop - i]
            _draw({k: x[part] for k, x in g.items()}, {k: x[:, part] for k, x in c.items()}, size, view, scratch)
            view += np.float32(0.5)
            np.clip(view, 0, 255, out=view)
            for k in range(3):
                images[order[part], :, :, k] = view[k].reshape(-1, size, size)

    threads = max(1, min(2, os.cpu_count() or 1, len(starts)))                     # 2 are 1.6 times as fast as 1; more wait for GIL
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(render_chunks, [starts[t::threads] for t in range(threads)]))    # list() raises the threads' errors
    return images


if __name__ == "__main__":
    from PIL import Image
    faces = render(0, np.arange(64), 128)                                          # (64, 128, 128, 3)
    sheet = faces.reshape(8, 8, 128, 128, 3).transpose(0, 2, 1, 3, 4).reshape(1024, 1024, 3)
    Image.fromarray(sheet).save(sys.argv[1])
    print("\n".join(captions(0, np.arange(64))))
