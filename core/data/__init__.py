"""Data sets with explicit homes: `catalog` finds and loads them, `corpus` is the text that every install carries."""
