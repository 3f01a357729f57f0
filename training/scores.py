"""How unusual an item is: the parts of a score, each freed of the bias towards items with little ink, and their fusion.

A network observes an item (`Autoencoder.observe`), each part makes one number of what was seen, and the numbers are
fused through the tail probabilities that they have among held-out normal items. Everything here is exported with the
network; whatever is random was drawn before. To add a part: write a class, and name it in PARTS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from training.autoencoders import Autoencoder
from training.dataset import to_float
from training.errors import TrainingError
from training.noise import generator

PartName = Literal[
    "residual",
    "pathway",
    "companion",
    "restoration",
    "density",
    "likeness",
    "answer_likeness",
    "local",
    "patches",
    "likelihood",
    "divergence",
]

FITTING_ITEMS = 6000  # of the training part: what the parts' constants are taken from
LEAST_INK = 0.25  # of the median item's: blank pictures would divide by nothing
TAIL_SHARE, FEWEST_IN_TAIL = 0.05, 5
KNOTS = 200
LEAST_SHAPE, MOST_SHAPE = 0.05, 2.0  # of the tails: relative scatter of the values beyond the top ones
STEEPEST = 1 / (LEAST_SHAPE * math.log(10))  # evidence by relative change of a value
NEAREST = 5
LEAST_SPREAD = 1e-4  # of what is typical
WHITENING_FLOOR = 1e-6  # of the largest variance
LIKENESS_DIRECTIONS, LIKENESS_ITEMS = 64, 4000
PATCH_PX = 5
PATCHES_ACROSS = 32  # at least so many pixels across a picture where it is shrunk most
PATCH_FITTING_ITEMS = 500
PATCH_PLACES = 2**17  # at once, in fitting
GREY_LEVEL = 1 / 255


@dataclass(frozen=True)
class Scoring:
    """What a score is made of.

    `residual`: mean squared reconstruction error. `pathway`: what encoding changes when it is given the
    reconstruction, and the reconstruction's error itself, whitened on normal items. `companion`: the same of a second
    network, by half as many directions. `restoration`: error of restorations of noised copies, for networks that
    learnt to denoise. `density`: mean distance to the nearest latent vectors of normal items. `likeness`: the same to
    the items themselves, at unit norm and along their principal directions; `answer_likeness`: of reconstructions.
    `local`: mean of the most unusual places. `patches`: the same of places whose surroundings, a few pixels and their
    colours at several scales, are unusual; it makes the map too. `likelihood`, `divergence`: the two parts of −ELBO,
    of variational networks.

    Source: RaPP: Kim et al. 2020, ICLR; whitening of paths and division by the norm: measured in quality-anomaly;
    patches: Mahalanobis distance as in PaDiM, Defard et al. 2021, arXiv:2011.08785, of pixels instead of features.
    """

    parts: tuple[PartName, ...] = ("residual", "pathway")
    weights: tuple[NonNegativeFloat, ...] = ()  # of the parts in that order; none: equal
    directions: PositiveInt = 64  # of the pathway's whitening
    sigma: PositiveFloat = 0.5  # of the noise in restoration
    draws: PositiveInt = 2
    neighbours: PositiveInt = 2000  # normal items that density and likeness are measured against
    local_share: PositiveFloat = 0.02  # of a picture's places: those that say most
    windows: tuple[PositiveInt, ...] = (
        3,
    )  # odd, in pixels: over which errors are averaged, with their sign if above 3


class Part(nn.Module):
    """One number per item. What it takes from normal items it takes in `fit`; `forward` is compiled for serving."""

    wants: ClassVar[tuple[str, ...]] = ()
    """Observations beside `x` and `y`, the item and its reconstruction."""

    def fit(self, seen: dict[str, Tensor]) -> None:
        """Takes constants from the observations of training items."""

    def forward(self, seen: dict[str, Tensor]) -> Tensor:
        """Observations of a batch → (batch,), above zero, higher is more unusual."""
        raise NotImplementedError


@torch.no_grad()
def principal_directions(x: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of (items, values): their mean, up to so many directions (values, directions), and the variance along each."""
    x = x.double()
    mean = x.mean(0)
    centred = x - mean
    rows, columns = centred.shape
    # The smaller of the two Gram matrices has the same non-zero eigenvalues.
    if rows < columns:
        values, left = torch.linalg.eigh(centred @ centred.T)
        vectors = centred.T @ left / values.clamp_min(1e-30).sqrt()
    else:
        values, vectors = torch.linalg.eigh(centred.T @ centred)
    keep = max(1, min(most, rows - 1, columns))
    values, vectors = values.flip(0)[:keep], vectors.flip(1)[:, :keep]
    largest = vectors.abs().argmax(0)  # an eigenvector's sign is arbitrary
    return mean, vectors * vectors[largest, torch.arange(keep)].sign(), values / rows


