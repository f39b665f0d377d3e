"""The hub over HTTP: each route parses, calls one verb in a thread, answers. Errors become problem documents."""

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from trainchain import __version__
from trainchain.core.errors import TrainChainError
from trainchain.core.hub import (
    access,
    audits,
    contributions,
    faucet,
    jobs,
    keys,
    leases,
    relay,
    replays,
    sessions,
    shows,
    views,
    vouchers,
)
from trainchain.core.hub.service import Hub
from trainchain.core.messages import Answer, SignedContribution, SignedReplay
from trainchain.core.models import MAX_INT, PROTOCOL, Model, parse
from trainchain.core.objects import Spool

log = logging.getLogger(__name__)

SMALL_BODY = 64 << 10
SIGNED_BODY = 1 << 20
"""A contribution tells of each of its segments."""
REPORT_BODY = 2 << 20
"""An evaluation holds the answers to the sample prompts."""
RECIPE_BODY = 64 << 20
CHAIN_BODY = 1 << 20
CLAIMS_BODY = 1 << 20
MAX_WAIT = 25.0

After = Annotated[int, Query(ge=0, le=MAX_INT)]
Wait = Annotated[float, Query(ge=0, le=30)]
M = TypeVar("M", bound=Model)


def problem(error: TrainChainError) -> JSONResponse:
    """An RFC 9457 problem document with our stable `code`, the `hint`, and the facts."""
    document = {
        "type": "about:blank",
        "title": error.reason.meaning,
        "status": error.status,
        "detail": error.message,
        "code": error.code,
        "hint": error.hint,
        **error.facts,
    }
    size = error.facts.get("size")
    headers = {"content-range": f"bytes */{size}"} if error.code == "http.range" else None
    return JSONResponse(document, error.status, headers, media_type="application/problem+json")


async def read_into(request: Request, spool: Spool) -> None:
    """Stream a body into `spool`. A declared length above the cap is refused before anything is read."""
    declared = request.headers.get("content-length")
    if declared is None:
        raise TrainChainError("http.length_required", "Send a Content-Length with the body.")
    if not declared.isdigit() or int(declared) > spool.cap:
        spool.size = spool.cap
        spool.write(b"x")
    async for chunk in request.stream():
        spool.write(chunk)


async def body(request: Request, cap: int = SMALL_BODY) -> bytes:
    spool = Spool(cap)
    with contextlib.closing(spool):
        await read_into(request, spool)
        return spool.rewound().read()


async def parsed(request: Request, model: type[M], cap: int = SMALL_BODY) -> M:
    return parse(model, await body(request, cap), code="http.bad_request", what="The request")


def range_start(header: str | None, size: int) -> int | None:
    """The first byte that is asked for; None for all of them. One form of RFC 9110 is known, `bytes=N-`."""
    if header is None:
        return None
    found = re.fullmatch(r"bytes=([0-9]{1,19})-", header)
    if found is None or int(found[1]) >= size:
        raise TrainChainError(
            "http.range", f"{header[:60]!r} is no range of an object of {size} bytes; bytes=N- is known.", size=size
        )
    return int(found[1])


async def same_protocol(request: Request) -> None:
    """Whoever names a protocol version must name ours."""
    spoken = request.headers.get("trainchain-protocol", str(PROTOCOL))
    if spoken != str(PROTOCOL):
        raise TrainChainError(
            "hub.protocol",
            f"This hub speaks protocol {PROTOCOL}, not {spoken[:20]}.",
            hint="pip install --upgrade trainchain",
        )


