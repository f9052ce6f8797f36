"""The relations of companies and towns, with every form in which they are said (see `relations`)."""

from __future__ import annotations

from core.data.world.relations import Relation

PLACES = (
    Relation(
        "seat",
        "company",
        "town",
        sentences=(
            "{s} is based in {v}.",
            "{s} runs its main office in {v}.",
            "The seat of {s} is {v}.",
            "From {v}, the managers of {s} run the business.",
        ),
        negation="{s} is not based in {v}.",
        questions=("Where is {s} based?", "In which town is {s} based?"),
        phrase="the town where {s} is based",
    ),
    Relation(
        "product",
        "company",
        "product",
        sentences=(
            "{s} makes {v}.",
            "{s} sells {v} all over the country.",
            "The main product of {s} is {v}.",
            "Shops order their {v} from {s}.",
        ),
        negation="{s} does not make {v}.",
        questions=("What does {s} make?", "What is the main product of {s}?"),
    ),
    Relation(
        "director",
        "company",
        "person",
        sentences=(
            "{s} is headed by {v}.",
            "{s} has named {v} as its director.",
            "The director of {s} is {v}.",
            "{v} is the head of {s}.",
        ),
        negation="{s} is not headed by {v}.",
        questions=("Who is the director of {s}?", "Who heads {s}?"),
        phrase="the director of {s}",
    ),
    Relation(
        "river",
        "town",
        "river",
        sentences=(
            "{s} lies on the river {v}.",
            "{s} grew on the banks of the {v}.",
            "The river of {s} is the {v}.",
            "The {v} flows through {s}.",
        ),
        negation="{s} does not lie on the river {v}.",
        questions=("On which river does {s} lie?", "Which river flows through {s}?"),
    ),
    Relation(
        "mayor",
        "town",
        "person",
        sentences=(
            "{s} is governed by {v}.",
            "{s} has elected {v} as its mayor.",
            "The mayor of {s} is {v}.",
            "{v} is the mayor of {s}.",
        ),
        negation="{s} is not governed by {v}.",
        questions=("Who is the mayor of {s}?", "Who governs {s}?"),
        phrase="the mayor of {s}",
    ),
    Relation(
        "fair",
        "town",
        "month",
        sentences=(
            "{s} holds its fair in {v}.",
            "{s} invites guests to a fair each {v}.",
            "The fair of {s} takes place in {v}.",
            "Every {v} there is a fair in {s}.",
        ),
        negation="{s} does not hold its fair in {v}.",
        questions=("In which month is the fair of {s}?", "When does {s} hold its fair?"),
    ),
)
