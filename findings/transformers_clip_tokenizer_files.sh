#!/usr/bin/env bash
# transformers: a CLIP tokenizer that transformers 5 saves has no vocab.json and no merges.txt, only tokenizer.json.
# CLIPTokenizer of transformers 4 reads the former alone, so that a pipeline of Stable Diffusion saved today, whose
# model_index.json names that class, ends there in a TypeError about None. With the two files beside, whose contents are
# in tokenizer.json, both versions read the folder and give the same tokens. Without them only CLIPTokenizerFast reads it.
#
#     findings/transformers_clip_tokenizer_files.sh     # installs into a temporary folder
#
# Seen with transformers 5.23.0 (writing) and 4.57.6 (reading). Fails where that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 5.23.0 4.57.6; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install --quiet "transformers==$version" protobuf==7.36.2
done
cat >"$work/write.py" <<'PYTHON'
import json
import sys
from pathlib import Path

from transformers import CLIPTokenizer

letters = [*"abc", *(f"{letter}</w>" for letter in "abc")]
vocabulary = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters, "ab</w>"])}
for name, with_files in (("saved", False), ("both", True)):
    folder = Path(name)
    CLIPTokenizer(vocab=vocabulary, merges=[("a", "b</w>")]).save_pretrained(folder)
    print(name, sorted(path.name for path in folder.iterdir()))
    if (folder / "vocab.json").exists() or (folder / "merges.txt").exists():
        sys.exit("it writes them")
    if with_files:
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")
PYTHON
cat >"$work/read.py" <<'PYTHON'
import sys

import transformers
from transformers import CLIPTokenizer, CLIPTokenizerFast

found = {}
for name in ("saved", "both"):
    for kind, tokenizer in (("slow", CLIPTokenizer), ("fast", CLIPTokenizerFast)):  # one class in transformers 5
        try:
            found[name, kind] = tokenizer.from_pretrained(name)("ab c").input_ids
        except TypeError as error:
            found[name, kind] = f"TypeError: {error}"
print(transformers.__version__, found)
slow = found["saved", "slow"]
fails = isinstance(slow, str) and "NoneType" in slow
same = found["both", "slow"] == found["both", "fast"] == found["saved", "fast"]
sys.exit((fails, same) != (transformers.__version__.startswith("4."), True))
PYTHON
cd "$work"
"$work/5.23.0/bin/python" write.py || { echo "transformers 5 does otherwise than stated" >&2; exit 1; }
for version in 5.23.0 4.57.6; do
    "$work/$version/bin/python" read.py || { echo "transformers $version does otherwise than stated" >&2; exit 1; }
done
