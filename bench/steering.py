"""What the critic is worth at sampling: reward against compute for each way to steer: python bench/steering.py

On held-out prompts, from a base model with a critic that was trained on it, and from a post-trained model with its own.
Without arguments both runs are made first, on the embedded tiny-dit (runs/steering). Guidance's and SMC's scales are
chosen on training prompts. Results: bench/results/steering (see bench/README.md).
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = [str(HERE / "steering_parts"), str(HERE / "reproduce_parts")]
# Python puts this folder first, where transformers would find kernels.py for the package of that name.
sys.path = [*PARTS, *(entry for entry in sys.path if Path(entry or ".").resolve() != HERE and entry not in PARTS)]

from steer_runs import MODELS, find_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, metavar="RUN", help="run of value pretraining alone (default: made first)")
    parser.add_argument("--trained", type=Path, metavar="RUN", help="a post-trained run (default: made first)")
    parser.add_argument("--only", choices=MODELS, help="one of the two models")
    parser.add_argument("--prompts", type=int, default=512, help="held-out prompts, a picture each (default: 512)")
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each prompt, at least 2 (default: 2)")
    parser.add_argument("--most", type=int, default=16, help="particles of a prompt, at most (default: 16)")
    parser.add_argument("--output-dir", type=Path, default=HERE / "results" / "steering")
    args = parser.parse_args()
    if args.prompts < 2 or args.seeds < 2 or args.most < 1:
        parser.error("--prompts and --seeds take 2 or more, --most 1 or more")

    # After the arguments, so that --help and their mistakes answer at once.
    import steer_report
    from steer_cells import Bench

    from latent_critic.engine import launch

    launch.quiet()
    with launch.user_errors():
        for model in MODELS:
            if args.only in (None, model):
                bench = Bench(find_run(model, getattr(args, model)), args.prompts, args.seeds, args.most)
                kept = args.output_dir / f"{model}.json"
                bench.run(kept)  # a cell that is there already is not measured again
        print(steer_report.write(args.output_dir))


if __name__ == "__main__":
    main()
