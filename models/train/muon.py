"""Muon: momentum, then the nearest orthogonal matrix by five Newton-Schulz steps. For the layers' matrices only."""
import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon:
    def __init__(self, matrices, momentum=0.95, weight_decay=0.05):
        self.momentum, self.weight_decay = momentum, weight_decay
        self.by_shape = {}
        for p in matrices:
            self.by_shape.setdefault(tuple(p.shape), []).append(p)
        self.mean = {shape: torch.zeros(len(ps), *shape, device=ps[0].device) for shape, ps in self.by_shape.items()}

    @torch.no_grad()
    def step(self, rate):
        for shape, parameters in self.by_shape.items():  # matrices of one shape in one batch
            gradient = torch.stack([p.grad for p in parameters])
            mean = self.mean[shape].lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp(mean, self.momentum).bfloat16()).float()
            update *= max(1.0, shape[0] / shape[1]) ** 0.5
            torch._foreach_mul_(parameters, 1 - rate * self.weight_decay)
            torch._foreach_add_(parameters, list(update.unbind()), alpha=-rate)


def orthogonal(x):
    """x [n,rows,columns] bf16."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
