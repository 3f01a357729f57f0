"""Ratios are taken within a round, and a promise is judged by their median."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
import pytest

from benchmarks import report
from benchmarks.jobs import JOBS, file_of_multipart
from benchmarks.load import Load
from benchmarks.measure import GROUPS, numbers_of
from benchmarks.results import LINES, Cell, Results, verdicts
from benchmarks.servers import CONTENDERS


def cell(per_s: float, p50_s: float = 0.001, p99_s: float = 0.01) -> Cell:
    return Cell(Load(seconds=1, ok=int(per_s), shed=0, failed=0, p50_s=p50_s, p99_s=p99_s), cpu_s=1.0)


def words(results: Results, *groups: str) -> dict[str, str]:
    return {verdict.line.text: verdict.word for verdict in verdicts(results, groups)}


def test_a_ratio_is_taken_within_its_round() -> None:
    """Rounds of a noisy machine are compared each with itself: 2 ×, 1 × and 1 ×, not the ratio of the medians."""
    results = Results()
    results.cells["hourglass", "reconstruct", 64] = {1: cell(200), 2: cell(50), 3: cell(80)}
    results.cells["mosec", "reconstruct", 64] = {1: cell(100), 2: cell(50), 3: cell(80)}
    (verdict,) = verdicts(results, ["reconstruct"])
    assert list(verdict.values) == [2, 1, 1]
    assert verdict.median == 1
    assert verdict.word == "held"


@pytest.mark.parametrize(("per_s", "word"), [(79, "**missed**"), (80, "held"), (125, "goal reached")])
def test_must_and_goal(per_s: float, word: str) -> None:
    """Below the must a promise is missed, from the goal on the goal is reached."""
    results = Results()
    results.cells["hourglass", "reconstruct", 64] = {1: cell(per_s)}
    results.cells["mosec", "reconstruct", 64] = {1: cell(100)}
    assert set(words(results, "reconstruct").values()) == {word}


def test_the_best_of_several_is_what_counts() -> None:
    """Against several servers the strongest of each round is taken: highest rate, lowest latency."""
    results = Results()
    results.cells["hourglass", "score", 64] = {1: cell(1000)}
    results.cells["hourglass", "score", 1] = {1: cell(1000, p50_s=0.003)}
    for name, per_s, p50_s in (("LitServe", 100, 0.004), ("BentoML", 400, 0.002)):
        results.cells[name, "score", 64] = {1: cell(per_s)}
        results.cells[name, "score", 1] = {1: cell(per_s, p50_s=p50_s)}
    found = words(results, "score")
    assert found["… against the best of LitServe, BentoML, naive def and async"] == "held"
    assert found["… median against the fastest batching peer's"] == "**missed**"


def test_time_above_the_forward() -> None:
    """One connection's overhead is its median less the bare forward of the same round."""
    results = Results()
    results.add_scalar("bare forward ms", 1, 0.1)
    results.cells["hourglass", "score", 1] = {1: cell(1, p50_s=0.0009)}
    results.cells["bare app", "score", 1] = {1: cell(1, p50_s=0.0005)}
    values = {verdict.line.text: verdict.values for verdict in verdicts(results, ["score"])}
    assert values["one connection: median above the bare forward"] == pytest.approx([0.8])
    assert values["… above the bare forward, against the bare app's"] == pytest.approx([2.0])


def test_what_was_not_measured_is_said_to_be_so() -> None:
    """Without figures no line claims anything, and every line belongs to a group that can be asked for."""
    assert {verdict.word for verdict in verdicts(Results(), GROUPS)} == {"not measured"}
    assert {line.group for line in LINES} <= set(GROUPS)


def test_a_percentile_of_tries_is_one_of_them() -> None:
    """Of 100 tries the 99th percentile is the last but one."""
    results = Results(samples_ms={"disconnect": [float(number) for number in range(1, 101)]})
    values = {verdict.line.text: verdict.values for verdict in verdicts(results, ["promptness"])}
    assert values["a disconnected caller's rows: p99 until they have left the queue"] == [99.0]


def test_a_report_replaces_the_last_one_and_nothing_else(tmp_path: Path) -> None:
    """What people wrote around the marks of the document stays."""
    path = tmp_path / "performance.md"
    report.write(path, "first")
    path.write_text(f"Before.\n\n{path.read_text()}\nAfter.\n")
    report.write(path, "second")
    text = path.read_text()
    assert text.startswith("Before.")
    assert text.endswith("After.\n")
    assert "second" in text
    assert "first" not in text


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
def test_every_server_gets_the_same_picture(contender: object) -> None:
    """An upload is the picture itself or a multipart body from which the picture comes out whole."""
    picture = b"\x89PNG\r\n--not the boundary\r\n"
    body, content_type = contender.body("latent", picture)
    assert (body if contender.raw_uploads else file_of_multipart(body, content_type)) == picture


@pytest.mark.parametrize(
    "answer",
    [{"score": 0.5}, [{"score": 0.5}], {"model": "m", "results": [{"score": 0.5, "p_value": 0.1}]}],
)
def test_the_number_that_an_answer_is_about(answer: object) -> None:
    """Servers wrap it differently."""
    assert numbers_of(answer).tolist() == [0.5]


def test_jobs_encode_what_is_compared() -> None:
    """Every job's own answer is understood."""
    for job in JOBS.values():
        output = np.float32(0.5) if job.method == "anomaly_score" else np.full((4,), 0.5, np.float32)
        assert set(numbers_of(orjson.loads(job.encode(output)))) == {0.5}