class _Residual(Part):
    def __init__(self, scoring: Scoring) -> None:
        del scoring
        super().__init__()

    def forward(self, seen: dict[str, Tensor]) -> Tensor:
        return (seen["y"] - seen["x"]).square().mean(1) / seen["ink"]


class _Pathway(Part):
    wants = ("path",)
    observed = "path"
    if TYPE_CHECKING:  # TorchScript would take annotations for types of its own
        mean: Tensor
        whitening: Tensor

    def __init__(self, scoring: Scoring) -> None:
        super().__init__()
        self.directions = scoring.directions
        self.path = self.observed
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("whitening", torch.zeros(1, 1))

    @torch.no_grad()
    def fit(self, seen: dict[str, Tensor]) -> None:
        """Principal directions of the paths of normal items, each scaled to deviation 1."""
        mean, vectors, variances = principal_directions(seen[self.path], self.directions)
        self.mean = mean.float()
        deviations = (variances.clamp_min(WHITENING_FLOOR * float(variances[0])) + 1e-30).sqrt()
        self.whitening = (vectors / deviations).float().contiguous()  # (path, directions)

    def forward(self, seen: dict[str, Tensor]) -> Tensor:
        return ((seen[self.path] - self.mean) @ self.whitening).square().mean(1).sqrt() / seen["ink"]


