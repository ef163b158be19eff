"""Files of tokenizers that older versions of transformers read."""

from __future__ import annotations

import json
from pathlib import Path


def split_tokenizers(folder: Path) -> None:
    """Write the vocabulary and merges of a pipeline's BPE tokenizers as files of their own.

    transformers 5 saves them within `tokenizer.json` alone, where transformers 4 does not look for them. Files that
    are there stay as they are.
    """
    for path in folder.glob("*/tokenizer.json"):
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        vocabulary, merges = path.with_name("vocab.json"), path.with_name("merges.txt")
        if model.get("type") != "BPE" or vocabulary.exists() or merges.exists():
            continue
        vocabulary.write_text(json.dumps(model["vocab"], ensure_ascii=False) + "\n", encoding="utf-8")
        pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
        merges.write_text("#version: 0.2\n" + "".join(f"{pair}\n" for pair in pairs), encoding="utf-8")
