"""Makes the figure of scores.md and prints its table: python docs/reference/scores.py."""

from pathlib import Path

import numpy as np
from scipy import ndimage

from unet_ray.metrics import isbi_scores
from unet_ray.report.pictures import OKABE_ITO, side_by_side, write_png

SIZE, ZOOM = 128, 2
SEEDS = [(20, 25), (22, 95), (60, 60), (100, 20), (105, 75), (70, 115)]


def cells_of(seeds: list[tuple[int, int]], thickness: int) -> np.ndarray:
    """Cells (True) around seeds, with membranes of the given thickness in pixels between them."""
    y, x = np.mgrid[:SIZE, :SIZE]
    away = np.sort([np.hypot(y - a, x - b) for a, b in seeds], axis=0)
    return away[1] - away[0] > thickness


def predictions(truth: np.ndarray) -> dict[str, np.ndarray]:
    """Four kinds of error."""
    gap, wall = truth.copy(), truth.copy()
    gap[38:43, 70:90] = True
    wall[60:62, 16:90] = False
    return {
        "border moved by 2 pixels": ndimage.shift(truth, (2, 0), order=0, mode="nearest"),
        "membrane too thick": ndimage.binary_erosion(truth, border_value=1, iterations=2),
        "a gap: two cells merge": gap,
        "a false wall: one cell is split": wall,
    }


def picture(truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """What was found in black and white; wrong cell in orange, wrong membrane in blue."""
    rgb = np.repeat((found * np.uint8(255))[..., None], 3, axis=-1)
    rgb[found & ~truth] = OKABE_ITO[1]
    rgb[~found & truth] = OKABE_ITO[5]
    large = rgb.repeat(ZOOM, 0).repeat(ZOOM, 1)
    return np.pad(large, ((1, 1), (1, 1), (0, 0)), constant_values=128)


def main() -> None:
    """Draws the figure and prints one row of scores for each kind of error."""
    truth = cells_of(SEEDS, 4)
    found = predictions(truth)
    panels = [picture(truth, truth), *(picture(truth, each) for each in found.values())]
    write_png(Path(__file__).with_suffix(".png"), side_by_side(panels, ["the truth", *found]))
    rows = {name: isbi_scores(each, truth) for name, each in found.items()}
    names = list(next(iter(rows.values())))
    print("| | " + " | ".join(f"`{name}`" for name in names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for name, scores in rows.items():
        print(f"| {name} | " + " | ".join(f"{scores[n].value:.4f}" for n in names) + " |")


if __name__ == "__main__":
    main()
