"""The top of a run's report in light and dark, for the README: docs/report-light.png and -dark.png.

    rlhf-recipes report RUN && python tools/report_picture.py runs/RUN

Needs Chromium. Pillow comes with matplotlib.
"""

import subprocess
import sys
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parents[1] / "docs"
WIDTH, HEIGHT, SIDE = 1280, 1005, 100  # pixels; the page has an empty margin on each side

if __name__ == "__main__":
    page = Path(sys.argv[1]).resolve() / "report.html"
    for scheme, number in (("light", 1), ("dark", 0)):
        file = DOCS / f"report-{scheme}.png"
        words = ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars"]
        words += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={file}"]
        words += [f"--blink-settings=preferredColorScheme={number}", page.as_uri()]
        subprocess.run(words, check=True, stderr=subprocess.DEVNULL)
        picture = Image.open(file).convert("RGB").crop((SIDE, 30, WIDTH - SIDE, HEIGHT))
        picture.quantize(128).save(file, optimize=True)
        print(file, f"{file.stat().st_size / 1000:.0f} kB")
