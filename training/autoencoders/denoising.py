"""The denoising autoencoder: sees a corrupted item, answers for the clean one."""

from __future__ import annotations

from app.artifacts.manifest import Capability
from training.autoencoders.autoencoder import Autoencoder
from training.autoencoders.convolutional import ConvolutionalAutoencoder


class DenoisingAutoencoder(ConvolutionalAutoencoder):
    """Convolutional, trained against the clean item, so that its reconstruction is the denoised item.

    Which noise it sees is the preset's `corruption`; kind and strength are not told, hence one network for all.

    Source: Vincent et al. 2010, JMLR 11, "Stacked denoising autoencoders".
    """

    capabilities = (*Autoencoder.capabilities, Capability.DENOISE)
