"""Post-trains a diffusion model:  deepspeed engine/train.py --config configs/zero3_dit.json"""

import argparse
import os
import sys
import warnings
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a recipe, as in configs/ (keys: configs/README.md)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, as in --set training.iterations=20"
    )
    parser.add_argument(
        "--resume",
        metavar="auto|FOLDER",
        help="go on from the newest checkpoint of this output_dir, or of a run folder",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    return parser.parse_args()


def main() -> None:
    args = arguments()
    _quiet()
    # After the arguments, so that --help and their mistakes answer at once.
    from latent_critic.engine import run_folder
    from latent_critic.engine.config import load_config
    from latent_critic.engine.errors import UserError

    try:
        config = load_config(args.config, args.set)
        run_dir = run_folder.choose(config.output_dir, args.resume)
        from latent_critic.engine.sharding import init_distributed
        from latent_critic.engine.trainer import Trainer

        world = init_distributed()
        Trainer(config, world, run_dir).run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(error.exit_code)  # peers may wait in a collective: do not join them


def _quiet() -> None:
    """Keeps other packages' start-up chatter out of the log; their warnings and errors stay."""
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    main()
