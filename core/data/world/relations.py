"""What a relation is: who it is about, what its values are, and every form in which it is said.

Forms have the slots {s} (subject) and {v} (value). The first two sentence forms of a relation start with the subject,
so that what follows it can be joined by "and". No two relations share a form: a sentence tells its relation.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """A typed relation: who it is about, what its values are, whether there is exactly one, and how it is said."""

    name: str
    subject: str
    value: str
    sentences: tuple[str, ...]
    negation: str
    questions: tuple[str, ...]
    # At most so many values for one subject; a functional relation has exactly one.
    most: int = 1
    symmetric: bool = False
    # How the value is named through its subject, for questions of several hops.
    phrase: str = ""
    # In a dialogue: what the person says, is asked, and answers in few words.
    says: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    @property
    def functional(self) -> bool:
        """Whether every subject has exactly one value."""
        return self.most == 1

    @property
    def between_entities(self) -> bool:
        """Whether the value is an entity with facts of its own, not a plain word."""
        return self.value in ENTITY_KINDS


ENTITY_KINDS = ("person", "company", "town")
