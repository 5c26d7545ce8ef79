"""What is said of classes: the published sets, templates of one's own, and names as people write them."""

import pytest

from lamina.errors import ConfigError, DataError
from lamina.heads.templates import TEMPLATES, readable, spoken, templates_of


@pytest.mark.parametrize(
    ("name", "count", "one"),
    [
        ("plain", 1, "{}"),
        ("photo", 1, "a photo of a {}."),
        ("bad-photo", 1, "a bad photo of a {}."),
        ("cifar", 18, "a photo of the small {}."),
        ("imagenet-7", 7, "a origami {}."),
        ("imagenet-80", 80, "a photo of many {}."),
        ("domainnet", 12, "the real photo of a {}"),
        ("cub", 2, "a photo of a {}, a type of bird."),
        ("food", 1, "a photo of {}, a type of food."),
    ],
)
def test_a_set_has_its_published_templates(name, count, one):
    templates = templates_of(name)
    assert (len(templates), len(set(templates))) == (count, count) and one in templates
    assert all(template.count("{}") == 1 for template in templates)


def test_every_set_is_named_in_the_tests():
    assert sorted(TEMPLATES) == [
        "bad-photo", "cifar", "cub", "domainnet", "food", "imagenet-7", "imagenet-80", "photo", "plain",
    ]  # fmt: skip


def test_templates_of_ones_own_are_taken_as_they_are():
    assert templates_of("a sketch of a {}") == ["a sketch of a {}"]
    assert templates_of(["{}!", "the {}"]) == ["{}!", "the {}"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("cifra", "no set of templates is called 'cifra'; did you mean 'cifar'?"),
        ("a photo", "a template of your own needs one {}"),
        ("a {} of a {}", "needs {} once, where the name of a class goes, and no other brace; got 'a {} of a {}'"),
        ("a {0}", "needs {} once, where the name of a class goes, and no other brace; got 'a {0}'"),
        (["{}", "a photo"], "needs {} once, where the name of a class goes, and no other brace; got 'a photo'"),
        ([], "at least one template is needed; name a set (plain, photo, "),
    ],
)
def test_a_template_without_one_place_for_a_name_is_refused(said, message):
    with pytest.raises(ConfigError) as error:
        templates_of(said)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("lawn_mower", "lawn mower"),
        ("  Egyptian   cat_ ", "Egyptian cat"),
        ("jack-o'-lantern", "jack-o'-lantern"),
        ("7", "7"),
    ],
)
def test_names_are_read_as_people_write_them(name, read):
    assert readable(name) == read


@pytest.mark.parametrize("name", ["", "__", " - ", "?!"])
def test_a_name_with_nothing_to_read_is_refused(name):
    with pytest.raises(DataError) as error:
        readable(name)
    assert str(error.value) == (
        f"a text tower reads the names of classes, and {name!r} has nothing to read: rename it, or say what it is with "
        "names={...}"
    )


def test_a_description_takes_the_place_of_a_name():
    assert spoken("n01443537", {"n01443537": "gold_fish"}) == "gold fish" and spoken("cat", {"dog": "x"}) == "cat"
