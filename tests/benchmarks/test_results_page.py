"""The results page: words from figures by hand, what it does without them, and that the committed one is current."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import results_page
from benchmarks.recipes import (
    locref,
    locref_metrics,
    mifo_metrics,
    mifo_parts,
    object_prompt_metrics,
    tokencompose,
    tokencompose_metrics,
)
from benchmarks.results_cost import COSTS, compile_lines, cost_lines, gpu_lines
from benchmarks.results_methods import (
    CONTROLS,
    GUIDANCE_ARMS,
    LEARNING_ARMS,
    LOCREF_ABLATION_ARMS,
    LOCREF_ARMS,
    SECTIONS,
    STREAM_ARMS,
    TOKENCOMPOSE_ARMS,
    Section,
)
from benchmarks.results_plots import COLOURS, MAX_BYTES, OURS, Panel, Plot, Scatter, draw_plot
from benchmarks.results_tables import (
    FAILS,
    HOLDS,
    NO_TRADE_OFF,
    NOISY,
    OPEN,
    UNKNOWN,
    Claim,
    Column,
    Estimate,
    Table,
    judged,
    less_times,
    shown,
    table_lines,
    verdict,
)
from objectcompose.errors import ObjectComposeError
from objectcompose.evaluation.results import RESULTS_FOLDER, write_result
from tests.benchmarks.recipe_rows import ROWS, equally_good, tokencompose_rows


RECIPES = {
    "tokencompose_toybox": tokencompose_metrics, "locref_toybox": locref_metrics,
    "locref_ablations_toybox": locref_metrics, "object_prompt_toybox": object_prompt_metrics,
    "mifo_toybox": mifo_metrics,
}  # fmt: skip
#: Stated by the recipe beside its rows' figures; and 0 and 100 by definition.
NOT_OF_ROWS = {"trained_share.sepen", "identity_way.floor", "identity_way.ceiling", "identity_way_seen.floor",
               "identity_way_seen.ceiling"}  # fmt: skip


def save(root: Path, name: str, metrics: dict[str, object]) -> Path:
    """A result file as the page reads it."""
    path = root / RESULTS_FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"command": f"make {name}", "commit": "0123456789abcdef", "dirty": True, "device": "cpu: 2 threads"}
    more = {"date": "2026-01-02T03:04:05+00:00", "protocol": "mg<k>: a share.", "num_rows": 5, "metrics": metrics}
    path.write_text(json.dumps({**facts, **more}), encoding="utf-8")
    return path


def bounded(name: str, value: float, lo: float, hi: float) -> dict[str, float]:
    return {name: value, f"{name}.lo": lo, f"{name}.hi": hi}


def figures_of(section: Section) -> Iterator[str]:
    """Names of all figures that a section reads."""
    for claim in section.claims:
        yield from (claim.key, *(() if claim.less is None else claim.less[1:]))
    for table in section.tables:
        arms = [arm if isinstance(arm, str) else arm[1] for arm in table.arms]
        yield from (column.key.format(arm=arm) for arm in arms for column in table.columns)
    for panel in (panel for plot in section.plots for panel in plot.panels):
        if isinstance(panel, Panel):
            yield from (*(key for _, key in panel.points), *(key for *_, key in panel.lines if key))
        else:
            yield from (key.format(arm=arm) for arm in panel.arms for _, key in (panel.x, panel.y))
    yield from (row.key for row in section.paper)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_every_figure_of_the_page_is_one_that_the_recipe_writes(section):
    metrics = RECIPES[section.name].metrics_of_rows(ROWS[section.name](equally_good))
    assert set(figures_of(section)) - set(metrics) <= NOT_OF_ROWS


def test_the_page_knows_all_arms():
    assert set(TOKENCOMPOSE_ARMS) == set(tokencompose.ALL_ARMS)
    ends = {locref_metrics.CEILING, locref_metrics.FLOOR}
    assert set(LOCREF_ARMS) == {*locref.ALL_ARMS, *ends}
    assert set(LOCREF_ABLATION_ARMS) == {*locref.ABLATION_ARMS, *ends}
    assert STREAM_ARMS == object_prompt_metrics.STREAM_ARMS
    assert ("text", *GUIDANCE_ARMS) == object_prompt_metrics.GUIDANCE_ARMS
    assert set(LEARNING_ARMS) == set(mifo_parts.LEARNING_ARMS) and set(CONTROLS) == set(mifo_parts.CONTROLS)


@pytest.mark.parametrize(
    ("side", "bounds", "expected"),
    [
        ("above", (1.1, 2.0), HOLDS), ("above", (0.5, 1.0), FAILS), ("above", (0.5, 1.5), OPEN),
        ("at least", (1.0, 2.0), HOLDS), ("at least", (0.5, 0.9), FAILS), ("at least", (0.5, 1.0), OPEN),
        ("below", (0.5, 0.9), HOLDS), ("below", (1.0, 2.0), FAILS), ("below", (0.5, 1.0), OPEN),
        ("at most", (0.5, 1.0), HOLDS), ("at most", (1.1, 2.0), FAILS), ("at most", (1.0, 2.0), OPEN),
        ("not below", (0.1, 1.0), HOLDS), ("not below", (0.1, 0.9), FAILS), ("above", (None, None), OPEN),
    ],
)  # fmt: skip
def test_verdicts_at_a_bar_of_one(side, bounds, expected):
    assert verdict(Estimate(0.95, *bounds), side, 1.0) == expected


def test_counted_figures_are_decided_by_their_value_and_noisy_times_not_at_all():
    assert verdict(Estimate(0.012), "below", 0.05, exact=True) == HOLDS
    assert verdict(Estimate(0.05), "below", 0.05, exact=True) == FAILS
    assert verdict(Estimate(0.9, 0.8, 1.0, iqr=0.2, valid=False), "at most", 2.0) == NOISY
    metrics = {"ratio": 1.02, "ratio.iqr": 0.04, "ratio.valid": True, "other": 1.0, "other.iqr": 0.2}
    assert judged(Claim("", "ratio", "at most", 1.03, unit="x", decimals=2), metrics) == ("1.02x (IQR 0.04)", OPEN)
    assert judged(Claim("", "ratio", "at most", 1.04, unit="x", decimals=2), metrics)[1] == HOLDS
    noisy = judged(Claim("", "other", "at most", 9.0, unit="x"), metrics | {"other.valid": False})
    assert noisy == ("1.0x (IQR 0.2, noisy)", NOISY)


def test_a_multiple_of_another_arm_by_hand():
    """Half widths of 3 and of twice 2 make 5, of 6 and of twice 4 make 10."""
    found = less_times(Estimate(50.0, 47.0, 56.0), 2.0, Estimate(20.0, 16.0, 22.0))
    assert (found.value, found.lo, found.hi) == pytest.approx((10.0, 5.0, 20.0))
    assert less_times(Estimate(1.0), 2.0, Estimate(3.0, 2.0, 4.0)) == Estimate(-5.0)
    claim = Claim("", "ap50.full", "at least", less=(2.0, "ap50.text"))
    metrics = bounded("ap50.full", 50.0, 47.0, 56.0) | bounded("ap50.text", 20.0, 16.0, 22.0)
    assert judged(claim, metrics) == ("50.0 against 20.0; minus 2 times that: 10.0 [5.0, 20.0] points", HOLDS)
    assert judged(claim, bounded("ap50.full", 50.0, 47.0, 56.0)) == ("", UNKNOWN)


@pytest.mark.parametrize(
    ("differ", "difference", "expected"), [(True, -0.2, HOLDS), (True, 0.2, NO_TRADE_OFF), (False, -0.2, NO_TRADE_OFF)]
)
def test_mixed_is_judged_only_where_coarse_and_fine_differ_as_in_the_paper(differ, difference, expected):
    claim = Claim("", "identity.mixed", "at least", less=(0.8, "identity.fine"), trade_off=("identity", -1))
    metrics = bounded("identity.mixed", 0.5, 0.5, 0.5) | bounded("identity.fine", 0.5, 0.5, 0.5)
    metrics |= {"trade_off.identity": differ, "identity_diff.coarse_fine": difference}
    assert judged(claim, metrics)[1] == expected


def test_tables_leave_cells_empty_that_were_not_measured():
    table = Table("In per cent.", ("full", ("prompt alone", "text")), (Column("ap50", "ap50.{arm}"),))
    assert table_lines(table, bounded("ap50.full", 50.0, 47.0, 56.0))[2:] == [
        "|  | ap50 |", "| --- | --- |", "| full | 50.0 [47.0, 56.0] |", "| prompt alone |  |",
    ]  # fmt: skip
    assert table_lines(table, {"ap50.other": 1.0}) == []
    assert shown(Estimate(-0.0004, -0.2, 0.3), 1, "points") == "0.0 [-0.2, 0.3] points"


def test_costs_stand_beside_their_bars():
    file = next(one for one in COSTS if one.name == "locref_cost")
    metrics = {"time_ratio.n4": 1.08, "time_ratio.n4.iqr": 0.02, "time_ratio.n4.valid": True, "memory_ratio.n8": 1.2}
    metrics |= {"time_ratio.n20": 1.25, "time_ratio.n20.iqr": 0.2, "time_ratio.n20.valid": False}
    lines = cost_lines(file, metrics)
    assert "| 4 objects, time | 1.08x (IQR 0.02) | at most 1.15x | holds |" in lines
    assert "| 20 objects, time | 1.25x (IQR 0.20, noisy) | at most 1.3x | not decided (noisy) |" in lines
    assert "| 8 objects, memory above weights | 1.20x | at most 1.1x | does not hold |" in lines
    assert "| 20 objects, FLOPs |  |  |  |" in lines
    compiled = compile_lines({"graphs.token_maps": 1, "recompiled.token_maps": 0, "graphs.box_masks": 2})
    assert compiled[2].endswith("| holds |") and compiled[2].startswith("| maps of 4 tokens | 1 | 0 |  |  |")
    assert compiled[4] == "| masks of 4 boxes | 2 |  |  |  |  |"
    assert gpu_lines({"t": 1.0, "t.iqr": 0.5, "t.valid": False, "gpu": "H100"})[2:] == [
        "| `t` | 1.000 (IQR 0.500, noisy) |", "| `gpu` | H100 |",
    ]  # fmt: skip


def test_a_page_without_any_result_says_what_to_run(tmp_path, capsys):
    assert results_page.main(["--check", "--root", str(tmp_path)]) == 1
    assert "RESULTS.md is not what the result files say" in capsys.readouterr().err
    assert results_page.main(["--root", str(tmp_path)]) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    for section in SECTIONS:
        assert f"## {section.title}\n\nNot measured yet: `{section.command}`." in text
    assert text.count("Not measured yet") == len(SECTIONS) + sum(not file.optional for file in COSTS) + 1
    assert not (tmp_path / "docs").exists()
    assert results_page.main(["--check", "--root", str(tmp_path)]) == 0


def test_a_recipe_with_few_arms_and_a_page_that_gets_old(tmp_path, capsys):
    rows = [row for row in tokencompose_rows(equally_good) if row["arm"] in ("ldm", "tokencompose")]
    metrics = tokencompose_metrics.metrics_of_rows(rows)
    path = write_result(
        "tokencompose_toybox",
        metrics,
        rows,
        command="make reproduce-tokencompose PRESET=smoke",
        seeds=[0],
        protocol="mg<k>: a share.",
        recompute="benchmarks.recipes.tokencompose_metrics:metrics_of_rows",
        folder=tmp_path / RESULTS_FOLDER,
    )
    (tmp_path / "README.md").write_text("before\n<!-- results -->\nFORMER\n<!-- /results -->\nafter\n")
    assert results_page.main(["--root", str(tmp_path)]) == 0
    assert results_page.main(["--check", "--root", str(tmp_path)]) == 0
    text, readme = (tmp_path / "RESULTS.md").read_text(), (tmp_path / "README.md").read_text()
    assert "by 6 points or more | 0.0 [0.0, 0.0] points | does not hold |" in text
    assert "more often than the base |  | not measured |" in text  # Separate-and-Enhance was left out
    assert "\n| sepen |  |  |  |  |  |  |  |  |\n" in text
    assert "```text\nmg<k>: a share.\n```" in text and "`make reproduce-tokencompose PRESET=smoke`" in text
    assert readme.startswith("before\n<!-- results -->\n| method") and readme.endswith("<!-- /results -->\nafter\n")
    assert "FORMER" not in readme and 10 >= readme.count("\n| ") - 2 >= len(SECTIONS)
    plot = tmp_path / "docs" / "results" / "tokencompose_mg3.png"
    assert "](docs/results/tokencompose_mg3.png)" in text
    plot.unlink()
    assert results_page.main(["--check", "--root", str(tmp_path)]) == 1
    assert "docs/results/tokencompose_mg3.png is missing" in capsys.readouterr().err
    assert results_page.main(["--root", str(tmp_path)]) == 0 and plot.is_file()
    result = json.loads(path.read_text())
    result["metrics"]["mg3_diff.tokencompose_ldm"] = 3.0
    path.write_text(json.dumps(result))
    assert results_page.main(["--check", "--root", str(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert "RESULTS.md is not" in errors and "README.md is not" in errors
    assert (tmp_path / "RESULTS.md").read_text() == text, "a check writes nothing"


def test_a_sheet_is_shown_where_it_lies_beside_its_result(tmp_path):
    save(tmp_path, "locref_toybox", bounded("ap50.full", 50.0, 47.0, 56.0))
    assert "_sheet.png" not in results_page.page_text(results_page.read_results(tmp_path), tmp_path)
    (tmp_path / RESULTS_FOLDER / "locref_toybox_sheet.png").write_bytes(b"")
    text = results_page.page_text(results_page.read_results(tmp_path), tmp_path)
    assert "](benchmarks/results/locref_toybox_sheet.png)" in text
    facts = "commit 0123456789ab with changes that were not committed, cpu: 2 threads, 2026-01-02, 5 rows."
    assert facts in " ".join(text.split())


@pytest.mark.parametrize("readme", ["<!-- results -->", "<!-- /results --> <!-- results -->", "<!-- /results -->"])
def test_readme_without_one_of_its_markers_is_refused(readme):
    with pytest.raises(ObjectComposeError, match="`<!-- results -->` and then `<!-- /results -->`"):
        results_page.readme_text(readme, "table")


def test_readme_without_markers_stays():
    assert results_page.readme_text("words\n", "table") == "words\n"


@pytest.mark.parametrize("content", ["{", "[]", '{"metrics": {}}'])
def test_a_broken_result_file_is_named(tmp_path, capsys, content):
    save(tmp_path, "mifo_cost", {}).write_text(content)
    assert results_page.main(["--root", str(tmp_path)]) == 1
    assert "mifo_cost.json must be a result file" in capsys.readouterr().err
    assert not (tmp_path / "RESULTS.md").exists()


def test_plots_are_small_and_equal_each_time(tmp_path):
    metrics = bounded("a", 1.0, 0.5, 2.0) | bounded("b", 2.0, 1.5, 2.5) | {"c": 3.0, "c.iqr": 1.0, "c.valid": False}
    panel = Panel("points", (("ours", "a"), ("b", "b"), ("c", "c"), ("gone", "d")), ("ours",), (("bar", 1.0, ""),))
    plot = Plot("plot", "A title", (panel, Scatter(("x", "{arm}"), ("y", "{arm}"), ("a", "b", "d"))))
    for name in ("first.png", "second.png"):
        draw_plot(plot, metrics, tmp_path / name)
    content = (tmp_path / "first.png").read_bytes()
    assert content == (tmp_path / "second.png").read_bytes() and len(content) <= MAX_BYTES
    with Image.open(tmp_path / "first.png") as image:
        colours = image.convert("RGB").getcolors(COLOURS)
    near = [colour for _, colour in colours if sum(abs(a - b) for a, b in zip(colour, rgb(OURS), strict=True)) < 24]
    assert near, "the method has its colour"


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def test_the_committed_page_is_current(capsys):
    assert results_page.main(["--check"]) == 0, capsys.readouterr().err
