"""A stage of training: an optimizer with a time budget that resumes from its checkpoint."""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor, nn

from decinb.utils.files import replacing


@dataclass
class Stage:
    """A training run with a time budget: AdamW on float32 master weights, an average of the weights, and checkpoints.

    Args:
        name: of the checkpoint file, and in the lines of the log.
        modules: the networks to train; the stage moves them to ``device`` and ``dtype``.
        minutes: the budget. The learning rate warms up over its first 3% and falls to zero along a cosine.
        learning_rate: the maximum.
        folder: where ``NAME.pt`` and ``log.jsonl`` are kept; training resumes from a checkpoint found there.
        dtype: of the computation.
        average: the decay of the exponential moving average of the weights, with which the modules end.

    Attributes:
        step: steps taken so far.
        seconds: training time so far, without that of checkpoints.
    """

    name: str
    modules: dict[str, nn.Module]
    minutes: float
    learning_rate: float
    folder: Path
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    average: float = 0.999
    step: int = 0
    seconds: float = 0.0
    masters: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.masters = [p.detach().to(self.device, torch.float32).clone() for p in self._parameters()]
        for module in self.modules.values():
            nn.Module.to(module, self.device, self.dtype)  # diffusers' own `to` warns about layers to keep in float32
            module.train()
        self.averages = [master.clone() for master in self.masters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.file = self.folder / f"{self.name}.pt"
        if self.file.exists():
            self._restore()

    def run(self, loss_of: Callable[[int], Tensor], watch: Callable[[float], None] | None = None) -> None:
        """Minimise ``loss_of(step)`` until the budget is used up.

        Args:
            loss_of: computes the loss of a step.
            watch: called four times a minute, and at the end, with the progress from 0 to 1.
        """
        losses: list[float] = []
        saved = logged = monotonic()
        while self.progress < 1:
            started = monotonic()
            loss = loss_of(self.step)
            loss.backward()
            self._update()
            losses.append(loss.item())
            self.step += 1
            self.seconds += monotonic() - started
            if monotonic() - logged > 15 or self.progress >= 1:
                self._log(sum(losses) / len(losses))
                if watch:
                    watch(self.progress)
                losses, logged = [], monotonic()
            if monotonic() - saved > 30:
                self._save()
                saved = monotonic()
        self._save()
        self._write(self.averages)
        for module in self.modules.values():
            module.float().eval()

    @property
    def progress(self) -> float:
        """The fraction of the budget that is used up, 0 to 1."""
        return min(self.seconds / (60 * self.minutes), 1.0)

    def _parameters(self) -> Iterator[nn.Parameter]:
        return itertools.chain.from_iterable(module.parameters() for module in self.modules.values())

    @torch.no_grad()
    def _update(self) -> None:
        for master, parameter in zip(self.masters, self._parameters(), strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        warmup = min(1.0, self.progress / 0.03 + 1e-3)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * self.progress))
        self.optimizer.step()
        torch._foreach_lerp_(self.averages, self.masters, 1 - min(self.average, (1 + self.step) / (10 + self.step)))
        self._write(self.masters)

    @torch.no_grad()
    def _write(self, weights: list[Tensor]) -> None:
        for parameter, weight in zip(self._parameters(), weights, strict=True):
            parameter.copy_(weight)

    def _save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "masters": self.masters,
            "averages": self.averages,
            "optimizer": self.optimizer.state_dict(),
        }
        with replacing(self.file) as part:
            torch.save(state, part)

    def _restore(self) -> None:
        state = torch.load(self.file, map_location=self.device, weights_only=True)
        self.step, self.seconds = state["step"], state["seconds"]
        for weight, saved in zip(self.masters + self.averages, state["masters"] + state["averages"], strict=True):
            weight.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self._write(self.masters)

    def _log(self, loss: float) -> None:
        line = {"stage": self.name, "step": self.step, "minutes": round(self.seconds / 60, 2), "loss": round(loss, 5)}
        with open(self.folder / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
        print(
            f"{self.name}: step {self.step}, {line['minutes']} of {self.minutes:g} minutes, loss {loss:.4f}", flush=True
        )
