"""From prompts and objects to what box control needs of a prompt: subjects' tokens, the end token, function words.

Words that name nothing ("a", "of", "two") would carry a subject's meaning to cells outside of its box, so box control
hides them from every cell (Bounded Attention; it asks a part-of-speech tagger, here it is a closed list of English
function words and numbers, which needs no model and never takes a placeholder for a word; a call may name others).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from objectcompose.attention_processors.box_masks import PromptSubjects
from objectcompose.errors import PhraseNotFoundError
from objectcompose.layout import SceneObject
from objectcompose.layout_fields import shown_value
from objectcompose.pipelines.pipeline_output import PlacedObject
from objectcompose.pipelines.token_utils import find_everywhere, prompt_token_ids


FUNCTION_WORDS = frozenset(
    # determiners, conjunctions, "there", "to"
    "a an the this that these those each every some any no all both either neither another and or nor but yet so plus"
    " there to"
    # prepositions and subordinating conjunctions; left, right, top and bottom name places
    " of in on at by with without within into onto upon over under above below beneath beside besides between among"
    " around near behind before after across along against through inside outside off from for about as like than"
    " while if because although though since until unless next left right top bottom"
    # pronouns and possessives
    " i me my mine you your yours he him his she her hers it its we us our ours they them their theirs who whom whose"
    " which what where when why how"
    # modal verbs
    " can could may might must shall should will would"
    # numbers
    " one two three four five six seven eight nine ten eleven twelve hundred thousand".split()
)
_WORD_MARK = "</w>"


def function_word_positions(tokenizer: Any, prompt: str, words: Collection[str] | None = None) -> list[int]:
    """Positions of function words in the encoded prompt (start token = 0).

    Args:
        tokenizer: a CLIP tokenizer.
        prompt: the text as the user wrote it.
        words: what counts as one, words or phrases; None: `FUNCTION_WORDS` and digits.
    """
    if words is not None:
        return find_everywhere(tokenizer, prompt, words)
    pieces = tokenizer.convert_ids_to_tokens(prompt_token_ids(tokenizer, prompt))
    stand_alone = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}  # have no end mark
    positions = []
    for position in range(1, len(pieces) - 1):
        before, piece = pieces[position - 1], pieces[position]
        begins_word = before.endswith(_WORD_MARK) or before in stand_alone
        is_word = (
            begins_word and piece.endswith(_WORD_MARK) and piece.removesuffix(_WORD_MARK).lower() in FUNCTION_WORDS
        )
        if is_word or (piece not in stand_alone and piece.removesuffix(_WORD_MARK).isdigit()):
            positions.append(position)
    return positions


def check_placeholders(tokenizer: Any, objects: Sequence[SceneObject]) -> None:
    """Raise unless the tokenizer knows every learned `token` of the objects.

    Raises:
        PhraseNotFoundError: it does not; the message lists those it knows.
    """
    added = tokenizer.get_added_vocab()
    for index, item in enumerate(objects):
        if item.token is not None and item.token not in added:
            known = sorted(set(added) - set(tokenizer.all_special_tokens))
            raise PhraseNotFoundError(
                f"`objects[{index}].token` {shown_value(item.token)} is no learned placeholder of this pipeline; it"
                f" has {', '.join(known) if known else 'none'}. Load it with `load_textual_inversion`."
            )


def prompt_subjects(
    tokenizer: Any,
    prompt: str,
    objects: Sequence[SceneObject],
    placed: Sequence[PlacedObject],
    filtered_words: Collection[str] | None = None,
) -> PromptSubjects:
    """The subjects of one prompt.

    A subject's tokens are those of its phrase or placeholder without function words; a phrase of function words only
    keeps them all. The one that labels clusters is its placeholder, else its last token, which in English is the noun.
    Without subjects nothing is hidden.

    Args:
        tokenizer: a CLIP tokenizer.
        prompt: the text as the user wrote it.
        objects: S of them.
        placed: where their phrases are, in the same order.
        filtered_words: what counts as a function word; see `function_word_positions`.
    """
    ids = prompt_token_ids(tokenizer, prompt)
    filtered = set(function_word_positions(tokenizer, prompt, filtered_words)) if objects else set()
    tokens, leading = [], []
    for item, where in zip(objects, placed, strict=True):
        named = tuple(index for index in where.token_indices if index not in filtered) or where.token_indices
        placeholder = None if item.token is None else tokenizer.convert_tokens_to_ids(item.token)
        own = [index for index in named if ids[index] == placeholder]
        tokens.append(named)
        leading.append(own[0] if own else named[-1])
    filtered -= {index for indices in tokens for index in indices}
    return PromptSubjects(tuple(tokens), tuple(leading), len(ids) - 1, tuple(sorted(filtered)))
