"""`objectcompose ground-captions`: from pictures with captions to the training set of TokenCompose.

    objectcompose ground-captions photos --backend grounding-dino --segmenter sam-hq --out my_captions
    objectcompose ground-captions train2017 --captions captions_train2017.json --backend grounding-dino \\
        --segmenter sam-hq --out my_captions
    accelerate launch -m objectcompose ground-captions photos --backend owlv2 --segmenter sam2 --out my_captions
    objectcompose ground-captions scenes --out scenes_grounded     # toybox's scenes and its own CLIPSeg

As in the data generation of arXiv 2312.03626: of several captions the one that CLIP prefers, its nouns, one call of
the detector per picture with all of them, and the union of all masks of a noun; pictures without any mask are left
out. Captions come as `caption_sources` says, the result is the layout of `grounded_captions`. Two rules differ from
the authors' scripts: a box belongs to the phrase that it was found for, never to one that merely looks alike, and no
two nouns write the same file.

The same command goes on after an interruption and gives the same files; any number of processes does too. Pictures are
done in batches that depend on the input alone, so that a model sees the same neighbours every time (but for what the
cache of groundings already holds). The output folder belongs to the command: what no longer has a picture is removed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

from objectcompose.errors import ImageInputError, ObjectComposeError, ObjectNotFoundError, PromptTooLongError
from objectcompose.files import write_atomically, write_png
from objectcompose.grounding.command import (
    add_model_arguments,
    add_run_arguments,
    check_run_arguments,
    load_models,
)
from objectcompose.grounding.detection import Detection
from objectcompose.grounding.grounder import DTYPES, MASK_DETECTORS, Grounder, usable_device
from objectcompose.grounding.inputs import check_ground_picture
from objectcompose.processes import process_state
from objectcompose.toybox.weights import toybox_path
from objectcompose.training.caption_choice import DEFAULT_CLIP, ClipChooser, load_clip_chooser
from objectcompose.training.caption_nouns import (
    DEFAULT_TAGGERS,
    NounTagger,
    findable_phrases,
    load_caption_tokenizer,
    load_tagger,
    noun_phrases,
)
from objectcompose.training.caption_sources import CaptionedFolder, CaptionedPicture, read_captioned_folder
from objectcompose.training.ground_captions_records import (
    REPORT_FILE,
    SHEET_FILE,
    LeftOut,
    OutcomeFolder,
    PictureOutcome,
    check_output_is_ours,
    picture_ids,
    picture_key,
)
from objectcompose.training.ground_captions_report import draw_contact_sheet, summarize_outcomes
from objectcompose.training.grounded_captions import write_metadata, write_record


HELP = "Make TokenCompose's training set from pictures with captions: nouns, and a mask for each."
DEFAULT_TOKENIZER = "openai/clip-vit-large-patch14"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("pictures", type=Path, help="folder of pictures (searched through)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the data set's folder")
    text = parser.add_argument_group("captions")
    text.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help="metadata.jsonl, or COCO's captions as .json; default: metadata.jsonl in the folder, else a .txt beside "
        "each picture, one caption per line",
    )
    text.add_argument(
        "--tagger", help=f"spaCy pipeline that finds nouns, package or folder; default: {' or '.join(DEFAULT_TAGGERS)}"
    )
    text.add_argument(
        "--tokenizer",
        help=f"of the base to be trained, folder or Hub id; default: {DEFAULT_TOKENIZER}, with toybox as backend "
        "toybox's",
    )
    text.add_argument(
        "--clip",
        default=DEFAULT_CLIP,
        help="chooses where a picture has several captions; folder or Hub id (%(default)s)",
    )
    add_model_arguments(parser)
    add_run_arguments(parser)


@dataclass(frozen=True)
class CaptionTools:
    """Everything that looks at pictures and captions.

    Attributes:
        tagger: finds nouns.
        tokenizer: of the base that will be trained; decides which nouns can be supervised.
        chooser: chooses among captions; None where no picture has several.
        grounder: finds masks.
    """

    tagger: NounTagger
    tokenizer: Any
    chooser: ClipChooser | None
    grounder: Grounder

    @cached_property
    def settings(self) -> dict[str, str | None]:
        """Names all weights and settings."""
        model = json.loads(self.tokenizer.backend_tokenizer.to_str())["model"]
        words = json.dumps([model, self.tokenizer.model_max_length], sort_keys=True)
        return {
            "tagger": self.tagger.identity(),
            "tokenizer": hashlib.sha256(words.encode()).hexdigest()[:32],
            "clip": None if self.chooser is None else self.chooser.identity(),
            "grounder": self.grounder.identity(),
        }

    def key(self, source: CaptionedPicture) -> str:
        """Names a picture with its captions and everything that looks at them."""
        used = [name for name in self.settings if name != "clip" or len(source.captions) > 1]
        return picture_key(source, [[name, self.settings[name]] for name in used])


@dataclass
class _Draft:
    """A picture on its way into the data set."""

    identifier: str
    source: CaptionedPicture
    key: str
    picture: Image.Image
    caption: str | None = None
    phrases: list[str] = field(default_factory=list)
    untokenized: list[str] = field(default_factory=list)

    def outcome(self, **found: Any) -> PictureOutcome:
        lost = {"untokenized": tuple(self.untokenized), **found}
        return PictureOutcome(self.source.name, self.key, self.caption, **lost)


class CaptionGrounder:
    """Takes batches of pictures to their records.

    Args:
        tools: what looks at them.
        folder: where the data set is written.
    """

    def __init__(self, tools: CaptionTools, folder: OutcomeFolder) -> None:
        self.tools = tools
        self.folder = folder

    def do_batch(self, batch: Sequence[tuple[str, CaptionedPicture]]) -> None:
        """Write what is not there yet; a batch of which anything is missing is done whole, so that it comes out equal.

        Args:
            batch: ids and pictures.

        Raises:
            ObjectComposeError: the output or the cache cannot be written.
        """
        keys = [self.tools.key(source) for _, source in batch]
        if all(self.folder.load(one, key) for (one, _), key in zip(batch, keys, strict=True)):
            return
        drafts = []
        for (identifier, source), key in zip(batch, keys, strict=True):
            try:
                picture = check_ground_picture(str(source.path), source.name)
                drafts.append(_Draft(identifier, source, key, picture))
            except ImageInputError as error:
                # the path would make the report differ from machine to machine
                detail = str(error).replace(str(source.path), source.name)
                left_out = PictureOutcome(source.name, key, reason=LeftOut.UNREADABLE, detail=detail)
                self.folder.store(identifier, left_out)
        drafts = [draft for draft in self._with_caption(drafts) if self._has_nouns(draft)]
        for draft, found in self._looked_at(drafts):
            self._write(draft, found)

    def _leave_out(self, draft: _Draft, reason: str, detail: Any = None, **found: Any) -> None:
        text = None if detail is None else str(detail)
        self.folder.store(draft.identifier, draft.outcome(reason=reason, detail=text, **found))

    def _with_caption(self, drafts: Sequence[_Draft]) -> list[_Draft]:
        """Choose the captions; a picture with one that CLIP cannot read whole is left out."""
        asked, kept = list[_Draft](), list[_Draft]()
        for draft in drafts:
            if len(draft.source.captions) == 1:
                draft.caption = draft.source.captions[0]
            else:
                assert self.tools.chooser is not None, "loaded where any picture has several captions"
                try:
                    self.tools.chooser.check_captions(draft.source.captions)
                except PromptTooLongError as error:
                    self._leave_out(draft, LeftOut.TOO_LONG, error)
                    continue
                asked.append(draft)
            kept.append(draft)
        if asked and self.tools.chooser is not None:
            captions = [draft.source.captions for draft in asked]
            numbers = self.tools.chooser.choose([draft.picture for draft in asked], captions)
            for draft, of_picture, number in zip(asked, captions, numbers, strict=True):
                draft.caption = of_picture[number]
        return kept

    def _has_nouns(self, draft: _Draft) -> bool:
        """Find the nouns of the caption; without one that can be supervised the picture is left out."""
        assert draft.caption is not None
        phrases = noun_phrases(draft.caption, self.tools.tagger.tag(draft.caption))
        try:
            kept = findable_phrases(self.tools.tokenizer, draft.caption, phrases)
        except PromptTooLongError as error:
            self._leave_out(draft, LeftOut.TOO_LONG, error)
            return False
        draft.phrases = [phrases[number] for number in kept]
        draft.untokenized = [phrase for number, phrase in enumerate(phrases) if number not in kept]
        if not draft.phrases:
            self._leave_out(draft, LeftOut.NOT_AMONG_TOKENS if phrases else LeftOut.NO_NOUNS)
        return bool(draft.phrases)

    def _looked_at(self, drafts: Sequence[_Draft]) -> list[tuple[_Draft, list[Detection]]]:
        """Ground the batch; where the detector refuses a picture, each on its own."""
        try:
            pictures, phrases = [draft.picture for draft in drafts], [draft.phrases for draft in drafts]
            return list(zip(drafts, self.tools.grounder.ground_batch(pictures, phrases, "skip"), strict=True))
        except (PromptTooLongError, ImageInputError) as error:
            if len(drafts) == 1:
                self._leave_out(drafts[0], LeftOut.NOT_ASKED, error)
                return []
        return [pair for draft in drafts for pair in self._looked_at([draft])]

    def _write(self, draft: _Draft, found: Sequence[Detection]) -> None:
        assert draft.caption is not None
        masks = {phrase: union_of_masks(found, phrase) for phrase in draft.phrases}
        masked = [phrase for phrase, mask in masks.items() if mask is not None]
        # the trainer looks for the masked nouns alone, which may choose other places than all of them together
        kept = {masked[number] for number in findable_phrases(self.tools.tokenizer, draft.caption, masked)}
        draft.untokenized += [phrase for phrase in masked if phrase not in kept]
        hit = {one.phrase for one in found}
        without = {
            "unmasked": tuple(phrase for phrase in draft.phrases if phrase not in hit),
            "empty": tuple(phrase for phrase in draft.phrases if phrase in hit and masks[phrase] is None),
        }
        if not kept:
            self._leave_out(draft, LeftOut.NOTHING_SEEN, **without)
            return
        nouns = [(phrase, mask) for phrase, mask in masks.items() if mask is None or phrase in kept]
        cropped = tuple(noun for noun, mask in nouns if mask is not None and not bool(centre_square(mask).any()))
        line = write_record(self.folder.out, draft.identifier, draft.source.path, draft.caption, nouns)
        self.folder.store(draft.identifier, draft.outcome(line=line, cropped=cropped, **without))


def union_of_masks(found: Sequence[Detection], phrase: str) -> torch.Tensor | None:
    """(H, W) in {0, 1}: where any detection of the phrase is; None where none is, or all masks are empty."""
    masks = [one.mask for one in found if one.phrase == phrase and one.mask is not None and bool(one.mask.any())]
    return torch.stack(masks).amax(0) if masks else None


def centre_square(mask: torch.Tensor) -> torch.Tensor:
    """The part of a mask (H, W) that is left when the trainer crops the long side."""
    side = min(mask.shape)
    top, left = (round((length - side) / 2) for length in mask.shape)
    return mask[top : top + side, left : left + side]


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0; 1 when pictures could not be read (the others are done). Other unusable input raises.

    Raises:
        ObjectComposeError: bad arguments, captions, tagger or checkpoint, or nothing is left to train on.
    """
    check_run_arguments(args)
    check_output_is_ours(args.out)
    if args.backend is not None and args.backend not in MASK_DETECTORS and args.segmenter is None:
        raise ObjectComposeError(
            f"`--segmenter` must be named with --backend {args.backend}, which finds boxes without masks."
        )
    source = read_captioned_folder(args.pictures, args.captions, args.out)
    state = process_state(args.device)
    tools = load_caption_tools(args, source, args.device or str(state.device))
    folder = OutcomeFolder(args.out)
    try:
        return _ground_folder(tools, folder, source, args.batch_size, state)
    except OSError as error:
        raise ObjectComposeError(
            f"`--out` must be a folder that can be written, got {str(args.out)!r}: {error.strerror or error}."
        ) from error


