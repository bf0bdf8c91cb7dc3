"""Scenes told: captions from a small grammar with synonyms and orders, each saying all or part of the scene."""

from vlscale.data.scenes import BACKGROUNDS, CHOICES, PLACES, Draw, Scene, Thing

_WORDS = {
    "circle": ("circle", "disc", "round shape"), "square": ("square", "box"), "triangle": ("triangle",),
    "diamond": ("diamond", "rhombus"), "star": ("star",), "cross": ("cross", "plus sign"), "ring": ("ring", "hoop"),
    "crescent": ("crescent", "half moon"),
    "red": ("red", "crimson"), "green": ("green",), "blue": ("blue",), "yellow": ("yellow", "golden"),
    "purple": ("purple", "violet"), "orange": ("orange",), "cyan": ("cyan", "turquoise"), "brown": ("brown",),
    "small": ("small", "tiny", "little"), "medium": ("medium", "medium-sized"), "large": ("large", "big", "huge"),
    "plain": ("plain", "solid"), "striped": ("striped", "stripy"), "dotted": ("dotted", "spotted"),
    "checked": ("checked", "checkered"),
    "grey": ("grey", "gray"), "beige": ("beige", "sandy"), "navy": ("navy", "dark blue"),
}  # fmt: skip
_NAMELESS = ("thing", "object", "something")
_GROUNDS = ("on a {} background", "on {}", "against a {} background")
_OPENINGS = ("", "", "a picture of ", "there is ", "we see ")
_JOINTS = (" and ", " with ", " next to ")
_MIDDLE = PLACES[len(PLACES) // 2]
_MENTION_FEWER = 0.5  # an object beyond the first is left out at half the rate of an attribute


def tell(scene: Scene, draw: Draw, *, dropout: float, noise: float, never_said: frozenset[str]) -> str:
    """One caption. `dropout`: chance that an attribute is left out of a mention; `noise`: that it is said wrongly."""
    things = draw.shuffled(scene.objects)
    told = [things[0], *(thing for thing in things[1:] if not draw.below(dropout * _MENTION_FEWER))]
    phrases = [_thing(thing, draw, dropout, noise, never_said) for thing in told]
    caption = draw.choice(_OPENINGS) + _join(phrases, draw)
    if "background" not in never_said and not draw.below(dropout):
        ground = draw.choice(BACKGROUNDS) if draw.below(noise) else scene.background
        phrase = draw.choice(_GROUNDS).format(_word(ground, draw))
        caption = f"{phrase}, {caption}" if draw.below(0.25) else f"{caption} {phrase}"
    return caption


def _thing(thing: Thing, draw: Draw, dropout: float, noise: float, never_said: frozenset[str]) -> str:
    said: dict[str, str] = {}
    for name, values in CHOICES.items():
        keep, wrong = not draw.below(dropout), draw.below(noise)
        if keep and name not in never_said:
            said[name] = draw.choice(values) if wrong else getattr(thing, name)
    adjectives = [_word(said[name], draw) for name in ("size", "texture", "colour") if name in said]
    if len(adjectives) == 3 and draw.below(0.3):
        adjectives[0], adjectives[1] = adjectives[1], adjectives[0]
    noun = _word(said["shape"], draw) if "shape" in said else draw.choice(_NAMELESS)
    if noun == "something":
        phrase = " ".join([noun, *adjectives])
    else:
        words = " ".join([*adjectives, noun])
        phrase = f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    return f"{phrase} {_place(said['place'], draw)}" if "place" in said else phrase


def _place(place: str, draw: Draw) -> str:
    row, column = place.split()
    if place == _MIDDLE:
        return draw.choice(("in the middle", "in the centre"))
    row_word = draw.choice({"top": ("top", "upper"), "middle": ("middle",), "bottom": ("bottom", "lower")}[row])
    return draw.choice(("in the {} {}", "at the {} {}")).format(row_word, column)


def _word(value: str, draw: Draw) -> str:
    return draw.choice(_WORDS.get(value, (value,)))


def _join(phrases: list[str], draw: Draw) -> str:
    if len(phrases) == 1:
        return phrases[0]
    return ", ".join(phrases[:-1]) + draw.choice(_JOINTS) + phrases[-1]
