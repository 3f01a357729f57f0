"""The shipped scores over a real socket: digits are normal; letters, photos and noise are not, and it shows where."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from app.artifacts.manifest import Capability
from app.artifacts.store import list_artifacts, read_artifact
from app.inference.loaded_model import LoadedModel
from app.settings import Settings

ROOT = Path(__file__).parents[2]
STORE = ROOT / "models_store"
MNIST = os.environ.get("HOURGLASS_DATA_ROOT")
SIDE = 28


@pytest.fixture(scope="module")
def client(serve: Callable[[Settings], AbstractContextManager[str]]) -> Iterator[httpx.Client]:
    """A client of a server over models_store/."""
    with (
        serve(Settings(models_store=STORE, max_queue_rows=20_000)) as url,
        httpx.Client(base_url=url, timeout=300) as client,
    ):
        yield client


def letter(text: str, turned: float) -> Image.Image:
    """A capital in Pillow's own font, turned by so many degrees and as large as the picture."""
    big = Image.new("L", (8 * SIDE, 8 * SIDE))
    font = ImageFont.load_default(6 * SIDE)
    ImageDraw.Draw(big).text((4 * SIDE, 4 * SIDE), text, fill=255, font=font, anchor="mm")
    whole = big.rotate(turned, Image.Resampling.BICUBIC)
    whole = whole.crop(whole.getbbox())
    factor = (SIDE - 2) / max(whole.size)
    small = whole.resize(tuple(max(1, round(factor * side)) for side in whole.size), Image.Resampling.LANCZOS)
    picture = Image.new("L", (SIDE, SIDE))
    picture.paste(small, ((SIDE - small.width) // 2, (SIDE - small.height) // 2))
    return picture


def b64(picture: Image.Image) -> dict[str, str]:
    """A picture as an item."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return {"b64": base64.b64encode(stream.getvalue()).decode()}


def mnist_test() -> np.ndarray:
    """MNIST's test pictures as the models take them."""
    from training.data import load_dataset
    from training.dataset import to_float

    dataset = load_dataset("mnist", Path(MNIST or ""))
    assert dataset.is_official_test is not None
    return to_float(dataset.items[dataset.is_official_test]).numpy()


def npy(array: np.ndarray) -> dict[str, object]:
    """A request's body and headers with an array in it."""
    stream = io.BytesIO()
    np.save(stream, array)
    return {"content": stream.getvalue(), "headers": {"content-type": "application/x-npy"}}


def test_letters_a_photo_and_noise_are_anomalies(
    client: httpx.Client, record_property: Callable[[str, object], None]
) -> None:
    """Capitals A, K and R turned, a photo and noise have p < .01; of what is strange in a part, the map shows where."""
    from sklearn.datasets import load_sample_image

    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
    things = {f"{text} {turned}": letter(text, turned) for text in "AKR" for turned in (-25, 15, 40)}
    things |= {"photo": Image.fromarray(load_sample_image("china.jpg")), "noise": Image.fromarray(noise)}
    body = {"instances": [b64(picture) for picture in things.values()], "ids": list(things)}
    results = client.post("/anomaly-score?heatmap=array&boxes=true", json=body).json()["results"]
    measured = {result["id"]: round(result["p_value"], 4) for result in results}
    record_property("measured", f"p-values of what is no digit: {measured}")
    assert all(result["p_value"] < 0.01 for result in results)
    maps = {result["id"]: np.array(result["heatmap"]) for result in results}
    # The tip of a turned A is where no digit has ink that wide; a photo is strange at its margin, noise all over it.
    y, x = np.unravel_index(maps["A 40"].argmax(), (SIDE, SIDE))
    assert maps["A 40"].max() > 1
    assert (x < 10, y < 10) == (True, True)
    margin = np.ones((SIDE, SIDE), dtype=bool)
    margin[3:-3, 3:-3] = False
    assert maps["photo"][margin].mean() > 2 * maps["photo"][~margin].mean()
    assert (maps["noise"][margin] > 1).mean() > 0.5


@pytest.mark.skipif(not MNIST, reason="needs HOURGLASS_DATA_ROOT with MNIST")
def test_digits_are_normal_and_the_rate_decides(
    client: httpx.Client, record_property: Callable[[str, object], None]
) -> None:
    """Of the first 200 MNIST test digits at least 180 have p > .05; a verdict flips where the p-value says."""
    digits = mnist_test()[:200]
    results = client.post("/anomaly-score?heatmap=array", **npy(digits)).json()["results"]  # type: ignore[arg-type]
    p_values = [result["p_value"] for result in results]
    typical = sum(p > 0.05 for p in p_values)
    hot = sum(np.max(result["heatmap"]) > 1 for result in results)
    record_property("measured", f"of 200 MNIST test digits {typical} have p > .05, {hot} a place above 1 in their map")
    assert typical >= 180
    assert hot <= 10
    for index in (0, int(np.argmin(p_values)), int(np.argmax(p_values))):
        one = npy(digits[index : index + 1])
        for rate, flagged in ((p_values[index] + 1e-9, True), (p_values[index], True), (p_values[index] - 1e-9, False)):
            if not 1 / 5994 <= rate < 1:
                continue
            answer = client.post(f"/anomaly-score?target_fpr={rate}", **one).json()["results"][0]  # type: ignore[arg-type]
            assert answer["is_anomaly"] is flagged, (index, rate)


@pytest.mark.skipif(not MNIST, reason="needs HOURGLASS_DATA_ROOT with MNIST")
def test_verdicts_are_one_whoever_computes_them(
    client: httpx.Client, record_property: Callable[[str, object], None]
) -> None:
    """The verdicts of 10,000 digits by eager PyTorch, by the artifact and over HTTP are the same, but for scores that
    lie within 1e-6 of the threshold.
    """
    from training.autoencoders import Autoencoder
    from training.export import ExportedModule, servable
    from training.presets import build_network, get_preset
    from training.scores import Scorer

    items = mnist_test()
    (ref,) = [ref for ref in list_artifacts(STORE) if ref.name == "mnist-conv"]
    artifact = read_artifact(ref)
    preset = get_preset(artifact.manifest.training.preset)
    network: Autoencoder = build_network(preset, (1, SIDE, SIDE), 0)
    network.load_state_dict(ExportedModule(artifact.model).weights)
    scorer = Scorer((1, SIDE, SIDE), preset.scoring)
    scorer.take(ExportedModule(artifact.model).scorer)
    eager = servable(network, scorer)
    batches = np.array_split(items, 40)
    with torch.inference_mode():
        scores = {"eager": torch.cat([eager.anomaly_score(torch.from_numpy(x))[0] for x in batches]).numpy()}  # type: ignore[operator]
    loaded = LoadedModel.load(artifact, torch.device("cpu"))
    scores["artifact"] = np.concatenate([loaded.forward(Capability.ANOMALY_SCORE, [x])[0] for x in batches])
    answers = [client.post("/anomaly-score", **npy(x)).json()["results"] for x in np.array_split(items, 10)]  # type: ignore[arg-type]
    over_http = [result for answer in answers for result in answer]
    scores["http"] = np.array([result["score"] for result in over_http], dtype=np.float32)
    threshold = np.float32(over_http[0]["threshold"])
    verdicts = {who: found > threshold for who, found in scores.items()}
    assert verdicts["http"].tolist() == [result["is_anomaly"] for result in over_http]
    near = np.any([np.abs(found - threshold) <= 1e-6 for found in scores.values()], axis=0)
    differing = np.any([verdict != verdicts["http"] for verdict in verdicts.values()], axis=0)
    farthest = max(float(np.abs(found - scores["http"]).max()) for found in scores.values())
    record_property(
        "measured",
        f"verdicts of 10,000 digits, eager, artifact and HTTP: {int(differing.sum())} differ, {int(near.sum())} scores "
        f"within 1e-6 of the threshold; scores differ by at most {farthest:.2g}",
    )
    assert not (differing & ~near).any()
