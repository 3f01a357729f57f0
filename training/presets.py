"""Every preset with every hyper-parameter of it, and how a user changes one for a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from app.artifacts.manifest import Capability
from training.autoencoders import AUTOENCODERS, Autoencoder, Blocks, Kind, kind_of
from training.autoencoders.bottlenecks import (
    BottleneckConfig,
    Dense,
    Gaussian,
    Memory,
    NoBottleneck,
    Paired,
    Quantised,
    Surroundings,
    TopK,
)
from training.autoencoders.convolution import Convolution
from training.autoencoders.hourglass import ArchitectureConfig, Likelihood, Regulariser
from training.autoencoders.mlp import Mlp
from training.autoencoders.unet import UNet
from training.corruptions import Corruption
from training.errors import TrainingError
from training.loop import Optimisation
from training.sampler import Sampling
from training.scores import Scoring

SQUARED_ERROR = Likelihood()
BITS = Likelihood("bernoulli")
NO_REGULARISER = Regulariser()
NO_CORRUPTION = Corruption()
MIXTURE = Sampling()
RESIDUAL_AND_PATHWAY = Scoring()
LOCAL = Scoring(("residual", "pathway", "local"))
RESTORING = Scoring(("residual", "pathway", "restoration"))
SMALL = Scoring(directions=12)
VARIATIONAL = Scoring(("likelihood", "divergence", "pathway"), directions=16)


@dataclass(frozen=True)
class Preset:
    """A network, its objective and its training, complete: the same preset, data and seed make the same artifact."""

    name: str
    purpose: str
    source: str
    expected: str  # figures on MNIST at the preset's own settings
    architecture: ArchitectureConfig
    bottleneck: BottleneckConfig
    optimisation: Optimisation
    likelihood: Likelihood = SQUARED_ERROR
    regulariser: Regulariser = NO_REGULARISER
    corruption: Corruption = NO_CORRUPTION
    sampling: Sampling = MIXTURE
    scoring: Scoring = RESIDUAL_AND_PATHWAY
    max_batch_size: int = 256  # of the service: where rows per second stop growing on a CPU

    @property
    def config(self) -> dict[str, Any]:
        """The hyper-parameters alone, as the manifest records them."""
        sections = {section: asdict(getattr(self, section)) for section in SECTIONS}
        for block in ("architecture", "bottleneck"):
            sections[block] = {"type": type(getattr(self, block)).__name__} | sections[block]
        return sections

    @property
    def takes(self) -> tuple[Kind, ...]:
        """What kinds of items it can be trained on."""
        return self.architecture.takes

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What its artifacts can do."""
        corruption = self.corruption
        return (
            *AUTOENCODERS[type(self.bottleneck)].capabilities,
            *([Capability.DENOISE] if corruption.removes_noise else []),
            *([Capability.INPAINT] if corruption.hole_side_fraction_max else []),
        )


def build_network(preset: Preset, item_shape: tuple[int, ...], seed: int) -> Autoencoder:
    """The preset's network, initialised by the seed; torch's global generator is left as it was.

    Raises TrainingError if the preset takes no items of this shape, naming presets that do.
    """
    kind = kind_of(item_shape)
    if kind not in preset.takes:
        fitting = ", ".join(other.name for other in PRESETS.values() if kind in other.takes)
        raise TrainingError(
            f"preset {preset.name}: takes {' and '.join(preset.takes)}, found {kind} of shape {item_shape}; "
            f"presets for {kind}: {fitting}"
        )
    blocks = Blocks(preset.architecture, preset.bottleneck, preset.likelihood, preset.regulariser)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = AUTOENCODERS[type(preset.bottleneck)](item_shape, blocks)
    network.capabilities = preset.capabilities
    return network


SECTIONS = (
    "architecture",
    "bottleneck",
    "likelihood",
    "regulariser",
    "corruption",
    "optimisation",
    "sampling",
    "scoring",
)