def create_app(hub: Hub) -> FastAPI:
    """The ASGI application of one hub process."""
    app = FastAPI(
        title="TrainChain hub",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        dependencies=[Depends(same_protocol)],
    )
    thread = run_in_threadpool
    exchange = hub.introduction()

    @app.exception_handler(TrainChainError)
    async def expected(_: Request, error: TrainChainError) -> Response:
        return problem(error)

    @app.exception_handler(HTTPException)
    async def unrouted(_: Request, error: HTTPException) -> Response:
        code = "http.not_found" if error.status_code in (404, 405) else "http.bad_request"
        return problem(TrainChainError(code, f"{error.detail}."))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return problem(TrainChainError("http.bad_request", f"{first['loc'][-1]}: {first['msg']}."))

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return problem(TrainChainError("http.bad_request", "The body broke off."))

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return problem(TrainChainError("hub.failed", "The hub failed on this request; its log has the details."))

    async def wallet(request: Request) -> str:
        return await thread(sessions.wallet_of, hub, request.headers.get("authorization"))

    async def asker(request: Request) -> str | None:
        """Who asks, where that makes a difference to the answer; a session that is over makes nobody of them."""
        return await thread(sessions.wallet_if_any, hub, request.headers.get("authorization"))

    async def wait_for(look: Callable[[], Any], seconds: float) -> Any:
        """Long-poll: look now and whenever the bell rings, until something is found or the time is up."""
        loop, rung = asyncio.get_running_loop(), asyncio.Event()

        def ring() -> None:
            with contextlib.suppress(RuntimeError):  # the loop may be closing
                loop.call_soon_threadsafe(rung.set)

        until = loop.time() + min(seconds, MAX_WAIT)
        hub.bell.listen(ring)
        try:
            while True:
                rung.clear()
                found = await thread(look)
                left = until - loop.time()
                if found or left <= 0 or hub.bell.closed:
                    return found
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(rung.wait(), min(left, 1.0))
        finally:
            hub.bell.forget(ring)

    @app.get("/v1/hub")
    async def describe() -> dict[str, Any]:
        told = {"protocol": PROTOCOL, "version": __version__, "exchange": exchange, "chain": hub.chain.describe()}
        return told | {"auditors": sorted(hub.evaluators)}

    @app.post("/v1/session/nonce")
    async def nonce() -> dict[str, Any]:
        return {"nonce": await thread(sessions.new_nonce, hub)}

    @app.post("/v1/session")
    async def sign_in(request: Request) -> dict[str, Any]:
        asked = await parsed(request, sessions.SignIn)
        host = request.headers.get("host", "")
        token, address, expires = await thread(sessions.sign_in, hub, asked, host)
        return {"token": token, "address": address, "expires": expires}

    @app.post("/v1/faucet")
    async def grant(request: Request) -> dict[str, Any]:
        address = await wallet(request)
        return await thread(faucet.grant, hub, address, await parsed(request, faucet.GrantRequest))

    @app.post("/chain")
    async def chain(request: Request) -> Response:
        answer = await thread(hub.chain.rpc, await body(request, CHAIN_BODY))
        return Response(answer, media_type="application/json")

    @app.get("/v1/jobs")
    async def list_jobs() -> dict[str, Any]:
        return {"jobs": await thread(views.list_jobs, hub)}

    @app.post("/v1/jobs")
    async def publish(request: Request) -> dict[str, Any]:
        owner = await wallet(request)
        publication = await parsed(request, jobs.Publication, RECIPE_BODY)
        return await thread(jobs.publish, hub, owner, publication)

    @app.get("/v1/jobs/{name}")
    async def show_job(request: Request, name: str) -> dict[str, Any]:
        who = await asker(request)
        return await thread(lambda: views.show_job(hub, jobs.find(hub, name), who))

    @app.get("/v1/jobs/{job_id}/recipe")
    async def recipe(job_id: str) -> Response:
        return Response(await thread(jobs.spec_of, hub, job_id), media_type="application/json")

    @app.get("/v1/jobs/{job_id}/events")
    async def events(job_id: str, after: After = 0, wait: Wait = 0.0) -> dict[str, Any]:
        await thread(hub.job, job_id)
        return {"events": await wait_for(lambda: views.events_after(hub, job_id, after), wait)}

    @app.get("/v1/jobs/{job_id}/contributions")
    async def accepted(
        request: Request,
        job_id: str,
        round_: Annotated[int | None, Query(alias="round", ge=1, le=MAX_INT)] = None,
        after: After = 0,
        limit: Annotated[int, Query(ge=1, le=views.MAX_CONTRIBUTIONS)] = views.MAX_CONTRIBUTIONS,
    ) -> dict[str, Any]:
        if await thread(access.is_private, hub, job_id):
            await thread(access.insist_reader, hub, job_id, await wallet(request))
        return await thread(views.contributions_of, hub, job_id, round_, after, limit)

    @app.put("/v1/jobs/{job_id}/objects/{digest}")
    async def upload(request: Request, job_id: str, digest: str) -> dict[str, Any]:
        owner = await wallet(request)
        cap = await thread(jobs.object_cap, hub, owner, job_id, digest)
        with contextlib.closing(Spool(cap)) as spool:
            await read_into(request, spool)
            return await thread(jobs.keep_object, hub, job_id, digest, spool)

    @app.post("/v1/jobs/{job_id}/fund")
    async def fund(job_id: str) -> dict[str, Any]:
        return await thread(jobs.fund, hub, job_id)

    @app.post("/v1/jobs/{job_id}/cancel")
    async def cancel(request: Request, job_id: str) -> dict[str, Any]:
        return await thread(jobs.cancel, hub, await wallet(request), job_id)

    @app.get("/v1/objects/{digest}")
    async def download(request: Request, digest: str) -> Response:
        public = await thread(access.is_public, hub, digest)
        kept_back = await thread(shows.is_kept_back, hub, digest)
        if kept_back or (not public and not await thread(access.may_read, hub, await wallet(request), digest)):
            raise TrainChainError("object.unknown", f"There is no object {digest[:64]} for you here.")
        size = await thread(hub.objects.size, digest)
        if size is None:
            raise TrainChainError("object.unknown", f"The hub no longer has the object {digest}.")
        start = range_start(request.headers.get("range"), size)
        headers = {"content-length": str(size - (start or 0)), "accept-ranges": "bytes"}
        if start is not None:
            headers["content-range"] = f"bytes {start}-{size - 1}/{size}"
        status = 200 if start is None else 206
        return StreamingResponse(hub.objects.stream(digest, start or 0), status, headers)

    @app.get("/v1/earned")
    async def earned(request: Request) -> dict[str, Any]:
        return {"jobs": await thread(views.earned, hub, await wallet(request))}

    @app.get("/v1/jobs/{job_id}/voucher")
    async def voucher(request: Request, job_id: str) -> dict[str, Any]:
        return await thread(vouchers.voucher_of, hub, job_id, await wallet(request))

    @app.post("/v1/claims")
    async def claim(request: Request) -> dict[str, Any]:
        return await thread(relay.relay, hub, await parsed(request, relay.Claims, CLAIMS_BODY))

    @app.post("/v1/leases")
    async def take(request: Request) -> Response:
        worker = await wallet(request)
        asked = await parsed(request, leases.LeaseRequest)
        lease = await wait_for(lambda: leases.take(hub, worker, asked.job, asked.skip, asked.only), asked.wait)
        return JSONResponse(lease) if lease else Response(status_code=204)

    @app.post("/v1/leases/{lease_id}/beat")
    async def beat(request: Request, lease_id: str) -> dict[str, Any]:
        worker = await wallet(request)
        return await thread(leases.beat, hub, worker, lease_id, await parsed(request, leases.Progress))

    @app.post("/v1/leases/{lease_id}/keys")
    async def release(request: Request, lease_id: str) -> dict[str, Any]:
        worker = await wallet(request)
        return await thread(keys.release, hub, worker, lease_id, await parsed(request, keys.KeyRequest))

    @app.delete("/v1/leases/{lease_id}")
    async def give_back(request: Request, lease_id: str) -> dict[str, Any]:
        await thread(leases.give_back, hub, await wallet(request), lease_id)
        return {"lease": lease_id}

    @app.put("/v1/leases/{lease_id}/objects/{digest}")
    async def upload_delta(request: Request, lease_id: str, digest: str) -> dict[str, Any]:
        worker = await wallet(request)
        cap = await thread(contributions.delta_cap, hub, worker, lease_id)
        with contextlib.closing(Spool(cap, too_large="delta.too_large")) as spool:
            await read_into(request, spool)
            return await thread(contributions.keep_delta, hub, worker, lease_id, digest, spool)

    @app.post("/v1/leases/{lease_id}/contribution")
    async def contribute(request: Request, lease_id: str) -> dict[str, Any]:
        worker = await wallet(request)
        signed = await parsed(request, SignedContribution, SIGNED_BODY)
        return await thread(contributions.contribute, hub, worker, lease_id, signed)

    @app.put("/v1/leases/{lease_id}/states/{index}")
    async def upload_state(
        request: Request, lease_id: str, index: Annotated[int, Path(ge=0, le=MAX_INT)]
    ) -> dict[str, Any]:
        who = await wallet(request)
        cap = await thread(audits.state_cap, hub, who, lease_id, index)
        with contextlib.closing(Spool(cap)) as spool:
            await read_into(request, spool)
            return await thread(audits.keep_state, hub, who, lease_id, index, spool)

    @app.post("/v1/leases/{lease_id}/answer")
    async def answer(request: Request, lease_id: str) -> dict[str, Any]:
        worker = await wallet(request)
        return await thread(audits.answer, hub, worker, lease_id, await parsed(request, Answer))

    @app.post("/v1/leases/{lease_id}/replay")
    async def replayed(request: Request, lease_id: str) -> dict[str, Any]:
        auditor = await wallet(request)
        return await thread(replays.hand_in, hub, auditor, lease_id, await parsed(request, SignedReplay))

    @app.get("/v1/audits")
    async def own_audits(request: Request) -> dict[str, Any]:
        return {"audits": await thread(shows.own, hub, await wallet(request))}

    @app.get("/v1/jobs/{job_id}/audits")
    async def audits_of(
        request: Request,
        job_id: str,
        after: After = 0,
        limit: Annotated[int, Query(ge=1, le=shows.MAX_AUDITS)] = shows.MAX_AUDITS,
    ) -> dict[str, Any]:
        if await thread(access.is_private, hub, job_id):
            await thread(access.insist_reader, hub, job_id, await wallet(request))
        return await thread(shows.audits_of, hub, job_id, after, limit)

    @app.get("/v1/jobs/{job_id}/evidence/{lease_id}")
    async def evidence(request: Request, job_id: str, lease_id: str) -> Response:
        if await thread(access.is_private, hub, job_id):
            await thread(access.insist_reader, hub, job_id, await wallet(request))
        who = await asker(request)
        return Response(await thread(shows.evidence, hub, job_id, lease_id, who), media_type="application/json")

    @app.post("/v1/leases/{lease_id}/evaluation")
    async def evaluation(request: Request, lease_id: str) -> dict[str, Any]:
        worker = await wallet(request)
        report = await parsed(request, contributions.EvaluationReport, REPORT_BODY)
        return await thread(contributions.evaluated, hub, worker, lease_id, report)

    return app
