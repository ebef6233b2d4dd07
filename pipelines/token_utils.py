"""Where a phrase stands among the tokens of a prompt.

Positions count from the start of the encoded prompt, so the start-of-text token is 0 and the first word is 1. Token
ids are compared, nothing is decoded and searched: a phrase is found where its own ids occur between word boundaries.
CLIP's word-end marks keep "car" apart from "carton"; what remains to be ruled out are matches that begin inside a
word ("ton") or stand against a letter or digit ("3" in "13", which CLIP cuts into single digits).
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from objectcompose.errors import LayoutError, PhraseNotFoundError, PromptTooLongError
from objectcompose.layout_fields import check_text, shown_value


_WORD_END = "</w>"
# What CLIP text encoders read, for a tokenizer that was saved without its limit.
_CLIP_LENGTH = 77
_UNLIMITED_LENGTH = 10**6
_IRREGULAR_PLURALS = {
    "person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice", "goose": "geese",
    "foot": "feet", "tooth": "teeth", "ox": "oxen", "knife": "knives", "wife": "wives", "life": "lives",
    "wolf": "wolves", "leaf": "leaves", "shelf": "shelves", "half": "halves", "calf": "calves", "loaf": "loaves",
    "scarf": "scarves", "tomato": "tomatoes", "potato": "potatoes",
}  # fmt: skip
_IRREGULAR_SINGULARS = {plural: singular for singular, plural in _IRREGULAR_PLURALS.items()}


def expand_placeholders(tokenizer: Any, text: str) -> str:
    """`text` with every learned placeholder of several vectors written out, for encoding and for locating alike.

    A placeholder `<cat-toy>` whose further vectors were added as `<cat-toy>_1`, `<cat-toy>_2`, ... becomes
    "<cat-toy> <cat-toy>_1 <cat-toy>_2", as in diffusers. Unlike there, text that is written out already stays as it
    is, and so does a longer token that begins with a placeholder's name.
    """
    added = tokenizer.get_added_vocab()
    if not any(f"{token}_1" in added for token in added):
        return text
    tokens = "|".join(re.escape(token) for token in sorted(added, key=len, reverse=True))  # the longest match counts

    def written_out(found: re.Match[str]) -> str:
        token = found.group()
        follower = re.compile(rf"\s+({tokens})").match(text, found.end())
        if follower is not None and follower[1] == f"{token}_1":
            return token
        further = itertools.takewhile(added.__contains__, (f"{token}_{index}" for index in itertools.count(1)))
        return " ".join([token, *further])

    return re.sub(tokens, written_out, text)


def prompt_token_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The ids of the whole prompt with start and end tokens, neither padded nor truncated.

    The end token is the last one, so its position is the length less one.

    Raises:
        LayoutError: `prompt` is not text.
    """
    check_text(prompt, "prompt", may_be_empty=True)
    return list(tokenizer(expand_placeholders(tokenizer, prompt), truncation=False, verbose=False).input_ids)


def max_prompt_length(tokenizer: Any) -> int:
    """How many tokens the tokenizer's text encoder reads, start and end included (CLIP: 77)."""
    length = int(tokenizer.model_max_length)
    return _CLIP_LENGTH if length > _UNLIMITED_LENGTH else length


def check_prompt_length(tokenizer: Any, prompt: str) -> int:
    """Number of tokens of the prompt, start and end included.

    Raises:
        PromptTooLongError: more tokens than the text encoder reads.
    """
    length, limit = len(prompt_token_ids(tokenizer, prompt)), max_prompt_length(tokenizer)
    if length > limit:
        raise PromptTooLongError(
            f"`prompt` must have at most {limit} tokens (start and end included), got {length}: "
            f"{shown_value(prompt)}. What lies beyond would not be read; shorten it."
        )
    return length