_ALL = (
    Preset(
        name="basic-tutorial",
        purpose="the classic tutorial's autoencoder, exactly; the one to compare others with",
        source="784-128-64-32, ReLU on the code too, Adam 1e-3, batch 128, 10 epochs",
        expected="test MSE .0147 on all training pictures (PCA .0168)",
        architecture=Mlp((128, 64), activation="relu"),
        bottleneck=Dense(32, activation="relu"),
        optimisation=Optimisation(epochs=10, optimiser="adam", schedule="constant", warmup_fraction=0.0),
    ),
    Preset(
        name="basic",
        purpose="small, fast vectors and scores; the first to try",
        source="Hinton & Salakhutdinov 2006, with GELU, a linear code and AdamW",
        expected="test MSE .0038 (PCA .0168)",
        architecture=Mlp((448, 192)),
        bottleneck=Dense(32),
        optimisation=Optimisation(epochs=45, learning_rate=2e-3, weight_decay=1e-2, ema_decay=0.999, clip_norm=1.0),
        scoring=SMALL,
    ),
    Preset(
        name="sparse",
        purpose="many units of which an item rouses few; what each stands for can be looked at",
        source="Ng 2011, CS294A notes: L1 (or, with bottleneck.activation=sigmoid, kl_sparsity) on 1024 ReLU units",
        expected="test MSE .0018 after 5 epochs, from 1024 numbers of which few are large",
        architecture=Mlp(),
        bottleneck=Dense(1024, activation="relu"),
        regulariser=Regulariser(l1=0.003),
        optimisation=Optimisation(epochs=20, learning_rate=2e-3, weight_decay=1e-2, ema_decay=0.999, clip_norm=1.0),
    ),
    Preset(
        name="sparse-topk",
        purpose="exactly 25 of 1000 units per item; features that a linear classifier likes",
        source="Makhzani & Frey 2014, and 2015 against dead units; items with noise",
        expected="a linear classifier's error on codes 1.8 %; test MSE .0070 (PCA of 25 numbers .0203)",
        architecture=Mlp(),
        bottleneck=TopK(1000, active=25),
        likelihood=Likelihood("mse", output="linear"),
        optimisation=Optimisation(epochs=20, learning_rate=2e-3, ema_decay=0.999, clip_norm=1.0, bfloat16=True),
        corruption=Corruption(gaussian_sigma_max=0.5),
    ),
    Preset(
        name="denoising",
        purpose="removes noise of unknown kind and strength",
        source="Vincent et al. 2010, blind: Gaussian, masking, salt and pepper of random strength",
        expected="PSNR at sigma .5 from 9.4 to 20.3 dB; test MSE .0036 (PCA .0090)",
        architecture=Convolution((32, 64)),
        bottleneck=Dense(64),
        optimisation=Optimisation(epochs=14, weight_decay=1e-3, ema_decay=0.999, clip_norm=1.0, bfloat16=True),
        max_batch_size=64,
        corruption=Corruption(gaussian_sigma_max=0.8, masked_fraction_max=0.7, salt_pepper_fraction_max=0.5),
        scoring=RESTORING,
    ),
    Preset(
        name="denoising-records",
        purpose="records with noisy and missing values, made whole",
        source="Vincent et al. 2010, on standardised features: Gaussian, missing at random",
        expected="–",
        architecture=Mlp((128, 64)),
        bottleneck=Dense(16),
        optimisation=Optimisation(epochs=200, weight_decay=1e-2, ema_decay=0.99, clip_norm=1.0),
        corruption=Corruption(gaussian_sigma_max=1.0, hole_side_fraction_max=0.5, hole_weight=0.6),
        scoring=RESTORING,
    ),
    Preset(
        name="unet-denoiser",
        purpose="the best at removing noise and at filling holes; no latent vectors",
        source="Ronneberger et al. 2015 on unshuffled pixels, blind to kind and strength, told of holes",
        expected="PSNR at sigma .5 from 9.4 to 20.8 dB; in a hole of 12 × 12 14.5 dB (biharmonic 11.0)",
        architecture=UNet((48, 96)),
        bottleneck=NoBottleneck(),
        optimisation=Optimisation(
            epochs=14,
            learning_rate=1.2e-3,
            warmup_fraction=0.05,
            weight_decay=1e-4,
            ema_decay=0.999,
            clip_norm=1.0,
            bfloat16=True,
        ),
        max_batch_size=64,
        corruption=Corruption(
            gaussian_sigma_max=0.8,
            masked_fraction_max=0.7,
            salt_pepper_fraction_max=0.5,
            hole_side_fraction_max=0.6,
            gaussian_weight=0.7,
            masked_weight=0.07,
            salt_pepper_weight=0.07,
            hole_weight=0.16,
        ),
    ),
    Preset(
        name="vae-tutorial",
        purpose="the classic tutorial's variational autoencoder, with the KL term's sign right",
        source="784-512-256-20, ReLU, Bernoulli ELBO, Adam 1e-3",
        expected="test MSE .0157 after 5 epochs (PCA of 20 numbers .0235)",
        architecture=Mlp((512, 256), activation="relu"),
        scoring=VARIATIONAL,
        bottleneck=Gaussian(20),
        likelihood=BITS,
        optimisation=Optimisation(epochs=20, optimiser="adam", schedule="constant", warmup_fraction=0.0),
    ),
    Preset(
        name="vae",
        purpose="draws new items, and smooth latent vectors to interpolate between",
        source="Kingma & Welling 2014, with GELU, AdamW and averaged weights",
        expected="-ELBO 98 nats on grey levels; test MSE .0108 (PCA .0269)",
        architecture=Mlp((448, 192)),
        scoring=VARIATIONAL,
        bottleneck=Gaussian(16),
        likelihood=BITS,
        optimisation=Optimisation(epochs=45, learning_rate=2e-3, weight_decay=1e-3, ema_decay=0.999, clip_norm=50.0),
    ),
    Preset(
        name="beta-vae",
        purpose="fewer latent numbers in use, each with a meaning of its own to turn at",
        source="Higgins et al. 2017, beta 4",
        expected="test MSE .0239 after 6 epochs (PCA of 10 numbers .0341)",
        architecture=Mlp((448, 192)),
        scoring=VARIATIONAL,
        bottleneck=Gaussian(10, beta=4.0, warmup_fraction=0.1),
        likelihood=BITS,
        optimisation=Optimisation(epochs=30, learning_rate=2e-3, weight_decay=1e-3, ema_decay=0.999, clip_norm=50.0),
    ),
    Preset(
        name="iwae",
        purpose="a tighter likelihood bound than the vae's, for five times its time",
        source="Burda et al. 2016, 5 importance samples, bits drawn anew at every step",
        expected="test MSE .0092 after 15 epochs (PCA of 40 numbers .0140)",
        architecture=Mlp((500, 500)),
        scoring=VARIATIONAL,
        bottleneck=Gaussian(40, importance_samples=5),
        likelihood=Likelihood("bernoulli", binarise=True),
        optimisation=Optimisation(epochs=30, weight_decay=1e-3, ema_decay=0.999, clip_norm=50.0, bfloat16=True),
    ),
    Preset(
        name="conv",
        purpose="pictures of any size; the best scores; removes noise and fills holes",
        source="Masci et al. 2011, with strides, GroupNorm and a linear dense code; noise and holes in training",
        expected="test MSE .0038 (PCA .0090); PSNR at sigma .5 from 9.4 to 20.2 dB",
        architecture=Convolution((32, 64)),
        bottleneck=Dense(64),
        optimisation=Optimisation(epochs=14, weight_decay=1e-2, ema_decay=0.999, clip_norm=1.0, bfloat16=True),
        corruption=Corruption(gaussian_sigma_max=0.8, hole_side_fraction_max=0.5, gaussian_weight=0.7, hole_weight=0.3),
        scoring=LOCAL,
        max_batch_size=64,
    ),
    Preset(
        name="conv-vae",
        purpose="new pictures of any size",
        source="Kingma & Welling 2014, on strided convolutions with GroupNorm",
        expected="test MSE .0074 after 3 epochs (PCA .0168)",
        architecture=Convolution((32, 64)),
        scoring=VARIATIONAL,
        bottleneck=Gaussian(32),
        likelihood=BITS,
        optimisation=Optimisation(epochs=14, weight_decay=1e-3, ema_decay=0.999, clip_norm=50.0, bfloat16=True),
        max_batch_size=64,
    ),
    Preset(
        name="contractive",
        purpose="latent vectors that hardly move when the item changes a little",
        source="Rifai et al. 2011, one random projection of the Jacobian per item",
        expected="test MSE .0126 after 4 epochs (PCA .0168)",
        architecture=Mlp((448, 192)),
        bottleneck=Dense(32),
        regulariser=Regulariser(contraction=2e-5),
        optimisation=Optimisation(epochs=30, learning_rate=2e-3, weight_decay=1e-2, ema_decay=0.999, clip_norm=1.0),
    ),
    Preset(
        name="memory",
        purpose="scores from one kind of normal item: what resembles no prototype cannot be rebuilt",
        source="Gong et al. 2019, 500 prototypes of a dense code",
        expected="test MSE .0080 after 3 epochs (PCA .0168)",
        architecture=Convolution((32, 64)),
        bottleneck=Memory(32),
        optimisation=Optimisation(epochs=14, weight_decay=1e-3, ema_decay=0.999, clip_norm=1.0, bfloat16=True),
        max_batch_size=64,
    ),
    Preset(
        name="one-class",
        purpose="the best scores where normal items are of one kind; two networks, one score",
        source="RaPP (Kim et al. 2020) and restoration of noise, each divided by the norm, fused by tail probabilities",
        expected="one digit of MNIST normal: mean AUROC .985 of ten (pixel kNN .953)",
        architecture=Mlp((1024, 512)),
        bottleneck=Paired(64),
        optimisation=Optimisation(
            epochs=55, learning_rate=2e-3, weight_decay=1e-2, ema_decay=0.999, clip_norm=1.0, bfloat16=True
        ),
        corruption=Corruption(gaussian_sigma_max=0.7),
        scoring=Scoring(("companion", "restoration", "pathway"), directions=512, sigma=0.5, draws=4),
    ),
    Preset(
        name="several-kinds",
        purpose="scores where normal items are of several kinds; the networks of one-class, nearness to normal items",
        source="nearest normal items at unit norm, with RaPP (Kim et al. 2020), fused by tail probabilities",
        expected="one digit of MNIST left out: mean AUROC .934 of ten (pixel kNN .818)",
        architecture=Mlp((1024, 512)),
        bottleneck=Paired(64),
        optimisation=Optimisation(
            epochs=20, learning_rate=2e-3, weight_decay=1e-2, ema_decay=0.999, clip_norm=1.0, bfloat16=True
        ),
        corruption=Corruption(gaussian_sigma_max=0.7),
        scoring=Scoring(
            ("likeness", "answer_likeness", "companion"), weights=(2.0, 2.0, 1.0), directions=512, neighbours=10_000
        ),
    ),
    Preset(
        name="inspection",
        purpose="finds defects, and where they are, in pictures of parts; learns from good ones alone",
        source="RIAD (Zavrtanik et al. 2021) with made-up defects as in DRAEM and CutPaste, on the U-Net",
        expected="drawn surfaces: image AUROC 1.0, pixel .99 (pixel kNN .70, .87)",
        architecture=UNet((32, 64)),
        bottleneck=Surroundings(),
        optimisation=Optimisation(
            epochs=20,
            batch_size=8,
            learning_rate=1.2e-3,
            warmup_fraction=0.05,
            weight_decay=1e-4,
            ema_decay=0.99,
            clip_norm=1.0,
            bfloat16=True,
        ),
        scoring=Scoring(("patches", "local"), weights=(4.0, 1.0), local_share=0.002, windows=(3, 9)),
        max_batch_size=16,
    ),
    Preset(
        name="vq-vae",
        purpose="pictures as maps of codebook entries, 49 bytes for 28 x 28 pixels",
        source="van den Oord et al. 2017, 256 entries of 8 numbers",
        expected="test MSE .0089 after 2 epochs (PCA of 49 numbers .0117)",
        architecture=Convolution((32, 64)),
        bottleneck=Quantised(channels=8, entries=256),
        optimisation=Optimisation(epochs=14, weight_decay=0.0, ema_decay=0.999, clip_norm=1.0, bfloat16=True),
        max_batch_size=64,
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}
"""By name, in the order in which they are listed."""


def get_preset(name: str) -> Preset:
    """The preset of this name. Raises TrainingError naming those there are."""
    if name not in PRESETS:
        raise TrainingError(f"preset: expected one of {', '.join(PRESETS)}; found {name!r}")
    return PRESETS[name]


def override(preset: Preset, settings: Sequence[str]) -> Preset:
    """The preset with `section.field=value` settings applied; the section may be left out where the field is unique.

    Values are JSON, or plain text: `network.latent_dim=16`, `hidden_sizes=[256,64]`, `optimiser=adam`.

    Raises TrainingError for an unknown key, one that two sections have, or a value of the wrong type.
    """
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise TrainingError(f"set: expected key=value, found {setting!r}")
        section, field = _find(preset, key.strip())
        before = getattr(preset, section)
        value = _parse(text.strip())
        # Strict JSON rules: "16" is no number and 1.5 no integer; lists become tuples.
        changed = asdict(before) | {field: value}
        try:
            after = TypeAdapter(type(before)).validate_json(json.dumps(changed), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise TrainingError(f"set: {section}.{field}: {first['msg']}, found {value!r}") from error
        preset = replace(preset, **{section: after})
    return preset


def _find(preset: Preset, key: str) -> tuple[str, str]:
    keys = [(section, field.name) for section in SECTIONS for field in _fields(getattr(preset, section))]
    found = [(section, field) for section, field in keys if key in (field, f"{section}.{field}")]
    if len(found) == 1:
        return found[0]
    known = ", ".join(f"{section}.{field}" for section, field in (found or keys))
    raise TrainingError(f"set: expected one of {known}; found {'the ambiguous ' if found else ''}{key!r}")


def _fields(section: Any) -> Any:
    return fields(section) if is_dataclass(section) else ()


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
