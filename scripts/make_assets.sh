#!/usr/bin/env bash
# Makes again what assets/ holds: the stories, and the tokenizer that is trained on them. Both are deterministic, so that
# nothing changes unless the generator or the trainer did.
set -euo pipefail
cd "$(dirname "$0")/.."
titan() { cargo run --release --quiet -- "$@"; }

titan write-stories --output assets/data/stories_train.json.zst --seed 1 --count 10000
titan write-stories --output assets/data/stories_validation.json.zst --seed 2 --count 500
titan train-tokenizer --output assets/tokenizer --vocab-size 2048 assets/data/stories_train.json.zst
