"""AdamW over two parameter groups, policy and critic, of which one can rest."""

import torch


class PhasedAdamW(torch.optim.AdamW):
    """AdamW that leaves a group whose learning rate is 0 wholly alone: weights, moments and step count.

    Plain AdamW would let the resting group's moments decay in every critic-only update, and so change the size of the
    policy's next step.
    """

    @torch.no_grad()
    def step(self, closure=None):
        resting = [(group, group["params"]) for group in self.param_groups if group["lr"] == 0.0]
        for group, _ in resting:
            group["params"] = []
        try:
            return super().step(closure)
        finally:
            for group, params in resting:
                group["params"] = params
