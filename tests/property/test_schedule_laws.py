"""The learning rate is a pure function with few laws; whoever checks a delta relies on them."""

from hypothesis import given
from hypothesis import strategies as st

from tests.fixtures_hub import job_files
from tests.fixtures_hub import recipe as hub_recipe
from trainchain.core.models import ResolvedRecipe
from trainchain.core.schedule import learning_rate


def recipe_of(rounds: int, steps: int, **training: object) -> ResolvedRecipe:
    made = hub_recipe(job_files())
    given_ = made.training.model_copy(update=training)
    return made.model_copy(update={"rounds": rounds, "steps": steps, "training": given_})


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 30),
    st.integers(0, 15),
    st.sampled_from(["constant", "cosine"]),
)
def test_it_stays_between_zero_and_the_peak(
    rounds: int, steps: int, warmup: int, shard_warmup: int, scheduler: str
) -> None:
    recipe = recipe_of(
        rounds,
        steps,
        learning_rate=0.5,
        warmup_steps=warmup,
        shard_warmup_steps=shard_warmup,
        lr_scheduler=scheduler,
    )
    rates = [learning_rate(recipe, r, s) for r in range(1, rounds + 1) for s in range(1, steps + 1)]

    assert all(0 < rate <= 0.5 for rate in rates)
    if not shard_warmup:
        assert rates[:warmup] == sorted(rates[:warmup])
        assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if scheduler == "constant" and not shard_warmup:
        assert all(rate == 0.5 for rate in rates[warmup:])


def test_a_cosine_ends_near_zero_and_a_shard_warms_up_anew() -> None:
    recipe = recipe_of(4, 25, learning_rate=1.0, warmup_steps=0, shard_warmup_steps=5, lr_scheduler="cosine")

    assert learning_rate(recipe, 4, 25) < 0.001
    assert learning_rate(recipe, 2, 1) < 0.25 * learning_rate(recipe, 1, 25)
    assert learning_rate(recipe, 1, 5) > 0.99
    half = recipe_of(4, 25, learning_rate=1.0, warmup_steps=0, shard_warmup_steps=0, lr_scheduler="cosine")
    assert abs(learning_rate(half, 3, 1) - 0.5) < 1e-12
