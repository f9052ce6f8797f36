"""All the world can speak of: its relations by name, and its plain words."""

from __future__ import annotations

from core.data.world.people import PEOPLE
from core.data.world.places import PLACES

RELATIONS = {relation.name: relation for relation in (*PEOPLE, *PLACES)}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Plain words; a world uses the first `num_values` of each in an order of its own. All take the article "a".
WORDS = {
    "job": _words(
        "baker miller tailor potter weaver farmer sailor carpenter doctor teacher painter smith gardener "
        "barber cobbler printer glazier hunter fisher lawyer clerk roofer tanner jeweller"
    ),
    "food": _words(
        "soup bread cheese rice porridge dumplings beans plums cake pancakes fish mushrooms pears noodles "
        "carrots honey lentils cabbage grapes peas waffles chestnuts cherries salad"
    ),
    "colour": _words(
        "red blue green white black brown grey pink yellow purple silver golden crimson scarlet teal "
        "turquoise maroon beige violet copper bronze cream lilac mint"
    ),
    "instrument": _words(
        "flute drum harp fiddle lute trumpet piano cello horn banjo bagpipe zither guitar clarinet "
        "mandolin tuba viola cornet bugle whistle gong lyre harmonica tambourine"
    ),
    "pet": _words(
        "goat parrot rabbit tortoise dog cat pony hamster lizard ferret pigeon donkey goose hen snake "
        "frog mouse spider sheep raven carp beaver badger falcon"
    ),
    "product": _words(
        "lamps boots ropes clocks barrels tiles candles kettles gloves bells mirrors ladders carpets "
        "locks needles baskets brushes buttons wagons bricks sails pencils saddles bottles"
    ),
    "month": _words("January February March April May June July August September October November December"),
}
