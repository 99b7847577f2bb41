"""CLIP's tokenizer, the same for both stages: sentences → token ids, checked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from fmbseg_jax.errors import UserError
from fmbseg_jax.io import machine, texts
from fmbseg_jax.pretrained.config_json import read_json

FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


def check(folder: Path) -> None:
    """Raises UserError where a folder lacks its tokenizer: an empty one would stand in for it."""
    one_file, *two = FILES[:3]
    if not (folder / one_file).is_file() and not all((folder / name).is_file() for name in two):
        raise UserError(
            f"{folder} has no tokenizer: expected {one_file}, or {' and '.join(two)}. Take them "
            "from where the model was published."
        )


class Tokenizer:
    """Sentences → ids. Each sentence ends at the first `end`; CLIP's feature is the state there."""

    def __init__(self, folder: Path, vocabulary: int, length: int):
        """Loads a published tokenizer.

        Args:
          vocabulary: how many tokens the model knows.
          length: the most tokens of a sentence, start and end included.
        """
        _parts(folder)  # raises where they are damaged
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # of PyTorch: not needed
        from transformers import AutoTokenizer  # a second, which programs without words save

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # damaged files: transformers and tokenizers raise many kinds
            machine.let_through(error, folder)
            raise UserError(f"The tokenizer in {folder} cannot be loaded: {error}") from None
        self._vocabulary, self._length = vocabulary, length
        # The published config.json names 2 as the end, which no sentence has; the tokenizer knows.
        self.end: int = self._tokenizer.eos_token_id

    def __call__(self, sentences: Sequence[str]) -> list[list[int]]:
        """The ids of each sentence, start and end included; as many as it has, without padding.

        Raises:
          UserError: a sentence is too long, or has a token that the model does not know.
        """
        rows: list[list[int]] = self._tokenizer(list(sentences))["input_ids"]
        for sentence, row in zip(sentences, rows, strict=True):
            if len(row) > self._length:
                raise UserError(
                    f"{sentence!r} has {len(row)} tokens; CLIP reads {self._length}. Shorten the "
                    "word."
                )
            if self.end not in row:
                raise UserError(
                    f"The tokenizer makes {row} of {sentence!r}, without the end, {self.end}. Take "
                    "it from where the model was published."
                )
            if max(row) >= self._vocabulary:
                raise UserError(
                    f"{sentence!r} has the token {max(row)} of the tokenizer; the model knows "
                    f"{self._vocabulary}, from 0. Take both from one place."
                )
        return rows


def digest(folder: Path) -> str:
    """SHA-256 of what the files make of a sentence: tokens, merges, and those added to them.

    The same whether they are in one file or several.
    """
    return hashlib.sha256(json.dumps(_parts(folder), sort_keys=True).encode()).hexdigest()


def _parts(folder: Path) -> tuple[dict[str, int], list[str]]:
    """The ids of all tokens, and the merges; raises UserError where they are damaged."""
    check(folder)
    try:
        tokens, merges = (_one_file if (folder / FILES[0]).is_file() else _files)(folder)
        made = {merge.replace(" ", "", 1) for merge in merges}
        # Words of a byte or two have no merge; those of special tokens, in brackets, neither.
        cut = [
            token
            for token in tokens
            if len(token.removesuffix("</w>")) > 1 and token not in made and token[0] != "<"
        ]
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(_damaged(folder, repr(error))) from None
    if len(cut) > _ADDED:
        raise UserError(_damaged(folder, f"no merge makes {len(cut)} tokens, such as {cut[0]!r}"))
    return tokens, merges


_ADDED = 100
"""People may add so many tokens, which need no merge; a file that was cut lacks thousands."""


def _damaged(folder: Path, fault: str) -> str:
    return (
        f"The tokenizer in {folder} is damaged ({fault}). Take it from where the model was "
        "published."
    )


def _one_file(folder: Path) -> tuple[dict[str, int], list[str]]:
    whole = read_json(folder / FILES[0])
    added = {token["content"]: token["id"] for token in whole.get("added_tokens") or ()}
    # "a b", or ["a", "b"] since tokenizers 0.20
    merges = [m if isinstance(m, str) else " ".join(m) for m in whole["model"]["merges"]]
    return whole["model"]["vocab"] | added, merges


def _files(folder: Path) -> tuple[dict[str, int], list[str]]:
    settings = folder / FILES[3]
    listed = read_json(settings).get("added_tokens_decoder", {}) if settings.is_file() else {}
    added = {token["content"]: int(i) for i, token in listed.items()}
    if (folder / FILES[5]).is_file():
        added |= read_json(folder / FILES[5])
    lines = texts.read(folder / FILES[2], "Fetch it again.").splitlines()
    merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    return read_json(folder / FILES[1]) | added, merges
