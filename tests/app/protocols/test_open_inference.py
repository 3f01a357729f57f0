"""The Open Inference Protocol as its own clients speak it, and byte by byte."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.http import aio as triton_aio
from tritonclient.utils import InferenceServerException

from app.settings import Settings

if TYPE_CHECKING:
    from conftest import Service

DEFAULTS = [
    "latent", "reconstruction", "reconstruction_error", "denoised", "anomaly_score", "p_value", "is_anomaly",
    "threshold", "mean", "largest", "heatmap",
]  # fmt: skip
ITEM = (np.arange(64, dtype=np.float32) / 128).reshape(1, 1, 8, 8)


@pytest.fixture
def client(service: Service) -> Iterator[triton.InferenceServerClient]:
    """Triton's own client."""
    client = triton.InferenceServerClient("{}:{}".format(*service.address))
    yield client
    client.close()


def asynchronously(service: Service, use: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
    """What `use` gives for Triton's asyncio client."""

    async def run() -> Any:
        async with triton_aio.InferenceServerClient("{}:{}".format(*service.address)) as client:
            return await use(client)

    return asyncio.run(run())


def tensor(
    array: np.ndarray = ITEM, datatype: str = "FP32", *, name: str = "input", binary: bool = True
) -> triton.InferInput:
    found = triton.InferInput(name, list(array.shape), datatype)
    found.set_data_from_numpy(array, binary_data=binary)
    return found


def wanted(*names: str, binary: bool = True) -> list[triton.InferRequestedOutput]:
    return [triton.InferRequestedOutput(name, binary_data=binary) for name in names]


def assert_same(found: np.ndarray, own: list[Any]) -> None:
    """What a client got is what JSON's digits say in the same precision, all of them."""
    assert found.shape == np.shape(own)
    assert (found == np.asarray(own, found.dtype)).all()


def test_triton_client_reads_server_and_model(client: triton.InferenceServerClient) -> None:
    """Metadata, liveness, readiness, configuration and repository reach Triton's client in its own terms."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("nobody")
    assert not client.is_model_ready("tiny", "9")
    assert set(client.get_server_metadata()["extensions"]) >= {"binary_tensor_data", "statistics"}
    metadata = client.get_model_metadata("tiny")
    assert (metadata["name"], metadata["versions"], metadata["platform"]) == ("tiny", ["1", "2"], "pytorch_torchscript")
    assert metadata["inputs"][0] == {"name": "input", "datatype": "FP32", "shape": [-1, 1, 8, 8]}
    outputs = {output["name"]: output for output in metadata["outputs"]}
    assert list(outputs) == [*DEFAULTS, "inpainted", "decoded", "sample"]
    assert outputs["latent"] == {"name": "latent", "datatype": "FP32", "shape": [-1, 4]}
    assert outputs["p_value"] == {"name": "p_value", "datatype": "FP64", "shape": [-1]}
    assert "sample" not in {output["name"] for output in client.get_model_metadata("tiny-plain")["outputs"]}
    config = client.get_model_config("tiny", "2")
    assert (config["max_batch_size"], config["dynamic_batching"]) == (16, {})
    assert config["input"][0] == {"name": "input", "data_type": "TYPE_FP32", "dims": [1, 8, 8]}
    assert [entry.get("optional") for entry in config["input"][1:]] == [True, True]
    index = client.get_model_repository_index()
    assert index[0] == {"name": "tiny", "version": "1", "state": "READY", "reason": ""}
    assert len(index) == 3


def test_triton_client_asynchronously(service: Service) -> None:
    """The asyncio client reads metadata and readiness and infers, compressed both ways."""

    async def use(client: Any) -> Any:
        assert await client.is_server_ready()
        assert await client.is_model_ready("tiny")
        assert (await client.get_model_metadata("tiny"))["name"] == "tiny"
        assert len(await client.get_model_repository_index()) == 3
        assert (await client.get_inference_statistics("tiny"))["model_stats"]
        results = [
            await client.infer(
                "tiny",
                [tensor()],
                outputs=wanted("latent", "is_anomaly"),
                request_compression_algorithm=coding,
                response_compression_algorithm=coding,
            )
            for coding in (None, "gzip", "deflate")
        ]
        with pytest.raises(InferenceServerException, match="latency"):
            await client.infer("tiny", [tensor()], outputs=wanted("latency"))
        return results

    results = asynchronously(service, use)
    own = service.client.post("/encode?model=tiny", json={"instances": [ITEM.ravel().tolist()]}).json()
    for result in results:
        assert_same(result.as_numpy("latent"), [own["results"][0]["latent"]])
        assert result.as_numpy("is_anomaly").dtype == np.bool_


def test_triton_client_asynchronously_in_json(service: Service, client: triton.InferenceServerClient) -> None:
    """The asyncio client's JSON tensors, versions, optional inputs and timeouts do what the other client's do."""
    latent = np.array([[0.5, -1, 0, 2]], np.float32)

    async def use(client: Any) -> Any:
        found = [
            await client.infer("tiny", [tensor(binary=False)], version, outputs=wanted("latent", binary=False))
            for version in ("", "1", "2")
        ]
        given = [tensor(latent, name="latent", binary=False)]
        decoded = await client.infer("tiny", given, outputs=wanted("decoded", binary=False))
        await client.infer("tiny", [tensor()], outputs=wanted("latent"), priority=1, timeout=5_000_000)
        with pytest.raises(InferenceServerException, match="tiny has the versions 1, 2; found 9"):
            await client.infer("tiny", [tensor()], "9")
        return found, decoded

    async def wait(client: Any) -> None:
        with pytest.raises(InferenceServerException, match=r"deadline: no answer within 20 ms") as caught:
            await client.infer("tiny", [tensor(binary=False)], outputs=wanted("latent"), timeout=20_000)
        assert caught.value.status() == "504"

    found, decoded = asynchronously(service, use)
    for version, result in zip(("2", "1", "2"), found, strict=True):
        assert result.get_response()["model_version"] == version
        own = client.infer("tiny", [tensor()], version, outputs=wanted("latent"))
        assert (result.as_numpy("latent") == own.as_numpy("latent")).all()
    own = client.infer("tiny", [tensor(latent, name="latent")], outputs=wanted("decoded"))
    assert (decoded.as_numpy("decoded") == own.as_numpy("decoded")).all()
    with service.held_device():
        asynchronously(service, wait)


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_inference_gives_the_routes_numbers(
    service: Service, client: triton.InferenceServerClient, binary_in: bool, binary_out: bool
) -> None:
    """Every output, as JSON or bytes, carries what the capability's own route answers, to the last digit."""
    items = np.concatenate([ITEM, ITEM[:, :, ::-1]])
    result = client.infer("tiny", [tensor(items, binary=binary_in)], outputs=wanted(*DEFAULTS, binary=binary_out))
    found = {name: result.as_numpy(name) for name in DEFAULTS}
    body = {"instances": [item.ravel().tolist() for item in items]}
    own: dict[str, Any] = {}
    for route in ("encode", "reconstruct", "denoise", "anomaly-score"):
        rows = service.client.post(f"/{route}?model=tiny", json=body).json()["results"]
        own |= {name: [row[name] for row in rows] for name in rows[0]}
    assert_same(found["latent"], own["latent"])
    assert_same(found["reconstruction"], own["reconstruction"])
    assert_same(found["reconstruction_error"], own["reconstruction_error"])
    assert_same(found["anomaly_score"], own["score"])
    assert_same(found["threshold"], own["threshold"])
    assert_same(found["p_value"], own["p_value"])
    assert_same(found["is_anomaly"], own["is_anomaly"])
    assert_same(found["denoised"], own["denoised"])


def test_outputs_are_named_or_all_that_need_the_input(client: triton.InferenceServerClient) -> None:
    """Named outputs come in the caller's order; without names all come that need only the input."""
    result = client.infer("tiny", [tensor()], request_id="mine")
    answer = result.get_response()
    assert [output["name"] for output in answer["outputs"]] == DEFAULTS
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("mine", "tiny", "2")
    some = client.infer("tiny", [tensor()], outputs=wanted("p_value", "latent")).get_response()
    assert [output["name"] for output in some["outputs"]] == ["p_value", "latent"]


def test_only_outputs_that_are_asked_for_are_computed(service: Service, client: triton.InferenceServerClient) -> None:
    """Asking for the latent vector runs the encoder and nothing else."""

    def batches() -> dict[str, float]:
        names = ("encode", "reconstruct", "denoise", "anomaly_score", "decode", "sample", "inpaint")
        labels = {"model": "tiny", "version": "2"}
        return {name: service.metric("hourglass_batch_rows_count", **labels, capability=name) for name in names}

    before = batches()
    client.infer("tiny", [tensor()], outputs=wanted("latent"))
    after = batches()
    assert {name for name in after if after[name] != before[name]} == {"encode"}


def test_the_same_head_says_nothing_of_the_bytes_behind_it(client: triton.InferenceServerClient) -> None:
    """Requests alike but for their tensors get each their own answer, and the error beside it changes none of it."""
    for item in (ITEM, 1 - ITEM, ITEM):
        alone = client.infer("tiny", [tensor(item)], outputs=wanted("reconstruction"))
        both = client.infer("tiny", [tensor(item)], outputs=wanted("reconstruction", "reconstruction_error"))
        in_json = client.infer("tiny", [tensor(item, binary=False)], outputs=wanted("reconstruction"))
        reconstruction = alone.as_numpy("reconstruction")
        assert (both.as_numpy("reconstruction") == reconstruction).all()
        assert (in_json.as_numpy("reconstruction") == reconstruction).all()
        error = np.square(reconstruction.astype(np.float64) - item).mean()
        assert both.as_numpy("reconstruction_error")[0] == pytest.approx(error)


def test_versions_differ(service: Service, client: triton.InferenceServerClient) -> None:
    """A version in the address is the one that answers; without it the highest does."""
    found = {
        version: client.infer("tiny", [tensor()], version, outputs=wanted("latent")).as_numpy("latent")
        for version in ("", "1", "2")
    }
    assert (found[""] == found["2"]).all()
    assert (found["1"] != found["2"]).any()
    answer = service.client.get("/v2/models/tiny/versions/1").json()
    assert answer["name"] == "tiny"


def test_optional_inputs(service: Service, client: triton.InferenceServerClient) -> None:
    """A mask fills holes, a latent vector is decoded without an input, a seed draws what /sample draws."""
    mask = np.zeros((1, 1, 8, 8), np.float32)
    mask[..., :4] = 1
    result = client.infer("tiny", [tensor(), tensor(mask, name="mask")], outputs=wanted("inpainted"))
    body = {"instances": [ITEM.ravel().tolist()], "masks": [mask[0, 0].tolist()]}
    own = service.client.post("/inpaint?model=tiny", json=body).json()["results"]
    assert_same(result.as_numpy("inpainted"), [own[0]["inpainted"]])
    latent = np.array([[0.5, -1, 0, 2]], np.float32)
    result = client.infer("tiny", [tensor(latent, name="latent")], outputs=wanted("decoded"))
    own = service.client.post("/decode?model=tiny", json={"latents": latent.tolist()}).json()["results"]
    assert_same(result.as_numpy("decoded"), [own[0]["reconstruction"]])
    result = client.infer("tiny", [], outputs=wanted("sample"), parameters={"seed": 7, "count": 3})
    own = service.client.post("/sample?model=tiny", json={"seed": 7, "count": 3}).json()["results"]
    assert_same(result.as_numpy("sample"), [row["sample"] for row in own])
    assert result.get_response()["parameters"] == {"seed": 7}


def test_bytes_are_pictures(client: triton.InferenceServerClient) -> None:
    """UINT8 is a picture, 0 to 255, as JSON and as bytes."""
    picture = np.arange(64, dtype=np.uint8).reshape(1, 1, 8, 8)
    expected = client.infer("tiny", [tensor(picture.astype(np.float32) / np.float32(255))], outputs=wanted("latent"))
    for binary in (True, False):
        result = client.infer("tiny", [tensor(picture, "UINT8", binary=binary)], outputs=wanted("latent"))
        assert (result.as_numpy("latent") == expected.as_numpy("latent")).all()


def test_target_fpr_is_a_parameter(service: Service, client: triton.InferenceServerClient) -> None:
    """target_fpr moves the threshold as on the route."""
    result = client.infer("tiny", [tensor()], outputs=wanted("threshold"), parameters={"target_fpr": 0.5})
    own = service.client.post("/anomaly-score?model=tiny&target_fpr=.5", json={"instances": [ITEM.ravel().tolist()]})
    assert_same(result.as_numpy("threshold"), [own.json()["results"][0]["threshold"]])


def test_timeout_and_priority(service: Service, client: triton.InferenceServerClient) -> None:
    """A timeout in microseconds ends in a readable message; a priority is accepted."""
    client.infer("tiny", [tensor()], outputs=wanted("latent"), priority=1, timeout=5_000_000)
    with (
        service.held_device(),
        pytest.raises(InferenceServerException, match=r"deadline: no answer within 20 ms") as caught,
    ):
        client.infer("tiny", [tensor()], outputs=wanted("latent"), timeout=20_000)
    assert caught.value.status() == "504"


def test_statistics_move_truthfully(service: Service, client: triton.InferenceServerClient) -> None:
    """Requests, items, failures and batches count what happened, through whichever route."""

    def read() -> tuple[int, ...]:
        (found,) = client.get_inference_statistics("tiny", "2")["model_stats"]
        stats = found["inference_stats"]
        assert stats["success"]["ns"] >= stats["compute_input"]["ns"] > 0
        return found["inference_count"], found["execution_count"], stats["success"]["count"], stats["fail"]["count"]

    client.infer("tiny", [tensor()], outputs=wanted("latent"))
    before = read()
    client.infer("tiny", [tensor(np.repeat(ITEM, 3, axis=0))], outputs=wanted("latent"))
    service.client.post("/encode?model=tiny", json={"instances": [[0.5] * 64] * 2})
    with pytest.raises(InferenceServerException):
        client.infer("tiny", [tensor(ITEM + 2)], outputs=wanted("latent"))
    assert tuple(after - was for after, was in zip(read(), before, strict=True)) == (5, 2, 2, 1)
    everything = client.get_inference_statistics()["model_stats"]
    assert [(entry["name"], entry["version"]) for entry in everything] == [
        ("tiny", "1"), ("tiny", "2"), ("tiny-plain", "1")
    ]  # fmt: skip
    assert everything[1]["last_inference"] > 1_600_000_000_000


@pytest.mark.parametrize(
    ("inputs", "options", "status", "message"),
    [
        ([tensor()], {"outputs": wanted("colour")}, 400, "outputs: tiny has latent, .*found 'colour'"),
        ([tensor()], {"outputs": wanted("inpainted")}, 400, "mask is missing, which inpainted needs"),
        ([], {"outputs": wanted("latent")}, 400, "input is missing"),
        ([tensor(ITEM[:, :, :4])], {}, 400, r"unexpected shape for input: expected \[-1, 1, 8, 8\], found"),
        ([tensor(ITEM.astype(np.float64), "FP64")], {}, 400, "expected datatype FP32 or UINT8, found 'FP64'"),
        ([tensor(name="x")], {}, 400, "inputs: expected one of input, mask, latent; found 'x'"),
        ([tensor(ITEM * np.nan)], {}, 400, "item 0: expected finite numbers, found NaN"),
        ([tensor(ITEM + 5)], {}, 400, "item 0: expected numbers from 0 to 1"),
        ([tensor(np.zeros((0, 1, 8, 8), np.float32))], {}, 400, "at least one item"),
        ([tensor(np.zeros((41, 1, 8, 8), np.float32))], {}, 413, "at most 40 items, found 41"),
        ([tensor()], {"model_version": "7"}, 404, "tiny has the versions 1, 2; found 7"),
        ([tensor()], {"model_name": "nobody"}, 404, "expected one of tiny, tiny-plain; found 'nobody'"),
        ([tensor()], {"parameters": {"colour": 1}}, 400, "'colour' is none that this service knows"),
        ([tensor()], {"parameters": {"target_fpr": "x"}}, 400, "target_fpr: expected a number"),
        ([tensor()], {"parameters": {"target_fpr": 2.0}}, 400, "target_fpr: .*less than 1"),
        ([tensor()], {"sequence_id": 5, "sequence_start": True}, 400, "'sequence_id' is none"),
        ([tensor()], {"outputs": wanted("sample"), "parameters": {"count": 1000}}, 400, "count: .*256"),
    ],
)  # fmt: skip
def test_errors_reach_the_client_as_messages(
    client: triton.InferenceServerClient, inputs: list[Any], options: dict[str, Any], status: int, message: str
) -> None:
    """Whatever is refused, the client tells its user why, and the same connection goes on."""
    with pytest.raises(InferenceServerException, match=message) as caught:
        client.infer(**{"model_name": "tiny", "inputs": inputs, **options})
    assert caught.value.status() == str(status)
    assert client.is_server_ready()


HEADER = b'{"inputs":[{"name":"input","shape":[1,1,8,8],"datatype":"FP32","parameters":{"binary_data_size":256}}],'
LATENT_JSON = HEADER + b'"outputs":[{"name":"latent"}]}'
LATENT_BINARY = HEADER + b'"outputs":[{"name":"latent","parameters":{"binary_data":true}}]}'
TENSOR = ITEM.astype("<f4").tobytes()


def infer(service: Service, content: bytes, length: object = None, **headers: str) -> httpx.Response:
    given = dict(headers) if length is None else {"inference-header-content-length": str(length), **headers}
    return service.client.post("/v2/models/tiny/infer", content=content, headers=given)


def test_golden_bytes(service: Service) -> None:
    """A binary request is answered by JSON, its length in a header, and little-endian rows behind it; byte by byte."""
    latent = service.client.post("/encode?model=tiny", json={"instances": [ITEM.ravel().tolist()]}).json()
    numbers = np.array(latent["results"][0]["latent"], "<f4").tobytes()
    answer = infer(service, LATENT_BINARY + TENSOR, len(LATENT_BINARY))
    head = (
        b'{"model_name":"tiny","model_version":"2","id":"","outputs":[{"name":"latent","datatype":"FP32",'
        b'"shape":[1,4],"parameters":{"binary_data_size":16}}]}'
    )
    assert answer.content == head + numbers
    assert answer.headers["inference-header-content-length"] == str(len(head))
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["x-model"] == "tiny:2"
    plain = infer(service, LATENT_JSON + TENSOR, len(LATENT_JSON))
    assert plain.headers["content-type"] == "application/json"
    assert "inference-header-content-length" not in plain.headers
    assert plain.json()["outputs"][0]["data"] == latent["results"][0]["latent"]


def test_compressed_bytes(service: Service) -> None:
    """The header's length counts decompressed bytes, and one accepted coding is used, several are not."""
    body = gzip.compress(LATENT_BINARY + TENSOR)
    plain = infer(service, LATENT_BINARY + TENSOR, len(LATENT_BINARY), **{"accept-encoding": "gzip, deflate"})
    assert "content-encoding" not in plain.headers
    for coding in ("gzip", "deflate"):
        packed = infer(service, body, len(LATENT_BINARY), **{"content-encoding": "gzip", "accept-encoding": coding})
        assert packed.headers["content-encoding"] == coding
        assert packed.content == plain.content  # httpx has decompressed it
        assert packed.headers["inference-header-content-length"] == plain.headers["inference-header-content-length"]


def test_raw_requests(service: Service) -> None:
    """Header length 0: the body is one item's bytes, FP32 or UINT8; all outputs are binary, or JSON where asked."""
    answer = infer(service, TENSOR, 0)
    head = json.loads(answer.content[: int(answer.headers["inference-header-content-length"])])
    assert [output["name"] for output in head["outputs"]] == DEFAULTS
    picture = infer(service, bytes(range(64)), 0, accept="application/json").json()
    assert picture["outputs"][0]["shape"] == [1, 4]
    assert len(picture["outputs"][0]["data"]) == 4


def numbers(*values: str) -> bytes:
    return b'{"inputs":[{"name":"input","shape":[1,64],"datatype":"FP32","data":[%s]}]}' % ",".join(values).encode()


MALFORMED: dict[str, tuple[bytes, object, str]] = {
    "truncated": (LATENT_JSON + TENSOR[:-1], len(LATENT_JSON), "expected 256 bytes, found 255"),
    "trailing": (LATENT_JSON + TENSOR + b"x", len(LATENT_JSON), "unexpected additional input data: 1 bytes"),
    "no tensor at all": (LATENT_JSON, len(LATENT_JSON), "unexpected size"),
    "without the header": (LATENT_JSON + TENSOR, None, "not JSON"),
    "length negative": (LATENT_JSON + TENSOR, -5, "expected an integer from 0 to"),
    "length too long": (LATENT_JSON + TENSOR, 10_000, "expected an integer from 0 to"),
    "length far too long": (LATENT_JSON + TENSOR, "9" * 300, "expected an integer from 0 to"),
    "length a word": (LATENT_JSON + TENSOR, "all", "expected an integer from 0 to"),
    "length cuts the JSON": (LATENT_JSON + TENSOR, 20, "not JSON"),
    "raw too short": (TENSOR[:-1], 0, "a raw request is one item of 256 or 64 bytes, found 255"),
    "size against shape": (LATENT_JSON.replace(b"256", b"128") + TENSOR[:128], len(LATENT_JSON), "needs 256 bytes"),
    "size negative": (LATENT_JSON.replace(b"256", b"-56") + TENSOR, len(LATENT_JSON), "binary_data_size"),
    "size a string": (LATENT_JSON.replace(b"256", b'"1"') + TENSOR, len(LATENT_JSON), "binary_data_size"),
    "shape negative": (LATENT_JSON.replace(b"[1,1,", b"[-1,1,"), None, "shape of integers"),
    "shape a string": (LATENT_JSON.replace(b"[1,1,", b'["1",'), None, "shape of integers"),
    "shape astronomical": (LATENT_JSON.replace(b"[1,1,", b"[9000000000000000000,"), None, "needs"),
    "shape empty": (LATENT_JSON.replace(b"[1,1,8,8]", b"[]"), None, "1 to 32 lengths"),
    "empty body": (b"", None, "empty body"),
    "a list": (b"[1]", None, "expected an object"),
    "inputs a number": (b'{"inputs": 5}', None, "inputs: expected a list of objects"),
    "inputs of numbers": (b'{"inputs": [5]}', None, "inputs: expected a list of objects"),
    "input twice": (numbers(*["0"] * 64).replace(b"}]}", b"}," + numbers(*["0"] * 64)[11:]), None, "more than once"),
    "no data": (b'{"inputs":[{"name":"input","shape":[1,64],"datatype":"FP32"}]}', None, "expected data"),
    "id a number": (b'{"id": 5, "inputs": []}', None, "id: expected a string"),
    "parameters a list": (b'{"parameters": [], "inputs": []}', None, "parameters: expected an object"),
    "outputs of strings": (b'{"inputs": [], "outputs": ["latent"]}', None, "outputs: expected a list of objects"),
    "strings": (numbers(*['"0.5"'] * 64), None, "expected numbers, found another type"),
    "booleans": (numbers(*["true"] * 64), None, "expected numbers"),
    "null": (numbers(*["null"] * 64), None, "expected numbers"),
    "too few": (numbers(*["0"] * 63), None, "needs 64 numbers, found 63"),
    "ragged": (numbers("[0,0]", *["0"] * 62), None, "ragged"),
    "NaN": (numbers("NaN", *["0"] * 63), None, "found NaN"),
    "Infinity": (numbers("-Infinity", *["0"] * 63), None, "infinity"),
    "1e400": (numbers("1e400", *["0"] * 63), None, "infinity|too large"),
    "10^400": (numbers("1" + "0" * 400, *["0"] * 63), None, "infinity|larger"),
    "10^300": (numbers("1" + "0" * 300, *["0"] * 63), None, "infinity|larger|fit"),
    "deep": (b'{"inputs":' + b"[" * 100_000, None, "nested more deeply"),
    "timeout a string": (b'{"parameters": {"timeout": "5"}, "inputs": []}', None, "timeout: expected an integer"),
    "timeout too long": (b'{"parameters": {"timeout": 600000001}, "inputs": []}', None, "timeout: expected at most"),
    "priority negative": (b'{"parameters": {"priority": -1}, "inputs": []}', None, "priority: expected an integer"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_requests_are_400(service: Service, case: str) -> None:
    """What is no request is refused with 400 and one readable reason, never with 422 and never with 500."""
    content, length, message = MALFORMED[case]
    answer = infer(service, content, length)
    assert answer.status_code == 400, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert isinstance(body["error"], str)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(body["error"])
    assert service.client.get("/v2/health/ready").json() == {"ready": True, "live": True}


def test_gzip_bomb_is_refused(service: Service) -> None:
    """A megabyte of nothing packed into a kilobyte is 413 before it is unpacked whole."""
    answer = infer(service, gzip.compress(bytes(1_000_000)), **{"content-encoding": "gzip"})
    assert (answer.status_code, answer.json()["code"]) == (413, "payload_too_large")


def test_health_and_names(service: Service) -> None:
    """Probes answer JSON to GET and nothing to HEAD; unknown addresses and methods are errors in the one form."""
    client = service.client
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.head("/v2/health/ready").status_code == 200
    assert client.get("/v2/models").json() == {"models": ["tiny", "tiny-plain"]}
    assert client.get("/v2/models/tiny/ready").json() == {"name": "tiny", "ready": True}
    assert client.get("/v2/nothing").json()["code"] == "not_found"
    assert client.get("/v2/models/tiny/infer").json()["code"] == "method_not_allowed"
    assert client.get("/v2/models/tiny/versions/x").json()["code"] == "invalid_parameter"
    assert client.post("/v2/models/tiny:1/infer", content=LATENT_JSON).status_code == 404
    assert client.post("/v2/repository/index", json={"ready": 5}).status_code == 400
    assert len(client.post("/v2/repository/index", json={"ready": True}).json()) == 3


def test_triton_client_controls_models(
    tmp_path: Path,
    run_app: Callable[..., AbstractContextManager[Service]],
    write_artifact_named: Callable[..., object],
) -> None:
    """Who has a key for it loads and unloads by Triton's client; others are told why they cannot."""
    write_artifact_named(tmp_path / "store", "tiny")
    keys = tmp_path / "keys"
    keys.write_text(f"me admin,infer sha256:{hashlib.sha256(b'secret').hexdigest()}\n")
    key = {"authorization": "Bearer secret"}
    with run_app(Settings(models_store=tmp_path / "store", log_format="json", api_keys_file=keys)) as service:
        client = triton.InferenceServerClient("{}:{}".format(*service.address))
        with pytest.raises(InferenceServerException, match="expected Bearer and a key"):
            client.unload_model("tiny")
        client.unload_model("tiny", headers=key)
        assert not client.is_model_ready("tiny", headers=key)
        assert client.get_model_repository_index(headers=key)[0]["state"] == "UNAVAILABLE"
        client.load_model("tiny", headers=key)
        assert client.is_model_ready("tiny", headers=key)
        with pytest.raises(InferenceServerException, match="cannot be sent along"):
            client.load_model("tiny", headers=key, config="{}")
        with pytest.raises(InferenceServerException, match="nobody"):
            client.load_model("nobody", headers=key)
        client.close()

        async def use(client: Any) -> None:
            await client.unload_model("tiny", headers=key)
            await client.load_model("tiny", headers=key)
            assert await client.is_model_ready("tiny", headers=key)

        asynchronously(service, use)


def test_model_control_needs_keys(client: triton.InferenceServerClient) -> None:
    """Where no keys are set nobody may load or unload."""
    with pytest.raises(InferenceServerException, match="HOURGLASS_API_KEYS_FILE"):
        client.load_model("tiny")
