"""The flattener, on a small package made for each case: what it merges and what it refuses."""

import subprocess
import sys
import textwrap

import pytest

from objectcompose.pipelines.hub import HubBuildError, flatten


LEAF = """
    '''Leaf.'''
    from __future__ import annotations

    import math
    from typing import TYPE_CHECKING

    if TYPE_CHECKING:
        from tinypkg.entry import Entry

    __all__ = ["area"]
    _UNIT = "m\\u00b2"


    def area(radius: float, entry: Entry | None = None, *, notes: dict[str,
             list[int]] | None = None) -> Missing:  # names that exist for type checkers only
        # a comment that stays
        return math.pi * radius**2
"""
ENTRY = """
    '''Entry's docstring.'''

    import math
    from dataclasses import dataclass

    from tinypkg.leaf import (
        _UNIT,
        area,
    )


    @dataclass
    class Entry:
        radius: float = 1.0

        def text(self) -> str:
            return f"{area(self.radius):.{len('ab')}f} {_UNIT} {math.floor(2.5)}"
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes the modules of `tinypkg` and returns nothing; they are importable during the test."""

    def write(**modules):
        folder = tmp_path / "tinypkg"
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
        for name, text in modules.items():
            (folder / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")

    monkeypatch.syspath_prepend(str(tmp_path))
    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "tinypkg"]:
        del sys.modules[name]


def test_merged_file_runs_alone_and_keeps_real_annotations(package, tmp_path):
    package(leaf=LEAF, entry=ENTRY)
    source = flatten("tinypkg.entry")
    assert source == flatten("tinypkg.entry")
    assert "from tinypkg.leaf" not in source and "__future__" not in source and "__all__" not in source
    assert "# a comment that stays" in source and source.count("import math") == 1
    alone = tmp_path / "alone" / "flat.py"
    alone.parent.mkdir()
    alone.write_text(source, encoding="utf-8")
    program = (
        "import runpy, sys\n"
        f"names = runpy.run_path({str(alone)!r})\n"
        "assert names['__doc__'].startswith('Entry'), names['__doc__']\n"
        "assert names['Entry'].__annotations__ == {'radius': float}\n"
        "assert names['area'].__annotations__['entry'] == 'Entry | None'\n"
        "assert not any(name.startswith('tinypkg') for name in sys.modules)\n"
        "print(names['Entry'](2.0).text())\n"
    )
    done = subprocess.run([sys.executable, "-I", "-X", "utf8", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "12.57 m² 2"


def test_each_needed_module_appears_once_and_before_its_user(package):
    package(
        a="VALUE_A = 1\n",
        b="from tinypkg.a import VALUE_A\nVALUE_B = VALUE_A + 1\n",
        c="from tinypkg.a import VALUE_A\nfrom tinypkg.b import VALUE_B\nVALUE_C = VALUE_A + VALUE_B\n",
        unused="raise RuntimeError\n",
    )
    source = flatten("tinypkg.c")
    assert source.count("VALUE_A = 1") == 1
    scope: dict = {}
    exec(compile(source, "flat", "exec"), scope)
    assert scope["VALUE_C"] == 3


REFUSED = [
    ("also defined", {"a": "def helper(): ...\n", "entry": "from tinypkg.a import helper\ndef helper(): ...\n"}),
    ("also defined", {"a": "X = 1\nfor i in []: pass\n", "entry": "from tinypkg.a import X\ni = 2\n"}),
    ("hides", {"a": "X = 1\nmath = 2\n", "entry": "import math\nfrom tinypkg.a import X\n"}),
    ("bind the same", {"a": "import math as m\nX = 1\n", "entry": "import cmath as m\nfrom tinypkg.a import X\n"}),
    ("inside a block", {"a": "X = 1\n", "entry": "def f():\n    from tinypkg.a import X\n    return X\n"}),
    ("inside a block", {"a": "X = 1\n", "entry": "try:\n    import tinypkg.a\nexcept ImportError:\n    pass\n"}),
    ("whole module", {"a": "X = 1\n", "entry": "import tinypkg.a\n"}),
    ("is a module", {"a": "X = 1\n", "entry": "from tinypkg import a\n"}),
    ("another name", {"a": "X = 1\n", "entry": "from tinypkg.a import X as Y\n"}),
    ("relative", {"a": "X = 1\n", "entry": "from .a import X\n"}),
    ("star", {"a": "X = 1\n", "entry": "from tinypkg.a import *\n"}),
    ("does not define", {"a": "import math\n", "entry": "from tinypkg.a import math\n"}),
    ("circle", {"a": "from tinypkg.entry import Y\nX = 1\n", "entry": "from tinypkg.a import X\nY = 2\n"}),
    ("else", {"entry": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    pass\n"}),
    ("__file__", {"entry": "HERE = __file__\n"}),
    ("one line", {"entry": "import math; X = 1\n"}),
]


@pytest.mark.parametrize(("message", "modules"), REFUSED, ids=[f"{i}-{row[0]}" for i, row in enumerate(REFUSED)])
def test_what_cannot_be_merged_exactly_is_a_build_error(package, message, modules):
    package(**modules)
    with pytest.raises(HubBuildError, match=message):
        flatten("tinypkg.entry")
