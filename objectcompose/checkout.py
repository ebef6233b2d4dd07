"""Which commit code and results come from."""

import subprocess


def checkout_state(*paths: str) -> tuple[str, bool]:
    """The commit that is checked out in the working directory, and whether tracked files differ from it.

    Args:
        paths: git's path patterns; only files that they choose count as different. None: all.

    Returns:
        ("unknown", True) outside a checkout.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *paths)
        return git("rev-parse", "HEAD"), bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True
