"""Words, the sentences made of them, and classes: words that stand for one thing."""

from fmbseg_jax.vocabulary.words import (
    IGNORE,
    MOST_TEMPLATES,
    TEMPLATE,
    check_words,
    parse_words,
    prompts,
    read_templates,
    read_words,
    synonyms,
    unlike,
)

__all__ = [
    "IGNORE",
    "MOST_TEMPLATES",
    "TEMPLATE",
    "check_words",
    "parse_words",
    "prompts",
    "read_templates",
    "read_words",
    "synonyms",
    "unlike",
]