def find_phrase(tokenizer: Any, prompt: str, phrase: str, occurrence: int = 0) -> list[int]:
    """Positions of a phrase's tokens in the encoded prompt.

    Args:
        tokenizer: a CLIP tokenizer, with any learned placeholders added to it.
        prompt: the text as the user wrote it.
        phrase: words that occur in the prompt in this order, or a placeholder. Case does not matter. If the words as
            they are do not occur often enough, the last one may also stand in its English plural or singular.
        occurrence: which of the places, 0 is the first; those in plural or singular come after the exact ones.

    Returns:
        Consecutive positions, start-of-text = 0, all below the text encoder's length.

    Raises:
        PhraseNotFoundError: names the closest matches.
        PromptTooLongError: the prompt has more tokens than the text encoder reads.
        LayoutError: an argument is not text.
    """
    reader = _PromptReader(tokenizer, prompt)
    places = list(dict.fromkeys([*reader.exact_places(phrase), *reader.inflected_places(phrase)]))
    if not 0 <= occurrence < len(places):
        raise reader.not_found(phrase, found=len(places), wanted=occurrence + 1)
    return list(range(*places[occurrence]))


def find_phrases(tokenizer: Any, prompt: str, phrases: Sequence[str], may_share: bool = False) -> list[list[int]]:
    """Positions of several phrases, each at a place of its own.

    A repeated phrase gets its first place first: "dog", "dog" in "a dog and a dog" are two places. Longer phrases
    choose before shorter ones, so "bear" does not take the second word of "teddy bear", and exact words before words
    in plural or singular.

    Args, raises: as in `find_phrase`; PhraseNotFoundError also if a phrase has fewer free places than it is asked for.
        may_share: a phrase that is repeated more often than it has places shares the last of them instead: "dogs",
            "dogs" in "two dogs" are one place.

    Returns:
        One list of positions per phrase, in the order of `phrases`; no position is in two of them, but for shared
        places.
    """
    reader = _PromptReader(tokenizer, prompt)
    if isinstance(phrases, str):
        raise LayoutError(f"`phrases` must be a list of strings, got {shown_value(phrases)}.")
    ids = [reader.phrase_ids(phrase) for phrase in phrases]
    longest_first = sorted(range(len(phrases)), key=lambda index: -len(ids[index]))
    chosen: dict[int, tuple[int, int]] = {}
    for places_of in (reader.exact_places, reader.inflected_places):
        for index in longest_first:
            if index in chosen:
                continue
            free = (place for place in places_of(phrases[index]) if not _overlaps(place, chosen.values()))
            place = next(free, None)
            if place is not None:
                chosen[index] = place
    for index, phrase in enumerate(phrases):
        if index in chosen:
            continue
        same = [place for other, place in sorted(chosen.items()) if ids[other] == ids[index]]
        if not (may_share and same):
            raise reader.not_found(phrase, found=len(same), wanted=1 if may_share else ids.count(ids[index]))
        chosen[index] = same[-1]
    return [list(range(*chosen[index])) for index in range(len(phrases))]


def find_everywhere(tokenizer: Any, prompt: str, phrases: Iterable[str]) -> list[int]:
    """Positions of all tokens that belong to one of the phrases, at every place where one's words stand as they are.

    Args, raises: as in `find_phrase`, but a phrase that does not occur has no positions.

    Returns:
        Positions in rising order, each once.
    """
    reader = _PromptReader(tokenizer, prompt)
    places = (place for phrase in phrases for place in reader.exact_places(phrase))
    return sorted({position for place in places for position in range(*place)})


