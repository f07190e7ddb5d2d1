"""Short texts in many languages: the interface of Django, whose translations its package carries as .mo files."""

from __future__ import annotations

import gettext
import re

from fastcontrast.data import package_folder

MARKUP = re.compile(r"[%{}<>&\n]")


def phrases(language: str) -> dict[str, str]:
    """{English text: its translation} of Django and its applications, e.g. "Home": "Domů" for "cs". About 500.

    Left out: plurals, texts with a context (single letters that stand for weekdays), with placeholders, or with markup.
    Raises MissingDataError without the package django, ValueError for a language that it does not have.
    """
    files = sorted(package_folder("django").rglob(f"locale/{language}/LC_MESSAGES/*.mo"))
    if not files:
        raise ValueError(f"phrases: language must be one of Django's locales, got {language!r}")
    found = {}
    for path in files:
        with path.open("rb") as file:
            catalogue = gettext.GNUTranslations(file)._catalog  # the standard library has no public way to list it
        for english, text in catalogue.items():
            if isinstance(english, str) and english and text and "\x04" not in english and not MARKUP.search(english):
                found[english] = text
    return found
