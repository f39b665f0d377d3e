"""What Azure's clients raise becomes one of our errors, and no secret comes along."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainchain.core.errors import TrainChainError
from trainchain.core.sources.azureml_errors import asking, tried, without_secrets

KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq"
KEYS = st.text("ABCDEFGHIJKLMNOPabcdefghijklmnop0123456789+/=-_", min_size=43, max_size=90)


@given(KEYS)
def test_no_key_survives(key: str) -> None:
    for text in (
        f"GET https://a.blob.core.windows.net/c?sv=1&sig={key} failed",
        f"AccountKey={key};EndpointSuffix=x",
        f"client_secret: {key}",
        f"token {key} is wrong",
        f"Bearer {key}.{key}.{key}",
    ):
        assert key not in without_secrets(text)


def test_a_short_secret_is_known_by_its_name() -> None:
    for text in ("sig=abc%2B", "client_secret=p4ss", "password: p4ss", "https://a.b/c?code=p4ss&x=1"):
        assert "p4ss" not in without_secrets(text)
        assert "abc" not in without_secrets(text)


def test_what_was_tried_is_shown_line_by_line_and_cut() -> None:
    text = (
        "DefaultAzureCredential failed to retrieve a token from the included credentials.\n"
        "Attempted credentials:\n\tEnvironmentCredential: EnvironmentCredential authentication unavailable. "
        + "x y "
        * 100
        + f"\n\tAzureCliCredential: Azure CLI not found on path {KEY}\n"
        "To mitigate this issue, please refer to the troubleshooting guidelines here at https://aka.ms/x."
    )
    lines = tried(text).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "Attempted credentials",
        "EnvironmentCredential",
        "AzureCliCredential",
    ]
    assert all(len(line) <= 165 for line in lines)
    assert KEY not in tried(text)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (401, "source.token"),
        (403, "source.forbidden"),
        (404, "source.not_found"),
        (408, "source.unavailable"),
        (412, "source.changed"),
        (429, "source.unavailable"),
        (503, "source.unavailable"),
        (400, "source.unsupported"),
        (None, "source.unavailable"),
    ],
)
@pytest.mark.azure
def test_every_status_has_its_code_also_where_the_sdk_wraps_it(status: int | None, code: str) -> None:
    exceptions = pytest.importorskip("azure.core.exceptions", reason="azure-core is not installed")

    class Wrapped(Exception):
        pass

    def fail(wrapped: bool) -> None:
        error = exceptions.HttpResponseError(f"sig={KEY}")
        error.status_code = status
        if wrapped:
            raise Wrapped(f"sig={KEY}") from error
        raise error

    for wrapped in (False, True):
        with pytest.raises(TrainChainError) as told, asking("the model m", "Reader"):
            fail(wrapped)
        if status is not None or not wrapped:
            assert told.value.code == code
        assert KEY not in told.value.message + told.value.hint
        assert "the model m" in told.value.message


@pytest.mark.azure
def test_a_connection_that_fails_and_a_bug_are_not_the_same() -> None:
    exceptions = pytest.importorskip("azure.core.exceptions", reason="azure-core is not installed")
    for error, code in (
        (exceptions.ServiceRequestError("no route"), "source.unavailable"),
        (exceptions.ServiceResponseError("cut"), "source.unavailable"),
        (exceptions.ClientAuthenticationError("nobody"), "source.token"),
        (KeyError("credential"), "source.unsupported"),
    ):
        with pytest.raises(TrainChainError) as told, asking("the model m", "Reader"):
            raise error
        assert told.value.code == code
    with pytest.raises(TrainChainError, match="as it was"), asking("the model m", "Reader"):
        raise TrainChainError("source.unsafe", "as it was")
