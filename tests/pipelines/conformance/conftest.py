"""`row` runs a test once per pipeline."""

from __future__ import annotations

import pytest

from tests.pipelines.conformance.rows import ROWS, Row


@pytest.fixture(params=ROWS)
def row(request) -> Row:
    return ROWS[request.param]
