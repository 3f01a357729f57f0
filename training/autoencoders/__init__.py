"""The architectures: one file each, and the one list of them."""

from training.autoencoders.autoencoder import Autoencoder
from training.autoencoders.basic import BasicAutoencoder
from training.autoencoders.convolutional import ConvolutionalAutoencoder
from training.autoencoders.denoising import DenoisingAutoencoder
from training.autoencoders.variational import VariationalAutoencoder

__all__ = ["AUTOENCODERS", "Autoencoder"]

AUTOENCODERS: dict[str, type[Autoencoder]] = {
    "basic": BasicAutoencoder,
    "convolutional": ConvolutionalAutoencoder,
    "denoising": DenoisingAutoencoder,
    "variational": VariationalAutoencoder,
}
"""By the name that presets call them."""
