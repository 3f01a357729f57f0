"""Runs in a peer's own environment, without the project: trains it for so many seconds of CPU, and measures it.

Usage: python peer_training.py pythae|pyod autoencoder|vae DATA.npz SECONDS
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
from torch import nn

HIDDEN = (448, 192)
LATENT = {"autoencoder": 32, "vae": 16}
PIXELS = 784


class Enough(Exception):  # named for what happened
    """The time is over."""


class Budget:
    """Seconds of this process's CPU from the first look at it."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.items = seconds, 0
        self.start: float | None = None

    def spend(self, items: int) -> None:
        """So many items were trained on. Raises Enough."""
        if self.start is None:
            self.start = time.process_time()
        self.items += items
        if time.process_time() - self.start > self.seconds:
            raise Enough


def pythae(kind: str, train: Any, test: Any, budget: Budget) -> dict[str, float]:
    """Test MSE, and of the VAE the mean loss, which is −ELBO."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import AE, VAE, AEConfig, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    latent = LATENT[kind]

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            a, b = HIDDEN
            self.body = nn.Sequential(nn.Flatten(1), nn.Linear(PIXELS, a), nn.GELU(), nn.Linear(a, b), nn.GELU())
            self.mu, self.log_var = nn.Linear(b, latent), nn.Linear(b, latent)

        def forward(self, x: Any) -> Any:
            h = self.body(x)
            return ModelOutput(embedding=self.mu(h), log_covariance=self.log_var(h))

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            a, b = HIDDEN
            self.body = nn.Sequential(
                nn.Linear(latent, b), nn.GELU(), nn.Linear(b, a), nn.GELU(), nn.Linear(a, PIXELS), nn.Sigmoid()
            )

        def forward(self, z: Any) -> Any:
            return ModelOutput(reconstruction=self.body(z).view(-1, 1, 28, 28))

    class Watch(TrainingCallback):
        def on_train_step_end(self, training_config: Any, **_: Any) -> None:
            budget.spend(training_config.per_device_train_batch_size)

    x = torch.from_numpy(train).view(-1, 1, 28, 28)
    if kind == "vae":
        config = VAEConfig(input_dim=(1, 28, 28), latent_dim=latent, reconstruction_loss="bce")
        model = VAE(config, encoder=Encoder(), decoder=Decoder())
    else:
        model = AE(AEConfig(input_dim=(1, 28, 28), latent_dim=latent), encoder=Encoder(), decoder=Decoder())
    with tempfile.TemporaryDirectory() as folder:
        settings = BaseTrainerConfig(
            output_dir=folder,
            num_epochs=1000,
            per_device_train_batch_size=128,
            learning_rate=1e-3,
            no_cuda=True,
            seed=0,
        )
        trainer = BaseTrainer(model, BaseDataset(x, torch.zeros(len(x))), training_config=settings, callbacks=[Watch()])
        with contextlib.suppress(Enough):
            trainer.train()
    model = model.eval()
    y = torch.from_numpy(test).view(-1, 1, 28, 28)
    errors, losses = [], []
    with torch.inference_mode():
        for batch in torch.split(y, 500):
            rebuilt = model.decoder(model.encoder(batch).embedding).reconstruction
            errors.append((rebuilt - batch).square().flatten(1).mean(1))
            losses.append(model({"data": batch}).loss)
    found = {"mse": float(torch.cat(errors).mean())}
    return found | ({"negative_elbo": float(torch.stack(losses).mean())} if kind == "vae" else {})


def pyod(kind: str, train: Any, test: Any, budget: Budget) -> dict[str, Any]:
    """Anomaly scores of the test items."""
    from pyod.models.auto_encoder import AutoEncoder
    from pyod.models.vae import VAE

    made: type[Any] = VAE if kind == "vae" else AutoEncoder

    class Watched(made):
        def training_forward(self, batch_data: Any) -> Any:
            budget.spend(len(batch_data))
            return super().training_forward(batch_data)

        def train(self, train_loader: Any) -> None:
            with contextlib.suppress(Enough):
                super().train(train_loader)

    common: dict[str, Any] = {"epoch_num": 1000, "verbose": 0, "device": torch.device("cpu"), "random_state": 0}
    latent = LATENT[kind]
    if kind == "vae":
        lists = {"encoder_neuron_list": list(HIDDEN), "decoder_neuron_list": list(HIDDEN[::-1])}
        detector = Watched(latent_dim=latent, **lists, **common)
    else:
        detector = Watched(hidden_neuron_list=[*HIDDEN, latent], **common)
    detector.fit(train)
    return {"scores": detector.decision_function(test).tolist()}


def main() -> None:
    """Prints one line of JSON."""
    peer, kind, data, seconds = sys.argv[1:5]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    arrays, budget = np.load(data), Budget(float(seconds))
    found = {"pythae": pythae, "pyod": pyod}[peer](kind, arrays["train"], arrays["test"], budget)
    print(json.dumps(found | {"items": budget.items}))


if __name__ == "__main__":
    main()
