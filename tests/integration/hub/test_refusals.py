"""Every reason to refuse what a stranger sends: its code, that nothing changed, and that honest work still counts."""

import json
import math
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures_hub import REACH, SHAPES, STEPS, Job, Person, Town, job_files, new_wallet, numbers, recipe
from trainchain.core.adapter import adapter_bytes
from trainchain.core.checks import delta_cap
from trainchain.core.digests import sha256
from trainchain.core.errors import CODES
from trainchain.core.hub import schema
from trainchain.core.hub.api import SIGNED_BODY
from trainchain.core.hub.service import LEASE_SECONDS
from trainchain.core.models import PROTOCOL

CAP = delta_cap(recipe(job_files()), SHAPES)
FIRST, *_, LAST = sorted(SHAPES)
NEVER = "0x" + "12" * 32
AGES = 10_000_000


@pytest.fixture(scope="module")
def job(town: Town) -> Job:
    """One round of many shards: each test takes one, abuses it, and works on it honestly afterwards."""
    return town.publish(rounds=1, shards=120, round_deadline=AGES, pay_deadline=AGES)


@pytest.fixture(scope="module")
def anna(town: Town) -> Person:
    return town.person()


@pytest.fixture(scope="module")
def ben(town: Town) -> Person:
    return town.person()


@dataclass
class Case:
    """Anna holds a lease and has uploaded what she will hand in; Ben is another worker of the job."""

    town: Town
    job: Job
    anna: Person
    ben: Person
    lease: dict[str, Any]
    delta: bytes

    def document(self, **changes: Any) -> dict[str, Any]:
        return self.anna.signed(self.anna.message(self.lease, self.delta, **changes))

    def hand_in(self, **changes: Any) -> httpx.Response:
        return self.anna.hand_in(self.lease, self.document(**changes))

    def honest(self) -> httpx.Response:
        """Upload the good delta, again where something else was sent since, and hand it in."""
        self.anna.upload(self.lease, self.delta).raise_for_status()
        return self.hand_in()

    def hand_in_tensors(self, **changes: np.ndarray) -> httpx.Response:
        """Hand in a delta with these tensors in place of, or beside, the good ones."""
        tensors: dict[str, np.ndarray] = {**numbers(7), **changes}
        return self.anna.contribute(self.lease, safetensors.numpy.save(tensors))

    def rows(self) -> list[Any]:
        key = {"job": self.job.id, "round": 1, "shard": self.lease["shard"]}
        return [
            self.town.rows(schema.shards, **key),
            self.town.rows(schema.leases, **key),
            self.town.rows(schema.contributions, **key),
            self.town.rows(schema.rounds, job=self.job.id),
            self.job.row,
        ]


@pytest.fixture
def case(town: Town, job: Job, anna: Person, ben: Person) -> Case:
    lease, delta = anna.must_lease(job), adapter_bytes(numbers(secrets.randbits(60)))
    anna.upload(lease, delta).raise_for_status()
    return Case(town, job, anna, ben, lease, delta)


def insist(answer: httpx.Response, code: str) -> dict[str, Any]:
    """The answer is the problem document of `code`."""
    assert answer.status_code == CODES[code].status, answer.text
    assert 400 <= answer.status_code < 500
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert (document["code"], document["status"]) == (code, answer.status_code)
    assert document["title"]
    assert document["detail"]
    return document


def refused(case: Case, send: Callable[[Case], httpx.Response], code: str) -> None:
    """Given a held lease; when this is sent; then it is refused, nothing moves, and the honest delta is accepted."""
    before = case.rows()

    insist(send(case), code)

    assert case.rows() == before
    assert case.honest().status_code == 200
    assert case.job.shards(1)[case.lease["shard"]] == "accepted"


def unsigned(case: Case, signature: str) -> httpx.Response:
    return case.anna.hand_in(case.lease, {**case.document(), "signature": signature})


def told(case: Case, micro_tokens: list[int]) -> httpx.Response:
    return case.anna.hand_in(case.lease, {**case.document(), "micro_tokens": micro_tokens})


def flip_last_bit_of(signature: str) -> str:
    return signature[:-1] + ("c" if signature[-1] == "b" else "b")


def without(document: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != name}