def load_caption_tools(args: argparse.Namespace, source: CaptionedFolder, device: str) -> CaptionTools:
    """Load what the arguments name, the quick ones first; CLIP only where a picture has several captions.

    Raises:
        MissingPackageError, CheckpointError, ObjectComposeError: something is not there or not usable.
    """
    tagger = load_tagger(args.tagger)
    is_toybox = args.backend == "toybox" or (args.backend is None and args.model is None)
    default = str(toybox_path("base") / "tokenizer") if is_toybox else DEFAULT_TOKENIZER
    tokenizer = load_caption_tokenizer(args.tokenizer or default)
    chooser = None
    if any(len(picture.captions) > 1 for picture in source.pictures):
        chooser = load_clip_chooser(args.clip, usable_device(device), DTYPES[args.dtype])
    return CaptionTools(tagger, tokenizer, chooser, load_models(args, device, with_phrases=True))


def _ground_folder(
    tools: CaptionTools, folder: OutcomeFolder, source: CaptionedFolder, batch_size: int, state: PartialState
) -> int:
    """This process's share of the batches, then what is said about all."""
    identifiers = picture_ids([picture.name for picture in source.pictures])
    named = list(zip(identifiers, source.pictures, strict=True))
    batches = [named[start : start + batch_size] for start in range(0, len(named), batch_size)]
    if state.is_main_process:
        folder.start()
    state.wait_for_everyone()
    grounder = CaptionGrounder(tools, folder)
    with state.split_between_processes(batches) as mine:
        total = sum(len(batch) for batch in mine)
        with tqdm(total=total, desc="ground", unit="picture", disable=not state.is_local_main_process) as progress:
            for batch in mine:
                grounder.do_batch(batch)
                progress.update(len(batch))
    state.wait_for_everyone()
    return _finish(folder, source, identifiers, tools.settings) if state.is_main_process else 0


