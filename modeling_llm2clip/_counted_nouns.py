"""Numbers with their nouns in messages. Imports nothing."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Write a number and its noun, such as "1 image" and "1,200 images".

    Args:
        number: How many there are.
        noun: In the singular; its plural ends in s, or in ies in place of a y after a consonant.
    """
    if number == 1:
        return f"1 {noun}"
    ends_in_ies = noun.endswith("y") and noun[-2] not in "aeiou"
    return f"{number:,} {noun[:-1]}ies" if ends_in_ies else f"{number:,} {noun}s"