SIGNATURES: dict[str, tuple[Callable[[Case], httpx.Response], str]] = {
    "an empty signature": (lambda c: unsigned(c, ""), "contribution.bad_signature"),
    "no signature field": (
        lambda c: c.anna.hand_in(c.lease, without(c.document(), "signature")),
        "http.bad_request",
    ),
    "a garbage signature": (lambda c: unsigned(c, "0x" + "ab" * 65), "contribution.bad_signature"),
    "no hex at all": (lambda c: unsigned(c, "please"), "contribution.bad_signature"),
    "a signature of zeros": (lambda c: unsigned(c, "0x" + "00" * 64 + "1b"), "contribution.bad_signature"),
    "a signature with its recovery bit flipped": (
        lambda c: unsigned(c, flip_last_bit_of(c.document()["signature"])),
        "contribution.bad_signature",
    ),
    "another wallet's signature": (
        lambda c: c.anna.hand_in(c.lease, c.anna.signed(c.anna.message(c.lease, c.delta), by=c.ben.wallet)),
        "contribution.bad_signature",
    ),
    "a signature over something else": (
        lambda c: unsigned(c, c.document(stateRoot="0x" + "00" * 32)["signature"]),
        "contribution.bad_signature",
    ),
}
NAMES: dict[str, tuple[Callable[[Case], httpx.Response], str]] = {
    "another worker": (lambda c: c.hand_in(worker=c.ben.address), "contribution.wrong_worker"),
    "another worker, signed by that one": (
        lambda c: c.anna.hand_in(
            c.lease, c.anna.signed(c.anna.message(c.lease, c.delta, worker=c.ben.address), by=c.ben.wallet)
        ),
        "contribution.wrong_worker",
    ),
    "another job": (lambda c: c.hand_in(jobId=NEVER), "contribution.wrong_job"),
    "another round": (lambda c: c.hand_in(round=2), "contribution.wrong_round"),
    "another shard": (lambda c: c.hand_in(shard=c.lease["shard"] + 1), "contribution.wrong_round"),
    "another lease than the one it is sent to": (lambda c: c.hand_in(lease=NEVER), "lease.not_yours"),
    "a lease that never was": (
        lambda c: c.anna.hand_in({"lease": NEVER}, c.document(lease=NEVER)),
        "lease.unknown",
    ),
    "another worker's lease": (
        lambda c: c.ben.hand_in(c.lease, c.ben.signed(c.ben.message(c.lease, c.delta))),
        "lease.not_yours",
    ),
    "another start adapter": (lambda c: c.hand_in(startHash=NEVER), "contribution.wrong_start"),
    "another encoding": (lambda c: c.hand_in(encoding="int4"), "contribution.encoding"),
    "no micro-batch of its segments": (
        lambda c: c.anna.hand_in(c.lease, without(c.document(), "micro_tokens")),
        "contribution.segments",
    ),
    "a segment too few": (lambda c: told(c, [128] * (STEPS - 1)), "contribution.segments"),
    "a segment too many": (lambda c: told(c, [128] * (STEPS + 1)), "contribution.segments"),
    "a micro-batch of nothing": (lambda c: told(c, [128, 0, 128, 128]), "http.bad_request"),
    "a delta that was never uploaded": (lambda c: c.hand_in(deltaHash=NEVER), "delta.missing"),
    "an unknown field": (lambda c: c.anna.hand_in(c.lease, {**c.document(), "bonus": 1}), "http.bad_request"),
    "an unknown signed field": (
        lambda c: c.anna.hand_in(c.lease, {**c.document(), "contribution": {**c.document()["contribution"], "tip": 1}}),
        "http.bad_request",
    ),
    "a number as text": (
        lambda c: c.anna.hand_in(
            c.lease, {**c.document(), "contribution": {**c.document()["contribution"], "round": "1"}}
        ),
        "http.bad_request",
    ),
}
BYTES: dict[str, tuple[Callable[[Case], httpx.Response], str]] = {
    "sent under another digest": (
        lambda c: c.anna.put(f"/v1/leases/{c.lease['lease']}/objects/{'ab' * 32}", c.delta),
        "delta.wrong_digest",
    ),
    "sent under no digest": (
        lambda c: c.anna.put(f"/v1/leases/{c.lease['lease']}/objects/my-delta", c.delta),
        "delta.wrong_digest",
    ),
    "sent to another worker's lease": (lambda c: c.ben.upload(c.lease, c.delta), "lease.not_yours"),
    "sent to a lease that never was": (lambda c: c.anna.upload({"lease": NEVER}, c.delta), "lease.unknown"),
    "empty": (lambda c: c.anna.contribute(c.lease, b""), "delta.not_safetensors"),
    "not safetensors": (lambda c: c.anna.contribute(c.lease, b"PK\x03\x04 a zip"), "delta.not_safetensors"),
    "a pickle": (lambda c: c.anna.contribute(c.lease, b"\x80\x04cos\nsystem\n."), "delta.not_safetensors"),
    "truncated": (lambda c: c.anna.contribute(c.lease, c.delta[:-5]), "delta.not_safetensors"),
    "with bytes to spare": (lambda c: c.anna.contribute(c.lease, c.delta + b"\0" * 4), "delta.not_safetensors"),
    "with a header that claims 2^62 bytes": (
        lambda c: c.anna.contribute(c.lease, (2**62).to_bytes(8, "little") + b"{}"),
        "delta.not_safetensors",
    ),
    "over the cap": (lambda c: c.anna.upload(c.lease, b"\0" * (CAP + 1)), "delta.too_large"),
}
TENSORS: dict[str, tuple[Callable[[Case], httpx.Response], str]] = {
    "lacking a tensor": (
        lambda c: c.anna.contribute(c.lease, adapter_bytes(without(numbers(1), FIRST))),
        "delta.missing_tensor",
    ),
    "with none": (lambda c: c.anna.contribute(c.lease, adapter_bytes({})), "delta.missing_tensor"),
    "with one more": (lambda c: c.hand_in_tensors(lm_head=np.zeros(2, np.float32)), "delta.extra_tensor"),
    "of another shape": (
        lambda c: c.hand_in_tensors(**{FIRST: np.zeros((3, 6), np.float32)}),
        "delta.wrong_shape",
    ),
    "of a transposed shape": (
        lambda c: c.hand_in_tensors(**{FIRST: np.zeros(SHAPES[FIRST][::-1], np.float32)}),
        "delta.wrong_shape",
    ),
    "in half precision": (
        lambda c: c.hand_in_tensors(**{FIRST: np.zeros(SHAPES[FIRST], np.float16)}),
        "delta.wrong_dtype",
    ),
    "in integers": (
        lambda c: c.hand_in_tensors(**{LAST: np.zeros(SHAPES[LAST], np.int64)}),
        "delta.wrong_dtype",
    ),
    "with a NaN": (
        lambda c: c.hand_in_tensors(**{LAST: np.full(SHAPES[LAST], np.nan, np.float32)}),
        "delta.not_finite",
    ),
    "with an infinity": (
        lambda c: c.hand_in_tensors(**{LAST: np.full(SHAPES[LAST], -np.inf, np.float32)}),
        "delta.not_finite",
    ),
    "out of the optimizer's reach": (
        lambda c: c.hand_in_tensors(**{LAST: np.full(SHAPES[LAST], REACH * 1.01, np.float32)}),
        "delta.out_of_reach",
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_contribution_counts_only_with_its_worker_s_signature(case: Case, name: str) -> None:
    refused(case, *SIGNATURES[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_contribution_is_refused_that_names(case: Case, name: str) -> None:
    refused(case, *NAMES[name])


@pytest.mark.parametrize("name", BYTES)
def test_a_delta_is_refused_that_is(case: Case, name: str) -> None:
    refused(case, *BYTES[name])


@pytest.mark.parametrize("name", TENSORS)
def test_a_delta_is_refused_with_tensors(case: Case, name: str) -> None:
    refused(case, *TENSORS[name])


def test_a_delta_at_the_very_edge_of_reach_is_accepted(case: Case) -> None:
    edge = np.float32(REACH) if float(np.float32(REACH)) <= REACH else np.nextafter(np.float32(REACH), np.float32(0))

    answer = case.anna.contribute(case.lease, {**numbers(3), LAST: np.full(SHAPES[LAST], edge, np.float32)})

    assert answer.status_code == 200


def test_a_shard_is_accepted_once_whoever_else_held_it(case: Case) -> None:
    case.town.clock.forward(LEASE_SECONDS + 1)
    offers = iter(lambda: case.ben.lease(case.job), None)
    again = next(offer for offer in offers if offer["shard"] == case.lease["shard"])
    assert case.ben.contribute(again).status_code == 200
    before = case.rows()

    insist(case.hand_in(), "shard.already_accepted")

    assert case.rows() == before


def test_a_repeat_is_answered_with_the_receipt_it_had(case: Case) -> None:
    first = case.hand_in().raise_for_status().json()
    before = case.rows()

    again = insist(case.hand_in(), "contribution.repeat")

    assert again["receipt"] == first
    assert case.rows() == before


def test_another_contribution_for_an_accepted_lease_is_refused(case: Case) -> None:
    case.hand_in().raise_for_status()
    before = case.rows()

    insist(case.anna.contribute(case.lease), "shard.already_accepted")

    after = case.rows()
    assert after[2][0].pop("second") is not None  # told, and of no consequence here
    assert before[2][0].pop("second") is None
    assert after == before


def test_the_same_bytes_count_for_one_shard_only(case: Case) -> None:
    other = case.ben.must_lease(case.job)
    case.hand_in().raise_for_status()
    before = case.rows()

    document = insist(case.ben.contribute(other, case.delta), "contribution.repeat")

    assert "receipt" not in document
    assert case.rows() == before
    assert case.ben.contribute(other).status_code == 200


def test_what_is_two_rounds_late_is_not_taken_any_more(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(rounds=3, round_deadline=60)
    lease, delta = anna.must_lease(job), adapter_bytes(numbers(1))
    anna.upload(lease, delta).raise_for_status()
    for _ in range(2):
        ben.work(job)
        town.clock.forward(61)
        town.tick()
    before = [town.rows(table, job=job.id) for table in (schema.rounds, schema.shards, schema.leases)]

    answer = anna.hand_in(lease, anna.signed(anna.message(lease, delta)))
    insist(answer, "contribution.too_late")
    assert "of round 1, and round 3 is open" in answer.json()["detail"]
    insist(anna.upload(lease, delta), "contribution.too_late")
    assert not [row for row in town.rows(schema.objects, job=job.id) if row["digest"] == sha256(delta)]

    assert [town.rows(table, job=job.id) for table in (schema.rounds, schema.shards, schema.leases)] == before
    assert anna.work(job)["round"] == 3


def test_a_settled_job_takes_nothing_more(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(rounds=1)
    late = anna.must_lease(job)
    ben.work(job)
    town.clock.forward(job.recipe.pay.deadline + 1)
    town.tick()
    assert job.state == "settled"

    insist(anna.contribute(late), "job.closed")

    assert len(town.rows(schema.contributions, job=job.id)) == 1


def raw(town: Town, head: list[str], body: bytes = b"", *, hang_up: bool = False) -> tuple[int, dict[str, Any]]:
    """Send these bytes and read one answer; `hang_up` sends nothing more after them."""
    with socket.create_connection(("127.0.0.1", int(town.host.partition(":")[2])), timeout=30) as connection:
        connection.sendall("\r\n".join([*head, f"host: {town.host}", "", ""]).encode() + body)
        if hang_up:
            connection.shutdown(socket.SHUT_WR)
        answer = httpx.Response(0)
        with connection.makefile("rb") as file:
            status = file.readline()
            if not status:
                return 0, {}
            headers = {}
            while line := file.readline().strip().decode():
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            answer = httpx.Response(int(status.split()[1]), content=file.read(int(headers.get("content-length", -1))))
    try:
        return answer.status_code, answer.json()
    except ValueError:
        return answer.status_code, {}


def put_head(case: Case, *lines: str) -> list[str]:
    path = f"/v1/leases/{case.lease['lease']}/objects/{sha256(case.delta)}"
    return [f"PUT {path} HTTP/1.1", f"authorization: {case.anna.headers['authorization']}", *lines]


def test_a_declared_size_over_the_cap_is_refused_before_a_byte_is_sent(case: Case) -> None:
    before = case.rows()

    for size in (CAP + 1, 10**18):
        status, document = raw(case.town, put_head(case, f"content-length: {size}"))
        assert (status, document["code"]) == (413, "delta.too_large")

    assert case.rows() == before
    assert case.honest().status_code == 200


def test_a_body_without_its_length_is_refused(case: Case) -> None:
    before = case.rows()

    status, document = raw(case.town, put_head(case, "transfer-encoding: chunked"))

    assert (status, document["code"]) == (411, "http.length_required")
    assert case.rows() == before
    assert case.honest().status_code == 200


def test_a_length_that_promises_too_little_gives_a_wrong_digest(case: Case) -> None:
    lines = (f"content-length: {len(case.delta) - 9}", "connection: close")

    status, document = raw(case.town, put_head(case, *lines), case.delta)

    assert (status, document["code"]) == (422, "delta.wrong_digest")
    assert case.honest().status_code == 200


def test_a_length_that_promises_too_much_stores_nothing(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    fresh = adapter_bytes(numbers(secrets.randbits(60)))
    head = put_head(case, f"content-length: {len(fresh)}")
    head[0] = head[0].replace(sha256(case.delta), sha256(fresh))

    status, _ = raw(case.town, head, fresh[:-1], hang_up=True)

    assert status in (0, 400, 422)
    assert caplog.text == "", "a worker whose line breaks is no bug of the hub's"
    assert case.town.hub.objects.size(sha256(fresh)) is None
    assert case.honest().status_code == 200


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "", "9" * 5000, "12, 13"])
def test_a_length_that_is_none_is_refused(case: Case, length: str) -> None:
    status, _ = raw(case.town, put_head(case, f"content-length: {length}"))

    assert 400 <= status < 500
    assert case.honest().status_code == 200


def test_a_body_over_its_cap_is_refused(case: Case) -> None:
    document = {**case.document(), "signature": "0" * SIGNED_BODY}

    refused(case, lambda c: c.anna.hand_in(c.lease, document), "http.too_large")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'"text"', b"[" * 60_000])
def test_a_body_that_is_no_contribution_is_refused(case: Case, body: bytes) -> None:
    path = f"/v1/leases/{case.lease['lease']}/contribution"

    refused(case, lambda c: c.anna.request("POST", path, content=body), "http.bad_request")


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer nonsense", "Basic YTpi", "Bearer " + "00" * 32])
def test_without_a_session_nothing_is_taken(case: Case, header: str) -> None:
    path = f"/v1/leases/{case.lease['lease']}/contribution"

    def send(case: Case) -> httpx.Response:
        return case.town.http.post(case.town.url + path, json=case.document(), headers={"authorization": header})

    refused(case, send, "session.required")


def test_a_session_ends(town: Town) -> None:
    headers = town.person().headers
    assert town.http.get(f"{town.url}/v1/earned", headers=headers).status_code == 200
    town.clock.forward(24 * 3600 + 1)

    insist(town.http.get(f"{town.url}/v1/earned", headers=headers), "session.required")


@pytest.mark.parametrize("version", ["0", str(PROTOCOL - 1), str(PROTOCOL + 1), f"{PROTOCOL}.0", "four", ""])
def test_another_protocol_is_refused_with_the_command_that_helps(case: Case, version: str) -> None:
    path = f"/v1/leases/{case.lease['lease']}/contribution"

    def send(case: Case) -> httpx.Response:
        headers = {"trainchain-protocol": version}
        answer = case.anna.request("POST", path, json=case.document(), headers=headers)
        assert "upgrade" in answer.json()["hint"]
        return answer

    refused(case, send, "hub.protocol")


@pytest.mark.parametrize(
    "changes",
    [
        {"nonce": "ab" * 16},
        {"domain": "evil.example"},
        {"uri": "http://evil.example"},
        {"uri": "http://[broken"},
        {"chain_id": 1},
        {"expiration_time": datetime.fromtimestamp(1_700_000_000, UTC).isoformat()},
        {"expiration_time": "tomorrow"},
        {"expiration_time": "0001-01-01T00:00:00"},
    ],
    ids=str,
)
def test_a_sign_in_is_refused_with(anna: Person, changes: dict[str, Any]) -> None:
    insist(anna.post_sign_in(anna.sign_in_fields(**changes)), "session.refused")

    assert anna.post_sign_in(anna.sign_in_fields()).status_code == 200


def test_a_sign_in_by_another_wallet_is_refused(anna: Person) -> None:
    insist(anna.post_sign_in(anna.sign_in_fields(), by=new_wallet()), "session.refused")


def test_a_nonce_is_good_once(anna: Person) -> None:
    fields = anna.sign_in_fields()
    assert anna.post_sign_in(fields).status_code == 200

    insist(anna.post_sign_in(fields), "session.refused")


def test_a_nonce_is_good_for_minutes(town: Town, anna: Person) -> None:
    fields = anna.sign_in_fields()
    town.clock.forward(301)

    insist(anna.post_sign_in(fields), "session.refused")


def test_a_failed_sign_in_does_not_use_a_nonce_up(anna: Person) -> None:
    fields = anna.sign_in_fields()
    insist(anna.post_sign_in(fields, by=new_wallet()), "session.refused")

    assert anna.post_sign_in(fields).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/v1/nothing", "http.not_found"),
        ("DELETE", "/v1/jobs", "http.not_found"),
        ("GET", "/v1/jobs/nobody", "job.unknown"),
        ("GET", "/v1/jobs/nobody/recipe", "job.unknown"),
        ("GET", "/v1/jobs/nobody/events", "job.unknown"),
        ("GET", "/v1/objects/../../../etc/passwd", "http.not_found"),
        ("GET", "/v1/objects/..%2f..%2fetc%2fpasswd", "http.not_found"),
        ("GET", "/v1/objects/" + "ab" * 32, "object.unknown"),
        ("PUT", f"/v1/jobs/{NEVER}/objects/{'ab' * 32}", "job.unknown"),
        ("POST", f"/v1/jobs/{NEVER}/fund", "job.unknown"),
        ("DELETE", f"/v1/leases/{NEVER}", "lease.unknown"),
        ("POST", f"/v1/leases/{NEVER}/beat", "lease.unknown"),
    ],
)
def test_what_is_not_there_is_said_to_be_not_there(anna: Person, method: str, path: str, code: str) -> None:
    options = {"json": {}} if method == "POST" else {}

    insist(anna.request(method, path, **options), code)


@pytest.mark.parametrize(
    "query", ["after=x", "after=-1", f"after={2**70}", "wait=x", "wait=nan", "wait=inf", "wait=-1"]
)
def test_a_senseless_query_is_refused(anna: Person, job: Job, query: str) -> None:
    insist(anna.get(f"/v1/jobs/{job.id}/events?{query}"), "http.bad_request")


def test_a_loss_that_is_no_number_is_refused(case: Case) -> None:
    body = json.dumps({**case.document(), "losses": [math.nan, math.inf]}).encode()

    answer = case.anna.request("POST", f"/v1/leases/{case.lease['lease']}/contribution", content=body)

    insist(answer, "http.bad_request")


@pytest.mark.parametrize(
    "change",
    [
        {"training": {"max_grad_norm": math.inf}},
        {"training": {"adam_beta1": math.nan}},
        {"training": {"learning_rate": -1.0}},
        {"steps": 100_001},
        {"steps": 2**62},
        {"quorum": 0.0},
        {"quorum": 1.5},
        {"rounds": 3},
        {"shards": 7},
        {"base_model": {"files": []}},
        {"counts": []},
        {"name": "../../etc"},
        {"name": "\x1b[31mred"},
        {"name": ""},
        {"name": "a" * 65},
    ],
    ids=str,
)
def test_a_recipe_is_refused_that_does_not_hold_together(anna: Person, job: Job, change: dict[str, Any]) -> None:
    made = job.recipe.model_dump(mode="json")
    changed = {key: {**made[key], **value} if isinstance(value, dict) else value for key, value in change.items()}
    body = json.dumps({"recipe": {**made, **changed}, "salt": NEVER}).encode()

    answer = anna.request("POST", "/v1/jobs", content=body)

    malformed = "name" in change or not all(math.isfinite(value) for value in change.get("training", {}).values())
    insist(answer, "http.bad_request" if malformed else "job.invalid")


def test_a_budget_below_the_price_is_refused(anna: Person, job: Job) -> None:
    made = job.recipe.model_dump(mode="json")
    document = {"recipe": {**made, "pay": {**made["pay"], "budget": "1"}}, "salt": NEVER}

    insist(anna.post("/v1/jobs", document), "money.budget_too_small")


def test_a_chain_request_that_is_too_deep_is_refused(anna: Person) -> None:
    for body in (b"[" * 200_000, b'{"a":' * 100_000):
        assert anna.request("POST", "/chain", content=body).status_code < 500


WORDS = st.none() | st.booleans() | st.integers() | st.integers(2**62, 2**140) | st.floats() | st.text(max_size=40)
VALUES = st.recursive(WORDS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner))
NAUGHTY = st.one_of(
    VALUES,
    st.sampled_from(["0x" + "00" * 32, "0x" + "g" * 64, "\ud800", "\0", "a" * 3000, "http://[", "../..", "1e999"]),
)
ROUTES = [
    ("POST", "/v1/session/nonce"),
    ("POST", "/v1/session"),
    ("POST", "/v1/faucet"),
    ("POST", "/chain"),
    ("POST", "/v1/jobs"),
    ("PUT", "/v1/jobs/{job}/objects/{digest}"),
    ("POST", "/v1/jobs/{job}/fund"),
    ("POST", "/v1/leases"),
    ("POST", "/v1/leases/{lease}/beat"),
    ("PUT", "/v1/leases/{lease}/objects/{digest}"),
    ("POST", "/v1/leases/{lease}/contribution"),
    ("POST", "/v1/leases/{lease}/evaluation"),
    ("POST", "/v1/leases/{lease}/keys"),
]


