"""A training step of the demo's small transformer, eager and compiled: nn.Dropout against quantum-keyed dropout."""

import copy

import torch
import torch.nn.functional as F

import everett_cuda as ev
from benchmarks.harness import Case, check, rows
from everett_cuda.demo.model import CharacterTransformer, Shape, dropouts

CHARACTERS = 65
BATCH = 32


def _step(model: torch.nn.Module, numbers: torch.Tensor, targets: torch.Tensor):
    """A function that trains `model` by one step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        loss = F.cross_entropy(model(numbers).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def run(quick: bool = False) -> list[dict]:
    """Rows: a step in eager code, and with the model compiled by inductor as one graph."""
    repeats = 5 if quick else 41
    shape = Shape()
    torch.manual_seed(0)
    stock = CharacterTransformer(CHARACTERS, shape).train()
    numbers = torch.randint(CHARACTERS, (BATCH, shape.context))
    targets = torch.randint(CHARACTERS, (BATCH, shape.context))
    draws = dropouts(stock)
    result = []
    for mode in ("eager", "compiled"):
        models = {"nn.Dropout": copy.deepcopy(stock), "ev.nn.Dropout": ev.convert(copy.deepcopy(stock))}
        if mode == "compiled":
            models = {name: torch.compile(model, fullgraph=True) for name, model in models.items()}
        steps = {name: _step(model, numbers, targets) for name, model in models.items()}
        before = ev.status().draws["draws"]
        steps["ev.nn.Dropout"]()
        check(ev.status().draws["draws"] - before == draws, "every dropout of the model draws a quantum key")
        group = {"measure": f"{mode} step", "n": BATCH * shape.context, "dtype": "float32"}
        group["threads"] = torch.get_num_threads()
        cases = [Case(name, step) for name, step in steps.items()]
        result += rows("compile", group, cases, repeats, rival="nn.Dropout")
    return result
