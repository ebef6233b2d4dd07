"""Regions on grids, against values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from objectcompose.attention_processors.regions import (
    RASTER_RULES,
    RegionPyramid,
    RegionPyramidBatch,
    exclusive_regions,
    grids_of,
    rasterize,
    region_area,
    shared_ownership,
)
from objectcompose.errors import LayoutError, MissingFieldError, RegionError
from objectcompose.layout import SceneObject


class TestBoxes:
    # Columns: 0.1 * 5 = 0.5 to 0.5 * 5 = 2.5. Rows: 1/3 * 3 = 1 to 0.9 * 3 = 2.7.
    BOX = (0.1, 1 / 3, 0.5, 0.9)

    @pytest.mark.parametrize(
        ("rule", "rows", "columns"),
        [
            ("area", [0, 1, 0.7], [0.5, 1, 0.5, 0, 0]),
            ("cover", [0, 1, 1], [1, 1, 1, 0, 0]),
            ("round", [0, 1, 1], [0, 1, 1, 0, 0]),  # 0.5 goes to border 1, 2.5 to border 3
            ("point", [0, 1, 1], [1, 1, 0, 0, 0]),  # the centre 0.5 lies on the start (in), 2.5 on the end (out)
        ],
    )
    def test_rules_on_3x5(self, rule, rows, columns):
        cells = rasterize(self.BOX, (3, 5), rule)
        assert cells.dtype == torch.float32
        torch.testing.assert_close(cells, torch.outer(torch.tensor(rows).float(), torch.tensor(columns).float()))

    def test_float_noise_does_not_add_a_cell(self):
        # 0.7 * 10 is 7.000000000000001 and 0.3 * 10 is exactly 3.
        assert rasterize((0.3, 0.0, 0.7, 1.0), (1, 10), "cover").sum() == 4

    @pytest.mark.parametrize("rule", RASTER_RULES)
    def test_whole_canvas(self, rule):
        assert rasterize((0, 0, 1, 1), (3, 5), rule).tolist() == [[1.0] * 5] * 3

    @pytest.mark.parametrize("rule", ["round", "point"])
    def test_abutting_boxes_neither_overlap_nor_leave_a_gap(self, rule):
        for step in range(1, 40):
            cut = step / 40
            both = rasterize((0, 0, cut, 1), (1, 7), rule) + rasterize((cut, 0, 1, 1), (1, 7), rule)
            # Only a side thinner than a cell may add one, because no region is ever empty.
            assert bool((both == 1).all()) or cut < 1 / 14 + 1e-9 or cut > 13 / 14 - 1e-9

    @pytest.mark.parametrize("rule", ["cover", "round", "point"])
    def test_small_box_keeps_the_cell_it_covers_most(self, rule):
        cells = rasterize((0.26, 0.7, 0.28, 0.71), (2, 4), rule)
        assert cells.tolist() == [[0, 0, 0, 0], [0, 1, 0, 0]]

    def test_thin_box_keeps_its_length(self):
        cells = rasterize((0.26, 0.0, 0.28, 1.0), (3, 4), "round")
        assert cells.tolist() == [[0, 1, 0, 0]] * 3

    @pytest.mark.parametrize("rule", RASTER_RULES)
    def test_box_below_float_precision(self, rule):
        start = 0.3
        stop = torch.nextafter(torch.tensor(start, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)).item()
        cells = rasterize((start, start, stop, stop), (3, 5), rule)
        assert cells.count_nonzero() == 1 and cells[0, 1] > 0

    def test_area_sums_to_the_box(self):
        cells = rasterize((0.13, 0.21, 0.77, 0.94), (7, 5), "area")
        assert cells.mean().item() == pytest.approx(0.64 * 0.73, abs=1e-6)
        assert region_area((0.13, 0.21, 0.77, 0.94)) == pytest.approx(0.64 * 0.73)


class TestMasks:
    MASK = torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])  # (3, 4)

    @pytest.mark.parametrize(
        ("rule", "cells"),
        [
            # Cells are 1.5 pixels high and 2 wide: shares (2 + 0.5) / 3, 0, 0.5 / 3 (left), 1 / 3 (right).
            ("area", [[2.5 / 3, 0], [0.5 / 3, 1 / 3]]),
            ("cover", [[1, 0], [1, 1]]),
            ("round", [[1, 0], [0, 0]]),
            # Pixels under the centres: rows floor(0.75) = 0 and floor(2.25) = 2, columns 1 and 3.
            ("point", [[1, 0], [0, 1]]),
        ],
    )
    def test_rules_down(self, rule, cells):
        torch.testing.assert_close(rasterize(self.MASK, (2, 2), rule), torch.tensor(cells).float())

    def test_area_up_and_across(self):
        cells = rasterize(torch.tensor([[1.0, 0.0]]), (2, 3), "area")
        torch.testing.assert_close(cells, torch.tensor([[1.0, 0.5, 0.0]] * 2))

    @pytest.mark.parametrize("rule", RASTER_RULES)
    def test_same_size_is_the_mask(self, rule):
        torch.testing.assert_close(rasterize(self.MASK, (3, 4), rule), self.MASK)

    @pytest.mark.parametrize("rule", RASTER_RULES)
    def test_one_pixel_is_never_lost(self, rule):
        mask = torch.zeros(101, 67)
        mask[37, 50] = 1
        for grid in grids_of(13, 9, 5):
            cells = rasterize(mask, grid, rule)
            assert cells.shape == grid and cells.any()
            assert cells[int(37.5 / 101 * grid[0]), int(50.5 / 67 * grid[1])] > 0

    @pytest.mark.parametrize("rule", RASTER_RULES)
    def test_mask_of_a_box_equals_the_box(self, rule):
        mask = torch.zeros(12, 20)
        mask[3:9, 5:16] = 1
        box = (5 / 20, 3 / 12, 16 / 20, 9 / 12)
        for grid in [(12, 20), (6, 10), (4, 5)]:
            if rule == "round":  # a mask rounds areas, a box its edges
                continue
            torch.testing.assert_close(rasterize(mask, grid, rule), rasterize(box, grid, rule))


class TestBadRegions:
    @pytest.mark.parametrize(
        ("region", "error"),
        [
            (torch.zeros(3, 4), RegionError),
            (torch.zeros(0, 4), RegionError),
            (torch.full((3, 4), float("nan")), RegionError),
            (torch.full((3, 4), 2.0), RegionError),
            (-torch.ones(3, 4), RegionError),
            (torch.ones(3, 4, 1), RegionError),
            ((0, 0, 1), LayoutError),
            ((0, 0, 1, 2), LayoutError),
            ((0.5, 0, 0.5, 1), LayoutError),
            (None, LayoutError),
            ("box", LayoutError),
        ],
    )
    def test_region(self, region, error):
        with pytest.raises(error, match="`region`"):
            rasterize(region, (2, 2))

    @pytest.mark.parametrize("grid", [(0, 2), (2,), (2, 2, 2), (2.0, 2), (-1, 2), None, "22", (True, 2)])
    def test_grid(self, grid):
        with pytest.raises(RegionError, match="`grid`"):
            rasterize((0, 0, 1, 1), grid)

    def test_rule(self):
        with pytest.raises(RegionError, match="`rule` must be one of .* got 'bilinear'"):
            rasterize((0, 0, 1, 1), (2, 2), "bilinear")


def test_grids_halve_rounding_up():
    assert grids_of(64, 64, 4) == [(64, 64), (32, 32), (16, 16), (8, 8)]
    assert grids_of(13, 7, 5) == [(13, 7), (7, 4), (4, 2), (2, 1), (1, 1)]


class TestExclusive:
    def regions(self):
        left = torch.tensor([[1.0, 1, 1, 0]])
        right = torch.tensor([[0.0, 0.5, 1, 1]])
        return torch.stack([left, right])

    def test_higher_order_is_in_front(self):
        out = exclusive_regions(self.regions(), [1, 0], [0.75, 0.5])
        assert out.tolist() == [[[1, 1, 1, 0]], [[0, 0, 0, 1]]]

    def test_ties_go_to_the_smaller(self):
        out = exclusive_regions(self.regions(), [3, 3], [0.75, 0.5])
        assert out.tolist() == [[[1, 0, 0, 0]], [[0, 0.5, 1, 1]]]

    def test_equal_in_all_goes_to_the_earlier(self):
        out = exclusive_regions(self.regions(), [0, 0], [0.5, 0.5])
        assert out.tolist() == [[[1, 1, 1, 0]], [[0, 0, 0, 1]]]

    def test_covered_region_keeps_its_best_cell(self):
        front = torch.ones(1, 4)
        back = torch.tensor([[0.0, 0.2, 0.9, 0.0]])
        out = exclusive_regions(torch.stack([front, back]), [1, 0], [1.0, 0.3])
        torch.testing.assert_close(out, torch.tensor([[[1.0, 1, 0, 1]], [[0, 0, 0.9, 0]]]))

    def test_chain_of_regions_is_resolved(self):
        # Only one way: 0 in cell 0, 1 in cell 1, 2 in cell 2.
        regions = torch.tensor([[[1.0, 1, 1]], [[1, 1, 0]], [[1, 0, 0]]])
        out = exclusive_regions(regions, [2, 1, 0], [3, 2, 1])
        assert out.tolist() == [[[0, 0, 1]], [[0, 1, 0]], [[1, 0, 0]]]

    def test_too_many_regions(self):
        regions = torch.tensor([[[1.0, 0, 1]], [[1, 0, 0]], [[1, 0, 0]]])
        with pytest.raises(RegionError, match=r"each of the 3 regions a cell of its own on the grid \(1, 3\)"):
            exclusive_regions(regions, [0, 0, 0], [2, 1, 1])

    def test_empty_region_and_wrong_lengths(self):
        with pytest.raises(RegionError, match=r"nothing in regions \[1\]"):
            exclusive_regions(torch.tensor([[[1.0]], [[0.0]]]), [0, 0], [1, 1])
        with pytest.raises(RegionError, match="one order and one area each"):
            exclusive_regions(torch.ones(2, 1, 2), [0], [1, 1])

    def test_none(self):
        assert exclusive_regions(torch.zeros(0, 2, 3), [], []).shape == (0, 2, 3)


class TestShared:
    def test_equals_exclusive_where_possible(self):
        regions = torch.tensor([[[1.0, 1, 1]], [[1, 1, 0]], [[1, 0, 0]]])
        out = shared_ownership(regions, [2, 1, 0], [3, 2, 1])
        assert torch.equal(out, exclusive_regions(regions, [2, 1, 0], [3, 2, 1]))

    def test_one_cell_for_three(self):
        out = shared_ownership(torch.ones(3, 1, 1), [0, 1, 2], [1, 1, 1])
        torch.testing.assert_close(out, torch.full((3, 1, 1), 1 / 3))

    def test_only_the_crowded_cell_is_shared(self):
        # The front region owns cells 0 and 2; the two others lie in cell 0 only: 1/3 each there, 2 is the first's.
        regions = torch.tensor([[[1.0, 0, 1]], [[1, 0, 0]], [[1, 0, 0]]])
        out = shared_ownership(regions, [1, 0, 0], [2, 1, 1])
        torch.testing.assert_close(out, torch.tensor([[[1 / 3, 0, 1]], [[1 / 3, 0, 0]], [[1 / 3, 0, 0]]]))


class TestPyramid:
    OBJECTS = (
        SceneObject("dog", box=(0.0, 0.0, 0.5, 1.0)),
        SceneObject("cup", mask=torch.eye(3), box=(0, 0, 1, 1), order=1),
    )

    def test_levels(self):
        pyramid = RegionPyramid.from_objects(self.OBJECTS, (13, 7))
        assert len(pyramid) == 2
        for grid in grids_of(13, 7, 5):
            cells = pyramid.at(grid)
            assert cells.shape == (2, *grid)
            torch.testing.assert_close(cells[0], rasterize((0.0, 0.0, 0.5, 1.0), grid))
            torch.testing.assert_close(cells[1], rasterize(torch.eye(3), grid))  # the mask, not the box
            assert torch.equal(pyramid.at_tokens(grid[0] * grid[1]), cells)

    def test_each_grid_is_built_once(self):
        pyramid = RegionPyramid.from_objects(self.OBJECTS, (8, 8))
        assert pyramid.at((4, 4)) is pyramid.at_tokens(16)
        assert pyramid.at((4, 4), "cpu", torch.float16) is pyramid.at((4, 4), "cpu", torch.float16)
        assert pyramid.at((4, 4), dtype=torch.float16).dtype == torch.float16

    @pytest.mark.parametrize("num_tokens", [0, 5, 63, 65, 10_000])
    def test_unknown_number_of_tokens(self, num_tokens):
        with pytest.raises(RegionError, match="`num_tokens`"):
            RegionPyramid([], (8, 8)).at_tokens(num_tokens)

    def test_exclusive_shares_only_on_coarse_grids(self):
        boxes = [(index / 4, 0.0, (index + 1) / 4, 1.0) for index in range(4)]
        pyramid = RegionPyramid(boxes, (1, 8), rule="cover", exclusive=True)
        assert pyramid.at((1, 8)).sum(0).tolist() == [[1.0] * 8]
        torch.testing.assert_close(pyramid.at((1, 2)).sum(0), torch.ones(1, 2))
        assert pyramid.at((1, 2))[:, 0].tolist() == [[0.5, 0.0], [0.5, 0.0], [0.0, 0.5], [0.0, 0.5]]
        torch.testing.assert_close(pyramid.at((1, 1)), torch.full((4, 1, 1), 0.25))

    def test_finest_grid_must_hold_all(self):
        with pytest.raises(RegionError, match="each of the 3 regions"):
            RegionPyramid([(0, 0, 1, 1)] * 3, (1, 2), exclusive=True)
        RegionPyramid([(0, 0, 1, 1)] * 3, (1, 3), exclusive=True)

    def test_objects_without_a_place(self):
        with pytest.raises(MissingFieldError, match=r"objects\[1\]"):
            RegionPyramid.from_objects([self.OBJECTS[0], SceneObject("cat")], (8, 8))

    def test_orders_must_match(self):
        with pytest.raises(RegionError, match="`orders`"):
            RegionPyramid([(0, 0, 1, 1)], (8, 8), orders=[1, 2])

    def test_batch_is_padded(self):
        pyramids = [RegionPyramid.from_objects(self.OBJECTS, (9, 5)), RegionPyramid([], (9, 5))]
        batch = RegionPyramidBatch(pyramids)
        assert batch.valid.tolist() == [[True, True], [False, False]]
        cells = batch.at((5, 3))
        assert cells.shape == (2, 2, 5, 3)
        assert torch.equal(cells[0], pyramids[0].at((5, 3))) and not cells[1].any()
        assert batch.at_tokens(15) is cells
        assert RegionPyramidBatch([RegionPyramid([], (9, 5))] * 3).at((9, 5)).shape == (3, 0, 9, 5)

    def test_batch_has_one_canvas(self):
        with pytest.raises(RegionError, match="`pyramids`"):
            RegionPyramidBatch([RegionPyramid([], (9, 5)), RegionPyramid([], (5, 9))])
