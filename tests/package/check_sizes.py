"""Tracked files must stay small, so that a clone is quick: `make quality` runs this."""

import subprocess
import sys
from pathlib import Path


MAX_TOTAL_BYTES = 48 * 2**20
MAX_FILE_BYTES = 15 * 10**6
MAX_ADAPTER_BYTES = 4 * 2**20
ADAPTERS = ("examples/toybox/locref/", "examples/toybox/object_prompt/")


def main() -> int:
    root = Path(__file__).resolve().parents[2]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True).stdout.decode()
    sizes = {name: (root / name).stat().st_size for name in listed.split("\0") if name and (root / name).is_file()}
    total = sum(sizes.values())
    failures = [
        f"{name}: {size} bytes, above {MAX_FILE_BYTES}" for name, size in sizes.items() if size > MAX_FILE_BYTES
    ]
    for folder in ADAPTERS:
        size = sum(size for name, size in sizes.items() if name.startswith(folder))
        if not 0 < size <= MAX_ADAPTER_BYTES:
            failures.append(f"{folder}: {size} bytes, not within (0, {MAX_ADAPTER_BYTES}]")
    if total >= MAX_TOTAL_BYTES:
        failures.append(f"tracked files: {total} bytes, not below {MAX_TOTAL_BYTES}")
    print("\n".join(failures) or f"{len(sizes)} tracked files, {total / 2**20:.1f} MiB")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
