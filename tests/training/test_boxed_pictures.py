"""Pictures with boxes: what is read, which boxes stay, and that they move with crop and flip."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from objectcompose.errors import ImageInputError, LayoutError
from objectcompose.training.box_crops import (
    box_area,
    box_in_square,
    boxes_in_square,
    central_square,
    mirrored_box,
    overlap,
    random_square,
)
from objectcompose.training.boxed_pictures import BoxedPicture, BoxedPictures, read_coco, read_openimages
from tests.training.locref_data import BOXES, OPENIMAGES_HEADER, SIZE, coco_instances, write_coco, write_openimages


def coco(folder, instances=None):
    write_coco(folder, instances)
    return read_coco(folder / "instances.json", folder / "captions.json", folder / "images")


def test_boxes_of_a_square():
    square = central_square((200, 100))
    assert square == (0.25, 0.0, 0.75, 1.0)
    assert box_in_square((0.25, 0.0, 0.5, 0.5), square) == ((0.0, 0.0, 0.5, 0.5), 1.0)
    inside, share = box_in_square((0.15, 0.2, 0.45, 0.6), square)
    assert inside == pytest.approx((0.0, 0.2, 0.4, 0.6)) and share == pytest.approx(2 / 3)
    assert box_in_square((0.0, 0.0, 0.25, 1.0), square) == (None, 0.0)
    assert mirrored_box((0.1, 0.2, 0.4, 0.9)) == pytest.approx((0.6, 0.2, 0.9, 0.9))
    assert mirrored_box(mirrored_box((0.125, 0.2, 0.5, 0.9))) == (0.125, 0.2, 0.5, 0.9)
    whole = random_square((64, 64), np.random.default_rng(0))
    assert whole == (0.0, 0.0, 1.0, 1.0)


def test_which_boxes_are_trained_on():
    square = (0.0, 0.0, 1.0, 1.0)
    usable = (0.1, 0.1, 0.5, 0.5)
    tiny, huge = (0.0, 0.0, 0.1, 0.19), (0.0, 0.0, 0.9, 0.9)
    twin = (0.1, 0.1, 0.49, 0.49)  # covers 95 % of the first
    lost = [number for number, _ in boxes_in_square([tiny, usable, huge, twin], square)]
    assert lost == [1]
    half = (0.0, 0.0, 0.5, 1.0)
    assert boxes_in_square([(0.3, 0.1, 0.7, 0.9)], half) == []  # half of it is cut off
    [(number, box)] = boxes_in_square([(0.2, 0.1, 0.6, 0.9)], half)  # a quarter is
    assert number == 0 and box == pytest.approx((0.4, 0.1, 1.0, 0.9))
    assert overlap(usable, usable) == 1 and overlap(usable, (0.5, 0.5, 1, 1)) == 0
    assert box_area(usable) == pytest.approx(0.16)


def test_pixels_and_boxes_move_together(tmp_path):
    """Each object is one colour: in every variant its box shows exactly that colour."""
    width, height = 96, 64
    pixels, colours = np.zeros((height, width, 3), dtype=np.uint8), [(255, 0, 0), (0, 255, 0)]
    boxes = [(32, 8, 56, 40), (60, 20, 72, 60)]
    for (x0, y0, x1, y1), colour in zip(boxes, colours, strict=True):
        pixels[y0:y1, x0:x1] = colour
    Image.fromarray(pixels).save(tmp_path / "one.png")
    fractions = tuple((x0 / width, y0 / height, x1 / width, y1 / height) for x0, y0, x1, y1 in boxes)
    data = BoxedPictures([BoxedPicture(tmp_path / "one.png", (width, height), fractions, ("a dog",))], height)
    places, seen = set(), set()
    for seed in range(40):
        sample = data.sample(0, np.random.default_rng(seed))
        assert sample.pixels.shape == (3, height, height)
        for item in sample.objects:
            x0, y0, x1, y1 = (round(edge * height) for edge in item.box)
            colour = tuple(item.image.getpixel((item.image.width // 2, item.image.height // 2)))
            inner = sample.pixels[:, y0 + 3 : y1 - 3, x0 + 3 : x1 - 3]  # resampling rings at edges
            expected = torch.tensor(colour).float() / 127.5 - 1
            assert (inner - expected[:, None, None]).abs().max() < 0.02
            assert [one for _, one in item.image.getcolors()] == [colour]  # the crop of the box shows nothing else
            seen.add(colour)
        places.add(round(sample.objects[0].box[0], 3))
    assert seen == set(colours) and len(places) > 10


def test_coco_reads_what_counts(tmp_path):
    pictures = coco(tmp_path)
    assert [len(picture.boxes) for picture in pictures] == [2, 1, 3]  # the crowd is none
    assert pictures[0].captions == ("a dog and a cup", "a red dog") and pictures[0].size == SIZE
    x, y, width, height = BOXES[0][0]
    assert pictures[0].boxes[0] == pytest.approx((x / 48, y / 32, (x + width) / 48, (y + height) / 32))
    data = BoxedPictures(pictures, 32, cut_outs=1.0)
    image = data.sample(0, np.random.default_rng(0)).objects[0].image
    assert image.mode == "RGBA" and image.getchannel("A").getextrema()[1] == 255
    assert BoxedPictures(pictures, 32).key(0) != BoxedPictures(pictures, 64).key(0)


@pytest.mark.parametrize("bbox", [[296.65, 388.33, 1.03, 0.0], [4, 4, 0, 10]])
def test_boxes_without_area_are_left_out(tmp_path, caplog, bbox):
    """COCO 2017 has two of them among its hundreds of thousands."""
    data = coco_instances()
    data["annotations"].insert(0, {**data["annotations"][0], "bbox": bbox})
    assert coco(tmp_path, data) == coco(tmp_path)
    assert "1 boxes have no width or height" in caplog.text


def test_captions_may_hold_any_separator(tmp_path):
    write_openimages(tmp_path)
    captions = tmp_path / "captions.jsonl"
    lines = [json.dumps({"image_id": "1", "caption": "a\u2028corgi\x85"}, ensure_ascii=False), ""]
    captions.write_text("\n".join(lines), encoding="utf-8")
    [picture] = read_openimages(tmp_path / "boxes.csv", captions, tmp_path / "images")
    assert picture.captions == ("a\u2028corgi\x85",)


def test_openimages_reads_what_counts(tmp_path):
    rows = [f"1,xclick,/m/01,1,0.2,0.6,0.1,0.9,{flags}" for flags in ("1,0,0,0", "0,1,0,0", "0,0,1,0", "0,0,0,1")]
    write_openimages(tmp_path, *rows, "unknown,xclick,/m/01,1,0.2,0.6,0.1,0.9,0,0,0,0")
    pictures = read_openimages(tmp_path / "boxes.csv", tmp_path / "captions.jsonl", tmp_path / "images")
    assert [len(picture.boxes) for picture in pictures] == [2, 1, 3]
    assert pictures[1].size == SIZE and pictures[1].captions == ("a corgi",)


def broken(**changes):
    """An instances file whose first box, or whole lists, are others."""
    data = coco_instances()
    if "bbox" in changes:
        data["annotations"][0]["bbox"] = changes.pop("bbox")
    return data | changes


@pytest.mark.parametrize(
    ("instances", "message"),
    [
        (broken(bbox=[40, 0, 20, 10]), "must lie in"),
        (broken(bbox=[4, 4, -3, 10]), "x0 < x1"),
        (broken(bbox="all"), "bbox"),
        (broken(annotations=None), "annotations"),
        (broken(images=[{"id": 0}]), "missing or wrong"),
    ],
    ids=["outside", "turned", "no box", "no annotations", "no file name"],
)
def test_broken_coco_is_refused(tmp_path, instances, message):
    with pytest.raises(LayoutError, match=message):
        coco(tmp_path, instances)


def test_other_bad_files_are_refused(tmp_path):
    write_coco(tmp_path)
    files = (tmp_path / "instances.json", tmp_path / "captions.json", tmp_path / "images")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    with pytest.raises(LayoutError, match="must be JSON"):
        read_coco(tmp_path / "broken.json", *files[1:])
    with pytest.raises(LayoutError, match="cannot be read"):
        read_coco(tmp_path / "none.json", *files[1:])
    tall = broken(bbox=[10, 4, 14, 20])
    tall["images"][0]["height"] = 40
    data = BoxedPictures(coco(tmp_path / "tall", tall), 32)
    with pytest.raises(ImageInputError, match="size"):
        data.sample(0, np.random.default_rng(0))
    (files[2] / "1.png").unlink()
    with pytest.raises(ImageInputError, match=r"1\.png"):
        read_coco(*files)


def test_nothing_to_train_on_is_refused(tmp_path):
    nothing = coco_instances()
    for entry in nothing["annotations"]:
        entry["bbox"] = [10, 10, 2, 2]
    with pytest.raises(LayoutError, match="got none"):
        BoxedPictures(coco(tmp_path, nothing), 32)
    bare = coco_instances()
    for entry in bare["annotations"]:
        del entry["segmentation"]
    with pytest.raises(LayoutError, match="outlines"):
        BoxedPictures(coco(tmp_path / "bare", bare), 32, cut_outs=0.5)


def test_bad_openimages_is_refused(tmp_path):
    files = (tmp_path / "boxes.csv", tmp_path / "captions.jsonl", tmp_path / "images")
    write_openimages(tmp_path, "1,xclick,/m/01,1,0.2,1.6,0.1,0.9,0,0,0,0")
    with pytest.raises(LayoutError, match="line 8"):
        read_openimages(*files)
    write_openimages(tmp_path)
    files[0].write_text(OPENIMAGES_HEADER.replace("XMin", "Left") + "\n", encoding="utf-8")
    with pytest.raises(LayoutError, match="XMin"):
        read_openimages(*files)
    write_openimages(tmp_path)
    files[1].write_text(json.dumps({"image": "1"}) + "\n", encoding="utf-8")
    with pytest.raises(LayoutError, match="line 1"):
        read_openimages(*files)
    write_openimages(tmp_path)
    (files[2] / "2.jpg").write_bytes(b"no picture")
    with pytest.raises(ImageInputError, match=r"2\.jpg"):
        read_openimages(*files)
