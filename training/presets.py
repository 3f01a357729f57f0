"""Every preset with every hyper-parameter of it, and how a user changes one for a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from training.autoencoders.basic import BasicConfig
from training.autoencoders.convolutional import ConvolutionalConfig
from training.autoencoders.variational import VariationalConfig
from training.corruptions import Corruption
from training.errors import TrainingError
from training.loop import Optimisation

NO_CORRUPTION = Corruption()

NetworkConfig = BasicConfig | ConvolutionalConfig | VariationalConfig


@dataclass(frozen=True)
class Preset:
    """A network, its objective and its training, complete: the same preset, data and seed make the same artifact."""

    name: str
    purpose: str
    source: str
    expected: str  # figures on MNIST at the preset's own settings
    architecture: str  # a key of AUTOENCODERS
    network: NetworkConfig
    optimisation: Optimisation
    corruption: Corruption = NO_CORRUPTION
    max_batch_size: int = 256  # of the service: where rows per second stop growing on a CPU

    @property
    def config(self) -> dict[str, Any]:
        """The hyper-parameters alone, as the manifest records them."""
        return {section: asdict(getattr(self, section)) for section in SECTIONS} | {"architecture": self.architecture}


SECTIONS = ("network", "optimisation", "corruption")

_ALL = (
    Preset(
        name="basic-tutorial",
        purpose="the classic tutorial's autoencoder, exactly; the one to compare others with",
        source="784-128-64-32, ReLU on the code too, Adam 1e-3, batch 128, 10 epochs",
        expected="test MSE .0150 (PCA .0168)",
        architecture="basic",
        network=BasicConfig(hidden_sizes=(128, 64), latent_dim=32, activation="relu", code_activation=True),
        optimisation=Optimisation(epochs=10, optimiser="adam", schedule="constant", warmup_fraction=0.0),
    ),
    Preset(
        name="basic",
        purpose="small, fast vectors and scores; the first to try",
        source="Hinton & Salakhutdinov 2006, with GELU, a linear code and AdamW",
        expected="test MSE .0038 (PCA .0168)",
        architecture="basic",
        network=BasicConfig(hidden_sizes=(448, 192), latent_dim=32),
        optimisation=Optimisation(epochs=45, learning_rate=2e-3, weight_decay=1e-2, ema_decay=0.999, clip_norm=1.0),
    ),
    Preset(
        name="conv",
        purpose="pictures of any size; the best scores",
        source="Masci et al. 2011, with strides, GroupNorm and a linear dense code",
        expected="test MSE .0020 (PCA .0090)",
        architecture="convolutional",
        network=ConvolutionalConfig(channels=(32, 64), latent_dim=64),
        optimisation=Optimisation(epochs=14, weight_decay=1e-2, ema_decay=0.999, clip_norm=1.0, bfloat16=True),
        max_batch_size=64,
    ),
    Preset(
        name="denoising",
        purpose="removes noise of unknown kind and strength",
        source="Vincent et al. 2010, blind: Gaussian, masking, salt and pepper of random strength",
        expected="PSNR at sigma .5 from 9.4 to 20.3 dB; test MSE .0036 (PCA .0090)",
        architecture="denoising",
        network=ConvolutionalConfig(channels=(32, 64), latent_dim=64),
        optimisation=Optimisation(epochs=14, weight_decay=1e-3, ema_decay=0.999, clip_norm=1.0, bfloat16=True),
        max_batch_size=64,
        corruption=Corruption(gaussian_sigma_max=0.8, masked_fraction_max=0.7, salt_pepper_fraction_max=0.5),
    ),
    Preset(
        name="vae-tutorial",
        purpose="the classic tutorial's variational autoencoder, with the KL term's sign right",
        source="784-512-256-20, ReLU, Bernoulli ELBO, Adam 1e-3",
        expected="-ELBO about 100 nats on grey levels",
        architecture="variational",
        network=VariationalConfig(hidden_sizes=(512, 256), latent_dim=20, activation="relu"),
        optimisation=Optimisation(epochs=20, optimiser="adam", schedule="constant", warmup_fraction=0.0),
    ),
    Preset(
        name="vae",
        purpose="draws new items, and smooth latent vectors to interpolate between",
        source="Kingma & Welling 2014, with GELU, AdamW and averaged weights",
        expected="-ELBO 98 nats on grey levels; test MSE .0108 (PCA .0269)",
        architecture="variational",
        network=VariationalConfig(hidden_sizes=(448, 192), latent_dim=16),
        optimisation=Optimisation(epochs=45, learning_rate=2e-3, weight_decay=1e-3, ema_decay=0.999, clip_norm=50.0),
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
