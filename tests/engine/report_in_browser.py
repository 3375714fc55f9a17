"""Opens a run's report in Chromium, where there is one; not part of the suite.

    python tests/engine/report_in_browser.py runs/zero3_dit [--browser chromium] [--output FOLDER]

Fails where the page's script did not run, or the console has anything to say: the page's policy forbids every request,
so that one it made would be told there. Leaves screenshots of a phone's and a desk's width, light and dark, to look at.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from latent_critic.engine.html_report import write_report

QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars")
OFFLINE = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic")
SCHEMES = {"light": 1, "dark": 0}  # as Blink numbers them


def open_page(browser: str, page: Path, *options: str) -> tuple[str, list[str]]:
    """What the browser printed, and its console's lines."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            *QUIET,
            *OFFLINE,
            "--enable-logging=stderr",
            f"--user-data-dir={profile}",
            *options,
            page.resolve().as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--browser", default="chromium")
    parser.add_argument("--output", type=Path, help="of the screenshots (default: the run folder)")
    args = parser.parse_args()
    page, folder = write_report(args.run), args.output or args.run
    dom, said = open_page(args.browser, page, "--dump-dom")
    sheets = re.findall(r'<section class="sheet"[^>]*>', dom)
    shown = [sheet for sheet in sheets if "hidden" not in sheet]
    for width in (375, 1440):
        for scheme, number in SCHEMES.items():
            picture = folder / f"report-{width}-{scheme}.png"
            options = (f"--window-size={width},3600", f"--blink-settings=preferredColorScheme={number}")
            said += open_page(args.browser, page, *options, f"--screenshot={picture.resolve()}")[1]
            print(picture)
    print(f"{page}: {len(sheets)} evaluations, {len(shown)} shown, {len(said)} lines in the console")
    if len(shown) != min(1, len(sheets)) or said:
        sys.exit("\n".join(["the script did not run, or the console is not empty", *said]))


if __name__ == "__main__":
    main()
