"""A picture of pictures, for looking at what an example found. Needs Pillow."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

TILE, GAP, TEXT = 144, 12, 40


def draw(rows: Sequence[tuple[str, Sequence[tuple[Path, str]]]], out: Path) -> None:
    """
    Args:
        rows: a title, and the images below it, each with its caption: up to two lines that end where the tile does.
        out: .png or .jpg.
    """
    width = GAP + max(len(tiles) for _, tiles in rows) * (TILE + GAP)
    sheet = Image.new("RGB", (max(width, 480), GAP + len(rows) * (TILE + 2 * TEXT)), "white")
    pen, small, large = ImageDraw.Draw(sheet), ImageFont.load_default(12), ImageFont.load_default(16)
    top = GAP
    for title, tiles in rows:
        pen.text((GAP, top), title, "black", font=large)
        for number, (path, caption) in enumerate(tiles):
            left = GAP + number * (TILE + GAP)
            with Image.open(path) as image:
                picture = ImageOps.exif_transpose(image).convert("RGB")
            # Pixels of small images stay visible.
            way = Image.Resampling.NEAREST if max(picture.size) < TILE else Image.Resampling.BICUBIC
            picture = ImageOps.contain(picture, (TILE, TILE), way)
            sheet.paste(picture, (left, top + 24))
            for line, text in enumerate(caption.splitlines()[:2]):
                pen.text((left, top + 26 + TILE + 14 * line), _shortened(text, small), "black", font=small)
        top += TILE + 2 * TEXT
    sheet.save(out)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Its end, where it is too long: of a path the file's name."""
    if font.getlength(text) <= TILE:
        return text
    while font.getlength("..." + text) > TILE:
        text = text[1:]
    return "..." + text
