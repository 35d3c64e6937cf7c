"""What `outsize adapt nested` measured of a pack's family, a row a member and one of the whole model.

python -m experiments.quality.nested_family NESTED-PACK --name smol -o FILE.jsonl"""

from __future__ import annotations

from dataclasses import asdict

from experiments.quality.nested_arms import sizes
from experiments.runs import arguments, record
from outsize.pack import fetch, nested_file


def main() -> None:
    args = arguments(__doc__, "nested", name="smol")
    pack = fetch.find(args.nested)
    assert pack is not None
    file = nested_file.of_pack(pack)
    assert file is not None
    a, (pieces, beside) = file.about, sizes(pack)
    said = {
        "model": args.name, "rank": a.rank, "labels": a.labels, "level": round(a.level, 4),
        "trained_tokens": a.trained_tokens, "minutes": a.minutes, "seed": a.seed, "text": a.text,
        "tokens": a.tokens, "pieces_bytes": pieces, "beside_bytes": beside,
    }  # fmt: skip
    whole = {"threshold": None, "share": 1.0, "perplexity": a.perplexity, "kl": 0.0, "agrees": 1.0}
    rows = [*({k: round(v, 4) for k, v in asdict(m).items()} for m in a.family), whole]
    for row in rows:
        record({**said, **row}, args.output)


if __name__ == "__main__":
    main()
