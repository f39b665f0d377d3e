import contextlib

from hypothesis import given
from hypothesis import strategies as st

from tests.fixtures_hub import recipe
from tests.fixtures_merge import PLAIN_MERGE
from trainchain.core.errors import TrainChainError
from trainchain.core.models import Check, Counts
from trainchain.core.money import parse, show
from trainchain.core.rewards import audit_price, job_price, replay_fee, round_cap, round_price, shard_reward

units = st.integers(0, 10**58 - 1)


@given(units)
def test_what_is_shown_reads_back_as_the_same_amount(amount):
    assert parse(show(amount)) == amount


@given(st.integers(0, 10**30), st.integers(0, 18))
def test_and_with_any_decimals(amount, decimals):
    assert parse(show(amount, decimals), decimals) == amount


@given(units)
def test_what_is_shown_is_the_shortest(amount):
    text = show(amount)
    assert not text.endswith(".")
    assert "." not in text or not text.endswith("0")
    assert text == "0" or not text.startswith("00")


@given(st.integers(-(10**40), 10**40))
def test_a_debt_is_the_amount_with_a_sign(amount):
    assert show(-amount) == (show(amount)[1:] if amount < 0 else ("-" if amount else "") + show(amount))


@given(st.text(max_size=30))
def test_any_text_is_an_amount_or_refused(text):
    with contextlib.suppress(TrainChainError):
        assert parse(text) >= 0


@st.composite
def jobs(draw):
    """A job whose shards pay what they like, and with how much of a quorum and of spares it runs."""
    rounds, shards = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    merge = PLAIN_MERGE.model_copy(update={"spares": draw(st.sampled_from([0.0, 0.4, 1.0]))})
    files = {"model.safetensors": b"", "train-0.jsonl": b""}
    made = recipe(files, rounds=rounds, shards=shards, merge=merge, quorum=draw(st.floats(0.01, 1)))
    tokens = st.lists(st.integers(0, 10**6), min_size=made.all_shards, max_size=made.all_shards)
    counts = [[Counts(rows=1, tokens=n, supervised=0) for n in draw(tokens)] for _ in range(rounds)]
    return made.model_copy(update={"counts": counts})


@given(jobs(), st.data())
def test_no_history_of_arrivals_asks_a_settlement_for_more_than_the_cap(job, data):
    """Any shards that make the quorum come in time, any others one round late; any rounds are settled together."""
    cap, last, total, before = round_cap(job), 0, 0, 0
    late = []
    for number in range(1, job.rounds + 1):
        order = data.draw(st.permutations(range(job.all_shards)))
        fewest = next(n for n in range(1, job.shards + 1) if n >= job.quorum * job.shards)
        in_time = data.draw(st.integers(fewest, job.all_shards))
        arrived = data.draw(st.integers(in_time, job.all_shards))
        total += sum(shard_reward(job, number, shard) for shard in order[:in_time])
        total += sum(shard_reward(job, number - 1, shard) for shard in late)
        late = order[in_time:arrived]
        if number == job.rounds:
            total += sum(shard_reward(job, number, shard) for shard in late)
        if number == job.rounds or data.draw(st.booleans()):
            assert total - before <= cap * (number - last)
            last, before = number, total
    assert total <= job_price(job) == sum(round_price(job, number) for number in range(1, job.rounds + 1))


@given(jobs())
def test_the_cap_holds_a_round_and_no_more_than_two(job):
    dearest = max(round_price(job, number) for number in range(1, job.rounds + 1))
    assert dearest <= round_cap(job) <= 2 * dearest


@given(jobs(), st.sampled_from([0.0, 0.05, 0.1, 0.3, 1.0]), st.integers(1, 9), st.integers(1, 60), st.data())
def test_audits_cost_their_share_and_replays_of_a_whole_shard_no_more_than_the_shard(job, spend, length, steps, data):
    check = Check(auditors="any", answer=3600, timeout=1800, before_merge=0, spend=spend)
    training = job.training.model_copy(update={"segment_steps": length})
    changed = {"check": check, "training": training, "steps": steps}
    job = job.model_copy(update=changed)
    number, shard = data.draw(st.integers(1, job.rounds)), data.draw(st.integers(0, job.all_shards - 1))
    fees = [replay_fee(job, number, shard, segment) for segment in range(job.segments)]

    assert all(fee >= 0 for fee in fees)
    assert sum(fees) <= shard_reward(job, number, shard)
    work = sum(shard_reward(job, number, shard) for shard in range(job.all_shards))
    assert round_price(job, number) == work + audit_price(job, number)
    assert audit_price(job, number) <= work * spend * (1 + 1e-9)


@given(jobs())
def test_where_nobody_audits_audits_cost_nothing(job):
    check = Check(auditors="none", answer=3600, timeout=1800, before_merge=0, spend=0.1)

    assert audit_price(job.model_copy(update={"check": check}), 1) == 0
