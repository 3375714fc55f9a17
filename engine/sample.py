"""Draws pictures from a base model, or from a run as its evaluations do, into one grid:

    python engine/sample.py --run runs/zero3_dit
    python engine/sample.py --model stabilityai/stable-diffusion-3.5-medium --count 4 "a red fox in the snow"

    python engine/sample.py --run runs/zero3_dit --steer guidance+bon --particles 4

A run is drawn with its evaluation's sampler, steps, guidance and seed, and unless you give prompts they are the
evaluation's, so that the pictures are too. A base model, or a run with --stock, is drawn by the stock pipeline with its
own scheduler and defaults. With --steer the run's critic steers, with the sampler that it was trained with; scores and
cost are written beside the picture, as JSON. --critic steers a base model by a critic that was trained on it.
"""

import argparse
from pathlib import Path

STEERING = ("guidance", "bon", "smc", "guidance+bon", "guidance+smc")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="FOLDER", help="a run folder")
    source.add_argument("--model", help="tiny-dit, tiny-unet, a diffusers folder or a hub id")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument("--prompts_from", metavar="SOURCE", help="as prompts.eval of a run: scenes:held-out, or a file")
    parser.add_argument(
        "--count", type=int, help="pictures; prompts are repeated or cut to it (default: 16, or one each)"
    )
    parser.add_argument("--stock", action="store_true", help="draw a run by the stock pipeline, as a base model is")
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--guidance_scale", type=float)
    parser.add_argument("--resolution", type=int, help="pixels a side")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--batch_size", type=int, default=8)
    steering = parser.add_argument_group("steering")
    steering.add_argument("--steer", choices=STEERING, help="guidance by the critic, best of N (bon), SMC, or two")
    steering.add_argument("--critic", type=Path, help="a critic.safetensors (default: the run's)")
    steering.add_argument("--scale", type=float, help="of guidance, in p(z) exp(scale V) (default: 4)")
    steering.add_argument("--window", metavar="START:END", help="steps that are guided, END excluded (default: all)")
    steering.add_argument("--particles", type=int, help="samples of a prompt, of bon and smc (default: 4)")
    steering.add_argument("--by", choices=("value", "reward"), help="what judges them on the way (default: value)")
    steering.add_argument("--keep", choices=("value", "reward"), help="what the best is chosen by (default: as --by)")
    steering.add_argument(
        "--smc_scale", type=float, help="in SMC's weights exp(scale V) (default: 3 by value, 10 by reward)"
    )
    steering.add_argument(
        "--resample_every", type=int, metavar="STEPS", help="SMC: at fixed steps (default: when weights degenerate)"
    )
    steering.add_argument(
        "--weight",
        action="append",
        metavar="REWARD=NUMBER",
        help="of the critic's values; 0 for others",
    )
    parser.add_argument("--output", type=Path, default=Path("samples.png"), help="default: samples.png")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    from latent_critic.engine import launch

    launch.quiet()
    with launch.user_errors():
        draw(args)


def check_steering(args: argparse.Namespace) -> None:
    """UserError for an option that would do nothing."""
    from latent_critic.engine.errors import UserError

    way = args.steer or ""
    needs = {
        "--steer": (not args.steer, ("critic", "weight")),
        "--steer guidance": ("guidance" not in way, ("scale", "window")),
        "--steer bon or smc": (way in ("", "guidance"), ("particles", "by", "keep")),
        "--steer smc": ("smc" not in way, ("smc_scale", "resample_every")),
    }
    for wanted, (is_missing, names) in needs.items():
        for name in names:
            if is_missing and getattr(args, name) is not None:
                raise UserError(f"--{name} does nothing without {wanted}")
    if args.stock and args.steer:
        raise UserError("--stock draws by the stock pipeline, which is not steered; give --stock or --steer")


def draw(args: argparse.Namespace) -> None:
    # After the arguments, so that --help and their mistakes answer at once.
    import torch
    from diffusers.utils.logging import disable_progress_bar

    from latent_critic.engine.backbones import load_backbone
    from latent_critic.engine.critic_file import prompt_length
    from latent_critic.engine.drawing import draw_as_evaluated, draw_by_stock_pipeline
    from latent_critic.engine.errors import UserError
    from latent_critic.engine.prompts import Prompt, load_prompts
    from latent_critic.engine.reports import save_grid
    from latent_critic.engine.saved_run import SavedRun
    from latent_critic.engine.world import resolve_dtype

    disable_progress_bar()  # of loading
    if args.batch_size < 1 or (args.count is not None and args.count < 1):
        raise UserError("--count and --batch_size take 1 or more")
    if not args.output.absolute().parent.is_dir():
        raise UserError(f"--output {args.output}: its folder does not exist")
    check_steering(args)
    run = SavedRun(args.run) if args.run else None
    prompts = [Prompt(text) for text in args.prompts]
    if not prompts:
        source = args.prompts_from or (run.config.prompts.eval if run else None)
        if source is None:
            raise UserError("give one prompt or more, or --prompts_from with a file of them")
        prompts = load_prompts(source)
    count = args.count or (len(args.prompts) or 16)
    prompts = [prompts[i % len(prompts)] for i in range(count)]
    texts = [prompt.text for prompt in prompts]

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(run.config.model.dtype if run else "auto", device)
    if run:
        backbone = run.backbone(dtype, args.resolution)
    else:
        backbone = load_backbone(args.model, prompt_length(args.critic) if args.critic else 512, args.resolution, dtype)
    chosen = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale", "seed")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if args.steer:
        from latent_critic.engine.steering.command import draw_steered

        images = draw_steered(args, run, backbone, prompts, device, chosen)
    elif run and not args.stock:
        evaluated = {
            name: getattr(run.config.evaluation, name) for name in ("num_inference_steps", "guidance_scale", "seed")
        }
        images = draw_as_evaluated(backbone, texts, device, batch_size=args.batch_size, **(evaluated | chosen))
    else:
        images = draw_by_stock_pipeline(backbone, texts, device, batch_size=args.batch_size, **({"seed": 0} | chosen))
    save_grid(images, texts, args.output)
    print(f"{count} pictures: {args.output}")


if __name__ == "__main__":
    main()
