"""One self-contained HTML page about an artifact and its run: pictures, curves, figures, origin."""

from __future__ import annotations

import base64
import html
import io
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from app.artifacts.manifest import Capability
from app.artifacts.store import Artifact
from training.dataset import Dataset, to_float
from training.evaluate import NOISES, add_noise, draw_samples, evaluation_mask, psnr_db
from training.export import ExportedModule
from training.splits import split_dataset

SHOWN = 12
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: .5rem 0 } td, th { padding: .25rem .7rem; text-align: left;
border-bottom: 1px solid #eee; vertical-align: top } td.n { text-align: right; font-variant-numeric: tabular-nums }
img { image-rendering: pixelated; display: block } figure { margin: .8rem 0 }
figcaption { color: #555; font-size: 13px }
.row { display: flex; align-items: center; gap: .8rem } .row b { width: 11rem; font-weight: 500; text-align: right }
.muted { color: #666; font-size: 13px } code { background: #f4f4f4; padding: 0 .2em } svg text { font-size: 11px }
"""


def report(artifact: Artifact, dataset: Dataset, epochs: Sequence[dict[str, Any]]) -> str:
    """The page. `dataset` is what the artifact was made from; `epochs` the run's log, empty where there is none."""
    manifest = artifact.manifest
    split = split_dataset(dataset, manifest.training.seed)
    test = to_float(dataset.items[split.test])
    exported = ExportedModule(artifact.model)
    parts = [_head(artifact)]
    if epochs:
        parts.append(_section("Training", _curves(epochs)))
    if manifest.input.picture is not None:
        parts += _pictures(artifact, exported, test)
    if manifest.projection is not None:
        parts.append(_section("Latent map", _latent_map(artifact)))
    if Capability.ANOMALY_SCORE in manifest.capabilities:
        parts.append(_section("Anomaly scores", _scores(artifact, exported, test)))
    parts.append(_section("Figures", _figures(artifact)))
    parts.append(_section("Origin", _origin(artifact)))
    title = html.escape(str(artifact.ref))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _head(artifact: Artifact) -> str:
    manifest = artifact.manifest
    can = ", ".join(f"<code>{capability}</code>" for capability in manifest.capabilities)
    cannot = "".join(
        f"<li><code>{capability}</code>: {html.escape(reason)}</li>"
        for capability, reason in manifest.unsupported.items()
    )
    return f"<h1>{html.escape(str(artifact.ref))}</h1><p>{html.escape(manifest.description)}</p><p>Can {can}.</p>" + (
        f"<details><summary>Cannot</summary><ul>{cannot}</ul></details>" if cannot else ""
    )


def _pictures(artifact: Artifact, exported: ExportedModule, test: Tensor) -> list[str]:
    manifest, sections = artifact.manifest, []
    able = manifest.capabilities
    if Capability.RECONSTRUCT in able:
        found = exported.run(Capability.RECONSTRUCT, test)
        errors = (found - test).square().flatten(1).mean(1)
        order = errors.argsort()
        rows = []
        middle = len(order) // 2
        chosen = {
            "typical": order[middle : middle + SHOWN],
            "best": order[:SHOWN],
            "worst": order.flip(0)[:SHOWN],
        }
        for words, indices in chosen.items():
            mse = float(errors[indices].mean())
            rows.append(_row(f"{words}, as they are", test[indices]))
            rows.append(_row(f"rebuilt, MSE {mse:.4f}", found[indices]))
        sections.append(_section("Reconstruction of test pictures", "".join(rows)))
    if Capability.DENOISE in able:
        rows = []
        for kind, words in NOISES.items():
            noisy = add_noise(test[:SHOWN], kind)
            clean = exported.run(Capability.DENOISE, noisy)
            before, after = (float(psnr_db(x, test[:SHOWN]).mean()) for x in (noisy, clean))
            rows += [_row(f"{words}: {before:.1f} dB", noisy), _row(f"denoised: {after:.1f} dB", clean)]
        sections.append(_section("Denoising", _row("clean", test[:SHOWN]) + "".join(rows)))
    if Capability.INPAINT in able:
        mask = evaluation_mask(test[:SHOWN])
        filled = exported.run(Capability.INPAINT, test[:SHOWN], mask)
        hidden = test[:SHOWN] * (1 - mask) + 0.5 * mask
        rows = [_row("as they are", test[:SHOWN]), _row("hidden in grey", hidden), _row("filled in", filled)]
        sections.append(_section("Inpainting", "".join(rows)))
    if Capability.SAMPLE in able and manifest.latent_dim is not None:
        classes = len(manifest.labels or ())
        drawn = draw_samples(exported, manifest.latent_dim, 3 * SHOWN, classes)
        content = _figure(_grid(drawn, SHOWN), "drawn at temperature 1, none left out")
        for label in range(min(classes, 10)):
            of_class = draw_samples(exported, manifest.latent_dim, SHOWN, classes, label)
            content += _row(f"class {(manifest.labels or ())[label]}", of_class)
        sections.append(_section("Samples", content))
    if {Capability.ENCODE, Capability.DECODE} <= set(able) and len(test) > 1:
        ends = exported.run(Capability.ENCODE, test[: 2 * 4])
        rows = []
        for i in range(0, len(ends) - 1, 2):
            path = torch.stack([_between(ends[i], ends[i + 1], t, manifest.interpolation) for t in _steps()])
            rows.append(_row(f"{i // 2 + 1}, {manifest.interpolation}", exported.run(Capability.DECODE, path)))
        sections.append(_section("From one test picture to another", "".join(rows)))
    return sections


def _steps() -> list[float]:
    return [step / (SHOWN - 1) for step in range(SHOWN)]


def _between(a: Tensor, b: Tensor, t: float, way: str) -> Tensor:
    angle = torch.arccos((a @ b / (a.norm() * b.norm()).clamp_min(1e-12)).clamp(-1, 1))
    if way == "linear" or float(angle.sin()) < 1e-4:
        return a + t * (b - a)
    mixed: Tensor = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
    return mixed


def _curves(epochs: Sequence[dict[str, Any]]) -> str:
    numbers = [epoch["number"] for epoch in epochs]
    series = {key: [epoch[key] for epoch in epochs] for key in epochs[0]}
    charts = [
        _chart(numbers, {"training": series["loss"], "validation": series["validation_loss"]}, "loss"),
        _chart(numbers, {"validation": series["validation_mse"]}, "squared error"),
        _chart(numbers, {"learning rate": series["learning_rate"]}, "learning rate"),
    ]
    return f'<div style="display:flex;flex-wrap:wrap;gap:1rem">{"".join(charts)}</div>'


def _chart(x: Sequence[float], lines: dict[str, Sequence[float]], title: str) -> str:
    width, height, left, bottom = 350, 220, 58, 30
    values = [v for line in lines.values() for v in line if np.isfinite(v)]
    low, high = min(values), max(values)
    span, run = (high - low) or 1.0, (max(x) - min(x)) or 1.0
    drawn = []
    for i, (name, line) in enumerate(lines.items()):
        points = " ".join(
            f"{left + (a - min(x)) / run * (width - left - 10):.1f},"
            f"{20 + (high - b) / span * (height - bottom - 20):.1f}"
            for a, b in zip(x, line, strict=True)
        )
        drawn.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[i]}" stroke-width="2"/>')
        drawn.append(f'<text x="{width - 10}" y="{34 + 14 * i}" text-anchor="end" fill="{COLOURS[i]}">{name}</text>')
    axes = "".join(
        f'<text x="{left - 6}" y="{y}" text-anchor="end">{value:.3g}</text>'
        for y, value in ((24, high), (height - bottom + 4, low))
    )
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="{title}">'
        f'<text x="{left}" y="12" font-weight="600">{title}</text>{axes}'
        f'<path d="M{left} 20V{height - bottom}H{width - 10}" stroke="#999" fill="none"/>'
        f'<text x="{left}" y="{height - 12}">epoch {min(x):g}</text>'
        f'<text x="{width - 10}" y="{height - 12}" text-anchor="end">{max(x):g}</text>{"".join(drawn)}</svg>'
    )


def _latent_map(artifact: Artifact) -> str:
    projection, labels = artifact.projection(), artifact.manifest.labels
    if projection is None:
        return ""
    side, points = 520, projection.points
    low, high = np.percentile(points, 0.5, axis=0), np.percentile(points, 99.5, axis=0)
    scaled = np.clip((points - low) / np.maximum(high - low, 1e-9), -0.02, 1.02) * (side - 40) + 20
    dots = "".join(
        f'<circle cx="{x:.0f}" cy="{side - y:.0f}" r="2.4" fill="{COLOURS[int(c) % 10] if c >= 0 else "#4269d0"}" '
        'fill-opacity=".65"/>'
        for (x, y), c in zip(scaled, projection.labels, strict=True)
    )
    legend = "".join(
        f'<text x="{side + 10}" y="{30 + 16 * i}" fill="{COLOURS[i % 10]}">● {html.escape(name)}</text>'
        for i, name in enumerate((labels or ())[:30])
    )
    caption = f"{len(points)} held-out items on the first two principal components of their latent vectors"
    svg = f'<svg width="{side + 160}" height="{side}" role="img" aria-label="latent map">{dots}{legend}</svg>'
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _scores(artifact: Artifact, exported: ExportedModule, test: Tensor) -> str:
    calibration, entry = artifact.calibration(), artifact.manifest.calibration
    if calibration is None or entry is None:
        return ""
    scores = exported.run(Capability.ANOMALY_SCORE, test).numpy()
    threshold = calibration.verdicts(scores, entry.default_target_fpr).threshold
    top = float(np.percentile(np.concatenate([scores, calibration.scores]), 99.5)) * 1.1
    edges = np.linspace(0, max(top, threshold * 1.1), 61)
    width, height = 760, 220
    drawn = []
    for i, (name, values) in enumerate({"calibration": calibration.scores, "test": scores}.items()):
        counts, _ = np.histogram(np.minimum(values, edges[-1]), edges)
        shares = counts / max(1, len(values))
        tallest = max(shares.max(), 1e-9)
        points = " ".join(
            f"{10 + (j + 0.5) / 60 * (width - 20):.1f},{height - 30 - share / tallest * (height - 60):.1f}"
            for j, share in enumerate(shares)
        )
        drawn.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[i]}" stroke-width="2"/>')
        drawn.append(f'<text x="14" y="{14 + 14 * i}" fill="{COLOURS[i]}">{name}</text>')
    at = 10 + threshold / edges[-1] * (width - 20)
    drawn.append(f'<path d="M{at:.1f} 20V{height - 30}" stroke="#c00" stroke-dasharray="4 3"/>')
    drawn.append(f'<text x="{at - 4:.1f}" y="32" text-anchor="end" fill="#c00">threshold {threshold:.4g}</text>')
    flagged = float((scores > threshold).mean())
    return (
        f'<figure><svg width="{width}" height="{height}" role="img" aria-label="scores">'
        f'<path d="M10 {height - 30}H{width - 10}" stroke="#999"/>'
        f'<text x="10" y="{height - 12}">0</text>'
        f'<text x="{width - 10}" y="{height - 12}" text-anchor="end">{edges[-1]:.3g}</text>{"".join(drawn)}</svg>'
        f"<figcaption>scores of normal items; at a target of {entry.default_target_fpr:g} the threshold flags "
        f"{flagged:.2%} of the test part</figcaption></figure>"
    )


