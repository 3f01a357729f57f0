"""The autoencoders: blocks to put together, and the one list of what is made of which bottleneck."""

from training.autoencoders.autoencoder import Autoencoder, Kind, kind_of
from training.autoencoders.bottlenecks import (
    Dense,
    Gaussian,
    Memory,
    NoBottleneck,
    Paired,
    Quantised,
    Surroundings,
    TopK,
)
from training.autoencoders.hourglass import Blocks, Hourglass, VariationalHourglass
from training.autoencoders.paired import PairedHourglass
from training.autoencoders.unet import InspectingUNet, RestoringUNet

__all__ = ["AUTOENCODERS", "Autoencoder", "Blocks", "Kind", "kind_of"]

AUTOENCODERS: dict[type, type[Hourglass] | type[RestoringUNet]] = {
    Dense: Hourglass,
    Paired: PairedHourglass,
    TopK: Hourglass,
    Memory: Hourglass,
    Quantised: Hourglass,
    Gaussian: VariationalHourglass,
    NoBottleneck: RestoringUNet,
    Surroundings: InspectingUNet,
}
"""By the type of the bottleneck's settings."""
