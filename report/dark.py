"""A figure's dark version, inside the figure: a style that a browser applies where its reader prefers dark pages."""

import colorsys
import re

from matplotlib.colors import to_hex, to_rgb

PAPER, INK = 0.096, 0.87  # lightness of the dark page and of its text: --paper and --ink in style.css
PAGE = "#15181c"
# from what each differs, and how much at the least (Web Content Accessibility Guidelines 2.2, 1.4.11 and 1.4.3)
CONTRASTS = {"line": (PAGE, 3), "text": (PAGE, 4.5), "area": ("#d9d9d9", 4.5)}
MARKS = "[id^=line2d] *, [id^=PathCollection] *"  # of lines, and scattered points
RULES = [("fill", "line", f":is({MARKS})"), ("fill", "text", ":is(text, [id^=text_] *)")]
RULES += [("stroke", "line", ":not([id^=QuadMesh] *)")]  # a mesh is data, whatever its colours
RULES += [("fill", "area", f":not(g, [id^=text_] *, [id^=QuadMesh] *, {MARKS})")]


def contrast(*colours: str) -> float:
    """The contrast of two colours "#rrggbb", from 1 to 21, by their luminance, as those guidelines define it."""
    parts = [[p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in to_rgb(one)] for one in colours]
    low, high = sorted(0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue in parts)
    return (high + 0.05) / (low + 0.05)


def on_dark(colour: str, what: str = "line") -> str:
    """What "#rrggbb" becomes on dark paper: white is the paper, black the ink, a grey lies between them, and any other
    colour keeps its hue. A "line" must be seen on it and a "text" be read; an "area" lets a text upon it be read."""
    if colour == "#ffffff":
        return PAGE
    hue, light, saturation = colorsys.rgb_to_hls(*to_rgb(colour))
    (other, least), power = CONTRASTS[what], 2 if what == "text" else 1
    light = INK + (PAPER - INK) * light**power if saturation < 0.05 else light
    least *= what != "line" or saturation >= 0.05  # a grid is faint
    while contrast(found := to_hex(colorsys.hls_to_rgb(hue, light, saturation)), other) < least:
        light += -0.01 if what == "area" else 0.01
    return found


def with_dark_version(svg: str) -> str:
    """A figure of matplotlib's with both: paper, text, axes and grid in the colours of the page around it."""
    rules = [f"[id^=text_] {{ fill: {on_dark('#000000')} }}"]  # black, which no style names
    for name, colour in sorted(set(re.findall(r"\b(fill|stroke): (#[0-9a-f]{6})", svg))):
        for what, where in [rule for of, *rule in RULES if of == name]:
            found = on_dark(colour, what)
            if found != colour and (what, colour) != ("text", "#ffffff"):  # white text stands on data
                rules.append(f'{where}[style*="{name}: {colour}"] {{ {name}: {found} !important }}')
    # in an image white is nothing and the darkest is most: the other way around on dark paper, in the same hue
    rules.append("image { filter: invert(0.91) hue-rotate(180deg) }")
    style = f"@media (prefers-color-scheme: dark) {{ {' '.join(rules)} }}"
    return svg.replace("</style>", f"{style}</style>", 1)