@pytest.fixture(scope="module")
def target(town: Town) -> Case:
    """A private job with a held lease of its own, to throw things at."""
    anna, job = town.person(), town.publish_sealed(rounds=1, shards=1, round_deadline=AGES, pay_deadline=AGES)
    return Case(town, job, anna, town.person(), anna.must_lease(job), adapter_bytes(numbers(5)))


def good_documents(case: Case) -> dict[str, Any]:
    fields = {**dict.fromkeys(("domain", "uri"), case.town.host), "address": case.anna.address, "chain_id": 1}
    fields |= {"nonce": "ab" * 16, "issued_at": "x", "expiration_time": "2030-01-01T00:00:00Z"}
    call = {"to": case.town.chain.escrow, "data": "0x"}
    return {
        "/v1/session": {"fields": {**fields, "uri": case.town.url}, "signature": "0x" + "11" * 65},
        "/v1/faucet": {"tokens": False},
        "/chain": {"jsonrpc": "2.0", "id": 1, "method": "eth_call", "params": [call, "latest"]},
        "/v1/jobs": {
            "recipe": case.job.recipe.model_dump(mode="json"),
            "salt": NEVER,
            "keys": case.town.wrapped(case.town.chain.job_id(case.anna.address, NEVER), case.job.identities),
        },
        "/v1/leases": {"job": case.job.id, "skip": [NEVER], "wait": 0.0},
        "/v1/leases/{lease}/beat": {"step": 1, "steps": 2, "tokens_per_second": 1.0},
        "/v1/leases/{lease}/contribution": case.document(),
        "/v1/leases/{lease}/evaluation": {"loss": 1.0, "samples": ["an answer"]},
        "/v1/leases/{lease}/keys": case.anna.exchange_request(),
    }


