"""Make `pictures/` from the npm packages that publish the drawings.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    for f in *.tgz; do mkdir -p "${f%.tgz}" && tar xzf "$f" -C "${f%.tgz}"; done
    python -m objectcompose.toybox.build_pictures --packages .

The results are committed, so nobody needs npm to use them. Licences: `pictures/LICENSES.md`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from objectcompose.toybox.categories import CATEGORY_CODES


SOURCES = {
    "fluent": ("lobehub-fluent-emoji-3d-1.1.0/package/assets", "webp"),
    "noto": ("emoji-datasource-google-16.0.0/package/img/google/64", "png"),
    "twemoji": ("emoji-datasource-twitter-16.0.0/package/img/twitter/64", "png"),
}
SIDE = 64  # pixels of the longer side of a drawing


def find_drawing(folder: Path, code: str, extension: str) -> Path:
    """The file of a code, with or without the emoji presentation suffix."""
    for stem in (code, code.removesuffix("-fe0f"), f"{code}-fe0f"):
        path = folder / f"{stem}.{extension}"
        if path.is_file():
            return path
    raise FileNotFoundError(f"no drawing for {code} in {folder}")


def trim(picture: Image.Image) -> Image.Image:
    """Cut transparent borders off and bring the longer side to `SIDE` pixels."""
    picture = picture.convert("RGBA")
    picture = picture.crop(picture.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox())
    scale = SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder that holds the unpacked npm packages")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures")
    args = parser.parse_args()
    for style, (folder, extension) in SOURCES.items():
        (args.out / style).mkdir(parents=True, exist_ok=True)
        for category, code in CATEGORY_CODES.items():
            picture = trim(Image.open(find_drawing(args.packages / folder, code, extension)))
            picture.save(args.out / style / f"{category.replace(' ', '_')}.png", optimize=True)


if __name__ == "__main__":
    main()