def _finish(
    folder: OutcomeFolder, source: CaptionedFolder, identifiers: Sequence[str], settings: dict[str, str | None]
) -> int:
    """Report, contact sheet and, last of all, the metadata."""
    outcomes = [folder.read(identifier) for identifier in identifiers]
    folder.remove_strays(outcomes, identifiers)
    report = summarize_outcomes(source, outcomes, settings)
    content = json.dumps(report, indent=2) + "\n"
    write_atomically(folder.out / REPORT_FILE, content.encode())
    lines = [outcome.line for outcome in outcomes if outcome.line is not None]
    if not lines:
        (folder.out / SHEET_FILE).unlink(missing_ok=True)
        raise ObjectNotFoundError(
            f"`pictures` must hold at least one with a noun that is seen, got {report['pictures']['left_out']}; see "
            f"{folder.out / REPORT_FILE}."
        )
    write_png(folder.out / SHEET_FILE, draw_contact_sheet(folder, outcomes))
    write_metadata(folder.out, lines)
    unreadable = [outcome for outcome in outcomes if outcome.reason == LeftOut.UNREADABLE]
    for outcome in unreadable:
        print(f"{outcome.picture}: {outcome.detail}")
    nouns = report["nouns"]
    print(
        f"{len(lines)} of {len(outcomes)} pictures, {nouns['with_mask']} of {nouns['looked_for']} nouns: {folder.out}"
    )
    return 1 if unreadable else 0
