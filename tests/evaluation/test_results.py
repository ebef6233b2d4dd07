"""Result files: round trip, what is refused, and what `verify` finds."""

import gzip
import hashlib
import json

import pytest

from objectcompose.errors import ObjectComposeError
from objectcompose.evaluation.results import hash_weights, load_result, write_result
from objectcompose.evaluation.statistics import bootstrap_mean, interval_metrics
from objectcompose.evaluation.verify import main, verify_result
from objectcompose.files import write_atomically


HERE = "tests.evaluation.test_results"
ROWS = [{"seed": seed, "found": seed % 3 == 0, "score": seed / 7, "seconds": 0.5 + seed} for seed in range(30)]


def metrics_of(rows):
    """The recompute function that the files of these tests name."""
    return interval_metrics("found", bootstrap_mean([row["found"] for row in rows], num_resamples=500))


def made_again(rows):
    """The regenerate function: rows as before, but for the time."""
    return [{**ROWS[row["seed"]], "seconds": -1.0} for row in rows]


def made_differently(rows):
    """A regenerate function that cannot repeat its rows."""
    return [{**row, "score": row["score"] + 0.1} for row in rows]


def write(folder, **changes):
    options = {
        "metrics": {**metrics_of(ROWS), "checkpoint_mib": 3.5},
        "raw_rows": ROWS,
        "command": "python -m made_up",
        "seeds": [0, 1],
        "protocol": "thirty rows",
        "recompute": f"{HERE}:metrics_of",
        "regenerate": f"{HERE}:made_again",
        "stated": ["checkpoint_mib"],
        "timing_fields": ["seconds"],
        "folder": folder,
    }
    return write_result("made_up", **{**options, **changes})


def test_round_trip_and_verification(tmp_path, capsys):
    (tmp_path / "w.bin").write_bytes(b"weights")
    path = write(tmp_path, weights={"base": tmp_path / "w.bin"})
    result, rows = load_result(path)
    assert rows == ROWS and result["metrics"]["checkpoint_mib"] == 3.5
    keys = {"name", "command", "commit", "dirty", "device", "date", "seeds", "protocol", "weights", "metrics", "raw"}
    assert keys <= set(result)
    assert verify_result(path, seed=0) == []
    assert main([str(path)]) == 0 and "holds" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.tmp"))


def test_rows_compress_to_equal_bytes(tmp_path):
    write(tmp_path)
    first = (tmp_path / "made_up.raw.jsonl.gz").read_bytes()
    write(tmp_path)
    assert (tmp_path / "made_up.raw.jsonl.gz").read_bytes() == first


def test_changed_rows_and_metrics_are_found(tmp_path, capsys):
    path = write(tmp_path)
    result = json.loads(path.read_text())
    raw = gzip.compress("".join(json.dumps({**row, "found": True}) + "\n" for row in ROWS).encode())
    (tmp_path / result["raw"]).write_bytes(raw)
    with pytest.raises(ObjectComposeError, match="is not the file"):
        verify_result(path)
    path.write_text(json.dumps({**result, "raw_sha256": hashlib.sha256(raw).hexdigest()}))
    assert any("found" in line for line in verify_result(path, num_rows=0))
    assert main([str(path), "--rows", "0"]) == 1 and "differs" in capsys.readouterr().out


def test_rows_that_cannot_be_repeated_are_found(tmp_path):
    path = write(tmp_path, regenerate=f"{HERE}:made_differently")
    assert len(verify_result(path, seed=1)) == 16
    assert verify_result(path, num_rows=0) == []


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"metrics": {"found": 0.9, "checkpoint_mib": 1}}, "do not follow"),
        ({"metrics": {"found": float("nan")}}, "finite"),
        ({"metrics": {"a": {"b": 1}}}, "number, bool or string"),
        ({"metrics": {"a": 1.0, "a.lo": 2.0, "a.hi": 3.0}}, "within its bounds"),
        ({"metrics": {"a": 1.0, "a.lo": 0.0}}, "together"),
        ({"raw_rows": []}, "at least one row"),
        ({"recompute": f"{HERE}:no_such"}, "module:function"),
        ({"regenerate": "no_such_module:f"}, "module:function"),
        ({"stated": ["checkpoint_mib", "other"]}, "no metric"),
        ({"weights": {"base": "no/such/file"}}, "weights"),
    ],
)
def test_unusable_results_are_refused_and_nothing_is_written(tmp_path, changes, word):
    with pytest.raises(ObjectComposeError, match=word):
        write(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_broken_result_file_is_a_typed_error(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ObjectComposeError, match="not a readable result file"):
        load_result(tmp_path / "broken.json")
    assert main([str(tmp_path / "broken.json")]) == 1


def test_hash_of_a_folder_sees_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_text("2")
    first = hash_weights(tmp_path)
    (tmp_path / ".hidden").write_text("ignored")
    assert hash_weights(tmp_path) == first
    (tmp_path / "sub" / "b").rename(tmp_path / "sub" / "c")
    assert hash_weights(tmp_path) != first


def test_failed_atomic_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
