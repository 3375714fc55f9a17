"""Post-trains a diffusion model:  deepspeed engine/train.py --config configs/zero3_dit.json"""

import argparse
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

LESS_MEMORY = (
    "Lower rollout.micro_batch_size, or set model.gradient_checkpointing=true; --resume auto then goes on from the "
    "newest checkpoint"
)


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
    parser.add_argument(
        "--plan",
        nargs="?",
        const="",
        metavar="GPUS",
        help="say what the run would need, of memory and time, on GPUs such as 8xH100 (default: this machine's, or "
        "these), and do no more; takes neither a GPU nor weights",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    return parser.parse_args()


def main() -> None:
    args = arguments()
    from latent_critic.engine import launch

    launch.quiet()
    try:
        with launch.user_errors():
            train(args)
    except KeyboardInterrupt:
        print("\nstopped; --resume auto goes on from the newest checkpoint", file=sys.stderr, flush=True)
        os._exit(130)
    except RuntimeError as error:
        if "by peer" in str(error):
            time.sleep(60)  # a peer has failed and said why, and the launcher ends this process: no traceback beside it
        raise


def train(args: argparse.Namespace) -> None:
    # After the arguments, so that --help and their mistakes answer at once.
    from latent_critic.engine import launch, run_folder
    from latent_critic.engine.config import load_config
    from latent_critic.engine.errors import UserError

    config = load_config(args.config, args.set)
    if args.plan is not None:
        with launch.imports():
            from latent_critic.engine.forecast import forecast

        if os.environ.get("RANK", "0") == "0":
            print(forecast(config, args.plan), flush=True)
        os._exit(0)  # to take down what was imported would take Python another second
    run_folder.choose(config.output_dir, args.resume)  # a mistake there is told at once
    with launch.imports():
        import torch
        import torch.distributed as dist
        from diffusers.utils.logging import disable_progress_bar

        from latent_critic.engine.sharding import init_distributed
        from latent_critic.engine.trainer import Trainer

    disable_progress_bar()  # of loading, which has no variable of the environment
    world = init_distributed()
    with run_folder.taken(config.output_dir, args.resume) if world.is_main else nullcontext() as folder:
        folders = [folder]
        dist.broadcast_object_list(folders)
        try:
            Trainer(config, world, folders[0]).run()
        except torch.OutOfMemoryError as error:
            raise UserError(f"{str(error).splitlines()[0]} {LESS_MEMORY}") from error
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
