"""Money that nobody may lose, steal or burn: work that is worth nothing, vouchers beside leaves, owners who change
hands, and strangers who would have the hub pay their gas."""

import pytest

from tests.fixtures_hub import Person, Town
from tests.integration.hub.test_vouchers import amounts, away, voucher_of, work


def test_a_job_whose_work_is_worth_nothing_comes_to_its_end(town: Town, anna: Person) -> None:
    job = town.publish(rounds=2, shards=1, per_million=1, budget=10)

    receipts = work(job, anna, 2)

    assert amounts(receipts) == [0, 0]
    assert job.state == "settled"
    assert town.chain.settlements(job.id) == []
    (told,) = [one for one in anna.get("/v1/earned").json()["jobs"] if one["job"] == job.id]
    assert (told["accepted"], told["settled"], told["ended"]) == ("0", "0", True)
