"""The autoencoders: blocks to put together, and the one list of what is made of which bottleneck."""

from training.autoencoders.autoencoder import Autoencoder, Kind, kind_of
from training.autoencoders.bottlenecks import Dense, Gaussian, Memory, NoBottleneck, Quantised, TopK
from training.autoencoders.hourglass import Blocks, Hourglass, VariationalHourglass
from training.autoencoders.unet import RestoringUNet

__all__ = ["AUTOENCODERS", "Autoencoder", "Blocks", "Kind", "kind_of"]

AUTOENCODERS: dict[type, type[Hourglass] | type[RestoringUNet]] = {
    Dense: Hourglass,
    TopK: Hourglass,
    Memory: Hourglass,
    Quantised: Hourglass,
    Gaussian: VariationalHourglass,
    NoBottleneck: RestoringUNet,
}
"""By the type of the bottleneck's settings."""
