"""`SceneObject`, its dict and JSON forms, and each way in which they can be wrong."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest
import torch
from PIL import Image

from objectcompose.errors import ImageInputError, LayoutError, MissingFieldError, ObjectComposeError, RegionError
from objectcompose.layout import (
    SCHEMA_VERSION,
    Layout,
    SceneObject,
    as_scene_objects,
    check_canvas,
    layout_from_coco,
    layout_from_dict,
    load_layout,
    object_fields_used,
    require_object_fields,
    save_layout,
)


MASK = [[0, 1, 1], [0, 0, 1]]


def picture(mode="RGB", size=(5, 3)):
    values = np.arange(size[0] * size[1] * 4, dtype=np.uint8).reshape(size[1], size[0], 4)
    return Image.fromarray(values, "RGBA" if len(mode) == 4 else None).convert(mode)


def full_layout():
    return Layout(
        "a corgi and a cup",
        (
            SceneObject("a corgi", image=picture("RGBA"), mask=MASK, box=(0.1, 0.2, 1 / 3, 1.0), order=-2),
            SceneObject("cup", image=picture(), token="<asset0>", scale=0.7),
            SceneObject(),
        ),
    )


class TestSceneObject:
    def test_defaults(self):
        obj = SceneObject()
        assert (obj.phrase, obj.image, obj.mask, obj.box, obj.token, obj.scale, obj.order) == (
            *(None,) * 5,
            1.0,
            0,
        )

    @pytest.mark.parametrize(
        "mask",
        [
            MASK,
            np.array(MASK, dtype=bool),
            np.array(MASK, dtype=np.uint8) * 255,
            torch.tensor(MASK),
            torch.tensor(MASK, dtype=torch.float16),
            Image.fromarray(np.array(MASK, dtype=np.uint8) * 255),
            Image.fromarray(np.array(MASK, dtype=np.uint8) * 255).convert("1"),
        ],
    )
    def test_mask_forms(self, mask):
        obj = SceneObject(mask=mask)
        assert obj.mask.dtype == torch.float32
        assert obj.mask.tolist() == MASK

    def test_mask_is_a_copy(self):
        mask = torch.tensor(MASK, dtype=torch.float32)
        obj = SceneObject(mask=mask)
        mask.zero_()
        assert obj.mask.sum() == 3

    @pytest.mark.parametrize("box", [[0, 0, 1, 1], np.array([0.0, 0, 1, 1]), torch.tensor([0.0, 0, 1, 1])])
    def test_box_forms(self, box):
        assert SceneObject(box=box).box == (0.0, 0.0, 1.0, 1.0)
        assert all(type(corner) is float for corner in SceneObject(box=box).box)

    @pytest.mark.parametrize(
        ("mode", "held"), [("L", "RGB"), ("LA", "RGBA"), ("1", "RGB"), ("P", "RGB"), ("CMYK", "RGB"), ("RGBA", "RGBA")]
    )
    def test_picture_modes(self, mode, held):
        source = picture("RGBA").convert("RGB").convert(mode) if mode in "CMYKP1" else picture(mode)
        assert SceneObject(image=source).image.mode == held

    def test_picture_from_path(self, tmp_path):
        picture().save(tmp_path / "dog.png")
        assert SceneObject(image=tmp_path / "dog.png") == SceneObject(image=picture())

    def test_equality_is_by_content(self):
        assert full_layout() == full_layout()
        assert hash(full_layout().objects[0]) == hash(full_layout().objects[0])
        assert SceneObject(mask=[[1, 0]]) != SceneObject(mask=[[0, 1]])
        assert SceneObject(mask=[[1, 1]]) != SceneObject(mask=[[1], [1]])
        assert SceneObject(image=picture()) != SceneObject(image=picture("RGBA"))
        assert SceneObject("dog") != "dog"

    @pytest.mark.parametrize(
        ("field", "value", "error"),
        [
            ("box", (0, 0, 1.01, 1), LayoutError),
            ("box", (-0.1, 0, 1, 1), LayoutError),
            ("box", (0.5, 0, 0.5, 1), LayoutError),
            ("box", (0.6, 0, 0.5, 1), LayoutError),
            ("box", (0, 0.5, 1, 0.4), LayoutError),
            ("box", (0, 0, float("nan"), 1), LayoutError),
            ("box", (0, 0, float("inf"), 1), LayoutError),
            ("box", (0, 0, 1), LayoutError),
            ("box", "0011", LayoutError),
            ("box", (0, 0, True, True), LayoutError),
            ("box", (0, 0, "1", 1), LayoutError),
            ("box", (0, 0, 10**400, 1), LayoutError),
            ("mask", [[0, 0]], RegionError),
            ("mask", [], RegionError),
            ("mask", [[]], RegionError),
            ("mask", [1, 0], RegionError),
            ("mask", [[[1]]], RegionError),
            ("mask", [[1, 0], [1]], RegionError),
            ("mask", [[0.5, 1]], RegionError),
            ("mask", [[float("nan"), 1]], RegionError),
            ("mask", [["a"]], RegionError),
            ("mask", [[2, 1]], RegionError),
            ("mask", np.array([[255, 128]], dtype=np.uint8), RegionError),
            ("mask", Image.new("RGB", (2, 2)), ImageInputError),
            ("mask", "missing.png", ImageInputError),
            ("image", "missing.png", ImageInputError),
            ("image", "", ImageInputError),
            ("image", "a\0b.png", ImageInputError),
            ("image", 3, ImageInputError),
            ("image", np.zeros((3, 3, 3)), ImageInputError),
            ("image", Image.new("I;16", (2, 2)), ImageInputError),
            ("image", Image.new("RGBA", (2, 2)), ImageInputError),
            ("phrase", "", LayoutError),
            ("phrase", "  ", LayoutError),
            ("phrase", 3, LayoutError),
            ("phrase", "\ud800", LayoutError),
            ("token", "two words", LayoutError),
            ("scale", -0.1, LayoutError),
            ("scale", float("nan"), LayoutError),
            ("scale", "1", LayoutError),
            ("scale", None, LayoutError),
            ("order", 0.5, LayoutError),
            ("order", True, LayoutError),
            ("order", 2**31, LayoutError),
        ],
    )
    def test_bad_field_names_itself(self, field, value, error):
        with pytest.raises(error, match=f"`{field}`") as caught:
            SceneObject(**{field: value})
        assert isinstance(caught.value, ObjectComposeError)

    def test_message_has_rule_and_value(self):
        with pytest.raises(LayoutError, match=r"x0 < x1 and y0 < y1, got \(0\.6, 0\.0, 0\.5, 1\.0\)"):
            SceneObject(box=(0.6, 0, 0.5, 1))


class TestAsSceneObjects:
    def test_one_list_serves_all_prompts(self):
        rows = as_scene_objects([SceneObject("dog"), {"phrase": "cup", "box": [0, 0, 0.5, 1]}], batch_size=3)
        assert len(rows) == 3
        assert all(row == [SceneObject("dog"), SceneObject("cup", box=(0, 0, 0.5, 1))] for row in rows)

    def test_one_list_per_prompt(self):
        rows = as_scene_objects([[{"phrase": "dog"}], [], None], batch_size=3)
        assert rows == [[SceneObject("dog")], [], []]

    def test_none_and_layout(self):
        assert as_scene_objects(None, 2) == [[], []]
        assert as_scene_objects([], 2) == [[], []]
        assert as_scene_objects(full_layout(), 1) == [list(full_layout().objects)]

    def test_objects_of_another_copy_of_the_class(self):
        foreign = types.SimpleNamespace(
            phrase="dog", image=None, mask=None, box=[0, 0, 1, 1], token=None, scale=2, order=1
        )
        assert as_scene_objects([foreign], 1) == [[SceneObject("dog", box=(0, 0, 1, 1), scale=2.0, order=1)]]

    @pytest.mark.parametrize(
        ("objects", "error", "match"),
        [
            ("dog", LayoutError, "`objects`"),
            ({"phrase": "dog"}, LayoutError, "`objects`"),
            (["dog"], LayoutError, r"`objects\[0\]`"),
            ([[], SceneObject()], LayoutError, "mixture"),
            ([[], [], []], LayoutError, "2 prompts, got 3"),
            ([{"phrase": "dog", "bbox": [0, 0, 1, 1]}], LayoutError, "Did you mean 'box'"),
            ([{1: 2}], LayoutError, "got 1"),
            ([{}, {"box": [0, 0, 0, 1]}], LayoutError, r"objects\[1\]: `box`"),
            ([{"mask": [[1]]}, {"mask": [[1, 1]]}], RegionError, "one size"),
        ],
    )
    def test_bad_objects(self, objects, error, match):
        with pytest.raises(error, match=match):
            as_scene_objects(objects, batch_size=2)


class TestFieldUse:
    def test_unused_fields(self):
        obj = SceneObject("dog", mask=MASK, scale=0.5, order=0)
        assert object_fields_used(obj, ["phrase"]) == ("mask", "scale")
        assert object_fields_used(obj, ["phrase", "mask", "scale", "box"]) == ()

    def test_required_fields(self):
        objects = [SceneObject("dog", mask=MASK), SceneObject("cup", box=(0, 0, 1, 1))]
        require_object_fields(objects, ["phrase", ("mask", "box")], "LocRef")
        with pytest.raises(MissingFieldError, match=r"LocRef needs `box` .* objects\[0\]"):
            require_object_fields(objects, ["box"], "LocRef")

    def test_canvas_proportions(self):
        check_canvas([SceneObject(mask=torch.ones(2, 3)), SceneObject()], 64, 96)
        check_canvas([SceneObject(mask=torch.ones(21, 32))], 64, 96)
        with pytest.raises(RegionError, match=r"canvas \(64, 64\)"):
            check_canvas([SceneObject(mask=torch.ones(2, 3))], 64, 64)


class TestFiles:
    def test_round_trip_is_exact(self, tmp_path):
        layout = full_layout()
        save_layout(layout, tmp_path / "a" / "scene.json")
        assert load_layout(tmp_path / "a" / "scene.json") == layout

    def test_written_again_is_the_same_bytes(self, tmp_path):
        save_layout(full_layout(), tmp_path / "a" / "scene.json")
        save_layout(load_layout(tmp_path / "a" / "scene.json"), tmp_path / "b" / "scene.json")
        files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
        assert len(files) == 4  # no temporary file stays
        for file in files:
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()

    def test_paths_are_relative_and_the_folder_moves(self, tmp_path):
        save_layout(full_layout(), tmp_path / "a" / "scene.json")
        entry = json.loads((tmp_path / "a" / "scene.json").read_text())["objects"][0]
        assert entry["image"].startswith("scene_pictures/")
        assert Image.open(tmp_path / "a" / entry["mask"]).mode == "L"
        (tmp_path / "a").rename(tmp_path / "moved")
        assert load_layout(tmp_path / "moved" / "scene.json") == full_layout()

    def test_failed_write_keeps_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "scene.json"
        save_layout(Layout("old"), path)
        monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(LayoutError, match="disk full"):
            save_layout(full_layout(), path)
        assert load_layout(path) == Layout("old")
        assert not list(tmp_path.glob(".*")) and not list((tmp_path / "scene_pictures").glob(".*"))

    def test_handwritten(self, tmp_path):
        picture().save(tmp_path / "dog.png")
        objects = [{"phrase": "a dog", "image": "dog.png", "box": [0, 0, 1, 1]}]
        data = {"schema_version": SCHEMA_VERSION, "prompt": "a dog", "objects": objects}
        (tmp_path / "scene.json").write_text(json.dumps(data))
        expected = SceneObject("a dog", image=picture(), box=(0, 0, 1, 1))
        assert load_layout(tmp_path / "scene.json") == Layout("a dog", (expected,))

    @pytest.mark.parametrize(
        ("text", "error", "match"),
        [
            ("{", LayoutError, "valid JSON"),
            ("", LayoutError, "valid JSON"),
            (b"\xff\xfe", LayoutError, "valid JSON"),
            ("[" * 100_000, LayoutError, "valid JSON"),
            ("[]", LayoutError, "JSON object"),
            ("{}", LayoutError, "`schema_version` must be 1, got None"),
            ('{"schema_version": 2, "prompt": ""}', LayoutError, "must be 1, got 2"),
            ('{"schema_version": true, "prompt": ""}', LayoutError, "must be 1, got True"),
            ('{"schema_version": 1}', LayoutError, "`prompt`"),
            ('{"schema_version": 1, "prompt": 3}', LayoutError, "`prompt`"),
            ('{"schema_version": 1, "prompt": "", "objets": []}', LayoutError, "Did you mean 'objects'"),
            ('{"schema_version": 1, "prompt": "", "objects": {}}', LayoutError, "`objects`"),
            ('{"schema_version": 1, "prompt": "", "prompt": ""}', LayoutError, "only once"),
            ('{"schema_version": 1, "prompt": "", "objects": [{"scale": NaN}]}', LayoutError, "finite"),
            ('{"schema_version": 1, "prompt": "", "objects": [{"scale": 1e999}]}', LayoutError, "finite"),
            ('{"schema_version": 1, "prompt": "", "objects": [{"image": "x.png"}]}', ImageInputError, "exists"),
            ('{"schema_version": 1, "prompt": "", "objects": [{"image": "../x.png"}]}', LayoutError, "inside"),
            ('{"schema_version": 1, "prompt": "", "objects": [{"image": "/etc/x.png"}]}', LayoutError, "inside"),
            ('{"schema_version": 1, "prompt": "", "objects": [{"image": 3}]}', LayoutError, "image"),
            ('{"schema_version": 1, "prompt": "", "objects": [{"mask": "a\\u0000b"}]}', LayoutError, "mask"),
            ('{"schema_version": 1, "prompt": "", "objects": [{"image": "scene.json"}]}', ImageInputError, "readable"),
        ],
    )
    def test_bad_file(self, tmp_path, text, error, match):
        path = tmp_path / "scene.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(error, match=match):
            load_layout(path)

    def test_missing_file(self, tmp_path):
        with pytest.raises(LayoutError, match="No such file"):
            load_layout(tmp_path / "none.json")

    def test_damaged_and_unsafe_pictures(self, tmp_path):
        picture(size=(50, 40)).save(tmp_path / "dog.png")
        whole = (tmp_path / "dog.png").read_bytes()
        (tmp_path / "dog.png").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ImageInputError, match="readable"):
            SceneObject(image=tmp_path / "dog.png")
        np.save(tmp_path / "mask.npy", np.array([{"pickled": 1}]), allow_pickle=True)
        with pytest.raises(ImageInputError, match="PNG"):
            SceneObject(mask=tmp_path / "mask.npy")

    def test_mask_file_must_be_binary(self, tmp_path):
        Image.fromarray(np.array([[0, 100, 255]], dtype=np.uint8)).save(tmp_path / "mask.png")
        with pytest.raises(RegionError, match="1 other values"):
            SceneObject(mask=tmp_path / "mask.png")

    def test_dict_without_folder_takes_pictures_as_they_are(self):
        data = {"schema_version": 1, "prompt": "a dog", "objects": [{"phrase": "dog", "image": picture()}]}
        assert layout_from_dict(data).objects[0].image.size == (5, 3)


COCO = {
    "images": [{"id": 7, "width": 200, "height": 100}, {"id": 8, "width": 10, "height": 10}],
    "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "orange"}],
    "annotations": [
        {"image_id": 7, "category_id": 1, "bbox": [20, 10, 100, 50]},
        {"image_id": 8, "category_id": 1, "bbox": [0, 0, 1, 1]},
        {"image_id": 7, "category_id": 2, "bbox": [150, 0, 50.5, 100], "iscrowd": 0},
        {"image_id": 7, "category_id": 2, "bbox": [0, 0, 9, 9], "iscrowd": 1},
    ],
}


class TestCoco:
    def test_boxes(self):
        layout = layout_from_coco(COCO, 7)
        assert layout.prompt == "a photo of a dog and an orange"
        assert layout.objects == (
            SceneObject("dog", box=(0.1, 0.1, 0.6, 0.6)),
            SceneObject("orange", box=(0.75, 0.0, 1.0, 1.0)),
        )

    def test_prompt_and_crowds(self):
        layout = layout_from_coco(COCO, 7, prompt="mine", include_crowds=True)
        assert layout.prompt == "mine" and len(layout.objects) == 3

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"images": []}, "image_id"),
            ({"images": [{"id": 7, "width": 0, "height": 1}]}, "positive"),
            ({"categories": []}, "annotations"),
            ({"annotations": [{"image_id": 7, "category_id": 1, "bbox": [0, 0, 202, 5]}]}, "200"),
            ({"annotations": [{"image_id": 7, "category_id": 1, "bbox": [0, 0, 0, 5]}]}, "bbox"),
            ({"annotations": [{"image_id": 7, "category_id": 1, "bbox": "0011"}]}, "bbox"),
            ({"annotations": [{"image_id": 7}]}, "annotations"),
            ({"annotations": 3}, "annotations"),
        ],
    )
    def test_bad_annotations(self, change, match):
        with pytest.raises(LayoutError, match=match):
            layout_from_coco({**COCO, **change}, 7)
