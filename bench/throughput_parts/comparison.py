"""One work, measured: the loops in their two processes take turns, round by round."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from bench_work import BATCHES, COMPILED, NO_GRAPHS, OURS, STOCK, WITH_CRITIC_PASSES, Work
from tqdm import tqdm
from turns import OutOfMemory, Worker

CRITIC_ROUNDS = 20
BATCHES_ON_GPU = 2  # of a rollout that is measured alone; on a CPU as many as an iteration's, which share its cores


def compare(work: Work, on_gpu: bool) -> dict[str, Any]:
    """Everything that was measured, as plain JSON data."""
    stock, ours = Worker("stock_loop", "StockLoop", work), Worker("our_loop", "OurLoop", work)
    try:
        for worker in tqdm((stock, ours), desc=f"{work.model}: start", leave=False):
            worker.ready()
        return _Comparison(work, on_gpu, stock, ours).run()
    finally:
        stock.close()
        ours.close()


class _Comparison:
    def __init__(self, work: Work, on_gpu: bool, stock: Worker, ours: Worker):
        self.work, self.on_gpu, self.stock, self.ours = work, on_gpu, stock, ours
        self.workers = dict.fromkeys((STOCK, COMPILED), stock)
        self.workers |= dict.fromkeys((NO_GRAPHS, OURS, WITH_CRITIC_PASSES), ours)
        self.notes: list[str] = []
        self.active: Worker | None = None

    def run(self) -> dict[str, Any]:
        work, batch = self.work, max(self.work.rollout_batches)
        results = {"work": asdict(work) | {"images": work.images, "trained_steps": work.trained_steps}}
        results |= {"stock": self.stock.call("about"), "ours": self.ours.call("about")}
        peaks, loops = [self.stock.call("peak")], self._loops()
        results["rollouts"] = [self._rollouts(loops, size) for size in work.rollout_batches]
        captured = self._captured(results["rollouts"])
        results["graphs"] = [{"batch": size, **self.ours.call("graph_cost", size)} for size in captured]
        results["critics"] = {"batch": batch, "seconds": self.ours.call("critics", batch, CRITIC_ROUNDS)}
        for worker in (self.stock, self.ours):
            worker.call("release")
        iterating = [*loops, WITH_CRITIC_PASSES] if work.with_iterations else []
        results["iterations"] = self._take_turns("iterations", iterating, self._iterate)
        peaks.append(self.stock.call("peak"))  # a measured one: other work on the machine can only have lowered it
        return results | {"peak": max(peaks, key=lambda peak: peak["flops_per_s"]), "notes": self.notes}

    def _loops(self) -> list[str]:
        loops = [STOCK, COMPILED, NO_GRAPHS, OURS]
        if not self.on_gpu:
            loops.remove(NO_GRAPHS)
            self.notes.append(f"On a CPU there are no CUDA graphs: `{OURS}` runs without.")
        if not self.work.with_compile:
            loops.remove(COMPILED)
            self.notes.append(f"`{COMPILED}` is left out, since compiling takes too long: `--model` measures it.")
        elif reason := self.stock.call("compiler_missing"):
            loops.remove(COMPILED)
            self.notes.append(f"`{COMPILED}` is left out, since nothing can be compiled here: {reason}")
        return loops

    def _captured(self, rollouts: list[dict]) -> list[int]:
        """The batch sizes at which ours replayed a graph. Where a step cannot be captured, the engine does without."""
        replayed = [r["batch"] for r in rollouts if r["counts"].get(OURS, {}).get("graph_launches")]
        if self.on_gpu and len(replayed) < len(rollouts):
            self.notes.append(f"`{OURS}` replayed graphs at these batch sizes alone: {replayed}.")
        return replayed

    def _rollouts(self, loops: list[str], batch: int) -> dict[str, Any]:
        batches = BATCHES_ON_GPU if self.on_gpu else BATCHES

        def run(loop: str) -> float:
            return self.workers[loop].call("rollout", loop, batch, batches)

        seconds = self._take_turns(f"rollouts of {batch}", loops, run)
        counts = {loop: self.workers[loop].call("count", loop, batch) for loop in seconds}
        return {"batch": batch, "images": batch * batches, "seconds": seconds, "counts": counts}

    def _iterate(self, loop: str) -> dict[str, Any]:
        """On a GPU a process whose turn ends gives unused memory back; its next turn then begins with an iteration
        that is not counted."""
        worker = self.workers[loop]
        if self.on_gpu and worker is not self.active:
            if self.active is not None:
                self.active.call("release")
            self.active = worker
            worker.call("iterate", loop)
        return worker.call("iterate", loop)

    def _take_turns(self, what: str, loops: list[str], run: Callable[[str], Any]) -> dict[str, list]:
        """Results by loop, one a round. A round before them compiles, captures and tunes."""
        found: dict[str, list] = {loop: [] for loop in loops}
        rounds = self.work.rounds + 1
        with tqdm(total=rounds * len(loops), desc=f"{self.work.model}: {what}", leave=False) as bar:
            for number in range(rounds):
                for loop in list(found):
                    bar.set_postfix_str(loop)
                    try:
                        result = run(loop)
                    except OutOfMemory as error:
                        del found[loop]
                        self.notes.append(f"`{loop}`, {what}: does not fit beside the other process. {error}")
                        continue
                    if number > 0:
                        found[loop].append(result)
                    bar.update()
        return found