def send(case: Case, method: str, path: str, body: bytes) -> int:
    where = path.format(job=case.job.id, lease=case.lease["lease"], digest=sha256(case.delta))
    return case.anna.request(method, where, content=body).status_code


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(ROUTES), st.binary(max_size=300) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_whatever_make_a_route_fail(target: Case, route: tuple[str, str], body: bytes) -> None:
    assert send(target, *route, body) < 500


def test_the_good_documents_are_good(target: Case) -> None:
    """Or what is changed in them would be refused for something else."""
    documents = good_documents(target)

    for path in ("/v1/jobs", "/v1/leases", "/v1/leases/{lease}/beat", "/v1/leases/{lease}/keys"):
        assert send(target, "POST", path, json.dumps(documents[path]).encode()) < 300, path


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.data())
def test_no_changed_value_makes_a_route_fail(target: Case, data: st.DataObject) -> None:
    """Good documents with one value replaced, dropped or added: what a parser alone does not catch."""
    documents = good_documents(target)
    path = data.draw(st.sampled_from(sorted(documents)), label="path")
    document = json.loads(json.dumps(documents[path]))
    place: Any = document
    key: Any = data.draw(st.sampled_from(sorted(place)), label="key")
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans(), label="deeper"):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))), label="key")
    place[key] = data.draw(NAUGHTY, label="value")

    assert send(target, "POST", path, json.dumps(document).encode()) < 500
