"""The small model's own vocabulary: byte-level BPE in the layout that CLIPTokenizer reads (vocab.json, merges.txt).

Every word of the captions is one token; any other text still encodes, letter by letter or byte by byte.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Final

from training.data.vocabulary import COLOURS, COUNT_WORDS, OBJECTS, POSITIONS, STYLES, plural

START: Final = "<|startoftext|>"
END: Final = "<|endoftext|>"
END_OF_WORD: Final = "</w>"
MAX_LENGTH: Final = 24

GRAMMAR_WORDS: Final = """
a an and at background big bottom corner front huge in large left little next of on picture right small the tiny to top
with
"""
COMMON_WORDS: Final = """
photo drawing image emoji icon one four five some many very bright dark light colorful cute nice simple shape object
color colour plain solid flat side center centre middle above below under over near behind between by from it is are
this that these no not without for her his my your our their grey brown cyan magenta gold silver violet animal food
fruit face flower plant vehicle sky sea night day sun moon dog bird man woman person
"""


def caption_words() -> list[str]:
    """Every word that a caption of the picture program can hold, sorted."""
    words = {*GRAMMAR_WORDS.split(), *COLOURS, *OBJECTS, *STYLES, *COUNT_WORDS.values()}
    words |= {plural(name) for name in OBJECTS}
    words |= {word for position in POSITIONS for word in position.split()}
    return sorted(words)


def build_tokenizer(out_dir: str | Path) -> None:
    """Writes a folder for `CLIPTokenizer.from_pretrained`. The same call always writes the same bytes."""
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    merges = _merges([*caption_words(), *sorted(set(COMMON_WORDS.split()) - set(caption_words()))])
    letters = sorted(_byte_letters())
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    _write_json(folder / "special_tokens_map.json", special)
    config = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": MAX_LENGTH,
        "tokenizer_class": "CLIPTokenizer",
        **special,
    }
    _write_json(folder / "tokenizer_config.json", config)


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges, by rank, under which every word becomes one token.

    Words share prefixes: each is encoded with the merges found so far, then what is left is joined from the left.
    Joining from the left keeps every earlier word whole, since a new pair never ranks before an old one.
    """
    merges: dict[tuple[str, str], int] = {}
    for word in words:
        parts = _encode([*word[:-1], word[-1] + END_OF_WORD], merges)
        while len(parts) > 1:
            merges[parts[0], parts[1]] = len(merges)
            parts = _encode([*word[:-1], word[-1] + END_OF_WORD], merges)
    return list(merges)


def _encode(parts: list[str], merges: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding (Sennrich et al. 2016): the pair of lowest rank is joined first, until none is left."""
    while True:
        ranked = [(merges[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in merges]
        if not ranked:
            return parts
        _, i = min(ranked)
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]


def _byte_letters() -> list[str]:
    """The 256 printable characters that stand for bytes (Radford et al. 2019, GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [256 + k for k in range(256 - len(printable))]
    return [chr(code) for code in printable + others]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
