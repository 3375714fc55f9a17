"""Whether the paper's claims hold on the embedded models: python bench/reproduce.py

Trains a grid of variants with several seeds each and tells, claim by claim, whether the claims of "Explicit Critic
Guidance for Aligning Diffusion Models" (arXiv 2605.27736) hold here. It may be stopped at any time: the same command
goes on. Results: see bench/README.md.
"""

import argparse
import shlex
import signal
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = str(HERE / "reproduce_parts")
# Python puts this folder first, where transformers would find kernels.py for the package of that name.
sys.path = [PARTS, *(entry for entry in sys.path if Path(entry or ".").resolve() != HERE and entry != PARTS)]

from repro_grid import (  # noqa: E402
    DEFAULT_GROUPS,
    FULL,
    GROUPS,
    QUICK,
    QUICK_GROUPS,
    QUICK_SEEDS,
    SEEDS,
    Run,
    Variant,
    runs,
    variants,
)
from repro_machine import about, usable_cores  # noqa: E402
from repro_places import Mistake, Places, check_settings, result_of  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = ", ".join(GROUPS)
    parser.add_argument(
        "--quick", action="store_true", help="short runs of two groups: at most 20 minutes on two cores"
    )
    parser.add_argument(
        "--only", metavar="NAME[,NAME]", type=_names, help=f"groups, of {groups}; or variants, as --list names them"
    )
    parser.add_argument(
        "--seeds",
        metavar="SEED[,SEED]",
        type=_seeds,
        help="default: 0,1,2 (--quick: 0,1); tuning has seeds of its own",
    )
    parser.add_argument("--jobs", type=int, default=usable_cores(), help="runs at a time (default: a core each)")
    parser.add_argument("--report", action="store_true", help="no runs: tables and plots of those that are there")
    parser.add_argument("--list", action="store_true", help="no runs: the variants, and which are done")
    parser.add_argument(
        "--credit",
        metavar="RUN_FOLDER",
        type=Path,
        help="no runs: credit assignment of a trained one, see bench/README.md",
    )
    parser.add_argument("--output-dir", type=Path, help="default: bench/results/reproduce (--quick: reproduce_quick)")
    parser.add_argument(
        "--runs-dir", type=Path, help="of unfinished runs (default: runs/reproduce, or reproduce_quick)"
    )
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: give 1 or more")
    if sum(map(bool, (args.report, args.list, args.credit))) > 1:
        parser.error("--report, --list and --credit: give one of them")
    groups = QUICK_GROUPS if args.quick else tuple(GROUPS)
    names = {name for variant in _offered(args.quick) for name in (variant.group, variant.name)}
    every = {name for variant in _offered(False) for name in (variant.group, variant.name)}
    for name in args.only or ():
        if name not in names:
            parser.error(
                f"--only {name}: "
                + ("not part of --quick; " if name in every else "unknown; ")
                + f"choose of {', '.join(groups)}, or of the variants that --list names"
            )
    return args


def _offered(quick: bool) -> list[Variant]:
    return [variant for variant in variants(QUICK if quick else FULL) if not quick or variant.group in QUICK_GROUPS]


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _seeds(text: str) -> tuple[int, ...]:
    parts = _names(text)
    if not all(part.isdecimal() and int(part) < 2**32 for part in parts):
        raise argparse.ArgumentTypeError(f'"{text}": give whole numbers from 0, as in 0,1,2')
    return tuple(dict.fromkeys(map(int, parts)))


def main() -> None:
    args = arguments()
    try:
        sys.exit(reproduce(args))
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


def reproduce(args: argparse.Namespace) -> int:
    scale, name = (QUICK, "reproduce_quick") if args.quick else (FULL, "reproduce")
    places = Places(
        (args.output_dir or HERE / "results" / name).resolve(), (args.runs_dir or HERE.parent / "runs" / name).resolve()
    )
    offered = _offered(args.quick)
    names = args.only or (QUICK_GROUPS if args.quick else DEFAULT_GROUPS)
    chosen = [variant for variant in offered if variant.group in names or variant.name in names]
    planned = runs(chosen, args.seeds or (QUICK_SEEDS if args.quick else SEEDS))
    if args.list:
        return show(planned, places)
    if args.credit:
        if not (args.credit / "config.json").is_file():
            raise Mistake(
                f"--credit {args.credit}: no run there (no config.json); give the folder of a run that has ended"
            )
        from latent_critic.engine import launch

        launch.quiet()
        from repro_credit import measure_credit

        print(measure_credit(args.credit, places.output))
        return 0
    command, failed = shlex.join(["python", "bench/reproduce.py", *sys.argv[1:]]), []
    if not args.report:
        # After the arguments, so that --help and their mistakes answer at once; as what only some commands need.
        from repro_runner import Runner

        check_settings(planned, places)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what stops this stops its trainings too
        failed = Runner(places, about(), args.jobs, usable_cores())(planned)
    from repro_report import report

    print(report(offered, scale, places, command))
    if failed:
        print(f"failed: {', '.join(run.name for run in failed)}; the same command tries again", file=sys.stderr)
    return 1 if failed else 0


def show(planned: list[Run], places: Places) -> int:
    """A line for each variant: group, name, finished seeds, and how it differs from its recipe."""
    for variant in dict.fromkeys(run.variant for run in planned):
        seeds = [run for run in planned if run.variant == variant]
        done = [str(run.seed) for run in seeds if result_of(run, places) is not None]
        begun = [str(run.seed) for run in seeds if str(run.seed) not in done and places.recipe(run).exists()]
        state = f"done {len(done)} of {len(seeds)}"
        state += f" (seed {', '.join(done)})" if done else ""
        state += f", begun: seed {', '.join(begun)}" if begun else ""
        changes = ", ".join(f"{key}={value}" for key, value in variant.own_overrides.items()) or "the recipe as it is"
        print(f"{variant.group:13} {variant.name:16} {state}\n{'':30} {variant.about}: {changes}")
    return 0


if __name__ == "__main__":
    main()