class _PromptReader:
    """One encoded prompt and where words begin and end in it."""

    def __init__(self, tokenizer: Any, prompt: str) -> None:
        check_prompt_length(tokenizer, prompt)
        self.tokenizer, self.prompt = tokenizer, prompt
        self.ids = prompt_token_ids(tokenizer, prompt)
        self.added = set(tokenizer.get_added_vocab())
        pieces = tokenizer.convert_ids_to_tokens(self.ids)
        # boundaries[i]: a phrase may begin at token i, or end before it.
        self.boundaries = [True, *(self._ends_word(piece) for piece in pieces)]
        for position in self._joints():
            self.boundaries[position] = False

    def phrase_ids(self, phrase: str) -> list[int]:
        """The ids of a phrase on its own, without start and end."""
        check_text(phrase, "phrase")
        text = expand_placeholders(self.tokenizer, phrase)
        return list(self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)

    def exact_places(self, phrase: str) -> Iterator[tuple[int, int]]:
        """(start, stop) of each place where the words of the phrase stand as they are."""
        wanted = self.phrase_ids(phrase)
        # The first and the last token are the start and the end of the text, which no phrase names.
        for start in range(1, len(self.ids) - len(wanted)):
            stop = start + len(wanted)
            if wanted and self.ids[start:stop] == wanted and self.boundaries[start] and self.boundaries[stop]:
                yield start, stop

    def inflected_places(self, phrase: str) -> Iterator[tuple[int, int]]:
        """(start, stop) of each place where the last word of the phrase stands in its plural or singular."""
        places = {place for variant in other_numbers(phrase) for place in self.exact_places(variant)}
        return iter(sorted(places))

    def not_found(self, phrase: str, found: int, wanted: int) -> PhraseNotFoundError:
        """The error for a phrase with too few places, with what the prompt has instead."""
        words = self.prompt.lower().split()
        length = len(phrase.split())
        spans = {
            " ".join(words[start : start + count]).strip(".,;:!?()\"'")
            for count in range(1, length + 2)
            for start in range(len(words) - count + 1)
        }
        close = difflib.get_close_matches(phrase.lower(), sorted(spans), n=3, cutoff=0.5)
        hint = f"closest: {', '.join(ascii(match) for match in close)}" if close else "nothing in it comes close"
        rule = f"must occur in the prompt {wanted} time(s) at places of its own, found {found}"
        return PhraseNotFoundError(f"`phrase` {shown_value(phrase)} {rule}: {shown_value(self.prompt)} ({hint}).")

    def _ends_word(self, piece: str) -> bool:
        return piece.endswith(_WORD_END) or piece in self.added or piece in self.tokenizer.all_special_tokens

    def _joints(self) -> Iterator[int]:
        """Positions between two tokens that no white space parts and that are both letters or digits ("13", "dog2").

        Words are encoded one by one to learn where white space was; if that does not give the ids of the whole prompt,
        the tokenizer does more than CLIP's and only word-end marks are used.
        """
        words = expand_placeholders(self.tokenizer, self.prompt).split()
        encoded = [self.tokenizer(word, add_special_tokens=False, verbose=False).input_ids for word in words]
        if [token for ids in encoded for token in ids] != self.ids[1:-1]:
            return
        position = 1
        for word, ids in zip(words, encoded, strict=True):
            if len(ids) > 1 and not set(self.tokenizer.convert_ids_to_tokens(ids)) & self.added:
                yield from (position + offset for offset in self._joints_of_word(word, len(ids)))
            position += len(ids)

    def _joints_of_word(self, word: str, count: int) -> Iterator[int]:
        """Offsets of tokens of one word that begin between two letters or digits."""
        for cut in range(1, len(word)):
            if word[cut - 1].isalnum() and word[cut].isalnum() and word[cut - 1].isnumeric() | word[cut].isnumeric():
                before = self.tokenizer(word[:cut], add_special_tokens=False, verbose=False).input_ids
                if 0 < len(before) < count:
                    yield len(before)


def other_numbers(phrase: str) -> list[str]:
    """The phrase with its last word in the plural, and in the singular, by the rules of English spelling.

    Spellings that do not exist may be among them ("glas"): they are only looked for, so they do no harm.
    """
    *head, last = phrase.lower().split() or [""]
    forms = {_IRREGULAR_PLURALS.get(last, ""), _IRREGULAR_SINGULARS.get(last, "")}
    if last and last[-1].isalpha():
        forms |= {last + "s", last + "es"}
        if last.endswith("y"):
            forms.add(last[:-1] + "ies")
        if last.endswith("s"):
            forms.add(last[:-1])
        if last.endswith("es"):
            forms.add(last[:-2])
        if last.endswith("ies"):
            forms.add(last[:-3] + "y")
    return [" ".join([*head, form]) for form in sorted(forms - {"", last})]


def _overlaps(place: tuple[int, int], taken: Any) -> bool:
    return any(place[0] < stop and start < place[1] for start, stop in taken)
