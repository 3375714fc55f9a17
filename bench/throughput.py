"""Images per second against a loop like that of flow_grpo and ddpo-pytorch: python bench/throughput.py

Four loops on the same work, taking turns in one run: diffusers' modules called step by step with the scheduler's and
GRPO's arithmetic in eager torch, the same under torch.compile, the engine without CUDA graphs, and the engine. Also
where the time goes, and what a critic costs. Without arguments: on a GPU SD3.5-M and SD1.5 at 512 px in a few minutes,
on a CPU tiny-dit. Nothing is downloaded: full-size models get random weights. Results: see bench/README.md.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = str(HERE / "throughput_parts")
# Python puts this folder first, where transformers would find kernels.py for the package of that name.
sys.path = [PARTS, *(entry for entry in sys.path if Path(entry or ".").resolve() != HERE and entry != PARTS)]

from bench_work import MODELS, Work, usual


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"only this one: {', '.join(MODELS)}")
    parser.add_argument("--batch", type=int, help="images in a forward, of rollouts and updates; needs --model")
    parser.add_argument("--resolution", type=int, help="pixels; needs --model")
    parser.add_argument("--steps", type=int, help="denoising steps, of which the first half is trained; needs --model")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each loop, after one that warms up")
    parser.add_argument("--output-dir", type=Path, default=HERE / "results")
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in ("batch", "resolution", "steps") if getattr(args, name) is not None}
    if sizes and args.model is None:
        parser.error(f"--{next(iter(sizes))} needs --model, one of {', '.join(MODELS)}")
    try:
        works = [usual(args.model, args.rounds, **sizes)] if args.model else None
        on_cpu, on_gpu = works or cpu_works(args.rounds), works or gpu_works(args.rounds)
    except ValueError as error:
        parser.error(str(error))

    # After the arguments, so that --help and their mistakes answer at once.
    import bench_report
    import torch
    from comparison import compare

    has_gpu = torch.cuda.is_available()
    stem = args.output_dir / ("throughput_gpu" if has_gpu else "throughput_cpu")
    machine, cases = bench_report.about(), []
    for work in on_gpu if has_gpu else on_cpu:
        cases.append(compare(work, has_gpu))
        text = bench_report.save(cases, machine, stem)  # after each: nothing measured is lost
    print(text)


def cpu_works(rounds: int) -> list[Work]:
    return [usual("tiny-dit", rounds)]


def gpu_works(rounds: int) -> list[Work]:
    """About four minutes on an H100. Compiling a whole UNet would take one more, its iterations another."""
    return [
        Work("sd35-medium", 2, 512, 10, (1, 8), rounds),
        Work("sd15", 1, 512, 10, (1,), rounds, with_compile=False, with_iterations=False),
    ]


if __name__ == "__main__":
    main()
