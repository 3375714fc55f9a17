"""Post-trains a diffusion model:  deepspeed engine/train.py --config configs/zero3_dit.json"""

import argparse
import logging
import os
import sys
import time
import warnings
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
        import torch
        from diffusers.utils.logging import disable_progress_bar
        from torch.distributed import destroy_process_group

        from latent_critic.engine.sharding import init_distributed
        from latent_critic.engine.trainer import Trainer

        disable_progress_bar()  # of loading, which has no variable of the environment
        world = init_distributed()
        try:
            Trainer(config, world, run_dir).run()
        except torch.OutOfMemoryError as error:
            raise UserError(f"{str(error).splitlines()[0]} {LESS_MEMORY}") from error
        destroy_process_group()
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # rank 0 mostly makes the same mistake: then the launcher ends this process before it speaks
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(error.exit_code)  # peers may wait in a collective: do not join them
    except KeyboardInterrupt:
        print("\nstopped; --resume auto goes on from the newest checkpoint", file=sys.stderr, flush=True)
        os._exit(130)
    except RuntimeError as error:
        if "by peer" in str(error):
            time.sleep(60)  # a peer has failed and said why, and the launcher ends this process: no traceback beside it
        raise


def _quiet() -> None:
    """Keeps other packages' start-up chatter out of the log; their warnings and errors stay."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")  # it raises what it logs as an error
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("DeepSpeed").addFilter(_matters)


def _matters(record: logging.LogRecord) -> bool:
    """False for DeepSpeed's remarks on what is as it should be: no GPU, an optimizer that is not its own."""
    return not any(remark in record.getMessage() for remark in ("Setting accelerator to CPU", "untested optimizer"))


if __name__ == "__main__":
    main()
