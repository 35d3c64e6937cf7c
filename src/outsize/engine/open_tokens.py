"""A pack's tokenizer, checked."""

from __future__ import annotations

import zlib

from outsize.checkpoint.tokenizer import lean
from outsize.pack import tokenizer_file
from outsize.pack.format import Pack, damaged
from outsize.text.tokens import Tokens


def tokens(made: Pack) -> Tokens:
    raw = tokenizer_file.read(made.path)
    if zlib.crc32(raw) != made.tokenizer_crc:
        raise damaged(made.path, "its tokenizer does not match its checksum")
    try:
        return Tokens(lean(raw.decode()), made.bos, made.add_bos, made.description.vocab_size)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as e:  # the library raises bare Exception, and panics
        raise damaged(made.path, f"its tokenizer cannot be read ({str(e)[:200]})") from None