def _figures(artifact: Artifact) -> str:
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="n">{metric.value:.5g}</td>'
        f"<td>{html.escape(', '.join(f'{what} {value:.5g}' for what, value in metric.baselines.items()))}</td>"
        f'<td class="muted">{html.escape(metric.unit)}; {html.escape(metric.protocol)}</td></tr>'
        for name, metric in artifact.manifest.metrics.items()
    )
    return f"<table><tr><th>figure</th><th>value</th><th>beside</th><th>how</th></tr>{rows}</table>"


def _origin(artifact: Artifact) -> str:
    manifest = artifact.manifest
    origin = manifest.training
    facts = {
        "made": f"{manifest.created_at:%Y-%m-%d %H:%M} UTC, torch {manifest.torch_version}",
        "preset": f"{origin.preset}, seed {origin.seed}, {origin.epochs} epochs, {origin.parameters:,} parameters",
        "on": f"{origin.device}, {origin.threads} threads, {origin.wall_time_s:.0f} s",
        "data": f"{origin.data.name}: {', '.join(f'{count} {part}' for part, count in origin.data.counts.items())}",
        "data SHA-256": origin.data.sha256,
        "split SHA-256": origin.data.split_sha256,
        **{f"{file} SHA-256": entry.sha256 for file, entry in manifest.files.items()},
        **{
            section: ", ".join(f"{key}={value}" for key, value in fields.items())
            for section, fields in origin.config.items()
            if isinstance(fields, dict)
        },
        "report made with": f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}",
    }
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    return f"<table>{rows}</table>"


def _section(title: str, content: str) -> str:
    return f"<h2>{html.escape(title)}</h2>{content}"


def _row(words: str, items: Tensor) -> str:
    return f'<div class="row"><b>{html.escape(words)}</b>{_image(_grid(items, len(items)))}</div>'


def _figure(pixels: NDArray[np.uint8], caption: str) -> str:
    return f"<figure>{_image(pixels)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _grid(items: Tensor, columns: int) -> NDArray[np.uint8]:
    """Pictures side by side with a pixel between them, (height, width) or (height, width, 3)."""
    pixels = (items.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    _, height, width, channels = pixels.shape
    lines = (len(pixels) + columns - 1) // columns
    canvas = np.full((lines * (height + 1), columns * (width + 1), channels), 128, np.uint8)
    for i, picture in enumerate(pixels):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        canvas[top : top + height, left : left + width] = picture
    return canvas[..., 0] if channels == 1 else canvas


def _image(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    factor = max(1, round(900 / pixels.shape[1]))
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img width="{pixels.shape[1] * factor}" alt="" src="data:image/png;base64,{data}">'
