"""Makes of a run's checkpoint what others can load: a diffusers folder, or LoRA's factors, and the critic.

    python engine/export.py runs/zero3_dit                 the newest checkpoint
    python engine/export.py runs/sd35_lora --merge         LoRA's factors merged into a whole pipeline

A run that has ended has exported itself already. Checkpoints hold pickled tensors: export only runs of your own.
"""

import argparse
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--iteration", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument("--output", type=Path, help="a folder to be made (default: RUN/export-ITERATION)")
    parser.add_argument("--merge", action="store_true", help="of a LoRA run: a whole pipeline in place of the factors")
    parser.add_argument("--no_ema", action="store_true", help="the last weights, not their running average")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: that of the training")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    from latent_critic.engine import launch

    launch.quiet()
    with launch.user_errors():
        export_run(args)


def export_run(args: argparse.Namespace) -> None:
    # After the arguments, so that --help and their mistakes answer at once.
    from diffusers.utils.logging import disable_progress_bar
    from safetensors.torch import load_file

    from latent_critic.engine.checkpoint import disk_errors, export
    from latent_critic.engine.consolidate import load_checkpoint
    from latent_critic.engine.errors import UserError
    from latent_critic.engine.saved_run import SavedRun

    disable_progress_bar()  # of loading
    run = SavedRun(args.run)
    checkpoint = run.checkpoint(args.iteration)
    output = args.output or args.run / checkpoint.name.replace("iteration", "export")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is there already; give another --output")
    model = load_checkpoint(run, checkpoint, not args.no_ema, args.dtype)
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        state = load_file(checkpoint / "run_state.safetensors")
        export(output, model, run.config, run.folder, merge=args.merge, state=state)
    print(f"{checkpoint.name}: {output}")


if __name__ == "__main__":
    main()
