"""What is said of a class to a text tower: templates by name, and class names as people write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lamina.errors import ConfigError, DataError, unknown
from lamina.text import printable

_VIEWS = (
    "a photo of {} {{}}.",
    "a blurry photo of {} {{}}.",
    "a black and white photo of {} {{}}.",
    "a low contrast photo of {} {{}}.",
    "a high contrast photo of {} {{}}.",
    "a bad photo of {} {{}}.",
    "a good photo of {} {{}}.",
    "a photo of {} small {{}}.",
    "a photo of {} big {{}}.",
)
_DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real photo", "sketch")


def _cifar() -> Sequence[str]:
    return [view.format(article) for article in ("a", "the") for view in _VIEWS]


def _domainnet() -> Sequence[str]:
    return [f"{article} {domain} of a {{}}" for article in ("a", "the") for domain in _DOMAINS]


def _imagenet(name: str) -> Callable[[], Sequence[str]]:
    def read() -> Sequence[str]:
        import open_clip  # only here: its import takes a while

        return [template("{}") for template in getattr(open_clip, name)]

    return read


#: the sets that authors of CLIP methods use, by name
TEMPLATES: dict[str, Callable[[], Sequence[str]]] = {
    "plain": lambda: ["{}"],
    "photo": lambda: ["a photo of a {}."],
    "bad-photo": lambda: ["a bad photo of a {}."],
    "cifar": _cifar,
    "imagenet-7": _imagenet("SIMPLE_IMAGENET_TEMPLATES"),
    "imagenet-80": _imagenet("OPENAI_IMAGENET_TEMPLATES"),
    "domainnet": _domainnet,
    "cub": lambda: ["a photo of a {}, a type of bird.", "a photo of the {}, a type of bird."],
    "food": lambda: ["a photo of {}, a type of food."],
}


def templates_of(said: str | Sequence[str]) -> list[str]:
    """Return templates, each with one {} for the name of a class.

    Args:
        said: the name of a set, one template, or several.

    Raises:
        ConfigError: when there is none, or one of them has not exactly one {}.

    >>> templates_of("a sketch of a {}"), len(templates_of("cifar"))
    (['a sketch of a {}'], 18)
    """
    if isinstance(said, str):
        if said in TEMPLATES:
            return list(TEMPLATES[said]())
        if "{" not in said:
            raise ConfigError(f"{unknown('set of templates', said, TEMPLATES)}; a template of your own needs one {{}}")
        said = [said]
    for template in said:
        if template.count("{}") != 1 or template.replace("{}", "").count("{") or template.replace("{}", "").count("}"):
            raise ConfigError(
                f"a template needs {{}} once, where the name of a class goes, and no other brace; got {template!r}"
            )
    if not said:
        raise ConfigError(f"at least one template is needed; name a set ({', '.join(TEMPLATES)}) or write your own")
    return list(said)


def readable(name: str) -> str:
    """Return the name of a class as people write it: underscores and hyphens at the ends are no words.

    Raises:
        DataError: when nothing is left.

    >>> readable("lawn_mower"), readable("  Egyptian   cat_")
    ('lawn mower', 'Egyptian cat')
    """
    words = " ".join(name.replace("_", " ").split()).strip("- ")
    if not any(letter.isalnum() for letter in words):
        raise DataError(
            f"a text tower reads the names of classes, and {printable(name)!r} has nothing to read: rename it, or say "
            "what it is with names={...}"
        )
    return words


def spoken(name: str, names: Mapping[str, str]) -> str:
    """Return what is said of a class: its description among `names`, or its own name, `readable`."""
    return readable(names.get(name, name))
