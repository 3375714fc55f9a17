"""Writes a run's report:  python -m latent_critic.engine.html_report runs/zero3_dit"""

import argparse
from pathlib import Path

from latent_critic.engine import launch
from latent_critic.engine.html_report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m latent_critic.engine.html_report", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder; the run need not have ended")
    args = parser.parse_args()
    with launch.user_errors():
        print(write_report(args.run))


if __name__ == "__main__":
    main()
