"""Pruning-aware tuning: the hidden width is reduced during training; the result is a plain, narrower model.

After each writer of the residual stream stands D = I + L1 diag(v) L0, a low-rank change of basis, followed by
one mask shared by all writers (PAT, arXiv 2408.14721). Differences from the paper: directions come from the
PCA of the stream, so the mask first closes those of least variance; the mask sums exactly to its budget; the
budget falls by a cubic schedule; and the last steps run with the hard mask, so that the tuned model is the
merged model. Everything acts on weights: training runs with effective weights U diag(m) D U^T W, and merging
stores those and narrows the model.
"""

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.core.budget import annealed, cooled, hard_mask, identity_loss, soft_mask
from compress.core.rotation import narrowing, principal
from compress.errors import CompressError
from compress.ir import Document
from compress.methods.hidden_width import rewrite, untie
from compress.sites.modeling import owner
from compress.sites.residual_stream import Stream
from compress.tasks.task import Batch

INITIAL_SCORE = 1.0  # initial scores fall linearly from this to its negative, by rank

Loss = Callable[[nn.Module, Batch], Tensor]


class Settings(Document):
    """How the width is pruned while the model is tuned.

    Attributes:
        steps: optimizer steps.
        learning_rate: of weights, adapters and hybrid modules.
        score_rate: learning rate of the mask's scores.
        warmup: share of the steps in which the learning rates rise.
        adapters: rank of the adapters on the linear layers (LoRA); 0 tunes all weights directly.
        adapter_scale: factor of an adapter's product.
        hybrid: rank of D - I, as a share of the width.
        identity: weight of the identity loss.
        hard: share of the steps, at the end, with the hard mask.
        hot: temperature of the mask at the start.
        cold: temperature when the mask becomes hard.
        decay: weight decay of the weights.
        clip: maximum gradient norm.
        seed: of the initial adapters and hybrid modules.
    """

    steps: int = Field(ge=1)
    learning_rate: float = Field(default=1e-3, ge=0)
    score_rate: float = Field(default=1e-2, ge=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    adapters: int = Field(default=0, ge=0)
    adapter_scale: float = Field(default=1.0, gt=0)
    hybrid: float = Field(default=0.05, gt=0, le=1)
    identity: float = Field(default=1.0, ge=0)
    hard: float = Field(default=0.2, gt=0, lt=1)
    hot: float = Field(default=0.5, gt=0)
    cold: float = Field(default=0.005, gt=0)
    decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    seed: int = 0


class HybridRotation(nn.Module):
    """D = I + L1 diag(v) L0 on k directions; initially the identity, with orthonormal L0 and L1."""

    def __init__(self, directions: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        sides = [torch.randn(directions, rank, generator=generator, dtype=torch.float64) for _ in range(2)]
        inward, outward = (torch.linalg.qr(side).Q for side in sides)
        self.inward = nn.Parameter(inward.T.float().contiguous())
        self.outward = nn.Parameter(outward.float().contiguous())
        self.scale = nn.Parameter(torch.zeros(rank))

    def matrix(self) -> Tensor:
        """[k, k]."""
        own = torch.eye(self.outward.shape[0], dtype=self.scale.dtype, device=self.scale.device)
        return own + (self.outward * self.scale) @ self.inward

    def loss(self) -> Tensor:
        """The identity loss: zero where L0 and L1 are orthonormal."""
        return identity_loss(self.inward, self.outward)


class Adapter(nn.Module):
    """A low-rank update of one matrix in its stored layout; initially zero (LoRA, arXiv 2106.09685)."""

    def __init__(self, shape: torch.Size, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        rank = min(rank, *shape)
        self.right = nn.Parameter(torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5)
        self.left = nn.Parameter(torch.zeros(shape[0], rank))
        self.factor = scale

    def forward(self) -> Tensor:
        """The update, in the shape of the matrix."""
        return self.factor * self.left @ self.right


class Pruner(nn.Module):
    """A full-size model with a masked residual stream; called like the model, merged after tuning.

    `model` is a copy. Tied embeddings stay tied until the merge.
    """

    basis: Tensor

    def __init__(
        self, model: nn.Module, stream: Stream, second: Tensor, width: int, settings: Settings
    ) -> None:
        """Start from the directions of `second` [d, d], keeping `width` channels at the end.

        Raises:
            CompressError: the width is impossible.
        """
        super().__init__()
        basis, _ = principal(second, centered=stream.centered)
        narrowing(basis, width, centered=stream.centered)  # raises for an impossible width
        generator = torch.Generator().manual_seed(settings.seed)
        self.model = copy.deepcopy(model)
        self.stream, self.width, self.settings = stream, width, settings
        self.active = width - int(stream.centered)
        directions = basis.shape[1]
        dtype = next(self.model.parameters()).dtype
        self.register_buffer("basis", basis.to(dtype))
        self.scores = nn.Parameter(torch.linspace(INITIAL_SCORE, -INITIAL_SCORE, directions))
        rank = max(1, round(settings.hybrid * stream.width))
        # A weight and its bias pass through one module; stored tensors each through their own.
        places = dict.fromkeys(_place(part.tensor) for part in stream.writers)
        self.hybrids = nn.ModuleDict({key: HybridRotation(directions, rank, generator) for key in places})
        self.adapters = nn.ModuleDict()
        if settings.adapters:
            self.model.requires_grad_(False)
            for name in self._matrices():
                shape = self.model.get_parameter(name).shape
                made = Adapter(shape, settings.adapters, settings.adapter_scale, generator)
                self.adapters[_key(name)] = made
        self.to(dtype)
        self.at(0.0)

    def at(self, progress: float) -> None:
        """Set the mask for the next forward pass; `progress` goes from 0 to 1 over all steps."""
        self.progress = progress / (1 - self.settings.hard)

    @property
    def is_hard(self) -> bool:
        """Whether the mask is the final one."""
        return self.progress >= 1

    def mask(self) -> Tensor:
        """[k] values between 0 and 1 that sum exactly to the current budget."""
        if self.is_hard:
            return hard_mask(self.scores, self.active)
        budget = annealed(self.progress, float(len(self.scores)), float(self.active))
        heat = cooled(self.progress, self.settings.hot, self.settings.cold)
        return soft_mask(self.scores, budget, heat)

    def weights(self) -> dict[str, Tensor]:
        """By name, the effective tensors that differ from the model's own: adapted, masked, or both."""
        named: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        named |= dict(self.model.named_buffers())
        made = {name: named[name] + self.adapters[_key(name)]() for name in self._adapted()}
        mask = self.mask()
        turns: dict[str, Tensor] = {}
        for part in self.stream.writers:
            key = _place(part.tensor)
            if key not in turns:
                hybrid = self.hybrids[key]
                assert isinstance(hybrid, HybridRotation)
                turns[key] = (self.basis * mask) @ hybrid.matrix() @ self.basis.T
            value = made.get(part.tensor, named[part.tensor])
            turned = value.movedim(part.dim, -1) @ turns[key].T
            made[part.tensor] = turned.movedim(-1, part.dim)
        return made

    def forward(self, **inputs: object) -> object:
        """The output of the masked model."""
        return torch.func.functional_call(self.model, self.weights(), (), inputs, tie_weights=False)

    def identity_loss(self) -> Tensor:
        """The sum of the identity losses of all hybrid modules."""
        losses = [hybrid.loss() for hybrid in self.hybrids.values() if isinstance(hybrid, HybridRotation)]
        return torch.stack(losses).sum()

    def merge(self) -> nn.Module:
        """The plain narrower model that computes what this one does with its hard mask.

        Raises:
            CompressError: the mask is not hard yet, so the merged model was never trained.
        """
        if not self.is_hard:
            raise CompressError(
                f"the mask is still soft ({self.progress:.0%} of its schedule); run the hard-mask steps "
                "before merging"
            )
        with torch.no_grad():
            effective = self.weights()
            kept = self.mask().bool()
            merged = copy.deepcopy(self.model)
            untie(merged, self.stream)
            for name, value in effective.items():
                place = merged.get_submodule(owner(name))
                getattr(place, name.rpartition(".")[2]).data = value.clone()
            directions = self.basis[:, kept].double()
            made = narrowing(directions, self.width, centered=self.stream.centered)
            rewrite(merged, self.stream, made)
        merged.requires_grad_(True)
        return merged

    def groups(self) -> list[dict[str, object]]:
        """Parameter groups for an optimizer, by learning rate and weight decay."""
        extra = {id(p) for part in (self.hybrids, self.adapters) for p in part.parameters()}
        plain = [p for p in self.model.parameters() if p.requires_grad]
        rate, decay = self.settings.learning_rate, self.settings.decay
        made = [p for p in self.parameters() if id(p) in extra]
        return [
            {"params": plain, "lr": rate, "weight_decay": decay},
            {"params": made, "lr": rate, "weight_decay": 0.0},
            {"params": [self.scores], "lr": self.settings.score_rate, "weight_decay": 0.0},
        ]

    def _adapted(self) -> Iterator[str]:
        """Names of the matrices that have an adapter."""
        return (name for name in self._matrices() if _key(name) in self.adapters)

    def _matrices(self) -> Iterator[str]:
        """Names of the weights of linear layers, which get adapters."""
        yield from dict.fromkeys(product.weight for product in self.stream.products)


def tune(
    pruner: Pruner,
    batches: Iterable[Batch],
    loss: Loss,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Run all steps and merge.

    Args:
        pruner: made for a model.
        batches: one for each step; at least as many as `settings.steps`.
        loss: takes the model, which accepts the keyword arguments of the original, and a batch; it may
            include a distance to the outputs of the dense model.
        progress: called with steps done and the number of steps.

    Raises:
        CompressError: there are too few batches, or the loss is NaN or infinite.
    """
    settings = pruner.settings
    optimizer = torch.optim.AdamW([group for group in pruner.groups() if group["params"]])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, settings))
    stream = iter(batches)
    pruner.train()
    for step in range(settings.steps):
        batch = next(stream, None)
        if batch is None:
            raise CompressError(f"pruning-aware tuning needs {settings.steps} batches, the data gave {step}")
        pruner.at(step / settings.steps)
        value = loss(pruner, batch) + settings.identity * pruner.identity_loss()
        if not bool(torch.isfinite(value)):
            raise CompressError(f"the loss of step {step + 1} is {value.item()}; lower the learning rate")
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(value)
        nn.utils.clip_grad_norm_(pruner.parameters(), settings.clip)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, settings.steps)
    pruner.at(1.0)
    return pruner.merge().eval()


def rate_at(step: int, settings: Settings) -> float:
    """The share of the learning rate at a step: linear warmup, then linear decay to 0.

    >>> [round(rate_at(step, Settings(steps=10, warmup=0.2)), 2) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    rise = max(1, round(settings.warmup * settings.steps))
    return min((step + 1) / rise, (settings.steps - step) / max(1, settings.steps - rise), 1.0)


def _place(tensor: str) -> str:
    """The key of a writer's hybrid module; the weight and bias of a layer share one."""
    last = tensor.rpartition(".")[2]
    return _key(owner(tensor) if last in ("weight", "bias") else tensor)


def _key(name: str) -> str:
    """A dotted name as a key of a ModuleDict, which allows neither dots nor names of its methods."""
    return f"of/{name.replace('.', '/')}"
