from hypothesis import given
from hypothesis import strategies as st

from trainchain.chain import eip712
from trainchain.chain.hexes import checksum, to_hex
from trainchain.chain.wallet import Wallet
from trainchain.core.errors import TrainChainError

WALLET = Wallet(b"\x21" * 32)
addresses = st.binary(min_size=20, max_size=20).map(lambda raw: checksum(to_hex(raw)))
KINDS = {
    "bytes32": st.binary(min_size=32, max_size=32).map(to_hex),
    "address": addresses,
    "string": st.text(max_size=20).filter(lambda text: text.isprintable()),
    **{f"uint{bits}": st.integers(0, 2**bits - 1) for bits in (48, 64, 128, 256)},
}
domains = st.builds(eip712.Domain, st.integers(1, 2**53), addresses)


def messages(name):
    return st.fixed_dictionaries({field: KINDS[kind] for kind, field in eip712.TYPES[name]})


def recovered(domain, name, message, signature):
    """The signer, or the reason why there is none."""
    try:
        return eip712.recover(domain, name, message, signature)
    except TrainChainError as problem:
        return problem.code


signed = st.sampled_from(sorted(eip712.TYPES)).flatmap(lambda name: st.tuples(st.just(name), messages(name)))


@given(domains, signed)
def test_what_is_signed_is_recovered(domain, named):
    name, message = named
    assert eip712.recover(domain, name, message, WALLET.sign_typed(domain, name, message)) == WALLET.address


@given(domains, signed, st.data())
def test_a_change_to_any_field_is_another_signer(domain, named, data):
    name, message = named
    kind, field = data.draw(st.sampled_from(eip712.TYPES[name]))
    other = data.draw(KINDS[kind].filter(lambda value: value != message[field]))
    signature = WALLET.sign_typed(domain, name, message)
    assert recovered(domain, name, {**message, field: other}, signature) != WALLET.address


@given(st.one_of(st.text(), st.binary(), st.none(), st.binary(min_size=65, max_size=65).map(to_hex)))
def test_no_bytes_raise_anything_but_a_bad_signature(signature):
    domain = eip712.Domain(1, "0x" + "00" * 20)
    found = recovered(domain, "CloseEarly", {"jobId": "0x" + "00" * 32}, signature)
    assert found == "contribution.bad_signature" or found.startswith("0x")
