"""Training of the two twins, interleaved step by step in one process, so that their times meet the same conditions."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from ..nn import convert
from .model import CharacterTransformer, Shape
from .ranks import Ranks
from .text import Text, batch

BATCH = 16
LEARNING_RATE = 6e-3
WARM_UP_STEPS = 30
HELD_OUT_BATCHES = 4


@dataclass
class Twin:
    """One of the two models, and what its training measured: loss and seconds of each step, (step, held-out loss).

    trained: what the forward of a training step calls, where that is a wrapper of the model.
    """

    name: str
    model: nn.Module
    trained: nn.Module
    losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self):
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))

    def step(self, inputs: torch.Tensor, targets: torch.Tensor, rate: float) -> None:
        """Forward, backward and optimizer, timed together."""
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = _loss(self.trained, inputs, targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.step_s.append(time.perf_counter() - start)

    @torch.inference_mode()
    def evaluate(self, step: int, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Appends the mean loss on `batches`, without dropout."""
        self.model.eval()
        self.held_out.append((step, sum(_loss(self.model, *b).item() for b in batches) / len(batches)))
        self.model.train()


def _loss(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def _rate(step: int, steps: int) -> float:
    """Learning rate: up in a line over the first steps, then down along half a cosine to a tenth."""
    warm_up = min(WARM_UP_STEPS, max(1, steps // 4))
    if step < warm_up:
        return LEARNING_RATE * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return LEARNING_RATE * (0.55 + 0.45 * math.cos(math.pi * progress))


def make_twins(text: Text, shape: Shape, seed: int, ranks: Ranks) -> tuple[Twin, Twin]:
    """(torch's, ours): the same weights from `seed`, the second one converted. Seeds torch's default generator."""
    torch.manual_seed(seed)
    model = CharacterTransformer(len(text.characters), shape).train()
    ours = convert(copy.deepcopy(model))
    return Twin("torch", model, ranks.wrap(model)), Twin("everett_cuda", ours, ranks.wrap(ours))


def train(
    twins: tuple[Twin, Twin],
    text: Text,
    steps: int,
    seed: int,
    ranks: Ranks,
    on_step: Callable[[int], None],
    on_held_out: Callable[[int], None],
) -> None:
    """Trains both twins on the same `steps` batches, taking turns in going first; each rank has batches of its own.

    Held-out loss comes before the first step, after every eighth of the steps and at the end. on_step and on_held_out
    are called with the number of steps done.
    """
    context = twins[0].model.shape.context
    batches = torch.Generator().manual_seed(seed)
    held_out = [batch(text.held_out, BATCH, context, batches) for _ in range(HELD_OUT_BATCHES)]
    if not ranks.first:
        batches.manual_seed(seed + ranks.rank)
    interval = max(1, steps // 8)
    for step in range(steps + 1):
        if step % interval == 0 or step == steps:
            for twin in twins:
                twin.evaluate(step, held_out)
            on_held_out(step)
        if step == steps:
            return
        inputs, targets = batch(text.train, BATCH, context, batches)
        for twin in twins if step % 2 == 0 else twins[::-1]:
            twin.step(inputs, targets, _rate(step, steps))
        on_step(step + 1)
