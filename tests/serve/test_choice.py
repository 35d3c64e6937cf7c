"""Log-probabilities of a reply that stops before a text: they are those of the reply's own tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from outsize.sampling.logprobs import TokenLogprob
from outsize.serve.choice import HeldTokens


@given(
    st.lists(st.text("ab", min_size=0, max_size=3), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=2),
)
def test_what_is_given_makes_the_text(pieces: list[str], stops: list[str]) -> None:
    """However the tokens cut it: joined, those given are the text before the first stop string, or its last
    token holds the stop string's beginning; and none is given before that is certain."""
    held = HeldTokens(lambda token: pieces[token].encode(), stops)
    given_, full = list[TokenLogprob](), ""
    stop = None
    for i, piece in enumerate(pieces):
        held.push([TokenLogprob(i, -1.0)])
        full += piece
        found = [(full.index(s), s) for s in stops if s in full]
        if found:
            stop = min(found)[1]
            break
        given_ += held.take()
    before = full if stop is None else full[: full.index(stop)]
    early = "".join(pieces[t.token] for t in given_)
    assert before.startswith(early)
    given_ += held.rest(stop)
    joined = "".join(pieces[t.token] for t in given_)
    assert joined.startswith(before)
    assert full.startswith(joined)
    if stop is not None and given_:
        assert len(joined) - len(pieces[given_[-1].token]) <= len(before)
