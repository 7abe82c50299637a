"""A figure's dark version, inside the figure: a style that a browser applies where its reader prefers dark pages."""

import colorsys
import re

PAPER, INK = 0.096, 0.87  # lightness of the dark page and of its text: --paper and --ink in style.css
PAGE = "#15181c"
LEAST_CONTRAST = 3  # of a line or a mark on its paper (Web Content Accessibility Guidelines 2.2, 1.4.11)


def luminance(colour: str) -> float:
    """The relative luminance of "#rrggbb", from 0 to 1, as those guidelines define it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """The contrast of two colours, from 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def on_dark(colour: str) -> str:
    """What "#rrggbb" becomes on dark paper: white is the paper, black the ink, a grey lies between them; any other
    colour is data and stays, or, if it were too dark to be seen, is lightened in its own hue until it can be."""
    hue, light, saturation = colorsys.rgb_to_hls(*(int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)))
    if colour == "#ffffff":
        return PAGE
    if saturation < 0.05:
        light = INK + (PAPER - INK) * light
    while True:
        found = "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, light, saturation))
        if saturation < 0.05 or contrast(found, PAGE) >= LEAST_CONTRAST:
            return found
        light += 0.01


def with_dark_version(svg: str) -> str:
    """A figure of matplotlib's with both: paper, text, axes and grid in the colours of the page around it."""
    rules = [f"[id^=text_] {{ fill: {on_dark('#000000')} }}"]  # black, which no style names
    for what, colour in sorted(set(re.findall(r"\b(fill|stroke): (#[0-9a-f]{6})", svg))):
        if (found := on_dark(colour)) != colour:
            # white text stands on data; a mesh is data, whatever its colours
            where = ":not(g)" if colour == "#ffffff" else ""
            rules.append(f'{where}:not([id^=QuadMesh] *)[style*="{what}: {colour}"] {{ {what}: {found} !important }}')
    # in an image white is nothing and the darkest is most: the other way around on dark paper, in the same hue
    rules.append("image { filter: invert(0.91) hue-rotate(180deg) }")
    style = f"@media (prefers-color-scheme: dark) {{ {' '.join(rules)} }}"
    return svg.replace("</style>", f"{style}</style>", 1)
