"""Small tokenizers that cover text fully, partly, or with an unknown token, and preparing data with them."""

import json
from pathlib import Path
from typing import Any

from data_pipeline.prepare import prepare
from data_pipeline.settings import PrepareConfig, SourceConfig
from data_pipeline.storage.prepared import PreparedData
from data_pipeline.tokenizing.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer
from data_pipeline.tokenizing.tokenizer_formats import SPLIT_PATTERN, byte_characters, byte_level, make_tokenizer_config

DOCUMENTS = ["abc abc", "ab 漢字 c", "漢字", "é abc é", "cab"]


LETTERS = {name: number for number, name in enumerate([END_OF_TEXT, *"abc "])}


FALLBACK = {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}


BYTES = {END_OF_TEXT: 0} | {name: byte + 1 for byte, name in byte_characters().items()}


BERT = {
    "type": "BertNormalizer",
    "clean_text": True,
    "handle_chinese_chars": True,
    "strip_accents": None,
    "lowercase": True,
}


Config = dict[str, Any]  # Any: JSON


def bpe(vocab: dict[str, int], **settings: object) -> Config:
    affixes = {"unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    return {
        "type": "BPE",
        "dropout": None,
        "fuse_unk": False,
        "byte_fallback": False,
        **affixes,
        "vocab": vocab,
        "merges": [],
        **settings,
    }


def tokenizer_of(model: Config, **stages: object) -> Config:
    return make_tokenizer_config({END_OF_TEXT: 0}, model, **stages)


def without(vocab: dict[str, int], *names: str) -> dict[str, int]:
    return {name: number for name, number in vocab.items() if name not in names}


def byte_level_without(*missing: int) -> Config:
    """A byte-level BPE that lacks some bytes."""
    names = byte_characters()
    return tokenizer_of(
        bpe(without(BYTES, *(names[byte] for byte in missing))), pre_tokenizer=byte_level(SPLIT_PATTERN)
    )


LOSSY: dict[str, Config] = {
    "characters": tokenizer_of(bpe(LETTERS)),
    "byte fallback of 253": tokenizer_of(
        bpe(LETTERS | without(FALLBACK, "<0xE6>", "<0xE5>", "<0xC3>"), byte_fallback=True)
    ),
    "253 bytes": byte_level_without(0xE6, 0xA9, 0xC0),
}


WITH_UNKNOWN_TOKEN: dict[str, Config] = {
    "bpe": tokenizer_of(bpe(LETTERS | {"<unk>": 5}, unk_token="<unk>")),
    "bpe fused": tokenizer_of(bpe(LETTERS | {"<unk>": 5}, unk_token="<unk>", fuse_unk=True)),
    "unigram": tokenizer_of(
        {"type": "Unigram", "unk_id": 5, "byte_fallback": False, "vocab": [[c, -1.0] for c in [*LETTERS, "<unk>"]]}
    ),
    "wordlevel": tokenizer_of(
        {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {END_OF_TEXT: 0, "abc": 1, "[UNK]": 2}},
        pre_tokenizer={"type": "Whitespace"},
    ),
    "wordpiece": tokenizer_of(
        {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {END_OF_TEXT: 0, "[UNK]": 1, "a": 2, "##b": 3, "##c": 4, "c": 5, "##a": 6},
        },
        normalizer=BERT,
        pre_tokenizer={"type": "BertPreTokenizer"},
    ),
}


COMPLETE: dict[str, Config] = {
    "bytes": byte_level_without(),
    "byte fallback": tokenizer_of(bpe(LETTERS | FALLBACK, byte_fallback=True)),
    "bytes with suffix, unknown is the end": tokenizer_of(
        bpe(
            BYTES | {f"{name}</w>": 257 + i for i, name in enumerate(BYTES)},
            end_of_word_suffix="</w>",
            unk_token=END_OF_TEXT,
        ),
        pre_tokenizer=byte_level(SPLIT_PATTERN),
    ),
    "unigram fallback": tokenizer_of(
        {
            "type": "Unigram",
            "unk_id": 1,
            "byte_fallback": True,
            "vocab": [[c, -1.0] for c in [END_OF_TEXT, "<unk>", "a", *FALLBACK]],
        }
    ),
}


def load(folder: Path, config: Config) -> Tokenizer:
    file = folder / "tokenizer-to-load.json"
    file.write_text(json.dumps(config))
    return load_tokenizer(file)


def prepared_with(folder: Path, config: Config, documents: list[str] = DOCUMENTS, **settings: Any) -> PreparedData:
    load(folder, config)
    (folder / "web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    defaults: dict[str, Any] = {
        "sources": (SourceConfig(kind="jsonl", paths=(str(folder / "web.jsonl"),)),),
        "tokenizer": folder / "tokenizer-to-load.json",
        "validation_fraction": 0,
        "workers": 1,
    }
    return prepare(folder / "data", PrepareConfig(**(defaults | settings)), keep_rejects=True)
