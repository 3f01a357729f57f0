from __future__ import annotations

import pytest
from torch import nn

from training.autoencoders.hourglass import Hourglass, VariationalHourglass
from training.errors import TrainingError
from training.presets import PRESETS, build_network, get_preset, override


def layer_sizes(network: nn.Module) -> list[tuple[int, int]]:
    return [(m.in_features, m.out_features) for m in network.modules() if isinstance(m, nn.Linear)]


def test_basic_tutorial_is_the_tutorials() -> None:
    """784-128-64-32 and back, ReLU on the code too, sigmoid out, Adam 1e-3 without schedule, batch 128, 10 epochs."""
    preset = PRESETS["basic-tutorial"]
    network = build_network(preset, (1, 28, 28), seed=0)
    assert layer_sizes(network) == [(784, 128), (128, 64), (64, 32), (32, 64), (64, 128), (128, 784)]
    assert isinstance(network, Hourglass)
    assert isinstance(network.bottleneck.activation, nn.ReLU)
    o = preset.optimisation
    assert (o.optimiser, o.learning_rate, o.batch_size, o.epochs) == ("adam", 1e-3, 128, 10)
    assert (o.schedule, o.warmup_fraction, o.weight_decay, o.ema_decay, o.clip_norm) == ("constant", 0, 0, 0, 0)


def test_vae_tutorial_is_the_tutorials() -> None:
    """784-512-256-d and back, ReLU."""
    network = build_network(PRESETS["vae-tutorial"], (1, 28, 28), seed=0)
    assert isinstance(network, VariationalHourglass)
    expected = [(784, 512), (512, 256), (256, 20), (256, 20), (20, 256), (256, 512), (512, 784)]
    assert layer_sizes(network) == expected


def test_settings_change_a_field_by_either_name() -> None:
    """A field is found with and without its section; lists, numbers and words are understood."""
    preset = override(
        PRESETS["basic"], ["bottleneck.latent_dim=5", "hidden_sizes=[9, 8]", "learning_rate=2e-3", "optimiser=adam"]
    )
    assert (preset.bottleneck.latent_dim, preset.architecture.hidden_sizes) == (5, (9, 8))  # type: ignore[union-attr]
    assert (preset.optimisation.learning_rate, preset.optimisation.optimiser) == (2e-3, "adam")
    assert PRESETS["basic"].bottleneck.latent_dim == 32


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("latent_dimm=5", r"expected one of architecture\.hidden_sizes, .*; found 'latent_dimm'"),
        ("latent_dim", "expected key=value, found 'latent_dim'"),
        ("latent_dim=0", r"bottleneck\.latent_dim: .*greater than 0, found 0"),
        ("latent_dim=many", r"bottleneck\.latent_dim: .*integer, found 'many'"),
        ("optimisation.optimiser=sgd", r"optimisation\.optimiser: .*'adam' or 'adamw', found 'sgd'"),
        ("architecture=variational", "expected one of"),
        ("activation=relu", r"architecture\.activation, bottleneck\.activation; found the ambiguous"),
    ],
)
def test_bad_settings_are_refused(setting: str, message: str) -> None:
    """An unknown key or an impossible value is one clear error."""
    with pytest.raises(TrainingError, match=message):
        override(PRESETS["basic"], [setting])


def test_unknown_preset_is_answered_with_the_known() -> None:
    """The error lists the presets."""
    with pytest.raises(TrainingError, match=r"expected one of basic-tutorial, basic, .*found 'bsic'"):
        get_preset("bsic")