class _Companion(_Pathway):
    wants = ("companion",)
    observed = "companion"

    def __init__(self, scoring: Scoring) -> None:
        super().__init__(scoring)
        self.directions = max(1, scoring.directions // 2)


class _Restoration(Part):
    wants = ("restoration",)

    def __init__(self, scoring: Scoring) -> None:
        del scoring
        super().__init__()

    def forward(self, seen: dict[str, Tensor]) -> Tensor:
        return seen["restoration"] / seen["ink"]


class _Density(Part):
    wants: ClassVar[tuple[str, ...]] = ("latent",)
    if TYPE_CHECKING:
        known: Tensor

    def __init__(self, scoring: Scoring) -> None:
        super().__init__()
        self.count = scoring.neighbours
        self.nearest = NEAREST
        self.register_buffer("known", torch.zeros(1, 1, dtype=torch.float64))

    def vectors(self, seen: dict[str, Tensor]) -> Tensor:
        """What distances are between, (batch, numbers), in double: they are differences of nearly equal numbers."""
        return seen["latent"].double()

    @torch.no_grad()
    def fit(self, seen: dict[str, Tensor]) -> None:
        """Keeps the vectors of the first normal items; their order is the split's, hence arbitrary."""
        self.known = self.vectors(seen)[: self.count].clone()
        self.nearest = min(NEAREST, len(self.known))

    def forward(self, seen: dict[str, Tensor]) -> Tensor:
        # In the product's form: cdist changes its algorithm, hence its rounding, with the number of rows.
        z, known = self.vectors(seen), self.known
        squared = z.square().sum(1, keepdim=True) + known.square().sum(1) - 2 * z @ known.t()
        return torch.topk(squared, self.nearest, dim=1, largest=False)[0].clamp_min(1e-12).sqrt().mean(1).float()


class _Likeness(_Density):
    wants: ClassVar[tuple[str, ...]] = ()
    observed = "x"
    if TYPE_CHECKING:
        mean: Tensor
        directions: Tensor

    def __init__(self, scoring: Scoring) -> None:
        super().__init__(scoring)
        self.item = self.observed
        self.register_buffer("mean", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("directions", torch.zeros(1, 1, dtype=torch.float64))

    def vectors(self, seen: dict[str, Tensor]) -> Tensor:
        """At the item's unit norm: neither much ink nor little makes an item unlike others."""
        return (seen[self.item].double() / seen["ink"].double()[:, None] - self.mean) @ self.directions

    @torch.no_grad()
    def fit(self, seen: dict[str, Tensor]) -> None:
        """Takes principal directions, which leave noise behind, then keeps normal items."""
        unit = seen[self.item][:LIKENESS_ITEMS] / seen["ink"][:LIKENESS_ITEMS, None]
        self.mean, directions, _ = principal_directions(unit, LIKENESS_DIRECTIONS)
        self.directions = directions.contiguous()
        super().fit(seen)


class _AnswerLikeness(_Likeness):
    observed = "y"


class _Local(Part):
    wants = ("map",)
    observed = "map"

    def __init__(self, scoring: Scoring) -> None:
        super().__init__()
        self.share = scoring.local_share
        self.map = self.observed

    def forward(self, seen: dict[str, Tensor]) -> Tensor:
        places = seen[self.map]
        count = max(1, int(self.share * places.shape[1]))
        return torch.topk(places, count, dim=1)[0].mean(1)


class _Patches(_Local):
    wants = ("patches",)
    observed = "patches"


class _Likelihood(Part):
    wants = ("likelihood",)

    def __init__(self, scoring: Scoring) -> None:
        del scoring
        super().__init__()

    def forward(self, seen: dict[str, Tensor]) -> Tensor:
        return seen["likelihood"] / seen["ink"]


class _Divergence(Part):
    wants = ("likelihood", "divergence")

    def __init__(self, scoring: Scoring) -> None:
        del scoring
        super().__init__()

    def forward(self, seen: dict[str, Tensor]) -> Tensor:
        return seen["divergence"]


PARTS: dict[PartName, type[Part]] = {
    "residual": _Residual,
    "pathway": _Pathway,
    "companion": _Companion,
    "restoration": _Restoration,
    "density": _Density,
    "likeness": _Likeness,
    "answer_likeness": _AnswerLikeness,
    "local": _Local,
    "patches": _Patches,
    "likelihood": _Likelihood,
    "divergence": _Divergence,
}


class Tails(nn.Module):
    """Values of parts as evidence: −log₁₀ of the share of held-out normal items that have such a value or a higher.

    Between the values of those items it is interpolated, nowhere more steeply than it can be beyond them: few items, of
    which two happen to be almost alike, would make a difference out of the values' rounding. Beyond the top 5 % of them
    the share falls as a power of the value (Hill 1975, doi:10.1214/aos/1176343247), so that evidence goes on growing
    where the data ends. Not fitted, it leaves values as they are.
    """

    if TYPE_CHECKING:
        values: Tensor
        evidence: Tensor
        shape: Tensor

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(parts, 0))
        self.register_buffer("evidence", torch.zeros(parts, 0))
        self.register_buffer("shape", torch.ones(parts))

    @torch.no_grad()
    def fit(self, parts: Tensor) -> None:
        """Takes the distribution from normal items that no part was fitted on, (items, parts)."""
        rows = len(parts)
        beyond = min(rows - 1, max(min(FEWEST_IN_TAIL, rows // 2), math.ceil(TAIL_SHARE * rows)))
        places = torch.linspace(0, rows - beyond - 1, min(KNOTS, rows - beyond)).round().long()
        ordered = parts.double().sort(0).values.clamp_min(1e-12)
        # The k-th smallest of n has n − k above it.
        evidence = -((rows - places.double()) / (rows + 1)).log10()
        knots = [self._gentle(values, evidence) for values in ordered[places].T]
        # As many for each part: the last one again, where a part has fewer.
        most = max(len(kept) for kept in knots)
        kept = torch.tensor([[*chosen, *[chosen[-1]] * (most - len(chosen))] for chosen in knots])
        self.values = ordered[places].T.gather(1, kept).float().contiguous()  # (parts, knots)
        self.evidence = evidence[kept].float().contiguous()
        if beyond:
            excess = (ordered[rows - beyond :] / ordered[places[-1]]).log().mean(0)
            self.shape = excess.clamp(LEAST_SHAPE, MOST_SHAPE).float()

    @staticmethod
    def _gentle(values: Tensor, evidence: Tensor) -> list[int]:
        """Which knots to keep of one part, ascending, the last among them, so that none is reached too steeply."""
        heights, logs = evidence.tolist(), values.log().tolist()
        kept: list[int] = []
        for knot, (height, log) in enumerate(zip(heights, logs, strict=True)):
            is_last = knot == len(heights) - 1
            while is_last and kept and height - heights[kept[-1]] > STEEPEST * (log - logs[kept[-1]]):
                kept.pop()
            if is_last or not kept or height - heights[kept[-1]] <= STEEPEST * (log - logs[kept[-1]]):
                kept.append(knot)
        return kept

    def forward(self, parts: Tensor) -> Tensor:
        """(batch, parts) → the same of evidence."""
        if self.values.shape[1] == 0:
            return parts
        columns: list[Tensor] = []
        last = self.values.shape[1] - 1
        for part in range(self.values.shape[0]):
            values, evidence = self.values[part], self.evidence[part]
            value = parts[:, part].contiguous()
            above = torch.searchsorted(values, value).clamp(1, max(1, last)).clamp_max(last)
            below = (above - 1).clamp_min(0)
            step = (values[above] - values[below]).clamp_min(1e-30)
            share = ((value - values[below]) / step).clamp(0.0, 1.0)
            within = evidence[below] + share * (evidence[above] - evidence[below])
            low = evidence[0] * value / values[0]
            high = evidence[last] + (value / values[last]).clamp_min(1.0).log() / (self.shape[part] * math.log(10.0))
            column = torch.where(value < values[0], low, torch.where(value > values[last], high, within))
            columns.append(column)
        return torch.stack(columns, 1)


class _Scale(nn.Module):
    """Mahalanobis distance of the surroundings of each place, on a picture shrunk by a whole factor."""

    if TYPE_CHECKING:
        filters: Tensor
        offsets: Tensor
        typical: Tensor

    def __init__(self, item_shape: tuple[int, ...], factor: int) -> None:
        super().__init__()
        channels, self.height, self.width = item_shape
        self.factor, self.margin = factor, PATCH_PX // 2
        shape = (1, channels, PATCH_PX, PATCH_PX)
        self.register_buffer("filters", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("offsets", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("typical", torch.ones(1, 1, item_shape[1], item_shape[2]))

    def shrunk(self, x: Tensor) -> Tensor:
        # In double: along directions in which normal pictures hardly differ, rounding would be seen.
        return functional.avg_pool2d(x.double(), self.factor, self.factor, 0, True)

    @torch.no_grad()
    def fit(self, items: Tensor) -> None:
        """Takes mean and covariance of the patches of normal pictures, (items, *item)."""
        small = self.shrunk(to_float(items[:1]))
        count, total, products = 0, torch.zeros(()), torch.zeros(())
        for batch in torch.split(items, max(1, PATCH_PLACES // small[0, 0].numel())):
            patches = functional.unfold(self.shrunk(to_float(batch)), PATCH_PX).transpose(1, 2).flatten(0, 1)
            count += len(patches)
            total, products = total + patches.sum(0), products + patches.T @ patches
        mean = total / count
        values, vectors = torch.linalg.eigh(products / count - mean[:, None] * mean)
        # No picture of whole grey levels is more exact than their rounding.
        floor = max(GREY_LEVEL**2 / 12 / self.factor**2, WHITENING_FLOOR * float(values[-1]))
        whitening = (vectors / (values.clamp_min(0) + floor).sqrt()).T  # (directions, values of a patch)
        self.filters = whitening.reshape(-1, *self.filters.shape[1:]).contiguous()
        self.offsets = -(whitening @ mean)

    def forward(self, x: Tensor) -> Tensor:
        """Mean square along all directions, (batch, 1, height, width); a margin is as its nearest neighbour is."""
        squared = functional.conv2d(self.shrunk(x), self.filters, self.offsets).square().mean(1, keepdim=True)
        margin = self.margin
        near = functional.pad(squared.float(), [margin, margin, margin, margin], mode="replicate")
        near = near.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)
        return functional.avg_pool2d(near[:, :, : self.height, : self.width], 3, 1, 1, False, False)


class PatchMap(nn.Module):
    """How unusual the surroundings of each place are among those of normal pictures, whatever the network answers.

    A few pixels with all of their colours, at full size and shrunk by 2, 4 and so on. Along directions in which
    neighbouring pixels and colours of normal pictures hardly differ, little is much: a faint edge in a smooth grain, a
    tint that the grain never has.
    """

    if TYPE_CHECKING:
        peak: Tensor

    def __init__(self, item_shape: tuple[int, ...]) -> None:
        super().__init__()
        side = min(item_shape[1:], default=0)
        if side < PATCH_PX:
            raise TrainingError(
                f"scoring.parts: patches: expected pictures of {PATCH_PX} pixels or more, found items of {item_shape}"
            )
        factors = [2**k for k in range(16) if k == 0 or 2**k * PATCHES_ACROSS <= side]
        self.scales = nn.ModuleList([_Scale(item_shape, factor) for factor in factors])
        self.least_spread = LEAST_SPREAD
        self.register_buffer("peak", torch.ones(()))

    @torch.no_grad()
    def fit(self, normal: Tensor, held_out: Tensor) -> None:
        """Takes the patches of normal pictures, and from others too what is typical of each place."""
        normal = normal[:PATCH_FITTING_ITEMS]
        everything = torch.cat([normal, held_out[:PATCH_FITTING_ITEMS]])
        for scale in self.scales:
            scale.fit(normal)  # type: ignore[operator]
            total = sum(scale(to_float(batch)).sum(0, keepdim=True) for batch in torch.split(everything, 16))
            typical = total / len(everything)
            scale.typical = typical + 0.1 * typical.mean() + 1e-12
        highest = [self(to_float(batch)).amax(1) for batch in torch.split(held_out[:PATCH_FITTING_ITEMS], 16)]
        self.peak = torch.cat(highest).quantile(0.99)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, *item) → (batch, places); few normal items exceed 1 anywhere."""
        total = torch.zeros_like(x[:, :1])
        for scale in self.scales:
            total = total + scale(x) / scale.typical
        return (total / len(self.scales) + self.least_spread).sqrt().flatten(1) / self.peak


class _NoPatchMap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class Scorer(nn.Module):
    """The parts, their fusion, and the map of where an item is unusual; with its network it makes scores.

    Args:
        item_shape: of the network's items.
        scoring: which parts. None: the mean squared error alone, not set against anything.
    """

    if TYPE_CHECKING:
        noise: Tensor
        weights: Tensor
        least_ink: Tensor
        typical: Tensor
        peak: Tensor

    def __init__(self, item_shape: tuple[int, ...], scoring: Scoring | None = None) -> None:
        super().__init__()
        self.is_plain = scoring is None
        scoring = scoring or Scoring(parts=("residual",))
        if len(set(scoring.parts)) != len(scoring.parts) or not scoring.parts:
            raise TrainingError(f"scoring.parts: expected different parts, at least one, found {scoring.parts}")
        if len(scoring.weights) not in (0, len(scoring.parts)):
            raise TrainingError(
                f"scoring.weights: expected none or one for each of {', '.join(scoring.parts)}; "
                f"found {len(scoring.weights)}"
            )
        self.names = list(scoring.parts)
        self.parts = nn.ModuleList([PARTS[name](scoring) for name in scoring.parts])
        self.tails = Tails(len(scoring.parts))
        self.wants = sorted({"x", "y", *(want for name in scoring.parts for want in PARTS[name].wants)})
        self.sigma = scoring.sigma
        self.least_spread = LEAST_SPREAD
        self.places = [1, *item_shape[1:]] if len(item_shape) == 3 else list(item_shape)
        self.item = list(item_shape)
        draws = scoring.draws if "restoration" in self.wants else 0
        # Drawn once: neither the batch nor the request has a say in what noise an item meets.
        self.register_buffer("noise", torch.randn(draws, *item_shape, generator=generator(0, "restoration")))
        weights = torch.tensor(scoring.weights or [1.0] * len(scoring.parts))
        self.register_buffer("weights", weights / weights.sum().clamp_min(1e-12))
        self.register_buffer("least_ink", torch.zeros(()))
        self.windows = list(scoring.windows) if len(self.places) == 3 else [1]
        if any(window % 2 == 0 for window in self.windows) or not self.windows:
            raise TrainingError(f"scoring.windows: expected odd numbers of pixels, found {scoring.windows}")
        self.register_buffer("typical", torch.ones(len(self.windows), math.prod(self.places)))
        self.register_buffer("peak", torch.ones(()))
        self.maps_patches = "patches" in self.wants
        self.patches = PatchMap(item_shape) if self.maps_patches else _NoPatchMap()

    def take(self, constants: dict[str, Tensor]) -> None:
        """Takes constants that were fitted before, of whatever size; by name, as the exported module has them."""
        for name, tensor in constants.items():
            module, _, buffer = name.rpartition(".")
            setattr(self.get_submodule(module), buffer, tensor.clone())

    def complete(self, x: Tensor, seen: dict[str, Tensor]) -> dict[str, Tensor]:
        """A network's observations of the items x, with what no network need know: `ink`, and maps where wanted."""
        if self.is_plain or len(self.places) == 1:
            seen["ink"] = torch.ones_like(seen["x"][:, 0])
        else:
            seen["ink"] = x.flatten(1).square().sum(1).sqrt().clamp_min(self.least_ink).clamp_min(1e-6)
        if "map" in self.wants:
            seen["map"] = self.map(seen["x"], seen["y"])
        if self.maps_patches:
            seen["patches"] = self.patches(x)
        return seen

    def map(self, x: Tensor, y: Tensor) -> Tensor:
        """How far each place of an item is from its reconstruction, set against what it is for normal items.

        Few normal items exceed 1 anywhere. Errors of pictures are averaged over windows and channels.
        (batch, values) each → (batch, places).
        """
        # A root is steep at nothing, where what it is taken of is rounding.
        return ((self.spread(x, y) / self.typical).mean(1) + self.least_spread).sqrt() / self.peak

    def spread(self, x: Tensor, y: Tensor) -> Tensor:
        """Squared error by place, averaged over each of the windows, (batch, windows, places)."""
        error = y - x
        if len(self.places) == 1:
            return error.square()[:, None]
        pictures = error.reshape(error.shape[0], self.item[0], self.item[1], self.item[2])
        spreads: list[Tensor] = []
        for window in self.windows:
            # What is a little off all over a wide window shows where noise has cancelled out.
            wide = (
                pictures.square() if window <= 3 else functional.avg_pool2d(pictures, window, 1, window // 2).square()
            )
            near = functional.avg_pool2d(wide.mean(1, keepdim=True), min(window, 3), 1, min(window, 3) // 2)
            spreads.append(near.flatten(1))
        return torch.stack(spreads, 1)

    def evidence(self, seen: dict[str, Tensor]) -> Tensor:
        """Each part of the score, (batch, parts): −log₁₀ of how many normal items are so unusual in it."""
        return self.tails(self.raw(seen))

    def raw(self, seen: dict[str, Tensor]) -> Tensor:
        """Each part's value before it is set against those of normal items, (batch, parts)."""
        columns: list[Tensor] = []
        for part in self.parts:
            columns.append(part(seen))  # noqa: PERF401  TorchScript unrolls no comprehension
        return torch.stack(columns, 1)


class Observing(nn.Module):
    """What a network and a scorer see of items together, in training; the exported module does the same."""

    def __init__(self, network: Autoencoder, scorer: Scorer) -> None:
        super().__init__()
        self.network, self.scorer = network, scorer

    @torch.inference_mode()
    def forward(self, items: Tensor, batch_size: int = 500) -> dict[str, Tensor]:
        """All observations of uint8 or float items, in batches."""
        scorer, batches = self.scorer, []
        for batch in torch.split(items, batch_size):
            x = to_float(batch)
            seen = self.network.observe(x, scorer.noise, scorer.sigma, scorer.wants)
            batches.append(scorer.complete(x, seen))
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


@torch.no_grad()
def fit_scorer(network: Autoencoder, scoring: Scoring, normal: Tensor, held_out: Tensor) -> Scorer:
    """The scorer of a trained network.

    Args:
        network: on the CPU, in evaluation mode.
        scoring: which parts.
        normal: (items, *item), training items: constants of the parts.
        held_out: (items, *item), seen by no weight: what evidence is measured by. Not those of the calibration.

    Raises TrainingError if the network has nothing to make a part of.
    """
    scorer = Scorer(tuple(normal.shape[1:]), scoring).eval()
    observing = Observing(network, scorer)
    _check_has_all(observing, normal[:1])
    normal = normal[: max(FITTING_ITEMS, scoring.neighbours)]
    if isinstance(scorer.patches, PatchMap):
        scorer.patches.fit(normal, held_out)
    if normal.dim() == 4:
        ink = to_float(normal).flatten(1).norm(dim=1)
        scorer.least_ink = LEAST_INK * ink.median()
    seen, others = observing(normal), observing(held_out)
    # What training items err by is less than what others do: the held-out ones have their say too.
    typical = torch.cat([scorer.spread(s["x"], s["y"]) for s in (seen, others)]).mean(0)
    scorer.typical = typical + 0.1 * typical.mean(1, keepdim=True) + 1e-12
    scorer.peak = scorer.map(others["x"], others["y"]).amax(1).quantile(0.99)
    if "map" in scorer.wants:
        seen["map"] = scorer.map(seen["x"], seen["y"])
    for part in scorer.parts:
        part.fit(seen)  # type: ignore[operator]
    scorer.tails.fit(scorer.raw(observing(held_out)))
    return scorer


def _check_has_all(observing: Observing, item: Tensor) -> None:
    try:
        missing = set(observing.scorer.wants) - observing(item).keys()
    except NotImplementedError:
        missing = set(observing.scorer.wants) & {"companion", "likelihood", "divergence"}
    if missing:
        raise TrainingError(f"scoring.parts: this network has no {', '.join(sorted(missing))} to score by")
